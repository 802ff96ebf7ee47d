"""`peft-moice angles`: which base angles for a model?"""

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..evaluation import encode_chat, sample_facts
from ..evaluation.angles import OwnAngle, own_angles, score_angles, search_angles
from ..evaluation.plotting import plot_waveforms
from .models import ModelArguments, load_model, load_tokenizer
from .parsing import Outcome, Parser, UsageError, can_draw, option, output_folder

SUMMARY = "choose base angles, by RoPE's waveforms and by measuring a model"
_MOST_DRAWN = 7

_EPILOG = """Two searches. By waveform, after Attention Buckets (arXiv 2312.04455): angles whose peaks
fill each other's troughs; needs no model. By measurement, with --model: the loss on answers about lists of facts under
each angle alone, and angles that complement each other, in the order of their use. `peft-moice train --angles` takes
multiples of the model's own angle.

examples
  peft-moice angles --rope_theta 10000 --head_dim 128 --context_length 2048
  peft-moice angles --model HuggingFaceTB/SmolLM2-135M-Instruct --context_length 1024"""


@dataclass
class Arguments(ModelArguments):
    """Whose angles to choose."""

    model: str | None = option("Folder or Hub id of a model to measure.", None)
    head_dim: int = option("Rotated dimensions of a head; read from --model if given.", 128)
    rope_theta: float = option("Own angle; read from --model if given.", 10_000.0)
    context_length: int = option("Distances that matter, in tokens.", 2048)
    num_experts: int = option("Number of angles, the model's own included.", 7)
    facts: int = option("Facts in a prompt of the measurement.", 30)
    prompts: int = option("Prompts of the measurement.", 10)
    output_dir: str = option("Folder for the picture.", "outputs/angles")


def parser() -> Parser:
    """Of the command's arguments."""
    return Parser("angles", (Arguments,), usage="[--model MODEL] [options] [--json]", summary=SUMMARY, epilog=_EPILOG)


def run(args: Arguments) -> Outcome:
    """Search, and measure if there is a model."""
    # What does not go shows before a model is loaded.
    search_angles(args.head_dim, args.rope_theta, args.context_length, args.num_experts)
    sample_facts(args.facts, random.Random(0))
    if args.prompts < 1:
        raise UsageError(f"--prompts is {args.prompts}, but has to be at least 1.")
    output_dir = output_folder(args.output_dir)
    own, model, tokenizer = [OwnAngle(args.rope_theta, args.head_dim, None)], None, None
    if args.model is not None:
        tokenizer = load_tokenizer(args.model)
        model = load_model(args.model, args.dtype, quantization=args.quantization()).eval()
        own = own_angles(model)
    searched = [_by_waveform(angle, args) for angle in own]
    if is_drawn := can_draw():
        _draw(searched, args.context_length, output_dir)
    lines = [_waveform_in_words(found) for found in searched]
    values: dict[str, Any] = {"by_waveform": searched, "by_measurement": None}
    if len(own) > 1:
        lines.append(
            "Nothing is measured: the layer types have different angles, and the search varies one scale for all."
        )
    elif model is not None:
        try:
            scores = score_angles(model, lambda candidate: _answer_losses(candidate, tokenizer, args))
        except KeyboardInterrupt:
            lines.append("Interrupted before the measurement was finished.")
            return Outcome("\n".join(lines), values, interrupted=True)
        chosen = scores.best(min(args.num_experts, len(scores.rope_bases)))
        means = {
            f"{base / own[0].rope_theta:g}": float(loss)
            for base, loss in zip(scores.rope_bases, scores.losses.mean(dim=1), strict=True)
        }
        lines += [f"  {multiple:>6} times: mean loss {loss:.3f}" for multiple, loss in means.items()]
        lines.append(f"By measurement, in the order of their use: {_multiples(chosen)}")
        values["by_measurement"] = {"rope_bases": chosen, "multiples": _multiples(chosen), "mean_losses": means}
    if is_drawn:
        lines.append(f"Pictures of the waveforms are in {output_dir}.")
    return Outcome("\n".join(lines), values)


def _draw(searched: list[dict[str, Any]], context_length: int, output_dir: Path) -> None:
    """Pictures of the choices by waveform."""
    for found in searched:
        figure = plot_waveforms(found["rotary_dim"], found["rope_bases"][:_MOST_DRAWN], context_length)
        name = "waveforms" if found["layer_type"] is None else f"waveforms_{found['layer_type']}"
        figure.savefig(output_dir / f"{name}.png", dpi=150)


def _by_waveform(own: OwnAngle, args: Arguments) -> dict[str, Any]:
    """Search by waveform."""
    angles = search_angles(own.rotary_dim, own.rope_theta, args.context_length, args.num_experts)
    found = {"layer_type": own.layer_type, "rotary_dim": own.rotary_dim, "rope_bases": angles}
    found["multiples"] = _multiples(angles)
    return found


def _waveform_in_words(found: dict[str, Any]) -> str:
    where = "" if found["layer_type"] is None else f" in layers of type {found['layer_type']}"
    angles = found["rope_bases"]
    return (
        f"By waveform{where}, over {found['rotary_dim']} rotated dimensions: {angles}, times {angles[0]:g}: "
        f"{found['multiples']}"
    )


def _multiples(angles: list[float]) -> list[float]:
    return [round(angle / angles[0], 3) for angle in angles]


def _answer_losses(model: Any, tokenizer: Any, args: Arguments) -> list[float]:
    """Loss on the answer to each of the prompts."""
    losses = []
    rng = random.Random(0)
    for _ in range(args.prompts):
        chat = encode_chat(tokenizer, sample_facts(args.facts, rng), [rng.randrange(args.facts)])
        ids = torch.tensor([chat.input_ids], device=model.device)
        labels = ids.masked_fill(~torch.tensor([chat.is_answer], device=model.device), -100)
        losses.append(float(model(input_ids=ids, labels=labels).loss))
    return losses
