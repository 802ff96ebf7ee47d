"""What an adapted model of any family is checked for. Every check tells how far off the model is, and its bound."""

import copy
import functools
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import families
import torch
from families import tokens
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, DynamicCache, StaticCache
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import peft_moice
from peft_moice import MoICEConfig, MoICELayer
from peft_moice.attention.interface import uses_attention_interface
from peft_moice.probing import attention_module_names

THETA_FACTOR = 3.0


@dataclass
class Outcome:
    """How one feature of one family came out.

    Attributes:
        status: "exact", "not equal", "refused" (by the library), "base cannot" (the model itself, without an adapter)
            or "not tried".
        detail: the figure, or the reason.
    """

    status: str
    detail: str = ""


@dataclass
class Feature:
    """A check.

    Attributes:
        says: what holds, in a few words.
        check: takes `build`, which gives a model of the family (not to be changed), the family and a folder; returns
            how far off the model is.
        bound: the largest figure that counts as exact.
        of_base: whether the base model can be checked for the same.
    """

    says: str
    check: Callable[[Callable, str, Path], float]
    bound: float = 1e-5
    of_base: bool = True


class NotApplicable(Exception):
    """The base model gives nothing to check."""


# Making a model takes longer than a check. Checks that change a model make a copy of it first.
tiny_model = functools.lru_cache(maxsize=2)(families.tiny_model)


@functools.lru_cache(maxsize=3)
def adapted_model(family: str, theta_factor: float | None = None, **options) -> PeftModel:
    """The family with a mixture, or under the one angle `theta_factor` times its own."""
    config = mixture(**options) if theta_factor is None else MoICEConfig(base_multipliers=[theta_factor])
    model = copy.deepcopy(tiny_model(family))
    torch.manual_seed(1)
    return get_peft_model(model, config).eval()


def mixture(**options) -> MoICEConfig:
    """Three angles, two of them per token, with routers that decide from the start."""
    return MoICEConfig(**{"base_multipliers": [1.0, 4.0, 0.25], "top_k": 2, "init_weights": False, **options})


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference, as a share of the largest value. Logits that the model bars are left out."""
    actual, expected = actual.detach().float(), expected.detach().float()
    barred = expected < torch.finfo(torch.bfloat16).min / 2
    difference = (actual - expected).masked_fill(barred, 0)
    return (difference.abs().max() / expected.masked_fill(barred, 0).abs().max()).item()


def logits_of(model, ids: torch.Tensor | None = None, **options) -> torch.Tensor:
    return model(input_ids=tokens() if ids is None else ids, **options).logits


def logits_with_cache(model, make_cache: Callable | None = None) -> torch.Tensor:
    """Logits of tokens all but the last three of which are fed at once and the rest one by one."""
    config = model.config.get_text_config(decoder=True)
    # MiniMax makes a cache of its own kind.
    cache = (
        make_cache(config) if make_cache else None if config.model_type == "minimax" else DynamicCache(config=config)
    )
    ids, logits, start = tokens(), [], 0
    for piece in ids.split((ids.shape[1] - 3, 1, 1, 1), dim=1):
        # Passed as generation does, because some families start from 0 at every call.
        position_ids = torch.arange(start, start + piece.shape[1])[None].expand(piece.shape)
        output = model(input_ids=piece, position_ids=position_ids, past_key_values=cache, use_cache=True)
        cache = getattr(output, "past_key_values", cache)
        start += piece.shape[1]
        logits.append(output.logits)
    return torch.cat(logits, dim=1)


@torch.no_grad()
def equals_a_model_with_that_rope_theta(build, family, folder) -> float:
    expected = logits_of(tiny_model(family, theta_factor=THETA_FACTOR))
    if relative_error(logits_of(tiny_model(family)), expected) < 1e-4:
        raise NotApplicable("the angle does not matter in the tiny model")
    return relative_error(logits_of(adapted_model(family, THETA_FACTOR)), expected)


@torch.no_grad()
def equals_the_reference(build, family, folder) -> float:
    return relative_error(logits_of(build()), logits_of(build(implementation="reference")))


@torch.no_grad()
def both_hold_with_a_cache(build, family, folder) -> float:
    turned = logits_with_cache(tiny_model(family, theta_factor=THETA_FACTOR))
    reference = logits_with_cache(build(implementation="reference"))
    return max(
        relative_error(logits_with_cache(adapted_model(family, THETA_FACTOR)), turned),
        relative_error(logits_with_cache(build()), reference),
    )


@torch.no_grad()
def cached_decoding_equals_the_whole(build, family, folder) -> float:
    model = build()
    return relative_error(logits_with_cache(model), logits_of(model, use_cache=False))


@torch.no_grad()
def static_cache_equals_the_whole(build, family, folder) -> float:
    model = build()
    logits = logits_with_cache(model, functools.partial(StaticCache, max_cache_len=32))
    return relative_error(logits, logits_of(model, use_cache=False))


@torch.no_grad()
def left_padded_rows_equal_single_rows(build, family, folder) -> float:
    model, ids, padding = build(), tokens(), 7
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    # As generation passes them: routers read queries that are rotated by these positions.
    position_ids = (mask.cumsum(dim=1) - 1).clamp(min=0)
    padded = logits_of(model, ids * mask, attention_mask=mask, position_ids=position_ids)
    return max(
        relative_error(padded[:1, padding:], logits_of(model, ids[:1, padding:])),
        relative_error(padded[1:], logits_of(model, ids[1:])),
    )


@torch.no_grad()
def eager_attention_equals_the_default(build, family, folder) -> float:
    model = copy.deepcopy(build())
    expected = logits_of(model)
    _set_attention(model, "eager")
    return relative_error(logits_of(model), expected)


@torch.no_grad()
def eager_probabilities_sum_to_one(build, family, folder) -> float:
    model = copy.deepcopy(build())
    _set_attention(model, "eager")
    attentions = model(input_ids=tokens(), output_attentions=True).attentions
    sums = [layer.sum(dim=-1) for layer in attentions or () if layer is not None]
    if not sums:
        raise ValueError("no probabilities are returned")
    return max((layer - 1).abs().max().item() for layer in sums)


@torch.no_grad()
def bfloat16_costs_what_it_costs_the_base_model(build, family, folder) -> float:
    """Median over tokens of the error in bfloat16, as a multiple of the base model's own.

    The median, because rounding sends single tokens to other experts in models that have some.
    """
    ids = tokens(batch=8)

    def error(model: torch.nn.Module) -> float:
        expected = logits_of(model, ids).float()
        barred = expected < torch.finfo(torch.bfloat16).min / 2
        # PEFT keeps adapters in float32.
        routers = {name: parameter.data for name, parameter in model.named_parameters() if "moice_" in name}
        model = copy.deepcopy(model).to(torch.bfloat16)
        for name, values in routers.items():
            model.get_parameter(name).data = values
        difference = (logits_of(model, ids).float() - expected).masked_fill(barred, 0)
        return difference.abs().mean(dim=-1).median().item()

    return error(build()) / error(tiny_model(family))


def routers_train(build, family, folder) -> float:
    """Share of trainable tensors whose gradient is missing, zero or not finite, and of frozen ones that get one."""
    model = copy.deepcopy(build()).train()
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    trained = [
        parameter.grad is not None and bool(parameter.grad.isfinite().all() and parameter.grad.abs().max() > 0)
        for name, parameter in model.named_parameters()
        if "moice_" in name or (not isinstance(model, PeftModel) and "embed" in name)
    ]
    frozen = [
        parameter.grad is None
        for name, parameter in model.named_parameters()
        if "moice_" not in name and isinstance(model, PeftModel)
    ]
    return 1 - sum(trained + frozen) / len(trained + frozen)


@torch.no_grad()
def adapter_reloads(build, family, folder) -> float:
    model = build()
    expected = logits_of(model)
    model.save_pretrained(folder)
    return relative_error(
        logits_of(PeftModel.from_pretrained(copy.deepcopy(tiny_model(family)), folder).eval()), expected
    )


@torch.no_grad()
def merged_model_reloads(build, family, folder) -> float:
    model = copy.deepcopy(build())
    expected = logits_of(model)
    if isinstance(model, PeftModel):
        model = model.merge_and_unload()
    model.save_pretrained(folder)
    causal = family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    loaded = (AutoModelForCausalLM if causal else AutoModelForImageTextToText).from_pretrained(folder).eval()
    return max(relative_error(logits_of(model), expected), relative_error(logits_of(loaded), expected))


@torch.no_grad()
def positions_of_images_are_refused(build, family, folder) -> float:
    """1 if a model with positions in three dimensions takes those of an image."""
    own, ids = tiny_model(family), tokens(length=8)
    text = torch.arange(8)[None, None].expand(3, 2, 8)
    image = text.clone()
    image[1, :, 3:6] = 3
    try:
        differ = not torch.equal(logits_of(own, ids, position_ids=text), logits_of(own, ids, position_ids=image))
    except Exception:
        differ = False
    if not differ:
        raise NotApplicable("its positions have one dimension")
    try:
        logits_of(build(), ids, position_ids=image)
    except ValueError as error:
        return float("mRoPE" not in str(error))
    return 1.0


FEATURES = {
    "one angle": Feature("equals a model with that `rope_theta`", equals_a_model_with_that_rope_theta, of_base=False),
    "mixture": Feature("equals the implementation `reference`", equals_the_reference),
    "both with a cache": Feature("the same two, decoding with a cache", both_hold_with_a_cache),
    "cached decoding": Feature("equals the whole sequence at once", cached_decoding_equals_the_whole),
    "static cache": Feature("the same with a `StaticCache`", static_cache_equals_the_whole),
    "left padding": Feature(
        "rows equal single rows, with `position_ids` as generation passes them", left_padded_rows_equal_single_rows
    ),
    "eager": Feature("equals the default attention", eager_attention_equals_the_default),
    "probabilities": Feature(
        "mixed probabilities of eager attention sum to one; off by at most", eager_probabilities_sum_to_one
    ),
    "bfloat16": Feature(
        "error of the median token, as a multiple of the base model's own",
        bfloat16_costs_what_it_costs_the_base_model,
        bound=1.25,
    ),
    "training": Feature(
        "share of routers without a finite, non-zero gradient after one step, and of other weights with one",
        routers_train,
        bound=0.0,
    ),
    "adapter reloads": Feature("`save_pretrained`, `PeftModel.from_pretrained`", adapter_reloads, of_base=False),
    "merged model reloads": Feature("`merge_and_unload`, `save_pretrained`, `from_pretrained`", merged_model_reloads),
    "positions of images": Feature(
        "mRoPE in more than one dimension is refused (0) or not (1)", positions_of_images_are_refused, bound=0.0
    ),
}


@functools.lru_cache(maxsize=1)
def injection(family: str) -> tuple[Outcome, dict[str, int]]:
    """Whether the family can be adapted with automatic targets, and its numbers of attention modules."""
    if family in families.WHY_NOT:
        return Outcome("not tried", families.WHY_NOT[family]), {}
    try:
        model = families.model_without_weights(family)
        too_large = sum(parameter.numel() for parameter in model.parameters()) > families.LARGEST_MODEL
        if not too_large:
            model = tiny_model(family)
    except Exception as error:
        return Outcome("not tried", f"{type(error).__name__}: {error}"), {}
    inside = len(attention_module_names(model))
    everywhere = sum(map(uses_attention_interface, model.modules()))
    try:
        model = get_peft_model(model, mixture()) if too_large else adapted_model(family)
    except ValueError as error:
        reason = str(error).removeprefix(f"MoICE cannot be applied to {type(model).__name__}: ")
        return Outcome("refused", reason.split(". ")[0].removeprefix("MoICE cannot be applied to ")), {}
    if too_large:
        return Outcome("not tried", "its smallest model is too large"), {}
    count = sum(isinstance(module, MoICELayer) for module in model.modules())
    return Outcome("exact"), {"adapted": count, "left out": inside - count, "outside": everywhere - inside}


def try_feature(family: str, feature: str, folder: Path) -> Outcome:
    """Check one feature of one family; where it fails, see whether the base model has it."""
    spec = FEATURES[feature]
    outcome = injection(family)[0]
    if outcome.status != "exact":
        return outcome
    figure, failure = _figure(spec, functools.partial(adapted_model, family), family, folder)
    if failure is None and figure <= spec.bound:
        return Outcome("exact", f"{figure:.1e}")
    if isinstance(failure, NotApplicable):
        return Outcome("base cannot", str(failure))
    if spec.of_base:
        own_figure, own_failure = _figure(spec, lambda **_: tiny_model(family), family, folder / "base")
        if own_failure is not None:
            return Outcome("base cannot", _describe(own_failure))
        if not own_figure <= spec.bound:
            return Outcome("base cannot", f"off by {own_figure:.1e}")
    if failure is None:
        return Outcome("not equal", f"off by {figure:.1e}")
    if isinstance(failure, ValueError) and _raised_by_the_library(failure):
        return Outcome("refused", str(failure))
    return Outcome("not equal", _describe(failure))


def _figure(spec: Feature, build: Callable, family: str, folder: Path) -> tuple[float, Exception | None]:
    try:
        return spec.check(build, family, folder), None
    except Exception as error:
        return float("nan"), error


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _raised_by_the_library(error: Exception) -> bool:
    return Path(traceback.extract_tb(error.__traceback__)[-1].filename).is_relative_to(
        Path(peft_moice.__file__).parent
    )


def _set_attention(model, name: str) -> None:
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    base.set_attn_implementation(name)
