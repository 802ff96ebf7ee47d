/* Panels of rows, blocks of keys, and the scores between them, for `attend.c` and `differentiate.c`.

   A round takes some queries of one key-value head. Their rows, pairs of a query and an expert that it picked, are
   sorted by expert and cut into panels. A panel meets the keys block by block, each rotated to the expert's angle
   where it is needed, with a running maximum and sum of exponentials in every row. Scores lie transposed, one row of
   the panel in each lane, so that nothing is summed across lanes and keys and values are read as they come. */

#ifndef PEFT_MOICE_PANELS_H
#define PEFT_MOICE_PANELS_H

#include "kernels.h"

#define ROWS (2 * LANES)  /* of a panel */
#define BLOCK 120         /* keys; a multiple of STEP, whichever it is */
#define MOST_ROWS 4096    /* of a round */
#define FEWEST_QUERIES 64 /* of a share of the work */

/* Rows of a panel: heads are counted within the group. */
struct row {
    int32_t head, token;
};

/* Rows of one expert, in the order of their tokens; behind the last one, zeros. */
struct panel {
    int64_t expert, count;
    struct row *rows; /* [ROWS] */
    float *columns;   /* [D][ROWS], the rotated queries times the scaling */
    float *far;       /* [D][ROWS], the same for far keys; only with `far_from` */
    float *top;       /* [ROWS], the largest score so far */
    float *total;     /* [ROWS], the sum of exponentials less that */
    float *sums;      /* [the larger of D and Dv, padded][ROWS]: of values; in the backward pass of keys */
    /* From here on, backward only. */
    float *queries;      /* [ROWS][padded D], the columns again */
    float *grads;        /* [ROWS][padded Dv], gradients of the output */
    float *grad_columns; /* [Dv][ROWS], the same again */
    float *mean;         /* [ROWS], the mean of the probabilities' gradients */
};

/* A thread's own memory. */
struct own {
    struct panel *panels;
    float *original;    /* [BLOCK][padded D], keys in the order of their pairs */
    float *keys;        /* [BLOCK][padded D], those under one expert */
    float *values;      /* [BLOCK][padded Dv] */
    float *scores;      /* [BLOCK][ROWS], later their exponentials */
    float *bias;        /* [BLOCK][ROWS] */
    float *far_scores;  /* [BLOCK][ROWS]; only with `far_from` */
    float *grad_probs;  /* [BLOCK][ROWS]; from here on, backward only */
    float *grad_keys;   /* [BLOCK][padded D], under one expert */
    float *grad_sums;   /* [BLOCK][padded D], of all experts, rotated back */
    float *grad_values; /* [BLOCK][padded Dv] */
    float *center;      /* [padded Dv], subtracted from values, so that gradients of probabilities are small numbers */
};

struct sizes {
    int64_t key_dim, value_dim, sum_dim, panels, panel, own, queries;
};

/* So many shares of every key-value head's queries give each thread about four to work on. */
static inline int64_t wanted_shares(const struct problem *p, int64_t threads) {
    return (4 * threads + p->batch * p->kv_heads - 1) / (p->batch * p->kv_heads);
}

static inline struct sizes sizes_of(const struct problem *p, int64_t threads) {
    struct sizes n;
    int64_t shares = wanted_shares(p, threads);
    n.key_dim = round_up(round_up(p->head_dim, STEP), ROWS);
    n.value_dim = round_up(round_up(p->value_dim, STEP), ROWS);
    n.sum_dim = n.key_dim > n.value_dim ? n.key_dim : n.value_dim;
    n.queries = (p->queries + shares - 1) / shares;
    n.queries = n.queries * p->group < MOST_ROWS ? n.queries : (MOST_ROWS + p->group - 1) / p->group;
    n.queries = n.queries > FEWEST_QUERIES ? n.queries : smaller(FEWEST_QUERIES, p->queries);
    int64_t rows = smaller(n.queries * p->group * p->experts, MOST_ROWS);
    rows = rows > p->group * p->experts ? rows : p->group * p->experts;
    n.panels = rows / ROWS + p->experts;
    n.panel = ROWS * (2 + p->head_dim + 2 + n.sum_dim);
    n.own = BLOCK * (2 * n.key_dim + n.value_dim + 2 * ROWS);
    if (p->far_from) {
        n.panel += ROWS * p->head_dim;
        n.own += BLOCK * ROWS;
    }
    if (p->grad_output) {
        n.panel += ROWS * (n.key_dim + n.value_dim + p->value_dim + 1);
        n.own += BLOCK * (ROWS + 2 * n.key_dim + n.value_dim) + n.value_dim;
    }
    n.own += n.panels * (n.panel + round_up(sizeof(struct panel) / sizeof(float), LANES));
    return n;
}

static inline struct own lay_out(const struct problem *p, const struct sizes *n, float *memory) {
    struct own w = {0};
    w.original = take(&memory, BLOCK * n->key_dim);
    w.keys = take(&memory, BLOCK * n->key_dim);
    w.values = take(&memory, BLOCK * n->value_dim);
    w.scores = take(&memory, BLOCK * ROWS);
    w.bias = take(&memory, BLOCK * ROWS);
    memset(w.original, 0, BLOCK * (2 * n->key_dim + n->value_dim) * sizeof(float));
    if (p->far_from)
        w.far_scores = take(&memory, BLOCK * ROWS);
    if (p->grad_output) {
        w.grad_probs = take(&memory, BLOCK * ROWS);
        w.grad_keys = take(&memory, BLOCK * n->key_dim);
        w.grad_sums = take(&memory, BLOCK * n->key_dim);
        w.grad_values = take(&memory, BLOCK * n->value_dim);
        w.center = take(&memory, n->value_dim);
    }
    w.panels = (struct panel *)take(&memory, n->panels * round_up(sizeof(struct panel) / sizeof(float), LANES));
    for (int64_t i = 0; i < n->panels; i++) {
        struct panel *x = w.panels + i;
        x->rows = (struct row *)take(&memory, 2 * ROWS);
        x->columns = take(&memory, p->head_dim * ROWS);
        if (p->far_from)
            x->far = take(&memory, p->head_dim * ROWS);
        x->top = take(&memory, ROWS);
        x->total = take(&memory, ROWS);
        x->sums = take(&memory, n->sum_dim * ROWS);
        if (p->grad_output) {
            x->queries = take(&memory, ROWS * n->key_dim);
            x->grads = take(&memory, ROWS * n->value_dim);
            x->grad_columns = take(&memory, p->value_dim * ROWS);
            x->mean = take(&memory, ROWS);
        }
    }
    return w;
}

/* Rotate `x`, ordered by pairs, to an expert's angles at one position (direction 1), or back from them (-1). */
static inline void rotate(const struct problem *p, int64_t expert, int64_t position, float direction,
                          const float *restrict x, float *restrict rotated) {
    const int64_t pairs = p->pairs;
    const float *restrict cos = p->cos + expert * p->table_stride + position * pairs;
    const float *restrict sin = p->sin + expert * p->table_stride + position * pairs;
    for (int64_t i = 0; i < pairs; i++) {
        rotated[i] = x[i] * cos[i] - x[pairs + i] * (direction * sin[i]);
        rotated[pairs + i] = x[pairs + i] * cos[i] + x[i] * (direction * sin[i]);
    }
    for (int64_t d = 2 * pairs; d < p->head_dim; d++)
        rotated[d] = x[d];
}

/* target[STEP][ROWS] (+)= left[STEP][depth] * right[depth][ROWS]; steps in floats. */
static inline void multiply(const float *restrict left, int64_t left_row, int64_t left_depth,
                            const float *restrict right, int64_t right_depth, int64_t depth, float *restrict target,
                            int64_t target_row, int add) {
    vec sums[STEP][2];
#pragma GCC unroll 8
    for (int r = 0; r < STEP; r++)
        sums[r][0] = sums[r][1] = splat(0.0f);
    for (int64_t d = 0; d < depth; d++) {
        vec low = *(const vec *)(right + d * right_depth), high = *(const vec *)(right + d * right_depth + LANES);
#pragma GCC unroll 8
        for (int r = 0; r < STEP; r++) {
            vec x = splat(left[r * left_row + d * left_depth]);
            sums[r][0] += x * low;
            sums[r][1] += x * high;
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < STEP; r++) {
        vec *low = (vec *)(target + r * target_row), *high = (vec *)(target + r * target_row + LANES);
        if (add) {
            sums[r][0] += *low;
            sums[r][1] += *high;
        }
        *low = sums[r][0];
        *high = sums[r][1];
    }
}

/* The keys of a panel that its rows see end before this. */
static inline int64_t end_of_keys(const struct problem *p, const struct panel *x) {
    return p->is_causal ? p->query_start + x->rows[x->count - 1].token + 1 : p->keys;
}

static inline void load_block(const struct problem *p, const struct sizes *n, const struct own *w, int64_t b,
                              int64_t g, int64_t start, int64_t count) {
    for (int64_t t = 0; t < BLOCK; t++) {
        float *key = w->original + t * n->key_dim, *value = w->values + t * n->value_dim;
        if (t < count) {
            const float *x = ordered_at(p, p->key, key_at(p, b, g, start + t), key);
            if (x != key)
                memcpy(key, x, p->head_dim * sizeof(float));
            x = floats_at(p, p->value, value_at(p, b, g, start + t), p->value_dim, value);
            for (int64_t d = 0; d < p->value_dim; d++)
                value[d] = p->grad_output ? x[d] - w->center[d] : x[d];
        } else if (t < round_up(count, STEP)) {
            memset(key, 0, p->head_dim * sizeof(float));
            memset(value, 0, p->value_dim * sizeof(float));
        }
    }
}

static inline void rotate_block(const struct problem *p, const struct sizes *n, const struct own *w, int64_t expert,
                                int64_t start, int64_t count) {
    for (int64_t t = 0; t < round_up(count, STEP); t++) {
        float *key = w->keys + t * n->key_dim;
        if (t < count)
            rotate(p, expert, start + t, 1.0f, w->original + t * n->key_dim, key);
        else
            memset(key, 0, p->head_dim * sizeof(float));
    }
}

/* scores[count][ROWS] = products of a panel's columns with the keys as they are rotated now. */
static inline void score_keys(const struct problem *p, const struct sizes *n, const struct own *w,
                              const float *columns, float *scores, int64_t count) {
    for (int64_t t = 0; t < count; t += STEP)
        multiply(w->keys + t * n->key_dim, n->key_dim, 1, columns, ROWS, p->head_dim, scores + t * ROWS, ROWS, 0);
}

/* What the mask and causality leave of a panel's scores for a block of keys; returns 0 where the mask hides all. */
static inline int mask_block(const struct problem *p, const struct own *w, const struct panel *x, int64_t b, int64_t g,
                             int64_t start, int64_t count) {
    if (p->mask) {
        int is_seen = 0;
        for (int64_t r = 0; r < x->count; r++)
            is_seen |=
                read_mask(p, b, g * p->group + x->rows[r].head, x->rows[r].token, start, count, w->bias + r, ROWS);
        if (!is_seen)
            return 0;
        for (int64_t r = x->count; r < ROWS; r++)
            for (int64_t t = 0; t < count; t++)
                w->bias[t * ROWS + r] = 0.0f;
    }
    for (int64_t t = count; t < round_up(count, STEP); t++)
        for (int64_t r = 0; r < ROWS; r++)
            w->scores[t * ROWS + r] = -INFINITY;
    if (p->mask)
        for (int64_t i = 0; i < count * ROWS; i += LANES)
            *(vec *)(w->scores + i) += *(const vec *)(w->bias + i);
    if (p->is_causal && start + count - 1 > p->query_start + x->rows[0].token)
        for (int64_t r = 0; r < x->count; r++) {
            int64_t hidden = p->query_start + x->rows[r].token + 1 - start;
            for (int64_t t = hidden > 0 ? hidden : 0; t < count; t++)
                w->scores[t * ROWS + r] = -INFINITY;
        }
    return 1;
}

/* Take a block of scores into a panel's running maximum and sum, turn it into exponentials, and scale sums so far,
   [size][ROWS], to the new maximum. */
static inline void accumulate(const struct own *w, const struct panel *x, int64_t keys, float *sums, int64_t size) {
    for (int64_t i = 0; i < ROWS; i += LANES) {
        vec *top = (vec *)(x->top + i), *total = (vec *)(x->total + i), largest = *top, sum = splat(0.0f);
        for (int64_t t = 0; t < keys; t++)
            largest = larger(*(const vec *)(w->scores + t * ROWS + i), largest);
        vec shift = shift_of(largest);
        for (int64_t t = 0; t < keys; t++) {
            vec *score = (vec *)(w->scores + t * ROWS + i);
            *score = exponential(*score - shift);
            sum += *score;
        }
        ivec grew = largest > *top;
        int any = 0;
        for (int l = 0; l < LANES; l++)
            any |= grew[l];
        if (any) {
            vec factor = choose(grew, exponential(*top - shift), splat(1.0f));
            *total *= factor;
            for (int64_t d = 0; d < size; d++)
                *(vec *)(sums + d * ROWS + i) *= factor;
            *top = largest;
        }
        *total += sum;
    }
}

/* The end of the keys that some row of the panels sees. */
static inline int64_t end_of_all(const struct problem *p, const struct own *w, int64_t panels) {
    int64_t end = 0;
    for (int64_t i = 0; i < panels; i++)
        end = end_of_keys(p, w->panels + i) > end ? end_of_keys(p, w->panels + i) : end;
    return end;
}

/* Rotate the block that was loaded to the rotation `wanted` of the table, unless `turn`, which the keys have, is that
   already. */
static inline void turn_block(const struct problem *p, const struct sizes *n, const struct own *w, int64_t wanted,
                              int64_t start, int64_t count, int64_t *turn) {
    if (*turn != wanted)
        rotate_block(p, n, w, wanted, start, count);
    *turn = wanted;
}

/* Scores of a panel for the block that was loaded, which is rotated for it; returns 0 where no row sees any of the
   keys. */
static inline int meet_block(const struct problem *p, const struct sizes *n, const struct own *w,
                             const struct panel *x, int64_t b, int64_t g, int64_t start, int64_t count,
                             int64_t *turn) {
    if (start >= end_of_keys(p, x))
        return 0;
    const int64_t first = p->query_start + x->rows[0].token, end = p->query_start + x->rows[x->count - 1].token + 1;
    const enum side side = side_of(p, x->expert, first, end, start, start + count - 1);
    if (side != FAR) {
        turn_block(p, n, w, x->expert, start, count, turn);
        score_keys(p, n, w, x->columns, w->scores, count);
    }
    if (side != NEAR) {
        turn_block(p, n, w, p->experts + x->expert, start, count, turn);
        score_keys(p, n, w, x->far, side == FAR ? w->scores : w->far_scores, count);
    }
    for (int64_t r = 0; side == BORDER && r < x->count; r++) {
        int64_t last = p->query_start + x->rows[r].token - p->far_from[x->expert] - start;
        for (int64_t t = 0; t <= last && t < count; t++)
            w->scores[t * ROWS + r] = w->far_scores[t * ROWS + r];
    }
    return mask_block(p, w, x, b, g, start, count);
}

static inline int is_picked(const struct problem *p, int64_t at) {
    return p->picked ? p->picked[at] != 0 : p->gates[at] != 0.0f;
}

/* Fill panels with the rows of the queries from `token` on, before `end`, as far as there is room; returns the next
   query and leaves the number of panels in `panels`. */
static inline int64_t fill_panels(const struct problem *p, const struct sizes *n, const struct own *w, int64_t b,
                                  int64_t g, int64_t token, int64_t end, int64_t *panels) {
    int64_t counts[p->experts], needed = 0, first = token;
    memset(counts, 0, sizeof counts);
    for (; token < end; token++) {
        int64_t before = needed;
        for (int64_t head = 0; head < p->group; head++) {
            int64_t at = gates_at(p, b, g * p->group + head, token);
            for (int64_t j = 0; j < p->experts; j++)
                if (is_picked(p, at + j))
                    needed += counts[j]++ % ROWS == 0;
        }
        if (needed > n->panels && token > first) {
            needed = before;
            break;
        }
    }
    struct panel *x = w->panels - 1;
    for (int64_t j = 0; j < p->experts; j++) {
        int64_t count = ROWS;
        for (int64_t s = first; s < token; s++)
            for (int64_t head = 0; head < p->group; head++) {
                if (!is_picked(p, gates_at(p, b, g * p->group + head, s) + j))
                    continue;
                if (count == ROWS) {
                    (++x)->expert = j;
                    count = 0;
                }
                x->rows[count++] = (struct row){(int32_t)head, (int32_t)s};
                x->count = count;
            }
    }
    *panels = x + 1 - w->panels;
    return token;
}

/* Multiply a rotated query by the scaling, and what of it rotates by the expert's factor. */
static inline void scale_query(const struct problem *p, int64_t expert, int is_far, float *rotated) {
    const float factor = factor_of(p, expert, is_far) * p->scaling;
    for (int64_t d = 0; d < p->head_dim; d++)
        rotated[d] *= d < 2 * p->pairs ? factor : p->scaling;
}

static inline void prepare_panel(const struct problem *p, const struct sizes *n, const struct panel *x, int64_t b,
                                 int64_t g) {
    float buffer[MAX_HEAD_DIM], rotated[MAX_HEAD_DIM];
    memset(x->columns, 0, p->head_dim * ROWS * sizeof(float));
    if (p->far_from)
        memset(x->far, 0, p->head_dim * ROWS * sizeof(float));
    memset(x->sums, 0, n->sum_dim * ROWS * sizeof(float));
    if (p->grad_output) {
        memset(x->queries, 0, ROWS * n->key_dim * sizeof(float));
        memset(x->grads, 0, ROWS * n->value_dim * sizeof(float));
        memset(x->grad_columns, 0, p->value_dim * ROWS * sizeof(float));
        memset(x->mean, 0, ROWS * sizeof(float));
    }
    for (int64_t r = 0; r < ROWS; r++) {
        x->top[r] = -INFINITY;
        x->total[r] = 0.0f;
    }
    for (int64_t r = 0; r < x->count; r++) {
        int64_t head = g * p->group + x->rows[r].head, token = x->rows[r].token;
        const float *query = ordered_at(p, p->query, query_at(p, b, head, token), buffer);
        const int64_t position = p->query_start + token;
        /* A query before `far_from` meets no far key. */
        if (p->far_from && position >= p->far_from[x->expert]) {
            rotate(p, p->experts + x->expert, position - p->far_from[x->expert], 1.0f, query, rotated);
            scale_query(p, x->expert, 1, rotated);
            for (int64_t d = 0; d < p->head_dim; d++)
                x->far[d * ROWS + r] = rotated[d];
        }
        rotate(p, x->expert, position, 1.0f, query, rotated);
        scale_query(p, x->expert, 0, rotated);
        for (int64_t d = 0; d < p->head_dim; d++)
            x->columns[d * ROWS + r] = rotated[d];
        if (!p->grad_output)
            continue;
        const float *grad = p->grad_output + output_at(p, b, head, token);
        memcpy(x->queries + r * n->key_dim, rotated, p->head_dim * sizeof(float));
        memcpy(x->grads + r * n->value_dim, grad, p->value_dim * sizeof(float));
        for (int64_t d = 0; d < p->value_dim; d++)
            x->grad_columns[d * ROWS + r] = grad[d];
    }
}

/* weights[ROWS] = the gates over the sums of exponentials, 0 where a row sees nothing. */
static inline void weigh(const struct problem *p, const struct panel *x, int64_t b, int64_t g, float *weights) {
    for (int64_t r = 0; r < ROWS; r++)
        weights[r] = 0.0f;
    for (int64_t r = 0; r < x->count; r++)
        if (x->total[r] != 0.0f)
            weights[r] =
                p->gates[gates_at(p, b, g * p->group + x->rows[r].head, x->rows[r].token) + x->expert] / x->total[r];
}

#endif
