/* Products of bfloat16 rows with bfloat16 matrices as the CPU multiplies them itself, summed in float32: Intel's in a unit
   for matrices (AMX), AMD's in vectors (AVX512_BF16, twice as many products an instruction as of float32).

   A row's sums do not depend on the rows beside it, so one row and a chunk of many get the same bits. The unit's are those
   of plain arithmetic, too: of each 32 inputs the even and the odd ones are summed in order, and the two added to the
   rest. */

#include "block_products.h"

#if defined __AMX_TILE__ && defined __AMX_BF16__ && defined __AVX512F__ && defined __linux__
#define MATRIX_UNIT 1
#include <sys/syscall.h>
#include <unistd.h>
#else
#define MATRIX_UNIT 0
#endif

enum { UNIT_ROWS = 16, UNIT_BYTES = 64, UNIT_OUTPUTS = 16 };

/* Whether it does, and this process may use that. Linux wants to be asked for the unit. Intel's vectors take as long for
   two products of bfloat16 as for four of float32. */
int multiplies_bfloat16(void) {
#if MATRIX_UNIT
    enum { REQUEST_PERMISSION = 0x1023, TILE_DATA = 18 };
    return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
#elif defined __AVX512BF16__
    return __builtin_cpu_is("amd") != 0;
#else
    return 0;
#endif
}

/* So many numbers as bfloat16 */
static void round_rows(const float *rows, int64_t numbers, uint16_t *out) {
    for (int64_t i = 0; i < numbers; i++) out[i] = upper_half(rows[i]);
}

#if MATRIX_UNIT

/* What was written to `at`, and elsewhere, is in memory for the instructions on tiles, and what they read was read: some
   compilers don't know that they read. */
#define SETTLED(at) __asm__ volatile("" : : "r"(at) : "memory")

typedef struct {
    uint8_t palette, start, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
} shapes;

/* Of the tiles: 0 to 3 sums, 4 and 5 rows, 6 and 7 weights; `upper` rows in sums 0 and 1 and rows 4, `lower` in 2, 3, 5. */
static void shape_tiles(int upper, int lower) {
    shapes of = {.palette = 1};
    const int rows[8] = {upper, upper, lower, lower, upper, lower, UNIT_ROWS, UNIT_ROWS};
    for (int t = 0; t < 8; t++) of.rows[t] = (uint8_t)rows[t], of.bytes[t] = rows[t] ? UNIT_BYTES : 0;
    SETTLED(&of);
    _tile_loadconfig(&of);
}

enum { PART = 2 * UNIT_OUTPUTS, FEW = 2 * UNIT_ROWS };

/* out[rows, PART] = rows[upper + lower, inputs] @ a part of a panel, from its vector `from` on. Of many rows, `second` is
   where the lower ones are. */
INLINE void unit_tile(int kind, int lower, int ahead, const uint16_t *rows, const uint16_t *second, const uint8_t *panel,
                      int from, int64_t packed, int64_t inputs, float *out, float *out_second, int64_t stride) {
    uint8_t block[BLOCK / 2 * PART * 4] __attribute__((aligned(LINE)));
    int64_t line = kind == BFLOAT16 ? packed * 4 : PART * 4, bytes = kind == BFLOAT16 ? BLOCK / 2 * line : block_bytes(kind);
    _tile_zero(0);
    _tile_zero(1);
    if (lower) {
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int64_t k = 0; k < inputs; k += BLOCK, panel += bytes) {
        for (int64_t at = 0; ahead && at < bytes; at += LINE) fetch(panel + bytes + at);
        const uint8_t *columns = kind == BFLOAT16 ? panel + from * UNIT_BYTES : block;
        if (kind != BFLOAT16) {
            uint8_t *to[PANEL_VECTORS];
            to[from] = block, to[from + 1] = block + UNIT_BYTES;
            SETTLED(block);
            round_block(kind, panel, from, from + 2, to, line);
        }
        SETTLED(columns);
        _tile_loadd(4, rows + k, inputs * 2);
        _tile_loadd(6, columns, line);
        _tile_loadd(7, columns + UNIT_BYTES, line);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        if (lower) {
            _tile_loadd(5, second + k, inputs * 2);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, out, stride * 4);
    _tile_stored(1, out + UNIT_OUTPUTS, stride * 4);
    if (lower) {
        _tile_stored(2, out_second, stride * 4);
        _tile_stored(3, out_second + UNIT_OUTPUTS, stride * 4);
    }
}

/* Outputs first .. stop - 1 of a panel, for all rows. */
INLINE void unit_panel(int kind, const uint8_t *panel, int64_t packed, int64_t outputs, int64_t inputs, int ahead,
                       const uint16_t *rows, int64_t count, int *shaped, float *out, int64_t stride) {
    for (int64_t n = 0; n < outputs; n += PART)
        for (int64_t m = 0; m < count; m += FEW) {
            int upper = (int)smaller(count - m, UNIT_ROWS), lower = (int)smaller(count - m - upper, UNIT_ROWS);
            if (*shaped != upper * FEW + lower) shape_tiles(upper, lower), *shaped = upper * FEW + lower;
            const uint16_t *top = rows + m * inputs, *bottom = top + UNIT_ROWS * inputs;
            float *to = out + m * stride + n, *below = to + UNIT_ROWS * stride;
            /* the first part's loads bring what the others need */
            int fetching = ahead && m == 0 && n == 0;
#define UNIT(has_lower, from) \
    unit_tile(kind, has_lower, fetching, top, bottom, panel, from, packed, inputs, to, below, stride)
            if (n == 0) {
                if (lower) UNIT(1, 0);
                else UNIT(0, 0);
            } else {
                if (lower) UNIT(1, 2);
                else UNIT(0, 2);
            }
        }
}

/* Floats that `multiply_rounded` needs at `scratch`, which begins with a line. */
INLINE int64_t rounded_scratch_floats(const matrix *of, int64_t count) {
    (void)count;
    return PANEL * of->inputs / 2;
}

/* As `multiply_by`, with weights and `rows` in bfloat16. Numbers of outputs, and of those that a matrix in bfloat16 has
   side by side, are multiples of PART, at most PANEL. */
static void multiply_rounded(const matrix *of, int64_t first, int64_t stop, const uint16_t *rows, int64_t count,
                             float *scratch, float *out) {
    uint8_t *expanded = (uint8_t *)scratch;
    int64_t inputs = of->inputs, blocks = inputs / BLOCK, stride = of->outputs;
    const uint8_t *panel = (const uint8_t *)(intptr_t)of->address + first / of->packed * panel_bytes(of);
    int shaped = -1;
    for (int64_t n = first; n < stop; n += of->packed, panel += panel_bytes(of)) {
        int64_t outputs = smaller(stop - n, of->packed);
        float *to = out + n;
#define PANEL_OF(kind) \
    if (count <= FEW) \
        unit_panel(kind, panel, of->packed, outputs, inputs, 1, rows, count, &shaped, to, stride); \
    else { \
        round_panel(kind, panel, blocks, PANEL, expanded); \
        unit_panel(BFLOAT16, expanded, PANEL, outputs, inputs, 0, rows, count, &shaped, to, stride); \
    }
        switch (of->kind) {
            BLOCK_KINDS(PANEL_OF);
            default: unit_panel(BFLOAT16, panel, of->packed, outputs, inputs, 1, rows, count, &shaped, to, stride);
        }
    }
    _tile_release();
}

#else

INLINE int64_t rounded_scratch_floats(const matrix *of, int64_t count) { return scratch_floats(DOTTED, of, count); }

static void multiply_rounded(const matrix *of, int64_t first, int64_t stop, const uint16_t *rows, int64_t count,
                             float *scratch, float *out) {
    multiply_as(DOTTED, of, first, stop, (const float *)rows, count, scratch, out, of->outputs);
}

#endif
