/* Products of float32 rows with a matrix that stays in blocks: GGUF's Q4_0, Q4_1 and Q8_0, or plain bfloat16.

   A block is 32 neighbouring weights of one matrix row: a scale (float16), for Q4_1 a minimum (float16), codes. A
   row has its scales first, then its minima, then its codes. Weights are expanded in registers. Each result is summed in an order that depends on the shape of the matrix
   alone, so a row of activations gives the same bits whichever other rows share the call. */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef float floats __attribute__((vector_size(32)));

enum { Q4_0, Q4_1, Q8_0, BFLOAT16 };
enum { BLOCK = 32, TOGETHER = 4 };

#define INLINE static inline __attribute__((always_inline))

INLINE int code_bytes(int kind) { return kind < Q8_0 ? 16 : kind == Q8_0 ? 32 : 64; }

/* float16 numbers in front of a row's codes, for each block */
INLINE int halves(int kind) { return kind == Q4_1 ? 2 : kind == BFLOAT16 ? 0 : 1; }

INLINE int64_t row_bytes(int kind, int64_t blocks) { return blocks * (2 * halves(kind) + code_bytes(kind)); }

INLINE floats load(const float *at) {
    floats value;
    memcpy(&value, at, sizeof value);
    return value;
}

INLINE float total(floats v) {
    return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
}

#ifdef __AVX2__ /* compilers do not find these by themselves */

#include <immintrin.h>

INLINE void from_halves(const uint8_t *from, int64_t count, float *to) {
    int64_t i = 0;
    for (; i + 8 <= count; i += 8) _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(from + 2 * i))));
    for (; i < count; i++) {
        uint16_t bits;
        memcpy(&bits, from + 2 * i, 2);
        to[i] = _cvtsh_ss(bits);
    }
}

INLINE void from_bytes(const uint8_t *codes, floats out[4]) {
    for (int i = 0; i < 4; i++)
        out[i] = (floats)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(codes + 8 * i))));
}

INLINE void from_nibbles(const uint8_t *codes, floats out[4]) {
    __m128i pairs = _mm_loadu_si128((const __m128i *)codes), mask = _mm_set1_epi8(15);
    __m128i low = _mm_and_si128(pairs, mask), high = _mm_and_si128(_mm_srli_epi16(pairs, 4), mask);
    out[0] = (floats)_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(low));
    out[1] = (floats)_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_srli_si128(low, 8)));
    out[2] = (floats)_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(high));
    out[3] = (floats)_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_srli_si128(high, 8)));
}

INLINE void from_bfloat16(const uint8_t *codes, floats out[4]) {
    for (int i = 0; i < 4; i++) {
        __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(codes + 16 * i)));
        out[i] = (floats)_mm256_slli_epi32(wide, 16);
    }
}

#else

INLINE void from_halves(const uint8_t *from, int64_t count, float *to) {
    for (int64_t i = 0; i < count; i++) {
        _Float16 value;
        memcpy(&value, from + 2 * i, sizeof value);
        to[i] = (float)value;
    }
}

INLINE void from_bytes(const uint8_t *codes, floats out[4]) {
    for (int i = 0; i < BLOCK; i++) out[i / 8][i % 8] = (int8_t)codes[i];
}

INLINE void from_nibbles(const uint8_t *codes, floats out[4]) {
    for (int i = 0; i < BLOCK / 2; i++) {
        out[i / 8][i % 8] = codes[i] & 15;
        out[2 + i / 8][i % 8] = codes[i] >> 4;
    }
}

INLINE void from_bfloat16(const uint8_t *codes, floats out[4]) {
    for (int i = 0; i < BLOCK; i++) {
        uint32_t bits = ((uint32_t)codes[2 * i] << 16) | ((uint32_t)codes[2 * i + 1] << 24);
        float value;
        memcpy(&value, &bits, sizeof value);
        out[i / 8][i % 8] = value;
    }
}

#endif

/* weight = scale * code + shift: the numbers of a whole row, into factors[2 * blocks] */
INLINE void read_factors(int kind, const uint8_t *row, int64_t blocks, float *factors) {
    from_halves(row, halves(kind) * blocks, factors);
    for (int64_t b = 0; kind == Q4_0 && b < blocks; b++) factors[blocks + b] = -8.0f * factors[b];
}

INLINE void decode(int kind, const uint8_t *from, floats codes[4]) {
    if (kind < Q8_0) from_nibbles(from, codes);
    if (kind == Q8_0) from_bytes(from, codes);
    if (kind == BFLOAT16) from_bfloat16(from, codes);
}

/* One matrix row times `count` rows of activations. */
INLINE void dot(int kind, int count, const uint8_t *codes_at, const float *factors, int64_t blocks, const float *rows,
                const float *sums, float *out, int64_t stride) {
    floats scaled[TOGETHER] = {0};
    for (int64_t b = 0; b < blocks; b++, codes_at += code_bytes(kind)) {
        floats codes[4];
        decode(kind, codes_at, codes);
        for (int i = 0; i < count; i++) {
            const float *at = rows + (i * blocks + b) * BLOCK;
            floats part = codes[0] * load(at);
            part += codes[1] * load(at + 8);
            part += codes[2] * load(at + 16);
            part += codes[3] * load(at + 24);
            scaled[i] += kind == BFLOAT16 ? part : part * factors[b];
        }
    }
    for (int i = 0; i < count; i++) {
        floats shifted = {0};
        float rest = 0;
        int64_t b = 0;
        for (; kind < Q8_0 && b + 8 <= blocks; b += 8) shifted += load(sums + i * blocks + b) * load(factors + blocks + b);
        for (; kind < Q8_0 && b < blocks; b++) rest += sums[i * blocks + b] * factors[blocks + b];
        out[i * stride] = total(scaled[i] + shifted) + rest;
    }
}

INLINE void all_dots(int kind, const uint8_t *matrix, int64_t outputs, int64_t blocks, const float *rows,
                     const float *sums, float *factors, int64_t count, float *out, int64_t stride) {
    for (int64_t n = 0; n < outputs; n++, matrix += row_bytes(kind, blocks), out++) {
        const uint8_t *codes = matrix + 2 * halves(kind) * blocks;
        int64_t i = 0;
        read_factors(kind, matrix, blocks, factors);
        for (; i + TOGETHER <= count; i += TOGETHER)
            dot(kind, TOGETHER, codes, factors, blocks, rows + i * blocks * BLOCK, sums + i * blocks, out + i * stride, stride);
        for (; i < count; i++)
            dot(kind, 1, codes, factors, blocks, rows + i * blocks * BLOCK, sums + i * blocks, out + i * stride, stride);
    }
}

#define FOR_KIND(call) \
    switch (kind) { \
        case Q4_0: call(Q4_0); break; \
        case Q4_1: call(Q4_1); break; \
        case Q8_0: call(Q8_0); break; \
        default: call(BFLOAT16); \
    }

/* out[count, outputs] = rows[count, blocks * 32] @ matrix[outputs, blocks].T; rows of `out` are `stride` floats apart.
   Returns 0, or -1 without memory for sums and factors. */
int product(int kind, const uint8_t *matrix, int64_t outputs, int64_t blocks, const float *rows, int64_t count,
            float *out, int64_t stride) {
    float *sums = malloc((count + 2) * blocks * sizeof *sums), *factors = sums + count * blocks;
    if (sums == NULL) return -1;
    for (int64_t b = 0; b < count * blocks; b++) {
        const float *at = rows + b * BLOCK;
        sums[b] = total((load(at) + load(at + 8)) + (load(at + 16) + load(at + 24)));
    }
#define PRODUCT(kind) all_dots(kind, matrix, outputs, blocks, rows, sums, factors, count, out, stride)
    FOR_KIND(PRODUCT)
    free(sums);
    return 0;
}

INLINE void expand_rows(int kind, const uint8_t *matrix, int64_t count, int64_t blocks, float *factors, float *out) {
    for (int64_t n = 0; n < count; n++, matrix += row_bytes(kind, blocks)) {
        read_factors(kind, matrix, blocks, factors);
        for (int64_t b = 0; b < blocks; b++, out += BLOCK) {
            floats codes[4];
            decode(kind, matrix + 2 * halves(kind) * blocks + b * code_bytes(kind), codes);
            for (int i = 0; i < 4; i++) {
                floats values = codes[i];
                if (kind != BFLOAT16) values *= factors[b];
                if (kind < Q8_0) values += factors[blocks + b];
                memcpy(out + 8 * i, &values, sizeof values);
            }
        }
    }
}

/* out[count, blocks * 32]: the weights of `count` rows. Returns 0, or -1 without memory for factors. */
int expand(int kind, const uint8_t *matrix, int64_t count, int64_t blocks, float *out) {
    float *factors = malloc(2 * blocks * sizeof *factors);
    if (factors == NULL) return -1;
#define EXPAND(kind) expand_rows(kind, matrix, count, blocks, factors, out)
    FOR_KIND(EXPAND)
    free(factors);
    return 0;
}

/* ---- what lies around the products of a decoder layer ---- */

typedef int32_t ints __attribute__((vector_size(32)));

INLINE void store(float *at, floats value) { memcpy(at, &value, sizeof value); }

INLINE floats choose(ints where, floats yes, floats no) { return (floats)((where & (ints)yes) | (~where & (ints)no)); }

/* exp(x) to about 2e-7, by 2^n * exp(r) */
INLINE floats exponential(floats x) {
    const floats low = {-87, -87, -87, -87, -87, -87, -87, -87}, high = -low, zero = {0};
    x = choose(x < low, low, choose(x > high, high, x));
    floats shifted = x * 1.44269504f + 12582912.0f; /* its lowest bits are the nearest whole number */
    floats n = shifted - 12582912.0f;
    floats r = x - n * 0.693359375f + n * 2.12194440e-4f;
    floats value = zero + 1.9875691500e-4f;
    value = value * r + 1.3981999507e-3f;
    value = value * r + 8.3334519073e-3f;
    value = value * r + 4.1665795894e-2f;
    value = value * r + 1.6666665459e-1f;
    value = value * r + 5.0000001201e-1f;
    value = value * r * r + r + 1.0f;
    return (floats)((ints)value + ((ints)shifted << 23));
}

/* Sizes of rows are multiples of 32 here, those of heads of 16. */
static void norm_rows(const float *rows, int64_t count, int64_t size, const float *weight, float epsilon, float *out) {
    for (int64_t m = 0; m < count; m++, rows += size, out += size) {
        floats squares = {0};
        for (int64_t i = 0; i < size; i += 8) squares += load(rows + i) * load(rows + i);
        float scale = 1.0f / __builtin_sqrtf(total(squares) / size + epsilon);
        for (int64_t i = 0; i < size; i += 8) store(out + i, load(rows + i) * scale * load(weight + i));
    }
}

static void add_rows(float *to, const float *rows, int64_t count) {
    for (int64_t i = 0; i < count; i += 8) store(to + i, load(to + i) + load(rows + i));
}

/* A matrix as four numbers: kind, address, outputs, blocks. */
static int times(const int64_t matrix[4], const float *rows, int64_t count, float *out) {
    const uint8_t *data = (const uint8_t *)(intptr_t)matrix[1];
    return product((int)matrix[0], data, matrix[2], matrix[3], rows, count, out, matrix[2]);
}

/* out[count, outputs] = norm(hidden) @ matrix.T, in which the first `heads` heads are rotated by the tables
   [count, head_dim]; sines have the sign of their half. */
int project(const int64_t matrix[4], const float *hidden, int64_t count, const float *weight, float epsilon,
            const float *cosines, const float *sines, int64_t heads, int64_t head_dim, float *out) {
    int64_t size = matrix[3] * BLOCK, half = head_dim / 2;
    float *rows = malloc(count * size * sizeof *rows);
    if (rows == NULL) return -1;
    norm_rows(hidden, count, size, weight, epsilon, rows);
    int failed = times(matrix, rows, count, out);
    free(rows);
    if (failed) return -1;
    for (int64_t m = 0; m < count; m++, cosines += head_dim, sines += head_dim)
        for (int64_t h = 0; h < heads; h++) {
            float *head = out + m * matrix[2] + h * head_dim;
            for (int64_t i = 0; i < half; i += 8) {
                floats first = load(head + i), second = load(head + half + i);
                store(head + i, first * load(cosines + i) + second * load(sines + i));
                store(head + half + i, second * load(cosines + half + i) + first * load(sines + half + i));
            }
        }
    return 0;
}

/* hidden[count, size] += attended @ output.T, and then += down(silu(gate) * up) of norm(hidden). */
int finish(const int64_t output[4], const int64_t gate_up[4], const int64_t down[4], const float *attended,
           int64_t count, const float *weight, float epsilon, float *hidden) {
    int64_t size = output[2], wide = gate_up[2] / 2;
    float *rows = malloc(count * (size + 2 * wide) * sizeof *rows), *wider = rows + count * size;
    if (rows == NULL) return -1;
    int failed = times(output, attended, count, rows);
    add_rows(hidden, rows, count * size);
    norm_rows(hidden, count, size, weight, epsilon, rows);
    failed |= times(gate_up, rows, count, wider);
    for (int64_t m = 0; m < count; m++)
        for (int64_t i = 0; i < wide; i += 8) {
            const float *at = wider + m * 2 * wide + i;
            floats gate = load(at), gated = gate / (1.0f + exponential(-gate)) * load(at + wide);
            store(wider + m * wide + i, gated); /* never before what is still to be read */
        }
    failed |= times(down, wider, count, rows);
    add_rows(hidden, rows, count * size);
    free(rows);
    return failed;
}
