"""Where queries stand among the keys, and positions that are refused because the keys' order cannot represent them."""

import copy
import pickle

import pytest
import torch
from families import tiny_model, tokens
from peft import get_peft_model
from transformers import DynamicCache, StaticCache

from peft_moice import MoICEConfig
from peft_moice.rope.positions import query_start


def adapted(family: str = "llama", **overrides):
    torch.manual_seed(1)
    config = MoICEConfig(base_multipliers=[1.0, 4.0, 0.25], top_k=2, init_weights=False)
    return get_peft_model(tiny_model(family, **overrides), config).eval()


def right_padded_prompt() -> dict[str, torch.Tensor]:
    mask = torch.ones(3, 9, dtype=torch.long)
    mask[1, 6:] = 0
    return {"input_ids": tokens(batch=3, length=9) * mask, "attention_mask": mask}


@torch.no_grad()
def test_right_padding_before_generation_is_refused_with_its_row():
    model, prompt = adapted(), right_padded_prompt()
    with pytest.raises(ValueError, match=r"Row 1 of the prompts is padded on the right.*padding_side"):
        model.generate(**prompt, max_new_tokens=2)
    with model.disable_adapter():
        model.generate(**prompt, max_new_tokens=2)


@torch.no_grad()
def test_right_padding_without_generation_changes_no_real_token():
    model, prompt = adapted(), right_padded_prompt()
    logits = model(**prompt).logits
    alone = model(prompt["input_ids"][1:2, :6]).logits
    torch.testing.assert_close(logits[1:2, :6], alone, rtol=0, atol=1e-5 * alone.abs().max().item())


@pytest.mark.parametrize(
    "position_ids",
    [
        pytest.param([0, 1, 2, 3, 4, 8, 9, 10], id="gap"),
        pytest.param([0, 0, 1, 1, 2, 2, 3, 3], id="repeated"),
        pytest.param([0, 2, 4, 6, 8, 10, 12, 14], id="stretched"),
    ],
)
@torch.no_grad()
def test_positions_that_do_not_count_are_refused_with_their_row(position_ids):
    model = adapted()
    rows = torch.tensor([list(range(8)), position_ids])
    with pytest.raises(ValueError, match=r"position_ids of row 1 .*Leave `position_ids` out"):
        model(tokens(length=8), position_ids=rows)
    with model.disable_adapter():
        model(tokens(length=8), position_ids=rows)


@pytest.mark.parametrize(
    "position_ids",
    [
        pytest.param([5, 6, 7, 8, 9, 10, 11, 12], id="shifted"),
        pytest.param([0, 0, 0, 0, 1, 2, 3, 4], id="left padding"),
        pytest.param([1, 1, 1, 0, 1, 2, 3, 4], id="left padding marked by ones"),
        pytest.param([0, 1, 2, 0, 1, 0, 1, 2], id="packed"),
        pytest.param([0, 1, 2, 3, 4, 1, 1, 1], id="right padding in training"),
    ],
)
@torch.no_grad()
def test_positions_that_count_are_accepted(position_ids):
    adapted()(tokens(length=8), position_ids=torch.tensor([position_ids, list(range(8))]))


class TestPromptsThatContinueACache:
    @pytest.mark.parametrize("noted", [True, False])
    @torch.no_grad()
    def test_positions_that_jump_are_refused(self, noted):
        """Also where the model made the cache itself, so that nothing could be noted on it."""
        model, ids = adapted(), tokens(length=12)
        first = {"position_ids": torch.arange(6)[None], "past_key_values": DynamicCache(config=model.config)}
        cache = model(ids[:, :6], **(first if noted else {})).past_key_values
        for start in (50, 3):
            positions = torch.arange(start, start + 4).expand(2, -1)
            with pytest.raises(ValueError, match=f"row 0 begin at {start}, .* comes 6.*continue where the cache"):
                model(ids[:, 6:10], position_ids=positions, past_key_values=cache)
        model(ids[:, 6:10], position_ids=torch.arange(6, 10)[None], past_key_values=copy.deepcopy(cache))
        model(ids[:, 6:7], position_ids=torch.tensor([[50]]), past_key_values=cache)
        with pytest.raises(ValueError, match=r"row 0 begin at 51, .* comes 7"):
            model(ids[:, 7:10], position_ids=torch.arange(51, 54)[None], past_key_values=cache)

    @pytest.mark.parametrize("noted", [True, False])
    @torch.no_grad()
    def test_padded_rows(self, noted):
        model, ids, padding = adapted(), tokens(length=12), torch.tensor([[0], [3]])
        mask = (torch.arange(12) >= padding).long()
        positions = (torch.arange(12) - padding).clamp(min=0)
        cache = DynamicCache(config=model.config)
        options = {"position_ids": positions[:, :6]} if noted else {}
        if noted:
            model(ids[:, :6], attention_mask=mask[:, :6], past_key_values=cache, **options)
        else:
            for t in range(6):
                step = {"attention_mask": mask[:, : t + 1], "position_ids": positions[:, t : t + 1]}
                model(ids[:, t : t + 1], past_key_values=cache, **step)
        actual = model(
            ids[:, 6:], attention_mask=mask, position_ids=positions[:, 6:], past_key_values=copy.deepcopy(cache)
        ).logits
        alone = model(ids[1:, 3:]).logits[:, 3:]
        torch.testing.assert_close(actual[1:], alone, rtol=0, atol=1e-5 * alone.abs().max().item())
        with pytest.raises(ValueError, match=r"row 1 begin at 6, .* comes 3"):
            wrong = torch.arange(6, 12).expand(2, -1)
            model(ids[:, 6:], attention_mask=mask, position_ids=wrong, past_key_values=cache)

    @torch.no_grad()
    def test_chats_prompt_lookup_and_static_caches_generate_as_without_a_cache(self):
        model, ids = adapted(), tokens(length=14)
        mask = torch.ones(2, 14, dtype=torch.long)
        mask[1, :4] = 0
        options = {"do_sample": False, "max_new_tokens": 4, "pad_token_id": 0, "eos_token_id": None}
        expected = model.generate(input_ids=ids, attention_mask=mask, use_cache=False, **options)
        for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=18)):
            model(
                ids[:, :8], attention_mask=mask[:, :8], past_key_values=cache, position_ids=positions_of(mask[:, :8])
            )
            actual = model.generate(input_ids=ids, attention_mask=mask, past_key_values=cache, **options)
            assert torch.equal(actual, expected)
        alone = model.generate(input_ids=ids[:1], attention_mask=mask[:1], prompt_lookup_num_tokens=3, **options)
        assert torch.equal(alone, expected[:1])


def positions_of(mask: torch.Tensor) -> torch.Tensor:
    return (mask.cumsum(dim=-1) - 1).clamp(min=0)


@torch.no_grad()
def test_positions_are_watched_in_copies_and_no_longer_after_unloading():
    position_ids = torch.tensor([[0, 1, 2, 9]])
    model = adapted()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with pytest.raises(ValueError, match="row 0"):
            twin(tokens(1, 4), position_ids=position_ids)
        with twin.disable_adapter():
            twin(tokens(1, 4), position_ids=position_ids)
    base = model.unload()
    base(tokens(1, 4), position_ids=position_ids)
    assert not any(module._forward_pre_hooks for module in base.modules())


@torch.no_grad()
def test_merged_routers_watch_positions_too():
    model = adapted()
    model.merge_adapter()
    with pytest.raises(ValueError, match="row 0"):
        model(tokens(1, 4), position_ids=torch.tensor([[0, 1, 2, 9]]))


@torch.no_grad()
def test_positions_of_images_are_refused():
    model = adapted("qwen3_vl")
    text = torch.arange(8)[None, None].expand(3, 2, 8)
    model(input_ids=tokens(length=8), position_ids=text)
    image = text.clone()
    image[1, 1, 3:6] = 3
    with pytest.raises(ValueError, match=r"Row 1 has positions in more than one dimension \(mRoPE\)"):
        model(input_ids=tokens(length=8), position_ids=image)
    with model.disable_adapter():
        model(input_ids=tokens(length=8), position_ids=image)


def test_query_start_in_a_static_cache():
    config = tiny_model("llama").config
    cache = StaticCache(config=config, max_cache_len=16)
    keys = torch.zeros(1, 2, 5, 16)
    assert query_start(0, (torch.zeros(1, 5, 64),), {"past_key_values": cache}) == 0
    cache.update(keys, keys, 0)
    assert query_start(0, (torch.zeros(1, 1, 64),), {"past_key_values": cache}) == 5
    assert query_start(1, (torch.zeros(1, 5, 64),), {"past_key_values": cache}) == 0
    assert query_start(0, (torch.zeros(1, 1, 64),), {"past_key_values": cache, "logits_to_keep": 1}) == 5
    # A family that shares its attention modules names the layer in the call.
    assert query_start(1, (torch.zeros(1, 1, 64),), {"past_key_values": cache, "layer_idx": 0}) == 5


def test_query_start_is_left_to_the_keys_of_growing_caches():
    cache = DynamicCache(config=tiny_model("mistral").config)
    assert query_start(0, (torch.zeros(1, 5, 64),), {"past_key_values": cache}) is None
    assert query_start(0, (torch.zeros(1, 5, 64),), {}) is None


@torch.no_grad()
def test_static_caches_whose_layer_cannot_be_told_are_refused():
    model = adapted("hrm_text")
    cache = StaticCache(config=model.config, max_cache_len=16)
    with pytest.raises(ValueError, match=r"`cycle_offset` chooses among several of its layers.*DynamicCache"):
        model(tokens(length=4), past_key_values=cache)
