"""Models with ropes by position and distance: the base model within its window, exact beyond it."""

import copy
import itertools

import pytest
import torch
from families import tiny_model, tokens
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from position_models import assert_close as close
from representatives import slow_but
from tiny_models import decide, load, logits_of, save_tiny_model, token_ids, wide_config
from torch._dynamo.testing import CompileCounter
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

import peft_moice
from peft_moice import MoICEConfig, MoICELayer

pytestmark = pytest.mark.usefixtures("no_grad")

WINDOW, NEAR, FACTOR = 32, 24, 4
SLOWER = (FACTOR * WINDOW - NEAR) / (WINDOW - NEAR)
"""How much more slowly the angles of far keys grow in what `extend` writes."""
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": WINDOW}
BY_POSITION = [{"query_positions": [0, WINDOW]}, {"query_positions": [WINDOW, None], **YARN}]
SEVERAL = [
    {"query_positions": [0, WINDOW]},
    {"query_positions": [WINDOW, 50], "rope_type": "linear", "factor": 2.0},
    {"query_positions": [50, None], **YARN},
]
MIXED = [*SEVERAL[:2], {"query_positions": [50, None], "distances": [0, 20]}]
MIXED += [{"query_positions": [50, None], "distances": [20, None], "rope_type": "linear", "factor": 8.0}]
MIXED_CONFIG = MoICEConfig(ropes=MIXED, implementation="delegated", task_type="CAUSAL_LM")
RULES = {"by distance": None, "by position": BY_POSITION, "several": SEVERAL, "mixed": MIXED}
ATTENTIONS = ["eager", "sdpa", pytest.param("flex_attention", marks=pytest.mark.slow)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return save_tiny_model(tmp_path_factory.mktemp("short"), max_position_embeddings=WINDOW)


def with_ropes(model, ropes: list, implementation: str = "auto"):
    config = MoICEConfig(ropes=ropes, implementation=implementation, task_type="CAUSAL_LM")
    return get_peft_model(model, config).eval()


def extended(folder: str, ropes: list | None = None, implementation: str = "auto", **options):
    """The tiny model with the rules that `extend` writes, or with others."""
    model = load(folder, **options)
    config = peft_moice.tuner.extending.extension_config(model.config, FACTOR)
    return with_ropes(model, ropes or config.ropes, implementation)


def in_chunks(model, ids: torch.Tensor, sizes: list[int], cache=None, **options) -> torch.Tensor:
    """Logits of a sequence given to the model in pieces, the last of them as long as is left."""
    cache, parts = DynamicCache() if cache is None else cache, []
    sizes = [*sizes, ids.shape[1] - sum(sizes)]
    for start, size in zip([sum(sizes[:i]) for i in range(len(sizes))], sizes, strict=True):
        piece = {name: value[:, start : start + size] for name, value in options.items()}
        parts.append(model(ids[:, start : start + size], past_key_values=cache, **piece).logits)
    return torch.cat(parts, dim=1)


def left_padded(lengths: tuple[int, ...]) -> dict[str, torch.Tensor]:
    mask = torch.stack([torch.arange(max(lengths)) >= max(lengths) - length for length in lengths]).long()
    return {
        "input_ids": token_ids(len(lengths), max(lengths)) * mask,
        "attention_mask": mask,
        "position_ids": (mask.cumsum(-1) - 1).clamp(min=0),
    }


class TestWithin:
    """Queries below the window compute what they did, bit for bit."""

    @pytest.fixture(params=ATTENTIONS)
    def pair(self, request, folder):
        base, model = (
            load(folder, attn_implementation=request.param),
            extended(folder, attn_implementation=request.param),
        )
        base.requires_grad_(False)  # as PEFT has it; PyTorch chooses how to compute products by it
        # Where weights lie in memory decides the order in which some products are summed.
        for own, parameter in zip(base.parameters(), model.parameters(), strict=True):
            parameter.data = own.data
        return base, model

    @torch.enable_grad()
    def test_logits_and_gradients(self, pair):
        ids, results = token_ids(length=WINDOW), []
        if pair[0].config._attn_implementation == "flex_attention":  # no gradients on a CPU
            assert torch.equal(*[logits_of(model, ids) for model in pair])
            return
        for model in pair:
            embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
            output = model(inputs_embeds=embedded, labels=ids)
            results.append((output.logits, *torch.autograd.grad(output.loss, embedded)))
        for actual, expected in zip(*results, strict=True):
            assert torch.equal(actual, expected)

    def test_chunks_single_tokens_and_padded_rows(self, pair):
        base, model = pair
        ids, batch = token_ids(length=WINDOW), left_padded((WINDOW, 9))
        assert torch.equal(model(**batch).logits, base(**batch).logits)
        for sizes in ([5, 20], [*[1] * 8, 22, 1]):
            assert torch.equal(in_chunks(model, ids, sizes), in_chunks(base, ids, sizes))

    def test_a_static_cache(self, pair):
        ids, config = token_ids(length=WINDOW), pair[0].config
        results = [in_chunks(m, ids, [20, 11], cache=StaticCache(config=config, max_cache_len=48)) for m in pair]
        assert torch.equal(*results)

    @pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 4}], ids=str)
    def test_generated_tokens(self, pair, options):
        batch = left_padded((16,)) if "prompt_lookup_num_tokens" in options else left_padded((16, 7))
        batch.pop("position_ids")
        # What is drafted, and not taken, must not stand beyond either.
        length = WINDOW - 16 - options.get("prompt_lookup_num_tokens", 0)
        options = {"max_new_tokens": length, "return_dict_in_generate": True, "output_scores": True} | options
        results = [model.generate(**batch, do_sample=False, **options) for model in pair]
        assert torch.equal(*[result.sequences for result in results])
        for scores in zip(*[result.scores for result in results], strict=True):
            assert torch.equal(*scores)


def frequencies(base: float = 10000.0, size: int = 16) -> torch.Tensor:
    return base ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)


def angles_of_extension(m: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
    """`[S, T, P]`, the angles between queries at `m` and keys at `n` under the rules that `extend` writes."""
    distance = (m[:, None] - n)[..., None].double()
    is_far = (m[:, None, None] >= WINDOW) & (distance >= NEAR)
    return torch.where(is_far, NEAR + (distance - NEAR) / SLOWER, distance) * frequencies()


@torch.no_grad()
def oracle_logits(model, ids: torch.Tensor, positions=None, sees=None, angles=angles_of_extension) -> torch.Tensor:
    """A llama in float64 from its weights alone, whose scores are computed pair by pair from unrotated vectors.

    Args:
        model: a tiny llama.
        ids: `[T]`, one row.
        positions: `[T]`.
        sees: `[T, T]` of booleans. Default: causal.
        angles: gives the angles `[T, T, P]` from the positions of queries and keys.
    """
    weights = {name: value.double() for name, value in model.state_dict().items()}
    order = torch.arange(len(ids))
    positions, sees = order if positions is None else positions, order[:, None] >= order if sees is None else sees
    angle = angles(positions, positions)

    def norm(x, name):
        return x / (x.square().mean(-1, keepdim=True) + model.config.rms_norm_eps).sqrt() * weights[f"{name}.weight"]

    hidden = weights["model.embed_tokens.weight"][ids]
    for i in range(model.config.num_hidden_layers):
        at = f"model.layers.{i}"
        x = norm(hidden, f"{at}.input_layernorm")
        query, key, value = (
            (x @ weights[f"{at}.self_attn.{name}_proj.weight"].T).view(len(ids), -1, 16).transpose(0, 1)
            for name in "qkv"
        )
        key, value = key.repeat_interleave(2, 0), value.repeat_interleave(2, 0)
        (q1, q2), (k1, k2) = query[:, :, None].chunk(2, -1), key[:, None].chunk(2, -1)
        scores = ((q1 * k1 + q2 * k2) * angle.cos() + (q1 * k2 - q2 * k1) * angle.sin()).sum(-1) / 4
        mixed = scores.masked_fill(~sees, -torch.inf).softmax(-1) @ value
        hidden = hidden + mixed.transpose(0, 1).flatten(1) @ weights[f"{at}.self_attn.o_proj.weight"].T
        x = norm(hidden, f"{at}.post_attention_layernorm")
        gate, up = (x @ weights[f"{at}.mlp.{name}_proj.weight"].T for name in ("gate", "up"))
        hidden = hidden + (gate * gate.sigmoid() * up) @ weights[f"{at}.mlp.down_proj.weight"].T
    head = "lm_head.weight"
    return (norm(hidden, "model.norm") @ weights[head].T).float()


@torch.no_grad()
def oracle_by_position(model, ids: torch.Tensor, rules: list, kind: str | None = None, interleaved: bool = False):
    """The family's own models under each rule's rope, one after the other.

    Each goes on with the keys of the one before, turned back and rotated as its own rope does.

    Args:
        model: the base model.
        ids: `[B, T]`.
        rules: by the positions of queries.
        kind: layer type whose angles are exchanged. Default: the model has the same angles in all layers.
        interleaved: where the rotated coordinates lie.
    """
    parts, cache, before, prefix = [], DynamicCache(config=model.config), None, f"{kind}_" if kind else ""
    for rule in rules:
        first, end = rule["query_positions"]
        config = copy.deepcopy(model.config)
        of_kind = config.rope_parameters[kind] if kind else config.rope_parameters
        of_kind.update({name: value for name, value in rule.items() if name != "query_positions"})
        other = type(model)._from_config(config, attn_implementation=model.config._attn_implementation).eval()
        other.load_state_dict(model.state_dict())
        rotary = next(module for name, module in other.named_modules() if name.endswith("rotary_emb"))
        frequency = getattr(rotary, f"{prefix}inv_freq").double()
        scaling = getattr(rotary, f"{prefix}attention_scaling")
        for i, layer in enumerate(cache.layers if parts else ()):
            if kind in (None, getattr(config, "layer_types", [None] * 9)[i]):
                size = 2 * len(frequency)
                pairs = layer.keys[..., :size].double().unflatten(-1, (-1, 2) if interleaved else (2, -1))
                pairs = pairs if interleaved else pairs.transpose(-1, -2)
                angle = torch.arange(pairs.shape[2])[:, None] * (frequency - before[0])
                turn = torch.polar(torch.full_like(angle, scaling / before[1]), angle)
                pairs = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * turn)
                pairs = pairs if interleaved else pairs.transpose(-1, -2)
                layer.keys = torch.cat((pairs.flatten(-2).float(), layer.keys[..., size:]), -1)
        parts.append(other(ids[:, first:end], past_key_values=cache).logits)
        before = frequency, scaling
    return torch.cat(parts, dim=1)


class TestBeyond:
    @pytest.mark.parametrize("attention", ATTENTIONS)
    def test_by_distance_equals_scores_computed_pair_by_pair(self, folder, attention):
        ids = token_ids(length=100)
        model = extended(folder, attn_implementation=attention)
        expected = torch.stack([oracle_logits(load(folder), row) for row in ids])
        close(logits_of(model, ids), expected)
        assert not torch.allclose(expected[:, 40:], logits_of(load(folder), ids)[:, 40:], atol=1e-2)
        # Rows on both sides of the boundary.
        batch = left_padded((100, 40, 20))
        logits = model(**batch).logits
        for row, length in enumerate((100, 40, 20)):
            close(logits[row, -length:], oracle_logits(load(folder), batch["input_ids"][row, -length:]))

    @pytest.mark.parametrize("attention", ATTENTIONS)
    @pytest.mark.parametrize("rules", [BY_POSITION, SEVERAL], ids=["two ranges", "three ranges"])
    def test_by_position_equals_the_models_with_those_ropes_over_keys_rotated_anew(self, folder, attention, rules):
        ids = token_ids(length=100)
        expected = oracle_by_position(load(folder, attn_implementation=attention), ids, rules)
        close(logits_of(extended(folder, rules, attn_implementation=attention), ids), expected)
        assert not torch.allclose(expected[:, 40:], logits_of(load(folder), ids)[:, 40:], atol=1e-2)

    @pytest.mark.parametrize(
        ("rules", "attention"),
        slow_but(
            [("by distance", "sdpa"), ("mixed", "eager")],
            itertools.product(RULES, ["eager", "sdpa", "flex_attention"]),
        ),
    )
    def test_every_way_and_any_pieces_equal_the_reference(self, folder, rules, attention):
        ids, batch = token_ids(length=70), left_padded((70, 45, 20))
        real, reference = batch["attention_mask"].bool(), extended(folder, RULES[rules], "reference")
        whole, padded = logits_of(reference, ids), reference(**batch).logits[real]
        others = {"eager": ["reference"], "sdpa": ["reference", "native"], "flex_attention": []}
        for name in ("auto", "delegated", *others[attention]):
            model = extended(folder, RULES[rules], name, attn_implementation=attention)
            close(logits_of(model, ids), whole)
            close(model(**batch).logits[real], padded)
            close(in_chunks(model, ids, [40, 1, 1, 5]), whole)
        model = extended(folder, RULES[rules], attn_implementation=attention)
        for sizes in ([10, 35], [31, 1, 1], [32, 18], [33, 16, 3, *[1] * 17]):
            close(in_chunks(model, ids, sizes), whole)
        if attention != "flex_attention":  # transformers gives static caches another model's logits there
            static = StaticCache(config=model.config, max_cache_len=96)
            close(in_chunks(model, ids, [28, 1, 10, *[1] * 20], cache=static), whole)


class TestCachesAndPositions:
    @pytest.fixture(scope="class", params=["auto", "delegated"])
    def model(self, folder, request):
        return extended(folder, MIXED, request.param)

    @pytest.fixture(scope="class")
    def whole(self, model):
        return logits_of(model, token_ids(length=70))

    def test_caches_cropped_below_a_boundary_copied_and_reordered(self, model, whole):
        ids, cache = token_ids(length=70), DynamicCache()
        model(ids[:, :60], past_key_values=cache)
        kept = copy.deepcopy(cache)
        for length in (52, 40, 20):
            cache.crop(length - cache.get_seq_length())
            close(model(ids[:, length : length + 15], past_key_values=cache).logits, whole[:, length : length + 15])
        close(model(ids[:, 60:], past_key_values=kept).logits, whole[:, 60:])
        kept.crop(-20)
        kept.reorder_cache(torch.tensor([1, 0]))
        close(model(ids.flip(0)[:, 50:], past_key_values=kept).logits, whole.flip(0)[:, 50:])

    @pytest.mark.parametrize("rules", [None, BY_POSITION], ids=["by distance", "by position"])
    def test_turned_keys_are_taken_up_only_where_they_are_those_of_the_cache(self, folder, rules):
        model = extended(folder, rules, "delegated")
        model.add_adapter("other", MIXED_CONFIG)
        ids, cache = token_ids(length=70), DynamicCache()

        def step(cache, number: int) -> torch.Tensor:
            return model(ids[: cache.layers[0].keys.shape[0], number : number + 1], past_key_values=cache).logits

        def write(cache) -> None:
            cache.layers[1].keys[:, :, 5] *= -2.0

        def exchange(cache) -> None:
            cache.layers[1].keys = cache.layers[1].keys.flip(2)

        def under_another(cache) -> None:
            model.set_adapter("other")
            fresh = copy.deepcopy(cache)
            close(step(cache, 62), step(fresh, 62))
            model.set_adapter("default")

        def aside(cache) -> None:
            with model.disable_adapter():
                step(cache, 62)

        changes = [write, exchange, under_another, aside, lambda cache: cache.reorder_cache(torch.tensor([1, 0]))]
        changes += [lambda cache: cache.crop(-8), lambda cache: cache.batch_select_indices(torch.tensor([1]))]
        model(ids[:, :60], past_key_values=cache)
        kept = vars(cache)["_moice_turned_keys"][0]
        before = kept._turned
        step(cache, 60)
        assert kept._turned is before and before is not None  # what the pass before turned serves this one
        for change in changes:
            own = copy.deepcopy(cache)  # of which nothing is turned
            step(own, 61)
            assert vars(own)["_moice_turned_keys"][0]._turned is not None
            change(own)
            fresh = copy.deepcopy(own)
            assert vars(fresh)["_moice_turned_keys"][0]._turned is None
            close(step(own, 61), step(fresh, 61))
            close(step(own, 62), step(fresh, 62))

    @pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 4}], ids=str)
    def test_generation_across_equals_that_without_cache(self, model, options):
        ids = token_ids(1, 26)
        results = [
            model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=34,
                do_sample=False,
                use_cache=use_cache,
                **(options if use_cache else {**options, "prompt_lookup_num_tokens": None}),
            )
            for use_cache in (True, False)
        ]
        assert torch.equal(*results)

    @pytest.mark.parametrize("implementation", ["auto", "reference", "delegated"])
    def test_positions_with_gaps_and_packed_rows(self, folder, implementation):
        model, base = extended(folder, implementation=implementation), load(folder)
        ids = token_ids(1, 60)
        jumps = torch.cat((torch.arange(20), torch.arange(28, 45), torch.arange(90, 113)))
        close(model(ids, position_ids=jumps[None]).logits[0], oracle_logits(base, ids[0], jumps))
        close(in_chunks(model, ids, [19, 3, 1, 20], position_ids=jumps[None])[0], oracle_logits(base, ids[0], jumps))
        packed = torch.cat((torch.arange(40), torch.arange(20)))
        document = (packed == 0).cumsum(0)
        sees = (document[:, None] == document) & torch.ones(60, 60, dtype=torch.bool).tril()
        close(
            model(ids, position_ids=packed[None], attention_mask=sees[None, None]).logits[0],
            oracle_logits(base, ids[0], packed, sees),
        )
        close(
            model(ids, position_ids=packed[None], use_cache=False).logits[0], oracle_logits(base, ids[0], packed, sees)
        )


class TestTraining:
    @pytest.mark.parametrize("attention", slow_but(["sdpa"], ["eager", "sdpa"]))
    @pytest.mark.parametrize("rules", [None, MIXED], ids=["by distance", "mixed"])
    @torch.enable_grad()
    def test_lora_below_gets_the_gradients_of_the_reference(self, folder, rules, attention):
        grads, ids = [], token_ids(length=70)
        for implementation, checkpoints in (("reference", False), ("auto", False), ("delegated", True)):
            torch.manual_seed(0)
            base = load(folder, attn_implementation=attention)
            lora = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
            config = MoICEConfig(ropes=rules or peft_moice.tuner.extending.extension_config(base.config, FACTOR).ropes)
            config.implementation = implementation
            model = get_peft_model(lora, config)
            if checkpoints:
                base.gradient_checkpointing_enable({"use_reentrant": False})
            model.train()(ids, labels=ids).loss.backward()
            grads.append({name: p.grad for name, p in base.named_parameters() if p.requires_grad})
        assert len(grads[0]) == 12
        assert all(grad is not None and grad.abs().max() > 0 for grad in grads[0].values())
        for other in grads[1:]:
            for name, expected in grads[0].items():
                torch.testing.assert_close(other[name], expected, rtol=0, atol=2e-5 * expected.abs().max().item())

    def test_extend_goes_over_another_tuner(self, folder):
        lora = get_peft_model(load(folder), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)).eval()
        ids = token_ids(length=50)
        within, beyond = logits_of(lora, ids[:, :WINDOW]), logits_of(lora, ids)
        model = peft_moice.extend(lora, FACTOR).eval()
        assert torch.equal(logits_of(model, ids[:, :WINDOW]), within)
        assert not torch.allclose(logits_of(model, ids), beyond, atol=1e-3)
        with model.disable_adapter():
            assert torch.equal(logits_of(model, ids), beyond)


class TestFamilies:
    @pytest.mark.parametrize(
        ("family", "options"),
        slow_but(
            [("phi", {}), ("gemma3_text", {"kind": "full_attention"})],
            [
                *((family, {}) for family in ("llama", "qwen2", "qwen3", "phi", "gpt_neox")),  # phi: half of a head
                ("glm", {"interleaved": True}),
                ("gemma3_text", {"kind": "full_attention"}),
            ],
        ),
        ids=lambda value: value if isinstance(value, str) else "",
    )
    def test_is_exact(self, family, options):
        ids, base = tokens(length=70), tiny_model(family, max_position_embeddings=WINDOW)
        expected = oracle_by_position(base, ids, SEVERAL, **options)
        close(logits_of(with_ropes(tiny_model(family, max_position_embeddings=WINDOW), SEVERAL), ids), expected)
        assert not torch.allclose(expected[:, 40:], logits_of(base, ids)[:, 40:], atol=1e-2)
        model, within = peft_moice.extend(base, FACTOR).eval(), logits_of(base, ids[:, :WINDOW])
        assert torch.equal(logits_of(model, ids[:, :WINDOW]), within)
        rules = model.peft_config["default"].ropes
        reference = with_ropes(tiny_model(family, max_position_embeddings=WINDOW), rules, "reference")
        close(logits_of(model, ids), logits_of(reference, ids))
        close(in_chunks(model, ids, [30, 1, 1, 1, 7]), logits_of(reference, ids))

    def test_sliding_layers_are_left_alone(self):
        model = peft_moice.extend(tiny_model("gemma3_text", max_position_embeddings=WINDOW), FACTOR)
        kinds = model.config.layer_types
        adapted = [i for i, layer in enumerate(model.model.model.layers) if hasattr(layer.self_attn, "moice_router")]
        assert 0 < len(adapted) < len(kinds)
        assert {kinds[i] for i in adapted} == {"full_attention"}

    def test_models_without_a_layer_to_extend(self):
        with pytest.raises(ValueError, match=r"sliding window.*no layer to extend"):
            peft_moice.extend(tiny_model("mistral", max_position_embeddings=WINDOW), FACTOR)
        with pytest.raises(ValueError, match="rotary"):
            peft_moice.extend(tiny_model("gpt2"), FACTOR)

    def test_angles_that_change_with_the_length(self):
        parameters = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
        model = tiny_model("llama", rope_parameters=parameters)
        with pytest.raises(ValueError, match=r"dynamic.*serves longer texts already"):
            peft_moice.extend(model, FACTOR)
        with pytest.raises(ValueError, match="'dynamic' changes its angles with the length"):
            with_ropes(model, BY_POSITION)
        assert not hasattr(model, "peft_config")

    def test_a_yarn_model_gets_its_short_texts_back(self):
        yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": WINDOW}
        ids, default = tokens(length=70), tiny_model("llama", max_position_embeddings=WINDOW)
        rules = [{"query_positions": [0, WINDOW], "rope_type": "default"}, {"query_positions": [WINDOW, None]}]
        model = with_ropes(tiny_model("llama", rope_parameters=yarn), rules)
        close(logits_of(model, ids), oracle_by_position(default, ids, BY_POSITION))

    @pytest.mark.slow
    def test_flex_attention_with_a_softcap_is_refused_beyond(self):
        base = tiny_model("gemma2", max_position_embeddings=WINDOW)
        base.set_attn_implementation("flex_attention")
        model = peft_moice.extend(base, FACTOR)
        with pytest.raises(ValueError, match=r"softcap.*'sdpa' or 'eager'"):
            model(tokens(length=50))


class TestAdapters:
    def test_saving_and_loading(self, folder, tmp_path):
        ids = token_ids(length=60)
        model = peft_moice.extend(load(folder), FACTOR).eval()
        expected = logits_of(model, ids)
        model.save_pretrained(tmp_path)
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 0
        assert (tmp_path / "adapter_model.safetensors").stat().st_size < 300
        assert (tmp_path / "adapter_config.json").stat().st_size < 2500
        for again in (
            PeftModel.from_pretrained(load(folder), tmp_path),
            AutoPeftModelForCausalLM.from_pretrained(tmp_path),
            AutoModelForCausalLM.from_pretrained(tmp_path),
        ):
            assert torch.equal(logits_of(again.eval(), ids), expected)
        again = load(folder)
        again.load_adapter(tmp_path)
        assert torch.equal(logits_of(again, ids), expected)

    def test_switching_it_off_and_removing_it(self, folder):
        ids, base = token_ids(length=60), load(folder)
        own = logits_of(base, ids)
        model = peft_moice.extend(base, FACTOR).eval()
        expected = logits_of(model, ids)
        with model.disable_adapter():
            assert torch.equal(logits_of(model, ids), own)
        model.add_adapter("position", MoICEConfig(ropes=BY_POSITION, task_type="CAUSAL_LM"))
        assert torch.equal(logits_of(model, ids), expected)
        model.set_adapter("position")
        assert torch.equal(logits_of(model, ids), logits_of(extended(folder, BY_POSITION), ids))
        # A cache that was filled under one goes on under the other: it holds the model's own keys.
        cache = DynamicCache()
        model(ids[:, :50], past_key_values=cache)
        model.set_adapter("default")
        assert model(ids[:, 50:], past_key_values=cache).logits.isfinite().all()
        model.delete_adapter("position")
        assert torch.equal(logits_of(model, ids), expected)
        assert torch.equal(logits_of(model.unload(), ids), own)
        assert not any(isinstance(module, MoICELayer) for module in base.modules())

    def test_with_routers(self, tmp_path):
        # In a model of one layer, keys do not depend on what earlier queries saw.
        folder = save_tiny_model(tmp_path, max_position_embeddings=WINDOW, num_hidden_layers=1)
        ids, model = token_ids(length=70), get_peft_model(load(folder), wide_config()).eval()
        decide(model)
        within, everywhere = logits_of(model, ids[:, :WINDOW]), logits_of(model, ids)
        extension = logits_of(extended(folder), ids)
        assert peft_moice.extend(model, FACTOR) is model
        model.eval()
        assert model.active_adapters == ["default", "extension"]
        assert torch.equal(logits_of(model, ids[:, :WINDOW]), within)
        both = logits_of(model, ids)
        close(both[:, :WINDOW], everywhere[:, :WINDOW])
        close(both[:, WINDOW:], extension[:, WINDOW:])
        assert not torch.allclose(within, extension[:, :WINDOW], atol=1e-3)
        close(in_chunks(model, ids, [20, 20, 1]), both)
        model.set_adapter("default")
        assert torch.equal(logits_of(model, ids), everywhere)

    @torch.enable_grad()
    def test_routers_within_learn_beside_an_extension(self, folder):
        grads, ids = [], token_ids(length=60)
        for implementation in ("reference", "auto"):
            model = get_peft_model(load(folder), wide_config(implementation=implementation))
            decide(model)
            model = peft_moice.extend(model, FACTOR)
            model.train()(ids, labels=ids).loss.backward()
            grads.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
        assert len(grads[0]) == 9
        for name, expected in grads[0].items():
            assert expected.abs().max() > 0
            torch.testing.assert_close(grads[1][name], expected, rtol=0, atol=2e-5 * expected.abs().max().item())

    def test_what_is_refused(self, folder):
        model = peft_moice.extend(load(folder), FACTOR).eval()
        peft_moice.extend(model, 2.0, adapter_name="other")
        with pytest.raises(ValueError, match="only one can"):
            logits_of(model)
        model.set_adapter("default")
        expected = logits_of(model, token_ids(length=50))
        with pytest.raises(ValueError, match="go by position and hold for all rows"):
            model(token_ids(), adapter_names=["default", "__base__"])
        for names in (["default"], ["default", "other"]):
            for kind in ("cat", "linear"):
                with pytest.raises(ValueError, match="no routers"):
                    weights = [1 / len(names)] * len(names)
                    model.add_weighted_adapter(names, weights, "mean", combination_type=kind)
        assert sorted(model.peft_config) == ["default", "other"]
        assert torch.equal(logits_of(model, token_ids(length=50)), expected)
        with pytest.raises(ValueError, match=r"'other'.*exists"):
            peft_moice.extend(model, FACTOR, adapter_name="other")
        assert model.active_adapters == ["default"]


@pytest.mark.slow
class TestCompiled:
    @pytest.fixture(autouse=True)
    def fresh_compiler(self):
        torch.compiler.reset()
        yield
        torch.compiler.reset()

    @pytest.mark.parametrize(
        ("rules", "attention"), [(None, "eager"), (None, "sdpa"), (MIXED, "sdpa"), ("routers", "sdpa")]
    )
    def test_decoding_across_with_a_static_cache_is_one_graph(self, folder, rules, attention):
        options = {"attn_implementation": attention}
        if rules == "routers":
            model = get_peft_model(load(folder, **options), wide_config())
            decide(model)
            model = peft_moice.extend(model, FACTOR).eval()
        else:
            model = extended(folder, rules, **options)
        ids, graphs = token_ids(length=56), CompileCounter()
        expected = logits_of(model, ids)
        cache = StaticCache(config=model.config, max_cache_len=96)
        model(ids[:, :29], past_key_values=cache)
        compiled = torch.compile(model, fullgraph=True, backend=graphs)
        logits = [
            compiled(ids[:, i : i + 1], past_key_values=cache, position_ids=torch.tensor([[i]])).logits
            for i in range(29, 56)
        ]
        close(torch.cat(logits, dim=1), expected[:, 29:])
        assert graphs.frame_count == 1

    def test_prompts_on_both_sides(self, folder):
        model = extended(folder, MIXED)
        expected = {length: logits_of(model, token_ids(length=length)) for length in (20, 60)}
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        for length, logits in expected.items():
            close(compiled(token_ids(length=length), use_cache=False).logits, logits)

    @pytest.mark.parametrize("lengths", [(26,), (26, 9)], ids=["one row", "left-padded"])
    def test_generation_compiles_by_itself_with_a_static_cache(self, folder, lengths):
        model, batch = extended(folder), left_padded(lengths)
        batch.pop("position_ids")
        options = {"max_new_tokens": 20, "do_sample": False}
        expected = model.generate(**batch, **options)
        assert torch.equal(model.generate(**batch, cache_implementation="static", **options), expected)
