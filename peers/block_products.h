/* Products of float32 rows with matrices in panels: so many outputs stand side by side for each input.

   A panel is read in the order in which it lies, and no sum goes across a vector. Weights are float32 or bfloat16 as oneDNN
   packs them, [outputs / packed, inputs, packed] and [outputs / packed, inputs / 2, packed, 2], or GGUF's Q4_0, Q4_1 or
   Q8_0. In those a panel has PANEL outputs and goes block by block of 32 inputs: PANEL scales (float16), PANEL minima
   (Q4_1), then for each input PANEL codes. Of 4 bits, byte n holds the codes of outputs n and n + PANEL / 2. A last panel
   may have outputs that the matrix doesn't.

   Every result is summed in the order of the inputs, with codes block by block: codes and inputs of a block first, and
   that sum is scaled. So a row of activations gives the same bits whichever other rows share the call, and however many. */

#include "vectors.h"

enum { Q4_0, Q4_1, Q8_0, BFLOAT16, FLOAT32 };
enum { BLOCK = 32, PANEL = 64, PANEL_VECTORS = PANEL / LANES };
enum { AHEAD_BYTES = 4096 };

/* As Python fills it: numbers of 64 bits. */
typedef struct {
    int64_t kind, address, outputs, inputs, packed;
} matrix;

INLINE int code_bytes(int kind) { return kind < Q8_0 ? PANEL / 2 : PANEL; }

INLINE int factor_bytes(int kind) { return 2 * PANEL * (kind == Q4_1 ? 2 : 1); }

INLINE int block_bytes(int kind) { return factor_bytes(kind) + BLOCK * code_bytes(kind); }

/* ---- weights as floats; compilers do not find these instructions by themselves ---- */

/* `halves`: LANES numbers of 16 bits. `codes`: vector `v` of one input's codes; SIGNED: those of Q4_0 less 8. */

#ifdef __AVX512F__

enum { SIGNED = 1 };

INLINE floats halves(const uint8_t *at) { return (floats)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)at)); }

INLINE floats codes(int kind, const uint8_t *at, int v) {
    if (kind < Q8_0) {
        /* The numbers that a code may stand for; four bits of each lane choose one, the others do not count. */
        const floats count = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
        const floats numbers = kind == Q4_0 ? count - 8.0f : count;
        __m512i pairs = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(at + 16 * (v & 1))));
        return (floats)_mm512_permutexvar_ps(v < 2 ? pairs : _mm512_srli_epi32(pairs, 4), (__m512)numbers);
    }
    return (floats)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(at + 16 * v))));
}

#else

enum { SIGNED = 0 };

#ifdef __AVX2__

INLINE floats halves(const uint8_t *at) { return (floats)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)at)); }

INLINE floats codes(int kind, const uint8_t *at, int v) {
    if (kind < Q8_0) {
        __m256i pairs = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(at + 8 * (v & 3))));
        __m256i chosen = v < 4 ? _mm256_and_si256(pairs, _mm256_set1_epi32(15)) : _mm256_srli_epi32(pairs, 4);
        return (floats)_mm256_cvtepi32_ps(chosen);
    }
    return (floats)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(at + 8 * v))));
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
        else out[lane] = (int8_t)at[n];
    }
    return out;
}

#endif
#endif

/* A weight is a code times `scale`, plus `shift` if its kind is `shifted`. */
typedef struct {
    floats scale, shift;
} factor;

INLINE int shifted(int kind) { return kind == Q4_1 || (kind == Q4_0 && !SIGNED); }

/* Of vector `v` of a block. */
INLINE factor factors(int kind, const uint8_t *block, int v) {
    floats scale = halves(block + 2 * LANES * v);
    return (factor){scale, kind == Q4_1 ? halves(block + 2 * PANEL + 2 * LANES * v) : scale * -8.0f};
}

INLINE floats weights(int kind, const uint8_t *at, int v, factor by) {
    floats found = codes(kind, at, v);
    return shifted(kind) ? fused(found, by.scale, by.shift) : found * by.scale;
}

/* Cases of a switch: `call` with the kind of a matrix in blocks as a number that the compiler knows. */
#define BLOCK_KINDS(call) \
    case Q4_0: call(Q4_0); break; \
    case Q4_1: call(Q4_1); break; \
    case Q8_0: call(Q8_0); break

/* ---- weights as bfloat16 ---- */

/* Two inputs' numbers as bfloat16 side by side, rounded to the nearest */
INLINE ints pairs(floats first, floats second) {
#ifdef __AVX512BF16__
    const __m512i turns = _mm512_add_epi32(_mm512_set1_epi32(16 << 16), _mm512_mullo_epi32(_mm512_set1_epi32(0x10001),
        _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)));
    return (ints)_mm512_permutexvar_epi16(turns, (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first));
#else
    ints low = (ints)first, high = (ints)second;
    low += 0x7fff + (low >> 16 & 1), high += 0x7fff + (high >> 16 & 1);
    return (low >> 16 & 0xffff) | (high & -65536);
#endif
}

/* The weights of a block as bfloat16: vector `v` of inputs 2k and 2k + 1 to `to[v]` + k * `line`. */
INLINE void round_block(int kind, const uint8_t *block, int first, int stop, uint8_t *const *to, int64_t line) {
    factor by[PANEL_VECTORS];
    for (int v = first; v < stop; v++) by[v] = factors(kind, block, v);
    const uint8_t *at = block + factor_bytes(kind);
    for (int k = 0; k < BLOCK / 2; k++, at += 2 * code_bytes(kind))
        for (int v = first; v < stop; v++) {
            ints both = pairs(weights(kind, at, v, by[v]), weights(kind, at + code_bytes(kind), v, by[v]));
            memcpy(to[v] + k * line, &both, sizeof both);
        }
}

/* The weights of a panel as bfloat16 in oneDNN's order; `packed` is a multiple of LANES and divides PANEL. */
INLINE void round_panel(int kind, const uint8_t *panel, int64_t blocks, int64_t packed, uint8_t *out) {
    uint8_t *to[PANEL_VECTORS];
    for (int v = 0, n = 0; v < PANEL_VECTORS; v++, n += LANES)
        to[v] = out + n / packed * packed * blocks * BLOCK * 2 + n % packed * 4;
    for (int64_t b = 0; b < blocks; b++, panel += block_bytes(kind)) {
        round_block(kind, panel, 0, PANEL_VECTORS, to, 4 * packed);
        for (int v = 0; v < PANEL_VECTORS; v++) to[v] += BLOCK / 2 * 4 * packed;
    }
}

/* ---- products ---- */

/* out[count, blocks]: the sums of a row's inputs block by block, with which a shift of all weights is multiplied. */
INLINE void sum_blocks(const float *rows, int64_t count, int64_t blocks, float *out) {
    for (int64_t b = 0; b < count * blocks; b++, rows += BLOCK) {
        floats sum = load(rows);
        for (int i = LANES; i < BLOCK; i += LANES) sum += load(rows + i);
        out[b] = total(sum);
    }
}

/* The codes of 4 bits of a panel as `codes` finds those of 8. */
INLINE void unpack_panel(int kind, const uint8_t *panel, int64_t blocks, int8_t *out) {
    for (int64_t b = 0; b < blocks; b++, panel += block_bytes(kind)) {
        const uint8_t *at = panel + factor_bytes(kind);
        for (int k = 0; k < BLOCK; k++, at += PANEL / 2, out += PANEL) {
            if (k % (2 * LINE / PANEL) == 0) fetch(at + AHEAD_BYTES);
            for (int n = 0; n < PANEL / 2; n++) {
                out[n] = (int8_t)((at[n] & 15) - (SIGNED && kind == Q4_0 ? 8 : 0));
                out[n + PANEL / 2] = (int8_t)((at[n] >> 4) - (SIGNED && kind == Q4_0 ? 8 : 0));
            }
        }
    }
}

/* A tile: out[count, tile] = rows[count, blocks * BLOCK] @ a panel's outputs from vector `from` on. Codes of all blocks are
   `unpacked`, or in the panel. Registers are for the sums of one block; those of all are in `out`. */
INLINE void block_tile(int kind, int unpacked, int count, int from, const uint8_t *panel, const uint8_t *all_codes,
                       int64_t blocks, const float *rows, const float *shares, float *out, int64_t stride) {
    const int vectors = tile_vectors(count), read_as = unpacked ? Q8_0 : kind;
    const int64_t apart = blocks * BLOCK;
    for (int64_t b = 0; b < blocks; b++, panel += block_bytes(kind), rows += BLOCK) {
        floats sums[TILE_ROWS][TILE_VECTORS] = {0};
        const uint8_t *at = unpacked ? all_codes + b * BLOCK * PANEL : panel + factor_bytes(kind);
        for (int k = 0; k < BLOCK; k++, at += code_bytes(read_as)) {
            if (!unpacked && k % (LINE / code_bytes(kind)) == 0) fetch(at + AHEAD_BYTES);
            if (FEW_REGISTERS && count <= WIDE_ROWS) { /* one column at a time: all at once don't fit beside the sums */
                for (int v = 0; v < vectors; v++) {
                    floats column = codes(read_as, at, from + v);
                    for (int m = 0; m < count; m++) sums[m][v] = fused(column, all(rows[m * apart + k]), sums[m][v]);
                }
                continue;
            }
            floats columns[TILE_VECTORS];
            for (int v = 0; v < vectors; v++) columns[v] = codes(read_as, at, from + v);
            for (int m = 0; m < count; m++)
                for (int v = 0; v < vectors; v++) sums[m][v] = fused(columns[v], all(rows[m * apart + k]), sums[m][v]);
        }
        for (int v = 0; v < vectors; v++) {
            factor by = factors(kind, panel, from + v);
            for (int m = 0; m < count; m++) {
                float *to = out + m * stride + v * LANES;
                floats before = b ? load(to) : all(0);
                if (shifted(kind)) before = fused(by.shift, all(shares[m * blocks + b]), before);
                store(to, fused(by.scale, sums[m][v], before));
            }
        }
    }
}

/* As `block_tile`, in the CPU's own products of bfloat16, of which a row has pairs. */
INLINE void rounded_tile(int kind, int count, const uint8_t *panel, int64_t blocks, const float *rows, int64_t apart,
                         float *out, int64_t stride) {
    floats sums[TILE_ROWS][TILE_VECTORS] = {0};
    for (int64_t b = 0; b < blocks; b++, panel += block_bytes(kind), rows += BLOCK / 2) {
        factor by[TILE_VECTORS];
        for (int v = 0; v < TILE_VECTORS; v++) by[v] = factors(kind, panel, v);
        const uint8_t *at = panel + factor_bytes(kind);
        for (int k = 0; k < BLOCK / 2; k++, at += 2 * code_bytes(kind)) {
            floats column[TILE_VECTORS];
            if (k * 2 * code_bytes(kind) % LINE == 0) fetch(at + AHEAD_BYTES);
            for (int v = 0; v < TILE_VECTORS; v++)
                column[v] = (floats)pairs(weights(kind, at, v, by[v]), weights(kind, at + code_bytes(kind), v, by[v]));
            for (int m = 0; m < count; m++)
                for (int v = 0; v < TILE_VECTORS; v++)
                    sums[m][v] = plus_product(DOTTED, column[v], rows + m * apart + k, sums[m][v]);
        }
    }
    for (int m = 0; m < count; m++)
        for (int v = 0; v < TILE_VECTORS; v++) store(out + m * stride + v * LANES, sums[m][v]);
}

/* `multiply` as functions of their own: compilers would take a minute if all were inlined wherever they are called. */
typedef void multiplying(int count, int add, const float *next, int64_t pace, const float *rows, int64_t apart,
                         const float *columns, int64_t inner, int64_t width, int64_t used, float *out, int64_t stride);
#define MULTIPLYING(name, how, fetched) \
    static __attribute__((noinline)) void name(int count, int add, const float *next, int64_t pace, const float *rows, \
                                               int64_t apart, const float *columns, int64_t inner, int64_t width, \
                                               int64_t used, float *out, int64_t stride) { \
        multiply(how, count, add, fetched, next, pace, rows, apart, columns, inner, width, used, out, stride); \
    }
#define ALL_FETCHED(name, how) \
    MULTIPLYING(name##_itself, how, ITSELF) \
    MULTIPLYING(name##_nothing, how, NOTHING) \
    MULTIPLYING(name##_one, how, 1) \
    MULTIPLYING(name##_two, how, 2) \
    /* by what is fetched, from ITSELF on */ \
    static multiplying *const name[] = {name##_itself, name##_nothing, name##_one, name##_two};
ALL_FETCHED(single, SINGLE)
ALL_FETCHED(paired, PAIRED)
ALL_FETCHED(dotted_pairs, DOTTED)

INLINE multiplying *multiplying_as(int how, int64_t fetched) {
    multiplying *const *found = how == SINGLE ? single : how == PAIRED ? paired : dotted_pairs;
    return found[fetched - ITSELF];
}

/* So many steps of a panel are multiplied with all rows before the next ones. Where registers are few, tiles
   are small and columns are read often: of these the first cache holds them from one tile to the next. */
INLINE int64_t cached_steps(int64_t count, int64_t width, int64_t all_steps) {
    if (!FEW_REGISTERS || count == 1) return all_steps;
    return (count > TILE_ROWS ? 16384 : 8192) / (int64_t)sizeof(float) / width;
}

/* out[count, width] = rows[count, steps] @ columns[steps, width]. Memory and arithmetic take about as long as each other
   from a few rows on, and would take turns otherwise: meanwhile `ahead` floats are fetched for each step, of what comes
   `next`, up to `end`. Several tiles share them, so that each fetches a quarter of a line at once, or more. */
INLINE void float_columns(int how, const float *columns, int64_t width, int64_t steps, const float *rows, int64_t apart,
                          int64_t count, const float *next, const float *end, int64_t ahead, float *out,
                          int64_t stride) {
    int64_t part = cached_steps(count, width, steps), high = (count + TILE_ROWS - 1) / TILE_ROWS;
    /* With so little arithmetic, some processors read ahead faster by themselves. */
    int left_alone = FEW_REGISTERS && count * per_step(how) <= 2;
    for (int64_t first = 0; first < steps; first += part, columns += part * width) {
        int64_t inner = smaller(part, steps - first), done = 0;
        for (int64_t t = 0; t < high; t++) {
            int many = rows_of_tile(count - done), wide = tile_vectors(many) * LANES;
            int64_t tiles = high * ((width + wide - 1) / wide), number = tiles / high * t;
            int64_t sharing = smaller(tiles, ahead / (LINE_FLOATS / 4)), pace = ahead / sharing;
            int64_t fetches = pace > LINE_FLOATS ? 2 : 1;
            const float *own_rows = rows + done * apart + first * per_step(how);
            float *to = out + done * stride;
            for (int64_t from = 0; from < width; from += wide, number++) {
                int64_t fetched = number % (tiles / sharing) || next >= end ? NOTHING : fetches;
                if (left_alone) fetched = NOTHING;
                else if (!FEW_REGISTERS && tiles == 1) fetched = ITSELF;
                multiplying_as(how, fetched)(many, first > 0, next, pace / fetches, own_rows, apart, columns + from,
                                             inner * per_step(how), width, smaller(wide, width - from), to + from, stride);
                if (fetched > 0) next += pace * inner;
            }
            done += many;
        }
    }
}

/* out[count, PANEL] = rows[count, blocks * BLOCK] @ a panel in blocks; many rows find its codes unpacked. */
INLINE void block_panel(int kind, const uint8_t *panel, int64_t blocks, const float *rows, const float *shares,
                        int64_t count, float *scratch, float *out, int64_t stride) {
    const int unpacked = kind < Q8_0 && count > TILE_ROWS;
    if (unpacked) unpack_panel(kind, panel, blocks, (int8_t *)scratch);
    for (int64_t done = 0; done < count;) {
        int many = rows_of_tile(count - done);
        const float *own = rows + done * blocks * BLOCK, *own_shares = shares + done * blocks;
        for (int v = 0; v < PANEL_VECTORS; v += tile_vectors(many)) {
            float *to = out + done * stride + v * LANES;
#define AS(is_unpacked, known) \
    block_tile(kind, is_unpacked, known, v, panel, (const uint8_t *)scratch, blocks, own, own_shares, to, stride)
#define BLOCK_TILE(known) \
    if (unpacked) AS(1, known); \
    else AS(0, known)
            FOR_ROWS(many, BLOCK_TILE)
        }
        done += many;
    }
}

/* The same in bfloat16: `rows` are pairs, half as many. */
INLINE void rounded_panel(int kind, const uint8_t *panel, int64_t blocks, const float *rows, int64_t count, float *scratch,
                          float *out, int64_t stride) {
    const int64_t inputs = blocks * BLOCK / 2;
    if (count <= TILE_ROWS) {
#define ROUNDED(known) rounded_tile(kind, known, panel, blocks, rows, inputs, out, stride)
        FOR_ROWS(count, ROUNDED)
        return;
    }
    const float *next = (const float *)(panel + blocks * block_bytes(kind));
    int64_t size = blocks * block_bytes(kind) / (int64_t)sizeof *next;
    round_panel(kind, panel, blocks, PANEL, (uint8_t *)scratch);
    float_columns(DOTTED, scratch, PANEL, inputs, rows, inputs, count, next, next + size, larger(LINE_FLOATS, size / inputs),
                  out, stride);
}

/* What is fetched is ahead by the steps that are multiplied together: the rest of the panel, then the next one, if it is not
   the last. */
INLINE void float_panel(int how, const float *panel, int64_t packed, int64_t inputs, int last, const float *rows,
                        int64_t count, float *out, int64_t stride) {
    int64_t steps = inputs / per_step(how), first = smaller(cached_steps(count, packed, steps), steps);
    const float *end = panel + packed * steps * (last ? 1 : 2);
    float_columns(how, panel, packed, steps, rows, inputs, count, panel + first * packed, end, packed, out, stride);
}

INLINE int64_t panel_bytes(const matrix *of) {
    if (of->kind == FLOAT32) return of->packed * of->inputs * (int64_t)sizeof(float);
    if (of->kind == BFLOAT16) return of->packed * of->inputs * 2;
    return of->inputs / BLOCK * block_bytes((int)of->kind);
}

/* Floats of a panel that was expanded ... */
INLINE int64_t expanded_floats(int how, const matrix *of, int64_t count) {
    if (count <= TILE_ROWS || of->kind >= BFLOAT16) return 0;
    return how == DOTTED ? PANEL * of->inputs : of->kind < Q8_0 ? PANEL * of->inputs / 4 : 0;
}

INLINE int has_shares(int how, const matrix *of) { return how == SINGLE && shifted((int)of->kind); }

/* ... of sums of the rows' blocks, in whole lines. */
INLINE int64_t share_floats(int how, const matrix *of, int64_t count) {
    return has_shares(how, of) ? (count * of->inputs / BLOCK + LINE_FLOATS - 1) / LINE_FLOATS * LINE_FLOATS : 0;
}

/* Floats that `multiply_as` needs at `scratch`, which begins with a line. */
INLINE int64_t scratch_floats(int how, const matrix *of, int64_t count) {
    return expanded_floats(how, of, count) + share_floats(how, of, count) +
           (of->outputs % of->packed ? of->packed * count : 0);
}

/* out[count, outputs] = rows[count, inputs] @ matrix.T, outputs first .. stop - 1 of it, from a panel's first one to a
   panel's last one or the matrix's; rows of `out` are `stride` floats apart. SINGLE, or DOTTED with a
   matrix that is not float32. */
INLINE void multiply_as(int how, const matrix *of, int64_t first, int64_t stop, const float *rows, int64_t count,
                        float *scratch, float *out, int64_t stride) {
    const uint8_t *panel = (const uint8_t *)(intptr_t)of->address + first / of->packed * panel_bytes(of);
    float *shares = scratch + expanded_floats(how, of, count), *edge = shares + share_floats(how, of, count);
    int64_t inputs = how == DOTTED ? of->inputs / 2 : of->inputs, blocks = of->inputs / BLOCK;
    if (has_shares(how, of)) sum_blocks(rows, count, blocks, shares);
    for (int64_t n = first; n < stop; n += of->packed, panel += panel_bytes(of)) {
        int64_t used = smaller(stop - n, of->packed), whole = used == of->packed, apart = whole ? stride : of->packed;
        int last = n + of->packed >= stop;
        float *to = whole ? out + n : edge;
        switch (of->kind) {
#define IN_BLOCKS(known) \
    if (how == DOTTED) rounded_panel(known, panel, blocks, rows, count, scratch, to, apart); \
    else block_panel(known, panel, blocks, rows, shares, count, scratch, to, apart)
            BLOCK_KINDS(IN_BLOCKS);
#define IN_FLOATS(lying) float_panel(lying, (const float *)panel, of->packed, inputs, last, rows, count, to, apart)
            case BFLOAT16:
                if (how == DOTTED) IN_FLOATS(DOTTED);
                else IN_FLOATS(PAIRED);
                break;
            default: IN_FLOATS(SINGLE);
        }
        for (int64_t m = 0; !whole && m < count; m++)
            memcpy(out + m * stride + n, edge + m * of->packed, used * sizeof *out);
    }
}

static void multiply_by(const matrix *of, int64_t first, int64_t stop, const float *rows, int64_t count, float *scratch,
                        float *out, int64_t stride) {
    multiply_as(SINGLE, of, first, stop, rows, count, scratch, out, stride);
}
