// GGML_OP_GATED_DELTA_NET of llama.cpp's ggml-cuda, through libdeltanet. Takes the place of
// ggml/src/ggml-cuda/gated_delta_net.cu and exports the same two functions; deltanet.cmake beside this puts it there.
// SPDX-License-Identifier: MIT
#include "gated_delta_net.cuh" // ggml-cuda's
#include "deltanet-ggml.cuh"

static deltanet_tensor as_it_is(const ggml_tensor * t) {
    GGML_ASSERT(t->type == GGML_TYPE_F32);
    return deltanet_ggml::tensor(t->data, t->ne, t->nb);
}

// `cache`: where the states go instead of dst's tail; null for that.
static void run(ggml_backend_cuda_context & ctx, ggml_tensor * dst, const ggml_cuda_gated_delta_net_fused_cache * cache) {
    const ggml_tensor * v = dst->src[2];
    const int64_t S = v->ne[0], H = v->ne[1], T = v->ne[2], B = v->ne[3];
    const int64_t states = S*S*H*B; // elements of one snapshot of all sequences

    deltanet_params p = {};
    p.struct_size = sizeof p;
    p.q        = as_it_is(dst->src[0]);
    p.k        = as_it_is(dst->src[1]);
    p.v        = as_it_is(v);
    p.g        = as_it_is(dst->src[3]);
    p.beta     = as_it_is(dst->src[4]);
    p.state_in = as_it_is(dst->src[5]);
    p.out      = deltanet_ggml::dense(dst->data, S, H, T, B);
    p.scale    = 1.0f / sqrtf((float) S);

    float * tail = (float *) dst->data + S*H*T*B;
    const deltanet_tensor newest = deltanet_ggml::dense(cache != nullptr ? cache->data : tail, S, S, H, B);
    // Slots past the tokens there are stay the caller's.
    const int64_t kept = std::min<int64_t>(ggml_get_op_params_i32(dst, 0), T);
    if (kept > 1) {
        p.snapshots       = newest;
        p.snapshot_stride = (cache != nullptr ? cache->slot_stride : states) * sizeof(float);
        p.snapshot_slots  = (uint32_t) kept;
        p.n_snapshots     = (uint32_t) kept;
        p.snapshot_order  = DELTANET_SNAPSHOT_ORDER_NEWEST_FIRST;
    } else {
        p.state_out = newest;
    }
    GGML_ASSERT(cache != nullptr || ggml_nelements(dst) >= S*H*T*B + std::max<int64_t>(kept, 1)*states);
    deltanet_ggml::run(ctx, p);
}

void ggml_cuda_op_gated_delta_net(ggml_backend_cuda_context & ctx, ggml_tensor * dst) {
    run(ctx, dst, nullptr);
}

void ggml_cuda_op_gated_delta_net_fused_cache(
        ggml_backend_cuda_context & ctx, ggml_tensor * dst, ggml_cuda_gated_delta_net_fused_cache cache) {
    run(ctx, dst, &cache);
}
