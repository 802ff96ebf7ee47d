/* Gradients of `attend.c`. Panels meet the keys twice: for the sums of exponentials and the means of the
   probabilities' gradients, and for the gradients that follow from them. */

#include "panels.h"

/* The mean of a head's values. Softmax makes what all probabilities' gradients have in common without effect, but not
   without rounding errors. */
static void find_center(const struct problem *p, const struct own *w, int64_t b, int64_t g) {
    float buffer[MAX_HEAD_DIM];
    memset(w->center, 0, p->value_dim * sizeof(float));
    for (int64_t t = 0; t < p->keys; t++) {
        const float *x = floats_at(p, p->value, value_at(p, b, g, t), p->value_dim, buffer);
        for (int64_t d = 0; d < p->value_dim; d++)
            w->center[d] += x[d] / (float)p->keys;
    }
    for (int64_t d = 0; d < p->value_dim; d++)
        if (!isfinite(w->center[d]))
            w->center[d] = 0.0f;
}

/* grad_probs[keys][ROWS] = gradients of the probabilities. */
static void grad_probs_of(const struct problem *p, const struct sizes *n, const struct own *w, const struct panel *x,
                          int64_t keys) {
    for (int64_t t = 0; t < keys; t += STEP)
        multiply(w->values + t * n->value_dim, n->value_dim, 1, x->grad_columns, ROWS, p->value_dim,
                 w->grad_probs + t * ROWS, ROWS, 0);
}

/* The backward pass's first look at a block: maxima, sums and means. */
static void measure_block(const struct problem *p, const struct sizes *n, const struct own *w, const struct panel *x,
                          int64_t count) {
    int64_t keys = round_up(count, STEP);
    grad_probs_of(p, n, w, x, keys);
    accumulate(w, x, keys, x->mean, 1);
    for (int64_t i = 0; i < ROWS; i += LANES) {
        vec sum = splat(0.0f);
        for (int64_t at = i; at < keys * ROWS; at += ROWS)
            sum += *(const vec *)(w->scores + at) * *(const vec *)(w->grad_probs + at);
        *(vec *)(x->mean + i) += sum;
    }
}

/* Its second look: gradients. `weights` [ROWS] are the gates over the sums of exponentials. */
static void differentiate_block(const struct problem *p, const struct sizes *n, const struct own *w,
                                const struct panel *x, const float *weights, int64_t count) {
    int64_t keys = round_up(count, STEP);
    grad_probs_of(p, n, w, x, keys);
    for (int64_t i = 0; i < ROWS; i += LANES) {
        vec shift = shift_of(*(const vec *)(x->top + i)), weight = *(const vec *)(weights + i);
        vec mean = *(const vec *)(x->mean + i);
        for (int64_t at = i; at < keys * ROWS; at += ROWS) {
            vec probs = exponential(*(const vec *)(w->scores + at) - shift) * weight;
            *(vec *)(w->scores + at) = probs;
            *(vec *)(w->grad_probs + at) = probs * (*(const vec *)(w->grad_probs + at) - mean);
        }
    }
    if (p->grad_value)
        for (int64_t t = 0; t < keys; t += STEP)
            for (int64_t d = 0; d < p->value_dim; d += ROWS)
                multiply(w->scores + t * ROWS, ROWS, 1, x->grads + d, n->value_dim, x->count,
                         w->grad_values + t * n->value_dim + d, n->value_dim, 1);
    if (p->grad_key)
        for (int64_t t = 0; t < keys; t += STEP)
            for (int64_t d = 0; d < p->head_dim; d += ROWS)
                multiply(w->grad_probs + t * ROWS, ROWS, 1, x->queries + d, n->key_dim, x->count,
                         w->grad_keys + t * n->key_dim + d, n->key_dim, 1);
    if (p->grad_query)
        for (int64_t d = 0; d < p->head_dim; d += STEP)
            multiply(w->keys + d, 1, n->key_dim, w->grad_probs, ROWS, keys, x->sums + d * ROWS, ROWS, 1);
}

static void finish_measuring(const struct problem *p, const struct sizes *n, const struct own *w,
                             const struct panel *x, int64_t b, int64_t g, float *weights) {
    weigh(p, x, b, g, weights);
    for (int64_t r = 0; r < x->count; r++) {
        float grad = 0.0f;
        if (x->total[r] != 0.0f) {
            grad = x->mean[r] /= x->total[r];
            for (int64_t d = 0; d < p->value_dim; d++)
                grad += w->center[d] * x->grads[r * n->value_dim + d];
        }
        if (p->grad_gates)
            p->grad_gates[gates_at(p, b, g * p->group + x->rows[r].head, x->rows[r].token) + x->expert] = grad;
    }
}

static void finish_gradients(const struct problem *p, const struct panel *x, int64_t b, int64_t g) {
    float grad[MAX_HEAD_DIM], rotated[MAX_HEAD_DIM];
    for (int64_t r = 0; r < x->count; r++) {
        int64_t head = g * p->group + x->rows[r].head, token = x->rows[r].token;
        for (int64_t d = 0; d < p->head_dim; d++)
            grad[d] = x->sums[d * ROWS + r] * p->scaling;
        rotate(p, x->expert, p->query_start + token, -1.0f, grad, rotated);
        float *total = p->grad_query + gates_at(p, b, head, token) / p->experts * p->head_dim;
        for (int64_t d = 0; d < p->head_dim; d++)
            total[p->order[d]] += rotated[d];
    }
}

/* Set to zero what the queries `first` to `end - 1` add to. */
static void clear(const struct problem *p, int64_t b, int64_t g, int64_t first, int64_t end) {
    for (int64_t head = g * p->group; head < (g + 1) * p->group; head++) {
        int64_t at = gates_at(p, b, head, first);
        if (p->grad_gates)
            memset(p->grad_gates + at, 0, (end - first) * p->experts * sizeof(float));
        if (p->grad_query)
            memset(p->grad_query + at / p->experts * p->head_dim, 0, (end - first) * p->head_dim * sizeof(float));
    }
}

/* Rotate the gradients of a block's keys under one expert back, and add them to those of the others. */
static void rotate_back(const struct problem *p, const struct sizes *n, const struct own *w, int64_t expert,
                        int64_t start, int64_t count) {
    for (int64_t t = 0; t < count; t++) {
        float rotated[MAX_HEAD_DIM], *sums = w->grad_sums + t * n->key_dim;
        rotate(p, expert, start + t, -1.0f, w->grad_keys + t * n->key_dim, rotated);
        for (int64_t d = 0; d < p->head_dim; d++)
            sums[d] += rotated[d];
    }
}

/* Gradients from one block of keys, all panels together. */
static void differentiate_keys(const struct problem *p, const struct sizes *n, const struct own *w, int64_t panels,
                               int64_t b, int64_t g, int64_t part, const float *weights, int64_t start,
                               int64_t count) {
    int64_t turn = -1, at = ((part * p->batch + b) * p->kv_heads + g) * p->keys + start;
    memset(w->grad_keys, 0, BLOCK * n->key_dim * sizeof(float));
    memset(w->grad_sums, 0, BLOCK * n->key_dim * sizeof(float));
    memset(w->grad_values, 0, BLOCK * n->value_dim * sizeof(float));
    load_block(p, n, w, b, g, start, count);
    for (int64_t i = 0; i < panels; i++) {
        const struct panel *x = w->panels + i;
        if (meet_block(p, n, w, x, b, g, start, count, &turn))
            differentiate_block(p, n, w, x, weights + i * ROWS, count);
        if (p->grad_key && turn == x->expert && (i + 1 == panels || x[1].expert != turn)) {
            rotate_back(p, n, w, turn, start, count);
            memset(w->grad_keys, 0, BLOCK * n->key_dim * sizeof(float));
        }
    }
    for (int64_t t = 0; t < count; t++, at++) {
        for (int64_t d = 0; p->grad_key && d < p->head_dim; d++)
            p->grad_key[at * p->head_dim + p->order[d]] += w->grad_sums[t * n->key_dim + d];
        for (int64_t d = 0; p->grad_value && d < p->value_dim; d++)
            p->grad_value[at * p->value_dim + d] += w->grad_values[t * n->value_dim + d];
    }
}

/* The queries `token` to `end - 1` of one key-value head. */
static void differentiate_queries(const struct problem *p, const struct sizes *n, const struct own *w, int64_t b,
                                  int64_t g, int64_t part, int64_t token, int64_t end) {
    clear(p, b, g, token, end);
    while (token < end) {
        int64_t panels;
        token = fill_panels(p, n, w, b, g, token, end, &panels);
        for (int64_t i = 0; i < panels; i++)
            prepare_panel(p, n, w->panels + i, b, g);
        int64_t keys = end_of_all(p, w, panels);
        for (int64_t start = 0; start < keys; start += BLOCK) {
            int64_t count = smaller(BLOCK, p->keys - start), turn = -1;
            load_block(p, n, w, b, g, start, count);
            for (int64_t i = 0; i < panels; i++)
                if (meet_block(p, n, w, w->panels + i, b, g, start, count, &turn))
                    measure_block(p, n, w, w->panels + i, count);
        }
        float weights[n->panels * ROWS];
        for (int64_t i = 0; i < panels; i++)
            finish_measuring(p, n, w, w->panels + i, b, g, weights + i * ROWS);
        if (!p->grad_query && !p->grad_key && !p->grad_value)
            continue;
        for (int64_t start = 0; start < keys; start += BLOCK)
            differentiate_keys(p, n, w, panels, b, g, part, weights, start, smaller(BLOCK, p->keys - start));
        for (int64_t i = 0; p->grad_query && i < panels; i++)
            finish_gradients(p, w->panels + i, b, g);
    }
}

/* One part of the queries of one key-value head; others may work on other parts at the same time. */
static void differentiate_part(const struct problem *p, const struct sizes *n, const struct own *w, int64_t b,
                               int64_t g, int64_t part) {
    int64_t at = ((part * p->batch + b) * p->kv_heads + g) * p->keys,
            shares = (p->queries + n->queries - 1) / n->queries;
    if (p->grad_key)
        memset(p->grad_key + at * p->head_dim, 0, p->keys * p->head_dim * sizeof(float));
    if (p->grad_value)
        memset(p->grad_value + at * p->value_dim, 0, p->keys * p->value_dim * sizeof(float));
    find_center(p, w, b, g);
    for (int64_t i = part; i < shares; i += p->parts)
        differentiate_queries(p, n, w, b, g, part, i * n->queries, smaller((i + 1) * n->queries, p->queries));
}

/* Gradients of everything that is wanted. */
void differentiate(const struct problem *p, int64_t threads) {
    const struct sizes n = sizes_of(p, threads);
    int64_t heads = p->batch * p->kv_heads;
#pragma omp parallel num_threads(threads)
    {
        struct own w = lay_out(p, &n, p->scratch + thread_number() * n.own);
#pragma omp for schedule(dynamic) collapse(2)
        for (int64_t part = p->parts - 1; part >= 0; part--)
            for (int64_t head = 0; head < heads; head++)
                differentiate_part(p, &n, &w, head / p->kv_heads, head % p->kv_heads, part);
    }
}

/* Into how many parts `differentiate` splits the queries for the gradients of keys and values. */
int64_t count_parts(const struct problem *p, int64_t threads) {
    const struct sizes n = sizes_of(p, threads);
    return smaller((p->queries + n.queries - 1) / n.queries, wanted_shares(p, threads));
}

/* Floats of scratch memory that `differentiate` needs. */
int64_t differentiate_floats(const struct problem *p, int64_t threads) { return threads * sizes_of(p, threads).own; }
