/* Attention of a few new rows for each of many sessions, against the sessions' own caches, all in float32.

   A cache is blocks of positions, [layers, 2 (keys, values), kv_heads, block, row]; a row is head_dim floats, or
   head_dim signed bytes and the float that they are multiples of. The new rows' keys and values are written there
   first, and a row attends to what was written. Its result does not depend on which other rows share the call. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __AVX2__
#include <immintrin.h>
#endif

typedef float floats __attribute__((vector_size(32)));
typedef int32_t ints __attribute__((vector_size(32)));
typedef int8_t codes __attribute__((vector_size(8)));

enum { LANES = 8, MOST_GROUP = 16, LINE = 64 };

#define INLINE static inline __attribute__((always_inline))

INLINE floats load(const float *at) {
    floats value;
    memcpy(&value, at, sizeof value);
    return value;
}

INLINE void store(float *at, floats value) { memcpy(at, &value, sizeof value); }

INLINE floats all(float x) { return (floats){x, x, x, x, x, x, x, x}; }

INLINE float total(floats v) {
    return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
}

/* e to the power of x <= 0: 2^n times a polynomial in what is left (Cody and Waite's reduction) */
INLINE floats exponential(floats x) {
    ints small = x < all(-87.0f);
    x = (floats)((small & (ints)all(-87.0f)) | (~small & (ints)x));
    floats shifted = x * all(1.44269504f) + all(12582912.0f), n = shifted - all(12582912.0f);
    floats r = x - n * all(0.693359375f) + n * all(2.12194440e-4f);
    floats p = all(1.9875691500e-4f);
    p = p * r + all(1.3981999507e-3f);
    p = p * r + all(8.3334519073e-3f);
    p = p * r + all(4.1665795894e-2f);
    p = p * r + all(1.6666665459e-1f);
    p = p * r + all(5.0000001201e-1f);
    p = p * r * r + r + all(1.0f);
    ints power = (((ints)shifted - (ints)all(12582912.0f)) + 127) << 23;
    return p * (floats)power;
}

/* scores in place -> weights; returns what they sum to */
INLINE float soften(float *scores, int64_t count) {
    float most = scores[0];
    for (int64_t i = 1; i < count; i++) most = scores[i] > most ? scores[i] : most;
    floats sum = all(0.0f);
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) {
        floats weights = exponential(load(scores + i) - all(most));
        store(scores + i, weights);
        sum += weights;
    }
    float result = total(sum);
    if (i < count) {
        float rest[LANES];
        for (int64_t j = 0; j < LANES; j++) rest[j] = i + j < count ? scores[i + j] - most : 0.0f;
        store(rest, exponential(load(rest)));
        for (int64_t j = 0; i + j < count; j++) result += scores[i + j] = rest[j];
    }
    return result;
}

/* Numbers at `at` of a row in int8, to be multiplied by its scale. */
INLINE floats load_codes(const int8_t *at) {
#ifdef __AVX2__ /* which compilers don't find by themselves */
    return (floats)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)at)));
#else
    codes value;
    memcpy(&value, at, sizeof value);
    return __builtin_convertvector(value, floats);
#endif
}

INLINE float scale_of(const char *row, int64_t dim) {
    float scale;
    memcpy(&scale, row + dim, sizeof scale);
    return scale;
}

INLINE void put(char *row, const float *numbers, int64_t dim, int coded) {
    if (!coded) {
        memcpy(row, numbers, sizeof(float) * (size_t)dim);
        return;
    }
    float most = 0.0f;
    for (int64_t d = 0; d < dim; d++) most = fabsf(numbers[d]) > most ? fabsf(numbers[d]) : most;
    float scale = most / 127.0f, divisor = scale > 0.0f ? scale : 1.0f;
    for (int64_t d = 0; d < dim; d++) ((int8_t *)row)[d] = (int8_t)rintf(numbers[d] / divisor);
    memcpy(row + dim, &scale, sizeof scale);
}

/* Where a session's keys and values are: for a layer and kv head, keys `at` this offset of each block, values
   `values` further on. */
typedef struct {
    const int64_t *blocks;
    int64_t block, at, values, row, coded;
} Rows;

INLINE char *block_of(const Rows *rows, int64_t index) { return (char *)(uintptr_t)rows->blocks[index] + rows->at; }

/* The bytes at `at` of block `index` + 1, if that has positions before `end`: no hardware looks ahead into another block. */
INLINE const char *ahead(const Rows *rows, int64_t index, int64_t end, const char *at) {
    int64_t there = (index + 1) * rows->block < end;
    return (const char *)(uintptr_t)(rows->blocks[index + there] + (at - (const char *)(uintptr_t)rows->blocks[index]));
}

INLINE floats numbers_at(const char *row, int64_t d, int coded) {
    return coded ? load_codes((const int8_t *)row + d) : load((const float *)row + d);
}

/* The query heads of one kv head: `group` of them, `q_head` floats apart, over positions first .. end - 1; scores have
   room for group * (end - first). */
INLINE void attend_group(const float *queries, int64_t q_head, int64_t group, const Rows *rows, int64_t first,
                         int64_t end, int64_t dim, float scale, float *scores, float *out, int coded) {
    int64_t count = end - first, block = rows->block, row = rows->row;
    for (int64_t from = first; from < end;) {
        int64_t index = from / block, until = (index + 1) * block < end ? (index + 1) * block : end;
        const char *key = block_of(rows, index) + (from - index * block) * row;
        const char *next = ahead(rows, index, end, key);
        for (int64_t k = from - first; k < until - first; k++, key += row, next += row) {
            for (int64_t line = 0; line < row; line += LINE) __builtin_prefetch(next + line);
            float factor = coded ? scale * scale_of(key, dim) : scale;
            for (int64_t g = 0; g < group; g++) {
                floats sum = all(0.0f), other = all(0.0f);
                const float *query = queries + g * q_head;
                int64_t d = 0;
                for (; d + 2 * LANES <= dim; d += 2 * LANES) {
                    sum += load(query + d) * numbers_at(key, d, coded);
                    other += load(query + d + LANES) * numbers_at(key, d + LANES, coded);
                }
                if (d < dim) sum += load(query + d) * numbers_at(key, d, coded);
                scores[g * count + k] = factor * total(sum + other);
            }
        }
        from = until;
    }
    float inverse[MOST_GROUP];
    for (int64_t g = 0; g < group; g++) inverse[g] = 1.0f / soften(scores + g * count, count);
    for (int64_t i = 0; i < group * dim; i++) out[i] = 0.0f;
    for (int64_t from = first; from < end;) { /* a block's values stay in the nearest cache for all of their numbers */
        int64_t index = from / block, until = (index + 1) * block < end ? (index + 1) * block : end;
        const char *values = block_of(rows, index) + rows->values + (from - index * block) * row, *value = values;
        if (coded)
            for (int64_t k = from - first; k < until - first; k++, value += row)
                for (int64_t g = 0; g < group; g++) scores[g * count + k] *= scale_of(value, dim);
        const char *following = ahead(rows, index, end, values);
        for (int64_t d = 0; d < dim; d += LANES) {
            floats sums[MOST_GROUP];
            for (int64_t g = 0; g < group; g++) sums[g] = load(out + g * dim + d);
            value = values;
            const char *next = following + d * row / dim;
            for (int64_t k = from - first; k < until - first; k++, value += row, next += row) {
                if (d % (LINE / 4) == 0) __builtin_prefetch(next);
                floats numbers = numbers_at(value, d, coded);
                for (int64_t g = 0; g < group; g++) sums[g] += all(scores[g * count + k]) * numbers;
            }
            for (int64_t g = 0; g < group; g++) store(out + g * dim + d, sums[g]);
        }
        from = until;
    }
    for (int64_t g = 0; g < group; g++)
        for (int64_t d = 0; d < dim; d += LANES) store(out + g * dim + d, load(out + g * dim + d) * all(inverse[g]));
}

/* For usual sizes the compiler keeps a group's sums in registers. */
static void attend_rows(const float *queries, int64_t q_head, int64_t group, const Rows *rows, int64_t first,
                        int64_t end, int64_t dim, float scale, float *scores, float *out) {
#define WITH(group, coded) attend_group(queries, q_head, group, rows, first, end, dim, scale, scores, out, coded)
    switch (2 * group + (rows->coded != 0)) {
    case 2: WITH(1, 0); return;
    case 3: WITH(1, 1); return;
    case 4: WITH(2, 0); return;
    case 5: WITH(2, 1); return;
    case 6: WITH(3, 0); return;
    case 7: WITH(3, 1); return;
    case 8: WITH(4, 0); return;
    case 9: WITH(4, 1); return;
    }
    if (rows->coded) WITH(group, 1);
    else WITH(group, 0);
#undef WITH
}

enum { BLOCKS, BLOCK, CODED, LAYER, START, COUNT, OFFSET, RECORD };

/* spans: a record for each session: where the addresses of its blocks are, the positions in a block, whether rows are
   in int8, the cache's first layer, the session's first new position, how many new rows there are, and which row of the
   batch is the first of them. A row sees itself and the positions before it, window of them in all if that is not 0.
   Strides are in floats; out is [rows, heads, dim]. 1: there is no memory. */
int attend(const int64_t *spans, int64_t sessions, int64_t layer, int64_t window, int64_t heads, int64_t kv_heads,
           int64_t dim, float scale, const float *queries, int64_t q_head, int64_t q_row, const float *keys,
           int64_t k_head, int64_t k_row, const float *values, int64_t v_head, int64_t v_row, float *out) {
    int64_t longest = 0, group = heads / kv_heads;
    for (int64_t s = 0; s < sessions; s++) {
        int64_t end = spans[RECORD * s + START] + spans[RECORD * s + COUNT];
        longest = end > longest ? end : longest;
    }
    float *scores = malloc(sizeof(float) * (size_t)(group * longest));
    if (!scores) return 1;
    for (int64_t s = 0; s < sessions; s++) {
        const int64_t *span = spans + RECORD * s;
        int64_t start = span[START], offset = span[OFFSET], block = span[BLOCK], coded = span[CODED];
        int64_t row = coded ? dim + (int64_t)sizeof(float) : dim * (int64_t)sizeof(float), head = block * row;
        int64_t at = (layer - span[LAYER]) * 2 * kv_heads * head;
        for (int64_t h = 0; h < kv_heads; h++) {
            Rows rows = {(const int64_t *)(uintptr_t)span[BLOCKS], block, at + h * head, kv_heads * head, row, coded};
            for (int64_t r = 0; r < span[COUNT]; r++) {
                int64_t position = start + r;
                char *place = block_of(&rows, position / block) + position % block * row;
                put(place, keys + h * k_head + (offset + r) * k_row, dim, coded != 0);
                put(place + rows.values, values + h * v_head + (offset + r) * v_row, dim, coded != 0);
            }
            for (int64_t r = 0; r < span[COUNT]; r++) {
                int64_t end = start + r + 1, first = window && end > window ? end - window : 0;
                attend_rows(queries + h * group * q_head + (offset + r) * q_row, q_head, group, &rows, first, end, dim,
                            scale, scores, out + ((offset + r) * heads + h * group) * dim);
            }
        }
    }
    free(scores);
    return 0;
}
