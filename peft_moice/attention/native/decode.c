/* Attention of few queries under several rotary base angles: keys and values are read once and never rotated.

   Rotating a query and a key by an expert's angles d and multiplying them equals C cos(r d) + S sin(r d), summed over
   their pairs, at the distance r. */

#ifdef _OPENMP
#include <omp.h>
#endif

#include "kernels.h"

#define PIECE 64      /* keys of a share of the work; a multiple of LANES */
#define SUM_BLOCK 512 /* numbers summed in sequence; likewise */

static inline float sum(vec x) {
    float total = 0.0f;
    for (int i = 0; i < LANES; i++)
        total += x[i];
    return total;
}

#ifdef __clang__
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (ivec){__VA_ARGS__})
#endif
#define EACH_OF_4(f, j, h) f(j, h), f(j + 1, h), f(j + 2, h), f(j + 3, h)
#define EACH_OF_8(f, j, h) EACH_OF_4(f, j, h), EACH_OF_4(f, j + 4, h)
#if LANES == 16
#define EACH(f, h) EACH_OF_8(f, 0, h), EACH_OF_8(f, 8, h)
#elif LANES == 8
#define EACH(f, h) EACH_OF_8(f, 0, h)
#else
#define EACH(f, h) EACH_OF_4(f, 0, h)
#endif
#define LEFT(j, h) ((j) & (h) ? LANES + (j) - (h) : (j))
#define RIGHT(j, h) ((j) & (h) ? LANES + (j) : (j) + (h))
/* Sums of lanes at the distance `h`: those of `a` where the lane's bit `h` is 0, else those of `b`. */
#define FOLD(a, b, h) (SHUFFLE(a, b, EACH(LEFT, h)) + SHUFFLE(a, b, EACH(RIGHT, h)))

/* The sums of LANES vectors; overwrites them. */
static inline vec sums_of(vec *x) {
    for (int i = 0; i < LANES / 2; i++)
        x[i] = FOLD(x[2 * i], x[2 * i + 1], 1);
    for (int i = 0; i < LANES / 4; i++)
        x[i] = FOLD(x[2 * i], x[2 * i + 1], 2);
#if LANES > 4
    for (int i = 0; i < LANES / 8; i++)
        x[i] = FOLD(x[2 * i], x[2 * i + 1], 4);
#endif
#if LANES > 8
    x[0] = FOLD(x[0], x[1], 8);
#endif
    return x[0];
}

/* Exponentials of `row` [keys, padded] less its largest number, in place, with zeros behind the last key; returns
   their sum. */
static float exponentials(float *row, int64_t keys) {
    int64_t width = round_up(keys, LANES);
    for (int64_t t = keys; t < width; t++)
        row[t] = -INFINITY;
    vec largest = splat(-INFINITY), total = splat(0.0f);
    for (int64_t t = 0; t < width; t += LANES)
        largest = larger(*(const vec *)(row + t), largest);
    float top = largest[0];
    for (int i = 1; i < LANES; i++)
        top = largest[i] > top ? largest[i] : top;
    vec shift = shift_of(splat(top));
    for (int64_t start = 0; start < width; start += SUM_BLOCK) {
        vec part = splat(0.0f);
        for (int64_t t = start; t < smaller(start + SUM_BLOCK, width); t += LANES) {
            vec *score = (vec *)(row + t);
            *score = exponential(*score - shift);
            part += *score;
        }
        total += part;
    }
    return sum(total);
}

/* mixed = weight * row, or mixed += weight * row. */
static void mix(const float *restrict row, float weight, int64_t width, float *restrict mixed, int is_first) {
    if (is_first)
        for (int64_t t = 0; t < width; t++)
            mixed[t] = row[t] * weight;
    else
        for (int64_t t = 0; t < width; t++)
            mixed[t] += row[t] * weight;
}

/* C and S of one query and one key, S with `sign`; returns the part of their product that does not rotate. */
static inline float pair_products(const float *restrict q, const float *restrict k, float sign, int64_t pairs,
                                  int64_t head_dim, float *restrict same, float *restrict other) {
    for (int64_t i = 0; i < pairs; i++) {
        same[i] = q[i] * k[i] + q[pairs + i] * k[pairs + i];
        other[i] = sign * (q[i] * k[pairs + i] - q[pairs + i] * k[i]);
    }
    float rest = 0.0f;
    for (int64_t d = 2 * pairs; d < head_dim; d++)
        rest += q[d] * k[d];
    return rest;
}

/* Scores [H][N][width] of one query of every head with the keys `start` to `end - 1`, for the experts that `picked`
   lists. `queries` [H][D] are ordered by pairs. */
static void score_keys(const struct problem *p, int64_t b, int64_t s, const float *restrict queries,
                       const int32_t *restrict picked, int64_t start, int64_t end, int64_t width,
                       float *restrict scores) {
    const int64_t position = p->query_start + s, pairs = p->pairs, whole = pairs / LANES * LANES;
    float same[LANES][MAX_HEAD_DIM / 2], other[LANES][MAX_HEAD_DIM / 2], buffer[LANES][MAX_HEAD_DIM], sign[LANES];
    const float *keys[LANES];
    int64_t rows[LANES];
    for (int64_t t = start; t < end; t += LANES)
        for (int64_t g = 0; g < p->kv_heads; g++) {
            for (int64_t u = 0; u < LANES; u++) {
                /* Behind the last key it is repeated; those scores lie behind the row's end and are not used. */
                int64_t at = smaller(t + u, end - 1);
                rows[u] = (position > at ? position - at : at - position) * pairs;
                sign[u] = position < at ? -1.0f : 1.0f;
                keys[u] = ordered_at(p, p->key, key_at(p, b, g, at), buffer[u]);
            }
            for (int64_t head = g * p->group; head < (g + 1) * p->group; head++) {
                vec rest;
                for (int64_t u = 0; u < LANES; u++)
                    rest[u] = pair_products(queries + head * p->head_dim, keys[u], sign[u], pairs, p->head_dim,
                                            same[u], other[u]);
                const int32_t *experts = picked + head * p->experts;
                for (int64_t n = 0; n < p->experts && experts[n] >= 0; n++) {
                    const float *cos = p->cos + experts[n] * p->table_stride;
                    const float *sin = p->sin + experts[n] * p->table_stride;
                    vec sums[LANES], total = rest;
                    for (int64_t u = 0; u < LANES; u++) {
                        sums[u] = splat(0.0f);
                        for (int64_t i = 0; i < whole; i += LANES)
                            sums[u] += *(const vec *)(same[u] + i) * *(const vec *)(cos + rows[u] + i) +
                                       *(const vec *)(other[u] + i) * *(const vec *)(sin + rows[u] + i);
                        for (int64_t i = whole; i < pairs; i++)
                            total[u] += same[u][i] * cos[rows[u] + i] + other[u][i] * sin[rows[u] + i];
                    }
                    *(vec *)(scores + (head * p->experts + n) * width + t) =
                        (total + sums_of(sums)) * splat(p->scaling);
                }
            }
        }
}

/* Add `weights` [T] times the values of the keys `start` to `end - 1`, at most PIECE, to the sums [group][Dv] of a
   key-value head. */
static void add_values(const struct problem *p, int64_t b, int64_t g, const float *restrict weights, int64_t width,
                       int64_t start, int64_t end, float *restrict sums) {
    float buffer[PIECE][MAX_HEAD_DIM];
    const float *values[PIECE];
    for (int64_t t = start; t < end; t++)
        values[t - start] = floats_at(p, p->value, value_at(p, b, g, t), p->value_dim, buffer[t - start]);
    for (int64_t head = 0; head < p->group; head++) {
        const float *own = weights + head * width + start;
        float *total = sums + head * p->value_dim;
        int64_t d = 0;
        for (; d + 2 * LANES <= p->value_dim; d += 2 * LANES) {
            vec low = splat(0.0f), high = splat(0.0f);
            for (int64_t t = 0; t < end - start; t++) {
                vec weight = splat(own[t]);
                low += weight * *(const vec *)(values[t] + d);
                high += weight * *(const vec *)(values[t] + d + LANES);
            }
            *(vec *)(total + d) += low;
            *(vec *)(total + d + LANES) += high;
        }
        for (; d < p->value_dim; d++) {
            float part = 0.0f;
            for (int64_t t = 0; t < end - start; t++)
                part += own[t] * values[t][d];
            total[d] += part;
        }
    }
}

/* The experts that each head of a query picked, [H][N], ended by -1. */
static void list_picks(const struct problem *p, int64_t b, int64_t s, int32_t *picked) {
    for (int64_t head = 0; head < p->kv_heads * p->group; head++) {
        const float *gates = p->gates + gates_at(p, b, head, s);
        int64_t n = 0;
        for (int64_t j = 0; j < p->experts; j++)
            if (gates[j] != 0.0f)
                picked[head * p->experts + n++] = (int32_t)j;
        if (n < p->experts)
            picked[head * p->experts + n] = -1;
    }
}

/* mixed[T] = the probabilities of one head's query, mixed by its gates. */
static void mix_probs(const struct problem *p, int64_t b, int64_t head, int64_t s, const int32_t *experts,
                      const float *bias, int64_t keys, int64_t width, float *scores, float *mixed) {
    const float *gates = p->gates + gates_at(p, b, head, s);
    if (experts[0] < 0)
        memset(mixed, 0, width * sizeof(float));
    for (int64_t n = 0; n < p->experts && experts[n] >= 0; n++) {
        float *row = scores + n * width;
        for (int64_t t = 0; bias && t < keys; t++)
            row[t] += bias[t];
        float total = exponentials(row, keys);
        mix(row, total == 0.0f ? 0.0f : gates[experts[n]] / total, round_up(keys, LANES), mixed, n == 0);
    }
}

/* Output of all queries, one after the other. */
void decode(const struct problem *p, int64_t threads) {
    const int64_t heads = p->kv_heads * p->group, width = round_up(p->keys, LANES), experts = p->experts;
    float *scores = p->scratch, *mixed = scores + heads * experts * width, *bias = mixed + heads * width;
    float *sums = bias + heads * width, *queries = sums + threads * heads * p->value_dim;
    int32_t *picked = (int32_t *)(queries + heads * p->head_dim);
#pragma omp parallel num_threads(threads)
    {
        int64_t thread = 0, team = 1;
#ifdef _OPENMP
        thread = omp_get_thread_num();
        team = omp_get_num_threads();
#endif
        for (int64_t b = 0; b < p->batch; b++)
            for (int64_t s = 0; s < p->queries; s++) {
                const int64_t keys = p->is_causal ? p->query_start + s + 1 : p->keys;
                const int64_t pieces = (keys + PIECE - 1) / PIECE;
#pragma omp single
                {
                    list_picks(p, b, s, picked);
                    for (int64_t head = 0; head < heads; head++) {
                        float *query = queries + head * p->head_dim;
                        const float *x = ordered_at(p, p->query, query_at(p, b, head, s), query);
                        if (x != query)
                            memcpy(query, x, p->head_dim * sizeof(float));
                    }
                }
#pragma omp for schedule(static)
                for (int64_t i = 0; i < pieces; i++)
                    score_keys(p, b, s, queries, picked, i * PIECE, smaller((i + 1) * PIECE, keys), width, scores);
#pragma omp for schedule(static)
                for (int64_t head = 0; head < heads; head++) {
                    if (p->mask)
                        read_mask(p, b, head, s, 0, keys, bias + head * width, 1);
                    mix_probs(p, b, head, s, picked + head * experts, p->mask ? bias + head * width : NULL, keys,
                              width, scores + head * experts * width, mixed + head * width);
                }
                float *own = sums + thread * heads * p->value_dim;
                memset(own, 0, heads * p->value_dim * sizeof(float));
#pragma omp for schedule(static)
                for (int64_t i = 0; i < pieces; i++)
                    for (int64_t g = 0; g < p->kv_heads; g++)
                        add_values(p, b, g, mixed + g * p->group * width, width, i * PIECE,
                                   smaller((i + 1) * PIECE, keys), own + g * p->group * p->value_dim);
#pragma omp single
                for (int64_t i = 0; i < heads * p->value_dim; i++) {
                    float total = 0.0f;
                    for (int64_t n = 0; n < team; n++)
                        total += sums[n * heads * p->value_dim + i];
                    p->output[output_at(p, b, 0, s) + i] = total;
                }
            }
    }
}

/* Floats of scratch memory that `decode` needs. */
int64_t decode_floats(const struct problem *p, int64_t threads) {
    int64_t heads = p->kv_heads * p->group, width = round_up(p->keys, LANES);
    return heads * ((p->experts + 2) * width + p->experts + threads * p->value_dim + p->head_dim);
}
