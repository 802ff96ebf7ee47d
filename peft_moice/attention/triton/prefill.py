"""Attention of many queries: one launch per expert, over the rows that picked it.

A program takes a block of one expert's rows in one key-value head, the heads of the group together, so K of N experts
cost K/N, and grouped-query heads share the keys they load. Keys are rotated in registers. The grid is that of the
worst case, every row picking the expert, because the host does not know the counts without waiting for the device;
programs of empty blocks leave at once. Of a list's blocks, those with the latest rows, which see the most keys, start
first.

Launches follow each other in a stream, so each adds its share to the float32 output without atomics: the sum over
experts has a fixed order, and no output is stored per pick. A row's maximum and sum are kept apart for the backward
pass; in their log-sum-exp the sum would be lost where a row sees nothing.
"""

import torch
import triton
import triton.language as tl

from .picks import Picks
from .problem import Blocks, Problem, choose_blocks
from .tiles import LOWEST, add_values, first_position, load_rest, load_rotated, load_values, masked, product


def prefill(problem: Problem, picks: Picks, keep: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The output `[B, S, H, Dv]` in float32; with `keep`, each pick's maximum and sum `[Z, N, S * R]` besides."""
    batch, heads, length, _ = problem.query.shape
    output = problem.query.new_zeros(batch, length, heads, problem.value.shape[-1], dtype=torch.float32)
    shape = (problem.lists, problem.num_experts, problem.num_rows if keep else 1)
    row_max, row_sum = output.new_empty(shape), output.new_empty(shape)
    blocks = choose_blocks(problem, hopper=Blocks(128, 64, 8), ampere=Blocks(64, 32, 8))
    grid = (triton.cdiv(problem.num_rows, blocks.rows), problem.lists)
    results = (output, row_max, row_sum) if keep else (output, None, None)
    for arguments in problem.by_expert(blocks):
        forward_kernel[grid](**arguments, picks=(picks.rows, picks.counts), results=results)
    return output, row_max, row_sum


@triton.jit(do_not_specialize=["query_start", "expert", "S", "T"])
def forward_kernel(inputs, strides, sizes, table, picks, results, query_start, expert, S, T, form: tl.constexpr):
    query, key, value, mask, gates = inputs
    q_b, q_h, q_s, k_b, k_h, k_t, v_b, v_h, v_t, m_b, m_h, m_s, m_t = strides
    N, G, scale = sizes
    cos, sin = table
    rows, counts = picks
    output, row_max, row_sum = results
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

    q_row = head * q_h + token * q_s
    qa, qb = load_rotated(query + b * q_b, q_row, valid, cos, sin, position, form)
    if form.BR > 0:
        qr = load_rest(query + b * q_b, q_row, valid, form)

    tile = tl.arange(0, form.BN)
    tile_keys, tile_values = key + b * k_b + g * k_h, value + b * v_b + g * v_h
    tile_cos, tile_sin = cos, sin
    end = T
    if form.MASK == 0:
        end = tl.minimum(T, tl.max(tl.where(valid, position, 0)) + 1)
    top = tl.full([form.BM], LOWEST, tl.float32)
    total = tl.full([form.BM], 0.0, tl.float32)
    attended = tl.full([form.BM, form.BV], 0.0, tl.float32)
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
        new_top = tl.maximum(top, tl.max(scores, 1))
        probs = tl.exp2(scores - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(probs, 1)
        v = load_values(tile_values, tile * v_t, exists, form)
        attended = product(probs.to(v.dtype), v, attended * shrink[:, None])
        top = new_top
        tile_keys += form.BN * k_t
        tile_values += form.BN * v_t
        tile_cos += form.BN * form.P
        tile_sin += form.BN * form.P

    gate = tl.load(gates + ((b * G * form.R + head) * S + token) * N + expert, mask=valid, other=0.0)
    out_row = ((b * S + token) * G * form.R + head) * form.DV
    add_values(output, out_row, valid, attended * (gate / total)[:, None], form)
    if row_max is not None:
        kept = (z * N + expert) * S * form.R + place
        tl.store(row_max + kept, top, mask=valid)
        tl.store(row_sum + kept, total, mask=valid)
