// What every kernel needs to read a dn_problem: elements of any dtype, the gates, heads, sequences and state rows.
//
// The toolkit's cuda_fp16.h and cuda_bf16.h are left out on purpose: they need a package that the compiler does not.
#pragma once
#include "problem.h"

// ---- elements ----

__device__ inline int dn_elt_size(int dtype) { return dtype == DN_F32 ? 4 : 2; }

__device__ inline float dn_f16_to_f32(uint16_t x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
    return y;
}

__device__ inline uint16_t dn_f32_to_f16(float x) {
    uint16_t y;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x));
    return y;
}

__device__ inline float dn_bf16_to_f32(uint16_t x) { return __uint_as_float((uint32_t)x << 16); }

// Round to nearest even; a NaN stays one (the addition could carry it to an infinity). Integer code, because
// sm_75 has no bf16 conversion.
__device__ inline uint16_t dn_f32_to_bf16(float x) {
    uint32_t u = __float_as_uint(x);
    if ((u & 0x7fffffffu) > 0x7f800000u) return (uint16_t)((u >> 16) | 0x40u);
    return (uint16_t)((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}

__device__ inline float dn_load(const char *p, int dtype) {
    if (dtype == DN_F32) return *(const float *)p;
    uint16_t x = *(const uint16_t *)p;
    return dtype == DN_F16 ? dn_f16_to_f32(x) : dn_bf16_to_f32(x);
}

__device__ inline void dn_store(char *p, int dtype, float x) {
    if (dtype == DN_F32) {
        *(float *)p = x;
    } else {
        *(uint16_t *)p = dtype == DN_F16 ? dn_f32_to_f16(x) : dn_f32_to_bf16(x);
    }
}

// Four consecutive channels as they lie in memory: a prefetch must not wait for its own load, so the conversion is a
// second step. 16-bit types use x and y.
__device__ inline uint4 dn_load4_raw(const char *row, int64_t nb0, int channel, int dtype, bool vec) {
    uint4 r = make_uint4(0, 0, 0, 0);
    if (dtype == DN_F32) {
        if (vec) return *(const uint4 *)(row + channel * 4);
        const char *p = row + channel * nb0;
        r.x = *(const uint32_t *)p;
        r.y = *(const uint32_t *)(p + nb0);
        r.z = *(const uint32_t *)(p + 2 * nb0);
        r.w = *(const uint32_t *)(p + 3 * nb0);
        return r;
    }
    if (vec) {
        uint2 h = *(const uint2 *)(row + channel * 2);
        r.x = h.x;
        r.y = h.y;
        return r;
    }
    const char *p = row + channel * nb0;
    r.x = *(const uint16_t *)p | (uint32_t) * (const uint16_t *)(p + nb0) << 16;
    r.y = *(const uint16_t *)(p + 2 * nb0) | (uint32_t) * (const uint16_t *)(p + 3 * nb0) << 16;
    return r;
}

__device__ inline float4 dn_raw4_to_f32(uint4 r, int dtype) {
    if (dtype == DN_F32)
        return make_float4(__uint_as_float(r.x), __uint_as_float(r.y), __uint_as_float(r.z), __uint_as_float(r.w));
    if (dtype == DN_F16)
        return make_float4(dn_f16_to_f32((uint16_t)r.x), dn_f16_to_f32((uint16_t)(r.x >> 16)),
                           dn_f16_to_f32((uint16_t)r.y), dn_f16_to_f32((uint16_t)(r.y >> 16)));
    return make_float4(__uint_as_float(r.x << 16), __uint_as_float(r.x & 0xffff0000u), __uint_as_float(r.y << 16),
                       __uint_as_float(r.y & 0xffff0000u));
}

// ---- gates ----

__device__ inline float dn_log_decay(const dn_problem &p, float g) { return fminf(g, p.gate_max); }
__device__ inline float dn_decay(const dn_problem &p, float g) { return expf(dn_log_decay(p, g)); }

__device__ inline float dn_beta(const dn_problem &p, float x) {
    return p.beta_kind ? 1.0f / (1.0f + expf(-x)) : x;
}

__device__ inline float dn_clamp_state(float s, float c) { return fminf(fmaxf(s, -c), c); }

// ---- heads, sequences, rows ----

__device__ inline int dn_key_head(const dn_problem &p, int h) {
    return p.head_map ? h / (p.Hv / p.Hk) : h % p.Hk;
}

__device__ inline int64_t dn_index(const void *a, int i64, int i) {
    return i64 ? ((const int64_t *)a)[i] : (int64_t)((const int32_t *)a)[i];
}

struct dn_sequence {
    int row_in, row_out; // rows of the state pools
    int start, len;      // tokens, counted from the token axis' origin
    int b, bq;           // index on the sequence axis of v, g, beta, out and of q, k
};

// False: an index points outside its pool, and the sequence must be left alone. The offsets lie in device memory, where
// the host cannot check them, so they are held inside [0, T] here.
__device__ inline bool dn_sequence_of(const dn_problem &p, int b, dn_sequence &s) {
    int64_t in = p.rows_in ? dn_index(p.rows_in, p.rows_in_i64, b) : b;
    int64_t out = p.rows_out ? dn_index(p.rows_out, p.rows_out_i64, b) : b;
    if (in < 0 || in >= p.n_rows_in) return false;
    if (p.state_out.data && (out < 0 || out >= p.n_rows_out)) return false;
    s.row_in = (int)in;
    s.row_out = (int)out;
    if (p.cu_seqlens) {
        int64_t begin = dn_index(p.cu_seqlens, p.cu_i64, b), end = dn_index(p.cu_seqlens, p.cu_i64, b + 1);
        begin = min(max(begin, (int64_t)0), (int64_t)p.T);
        end = min(max(end, begin), (int64_t)p.T);
        s.start = (int)begin;
        s.len = (int)(end - begin);
        s.b = s.bq = 0;
    } else {
        s.start = 0;
        s.len = p.T;
        s.b = b;
        s.bq = p.Bq == p.B ? b : b / (p.B / p.Bq);
    }
    return true;
}

// The snapshot slot for the state after token t of a sequence of len tokens, or -1.
__device__ inline int dn_snapshot_slot(const dn_problem &p, int t, int len) {
    int last = len - p.snapshot_skip; // tokens that count
    if (t >= last) return -1;
    int slot = p.snapshot_order ? t - max(last - p.n_snapshots, 0) : last - 1 - t;
    return slot < p.n_snapshots ? slot : -1;
}
