// What gated_delta_net.cu (llama.cpp) and delta-net.cu (ik_llama.cpp) share: a call of libdeltanet on ggml-cuda's stream,
// and a kernel for what libdeltanet does not take.
// SPDX-License-Identifier: MIT
#pragma once

#include "common.cuh" // ggml-cuda's
#include <deltanet.h>

#include <atomic>
#include <cstdlib>
#include <cstring>

#if defined(GGML_USE_HIP) || defined(GGML_USE_HIPBLAS) || defined(GGML_USE_MUSA)
#error "libdeltanet has kernels for CUDA alone; build this backend with its own file"
#endif

#ifndef GGML_LOG_INFO // ik_llama.cpp
#include <cstdio>
#define GGML_LOG_INFO(...) fprintf(stderr, __VA_ARGS__)
#endif

namespace deltanet_ggml {

// A warp of the kernel below has one value column; a block has so many.
constexpr int COLUMNS = 4;

template <typename T> static __device__ __forceinline__ T * at(const deltanet_tensor & t, int64_t bytes) {
    return (T *) ((char *) t.data + bytes);
}

// The operator token by token for f32 tensors, in the shapes and with the options that the two engines use: S up to
// 32 * ROWS, all strides, any layout. Runs where libdeltanet has no kernels (GPUs before Turing) or refuses a call.
template <int ROWS> static __global__ void __launch_bounds__(WARP_SIZE * COLUMNS) token_serial(const deltanet_params p) {
    const int64_t S = p.v.ne[0], H = p.v.ne[1], T = p.v.ne[2], B = p.v.ne[3];
    const int64_t column = (int64_t) blockIdx.x * COLUMNS + threadIdx.y, h = blockIdx.y, b = blockIdx.z;
    const int     lane   = threadIdx.x;
    if (column >= S) {
        return;
    }
    const int64_t kh = p.head_map == DELTANET_HEAD_MAP_TILED ? h % p.k.ne[1] : h / (H / p.k.ne[1]);
    const int64_t bq = b / (B / p.k.ne[3]);
    const bool    by_channel = p.g.ne[0] > 1;
    const bool    by_value   = p.state_layout == DELTANET_STATE_LAYOUT_VALUE_CONTIGUOUS;
    // A state's element of this column: its base, and its stride along the key channels.
    const auto in_state  = [&](const deltanet_tensor & t) { return h*t.nb[2] + b*t.nb[3] + column*t.nb[by_value ? 0 : 1]; };
    const auto key_bytes = [&](const deltanet_tensor & t) { return by_value ? t.nb[1] : t.nb[0]; };

    float s[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        const int64_t i = r*WARP_SIZE + lane;
        s[r] = i < S ? *at<float>(p.state_in, in_state(p.state_in) + i*key_bytes(p.state_in)) : 0.0f;
    }
    const auto store = [&](const deltanet_tensor & t, int64_t offset) {
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            const int64_t i = r*WARP_SIZE + lane;
            if (i < S) {
                *at<float>(t, in_state(t) + offset + i*key_bytes(t)) = s[r];
            }
        }
    };

    const int64_t last_kept  = T - 1 - p.snapshot_skip;
    const int64_t first_kept = last_kept - p.n_snapshots + 1 > 0 ? last_kept - p.n_snapshots + 1 : 0;
    for (int64_t t = 0; t < T; t++) {
        float beta = *at<float>(p.beta, h*p.beta.nb[1] + t*p.beta.nb[2] + b*p.beta.nb[3]);
        if (p.beta_kind == DELTANET_BETA_KIND_LOGIT) {
            beta = 1.0f / (1.0f + expf(-beta));
        }
        const float v = *at<float>(p.v, column*p.v.nb[0] + h*p.v.nb[1] + t*p.v.nb[2] + b*p.v.nb[3]);
        float k[ROWS];
        float seen = 0.0f;
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            const int64_t i = r*WARP_SIZE + lane;
            k[r] = 0.0f;
            if (i < S) {
                k[r] = *at<float>(p.k, i*p.k.nb[0] + kh*p.k.nb[1] + t*p.k.nb[2] + bq*p.k.nb[3]);
                float g = *at<float>(p.g, (by_channel ? i*p.g.nb[0] : 0) + h*p.g.nb[1] + t*p.g.nb[2] + b*p.g.nb[3]);
                if (p.gate_max > 0.0f) {
                    g = fminf(g, p.gate_max);
                }
                s[r] *= expf(g);
                seen += s[r] * k[r];
            }
        }
        const float delta = beta * (v - warp_reduce_sum(seen));
        float out = 0.0f;
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            const int64_t i = r*WARP_SIZE + lane;
            if (i < S) {
                s[r] += k[r] * delta;
                out  += s[r] * *at<float>(p.q, i*p.q.nb[0] + kh*p.q.nb[1] + t*p.q.nb[2] + bq*p.q.nb[3]);
                if (p.state_clamp > 0.0f) {
                    s[r] = fminf(fmaxf(s[r], -p.state_clamp), p.state_clamp);
                }
            }
        }
        out = warp_reduce_sum(out);
        if (lane == 0) {
            *at<float>(p.out, column*p.out.nb[0] + h*p.out.nb[1] + t*p.out.nb[2] + b*p.out.nb[3]) = out * p.scale;
        }
        if (p.n_snapshots > 0 && t >= first_kept && t <= last_kept) {
            const bool newest_first = p.snapshot_order == DELTANET_SNAPSHOT_ORDER_NEWEST_FIRST;
            store(p.snapshots, (newest_first ? last_kept - t : t - first_kept) * p.snapshot_stride);
        }
    }
    if (p.state_out.data != nullptr) {
        store(p.state_out, 0);
    }
}

static void run_token_serial(const deltanet_params & p, cudaStream_t stream) {
    const int64_t S = p.v.ne[0];
    const dim3 grid((S + COLUMNS - 1) / COLUMNS, p.v.ne[1], p.v.ne[3]);
    const dim3 block(WARP_SIZE, COLUMNS);
    if (S <= 32) {
        token_serial<1><<<grid, block, 0, stream>>>(p);
    } else if (S <= 64) {
        token_serial<2><<<grid, block, 0, stream>>>(p);
    } else if (S <= 128) {
        token_serial<4><<<grid, block, 0, stream>>>(p);
    } else if (S <= 256) {
        token_serial<8><<<grid, block, 0, stream>>>(p);
    } else {
        GGML_ABORT("gated delta net: head size %d is above 256", (int) S);
    }
    CUDA_CHECK(cudaGetLastError());
}

// Says once in a process and device who does the work.
static void tell(int device, bool served, const char * why) {
    static std::atomic<bool> told[GGML_CUDA_MAX_DEVICES][2];
    if (!told[device][served].exchange(true)) {
        GGML_LOG_INFO("deltanet %s: CUDA device %d: %s%s\n", deltanet_version_string(), device,
            served ? "libdeltanet runs the gated delta net" : "token-serial kernel: ", why);
    }
}

// Whether the workspace can come from the pool: a pool that cannot grow ends the process, and without the workspace
// there is still the token-serial kernel. Asks the driver only where more is wanted than ever before.
static bool has_room(int device, size_t bytes) {
    static std::atomic<size_t> largest[GGML_CUDA_MAX_DEVICES];
    if (bytes <= largest[device].load()) {
        return true;
    }
    size_t available = 0, total = 0;
    CUDA_CHECK(cudaMemGetInfo(&available, &total));
    if (available < bytes + bytes/4) {
        return false;
    }
    largest[device].store(bytes);
    return true;
}

// Hands the call to libdeltanet; false where it was not taken, and then nothing is on the stream.
static bool run_library(ggml_backend_cuda_context & ctx, const deltanet_params & p) {
    static const bool off = [] {
        const char * value = getenv("DELTANET_GGML_CUDA");
        return value != nullptr && strcmp(value, "off") == 0;
    }();
    static std::atomic<bool> refused[GGML_CUDA_MAX_DEVICES]; // a device without kernels stays one
    if (off || refused[ctx.device].load()) {
        tell(ctx.device, false, off ? "DELTANET_GGML_CUDA is off" : "");
        return false;
    }
    // ggml-cuda evaluates a graph before it captures it, so the kernels are loaded by then. Should the first call come in
    // a capture all the same, here or in another thread, relaxed mode lets this thread load them.
    cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
    CUDA_CHECK(cudaThreadExchangeStreamCaptureMode(&mode));
    deltanet_status status = deltanet_cuda_prepare(); // once a context; returns at once from then on
    CUDA_CHECK(cudaThreadExchangeStreamCaptureMode(&mode));
    if (status == DELTANET_STATUS_UNSUPPORTED) {
        refused[ctx.device].store(true);
    }
    size_t bytes = 0;
    if (status == DELTANET_STATUS_OK) {
        status = deltanet_cuda_workspace_size(&p, &bytes);
    }
    if (status == DELTANET_STATUS_OK) {
        if (!has_room(ctx.device, bytes)) {
            tell(ctx.device, false, "no memory for libdeltanet's workspace");
            return false;
        }
        // Given back to the pool on return: what takes it next is on the same stream, after this.
        ggml_cuda_pool_alloc<char> workspace(ctx.pool());
        if (bytes > 0) {
            workspace.alloc(bytes);
        }
        status = deltanet_cuda_run(&p, workspace.get(), bytes, ctx.stream());
    }
    const bool served = status == DELTANET_STATUS_OK;
    tell(ctx.device, served, served ? "" : deltanet_last_error());
    return served;
}

static void run(ggml_backend_cuda_context & ctx, const deltanet_params & p) {
    if (!run_library(ctx, p)) {
        run_token_serial(p, ctx.stream());
    }
}

// A tensor of f32 with these extents and strides in bytes.
static deltanet_tensor tensor(const void * data, const int64_t (&ne)[4], const size_t (&nb)[4]) {
    deltanet_tensor t = {};
    t.data = const_cast<void *>(data); // inputs are only read
    memcpy(t.ne, ne, sizeof t.ne);
    memcpy(t.nb, nb, sizeof t.nb);
    t.dtype = DELTANET_DTYPE_F32;
    return t;
}

// One whose elements follow each other.
static deltanet_tensor dense(const void * data, int64_t n0, int64_t n1, int64_t n2, int64_t n3) {
    const size_t row = n0 * sizeof(float);
    return tensor(data, { n0, n1, n2, n3 }, { sizeof(float), row, row*n1, row*n1*n2 });
}

} // namespace deltanet_ggml
