"""Learns, by running an attention module on a few tokens, how its rotary embedding acts.

A layer is run twice, under the model's own base angle and under another, up to its call of the attention function.
Equal queries and keys mean that the layer has no rotary embedding; queries and keys that differ by exactly the
rotation predicted from the inverse frequencies tell the layout; anything else cannot be supported. Where the rope type
changes its angles with the length (longrope), both sets are tried. That the model then runs its layers with that
rotary embedding, its frequencies and its positions is seen by running it. No list of model families is needed.
"""

import inspect
import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..attention.interface import uses_attention_interface
from ..rope import LayerRope, RotaryLayout
from ..rope.frequencies import inverse_frequencies, original_length, rope_parameters, rotary_with_theta
from ..rope.own_rotary import OwnRotary
from .attention_modules import explain_target
from .layouts import Capture, best_layout, error_of, explains
from .observing import Observation, observe
from .running import UnsupportedLayerError, position_embeddings_of, run_up_to_attention

logger = logging.getLogger(__name__)

_THETA_FACTOR = 4.0
_POSITIONS = (0, 1, 3, 8, 20, 50)
_OTHER_STATES = {"key_value_states", "encoder_hidden_states", "cross_attention_states"}
NO_ROTARY = "a rotary embedding"
OTHER_KEYS = "keys of its own tokens alone"


@dataclass
class LayerPlan:
    """What the probe learned about one attention module.

    Attributes:
        rope: the layer's rotary embedding, or None if the layer is to be left as it is.
        num_heads: H, number of query heads; 0 if the layer is left as it is.
        head_dim: D, size of a query vector; likewise.
        lacks: what a layer that is left as it is does not have.
    """

    rope: LayerRope | None
    num_heads: int = 0
    head_dim: int = 0
    lacks: str = NO_ROTARY


class LayerProbe:
    """Probes the attention modules of one model.

    Args:
        model: the model that holds them.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self._ropes: dict[tuple[int, str | None, RotaryLayout], LayerRope] = {}
        # Rotary embeddings by where they hang, so that layers share what is known of them.
        self._rotaries: dict[tuple[int, str], OwnRotary] = {}
        # Some families hand keys and values from layer to layer; one such hand-over per angle and set of positions.
        self._shared_keys: dict[tuple[float, tuple[int, ...]], dict[torch.dtype, dict[str, Any]]] = {}
        self._observations: dict[nn.Module, Observation] | None = None
        self._why_unobserved: str | None = None
        # Whether attention modules of a class run without position embeddings too.
        self._optional: dict[type[nn.Module], bool] = {}

    def plan(self, name: str) -> LayerPlan:
        """Probe the attention module called `name`. Layers with equal rotary embeddings share one [`LayerRope`].

        Raises:
            UnsupportedLayerError: the layer's position encoding cannot be rotated to other base angles; names the
                layer, the reason and the way out.
        """
        if not uses_attention_interface(self.model.get_submodule(name)):
            raise UnsupportedLayerError(explain_target(self.model, name))
        try:
            return self._plan(name)
        except UnsupportedLayerError as error:
            raise UnsupportedLayerError(
                f"MoICE cannot be applied to the attention module {name!r} "
                f"({type(self.model.get_submodule(name)).__name__}): {error}. Leave it out with `exclude_modules`, or "
                "name the modules to adapt with `target_modules`."
            ) from error.__cause__

    def _plan(self, name: str) -> LayerPlan:
        module = self.model.get_submodule(name)
        if getattr(module, "is_cross_attention", False):
            return LayerPlan(rope=None, lacks=OTHER_KEYS)
        found = self.find_rotary(name)
        if found is None:
            self._refuse_unknown_rotary(module)
            return LayerPlan(rope=None)
        if self._is_called_without(module, found):
            return LayerPlan(rope=None)
        if self._has_other_keys(module):
            return LayerPlan(rope=None, lacks=OTHER_KEYS)
        layer_type = _layer_type(module, found.module)
        if rope_parameters(found.module.config, layer_type) is None:
            return LayerPlan(rope=None)
        _refuse_cache_without_layer(module)
        disagreement = found.disagreement(layer_type)
        if disagreement is not None:
            raise UnsupportedLayerError(
                f"{disagreement}, and MoICE has to know which the model was trained with. Load the model with the "
                "right `rope_parameters` in its config, or build the rotary embedding anew from the config"
            )
        self._refuse_other_embeddings(module, found, layer_type)
        return self._plan_by_running(module, _ThetaPair(found, layer_type))

    def _plan_by_running(self, module: nn.Module, pair: "_ThetaPair") -> LayerPlan:
        """What running `module` under both base angles of `pair` says of it."""
        limit = pair.original_length
        positions = tuple(p for p in _POSITIONS if limit is None or p < limit)
        capture = self._capture(module, pair, positions)
        query, _ = capture.pairs[0]
        plan = LayerPlan(None, num_heads=query.shape[1], head_dim=query.shape[-1])
        if all(torch.equal(own, rotated) for own, rotated in capture.pairs):
            return plan
        best = best_layout(capture, pair.deltas())
        if best is None:
            raise UnsupportedLayerError(
                "its queries and keys under another rope_theta are not a rotation of those under its own, so "
                "something other than a rotation acts on them after the rotary embedding"
            )
        layout, direction = best
        switch = limit if limit is not None and self._changes_factors(module, pair, positions, best) else None
        rope = LayerRope(*pair.build, layout, direction, switch, own=pair.found)
        plan.rope = self._ropes.setdefault((id(pair.found.module), pair.layer_type, layout), rope)
        return plan

    def _changes_factors(
        self, module: nn.Module, pair: "_ThetaPair", positions: tuple[int, ...], best: tuple[RotaryLayout, int]
    ) -> bool:
        """Whether `module` rotates by the long factors of longrope once a token stands beyond the original length."""
        if pair.parameters.get("rope_type") != "longrope" or pair.original_length is None:
            return False
        layout, direction = best
        # One more token, at a position that makes the long factors hold for all.
        capture = self._capture(module, pair, (*positions, pair.original_length))
        capture.positions = positions
        if explains(capture, error_of(capture, direction * pair.deltas(is_long=True), layout)):
            return True
        if explains(capture, error_of(capture, direction * pair.deltas(), layout)):
            return False
        raise UnsupportedLayerError(
            f"beyond its original length of {pair.original_length} tokens, its queries and keys under another "
            "rope_theta are rotated neither by the long nor by the short factors of its rope type 'longrope'"
        )

    def find_rotary(self, name: str, rope_theta: float | None = None) -> OwnRotary | None:
        """The rotary embedding nearest to the module called `name`: inside it, or beside one of its ancestors.

        Of several, it is the one with `rope_theta`; without that, the model is run to see.

        None if there is none, or if it cannot reach the module.
        """
        module = self.model.get_submodule(name)
        for holder in module.modules():
            for attribute, child in holder.named_children():
                if _is_rotary(child):
                    return self._rotary_at(holder, attribute)
        if "position_embeddings" not in inspect.signature(type(module).forward).parameters:
            return None
        while name:
            name = name.rpartition(".")[0]
            ancestor = self.model.get_submodule(name)
            for child in ancestor.children():
                if isinstance(child, nn.ModuleList) and len(child) > 0 and all(map(_is_rotary, child)):
                    if rope_theta is None:
                        return self._observed_rotary(module, child)
                    thetas = [rope_parameters(rotary.config, None)["rope_theta"] for rotary in child]
                    return self._rotary_at(child, str(thetas.index(rope_theta)))
            for attribute, child in ancestor.named_children():
                if _is_rotary(child):
                    return self._rotary_at(ancestor, attribute)
        return None

    def _rotary_at(self, holder: nn.Module, attribute: str) -> OwnRotary:
        return self._rotaries.setdefault((id(holder), attribute), OwnRotary(holder, attribute))

    def _refuse_unknown_rotary(self, module: nn.Module) -> None:
        """Refuse position embeddings that do not come from frequencies under a `rope_theta` in a config."""
        for part in module.modules():
            if _has_frequencies(part):
                raise UnsupportedLayerError(
                    f"its rotary embedding ({type(part).__name__}) has no config that names its rope_theta, so it "
                    "cannot be computed under another"
                )
        takes = "position_embeddings" in inspect.signature(type(module).forward).parameters
        if takes and not self._runs_without_embeddings(module, None):
            raise UnsupportedLayerError(
                "it needs position embeddings, but the model has no rotary embedding that computes them from a "
                "rope_theta in its config"
            )

    def _is_called_without(self, module: nn.Module, found: OwnRotary) -> bool:
        """Whether the model keeps its position embeddings from `module`, seen by running it on three tokens.

        Only modules that run without position embeddings raise the question.
        """
        if _lies_inside(found, module):
            return False
        return self._runs_without_embeddings(module, found) and self._observation(module).position_embeddings is None

    def _runs_without_embeddings(self, module: nn.Module, found: OwnRotary | None) -> bool:
        if type(module) not in self._optional:
            try:
                run_up_to_attention(module, found, [None], None, _POSITIONS, [{}])
            except UnsupportedLayerError:
                self._optional[type(module)] = False
            else:
                self._optional[type(module)] = True
        return self._optional[type(module)]

    def _has_other_keys(self, module: nn.Module) -> bool:
        """Whether the model gives `module` states of other tokens, such as an encoder's, to make keys of.

        Only modules that can take such states, and do not tell whether they do, raise the question.
        """
        parameters = inspect.signature(type(module).forward).parameters
        if hasattr(module, "is_cross_attention") or not _OTHER_STATES & parameters.keys():
            return False
        return self._observation(module).has_other_keys

    def _observed_rotary(self, module: nn.Module, rotaries: nn.ModuleList) -> OwnRotary | None:
        """Which of several rotary embeddings the model gives to `module`."""
        observed = self._observation(module)
        if observed.position_embeddings is None:
            return None
        for index, rotary in enumerate(rotaries):
            if _gives_what_was_received(rotary, None, observed):
                return self._rotary_at(rotaries, str(index))
        raise UnsupportedLayerError("the model has several rotary embeddings, and it uses none of them unchanged")

    def _refuse_other_embeddings(self, module: nn.Module, found: OwnRotary, layer_type: str | None) -> None:
        """Refuse a module whose model alters positions or position embeddings on the way to it, where it can be run.

        Positions that reach the module are used as they are.
        """
        if _lies_inside(found, module):
            return
        # Running a model whose weights lie elsewhere takes too long where nothing depends on it.
        if self._observations is None and any(parameter.is_meta for parameter in self.model.parameters()):
            return
        try:
            observed = self._observation(module)
        except UnsupportedLayerError as error:
            logger.debug("MoICE could not see the positions that %s gets: %s", type(module).__name__, error)
            return
        positions = observed.position_ids
        if positions is not None and positions.is_floating_point():
            raise UnsupportedLayerError(
                f"the model gives it positions that are not integers: {positions.flatten().tolist()} for its first "
                "tokens"
            )
        if observed.position_embeddings is not None and not _gives_what_was_received(
            found.module, layer_type, observed
        ):
            where = "of the order of tokens" if positions is None else f"{positions.flatten().tolist()}"
            raise UnsupportedLayerError(
                f"the model gives it other position embeddings than `{found.attribute}` "
                f"({type(found.module).__name__}) computes for the positions {where}, so it alters them on the way"
            )

    def _observation(self, module: nn.Module) -> Observation:
        """What `module` receives when the model runs on three tokens."""
        if self._why_unobserved is not None:
            raise UnsupportedLayerError(self._why_unobserved)
        if self._observations is None:
            try:
                self._observations = observe(self.model)
            except UnsupportedLayerError as error:
                # Not the error itself, whose traceback holds the model.
                self._why_unobserved = str(error)
                raise
        observation = self._observations.get(module)
        if observation is None:
            raise UnsupportedLayerError("what this layer receives depends on the model, and running it did not tell")
        return observation

    def _capture(self, module: nn.Module, pair: "_ThetaPair", positions: tuple[int, ...]) -> Capture:
        """Queries and keys of tokens at `positions` under both base angles of `pair`."""
        rotaries = [rotary_with_theta(*pair.build, theta) for theta in pair.thetas]
        shared = [self._shared_keys.setdefault((theta, positions), {}) for theta in pair.thetas]
        own, rotated = run_up_to_attention(module, pair.found, rotaries, pair.layer_type, positions, shared)
        return Capture(positions, list(zip(own, rotated, strict=True)))


class _ThetaPair:
    """A rotary embedding of the model under two base angles: its own, and another.

    Raises:
        UnsupportedLayerError: more than the inverse frequencies depends on the base angle.
    """

    def __init__(self, found: OwnRotary, layer_type: str | None):
        rotary = found.module
        self.found = found
        self.layer_type = layer_type
        self.build = (type(rotary), rotary.config, layer_type)
        self.parameters = rope_parameters(rotary.config, layer_type)
        self.original_length = original_length(rotary.config, layer_type)
        own = float(self.parameters["rope_theta"])
        self.thetas = (own, own * _THETA_FACTOR)
        own_scaling, scaling = (inverse_frequencies(*self.build, theta)[1] for theta in self.thetas)
        if scaling != own_scaling:
            raise UnsupportedLayerError("its attention scaling depends on rope_theta")

    def deltas(self, is_long: bool = False) -> torch.Tensor:
        """Angles `[P]` per position that lead from the own base angle to the other."""
        own, other = (inverse_frequencies(*self.build, theta, is_long)[0] for theta in self.thetas)
        return other - own


def _is_rotary(module: nn.Module) -> bool:
    return hasattr(module, "config") and _has_frequencies(module)


def _has_frequencies(module: nn.Module) -> bool:
    buffers = module._buffers
    return bool(buffers) and any(name.endswith("inv_freq") and buffers[name] is not None for name in buffers)


def _layer_type(module: nn.Module, rotary: nn.Module) -> str | None:
    """The module's key into `rope_parameters` where the model has angles per layer type, else None."""
    if not isinstance(getattr(rotary, "rope_type", None), dict):
        return None
    layer_type: str | None = getattr(module, "layer_type", None)
    if layer_type is None:
        layer_types: Any = getattr(module.config, "layer_types", None)
        if layer_types is None or not hasattr(module, "layer_idx"):
            raise UnsupportedLayerError("the model has angles per layer type, but this layer has no type")
        layer_type = layer_types[module.layer_idx]
    if layer_type not in rope_parameters(rotary.config, None):
        raise UnsupportedLayerError(f"the model's config has no rope parameters for layers of type {layer_type!r}")
    return layer_type


def _lies_inside(found: OwnRotary, module: nn.Module) -> bool:
    """Whether the rotary embedding hangs on `module` or on a part of it."""
    return found.holder in set(module.modules())


def _refuse_cache_without_layer(module: nn.Module) -> None:
    """Refuse a module that takes a cache, but does not know which of its layers is its own."""
    parameters = inspect.signature(type(module).forward).parameters.values()
    caches = [parameter.name for parameter in parameters if "Cache" in str(parameter.annotation)]
    if caches and getattr(module, "layer_idx", None) is None:
        raise UnsupportedLayerError(f"it takes a cache (`{caches[0]}`), but has no `layer_idx`")


def _gives_what_was_received(rotary: nn.Module, layer_type: str | None, observed: Observation) -> bool:
    """Whether `rotary` computes the position embeddings that a module was seen to receive."""
    positions = observed.position_ids
    if positions is None:
        positions = torch.arange(observed.hidden_states.shape[-2], device=observed.hidden_states.device)[None]
    computed = position_embeddings_of(rotary, observed.hidden_states, positions, layer_type)
    computed, received = (_tensors(value) for value in (computed, observed.position_embeddings))
    return len(computed) == len(received) and all(map(_is_same, computed, received))


def _tensors(value: Any) -> list[torch.Tensor]:
    return list(value) if isinstance(value, (tuple, list)) else [value]


def _is_same(computed: torch.Tensor, received: torch.Tensor) -> bool:
    if received.is_meta or computed.is_meta:
        return True
    tolerance = 4 * torch.finfo(received.dtype).eps
    computed = computed.to(received)
    try:
        computed, received = torch.broadcast_tensors(computed, received)
    except RuntimeError:
        return False
    return torch.allclose(computed, received, rtol=tolerance, atol=tolerance)
