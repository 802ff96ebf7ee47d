/* Attention of few queries under several rotary base angles: keys and values are read once.

   Blocks of LANES keys are transposed, one key in each lane, and rotated by their places in the block; queries are
   rotated by their distance to its first key, and from there on block by block. So keys need LANES rows of the table of
   rotations, and queries one more per piece.

   Softmax runs in every lane of a piece of the keys on its own. What makes one of them are factors of the exponentials,
   by which these are mixed before their product with the values. */

#include "kernels.h"

#define PIECE 128    /* keys of a share of the work; a multiple of LANES */
#define MOST_ROWS 4  /* that are scored together */
#define MOST_PARTS 4 /* vectors of a value that are added up together */

/* One query under one expert that it picked. */
struct row {
    int32_t head, expert; /* the head within its group */
    float gate;
};

/* What the threads share. */
struct work {
    int64_t pieces, most_rows;
    struct row *rows; /* [G][group * N], of each key-value head in the order of their experts */
    int64_t *count;   /* [G], how many there are */
    float *queries;   /* [H][D], ordered by pairs, times the scaling */
    float *cos, *sin; /* [N or 2 N][P][LANES], of the places in a block */
    float *scores;    /* [G][pieces][rows][PIECE], later their exponentials */
    float *top;       /* [G][pieces][rows][LANES], their maxima, later the factors of the exponentials */
    float *total;     /* [G][pieces][rows][LANES], the sums of the exponentials */
    float *rotated;   /* [threads][rows][2 P], a thread's queries for the block at hand */
    float *sums;      /* [threads][H][Dv] */
};

/* The most rows that a key-value head has with one query of each of its heads. */
static int64_t most_rows(const struct problem *p) {
    int64_t most = 0;
    for (int64_t b = 0; b < p->batch; b++)
        for (int64_t s = 0; s < p->queries; s++)
            for (int64_t g = 0; g < p->kv_heads; g++) {
                int64_t count = 0;
                for (int64_t head = g * p->group; head < (g + 1) * p->group; head++)
                    for (int64_t j = 0; j < p->experts; j++)
                        count += p->gates[gates_at(p, b, head, s) + j] != 0.0f;
                most = count > most ? count : most;
            }
    return most;
}

/* How many rotations the table has. */
static inline int64_t rotations(const struct problem *p) { return p->far_from ? 2 * p->experts : p->experts; }

/* Lays the work out in `memory`, which may be NULL; returns its size in floats. */
static int64_t lay_out(const struct problem *p, int64_t threads, struct work *w, float *memory) {
    const int64_t heads = p->kv_heads * p->group, first = (int64_t)memory;
    w->pieces = (p->keys + PIECE - 1) / PIECE;
    w->most_rows = most_rows(p);
    const int64_t rows = p->kv_heads * w->pieces * w->most_rows;
    w->count = (int64_t *)take(&memory, 2 * p->kv_heads);
    w->rows = (struct row *)take(&memory, 3 * heads * p->experts);
    w->queries = take(&memory, heads * p->head_dim);
    w->cos = take(&memory, rotations(p) * p->pairs * LANES);
    w->sin = take(&memory, rotations(p) * p->pairs * LANES);
    w->scores = take(&memory, rows * PIECE);
    w->top = take(&memory, rows * LANES);
    w->total = take(&memory, rows * LANES);
    w->rotated = take(&memory, threads * w->most_rows * 2 * p->pairs);
    w->sums = take(&memory, threads * heads * p->value_dim);
    return ((int64_t)memory - first) / (int64_t)sizeof(float);
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
#define UPPER(j, h) ((j) & (h) ? LANES + (j) - (h) : (j))
#define LOWER(j, h) ((j) & (h) ? LANES + (j) : (j) + (h))
/* One step of transposing the square `x` [LANES]: exchange rows and lanes at the distance `h`. */
#define EXCHANGE(x, h)                                                                                                \
    for (int i = 0; i < LANES; i++)                                                                                   \
        if (!(i & (h))) {                                                                                             \
            vec a = x[i], b = x[i + (h)];                                                                             \
            x[i] = SHUFFLE(a, b, EACH(UPPER, h));                                                                     \
            x[i + (h)] = SHUFFLE(a, b, EACH(LOWER, h));                                                               \
        }

/* columns[size][LANES] = the numbers of LANES rows. */
static void transpose(const float *const *rows, int64_t size, float *restrict columns) {
    int64_t d = 0;
    for (; d + LANES <= size; d += LANES) {
        vec x[LANES];
        for (int u = 0; u < LANES; u++)
            x[u] = *(const vec *)(rows[u] + d);
        EXCHANGE(x, 1)
        EXCHANGE(x, 2)
#if LANES > 4
        EXCHANGE(x, 4)
#endif
#if LANES > 8
        EXCHANGE(x, 8)
#endif
        for (int i = 0; i < LANES; i++)
            *(vec *)(columns + (d + i) * LANES) = x[i];
    }
    for (; d < size; d++)
        for (int u = 0; u < LANES; u++)
            columns[d * LANES + u] = rows[u][d];
}

/* The table's rows for the places in a block. */
static void prepare_tables(const struct problem *p, const struct work *w) {
    for (int64_t j = 0; j < rotations(p); j++) {
        const float *cos[LANES], *sin[LANES];
        for (int u = 0; u < LANES; u++) {
            cos[u] = p->cos + j * p->table_stride + u * p->pairs;
            sin[u] = p->sin + j * p->table_stride + u * p->pairs;
        }
        transpose(cos, p->pairs, w->cos + j * p->pairs * LANES);
        transpose(sin, p->pairs, w->sin + j * p->pairs * LANES);
    }
}

/* The rows and queries of one token. */
static void prepare_token(const struct problem *p, const struct work *w, int64_t b, int64_t s) {
    for (int64_t g = 0; g < p->kv_heads; g++) {
        struct row *row = w->rows + g * p->group * p->experts, *first = row;
        for (int64_t j = 0; j < p->experts; j++)
            for (int64_t head = 0; head < p->group; head++) {
                float gate = p->gates[gates_at(p, b, g * p->group + head, s) + j];
                if (gate != 0.0f)
                    *row++ = (struct row){(int32_t)head, (int32_t)j, gate};
            }
        w->count[g] = row - first;
    }
    for (int64_t head = 0; head < p->kv_heads * p->group; head++) {
        float buffer[MAX_HEAD_DIM], *query = w->queries + head * p->head_dim;
        const float *x = ordered_at(p, p->query, query_at(p, b, head, s), buffer);
        for (int64_t d = 0; d < p->head_dim; d++)
            query[d] = x[d] * p->scaling;
    }
}

/* Rotate a query to an expert's angles at a distance from its key, which may be negative, and scale it; without what
   does not rotate. */
static inline void rotate_query(const struct problem *p, int64_t expert, int is_far, int64_t distance,
                                const float *restrict query, float *restrict rotated) {
    const int64_t pairs = p->pairs, turn = is_far ? p->experts + expert : expert;
    distance -= is_far ? p->far_from[expert] : 0;
    const int64_t at = turn * p->table_stride + (distance < 0 ? -distance : distance) * pairs;
    const float *restrict cos = p->cos + at, *restrict sin = p->sin + at, sign = distance < 0 ? -1.0f : 1.0f;
    for (int64_t i = 0; i < pairs; i++) {
        rotated[i] = query[i] * cos[i] - query[pairs + i] * (sign * sin[i]);
        rotated[pairs + i] = query[pairs + i] * cos[i] + query[i] * (sign * sin[i]);
    }
    if (p->factors)
        for (int64_t i = 0; i < 2 * pairs; i++)
            rotated[i] *= factor_of(p, expert, is_far);
}

/* The side of the block of keys at `t` for a query at `position`. */
static inline enum side side_at(const struct problem *p, int64_t expert, int64_t position, int64_t t) {
    return side_of(p, expert, position, position + 1, t, t + LANES - 1);
}

/* Bring a rotated query from its distance to one block to that to the next. */
static inline void rotate_on(const struct problem *p, int64_t turn, float *restrict rotated) {
    const int64_t pairs = p->pairs, at = turn * p->table_stride + LANES * pairs;
    const float *restrict cos = p->cos + at, *restrict sin = p->sin + at;
    float *restrict other = rotated + pairs;
    for (int64_t i = 0; i < pairs; i++) {
        const float x = rotated[i], y = other[i];
        rotated[i] = x * cos[i] + y * sin[i];
        other[i] = y * cos[i] - x * sin[i];
    }
}

/* scores[count][PIECE] = products of rotated queries [count][2 P] with a block of keys that are rotated by their
   places. */
static inline __attribute__((always_inline)) void
score_rows(int count, int64_t pairs, const float *restrict keys, const float *restrict cos, const float *restrict sin,
           const float *restrict queries, float *restrict scores) {
    vec low[MOST_ROWS], high[MOST_ROWS];
    for (int r = 0; r < count; r++)
        low[r] = high[r] = splat(0.0f);
    for (int64_t i = 0; i < pairs; i++) {
        const vec c = *(const vec *)(cos + i * LANES), x = *(const vec *)(keys + i * LANES);
        const vec s = *(const vec *)(sin + i * LANES), y = *(const vec *)(keys + (pairs + i) * LANES);
        const vec first = x * c - y * s, second = y * c + x * s;
        for (int r = 0; r < count; r++) {
            low[r] += first * splat(queries[r * 2 * pairs + i]);
            high[r] += second * splat(queries[(r * 2 + 1) * pairs + i]);
        }
    }
    for (int r = 0; r < count; r++)
        *(vec *)(scores + r * PIECE) = low[r] + high[r];
}

/* The same for `count` rows of one rotation, `turn`. */
static inline void score_group(const struct problem *p, const struct work *w, int64_t turn, int64_t count,
                               const float *columns, const float *rotated, float *scores) {
    const float *cos = w->cos + turn * p->pairs * LANES, *sin = w->sin + turn * p->pairs * LANES;
    if (count == 1)
        score_rows(1, p->pairs, columns, cos, sin, rotated, scores);
    else if (count == 2)
        score_rows(2, p->pairs, columns, cos, sin, rotated, scores);
    else if (count == 3)
        score_rows(3, p->pairs, columns, cos, sin, rotated, scores);
    else
        score_rows(4, p->pairs, columns, cos, sin, rotated, scores);
}

/* Where an expert's keys become far within the block at `t`: put the scores of far keys, of `count` rows, in place of
   those that were made as for near ones. */
static void score_border(const struct problem *p, const struct work *w, const struct row *rows, int64_t count,
                         int64_t position, int64_t t, const float *columns, const float *queries, float *scores) {
    const int64_t expert = rows->expert, far = position - p->far_from[expert] + 1 - t;
    float rotated[MOST_ROWS * MAX_HEAD_DIM], found[MOST_ROWS * PIECE];
    for (int64_t r = 0; r < count; r++)
        rotate_query(p, expert, 1, position - t, queries + rows[r].head * p->head_dim, rotated + r * 2 * p->pairs);
    score_group(p, w, p->experts + expert, count, columns, rotated, found);
    for (int64_t r = 0; r < count; r++)
        for (int64_t u = 0; u < far; u++)
            scores[r * PIECE + u] = found[r * PIECE + u];
}

/* Scores [rows][PIECE] of a key-value head's rows for the keys `start` to `end - 1`. */
static void score_piece(const struct problem *p, const struct work *w, int64_t b, int64_t g, int64_t position,
                        int64_t start, int64_t end, float *restrict rotated, float *restrict scores) {
    const int64_t pairs = p->pairs, count = w->count[g];
    const struct row *rows = w->rows + g * p->group * p->experts;
    const float *queries = w->queries + g * p->group * p->head_dim;
    float buffer[LANES][MAX_HEAD_DIM], columns[MAX_HEAD_DIM * LANES];
    for (int64_t t = start; t < end; t += LANES, scores += LANES) {
        const float *keys[LANES];
        for (int u = 0; u < LANES; u++) /* behind the last key, that again; nobody reads those scores */
            keys[u] = ordered_at(p, p->key, key_at(p, b, g, smaller(t + u, end - 1)), buffer[u]);
        transpose(keys, p->head_dim, columns);
        /* All before the first is read, because what was just written in vectors is slow to read as numbers. */
        for (int64_t r = 0; r < count; r++) {
            const int64_t expert = rows[r].expert;
            const int is_far = side_at(p, expert, position, t) == FAR;
            if (t == start || is_far != (side_at(p, expert, position, t - LANES) == FAR))
                rotate_query(p, expert, is_far, position - t, queries + rows[r].head * p->head_dim,
                             rotated + r * 2 * pairs);
            else
                rotate_on(p, is_far ? p->experts + expert : expert, rotated + r * 2 * pairs);
        }
        for (int64_t r = 0, next; r < count; r = next) {
            const int64_t expert = rows[r].expert;
            for (next = r + 1; next < count && next < r + MOST_ROWS && rows[next].expert == expert; next++)
                ;
            const enum side side = side_at(p, expert, position, t);
            score_group(p, w, side == FAR ? p->experts + expert : expert, next - r, columns, rotated + r * 2 * pairs,
                        scores + r * PIECE);
            if (side == BORDER)
                score_border(p, w, rows + r, next - r, position, t, columns, queries, scores + r * PIECE);
        }
        for (int64_t r = 0; 2 * pairs < p->head_dim && r < count; r++) {
            vec *score = (vec *)(scores + r * PIECE);
            for (int64_t d = 2 * pairs; d < p->head_dim; d++)
                *score += *(const vec *)(columns + d * LANES) * splat(queries[rows[r].head * p->head_dim + d]);
        }
    }
}

/* Turn a row's scores for the keys `start` to `end - 1` into exponentials less the maximum of their lane. */
static void exponentiate(float *restrict scores, int64_t count, float *restrict top, float *restrict total) {
    for (int64_t t = count; t < round_up(count, LANES); t++)
        scores[t] = -INFINITY;
    vec largest = splat(-INFINITY), sum = splat(0.0f);
    for (int64_t t = 0; t < count; t += LANES)
        largest = larger(*(const vec *)(scores + t), largest);
    const vec shift = shift_of(largest);
    for (int64_t t = 0; t < count; t += LANES) {
        vec *score = (vec *)(scores + t);
        *score = exponential(*score - shift);
        sum += *score;
    }
    *(vec *)top = largest;
    *(vec *)total = sum;
}

/* The first part of a share of the work: exponentials of a piece of the keys. */
static void meet_piece(const struct problem *p, const struct work *w, int64_t b, int64_t g, int64_t s, int64_t piece,
                       int64_t end, float *rotated) {
    const int64_t start = piece * PIECE, at = (g * w->pieces + piece) * w->most_rows;
    const struct row *rows = w->rows + g * p->group * p->experts;
    float *scores = w->scores + at * PIECE, bias[PIECE];
    score_piece(p, w, b, g, p->query_start + s, start, end, rotated, scores);
    for (int64_t r = 0; r < w->count[g]; r++) {
        float *own = scores + r * PIECE;
        if (p->mask) {
            read_mask(p, b, g * p->group + rows[r].head, s, start, end - start, bias, 1);
            for (int64_t t = 0; t < end - start; t++)
                own[t] += bias[t];
        }
        exponentiate(own, end - start, w->top + (at + r) * LANES, w->total + (at + r) * LANES);
    }
}

/* Put the factors of a row's exponentials in place of their maxima: its gate over the sum of all, or 0 where it sees
   nothing. */
static void weigh(const struct work *w, int64_t g, int64_t r, float gate, int64_t pieces) {
    vec largest = splat(-INFINITY), sum = splat(0.0f);
    const int64_t first = g * w->pieces * w->most_rows + r;
    for (int64_t i = 0; i < pieces; i++)
        largest = larger(*(const vec *)(w->top + (first + i * w->most_rows) * LANES), largest);
    float highest = largest[0], total = 0.0f;
    for (int l = 1; l < LANES; l++)
        highest = largest[l] > highest ? largest[l] : highest;
    const vec shift = shift_of(splat(highest));
    for (int64_t i = 0; i < pieces; i++) {
        const int64_t at = (first + i * w->most_rows) * LANES;
        vec *top = (vec *)(w->top + at);
        *top = exponential(*top - shift);
        sum += *top * *(const vec *)(w->total + at);
    }
    for (int l = 0; l < LANES; l++)
        total += sum[l];
    for (int64_t i = 0; i < pieces; i++)
        *(vec *)(w->top + (first + i * w->most_rows) * LANES) *= splat(total == 0.0f ? 0.0f : gate / total);
}

/* sums[heads][parts * LANES] += weights[heads][PIECE] times the values of `count` keys. */
static inline __attribute__((always_inline)) void add_values(int heads, int parts, const float *const *values,
                                                             int64_t d, int64_t count, const float *restrict weights,
                                                             float *restrict sums, int64_t step) {
    vec total[2][MOST_PARTS];
    for (int h = 0; h < heads; h++)
        for (int i = 0; i < parts; i++)
            total[h][i] = splat(0.0f);
    for (int64_t t = 0; t < count; t++)
        for (int h = 0; h < heads; h++)
            for (int i = 0; i < parts; i++)
                total[h][i] += splat(weights[h * PIECE + t]) * *(const vec *)(values[t] + d + i * LANES);
    for (int h = 0; h < heads; h++)
        for (int i = 0; i < parts; i++)
            *(vec *)(sums + h * step + d + i * LANES) += total[h][i];
}

/* The second part: mix the exponentials of a piece, and add its values to a thread's sums [H][Dv]. */
static void add_piece(const struct problem *p, const struct work *w, int64_t b, int64_t g, int64_t piece, int64_t end,
                      float *restrict sums) {
    const int64_t start = piece * PIECE, count = end - start, size = p->value_dim;
    const int64_t at = (g * w->pieces + piece) * w->most_rows;
    const struct row *rows = w->rows + g * p->group * p->experts;
    float buffer[PIECE][MAX_HEAD_DIM], mixed[2][PIECE];
    const float *values[PIECE];
    for (int64_t t = 0; t < count; t++)
        values[t] = floats_at(p, p->value, value_at(p, b, g, start + t), size, buffer[t]);
    for (int64_t head = 0; head < p->group; head += 2) {
        const int64_t heads = smaller(2, p->group - head);
        memset(mixed, 0, sizeof mixed);
        for (int64_t r = 0; r < w->count[g]; r++) {
            if (rows[r].head < head || rows[r].head >= head + 2)
                continue;
            const vec factor = *(const vec *)(w->top + (at + r) * LANES);
            float *own = mixed[rows[r].head - head];
            for (int64_t t = 0; t < count; t += LANES)
                *(vec *)(own + t) += factor * *(const vec *)(w->scores + (at + r) * PIECE + t);
        }
        float *own = sums + (g * p->group + head) * size;
        int64_t d = 0;
        for (; d + MOST_PARTS * LANES <= size; d += MOST_PARTS * LANES)
            if (heads == 2)
                add_values(2, MOST_PARTS, values, d, count, mixed[0], own, size);
            else
                add_values(1, MOST_PARTS, values, d, count, mixed[0], own, size);
        for (; d + LANES <= size; d += LANES)
            if (heads == 2)
                add_values(2, 1, values, d, count, mixed[0], own, size);
            else
                add_values(1, 1, values, d, count, mixed[0], own, size);
        for (; d < size; d++)
            for (int64_t h = 0; h < heads; h++) {
                float part = 0.0f;
                for (int64_t t = 0; t < count; t++)
                    part += mixed[h][t] * values[t][d];
                own[h * size + d] += part;
            }
    }
}

/* Output of all queries, one after the other. */
void decode(const struct problem *p, int64_t threads) {
    const int64_t heads = p->kv_heads * p->group;
    struct work w;
    lay_out(p, threads, &w, p->scratch);
    prepare_tables(p, &w);
#pragma omp parallel num_threads(threads)
    {
        const int64_t thread = thread_number();
        int64_t team = 1;
#ifdef _OPENMP
        team = omp_get_num_threads();
#endif
        float *own = w.sums + thread * heads * p->value_dim;
        float *rotated = w.rotated + thread * w.most_rows * 2 * p->pairs;
        for (int64_t b = 0; b < p->batch; b++)
            for (int64_t s = 0; s < p->queries; s++) {
                const int64_t keys = p->is_causal ? p->query_start + s + 1 : p->keys;
                const int64_t pieces = (keys + PIECE - 1) / PIECE;
#pragma omp single
                prepare_token(p, &w, b, s);
#pragma omp for schedule(static) collapse(2)
                for (int64_t g = 0; g < p->kv_heads; g++)
                    for (int64_t i = 0; i < pieces; i++)
                        meet_piece(p, &w, b, g, s, i, smaller((i + 1) * PIECE, keys), rotated);
#pragma omp for schedule(static) collapse(2)
                for (int64_t g = 0; g < p->kv_heads; g++)
                    for (int64_t r = 0; r < w.most_rows; r++)
                        if (r < w.count[g])
                            weigh(&w, g, r, w.rows[g * p->group * p->experts + r].gate, pieces);
                memset(own, 0, heads * p->value_dim * sizeof(float));
#pragma omp for schedule(static) collapse(2)
                for (int64_t g = 0; g < p->kv_heads; g++)
                    for (int64_t i = 0; i < pieces; i++)
                        add_piece(p, &w, b, g, i, smaller((i + 1) * PIECE, keys), own);
#pragma omp single
                for (int64_t i = 0; i < heads * p->value_dim; i++) {
                    float total = 0.0f;
                    for (int64_t n = 0; n < team; n++)
                        total += w.sums[n * heads * p->value_dim + i];
                    p->output[output_at(p, b, 0, s) + i] = total;
                }
            }
    }
}

/* Floats of scratch memory that `decode` needs. */
int64_t decode_floats(const struct problem *p, int64_t threads) {
    struct work w;
    return lay_out(p, threads, &w, NULL);
}
