/* Attention under several rotary base angles, mixed by gates, for the CPU in float32.

   Probabilities are mixed before they are multiplied with the values: N score products and one value product.
   Vectors are those of GCC and Clang, which lower them to what the processor has. */

#include <math.h>
#ifdef _OPENMP
#include <omp.h>
#endif
#include <stdint.h>
#include <string.h>

#define LANES 8
#define TILE_ROWS 6
#define PANEL (2 * LANES)
#define WIDTH_STEP 48 /* a multiple of both */
#define MAX_HEAD_DIM 256

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

/* One call. Strides count floats; the last dimension of every tensor is contiguous. */
struct problem {
    int64_t batch, kv_heads, group, queries, keys, head_dim, value_dim, experts, pairs;
    int64_t query_start, is_causal, tile_rows, single_tile_rows, is_ordered;
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
    /* The backward pass; all contiguous, gradients zero on entry, NULL where not wanted. */
    const float *grad_output; /* [B, S, H, Dv] */
    const uint8_t *picked;    /* [B, H, S, N], the experts whose gates have a gradient */
    float *grad_query;        /* [B, H, S, D] */
    float *grad_key;          /* [B, G, T, D] */
    float *grad_value;        /* [B, G, T, Dv] */
    float *grad_gates;        /* [B, H, S, N] */
};

static inline vec splat(float x) { return (vec){x, x, x, x, x, x, x, x}; }

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

/* Rotate the D numbers of `x` to an expert's angles at one position (direction 1), or back from them (-1). */
static void turn(const struct problem *p, int64_t expert, int64_t position, float direction, const float *x,
                 float *turned) {
    const float *cos = p->cos + expert * p->table_stride + position * p->pairs;
    const float *sin = p->sin + expert * p->table_stride + position * p->pairs;
    memcpy(turned, x, p->head_dim * sizeof(float));
    for (int64_t i = 0; i < p->pairs; i++) {
        float a = x[p->first[i]], b = x[p->second[i]];
        turned[p->first[i]] = a * cos[i] - b * direction * sin[i];
        turned[p->second[i]] = b * cos[i] + a * direction * sin[i];
    }
}

/* Exponentials of `row` less its largest number, in place, with zeros from `visible` to `width`; returns their sum. */
static float exponentials(float *row, const float *bias, int64_t visible, int64_t width) {
    if (bias)
        for (int64_t t = 0; t < visible; t++)
            row[t] += bias[t];
    for (int64_t t = visible; t < width; t++)
        row[t] = -INFINITY;
    vec top = splat(-INFINITY);
    for (int64_t t = 0; t < width; t += LANES)
        top = larger(*(vec *)(row + t), top);
    float most = top[0];
    for (int i = 1; i < LANES; i++)
        most = top[i] > most ? top[i] : most;
    vec total = splat(0.0f), shift = splat(most);
    for (int64_t t = 0; t < width; t += LANES) {
        vec e = exponential(*(vec *)(row + t) - shift);
        *(vec *)(row + t) = e;
        total += e;
    }
    return sum(total);
}

/* mixed = weight * row, or mixed += weight * row. */
static void mix(const float *restrict row, float weight, int64_t width, float *restrict mixed, int is_first) {
    vec scale = splat(weight);
    if (is_first)
        for (int64_t t = 0; t < width; t += LANES)
            *(vec *)(mixed + t) = *(const vec *)(row + t) * scale;
    else
        for (int64_t t = 0; t < width; t += LANES)
            *(vec *)(mixed + t) += *(const vec *)(row + t) * scale;
}

/* target[TILE_ROWS][PANEL] (+)= left[TILE_ROWS][depth] * right[depth][PANEL]; steps in floats. */
static inline void multiply(const float *left, int64_t left_row, int64_t left_depth, const float *right,
                            int64_t right_depth, int64_t depth, float *target, int64_t target_row, int add) {
    vec sums[TILE_ROWS][2];
    for (int r = 0; r < TILE_ROWS; r++)
        for (int i = 0; i < 2; i++)
            sums[r][i] = add ? *(vec *)(target + r * target_row + i * LANES) : splat(0.0f);
    for (int64_t d = 0; d < depth; d++) {
        vec low = *(const vec *)(right + d * right_depth), high = *(const vec *)(right + d * right_depth + LANES);
#pragma GCC unroll 6
        for (int r = 0; r < TILE_ROWS; r++) {
            vec x = splat(left[r * left_row + d * left_depth]);
            sums[r][0] += x * low;
            sums[r][1] += x * high;
        }
    }
    for (int r = 0; r < TILE_ROWS; r++)
        for (int i = 0; i < 2; i++)
            *(vec *)(target + r * target_row + i * LANES) = sums[r][i];
}

/* Rows of a tile are pairs of a head of the group and a token. */
struct row {
    int32_t head, token;
};

/* One row of the batch and key-value head under every expert's angle, shared by all threads. */
struct shared {
    int64_t b, g;
    float *key_panels;   /* [N][T / PANEL][D][PANEL] */
    float *key_rows;     /* [N][T][padded D], backward only */
    float *value_panels; /* [T / PANEL][Dv][PANEL], backward only */
    float *value_rows;   /* [T][padded Dv] */
};

/* A thread's own memory. */
struct own {
    struct row *rows;    /* [tile rows] */
    float *turned;       /* [tile rows][padded D] */
    float *scores;       /* [tile rows][width] */
    float *mixed;        /* [tile rows][width] */
    float *products;     /* [tile rows][the larger of padded D and padded Dv] */
    float *grads;        /* [tile rows][padded Dv]; from here on, backward only */
    float *grad_probs;   /* [tile rows][width] */
    float *grad_keys;    /* [N][width][padded D] */
    float *grad_values;  /* [width][padded Dv] */
};

struct sizes {
    int64_t width, rows, key_dim, value_dim, product_dim, shared, own;
};

static int64_t round_up(int64_t x, int64_t step) { return (x + step - 1) / step * step; }

static struct sizes sizes_of(const struct problem *p) {
    struct sizes n;
    n.width = round_up(p->keys, WIDTH_STEP);
    n.rows = round_up(p->single_tile_rows, TILE_ROWS);
    n.key_dim = round_up(p->head_dim, PANEL);
    n.value_dim = round_up(p->value_dim, PANEL);
    n.product_dim = n.key_dim > n.value_dim ? n.key_dim : n.value_dim;
    n.shared = n.width * (p->experts * p->head_dim + n.value_dim);
    n.own = n.rows * (2 + n.key_dim + 2 * n.width + n.product_dim);
    if (p->grad_output) {
        n.shared += n.width * (p->experts * n.key_dim + p->value_dim);
        n.own += n.rows * (n.value_dim + n.width) + n.width * (p->experts * n.key_dim + n.value_dim);
    }
    return n;
}

static float *take(float **memory, int64_t size) {
    float *taken = *memory;
    *memory += size;
    return taken;
}

static int64_t head_of(const struct problem *p, const struct shared *h, struct row row) {
    return h->g * p->group + row.head;
}

/* Index of a row's first gate. */
static int64_t gates_of(const struct problem *p, const struct shared *h, struct row row) {
    int64_t heads = p->kv_heads * p->group;
    return ((h->b * heads + head_of(p, h, row)) * p->queries + row.token) * p->experts;
}

/* Index of a row in tensors [B, S, H, Dv]. */
static int64_t output_of(const struct problem *p, const struct shared *h, struct row row) {
    int64_t heads = p->kv_heads * p->group;
    return ((h->b * p->queries + row.token) * heads + head_of(p, h, row)) * p->value_dim;
}

/* Exponentials of the tile's scores under expert `j`; `totals` gets their sums. */
static void score_tile(const struct problem *p, const struct sizes *n, const struct shared *h, const struct own *w,
                       int64_t count, int64_t keys, int64_t j, float *totals) {
    int64_t filled = round_up(count, TILE_ROWS), width = round_up(keys, WIDTH_STEP);
    for (int64_t r = 0; r < count; r++) {
        int64_t head = head_of(p, h, w->rows[r]), token = w->rows[r].token;
        const float *q =
            p->query + h->b * p->query_stride[0] + head * p->query_stride[1] + token * p->query_stride[2];
        float *turned = w->turned + r * n->key_dim;
        turn(p, j, p->query_start + token, 1.0f, q, turned);
        for (int64_t d = 0; d < p->head_dim; d++)
            turned[d] *= p->scaling;
    }
    const float *panels = h->key_panels + j * n->width * p->head_dim;
    for (int64_t t = 0; t < keys; t += PANEL)
        for (int64_t r = 0; r < filled; r += TILE_ROWS)
            multiply(w->turned + r * n->key_dim, n->key_dim, 1, panels + t * p->head_dim, PANEL, p->head_dim,
                     w->scores + r * n->width + t, n->width, 0);
    for (int64_t r = 0; r < count; r++) {
        int64_t head = head_of(p, h, w->rows[r]), token = w->rows[r].token;
        const float *bias = NULL;
        if (p->mask)
            bias = p->mask + h->b * p->mask_stride[0] + head * p->mask_stride[1] + token * p->mask_stride[2];
        int64_t visible = p->is_causal ? p->query_start + token + 1 : keys;
        totals[r] = exponentials(w->scores + r * n->width, bias, visible, width);
    }
}

/* target[tile rows][columns] = left[tile rows][keys] * right[keys][columns], with `columns` a multiple of PANEL. */
static void multiply_rows(const float *left, int64_t left_row, const float *right, int64_t columns, int64_t keys,
                          int64_t filled, float *target, int64_t target_row) {
    const int64_t block = 256; /* the right side of so many keys stays in the nearest cache while all rows use it */
    for (int64_t t = 0; t < keys; t += block)
        for (int64_t d = 0; d < columns; d += PANEL)
            for (int64_t r = 0; r < filled; r += TILE_ROWS)
                multiply(left + r * left_row + t, left_row, 1, right + t * columns + d, columns,
                         keys - t < block ? keys - t : block, target + r * target_row + d, target_row, t > 0);
}

/* target[keys][columns] += left[rows][keys]ᵀ * right[rows][columns]. */
static void add_transposed(const float *left, int64_t left_row, const float *right, int64_t columns, int64_t keys,
                           int64_t rows, float *target) {
    for (int64_t t = 0; t < keys; t += TILE_ROWS)
        for (int64_t d = 0; d < columns; d += PANEL)
            multiply(left + t, 1, left_row, right + d, columns, rows, target + t * columns + d, columns, 1);
}

static int64_t keys_seen(const struct problem *p, const struct own *w, int64_t count) {
    return p->is_causal ? p->query_start + w->rows[count - 1].token + 1 : p->keys;
}

/* Attend for `count` rows, which all picked the experts that `uses` marks, and add to their output. */
static void attend_tile(const struct problem *p, const struct sizes *n, const struct shared *h, const struct own *w,
                        int64_t count, const uint8_t *uses) {
    int64_t keys = keys_seen(p, w, count), width = round_up(keys, WIDTH_STEP);
    int64_t used = 0;
    for (int64_t j = 0; j < p->experts; j++)
        used += uses[j];
    int is_first = 1;
    float totals[n->rows], weights[n->rows];
    for (int64_t j = 0; j < p->experts; j++) {
        if (!uses[j])
            continue;
        score_tile(p, n, h, w, count, keys, j, totals);
        for (int64_t r = 0; r < count; r++) {
            weights[r] = p->gates[gates_of(p, h, w->rows[r]) + j] / totals[r];
            if (used > 1)
                mix(w->scores + r * n->width, weights[r], width, w->mixed + r * n->width, is_first);
        }
        is_first = 0;
    }
    multiply_rows(used > 1 ? w->mixed : w->scores, n->width, h->value_rows, n->value_dim, keys,
                  round_up(count, TILE_ROWS), w->products, n->product_dim);
    for (int64_t r = 0; r < count; r++) {
        float *out = p->output + output_of(p, h, w->rows[r]), weight = used > 1 ? 1.0f : weights[r];
        for (int64_t d = 0; d < p->value_dim; d++)
            out[d] += weight * w->products[r * n->product_dim + d];
    }
}

/* Gradient of scores from probabilities `row` and their gradients, in place; returns the gradient of the gate. */
static float score_gradients(float *restrict row, const float *restrict grad, float scale, float gate, int64_t width) {
    vec products = splat(0.0f);
    for (int64_t t = 0; t < width; t += LANES)
        products += *(vec *)(row + t) * *(const vec *)(grad + t);
    float mean = sum(products) * scale;
    vec shift = splat(mean), weight = splat(gate * scale);
    for (int64_t t = 0; t < width; t += LANES)
        *(vec *)(row + t) *= (*(const vec *)(grad + t) - shift) * weight;
    return mean;
}

/* The backward pass of `attend_tile`, with probabilities computed anew. */
static void attend_tile_backward(const struct problem *p, const struct sizes *n, const struct shared *h,
                                 const struct own *w, int64_t count, const uint8_t *uses) {
    int64_t keys = keys_seen(p, w, count), width = round_up(keys, WIDTH_STEP), filled = round_up(count, TILE_ROWS);
    int is_first = 1;
    float totals[n->rows], turned[MAX_HEAD_DIM];
    for (int64_t r = 0; r < count; r++)
        memcpy(w->grads + r * n->value_dim, p->grad_output + output_of(p, h, w->rows[r]),
               p->value_dim * sizeof(float));
    for (int64_t t = 0; t < width; t += PANEL)
        for (int64_t r = 0; r < filled; r += TILE_ROWS)
            multiply(w->grads + r * n->value_dim, n->value_dim, 1, h->value_panels + t * p->value_dim, PANEL,
                     p->value_dim, w->grad_probs + r * n->width + t, n->width, 0);
    for (int64_t j = 0; j < p->experts; j++) {
        if (!uses[j])
            continue;
        score_tile(p, n, h, w, count, keys, j, totals);
        for (int64_t r = 0; r < count; r++) {
            int64_t at = gates_of(p, h, w->rows[r]) + j;
            float *row = w->scores + r * n->width;
            if (p->grad_value)
                mix(row, p->gates[at] / totals[r], width, w->mixed + r * n->width, is_first);
            float grad = score_gradients(row, w->grad_probs + r * n->width, 1.0f / totals[r], p->gates[at], width);
            if (p->grad_gates)
                p->grad_gates[at] = grad;
        }
        is_first = 0;
        if (p->grad_query) {
            multiply_rows(w->scores, n->width, h->key_rows + j * n->width * n->key_dim, n->key_dim, keys, filled,
                          w->products, n->product_dim);
            for (int64_t r = 0; r < count; r++) {
                float *grad = p->grad_query + gates_of(p, h, w->rows[r]) / p->experts * p->head_dim;
                turn(p, j, p->query_start + w->rows[r].token, -1.0f, w->products + r * n->product_dim, turned);
                for (int64_t d = 0; d < p->head_dim; d++)
                    grad[d] += turned[d] * p->scaling;
            }
        }
        if (p->grad_key)
            add_transposed(w->scores, n->width, w->turned, n->key_dim, keys, count,
                           w->grad_keys + j * n->width * n->key_dim);
    }
    if (p->grad_value)
        add_transposed(w->mixed, n->width, w->grads, n->value_dim, keys, count, w->grad_values);
}

/* The tokens `start` to `end` - 1: rows that picked every expert together, others expert by expert. */
static void attend_tokens(const struct problem *p, const struct sizes *n, const struct shared *h, const struct own *w,
                          int64_t start, int64_t end) {
    uint8_t uses[p->experts];
    for (int64_t j = -1; j < p->experts; j++) {
        memset(uses, j < 0, p->experts);
        if (j >= 0)
            uses[j] = 1;
        int64_t count = 0, most = j < 0 ? p->tile_rows : p->single_tile_rows;
        for (int64_t token = start; token < end; token++)
            for (int64_t head = 0; head < p->group; head++) {
                struct row row = {(int32_t)head, (int32_t)token};
                const float *gates = p->gates + gates_of(p, h, row);
                const uint8_t *picked = p->picked ? p->picked + gates_of(p, h, row) : NULL;
                int all = 1;
                for (int64_t i = 0; i < p->experts; i++)
                    all &= picked ? picked[i] : gates[i] != 0.0f;
                if (j < 0 ? !all : all || !(picked ? picked[j] : gates[j] != 0.0f))
                    continue;
                w->rows[count++] = row;
                if (count == most) {
                    (p->grad_output ? attend_tile_backward : attend_tile)(p, n, h, w, count, uses);
                    count = 0;
                }
            }
        if (count)
            (p->grad_output ? attend_tile_backward : attend_tile)(p, n, h, w, count, uses);
    }
}

/* Lay out PANEL keys from `start` on as one expert sees them. */
static void pack_keys(const struct problem *p, const struct sizes *n, const struct shared *h, int64_t j,
                      int64_t start) {
    float turned[MAX_HEAD_DIM];
    for (int64_t t = start; t < start + PANEL; t++) {
        memset(turned, 0, sizeof turned);
        if (t < p->keys)
            turn(p, j, t, 1.0f, p->key + h->b * p->key_stride[0] + h->g * p->key_stride[1] + t * p->key_stride[2],
                 turned);
        float *panel = h->key_panels + (j * n->width + start) * p->head_dim + t % PANEL;
        for (int64_t d = 0; d < p->head_dim; d++)
            panel[d * PANEL] = turned[d];
        if (p->grad_output)
            memcpy(h->key_rows + (j * n->width + t) * n->key_dim, turned, n->key_dim * sizeof(float));
    }
}

static void pack_values(const struct problem *p, const struct sizes *n, const struct shared *h, int64_t t) {
    float value[MAX_HEAD_DIM] = {0};
    if (t < p->keys)
        memcpy(value, p->value + h->b * p->value_stride[0] + h->g * p->value_stride[1] + t * p->value_stride[2],
               p->value_dim * sizeof(float));
    memcpy(h->value_rows + t * n->value_dim, value, n->value_dim * sizeof(float));
    if (p->grad_output)
        for (int64_t d = 0; d < p->value_dim; d++)
            h->value_panels[t / PANEL * PANEL * p->value_dim + d * PANEL + t % PANEL] = value[d];
}

/* Sum the threads' gradients of one key and value, and turn those of the key back. */
static void unpack_gradients(const struct problem *p, const struct sizes *n, const struct shared *h,
                             const float *threads_own, int64_t threads, int64_t keys_at, int64_t values_at,
                             int64_t t) {
    float turned[MAX_HEAD_DIM], total[MAX_HEAD_DIM];
    int64_t row = (h->b * p->kv_heads + h->g) * p->keys + t;
    for (int64_t j = 0; p->grad_key && j < p->experts; j++) {
        memset(total, 0, sizeof total);
        for (int64_t i = 0; i < threads; i++)
            for (int64_t d = 0; d < p->head_dim; d++)
                total[d] += threads_own[i * n->own + keys_at + (j * n->width + t) * n->key_dim + d];
        turn(p, j, t, -1.0f, total, turned);
        for (int64_t d = 0; d < p->head_dim; d++)
            p->grad_key[row * p->head_dim + d] += turned[d];
    }
    for (int64_t i = 0; p->grad_value && i < threads; i++)
        for (int64_t d = 0; d < p->value_dim; d++)
            p->grad_value[row * p->value_dim + d] += threads_own[i * n->own + values_at + t * n->value_dim + d];
}

/* Output of all queries; with `grad_output`, the gradients instead. */
void attend(const struct problem *p, int64_t threads) {
    const struct sizes n = sizes_of(p);
    int64_t tokens = round_up(p->single_tile_rows * p->experts, p->group) / p->group;
    int64_t blocks = (p->queries + tokens - 1) / tokens;
    struct shared h = {0};
    float *memory = p->scratch;
    h.key_panels = take(&memory, p->experts * n.width * p->head_dim);
    h.value_rows = take(&memory, n.width * n.value_dim);
    if (p->grad_output) {
        h.key_rows = take(&memory, p->experts * n.width * n.key_dim);
        h.value_panels = take(&memory, n.width * p->value_dim);
    }
    float *threads_own = memory;
#pragma omp parallel num_threads(threads) firstprivate(h)
    {
        int64_t thread = 0;
#ifdef _OPENMP
        thread = omp_get_thread_num();
#endif
        float *first = threads_own + thread * n.own, *mine = first;
        memset(first, 0, n.own * sizeof(float));
        struct own w = {0};
        w.rows = (struct row *)take(&mine, 2 * n.rows);
        w.turned = take(&mine, n.rows * n.key_dim);
        w.scores = take(&mine, n.rows * n.width);
        w.mixed = take(&mine, n.rows * n.width);
        w.products = take(&mine, n.rows * n.product_dim);
        if (p->grad_output) {
            w.grads = take(&mine, n.rows * n.value_dim);
            w.grad_probs = take(&mine, n.rows * n.width);
            w.grad_keys = take(&mine, p->experts * n.width * n.key_dim);
            w.grad_values = take(&mine, n.width * n.value_dim);
        }
        for (h.b = 0; h.b < p->batch; h.b++)
            for (h.g = 0; h.g < p->kv_heads; h.g++) {
#pragma omp for schedule(static) collapse(2) nowait
                for (int64_t j = 0; j < p->experts; j++)
                    for (int64_t t = 0; t < n.width; t += PANEL)
                        pack_keys(p, &n, &h, j, t);
#pragma omp for schedule(static)
                for (int64_t t = 0; t < n.width; t++)
                    pack_values(p, &n, &h, t);
#pragma omp for schedule(dynamic)
                for (int64_t i = blocks - 1; i >= 0; i--) {
                    int64_t end = (i + 1) * tokens < p->queries ? (i + 1) * tokens : p->queries;
                    attend_tokens(p, &n, &h, &w, i * tokens, end);
                }
                if (!p->grad_output)
                    continue;
#pragma omp for schedule(static)
                for (int64_t t = 0; t < p->keys; t++)
                    unpack_gradients(p, &n, &h, threads_own, threads, w.grad_keys - first, w.grad_values - first, t);
                memset(w.grad_keys, 0, p->experts * n.width * n.key_dim * sizeof(float));
                memset(w.grad_values, 0, n.width * n.value_dim * sizeof(float));
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

/* Scores [H][N][T] of one query of every head with the keys `start` to `end` - 1. Rotating a query and a key by an
   expert's angles d and multiplying them equals C cos(r d) + S sin(r d), summed over their pairs, at the distance r.
   `queries` holds the heads' queries, ordered by pairs. */
static void score_keys(const struct problem *p, int64_t b, int64_t s, const float *restrict queries,
                       const int32_t *restrict picked, int64_t start, int64_t end, float *restrict scores) {
    const int64_t pairs = p->pairs, head_dim = p->head_dim, experts = p->experts, group = p->group;
    const int64_t position = p->query_start + s, width = round_up(p->keys, WIDTH_STEP), whole = pairs / LANES * LANES;
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
                const int32_t *own = picked + head * experts;
                for (int64_t n = 0; n < experts && own[n] >= 0; n++) {
                    const float *cos = p->cos + own[n] * p->table_stride;
                    const float *sin = p->sin + own[n] * p->table_stride;
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
                    *(vec *)(scores + (head * experts + n) * width + t) = (total + sums_of(sums)) * splat(p->scaling);
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
    int64_t heads = p->kv_heads * p->group, width = round_up(p->keys, WIDTH_STEP);
    return heads * ((p->experts + 1) * width + p->experts + threads * p->value_dim + p->head_dim);
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
    int64_t heads = p->kv_heads * p->group, width = round_up(p->keys, WIDTH_STEP), experts = p->experts;
    float *scores = p->scratch, *mixed = scores + heads * experts * width;
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
                    const int32_t *own = picked + head * experts;
                    const float *bias = NULL;
                    if (p->mask)
                        bias = p->mask + b * p->mask_stride[0] + head * p->mask_stride[1] + s * p->mask_stride[2];
                    for (int64_t n = 0; n < experts && own[n] >= 0; n++) {
                        float *row = scores + (head * experts + n) * width;
                        float total = exponentials(row, bias, keys, round_up(keys, LANES));
                        mix(row, gates[own[n]] / total, round_up(keys, LANES), mixed + head * width, n == 0);
                    }
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
    const struct sizes n = sizes_of(p);
    return decodes ? decode_floats(p, threads) : n.shared + threads * n.own;
}
