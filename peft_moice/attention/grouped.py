"""Attention whose cost follows K, from PyTorch's fused attention for the CPU.

An expert attends for the rows (heads and tokens) that picked it and for no others. Where every row picked it, it is
one call of fused attention. Else rows are sorted by expert and token, and the causal triangle of each expert is cut
into blocks: the later half of the rows attends to the earlier half of the keys without a mask, and so on within either
half, down to small triangles with one. Results are merged by their log-sum-exps.

For the backward pass every expert's output and log-sum-exps are kept; queries and keys are rotated anew.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch.autograd.function import once_differentiable

from ..rope import RotationTable, rotate
from .call import AttentionCall
from .cpu_limits import first_position, why_not_on_cpu
from .masks import additive

_FUSED = "_scaled_dot_product_flash_attention_for_cpu"
"""PyTorch's private operator, and with `_backward` its gradient."""
_ROWS_PER_TRIANGLE = 192
_MIN_TOKENS, _MAX_TOKENS = 64, 1024


def why_not(call: AttentionCall) -> str | None:
    """See [`Implementation`]."""
    return why_not_on_cpu(call) or _why_no_operator()


def _why_no_operator() -> str | None:
    for name in (_FUSED, f"{_FUSED}_backward"):
        if not hasattr(torch.ops.aten, name):
            return f"it needs the operator `aten::{name}`, which PyTorch {torch.__version__} does not have"
    return None


def run(call: AttentionCall) -> tuple[torch.Tensor, None]:
    """See [`mixed_attention`]. In the precision of fused attention."""
    query, key, value, mask = call.query, call.key, call.value, call.attention_mask
    head_dim, value_dim = query.shape[-1], value.shape[-1]
    if head_dim != value_dim:
        # Fused attention wants one size for all.
        pad = torch.nn.functional.pad
        query, key = (pad(x, (0, max(0, value_dim - head_dim))) for x in (query, key))
        value = pad(value, (0, max(0, head_dim - value_dim)))
    # Fused attention reads the last dimension as it lies in memory.
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    if mask is not None:
        mask = additive(mask, query.dtype)
    elif not call.is_causal:
        mask = query.new_zeros(1, 1, 1, 1)
    output: torch.Tensor = _GroupedAttention.apply(  # type: ignore[no-untyped-call]
        query, key, value, call.gates.float(), call.picks(), mask, call.rotations, first_position(call), call.scaling
    )
    # Under a mask, fused attention gives zeros for a query that is not a number.
    is_finite = call.query.isfinite().all(dim=-1).transpose(1, 2)[..., None]
    return output[..., :value_dim].masked_fill(~is_finite, torch.nan), None


@dataclass
class _Block:
    """Rows and keys that attend in one call.

    Attributes:
        rows, keys: which.
        mask: `[..., rows, keys]`, additive, or None.
        is_causal: whether row i sees the keys up to the i-th.
        is_first: whether the rows have not attended to other keys before.
    """

    rows: slice
    keys: slice
    mask: torch.Tensor | None = None
    is_causal: bool = False
    is_first: bool = False


def _attend(query, key, value, blocks: list[_Block], scaling: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention output `[B, H, S, D]` and log-sum-exp `[B, H, S]` over the keys of all blocks."""
    fused = getattr(torch.ops.aten, _FUSED)
    output = log_sum = None
    for block in blocks:
        tensors = (query[..., block.rows, :], key[..., block.keys, :], value[..., block.keys, :])
        part, part_log_sum = fused(*tensors, 0.0, block.is_causal, attn_mask=block.mask, scale=scaling)
        if part.shape[-2] == query.shape[-2] and block.is_first:
            output, log_sum = part, part_log_sum
            continue
        if output is None:
            output, log_sum = torch.empty_like(query), query.new_empty(query.shape[:-1], dtype=torch.float32)
        rows, rows_log_sum = output[..., block.rows, :], log_sum[..., block.rows]
        if block.is_first:
            rows.copy_(part)
            rows_log_sum.copy_(part_log_sum)
        else:
            total = torch.logaddexp(rows_log_sum, part_log_sum)
            rows.mul_((rows_log_sum - total).exp_()[..., None])
            rows.addcmul_(part, (part_log_sum - total).exp_()[..., None].to(part.dtype))
            rows_log_sum.copy_(total)
    return output, log_sum


def _attend_backward(
    grad_output, query, key, value, output, log_sum, blocks: list[_Block], scaling: float, grad_key, grad_value
) -> torch.Tensor:
    """Gradient of `query`; those of `key` and `value` are added to `grad_key` and `grad_value`."""
    fused_backward = getattr(torch.ops.aten, f"{_FUSED}_backward")
    grad_query = torch.zeros_like(query)
    for block in blocks:
        rows, keys = (..., block.rows, slice(None)), (..., block.keys, slice(None))
        # With the output and log-sum-exp over all keys, a block gives its own share of the gradients.
        grads = fused_backward(
            *(grad_output[rows], query[rows], key[keys], value[keys], output[rows], log_sum[..., block.rows]),
            *(0.0, block.is_causal),
            attn_mask=block.mask,
            scale=scaling,
        )
        for target, index, grad in zip((grad_query, grad_key, grad_value), (rows, keys, keys), grads, strict=True):
            target[index] += grad
    return grad_query


@dataclass
class _Problem:
    """A call.

    Attributes:
        query: `[B, H, S, D]`.
        key: `[B, G, T, D]`.
        value: `[B, G, T, D]`.
        gates: `[B, H, S, N]` in float32.
        picked: `[B, H, S, N]`.
        mask: `[1 or B, 1 or H, 1 or S, 1 or T]`, additive, or None for causal attention.
        whole: the experts that every row picked.
        blocks: how those attend.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    gates: torch.Tensor
    picked: torch.Tensor
    mask: torch.Tensor | None
    rotations: RotationTable
    query_start: int
    scaling: float
    whole: list[int] = field(init=False)

    def __post_init__(self):
        self.cos, self.sin = self.rotations.cos_sin(self.key.shape[-2], self.key.device)
        self.whole = self.picked.flatten(0, 2).all(dim=0).nonzero().flatten().tolist()
        every, length = slice(None), self.query.shape[-2]
        if self.mask is not None:
            mask = self.mask.expand(-1, -1, length, self.key.shape[-2])
            self.blocks = [_Block(every, every, mask, is_first=True)]
        else:
            own = slice(self.query_start, self.query_start + length)
            self.blocks = [_Block(every, own, is_causal=True, is_first=True), *self.earlier(every)]

    def earlier(self, rows: slice) -> list[_Block]:
        """The keys before all queries."""
        return [_Block(rows, slice(0, self.query_start))] if self.query_start else []

    def turn_queries(self, query: torch.Tensor, expert: int, direction: int = 1) -> torch.Tensor:
        """All queries `[..., S, D]` under an expert's angle, or back from it."""
        own = slice(self.query_start, self.query_start + self.query.shape[-2])
        return self._turn(query, expert, own, direction)

    def turn_keys(self, key: torch.Tensor, expert: int, direction: int = 1) -> torch.Tensor:
        """All keys `[..., T, D]` likewise."""
        return self._turn(key, expert, slice(None), direction)

    def _turn(self, x: torch.Tensor, expert: int, positions: slice, direction: int) -> torch.Tensor:
        if self.rotations.is_identity[expert]:
            return x
        cos, sin = self.cos[expert, positions], self.sin[expert, positions]
        return rotate(x, cos, direction * sin, self.rotations.layout)

    def sorted_rows(self) -> Iterator["_SortedRows"]:
        """The rows of the experts that not every row picked, by row of the batch and key-value head."""
        if len(self.whole) == self.rotations.num_experts:
            return
        picked = self.picked
        if self.whole:
            picked = picked.clone()
            picked[..., self.whole] = False
        heads = self.query.shape[1] // self.key.shape[1]
        tokens = int(_ROWS_PER_TRIANGLE / max(heads * picked.float().mean().item(), 1e-3))
        tokens = min(max(tokens, _MIN_TOKENS), _MAX_TOKENS)
        for row in range(picked.shape[0]):
            for group in range(self.key.shape[1]):
                rows = _SortedRows(self, picked, row, group, tokens)
                if len(rows.expert):
                    yield rows


class _SortedRows:
    """M pairs of an expert and a row that picked it, sorted by expert, token and head, for one key-value head.

    Attributes:
        expert, token, head: `[M]`; heads are counted within the group.
        query: `[M, D]`, under the experts' angles.
        blocks: of each expert its M' rows, its index, and how they attend.
    """

    def __init__(self, problem: _Problem, picked: torch.Tensor, row: int, group: int, tokens: int):
        self.problem, self.row, self.group = problem, row, group
        heads = problem.query.shape[1] // problem.key.shape[1]
        self.heads = slice(group * heads, (group + 1) * heads)
        by_expert = picked[row, self.heads].permute(2, 1, 0)  # [N, S, R]
        self.expert, self.token, self.head = by_expert.nonzero(as_tuple=True)
        self.query = self._turn(self.take(problem.query))
        self.key, self.value = problem.key[row, group], problem.value[row, group]
        self.blocks = list(self._blocks(*by_expert.shape[:2], tokens))

    def take(self, tensor: torch.Tensor) -> torch.Tensor:
        """The rows `[M, ...]` of `[B, H, S, ...]`."""
        return tensor[self.row, self.heads][self.head, self.token]

    def add_to(self, target: torch.Tensor, rows: torch.Tensor) -> None:
        """Add `rows` `[M, D]` to theirs of `target` `[B, H, S, D]`."""
        part = target[self.row, self.heads]
        index = (self.head * part.shape[1] + self.token)[:, None].expand_as(rows)
        sums = rows.new_zeros(part.shape[0] * part.shape[1], rows.shape[1])
        part += sums.scatter_add_(0, index, rows).view(part.shape)

    def turn_back(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows `[M, D]` turned from their experts' angles to the model's own."""
        return self._turn(rows, direction=-1)

    def _turn(self, rows: torch.Tensor, direction: int = 1) -> torch.Tensor:
        problem, position = self.problem, self.problem.query_start + self.token
        cos, sin = problem.cos[self.expert, position], problem.sin[self.expert, position]
        return rotate(rows, cos, direction * sin, problem.rotations.layout)

    def _blocks(self, num_experts: int, length: int, tokens: int) -> Iterator[tuple[slice, int, list[_Block]]]:
        pieces = -(-length // tokens)
        counts = torch.bincount(self.expert * pieces + self.token // tokens, minlength=num_experts * pieces)
        starts = [0, *counts.cumsum(0).tolist()]
        causal = self.query.new_full((tokens, tokens), -torch.inf).triu_(1)
        for expert in range(num_experts):
            edges = starts[expert * pieces : (expert + 1) * pieces + 1]
            rows = slice(edges[0], edges[-1])
            if rows.start == rows.stop:
                continue
            if self.problem.mask is not None:
                yield rows, expert, [_Block(slice(None), slice(None), self._mask_of(rows), is_first=True)]
                continue
            cut = _Triangle([edge - rows.start for edge in edges], self.token[rows], tokens, length, causal)
            blocks = sorted(cut.blocks(0, pieces), key=lambda block: not block.is_first)
            for block in blocks:
                keys, start = block.keys, self.problem.query_start
                block.keys = slice(start + keys.start, start + keys.stop)
            yield rows, expert, [*blocks, *self.problem.earlier(slice(None))]

    def _mask_of(self, rows: slice) -> torch.Tensor:
        batch, heads, length, _ = self.problem.mask.shape
        head = self.head[rows] + self.heads.start if heads > 1 else 0
        token = self.token[rows] if length > 1 else 0
        mask = self.problem.mask[self.row if batch > 1 else 0, head, token]
        return mask.expand(rows.stop - rows.start, self.key.shape[-2])[None, None]

    def attend(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Outputs `[M, D]` and log-sum-exps `[M]`, before gates."""
        output = torch.empty_like(self.query)
        log_sum = self.query.new_empty(len(self.query), dtype=torch.float32)
        for rows, expert, blocks in self.blocks:
            tensors = (self.query[rows], self.problem.turn_keys(self.key, expert), self.value)
            part = _attend(*(tensor[None, None] for tensor in tensors), blocks, self.problem.scaling)
            output[rows], log_sum[rows] = part[0][0, 0], part[1][0, 0]
        return output, log_sum

    def attend_backward(self, grad_output, output, log_sum, grad_key, grad_value) -> torch.Tensor:
        """Gradients `[M, D]` of the queries; those of this head's keys and values are added where they belong."""
        grad_query = torch.empty_like(self.query)
        own = (self.row, self.group)
        for rows, expert, blocks in self.blocks:
            key = self.problem.turn_keys(self.key, expert)
            grad_turned = torch.zeros_like(key, dtype=torch.float32)
            tensors = (grad_output[rows], self.query[rows], key, self.value, output[rows], log_sum[rows])
            grad_query[rows] = _attend_backward(
                *(tensor[None, None] for tensor in tensors),
                blocks,
                self.problem.scaling,
                grad_turned[None, None],
                grad_value[own][None, None],
            )[0, 0]
            grad_key[own] += self.problem.turn_keys(grad_turned, expert, direction=-1)
        return self.turn_back(grad_query)


@dataclass
class _Triangle:
    """The rows of one expert, sorted by token, over a sequence cut into pieces of `piece` tokens.

    Attributes:
        edges: where the rows of each piece begin, and where the last ones end.
        token: `[rows]`.
        piece: tokens of a piece.
        length: tokens of the sequence.
        causal: `[piece, piece]`, the mask within a piece.
    """

    edges: list[int]
    token: torch.Tensor
    piece: int
    length: int
    causal: torch.Tensor

    def blocks(self, first: int, end: int) -> Iterator[_Block]:
        """How the rows of the pieces `first` to `end` - 1 attend to the keys of these pieces."""
        rows = slice(self.edges[first], self.edges[end])
        if rows.start == rows.stop:
            return
        if end - first == 1:
            keys = self._keys(first, end)
            mask = self.causal[self.token[rows] - keys.start, : keys.stop - keys.start]
            yield _Block(rows, keys, mask[None, None], is_first=True)
            return
        middle = (first + end + 1) // 2
        if self.edges[middle] < rows.stop:
            yield _Block(slice(self.edges[middle], rows.stop), self._keys(first, middle))
        yield from self.blocks(first, middle)
        yield from self.blocks(middle, end)

    def _keys(self, first: int, end: int) -> slice:
        return slice(first * self.piece, min(end * self.piece, self.length))


class _GroupedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, gates, picked, mask, *options):
        problem = _Problem(query, key, value, gates, picked, mask, *options)
        batch, heads, length, size = query.shape
        output = query.new_zeros(batch, length, heads, size, dtype=torch.float32)
        by_head = output.transpose(1, 2)
        kept = []
        for expert in problem.whole:
            tensors = (problem.turn_queries(query, expert), problem.turn_keys(key, expert), value)
            kept += _attend(*tensors, problem.blocks, problem.scaling)
            by_head.addcmul_(kept[-2], gates[..., expert, None])
        for rows in problem.sorted_rows():
            kept += rows.attend()
            gate = rows.take(gates).gather(1, rows.expert[:, None])[:, 0]
            rows.add_to(by_head, kept[-2] * gate[:, None])
        ctx.save_for_backward(query, key, value, gates, picked, mask, *kept)
        ctx.options = options
        return output.to(query.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        query, key, value, gates, picked, mask, *kept = ctx.saved_tensors
        needs_query, needs_key, needs_value, needs_gates = ctx.needs_input_grad[:4]
        problem = _Problem(query, key, value, gates, picked, mask, *ctx.options)
        grad_output = grad_output.transpose(1, 2)  # [B, H, S, D]
        grad_query, grad_key, grad_value = (torch.zeros_like(x, dtype=torch.float32) for x in (query, key, value))
        grad_gates = torch.zeros_like(gates)
        attends = needs_query or needs_key or needs_value
        parts = iter(kept)
        for expert in problem.whole:
            output, log_sum = next(parts), next(parts)
            grad_gates[..., expert] = torch.linalg.vecdot(output.float(), grad_output.float())
            if attends:
                turned = (problem.turn_queries(query, expert), problem.turn_keys(key, expert))
                grad_turned = torch.zeros_like(grad_key)
                weighted = (grad_output * gates[..., expert, None]).to(query.dtype)
                grads = _attend_backward(
                    *(
                        weighted,
                        *turned,
                        value,
                        output,
                        log_sum,
                        problem.blocks,
                        problem.scaling,
                        grad_turned,
                        grad_value,
                    )
                )
                grad_query += problem.turn_queries(grads, expert, direction=-1)
                grad_key += problem.turn_keys(grad_turned, expert, direction=-1)
        for rows in problem.sorted_rows():
            output, log_sum = next(parts), next(parts)
            grads = rows.take(grad_output)
            index = (rows.row, rows.head + rows.heads.start, rows.token, rows.expert)
            grad_gates[index] = torch.linalg.vecdot(output.float(), grads.float())
            if attends:
                weighted = (grads * gates[index][:, None]).to(query.dtype)
                grads = rows.attend_backward(weighted, output, log_sum, grad_key, grad_value)
                rows.add_to(grad_query, grads.float())
        return (
            grad_query.to(query.dtype) if needs_query else None,
            grad_key.to(key.dtype) if needs_key else None,
            grad_value.to(value.dtype) if needs_value else None,
            grad_gates if needs_gates else None,
            *(None,) * 5,
        )
