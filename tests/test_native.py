"""The kernels in C: compiled once, chosen where they apply, left out where they cannot be had."""

import pytest
import torch
from test_operator import LAYOUTS, attend, inputs, table
from torch._subclasses.fake_tensor import FakeTensorMode

from peft_moice.attention import mixed_attention
from peft_moice.attention.call import AttentionCall
from peft_moice.attention.native import library
from peft_moice.attention.operator import choose

pytestmark = pytest.mark.skipif(
    isinstance(library.load(), str), reason=f"the kernels cannot be had here: {library.load()}"
)


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """Nothing is loaded, and nothing was ever compiled. Returns the folder for what is compiled."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    library.load.cache_clear()
    yield tmp_path / "peft_moice"
    library.load.cache_clear()


def mixed(implementation: str = "native") -> torch.Tensor:
    query, key, value, gates = inputs()
    options = {"rotations": table(LAYOUTS["half"]), "query_start": 0, "attend": attend}
    return mixed_attention(query, key, value, gates, implementation=implementation, **options)[0]


def chosen(dtype: torch.dtype = torch.float32, backend: str = "sdpa", length: int = 9, **options) -> str:
    query, key, value, gates = inputs(length, length)
    tensors = (x.to(dtype) for x in (query, key, value))
    call = AttentionCall(*tensors, gates, table(LAYOUTS["half"]), backend=backend, attend=attend, options=options)
    return choose(call)


def test_they_are_compiled_once(fresh):
    expected = mixed()
    (compiled,) = fresh.glob("*.so")
    first_time = compiled.stat().st_mtime_ns
    library.load.cache_clear()
    assert torch.equal(mixed(), expected)
    assert compiled.stat().st_mtime_ns == first_time
    assert list(fresh.iterdir()) == [compiled]


@pytest.mark.parametrize("variable, value", [("CC", "no-such-compiler"), ("CC", "false"), (library.SWITCH, "0")])
def test_without_them_another_implementation_is_chosen(fresh, monkeypatch, variable, value):
    expected = mixed("reference")
    monkeypatch.setenv(variable, value)
    assert chosen() == "grouped"
    torch.testing.assert_close(mixed("auto"), expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(
        ValueError, match=f"native implementation cannot be used: .*{'compiler|' * (value != '0')}{value}"
    ):
        mixed()
    assert not list(fresh.glob("*.so"))


def test_they_are_chosen_where_they_compute_what_sdpa_would():
    assert chosen() == chosen(length=1) == "native"
    assert chosen(torch.bfloat16) == "delegated"
    assert chosen(backend="eager") == "delegated"
    assert chosen(dropout=0.1) == "delegated"


@pytest.mark.parametrize("length", [1, 50])
def test_threads_change_nothing_but_rounding(length):
    query, key, value, gates = (x.requires_grad_() for x in inputs(length, 50))
    options = {"rotations": table(LAYOUTS["partial"]), "query_start": 50 - length, "attend": attend}
    threads, results = torch.get_num_threads(), []
    try:
        for number in (1, 3):
            torch.set_num_threads(number)
            output, _ = mixed_attention(query, key, value, gates, implementation="native", **options)
            results.append((output, *torch.autograd.grad(output.square().sum(), (query, key, value, gates))))
    finally:
        torch.set_num_threads(threads)
    for one, three in zip(*results, strict=True):
        torch.testing.assert_close(one, three, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("wanted", range(4))
def test_gradients_that_nobody_wants_change_no_other(wanted):
    tensors = inputs()
    options = {"rotations": table(LAYOUTS["half"]), "query_start": 0, "attend": attend, "implementation": "native"}
    grads = []
    for all_wanted in (True, False):
        leaves = [x.clone().requires_grad_(all_wanted or index == wanted) for index, x in enumerate(tensors)]
        mixed_attention(*leaves, **options)[0].square().sum().backward()
        grads.append([x.grad for x in leaves])
    torch.testing.assert_close(grads[1][wanted], grads[0][wanted], rtol=1e-5, atol=1e-6)
    assert sum(grad is not None for grad in grads[1]) == 1


def test_strided_inputs_are_read_as_they_are():
    """Attention modules hand over transposed projections, and caches slices of larger tensors."""
    query, key, value, gates = inputs(9, 9)
    options = {"rotations": table(LAYOUTS["half"]), "query_start": 0, "attend": attend, "implementation": "native"}
    expected, _ = mixed_attention(query, key, value, gates, **options)
    transposed = query.transpose(1, 2).contiguous().transpose(1, 2)
    larger = [torch.cat((x, x), dim=2)[:, :, :9] for x in (key, value)]
    output, _ = mixed_attention(transposed, *larger, gates, **options)
    assert torch.equal(output, expected)


def test_queries_have_to_fit_the_keys():
    query, key, value, gates = inputs()
    with pytest.raises(ValueError, match="9 queries starting at position 4 do not fit 9 keys"):
        mixed_attention(
            query, key, value, gates, rotations=table(LAYOUTS["half"]), query_start=4, attend=attend,
            implementation="native",
        )  # fmt: skip


def test_exponentials_reach_far_below_zero():
    """Scores differ by hundreds in trained models; the small ones vanish and the large one keeps its weight."""
    query, key, value, gates = inputs()
    options = {"rotations": table(LAYOUTS["half"]), "query_start": 0, "attend": attend}
    outputs = [
        mixed_attention(60 * query, 10 * key, value, gates, implementation=name, **options)[0]
        for name in ("native", "reference")
    ]
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)


def test_tensors_without_memory_of_their_own_are_left_to_others():
    rotations = table(LAYOUTS["half"])
    with FakeTensorMode() as mode:
        tensors = (mode.from_tensor(x) for x in inputs())
        assert choose(AttentionCall(*tensors, rotations, backend="sdpa", attend=attend)) != "native"


@pytest.mark.parametrize("implementation", ["native", "grouped"])
def test_second_derivatives_are_refused(implementation):
    query, key, value, gates = inputs()
    query.requires_grad_()
    options = {"rotations": table(LAYOUTS["half"]), "query_start": 0, "attend": attend}
    output, _ = mixed_attention(query, key, value, gates, implementation=implementation, **options)
    (grad,) = torch.autograd.grad(output.square().sum(), query, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
