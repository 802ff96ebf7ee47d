"""Positions of tokens that go on with a cache: the cache knows where its keys stand, and its copies know as much."""

import contextlib
import copy
import pickle

import pytest
import torch
from families import tiny_model, tokens
from peft import get_peft_model
from position_models import FACTOR, Waits, additive, assert_close, mixture, one_angle, positions_of, rotated
from representatives import slow_but
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import Cache, DynamicLayer
from transformers.models.llama.modeling_llama import rotate_half

from peft_moice import MoICEConfig
from peft_moice.rope.noted_keys import NotedKeys

pytestmark = pytest.mark.usefixtures("no_grad")


def span(*values: int) -> torch.Tensor:
    return torch.tensor([values])


def dynamic_cache(model) -> DynamicCache:
    return DynamicCache(config=model.config)


def static_cache(model) -> StaticCache:
    return StaticCache(config=model.config, max_cache_len=24)


def run(model, cache, ids: torch.Tensor, place: torch.Tensor | None = None, mask=None) -> torch.Tensor:
    return model(ids, position_ids=place, past_key_values=cache, attention_mask=mask).logits


PIECES = {
    "a prompt that jumps": [span(*range(6)), span(*range(50, 54)), span(54), span(55)],
    "a prompt that steps back": [span(*range(6)), span(3, 4, 5, 6), span(7), span(8)],
    "a token that jumps": [span(*range(6)), span(50), span(51), span(52, 53), span(54)],
    "tokens at one place": [span(0), span(0), span(0), span(0, 0)],
    "a prompt with a gap": [span(0, 1, 2, 9, 10), span(11), span(12), span(13, 14)],
    "a late beginning": [span(*range(20, 26)), span(26), span(27), span(28, 29)],
    "rows apart": [
        torch.tensor([[0, 1, 2, 3], [0, 1, 2, 3]]),
        torch.tensor([[4], [30]]),
        torch.tensor([[5, 6], [31, 32]]),
    ],
}
"""Positions of the passes that fill a cache one after the other."""


def fill(model, cache, steps: list) -> torch.Tensor:
    """Logits of passes at these positions, one after the other; a function among them changes the cache."""
    ids, found = tokens(length=sum(step.shape[-1] for step in steps if isinstance(step, torch.Tensor))), []
    for step in steps:
        if isinstance(step, torch.Tensor):
            part, ids = ids.split([step.shape[-1], ids.shape[1] - step.shape[-1]], dim=1)
            found.append(run(model, cache, part, step))
        else:
            step(model, cache)
    return torch.cat(found, dim=1)


@pytest.mark.parametrize("make_cache", slow_but([dynamic_cache], [dynamic_cache, static_cache]))
@pytest.mark.parametrize("family", slow_but(["llama"], ["llama", "mistral", "gemma3_text", "gpt_neox", "persimmon"]))
@pytest.mark.parametrize("name", PIECES)
def test_one_angle_equals_a_model_with_that_rope_theta(name, family, make_cache):
    model, own = one_angle(family), rotated(family)
    assert_close(fill(model, make_cache(model), PIECES[name]), fill(own, make_cache(own), PIECES[name]))


@pytest.mark.parametrize("name", slow_but(["a prompt that jumps", "rows apart"], PIECES))
def test_mixtures_equal_the_reference_without_a_cache(name):
    model, reference = mixture(), mixture(implementation="reference")
    place = torch.cat([part.expand(2, -1) for part in PIECES[name]], dim=1)
    ids = tokens(length=place.shape[1])
    # The mask keeps transformers from taking a jump for the beginning of another sequence.
    expected = reference(ids, position_ids=place, attention_mask=torch.ones_like(ids), use_cache=False).logits
    assert_close(fill(model, dynamic_cache(model), PIECES[name]), expected)


def seen_by(length: int, hidden: dict[int, list[int]]) -> torch.Tensor:
    visible = torch.ones(length, length, dtype=torch.bool).tril()
    for query, keys in hidden.items():
        visible[query, keys] = False
    return visible[None, None]


@pytest.mark.parametrize("noted_by", ["prompt", "steps"])
def test_a_tree_over_a_cache(noted_by):
    """Two drafts of two tokens each behind the same six."""
    ids, visible = tokens(length=11), seen_by(11, {8: [6, 7], 9: [6, 7], 10: [8, 9]})
    place = torch.tensor([[*range(6), 6, 7, 6, 7, 8]])

    def logits(model) -> torch.Tensor:
        cache = dynamic_cache(model)
        for part in ids[:, :6].split(1, dim=1) if noted_by == "steps" else [ids[:, :6]]:
            start = cache.get_seq_length()
            run(model, cache, part, torch.arange(start, start + part.shape[1])[None])
        tree = run(model, cache, ids[:, 6:10], place[:, 6:10], additive(visible[:, :, 6:10, :10]))
        step = run(model, cache, ids[:, 10:], place[:, 10:], additive(visible[:, :, 10:]))
        return torch.cat((tree, step), dim=1)

    assert_close(logits(one_angle()), logits(rotated()))
    options = {"position_ids": place, "attention_mask": additive(visible), "use_cache": False}
    assert_close(logits(mixture()), mixture(implementation="reference")(ids, **options).logits[:, 6:])


@pytest.mark.slow
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
def test_continuations_of_one_prefix(copied):
    """Also of a prefix with a gap, and of one that ends in a token which jumped."""
    for places in ([span(*range(6))], [span(0, 1, 2, 7, 8, 9)], [span(*range(5)), span(8)]):

        def logits(model, places=places) -> torch.Tensor:
            prefix, found = dynamic_cache(model), []
            fill(model, prefix, places)
            for seed, start in ((1, 10), (2, 10), (3, 30)):
                cache, ids = copied(prefix), tokens(length=4, seed=seed)
                found.append(run(model, cache, ids[:, :3], torch.arange(start, start + 3)[None]))
                found.append(run(model, cache, ids[:, 3:], span(start + 3)))
            return torch.cat(found, dim=1)

        assert_close(logits(one_angle()), logits(rotated()))


def crop(model, cache) -> None:
    """Takes the last two tokens back."""
    length = cache.get_seq_length()
    cache.crop(-2)
    assert cache.get_seq_length() == length - 2


BUFFER = torch.empty(1, 2, dtype=torch.long)


def write(*places: int):
    """Other positions in the one buffer for those of all passes."""
    return lambda model, cache: BUFFER.copy_(span(*places))


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize(
    "steps",
    [
        [span(*range(5)), span(20, 21), crop, span(5, 6), span(7)],
        [span(*range(5)), write(9, 10), BUFFER, crop, write(30, 31), BUFFER, crop, write(5, 6), BUFFER],
    ],
    ids=["a jump is taken back", "drafts in one buffer"],
)
def test_a_cache_that_was_cropped_forgets_the_jump(family, steps):
    def logits(model) -> torch.Tensor:
        cache = dynamic_cache(model)
        if hasattr(cache, "activate_past_recording"):
            cache.activate_past_recording()
        return fill(model, cache, steps)

    assert_close(logits(one_angle(family)), logits(rotated(family)))
    logits(mixture(family, implementation="reference"))


class TestPaddedRows:
    @pytest.mark.parametrize("family", slow_but(["gemma3_text"], ["llama", "mistral", "gemma3_text"]))
    @pytest.mark.parametrize("parts", [(6, 6), (2, 2, 8), (1,) * 12, (4, 1, 1, 4, 2)])
    def test_prompts_in_pieces_padded_on_the_left(self, family, parts):
        """A row of which a piece is nothing but padding; forced kernels know plain rows only."""
        ids, padding = tokens(batch=3, length=12), torch.tensor([[0], [3], [5]])
        mask = (torch.arange(12) >= padding).long()
        place = positions_of(mask)
        model, found, start = mixture(family, implementation="native"), [], 0
        cache = dynamic_cache(model)
        for length in parts:
            end = start + length
            found.append(run(model, cache, ids[:, start:end], place[:, start:end], mask[:, :end]))
            start = end
        logits = torch.cat(found, dim=1)
        for row, count in enumerate(padding[:, 0].tolist()):
            alone = model(ids[row : row + 1, count:], use_cache=False).logits
            assert_close(logits[row : row + 1, count:], alone)

    def test_a_row_that_jumps_behind_its_padding(self):
        ids, mask = tokens(length=12), (torch.arange(12) >= torch.tensor([[0], [3]])).long()
        place = positions_of(mask)
        place[1, 6:] += 7

        def logits(model) -> torch.Tensor:
            cache = dynamic_cache(model)
            found = run(model, cache, ids[:, :6], place[:, :6], mask[:, :6])
            rest = run(model, cache, ids[:, 6:], place[:, 6:], mask)
            return torch.cat((found, rest), dim=1)[mask.bool()]

        assert_close(logits(one_angle()), logits(rotated()))

    @pytest.mark.parametrize("family", slow_but(["llama"], ["llama", "mistral", "gemma3_text", "gpt_neox"]))
    @pytest.mark.parametrize("cache", [None, "static"])
    def test_prompts_padded_on_the_right_are_continued(self, family, cache):
        """As in the base model, new tokens are numbered on from the last real one."""
        mask = (torch.arange(9) < torch.tensor([[9], [6], [4]])).long()
        ids = tokens(batch=3, length=9) * mask
        options = {"do_sample": False, "max_new_tokens": 8, "pad_token_id": 0, "output_logits": True}
        options |= {"cache_implementation": cache, "disable_compile": True} if cache else {}
        models = one_angle(family), rotated(family)
        outputs = [
            model.generate(input_ids=ids, attention_mask=mask, return_dict_in_generate=True, **options)
            for model in models
        ]
        assert torch.equal(outputs[0].sequences, outputs[1].sequences)
        assert_close(*(torch.stack(output.logits) for output in outputs))

    @pytest.mark.parametrize("side", ["left", "right"])
    def test_beams(self, side):
        order = torch.arange(9) if side == "right" else torch.arange(8, -1, -1)
        mask = (order < torch.tensor([[9], [5]])).long()
        ids = tokens(length=9) * mask
        options = {"do_sample": False, "num_beams": 3, "max_new_tokens": 8, "pad_token_id": 0}
        texts = [model.generate(input_ids=ids, attention_mask=mask, **options) for model in (one_angle(), rotated())]
        assert torch.equal(*texts)


def test_rows_that_are_repeated_selected_or_permuted():
    ids, place = tokens(length=6), torch.tensor([[*range(6)], [0, 1, 2, 10, 11, 12]])
    step, after = tokens(batch=4, length=2, seed=1), torch.tensor([[6, 7], [6, 7], [13, 14], [13, 14]])

    def repeated(model) -> torch.Tensor:
        cache = dynamic_cache(model)
        run(model, cache, ids, place)
        cache.batch_repeat_interleave(2)
        return run(model, cache, step, after)

    assert_close(repeated(one_angle()), repeated(rotated()))
    model = one_angle()
    cache = dynamic_cache(model)
    run(model, cache, step[:, :1].repeat(1, 6), place.repeat_interleave(2, dim=0))
    cache.batch_select_indices(torch.tensor([0, 2, 3]))
    with pytest.raises(ValueError, match="the rows of the batch have changed"):
        run(model, cache, step[:3], after[:3])
    assert cache.get_seq_length(0) == cache.get_seq_length(1) == 6, "refused after a layer had taken keys up"
    cache = dynamic_cache(model)
    run(model, cache, ids, torch.tensor([[*range(6)], [*range(30, 36)]]))
    cache.reorder_cache(torch.tensor([1, 0]))
    with pytest.raises(ValueError, match="the rows of the batch have changed"):
        run(model, cache, step[:2], torch.tensor([[36, 37], [6, 7]]))


@pytest.mark.parametrize("rows", [[2, 1], [2, 0, 1], [1, 1, 2, 0]])
@pytest.mark.parametrize("family", slow_but(["mistral"], ["llama", "mistral"]))
def test_padded_rows_that_are_selected_count_on(family, rows):
    model, mask = mixture(family, implementation="native"), (torch.arange(14) >= torch.tensor([[0], [3], [1]])).long()
    ids, place, rows = tokens(batch=3, length=14), positions_of(mask), torch.tensor(rows)
    cache = dynamic_cache(model)
    run(model, cache, ids[:, :11], place[:, :11], mask[:, :11])
    cache.batch_select_indices(rows)
    actual = run(model, cache, ids[rows, 11:], place[rows, 11:], mask[rows])
    for row, logits in zip(rows.tolist(), actual, strict=True):
        assert_close(logits, model(ids[row : row + 1, mask[row].bool()], use_cache=False).logits[0, -3:])


def exchange(change):
    def exchanged(model, cache) -> None:
        for layer in cache.layers:
            layer.keys, layer.values = change(layer.keys).contiguous(), change(layer.values).contiguous()

    return exchanged


def of_one_layer(model, cache) -> None:
    cache.layers[-1].keys, cache.layers[-1].values = (
        x[:, :, 4:] for x in (cache.layers[-1].keys, cache.layers[-1].values)
    )


def in_place(model, cache) -> None:
    for layer in cache.layers:
        layer.keys.copy_(layer.keys.flip(2))


def views_of_the_front(model, cache) -> None:
    for layer in cache.layers:
        layer.keys = layer.keys[:, :, 4:]


def out_of_a_static_cache(model, cache) -> None:
    for layer in cache.layers:
        layer.keys[:, :, 4:8] = layer.keys[:, :, 8:12].clone()
        layer.cumulative_length.fill_(8)


class Evicting(DynamicLayer):
    """Keeps the first and the last four keys."""

    def update(self, *states, **kwargs):
        found = super().update(*states, **kwargs)
        self.keys, self.values = (torch.cat((x[:, :, :4], x[:, :, -4:]), dim=2) for x in found)
        return found


MOVED = {
    "out of the middle": exchange(lambda x: x[:, :, [0, 1, 2, 3, 8, 9, 10, 11]]),
    "from the front": exchange(lambda x: x[:, :, 4:]),
    "a view of the front": views_of_the_front,
    "other keys of each head": exchange(lambda x: torch.stack((x[:, 0, 4:], x[:, 1, :8]), dim=1)),
    "in other order": exchange(lambda x: x.flip(2)),
    "in other order, in place": in_place,
    "twice the same": exchange(lambda x: torch.cat((x[:, :, :4], x), dim=2)),
    "from one layer": of_one_layer,
}


class TestKeysThatOthersMoved:
    """Libraries that evict keys leave those that remain where they stood, and nobody tells which they are."""

    @pytest.mark.parametrize("goes_on_at", ["the next token", "the number of keys"])
    @pytest.mark.parametrize("change", slow_but(["out of the middle", "in other order, in place"], MOVED))
    def test_are_refused(self, change, goes_on_at):
        model = mixture()
        cache = dynamic_cache(model)
        fill(model, cache, [span(*range(12)), MOVED[change]])
        place = span(12) if goes_on_at == "the next token" else None
        for _ in range(2):
            with pytest.raises(ValueError, match="they were taken out, moved or written by others"):
                run(model, cache, tokens(length=1, seed=1), place)

    @pytest.mark.parametrize(
        "family, make_cache, change",
        [
            ("mistral", dynamic_cache, MOVED["in other order"]),
            ("llama", static_cache, out_of_a_static_cache),
            ("llama", lambda model: Cache(layer_class_to_replicate=Evicting), lambda model, cache: None),
        ],
        ids=["sliding", "static", "evicts by itself"],
    )
    def test_are_refused_in_other_caches(self, family, make_cache, change):
        model = mixture(family)
        cache = make_cache(model)
        fill(model, cache, [span(*range(12)), change])
        with pytest.raises(ValueError, match="they were taken out, moved or written by others"):
            run(model, cache, tokens(length=1, seed=1))

    @pytest.mark.parametrize("seen", [True, False])
    def test_are_refused_although_no_pass_with_routers_saw_them(self, seen):
        model = mixture()
        cache = dynamic_cache(model)
        with contextlib.nullcontext() if seen else model.disable_adapter():
            fill(model, cache, [span(*range(12))])
        cache = pickle.loads(pickle.dumps(cache))
        MOVED["out of the middle"](model, cache)
        with pytest.raises(ValueError, match="do not count up from the keys in the cache"):
            run(model, cache, tokens(length=1, seed=1), span(12))

    @pytest.mark.parametrize(
        "change, bound",
        [
            (lambda x: x.transpose(1, 2).clone().transpose(1, 2), 1e-5),
            (lambda x: x[:, :, :8], 1e-5),
            (lambda x: x.half(), 1e-3),
        ],
        ids=["copied", "cropped", "in half precision"],
    )
    def test_others_may_write_keys_that_stay_in_order(self, change, bound):
        steps = [span(*range(6), *range(20, 26)), exchange(change), span(40, 41)]
        actual, expected = (fill(model, dynamic_cache(model), steps) for model in (one_angle(), rotated()))
        torch.testing.assert_close(actual, expected, rtol=0, atol=bound * expected.abs().max().item())

    def test_sinks_whose_window_is_rotated_to_their_places_count_on(self):
        """As StreamingLLM does: four sinks, and the last six keys turned to the places behind them."""

        def stream(model, cache) -> None:
            for layer in cache.layers:
                window = layer.keys[:, :, 10:]
                cos, sin = model.get_decoder().rotary_emb(window, span(*[-6] * 6))
                layer.keys = torch.cat((layer.keys[:, :, :4], window * cos + rotate_half(window) * sin), dim=2)
                layer.values = torch.cat((layer.values[:, :, :4], layer.values[:, :, 10:]), dim=2)

        steps = [span(*range(16)), stream, span(10), span(11)]
        assert_close(*(fill(model, dynamic_cache(model), steps) for model in (one_angle(), rotated())))


class TestKeysThatNobodyToldAbout:
    """Those that the base model put into the cache before it had an adapter."""

    def cache(self, base, place: torch.Tensor, mask: torch.Tensor | None = None):
        cache = dynamic_cache(base)
        run(base, cache, tokens(length=6), place, mask)
        assert NotedKeys.of(cache) is None
        return cache

    def test_are_taken_to_count_up(self):
        mask = (torch.arange(9) >= torch.tensor([[0], [2]])).long()
        for place, options in ((torch.arange(9)[None], {}), (positions_of(mask), {"mask": mask})):
            prompt = {name: value[:, :6] for name, value in options.items()}
            # Keys of later layers depend on the angles of earlier ones, so one layer has to do.
            own = rotated(num_hidden_layers=1)
            cache = dynamic_cache(own)
            run(own, cache, tokens(length=6), place[:, :6], **prompt)
            expected = run(own, cache, tokens(length=3, seed=1), place[:, 6:], **options)
            base = tiny_model("llama", num_hidden_layers=1)
            cache = self.cache(base, place[:, :6], **prompt)
            model = get_peft_model(base, MoICEConfig(base_multipliers=[FACTOR])).eval()
            assert_close(run(model, cache, tokens(length=3, seed=1), place[:, 6:], **options), expected)

    def test_are_refused_where_the_next_tokens_do_not_follow(self):
        base = tiny_model("llama")
        cache = self.cache(base, torch.arange(6)[None])
        model = get_peft_model(base, MoICEConfig(base_multipliers=[FACTOR])).eval()
        with pytest.raises(ValueError, match=r"position_ids \[\[50, 51, 52\]\] do not count up from the keys"):
            run(model, cache, tokens(length=3), span(50, 51, 52))
        with model.disable_adapter():
            run(model, cache, tokens(length=3), span(50, 51, 52))

    def test_keys_that_came_while_routers_were_off_are_known(self):
        """The cache holds the base model's keys either way."""

        model, own, places = one_angle(num_hidden_layers=1), rotated(num_hidden_layers=1), PIECES["a token that jumps"]
        cache, own_cache = dynamic_cache(model), dynamic_cache(own)
        with model.disable_adapter():
            fill(model, cache, places)
        fill(own, own_cache, places)
        ids, place = tokens(length=3, seed=1), span(80, 81, 82)
        assert_close(run(model, cache, ids, place), run(own, own_cache, ids, place))


def test_chats_with_padded_rows_generate_as_without_a_cache():
    model, ids = mixture(), tokens(length=14)
    mask = torch.ones(2, 14, dtype=torch.long)
    mask[1, :4] = 0
    options = {"do_sample": False, "max_new_tokens": 4, "pad_token_id": 0}
    expected = model.generate(input_ids=ids, attention_mask=mask, use_cache=False, **options)
    for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=18)):
        run(model, cache, ids[:, :8], positions_of(mask[:, :8]), mask[:, :8])
        actual = model.generate(input_ids=ids, attention_mask=mask, past_key_values=cache, **options)
        assert torch.equal(actual, expected)


def test_static_caches_whose_layer_cannot_be_told_are_refused():
    model = mixture("hrm_text")
    with pytest.raises(ValueError, match=r"`cycle_offset` chooses among several of its layers.*DynamicCache"):
        run(model, StaticCache(config=model.config, max_cache_len=16), tokens(length=4))


@pytest.mark.slow
def test_layers_that_come_more_than_once_in_a_pass():
    model, own = one_angle("hrm_text"), rotated("hrm_text")
    for name in ("a late beginning", "a token that jumps"):
        assert_close(fill(model, dynamic_cache(model), PIECES[name]), fill(own, dynamic_cache(own), PIECES[name]))


class TestOnAGpu:
    @pytest.mark.parametrize("prompt", ["plain", "left padding", "gap"])
    def test_single_tokens_do_not_wait(self, as_on_a_gpu, prompt):
        mask = (torch.arange(9) >= torch.tensor([[0], [3 if prompt == "left padding" else 0]])).long()
        place = positions_of(mask) + (torch.arange(9) > 4) * (9 if prompt == "gap" else 0)

        def waits(model) -> int:
            cache = dynamic_cache(model)
            run(model, cache, tokens(length=6), place[:, :6], mask[:, :6])
            with Waits() as waits:
                for t in range(6, 9):
                    run(model, cache, tokens(length=1, seed=t), place[:, t : t + 1], mask[:, : t + 1])
            return waits.count

        assert waits(mixture()) == waits(tiny_model("llama"))

    def test_prompts_padded_on_the_right_are_seen(self, as_on_a_gpu):
        TestPaddedRows().test_prompts_padded_on_the_right_are_continued("llama", None)

    def test_a_single_token_that_jumps_is_seen_by_the_next_prompt(self, as_on_a_gpu):
        steps = [span(*range(6)), span(50), span(51, 52), span(53)]
        # With one layer, the token that jumped leaves nothing but its key behind.
        models = one_angle(num_hidden_layers=1), rotated(num_hidden_layers=1)
        assert_close(*(fill(model, dynamic_cache(model), steps)[:, 7:] for model in models))


@pytest.mark.slow
def test_compiled_steps_after_rows_that_do_not_count_up_are_refused():
    model, ids = mixture(num_hidden_layers=1), tokens(length=8)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    mask = (torch.arange(6) < torch.tensor([[6], [4]])).long()
    cache = static_cache(model)
    run(model, cache, ids[:, :6], positions_of(mask), mask)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="Compiled code counts positions by the order of the keys"):
        run(compiled, cache, ids[:, 6:7], torch.tensor([[6], [4]]))
    cache = static_cache(model)
    run(model, cache, ids[:, :6], torch.arange(6)[None])
    for t in range(6, 8):
        step = run(compiled, cache, ids[:, t : t + 1], span(t))
    assert_close(step, model(ids, use_cache=False).logits[:, -1:])
    # What a compiled pass left in the cache is taken to count up.
    run(model, cache, ids[:, :2], span(8, 9))
    with pytest.raises(ValueError, match="cannot tell where those stand"):
        run(model, cache, ids[:, :2], span(20, 21))
    torch.compiler.reset()
