"""The Triton kernels against the reference: on a GPU where there is one, else in Triton's interpreter.

The interpreter has to be chosen before Triton is imported, so one test runs this file again in a process of its own:

    TRITON_INTERPRET=1 python -m pytest tests/test_triton.py
"""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch
from peft import get_peft_model
from tiny_models import decide, load, logits_of, save_tiny_model, token_ids, wide_config

from peft_moice.attention import mixed_attention
from peft_moice.rope import RotaryLayout, RotationTable
from peft_moice.routing.router import select_experts

CUDA = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
INSTALLED = importlib.util.find_spec("triton") is not None
DEVICE = "cuda" if CUDA and not INTERPRETED else "cpu"

pytestmark = pytest.mark.skipif(not INSTALLED, reason="needs triton")
runs = pytest.mark.skipif(not (CUDA or INTERPRETED), reason="runs in a process of its own")

HALF, INTERLEAVED = RotaryLayout(0, 8, False), RotaryLayout(0, 8, True)
DECODING = {"queries": 1, "keys": 20}


@pytest.mark.slow
@pytest.mark.skipif(CUDA or INTERPRETED, reason="the tests run in this process")
def test_all_in_the_interpreter():
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", __file__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


def problem(
    queries: int = 9,
    keys: int | None = None,
    heads: tuple[int, int] = (2, 1),
    batch: int = 1,
    experts: int = 3,
    top_k: int = 2,
    layout: RotaryLayout = HALF,
    sizes: tuple[int, int] = (8, 8),
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> tuple[list[torch.Tensor], dict]:
    """Query, key, value and gates, and the options that place the queries at the last keys."""
    keys = queries if keys is None else keys
    generator = torch.Generator().manual_seed(seed)
    tensors = [
        torch.randn(batch, *shape, generator=generator).to(DEVICE, dtype)
        for shape in ((heads[0], queries, sizes[0]), (heads[1], keys, sizes[0]), (heads[1], keys, sizes[1]))
    ]
    gates = select_experts(torch.randn(batch, heads[0], queries, experts, generator=generator), top_k).to(DEVICE)
    pairs = torch.arange(0, layout.size, 2, dtype=torch.float64) / layout.size
    frequencies = torch.stack([(10.0 * 3.0**index) ** -pairs for index in range(experts)])
    rotations = RotationTable(frequencies - frequencies[0], layout)
    return [*tensors, gates], {"rotations": rotations, "query_start": keys - queries, "attend": None}


def outputs(tensors: list[torch.Tensor], options: dict, implementation: str = "triton") -> torch.Tensor:
    with torch.no_grad():
        return mixed_attention(*tensors, implementation=implementation, **options)[0]


def output_and_gradients(tensors, options: dict, implementation: str = "triton", wanted=range(4)) -> list:
    """The output, and its gradients by the `wanted` of query, key, value and gates (where picked)."""
    tensors = [tensor.detach().requires_grad_(index in wanted) for index, tensor in enumerate(tensors)]
    output, _ = mixed_attention(*tensors, implementation=implementation, **options)
    weight = torch.linspace(-1, 1, output.numel(), device=output.device).reshape(output.shape)
    (output.float() * weight).sum().backward()
    grads = [tensor.grad for tensor in tensors]
    if grads[3] is not None:
        picked = options.get("picked")
        grads[3] = grads[3] * (tensors[3] != 0 if picked is None else picked)
    return [output.detach(), *grads]


def assert_equal(actual: list, expected: list, tolerance: float = 1e-5) -> None:
    """Equal up to `tolerance` times the largest element of each tensor."""
    for one, other in zip(actual, expected, strict=True):
        if other is None:
            assert one is None
            continue
        scale = max(1.0, other.abs().max().item())
        torch.testing.assert_close(one.float(), other.float(), rtol=0, atol=tolerance * scale)


def causal(queries: int, keys: int, start: int) -> torch.Tensor:
    positions = start + torch.arange(queries, device=DEVICE)[:, None]
    return (torch.arange(keys, device=DEVICE) <= positions)[None, None]


@runs
class TestKernels:
    @pytest.mark.parametrize(
        "shape",
        [
            pytest.param({"heads": (1, 1), "top_k": 1, "queries": 17}, id="one of three"),
            pytest.param({"heads": (4, 2), "top_k": 2}, id="two of three"),
            pytest.param({"top_k": 3, "queries": 7, "keys": 19}, id="all, behind a past"),
            pytest.param({"experts": 1, "top_k": 1, "batch": 2}, id="one expert"),
            pytest.param({"layout": INTERLEAVED, "sizes": (8, 5)}, id="interleaved"),
            pytest.param({"layout": RotaryLayout(0, 4, False), "sizes": (10, 8)}, id="first dimensions"),
            pytest.param({"layout": RotaryLayout(6, 4, True), "sizes": (10, 6)}, id="last dimensions"),
            pytest.param({"layout": RotaryLayout(2, 4, False), "sizes": (9, 8)}, id="middle dimensions"),
            pytest.param({"layout": RotaryLayout(0, 80, False), "sizes": (80, 96)}, id="80 and 96"),
            pytest.param({"queries": 17, "dtype": torch.bfloat16}, id="bfloat16"),
            pytest.param({"queries": 17, "dtype": torch.float16}, id="float16"),
            pytest.param(DECODING | {"heads": (1, 1), "keys": 53}, id="decoding, one head"),
            pytest.param({"heads": (4, 1), "keys": 37, "queries": 3, "top_k": 1}, id="decoding, three queries"),
            pytest.param(DECODING | {"heads": (6, 2), "batch": 2, "keys": 37, "top_k": 3}, id="decoding, batch"),
            pytest.param(DECODING | {"experts": 1, "top_k": 1}, id="decoding, one expert"),
            pytest.param(DECODING | {"layout": INTERLEAVED, "sizes": (8, 5)}, id="decoding, interleaved"),
            pytest.param(DECODING | {"layout": RotaryLayout(6, 4, True), "sizes": (10, 6)}, id="decoding, last"),
            pytest.param(DECODING | {"layout": RotaryLayout(0, 80, False), "sizes": (80, 96)}, id="decoding, 80"),
            pytest.param(DECODING | {"experts": 5, "top_k": 2, "dtype": torch.bfloat16}, id="decoding, bfloat16"),
            pytest.param(DECODING | {"dtype": torch.float16}, id="decoding, float16"),
        ],
    )
    def test_equals_the_reference(self, shape):
        """With gradients, and without, where few queries have kernels of their own."""
        tensors, options = problem(**shape)
        dtype = tensors[0].dtype
        tolerance = 1e-5 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
        actual = outputs(tensors, options)
        assert actual.dtype == dtype
        assert_equal([actual], [outputs(tensors, options, "reference")], tolerance)
        if shape.get("queries") != 1:
            results = output_and_gradients(tensors, options)
            assert [result.dtype for result in results] == [dtype] * 4 + [torch.float32]
            assert_equal(results, output_and_gradients(tensors, options, "reference"), tolerance)

    def test_many_experts_take_the_other_kernels(self):
        tensors, options = problem(queries=1, keys=5, experts=40, top_k=1, sizes=(8, 64))
        assert_equal([outputs(tensors, options)], [outputs(tensors, options, "reference")])

    @pytest.mark.parametrize("with_gradients", [False, True])
    @pytest.mark.parametrize("kind", ["padding", "window", "additive", "per head", "row", "causal"])
    def test_masks(self, kind, with_gradients):
        """Keys behind the last query, as in a static cache, and a start that only the device knows."""
        queries, keys, start = (6, 18, 4) if with_gradients else (2, 40, 20)
        tensors, options = problem(queries=queries, keys=keys)
        mask = causal(queries, keys, start)
        if kind == "padding":
            mask = mask & (torch.arange(keys, device=DEVICE) >= 3)
        elif kind == "window":
            mask = mask & ~causal(queries, keys, 1)
        elif kind == "additive":
            lowest = torch.finfo(torch.float32).min
            mask = torch.linspace(-2, 2, mask.numel(), device=DEVICE).reshape(mask.shape).masked_fill(~mask, lowest)
        elif kind == "per head":
            mask = torch.cat((mask, mask & ~causal(queries, keys, 2)), dim=1)
        elif kind == "row":
            mask = torch.arange(keys, device=DEVICE)[None, None, None] > 2
        options |= {"query_start": torch.tensor(start, device=DEVICE), "attention_mask": mask}
        compute = output_and_gradients if with_gradients else outputs
        assert_equal([*compute(tensors, options)], [*compute(tensors, options, "reference")])

    @pytest.mark.parametrize("kind", ["boolean", "additive"])
    def test_a_row_that_sees_nothing(self, kind):
        """It gives what PyTorch's attention gives: zeros under a boolean mask, the mean under an additive one."""
        tensors, options = problem(queries=4, keys=18, heads=(1, 1))
        mask = causal(4, 18, 14)
        mask[..., 1, :] = False
        if kind == "additive":
            mask = torch.zeros(mask.shape, device=DEVICE).masked_fill(~mask, torch.finfo(torch.float32).min)
        options["attention_mask"] = mask
        results = output_and_gradients(tensors, options)
        assert_equal(results, output_and_gradients(tensors, options, "reference"))
        expected = torch.zeros_like(results[0][:, 1]) if kind == "boolean" else tensors[2].mean(dim=2)
        torch.testing.assert_close(results[0][:, 1], expected)
        torch.testing.assert_close(outputs(tensors, options), results[0])

    @pytest.mark.parametrize("wanted", [(3,), (0,), (1,), (2,), (1, 3)])
    def test_gradients_that_are_asked_for(self, wanted):
        tensors, options = problem(queries=4, keys=7)
        results = output_and_gradients(tensors, options, wanted=wanted)
        assert_equal(results, output_and_gradients(tensors, options, "reference", wanted=wanted))

    def test_closed_gates_learn_where_picked(self):
        tensors, options = problem(queries=5, top_k=1)
        options["picked"] = torch.ones_like(tensors[3], dtype=torch.bool)
        options["picked"][..., 2] = tensors[3][..., 2] != 0
        results = output_and_gradients(tensors, options)
        assert_equal(results, output_and_gradients(tensors, options, "reference"))
        assert (results[4][..., :2] != 0).all()

    def test_results_repeat_bitwise(self):
        tensors, options = problem(top_k=3)
        first, second = (output_and_gradients(tensors, options) for _ in range(2))
        assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))

    def test_second_derivatives_are_refused(self):
        tensors, options = problem(queries=3)
        query, key, value, gates = (x.requires_grad_() for x in tensors)
        output, _ = mixed_attention(query, key, value, gates, implementation="triton", **options)
        (grad,) = torch.autograd.grad(output.square().sum(), query, create_graph=True)
        with pytest.raises(NotImplementedError, match="no second derivatives"):
            torch.autograd.grad(grad.sum(), key)

    def test_segments_equal_the_whole(self):
        tensors, options = problem(queries=40, heads=(2, 1))
        query, key, value, gates = tensors
        whole = outputs(tensors, options)
        for start, end in ((0, 33), (33, 39), (39, 40)):
            part = [query[:, :, start:end], key[:, :, :end], value[:, :, :end], gates[:, :, start:end]]
            assert_equal([outputs(part, options | {"query_start": start})], [whole[:, start:end]])

    def test_tensors_that_are_views(self):
        """Models hand over transposed projections."""
        tensors, options = problem(queries=5, heads=(4, 2))
        views = [tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in tensors]
        views[1] = views[1].mT.contiguous().mT
        assert_equal([outputs(views, options)], [outputs(tensors, options)])
        assert_equal(output_and_gradients(views, options), output_and_gradients(tensors, options))


@runs
def test_a_model_computes_the_same(tmp_path):
    """Logits, router gradients, also under autocast, and generation with a static cache."""
    folder = save_tiny_model(tmp_path, num_hidden_layers=1)
    ids = token_ids(batch=1, length=9).to(DEVICE)
    results = []
    for implementation in ("reference", "triton"):
        model = get_peft_model(load(folder), wide_config(implementation=implementation)).eval().to(DEVICE)
        decide(model)
        logits = logits_of(model, ids)
        model(ids, labels=ids).loss.backward()
        grads = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
        options = {"max_new_tokens": 3, "do_sample": False, "cache_implementation": "static"}
        generated = model.generate(ids, disable_compile=True, **options)
        with torch.autocast(DEVICE, dtype=torch.bfloat16), torch.no_grad():
            low = model(ids).logits.float()
        results.append([logits, *grads, generated, low])
    *expected, expected_tokens, expected_low = results[0]
    *actual, actual_tokens, actual_low = results[1]
    assert_equal(actual, expected)
    assert torch.equal(actual_tokens, expected_tokens)
    assert_equal([actual_low], [expected_low], 8 * torch.finfo(torch.bfloat16).eps)


@pytest.mark.skipif(not CUDA or INTERPRETED, reason="needs a GPU")
@pytest.mark.parametrize("queries", [1, 1000])
def test_a_realistic_shape_on_a_gpu(queries):
    layout = RotaryLayout(0, 128, False)
    tensors, options = problem(
        queries, 3000, (32, 8), experts=7, layout=layout, sizes=(128, 128), dtype=torch.bfloat16
    )
    tolerance = 4 * torch.finfo(torch.bfloat16).eps
    assert_equal([outputs(tensors, options)], [outputs(tensors, options, "reference")], tolerance)
    if queries > 1:
        actual, expected = (output_and_gradients(tensors, options, name) for name in ("triton", "reference"))
        assert_equal(actual, expected, tolerance)


class TestRefusals:
    def test_without_a_gpu(self, monkeypatch):
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        tensors, options = problem()
        tensors = [tensor.cpu() for tensor in tensors]
        with pytest.raises(ValueError, match=r"it is for CUDA, and the queries are on 'cpu'.*implementation='auto'"):
            outputs(tensors, options)

    @runs
    @pytest.mark.parametrize(
        ("reason", "extra"),
        [
            ("masks of four dimensions", {"attention_mask": torch.ones(1, 9)}),
            ("boolean and additive masks, not torch.int64", {"attention_mask": torch.ones(1, 1, 9, 9).long()}),
            (r"does not broadcast to \(1, 2, 9, 9\)", {"attention_mask": torch.ones(1, 1, 9, 12)}),
            ("no gradient for the mask", {"attention_mask": torch.ones(1, 1, 9, 9, requires_grad=True)}),
            ("no dropout", {"dropout": 0.1}),
            ("softcap", {"softcap": 30.0}),
            ("attention sinks", {"s_aux": torch.zeros(2)}),
            ("position bias", {"position_bias": torch.zeros(1, 2, 9, 9)}),
            ("it is causal", {"is_causal": False}),
            ("a sliding window from the mask", {"sliding_window": 4}),
            ("probabilities", {"output_attentions": True}),
            ("packed sequences", {"query_start": torch.zeros(9, dtype=torch.int64)}),
        ],
    )
    def test_says_why(self, reason, extra):
        tensors, options = problem()
        with pytest.raises(ValueError, match=f"{reason}.*implementation='auto'"):
            outputs(tensors, {**options, **extra})

    @runs
    def test_says_which_dtypes_and_sizes(self):
        tensors, options = problem()
        with pytest.raises(ValueError, match=r"not torch.float64.*implementation='auto'"):
            outputs([tensor.double() for tensor in tensors], options)
        with pytest.raises(ValueError, match=r"one dtype.*torch.bfloat16 and torch.float32"):
            outputs([tensors[0], tensors[1].bfloat16(), *tensors[2:]], options)
        tensors, options = problem(sizes=(8, 300))
        with pytest.raises(ValueError, match=r"up to 256 dimensions, not 8 \(values 300\)"):
            outputs(tensors, options)


@pytest.mark.slow
def test_the_package_does_not_need_triton():
    """Nor does importing it import the kernels."""
    script = """
import sys
sys.modules["triton"] = None
import torch
import peft_moice
from peft_moice.attention import mixed_attention
from peft_moice.attention.call import AttentionCall
from peft_moice.attention.triton import why_not
from peft_moice.rope import RotaryLayout, RotationTable
assert not any(name.startswith("peft_moice.attention.triton.t") for name in sys.modules)
x = torch.zeros(1, 1, 1, 8)
rotations = RotationTable(torch.zeros(1, 4), RotaryLayout(0, 8, False))
print(why_not(AttentionCall(x, x, x, torch.ones(1, 1, 1, 1), rotations)))
"""
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Triton is not installed" in done.stdout
