/* Attention of many queries under several rotary base angles. */

#include "panels.h"

static void attend_block(const struct problem *p, const struct sizes *n, const struct own *w, const struct panel *x,
                         int64_t count) {
    int64_t keys = round_up(count, STEP);
    accumulate(w, x, keys, x->sums, p->value_dim);
    for (int64_t d = 0; d < p->value_dim; d += STEP)
        multiply(w->values + d, 1, n->value_dim, w->scores, ROWS, keys, x->sums + d * ROWS, ROWS, 1);
}

static void finish_panel(const struct problem *p, const struct panel *x, int64_t b, int64_t g) {
    float weights[ROWS];
    weigh(p, x, b, g, weights);
    for (int64_t r = 0; r < x->count; r++) {
        float *output = p->output + output_at(p, b, g * p->group + x->rows[r].head, x->rows[r].token);
        for (int64_t d = 0; d < p->value_dim; d++)
            output[d] += weights[r] * x->sums[d * ROWS + r];
    }
}

/* The queries `token` to `end - 1` of one key-value head. */
static void attend_queries(const struct problem *p, const struct sizes *n, const struct own *w, int64_t b, int64_t g,
                           int64_t token, int64_t end) {
    for (int64_t head = g * p->group; head < (g + 1) * p->group; head++)
        for (int64_t s = token; s < end; s++)
            memset(p->output + output_at(p, b, head, s), 0, p->value_dim * sizeof(float));
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
                    attend_block(p, n, w, w->panels + i, count);
        }
        for (int64_t i = 0; i < panels; i++)
            finish_panel(p, w->panels + i, b, g);
    }
}

/* Output of all queries. */
void attend(const struct problem *p, int64_t threads) {
    const struct sizes n = sizes_of(p, threads);
    int64_t heads = p->batch * p->kv_heads, shares = (p->queries + n.queries - 1) / n.queries;
#pragma omp parallel num_threads(threads)
    {
        struct own w = lay_out(p, &n, p->scratch + thread_number() * n.own);
#pragma omp for schedule(dynamic) collapse(2)
        for (int64_t i = shares - 1; i >= 0; i--)
            for (int64_t head = 0; head < heads; head++)
                attend_queries(p, &n, &w, head / p->kv_heads, head % p->kv_heads, i * n.queries,
                               smaller((i + 1) * n.queries, p->queries));
    }
}

/* Floats of scratch memory that `attend` needs. */
int64_t attend_floats(const struct problem *p, int64_t threads) { return threads * sizes_of(p, threads).own; }
