// kernels/ptx.cuh for the machine of machine.h: the same names, and what the instructions do, once they have done it. What they
// do meanwhile, and what they need to be told in order not to do it too early or too late, is not here: races stay unseen.
#define DN_PTX
#include "cuda.h"

#define DN_SM90 (__CUDA_ARCH__ >= 900)
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define DN_WGMMA 1
#else
#define DN_WGMMA 0
#endif
#define DN_BULK_COPY DN_SM90

#define DN_SHARED(type, name) type *const name = emulated::Shared()

// ---- what the compiler may know ----

inline void hide(int &) {}
#define DN_HIDE_4(a, b, c, d)
#define DN_HIDE_5(a, b, c, d, e)
inline void block_here(int &x, int &y, int &z) { x = blockIdx.x, y = blockIdx.y, z = blockIdx.z; }
inline void form_here(uint32_t, uint32_t) {}

// ---- numbers ----

inline float dn_f16_to_f32(uint16_t x) {
    _Float16 y;
    memcpy(&y, &x, 2);
    return (float)y;
}
inline uint16_t dn_f32_to_f16(float x) {
    const _Float16 y = (_Float16)x;
    uint16_t z;
    memcpy(&z, &y, 2);
    return z;
}
inline float dn_bf16_to_f32(uint16_t x); // of common.cuh, which comes later
inline uint16_t dn_f32_to_bf16(float x);
inline uint32_t pack_bf16(float x0, float x1) { return dn_f32_to_bf16(x0) | (uint32_t)dn_f32_to_bf16(x1) << 16; }
inline uint32_t pack_f16(float x0, float x1) { return dn_f32_to_f16(x0) | (uint32_t)dn_f32_to_f16(x1) << 16; }
// Half of a packed pair of bf16.
inline float half_of(uint32_t pair, int which) { return dn_bf16_to_f32((uint16_t)(pair >> 16 * which)); }

// ---- overlapping launches ----

inline void launch_next() {}
inline void wait_for_previous() {}

// ---- fragments and products of a warp ----

inline uint32_t smem_address(const void *p) {
    const ptrdiff_t at = (const unsigned char *)p - emulated::self->block->shared;
    if (at < 0 || (size_t)at > emulated::self->block->shared_bytes) emulated::fail("not in shared memory", at);
    return (uint32_t)at;
}
inline unsigned char *shared_at(uint32_t address, size_t bytes) { return emulated::self->block->at(address, bytes); }

template <bool TRANS>
void load_matrices(uint32_t (&r)[4], uint32_t address) {
    const auto rows = emulated::everyones(address);
    const int g = emulated::self->lane >> 2, t = emulated::self->lane & 3;
    for (int m = 0; m < 4; m++) {
        uint16_t x[2];
        for (int j = 0; j < 2; j++) {
            const int row = TRANS ? 2 * t + j : g, column = TRANS ? g : 2 * t + j;
            memcpy(&x[j], shared_at(rows.of[m * 8 + row], 16) + column * 2, 2);
        }
        r[m] = x[0] | (uint32_t)x[1] << 16;
    }
    __syncwarp();
}
inline void ldmatrix4(uint32_t (&r)[4], uint32_t address) { load_matrices<false>(r, address); }
inline void ldmatrix4_trans(uint32_t (&r)[4], uint32_t address) { load_matrices<true>(r, address); }

// An m16k16 operand in the lanes' registers.
struct OperandA {
    uint32_t a[4];
};
inline float entry(const emulated::Everyones<OperandA> &a, int row, int k) {
    return half_of(a.of[(row & 7) * 4 + (k & 7) / 2].a[(row >= 8) + 2 * (k >= 8)], k & 1);
}
// acc += A B for this thread's entries of 8 columns; `b(k, column)`.
template <class F>
void multiply(float *acc, const emulated::Everyones<OperandA> &a, F b) {
    const int g = emulated::self->lane >> 2, t = emulated::self->lane & 3;
    for (int e = 0; e < 4; e++)
        for (int k = 0; k < 16; k++) acc[e] += entry(a, g + (e >> 1) * 8, k) * b(k, 2 * t + (e & 1));
}
inline void mma_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    struct OperandB {
        uint32_t b[2];
    };
    const auto all_a = emulated::everyones(OperandA{{a[0], a[1], a[2], a[3]}});
    const auto all_b = emulated::everyones(OperandB{{b0, b1}});
    multiply(d, all_a, [&](int k, int column) { return half_of(all_b.of[column * 4 + (k & 7) / 2].b[k >= 8], k & 1); });
    __syncwarp();
}
inline uint32_t transpose8x8(uint32_t x) {
    const auto all = emulated::everyones(x);
    const int g = emulated::self->lane >> 2, t = emulated::self->lane & 3;
    const auto at = [&](int row, int column) { return all.of[row * 4 + column / 2] >> 16 * (column & 1) & 0xffff; };
    return at(2 * t, g) | at(2 * t + 1, g) << 16;
}

// ---- asynchronous copies ----

template <int BYTES>
void cp_async_or_zero(uint32_t dst, const void *src, bool there) {
    if (there) memcpy(shared_at(dst, BYTES), src, BYTES);
    else memset(shared_at(dst, BYTES), 0, BYTES);
}
template <int BYTES>
void cp_async(uint32_t dst, const void *src) {
    cp_async_or_zero<BYTES>(dst, src, true);
}
inline uint64_t evict_first() { return 0; }
inline uint64_t evict_normal() { return 0; }
inline void cp_async_once(uint32_t dst, const void *src, bool there, uint64_t) { cp_async_or_zero<16>(dst, src, there); }
inline void prefetch_l2(const char *) {}
inline void cp_async_commit() {}
template <int N>
void cp_async_wait() {}

inline void async_proxy_fence() {}
#if DN_BULK_COPY
inline void mbarrier_init(uint32_t bar, int count) {
    emulated::Barrier &barrier = emulated::self->block->barriers[bar] = {};
    barrier.count = barrier.pending = count;
}
inline void mbarrier_init_fence() {}
inline void mbarrier_expect(uint32_t bar, int bytes) { emulated::self->block->barrier(bar).change(1, bytes); }
inline void mbarrier_arrive(uint32_t bar) { emulated::self->block->barrier(bar).change(1, 0); }
inline void mbarrier_arrive_copied(uint32_t bar) { mbarrier_arrive(bar); }
inline void mbarrier_wait(uint32_t bar, int parity) {
    const emulated::Barrier &barrier = emulated::self->block->barrier(bar);
    emulated::wait_until("an mbarrier", [&] { return (barrier.phase & 1) != parity; });
}
inline void bulk_copy(uint32_t dst, const void *src, int bytes, uint32_t bar, uint64_t = 0) {
    memcpy(shared_at(dst, bytes), src, bytes);
    emulated::self->block->barrier(bar).change(0, -bytes);
}
inline void bulk_store(void *dst, uint32_t src, int bytes) { memcpy(dst, shared_at(src, bytes), bytes); }
inline void bulk_store_commit() {}
inline void bulk_store_wait_read() {}
inline void bulk_store_wait() {}

// ---- clusters ----

inline uint32_t cluster_rank() { return emulated::self->block->rank; }
inline void cluster_sync() {
    emulated::self->block->cluster_meeting->meet((int)emulated::self->block->cluster->size() * blockDim.x);
}
inline void bulk_multicast(uint32_t dst, const void *src, int bytes, uint32_t bar, uint16_t mask) {
    for (emulated::Block *block : *emulated::self->block->cluster) {
        if (!(mask >> block->rank & 1)) continue;
        memcpy(block->at(dst, bytes), src, bytes);
        block->barrier(bar).change(0, -bytes);
    }
}
inline void remote_arrive(uint32_t bar, uint32_t block) {
    (*emulated::self->block->cluster)[block]->barrier(bar).change(1, 0);
}
#endif

// ---- warpgroup products ----

inline void wgmma_fence() {}
inline void wgmma_commit() {}
template <int N>
void wgmma_wait() {}
template <int NT>
void wgmma_touch(float (&)[NT][4]) {}
#if DN_WGMMA
inline uint64_t wgmma_descriptor(uint32_t address, int leading_bytes) {
    return (uint64_t)((address & 0x3ffff) >> 4) | (uint64_t)(leading_bytes >> 4) << 16 | (uint64_t)(1024 >> 4) << 32 | 1ull << 62;
}
template <int N, int TRANS>
void wgmma(float (*d)[4], const uint32_t (&a)[4], uint64_t b, int accumulate) {
    const auto field = [&](int bit) { return (uint32_t)(b >> bit & 0x3fff) << 4; };
    const uint32_t base = field(0), leading = field(16), eight_rows = field(32);
    const auto all_a = emulated::everyones(OperandA{{a[0], a[1], a[2], a[3]}});
    for (int tile = 0; tile < N / 8; tile++) {
        if (!accumulate) d[tile][0] = d[tile][1] = d[tile][2] = d[tile][3] = 0;
        multiply(d[tile], all_a, [&](int k, int column) {
            const int n = tile * 8 + column, row = TRANS ? k : n, along = TRANS ? n % 64 : k;
            uint32_t at = base + row / 8 * eight_rows + row % 8 * 128 + along * 2 + (TRANS ? n / 64 * leading : 0);
            at ^= at >> 3 & 0x70; // the 128-byte swizzle
            uint16_t x;
            memcpy(&x, shared_at(at, 2), 2);
            return dn_bf16_to_f32(x);
        });
    }
    __syncwarp();
}
#endif
