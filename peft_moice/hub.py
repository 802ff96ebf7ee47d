"""Adapters on the Hugging Face Hub, with a model card that says what they are and how they are loaded.

PEFT's own `model.push_to_hub` uploads an adapter with a card of blank fields, which does not mention the import that
registers MoICE; [`push_to_hub`] is the call to use in its place.
"""

import importlib.metadata
import json
import logging
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard, ModelCardData
from peft import PeftModel, TaskType
from peft.utils import CONFIG_NAME

from .config import Bases, MoICEConfig, RouterSpec, as_moice_config

logger = logging.getLogger(__name__)

TAGS = ("moice", "long-context")
PAPER = "https://arxiv.org/abs/2406.19598"

Table = str | Sequence[Mapping[str, Any]]


def push_to_hub(
    model: PeftModel,
    repo_id: str,
    *,
    adapter_name: str | None = None,
    base_model: str | None = None,
    recipe: Mapping[str, Any] | None = None,
    evaluation: Table | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str = "Upload MoICE adapter",
) -> str:
    """Upload one adapter and its model card to the Hub, in one commit. A card that is there already is replaced.

    Args:
        model: a model with MoICE adapters.
        repo_id: repository to push to, such as "user/name". Created if it does not exist.
        adapter_name: which adapter. Default: the active one.
        base_model: Hub id of the base model, needed where the base model was loaded from a local folder. Default: the
            name in the adapter's config.
        recipe: how it was trained, as names and values; a table in the card.
        evaluation: what was measured, as rows with equal keys or as Markdown; a table in the card.
        private: whether a new repository is private. Default: the organization's setting.
        token: access token, see `huggingface_hub.HfApi`.
        revision: branch to push to, created if it does not exist. Default: main.
        create_pr: open a pull request instead of committing to the branch. Default: False.
        commit_message: message of the commit.

    Returns:
        The URL of the commit.

    Raises:
        TypeError: the model is not a PEFT model.
        ValueError: it has no such MoICE adapter, or several are active and `adapter_name` is missing.
    """
    adapter_name = _adapter_of(model, adapter_name)
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None and not revision.startswith("refs/"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, selected_adapters=[adapter_name])
        # PEFT puts every adapter but "default" into a folder of its own; in a repository it stands at the top.
        adapter_folder = Path(folder) if adapter_name == "default" else Path(folder, adapter_name)
        base_model = _base_model_of(model, adapter_name, base_model)
        if base_model is not None:
            _rename_base_model(adapter_folder, base_model)
        write_model_card(
            model,
            adapter_folder,
            adapter_name=adapter_name,
            repo_id=repo_id,
            base_model=base_model,
            recipe=recipe,
            evaluation=evaluation,
        )
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=adapter_folder,
            commit_message=commit_message,
            revision=revision,
            create_pr=create_pr,
        )
    return commit.commit_url


def write_model_card(
    model: PeftModel,
    folder: str | os.PathLike[str],
    *,
    adapter_name: str | None = None,
    repo_id: str | None = None,
    base_model: str | None = None,
    recipe: Mapping[str, Any] | None = None,
    evaluation: Table | None = None,
) -> Path:
    """Write the model card of an adapter to `folder`/README.md, in place of the one that `save_pretrained` wrote.

    Args:
        model: a model with MoICE adapters.
        folder: where the adapter was saved.
        adapter_name: which adapter. Default: the active one.
        repo_id: what the snippet in the card loads. Default: `folder`.
        base_model: see [`push_to_hub`].
        recipe: see [`push_to_hub`].
        evaluation: see [`push_to_hub`].

    Returns:
        The path of the card.

    Raises:
        TypeError: the model is not a PEFT model.
        ValueError: see [`push_to_hub`]; or the rows of `evaluation` have different keys.
    """
    adapter_name = _adapter_of(model, adapter_name)
    config = as_moice_config(model.peft_config[adapter_name])
    base_model = _base_model_of(model, adapter_name, base_model)
    is_causal_lm = config.task_type == TaskType.CAUSAL_LM
    data = ModelCardData(
        library_name="peft",
        base_model=base_model,
        tags=[*TAGS, *([f"base_model:adapter:{base_model}"] if base_model else [])],
        pipeline_tag="text-generation" if is_causal_lm else None,
    )
    sections = [
        f"# MoICE routers{f' for {base_model}' if base_model else ''}",
        f"[MoICE]({PAPER}) lets every attention head mix several rotary base angles, chosen per token by a small "
        "router, so that the model uses all of a long context. This adapter holds the routers; the base model's "
        "weights are unchanged.",
        f"## Use\n\n{_snippet(str(repo_id or folder), base_model, is_causal_lm)}",
        f"## Adapter\n\n{_table(_facts(model, adapter_name))}",
    ]
    if recipe:
        sections.append(f"## Training\n\n{_table(_rows(recipe))}")
    if evaluation:
        text = evaluation if isinstance(evaluation, str) else _table(evaluation)
        sections.append(f"## Evaluation\n\n{text}")
    versions = {name: importlib.metadata.version(name) for name in ("peft", "transformers", "torch")}
    sections.append(f"## Versions\n\n{_table([{'package': k, 'version': v} for k, v in versions.items()])}")
    path = Path(folder, "README.md")
    path.parent.mkdir(parents=True, exist_ok=True)
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n").save(path)
    return path


def _adapter_of(model: PeftModel, adapter_name: str | None) -> str:
    if not isinstance(model, PeftModel):
        raise TypeError(
            f"The model has to be a PeftModel with a MoICE adapter, not {type(model).__name__}. (A merged model is an "
            "ordinary transformers model, with a `push_to_hub` of its own.)"
        )
    if adapter_name is None:
        active = model.active_adapters
        if len(active) != 1:
            raise ValueError(f"The adapters {active} are active; say which one is meant with `adapter_name`.")
        adapter_name = active[0]
    if not isinstance(model.peft_config.get(adapter_name), MoICEConfig):
        known = [name for name, config in model.peft_config.items() if isinstance(config, MoICEConfig)]
        raise ValueError(f"The model has no MoICE adapter called {adapter_name!r}; it has {known}.")
    return adapter_name


def _base_model_of(model: PeftModel, adapter_name: str, base_model: str | None) -> str | None:
    """The Hub id of the base model, or None if all that is known is a local folder."""
    name = base_model or model.peft_config[adapter_name].base_model_name_or_path
    if name and os.path.isdir(name):
        logger.warning(
            "The base model was loaded from the local folder %s, which nobody else has, so the model card does not "
            "name it. Give its Hub id as `base_model`.",
            name,
        )
        return None
    return name or None


def _rename_base_model(folder: Path, base_model: str) -> None:
    file = folder / CONFIG_NAME
    config = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**config, "base_model_name_or_path": base_model}, indent=2), encoding="utf-8")


def _snippet(repo_id: str, base_model: str | None, is_causal_lm: bool) -> str:
    load = "import peft_moice  # registers MoICE with PEFT; without it PEFT raises KeyError: 'MOICE'\n"
    if is_causal_lm and base_model:
        load += (
            "from peft import AutoPeftModelForCausalLM\n"
            "from transformers import AutoTokenizer\n\n"
            f'model = AutoPeftModelForCausalLM.from_pretrained("{repo_id}")\n'
            f'tokenizer = AutoTokenizer.from_pretrained("{base_model}")\n'
        )
    else:
        load += (
            "from peft import PeftModel\n\n"
            "base_model = ...  # the model that the adapter was trained on\n"
            f'model = PeftModel.from_pretrained(base_model, "{repo_id}")\n'
        )
    return f"```python\n{load}```"


def _facts(model: PeftModel, adapter_name: str) -> list[dict[str, Any]]:
    config = as_moice_config(model.peft_config[adapter_name])
    specs = config.router_specs()
    facts: dict[str, Any] = {}
    for number, spec in enumerate(specs, start=1):
        which = "" if len(specs) == 1 else f"Router {number} of {len(specs)}, share {spec.weight:g}: "
        facts |= {f"{which}{name}": value for name, value in _router_facts(spec).items()}
    weights = [parameter for name, parameter in model.named_parameters() if f".moice_router.{adapter_name}." in name]
    facts["Router parameters"] = f"{sum(weight.numel() for weight in weights):,}"
    return _rows(facts)


def _router_facts(spec: RouterSpec) -> dict[str, Any]:
    first = next(iter(spec.rope_bases.values())) if isinstance(spec.rope_bases, dict) else spec.rope_bases
    return {
        "Base angles (`rope_theta`)": _angles(spec.rope_bases),
        "Angles per head and token (`top_k`)": f"{spec.top_k} of {len(first)}",
        "Routers": "one per head" if spec.router_scope == "head" else "one per layer, shared by its heads",
        "Hidden size of a router": spec.router_dim,
        "Identity scale": "one per head" if spec.identity else "none",
    }


def _angles(bases: Bases) -> str:
    if isinstance(bases, dict):
        return "; ".join(f"{layer_type}: {_angles(values)}" for layer_type, values in bases.items())
    return ", ".join(f"{base:.12g}" for base in bases)


def _rows(values: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [{"": name, "value": value} for name, value in values.items()]


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    columns = list(rows[0])
    for row in rows:
        if list(row) != columns:
            raise ValueError(f"A table needs the same columns in every row, but one has {list(row)}, not {columns}.")
    lines = [columns, ["---"] * len(columns), *([row[column] for column in columns] for row in rows)]
    return "\n".join("| " + " | ".join(_cell(value) for value in line) + " |" for line in lines)


def _cell(value: Any) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")
