"""Rope type longrope: two sets of angles, one up to the original length and one beyond it."""

import copy
import pickle

import pytest
import torch
from families import tiny_model, tokens
from peft import PeftModel, get_peft_model
from position_models import Waits
from test_window import close, in_chunks, oracle_by_position
from torch._dynamo.testing import CompileCounter
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache
from versions import needs_transformers

from peft_moice import MoICEConfig, extend
from peft_moice.probing import LayerProbe, attention_module_names

ORIGINAL_LENGTH = 32
SHORT, EXACTLY, LONG = 20, ORIGINAL_LENGTH, 50


def model_of(family: str = "llama", theta_factor: float = 1.0, angles: int = 8, **options):
    """A model whose original length is 32 tokens, and whose long factors are not a multiple of its short ones."""
    parameters = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": ORIGINAL_LENGTH,
        "short_factor": [1.0 + 0.1 * i for i in range(angles)],
        "long_factor": [1.5 + 0.5 * i for i in range(angles)],
    }
    if family in ("phi3", "phimoe"):
        options["original_max_position_embeddings"] = ORIGINAL_LENGTH
    if family == "phimoe":
        parameters |= {"short_mscale": 1.0, "long_mscale": 1.2}
    if family == "olmo3":
        default = {"rope_type": "default", "rope_theta": 10000.0}
        parameters = {"full_attention": parameters, "sliding_attention": default}
    return tiny_model(family, theta_factor, rope_parameters=parameters, **options)


def mixture(**options) -> MoICEConfig:
    return MoICEConfig(base_multipliers=[1.0, 4.0, 0.25], top_k=2, init_weights=False, **options)


def adapted(model=None, config: MoICEConfig | None = None):
    torch.manual_seed(1)
    return get_peft_model(model or model_of(), config or mixture()).eval()


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def cached_logits(model, ids: torch.Tensor, prompt_length: int, cache=None, **options) -> torch.Tensor:
    """Logits of `ids`: a prompt at once, then the rest one by one."""
    cache = DynamicCache(config=model.config) if cache is None else cache
    pieces = ids.split((prompt_length, *([1] * (ids.shape[1] - prompt_length))), dim=1)
    return torch.cat([model(piece, past_key_values=cache, **options).logits for piece in pieces], dim=1)


@pytest.mark.parametrize(
    "family",
    [
        "llama",
        "phi3",
        "phimoe",
        pytest.param("olmo3", marks=needs_transformers("5.21", "cannot run longrope with layer types twice")),
        "deepseek_v3",
    ],
)
@torch.no_grad()
def test_one_angle_equals_a_model_with_that_rope_theta(family):
    angles = 4 if family == "deepseek_v3" else 8
    base, turned = model_of(family, angles=angles), model_of(family, theta_factor=3.0, angles=angles)
    own = {length: base(tokens(length=length)).logits for length in (SHORT, EXACTLY, LONG)}
    model = adapted(base, MoICEConfig(base_multipliers=[3.0]))
    for length in (SHORT, EXACTLY, LONG, SHORT):
        ids = tokens(length=length)
        expected = turned(ids).logits
        assert (own[length] - expected).abs().max() > 1e-3 * expected.abs().max()
        assert_close(model(ids).logits, expected)
        assert_close(cached_logits(model, ids, length - 3 if length != LONG else 40), expected)


@pytest.mark.parametrize("length", [SHORT, EXACTLY, LONG])
@torch.no_grad()
def test_mixture_equals_reference(length):
    ids = tokens(length=length)
    expected = adapted(config=mixture(implementation="reference"))(ids).logits
    for implementation in ("auto", "delegated"):
        model = adapted(config=mixture(implementation=implementation))
        assert_close(model(ids).logits, expected)
        assert_close(cached_logits(model, ids, length - 3), expected)


@torch.no_grad()
def test_merged_and_saved_models(tmp_path):
    model = adapted(model_of("phi3"))
    lengths = (SHORT, LONG, EXACTLY)
    expected = [model(tokens(length=length)).logits for length in lengths]
    model.save_pretrained(tmp_path / "adapter")
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    for length, logits in zip(lengths, expected, strict=True):
        ids = tokens(length=length)
        assert_close(again(ids).logits, logits)
        assert_close(cached_logits(again, ids, length - 3), logits)
    with pytest.raises(ValueError, match="original length of 32 tokens"):
        cached_logits(again, tokens(length=40), 30)


def test_gradients_with_checkpointing_when_other_lengths_come_in_between():
    def gradients(checkpoint: bool) -> list[torch.Tensor]:
        model = adapted(model_of()).train()
        if checkpoint:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        losses = [model(input_ids=tokens(length=n), labels=tokens(length=n)).loss for n in (LONG, SHORT)]
        sum(losses).backward()
        return [parameter.grad for name, parameter in model.named_parameters() if "moice_router" in name]

    for actual, expected in zip(gradients(True), gradients(False), strict=True):
        assert expected.abs().max() > 0
        assert_close(actual, expected)


class TestSequencesThatCrossTheOriginalLength:
    """In transformers, keys in the cache keep the factors that held when they came."""

    @pytest.mark.parametrize("merged", [False, True])
    @torch.no_grad()
    def test_step_by_step(self, merged):
        model, ids = adapted(), tokens(length=40)
        if merged:
            model.merge_adapter()
        cache = DynamicCache(config=model.config)
        cached_logits(model, ids[:, :32], 30, cache)
        with pytest.raises(
            ValueError, match=r"uses the long factors .* the short ones.* original length of 32 tokens"
        ):
            model(ids[:, 32:33], past_key_values=cache)
        with pytest.raises(ValueError, match="Run the whole sequence again without its cache"):
            model(ids[:, 32:36], past_key_values=copy.deepcopy(cache))
        assert_close(model(ids).logits[:, 32:], cached_logits(model, ids, 33)[:, 32:])

    @torch.no_grad()
    def test_prompt_in_pieces(self):
        cache = DynamicCache(config=model_of().config)
        model, ids = adapted(), tokens(length=LONG)
        expected = model(ids).logits
        model(ids[:, :25], past_key_values=cache)
        with pytest.raises(ValueError, match="original length of 32 tokens"):
            model(ids[:, 25:], past_key_values=cache)
        cache = DynamicCache(config=model.config)
        pieces = [model(piece, past_key_values=cache).logits for piece in ids.split((40, 5, 5), dim=1)]
        assert_close(torch.cat(pieces, dim=1), expected)

    @torch.no_grad()
    def test_cropped_below_it(self):
        model, ids = adapted(), tokens(length=LONG)
        cache = DynamicCache(config=model.config)
        model(ids, past_key_values=cache)
        cache = pickle.loads(pickle.dumps(cache))
        cache.layers[0].keys, cache.layers[1].keys = (layer.keys[..., :20, :] for layer in cache.layers)
        cache.layers[0].values, cache.layers[1].values = (layer.values[..., :20, :] for layer in cache.layers)
        with pytest.raises(ValueError, match=r"uses the short factors .* the long ones"):
            model(ids[:, 20:21], past_key_values=cache)

    @torch.no_grad()
    def test_while_routers_are_off(self):
        model, base, ids = adapted(), model_of(), tokens(length=40)
        cache, own_cache = DynamicCache(config=model.config), DynamicCache(config=model.config)
        with model.disable_adapter():
            logits = cached_logits(model, ids[:, :35], 30, cache)
            assert torch.equal(logits, cached_logits(base, ids[:, :35], 30, own_cache))
        with pytest.raises(ValueError, match="both kinds"):
            model(ids[:, 35:36], past_key_values=cache)
        cache = DynamicCache(config=model.config)
        with model.disable_adapter():
            cached_logits(model, ids[:, :38], 36, cache)
        model(ids[:, 38:], past_key_values=cache)

    @needs_transformers("5.20", "throws Phi-3's cache away, but runs the last token alone")
    @torch.no_grad()
    def test_generation_of_phi_runs_the_sequence_again(self):
        """Phi-3 throws its cache away where the factors change, so that generating across is exact."""
        model, ids = adapted(model_of("phi3")), tokens(batch=1, length=28)
        options = {"do_sample": False, "min_new_tokens": 8, "max_new_tokens": 8, "pad_token_id": 0}
        generated = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
        for length in range(28, 36):
            ids = torch.cat((ids, generated[:, length : length + 1]), dim=1)
            allowed = model(ids[:, :-1], use_cache=False).logits[0, -1]
            allowed[2] = -torch.inf  # the end of the text, ruled out by min_new_tokens
            assert allowed.argmax() == ids[0, -1]


@torch.no_grad()
def test_padded_batches_count_positions_and_not_places_in_the_cache():
    """28 tokens and 8 of padding in front: 36 places, but within the original length until 4 more have come."""
    model, ids = adapted(), tokens(length=33)
    padded = torch.cat((torch.zeros(2, 8, dtype=torch.long), ids), dim=1)
    mask = (torch.arange(41) >= 8).long().expand(2, -1)
    positions = (torch.arange(41) - 8).clamp(min=0).expand(2, -1)
    cache, logits = DynamicCache(config=model.config), []
    for start, end in ((0, 36), *((place, place + 1) for place in range(36, 40))):
        options = {"attention_mask": mask[:, :end], "position_ids": positions[:, start:end].clone()}
        logits.append(model(padded[:, start:end], past_key_values=cache, **options).logits)
    assert_close(torch.cat(logits, dim=1)[:, 8:], model(ids[:, :32]).logits)
    with pytest.raises(ValueError, match="original length of 32 tokens"):
        model(padded[:, 40:], past_key_values=cache, attention_mask=mask, position_ids=positions[:, 40:])


@torch.no_grad()
def test_prompts_that_do_not_begin_at_zero():
    model, ids = adapted(), tokens(length=20)
    cache = DynamicCache(config=model.config)
    positions = torch.arange(20, 40)[None]
    actual = model(ids[:, :15], position_ids=positions[:, :15], past_key_values=cache).logits
    rest = model(ids[:, 15:], position_ids=positions[:, 15:], past_key_values=cache).logits
    reference = adapted(config=mixture(implementation="reference"))
    expected = reference(ids, position_ids=positions).logits
    assert_close(torch.cat((actual, rest), dim=1), expected)
    assert (expected - reference(ids).logits).abs().max() > 0.1


@pytest.mark.parametrize("length", [SHORT, LONG])
@torch.no_grad()
def test_steps_of_decoding_wait_for_the_device_no_more_often_than_the_base_model(as_on_a_gpu, length):
    def waits(model) -> int:
        cache = DynamicCache(config=model.config)
        cached_logits(model, tokens(length=length), length - 2, cache)
        step = tokens(length=2, seed=1).split(1, dim=1)
        with Waits() as waits:
            for token in step:
                model(token, past_key_values=cache)
        return waits.count

    assert waits(adapted()) == waits(model_of())


@torch.no_grad()
def test_static_caches():
    model, ids = adapted(), tokens(length=LONG)
    for length, places in ((LONG, 64), (EXACTLY, ORIGINAL_LENGTH)):
        expected = model(ids[:, :length]).logits
        cache = StaticCache(config=model.config, max_cache_len=places)
        assert_close(cached_logits(model, ids[:, :length], length - 3 if length < 40 else 40, cache), expected)
    with pytest.raises(ValueError, match=r"static cache of 33 places can outgrow .* 32 tokens unseen.*DynamicCache"):
        cached_logits(model, ids[:, :SHORT], 15, StaticCache(config=model.config, max_cache_len=33))


@pytest.mark.slow
@needs_transformers("5.21", "branches on the values of positions in longrope")
@torch.no_grad()
def test_compiled_prompts_are_one_graph_per_shape_of_either_length():
    model = adapted(model_of(num_hidden_layers=1))
    for length in (SHORT, LONG):
        torch.compiler.reset()
        graphs, ids = CompileCounter(), tokens(length=length)
        actual = torch.compile(model, fullgraph=True, backend=graphs)(ids, use_cache=False).logits
        assert_close(actual, model(ids, use_cache=False).logits)
        assert graphs.frame_count == 1


@pytest.mark.slow
@torch.no_grad()
def test_compiled_decoding():
    model, ids = adapted(model_of(num_hidden_layers=1)), tokens(length=LONG)
    expected = model(ids).logits
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager")
    cache = StaticCache(config=model.config, max_cache_len=64)
    model(ids[:, :40], past_key_values=cache)
    logits = [compiled(ids[:, t : t + 1], past_key_values=cache).logits for t in range(40, 43)]
    assert_close(torch.cat(logits, dim=1), expected[:, 40:43])

    cache = DynamicCache(config=model.config)
    model(ids[:, :32], past_key_values=cache)
    with pytest.raises(Exception, match="original length of 32 tokens"):
        compiled(ids[:, 32:33], past_key_values=cache)


@needs_transformers("5.21", "branches on the values of positions in longrope")
@pytest.mark.slow
@torch.no_grad()
def test_compiled_decoding_over_keys_that_nobody_saw_come():
    model, ids = adapted(model_of(num_hidden_layers=1)), tokens(length=LONG)
    cache = DynamicCache(config=model.config)
    model(ids[:, :32], past_key_values=cache)
    del cache._moice_note
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with pytest.raises(torch._dynamo.exc.Unsupported, match="Run the prompt, which fills the cache, without"):
        compiled(ids[:, 32:33], past_key_values=cache)


@torch.no_grad()
def test_assisted_generation_and_several_adapters():
    model, ids = adapted(), tokens(batch=1, length=40)
    model.add_adapter("other", MoICEConfig(base_multipliers=[1.0, 2.0], init_weights=False))
    model.base_model.set_adapter(["default", "other"])
    options = {"do_sample": False, "max_new_tokens": 6, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
    expected = model.generate(input_ids=ids, use_cache=False, **options)
    assert torch.equal(model.generate(input_ids=ids, **options), expected)
    assert torch.equal(model.generate(input_ids=ids, prompt_lookup_num_tokens=3, **options), expected)


@torch.no_grad()
def test_layers_that_get_no_position_ids_learn_them_from_the_rotary_embedding():
    model = adapted(model_of("llama4_text"), MoICEConfig(base_multipliers=[3.0]))
    for length in (SHORT, LONG):
        expected = model_of("llama4_text", theta_factor=3.0)(tokens(length=length)).logits
        assert_close(model(tokens(length=length)).logits, expected)
        assert_close(cached_logits(model, tokens(length=length), length - 3), expected)


def test_phimoe_keeps_its_angles():
    """Its rotary embedding takes the short factors at any length, so its sequences may cross the original one."""
    for family, original_length in (("phimoe", None), ("phi3", ORIGINAL_LENGTH)):
        model = model_of(family)
        names = attention_module_names(model)
        assert LayerProbe(model).plan(names[0]).rope.original_length == original_length
    ids, turned = tokens(length=40), model_of("phimoe", theta_factor=3.0)
    model = adapted(model_of("phimoe"), MoICEConfig(base_multipliers=[3.0]))
    with torch.no_grad():
        assert_close(cached_logits(model, ids, 30), cached_logits(turned, ids, 30))


class TestRopesByPosition:
    """Queries below the original length have the short factors, later ones the long ones, over one cache."""

    @pytest.mark.parametrize(
        ("family", "options"),
        [
            ("llama", {}),
            ("phi3", {"sliding_window": 256}),
            pytest.param("olmo3", {}, marks=needs_transformers("5.21", "cannot run longrope with layer types twice")),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    @torch.no_grad()
    def test_equals_the_models_under_either_set_over_keys_rotated_anew(self, family, options):
        ids, base, kind = (
            tokens(length=LONG),
            model_of(family, **options),
            "full_attention" if family == "olmo3" else None,
        )
        own = base.config.rope_parameters[kind] if kind else base.config.rope_parameters
        rules = [
            {"query_positions": [0, ORIGINAL_LENGTH]},
            {"query_positions": [ORIGINAL_LENGTH, None], "short_factor": own["long_factor"]},
        ]
        expected = oracle_by_position(base, ids, rules, kind)
        short, long = base(ids[:, :EXACTLY]).logits, base(ids).logits
        model = extend(base).eval()
        close(model(ids).logits, expected)
        assert (expected - long).abs().max() > 1e-2 * long.abs().max()  # which has the long factors for all
        assert torch.equal(model(ids[:, :EXACTLY]).logits, short)
        for sizes in ([10, 30], [*[1] * 2, 29, 1, 1, 1, 1]):
            close(in_chunks(model, ids, sizes), expected)
        static = StaticCache(config=model.config, max_cache_len=64)
        close(in_chunks(model, ids, [28, *[1] * 9], cache=static), expected)
        with model.disable_adapter():
            assert torch.equal(model(ids).logits, long)
        close(model(ids).logits, expected)
        assert torch.equal(model.unload()(ids).logits, long)

    @torch.no_grad()
    def test_saved_merged_and_beside_routers(self, tmp_path):
        ids, model = tokens(length=LONG), extend(model_of("phi3", sliding_window=256)).eval()
        expected = model(ids).logits
        model.save_pretrained(tmp_path / "adapter")
        again = PeftModel.from_pretrained(model_of("phi3", sliding_window=256), tmp_path / "adapter").eval()
        assert torch.equal(again(ids).logits, expected)
        options = {"do_sample": False, "min_new_tokens": 16, "max_new_tokens": 16, "pad_token_id": 0}
        llama = extend(model_of()).eval()  # Phi-3 throws its cache away on the way
        generated = llama.generate(input_ids=ids[:1, :24], **options)
        allowed = llama(generated[:, :-1]).logits[0, 23:]
        allowed[:, 2] = -torch.inf  # the end of the text, ruled out by min_new_tokens
        assert torch.equal(allowed.argmax(-1), generated[0, 24:])
        model.merge_and_unload().save_pretrained(tmp_path / "merged")
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
        assert torch.equal(merged(ids).logits, expected)
        # With routers, which decide below the original length alone.
        both, routed = extend(adapted(model_of(num_hidden_layers=1))).eval(), adapted(model_of(num_hidden_layers=1))
        beyond = extend(model_of(num_hidden_layers=1)).eval()(ids).logits
        actual = in_chunks(both, ids, [30, 1, 1, 1, 1])
        close(actual[:, :EXACTLY], routed(ids[:, :EXACTLY]).logits)
        close(actual[:, EXACTLY:], beyond[:, EXACTLY:])

    @torch.no_grad()
    def test_caches_with_other_factors_are_refused(self):
        model, ids = extend(model_of()).eval(), tokens(length=LONG)
        for prompt in (40, 30):
            cache = DynamicCache(config=model.config)
            with model.disable_adapter():
                in_chunks(model, ids[:, :44], [prompt, 1], cache)
            with pytest.raises(ValueError, match=r"uses the short factors.*(the long ones|both kinds)"):
                model(ids[:, 44:45], past_key_values=cache)
        cache = DynamicCache(config=model.config)
        model(ids[:, :40], past_key_values=cache)
        with model.disable_adapter():
            model(ids[:, 40:42], past_key_values=cache)
        with pytest.raises(ValueError, match="both kinds"):
            model(ids[:, 42:], past_key_values=cache)

    def test_rules_that_go_on_with_the_short_factors_are_refused(self):
        beyond = {"query_positions": [ORIGINAL_LENGTH, None]}
        for rules in (
            [{"query_positions": [0, 40]}, {"query_positions": [40, None], "rope_type": "longrope"}],
            [{"query_positions": [0, 20]}, {"query_positions": [20, None], "rope_type": "longrope"}],
            [{"query_positions": [0, ORIGINAL_LENGTH]}, beyond],
        ):
            with pytest.raises(ValueError, match=r"short factors hold for its first 32 tokens.*as `extend` does"):
                get_peft_model(model_of(), MoICEConfig(ropes=rules))
        rules = [{"query_positions": [0, ORIGINAL_LENGTH]}, {**beyond, "rope_type": "longrope"}]
        with pytest.raises(ValueError, match=r"leave out model.layers.0.self_attn"):
            get_peft_model(model_of(), MoICEConfig(ropes=rules, layers_to_transform=[1]))
        with pytest.raises(ValueError, match=r"`factor` is 4\.0.*Leave them out"):
            extend(model_of(), 4.0)

    @pytest.mark.slow
    @needs_transformers("5.21", "branches on the values of positions in longrope")
    @torch.no_grad()
    def test_compiled_decoding_across(self):
        model, ids, graphs = extend(model_of(num_hidden_layers=1)).eval(), tokens(length=44), CompileCounter()
        expected, cache = model(ids).logits, StaticCache(config=model.config, max_cache_len=64)
        model(ids[:, :29], past_key_values=cache)
        torch.compiler.reset()
        compiled = torch.compile(model, fullgraph=True, backend=graphs)
        logits = [
            compiled(ids[:, i : i + 1], past_key_values=cache, position_ids=torch.tensor([[i]])).logits
            for i in range(29, 44)
        ]
        close(torch.cat(logits, dim=1), expected[:, 29:])
        assert graphs.frame_count == 1
