/* A stand-in for ik_llama.cpp: a library with its own iqk_fused_delta_net, in one of the forms that the function has
 * had (VERSION), and with the operator that calls it. Built without one of its own (VERSION 0), it is an engine that
 * was changed to call deltanet's. The function is plain loops over the equations. */
#include <math.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { FIRST = 1, RATIO, PLAIN, SAVE_ALL, SAVED_STEPS, UNKNOWN_ARGUMENT, OTHER_BETA };

typedef struct {
    int S, H, ratio, repeat, T, B;
    size_t v_token, v_head, v_sequence;
    const float *q, *k, *v, *g, *beta, *state_in;
    float *out, *state_out, *saved;
    int step_stride, ith, nth;
} call;

static int own_calls, own_heads;

/* The heads of part ith of nth. */
static bool compute(const call *c) {
    own_calls++;
    if (c->S != 64 && c->S != 128) return false;
    int S = c->S, all = c->H * c->B, each = (all + c->nth - 1) / c->nth;
    long first = (long) c->ith * each, end = first + each < all ? first + each : all;
    for (long at = first; at < end; at++) {
        own_heads++;
        int b = (int) (at / c->H), h = (int) (at % c->H), key_heads = c->H / c->ratio;
        int kh = c->repeat == 0 ? h / c->ratio : h % key_heads;
        float *state = c->state_out + at * S * S;
        memmove(state, c->state_in + at * S * S, sizeof(float) * (size_t) (S * S));
        for (int t = 0; t < c->T; t++) {
            const float *q = c->q + ((b * key_heads + kh) * c->T + t) * S, *k = c->k + (q - c->q);
            const float *v = c->v + (size_t) b * c->v_sequence + (size_t) h * c->v_head + (size_t) t * c->v_token;
            float raw = c->beta[(b * c->T + t) * c->H + h];
            float beta = VERSION == OTHER_BETA ? raw : 1 / (1 + expf(-raw));
            float decay = expf(fminf(c->g[(b * c->T + t) * c->H + h], 50));
            for (int j = 0; j < S; j++) {
                float seen = 0, o = 0;
                for (int i = 0; i < S; i++) seen += (state[i * S + j] *= decay) * k[i];
                float delta = beta * (v[j] - seen);
                for (int i = 0; i < S; i++) o += (state[i * S + j] += k[i] * delta) * q[i];
                c->out[((b * c->T + t) * c->H + h) * S + j] = o / sqrtf((float) S);
            }
            for (int i = 0; i < S * S; i++) state[i] = fmaxf(fminf(state[i], 1e6f), -1e6f);
            if (c->saved && t + 1 < c->T)
                memcpy(c->saved + (size_t) t * (size_t) c->step_stride + at * S * S, state, sizeof(float) * (size_t) (S * S));
        }
    }
    return true;
}

#define SHAPE int S, int H, int ratio, int repeat, int T, int B
#define STRIDES size_t v1, size_t v2, size_t v3
#define TENSORS const float *q, const float *k, const float *v, const float *g, const float *beta, \
    const float *state_in, float *out, float *state_out
#define PARTS int ith, int nth

#if VERSION == 1
bool iqk_fused_delta_net(int S, int H, int T, int B, TENSORS, PARTS) {
    call c = { S, H, 1, 0, T, B, (size_t) S, (size_t) (S * T), (size_t) (S * T * H), q, k, v, g, beta, state_in, out,
        state_out, NULL, 0, ith, nth };
    return compute(&c);
}
#define CALL(c) iqk_fused_delta_net(c->S, c->H, c->T, c->B, c->q, c->k, c->v, c->g, c->beta, c->state_in, c->out, \
    c->state_out, c->ith, c->nth)
#elif VERSION == 2
bool iqk_fused_delta_net(SHAPE, TENSORS, PARTS) {
    call c = { S, H, ratio, repeat, T, B, (size_t) S, (size_t) (S * T), (size_t) (S * T * H), q, k, v, g, beta,
        state_in, out, state_out, NULL, 0, ith, nth };
    return compute(&c);
}
#define CALL(c) iqk_fused_delta_net(c->S, c->H, c->ratio, c->repeat, c->T, c->B, c->q, c->k, c->v, c->g, c->beta, \
    c->state_in, c->out, c->state_out, c->ith, c->nth)
#elif VERSION == 3
bool iqk_fused_delta_net(SHAPE, STRIDES, TENSORS, PARTS) {
    call c = { S, H, ratio, repeat, T, B, v1, v2, v3, q, k, v, g, beta, state_in, out, state_out, NULL, 0, ith, nth };
    return compute(&c);
}
#define CALL(c) iqk_fused_delta_net(c->S, c->H, c->ratio, c->repeat, c->T, c->B, c->v_token, c->v_head, \
    c->v_sequence, c->q, c->k, c->v, c->g, c->beta, c->state_in, c->out, c->state_out, c->ith, c->nth)
#elif VERSION == 4
bool iqk_fused_delta_net(SHAPE, STRIDES, TENSORS, int save_all, int stride, PARTS) {
    /* This version saved its steps behind state_out. */
    float *saved = save_all ? state_out + stride : NULL;
    call c = { S, H, ratio, repeat, T, B, v1, v2, v3, q, k, v, g, beta, state_in, out, state_out, saved, stride, ith,
        nth };
    return compute(&c);
}
#define CALL(c) iqk_fused_delta_net(c->S, c->H, c->ratio, c->repeat, c->T, c->B, c->v_token, c->v_head, \
    c->v_sequence, c->q, c->k, c->v, c->g, c->beta, c->state_in, c->out, c->state_out, 0, 0, c->ith, c->nth)
#elif VERSION == 6
bool iqk_fused_delta_net(SHAPE, STRIDES, TENSORS, float *saved, int stride, int extra, PARTS) {
    call c = { S, H, ratio, repeat, T, B, v1, v2, v3, q, k, v, g, beta, state_in, out, state_out, saved, stride, ith,
        nth };
    (void) extra;
    return compute(&c);
}
#define CALL(c) iqk_fused_delta_net(c->S, c->H, c->ratio, c->repeat, c->T, c->B, c->v_token, c->v_head, \
    c->v_sequence, c->q, c->k, c->v, c->g, c->beta, c->state_in, c->out, c->state_out, c->saved, c->step_stride, 42, \
    c->ith, c->nth)
#else
bool iqk_fused_delta_net(SHAPE, STRIDES, TENSORS, float *saved, int stride, PARTS)
#if VERSION == 0
;
#else
{
    call c = { S, H, ratio, repeat, T, B, v1, v2, v3, q, k, v, g, beta, state_in, out, state_out, saved, stride, ith,
        nth };
    return compute(&c);
}
#endif
#define CALL(c) iqk_fused_delta_net(c->S, c->H, c->ratio, c->repeat, c->T, c->B, c->v_token, c->v_head, \
    c->v_sequence, c->q, c->k, c->v, c->g, c->beta, c->state_in, c->out, c->state_out, c->saved, c->step_stride, \
    c->ith, c->nth)
#endif

static float *numbers(size_t count, float scale) {
    float *p = malloc(sizeof(float) * (count + 1));
    if (!p) exit(3);
    for (size_t i = 0; i < count; i++) p[i] = scale * ((float) rand() / (float) RAND_MAX - 0.5f);
    return p;
}

static double difference(const float *a, const float *b, size_t count) {
    double error = 0, power = 0;
    for (size_t i = 0; i < count; i++) {
        error += ((double) a[i] - b[i]) * ((double) a[i] - b[i]);
        power += (double) b[i] * b[i];
    }
    return error / power;
}

/* Runs the operator through the symbol twice and compares with the loops above. Prints what the engine's own function
 * had to do each time. */
int engine_main(int S) {
    int H = 4, ratio = VERSION == FIRST ? 1 : 2, T = 5, B = 2, nth = 3;
    size_t rows = (size_t) (S * H * T * B), states = (size_t) (S * S * H * B);
    call c = { S, H, ratio, 1, T, B, (size_t) S, (size_t) (S * T), (size_t) (S * T * H), numbers(rows, 0.5f),
        numbers(rows, 0.5f), numbers(rows, 2), numbers((size_t) (H * T * B), 1), numbers((size_t) (H * T * B), 4),
        numbers(states, 1), numbers(rows, 0), numbers(states, 0), NULL, (int) states, 0, 1 };
    if (VERSION == FIRST) c.repeat = 0;
    if (VERSION == 0 || VERSION >= SAVED_STEPS) c.saved = numbers(states * (size_t) (T - 1), 0);
    call want = c;
    want.out = numbers(rows, 0);
    want.state_out = numbers(states, 0);
    if (c.saved) want.saved = numbers(states * (size_t) (T - 1), 0);
    bool serves = compute(&want);
    for (int round = 0; round < 2; round++) {
        own_calls = own_heads = 0;
        for (c.ith = 0, c.nth = nth; c.ith < nth; c.ith++) {
            const call *p = &c;
            if (CALL(p) != serves) return puts("answered otherwise"), 1;
        }
        printf("round %d: own function computed %d heads in %d calls\n", round, own_heads, own_calls);
    }
    if (!serves) return puts("not served by either"), 0;
    double out = difference(c.out, want.out, rows), state = difference(c.state_out, want.state_out, states);
    double saved = c.saved ? difference(c.saved, want.saved, states * (size_t) (T - 1)) : 0;
    printf("NMSE: out %.1e, state %.1e, saved steps %.1e\n", out, state, saved);
    return out < 1e-10 && state < 1e-10 && saved < 1e-10 ? 0 : 2;
}
