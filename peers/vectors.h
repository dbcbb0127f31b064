/* What the kernels are made of: vectors as wide as the machine has them, and products of small tiles.

   Everything that a caller knows when it is compiled is inlined, so that a tile's sums stay in registers. Each result is
   summed in one order, whatever else is computed beside it. */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __AVX2__
#include <immintrin.h>
#endif

#ifdef __AVX512F__
enum { LANES = 16 };
#else
enum { LANES = 8 };
#endif
/* A tile has at most so many rows, and so many vectors side by side. */
enum { TILE_ROWS = 6, TILE_VECTORS = 64 / LANES, LINE = 64, LINE_FLOATS = LINE / sizeof(float) };

typedef float floats __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));

#ifndef __has_builtin
#define __has_builtin(name) 0
#endif

#define INLINE static inline __attribute__((always_inline))

INLINE floats load(const float *at) {
    floats value;
    memcpy(&value, at, sizeof value);
    return value;
}

INLINE void store(float *at, floats value) { memcpy(at, &value, sizeof value); }

INLINE floats all(float x) { return x - (floats){0}; }

INLINE floats choose(ints where, floats yes, floats no) { return (floats)((where & (ints)yes) | (~where & (ints)no)); }

INLINE float total(floats v) {
#ifdef __AVX512F__
    return _mm512_reduce_add_ps((__m512)v);
#else
    return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
#endif
}

INLINE float largest(floats v) {
#ifdef __AVX512F__
    return _mm512_reduce_max_ps((__m512)v);
#else
    float most = v[0];
    for (int i = 1; i < LANES; i++) most = v[i] > most ? v[i] : most;
    return most;
#endif
}

/* a * b + c with one rounding, where the machine has that. Never left to the compiler: it would do so in some copies of an
   inlined function, and not in others, and a row's bits would depend on its company. */
INLINE floats fused(floats a, floats b, floats c) {
#if defined __AVX512F__
    return (floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined __AVX2__ && defined __FMA__
    return (floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif __has_builtin(__builtin_elementwise_fma)
    return __builtin_elementwise_fma(a, b, c);
#elif defined __FP_FAST_FMAF
    for (int lane = 0; lane < LANES; lane++) c[lane] = __builtin_fmaf(a[lane], b[lane], c[lane]);
    return c;
#else
    return a * b + c;
#endif
}

INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

/* A number as bfloat16, rounded to the nearest as torch does. */
INLINE uint16_t upper_half(float number) {
    uint32_t bits;
    memcpy(&bits, &number, sizeof bits);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

/* e to the power of x, to about 2e-7: 2^n times a polynomial in what is left (Cody and Waite's reduction) */
INLINE floats exponential(floats x) {
    x = choose(x < all(-87), all(-87), choose(x > all(87), all(87), x));
    floats shifted = fused(x, all(1.44269504f), all(12582912.0f)); /* its lowest bits are the nearest whole number */
    floats n = shifted - 12582912.0f;
    floats r = fused(n, all(2.12194440e-4f), fused(n, all(-0.693359375f), x));
    floats value = all(1.9875691500e-4f);
    value = fused(value, r, all(1.3981999507e-3f));
    value = fused(value, r, all(8.3334519073e-3f));
    value = fused(value, r, all(4.1665795894e-2f));
    value = fused(value, r, all(1.6666665459e-1f));
    value = fused(value, r, all(5.0000001201e-1f));
    value = fused(value, r * r, r + 1.0f);
    return (floats)((ints)value + ((ints)shifted << 23));
}

/* ---- tiles ---- */

/* Where vectors are short there are half as many registers, and tiles of more than WIDE_ROWS rows are narrow. One that
   fetches its own columns is AHEAD_ROWS rows of them ahead. */
enum { FEW_REGISTERS = LANES == 8, WIDE_ROWS = FEW_REGISTERS ? 2 : TILE_ROWS, AHEAD_ROWS = 6 };

/* Vectors of a tile of so many rows: as many sums as there are registers for. A single row has a whole panel side by side,
   so that memory is read in the order in which it lies. */
INLINE int tile_vectors(int rows) {
    return !FEW_REGISTERS || rows == 1 ? TILE_VECTORS : rows <= WIDE_ROWS ? TILE_VECTORS / 2 : TILE_VECTORS / 4;
}

/* Into all caches. Past them (prefetchnta) it would keep what the next thing to run has there, but on Intel's
   servers that takes three times as long: such lines have only the few buffers of the first cache, and the second's
   prefetcher doesn't see them. */
INLINE void fetch(const void *line) { __builtin_prefetch(line, 0, 3); }

/* What a tile has the processor fetch while it computes: nothing, its own columns, or at `next`, so many times for each row
   of columns, `pace` floats further on each time. */
enum { NOTHING = 0, ITSELF = -1 };

/* How columns lie: SINGLE are [inner, width] numbers of 32 bits. PAIRED and DOTTED are [inner / 2, width, 2] of bfloat16,
   so that a vector's bits have two inputs' numbers; of DOTTED the rows are in bfloat16, too, and two numbers of theirs
   count as one of 32 bits. Columns are always `width` floats further on at the next step. */
enum { SINGLE, PAIRED, DOTTED };

/* Numbers of a row that one step takes */
INLINE int per_step(int how) { return how == PAIRED ? 2 : 1; }

INLINE floats one_of(int how, int i, floats column) {
    if (how != PAIRED) return column;
    return (floats)(i ? (ints)column & -65536 : (ints)column << 16);
}

/* The CPU's own product of bfloat16: of each lane the two, summed in float32. */
INLINE floats dotted(floats a, floats b, floats c) {
#ifdef __AVX512BF16__
    return (floats)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b);
#else
    (void)a, (void)b; /* never called */
    return c;
#endif
}

INLINE floats plus_product(int how, floats column, const float *number, floats sum) {
    if (how != DOTTED) return fused(column, all(*number), sum);
    int32_t both;
    memcpy(&both, number, sizeof both);
    return dotted(column, (floats)(both - (ints){0}), sum);
}

/* out[count, vectors * LANES] = rows[count, inner] @ columns[inner, width], of which it takes the first; or += with
   `add`. */
INLINE void tile(int how, int count, int vectors, int add, int fetched, const float *next, int64_t pace, const float *rows,
                 int64_t apart, const float *columns, int64_t inner, int64_t width, float *out, int64_t stride) {
    floats sums[TILE_ROWS][TILE_VECTORS] = {0};
    for (int m = 0; add && m < count; m++)
        for (int v = 0; v < vectors; v++) sums[m][v] = load(out + m * stride + v * LANES);
    for (int64_t k = 0; k < inner; k += per_step(how), columns += width) {
        for (int v = 0; fetched == ITSELF && v < vectors; v++) fetch(columns + AHEAD_ROWS * width + v * LANES);
        for (int n = 0; n < fetched; n++, next += pace) __builtin_prefetch(next, 0, 2);
        for (int i = 0; i < per_step(how); i++) {
            floats column[TILE_VECTORS];
            for (int v = 0; v < vectors; v++) column[v] = one_of(how, i, load(columns + v * LANES));
#if defined __AVX2__ && !defined __AVX512F__ /* stays in its register: GCC reads it again for each row */
            for (int v = 0; count > WIDE_ROWS && v < vectors; v++) __asm__("" : "+x"(column[v]));
#endif
            for (int m = 0; m < count; m++)
                for (int v = 0; v < vectors; v++)
                    sums[m][v] = plus_product(how, column[v], rows + m * apart + k + i, sums[m][v]);
        }
    }
    for (int m = 0; m < count; m++)
        for (int v = 0; v < vectors; v++) store(out + m * stride + v * LANES, sums[m][v]);
}

/* As above, for the first `used` of `width` columns, a multiple of LANES. */
INLINE void wide_tile(int how, int count, int add, int fetched, const float *next, int64_t pace, const float *rows,
                      int64_t apart, const float *columns, int64_t inner, int64_t width, int64_t used, float *out,
                      int64_t stride) {
    const int most = tile_vectors(count);
    for (int64_t from = 0; from < used; from += most * LANES)
#define TILE(vectors) \
    tile(how, count, vectors, add, fetched, next, pace, rows, apart, columns + from, inner, width, out + from, stride)
        switch (smaller((used - from) / LANES, most)) {
/* a tile of so many rows has no more: then there is nothing to compile */
#define IF_WIDE(vectors) \
    case vectors: if (vectors <= most) TILE(vectors); break;
            IF_WIDE(1) IF_WIDE(2) IF_WIDE(3) IF_WIDE(4) IF_WIDE(5) IF_WIDE(6) IF_WIDE(7) IF_WIDE(8)
        }
}

/* `call` with `count`, at most TILE_ROWS, as a number that the compiler knows. */
#define FOR_ROWS(count, call) \
    switch (count) { \
        case 1: call(1); break; \
        case 2: call(2); break; \
        case 3: call(3); break; \
        case 4: call(4); break; \
        case 5: call(5); break; \
        default: call(6); \
    }

/* Rows of the next tile of those that are left: as few tiles as possible, about equal. */
INLINE int rows_of_tile(int64_t left) { return (int)(left / ((left + TILE_ROWS - 1) / TILE_ROWS)); }

/* As above, for at most TILE_ROWS rows. */
INLINE void multiply(int how, int count, int add, int fetched, const float *next, int64_t pace, const float *rows,
                     int64_t apart, const float *columns, int64_t inner, int64_t width, int64_t used, float *out,
                     int64_t stride) {
#define ROWS(known) \
    if (known <= TILE_ROWS) \
    wide_tile(how, known, add, fetched, next, pace, rows, apart, columns, inner, width, used, out, stride)
    FOR_ROWS(count, ROWS)
}
