// Few heads leave most of a device idle while a scan goes from chunk to chunk. A slab is then cut into pieces that are
// scanned side by side, once their first states are known: what a piece does to a state is linear,
//     S_{q+1} = M_q S_q + N_q
// with M_q what becomes of the identity without V, and N_q what becomes of a zero state. The scan's TRANSITION form makes
// both; this kernel joins them. Rows of the states (value columns) do not mix: a block has ROWS of them for all pieces.
#pragma once
#include "chunk_tiles.cuh"

static constexpr int JOIN_ROWS = 4;

// 2 S threads: one for each key and half of the old keys.
template <int S>
__device__ inline void chunk_join(const dn_chunk_args &a) {
    constexpr int ROWS = JOIN_ROWS, OLD = S / 2;
    __shared__ __align__(16) float state[ROWS][S], partial[ROWS][S];
    const int h = blockIdx.y, sequence = blockIdx.z, k = threadIdx.x % S, half = threadIdx.x / S;
    wait_for_previous();
    launch_next();
    const auto tile = [&](void *base, int slot) {
        return (float *)base + ((int64_t)(slot * a.nseq + sequence) * a.p.Hv + h) * S * S;
    };
    float *const first = tile(a.carry, 2) + blockIdx.x * ROWS * S + k; // of piece 1
    const int64_t step = (int64_t)a.nseq * a.p.Hv * S * S;               // from a piece to the next
    const float *m = tile(a.transitions, 0) + half * OLD * S + k;        // row j: what becomes of key j
    if (half == 0) {
#pragma unroll
        for (int r = 0; r < ROWS; r++) state[r][k] = first[r * S];
    }
    float next[OLD];
#pragma unroll
    for (int j = 0; j < OLD; j++) next[j] = m[j * S];
    for (int q = 1; q < a.pieces - 1; q++) {
        float now[OLD], own[ROWS], sum[ROWS];
#pragma unroll
        for (int j = 0; j < OLD; j++) now[j] = next[j];
        m += step;
        if (q + 1 < a.pieces - 1) {
#pragma unroll
            for (int j = 0; j < OLD; j++) next[j] = m[j * S];
        }
#pragma unroll
        for (int r = 0; r < ROWS; r++) own[r] = half ? 0.0f : first[q * step + r * S], sum[r] = 0;
        __syncthreads(); // the state is there
#pragma unroll
        for (int j = 0; j < OLD; j += 4) {
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
                const float4 x = *(const float4 *)&state[r][half * OLD + j];
                sum[r] = fmaf(x.x, now[j], fmaf(x.y, now[j + 1], fmaf(x.z, now[j + 2], fmaf(x.w, now[j + 3], sum[r]))));
            }
        }
        if (half == 1) {
#pragma unroll
            for (int r = 0; r < ROWS; r++) partial[r][k] = sum[r];
        }
        __syncthreads(); // and read
        if (half == 0) {
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
                const float x = own[r] + (sum[r] + partial[r][k]);
                state[r][k] = x;
                first[q * step + r * S] = x;
            }
        }
    }
}
