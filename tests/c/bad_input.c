/* Every bad input through the C interface: its status, its words, and memory that stays as it was; then the edge cases
 * that are defined. Buffers are exactly as large as described, so that valgrind sees any access outside them.
 * SPDX-License-Identifier: MIT */
#define _POSIX_C_SOURCE 200809L
#include "deltanet.h"

#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { S = 16, HK = 2, HV = 4, T = 3, B = 2, ROWS = 4, SLOTS = 2, N_BUFFERS = 12, SECONDS = 300 };
enum { STATES = 4 * S * S * HV * B }; /* bytes of all sequences' states */

static int failures, checks;
static const char *title = "";

#define EXPECT(rule, ...)                                        \
    do {                                                         \
        checks++;                                                \
        if (!(rule)) {                                           \
            failures++;                                          \
            printf("FAIL %s (line %d): ", title, __LINE__);      \
            printf(__VA_ARGS__);                                 \
            putchar('\n');                                       \
        }                                                        \
    } while (0)

/* ---- A valid call and all its memory. ---- */

typedef struct {
    void *data;
    size_t size;
} buffer;

typedef struct {
    deltanet_params params;
    buffer buffers[N_BUFFERS], before[N_BUFFERS];
    size_t n_buffers;
    unsigned char *scratch;
    size_t scratch_size;
} call;

static void *checked_malloc(size_t size) {
    void *memory = malloc(size ? size : 1);
    if (!memory) {
        fputs("no memory\n", stderr);
        exit(2);
    }
    return memory;
}

/* Fresh values every run; main prints the seed. */
static uint64_t seed;
static double uniform(double low, double high) {
    seed = seed * 6364136223846793005u + 1442695040888963407u;
    return low + (high - low) * (double) (seed >> 11) / 9007199254740992.0;
}

static size_t element_size(uint32_t dtype) {
    return dtype == DELTANET_DTYPE_I64 ? 8 : dtype == DELTANET_DTYPE_F16 || dtype == DELTANET_DTYPE_BF16 ? 2 : 4;
}

static deltanet_tensor dense(call *c, uint32_t dtype, int64_t n0, int64_t n1, int64_t n2, int64_t n3) {
    deltanet_tensor t = {.dtype = dtype, .ne = {n0, n1, n2, n3}};
    size_t size = element_size(dtype);
    for (int axis = 0; axis < 4; axis++) {
        t.nb[axis] = size;
        size *= (size_t) t.ne[axis];
    }
    t.data = checked_malloc(size);
    memset(t.data, 0xff, size);
    c->buffers[c->n_buffers++] = (buffer){t.data, size};
    return t;
}

static deltanet_tensor values(call *c, double low, double high, int64_t n0, int64_t n1, int64_t n2, int64_t n3) {
    deltanet_tensor t = dense(c, DELTANET_DTYPE_F32, n0, n1, n2, n3);
    for (int64_t i = 0; i < n0 * n1 * n2 * n3; i++) ((float *) t.data)[i] = (float) uniform(low, high);
    return t;
}

static deltanet_tensor index_of(call *c, uint32_t dtype, size_t n, const int64_t *numbers) {
    deltanet_tensor t = dense(c, dtype, (int64_t) n, 1, 1, 1);
    for (size_t i = 0; i < n; i++) {
        if (dtype == DELTANET_DTYPE_I64) ((int64_t *) t.data)[i] = numbers[i];
        else ((int32_t *) t.data)[i] = (int32_t) numbers[i];
    }
    return t;
}

/* Which optional tensors a call has. */
enum { PLAIN = 0, SNAPSHOTS = 1, POOL = 2, RAGGED = 4, NO_TOKENS = 8, NO_SEQUENCES = 16 };

static void make(call *c, int kind) {
    memset(c, 0, sizeof *c);
    deltanet_params *p = &c->params;
    p->struct_size = sizeof *p;
    const int64_t t = kind & NO_TOKENS ? 0 : T;
    const int64_t sequences = kind & NO_SEQUENCES ? 0 : B, batch = kind & RAGGED ? 1 : sequences;
    const int64_t rows = kind & POOL ? ROWS : sequences;
    p->q = values(c, -1, 1, S, HK, t, batch);
    p->k = values(c, -0.4, 0.4, S, HK, t, batch);
    p->v = values(c, -1, 1, S, HV, t, batch);
    p->g = values(c, -2, 0, 1, HV, t, batch);
    p->beta = values(c, 0, 1, 1, HV, t, batch);
    p->state_in = values(c, -1, 1, S, S, HV, rows);
    p->out = dense(c, DELTANET_DTYPE_F32, S, HV, t, batch);
    p->state_out = dense(c, DELTANET_DTYPE_F32, S, S, HV, rows);
    if (kind & SNAPSHOTS) {
        /* Slots lie one behind the other in one buffer: one axis more than a tensor has. */
        p->snapshots = dense(c, DELTANET_DTYPE_F32, S, S, HV, sequences * SLOTS);
        p->snapshots.ne[3] = sequences;
        p->snapshot_stride = p->snapshots.nb[3] * (size_t) sequences;
        p->snapshot_slots = p->n_snapshots = SLOTS;
    }
    if (kind & POOL) {
        p->rows_in = index_of(c, DELTANET_DTYPE_I32, (size_t) sequences, (const int64_t[]){3, 1});
        p->rows_out = index_of(c, DELTANET_DTYPE_I64, (size_t) sequences, (const int64_t[]){2, 0});
    }
    if (kind & RAGGED)
        p->cu_seqlens = index_of(c, DELTANET_DTYPE_I32, (size_t) sequences + 1, (const int64_t[]){0, t > 0, t});
    title = "a valid call";
    EXPECT(deltanet_scratch_size(p, &c->scratch_size) == DELTANET_STATUS_OK, "%s", deltanet_last_error());
    c->scratch = checked_malloc(c->scratch_size);
}

static void keep(call *c) {
    for (size_t i = 0; i < c->n_buffers; i++) {
        c->before[i] = (buffer){checked_malloc(c->buffers[i].size), c->buffers[i].size};
        if (c->buffers[i].size) memcpy(c->before[i].data, c->buffers[i].data, c->buffers[i].size);
    }
}

/* Nothing that the call was given has changed. */
static int untouched(const call *c) {
    for (size_t i = 0; i < c->n_buffers; i++)
        if (memcmp(c->before[i].data, c->buffers[i].data, c->buffers[i].size)) return 0;
    return 1;
}

static void drop(call *c) {
    for (size_t i = 0; i < c->n_buffers; i++) {
        free(c->buffers[i].data);
        free(c->before[i].data);
    }
    free(c->scratch);
}

static const char *name_of(uint32_t status) { return deltanet_status_name(status); }

/* The last call's status, and every word of the list (argument, value, rule; a NULL ends it) in its message. */
static void expect_error(uint32_t status, uint32_t wanted, const char *function, const char *const *words) {
    EXPECT(status == wanted, "%s gave %s, not %s: %s", function, name_of(status), name_of(wanted),
           deltanet_last_error());
    for (; *words; words++)
        EXPECT(strstr(deltanet_last_error(), *words), "%s: «%s» lacks «%s»", function, deltanet_last_error(), *words);
    EXPECT(strstr(deltanet_last_error(), name_of(wanted)), "%s: «%s» lacks the status", function, deltanet_last_error());
}

#define WORDS(...) ((const char *const[]){__VA_ARGS__, NULL})

/* Every function that takes the params refuses them in the same way and writes nothing. */
static void refused(call *c, uint32_t wanted, const char *const *words) {
    keep(c);
    size_t size = 77;
    char text[64] = "untouched";
    expect_error(deltanet_supports(&c->params), wanted, "supports", words);
    expect_error(deltanet_run(&c->params, 1), wanted, "run", words);
    expect_error(deltanet_run(&c->params, 3), wanted, "run in 3 threads", words);
    expect_error(deltanet_run_part(&c->params, 0, 1, c->scratch, c->scratch_size), wanted, "run_part", words);
    expect_error(deltanet_scratch_size(&c->params, &size), wanted, "scratch_size", words);
    expect_error(deltanet_describe(&c->params, text, sizeof text), wanted, "describe", words);
    EXPECT(size == 77 && !strcmp(text, "untouched"), "size or text was written");
    EXPECT(untouched(c), "memory was written");
    drop(c);
}

/* A call of some kind with one change is refused. */
#define REFUSE(kind, change, status, ...)                        \
    do {                                                         \
        call c;                                                  \
        make(&c, kind);                                          \
        deltanet_params *p = &c.params;                          \
        title = #change;                                         \
        change;                                                  \
        refused(&c, DELTANET_STATUS_##status, WORDS(__VA_ARGS__)); \
    } while (0)

static void *shifted(void *data, long bytes) { return (char *) data + bytes; }

/* ---- What is refused. ---- */

static void pointers(void) {
    REFUSE(PLAIN, p->q.data = NULL, NULL_POINTER, "q.data is null", "must point");
    REFUSE(PLAIN, p->k.data = NULL, NULL_POINTER, "k.data is null", "must point");
    REFUSE(PLAIN, p->v.data = NULL, NULL_POINTER, "v.data is null", "must point");
    REFUSE(PLAIN, p->g.data = NULL, NULL_POINTER, "g.data is null", "must point");
    REFUSE(PLAIN, p->beta.data = NULL, NULL_POINTER, "beta.data is null", "must point");
    REFUSE(PLAIN, p->state_in.data = NULL, NULL_POINTER, "state_in.data is null", "must point");
    REFUSE(PLAIN, p->out.data = NULL, NULL_POINTER, "out.data is null", "must point");
    REFUSE(POOL, p->state_out.data = NULL, NULL_POINTER, "state_out.data is null", "rows_out");
    REFUSE(PLAIN, p->q.data = shifted(p->q.data, 2), MISALIGNED, "q.data is 0x", "aligned to 4");
    REFUSE(PLAIN, p->v.data = shifted(p->v.data, 1), MISALIGNED, "v.data is 0x", "aligned to 4");
    REFUSE(PLAIN, p->g.data = shifted(p->g.data, 3), MISALIGNED, "g.data is 0x", "aligned to 4");
    REFUSE(PLAIN, p->beta.data = shifted(p->beta.data, 2), MISALIGNED, "beta.data is 0x", "aligned to 4");
    REFUSE(PLAIN, p->state_in.data = shifted(p->state_in.data, 2), MISALIGNED, "state_in.data is 0x", "aligned to 4");
    REFUSE(PLAIN, p->out.data = shifted(p->out.data, 2), MISALIGNED, "out.data is 0x", "aligned to 4");
    REFUSE(PLAIN, p->state_out.data = shifted(p->state_out.data, 2), MISALIGNED, "state_out.data is 0x", "aligned to 4");
    REFUSE(SNAPSHOTS, p->snapshots.data = shifted(p->snapshots.data, 1), MISALIGNED, "snapshots.data is 0x", "aligned");
    REFUSE(PLAIN, (p->k.dtype = DELTANET_DTYPE_BF16, p->k.data = shifted(p->k.data, 1)), MISALIGNED, "k.data is 0x",
           "aligned to 2");
    REFUSE(POOL, p->rows_in.data = shifted(p->rows_in.data, 2), MISALIGNED, "rows_in.data is 0x", "aligned to 4");
    REFUSE(POOL, p->rows_out.data = shifted(p->rows_out.data, 4), MISALIGNED, "rows_out.data is 0x", "aligned to 8");
    REFUSE(RAGGED, p->cu_seqlens.data = shifted(p->cu_seqlens.data, 1), MISALIGNED, "cu_seqlens.data is 0x", "aligned");
    REFUSE(PLAIN, p->q.nb[1] += 2, MISALIGNED, "q.nb[1] is 66", "multiple of the element size 4");
    REFUSE(PLAIN, p->state_in.nb[3] += 1, MISALIGNED, "state_in.nb[3] is 4097", "multiple of the element size 4");
    REFUSE(SNAPSHOTS, p->snapshot_stride += 2, MISALIGNED, "snapshot_stride is 8194", "multiple of the element size 4");
}

static void extents(void) {
    REFUSE(PLAIN, p->q.ne[2] = -1, SHAPE, "q.ne[2] is -1", "not be negative");
    REFUSE(PLAIN, p->state_out.ne[3] = INT64_MIN, SHAPE, "state_out.ne[3] is -9223372036854775808", "not be negative");
    REFUSE(PLAIN, p->v.ne[2] = INT64_MAX, STRIDE, "v with ne [16, 4, 9223372036854775807, 2]", "address space");
    REFUSE(PLAIN, p->k.ne[3] = INT64_MAX / 64, STRIDE, "k with ne", "address space");
    REFUSE(PLAIN, p->k.nb[2] = SIZE_MAX - 3, STRIDE, "k with ne", "18446744073709551612", "address space");
    REFUSE(PLAIN, p->out.nb[3] = SIZE_MAX / 2 - 3, STRIDE, "out with ne", "address space");
    REFUSE(PLAIN, p->state_in.nb[2] = (size_t) 1 << 62, STRIDE, "state_in with ne", "address space");
    REFUSE(SNAPSHOTS, p->snapshot_stride = SIZE_MAX - 3, STRIDE, "snapshot_stride is 18446744073709551612",
           "address space");
    REFUSE(PLAIN, p->v.ne[0] = 8, SHAPE, "v.ne[0] (the head size) is 8", "multiple of 16 from 16 to 1024");
    REFUSE(PLAIN, p->v.ne[0] = 24, SHAPE, "v.ne[0] (the head size) is 24", "multiple of 16");
    REFUSE(PLAIN, p->v.ne[0] = 1040, SHAPE, "v.ne[0] (the head size) is 1040", "multiple of 16 from 16 to 1024");
    REFUSE(PLAIN, p->v.ne[0] = 0, SHAPE, "v.ne[0] (the head size) is 0", "multiple of 16");
    REFUSE(PLAIN, p->q.ne[0] = 32, SHAPE, "q.ne[0] is 32", "must be 16");
    REFUSE(PLAIN, p->k.ne[0] = 8, SHAPE, "k.ne[0] is 8", "must be 16");
    REFUSE(PLAIN, (p->q.ne[1] = 3, p->k.ne[1] = 3), SHAPE, "v.ne[1] (the number of value heads) is 4",
           "multiple of q.ne[1], 3");
    REFUSE(PLAIN, p->q.ne[1] = 0, SHAPE, "q.ne[1] (the number of key heads) is 0", "must be positive");
    REFUSE(PLAIN, p->v.ne[1] = 0, SHAPE, "v.ne[1] (the number of value heads) is 0", "positive multiple");
    REFUSE(PLAIN, p->k.ne[1] = 1, SHAPE, "k.ne[1] is 1", "must be 2");
    REFUSE(PLAIN, p->q.ne[2] = 2, SHAPE, "q.ne[2] is 2", "must be 3");
    REFUSE(PLAIN, p->k.ne[2] = 4, SHAPE, "k.ne[2] is 4", "must be 3");
    REFUSE(PLAIN, p->g.ne[2] = 1, SHAPE, "g.ne[2] is 1", "must be 3");
    REFUSE(PLAIN, p->beta.ne[2] = 2, SHAPE, "beta.ne[2] is 2", "must be 3");
    REFUSE(PLAIN, p->out.ne[2] = 4, SHAPE, "out.ne[2] is 4", "must be 3");
    REFUSE(PLAIN, p->g.ne[0] = 2, SHAPE, "g.ne[0] is 2", "1 (one decay a head) or the head size 16");
    REFUSE(PLAIN, p->g.ne[1] = 2, SHAPE, "g.ne[1] is 2", "must be 4");
    REFUSE(PLAIN, p->beta.ne[0] = 16, SHAPE, "beta.ne[0] is 16", "must be 1");
    REFUSE(PLAIN, p->beta.ne[1] = 2, SHAPE, "beta.ne[1] is 2", "must be 4");
    REFUSE(PLAIN, (p->q.ne[3] = 3, p->k.ne[3] = 3), SHAPE, "q.ne[3] is 3", "divide the number of sequences, 2");
    REFUSE(PLAIN, (p->q.ne[3] = 0, p->k.ne[3] = 0), SHAPE, "q.ne[3] is 0", "divide the number of sequences, 2");
    REFUSE(PLAIN, p->k.ne[3] = 1, SHAPE, "k.ne[3] is 1", "must be 2");
    REFUSE(PLAIN, p->g.ne[3] = 1, SHAPE, "g.ne[3] is 1", "must be 2");
    REFUSE(PLAIN, p->out.ne[3] = 1, SHAPE, "out.ne[3] is 1", "must be 2");
    REFUSE(PLAIN, p->out.ne[0] = 32, SHAPE, "out.ne[0] is 32", "must be 16");
    REFUSE(PLAIN, p->state_in.ne[0] = 8, SHAPE, "state_in.ne[0] is 8", "must be 16");
    REFUSE(PLAIN, p->state_in.ne[1] = 32, SHAPE, "state_in.ne[1] is 32", "must be 16");
    REFUSE(PLAIN, p->state_in.ne[2] = 2, SHAPE, "state_in.ne[2] is 2", "must be 4");
    REFUSE(PLAIN, p->state_in.ne[3] = 1, SHAPE, "state_in.ne[3] is 1", "must be 2");
    REFUSE(PLAIN, p->state_out.ne[3] = 4, SHAPE, "state_out.ne[3] is 4", "must be 2");
    REFUSE(SNAPSHOTS, p->snapshots.ne[3] = 1, SHAPE, "snapshots.ne[3] is 1", "must be 2");
    REFUSE(POOL, p->rows_in.ne[0] = 1, SHAPE, "rows_in.ne[0] is 1", "number of sequences, 2");
    REFUSE(POOL, p->rows_out.ne[0] = 1, SHAPE, "rows_out.ne[0] is 1", "number of sequences, 2");
    REFUSE(POOL, p->rows_in.ne[1] = 2, SHAPE, "rows_in.ne is [2, 2, 1, 1]", "must be a vector");
    REFUSE(RAGGED, p->cu_seqlens.ne[0] = 0, SHAPE, "cu_seqlens.ne[0] is 0", "sequences plus 1");
    REFUSE(RAGGED, p->cu_seqlens.ne[0] = 2, SHAPE, "state_in.ne[3] is 2", "must be 1");
    REFUSE(PLAIN, p->cu_seqlens = index_of(&c, DELTANET_DTYPE_I32, 3, (const int64_t[]){0, 1, 3}), SHAPE, "v.ne[3] is 2",
           "with cu_seqlens it must be 1");
    /* Nothing to compute, but more heads and sequences than can be counted. */
    REFUSE(PLAIN | NO_TOKENS,
           (p->state_out.data = NULL, p->q.ne[1] = p->k.ne[1] = p->v.ne[1] = p->g.ne[1] = p->beta.ne[1] = p->out.ne[1] =
                p->state_in.ne[2] = (int64_t) 1 << 40, p->state_in.nb[2] = p->state_in.nb[3] = 0),
           SHAPE, "v.ne[1] is 1099511627776", "at most 2147483647");
    REFUSE(PLAIN | NO_SEQUENCES, p->v.ne[2] = INT64_MAX, SHAPE, "v.ne[2] (the number of tokens) is 9223372036854775807",
           "at most 2147483647");
    REFUSE(RAGGED | NO_TOKENS,
           (p->state_out.data = NULL, p->cu_seqlens.ne[0] = (int64_t) 1 << 33, p->state_in.nb[3] = 0,
            p->state_in.ne[3] = ((int64_t) 1 << 33) - 1),
           SHAPE, "cu_seqlens.ne[0] is 8589934592", "at most 2147483647");
    REFUSE(RAGGED, p->cu_seqlens.nb[0] = 0, STRIDE, "cu_seqlens.nb[0] is 0", "at least the element size");
    REFUSE(POOL, p->rows_out.nb[0] = 0, STRIDE, "rows_out.nb[0] is 0", "at least the element size");
}

static void codes(void) {
    REFUSE(PLAIN, p->q.dtype = 5, DTYPE, "q.dtype is 5", "deltanet_dtype");
    REFUSE(PLAIN, p->out.dtype = UINT32_MAX, DTYPE, "out.dtype is 4294967295", "deltanet_dtype");
    REFUSE(PLAIN, p->k.dtype = DELTANET_DTYPE_I32, DTYPE, "k.dtype is I32", "F32, F16, Bf16");
    REFUSE(PLAIN, p->v.dtype = DELTANET_DTYPE_I64, DTYPE, "v.dtype is I64", "F32, F16, Bf16");
    REFUSE(PLAIN, p->g.dtype = DELTANET_DTYPE_F16, DTYPE, "g.dtype is F16", "must be one of [F32]");
    REFUSE(PLAIN, p->beta.dtype = DELTANET_DTYPE_BF16, DTYPE, "beta.dtype is Bf16", "must be one of [F32]");
    REFUSE(PLAIN, p->state_in.dtype = DELTANET_DTYPE_F16, DTYPE, "state_in.dtype is F16", "must be one of [F32]");
    REFUSE(PLAIN, p->state_out.dtype = DELTANET_DTYPE_BF16, DTYPE, "state_out.dtype is Bf16", "must be one of [F32]");
    REFUSE(SNAPSHOTS, p->snapshots.dtype = DELTANET_DTYPE_F16, DTYPE, "snapshots.dtype is F16", "must be one of [F32]");
    REFUSE(POOL, p->rows_in.dtype = DELTANET_DTYPE_F32, DTYPE, "rows_in.dtype is F32", "I32, I64");
    REFUSE(POOL, p->rows_out.dtype = DELTANET_DTYPE_F16, DTYPE, "rows_out.dtype is F16", "I32, I64");
    REFUSE(RAGGED, p->cu_seqlens.dtype = DELTANET_DTYPE_BF16, DTYPE, "cu_seqlens.dtype is Bf16", "I32, I64");
    REFUSE(PLAIN, p->v.reserved = 1, UNKNOWN_VALUE, "v.reserved is 1", "must be 0");
    REFUSE(PLAIN, p->head_map = 2, UNKNOWN_VALUE, "head_map is 2", "from 0 to 1");
    REFUSE(PLAIN, p->state_layout = 7, UNKNOWN_VALUE, "state_layout is 7", "from 0 to 1");
    REFUSE(PLAIN, p->beta_kind = UINT32_MAX, UNKNOWN_VALUE, "beta_kind is 4294967295", "from 0 to 1");
    REFUSE(PLAIN, p->snapshot_order = 2, UNKNOWN_VALUE, "snapshot_order is 2", "from 0 to 1");
    REFUSE(PLAIN, p->precision = 3, UNKNOWN_VALUE, "precision is 3", "from 0 to 2");
    REFUSE(PLAIN, p->qk_norm = 2, UNKNOWN_VALUE, "qk_norm is 2", "from 0 to 1");
    REFUSE(PLAIN, p->scale = NAN, VALUE, "scale is NaN", "finite");
    REFUSE(PLAIN, p->scale = -INFINITY, VALUE, "scale is -inf", "finite");
    REFUSE(PLAIN, p->gate_max = INFINITY, VALUE, "gate_max is inf", "finite");
    REFUSE(PLAIN, p->state_clamp = -1.0f, VALUE, "state_clamp is -1", "not negative");
    REFUSE(PLAIN, p->state_clamp = NAN, VALUE, "state_clamp is NaN", "finite");
    REFUSE(PLAIN, p->qk_norm_eps = -1e-6f, VALUE, "qk_norm_eps is -0.000001", "not negative");
    REFUSE(PLAIN, p->qk_norm_eps = INFINITY, VALUE, "qk_norm_eps is inf", "finite");
    REFUSE(PLAIN, p->struct_size = 0, STRUCT_SIZE, "struct_size is 0", "sizeof(deltanet_params)");
    REFUSE(PLAIN, p->struct_size = 4, STRUCT_SIZE, "struct_size is 4", "sizeof(deltanet_params)");
    REFUSE(PLAIN, p->struct_size = UINT32_MAX, STRUCT_SIZE, "struct_size is 4294967295", "sizeof(deltanet_params)");
}

static void snapshots(void) {
    REFUSE(SNAPSHOTS, p->n_snapshots = SLOTS + 1, SNAPSHOTS, "n_snapshots is 3", "snapshot_slots, the 2");
    REFUSE(SNAPSHOTS, p->n_snapshots = UINT32_MAX, SNAPSHOTS, "n_snapshots is 4294967295", "snapshot_slots, the 2");
    REFUSE(SNAPSHOTS, p->snapshot_slots = 0, SNAPSHOTS, "n_snapshots is 2", "snapshot_slots, the 0");
    REFUSE(PLAIN, p->n_snapshots = 1, SNAPSHOTS, "snapshots.data is null", "n_snapshots is 1");
    REFUSE(SNAPSHOTS, p->snapshot_stride = 0, OVERLAP, "snapshots has strides", "share memory");
    REFUSE(SNAPSHOTS, p->snapshot_stride -= 4, OVERLAP, "snapshots has strides", "share memory");
    REFUSE(SNAPSHOTS, p->state_out.data = shifted(p->snapshots.data, STATES), OVERLAP, "state_out overlaps snapshots",
           "memory of their own");
    REFUSE(SNAPSHOTS, p->out.data = shifted(p->snapshots.data, STATES), OVERLAP, "out overlaps snapshots", "their own");
    REFUSE(SNAPSHOTS, p->state_in.data = p->snapshots.data, OVERLAP, "snapshots overlaps state_in", "apart");
    REFUSE(SNAPSHOTS, p->state_in.data = shifted(p->snapshots.data, STATES), OVERLAP, "snapshots overlaps state_in");
}

static void overlaps(void) {
    REFUSE(PLAIN, p->v.data = p->out.data, OVERLAP, "out overlaps v", "memory of their own");
    REFUSE(PLAIN, p->q.data = shifted(p->out.data, 4), OVERLAP, "out overlaps q", "memory of their own");
    REFUSE(PLAIN, p->k.data = shifted(p->out.data, -4), OVERLAP, "out overlaps k", "memory of their own");
    REFUSE(PLAIN, p->g.data = p->out.data, OVERLAP, "out overlaps g", "memory of their own");
    REFUSE(PLAIN, p->beta.data = p->out.data, OVERLAP, "out overlaps beta", "memory of their own");
    REFUSE(PLAIN, p->out.data = p->state_in.data, OVERLAP, "out overlaps state_in", "apart");
    REFUSE(PLAIN, p->out.data = p->state_out.data, OVERLAP, "out overlaps state_out", "memory of their own");
    REFUSE(PLAIN, p->out.nb[1] = 0, OVERLAP, "out has strides [4, 0", "share memory");
    REFUSE(PLAIN, p->out.nb[2] -= 4, OVERLAP, "out has strides", "share memory");
    REFUSE(PLAIN, p->state_out.nb[3] = 0, OVERLAP, "state_out has strides", "share memory");
    REFUSE(PLAIN, p->v.data = p->state_out.data, OVERLAP, "state_out overlaps v", "memory of their own");
    REFUSE(PLAIN, p->state_out.data = shifted(p->state_in.data, 4), OVERLAP, "state_out overlaps state_in",
           "same memory with the same strides");
    REFUSE(PLAIN, (p->state_out.data = p->state_in.data, p->state_out.nb[0] = p->state_in.nb[1], p->state_out.nb[1] = 4),
           OVERLAP, "state_out overlaps state_in", "same memory with the same strides");
    REFUSE(POOL, p->rows_in.data = p->state_out.data, OVERLAP, "state_out overlaps rows_in", "memory of their own");
    REFUSE(POOL, p->rows_out.data = p->out.data, OVERLAP, "out overlaps rows_out", "memory of their own");
    REFUSE(RAGGED, p->cu_seqlens.data = p->out.data, OVERLAP, "out overlaps cu_seqlens", "memory of their own");
}

static void rows(void) {
    REFUSE(POOL, ((int32_t *) p->rows_in.data)[1] = ROWS, ROW, "rows_in[1] is 4", "from 0 to 3");
    REFUSE(POOL, ((int32_t *) p->rows_in.data)[0] = -1, ROW, "rows_in[0] is -1", "from 0 to 3");
    REFUSE(POOL, ((int64_t *) p->rows_out.data)[1] = -1, ROW, "rows_out[1] is -1", "from 0 to 3");
    REFUSE(POOL, ((int64_t *) p->rows_out.data)[0] = INT64_MAX, ROW, "rows_out[0] is 9223372036854775807", "from 0 to 3");
    REFUSE(POOL, ((int64_t *) p->rows_out.data)[1] = (int64_t) 1 << 32, ROW, "rows_out[1] is 4294967296", "from 0 to 3");
    REFUSE(POOL, p->state_in.ne[3] = 0, ROW, "rows_in[0] is 3", "rows of the pool");
    REFUSE(POOL, ((int64_t *) p->rows_out.data)[1] = 2, ROW, "rows_out[1] is 2", "rows_out[0]", "row of its own");
    /* One pool: row 1 is read by sequence 1 and written by sequence 0. */
    REFUSE(POOL, (p->state_out.data = p->state_in.data, ((int64_t *) p->rows_out.data)[0] = 1), ROW, "rows_out[0] is 1",
           "which sequence 1 reads", "only by its reader");
    /* Without rows_out, sequence b writes row b. */
    REFUSE(POOL, (p->state_out.data = p->state_in.data, p->rows_out.data = NULL, p->state_out.ne[3] = B,
                  ((int32_t *) p->rows_in.data)[1] = 0), ROW, "rows_out[0] is 0", "which sequence 1 reads");
    REFUSE(POOL, (p->state_out.data = p->state_in.data, ((int32_t *) p->rows_in.data)[0] = 1,
                  ((int64_t *) p->rows_out.data)[1] = 1), ROW, "rows_out[1] is 1", "which sequence 0 reads");
}

static void sequences(void) {
    REFUSE(RAGGED, ((int32_t *) p->cu_seqlens.data)[0] = 1, SEQUENCES, "cu_seqlens[0] is 1", "must be 0");
    REFUSE(RAGGED, ((int32_t *) p->cu_seqlens.data)[0] = -1, SEQUENCES, "cu_seqlens[0] is -1", "must be 0");
    REFUSE(RAGGED, ((int32_t *) p->cu_seqlens.data)[2] = 0, SEQUENCES, "cu_seqlens[2] is 0", "from 1");
    REFUSE(RAGGED, ((int32_t *) p->cu_seqlens.data)[1] = -2, SEQUENCES, "cu_seqlens[1] is -2", "from 0");
    REFUSE(RAGGED, ((int32_t *) p->cu_seqlens.data)[2] = T + 1, SEQUENCES, "cu_seqlens[2] is 4", "to 3 (the tokens)");
    REFUSE(RAGGED, ((int32_t *) p->cu_seqlens.data)[1] = INT32_MAX, SEQUENCES, "cu_seqlens[1] is 2147483647", "to 3");
}

/* Arguments of the functions themselves. */
static void arguments(void) {
    call c;
    make(&c, PLAIN);
    keep(&c);
    size_t size = 0;
    char text[8];
    title = "params";
    expect_error(deltanet_supports(NULL), DELTANET_STATUS_NULL_POINTER, "supports", WORDS("params is null"));
    expect_error(deltanet_run(NULL, 1), DELTANET_STATUS_NULL_POINTER, "run", WORDS("params is null"));
    expect_error(deltanet_run_part(NULL, 0, 1, c.scratch, c.scratch_size), DELTANET_STATUS_NULL_POINTER, "run_part",
                 WORDS("params is null"));
    expect_error(deltanet_scratch_size(NULL, &size), DELTANET_STATUS_NULL_POINTER, "scratch_size", WORDS("params is null"));
    expect_error(deltanet_describe(NULL, text, sizeof text), DELTANET_STATUS_NULL_POINTER, "describe",
                 WORDS("params is null"));
    unsigned char *odd = checked_malloc(sizeof c.params + 1);
    memcpy(odd + 1, &c.params, sizeof c.params);
    expect_error(deltanet_run((const deltanet_params *) (const void *) (odd + 1), 1), DELTANET_STATUS_MISALIGNED, "run",
                 WORDS("params is 0x", "aligned to 8"));
    free(odd);

    title = "function arguments";
    expect_error(deltanet_scratch_size(&c.params, NULL), DELTANET_STATUS_NULL_POINTER, "scratch_size", WORDS("size is null"));
    expect_error(deltanet_describe(&c.params, NULL, 8), DELTANET_STATUS_NULL_POINTER, "describe", WORDS("text is null"));
    expect_error(deltanet_describe(&c.params, text, 0), DELTANET_STATUS_SCRATCH, "describe", WORDS("size is 0"));
    expect_error(deltanet_run(&c.params, 1025), DELTANET_STATUS_THREADS, "run", WORDS("n_threads is 1025", "at most 1024"));
    expect_error(deltanet_run(&c.params, UINT32_MAX), DELTANET_STATUS_THREADS, "run", WORDS("n_threads is 4294967295"));
    expect_error(deltanet_run_part(&c.params, 2, 2, c.scratch, c.scratch_size), DELTANET_STATUS_THREADS, "run_part",
                 WORDS("ith is 2", "below nth, 2"));
    expect_error(deltanet_run_part(&c.params, UINT32_MAX, 4, c.scratch, c.scratch_size), DELTANET_STATUS_THREADS,
                 "run_part", WORDS("ith is 4294967295", "below nth, 4"));
    expect_error(deltanet_run_part(&c.params, 0, 0, c.scratch, c.scratch_size), DELTANET_STATUS_THREADS, "run_part",
                 WORDS("nth is 0", "from 1 to 1024"));
    expect_error(deltanet_run_part(&c.params, 0, 1025, c.scratch, c.scratch_size), DELTANET_STATUS_THREADS, "run_part",
                 WORDS("nth is 1025", "from 1 to 1024"));
    expect_error(deltanet_run_part(&c.params, 0, 1, NULL, c.scratch_size), DELTANET_STATUS_SCRATCH, "run_part",
                 WORDS("scratch is null", "at least"));
    char needed[32];
    snprintf(needed, sizeof needed, "at least %zu", c.scratch_size);
    expect_error(deltanet_run_part(&c.params, 0, 1, c.scratch, c.scratch_size - 1), DELTANET_STATUS_SCRATCH, "run_part",
                 WORDS("scratch_size is", needed));
    expect_error(deltanet_run_part(&c.params, 0, 1, c.scratch, 0), DELTANET_STATUS_SCRATCH, "run_part",
                 WORDS("scratch_size is 0", needed));
    expect_error(deltanet_run_part(&c.params, 0, 1, c.scratch, SIZE_MAX), DELTANET_STATUS_SCRATCH, "run_part",
                 WORDS("scratch_size is 18446744073709551615"));
    EXPECT(untouched(&c), "memory was written");

    title = "describe cuts its words";
    memset(text, 'x', sizeof text);
    EXPECT(deltanet_describe(&c.params, text, 5) == DELTANET_STATUS_OK && strlen(text) == 4 && text[5] == 'x', "%.8s", text);
    drop(&c);
}

/* ---- What is defined. ---- */

static void accepted(call *c) {
    EXPECT(deltanet_supports(&c->params) == DELTANET_STATUS_OK, "%s", deltanet_last_error());
    EXPECT(deltanet_run(&c->params, 2) == DELTANET_STATUS_OK, "%s", deltanet_last_error());
}

static int same(const void *a, const void *b, size_t size) { return size == 0 || !memcmp(a, b, size); }

/* No NaN byte pattern of the poison is left. */
static int all_finite(const deltanet_tensor *t) {
    int64_t n = t->ne[0] * t->ne[1] * t->ne[2] * t->ne[3];
    for (int64_t i = 0; i < n; i++)
        if (!isfinite(((const float *) t->data)[i])) return 0;
    return 1;
}

/* A struct from a newer header has more fields: fine while they are zero, refused when they are in use. */
static void newer_header(void) {
    struct {
        deltanet_params params;
        uint64_t future[4];
    } newer;
    call c;
    make(&c, PLAIN);
    keep(&c);
    memset(&newer, 0, sizeof newer);
    newer.params = c.params;
    newer.params.struct_size = sizeof newer;
    title = "newer header, new field in use";
    newer.future[3] = 1;
    expect_error(deltanet_run(&newer.params, 1), DELTANET_STATUS_STRUCT_SIZE, "run", WORDS("struct_size is", "must be zero"));
    EXPECT(untouched(&c), "memory was written");
    title = "newer header, new fields zero";
    newer.future[3] = 0;
    EXPECT(deltanet_run(&newer.params, 1) == DELTANET_STATUS_OK, "%s", deltanet_last_error());
    EXPECT(all_finite(&c.params.out), "not computed");
    drop(&c);
}

static void no_tokens(void) {
    title = "T = 0 copies the state";
    call c;
    make(&c, NO_TOKENS | SNAPSHOTS);
    keep(&c);
    deltanet_params *p = &c.params;
    const size_t state = p->state_in.nb[3] * B;
    accepted(&c);
    EXPECT(same(p->state_out.data, p->state_in.data, state), "state_out is not state_in");
    for (size_t i = 0; i < state * SLOTS; i++)
        if (((unsigned char *) p->snapshots.data)[i] != 0xff) {
            EXPECT(0, "a snapshot slot past the tokens was written");
            break;
        }
    drop(&c);

    title = "T = 0 with null token tensors";
    make(&c, NO_TOKENS);
    p = &c.params;
    p->q.data = p->k.data = p->v.data = p->g.data = p->beta.data = p->out.data = NULL;
    accepted(&c);
    EXPECT(same(p->state_out.data, p->state_in.data, state), "state_out is not state_in");
    drop(&c);

    title = "T = 0 in place";
    make(&c, NO_TOKENS);
    keep(&c);
    c.params.state_out = c.params.state_in;
    accepted(&c);
    EXPECT(untouched(&c), "the state changed");
    drop(&c);

    title = "T = 0 from row to row";
    make(&c, NO_TOKENS | POOL);
    p = &c.params;
    accepted(&c);
    const char *in = p->state_in.data, *out = p->state_out.data;
    const size_t row = p->state_in.nb[3];
    EXPECT(same(out + 2 * row, in + 3 * row, row) && same(out, in + row, row), "rows 3 and 1 are not in rows 2 and 0");
    EXPECT((unsigned char) out[row] == 0xff && (unsigned char) out[3 * row] == 0xff, "another row was written");
    drop(&c);

    title = "an empty sequence of a ragged batch keeps its state";
    make(&c, RAGGED);
    p = &c.params;
    ((int32_t *) p->cu_seqlens.data)[1] = 0;
    accepted(&c);
    EXPECT(same(p->state_out.data, p->state_in.data, p->state_in.nb[3]), "state_out is not state_in");
    EXPECT(all_finite(&p->out) && all_finite(&p->state_out), "the other sequence was not computed");
    drop(&c);

    title = "tokens past the last sequence stay untouched";
    make(&c, RAGGED);
    p = &c.params;
    ((int32_t *) p->cu_seqlens.data)[2] = T - 1;
    accepted(&c);
    const unsigned char *token = (unsigned char *) p->out.data + (T - 1) * p->out.nb[2];
    for (size_t i = 0; i < p->out.nb[2]; i++)
        if (token[i] != 0xff) {
            EXPECT(0, "written");
            break;
        }
    drop(&c);
}

static void no_sequences(void) {
    title = "B = 0 does nothing";
    static const int kinds[] = {NO_SEQUENCES, NO_SEQUENCES | NO_TOKENS, NO_SEQUENCES | SNAPSHOTS};
    for (size_t i = 0; i < sizeof kinds / sizeof *kinds; i++) {
        call c;
        make(&c, kinds[i]);
        keep(&c);
        accepted(&c);
        EXPECT(deltanet_run_part(&c.params, 3, 4, c.scratch, c.scratch_size) == DELTANET_STATUS_OK, "%s",
               deltanet_last_error());
        EXPECT(untouched(&c), "memory was written");
        drop(&c);
    }
    title = "B = 0 by cu_seqlens does nothing";
    call c;
    make(&c, RAGGED);
    c.params.cu_seqlens.ne[0] = 1;
    c.params.state_in.ne[3] = c.params.state_out.ne[3] = 0;
    keep(&c);
    accepted(&c);
    EXPECT(untouched(&c), "memory was written");
    drop(&c);
}

/* Overlaps and strides that are allowed give the bits of a plain call. */
static void allowed(void) {
    call c;
    make(&c, PLAIN);
    deltanet_params plain = c.params, *p = &c.params;
    const size_t state = p->state_in.nb[3] * B, out = p->out.nb[3] * B;
    title = "a plain call";
    accepted(&c);
    EXPECT(all_finite(&p->out) && all_finite(&p->state_out), "not all was written");
    void *expected_state = checked_malloc(state), *expected_out = checked_malloc(out);
    memcpy(expected_state, p->state_out.data, state);
    memcpy(expected_out, p->out.data, out);
    void *start = checked_malloc(state);
    memcpy(start, p->state_in.data, state);

    title = "in place";
    p->state_out = p->state_in;
    memset(p->out.data, 0xff, out);
    accepted(&c);
    EXPECT(same(p->state_in.data, expected_state, state), "state differs");
    EXPECT(same(p->out.data, expected_out, out), "out differs");

    title = "no state_out";
    memcpy(p->state_in.data, start, state);
    memset(&p->state_out, 0, sizeof p->state_out);
    memset(p->out.data, 0xff, out);
    accepted(&c);
    EXPECT(same(p->out.data, expected_out, out) && same(p->state_in.data, start, state), "out differs");

    title = "q and k in one memory, an input with stride 0";
    *p = plain;
    p->k = p->q;
    p->beta.nb[0] = p->beta.nb[1] = p->beta.nb[2] = p->beta.nb[3] = 0;
    accepted(&c);
    EXPECT(all_finite(&p->out), "not computed");

    title = "out and v as columns of one buffer";
    *p = plain;
    const size_t row = 2 * S * sizeof(float);
    char *columns = checked_malloc(row * HV * T * B);
    memset(columns, 0xff, row * HV * T * B);
    for (size_t i = 0; i < HV * T * B; i++) memcpy(columns + i * row, (char *) plain.v.data + i * row / 2, row / 2);
    p->v.data = columns;
    p->out.data = columns + row / 2;
    for (int axis = 1; axis < 4; axis++) p->v.nb[axis] = p->out.nb[axis] = plain.v.nb[axis] * 2;
    accepted(&c);
    for (size_t i = 0; i < HV * T * B; i++)
        EXPECT(same(columns + i * row + row / 2, (char *) expected_out + i * row / 2, row / 2), "row %zu differs", i);
    free(columns);

    title = "strides of axes of one element mean nothing";
    *p = plain;
    for (int i = 0; i < 4; i++) {
        deltanet_tensor *t[] = {&p->q, &p->k, &p->v, &p->g};
        t[i]->ne[3] = 1;
        t[i]->nb[3] = SIZE_MAX;
    }
    p->beta.ne[3] = p->out.ne[3] = p->state_in.ne[3] = 1;
    p->g.nb[0] = 3;
    p->state_in.nb[3] = 12345;
    p->state_out = p->state_in;
    p->state_out.nb[3] = 1;
    memcpy(p->state_in.data, start, state);
    EXPECT(deltanet_run(p, 1) == DELTANET_STATUS_OK, "%s", deltanet_last_error());
    EXPECT(same(p->state_in.data, expected_state, state / B) && same(p->out.data, expected_out, out / B), "differs");
    drop(&c);
    free(expected_state);
    free(expected_out);
    free(start);
}

/* NaN and infinity go where IEEE sends them: into their own head, and nowhere else. */
static void not_finite(void) {
    static const float bad[] = {NAN, INFINITY, -INFINITY, 3e38f};
    for (int input = 0; input < 6; input++)
        for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
            for (int options = 0; options < 2; options++) {
                call c;
                make(&c, PLAIN);
                deltanet_params *p = &c.params;
                char words[64];
                snprintf(words, sizeof words, "input %d is %f, options %d", input, (double) bad[i], options);
                title = words;
                if (options) {
                    p->qk_norm = 1;
                    p->qk_norm_eps = 1e-6f;
                    p->state_clamp = 1e6f;
                    p->gate_max = 50;
                    p->beta_kind = DELTANET_BETA_KIND_LOGIT;
                }
                deltanet_tensor *tensors[] = {&p->q, &p->k, &p->v, &p->g, &p->beta, &p->state_in};
                ((float *) tensors[input]->data)[0] = bad[i];
                accepted(&c);
                if (isnan(bad[i]) && input != 3) EXPECT(isnan(((float *) p->out.data)[0]), "the NaN was lost");
                /* Head 1 reads key head 1, sequence 1 its own tensors: the poison of neither may be in them. */
                const float *head = (const float *) p->out.data + S, *sequence = (const float *) p->out.data + S * HV * T;
                for (int j = 0; j < S; j++) EXPECT(isfinite(head[j]) && isfinite(sequence[j]), "it spread");
                drop(&c);
            }
}

static void *other_thread(void *argument) {
    *(int *) argument = deltanet_last_error()[0] == '\0';
    return NULL;
}

static void messages(void) {
    title = "messages belong to their thread";
    EXPECT(deltanet_supports(NULL) != DELTANET_STATUS_OK && deltanet_last_error()[0], "no message");
    pthread_t thread;
    int empty = 0;
    EXPECT(!pthread_create(&thread, NULL, other_thread, &empty) && !pthread_join(thread, NULL), "no thread");
    EXPECT(empty, "another thread's message");
    title = "status names";
    for (uint32_t status = 0; status <= DELTANET_STATUS_INTERNAL; status++)
        EXPECT(strcmp(name_of(status), "UNKNOWN"), "status %u has no name", status);
    EXPECT(!strcmp(name_of(DELTANET_STATUS_OK), "OK") && !strcmp(name_of(UINT32_MAX), "UNKNOWN"), "wrong names");
    title = "version";
    EXPECT(deltanet_version() == DELTANET_VERSION, "%u", deltanet_version());
}

static const char *op_name(int op) { return op ? NULL : "NONE"; }
static bool buffer_is_host(void *memory) { return memory == NULL; }

/* What a program that links ggml itself calls, with every mistake that needs no ggml. */
static void ggml(void) {
    _Alignas(16) char device[256] = {0}; /* has no registry: of no known version */
    const deltanet_ggml_host good = {sizeof good, 0, device, op_name, buffer_is_host, 368};
    deltanet_ggml_host host[2] = {good, good};
    title = "deltanet_ggml_attach";
#define DECLINED(pointer, word)                                                                      \
    do {                                                                                             \
        EXPECT(!deltanet_ggml_attach(pointer), "%s was taken", word);                                \
        EXPECT(strstr(deltanet_last_error(), word), "«%s» without %s", deltanet_last_error(), word); \
    } while (0)
    DECLINED(NULL, "NULL_POINTER: host");
    DECLINED((const deltanet_ggml_host *) (const void *) ((const char *) host + 1), "MISALIGNED: host");
    host->struct_size = sizeof good - 1;
    DECLINED(host, "STRUCT_SIZE: host.struct_size is");
    *host = good, host->cpu_device = NULL;
    DECLINED(host, "NULL_POINTER: host.cpu_device");
    *host = good, host->op_name = NULL;
    DECLINED(host, "NULL_POINTER: host.op_name");
    DECLINED(&good, "UNSUPPORTED: the host's plugin API version is -1");
    title = "deltanet_ggml_read_counters";
    deltanet_ggml_counters counters[2] = {{.struct_size = sizeof *counters, .taken = 77}};
    EXPECT(deltanet_ggml_read_counters(NULL) == DELTANET_STATUS_NULL_POINTER, "null");
    EXPECT(deltanet_ggml_read_counters((void *) ((char *) counters + 1)) == DELTANET_STATUS_MISALIGNED, "misaligned");
    counters->struct_size -= 1;
    EXPECT(deltanet_ggml_read_counters(counters) == DELTANET_STATUS_STRUCT_SIZE && counters->taken == 77, "size");
    counters->struct_size += 1;
    EXPECT(deltanet_ggml_read_counters(counters) == DELTANET_STATUS_OK && counters->taken == 0, "not 0 before any node");
    title = "deltanet_ggml_supports";
    EXPECT(deltanet_ggml_supports(NULL, NULL) == DELTANET_STATUS_NULL_POINTER, "%s", deltanet_last_error());
}

int main(void) {
    /* A hang is a failure too. */
    alarm(SECONDS);
    const char *given = getenv("DELTANET_TEST_SEED");
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    seed = given ? strtoull(given, NULL, 10) : (uint64_t) now.tv_nsec * 1000003u + (uint64_t) now.tv_sec;
    printf("DELTANET_TEST_SEED=%llu\n", (unsigned long long) seed);
    title = "before any error";
    EXPECT(deltanet_last_error()[0] == '\0', "«%s»", deltanet_last_error());
    pointers();
    extents();
    codes();
    snapshots();
    overlaps();
    rows();
    sequences();
    arguments();
    newer_header();
    no_tokens();
    no_sequences();
    allowed();
    not_finite();
    ggml();
    messages();
    printf("%d checks, %d failures\n", checks, failures);
    return failures ? 1 : 0;
}
