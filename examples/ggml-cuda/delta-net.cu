// GGML_OP_DELTA_NET of ik_llama.cpp's CUDA backend, through libdeltanet. Takes the place of
// ggml/src/ggml-cuda/delta-net.cu and exports the same function; deltanet.cmake beside this puts it there.
// SPDX-License-Identifier: MIT
#include "delta-net.cuh" // ik_llama.cpp's
#include "deltanet-ggml.cuh"

void ggml_cuda_op_delta_net(ggml_backend_cuda_context & ctx, ggml_tensor * dst) {
    const ggml_tensor * q = dst->src[0];
    const ggml_tensor * v = dst->src[2];
    const ggml_tensor * state = dst->src[5];
    const ggml_tensor * steps = dst->src[6]; // where the states after all tokens but the last go; may be null
    const ggml_tensor * slot  = dst->src[7]; // where the last state goes instead of dst's tail; may be null
    const int64_t S = q->ne[0], T = q->ne[1], Hk = q->ne[2], B = q->ne[3], H = v->ne[2];
    const int64_t states = S*S*H*B; // elements of one step's states of all sequences

    GGML_ASSERT(q->type == GGML_TYPE_F32 && v->type == GGML_TYPE_F32 && dst->type == GGML_TYPE_F32);
    GGML_ASSERT(ggml_are_same_shape(q, dst->src[1]) && H % Hk == 0);
    GGML_ASSERT(v->ne[0] == S && v->ne[1] == T && v->ne[3] == B);
    GGML_ASSERT(ggml_nelements(dst->src[3]) == H*T*B && ggml_nelements(dst->src[4]) == H*T*B);
    GGML_ASSERT(ggml_nelements(state) == states && ggml_nelements(dst) == S*H*T*B + states);
    GGML_ASSERT(slot == nullptr || (slot->data == state->data && ggml_nelements(slot) == states));
    GGML_ASSERT(steps == nullptr || ggml_nelements(steps) >= (T - 1)*states);

    deltanet_params p = {};
    p.struct_size  = sizeof p;
    p.head_map     = dst->op_params[0] == 0 ? DELTANET_HEAD_MAP_GROUPED : DELTANET_HEAD_MAP_TILED;
    p.state_layout = DELTANET_STATE_LAYOUT_VALUE_CONTIGUOUS;
    p.beta_kind    = DELTANET_BETA_KIND_LOGIT;
    // The engine's q and k are dense [S, T, Hk, B], and g and beta dense [H, T, B] whatever their tensors say.
    const size_t row = S*sizeof(float);
    p.q    = deltanet_ggml::tensor(q->data,           { S, Hk, T, B }, { sizeof(float), row*T, row, row*T*Hk });
    p.k    = deltanet_ggml::tensor(dst->src[1]->data, { S, Hk, T, B }, { sizeof(float), row*T, row, row*T*Hk });
    p.v    = deltanet_ggml::tensor(v->data, { S, H, T, B }, { sizeof(float), v->nb[2], v->nb[1], v->nb[3] });
    p.g    = deltanet_ggml::dense(dst->src[3]->data, 1, H, T, B);
    p.beta = deltanet_ggml::dense(dst->src[4]->data, 1, H, T, B);
    p.out  = deltanet_ggml::dense(dst->data, S, H, T, B);
    p.state_in  = deltanet_ggml::dense(state->data, S, S, H, B);
    p.state_out = deltanet_ggml::dense(slot != nullptr ? slot->data : (float *) dst->data + S*H*T*B, S, S, H, B);
    if (steps != nullptr && T > 1) {
        p.snapshots       = deltanet_ggml::dense(steps->data, S, S, H, B);
        p.snapshot_stride = states*sizeof(float);
        p.snapshot_slots  = (uint32_t) (T - 1);
        p.n_snapshots     = (uint32_t) (T - 1);
        p.snapshot_order  = DELTANET_SNAPSHOT_ORDER_OLDEST_FIRST;
        p.snapshot_skip   = 1;
    }
    p.scale       = 1.0f / sqrtf((float) S);
    p.gate_max    = 50.0f;
    p.state_clamp = 1e6f;
    deltanet_ggml::run(ctx, p);
}
