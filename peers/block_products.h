/* Products of float32 rows with matrices that stay as they are stored.

   A matrix is in GGUF's Q4_0, Q4_1 or Q8_0, in plain bfloat16, or in float32 as oneDNN packs it. In the first four, rows
   of outputs follow each other, each with its scales (float16) first, then its minima (Q4_1), then the codes of its
   blocks of 32 neighbouring weights. In the last, `packed` outputs stand side by side: [outputs / packed, inputs,
   packed].

   Weights are expanded in registers. Each result is summed in an order that depends on the matrix's shape alone, so a row
   of activations gives the same bits whichever other rows share the call. */

#include "vectors.h"

#ifdef __AVX512F__
enum { ROWS_TOGETHER = 8 };
#else
enum { ROWS_TOGETHER = 4 };
#endif

enum { Q4_0, Q4_1, Q8_0, BFLOAT16, FLOAT32 };
enum { BLOCK = 32, PIECES = BLOCK / LANES, OUTPUTS_TOGETHER = 2 };
enum { AHEAD = 2, CACHED_BYTES = 40 * 1024 }; /* of activations: all outputs read them again and again */

/* As Python fills it: numbers of 64 bits. */
typedef struct {
    int64_t kind, address, outputs, inputs, packed;
} matrix;

INLINE int code_bytes(int kind) { return kind < Q8_0 ? 16 : kind == Q8_0 ? 32 : 64; }

/* float16 numbers in front of a row's codes, for each block */
INLINE int halves(int kind) { return kind == Q4_1 ? 2 : kind == BFLOAT16 ? 0 : 1; }

INLINE int64_t row_bytes(int kind, int64_t blocks) { return blocks * (2 * halves(kind) + code_bytes(kind)); }

/* ---- weights as floats; compilers do not find these instructions by themselves ---- */

/* `weights`: LANES * piece and on of a block, scale * code + shift. */

#ifdef __AVX2__

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
            int many = (int)smaller(count - m, ROWS_TOGETHER);
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
    int64_t fitting = CACHED_BYTES / (blocks * BLOCK * sizeof *rows) / ROWS_TOGETHER * ROWS_TOGETHER;
    int64_t most = larger(fitting, ROWS_TOGETHER);
    for (int64_t m = 0; m < count; m += most, rows += most * blocks * BLOCK, out += most * stride) {
        int64_t many = smaller(count - m, most);
#define PRODUCT(known) all_dots(known, rows_of_matrix, outputs, blocks, rows, many, factors, out, stride)
        FOR_KIND(PRODUCT)
    }
    free(factors);
    return 0;
}

/* As `product`, for float32 in oneDNN's layout; `packed` is a multiple of LANES and divides the outputs. A cache holds a
   panel of weights from one tile of rows to the next, and each tile fetches its share of the next panel: memory and
   arithmetic take about as long as each other from eight rows on, and would take turns otherwise. */
static void packed_product(const float *weights_at, int64_t packed, int64_t outputs, int64_t inputs, const float *rows,
                           int64_t count, float *out, int64_t stride) {
    int64_t tiles = (count + TILE_ROWS - 1) / TILE_ROWS;
    for (int64_t n = 0; n < outputs; n += packed, weights_at += packed * inputs) {
        const float *next = weights_at + packed * inputs;
        int64_t lines = n + packed < outputs ? packed / LINE_FLOATS : 0, fetched = 0, done = 0;
        for (int64_t t = 1; t <= tiles; t++) {
            int64_t now = tiles == 1 ? ITSELF : lines * t / tiles - fetched;
            int many = (int)((count - done) / (tiles - t + 1));
#define FETCHING(known) \
    multiply(many, 0, known, next + fetched * LINE_FLOATS * inputs, rows + done * inputs, inputs, weights_at, inputs, packed, \
             packed, out + done * stride + n, stride)
            switch (now) {
                case ITSELF: FETCHING(ITSELF); break;
                case NOTHING: FETCHING(NOTHING); break;
                case 1: FETCHING(1); break;
                default: FETCHING(2); /* a few lines of unusually wide panels are left */
            }
            fetched += now, done += many;
        }
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
