"""`MoICEConfig`: which angles, how many of them per token, which router, which modules."""

import math
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from reprlib import repr as shortened
from typing import Any, ClassVar

from peft.config import PeftConfig
from peft.utils import PeftType, TaskType

from ..files.atomic import staged
from ..files.weights import names_of_weights
from ..hub.card import adapter_part, put_card, shared_name
from ..rope.rules import Base, RopeExpert, are_for_routers, experts_of
from ..routing.spec import (
    PEFT_TYPE_NAME,
    Bases,
    RouterSpec,
    bases_of,
    check_router,
    checked_angles,
    checked_bases,
    count_experts,
)
from .beside_routers import StoredBeside, check_token_indices, fields_beside

RELEASED_MULTIPLIERS = (1.0, 1.75, 1.8, 1.9, 2.0, 2.25, 2.5)
"""Base angles of the official release for Llama-2-7B-chat, as multiples of the model's own `rope_theta`."""


_OF_ROUTERS = ("rope_bases", "base_multipliers", "members")
"""Fields that only adapters with routers have."""
_RESOLVED = ("rope_bases", "top_k", "router_dim", "router_scope", "hidden_act", "router_aux_loss_coef")
"""Fields that say what a router is, and that may be open until the adapter is injected."""


@dataclass
class MoICEConfig(PeftConfig):
    """Configuration of a [`MoICEModel`] (Lin et al., NeurIPS 2024, https://arxiv.org/abs/2406.19598).

    Fields left at None are resolved against the base model when the adapter is injected, and the resolved values are
    what is saved.

    A bare `MoICEConfig()` is the paper's official release, made for Llama-2-7B-chat; with it and its learning rate of
    1e-4, small models barely move. The presets `retrieval` and `chats` of `peft-moice train` use
    `base_multipliers=[1, 1.5, 2, 3, 4]`, `init_weights="identity"`, `router_aux_loss_coef=0` and a learning rate of
    5e-2 in its place.

    Args:
        rope_bases: absolute base angles (`rope_theta` values) of the N experts, or the ropes of some of them as dicts,
            see `ropes`. The first has to be the model's own; a single angle may be any, which runs the model under
            another `rope_theta`. For models with angles per layer type, a dict from layer type to such a list.
            Default: `base_multipliers` times the model's own. All other rope parameters are kept; with longrope, an
            angle holds for the short and for the long factors.
        base_multipliers: base angles as multiples of the model's own `rope_theta`, starting with 1. Excludes
            `rope_bases`. Default: the official release's 1, 1.75, 1.8, 1.9, 2, 2.25, 2.5.
        top_k: number K of experts mixed per head and token, 1 to N. Default: N, as in the official release. The cost
            of attention follows K in the fast implementations.
        router_dim: hidden size R of the routers. Default: N, as in the official code.
        router_scope: "layer" (default) shares a router among a layer's heads, as in the official code; "head" gives
            every head its own, as in the paper's text.
        hidden_act: activation of the routers, a name in transformers' `ACT2FN`. Default: the model's own.
        router_aux_loss_coef: weight of the balance loss that training adds to `outputs.loss`. With K = N that loss is
            a constant, which is reported in `outputs.aux_loss` but not added. Default: 0.3, as in the official
            release.
        init_weights: True (default) draws router weights from normal(0, 0.02) as the official code does, which starts
            near the equal mixture of all angles. "identity" adds a scale per head, zero at first, on the distance from
            the model's own angle: a fresh adapter then computes what the base model computes. False draws weights
            from PyTorch's wider uniform start.
        target_modules: attention modules to adapt, as names, suffixes or one regular expression. Default: every
            attention module of the decoder that has a rotary embedding.
        exclude_modules: modules to leave out, likewise.
        layers_to_transform: indices of the layers to adapt, whatever the targets. Default: all.
        layers_pattern: name of the list of layers, if it is not a common one. Used with `layers_to_transform`.
        modules_to_save: further modules to train and save with the adapter. Names may reach into adapted attention
            modules, as "norm" reaches `q_norm`.
        trainable_token_indices: token indices whose embeddings are trained, see PEFT's `LoraConfig`.
        ropes: ropes by the position of the query and by the distance of the key, in place of routers: a list of dicts
            in the form of transformers' `rope_parameters`, over the model's own, each with the ranges
            `query_positions` and `distances` `[first, end]` in which it holds (default: all; an end may be None). The
            ranges of query positions follow each other from 0 on; for one of them, distances may be cut once, into
            near keys, under the model's own rope, and far ones, whose angles go on from the border where they were.
            [`extend`] writes the usual ones. Such an adapter has no parameters. Several ropes without ranges are the
            experts of routers instead: `{}` first, the model's own, and each of them fixed at any length. They become
            `rope_bases`, whose angles are the short form of `{"rope_theta": ...}`. A rope with an attention scaling
            (YaRN without `"attention_factor": 1.0`) rules out the implementations "folded" and "triton", and models
            whose own rope changes with the length (longrope, dynamic) are refused. Default: None.
        implementation: "auto" (default), or the name of the attention implementation to force, see
            [`attention.mixed_attention`].
        members: routers of an adapter that is a mean of others, written by
            `add_weighted_adapter(..., combination_type="cat")`, as the fields of [`RouterSpec`]. `rope_bases` then
            holds all of their angles and `top_k` the most that a token can pick; `router_dim`, `router_scope`,
            `hidden_act` and `router_aux_loss_coef` are None where the routers differ.

    Raises:
        ValueError: a value out of its range, or values that contradict each other.
        TypeError: a value of the wrong type.
    """

    rope_bases: Bases | None = field(default=None)
    base_multipliers: list[float] | None = field(default=None)
    top_k: int | None = field(default=None)
    router_dim: int | None = field(default=None)
    router_scope: str | None = field(default="layer")
    hidden_act: str | None = field(default=None)
    router_aux_loss_coef: float | None = field(default=0.3)
    init_weights: bool | str = field(default=True)
    target_modules: set[str] | list[str] | str | None = field(default=None)
    exclude_modules: set[str] | list[str] | str | None = field(default=None)
    layers_to_transform: list[int] | int | None = field(default=None)
    layers_pattern: list[str] | str | None = field(default=None)
    modules_to_save: list[str] | None = field(default=None)
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(default=None)
    implementation: str = field(default="auto")
    ropes: list[dict[str, Any]] | None = field(default=None)
    members: list[dict[str, Any]] | None = field(default=None)

    awaits_weights = False
    """Set on a config that was read from a file, until the weights beside it are loaded. Not a field, not saved."""
    stored_beside: ClassVar[StoredBeside | None] = None
    """Likewise: what was stored with it."""

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[no-untyped-call]  # without annotations in PEFT
        self.peft_type = PeftType[PEFT_TYPE_NAME]
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), list):
                setattr(self, name, set(getattr(self, name)))
        self._check_targets()
        if self.ropes is not None:
            self._check_ropes()
        if self.ropes is not None:  # Routers choose among the rest, which `rope_bases` holds by now.
            return
        self._check_angles()
        self._check_router()
        if self.members is not None:
            if not isinstance(self.members, list) or not self.members:
                raise TypeError(f"`members` has to be a list of routers, not {shortened(self.members)}.")
            self.router_specs()

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> "MoICEConfig":
        """Read a config that was saved, see PEFT's `PeftConfig`. PEFT calls it before it loads an adapter.

        Raises:
            ValueError, TypeError: it says what no config says.
            SafetensorError, UnpicklingError: the weights beside it cannot be read. (PEFT would notice that only when
                it has put the adapter into the model already.)
        """
        config: MoICEConfig = super().from_pretrained(pretrained_model_name_or_path, subfolder, **kwargs)
        names = names_of_weights(Path(pretrained_model_name_or_path, subfolder or ""))
        config.stored_beside = StoredBeside(names, fields_beside(config))  # type: ignore[misc]  # not of the class
        config.awaits_weights = True
        return config

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Write adapter_config.json, as a whole or not at all, and say in the folder's model card what the adapter is.

        PEFT and transformers call it when they save an adapter. A config that has not been injected yet, so that its
        angles are open, leaves the card alone.

        Args:
            save_directory: folder to write to, made if it is missing.
            kwargs: see PEFT's `PeftConfig`.

        Raises:
            OSError: the files cannot be written; what was there stays.
        """
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        with staged(folder) as staging:
            super().save_pretrained(str(staging), **kwargs)
        self.put_in_card(folder)

    def put_in_card(self, folder: str | os.PathLike[str]) -> None:
        """Say in the model card of `folder` what the adapter is, if that is resolved."""
        if self.is_resolved:
            base_model = shared_name(self.base_model_name_or_path)
            is_causal_lm = self.task_type == TaskType.CAUSAL_LM
            ropes = self.ropes_by_position()
            part = adapter_part(self.router_specs(), ropes=ropes, base_model=base_model, is_causal_lm=is_causal_lm)
            put_card(Path(folder), part)

    @property
    def is_resolved(self) -> bool:
        """Whether it says all about its routers, as it does once it was injected."""
        if self.ropes is not None:
            return True
        return self.members is not None or all(getattr(self, name) is not None for name in _RESOLVED)

    @property
    def num_experts(self) -> int:
        """Number N of experts, in a mean of adapters that of its distinct angles."""
        bases = self.rope_bases if self.rope_bases is not None else self.base_multipliers
        return count_experts(bases) if bases is not None else len(RELEASED_MULTIPLIERS)

    def router_specs(self) -> list[RouterSpec]:
        """The adapter's routers.

        Raises:
            ValueError: fields are open that injecting the adapter resolves.
        """
        if self.ropes is not None:
            return []
        if self.members is not None:
            return [RouterSpec.from_saved(member, f"members[{i}]") for i, member in enumerate(self.members)]
        if not self.is_resolved:
            raise ValueError(
                "The config leaves open what its routers are, which the base model decides. Inject the adapter first, "
                "as `peft.get_peft_model(model, config)` does."
            )
        fields = {name: getattr(self, name) for name in _RESOLVED}
        identity = self.init_weights == "identity"
        return [RouterSpec(**fields, identity=identity, implementation=self.implementation)]

    def resolve_bases(self, own_thetas: dict[str | None, float]) -> None:
        """Fill `rope_bases` for a model, or check that they fit it, those of every router in a mean of adapters.

        Args:
            own_thetas: the model's own `rope_theta` by layer type; the key None stands for all layers.

        Raises:
            ValueError: the first angle is not the model's own, or the layer types differ from the model's.
        """
        if self.ropes is not None:
            return
        if self.rope_bases is None or (isinstance(self.rope_bases, list) and {} in self.rope_bases):
            bases = {kind: self._bases_over(own) for kind, own in own_thetas.items()}
            of_types = {kind: of_type for kind, of_type in bases.items() if kind is not None}
            self.rope_bases = checked_bases(bases.get(None, of_types))
            self.base_multipliers = None
        for member in self.members or [{"rope_bases": self.rope_bases}]:
            _check_own_base(member["rope_bases"], own_thetas)

    def _bases_over(self, own: float) -> list[Base]:
        if self.rope_bases is None:
            return [multiplier * own for multiplier in self.base_multipliers or RELEASED_MULTIPLIERS]
        return [own if base == {} else base for base in bases_of(self.rope_bases, None)]

    def _check_targets(self) -> None:
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            names = value if isinstance(value, (set, list, tuple)) else ()
            if not isinstance(value, (set, list, tuple, str, type(None))) or not all(
                isinstance(n, str) for n in names
            ):
                raise TypeError(
                    f"`{name}` has to be a list of names, a regular expression or None, not {shortened(value)}."
                )
        if self.modules_to_save is not None:
            names = self.modules_to_save if isinstance(self.modules_to_save, (list, tuple, set)) else [None]
            if not all(isinstance(name, str) for name in names):
                raise TypeError(
                    f"`modules_to_save` has to be a list of names or None, not {shortened(self.modules_to_save)}."
                )
        check_token_indices(self.trainable_token_indices)
        if self.target_modules == "all-linear":
            raise ValueError(
                "target_modules='all-linear' selects linear layers, but MoICE adapts attention modules. Leave "
                "`target_modules` out to adapt every attention module, or name them, such as ['self_attn']."
            )
        if self.layers_to_transform is not None:
            indices = self.layers_to_transform
            indices = list(indices) if isinstance(indices, (list, tuple, set, range)) else [indices]
            if any(isinstance(index, bool) or not isinstance(index, int) for index in indices):
                raise TypeError(
                    f"`layers_to_transform` has to hold integers, not {shortened(self.layers_to_transform)}."
                )
            if not indices or min(indices) < 0:
                raise ValueError(
                    f"`layers_to_transform` is {shortened(self.layers_to_transform)}, but has to name at least one "
                    "layer, by its index from 0. Leave it out to adapt all layers."
                )
            self.layers_to_transform = indices
        if self.layers_to_transform is not None and isinstance(self.target_modules, str):
            raise ValueError(
                "`layers_to_transform` cannot be combined with a regular expression in `target_modules`. Give "
                "`target_modules` as a list of names."
            )
        patterns = self.layers_pattern if isinstance(self.layers_pattern, list) else [self.layers_pattern or ""]
        if not all(isinstance(pattern, str) for pattern in patterns):
            raise TypeError(f"`layers_pattern` has to be one name or a list, not {shortened(self.layers_pattern)}.")
        expressions = {"layers_pattern": patterns, "target_modules": self.target_modules}
        for name, value in {**expressions, "exclude_modules": self.exclude_modules}.items():
            for expression in value if isinstance(value, list) else [value]:
                _check_expression(name, expression)
        if self.layers_pattern is not None and self.layers_to_transform is None:
            raise ValueError("`layers_pattern` has no effect without `layers_to_transform`; set both or neither.")

    def _check_ropes(self) -> None:
        given = [name for name in _OF_ROUTERS if getattr(self, name)]
        if are_for_routers(self.ropes):
            if given:
                raise ValueError(f"`ropes` and {given} both say what routers choose among. Leave one of them out.")
            self.rope_bases, self.ropes = checked_angles(self.ropes, "ropes", ropes=True), None
            return
        experts_of(self.ropes)
        if given:
            raise ValueError(
                f"`ropes` are ropes without routers, and {given} say what routers do. Make two adapters: that with "
                "routers then decides where `ropes` give the model's own rope."
            )
        # Versions that know no `ropes` refuse an empty list.
        self.rope_bases, self.top_k, self.router_dim = [], 1, 1

    def ropes_by_position(self) -> tuple[RopeExpert, ...]:
        """The experts that `ropes` stand for; none where the adapter has routers."""
        return () if self.ropes is None else experts_of(self.ropes)

    def _check_angles(self) -> None:
        if self.rope_bases is not None and self.base_multipliers is not None:
            raise ValueError("`rope_bases` and `base_multipliers` exclude each other; give one of them.")
        if self.rope_bases is not None:
            self.rope_bases = checked_bases(self.rope_bases, may_differ=self.members is not None)
        if self.base_multipliers is not None:
            self.base_multipliers = checked_angles(self.base_multipliers, "base_multipliers")
            if len(self.base_multipliers) > 1 and self.base_multipliers[0] != 1.0:
                raise ValueError(
                    f"The first of `base_multipliers` is {self.base_multipliers[0]}; it has to be 1, the model's own "
                    "angle, because keys in the cache carry it."
                )

    def _check_router(self) -> None:
        check_router(self, may_differ=bool(self.members))
        if self.init_weights not in (True, False, "identity"):
            raise ValueError(f"`init_weights` is {shortened(self.init_weights)}; choose True, False or 'identity'.")


def _check_expression(name: str, value: object) -> None:
    """Raise a ValueError if `value` is a text, but no regular expression."""
    try:
        re.compile(value if isinstance(value, str) else "")
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"`{name}` is no regular expression ({error}): {shortened(value)}.") from error


def as_moice_config(config: PeftConfig) -> MoICEConfig:
    """`config` as what it is, where PEFT's signatures say less.

    Raises:
        TypeError: it is another tuner's.
    """
    if not isinstance(config, MoICEConfig):
        raise TypeError(f"The config has to be a MoICEConfig, not {type(config).__name__}.")
    return config


def _check_own_base(rope_bases: Bases, own_thetas: dict[str | None, float]) -> None:
    if isinstance(rope_bases, dict) and not own_thetas.keys() <= rope_bases.keys():
        types = sorted(kind for kind in own_thetas if kind is not None)
        have, give = (f"have {types}", "one list per layer type") if types else ("have one angle for all", "one list")
        raise ValueError(
            f"`rope_bases` names the layer types {sorted(rope_bases)}, but the adapted layers of this model {have}. "
            f"Give {give}, or use `base_multipliers`."
        )
    for layer_type, own in own_thetas.items():
        bases = bases_of(rope_bases, layer_type)
        if len(bases) > 1 and (isinstance(bases[0], dict) or not math.isclose(bases[0], own, rel_tol=1e-6)):
            where = "" if layer_type is None else f" in layers of type {layer_type!r}"
            lists = "" if len(own_thetas) == 1 or isinstance(rope_bases, dict) else ", in one list per layer type"
            raise ValueError(
                f"The first of `rope_bases` is {bases[0]}, but the model's own rope_theta is {own}{where}. Put "
                f"the model's own angle first{lists}, or use `base_multipliers`. (Angles are resolved and stored when "
                "an adapter is injected, so a config made for another model does not fit this one.)"
            )
