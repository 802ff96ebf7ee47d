"""Attention whose cost follows K, in plain tensor operations for the CPU.

Queries are taken in chunks. Within a chunk, the rows (heads and tokens) that picked an expert are gathered, rotated by
its angle and multiplied with keys rotated likewise, so an expert costs what its rows cost. Where every row picked
every expert, probabilities are mixed first and multiplied with the values once. The backward pass computes
probabilities anew: nothing of the size of queries times keys is kept.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from ..rope import RotationTable, rotate

_ROWS_PER_EXPERT = 128
_MIN_CHUNK, _MAX_CHUNK = 128, 1024


def grouped(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    gates: torch.Tensor,
    *,
    rotations: RotationTable,
    query_start: int | torch.Tensor,
    picked: torch.Tensor | None = None,
    attend: Callable | None = None,
    attention_mask: torch.Tensor | None = None,
    scaling: float | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """See [`mixed_attention`]. Causal, or under a four-dimensional mask; works in float32."""
    reason = why_not_grouped(query, attention_mask, **kwargs)
    if reason is not None:
        raise ValueError(f"The grouped implementation cannot be used: {reason}. Choose implementation='delegated'.")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    picked = gates != 0 if picked is None else picked
    # Autocast would turn the products inside to half precision.
    with torch.autocast(query.device.type, enabled=False):
        output = _GroupedAttention.apply(
            query.float(),
            key.float(),
            value.float(),
            gates.float(),
            picked,
            attention_mask,
            rotations,
            int(query_start),
            scaling,
        )
    return output.transpose(1, 2).contiguous().to(query.dtype), None


def why_not_grouped(
    query: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    position_bias: torch.Tensor | None = None,
    is_causal: bool | None = None,
    output_attentions: bool | None = None,
    **kwargs,
) -> str | None:
    """The reason why [`grouped`] cannot compute this call, or None."""
    if query.device.type != "cpu":
        return f"it is for the CPU, and the queries are on {query.device.type!r}"
    if attention_mask is not None and (not isinstance(attention_mask, torch.Tensor) or attention_mask.dim() != 4):
        return "it reads masks of four dimensions only"
    if dropout or softcap is not None or s_aux is not None or position_bias is not None:
        return "it knows no dropout, softcap, attention sinks or position bias"
    if is_causal is False and attention_mask is None:
        return "it is causal"
    if output_attentions:
        return "it does not give attention probabilities"
    return None


@dataclass
class _Problem:
    """The tensors of a call by key-value head: Z = B · G, and R query heads for each of them."""

    query: torch.Tensor  # [Z, R, S, D]
    key: torch.Tensor  # [Z, T, D]
    value: torch.Tensor  # [Z, T, Dv]
    gates: torch.Tensor  # [Z, R, S, N]
    picked: torch.Tensor  # [Z, R, S, N]
    mask: torch.Tensor | None  # [B, 1 or H, 1 or S, T]
    rotations: RotationTable
    query_start: int
    scaling: float

    def __post_init__(self):
        self.buffers: dict[str, torch.Tensor] = {}
        self.cos, self.sin = self.rotations.cos_sin(self.key.shape[1], self.key.device)
        # One layer's keys under all angles at a time, which is small beside the cache of all layers.
        self.keys = [
            self.key if own else rotate(self.key, self.cos[j], self.sin[j], self.rotations.layout)
            for j, own in enumerate(self.rotations.is_identity)
        ]

    def buffer(self, name: str, *shape: int) -> torch.Tensor:
        """Memory used again by every chunk and expert; fresh memory of this size costs more than the arithmetic."""
        size = math.prod(shape)
        if name not in self.buffers or self.buffers[name].numel() < size:
            self.buffers[name] = self.query.new_empty(size)
        return self.buffers[name][:size].view(shape)

    def chunks(self) -> Iterator["_Chunk"]:
        heads, length = self.query.shape[1:3]
        share = self.picked.float().mean().item() or 1.0
        size = int(_ROWS_PER_EXPERT / (heads * share))
        size = min(max(size, _MIN_CHUNK), _MAX_CHUNK)
        for start in range(0, length, size):
            yield _Chunk(self, start, min(start + size, length))


class _Chunk:
    """Queries `start` to `end` - 1 of all heads; M = R · C rows."""

    def __init__(self, problem: _Problem, start: int, end: int):
        self.problem, self.start, self.end = problem, start, end
        self.first_key = problem.query_start + start
        # Without a mask, no key after the last query is seen.
        self.num_keys = problem.key.shape[1] if problem.mask is not None else problem.query_start + end
        self.picked = self.rows(problem.picked)
        self.gates = self.rows(problem.gates) * self.picked
        self.query = self.rows(problem.query)
        self.all_pick_all = bool(self.picked.all())

    def rows(self, tensor: torch.Tensor) -> torch.Tensor:
        """This chunk's rows `[Z, M, ...]` of `[Z, R, S, ...]`."""
        return tensor[:, :, self.start : self.end].flatten(1, 2)

    def experts(self) -> Iterator["_Expert"]:
        for index in range(self.gates.shape[-1]):
            picked = self.picked[..., index]
            count = int(picked.sum(dim=1).max())
            if count == picked.shape[1]:
                yield _Expert(self, index, None)
            elif count:
                # Rows of heads that fewer tokens picked are filled up with others, whose gate is zero.
                order = torch.argsort(picked, dim=1, descending=True, stable=True)
                yield _Expert(self, index, order[:, :count])


class _Expert:
    """The rows of a chunk that picked one expert: all, or those at `row_index` `[Z, n]`."""

    def __init__(self, chunk: _Chunk, index: int, row_index: torch.Tensor | None):
        self.chunk, self.index, self.row_index = chunk, index, row_index
        problem = chunk.problem
        size = chunk.end - chunk.start
        token = torch.arange(chunk.gates.shape[1]) % size if row_index is None else row_index % size
        self.token = token  # [M] or [Z, n], within the chunk
        self.position = chunk.first_key + token
        self.gate = self.take(chunk.gates[..., index])[..., None]
        self.keys = problem.keys[index][:, : chunk.num_keys]
        self.query = self.turn(self.take(chunk.query)) * problem.scaling

    def take(self, rows: torch.Tensor) -> torch.Tensor:
        """This expert's rows `[Z, n, ...]` of the chunk's `[Z, M, ...]`."""
        if self.row_index is None:
            return rows
        return rows[torch.arange(len(rows))[:, None], self.row_index]

    def put(self, target: torch.Tensor, rows: torch.Tensor) -> None:
        """Add this expert's rows to the chunk's."""
        if self.row_index is None:
            target += rows
        else:
            target.scatter_add_(1, self.row_index[..., None].expand_as(rows), rows)

    def turn(self, rows: torch.Tensor, direction: int = 1) -> torch.Tensor:
        """Queries rotated from the model's own angle to the expert's, or back."""
        rotations = self.chunk.problem.rotations
        if rotations.is_identity[self.index]:
            return rows
        cos, sin = self.chunk.problem.cos[self.index], self.chunk.problem.sin[self.index]
        return rotate(rows, cos[self.position], direction * sin[self.position], rotations.layout)

    def probabilities(self) -> torch.Tensor:
        """Attention probabilities `[Z, n, keys]`, in memory that the next expert's will take."""
        chunk, problem = self.chunk, self.chunk.problem
        scores = problem.buffer("scores", *self.query.shape[:2], chunk.num_keys)
        torch.bmm(self.query, self.keys.mT, out=scores)
        lowest = torch.finfo(scores.dtype).min
        if problem.mask is None:
            later = torch.arange(chunk.first_key, chunk.num_keys) > self.position[..., None]
            scores[..., chunk.first_key :].masked_fill_(later, lowest)
        else:
            mask = self.mask_rows()
            if mask.dtype == torch.bool:
                scores.masked_fill_(~mask, lowest)
            else:
                scores += mask
        return torch.softmax(scores, dim=-1, out=scores)

    def mask_rows(self) -> torch.Tensor:
        problem, chunk = self.chunk.problem, self.chunk
        mask = problem.mask[..., : chunk.num_keys]
        if mask.shape[2] > 1:
            mask = mask[:, :, chunk.start : chunk.end]
        z, heads = problem.query.shape[:2]
        groups = z // mask.shape[0] if mask.shape[0] > 1 else z
        batch = torch.arange(z)[:, None] // groups
        size = chunk.end - chunk.start
        rows = torch.arange(chunk.gates.shape[1]).expand(z, -1) if self.row_index is None else self.row_index
        num_groups = mask.shape[1] // heads if mask.shape[1] > 1 else 1
        head = (torch.arange(z)[:, None] % num_groups) * heads + rows // size if mask.shape[1] > 1 else 0
        token = rows % size if mask.shape[2] > 1 else 0
        return mask[batch, head, token]


class _GroupedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, gates, picked, mask, rotations, query_start, scaling):
        ctx.save_for_backward(query, key, value, gates, picked, mask)
        ctx.options = (rotations, query_start, scaling)
        problem = _problem(query, key, value, gates, picked, mask, *ctx.options)
        output = problem.query.new_empty(*problem.query.shape[:3], value.shape[-1])
        for chunk in problem.chunks():
            values = problem.value[:, : chunk.num_keys]
            if chunk.all_pick_all:
                mixed = problem.buffer("mixed", *chunk.gates.shape[:2], chunk.num_keys).zero_()
                for expert in chunk.experts():
                    mixed.addcmul_(expert.probabilities(), expert.gate)
                rows = torch.bmm(mixed, values)
            else:
                rows = output.new_zeros(*chunk.gates.shape[:2], value.shape[-1])
                for expert in chunk.experts():
                    expert.put(rows, torch.bmm(expert.probabilities(), values).mul_(expert.gate))
            output[:, :, chunk.start : chunk.end] = rows.unflatten(1, (problem.query.shape[1], -1))
        return output.view(*query.shape[:3], value.shape[-1])

    @staticmethod
    def backward(ctx, grad_output):
        query, key, value, gates, picked, mask = ctx.saved_tensors
        problem = _problem(query, key, value, gates, picked, mask, *ctx.options)
        needs_query, needs_key, needs_value, needs_gates = ctx.needs_input_grad[:4]
        grad_output = grad_output.reshape(*problem.query.shape[:3], -1)
        grad_query = torch.empty_like(problem.query) if needs_query else None
        grad_gates = torch.zeros_like(problem.gates) if needs_gates else None
        grad_key = torch.zeros_like(problem.key) if needs_key else None
        grad_value = torch.zeros_like(problem.value) if needs_value else None

        for chunk in problem.chunks():
            grad_rows = chunk.rows(grad_output)
            values = problem.value[:, : chunk.num_keys]
            shape = (*chunk.gates.shape[:2], chunk.num_keys)
            shared = mixed = None
            if chunk.all_pick_all:
                shared = torch.bmm(grad_rows, values.mT, out=problem.buffer("shared", *shape))
                mixed = problem.buffer("mixed", *shape).zero_()
            grad_query_rows = torch.zeros_like(chunk.query)
            grad_gate_rows = torch.zeros_like(chunk.gates)
            for expert in chunk.experts():
                probs = expert.probabilities()
                grads = expert.take(grad_rows)
                grad_probs = shared
                if grad_probs is None:
                    grad_probs = problem.buffer("grad_probs", *probs.shape)
                    torch.bmm(grads, values.mT, out=grad_probs)
                grad_gate = torch.linalg.vecdot(probs, grad_probs)  # [Z, n]
                expert.put(grad_gate_rows[..., expert.index, None], grad_gate[..., None])
                if mixed is not None:
                    mixed.addcmul_(probs, expert.gate)
                elif needs_value:
                    grad_value[:, : chunk.num_keys].baddbmm_(probs.mT, grads * expert.gate)
                if needs_query or needs_key:
                    grad_scores = problem.buffer("grad_scores", *probs.shape)
                    torch.sub(grad_probs, grad_gate[..., None], out=grad_scores).mul_(probs).mul_(expert.gate)
                if needs_query:
                    turned = torch.bmm(grad_scores, expert.keys) * problem.scaling
                    expert.put(grad_query_rows, expert.turn(turned, direction=-1))
                if needs_key:
                    grad_keys = torch.bmm(grad_scores.mT, expert.query)
                    if not problem.rotations.is_identity[expert.index]:
                        cos, sin = (t[expert.index, : chunk.num_keys] for t in (problem.cos, problem.sin))
                        grad_keys = rotate(grad_keys, cos, -sin, problem.rotations.layout)
                    grad_key[:, : chunk.num_keys] += grad_keys
            if mixed is not None and needs_value:
                grad_value[:, : chunk.num_keys].baddbmm_(mixed.mT, grad_rows)
            # Rows that filled up an expert's group did not pick it.
            grad_gate_rows *= chunk.picked
            heads = (problem.query.shape[1], -1)
            if needs_query:
                grad_query[:, :, chunk.start : chunk.end] = grad_query_rows.unflatten(1, heads)
            if needs_gates:
                grad_gates[:, :, chunk.start : chunk.end] = grad_gate_rows.unflatten(1, heads)
        return (
            grad_query.view_as(query) if needs_query else None,
            grad_key.view_as(key) if needs_key else None,
            grad_value.view_as(value) if needs_value else None,
            grad_gates.view_as(gates) if needs_gates else None,
            *(None,) * 5,
        )


def _problem(query, key, value, gates, picked, mask, rotations, query_start, scaling) -> _Problem:
    batch, num_kv_heads = key.shape[:2]
    by_group = (batch * num_kv_heads, query.shape[1] // num_kv_heads)
    return _Problem(
        query.reshape(*by_group, *query.shape[2:]),
        key.reshape(-1, *key.shape[2:]),
        value.reshape(-1, *value.shape[2:]),
        gates.reshape(*by_group, *gates.shape[2:]),
        picked.reshape(*by_group, *picked.shape[2:]),
        mask,
        rotations,
        query_start,
        scaling,
    )
