/* The operator inside a ggml graph that this program builds itself: deltanet_ggml_custom_op as a ggml_custom_4d node.
 * The graph has ggml's own operator beside it, on the same tensors, and the program compares the two.
 *
 * build: cc -O2 custom_op.c -I<ggml>/include -I../../include -L<ggml>/lib -lggml -lggml-base -lggml-cpu
 *           -L../../target/release -ldeltanet -lm
 */
#include "deltanet.h"
#include "ggml-backend.h"
#include "ggml-cpu.h"
#include "ggml.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

enum { S = 64, HK = 2, HV = 4, T = 7, B = 3, K = 2 };

static float uniform(void) {
    return (float) rand() / (float) RAND_MAX;
}

static struct ggml_tensor * input(struct ggml_context * ctx, int64_t n0, int64_t n1, int64_t n2, int64_t n3, float low, float high) {
    struct ggml_tensor * t = ggml_new_tensor_4d(ctx, GGML_TYPE_F32, n0, n1, n2, n3);
    for (int64_t i = 0; i < ggml_nelements(t); i++) {
        ((float *) t->data)[i] = low + (high - low) * uniform();
    }
    return t;
}

int main(void) {
    const struct ggml_init_params memory = { /*.mem_size =*/ 64 << 20, /*.mem_buffer =*/ NULL, /*.no_alloc =*/ false };
    struct ggml_context * ctx = ggml_init(memory);
    if (!ctx) {
        return 1;
    }
    /* q and k are of unit length, as models make them: without that the state grows without bound. */
    struct ggml_tensor * args[] = {
        ggml_l2_norm(ctx, input(ctx, S, HK, T, B, -1.0f, 1.0f), 1e-6f),
        ggml_l2_norm(ctx, input(ctx, S, HK, T, B, -1.0f, 1.0f), 1e-6f),
        input(ctx, S, HV, T, B, -1.0f, 1.0f),
        input(ctx, 1, HV, T, B, -1.0f, 0.0f),
        input(ctx, 1, HV, T, B, 0.0f, 1.0f),
        input(ctx, S, S, HV, B, -1.0f, 1.0f),
    };

    /* The outputs, and behind them the states after the last K tokens, the newest first. */
    struct ggml_tensor * ours = ggml_custom_4d(ctx, GGML_TYPE_F32, S * HV, T * B + K * S * B, 1, 1, args, 6,
                                               deltanet_ggml_custom_op, GGML_N_TASKS_MAX, NULL);
    if (deltanet_ggml_supports(ours, NULL) != DELTANET_STATUS_OK) {
        fprintf(stderr, "%s\n", deltanet_last_error());
        return 1;
    }
    struct ggml_tensor * own = ggml_gated_delta_net(ctx, args[0], args[1], args[2], args[3], args[4], args[5], K);

    struct ggml_cgraph * graph = ggml_new_graph(ctx);
    ggml_build_forward_expand(graph, ours);
    ggml_build_forward_expand(graph, own);
    ggml_backend_t cpu = ggml_backend_init_by_type(GGML_BACKEND_DEVICE_TYPE_CPU, NULL);
    if (!cpu || ggml_backend_graph_compute(cpu, graph) != GGML_STATUS_SUCCESS) {
        return 1;
    }

    double error = 0, square = 0;
    for (int64_t i = 0; i < ggml_nelements(own); i++) {
        const double a = ((float *) own->data)[i], b = ((float *) ours->data)[i];
        error += (a - b) * (a - b);
        square += a * a;
    }
    printf("%lld elements, NMSE against ggml's own operator %.1e\n", (long long) ggml_nelements(own), error / square);
    ggml_backend_free(cpu);
    ggml_free(ctx);
    return error / square < 1e-9 ? 0 : 1;
}
