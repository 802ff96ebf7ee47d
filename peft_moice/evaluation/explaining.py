"""Which base angles the routers choose for the tokens of a text, as numbers and as a picture."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedTokenizerBase

from ..probing.evaluation_mode import evaluating
from ..rope.rules import Ropes, expert_in_words
from ..routing.mixture import LayerMixture, MixesAngles, RouterRecord, in_columns
from ..standalone.built_in import ROUTERS_NAME

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Explanation:
    """What the routers of a model decided along a text.

    Attributes:
        tokens: the S tokens, as text.
        gates: `[S, L, H, N]` in float32, the share of each of N base angles in each of H heads of the L layers with
            routers. They sum to one over N, and lie in 0 to 1 unless an identity scale does not.
        rope_bases: the N base angles of each of these layers; the model's own is the first, except in a mixture of
            several adapters, where they ascend. Ropes stand as pairs of names and values.
        layers: names of these layers' attention modules.
    """

    tokens: list[str]
    gates: torch.Tensor
    rope_bases: list[Ropes]
    layers: list[str]

    def plot(self, layer: int | None = None, head: int | None = None) -> "Figure":
        """Draw how the base angles share the gates along the text.

        Args:
            layer: which of the layers, counted from 0 over those with routers. Default: their mean.
            head: which head. Default: the mean over heads.

        Raises:
            ImportError: matplotlib is not installed; it comes with `peft_moice[plot]`.
            IndexError: there is no such layer or head.
            ValueError: there are more than seven base angles, or layers of other angles would be averaged.
        """
        from .plotting import plot_gates

        if layer is None and len(set(self.rope_bases)) > 1:
            raise ValueError("The layers have different base angles, and no mean over them. Give one as `layer`.")
        gates = self.gates.mean(dim=1) if layer is None else self.gates[:, layer]
        gates = gates.mean(dim=1) if head is None else gates[:, head]
        where = "mean over layers" if layer is None else self.layers[layer]
        which = "mean over heads" if head is None else f"head {head}"
        names = [expert_in_words(base) for base in self.rope_bases[layer or 0]]
        return plot_gates(gates, self.tokens, names=names, title=f"{where}, {which}")


def explain(model: Any, tokenizer: PreTrainedTokenizerBase, text: str) -> Explanation:
    """Run `model` on `text` once and keep what its routers decide.

    ```python
    explanation = peft_moice.explain(model, tokenizer, "The access code of Ada is 31415.")
    explanation.gates[-1].mean(dim=(0, 1))  # the last token's base angles, as a mean over layers and heads
    explanation.plot().savefig("gates.png")
    ```

    Args:
        model: a model with a MoICE adapter, or with routers built in. Several active adapters are explained as the
            one mixture that they make.
        tokenizer: the model's tokenizer.
        text: what to run it on. Special tokens are added as the tokenizer does it.

    Raises:
        TypeError: `text` is not one string.
        ValueError: no routers are at work in the model, its layers have different numbers of base angles, or the text
            has no tokens.
    """
    if not isinstance(text, str):
        raise TypeError(f"`text` is a {type(text).__name__}, but has to be one string. Explain texts one by one.")
    input_ids = torch.tensor(tokenizer(text)["input_ids"], dtype=torch.long, device="cpu")
    if not len(input_ids):
        raise ValueError(f"The text {text!r} has no tokens. Give a longer one.")
    passed = records_along(model, input_ids)
    if not passed:
        raise ValueError(
            "No routers are at work in this model. Load an adapter with `PeftModel.from_pretrained`, or enable it."
        )
    mixtures = [LayerMixture([record.share for record in records], layer.rope) for layer, records in passed.values()]
    rope_bases = [mixture.rope_bases() for mixture in mixtures]
    if len({len(bases) for bases in rope_bases}) > 1:
        raise ValueError(
            f"The layers have {sorted({len(bases) for bases in rope_bases})} base angles, which make no one tensor. "
            "Use `evaluation.gates_along`, which gives one for each layer."
        )
    gates = [
        torch.stack([_weighted(bases, layer, record) for record in records]).sum(dim=0)
        for bases, (layer, records) in zip(rope_bases, passed.values(), strict=True)
    ]
    return Explanation(
        tokens=[str(tokenizer.decode([index])) for index in input_ids.tolist()],
        gates=torch.stack([gate.permute(1, 0, 2) for gate in gates], dim=1),
        rope_bases=rope_bases,
        layers=[name.removesuffix(f".{ROUTERS_NAME}").removeprefix("base_model.model.") for name in passed],
    )


def _weighted(rope_bases: Ropes, layer: MixesAngles, record: RouterRecord) -> torch.Tensor:
    """The gates `[H, S, N]` of one router over all base angles of its layer, times its share."""
    columns = [rope_bases.index(base) for base in record.share.spec.bases_of(layer.rope.layer_type)]
    return record.share.weight * in_columns(record.gates[0].float().cpu(), columns, len(rope_bases))


def gates_along(model: Any, input_ids: torch.Tensor, adapter_name: str = "default") -> dict[str, torch.Tensor]:
    """Gates `[H, S, N]` of each adapted layer, by the layer's name, in the order of layers.

    Args:
        model: a model with MoICE routers.
        input_ids: one sequence `[S]` of token ids.
        adapter_name: whose routers. Those of a mean of adapters are called "NAME.0", "NAME.1", ..., and those of a
            merged model "0", "1", .... Default: "default".

    Raises:
        ValueError: no routers of this name are at work, or `input_ids` are not one sequence.
    """
    if input_ids.dim() != 1:
        raise ValueError(
            f"`input_ids` has the shape {tuple(input_ids.shape)}; give one sequence `[S]`, a row of a batch."
        )
    passed = records_along(model, input_ids)
    gates = {
        name: record.gates[0].float().cpu()
        for name, (_, records) in passed.items()
        for record in records
        if record.share.name == adapter_name
    }
    if not gates:
        known = sorted({record.share.name for _, records in passed.values() for record in records})
        raise ValueError(
            f"No layer of this model has routers of the name {adapter_name!r} at work; those at work are {known}. "
            "Give one of these names as `adapter_name`, or activate the adapter."
        )
    return gates


def records_along(model: Any, input_ids: torch.Tensor) -> dict[str, tuple[MixesAngles, list[RouterRecord]]]:
    """The layers whose routers took part in a pass over `input_ids` `[S]`, by name, and what these recorded."""
    names = {module: name for name, module in model.named_modules() if isinstance(module, MixesAngles)}
    collector = _Collector()
    before = {layer: layer.recorder for layer in names}
    try:
        with evaluating(model):
            for layer in names:
                layer.recorder = collector
            model(input_ids=input_ids[None].to(model.device), use_cache=False, logits_to_keep=1)
    finally:
        for layer, recorder in before.items():
            layer.recorder = recorder
    return {name: (layer, collector.records[layer]) for layer, name in names.items() if layer in collector.records}


class _Collector:
    """Keeps the records of a pass."""

    def __init__(self) -> None:
        self.records: dict[MixesAngles, list[RouterRecord]] = {}

    def take(self, layer: MixesAngles, records: list[RouterRecord]) -> None:
        self.records[layer] = records
