// The chunked (WY) kernel for prompts: scalar gate, head sizes 64 and 128, sm_80 and newer. See chunk_prepare.cuh and
// chunk_scan.cuh, chunk_cluster.cuh for the scan on Hopper, chunk_single.cuh for sequences of one chunk there, chunk_join.cuh
// for few heads. Precision, head size, chunk length and the layout of v and out are in the names; src/cuda/chunked.rs picks.
#include "chunk_prepare.cuh"
#include "chunk_scan.cuh"
#include "chunk_cluster.cuh"
#include "chunk_single.cuh"
#include "chunk_join.cuh"

// Chunks of 64 tokens need 227 KiB of shared memory a block; the other architectures get chunks of 32. The kernels of the
// length that is not an architecture's are empty there.
#if !defined(__CUDA_ARCH__) || (__CUDA_ARCH__ >= 900 && __CUDA_ARCH__ < 1200)
#define DN_CHUNK 64
#else
#define DN_CHUNK 32
#endif

#define DN_PREPARE(S, C, PARTS, MODE)                                                                               \
    extern "C" __global__ void __launch_bounds__(4 * C, C == 64 ? 2 : 3)                                            \
        dn_chunk_prepare_##MODE##_s##S##_c##C(const __grid_constant__ dn_chunk_args a) {                            \
        if constexpr (C == DN_CHUNK) chunk_prepare<S, C, PARTS>(a);                                                 \
    }
#define DN_SCAN(S, C, PARTS, MODE, IO, IO_NAME)                                                                     \
    extern "C" __global__ void __launch_bounds__(128, 1)                                                            \
        dn_chunk_scan_##MODE##_s##S##_c##C##_##IO_NAME(const __grid_constant__ dn_chunk_args a) {                   \
        if constexpr (C == DN_CHUNK) chunk_scan<S, C, PARTS, IO, false>(a); \
    }
#define DN_TRANSITION(S, C, PARTS, MODE, IO, IO_NAME)                                                               \
    extern "C" __global__ void __launch_bounds__(128, 1)                                                            \
        dn_chunk_transition_##MODE##_s##S##_c##C##_##IO_NAME(const __grid_constant__ dn_chunk_args a) {             \
        if constexpr (C == DN_CHUNK) chunk_scan<S, C, PARTS, IO, true>(a);                                          \
    }
// Empty but on sm_90a.
#if defined(__CUDA_ARCH__) && DN_WGMMA
#define DN_CLUSTER(N) __cluster_dims__(N, 1, 1)
#define DN_CLUSTER_SCAN(S, PARTS, IO) chunk_cluster<S, PARTS, IO>(a)
#define DN_SINGLE_CHUNK(S, PARTS) chunk_single<S, PARTS>(a)
#else
#define DN_CLUSTER(N)
#define DN_CLUSTER_SCAN(S, PARTS, IO)
#define DN_SINGLE_CHUNK(S, PARTS)
#endif
#define DN_CLUSTERED(S, PARTS, MODE, IO, IO_NAME)                                                                   \
    extern "C" __global__ void DN_CLUSTER(2) __launch_bounds__(256, 1)                                             \
        dn_chunk_cluster_##MODE##_s##S##_##IO_NAME(const __grid_constant__ dn_chunk_args a) {                       \
        DN_CLUSTER_SCAN(S, PARTS, IO);                                                                              \
    }
#define DN_SINGLE(S, PARTS, MODE)                                                                                   \
    extern "C" __global__ void __launch_bounds__(SingleSmem<S, PARTS>::THREADS, 1)                                  \
        dn_chunk_single_##MODE##_s##S(const __grid_constant__ dn_chunk_args a) {                                    \
        DN_SINGLE_CHUNK(S, PARTS);                                                                                  \
    }
#define DN_JOIN(S)                                                                                                  \
    extern "C" __global__ void __launch_bounds__(2 * S, 1) dn_chunk_join_s##S(const __grid_constant__ dn_chunk_args a) { \
        chunk_join<S>(a);                                                                                           \
    }
#define DN_CHUNKED(S, C, PARTS, MODE)                                                                               \
    DN_PREPARE(S, C, PARTS, MODE)                                                                                   \
    DN_SCAN(S, C, PARTS, MODE, IO_F32, f32)                                                                         \
    DN_SCAN(S, C, PARTS, MODE, IO_16, h16)                                                                          \
    DN_SCAN(S, C, PARTS, MODE, IO_ANY, any)                                                                         \
    DN_TRANSITION(S, C, PARTS, MODE, IO_F32, f32)                                                                   \
    DN_TRANSITION(S, C, PARTS, MODE, IO_ANY, any)

DN_CHUNKED(128, 64, 2, exact)
DN_CHUNKED(128, 64, 1, bf16)
DN_CHUNKED(64, 64, 2, exact)
DN_CHUNKED(64, 64, 1, bf16)
DN_CHUNKED(128, 32, 2, exact)
DN_CHUNKED(128, 32, 1, bf16)
DN_CHUNKED(64, 32, 2, exact)
DN_CHUNKED(64, 32, 1, bf16)
DN_CLUSTERED(128, 2, exact, IO_F32, f32)
DN_CLUSTERED(128, 2, exact, IO_ANY, any)
DN_CLUSTERED(64, 2, exact, IO_F32, f32)
DN_CLUSTERED(64, 2, exact, IO_ANY, any)
DN_CLUSTERED(128, 1, bf16, IO_F32, f32)
DN_CLUSTERED(128, 1, bf16, IO_ANY, any)
DN_CLUSTERED(64, 1, bf16, IO_F32, f32)
DN_CLUSTERED(64, 1, bf16, IO_ANY, any)
DN_SINGLE(128, 2, exact)
DN_SINGLE(64, 2, exact)
DN_SINGLE(128, 1, bf16)
DN_SINGLE(64, 1, bf16)
DN_JOIN(128)
DN_JOIN(64)

// src/cuda/chunked.rs computes the same.
#define DN_SIZES(S, C, PARTS, PREPARE, SCAN, KQ_, TH_)                                                              \
    static_assert(sizeof(PrepareSmem<S, C, PARTS>) == PREPARE && ScanSmem<S, C, PARTS>::BYTES == SCAN &&            \
                  Tiles<S, C, PARTS>::KQ == KQ_ && Tiles<S, C, PARTS>::TH == TH_, "sizes");
DN_SIZES(128, 64, 2, 115216, 231456, 65536, 33280)
DN_SIZES(128, 64, 1, 82448, 133152, 32768, 16896)
DN_SIZES(64, 64, 2, 115216, 165920, 32768, 33280)
DN_SIZES(64, 64, 1, 82448, 100384, 16384, 16896)
DN_SIZES(128, 32, 2, 34064, 100384, 32768, 8448)
DN_SIZES(128, 32, 1, 24848, 59424, 16384, 4352)
DN_SIZES(64, 32, 2, 33040, 67616, 16384, 8448)
DN_SIZES(64, 32, 1, 24848, 43040, 8192, 4352)
static_assert(ClusterSmem<128, 2>::BYTES == 223376 && ClusterSmem<128, 1>::BYTES == 125072 &&
              ClusterSmem<64, 2>::BYTES == 157840 && ClusterSmem<64, 1>::BYTES == 92304, "sizes");
static_assert(sizeof(SingleSmem<128, 2>) == 123152 && sizeof(SingleSmem<128, 1>) == 74000 &&
              sizeof(SingleSmem<64, 2>) == 90384 && sizeof(SingleSmem<64, 1>) == 57616, "sizes");
