// CUDA's language on a CPU, as far as the kernels use it: the compiler is told to read this ahead of them.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include "machine.h"

#define __device__
#define __global__
#define __grid_constant__
#define __launch_bounds__(...)
#define __cluster_dims__(...)
#define __align__(n) __attribute__((aligned(n)))
// Blocks run one after another, those of a machine on one thread. (Without thread_local the linker would make one array of those
// in two machines, whose tests run at the same time.)
#define __shared__ static thread_local

struct __align__(8) float2 { float x, y; };
struct __align__(16) float4 { float x, y, z, w; };
struct __align__(8) uint2 { uint32_t x, y; };
struct __align__(16) uint4 { uint32_t x, y, z, w; };
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

#define threadIdx (emulated::self->index)
#define blockIdx (emulated::self->block->index)
#define blockDim (emulated::block_size)
#define gridDim (emulated::grid_size)

inline float __uint_as_float(uint32_t x) {
    float y;
    memcpy(&y, &x, 4);
    return y;
}
inline uint32_t __float_as_uint(float x) {
    uint32_t y;
    memcpy(&y, &x, 4);
    return y;
}
#define __expf(x) expf(x)
inline float __fdividef(float x, float y) { return x / y; }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
template <class T>
T __ldcg(const T *p) {
    return *p;
}
template <class T>
void __stcs(T *p, T x) {
    *p = x;
}
using std::max;
using std::min;

inline void __syncthreads() { emulated::self->block->all.meet(emulated::block_size.x); }
inline void __syncwarp() { emulated::self->warp->all.meet(32); }
template <class T>
T __shfl_sync(unsigned, T x, int lane) {
    return emulated::everyones(x).of[lane & 31];
}
template <class T>
T __shfl_xor_sync(unsigned, T x, int mask) {
    return emulated::everyones(x).of[emulated::self->lane ^ mask];
}
template <class T>
T __shfl_up_sync(unsigned, T x, int distance) {
    const auto all = emulated::everyones(x);
    return emulated::self->lane >= distance ? all.of[emulated::self->lane - distance] : x;
}
