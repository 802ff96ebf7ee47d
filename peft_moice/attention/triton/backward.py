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
    add_rows,
    first_position,
    load_rest,
    load_rotated,
    load_rows,
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

    Args:
        problem: the call.
        picks: its picks.
        output: `[B, S, H, Dv]`.
        row_max, row_sum: from [`prefill`].
        grad_output: `[B, S, H, Dv]`.
        needs: which of the four are wanted.
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
    unused = delta
    shared = {
        **problem.arguments(),
        "rows": picks.rows,
        "counts": picks.counts,
        "row_max": row_max,
        "row_sum": row_sum,
        "delta": delta,
        "grad_output": grad_output,
    }
    by_rows = choose_blocks(problem, hopper=Blocks(64, 32, 8), ampere=Blocks(32, 32, 4))
    by_keys = choose_blocks(problem, hopper=Blocks(32, 64, 8), ampere=Blocks(32, 32, 4))
    for expert in range(problem.num_experts):
        if needs_query or needs_key or needs_gates:
            query_kernel[(triton.cdiv(problem.num_rows, by_rows["BM"]), problem.lists)](
                **shared,
                **problem.of_expert(expert),
                mean_delta=mean_delta,
                grad_query=grads[0] if needs_query else unused,
                grad_gates=grads[3] if needs_gates else unused,
                NEEDS_QUERY=needs_query,
                NEEDS_GATES=needs_gates,
                **by_rows,
            )
        if needs_key or needs_value:
            key_kernel[(triton.cdiv(problem.key.shape[2], by_keys["BN"]), problem.lists)](
                **shared,
                **problem.of_expert(expert),
                through=picks.through,
                grad_key=grads[1] if needs_key else unused,
                grad_value=grads[2] if needs_value else unused,
                NEEDS_KEY=needs_key,
                NEEDS_VALUE=needs_value,
                **by_keys,
            )
    return tuple(grads)


@triton.jit(do_not_specialize=["query_start", "expert", "S", "T"])
def query_kernel(
    query,
    key,
    value,
    mask,
    gates,
    cos,
    sin,
    rows,
    counts,
    row_max,
    row_sum,
    delta,
    grad_output,
    mean_delta,
    grad_query,
    grad_gates,
    query_start,
    expert,
    S,
    T,
    N,
    G,
    scale,
    q_b,
    q_h,
    q_s,
    k_b,
    k_h,
    k_t,
    v_b,
    v_h,
    v_t,
    m_b,
    m_h,
    m_s,
    m_t,
    R: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    START: tl.constexpr,
    P: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ROTATE: tl.constexpr,
    MASK: tl.constexpr,
    START_IS_TENSOR: tl.constexpr,
    NEEDS_QUERY: tl.constexpr,
    NEEDS_GATES: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BP: tl.constexpr,
    BR: tl.constexpr,
    BV: tl.constexpr,
):
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    z = tl.program_id(1).to(tl.int64)
    b, g = z // G, z % G
    count = tl.load(counts + z * N + expert)
    if block * BM >= count:
        return

    place = block * BM + tl.arange(0, BM)
    valid = place < count
    row = tl.load(rows + (z * N + expert) * (S * R + 1) + place, mask=valid, other=0)
    token, head = (row // R).to(tl.int64), g * R + row % R
    position = first_position(query_start, START_IS_TENSOR) + row // R
    mask_row = b * m_b + head * m_h + token * m_s
    out_row = (b * S + token) * G * R + head
    gate_row = ((b * G * R + head) * S + token) * N + expert
    pick = (z * N + expert) * S * R + place

    q_row = head * q_h + token * q_s
    qa, qb = load_rotated(query + b * q_b, q_row, valid, cos, sin, position, START, P, INTERLEAVED, ROTATE, BP)
    if BR > 0:
        qr = load_rest(query + b * q_b, q_row, valid, START, P, D, BR)
    grads = load_rows(grad_output, out_row * DV, valid, DV, BV)
    middle = tl.load(mean_delta + out_row, mask=valid, other=0.0)
    top = tl.load(row_max + pick, mask=valid, other=0.0)
    share = 1.0 / tl.load(row_sum + pick, mask=valid, other=1.0)

    tile = tl.arange(0, BN)
    tile_keys, tile_values = key + b * k_b + g * k_h, value + b * v_b + g * v_h
    tile_cos, tile_sin = cos, sin
    end = T
    if MASK == 0:
        end = tl.minimum(T, tl.max(tl.where(valid, position, 0)) + 1)
    shift = tl.zeros([BM], tl.float32)
    if NEEDS_QUERY:
        sum_a, sum_b = tl.zeros([BM, BP], tl.float32), tl.zeros([BM, BP], tl.float32)
        mean_a, mean_b = tl.zeros([BM, BP], tl.float32), tl.zeros([BM, BP], tl.float32)
        if BR > 0:
            sum_r, mean_r = tl.zeros([BM, BR], tl.float32), tl.zeros([BM, BR], tl.float32)
    for first_key in range(0, end, BN):
        n = first_key + tile
        exists = n < T
        ka, kb = load_rotated(
            tile_keys, tile * k_t, exists, tile_cos, tile_sin, tile, START, P, INTERLEAVED, ROTATE, BP
        )
        scores = product(qa, tl.trans(ka), tl.zeros([BM, BN], tl.float32))
        scores = product(qb, tl.trans(kb), scores)
        if BR > 0:
            kr = load_rest(tile_keys, tile * k_t, exists, START, P, D, BR)
            scores = product(qr, tl.trans(kr), scores)
        scores = masked(
            scores * scale, mask, mask_row[:, None], position[:, None], n[None, :], exists[None, :], m_t, MASK
        )
        probs = tl.exp2(scores - top[:, None]) * share[:, None]
        v = load_rows(tile_values, tile * v_t, exists, DV, BV)
        grad_probs = product(grads, tl.trans(v), tl.zeros([BM, BN], tl.float32))
        grad_scores = probs * (grad_probs - middle[:, None])
        shift += tl.sum(grad_scores, 1)
        if NEEDS_QUERY:
            grad_scores, probs = grad_scores.to(ka.dtype), probs.to(ka.dtype)
            sum_a, sum_b = product(grad_scores, ka, sum_a), product(grad_scores, kb, sum_b)
            mean_a, mean_b = product(probs, ka, mean_a), product(probs, kb, mean_b)
            if BR > 0:
                sum_r, mean_r = product(grad_scores, kr, sum_r), product(probs, kr, mean_r)
        tile_keys += BN * k_t
        tile_values += BN * v_t
        tile_cos += BN * P
        tile_sin += BN * P

    tl.store(delta + pick, middle + shift, mask=valid)
    if NEEDS_GATES:
        tl.store(grad_gates + gate_row, middle + shift, mask=valid)
    if NEEDS_QUERY:
        gate = tl.load(gates + gate_row, mask=valid, other=0.0)
        # `scale` turns scores to base 2.
        factor = (gate * scale * LN2)[:, None]
        sum_a, sum_b = (sum_a - shift[:, None] * mean_a) * factor, (sum_b - shift[:, None] * mean_b) * factor
        if ROTATE:
            sum_a, sum_b = rotate(sum_a, sum_b, cos, sin, position, valid, -1.0, P, BP)
        grad_row = ((b * G * R + head) * S + token) * D
        add_pairs(grad_query, grad_row, valid, sum_a, sum_b, START, P, INTERLEAVED, BP)
        if BR > 0:
            add_rest(grad_query, grad_row, valid, (sum_r - shift[:, None] * mean_r) * factor, START, P, D, BR)


@triton.jit(do_not_specialize=["query_start", "expert", "S", "T"])
def key_kernel(
    query,
    key,
    value,
    mask,
    gates,
    cos,
    sin,
    rows,
    counts,
    through,
    row_max,
    row_sum,
    delta,
    grad_output,
    grad_key,
    grad_value,
    query_start,
    expert,
    S,
    T,
    N,
    G,
    scale,
    q_b,
    q_h,
    q_s,
    k_b,
    k_h,
    k_t,
    v_b,
    v_h,
    v_t,
    m_b,
    m_h,
    m_s,
    m_t,
    R: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    START: tl.constexpr,
    P: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ROTATE: tl.constexpr,
    MASK: tl.constexpr,
    START_IS_TENSOR: tl.constexpr,
    NEEDS_KEY: tl.constexpr,
    NEEDS_VALUE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BP: tl.constexpr,
    BR: tl.constexpr,
    BV: tl.constexpr,
):
    first_key = tl.program_id(0) * BN
    z = tl.program_id(1).to(tl.int64)
    b, g = z // G, z % G
    start = first_position(query_start, START_IS_TENSOR)
    count = tl.load(counts + z * N + expert)
    begin = 0
    if MASK == 0:
        # Rows of tokens before the first key do not see it.
        rows_before = tl.minimum(tl.maximum(first_key - start, 0), S) * R
        last = (z * N + expert) * S * R + tl.maximum(rows_before - 1, 0)
        begin = tl.where(rows_before > 0, tl.load(through + last), 0)
    if begin >= count:
        return

    n = first_key + tl.arange(0, BN)
    exists = n < T
    k_row = n.to(tl.int64) * k_t
    ka, kb = load_rotated(key + b * k_b + g * k_h, k_row, exists, cos, sin, n, START, P, INTERLEAVED, ROTATE, BP)
    if BR > 0:
        kr = load_rest(key + b * k_b + g * k_h, k_row, exists, START, P, D, BR)
    if NEEDS_KEY:
        v = load_rows(value + b * v_b + g * v_h, n.to(tl.int64) * v_t, exists, DV, BV)
        sum_a, sum_b = tl.zeros([BN, BP], tl.float32), tl.zeros([BN, BP], tl.float32)
        if BR > 0:
            sum_r = tl.zeros([BN, BR], tl.float32)
    if NEEDS_VALUE:
        sum_v = tl.zeros([BN, BV], tl.float32)
    for first_place in range(begin, count, BM):
        place = first_place + tl.arange(0, BM)
        valid = place < count
        row = tl.load(rows + (z * N + expert) * (S * R + 1) + place, mask=valid, other=0)
        token, head = (row // R).to(tl.int64), g * R + row % R
        position = start + row // R
        mask_row = b * m_b + head * m_h + token * m_s
        q_row = head * q_h + token * q_s
        pick = (z * N + expert) * S * R + place
        qa, qb = load_rotated(query + b * q_b, q_row, valid, cos, sin, position, START, P, INTERLEAVED, ROTATE, BP)
        scores = product(ka, tl.trans(qa), tl.zeros([BN, BM], tl.float32))
        scores = product(kb, tl.trans(qb), scores)
        if BR > 0:
            qr = load_rest(query + b * q_b, q_row, valid, START, P, D, BR)
            scores = product(kr, tl.trans(qr), scores)
        scores = masked(
            scores * scale, mask, mask_row[None, :], position[None, :], n[:, None], exists[:, None], m_t, MASK
        )
        top = tl.load(row_max + pick, mask=valid, other=0.0)
        total = tl.load(row_sum + pick, mask=valid, other=1.0)
        gate = tl.load(gates + ((b * G * R + head) * S + token) * N + expert, mask=valid, other=0.0)
        # Rows behind the last pick stand in for row 0, and must not count.
        gated = tl.where(valid[None, :], tl.exp2(scores - top[None, :]) * (gate / total)[None, :], 0.0)
        grads = load_rows(grad_output, ((b * S + token) * G * R + head) * DV, valid, DV, BV)
        if NEEDS_VALUE:
            sum_v = product(gated.to(grads.dtype), grads, sum_v)
        if NEEDS_KEY:
            middle = tl.load(delta + pick, mask=valid, other=0.0)
            grad_probs = product(v, tl.trans(grads), tl.zeros([BN, BM], tl.float32))
            grad_scores = (gated * (grad_probs - middle[None, :])).to(qa.dtype)
            sum_a, sum_b = product(grad_scores, qa, sum_a), product(grad_scores, qb, sum_b)
            if BR > 0:
                sum_r = product(grad_scores, qr, sum_r)

    kv_row = (z * T + n) * D
    if NEEDS_KEY:
        factor = scale * LN2
        sum_a, sum_b = sum_a * factor, sum_b * factor
        if ROTATE:
            sum_a, sum_b = rotate(sum_a, sum_b, cos, sin, n, exists, -1.0, P, BP)
        add_pairs(grad_key, kv_row, exists, sum_a, sum_b, START, P, INTERLEAVED, BP)
        if BR > 0:
            add_rest(grad_key, kv_row, exists, sum_r * factor, START, P, D, BR)
    if NEEDS_VALUE:
        add_rows(grad_value, (z * T + n) * DV, exists, sum_v, DV, BV)
