"""Attention of few queries, without gradients: keys and values are read once for all experts.

The cache is what decoding waits for, so a program reads a span of one key-value head's keys and values and does all
else with it: it scores every expert that some row of the group picked, and keeps maximum, sum and weighted values per
(expert, row). Experts have a softmax each, so their probabilities could be mixed only after a pass over all keys,
which would have to write N scores per key and query head and read them again. Keeping the experts apart costs products
on tensor cores instead, over a tile of N x rows that is no larger than that of ordinary attention over a prompt. A
second kernel combines the spans.

Only differences of positions matter: within a tile, keys rotate by their place in it, and queries by their distance
from its first key. Keys then need the first few rows of the table alone, which stay in the fastest cache; tables at
the keys' own positions would be several times larger than the keys. Turning keys serves all heads of a group. Turning
each pair's sums and differences instead (`C cos + S sin` per query and key) is less arithmetic for a single query
head, but no product for tensor cores, and grows with the heads of the group.
"""

import torch
import triton
import triton.language as tl

from .problem import MIN_BLOCK, Problem, padded
from .tiles import INTERPRETED, LOWEST, first_position, load_pairs, load_rest, load_values, masked, product, rotate

_MAX_ROWS = 64
_MAX_TILE = 32768
_WAVES, _MAX_SPLITS = 2, 128


def fits(problem: Problem) -> bool:
    """Whether the queries are few enough for the tile of all experts."""
    rows = padded(problem.num_rows)
    tile = triton.next_power_of_2(problem.num_experts) * rows * padded(problem.value.shape[-1])
    return rows <= _MAX_ROWS and tile <= _MAX_TILE // (2 if problem.query.dtype == torch.float32 else 1)


def decode(problem: Problem) -> torch.Tensor:
    """The output `[B, S, H, Dv]` in the dtype of the queries."""
    batch, heads, length, _ = problem.query.shape
    experts, rows = triton.next_power_of_2(problem.num_experts), padded(problem.num_rows)
    keys = MIN_BLOCK if INTERPRETED else 32
    shared = problem.arguments(rows, keys)
    values = shared["form"].BV
    span = _span(problem, keys)
    splits = triton.cdiv(problem.key.shape[2], span)
    part_max = problem.gates.new_empty(problem.lists, splits, experts * rows)
    parts = (part_max, torch.empty_like(part_max), part_max.new_empty(*part_max.shape, values))
    output = problem.query.new_empty(batch, length, heads, problem.value.shape[-1])
    decode_kernel[(splits, problem.lists)](
        **shared,
        table=(problem.cos, problem.sin, problem.cos.stride(0)),
        parts=parts,
        span=span,
        BE=experts,
        num_warps=8 if experts * rows * values > 8192 else 4,
        num_stages=2,
    )
    sizes = (length, problem.num_experts, problem.key.shape[1], splits)
    blocks = {"BE": experts, "BS": triton.next_power_of_2(splits)}
    combine_kernel[(problem.num_rows, problem.lists)](
        parts, problem.gates, output, sizes, form=shared["form"], **blocks, num_warps=8
    )
    return output


def _span(problem: Problem, tile: int) -> int:
    """Keys per program, so that the programs fill the device a few times over."""
    device = problem.query.device
    processors = 2
    if device.type == "cuda":
        processors = torch.cuda.get_device_properties(device).multi_processor_count
    splits = min(max(1, _WAVES * processors // problem.lists), _MAX_SPLITS)
    return int(triton.cdiv(triton.cdiv(problem.key.shape[2], splits), tile) * tile)


@triton.jit(do_not_specialize=["query_start", "T"])
def decode_kernel(inputs, strides, sizes, table, parts, query_start, S, T, span, form: tl.constexpr, BE: tl.constexpr):
    query, key, value, mask, gates = inputs
    q_b, q_h, q_s, k_b, k_h, k_t, v_b, v_h, v_t, m_b, m_h, m_s, m_t = strides
    N, G, scale = sizes
    cos, sin, table_stride = table
    part_max, part_sum, part_out = parts
    split = tl.program_id(0)
    z = tl.program_id(1).to(tl.int64)
    b, g = z // G, z % G
    row = tl.arange(0, form.BM)
    valid = row < S * form.R
    token, head = tl.where(valid, row // form.R, 0).to(tl.int64), g * form.R + row % form.R
    position = first_position(query_start, form) + row // form.R
    mask_row = b * m_b + head * m_h + token * m_s
    gate_row = ((b * G * form.R + head) * S + token) * N

    q_row = head * q_h + token * q_s
    qa, qb = load_pairs(query + b * q_b, q_row, valid, form)
    if form.BR > 0:
        qr = load_rest(query + b * q_b, q_row, valid, form)

    expert_of = tl.arange(0, BE)[:, None, None]
    top = tl.full([BE * form.BM], LOWEST, tl.float32)
    total = tl.full([BE * form.BM], 0.0, tl.float32)
    attended = tl.full([BE * form.BM, form.BV], 0.0, tl.float32)
    place = tl.arange(0, form.BN)
    end = tl.minimum((split + 1) * span, T)
    begin = split.to(tl.int64) * span
    tile_keys, tile_values = key + b * k_b + g * k_h + begin * k_t, value + b * v_b + g * v_h + begin * v_t
    for first_key in range(split * span, end, form.BN):
        n = first_key + place
        exists = n < end
        ka, kb = load_pairs(tile_keys, place * k_t, exists, form)
        unrotated = tl.full([form.BM, form.BN], 0.0, tl.float32)
        if form.BR > 0:
            kr = load_rest(tile_keys, place * k_t, exists, form)
            unrotated = product(qr, tl.trans(kr), unrotated)
        distance = position - first_key
        near = valid & (tl.abs(distance) < T)
        sign = tl.where(distance < 0, -1.0, 1.0)[:, None]
        all_scores = tl.full([BE, form.BM, form.BN], LOWEST, tl.float32)
        # A loop that is not unrolled, so that no table is kept in registers from tile to tile.
        for expert in range(0, N):
            gate = tl.load(gates + gate_row + expert, mask=valid, other=0.0)
            if tl.max((gate != 0).to(tl.int32)) > 0:
                expert_cos, expert_sin = cos + expert * table_stride, sin + expert * table_stride
                ra, rb = rotate(qa, qb, expert_cos, expert_sin, tl.abs(distance), near, sign, form)
                ta, tb = rotate(ka, kb, expert_cos, expert_sin, place, exists, 1.0, form)
                scores = product(ra, tl.trans(ta), unrotated)
                scores = product(rb, tl.trans(tb), scores)
                scores = masked(
                    scores * scale, mask, mask_row[:, None], position[:, None], n[None, :], exists[None, :], m_t, form
                )
                all_scores = tl.where(expert_of == expert, scores[None, :, :], all_scores)
        stacked = tl.where(exists[None, :], tl.reshape(all_scores, [BE * form.BM, form.BN]), float("-inf"))
        new_top = tl.maximum(top, tl.max(stacked, 1))
        probs = tl.exp2(stacked - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(probs, 1)
        v = load_values(tile_values, place * v_t, exists, form)
        attended = product(probs.to(v.dtype), v, attended * shrink[:, None])
        top = new_top
        tile_keys += form.BN * k_t
        tile_values += form.BN * v_t

    part = (z * tl.num_programs(0) + split) * BE * form.BM + tl.arange(0, BE * form.BM)
    tl.store(part_max + part, top)
    tl.store(part_sum + part, total)
    tl.store(part_out + part[:, None] * form.BV + tl.arange(0, form.BV)[None, :], attended)


@triton.jit
def combine_kernel(parts, gates, output, sizes, form: tl.constexpr, BE: tl.constexpr, BS: tl.constexpr):
    part_max, part_sum, part_out = parts
    S, N, G, splits = sizes
    row = tl.program_id(0)
    z = tl.program_id(1).to(tl.int64)
    b, token, head = z // G, row // form.R, z % G * form.R + row % form.R
    split, column = tl.arange(0, BS), tl.arange(0, form.BV)
    mixed = tl.full([form.BV], 0.0, tl.float32)
    for expert in range(0, N):
        gate = tl.load(gates + ((b * G * form.R + head) * S + token) * N + expert)
        if gate != 0:
            part = (z * splits + split) * BE * form.BM + expert * form.BM + row
            there = split < splits
            top = tl.load(part_max + part, mask=there, other=float("-inf"))
            total = tl.load(part_sum + part, mask=there, other=0.0)
            attended = tl.load(part_out + part[:, None] * form.BV + column[None, :], mask=there[:, None], other=0.0)
            weight = tl.exp2(top - tl.max(top, 0))
            mixed += tl.sum(weight[:, None] * attended, 0) * (gate / tl.sum(weight * total, 0))
    out_row = ((b * S + token) * G * form.R + head) * form.DV
    tl.store(output + out_row + column, mixed.to(output.dtype.element_ty), mask=column < form.DV)
