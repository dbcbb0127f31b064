/* Decoder layers from products with matrices that stay as they are stored, for rows of many sessions, on several threads.

   A row's result does not depend on the other rows, to the last bit. */

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>

#include "bfloat16_products.h"

enum { MOST_THREADS = 16, PATIENCE = 2000 };

int lanes(void) { return LANES; }

/* ---- single products ---- */

/* Panels first .. stop - 1 of out[count, outputs] = rows[count, inputs] @ matrix.T. Returns 0, or -1 without memory. */
int product(const matrix *of, int64_t first, int64_t stop, const float *rows, int64_t count, float *out) {
    int64_t size = scratch_floats(SINGLE, of, count);
    float *scratch = size ? aligned_alloc(LINE, (size + LINE_FLOATS) / LINE_FLOATS * LINE) : NULL;
    if (size && scratch == NULL) return -1;
    multiply_by(of, first * of->packed, smaller(stop * of->packed, of->outputs), rows, count, scratch, out, of->outputs);
    free(scratch);
    return 0;
}

/* Panels first .. stop - 1 of a matrix in blocks as bfloat16, in oneDNN's order with `packed` outputs side by side. */
void round_panels(const matrix *of, int64_t first, int64_t stop, int64_t packed, uint8_t *out) {
    for (int64_t n = first; n < stop; n++, out += 2 * PANEL * of->inputs) {
        const uint8_t *panel = (const uint8_t *)(intptr_t)of->address + n * panel_bytes(of);
        switch (of->kind) {
#define ROUND(known) round_panel(known, panel, of->inputs / BLOCK, packed, out)
            BLOCK_KINDS(ROUND);
        }
    }
}

/* ---- decoder layers ---- */

/* Sizes of rows are multiples of 32 here, those of heads of 2 * LANES. */
static void norm_rows(const float *rows, int64_t count, int64_t size, const float *weight, float epsilon, float *out) {
    for (int64_t m = 0; m < count; m++, rows += size, out += size) {
        floats squares = {0};
        for (int64_t i = 0; i < size; i += LANES) squares = fused(load(rows + i), load(rows + i), squares);
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
    const float *cosines, *sines; /* by position */
    const int64_t *positions;
    int64_t heads, kv_heads, dim;
    int rounded; /* products in bfloat16 */
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
    float *scratch;       /* for products */
    uint16_t *halves;     /* rows in bfloat16 */
    pthread_t thread;
} worker;

/* Numbers from .. to of `all`, in whole steps, are this thread's. */
INLINE int64_t share(const worker *own, int part, int64_t all, int64_t step) {
    return (all / step * (own->index + part) / own->of->at.threads) * step;
}

static void times(worker *own, const matrix *of, const float *rows, float *out) {
    int64_t first = share(own, 0, of->outputs, of->packed), stop = share(own, 1, of->outputs, of->packed);
    if (own->index + 1 == own->of->at.threads) stop = of->outputs; /* with the panel that is not full */
    if (own->of->rounded) {
        round_rows(rows, own->of->count * of->inputs, own->halves);
        multiply_rounded(of, first, stop, own->halves, own->of->count, own->scratch, out);
    } else
        multiply_by(of, first, stop, rows, own->of->count, own->scratch, out, of->outputs);
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
            rotate(head, dim, of->cosines + of->positions[m] * dim, of->sines + of->positions[m] * dim);
    }
}

static void attend(worker *own, const layer *now) {
    pass *of = own->of;
    int64_t dim = of->dim, mixed = now->query_key_value.outputs, pieces = of->count * of->kv_heads;
    if (of->attend(of->spans, of->sessions, now->number, now->window, of->heads, of->kv_heads, dim, of->scale, of->mixed,
                   dim, mixed, share(own, 0, pieces, 1), share(own, 1, pieces, 1), of->attended))
        of->failed = 1;
}

/* silu(gate) * up, this thread's share of it, into `attended`, which is not needed any more */
static void gate(worker *own, int64_t wide) {
    int64_t first = share(own, 0, wide, LANES), stop = share(own, 1, wide, LANES);
    for (int64_t m = 0; m < own->of->count; m++)
        for (int64_t i = first; i < stop; i += LANES) {
            const float *at = own->of->mixed + m * 2 * wide + i;
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

static int all_finite(const float *values, int64_t count) {
    floats zeros = {0}; /* 0 times a NaN or an infinity is a NaN */
    for (int64_t i = 0; i < count; i += LANES) zeros += load(values + i) * 0.0f;
    return total(zeros) == 0.0f;
}

/* given[count, size] through all layers, and the norm after the last one if there is a `norm`, into `hidden`. The tables
   of cosines and sines are [positions, dim]. Returns 0; 1 if what came out is not finite everywhere; or -1 without
   memory. */
int run_layers(const layer *layers, int64_t number, int64_t count, const float *cosines, const float *sines,
               const int64_t *positions, int64_t heads, int64_t kv_heads, int64_t dim, int64_t rounded, float scale,
               float epsilon, const float *norm, putting *put, attention *attend, const void *spans, int64_t sessions,
               int64_t threads, const float *given, float *hidden) {
    threads = larger(1, smaller(threads, MOST_THREADS));
    int64_t size = layers[0].output.outputs, mixed = 0, attended = 0, scratch = 0, halves = 0;
    for (int64_t n = 0; n < number; n++) {
        mixed = larger(mixed, larger(layers[n].query_key_value.outputs, layers[n].gate_up.outputs));
        attended = larger(attended, larger(layers[n].output.inputs, layers[n].down.inputs));
        const matrix *all[] = {&layers[n].query_key_value, &layers[n].output, &layers[n].gate_up, &layers[n].down};
        for (int i = 0; i < 4; i++) {
            int64_t needed = rounded ? rounded_scratch_floats(all[i], count) : scratch_floats(SINGLE, all[i], count);
            scratch = larger(scratch, needed);
            halves = larger(halves, rounded ? count * all[i]->inputs / 2 : 0);
        }
    }
    int64_t own = 2 * count * size + scratch + halves;
    /* A vector that lies across two cache lines is read in twice the time; all sizes are multiples of a line. */
    float *memory = aligned_alloc(LINE, (count * (mixed + attended + size) + threads * own) * sizeof *memory);
    if (memory == NULL) return -1;
    pass all = {layers, number, count, cosines, sines, positions, heads, kv_heads, dim, rounded != 0, scale, epsilon, put,
                attend, spans, sessions, size, memory, memory + count * mixed, memory + count * (mixed + attended), 0, 0,
                {0, 0, 0}};
    worker workers[MOST_THREADS];
    float *at = all.sums + count * size;
    int64_t started = 1;
    for (int64_t t = 0; t < threads; t++, at += own) {
        float *rest = at + 2 * count * size;
        workers[t] = (worker){&all, (int)t, t ? at + count * size : hidden, at, rest, (uint16_t *)(rest + scratch), 0};
        memcpy(workers[t].hidden, given, count * size * sizeof *hidden);
    }
    while (started < threads && !pthread_create(&workers[started].thread, NULL, work, workers + started)) started++;
    all.at.threads = (int)started; /* those that could be had */
    atomic_store(&all.begun, 1);
    work(workers);
    for (int64_t t = 1; t < started; t++) pthread_join(workers[t].thread, NULL);
    free(memory);
    if (norm) norm_rows(hidden, count, size, norm, epsilon, hidden);
    return all.failed ? -1 : !all_finite(hidden, count * size);
}
