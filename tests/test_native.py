"""The kernels in C: right whatever the threads, the memory, the numbers and the precision are."""

import pytest
import torch
from test_operator import LAYOUTS, attend, inputs, mix, table
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils import checkpoint

from peft_moice.attention import mixed_attention, operator
from peft_moice.attention.call import AttentionCall
from peft_moice.attention.native import kernel, library
from peft_moice.attention.operator import choose
from peft_moice.rope import RotaryLayout

pytestmark = pytest.mark.skipif(
    isinstance(library.load(), str), reason=f"the kernels cannot be had here: {library.load()}"
)


def chosen(
    dtype: torch.dtype = torch.float32,
    backend: str = "sdpa",
    length: int = 9,
    keys: int = 9,
    **options,
) -> str:
    query, key, value, gates = inputs(length, keys)
    tensors = (x.to(dtype) for x in (query, key, value))
    rotations = table(LAYOUTS["half"])
    call = AttentionCall(*tensors, gates, rotations, backend=backend, attend=attend, options=options)
    return choose(call)[0]


def test_they_are_chosen_where_they_compute_what_sdpa_would():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert chosen(dtype) == chosen(dtype, length=1) == "native"
    assert chosen(torch.float64) == "delegated"
    assert chosen(backend="eager") == "delegated"
    assert chosen(dropout=0.1) == "delegated"


def test_one_line_says_what_was_chosen_and_why(caplog):
    operator._say_once.cache_clear()
    with caplog.at_level("INFO", logger="peft_moice"):
        for backend in ("sdpa", "eager", "sdpa"):
            mix("auto", *inputs(), backend=backend)
    assert [record.getMessage() for record in caplog.records] == [
        "MoICE computes attention by native (compiled for this CPU; its cost follows K).",
        "MoICE computes attention by delegated (the model's attention is 'eager', and the kernels for the CPU stand "
        "in for sdpa).",
    ]


@pytest.mark.parametrize("length", [1, 50])
def test_threads_change_nothing_but_rounding(length):
    leaves = [x.requires_grad_() for x in inputs(length, 50)]
    threads, results = torch.get_num_threads(), []
    try:
        for number in (1, 3):
            torch.set_num_threads(number)
            output, _ = mix("native", *leaves, layout=LAYOUTS["partial"], query_start=50 - length)
            results.append((output, *torch.autograd.grad(output.square().sum(), leaves)))
    finally:
        torch.set_num_threads(threads)
    for one, three in zip(*results, strict=True):
        torch.testing.assert_close(one, three, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("wanted", range(4))
def test_gradients_that_nobody_wants_change_no_other(wanted):
    grads = []
    for all_wanted in (True, False):
        leaves = [x.requires_grad_(all_wanted or index == wanted) for index, x in enumerate(inputs())]
        mix("native", *leaves)[0].square().sum().backward()
        grads.append([x.grad for x in leaves])
    torch.testing.assert_close(grads[1][wanted], grads[0][wanted], rtol=1e-5, atol=1e-6)
    assert sum(grad is not None for grad in grads[1]) == 1


def test_queries_have_to_fit_the_keys():
    for start in (-1, 4):
        with pytest.raises(ValueError, match=f"9 queries starting at position {start} do not fit 9 keys"):
            mix("native", *inputs(), query_start=torch.tensor(start))


def test_nothing_is_left_to_others():
    empty = [x[:0] for x in inputs()]
    assert mix("auto", *empty, backend="sdpa")[0].shape == (0, 9, 4, 6)
    with pytest.raises(ValueError, match="there is nothing to attend to"):
        mix("native", *empty, backend="sdpa")


def test_exponentials_reach_far_below_zero():
    """Scores differ by hundreds in trained models; the small ones vanish and the large one keeps its weight."""
    query, key, value, gates = inputs()
    outputs = [mix(name, 60 * query, 10 * key, value, gates)[0] for name in ("native", "reference")]
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)


def test_tensors_without_memory_of_their_own_are_left_to_others():
    rotations = table(LAYOUTS["half"])
    with FakeTensorMode() as mode:
        tensors = (mode.from_tensor(x) for x in inputs())
        assert choose(AttentionCall(*tensors, rotations, backend="sdpa", attend=attend))[0] != "native"


def second(attention) -> dict[str, object]:
    """Ways to second derivatives and forward mode, each a function of two tensors."""

    def twice(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        (grad,) = torch.autograd.grad(attention(query, key), query, create_graph=True)
        return torch.autograd.grad(grad.sum(), key)[0]

    def backward(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        (grad,) = torch.autograd.grad(attention(query, key), query, create_graph=True)
        grad.sum().backward()
        return key.grad

    def forward_mode(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(query.detach(), torch.ones_like(query))
            return forward_ad.unpack_dual(attention(dual, key.detach())).tangent

    return {
        "twice": twice,
        "backward": backward,
        "forward mode": forward_mode,
        "func.jvp": lambda query, key: torch.func.jvp(
            lambda x: attention(x, key.detach()), (query.detach(),), (torch.ones_like(query),)
        )[1],
    }


@pytest.mark.parametrize("way", second(None))
def test_further_derivatives_are_right_or_refused(way):
    """Under "auto" they may be left to the model's own attention; what the kernels lack must not read as zero."""
    query, key, value, gates = inputs(3, 3)

    def found(implementation: str) -> torch.Tensor:
        def attention(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
            return mix(implementation, query.tanh(), key, value, gates, backend="sdpa")[0].square().sum()

        return second(attention)[way](query.clone().requires_grad_(), key.clone().requires_grad_())

    expected = found("reference")
    with pytest.raises((NotImplementedError, ValueError), match=r"no second derivatives|forward mode|torch\.func"):
        found("native")
    try:
        torch.testing.assert_close(found("auto"), expected, rtol=1e-4, atol=1e-4)
    except NotImplementedError as error:
        assert "implementation='reference'" in str(error)


def outcome(implementation: str, queries: int = 9, keys: int = 9) -> list[torch.Tensor]:
    """The output and the gradients of all inputs."""
    leaves = [x.requires_grad_() for x in inputs(queries, keys)]
    output, _ = mix(implementation, *leaves, query_start=keys - queries)
    output.float().square().sum().backward()
    return [output.detach(), *(x.grad for x in leaves)]


def assert_same(actual: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for one, other in zip(actual, expected, strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_memory_that_held_something_before_changes_nothing(monkeypatch):
    expected = [outcome("reference", *lengths) for lengths in ((9, 9), (3, 200), (150, 300))]

    def used(*shape: int) -> torch.Tensor:
        return torch.full(shape, float("nan"), dtype=torch.float32)

    monkeypatch.setattr(kernel, "_empty", used)
    for lengths, right in zip(((9, 9), (3, 200), (150, 300)), expected, strict=True):
        assert_same(outcome("native", *lengths)[:4], right[:4])


@pytest.mark.parametrize("lengths", [(1, 300), (40, 40)])
def test_fewer_threads_may_run_than_were_asked_for(monkeypatch, lengths):
    """OMP_DYNAMIC, OMP_THREAD_LIMIT, containers; here the library is compiled without OpenMP."""
    expected = outcome("reference", *lengths)
    monkeypatch.setattr(kernel, "_empty", lambda *shape: torch.full(shape, 1e9, dtype=torch.float32))
    monkeypatch.setenv(library.FLAGS, "-O1 -fno-openmp")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    library.load.cache_clear()
    try:
        assert_same(outcome("native", *lengths)[:4], expected[:4])
    finally:
        library.load.cache_clear()


@pytest.mark.parametrize("queries", [2, 9])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_defaults_for_dtype_and_device_change_nothing(queries, dtype):
    expected = outcome("native", queries)
    leaves = [x.requires_grad_() for x in inputs(queries, 9)]
    options = {"query_start": 9 - queries, "attend": attend, "implementation": "native"}
    rotations = table(LAYOUTS["half"])
    try:
        torch.set_default_dtype(dtype)
        torch.set_default_device("meta")
        output, _ = mixed_attention(*leaves, rotations=rotations, **options)
        output.square().sum().backward()
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    for one, other in zip([output.detach(), *(x.grad for x in leaves)], expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("queries", [2, 9])
def test_any_strides_are_read(queries):
    """Transposed projections, expanded heads, a last dimension with gaps, and gradients that are expanded numbers."""
    torch.manual_seed(0)
    query = torch.randn(2, queries, 4, 8).transpose(1, 2)
    key, value = torch.randn(2, 1, 9, 8).expand(-1, 2, -1, -1), torch.randn(8, 9, 2, 2).permute(3, 2, 1, 0)
    *_, gates = inputs(queries, 9)
    gates = gates.transpose(1, 2).contiguous().transpose(1, 2)
    results = []
    for make, name in ((torch.Tensor.detach, "native"), (torch.Tensor.contiguous, "reference")):
        leaves = [make(x.detach()).requires_grad_() for x in (query, key, value)]
        output, _ = mix(name, *leaves, gates, query_start=9 - queries)
        results.append([output, *torch.autograd.grad(output.sum(), leaves)])
    assert_same(*results)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.torch.jit.trace:DeprecationWarning")
def test_transforms_and_traces_take_what_they_can_follow():
    query, key, value, gates = inputs()
    options = {"rotations": table(LAYOUTS["half"]), "backend": "sdpa"}

    def loss(query: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        return mix("auto", query, key, value, gates, **options)[0].square().sum()

    leaf = query.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(leaf, gates), leaf)
    torch.testing.assert_close(torch.func.grad(loss)(query, gates), expected, rtol=1e-4, atol=1e-5)
    queries = torch.stack((query, 2 * query))
    expected = torch.stack([loss(x, gates) for x in queries])
    torch.testing.assert_close(torch.func.vmap(loss, (0, None))(queries, gates), expected, rtol=1e-5, atol=1e-4)
    traced = torch.jit.trace(loss, (query, gates))
    other = torch.randn_like(query)
    torch.testing.assert_close(traced(other, gates), loss(other, gates), rtol=1e-5, atol=1e-4)

    def forced(query: torch.Tensor) -> torch.Tensor:
        return mix("native", query, key, value, gates)[0].sum()

    with pytest.raises(ValueError, match=r"torch\.func cannot transform it"):
        torch.func.grad(forced)(query)


def test_checkpointing_that_keeps_everything_changes_no_gradient():
    """What a cache returns instead of new memory may be filled already."""
    query, key, value, gates = inputs()

    def attention(query: torch.Tensor) -> torch.Tensor:
        return mix("native", query.sin(), key, value, gates)[0].square().sum()

    def keep(context, operation, *args, **kwargs):
        return checkpoint.CheckpointPolicy.MUST_SAVE

    plain, kept = query.clone().requires_grad_(), query.clone().requires_grad_()
    attention(plain).backward()
    checkpoint.checkpoint(
        attention,
        kept,
        use_reentrant=False,
        context_fn=lambda: checkpoint.create_selective_checkpoint_contexts(keep),
    ).backward()
    torch.testing.assert_close(kept.grad, plain.grad)


@pytest.mark.parametrize(
    ("queries", "keys"), [(3, 1 << 14), (64, 1 << 14), pytest.param(1 << 12, 1 << 12, marks=pytest.mark.slow)]
)
def test_errors_stay_within_twice_those_of_sdpa(queries, keys):
    """Under the own angle alone, over many keys, or under many queries, whose parts all have the same sign."""
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, 1, n, 16, generator=generator) for n in (queries, keys))
    value = torch.rand(1, 1, keys, 16, generator=generator)
    gates = torch.tensor([1.0, 0.0, 0.0]).expand(1, 1, queries, 3)
    mask = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)

    def mixture(*tensors):
        options = {"layout": RotaryLayout(0, 16, False), "query_start": keys - queries}
        return mix("native", *tensors, gates, **options)[0].transpose(1, 2)

    def sdpa(*tensors):
        return torch.nn.functional.scaled_dot_product_attention(*tensors, attn_mask=mask)

    def results(attention, *tensors: torch.Tensor) -> list[torch.Tensor]:
        leaves = [x.clone().requires_grad_() for x in tensors]
        output = attention(*leaves)
        return [output.detach(), *torch.autograd.grad(output.sum() + output.square().sum(), leaves)]

    ours, theirs = (results(f, query, key, value) for f in (mixture, sdpa))
    exact = results(sdpa, query.double(), key.double(), value.double())
    for name, one, other, right in zip(("output", "query", "key", "value"), ours, theirs, exact, strict=True):
        error, allowed = ((x.double() - right).norm().item() for x in (one, other))
        assert error <= 2 * allowed, f"{name}: {error:.2g}, sdpa {allowed:.2g}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("queries", [2, 9])
def test_half_precision_is_read_exactly(dtype, queries):
    """Inputs are stored in half precision, and everything after them is float32."""
    query, key, value, gates = (x.to(dtype) for x in inputs(queries, 9))
    query[0, 0, 0, :4] = torch.tensor([0.0, -0.0, torch.finfo(dtype).smallest_normal / 4, -3.0])
    key[..., 1, 1] = torch.finfo(dtype).max / 1000
    options = {"layout": LAYOUTS["interleaved"], "query_start": 9 - queries}
    found = []
    for as_stored in (True, False):
        leaves = [(x if as_stored else x.float()).clone().requires_grad_() for x in (query, key, value)]
        output, _ = mix("native", *leaves, gates.float(), **options)
        output.float().sum().backward()
        found.append([output.detach(), *(x.grad for x in leaves)])
    for half, full in zip(*found, strict=True):
        assert half.dtype == dtype
        assert torch.equal(half, full.to(dtype))
