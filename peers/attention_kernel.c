/* Attention of new rows, of many sessions, against the sessions' own caches, all computed in float32.

   A cache is blocks of positions, [layers, 2 (keys, values), kv_heads, block, row]; a row is head_dim numbers of float32 or
   bfloat16, or head_dim signed bytes and the float that they are multiples of. Keys in numbers are [head_dim, block], as
   the products with queries want them. `put` writes the new rows' keys and values there, and then `attend` reads what was
   written: blocks of keys against tiles of queries, as in FlashAttention (Dao et al., 2022).
   What a row gives depends on nothing but its session, to the last bit: neither on which rows share the call, nor on
   those with which it came. */

#include <math.h>

#include "vectors.h"

typedef int8_t codes __attribute__((vector_size(LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES)));
typedef float four __attribute__((vector_size(16)));

#ifdef __clang__
#define PICK(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
typedef int32_t of_four __attribute__((vector_size(16)));
#define PICK(a, b, ...) __builtin_shuffle(a, b, (of_four){__VA_ARGS__})
#endif

/* ---- caches ---- */

/* How rows are kept */
enum { FLOAT32, INT8, BFLOAT16 };

/* A session's new rows; numbers as Python fills them. */
typedef struct {
    int64_t blocks; /* where the addresses of its cache's blocks are */
    int64_t block;  /* positions in one */
    int64_t kind;
    int64_t layer;  /* the first that the cache has */
    int64_t start, count; /* positions of the new rows */
    int64_t offset; /* which row of the batch is the first of them */
} span;

/* Where a layer and kv head have their rows: keys `at` this offset of each block, values `values` further on. */
typedef struct {
    const int64_t *blocks;
    int64_t block, at, values, row, kind;
} Rows;

INLINE Rows rows_of(const span *of, int64_t layer, int64_t kv_heads, int64_t h, int64_t dim) {
    int64_t row = of->kind == INT8 ? dim + 4 : dim * (of->kind == BFLOAT16 ? 2 : 4), head = of->block * row;
    int64_t at = ((layer - of->layer) * 2 * kv_heads + h) * head;
    return (Rows){(const int64_t *)(uintptr_t)of->blocks, of->block, at, kv_heads * head, row, of->kind};
}

INLINE char *block_of(const Rows *rows, int64_t index) { return (char *)(uintptr_t)rows->blocks[index] + rows->at; }

static void put_codes(char *row, const float *numbers, int64_t dim) {
    float most = 0.0f;
    for (int64_t d = 0; d < dim; d++) most = fabsf(numbers[d]) > most ? fabsf(numbers[d]) : most;
    float scale = most / 127.0f, divisor = scale > 0.0f ? scale : 1.0f;
    for (int64_t d = 0; d < dim; d++) ((int8_t *)row)[d] = (int8_t)rintf(numbers[d] / divisor);
    memcpy(row + dim, &scale, sizeof scale);
}

/* `count` rows of `used` numbers in bfloat16, `size` of them apart, as floats */
static void widen(const char *row, int64_t count, int64_t size, int64_t used, float *out) {
    for (int64_t k = 0; k < count; k++, row += 2 * size, out += size)
        for (int64_t i = 0; i < used; i += LANES) {
#if defined __AVX512F__
            __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(row + 2 * i)));
            store(out + i, (floats)_mm512_slli_epi32(wide, 16));
#elif defined __AVX2__
            __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(row + 2 * i)));
            store(out + i, (floats)_mm256_slli_epi32(wide, 16));
#else
            halves narrow;
            memcpy(&narrow, row + 2 * i, sizeof narrow);
            store(out + i, (floats)(__builtin_convertvector(narrow, ints) << 16));
#endif
        }
}

/* `count` rows in int8 as floats */
static void decode(const Rows *rows, const char *row, int64_t count, int64_t dim, float *out) {
    for (int64_t k = 0; k < count; k++, row += rows->row) {
        float scale;
        memcpy(&scale, row + dim, sizeof scale);
        for (int64_t d = 0; d < dim; d += LANES, out += LANES) {
#if defined __AVX512F__ /* compilers don't find these by themselves */
            __m512i wide = _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(row + d)));
            floats numbers = (floats)_mm512_cvtepi32_ps(wide);
#elif defined __AVX2__
            __m256i wide = _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(row + d)));
            floats numbers = (floats)_mm256_cvtepi32_ps(wide);
#else
            codes narrow;
            memcpy(&narrow, row + d, sizeof narrow);
            floats numbers = __builtin_convertvector(narrow, floats);
#endif
            store(out, numbers * all(scale));
        }
    }
}

/* The new keys and values of all sessions, to where their caches have them. Strides are in floats. */
void put(const span *spans, int64_t sessions, int64_t layer, int64_t kv_heads, int64_t dim, const float *keys,
         int64_t k_head, int64_t k_row, const float *values, int64_t v_head, int64_t v_row) {
    for (const span *of = spans; of < spans + sessions; of++)
        for (int64_t h = 0; h < kv_heads; h++) {
            Rows rows = rows_of(of, layer, kv_heads, h, dim);
            for (int64_t r = 0; r < of->count; r++) {
                int64_t position = of->start + r, from = of->offset + r;
                char *block = block_of(&rows, position / rows.block), *row = block + position % rows.block * rows.row;
                const float *key = keys + h * k_head + from * k_row, *value = values + h * v_head + from * v_row;
                if (rows.kind == INT8) {
                    put_codes(row, key, dim);
                    put_codes(row + rows.values, value, dim);
                } else if (rows.kind == BFLOAT16) {
                    uint16_t *column = (uint16_t *)block + position % rows.block, *to = (uint16_t *)(row + rows.values);
                    for (int64_t d = 0; d < dim; d++) column[d * rows.block] = upper_half(key[d]);
                    for (int64_t d = 0; d < dim; d++) to[d] = upper_half(value[d]);
                } else {
                    float *column = (float *)block + position % rows.block;
                    for (int64_t d = 0; d < dim; d++) column[d * rows.block] = key[d];
                    memcpy(row + rows.values, value, sizeof(float) * (size_t)dim);
                }
            }
        }
}

/* ---- attention ---- */

/* Scores of a query against the first `used` positions of a block become weights, those outside low .. high - 1 nothing.
   What was summed of earlier blocks is brought to the new largest score. */
static void weigh(float *scores, int64_t used, int64_t low, int64_t high, float *most, float *sum, float *sums,
                  int64_t dim) {
    for (int64_t i = 0; i < low; i++) scores[i] = -INFINITY;
    for (int64_t i = high; i < used; i++) scores[i] = -INFINITY;
    floats top = all(*most), weights = all(0.0f);
    for (int64_t i = 0; i < used; i += LANES) top = choose(load(scores + i) > top, load(scores + i), top);
    float now = largest(top), before = *most;
    for (int64_t i = 0; i < used; i += LANES) {
        floats score = load(scores + i), weight = exponential(score - all(now));
        weight = choose(score > all(-INFINITY), weight, all(0.0f));
        store(scores + i, weight);
        weights += weight;
    }
    if (now > before) {
        float factor = exponential(all(before - now))[0];
        *most = now, *sum *= factor;
        for (int64_t d = 0; d < dim; d += LANES) store(sums + d, load(sums + d) * all(factor));
    }
    *sum += total(weights);
}

/* What does not change from one call of `attend_rows` to the next. */
typedef struct {
    int64_t layer, window, heads, kv_heads, dim;
    float scale;
    const float *queries;
    int64_t q_head, q_row;
    float *out;
} attention;

/* out[size, width] = rows[count, size] turned round, up to `used` columns; those that have no row are 0. Sizes are
   multiples of 4. */
static void turn(const float *rows, int64_t count, int64_t size, int64_t width, int64_t used, float *out) {
    int64_t whole = count / 4 * 4;
    for (int64_t k = 0; k < whole; k += 4)
        for (int64_t d = 0; d < size; d += 4) {
            four row[4], half[4];
            for (int i = 0; i < 4; i++) memcpy(row + i, rows + (k + i) * size + d, sizeof(four));
            half[0] = PICK(row[0], row[1], 0, 4, 1, 5), half[1] = PICK(row[0], row[1], 2, 6, 3, 7);
            half[2] = PICK(row[2], row[3], 0, 4, 1, 5), half[3] = PICK(row[2], row[3], 2, 6, 3, 7);
            row[0] = PICK(half[0], half[2], 0, 1, 4, 5), row[1] = PICK(half[0], half[2], 2, 3, 6, 7);
            row[2] = PICK(half[1], half[3], 0, 1, 4, 5), row[3] = PICK(half[1], half[3], 2, 3, 6, 7);
            for (int i = 0; i < 4; i++) memcpy(out + (d + i) * width + k, row + i, sizeof(four));
        }
    for (int64_t k = whole; k < used; k++)
        for (int64_t d = 0; d < size; d++) out[d * width + k] = k < count ? rows[k * size + d] : 0.0f;
}

/* Lines of the next block's keys, and then of its values, that are fetched for each row of this one's: all of them, if
   heads are of 64 numbers. No hardware looks ahead into another block. */
enum { LINES_AHEAD = 4 };

/* Rows from .. to - 1 of one session's new ones, with the queries of kv head h. The keys at `after` will be wanted next.
   1: there is no memory. */
static int attend_rows(const attention *a, const span *of, int64_t h, int64_t from, int64_t to, const char *after) {
    int64_t dim = a->dim, group = a->heads / a->kv_heads, count = (to - from) * group, block = of->block;
    int64_t expanded = of->kind != FLOAT32 ? block * dim : 0;
    int64_t numbers = count * 2 * (dim + LANES) + 2 * expanded + TILE_ROWS * block;
    float *memory = aligned_alloc(LINE, sizeof(float) * (size_t)(numbers + LINE) / LINE * LINE);
    if (!memory) return 1;
    /* queries, sums of weighted values, a block's keys and values as floats where they are not, a tile's scores */
    float *asked = memory, *sums = asked + count * dim, *turned = sums + count * dim, *plain = turned + expanded;
    float *scores = plain + expanded, *most = scores + TILE_ROWS * block, *weights = most + count;
    Rows rows = rows_of(of, a->layer, a->kv_heads, h, dim);
    for (int64_t m = 0; m < count; m++) {
        const float *query = a->queries + (h * group + m % group) * a->q_head + (of->offset + from + m / group) * a->q_row;
        for (int64_t d = 0; d < dim; d++) asked[m * dim + d] = a->scale * query[d], sums[m * dim + d] = 0.0f;
        most[m] = -INFINITY, weights[m] = 0.0f;
    }
    int64_t start = of->start + from, end = of->start + to, first = a->window ? start + 1 - a->window : 0;
    for (int64_t index = (first > 0 ? first : 0) / block; index * block < end; index++) {
        int64_t base = index * block, filled = smaller(end - base, block), used = (filled + LANES - 1) / LANES * LANES;
        const char *keys = block_of(&rows, index), *values = keys + rows.values;
        const char *next = base + block < end ? block_of(&rows, index + 1) : after;
        if (rows.kind == BFLOAT16) {
            widen(keys, dim, block, used, turned);
            widen(values, filled, dim, dim, plain);
        } else if (rows.kind == INT8) {
            decode(&rows, keys, filled, dim, plain);
            turn(plain, filled, dim, block, used, turned);
            decode(&rows, values, filled, dim, plain);
        }
        const float *key_columns = expanded ? turned : (const float *)keys;
        const float *value_columns = expanded ? plain : (const float *)values;
        for (int64_t m = 0; m < count; m += TILE_ROWS) {
            int many = (int)smaller(count - m, TILE_ROWS);
            if (start + (m + many - 1) / group < base) continue;
            memset(scores, 0, sizeof(float) * (size_t)(many * block));
            multiply(SINGLE, many, 1, LINES_AHEAD, (const float *)next, LINE_FLOATS, asked + m * dim, dim, key_columns, dim,
                     block, used, scores, block);
            for (int64_t t = m; t < m + many; t++) {
                int64_t position = start + t / group - base, low = a->window ? position + 1 - a->window : 0;
                int64_t high = smaller(position + 1, filled);
                low = low > 0 ? low : 0;
                float *own = scores + (t - m) * block;
                if (low < high) weigh(own, used, low, high, most + t, weights + t, sums + t * dim, dim);
                else memset(own, 0, sizeof(float) * (size_t)used);
            }
            multiply(SINGLE, many, 1, LINES_AHEAD, (const float *)(next + rows.values), LINE_FLOATS, scores, block,
                     value_columns, filled, dim, dim, sums + m * dim, dim);
        }
    }
    for (int64_t m = 0; m < count; m++) {
        float *out = a->out + ((of->offset + from + m / group) * a->heads + h * group + m % group) * dim;
        for (int64_t d = 0; d < dim; d += LANES) store(out + d, load(sums + m * dim + d) * all(1.0f / weights[m]));
    }
    free(memory);
    return 0;
}

/* A row sees itself and the positions before it, window of them in all if that is not 0. Strides are in floats; out is
   [rows, heads, dim]. A session's rows for one kv head are as many pieces of work; those from .. to - 1 of all are done,
   so that several threads can share them. 1: there is no memory. */
int attend(const span *spans, int64_t sessions, int64_t layer, int64_t window, int64_t heads, int64_t kv_heads,
           int64_t dim, float scale, const float *queries, int64_t q_head, int64_t q_row, int64_t from, int64_t to,
           float *out) {
    attention a = {layer, window, heads, kv_heads, dim, scale, queries, q_head, q_row, out};
    int64_t before = 0;
    const span *end = spans + sessions;
    for (const span *of = spans; of < end; of++)
        for (int64_t h = 0; h < kv_heads; h++, before += of->count) {
            int64_t first = from > before ? from - before : 0, last = smaller(to - before, of->count);
            if (first >= last) continue;
            const span *following = h + 1 < kv_heads || of + 1 == end ? of : of + 1;
            Rows next = rows_of(following, layer, kv_heads, (h + 1) % kv_heads, dim);
            if (attend_rows(&a, of, h, first, last, block_of(&next, 0))) return 1;
        }
    return 0;
}
