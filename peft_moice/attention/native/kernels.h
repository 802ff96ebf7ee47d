/* What the kernels share: a call, vectors of floats, and rows of tensors as floats in the order of their pairs.

   Vectors are those of GCC and Clang, as wide as the processor's registers. */

#ifndef PEFT_MOICE_KERNELS_H
#define PEFT_MOICE_KERNELS_H

#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#endif

#if defined(__AVX512F__)
#define LANES 16
#define STEP 8 /* rows that one inner product keeps in registers, two vectors each */
#elif defined(__AVX__)
#define LANES 8
#define STEP 6
#elif defined(__aarch64__)
#define LANES 4
#define STEP 8
#else
#define LANES 4
#define STEP 4
#endif

#define MAX_HEAD_DIM 256

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint32_t uvec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

enum type { FLOAT32, BFLOAT16, FLOAT16 };

/* One call. Strides count elements; the last dimension of every tensor but the mask is contiguous. */
struct problem {
    int64_t batch, kv_heads, group, queries, keys, head_dim, value_dim, experts, pairs;
    int64_t query_start, is_causal, is_ordered, type; /* of query, key and value */
    const void *query;                                /* [B, H, S, D] */
    int64_t query_stride[3];
    const void *key; /* [B, G, T, D] */
    int64_t key_stride[3];
    const void *value; /* [B, G, T, Dv] */
    int64_t value_stride[3];
    const float *gates; /* [B, H, S, N], contiguous; an expert with gate 0 is not computed */
    const void *mask;   /* [B, H, S, T], floats that are added or, with `mask_is_boolean`, bytes; or NULL */
    int64_t mask_stride[4], mask_is_boolean;
    const float *cos, *sin; /* [N, T, P]; with `far_from`, [2 N, T, P], those for far keys behind the others */
    int64_t table_stride;
    const int32_t *order; /* [D], the dimensions: first of each pair, second of each pair, what does not rotate */
    float scaling;
    const int64_t *far_from; /* [N], the distance from which an expert's keys are far; or NULL, where none are */
    const float *factors;    /* [2 N], of the scores' rotated part; given with `far_from` */
    float *output; /* [B, S, H, Dv], contiguous */
    float *scratch;
    /* The backward pass; all contiguous, NULL where not wanted. */
    const float *grad_output; /* [B, S, H, Dv] */
    const uint8_t *picked;    /* [B, H, S, N], the experts whose gates have a gradient */
    int64_t parts;            /* the sums of keys' and values' gradients are left in so many parts */
    float *grad_query;        /* [B, H, S, D] */
    float *grad_key;          /* [parts, B, G, T, D] */
    float *grad_value;        /* [parts, B, G, T, Dv] */
    float *grad_gates;        /* [B, H, S, N] */
};

/* Where a block of keys lies, seen from queries under one expert. */
enum side { NEAR, FAR, BORDER };

/* The side of the keys `start` to `last` for queries at the positions `first` to `end` - 1. */
static inline enum side side_of(const struct problem *p, int64_t expert, int64_t first, int64_t end, int64_t start,
                                int64_t last) {
    if (!p->far_from || start > end - 1 - p->far_from[expert])
        return NEAR;
    return last <= first - p->far_from[expert] ? FAR : BORDER;
}

/* By what an expert multiplies the rotated part of its scores. */
static inline float factor_of(const struct problem *p, int64_t expert, int is_far) {
    return p->factors ? p->factors[is_far ? p->experts + expert : expert] : 1.0f;
}

/* The number of this thread among those that share the work. */
static inline int64_t thread_number(void) {
#ifdef _OPENMP
    return omp_get_thread_num();
#else
    return 0;
#endif
}

static inline float *take(float **memory, int64_t size) {
    float *taken = *memory;
    *memory += size;
    return taken;
}

static inline int64_t round_up(int64_t x, int64_t step) { return (x + step - 1) / step * step; }

static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

static inline vec splat(float x) { return x - (vec){0}; }

static inline vec choose(ivec condition, vec yes, vec no) {
    return (vec)(((ivec)yes & condition) | ((ivec)no & ~condition));
}

/* `b` where `a` is not a number. */
static inline vec larger(vec a, vec b) { return choose(a > b, a, b); }

/* exp for x <= 0, to about one unit in the last place; below -87, zero. What is not a number stays so. */
static inline vec exponential(vec x) {
    const vec magic = splat(12582912.0f); /* 1.5 * 2^23: adding it rounds to an integer */
    ivec tiny = x < splat(-87.0f), is_number = x == x;
    vec shifted = x * splat(1.44269504088896341f) + magic;
    vec n = shifted - magic;
    vec r = x - n * splat(0.693359375f);
    r = r - n * splat(-2.12194440e-4f);
    vec p = splat(1.9875691500e-4f);
    p = p * r + splat(1.3981999507e-3f);
    p = p * r + splat(8.3334519073e-3f);
    p = p * r + splat(4.1665795894e-2f);
    p = p * r + splat(1.6666665459e-1f);
    p = p * r + splat(5.0000001201e-1f);
    p = p * r * r + r + splat(1.0f);
    uvec power = (((uvec)shifted << 23) + (uvec)p) & ~(uvec)tiny;
    return choose(is_number, (vec)power, x);
}

/* What is subtracted before exponentials: the largest score, or 0 where a row sees nothing. */
static inline vec shift_of(vec largest) { return choose(largest == splat(-INFINITY), splat(0.0f), largest); }

static inline float from_half(uint16_t bits) {
    /* The exponents of float16 are 112 smaller than float32's, which a product corrects, subnormal numbers included.
     */
    union {
        uint32_t bits;
        float number;
    } x = {(uint32_t)(bits & 0x7fff) << 13}, scale = {0x77800000};
    x.number *= scale.number;
    x.bits |= (bits & 0x7c00) == 0x7c00 ? 0x7f800000u : 0u;
    x.bits |= (uint32_t)(bits & 0x8000) << 16;
    return x.number;
}

static inline float from_bfloat(uint16_t bits) {
    union {
        uint32_t bits;
        float number;
    } x = {(uint32_t)bits << 16};
    return x.number;
}

/* The `size` numbers of a tensor from the index `at` on, in place or in `buffer`. */
static inline const float *floats_at(const struct problem *p, const void *tensor, int64_t at, int64_t size,
                                     float *restrict buffer) {
    if (p->type == FLOAT32)
        return (const float *)tensor + at;
    const uint16_t *restrict x = (const uint16_t *)tensor + at;
    if (p->type == BFLOAT16)
        for (int64_t d = 0; d < size; d++)
            buffer[d] = from_bfloat(x[d]);
    else
        for (int64_t d = 0; d < size; d++)
            buffer[d] = from_half(x[d]);
    return buffer;
}

/* A query or key with its dimensions in the order of `problem.order`, in place or in `buffer`. */
static inline const float *ordered_at(const struct problem *p, const void *tensor, int64_t at, float *buffer) {
    float unordered[MAX_HEAD_DIM];
    if (p->is_ordered)
        return floats_at(p, tensor, at, p->head_dim, buffer);
    const float *x = floats_at(p, tensor, at, p->head_dim, unordered);
    for (int64_t d = 0; d < p->head_dim; d++)
        buffer[d] = x[p->order[d]];
    return buffer;
}

static inline int64_t query_at(const struct problem *p, int64_t b, int64_t head, int64_t token) {
    return b * p->query_stride[0] + head * p->query_stride[1] + token * p->query_stride[2];
}

static inline int64_t key_at(const struct problem *p, int64_t b, int64_t g, int64_t t) {
    return b * p->key_stride[0] + g * p->key_stride[1] + t * p->key_stride[2];
}

static inline int64_t value_at(const struct problem *p, int64_t b, int64_t g, int64_t t) {
    return b * p->value_stride[0] + g * p->value_stride[1] + t * p->value_stride[2];
}

/* Index of the first gate of a query. */
static inline int64_t gates_at(const struct problem *p, int64_t b, int64_t head, int64_t token) {
    return ((b * p->kv_heads * p->group + head) * p->queries + token) * p->experts;
}

/* Index of a query in tensors [B, S, H, Dv]. */
static inline int64_t output_at(const struct problem *p, int64_t b, int64_t head, int64_t token) {
    return ((b * p->queries + token) * p->kv_heads * p->group + head) * p->value_dim;
}

/* bias[t * step] = what the mask adds to a query's scores for the keys `start` to `start + count - 1`; returns whether
   any of them can be seen. */
static inline int read_mask(const struct problem *p, int64_t b, int64_t head, int64_t token, int64_t start,
                            int64_t count, float *restrict bias, int64_t step) {
    const int64_t *stride = p->mask_stride;
    int64_t at = b * stride[0] + head * stride[1] + token * stride[2] + start * stride[3];
    int is_seen = 0;
    for (int64_t t = 0; t < count; t++, at += stride[3]) {
        float x =
            p->mask_is_boolean ? (((const uint8_t *)p->mask)[at] ? 0.0f : -INFINITY) : ((const float *)p->mask)[at];
        bias[t * step] = x;
        is_seen |= x != -INFINITY;
    }
    return is_seen;
}

#endif
