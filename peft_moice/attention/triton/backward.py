"""Gradients of [`prefill`], which computes each tile's probabilities anew.

Like the forward pass, kernels run once per expert over the rows that picked it, and add to float32 gradients launch by
launch, without atomics.

The gradient of a score is `p (dp - δ)` with `δ = Σ p dp` over a pick's keys, which is also the gradient of its gate.
Only the mixture of the experts' outputs was stored, whose product Δ with the output's gradient is the mean of δ over
a row's experts. So the first kernel sums `p (dp - Δ) k` and `p k` in one pass over the keys, beside `δ - Δ`, and
subtracts at the end; Δ is near δ, so little is lost by rounding. The second kernel knows δ.
"""

import torch
import triton
import triton.language as tl

from .picks import Picks
from .problem import Blocks, Problem, choose_blocks
from .tiles import (
    LN2,
    add_pairs,
    add_rest,
    add_values,
    first_position,
    load_rest,
    load_rotated,
    load_values,
    masked,
    product,
    rotate,
)


def gradients(
    problem: Problem,
    picks: Picks,
    output: torch.Tensor,
    row_max: torch.Tensor,
    row_sum: torch.Tensor,
    grad_output: torch.Tensor,
    needs: tuple[bool, bool, bool, bool],
) -> tuple[torch.Tensor | None, ...]:
    """Gradients of query, key, value and gates in float32; None where `needs` has no use for them.

    `output`, `row_max` and `row_sum` are what [`prefill`] gave; `grad_output` is `[B, S, H, Dv]`.
    """
    needs_query, needs_key, needs_value, needs_gates = needs
    targets = (problem.query, problem.key, problem.value, problem.gates)
    grads = [
        torch.zeros(t.shape, dtype=torch.float32, device=t.device) if needed else None
        for t, needed in zip(targets, needs, strict=True)
    ]
    grad_output = grad_output.to(problem.query.dtype).contiguous()
    mean_delta = torch.linalg.vecdot(grad_output.float(), output.float()).contiguous()  # [B, S, H]
    delta = torch.empty_like(row_max)
    by_rows = choose_blocks(problem, hopper=Blocks(64, 32, 8), ampere=Blocks(32, 32, 4))
    by_keys = choose_blocks(problem, hopper=Blocks(32, 64, 8), ampere=Blocks(32, 32, 4))
    grad_query, grad_key, grad_value, grad_gates = grads
    stored, lists = (row_max, row_sum, delta, grad_output), (picks.rows, picks.counts)
    for of_rows, of_keys in zip(problem.by_expert(by_rows), problem.by_expert(by_keys), strict=True):
        if needs_query or needs_key or needs_gates:
            query_kernel[(triton.cdiv(problem.num_rows, by_rows.rows), problem.lists)](
                **of_rows, picks=lists, stored=stored, mean_delta=mean_delta, results=(grad_query, grad_gates)
            )
        if needs_key or needs_value:
            key_kernel[(triton.cdiv(problem.key.shape[2], by_keys.keys), problem.lists)](
                **of_keys, picks=(*lists, picks.through), stored=stored, results=(grad_key, grad_value)
            )
    return tuple(grads)


@triton.jit(do_not_specialize=["query_start", "expert", "S", "T"])
def query_kernel(
    inputs, strides, sizes, table, picks, stored, mean_delta, results, query_start, expert, S, T, form: tl.constexpr
):
    query, key, value, mask, gates = inputs
    q_b, q_h, q_s, k_b, k_h, k_t, v_b, v_h, v_t, m_b, m_h, m_s, m_t = strides
    N, G, scale = sizes
    cos, sin = table
    rows, counts = picks
    row_max, row_sum, delta, grad_output = stored
    grad_query, grad_gates = results
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    z = tl.program_id(1).to(tl.int64)
    b, g = z // G, z % G
    count = tl.load(counts + z * N + expert)
    if block * form.BM >= count:
        return

    place = block * form.BM + tl.arange(0, form.BM)
    valid = place < count
    row = tl.load(rows + (z * N + expert) * (S * form.R + 1) + place, mask=valid, other=0)
    token, head = (row // form.R).to(tl.int64), g * form.R + row % form.R
    position = first_position(query_start, form) + row // form.R
    mask_row = b * m_b + head * m_h + token * m_s
    out_row = (b * S + token) * G * form.R + head
    gate_row = ((b * G * form.R + head) * S + token) * N + expert
    pick = (z * N + expert) * S * form.R + place

    q_row = head * q_h + token * q_s
    qa, qb = load_rotated(query + b * q_b, q_row, valid, cos, sin, position, form)
    if form.BR > 0:
        qr = load_rest(query + b * q_b, q_row, valid, form)
    grads = load_values(grad_output, out_row * form.DV, valid, form)
    middle = tl.load(mean_delta + out_row, mask=valid, other=0.0)
    top = tl.load(row_max + pick, mask=valid, other=0.0)
    share = 1.0 / tl.load(row_sum + pick, mask=valid, other=1.0)

    tile = tl.arange(0, form.BN)
    tile_keys, tile_values = key + b * k_b + g * k_h, value + b * v_b + g * v_h
    tile_cos, tile_sin = cos, sin
    end = T
    if form.MASK == 0:
        end = tl.minimum(T, tl.max(tl.where(valid, position, 0)) + 1)
    shift = tl.full([form.BM], 0.0, tl.float32)
    if grad_query is not None:
        sum_a, sum_b = tl.full([form.BM, form.BP], 0.0, tl.float32), tl.full([form.BM, form.BP], 0.0, tl.float32)
        mean_a, mean_b = tl.full([form.BM, form.BP], 0.0, tl.float32), tl.full([form.BM, form.BP], 0.0, tl.float32)
        if form.BR > 0:
            sum_r, mean_r = tl.full([form.BM, form.BR], 0.0, tl.float32), tl.full([form.BM, form.BR], 0.0, tl.float32)
    for first_key in range(0, end, form.BN):
        n = first_key + tile
        exists = n < T
        ka, kb = load_rotated(tile_keys, tile * k_t, exists, tile_cos, tile_sin, tile, form)
        scores = product(qa, tl.trans(ka), tl.full([form.BM, form.BN], 0.0, tl.float32))
        scores = product(qb, tl.trans(kb), scores)
        if form.BR > 0:
            kr = load_rest(tile_keys, tile * k_t, exists, form)
            scores = product(qr, tl.trans(kr), scores)
        scores = masked(
            scores * scale, mask, mask_row[:, None], position[:, None], n[None, :], exists[None, :], m_t, form
        )
        probs = tl.exp2(scores - top[:, None]) * share[:, None]
        v = load_values(tile_values, tile * v_t, exists, form)
        grad_probs = product(grads, tl.trans(v), tl.full([form.BM, form.BN], 0.0, tl.float32))
        grad_scores = probs * (grad_probs - middle[:, None])
        shift += tl.sum(grad_scores, 1)
        if grad_query is not None:
            grad_scores, probs = grad_scores.to(ka.dtype), probs.to(ka.dtype)
            sum_a, sum_b = product(grad_scores, ka, sum_a), product(grad_scores, kb, sum_b)
            mean_a, mean_b = product(probs, ka, mean_a), product(probs, kb, mean_b)
            if form.BR > 0:
                sum_r, mean_r = product(grad_scores, kr, sum_r), product(probs, kr, mean_r)
        tile_keys += form.BN * k_t
        tile_values += form.BN * v_t
        tile_cos += form.BN * form.P
        tile_sin += form.BN * form.P

    tl.store(delta + pick, middle + shift, mask=valid)
    if grad_gates is not None:
        tl.store(grad_gates + gate_row, middle + shift, mask=valid)
    if grad_query is not None:
        gate = tl.load(gates + gate_row, mask=valid, other=0.0)
        # `scale` turns scores to base 2.
        factor = (gate * scale * LN2)[:, None]
        sum_a, sum_b = (sum_a - shift[:, None] * mean_a) * factor, (sum_b - shift[:, None] * mean_b) * factor
        if form.ROTATE:
            sum_a, sum_b = rotate(sum_a, sum_b, cos, sin, position, valid, -1.0, form)
        grad_row = ((b * G * form.R + head) * S + token) * form.D
        add_pairs(grad_query, grad_row, valid, sum_a, sum_b, form)
        if form.BR > 0:
            add_rest(grad_query, grad_row, valid, (sum_r - shift[:, None] * mean_r) * factor, form)


@triton.jit(do_not_specialize=["query_start", "expert", "S", "T"])
def key_kernel(inputs, strides, sizes, table, picks, stored, results, query_start, expert, S, T, form: tl.constexpr):
    query, key, value, mask, gates = inputs
    q_b, q_h, q_s, k_b, k_h, k_t, v_b, v_h, v_t, m_b, m_h, m_s, m_t = strides
    N, G, scale = sizes
    cos, sin = table
    rows, counts, through = picks
    row_max, row_sum, delta, grad_output = stored
    grad_key, grad_value = results
    first_key = tl.program_id(0) * form.BN
    z = tl.program_id(1).to(tl.int64)
    b, g = z // G, z % G
    start = first_position(query_start, form)
    count = tl.load(counts + z * N + expert)
    begin = 0
    if form.MASK == 0:
        # Rows of tokens before the first key do not see it.
        rows_before = tl.minimum(tl.maximum(first_key - start, 0), S) * form.R
        last = (z * N + expert) * S * form.R + tl.maximum(rows_before - 1, 0)
        begin = tl.where(rows_before > 0, tl.load(through + last), 0)
    if begin >= count:
        return

    n = first_key + tl.arange(0, form.BN)
    exists = n < T
    k_row = n.to(tl.int64) * k_t
    ka, kb = load_rotated(key + b * k_b + g * k_h, k_row, exists, cos, sin, n, form)
    if form.BR > 0:
        kr = load_rest(key + b * k_b + g * k_h, k_row, exists, form)
    if grad_key is not None:
        v = load_values(value + b * v_b + g * v_h, n.to(tl.int64) * v_t, exists, form)
        sum_a, sum_b = tl.full([form.BN, form.BP], 0.0, tl.float32), tl.full([form.BN, form.BP], 0.0, tl.float32)
        if form.BR > 0:
            sum_r = tl.full([form.BN, form.BR], 0.0, tl.float32)
    if grad_value is not None:
        sum_v = tl.full([form.BN, form.BV], 0.0, tl.float32)
    for first_place in range(begin, count, form.BM):
        place = first_place + tl.arange(0, form.BM)
        valid = place < count
        row = tl.load(rows + (z * N + expert) * (S * form.R + 1) + place, mask=valid, other=0)
        token, head = (row // form.R).to(tl.int64), g * form.R + row % form.R
        position = start + row // form.R
        mask_row = b * m_b + head * m_h + token * m_s
        q_row = head * q_h + token * q_s
        pick = (z * N + expert) * S * form.R + place
        qa, qb = load_rotated(query + b * q_b, q_row, valid, cos, sin, position, form)
        scores = product(ka, tl.trans(qa), tl.full([form.BN, form.BM], 0.0, tl.float32))
        scores = product(kb, tl.trans(qb), scores)
        if form.BR > 0:
            qr = load_rest(query + b * q_b, q_row, valid, form)
            scores = product(kr, tl.trans(qr), scores)
        scores = masked(
            scores * scale, mask, mask_row[None, :], position[None, :], n[:, None], exists[:, None], m_t, form
        )
        top = tl.load(row_max + pick, mask=valid, other=0.0)
        total = tl.load(row_sum + pick, mask=valid, other=1.0)
        gate = tl.load(gates + ((b * G * form.R + head) * S + token) * N + expert, mask=valid, other=0.0)
        # Rows behind the last pick stand in for row 0, and must not count.
        gated = tl.where(valid[None, :], tl.exp2(scores - top[None, :]) * (gate / total)[None, :], 0.0)
        grads = load_values(grad_output, ((b * S + token) * G * form.R + head) * form.DV, valid, form)
        if grad_value is not None:
            sum_v = product(gated.to(grads.dtype), grads, sum_v)
        if grad_key is not None:
            middle = tl.load(delta + pick, mask=valid, other=0.0)
            grad_probs = product(v, tl.trans(grads), tl.full([form.BN, form.BM], 0.0, tl.float32))
            grad_scores = (gated * (grad_probs - middle[None, :])).to(qa.dtype)
            sum_a, sum_b = product(grad_scores, qa, sum_a), product(grad_scores, qb, sum_b)
            if form.BR > 0:
                sum_r = product(grad_scores, qr, sum_r)

    kv_row = (z * T + n) * form.D
    if grad_key is not None:
        factor = scale * LN2
        sum_a, sum_b = sum_a * factor, sum_b * factor
        if form.ROTATE:
            sum_a, sum_b = rotate(sum_a, sum_b, cos, sin, n, exists, -1.0, form)
        add_pairs(grad_key, kv_row, exists, sum_a, sum_b, form)
        if form.BR > 0:
            add_rest(grad_key, kv_row, exists, sum_r * factor, form)
    if grad_value is not None:
        add_values(grad_value, (z * T + n) * form.DV, exists, sum_v, form)
