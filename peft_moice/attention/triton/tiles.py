"""Pieces that the kernels share: tiles of rotated coordinates, masks, products.

The rotated dimensions of a tile lie in two tiles of their own, one per member of the coordinate pairs, whatever the
layout. A rotation is then elementwise, and a score is the sum of two products (three where a model leaves dimensions
unrotated). Scores are kept in base 2.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

LOWEST = tl.constexpr(torch.finfo(torch.float32).min)
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))

NO_MASK, BOOLEAN_MASK, ADDITIVE_MASK = range(3)
"""Kinds of masks."""


@triton.jit
def product(a, b, total):
    """`total + a b` in float32."""
    if INTERPRETED:
        # The interpreter multiplies the bits of bfloat16 as integers.
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="tf32x3")


class Form(NamedTuple):
    """What kernels are compiled for: the sizes of a call, and the blocks that they are padded to.

    Attributes:
        R: query heads of a key-value head.
        D: dimensions of queries and keys.
        DV: dimensions of values.
        START: first rotated dimension.
        P: pairs of rotated dimensions.
        INTERLEAVED: whether the members of a pair lie side by side.
        ROTATE: whether the expert's angle is another than the model's own.
        MASK: one of the kinds above.
        START_IS_TENSOR: whether the device alone knows where the first query stands.
        BM: rows of a tile.
        BN: keys of a tile.
        BP: block of the pairs.
        BR: block of the dimensions that are not rotated; 0 if all are.
        BV: block of the values.
    """

    R: int
    D: int
    DV: int
    START: int
    P: int
    INTERLEAVED: bool
    ROTATE: bool
    MASK: int
    START_IS_TENSOR: bool
    BM: int
    BN: int
    BP: int
    BR: int
    BV: int


@triton.jit
def pair_offsets(form: tl.constexpr):
    """Dimensions `[BP]` of the pairs' first members, and the distance of the second ones."""
    pair = tl.arange(0, form.BP)
    # One return: the compiler also looks at what follows a branch that returns.
    if form.INTERLEAVED:
        offsets, partner = form.START + 2 * pair, 1
    else:
        offsets, partner = form.START + pair, form.P
    return offsets, partner


@triton.jit
def load_pairs(base, offset, valid, form: tl.constexpr):
    """First and second members `[M, BP]` of the rotated pairs of the vectors that begin at `base + offset` `[M]`."""
    first, partner = pair_offsets(form)
    at = base + offset[:, None] + first[None, :]
    keep = valid[:, None] & (tl.arange(0, form.BP) < form.P)[None, :]
    return tl.load(at, mask=keep, other=0.0), tl.load(at + partner, mask=keep, other=0.0)


@triton.jit
def add_pairs(base, offset, valid, a, b, form: tl.constexpr):
    """Add `a` and `b` to the float32 vectors at `base + offset`, where [`load_pairs`] would read them."""
    first, partner = pair_offsets(form)
    at = base + offset[:, None] + first[None, :]
    keep = valid[:, None] & (tl.arange(0, form.BP) < form.P)[None, :]
    tl.store(at, tl.load(at, mask=keep, other=0.0) + a, mask=keep)
    tl.store(at + partner, tl.load(at + partner, mask=keep, other=0.0) + b, mask=keep)


@triton.jit
def rest_offsets(form: tl.constexpr):
    """Dimensions `[BR]` before and behind the rotated ones."""
    dimension = tl.arange(0, form.BR)
    return tl.where(dimension < form.START, dimension, dimension + 2 * form.P)


@triton.jit
def load_rest(base, offset, valid, form: tl.constexpr):
    """The unrotated dimensions `[M, BR]`."""
    dimension = rest_offsets(form)
    keep = valid[:, None] & (dimension < form.D)[None, :]
    return tl.load(base + offset[:, None] + dimension[None, :], mask=keep, other=0.0)


@triton.jit
def add_rest(base, offset, valid, x, form: tl.constexpr):
    """Add `x` to the float32 vectors at `base + offset`, where [`load_rest`] would read them."""
    dimension = rest_offsets(form)
    keep = valid[:, None] & (dimension < form.D)[None, :]
    at = base + offset[:, None] + dimension[None, :]
    tl.store(at, tl.load(at, mask=keep, other=0.0) + x, mask=keep)


@triton.jit
def load_values(base, offset, valid, form: tl.constexpr):
    """Vectors `[M, BV]` of the values' size at `base + offset` `[M]`."""
    column = tl.arange(0, form.BV)
    keep = valid[:, None] & (column < form.DV)[None, :]
    return tl.load(base + offset[:, None] + column[None, :], mask=keep, other=0.0)


@triton.jit
def add_values(base, offset, valid, x, form: tl.constexpr):
    """Add `x` to the float32 vectors at `base + offset`, where [`load_values`] would read them."""
    column = tl.arange(0, form.BV)
    keep = valid[:, None] & (column < form.DV)[None, :]
    at = base + offset[:, None] + column[None, :]
    tl.store(at, tl.load(at, mask=keep, other=0.0) + x, mask=keep)


@triton.jit
def rotate(a, b, cos, sin, position, valid, sign, form: tl.constexpr):
    """Pairs `a`, `b` `[M, BP]` rotated by one expert's angles at `position` `[M]`, or by `sign` times them.

    `cos` and `sin` point at the expert's table `[positions, P]`. `sign` is a number or `[M, 1]`. In float32, returned
    in the dtype of `a`.
    """
    pair = tl.arange(0, form.BP)
    at = position[:, None] * form.P + pair[None, :]
    keep = valid[:, None] & (pair < form.P)[None, :]
    c = tl.load(cos + at, mask=keep, other=1.0)
    s = tl.load(sin + at, mask=keep, other=0.0) * sign
    first, second = a.to(tl.float32), b.to(tl.float32)
    return (first * c - second * s).to(a.dtype), (second * c + first * s).to(b.dtype)


@triton.jit
def load_rotated(base, offset, valid, cos, sin, position, form: tl.constexpr):
    """What [`load_pairs`] reads, rotated by one expert's angles at `position` `[M]` as [`rotate`] does; with `ROTATE`
    false, for the expert whose angle is the model's own, as it is."""
    a, b = load_pairs(base, offset, valid, form)
    if form.ROTATE:
        a, b = rotate(a, b, cos, sin, position, valid, 1.0, form)
    return a, b


@triton.jit
def masked(scores, mask, row_offset, position, key, exists, key_stride, form: tl.constexpr):
    """Scores in base 2 under the mask. `row_offset` and `position` run along queries, `key` and `exists` along keys.

    As in the reference, a row that sees nothing attends to all keys alike.
    """
    if form.MASK == 0:
        scores = tl.where(key <= position, scores, LOWEST)
    elif form.MASK == 1:
        seen = tl.load(mask + row_offset + key * key_stride, mask=exists, other=0)
        scores = tl.where(seen != 0, scores, LOWEST)
    else:
        bias = tl.load(mask + row_offset + key * key_stride, mask=exists, other=0.0).to(tl.float32)
        # The lowest number overflows in base 2, and -inf has to stay: a row of nothing else is NaN.
        total = tl.maximum(scores + bias * LOG2E, LOWEST)
        scores = tl.where(bias == float("-inf"), bias, total)
    return tl.where(exists, scores, float("-inf"))


@triton.jit
def first_position(query_start, form: tl.constexpr):
    """Position of the first query among the keys, which the host may not know."""
    return tl.load(query_start).to(tl.int32) if form.START_IS_TENSOR else query_start
