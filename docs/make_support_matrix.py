"""Writes docs/support.md: what MoICE does with every decoder family that the installed transformers knows.

    python docs/make_support_matrix.py

Every family is tried on a tiny random model (`tests/families.py`), with automatic targets: adapted with one angle, it
is compared to the same weights under that `rope_theta`. No network is needed; it takes a few minutes on one core.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from peft import get_peft_model
from tqdm.auto import tqdm
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from families import model_class, tiny_config, tiny_model, tokens  # noqa: E402

from peft_moice import MoICEConfig, MoICELayer  # noqa: E402
from peft_moice.probe import attention_module_names  # noqa: E402

THETA_FACTOR = 3.0
TOLERANCE = 1e-5
LARGEST_MODEL = 20_000_000
TITLES = {
    "exact": "Supported: the adapted model equals one with another `rope_theta`",
    "inexact": "Adapted, but not equal to a model with another `rope_theta`",
    "refused": "Refused at injection",
    "not tried": "Not tried: no tiny model for the comparison could be made",
}


@dataclass
class Outcome:
    status: str
    adapted: int = 0
    left_out: int = 0
    detail: str = ""


def try_family(model_type: str) -> Outcome:
    """Adapt a tiny model of the family and compare it with the same weights under another base angle."""
    try:
        cls = model_class(model_type)
        with torch.device("meta"):
            size = sum(parameter.numel() for parameter in cls(tiny_config(cls.config_class)).parameters())
        if size > LARGEST_MODEL:
            return Outcome("not tried", detail=f"{size:,} parameters")
        model, turned = tiny_model(model_type), tiny_model(model_type, theta_factor=THETA_FACTOR)
        expected = turned(input_ids=tokens()).logits
        has_effect = _error(model(input_ids=tokens()).logits, expected) > 10 * TOLERANCE
    except Exception as error:
        return Outcome("not tried", detail=f"{type(error).__name__}: {error}")
    names = attention_module_names(model)
    try:
        model = get_peft_model(model, MoICEConfig(base_multipliers=[THETA_FACTOR]))
    except ValueError as error:
        reason = str(error).split(": ", 1)[1].split(". ")[0]
        return Outcome("refused", detail=reason)
    adapted = sum(isinstance(module, MoICELayer) for module in model.modules())
    if not has_effect:
        return Outcome("not tried", detail="the base angle changes nothing in the tiny model")
    error = _error(model(input_ids=tokens()).logits, expected)
    return Outcome("exact" if error < TOLERANCE else "inexact", adapted, len(names) - adapted)


def _error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def write_matrix(outcomes: dict[str, Outcome], path: Path) -> None:
    lines = [
        "# Families of models",
        "",
        f"transformers {transformers.__version__}, PyTorch {torch.__version__.split('+')[0]}, float32 on the CPU. "
        "Written by `python docs/make_support_matrix.py`; do not edit.",
        "",
        f"A family is *exact* if a tiny random model with automatic targets and one angle, {THETA_FACTOR:g} times its "
        f"own, gives the logits of the same weights under that `rope_theta`, up to {TOLERANCE:g} of the largest. "
        "Layers without rotary embedding are left out by themselves. `tests/test_families.py` tests the same, besides "
        "mixtures of angles and decoding with a cache.",
        "",
    ]
    for status, title in TITLES.items():
        members = {family: outcome for family, outcome in outcomes.items() if outcome.status == status}
        if not members:
            continue
        lines += [f"## {title} ({len(members)})", ""]
        if status in ("exact", "inexact"):
            lines += ["| family | attention layers adapted | left out |", "|---|---|---|"]
            lines += [f"| {f} | {o.adapted} | {o.left_out or ''} |" for f, o in members.items()]
        else:
            lines += ["| family | reason |", "|---|---|"]
            lines += [f"| {f} | {_one_line(o.detail)} |" for f, o in members.items()]
        lines.append("")
    path.write_text("\n".join(lines))


def _one_line(text: str) -> str:
    text = " ".join(text.split()).replace("|", "\\|")
    return text if len(text) <= 160 else text[:160] + " ..."


@torch.no_grad()
def main() -> None:
    transformers.logging.set_verbosity_error()
    families = sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES})
    outcomes = {family: try_family(family) for family in tqdm(families)}
    write_matrix(outcomes, ROOT / "docs" / "support.md")


if __name__ == "__main__":
    main()
