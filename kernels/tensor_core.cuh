// Products on tensor cores: bf16 splitting, and the products of a register operand with a tile in shared memory that three
// bf16 products make (wgmma on sm_90a, ldmatrix + mma.sync elsewhere).
//
// Every product here has the form acc[16 or 64 rows][n] += A[rows][k] B[k][n]: A in registers in the m16n8k16 fragment
// order, one m16 slice per warp, B a tile image in shared memory, acc in the m16n8 accumulator order. wgmma and mma.sync
// agree on both register layouts, so that a kernel is written once for the two of them.
#pragma once
#include "common.cuh"

// A compile-time integer as an argument.
template <int N>
struct Index {
    static constexpr int value = N;
};

// The same to a 16-bit dtype.
__device__ inline uint32_t pack_16(float x0, float x1, int dtype) {
    return dtype == DN_BF16 ? pack_bf16(x0, x1) : pack_f16(x0, x1);
}

// x = hi + lo up to 2^-17 relative: what three bf16 products (hi hi, hi lo, lo hi) need for 16-bit accuracy.
__device__ inline void split_bf16(float x0, float x1, uint32_t &hi, uint32_t &lo) {
    hi = pack_bf16(x0, x1);
    lo = pack_bf16(x0 - __uint_as_float(hi << 16), x1 - __uint_as_float(hi & 0xffff0000u));
}

// acc += a b for two n-tiles.
__device__ inline void mma_pair(float (*acc)[4], const uint32_t (&a)[4], const uint32_t (&b)[4]) {
    mma_bf16(acc[0], a, b[0], b[1]);
    mma_bf16(acc[1], a, b[2], b[3]);
}
// The same in three products, the small ones first; in the high parts' alone for PARTS = 1.
template <int PARTS>
__device__ inline void mma_split(float (*acc)[4], const uint32_t (&ah)[4], const uint32_t (&al)[4], const uint32_t (&bh)[4],
                                 const uint32_t (&bl)[4]) {
    if (PARTS == 2) {
        mma_pair(acc, al, bh);
        mma_pair(acc, ah, bl);
    }
    mma_pair(acc, ah, bh);
}
