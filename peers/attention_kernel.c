/* Attention of a few new rows for each of many sessions, against the sessions' own caches, all in float32.

   A cache holds, for each layer, keys and then values, each [kv_heads, capacity, head_dim]. The new rows' keys and
   values are written there first. A row's result does not depend on which other rows share the call. */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef float floats __attribute__((vector_size(32)));
typedef int32_t ints __attribute__((vector_size(32)));

enum { LANES = 8, MOST_GROUP = 16 };

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

/* The query heads of one kv head: `group` of them, `q_head` floats apart; scores have room for group * count. */
INLINE void attend_group(const float *queries, int64_t q_head, int64_t group, const float *keys, const float *values,
                         int64_t count, int64_t dim, float scale, float *scores, float *out) {
    for (int64_t k = 0; k < count; k++) {
        const float *key = keys + k * dim;
        for (int64_t g = 0; g < group; g++) {
            floats sum = all(0.0f), other = all(0.0f);
            const float *query = queries + g * q_head;
            int64_t d = 0;
            for (; d + 2 * LANES <= dim; d += 2 * LANES) {
                sum += load(query + d) * load(key + d);
                other += load(query + d + LANES) * load(key + d + LANES);
            }
            if (d < dim) sum += load(query + d) * load(key + d);
            scores[g * count + k] = scale * total(sum + other);
        }
    }
    float inverse[MOST_GROUP];
    for (int64_t g = 0; g < group; g++) inverse[g] = 1.0f / soften(scores + g * count, count);
    for (int64_t d = 0; d < dim; d += LANES) {
        floats sums[MOST_GROUP];
        for (int64_t g = 0; g < group; g++) sums[g] = all(0.0f);
        for (int64_t k = 0; k < count; k++) {
            floats value = load(values + k * dim + d);
            for (int64_t g = 0; g < group; g++) sums[g] += all(scores[g * count + k]) * value;
        }
        for (int64_t g = 0; g < group; g++) store(out + g * dim + d, sums[g] * all(inverse[g]));
    }
}

/* spans: for each session where layer 0 of its cache would be, the cache's capacity, its first new position, how many
   new rows there are, and which row of the batch is the first of them. A row sees itself and the positions before it,
   window of them in all if that is not 0. Strides are in floats; out is [rows, heads, dim]. 1: there is no memory. */
int attend(const int64_t *spans, int64_t sessions, int64_t layer, int64_t window, int64_t heads, int64_t kv_heads,
           int64_t dim, float scale, const float *queries, int64_t q_head, int64_t q_row, const float *keys,
           int64_t k_head, int64_t k_row, const float *values, int64_t v_head, int64_t v_row, float *out) {
    int64_t longest = 0, group = heads / kv_heads;
    for (int64_t s = 0; s < sessions; s++) {
        int64_t end = spans[5 * s + 2] + spans[5 * s + 3];
        longest = end > longest ? end : longest;
    }
    float *scores = malloc(sizeof(float) * (size_t)(group * longest));
    if (!scores) return 1;
    for (int64_t s = 0; s < sessions; s++) {
        const int64_t *span = spans + 5 * s;
        int64_t capacity = span[1], start = span[2], offset = span[4];
        float *own = (float *)(uintptr_t)span[0] + layer * 2 * kv_heads * capacity * dim;
        float *own_values = own + kv_heads * capacity * dim;
        for (int64_t r = 0; r < span[3]; r++)
            for (int64_t h = 0; h < kv_heads; h++) {
                int64_t place = (h * capacity + start + r) * dim;
                memcpy(own + place, keys + h * k_head + (offset + r) * k_row, sizeof(float) * (size_t)dim);
                memcpy(own_values + place, values + h * v_head + (offset + r) * v_row, sizeof(float) * (size_t)dim);
            }
        for (int64_t r = 0; r < span[3]; r++) {
            int64_t end = start + r + 1, first = window && end > window ? end - window : 0;
            for (int64_t h = 0; h < kv_heads; h++) {
                int64_t from = (h * capacity + first) * dim;
                attend_group(queries + h * group * q_head + (offset + r) * q_row, q_head, group, own + from,
                             own_values + from, end - first, dim, scale, scores,
                             out + ((offset + r) * heads + h * group) * dim);
            }
        }
    }
    free(scores);
    return 0;
}
