"""Positions of tokens in passes without a cache: whatever they are, one base angle equals a model with that
`rope_theta`, and a mixture equals its reference."""

import copy
import pickle

import pytest
import torch
from families import tiny_model, tokens
from peft import get_peft_model, inject_adapter_in_model
from position_models import FACTOR, additive, assert_close, causal, mixture, one_angle, positions_of, rotated
from representatives import slow_but
from transformers import StaticCache
from transformers.models.llama.modeling_llama import LlamaModel

from peft_moice import MoICEConfig, MoICELayer
from peft_moice.rope.positions import positions_of_pass

pytestmark = pytest.mark.usefixtures("no_grad")

LENGTH = 12
FEW = ("gap in one row", "packed under a mask of ones", "two continuations", "a gap behind left padding")
"""Cases that are not marked slow: rows apart, steps back, a tree, and padding."""


def siblings() -> torch.Tensor:
    """Two continuations of a prefix of six tokens, which do not see each other."""
    visible = causal(LENGTH).clone()
    visible[..., 9:, 6:9] = False
    return visible


def alternatives() -> torch.Tensor:
    """Three tokens for the same place."""
    visible = causal(LENGTH).clone()
    visible[..., 10, 9] = visible[..., 11, 9:11] = False
    return visible


CASES = {
    "gap": ([*range(6), *range(40, 46)], None),
    "gap in one row": ([[*range(LENGTH)], [*range(8), *range(20, 24)]], None),
    "gap under a mask of ones": ([*range(6), *range(40, 46)], torch.ones(2, LENGTH)),
    "stretched": ([*range(0, 3 * LENGTH, 3)], torch.ones(2, LENGTH)),
    "halves": ([0.5 * place for place in range(LENGTH)], torch.ones(2, LENGTH)),
    "constant": ([7] * LENGTH, None),
    "constant under a mask": ([7] * LENGTH, torch.ones(2, LENGTH)),
    "backwards": ([*range(LENGTH - 1, -1, -1)], torch.ones(2, LENGTH)),
    "a step back under a mask of ones": ([*range(8), 4, 5, 6, 7], torch.ones(2, LENGTH)),
    "packed under a mask of ones": ([*range(5), *range(7)], torch.ones(2, LENGTH)),
    "two continuations": ([*range(9), 6, 7, 8], additive(siblings())),
    "two continuations, boolean mask": ([*range(9), 6, 7, 8], siblings()),
    "alternatives": ([*range(10), 9, 9], additive(alternatives())),
    "alternatives of one row": ([[*range(10), 9, 9], [*range(LENGTH)]], additive(alternatives())),
    "a gap behind left padding": ([[*range(LENGTH)], [0, 0, 0, *range(5), *range(30, 34)]], "left"),
    "right padding": ([[*range(LENGTH)], [*range(9), 1, 1, 1]], "right"),
    "a gap before right padding": ([[*range(LENGTH)], [0, 1, 2, 9, 10, 11, *range(6)]], "right"),
}


def case(name: str) -> dict[str, torch.Tensor]:
    positions, mask = CASES[name]
    if isinstance(mask, str):
        real = torch.arange(LENGTH) >= 3 if mask == "left" else torch.arange(LENGTH) < 9
        mask = torch.stack((torch.ones(LENGTH), real)).long()
    arguments = {"input_ids": tokens(length=LENGTH), "position_ids": torch.atleast_2d(torch.tensor(positions))}
    return arguments if mask is None else {**arguments, "attention_mask": mask}


def real_logits(model, arguments: dict[str, torch.Tensor]) -> torch.Tensor:
    """Without those of padding on the left, which sees nothing."""
    logits, mask = model(**arguments, use_cache=False).logits, arguments.get("attention_mask")
    return logits if mask is None or mask.dim() == 4 else logits[mask.cumsum(dim=-1) > 0]


# Eager attention adds its mask, which cannot be boolean then.
@pytest.mark.parametrize(
    "name, attention",
    slow_but(
        [(name, "sdpa") for name in FEW],
        [
            (name, attention)
            for attention in ("sdpa", "eager")
            for name in CASES
            if attention == "sdpa" or "boolean" not in name
        ],
    ),
)
def test_one_angle_equals_a_model_with_that_rope_theta(name, attention):
    model, own, base = one_angle(), rotated(), tiny_model("llama")
    model.get_base_model().set_attn_implementation(attention)
    own.set_attn_implementation(attention)
    arguments = case(name)
    expected = real_logits(own, arguments)
    if not name.startswith("constant"):
        assert (real_logits(base, arguments) - expected).abs().max() > 1e-3 * expected.abs().max()
    assert_close(real_logits(model, arguments), expected)


@pytest.mark.parametrize("name", slow_but(FEW, CASES))
def test_mixtures_equal_their_reference(name):
    """`reference` rotates by explicit positions wherever these are given, so it is held to a single angle as well."""
    arguments = case(name)
    expected = real_logits(mixture(implementation="reference"), arguments)
    for implementation in ("auto", "delegated"):
        assert_close(real_logits(mixture(implementation=implementation), arguments), expected)


@pytest.mark.parametrize(
    "family",
    slow_but(["gemma3_text"], ["mistral", "gemma3_text", "gpt_neox", "deepseek_v3", "persimmon", "llama4_text"]),
)
def test_other_families(family):
    """Windows, several kinds of layers, other keywords, latent attention, and layers that get no `position_ids`."""
    model, own = one_angle(family), rotated(family)
    for name in ("gap", "a step back under a mask of ones"):
        assert_close(real_logits(model, case(name)), real_logits(own, case(name)))


class TestRegularRowsKeepTheFastPath:
    """Implementations of our own read positions in the order of the keys, and say so where they cannot."""

    @pytest.mark.parametrize(
        "position_ids",
        [
            pytest.param([5, 6, 7, 8, 9, 10, 11, 12], id="shifted"),
            pytest.param([0, 1, 2, 0, 1, 0, 1, 2], id="packed"),
        ],
    )
    def test_without_a_mask(self, position_ids):
        arguments = {"input_ids": tokens(length=8), "position_ids": torch.tensor([position_ids]), "use_cache": False}
        assert_close(mixture(implementation="native")(**arguments).logits, mixture()(**arguments).logits)

    @pytest.mark.parametrize(
        "position_ids, start, end",
        [
            pytest.param([0, 0, 0, 0, 1, 2, 3, 4], 3, 8, id="left padding"),
            pytest.param([1, 1, 1, 0, 1, 2, 3, 4], 3, 8, id="left padding marked by ones"),
            pytest.param(list(range(8)), 0, 5, id="right padding"),
        ],
    )
    def test_padding(self, position_ids, start, end):
        model, ids = mixture(implementation="native"), tokens(length=8)
        mask = torch.ones(2, 8, dtype=torch.long)
        mask[1, :start] = mask[1, end:] = 0
        rows = torch.tensor([list(range(8)), position_ids])
        logits = model(ids, attention_mask=mask, position_ids=rows, use_cache=False).logits
        assert_close(logits[1:, start:end], model(ids[1:, start:end], use_cache=False).logits)

    def test_others_do_not(self):
        with pytest.raises(ValueError, match="these tokens stand elsewhere"):
            mixture(implementation="native")(**case("gap"))


@torch.enable_grad()
def test_gradients_with_checkpointing_when_other_positions_come_in_between():
    def gradients(**checkpointing) -> list[torch.Tensor]:
        model = mixture(router_aux_loss_coef=0.0).train()  # which the reentrant kind cannot have
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=checkpointing)
        losses = [
            model(**case(name), labels=case(name)["input_ids"], use_cache=False).loss for name in ("gap", "stretched")
        ]
        sum(losses).backward()
        return [parameter.grad for name, parameter in model.named_parameters() if "moice_router" in name]

    expected = gradients()
    for use_reentrant in (True, False):
        for actual, gradient in zip(gradients(use_reentrant=use_reentrant), expected, strict=True):
            assert gradient.abs().max() > 0
            assert_close(actual, gradient)


class Stretching(LlamaModel):
    """Alters positions before its decoder sees them."""

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, **kwargs):
        return super().forward(input_ids, attention_mask, 3 * torch.arange(input_ids.shape[1])[None], **kwargs)


class TestWaysInWhichPositionsCome:
    def test_by_position_and_to_the_decoder(self):
        ids, positions = tokens(length=LENGTH), case("gap")["position_ids"]
        ways = {
            "keyword": lambda model: model(input_ids=ids, position_ids=positions).logits,
            "third argument": lambda model: model(ids, None, positions).logits,
            "decoder": lambda model: model.model(ids, position_ids=positions).last_hidden_state,
            "decoder, third argument": lambda model: model.model(ids, None, positions).last_hidden_state,
        }
        added = inject_adapter_in_model(MoICEConfig(base_multipliers=[FACTOR]), tiny_model("llama"))
        merged = one_angle().merge_and_unload()
        for way in ways.values():
            expected = way(rotated())
            for model in (one_angle().get_base_model(), added, merged):
                assert_close(way(model), expected)

    def test_altered_by_a_subclass(self):
        ids, own, base = tokens(length=LENGTH), rotated(), tiny_model("llama")
        own.model.__class__ = base.model.__class__ = Stretching
        model = get_peft_model(base, MoICEConfig(base_multipliers=[FACTOR])).eval()
        expected = own(ids).logits
        assert (expected - rotated()(ids).logits).abs().max() > 1e-3 * expected.abs().max()
        assert_close(model(ids).logits, expected)

    def test_altered_by_a_hook_in_front_of_the_rotary_embedding(self):
        """The positions that its keywords name are then not those that a layer's cosines belong to."""

        def stretch(module, args, kwargs):
            return args, {**kwargs, "position_ids": 3 * kwargs["position_ids"] ** 2}

        ids, own, model = tokens(length=LENGTH), rotated(), one_angle()
        for decoder in (own.model, model.get_base_model().model):
            decoder.rotary_emb.register_forward_pre_hook(stretch, with_kwargs=True)
        assert_close(model(ids).logits, own(ids).logits)

    def test_to_copies_but_not_after_unloading(self):
        model, arguments = one_angle("llama4_text"), case("gap")
        expected = rotated("llama4_text")(**arguments).logits
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert_close(twin(**arguments).logits, expected)
        model.merge_adapter()
        assert_close(model(**arguments).logits, expected)
        base = model.unload()
        assert not any(module._forward_pre_hooks or module._forward_hooks for module in base.modules())

    @pytest.mark.parametrize("injected", [False, True])
    def test_to_layers_of_a_second_adapter(self, injected):
        """Its layers have a rotary embedding that no layer of the first adapter has."""
        family, first, second = (
            "granite_swa",
            *(MoICEConfig(base_multipliers=[FACTOR], layers_to_transform=[layer]) for layer in (0, 1)),
        )
        base = tiny_model(family, layer_rope_theta=[10000.0, 20000.0])
        own = tiny_model(family, FACTOR, layer_rope_theta=[10000.0, 20000.0])
        if injected:
            # As transformers' `add_adapter` does.
            for name, config in (("first", first), ("second", second)):
                base._hf_peft_config_loaded = name == "second"
                model = inject_adapter_in_model(config, base, name)
            for layer in (module for module in model.modules() if isinstance(module, MoICELayer)):
                layer.set_adapter(["first", "second"])
        else:
            model = get_peft_model(base, first, "first")
            model.add_adapter("second", second)
            model.base_model.set_adapter(["first", "second"])
        rotaries = model.get_decoder().rotary_embs
        assert len(rotaries) == 2 and all(len(rotary._forward_hooks) == 1 for rotary in rotaries)
        assert_close(real_logits(model.eval(), case("gap")), real_logits(own, case("gap")))


def test_positions_of_images_are_refused():
    model = mixture("qwen3_vl")
    text = torch.arange(8)[None, None].expand(3, 2, 8)
    model(input_ids=tokens(length=8), position_ids=text)
    image = text.clone()
    image[1, 1, 3:6] = 3
    with pytest.raises(ValueError, match=r"Row 1 has positions in more than one dimension \(mRoPE\)"):
        model(input_ids=tokens(length=8), position_ids=image)
    with model.disable_adapter():
        model(input_ids=tokens(length=8), position_ids=image)


def test_text_at_positions_of_several_dimensions_may_stand_anywhere():
    positions = torch.tensor([*range(4), *range(20, 24)])[None, None].expand(3, 2, 8)
    actual = one_angle("qwen3_vl")(input_ids=tokens(length=8), position_ids=positions).logits
    assert_close(actual, rotated("qwen3_vl")(input_ids=tokens(length=8), position_ids=positions).logits)


def query_start(layer: int, length: int, **kwargs) -> int | torch.Tensor | None:
    return positions_of_pass(layer, (torch.zeros(1, length, 64),), kwargs).query_start


def test_query_start_in_a_static_cache():
    assert query_start(0, 5) is None, "without one it is left to the keys"
    cache = StaticCache(config=tiny_model("llama").config, max_cache_len=16)
    keys = torch.zeros(1, 2, 5, 16)
    assert query_start(0, 5, past_key_values=cache) == 0
    cache.update(keys, keys, 0)
    assert query_start(0, 1, past_key_values=cache) == 5
    assert query_start(1, 5, past_key_values=cache) == 0
    assert query_start(0, 1, past_key_values=cache, logits_to_keep=1) == 5
    # A family that shares its attention modules names the layer in the call.
    assert query_start(1, 1, past_key_values=cache, layer_idx=0) == 5


def test_right_padding_changes_no_real_token():
    model, mask = mixture(), (torch.arange(9) < torch.tensor([[9], [6], [9]])).long()
    ids = tokens(batch=3, length=9) * mask
    for options in ({}, {"position_ids": positions_of(mask)}):
        logits = model(ids, attention_mask=mask, **options).logits
        assert_close(logits[1:2, :6], model(ids[1:2, :6]).logits)
