/* Head shards and sequence shards: strided views of the full tensors, no copy, the bits of the whole run.
 *
 * A tensor-parallel engine gives each device some key heads and the value heads that use them. With the grouped map
 * these are one range, so a shard is one call; with the tiled map (ggml) they are Hk apart, so a shard is Hv / Hk
 * calls. A data-parallel engine gives each device some sequences: rows of one state pool. */
#include "deltanet.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { S = 128, HK = 16, HV = 32, T = 48, B = 4 };

typedef struct {
    float *q, *k, *v, *g, *beta, *state, *out;
    deltanet_params params;
} problem;

static float uniform(float low, float high) { return low + (high - low) * (float)rand() / (float)RAND_MAX; }

static float *filled(size_t n, float low, float high) {
    float *data = malloc(n * sizeof *data);
    if (!data) abort();
    for (size_t i = 0; i < n; i++) data[i] = uniform(low, high);
    return data;
}

static deltanet_tensor dense(float *data, int64_t n0, int64_t n1, int64_t n2, int64_t n3) {
    const size_t b1 = sizeof(float) * (size_t)n0, b2 = b1 * (size_t)n1, b3 = b2 * (size_t)n2;
    deltanet_tensor t = { .data = data, .ne = { n0, n1, n2, n3 }, .nb = { sizeof(float), b1, b2, b3 },
                          .dtype = DELTANET_DTYPE_F32 };
    return t;
}

/* Entries first .. first + count along an axis: the same memory, another start and extent. */
static deltanet_tensor slice(deltanet_tensor t, int axis, int64_t first, int64_t count) {
    t.data = (char *)t.data + (size_t)first * t.nb[axis];
    t.ne[axis] = count;
    return t;
}

static deltanet_params heads(const deltanet_params *p, int64_t key, int64_t keys, int64_t value, int64_t values) {
    deltanet_params part = *p;
    part.q = slice(p->q, 1, key, keys);
    part.k = slice(p->k, 1, key, keys);
    part.v = slice(p->v, 1, value, values);
    part.g = slice(p->g, 1, value, values);
    part.beta = slice(p->beta, 1, value, values);
    part.out = slice(p->out, 1, value, values);
    part.state_in = slice(p->state_in, 2, value, values);
    part.state_out = slice(p->state_out, 2, value, values);
    return part;
}

static void run(const deltanet_params *p) {
    if (deltanet_run(p, 0) != DELTANET_STATUS_OK) {
        fprintf(stderr, "%s\n", deltanet_last_error());
        exit(1);
    }
}

/* Shard `at` of `shards`: as many key heads, and all value heads of those. */
static void run_head_shard(const deltanet_params *p, int64_t at, int64_t shards) {
    const int64_t keys = HK / shards, repeat = HV / HK;
    if (p->head_map == DELTANET_HEAD_MAP_GROUPED) {
        const deltanet_params part = heads(p, at * keys, keys, at * keys * repeat, keys * repeat);
        run(&part);
        return;
    }
    for (int64_t j = 0; j < repeat; j++) {
        const deltanet_params part = heads(p, at * keys, keys, j * HK + at * keys, keys);
        run(&part);
    }
}

/* Sequence `b` alone; the state pool stays whole, and the shard names its row of it. */
static void run_sequence_shard(const deltanet_params *p, int32_t b) {
    deltanet_params part = *p;
    deltanet_tensor *tokens[] = { &part.q, &part.k, &part.v, &part.g, &part.beta, &part.out };
    for (size_t i = 0; i < sizeof tokens / sizeof *tokens; i++) *tokens[i] = slice(*tokens[i], 3, b, 1);
    deltanet_tensor row = { .data = &b, .ne = { 1, 1, 1, 1 }, .nb = { 4, 4, 4, 4 }, .dtype = DELTANET_DTYPE_I32 };
    part.rows_in = part.rows_out = row;
    run(&part);
}

int main(void) {
    const size_t key_size = (size_t)S * HK * T * B, value_size = (size_t)S * HV * T * B, gates = (size_t)HV * T * B;
    const size_t state_size = (size_t)S * S * HV * B;
    problem p = { .q = filled(key_size, -0.1f, 0.1f),    .k = filled(key_size, -0.1f, 0.1f),
                  .v = filled(value_size, -1.0f, 1.0f),  .g = filled(gates, -1.0f, 0.0f),
                  .beta = filled(gates, 0.0f, 1.0f),     .state = filled(state_size, -1.0f, 1.0f),
                  .out = filled(value_size, 0.0f, 0.0f), .params = { .struct_size = sizeof(deltanet_params) } };
    p.params.q = dense(p.q, S, HK, T, B);
    p.params.k = dense(p.k, S, HK, T, B);
    p.params.v = dense(p.v, S, HV, T, B);
    p.params.g = dense(p.g, 1, HV, T, B);
    p.params.beta = dense(p.beta, 1, HV, T, B);
    p.params.out = dense(p.out, S, HV, T, B);
    p.params.state_in = p.params.state_out = dense(p.state, S, S, HV, B);

    float *before = malloc(state_size * sizeof(float)), *out = malloc(value_size * sizeof(float));
    float *after = malloc(state_size * sizeof(float));
    if (!before || !out || !after) abort();
    memcpy(before, p.state, state_size * sizeof(float));
    int failed = 0;
    for (uint32_t map = DELTANET_HEAD_MAP_TILED; map <= DELTANET_HEAD_MAP_GROUPED; map++) {
        p.params.head_map = map;
        memcpy(p.state, before, state_size * sizeof(float));
        run(&p.params);
        memcpy(out, p.out, value_size * sizeof(float));
        memcpy(after, p.state, state_size * sizeof(float));
        for (int64_t shards = 0; shards <= HK; shards = shards ? 2 * shards : 2) { /* 0: by sequence */
            memcpy(p.state, before, state_size * sizeof(float));
            memset(p.out, 0xff, value_size * sizeof(float));
            for (int64_t at = 0; at < (shards ? shards : B); at++) {
                if (shards) run_head_shard(&p.params, at, shards);
                else run_sequence_shard(&p.params, (int32_t)at);
            }
            const int same = !memcmp(out, p.out, value_size * sizeof(float)) &&
                             !memcmp(after, p.state, state_size * sizeof(float));
            printf("%-7s %2d shards by %-8s %s\n", map == DELTANET_HEAD_MAP_TILED ? "tiled" : "grouped",
                   (int)(shards ? shards : B), shards ? "head" : "sequence", same ? "same bits" : "DIFFERENT");
            failed |= !same;
        }
    }
    float *all[] = { p.q, p.k, p.v, p.g, p.beta, p.state, p.out, before, out, after };
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) free(all[i]);
    return failed;
}
