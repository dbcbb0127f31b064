/* Products of float32 rows with matrices in panels: so many outputs stand side by side for each input.

   A panel is read in the order in which it lies, and no sum goes across a vector. Weights are GGUF's Q4_0, Q4_1 or Q8_0,
   bfloat16, or float32 as oneDNN packs it: [outputs / packed, inputs, packed]. In the first four a panel has PANEL outputs,
   the last one perhaps fewer, and goes block by block of 32 inputs: PANEL scales (float16), PANEL minima (Q4_1), then for
   each input PANEL codes. Of 4 bits, byte n holds the codes of outputs n and n + PANEL / 2.

   Every result is summed in the order of the inputs, so a row of activations gives the same bits whichever other rows
   share the call, and however many. */

#include "vectors.h"

enum { Q4_0, Q4_1, Q8_0, BFLOAT16, FLOAT32 };
enum { BLOCK = 32, PANEL = 64, PANEL_VECTORS = PANEL / LANES };
enum { AHEAD_BLOCKS = 2 };

/* More rows than these find a panel expanded; a register's width decides how much that costs. */
enum { FEW_ROWS = LANES == 16 ? 10 : TILE_ROWS };

/* As Python fills it: numbers of 64 bits. */
typedef struct {
    int64_t kind, address, outputs, inputs, packed;
} matrix;

INLINE int code_bytes(int kind) { return kind < Q8_0 ? PANEL / 2 : kind == Q8_0 ? PANEL : 2 * PANEL; }

INLINE int factor_bytes(int kind) { return 2 * PANEL * (kind == Q4_1 ? 2 : kind == BFLOAT16 ? 0 : 1); }

INLINE int block_bytes(int kind) { return factor_bytes(kind) + BLOCK * code_bytes(kind); }

/* ---- weights as floats; compilers do not find these instructions by themselves ---- */

/* `halves`: LANES numbers of 16 bits. `codes`: vector `v` of one input's codes. */

#ifdef __AVX512F__

INLINE floats halves(const uint8_t *at) { return (floats)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)at)); }

INLINE floats codes(int kind, const uint8_t *at, int v) {
    if (kind < Q8_0) {
        /* The numbers that a code may stand for; four bits of each lane choose one, the others do not count. */
        const floats count = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
        __m512i pairs = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(at + 16 * (v & 1))));
        return (floats)_mm512_permutexvar_ps(v < 2 ? pairs : _mm512_srli_epi32(pairs, 4), (__m512)count);
    }
    if (kind == Q8_0)
        return (floats)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(at + 16 * v))));
    __m256i upper = _mm256_loadu_si256((const __m256i *)(at + 32 * v));
    return (floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32(upper), 16);
}

#elif defined(__AVX2__)

INLINE floats halves(const uint8_t *at) { return (floats)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)at)); }

INLINE floats codes(int kind, const uint8_t *at, int v) {
    if (kind < Q8_0) {
        __m256i pairs = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(at + 8 * (v & 3))));
        __m256i chosen = v < 4 ? _mm256_and_si256(pairs, _mm256_set1_epi32(15)) : _mm256_srli_epi32(pairs, 4);
        return (floats)_mm256_cvtepi32_ps(chosen);
    }
    if (kind == Q8_0)
        return (floats)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(at + 8 * v))));
    __m128i upper = _mm_loadu_si128((const __m128i *)(at + 16 * v));
    return (floats)_mm256_slli_epi32(_mm256_cvtepu16_epi32(upper), 16);
}

#else

INLINE floats halves(const uint8_t *at) {
    floats out;
    for (int lane = 0; lane < LANES; lane++) {
        _Float16 value;
        memcpy(&value, at + 2 * lane, sizeof value);
        out[lane] = (float)value;
    }
    return out;
}

INLINE floats codes(int kind, const uint8_t *at, int v) {
    floats out;
    for (int lane = 0; lane < LANES; lane++) {
        int n = LANES * v + lane;
        if (kind < Q8_0) out[lane] = n < PANEL / 2 ? at[n] & 15 : at[n - PANEL / 2] >> 4;
        if (kind == Q8_0) out[lane] = (int8_t)at[n];
        if (kind == BFLOAT16) {
            uint32_t bits = ((uint32_t)at[2 * n] << 16) | ((uint32_t)at[2 * n + 1] << 24);
            float value;
            memcpy(&value, &bits, sizeof value);
            out[lane] = value;
        }
    }
    return out;
}

#endif

typedef struct {
    floats scale, shift;
} factor;

/* Of vector `v` of a block. */
INLINE factor factors(int kind, const uint8_t *block, int v) {
    if (kind == BFLOAT16) return (factor){all(1), all(0)};
    floats scale = halves(block + 2 * LANES * v);
    return (factor){scale, kind == Q4_1   ? halves(block + 2 * PANEL + 2 * LANES * v)
                           : kind == Q4_0 ? scale * -8.0f
                                          : all(0)};
}

INLINE floats weights(int kind, const uint8_t *at, int v, factor by) {
    floats found = codes(kind, at, v);
    return kind == BFLOAT16 ? found : kind == Q8_0 ? found * by.scale : fused(found, by.scale, by.shift);
}

/* ---- products ---- */

/* out[count, TILE_VECTORS * LANES] = rows[count, inner] @ a panel's outputs from vector `from` on. */
INLINE void packed_tile(int kind, int count, int from, const uint8_t *panel, int64_t blocks, const float *rows,
                        int64_t apart, float *out, int64_t stride) {
    floats sums[TILE_ROWS][TILE_VECTORS] = {0};
    for (int64_t b = 0; b < blocks; b++, panel += block_bytes(kind), rows += BLOCK) {
        factor by[TILE_VECTORS];
        for (int at = 0; at < block_bytes(kind); at += LINE) fetch(panel + AHEAD_BLOCKS * block_bytes(kind) + at);
        for (int v = 0; v < TILE_VECTORS; v++) by[v] = factors(kind, panel, from + v);
        const uint8_t *at = panel + factor_bytes(kind);
        for (int k = 0; k < BLOCK; k++, at += code_bytes(kind)) {
            floats column[TILE_VECTORS];
            for (int v = 0; v < TILE_VECTORS; v++) column[v] = weights(kind, at, from + v, by[v]);
            for (int m = 0; m < count; m++) {
                floats row = all(rows[m * apart + k]);
                for (int v = 0; v < TILE_VECTORS; v++) sums[m][v] = fused(column[v], row, sums[m][v]);
            }
        }
    }
    for (int m = 0; m < count; m++)
        for (int v = 0; v < TILE_VECTORS; v++) store(out + m * stride + v * LANES, sums[m][v]);
}

/* out[blocks * BLOCK, PANEL], the numbers that `packed_tile` multiplies with. */
INLINE void expand_panel(int kind, const uint8_t *panel, int64_t blocks, float *out) {
    for (int64_t b = 0; b < blocks; b++, panel += block_bytes(kind)) {
        factor by[PANEL_VECTORS];
        for (int v = 0; v < PANEL_VECTORS; v++) by[v] = factors(kind, panel, v);
        const uint8_t *at = panel + factor_bytes(kind);
        for (int k = 0; k < BLOCK; k++, at += code_bytes(kind))
            for (int v = 0; v < PANEL_VECTORS; v++, out += LANES) store(out, weights(kind, at, v, by[v]));
    }
}

/* As `product` below for one panel and whole tiles of results. */
INLINE void panel_product(int kind, const uint8_t *panel, int64_t blocks, const float *rows, int64_t count, float *scratch,
                          float *out, int64_t stride) {
    int64_t inputs = blocks * BLOCK, expanded = count > FEW_ROWS;
    const float *next = (const float *)(panel + blocks * block_bytes(kind)), *end = next + blocks * block_bytes(kind) / sizeof *next;
    if (expanded) expand_panel(kind, panel, blocks, scratch);
    for (int64_t done = 0; done < count;) {
        int many = rows_of_tile(count - done);
        const float *from = rows + done * inputs;
        float *to = out + done * stride;
        if (expanded) {
            /* meanwhile the next panel comes, a line for each input; past the end of all it does nothing */
            if (next < end) multiply(many, 0, 1, next, from, inputs, scratch, inputs, PANEL, PANEL, to, stride);
            else multiply(many, 0, NOTHING, next, from, inputs, scratch, inputs, PANEL, PANEL, to, stride);
            next += inputs * LINE_FLOATS;
        } else
            for (int v = 0; v < PANEL_VECTORS; v += TILE_VECTORS) {
#define PACKED(known) \
    if (known <= TILE_ROWS) packed_tile(kind, known, v, panel, blocks, from, inputs, to + v * LANES, stride)
                FOR_ROWS(many, PACKED)
            }
        done += many;
    }
}

INLINE void all_panels(int kind, const uint8_t *panels, int64_t outputs, int64_t blocks, const float *rows, int64_t count,
                       float *scratch, float *edge, float *out, int64_t stride) {
    for (int64_t n = 0; n < outputs; n += PANEL, panels += blocks * block_bytes(kind)) {
        int64_t used = smaller(outputs - n, PANEL);
        if (used == PANEL) {
            panel_product(kind, panels, blocks, rows, count, scratch, out + n, stride);
            continue;
        }
        panel_product(kind, panels, blocks, rows, count, scratch, edge, PANEL);
        for (int64_t m = 0; m < count; m++) memcpy(out + m * stride + n, edge + m * PANEL, used * sizeof *out);
    }
}

#define FOR_KIND(call) \
    switch (kind) { \
        case Q4_0: call(Q4_0); break; \
        case Q4_1: call(Q4_1); break; \
        case Q8_0: call(Q8_0); break; \
        default: call(BFLOAT16); \
    }

INLINE int64_t expanded_floats(int64_t inputs, int64_t count) { return count > FEW_ROWS ? PANEL * inputs : 0; }

/* Floats that `blocks_product` needs at `scratch`, which begins with a line. */
INLINE int64_t scratch_floats(int64_t outputs, int64_t inputs, int64_t count) {
    return expanded_floats(inputs, count) + (outputs % PANEL ? PANEL * count : 0);
}

/* out[count, outputs] = rows[count, blocks * 32] @ matrix.T; rows of `out` are `stride` floats apart. */
static void blocks_product(int kind, const uint8_t *panels, int64_t outputs, int64_t blocks, const float *rows, int64_t count,
                           float *scratch, float *out, int64_t stride) {
    float *edge = scratch + expanded_floats(blocks * BLOCK, count);
#define PRODUCT(known) all_panels(known, panels, outputs, blocks, rows, count, scratch, edge, out, stride)
    FOR_KIND(PRODUCT)
}

/* As above. Returns 0, or -1 without memory for scratch. */
int product(int kind, const uint8_t *panels, int64_t outputs, int64_t blocks, const float *rows, int64_t count, float *out,
            int64_t stride) {
    int64_t size = scratch_floats(outputs, blocks * BLOCK, count);
    float *scratch = size ? aligned_alloc(LINE, (size + LINE_FLOATS) / LINE_FLOATS * LINE) : NULL;
    if (size && scratch == NULL) return -1;
    blocks_product(kind, panels, outputs, blocks, rows, count, scratch, out, stride);
    free(scratch);
    return 0;
}

/* As `blocks_product`, for float32 in oneDNN's layout; `packed` is a multiple of LANES and divides the outputs. A cache
   holds a panel of weights from one tile of rows to the next, and each tile fetches its share of the next panel: memory
   and arithmetic take about as long as each other from eight rows on, and would take turns otherwise. */
static void packed_product(const float *weights_at, int64_t packed, int64_t outputs, int64_t inputs, const float *rows,
                           int64_t count, float *out, int64_t stride) {
    int64_t tiles = (count + TILE_ROWS - 1) / TILE_ROWS;
    for (int64_t n = 0; n < outputs; n += packed, weights_at += packed * inputs) {
        const float *next = weights_at + packed * inputs;
        int64_t lines = n + packed < outputs ? packed / LINE_FLOATS : 0, fetched = 0, done = 0;
        for (int64_t t = 1; t <= tiles; t++) {
            int64_t now = tiles == 1 ? ITSELF : lines * t / tiles - fetched;
            int many = rows_of_tile(count - done);
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

/* out[count, blocks * 32, PANEL]: the weights of `count` panels. */
void expand(int kind, const uint8_t *panels, int64_t count, int64_t blocks, float *out) {
    for (int64_t n = 0; n < count; n++, out += blocks * BLOCK * PANEL)
#define EXPAND(known) expand_panel(known, panels + n * blocks * block_bytes(known), blocks, out)
        FOR_KIND(EXPAND)
}
