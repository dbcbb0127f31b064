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
enum { LANES = 16, TILE_ROWS = 6 }; /* 32 registers */
#else
enum { LANES = 8, TILE_ROWS = 3 };
#endif
enum { TILE_VECTORS = 4, LINE = 64, LINE_FLOATS = LINE / sizeof(float) };

typedef float floats __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));
typedef float four __attribute__((vector_size(16)));

#ifdef __clang__
#define PICK(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
typedef int32_t of_four __attribute__((vector_size(16)));
#define PICK(a, b, ...) __builtin_shuffle(a, b, (of_four){__VA_ARGS__})
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

INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

/* e to the power of x, to about 2e-7: 2^n times a polynomial in what is left (Cody and Waite's reduction) */
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

/* ---- tiles ---- */

enum { AHEAD_ROWS = 16 };

/* What a tile has the processor fetch while it computes: nothing, its own columns, which are read once and must not push
   out of the caches what the next thing to run has there, or so many lines at `next` for each row of columns. */
enum { NOTHING = 0, ITSELF = -1 };

/* out[count, vectors * LANES] = rows[count, inner] @ columns[inner, width], of which it takes the first; or += with
   `add`. */
INLINE void tile(int count, int vectors, int add, int fetched, const float *next, const float *rows, int64_t apart,
                 const float *columns, int64_t inner, int64_t width, float *out, int64_t stride) {
    floats sums[TILE_ROWS][TILE_VECTORS] = {0};
    for (int m = 0; add && m < count; m++)
        for (int v = 0; v < vectors; v++) sums[m][v] = load(out + m * stride + v * LANES);
    for (int64_t k = 0; k < inner; k++, columns += width) {
        floats column[TILE_VECTORS];
        for (int v = 0; fetched == ITSELF && v < vectors; v++)
            __builtin_prefetch(columns + AHEAD_ROWS * width + v * LANES, 0, 0);
        for (int n = 0; n < fetched; n++, next += LINE_FLOATS) __builtin_prefetch(next, 0, 2);
        for (int v = 0; v < vectors; v++) column[v] = load(columns + v * LANES);
        for (int m = 0; m < count; m++) {
            floats row = all(rows[m * apart + k]);
            for (int v = 0; v < vectors; v++) sums[m][v] += column[v] * row;
        }
    }
    for (int m = 0; m < count; m++)
        for (int v = 0; v < vectors; v++) store(out + m * stride + v * LANES, sums[m][v]);
}

/* As above, for the first `used` of `width` columns, a multiple of LANES. */
INLINE void wide_tile(int count, int add, int fetched, const float *next, const float *rows, int64_t apart,
                      const float *columns, int64_t inner, int64_t width, int64_t used, float *out, int64_t stride) {
    for (int64_t from = 0; from < used; from += TILE_VECTORS * LANES)
#define TILE(vectors) \
    tile(count, vectors, add, fetched, next, rows, apart, columns + from, inner, width, out + from, stride)
        switch ((used - from) / LANES) {
            case 1: TILE(1); break;
            case 2: TILE(2); break;
            case 3: TILE(3); break;
            default: TILE(4);
        }
}

/* As above, for at most TILE_ROWS rows. */
INLINE void multiply(int count, int add, int fetched, const float *next, const float *rows, int64_t apart,
                     const float *columns, int64_t inner, int64_t width, int64_t used, float *out, int64_t stride) {
#define ROWS(known) \
    if (known <= TILE_ROWS) \
    wide_tile(known, add, fetched, next, rows, apart, columns, inner, width, used, out, stride)
    switch (count) {
        case 1: ROWS(1); break;
        case 2: ROWS(2); break;
        case 3: ROWS(3); break;
        case 4: ROWS(4); break;
        case 5: ROWS(5); break;
        default: ROWS(6);
    }
}

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
