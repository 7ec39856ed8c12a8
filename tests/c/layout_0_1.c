/* A program as it was built with version 0.1: every field of the old struct in use, memory past its end full of
 * garbage, the answer compared with the equations. SPDX-License-Identifier: MIT */
#include "layout_0_1.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

_Static_assert(sizeof(deltanet_tensor) == LAYOUT_TENSOR_SIZE, "the frozen header was edited");
_Static_assert(sizeof(deltanet_params) == LAYOUT_PARAMS_SIZE, "the frozen header was edited");

enum { S = 16, Hk = 2, Hv = 4, T = 6, B = 2, ROWS = 4, KEPT = 2, SLOTS = 3, SKIP = 1 };
enum { STATE = S * S * Hv, POOL = STATE * ROWS };
#define SCALE 0.7
#define GATE_MAX (-0.4)
#define CLAMP 0.6
#define EPS 1e-3

static float q[S * Hk * T * B], k[S * Hk * T * B], v[S * Hv * T * B], g[S * Hv * T * B], beta[Hv * T * B];
static float pool_in[POOL], pool_out[POOL], out[S * Hv * T * B], kept[SLOTS * B * STATE + 7];
static const int32_t rows_in[B] = {2, 0};
static const int64_t rows_out[B] = {1, 3};

/* The struct as an old program has it, and what happens to lie behind it. */
static struct {
    deltanet_params params;
    unsigned char behind[512];
} call;

static double uniform(double low, double high) { return low + (high - low) * rand() / (double) RAND_MAX; }

static void fill(float *to, size_t n, double low, double high) {
    for (size_t i = 0; i < n; i++) to[i] = (float) uniform(low, high);
}

static deltanet_tensor tensor(void *data, uint32_t dtype, int64_t n0, int64_t n1, int64_t n2, int64_t n3) {
    size_t size = dtype == DTYPE_I64 ? 8 : 4;
    deltanet_tensor t = {.data = data, .ne = {n0, n1, n2, n3}, .dtype = dtype};
    for (int axis = 0; axis < 4; axis++) {
        t.nb[axis] = size;
        size *= (size_t) t.ne[axis];
    }
    return t;
}

static double error, power;

static void compare(float got, double wanted) {
    error += (got - wanted) * (got - wanted);
    power += wanted * wanted;
}

static double clamped(double x) { return x > CLAMP ? CLAMP : x < -CLAMP ? -CLAMP : x; }

/* One sequence and head by the equations: grouped heads, value-contiguous states, a gate a channel with a clamp, beta
 * from a logit, normalised q and k, clamped states, snapshots oldest first that leave the newest state out. */
static void expect(int b, int h) {
    double state[S][S];
    const float *from = pool_in + rows_in[b] * STATE + h * S * S;
    for (int i = 0; i < S; i++)
        for (int j = 0; j < S; j++) state[i][j] = from[i * S + j];
    for (int t = 0; t < T; t++) {
        int key = (h / (Hv / Hk) + Hk * (t + T * b)) * S, value = h + Hv * (t + T * b);
        double qq = EPS, kk = EPS;
        for (int i = 0; i < S; i++) qq += q[key + i] * (double) q[key + i], kk += k[key + i] * (double) k[key + i];
        double strength = 1 / (1 + exp(-beta[value]));
        for (int j = 0; j < S; j++) {
            double recalled = 0, sum = 0;
            for (int i = 0; i < S; i++) {
                double gate = g[value * S + i];
                state[i][j] *= exp(gate > GATE_MAX ? (double) (float) GATE_MAX : gate);
                recalled += state[i][j] * k[key + i] / sqrt(kk);
            }
            double delta = strength * (v[value * S + j] - recalled);
            for (int i = 0; i < S; i++) {
                state[i][j] += delta * k[key + i] / sqrt(kk);
                sum += state[i][j] * q[key + i] / sqrt(qq);
                state[i][j] = clamped(state[i][j]);
            }
            compare(out[value * S + j], SCALE * sum);
        }
        int slot = t - (T - SKIP - KEPT);
        for (int at = 0; at < S * S && slot >= 0 && slot < KEPT; at++)
            compare(kept[slot * (B * STATE + 1) + b * STATE + h * S * S + at], state[at / S][at % S]);
    }
    for (int at = 0; at < S * S; at++)
        compare(pool_out[rows_out[b] * STATE + h * S * S + at], state[at / S][at % S]);
}

static int check(const char *way) {
    error = power = 0;
    for (int b = 0; b < B; b++)
        for (int h = 0; h < Hv; h++) expect(b, h);
    int right = error / power < 1e-11; /* false for NaN */
    printf("layout=0.1 way=%s nmse=%.2e result=%s\n", way, error / power, right ? "ok" : "FAIL");
    /* Rows that no sequence writes, and the slot that is not asked for, are as they were. */
    for (int at = 0; at < STATE; at++)
        if (!isnan(pool_out[at]) || !isnan(pool_out[2 * STATE + at]) || !isnan(kept[KEPT * (B * STATE + 1) + at])) {
            puts("something was written that must not be");
            return 0;
        }
    memset(out, 0xff, sizeof out);
    memset(pool_out, 0xff, sizeof pool_out);
    memset(kept, 0xff, sizeof kept);
    return right;
}

static int refused(const char *what, uint32_t status, uint32_t wanted) {
    if (status == wanted) return 1;
    printf("%s: status %u (%s), not %u\n", what, status, deltanet_status_name(status), wanted);
    return 0;
}

int main(void) {
    unsigned seed = (unsigned) time(NULL);
    srand(seed);
    printf("seed=%u library=%u params=%zu\n", seed, deltanet_version(), sizeof call.params);
    fill(q, sizeof q / 4, -1, 1), fill(k, sizeof k / 4, -1, 1), fill(v, sizeof v / 4, -1, 1);
    fill(g, sizeof g / 4, -1, 0), fill(beta, sizeof beta / 4, -3, 3), fill(pool_in, POOL, -0.5, 0.5);
    memset(out, 0xff, sizeof out);
    memset(pool_out, 0xff, sizeof pool_out);
    memset(kept, 0xff, sizeof kept);

    memset(call.behind, 0xff, sizeof call.behind);
    deltanet_params *p = &call.params;
    *p = (deltanet_params){.struct_size = sizeof *p,
                           .head_map = HEAD_MAP_GROUPED,
                           .state_layout = STATE_VALUE_CONTIGUOUS,
                           .beta_kind = BETA_LOGIT,
                           .q = tensor(q, DTYPE_F32, S, Hk, T, B),
                           .k = tensor(k, DTYPE_F32, S, Hk, T, B),
                           .v = tensor(v, DTYPE_F32, S, Hv, T, B),
                           .g = tensor(g, DTYPE_F32, S, Hv, T, B),
                           .beta = tensor(beta, DTYPE_F32, 1, Hv, T, B),
                           .state_in = tensor(pool_in, DTYPE_F32, S, S, Hv, ROWS),
                           .out = tensor(out, DTYPE_F32, S, Hv, T, B),
                           .state_out = tensor(pool_out, DTYPE_F32, S, S, Hv, ROWS),
                           .snapshots = tensor(kept, DTYPE_F32, S, S, Hv, B),
                           .rows_in = tensor((void *) rows_in, DTYPE_I32, B, 1, 1, 1),
                           .rows_out = tensor((void *) rows_out, DTYPE_I64, B, 1, 1, 1),
                           .snapshot_stride = (B * STATE + 1) * sizeof(float),
                           .snapshot_slots = SLOTS,
                           .n_snapshots = KEPT,
                           .snapshot_order = OLDEST_FIRST,
                           .snapshot_skip = SKIP,
                           .scale = (float) SCALE,
                           .gate_max = (float) GATE_MAX,
                           .state_clamp = (float) CLAMP,
                           .qk_norm = 1,
                           .qk_norm_eps = (float) EPS};
    if (deltanet_supports(p) != STATUS_OK || deltanet_run(p, 2) != STATUS_OK) {
        printf("%s\n", deltanet_last_error());
        return 1;
    }
    int right = check("run");

    size_t size = 0;
    char text[128];
    if (deltanet_scratch_size(p, &size) || deltanet_describe(p, text, sizeof text)) return 1;
    void *scratch = malloc(size);
    for (uint32_t ith = 0; ith < 3; ith++)
        if (!scratch || deltanet_run_part(p, ith, 3, scratch, size)) return 1;
    free(scratch);
    right &= check("run_part");

    /* The last field and the variable-length batch, which the call above leaves alone. */
    p->precision = 99;
    right &= refused("precision", deltanet_supports(p), STATUS_UNKNOWN_VALUE);
    p->precision = 0;
    int32_t starts[] = {0, 2, T};
    p->cu_seqlens = tensor(starts, DTYPE_I32, 3, 1, 1, 1);
    p->q.ne[3] = p->k.ne[3] = p->v.ne[3] = p->g.ne[3] = p->beta.ne[3] = p->out.ne[3] = 1;
    right &= refused("cu_seqlens", deltanet_supports(p), STATUS_OK);
    starts[1] = T + 1;
    right &= refused("cu_seqlens past the end", deltanet_supports(p), 10);
    p->struct_size -= 4;
    right &= refused("struct_size", deltanet_supports(p), STATUS_STRUCT_SIZE);
    return right ? 0 : 1;
}
