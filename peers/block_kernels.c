/* Products of float32 rows with matrices that stay as they are stored, and all of a decoder layer around them.

   A matrix is in GGUF's Q4_0, Q4_1 or Q8_0, in plain bfloat16, or in float32 as oneDNN packs it. In the first four, rows
   of outputs follow each other, each with its scales (float16) first, then its minima (Q4_1), then the codes of its
   blocks of 32 neighbouring weights. In the last, `packed` outputs stand side by side: [outputs / packed, inputs, packed].

   Weights are expanded in registers. Each result is summed in an order that depends on the matrix's shape alone, so a row
   of activations gives the same bits whichever other rows share the call. */

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifdef __AVX512F__
enum { LANES = 16, ROWS_TOGETHER = 8, PACKED_ROWS = 6 }; /* 32 registers */
#else
enum { LANES = 8, ROWS_TOGETHER = 4, PACKED_ROWS = 3 };
#endif

typedef float floats __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));

enum { Q4_0, Q4_1, Q8_0, BFLOAT16, FLOAT32 };
enum { BLOCK = 32, PIECES = BLOCK / LANES, OUTPUTS_TOGETHER = 2, PACKED_VECTORS = 4 };
enum { MOST_THREADS = 16, PATIENCE = 2000 };
enum { MANY_ROWS = 32, PACKED = 64, PIECE = 4 }; /* from so many rows on it pays to expand a matrix */
enum { LINE = 64, AHEAD = 2, AHEAD_ROWS = 16, CACHED_BYTES = 40 * 1024 }; /* of activations: all outputs read them again and again */

#define INLINE static inline __attribute__((always_inline))

/* As Python fills it: numbers of 64 bits. */
typedef struct {
    int64_t kind, address, outputs, inputs, packed;
} matrix;

INLINE int code_bytes(int kind) { return kind < Q8_0 ? 16 : kind == Q8_0 ? 32 : 64; }

/* float16 numbers in front of a row's codes, for each block */
INLINE int halves(int kind) { return kind == Q4_1 ? 2 : kind == BFLOAT16 ? 0 : 1; }

INLINE int64_t row_bytes(int kind, int64_t blocks) { return blocks * (2 * halves(kind) + code_bytes(kind)); }

INLINE floats load(const float *at) {
    floats value;
    memcpy(&value, at, sizeof value);
    return value;
}

INLINE void store(float *at, floats value) { memcpy(at, &value, sizeof value); }

INLINE floats all(float x) { return x - (floats){0}; }

/* ---- weights as floats; compilers do not find these instructions by themselves ---- */

/* `weights`: LANES * piece and on of a block, scale * code + shift. */

#ifdef __AVX2__

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

#ifdef __AVX512F__

INLINE float total(floats v) { return _mm512_reduce_add_ps((__m512)v); }

INLINE floats weights(int kind, const uint8_t *codes, int piece, float scale, float shift) {
    if (kind < Q8_0) {
        /* The sixteen numbers that a code may stand for; four bits of each lane choose one, the others do not count. */
        const floats count = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
        __m512i pairs = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)codes));
        return (floats)_mm512_permutexvar_ps(piece ? _mm512_srli_epi32(pairs, 4) : pairs, (__m512)(count * scale + shift));
    }
    if (kind == Q8_0) {
        __m128i bytes = _mm_loadu_si128((const __m128i *)(codes + 16 * piece));
        return (floats)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes)) * scale;
    }
    __m256i upper = _mm256_loadu_si256((const __m256i *)(codes + 32 * piece));
    return (floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32(upper), 16);
}

#else

INLINE float total(floats v) {
    return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
}

INLINE floats weights(int kind, const uint8_t *codes, int piece, float scale, float shift) {
    if (kind < Q8_0) {
        __m256i pairs = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(codes + 8 * (piece & 1))));
        __m256i chosen = piece < 2 ? _mm256_and_si256(pairs, _mm256_set1_epi32(15)) : _mm256_srli_epi32(pairs, 4);
        return (floats)_mm256_cvtepi32_ps(chosen) * scale + shift;
    }
    if (kind == Q8_0) {
        __m128i bytes = _mm_loadl_epi64((const __m128i *)(codes + 8 * piece));
        return (floats)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)) * scale;
    }
    __m128i upper = _mm_loadu_si128((const __m128i *)(codes + 16 * piece));
    return (floats)_mm256_slli_epi32(_mm256_cvtepu16_epi32(upper), 16);
}

#endif
#else

INLINE float total(floats v) {
    return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
}

INLINE void from_halves(const uint8_t *from, int64_t count, float *to) {
    for (int64_t i = 0; i < count; i++) {
        _Float16 value;
        memcpy(&value, from + 2 * i, sizeof value);
        to[i] = (float)value;
    }
}

INLINE floats weights(int kind, const uint8_t *codes, int piece, float scale, float shift) {
    floats out = {0};
    for (int lane = 0; lane < LANES; lane++) {
        int i = LANES * piece + lane;
        if (kind < Q8_0) out[lane] = (i < 16 ? codes[i] & 15 : codes[i - 16] >> 4) * scale + shift;
        if (kind == Q8_0) out[lane] = (int8_t)codes[i] * scale;
        if (kind == BFLOAT16) {
            uint32_t bits = ((uint32_t)codes[2 * i] << 16) | ((uint32_t)codes[2 * i + 1] << 24);
            float value;
            memcpy(&value, &bits, sizeof value);
            out[lane] = value;
        }
    }
    return out;
}

#endif

/* Scales and shifts of a whole row, into factors[2 * blocks]. */
INLINE void read_factors(int kind, const uint8_t *row, int64_t blocks, float *factors) {
    from_halves(row, halves(kind) * blocks, factors);
    for (int64_t b = 0; kind == Q4_0 && b < blocks; b++) factors[blocks + b] = -8.0f * factors[b];
}

/* ---- products ---- */

/* `outputs` rows of the matrix times `count` rows of activations; both are constants where this is inlined. */
INLINE void dots(int kind, int outputs, int count, const uint8_t *matrix_row, int64_t blocks, const float *factors,
                 const float *rows, float *out, int64_t stride) {
    floats sums[OUTPUTS_TOGETHER][ROWS_TOGETHER] = {0};
    for (int64_t b = 0; b < blocks; b++)
        for (int piece = 0; piece < PIECES; piece++) {
            floats column[OUTPUTS_TOGETHER];
            for (int n = 0; n < outputs; n++) {
                const uint8_t *codes = matrix_row + n * row_bytes(kind, blocks) + 2 * halves(kind) * blocks;
                const float *own = factors + 2 * n * blocks;
                float scale = kind == BFLOAT16 ? 1 : own[b], shift = kind < Q8_0 ? own[blocks + b] : 0;
                column[n] = weights(kind, codes + b * code_bytes(kind), piece, scale, shift);
            }
            for (int m = 0; m < count; m++) {
                floats row = load(rows + (m * blocks + b) * BLOCK + piece * LANES);
                for (int n = 0; n < outputs; n++) sums[n][m] += column[n] * row;
            }
        }
    for (int n = 0; n < outputs; n++)
        for (int m = 0; m < count; m++) out[m * stride + n] = total(sums[n][m]);
}

#define FOR_ROWS(call) \
    switch (many) { \
        case 1: call(1); break; \
        case 2: call(2); break; \
        case 3: call(3); break; \
        case 4: call(4); break; \
        case 5: call(5); break; \
        case 6: call(6); break; \
        case 7: call(7); break; \
        default: call(8); \
    }

INLINE void all_dots(int kind, const uint8_t *rows_of_matrix, int64_t outputs, int64_t blocks, const float *rows,
                     int64_t count, float *factors, float *out, int64_t stride) {
    int64_t width = row_bytes(kind, blocks);
    for (int64_t n = 0; n < outputs; n += OUTPUTS_TOGETHER, rows_of_matrix += OUTPUTS_TOGETHER * width) {
        int two = n + 1 < outputs;
        for (int64_t at = 0; at < OUTPUTS_TOGETHER * width; at += LINE) /* of what comes next; past the end it does nothing */
            __builtin_prefetch(rows_of_matrix + AHEAD * OUTPUTS_TOGETHER * width + at);
        read_factors(kind, rows_of_matrix, blocks, factors);
        if (two) read_factors(kind, rows_of_matrix + width, blocks, factors + 2 * blocks);
        for (int64_t m = 0; m < count; m += ROWS_TOGETHER) {
            int many = (int)(count - m < ROWS_TOGETHER ? count - m : ROWS_TOGETHER);
            const float *from = rows + m * blocks * BLOCK;
            float *to = out + m * stride + n;
#define DOTS(known) \
    if (known > ROWS_TOGETHER) break; \
    if (two) dots(kind, 2, known, rows_of_matrix, blocks, factors, from, to, stride); \
    else dots(kind, 1, known, rows_of_matrix, blocks, factors, from, to, stride)
            FOR_ROWS(DOTS)
        }
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
   Returns 0, or -1 without memory for factors. */
int product(int kind, const uint8_t *rows_of_matrix, int64_t outputs, int64_t blocks, const float *rows, int64_t count,
            float *out, int64_t stride) {
    float *factors = malloc(2 * OUTPUTS_TOGETHER * blocks * sizeof *factors);
    if (factors == NULL) return -1;
    int64_t most = CACHED_BYTES / (blocks * BLOCK * sizeof *rows) / ROWS_TOGETHER * ROWS_TOGETHER;
    if (most < ROWS_TOGETHER) most = ROWS_TOGETHER;
    for (int64_t m = 0; m < count; m += most, rows += most * blocks * BLOCK, out += most * stride) {
        int64_t many = count - m < most ? count - m : most;
#define PRODUCT(known) all_dots(known, rows_of_matrix, outputs, blocks, rows, many, factors, out, stride)
        FOR_KIND(PRODUCT)
    }
    free(factors);
    return 0;
}

/* `vectors` * LANES outputs that stand side by side, for `count` rows of activations; these and `once` are constants.
   Weights that are read `once` in a pass must not push out of the caches what the next thing to run has there. */
INLINE void packed_tile(int count, int vectors, int once, const float *weights_at, int64_t inputs, int64_t packed,
                        const float *rows, float *out, int64_t stride) {
    floats sums[PACKED_ROWS][PACKED_VECTORS] = {0};
    for (int64_t k = 0; k < inputs; k++, weights_at += packed) {
        floats column[PACKED_VECTORS];
        for (int v = 0; once && v < vectors; v++) __builtin_prefetch(weights_at + AHEAD_ROWS * packed + v * LANES, 0, 0);
        for (int v = 0; v < vectors; v++) column[v] = load(weights_at + v * LANES);
        for (int m = 0; m < count; m++) {
            floats row = all(rows[m * inputs + k]);
            for (int v = 0; v < vectors; v++) sums[m][v] += column[v] * row;
        }
    }
    for (int m = 0; m < count; m++)
        for (int v = 0; v < vectors; v++) store(out + m * stride + v * LANES, sums[m][v]);
}

INLINE void packed_rows(int count, int once, const float *weights_at, int64_t inputs, int64_t packed, const float *rows, float *out,
                        int64_t stride) {
    for (int64_t v = 0; v < packed; v += PACKED_VECTORS * LANES) {
#define TILE(vectors) packed_tile(count, vectors, once, weights_at + v, inputs, packed, rows, out + v, stride)
        switch ((packed - v) / LANES) {
            case 1: TILE(1); break;
            case 2: TILE(2); break;
            case 3: TILE(3); break;
            default: TILE(4);
        }
    }
}

/* As `product`, for float32 in oneDNN's layout; `packed` is a multiple of LANES and divides the outputs. */
static void packed_product(const float *weights_at, int64_t packed, int64_t outputs, int64_t inputs, const float *rows,
                           int64_t count, float *out, int64_t stride) {
    for (int64_t n = 0; n < outputs; n += packed, weights_at += packed * inputs)
        for (int64_t m = 0; m < count; m += PACKED_ROWS) { /* a cache holds the weights from one round to the next */
            int many = (int)(count - m < PACKED_ROWS ? count - m : PACKED_ROWS);
            const float *from = rows + m * inputs;
            float *to = out + m * stride + n;
#define PACKED_DOTS(known) \
    if (known > PACKED_ROWS) break; \
    if (count == known) packed_rows(known, 1, weights_at, inputs, packed, from, to, stride); \
    else packed_rows(known, 0, weights_at, inputs, packed, from, to, stride)
            FOR_ROWS(PACKED_DOTS)
        }
}

INLINE void expand_rows(int kind, const uint8_t *rows_of_matrix, int64_t count, int64_t blocks, float *factors, float *out) {
    for (int64_t n = 0; n < count; n++, rows_of_matrix += row_bytes(kind, blocks)) {
        const uint8_t *codes = rows_of_matrix + 2 * halves(kind) * blocks;
        read_factors(kind, rows_of_matrix, blocks, factors);
        for (int64_t b = 0; b < blocks; b++, codes += code_bytes(kind))
            for (int piece = 0; piece < PIECES; piece++, out += LANES) {
                float scale = kind == BFLOAT16 ? 1 : factors[b], shift = kind < Q8_0 ? factors[blocks + b] : 0;
                store(out, weights(kind, codes, piece, scale, shift));
            }
    }
}

/* out[count, blocks * 32]: the weights of `count` rows. Returns 0, or -1 without memory for factors. */
int expand(int kind, const uint8_t *rows_of_matrix, int64_t count, int64_t blocks, float *out) {
    float *factors = malloc(2 * blocks * sizeof *factors);
    if (factors == NULL) return -1;
#define EXPAND(known) expand_rows(known, rows_of_matrix, count, blocks, factors, out)
    FOR_KIND(EXPAND)
    free(factors);
    return 0;
}

int lanes(void) { return LANES; }

/* ---- decoder layers ---- */

/* out[inputs, PACKED] = rows[PACKED, inputs] turned round: as oneDNN packs a matrix */
static void pack(const float *rows, int64_t inputs, float *out) {
    for (int64_t k = 0; k < inputs; k += PIECE)
        for (int n = 0; n < PACKED; n++)
            for (int i = 0; i < PIECE; i++) out[(k + i) * PACKED + n] = rows[n * inputs + k + i];
}


INLINE floats choose(ints where, floats yes, floats no) { return (floats)((where & (ints)yes) | (~where & (ints)no)); }

/* exp(x) to about 2e-7, by 2^n * exp(r) */
INLINE floats exponential(floats x) {
    x = choose(x < all(-87), all(-87), choose(x > all(87), all(87), x));
    floats shifted = x * 1.44269504f + 12582912.0f; /* its lowest bits are the nearest whole number */
    floats n = shifted - 12582912.0f;
    floats r = x - n * 0.693359375f + n * 2.12194440e-4f;
    floats value = all(1.9875691500e-4f);
    value = value * r + 1.3981999507e-3f;
    value = value * r + 8.3334519073e-3f;
    value = value * r + 4.1665795894e-2f;
    value = value * r + 1.6666665459e-1f;
    value = value * r + 5.0000001201e-1f;
    value = value * r * r + r + 1.0f;
    return (floats)((ints)value + ((ints)shifted << 23));
}

/* Sizes of rows are multiples of 32 here, those of heads of 2 * LANES. */
static void norm_rows(const float *rows, int64_t count, int64_t size, const float *weight, float epsilon, float *out) {
    for (int64_t m = 0; m < count; m++, rows += size, out += size) {
        floats squares = {0};
        for (int64_t i = 0; i < size; i += LANES) squares += load(rows + i) * load(rows + i);
        float scale = 1.0f / __builtin_sqrtf(total(squares) / size + epsilon);
        for (int64_t i = 0; i < size; i += LANES) store(out + i, load(rows + i) * scale * load(weight + i));
    }
}

static void add_rows(float *to, const float *rows, int64_t count) {
    for (int64_t i = 0; i < count; i += LANES) store(to + i, load(to + i) + load(rows + i));
}

/* Each half of a head is rotated into the other; sines have the sign of their half. */
static void rotate(float *head, int64_t dim, const float *cosines, const float *sines) {
    int64_t half = dim / 2;
    for (int64_t i = 0; i < half; i += LANES) {
        floats first = load(head + i), second = load(head + half + i);
        store(head + i, first * load(cosines + i) + second * load(sines + i));
        store(head + half + i, second * load(cosines + half + i) + first * load(sines + half + i));
    }
}

/* ---- threads: each has a share of every product's outputs ---- */

typedef struct {
    int threads;
    atomic_int here, round;
} meeting;

/* Returns when all threads have called it. Whoever waits for long lets others have the processor. */
static void meet(meeting *at) {
    if (at->threads == 1) return;
    int round = atomic_load(&at->round);
    if (atomic_fetch_add(&at->here, 1) + 1 == at->threads) {
        atomic_store(&at->here, 0);
        atomic_fetch_add(&at->round, 1);
        return;
    }
    for (int spins = 0; atomic_load(&at->round) == round; spins++)
        if (spins > PATIENCE) sched_yield();
}

/* As Python fills it: numbers of 64 bits; an address of 0 is of something that the layer does not have. */
typedef struct {
    matrix query_key_value, output, gate_up, down;
    int64_t input_norm, output_norm, bias, query_norm, key_norm, number, window;
} layer;

/* `put` and `attend` of attention_kernel.c */
typedef void putting(const void *spans, int64_t sessions, int64_t layer, int64_t kv_heads, int64_t dim, const float *keys,
                     int64_t k_head, int64_t k_row, const float *values, int64_t v_head, int64_t v_row);
typedef int attention(const void *spans, int64_t sessions, int64_t layer, int64_t window, int64_t heads, int64_t kv_heads,
                      int64_t dim, float scale, const float *queries, int64_t q_head, int64_t q_row, int64_t from,
                      int64_t to, float *out);

/* What all threads of one call share. */
typedef struct {
    const layer *layers;
    int64_t number, count;
    const float *cosines, *sines;
    int64_t heads, kv_heads, dim;
    float scale, epsilon;
    putting *put;
    attention *attend;
    const void *spans;
    int64_t sessions, size;
    float *mixed, *attended, *sums; /* outputs of products, complete once all threads have met */
    atomic_int failed, begun;
    meeting at;
} pass;

typedef struct {
    pass *of;
    int index;
    float *hidden, *rows; /* its own, [count, size] */
    float *piece;         /* room for two pieces of a matrix, if it is to be expanded */
    pthread_t thread;
} worker;

/* Numbers from .. to of `all`, in whole steps, are this thread's. */
INLINE int64_t share(const worker *own, int part, int64_t all, int64_t step) {
    return (all / step * (own->index + part) / own->of->at.threads) * step;
}

/* Many rows: pieces of the matrix are expanded into `own->piece`. Returns the first output that is not done. */
static int64_t times_expanded(worker *own, const matrix *of, const uint8_t *data, int64_t first, int64_t stop,
                              const float *rows, float *out) {
    int64_t blocks = of->inputs / BLOCK;
    float *packed = own->piece + PACKED * of->inputs;
    for (; first + PACKED <= stop; first += PACKED) {
        if (expand((int)of->kind, data + first * row_bytes((int)of->kind, blocks), PACKED, blocks, own->piece))
            own->of->failed = 1;
        pack(own->piece, of->inputs, packed);
        packed_product(packed, PACKED, PACKED, of->inputs, rows, own->of->count, out + first, of->outputs);
    }
    return first;
}

static void times(worker *own, const matrix *of, const float *rows, float *out) {
    int64_t step = of->kind == FLOAT32 ? of->packed : OUTPUTS_TOGETHER, count = own->of->count;
    int64_t first = share(own, 0, of->outputs, step), stop = share(own, 1, of->outputs, step);
    if (of->kind == FLOAT32) {
        const float *weights_at = (const float *)(intptr_t)of->address + first * of->inputs;
        packed_product(weights_at, of->packed, stop - first, of->inputs, rows, count, out + first, of->outputs);
        return;
    }
    int64_t blocks = of->inputs / BLOCK;
    const uint8_t *data = (const uint8_t *)(intptr_t)of->address;
    if (own->piece) first = times_expanded(own, of, data, first, stop, rows, out);
    data += first * row_bytes((int)of->kind, blocks);
    if (product((int)of->kind, data, stop - first, blocks, rows, count, out + first, of->outputs)) own->of->failed = 1;
}

#define FLOATS(address) ((const float *)(intptr_t)(address))

/* This thread's share of the rows that the first product gave: norms of heads, rotation. */
static void turn_heads(worker *own, const layer *now) {
    pass *of = own->of;
    int64_t heads = of->heads, kv_heads = of->kv_heads, dim = of->dim, mixed = now->query_key_value.outputs;
    for (int64_t m = share(own, 0, of->count, 1); m < share(own, 1, of->count, 1); m++) {
        float *head = of->mixed + m * mixed;
        if (now->bias) add_rows(head, FLOATS(now->bias), mixed);
        if (now->query_norm) {
            norm_rows(head, heads, dim, FLOATS(now->query_norm), of->epsilon, head);
            norm_rows(head + heads * dim, kv_heads, dim, FLOATS(now->key_norm), of->epsilon, head + heads * dim);
        }
        for (int64_t h = 0; h < heads + kv_heads; h++, head += dim)
            rotate(head, dim, of->cosines + m * dim, of->sines + m * dim);
    }
}

static void attend(worker *own, const layer *now) {
    pass *of = own->of;
    int64_t dim = of->dim, mixed = now->query_key_value.outputs, pieces = of->count * of->kv_heads;
    if (of->attend(of->spans, of->sessions, now->number, now->window, of->heads, of->kv_heads, dim, of->scale, of->mixed,
                   dim, mixed, share(own, 0, pieces, 1), share(own, 1, pieces, 1), of->attended))
        of->failed = 1;
}

/* silu(gate) * up, in place of this thread's share of the gates */
static void gate(worker *own, int64_t wide) {
    int64_t first = share(own, 0, wide, LANES), stop = share(own, 1, wide, LANES);
    for (int64_t m = 0; m < own->of->count; m++)
        for (int64_t i = first; i < stop; i += LANES) {
            float *at = own->of->mixed + m * 2 * wide + i;
            floats value = load(at);
            store(own->of->attended + m * wide + i, value / (1.0f + exponential(-value)) * load(at + wide));
        }
}

static void run_layer(worker *own, const layer *now) {
    pass *of = own->of;
    int64_t size = of->size, count = of->count;
    norm_rows(own->hidden, count, size, FLOATS(now->input_norm), of->epsilon, own->rows);
    times(own, &now->query_key_value, own->rows, of->mixed);
    meet(&of->at);
    turn_heads(own, now);
    meet(&of->at);
    if (own->index == 0) {
        const float *keys = of->mixed + of->heads * of->dim, *values = keys + of->kv_heads * of->dim;
        int64_t mixed = now->query_key_value.outputs;
        of->put(of->spans, of->sessions, now->number, of->kv_heads, of->dim, keys, of->dim, mixed, values, of->dim, mixed);
    }
    meet(&of->at);
    attend(own, now);
    meet(&of->at);
    times(own, &now->output, of->attended, of->sums);
    meet(&of->at);
    add_rows(own->hidden, of->sums, count * size);
    norm_rows(own->hidden, count, size, FLOATS(now->output_norm), of->epsilon, own->rows);
    times(own, &now->gate_up, own->rows, of->mixed);
    meet(&of->at);
    gate(own, now->down.inputs);
    meet(&of->at);
    times(own, &now->down, of->attended, of->sums);
    meet(&of->at);
    add_rows(own->hidden, of->sums, count * size);
}

static void *work(void *given) {
    worker *own = given;
    for (int spins = 0; !atomic_load(&own->of->begun); spins++)
        if (spins > PATIENCE) sched_yield();
    for (int64_t n = 0; n < own->of->number; n++) run_layer(own, own->of->layers + n);
    return NULL;
}

INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

/* hidden[count, size], in place, through all layers. The tables of cosines and sines are [count, dim]. With `exact` a row
   gets the same bits whatever `count` is, also from matrices in blocks. Returns 0, or -1 without memory. */
int run_layers(const layer *layers, int64_t number, int64_t count, const float *cosines, const float *sines,
               int64_t heads, int64_t kv_heads, int64_t dim, float scale, float epsilon, putting *put,
               attention *attend, const void *spans, int64_t sessions, int64_t threads, int64_t exact, float *hidden) {
    if (threads > MOST_THREADS) threads = MOST_THREADS;
    if (threads < 1) threads = 1;
    int64_t size = layers[0].output.outputs, mixed = 0, attended = 0, expanded = 0;
    for (int64_t n = 0; n < number; n++) {
        mixed = larger(mixed, larger(layers[n].query_key_value.outputs, layers[n].gate_up.outputs));
        attended = larger(attended, larger(layers[n].output.inputs, layers[n].down.inputs));
        if (count >= MANY_ROWS && !exact && layers[n].down.kind != FLOAT32) expanded = 2 * PACKED * larger(size, attended);
    }
    int64_t own = 2 * count * size + expanded;
    /* A vector that lies across two cache lines is read in twice the time; all sizes are multiples of a line. */
    float *memory = aligned_alloc(LINE, (count * (mixed + attended + size) + threads * own) * sizeof *memory);
    if (memory == NULL) return -1;
    pass all = {layers, number, count, cosines, sines, heads, kv_heads, dim, scale, epsilon, put, attend, spans, sessions,
                size, memory, memory + count * mixed, memory + count * (mixed + attended), 0, 0, {0, 0, 0}};
    worker workers[MOST_THREADS];
    float *at = all.sums + count * size;
    int64_t started = 1;
    for (int64_t t = 0; t < threads; t++, at += own) {
        workers[t] = (worker){&all, (int)t, t ? at + count * size : hidden, at, expanded ? at + 2 * count * size : NULL, 0};
        if (t) memcpy(workers[t].hidden, hidden, count * size * sizeof *hidden);
    }
    while (started < threads && !pthread_create(&workers[started].thread, NULL, work, workers + started)) started++;
    all.at.threads = (int)started; /* those that could be had */
    atomic_store(&all.begun, 1);
    work(workers);
    for (int64_t t = 1; t < started; t++) pthread_join(workers[t].thread, NULL);
    free(memory);
    return all.failed ? -1 : 0;
}
