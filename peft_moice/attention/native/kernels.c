/* Attention under several rotary base angles, mixed by gates, for the CPU in float32.

   Both kernels mix probabilities before they multiply them with the values: K score products and one value product.
   Vectors are those of GCC and Clang, which lower them to what the processor has. */

#include <math.h>
#ifdef _OPENMP
#include <omp.h>
#endif
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define LANES 8
#define TILE_ROWS 6
#define PANEL (2 * LANES)
#define MAX_HEAD_DIM 256

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4)));
typedef int32_t ivec __attribute__((vector_size(4 * LANES), aligned(4)));

/* One call. Strides count floats; the last dimension of every tensor is contiguous. */
struct problem {
    int64_t batch, kv_heads, group, queries, keys, head_dim, value_dim, experts, pairs;
    int64_t query_start, is_causal, tile_rows, picks, is_ordered;
    const float *query; /* [B, H, S, D] */
    int64_t query_stride[3];
    const float *key; /* [B, G, T, D] */
    int64_t key_stride[3];
    const float *value; /* [B, G, T, Dv] */
    int64_t value_stride[3];
    const float *gates; /* [B, H, S, N], contiguous; an expert with gate 0 is not computed */
    const float *mask;  /* [B, H, S, T], additive, or NULL */
    int64_t mask_stride[3];
    const float *cos, *sin; /* [N, T, P] */
    int64_t table_stride;
    const int32_t *first, *second; /* [P], the dimensions that turn into one another */
    float scaling;
    float *output; /* [B, S, H, Dv], contiguous, zero on entry */
    float *scratch;
};

static inline vec splat(float x) { return (vec){} + x; }

static inline float sum(vec x) {
    return ((x[0] + x[4]) + (x[1] + x[5])) + ((x[2] + x[6]) + (x[3] + x[7]));
}

#ifdef __clang__
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (ivec){__VA_ARGS__})
#endif

/* The sums of eight vectors. */
static inline vec sums_of(const vec *x) {
    vec pairs[4], fours[2];
    for (int i = 0; i < 4; i++)
        pairs[i] = SHUFFLE(x[2 * i], x[2 * i + 1], 0, 8, 2, 10, 4, 12, 6, 14) +
                   SHUFFLE(x[2 * i], x[2 * i + 1], 1, 9, 3, 11, 5, 13, 7, 15);
    for (int i = 0; i < 2; i++)
        fours[i] = SHUFFLE(pairs[2 * i], pairs[2 * i + 1], 0, 1, 8, 9, 4, 5, 12, 13) +
                   SHUFFLE(pairs[2 * i], pairs[2 * i + 1], 2, 3, 10, 11, 6, 7, 14, 15);
    return SHUFFLE(fours[0], fours[1], 0, 1, 2, 3, 8, 9, 10, 11) +
           SHUFFLE(fours[0], fours[1], 4, 5, 6, 7, 12, 13, 14, 15);
}

static inline vec larger(vec a, vec b) {
    ivec first = a > b;
    return (vec)(((ivec)a & first) | ((ivec)b & ~first));
}

/* exp for x <= 0, to about one unit in the last place; below -87, zero. */
static inline vec exponential(vec x) {
    const vec magic = splat(12582912.0f); /* 1.5 * 2^23: adding it rounds to an integer */
    ivec tiny = x < splat(-87.0f);
    x = larger(x, splat(-87.0f));
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
    ivec power = ((ivec)shifted << 23) + (ivec)p;
    return (vec)(power & ~tiny);
}

/* Rotate the D numbers of `x` by an expert's angles at one position. */
static void turn(const struct problem *p, int64_t expert, int64_t position, const float *x, float *turned) {
    const float *cos = p->cos + expert * p->table_stride + position * p->pairs;
    const float *sin = p->sin + expert * p->table_stride + position * p->pairs;
    memcpy(turned, x, p->head_dim * sizeof(float));
    for (int64_t i = 0; i < p->pairs; i++) {
        float a = x[p->first[i]], b = x[p->second[i]];
        turned[p->first[i]] = a * cos[i] - b * sin[i];
        turned[p->second[i]] = b * cos[i] + a * sin[i];
    }
}

/* Softmax of `row` over `keys` numbers, times `weight`, added to `mixed`; numbers from `visible` on count as masked. */
static void add_softmax(float *row, const float *bias, int64_t visible, int64_t keys, float weight, float *mixed,
                        int is_first) {
    int64_t padded = (keys + LANES - 1) / LANES * LANES;
    if (bias)
        for (int64_t t = 0; t < visible; t++)
            row[t] += bias[t];
    for (int64_t t = visible; t < padded; t++)
        row[t] = -INFINITY;
    vec top = splat(-INFINITY);
    for (int64_t t = 0; t < padded; t += LANES)
        top = larger(*(vec *)(row + t), top);
    float most = top[0];
    for (int i = 1; i < LANES; i++)
        most = top[i] > most ? top[i] : most;
    vec total = splat(0.0f), shift = splat(most);
    for (int64_t t = 0; t < padded; t += LANES) {
        vec e = exponential(*(vec *)(row + t) - shift);
        *(vec *)(row + t) = e;
        total += e;
    }
    vec scale = splat(weight / sum(total));
    if (is_first)
        for (int64_t t = 0; t < padded; t += LANES)
            *(vec *)(mixed + t) = *(vec *)(row + t) * scale;
    else
        for (int64_t t = 0; t < padded; t += LANES)
            *(vec *)(mixed + t) += *(vec *)(row + t) * scale;
}

/* target[TILE_ROWS][PANEL] (+)= left[TILE_ROWS][depth] * right[depth][PANEL]; strides in floats. */
static inline void multiply(const float *left, int64_t left_stride, const float *right, int64_t right_stride,
                            int64_t depth, float *target, int64_t target_stride, int add) {
    vec sums[TILE_ROWS][2];
    for (int r = 0; r < TILE_ROWS; r++)
        for (int i = 0; i < 2; i++)
            sums[r][i] = add ? *(vec *)(target + r * target_stride + i * LANES) : splat(0.0f);
    for (int64_t d = 0; d < depth; d++) {
        vec low = *(vec *)(right + d * right_stride), high = *(vec *)(right + d * right_stride + LANES);
#pragma GCC unroll 6
        for (int r = 0; r < TILE_ROWS; r++) {
            vec x = splat(left[r * left_stride + d]);
            sums[r][0] += x * low;
            sums[r][1] += x * high;
        }
    }
    for (int r = 0; r < TILE_ROWS; r++)
        for (int i = 0; i < 2; i++)
            *(vec *)(target + r * target_stride + i * LANES) = sums[r][i];
}

/* A row of the tile: a head of the group and a token. */
struct row {
    int32_t head, token;
};

struct workspace {
    float *turned;   /* [tile rows][D] */
    float *scores;   /* [tile rows][padded keys] */
    float *mixed;    /* [tile rows][padded keys] */
    float *products; /* [tile rows][padded Dv] */
    struct row *rows;
};

static int64_t round_up(int64_t x, int64_t step) { return (x + step - 1) / step * step; }

static int64_t panels_of(const struct problem *p) { return round_up(p->keys, PANEL) * p->head_dim; }

/* Attend for `count` rows, which all picked the experts that `uses` marks, and add to their output. */
static void attend_tile(const struct problem *p, const struct workspace *w, int64_t b, int64_t g, const float *panels,
                        int64_t count, const uint8_t *uses) {
    const struct row *rows = w->rows;
    int64_t width = round_up(p->keys, PANEL), heads = p->kv_heads * p->group;
    int64_t keys = p->is_causal ? p->query_start + rows[count - 1].token + 1 : p->keys;
    int64_t filled = round_up(count, TILE_ROWS), value_width = round_up(p->value_dim, PANEL);
    int is_first = 1;
    for (int64_t j = 0; j < p->experts; j++) {
        if (!uses[j])
            continue;
        for (int64_t r = 0; r < count; r++) {
            int64_t head = g * p->group + rows[r].head;
            const float *q = p->query + b * p->query_stride[0] + head * p->query_stride[1] +
                             rows[r].token * p->query_stride[2];
            turn(p, j, p->query_start + rows[r].token, q, w->turned + r * p->head_dim);
            for (int64_t d = 0; d < p->head_dim; d++)
                w->turned[r * p->head_dim + d] *= p->scaling;
        }
        const float *expert_panels = panels + j * panels_of(p);
        for (int64_t t = 0; t < keys; t += PANEL)
            for (int64_t r = 0; r < filled; r += TILE_ROWS)
                multiply(w->turned + r * p->head_dim, p->head_dim, expert_panels + t * p->head_dim, PANEL,
                         p->head_dim, w->scores + r * width + t, width, 0);
        for (int64_t r = 0; r < count; r++) {
            int64_t head = g * p->group + rows[r].head, token = rows[r].token;
            float gate = p->gates[((b * heads + head) * p->queries + token) * p->experts + j];
            const float *bias = NULL;
            if (p->mask)
                bias = p->mask + b * p->mask_stride[0] + head * p->mask_stride[1] + token * p->mask_stride[2];
            int64_t visible = p->is_causal ? p->query_start + token + 1 : keys;
            add_softmax(w->scores + r * width, bias, visible, keys, gate, w->mixed + r * width, is_first);
        }
        is_first = 0;
    }
    const float *values = p->value + b * p->value_stride[0] + g * p->value_stride[1];
    const int64_t block = 256; /* values of so many keys stay in the nearest cache while all rows use them */
    for (int64_t t = 0; t < keys; t += block) {
        int64_t depth = keys - t < block ? keys - t : block;
        for (int64_t d = 0; d < value_width; d += PANEL) {
            if (d + PANEL <= p->value_dim) {
                for (int64_t r = 0; r < filled; r += TILE_ROWS)
                    multiply(w->mixed + r * width + t, width, values + t * p->value_stride[2] + d, p->value_stride[2],
                             depth, w->products + r * value_width + d, value_width, t > 0);
                continue;
            }
            for (int64_t r = 0; r < count; r++)
                for (int64_t e = d; e < p->value_dim; e++) {
                    float total = t > 0 ? w->products[r * value_width + e] : 0.0f;
                    for (int64_t i = 0; i < depth; i++)
                        total += w->mixed[r * width + t + i] * values[(t + i) * p->value_stride[2] + e];
                    w->products[r * value_width + e] = total;
                }
        }
    }
    for (int64_t r = 0; r < count; r++) {
        int64_t head = g * p->group + rows[r].head;
        float *out = p->output + ((b * p->queries + rows[r].token) * heads + head) * p->value_dim;
        for (int64_t d = 0; d < p->value_dim; d++)
            out[d] += w->products[r * value_width + d];
    }
}

/* The tokens `start` to `end` - 1: rows that picked every expert together, others expert by expert. */
static void attend_tokens(const struct problem *p, const struct workspace *w, int64_t b, int64_t g,
                          const float *panels, int64_t start, int64_t end) {
    int64_t heads = p->kv_heads * p->group;
    uint8_t uses[p->experts];
    for (int64_t j = -1; j < p->experts; j++) {
        memset(uses, j < 0, p->experts);
        if (j >= 0)
            uses[j] = 1;
        int64_t count = 0;
        for (int64_t token = start; token < end; token++)
            for (int64_t head = 0; head < p->group; head++) {
                const float *gates =
                    p->gates + ((b * heads + g * p->group + head) * p->queries + token) * p->experts;
                int all = 1;
                for (int64_t i = 0; i < p->experts; i++)
                    all &= gates[i] != 0.0f;
                if (j < 0 ? !all : all || gates[j] == 0.0f)
                    continue;
                w->rows[count++] = (struct row){(int32_t)head, (int32_t)token};
                if (count == p->tile_rows) {
                    attend_tile(p, w, b, g, panels, count, uses);
                    count = 0;
                }
            }
        if (count)
            attend_tile(p, w, b, g, panels, count, uses);
    }
}

/* Keys under every expert's angle, [N][T / PANEL][D][PANEL], for one row of the batch and key-value head. */
static void pack_keys(const struct problem *p, int64_t b, int64_t g, int64_t expert, int64_t start, int64_t end,
                      float *panels) {
    float turned[MAX_HEAD_DIM];
    for (int64_t t = start; t < end; t++) {
        if (t < p->keys)
            turn(p, expert, t, p->key + b * p->key_stride[0] + g * p->key_stride[1] + t * p->key_stride[2], turned);
        else
            memset(turned, 0, sizeof turned);
        float *panel = panels + expert * panels_of(p) + t / PANEL * PANEL * p->head_dim + t % PANEL;
        for (int64_t d = 0; d < p->head_dim; d++)
            panel[d * PANEL] = turned[d];
    }
}

static int64_t attend_floats(const struct problem *p, int64_t threads) {
    int64_t width = round_up(p->keys, PANEL), rows = round_up(p->tile_rows, TILE_ROWS);
    int64_t own = rows * (2 * width + p->head_dim + round_up(p->value_dim, PANEL)) + 2 * rows;
    return p->experts * panels_of(p) + threads * own;
}

void attend(const struct problem *p, int64_t threads) {
    int64_t width = round_up(p->keys, PANEL), rows = round_up(p->tile_rows, TILE_ROWS);
    int64_t own = rows * (2 * width + p->head_dim + round_up(p->value_dim, PANEL)) + 2 * rows;
    float *panels = p->scratch;
    int64_t tokens = round_up(p->tile_rows * p->experts, p->group) / p->group;
    int64_t blocks = (p->queries + tokens - 1) / tokens, pieces = width / PANEL;
#pragma omp parallel num_threads(threads)
    {
        int64_t thread = 0;
#ifdef _OPENMP
        thread = omp_get_thread_num();
#endif
        struct workspace w;
        w.turned = p->scratch + p->experts * panels_of(p) + thread * own;
        w.scores = w.turned + rows * p->head_dim;
        w.mixed = w.scores + rows * width;
        w.products = w.mixed + rows * width;
        w.rows = (struct row *)(w.products + rows * round_up(p->value_dim, PANEL));
        memset(w.turned, 0, rows * p->head_dim * sizeof(float));
        memset(w.mixed, 0, rows * width * sizeof(float));
        for (int64_t b = 0; b < p->batch; b++)
            for (int64_t g = 0; g < p->kv_heads; g++) {
#pragma omp for schedule(static) collapse(2)
                for (int64_t j = 0; j < p->experts; j++)
                    for (int64_t i = 0; i < pieces; i++)
                        pack_keys(p, b, g, j, i * PANEL, (i + 1) * PANEL, panels);
#pragma omp for schedule(dynamic)
                for (int64_t i = blocks - 1; i >= 0; i--) {
                    int64_t end = (i + 1) * tokens < p->queries ? (i + 1) * tokens : p->queries;
                    attend_tokens(p, &w, b, g, panels, i * tokens, end);
                }
            }
    }
}

/* The D numbers of `x` in the order: first of each pair, second of each pair, what does not turn. */
static void by_pairs(const struct problem *p, const float *x, float *ordered) {
    uint8_t turns[MAX_HEAD_DIM] = {0};
    int64_t rest = 2 * p->pairs;
    for (int64_t i = 0; i < p->pairs; i++) {
        ordered[i] = x[p->first[i]];
        ordered[p->pairs + i] = x[p->second[i]];
        turns[p->first[i]] = turns[p->second[i]] = 1;
    }
    for (int64_t d = 0; d < p->head_dim; d++)
        if (!turns[d])
            ordered[rest++] = x[d];
}

/* C and S of `score_keys` for one query and one key; returns the part of their product that does not turn. */
static inline float pair_products(const float *restrict q, const float *restrict k, int64_t pairs, int64_t head_dim,
                                  float *restrict same, float *restrict other) {
    int64_t i = 0;
    for (; i + LANES <= pairs; i += LANES) {
        vec qa = *(const vec *)(q + i), qb = *(const vec *)(q + pairs + i);
        vec ka = *(const vec *)(k + i), kb = *(const vec *)(k + pairs + i);
        *(vec *)(same + i) = qa * ka + qb * kb;
        *(vec *)(other + i) = qa * kb - qb * ka;
    }
    for (; i < pairs; i++) {
        same[i] = q[i] * k[i] + q[pairs + i] * k[pairs + i];
        other[i] = q[i] * k[pairs + i] - q[pairs + i] * k[i];
    }
    float rest = 0.0f;
    for (int64_t d = 2 * pairs; d < head_dim; d++)
        rest += q[d] * k[d];
    return rest;
}

/* Scores [H][K][T] of one query of every head with the keys `start` to `end` - 1. Rotating a query and a key by an
   expert's angles d and multiplying them equals C cos(r d) + S sin(r d), summed over their pairs, at the distance r.
   `queries` holds the heads' queries, ordered by pairs. */
static void score_keys(const struct problem *p, int64_t b, int64_t s, const float *restrict queries,
                       const int32_t *restrict picked, int64_t start, int64_t end, float *restrict scores) {
    const int64_t pairs = p->pairs, head_dim = p->head_dim, picks = p->picks, group = p->group;
    const int64_t position = p->query_start + s, width = round_up(p->keys, PANEL), whole = pairs / LANES * LANES;
    float same[LANES][MAX_HEAD_DIM / 2], other[LANES][MAX_HEAD_DIM / 2], ordered[LANES][MAX_HEAD_DIM];
    for (int64_t t = start; t < end; t += LANES) {
        int64_t rows[LANES];
        const float *keys[LANES];
        for (int64_t g = 0; g < p->kv_heads; g++) {
            for (int64_t u = 0; u < LANES; u++) {
                /* Behind the last key, it is repeated; those scores lie behind the row's end and are not used. */
                int64_t at = t + u < end ? t + u : end - 1;
                rows[u] = (position > at ? position - at : 0) * pairs;
                keys[u] = p->key + b * p->key_stride[0] + g * p->key_stride[1] + at * p->key_stride[2];
                if (!p->is_ordered) {
                    by_pairs(p, keys[u], ordered[u]);
                    keys[u] = ordered[u];
                }
            }
            for (int64_t head = g * group; head < (g + 1) * group; head++) {
                vec rest;
                for (int64_t u = 0; u < LANES; u++)
                    rest[u] = pair_products(queries + head * head_dim, keys[u], pairs, head_dim, same[u], other[u]);
                const int32_t *experts = picked + head * p->experts;
                for (int64_t n = 0; n < picks && experts[n] >= 0; n++) {
                    const float *cos = p->cos + experts[n] * p->table_stride;
                    const float *sin = p->sin + experts[n] * p->table_stride;
                    vec sums[LANES], total = rest;
                    for (int64_t u = 0; u < LANES; u++) {
                        int64_t i = 0;
                        sums[u] = splat(0.0f);
                        for (; i < whole; i += LANES)
                            sums[u] += *(vec *)(same[u] + i) * *(const vec *)(cos + rows[u] + i) +
                                       *(vec *)(other[u] + i) * *(const vec *)(sin + rows[u] + i);
                        for (; i < pairs; i++)
                            total[u] += same[u][i] * cos[rows[u] + i] + other[u][i] * sin[rows[u] + i];
                    }
                    *(vec *)(scores + (head * picks + n) * width + t) = (total + sums_of(sums)) * splat(p->scaling);
                }
            }
        }
    }
}

/* Add `weights` [T] times the values of the keys `start` to `end` - 1 to `sums` [Dv]. */
static void add_values(const struct problem *p, const float *restrict values, const float *restrict weights,
                       int64_t start, int64_t end, float *restrict sums) {
    const int64_t size = p->value_dim, stride = p->value_stride[2], whole = size / PANEL * PANEL;
    for (int64_t d = 0; d < whole; d += PANEL) {
        vec low = *(vec *)(sums + d), high = *(vec *)(sums + d + LANES);
        for (int64_t t = start; t < end; t++) {
            vec weight = splat(weights[t]);
            low += weight * *(const vec *)(values + t * stride + d);
            high += weight * *(const vec *)(values + t * stride + d + LANES);
        }
        *(vec *)(sums + d) = low;
        *(vec *)(sums + d + LANES) = high;
    }
    for (int64_t d = whole; d < size; d++)
        for (int64_t t = start; t < end; t++)
            sums[d] += weights[t] * values[t * stride + d];
}

static int64_t decode_floats(const struct problem *p, int64_t threads) {
    int64_t heads = p->kv_heads * p->group, width = round_up(p->keys, PANEL);
    return heads * ((p->picks + 1) * width + p->experts + threads * p->value_dim + p->head_dim);
}

/* The experts that each head of a query picked, [H][N], ended by -1. */
static void list_picks(const struct problem *p, int64_t b, int64_t s, int32_t *picked) {
    int64_t heads = p->kv_heads * p->group;
    for (int64_t head = 0; head < heads; head++) {
        const float *gates = p->gates + ((b * heads + head) * p->queries + s) * p->experts;
        int64_t n = 0;
        for (int64_t j = 0; j < p->experts; j++)
            if (gates[j] != 0.0f)
                picked[head * p->experts + n++] = (int32_t)j;
        if (n < p->experts)
            picked[head * p->experts + n] = -1;
    }
}

/* Few queries: keys and values are read once and never rotated. */
void decode(const struct problem *p, int64_t threads) {
    int64_t heads = p->kv_heads * p->group, width = round_up(p->keys, PANEL), picks = p->picks;
    float *scores = p->scratch, *mixed = scores + heads * picks * width;
    float *sums = mixed + heads * width;
    float *queries = sums + threads * heads * p->value_dim;
    int32_t *picked = (int32_t *)(queries + heads * p->head_dim);
    const int64_t piece = 64;
#pragma omp parallel num_threads(threads)
    {
        int64_t thread = 0;
#ifdef _OPENMP
        thread = omp_get_thread_num();
#endif
        for (int64_t b = 0; b < p->batch; b++)
            for (int64_t s = 0; s < p->queries; s++) {
                int64_t keys = p->is_causal ? p->query_start + s + 1 : p->keys;
                int64_t pieces = (keys + piece - 1) / piece;
#pragma omp single
                {
                    list_picks(p, b, s, picked);
                    for (int64_t head = 0; head < heads; head++)
                        by_pairs(p,
                                 p->query + b * p->query_stride[0] + head * p->query_stride[1] +
                                     s * p->query_stride[2],
                                 queries + head * p->head_dim);
                }
#pragma omp for schedule(static)
                for (int64_t i = 0; i < pieces; i++)
                    score_keys(p, b, s, queries, picked, i * piece, (i + 1) * piece < keys ? (i + 1) * piece : keys,
                               scores);
#pragma omp for schedule(static)
                for (int64_t head = 0; head < heads; head++) {
                    const float *gates = p->gates + ((b * heads + head) * p->queries + s) * p->experts;
                    const int32_t *experts = picked + head * p->experts;
                    const float *bias = NULL;
                    if (p->mask)
                        bias = p->mask + b * p->mask_stride[0] + head * p->mask_stride[1] + s * p->mask_stride[2];
                    for (int64_t n = 0; n < picks && experts[n] >= 0; n++)
                        add_softmax(scores + (head * picks + n) * width, bias, keys, keys, gates[experts[n]],
                                    mixed + head * width, n == 0);
                }
                float *own = sums + thread * heads * p->value_dim;
                memset(own, 0, heads * p->value_dim * sizeof(float));
#pragma omp for schedule(static)
                for (int64_t i = 0; i < pieces; i++)
                    for (int64_t head = 0; head < heads; head++)
                        add_values(p, p->value + b * p->value_stride[0] + head / p->group * p->value_stride[1],
                                   mixed + head * width, i * piece, (i + 1) * piece < keys ? (i + 1) * piece : keys,
                                   own + head * p->value_dim);
#pragma omp single
                for (int64_t n = 0; n < threads; n++)
                    for (int64_t i = 0; i < heads * p->value_dim; i++)
                        p->output[(b * p->queries + s) * heads * p->value_dim + i] +=
                            sums[n * heads * p->value_dim + i];
            }
    }
}

/* Floats of scratch memory that `attend` or `decode` needs. */
int64_t scratch_size(const struct problem *p, int64_t threads, int decodes) {
    return decodes ? decode_floats(p, threads) : attend_floats(p, threads);
}
