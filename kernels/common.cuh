// What every kernel needs to read a dn_problem: elements of any dtype, the gates, heads, sequences and state rows.
//
// The toolkit's cuda_fp16.h and cuda_bf16.h are left out on purpose: they need a package that the compiler does not.
#pragma once
#include "problem.h"
#include "ptx.cuh"

// ---- elements ----

__device__ inline int dn_elt_size(int dtype) { return dtype == DN_F32 ? 4 : 2; }

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

// Four 16-bit elements, two a word.
__device__ inline float4 dn_unpack4(uint2 r, int dtype) {
    if (dtype == DN_F16)
        return make_float4(dn_f16_to_f32((uint16_t)r.x), dn_f16_to_f32((uint16_t)(r.x >> 16)),
                           dn_f16_to_f32((uint16_t)r.y), dn_f16_to_f32((uint16_t)(r.y >> 16)));
    return make_float4(__uint_as_float(r.x << 16), __uint_as_float(r.x & 0xffff0000u), __uint_as_float(r.y << 16),
                       __uint_as_float(r.y & 0xffff0000u));
}

// What nobody reads again soon makes room in L2 first.
__device__ inline void store_once(float4 *p, float4 x) { __stcs(p, x); }

// Four neighbouring channels. vec: the tensor has its DN_VEC_* bit; otherwise the stride may be anything.
__device__ inline float4 dn_load4(const dn_view &v, const char *row, int channel, int dtype, bool vec) {
    if (vec) {
        return dtype == DN_F32 ? *(const float4 *)(row + channel * 4)
                               : dn_unpack4(*(const uint2 *)(row + channel * 2), dtype);
    }
    const char *x = row + channel * v.nb[0];
    return make_float4(dn_load(x, dtype), dn_load(x + v.nb[0], dtype), dn_load(x + 2 * v.nb[0], dtype),
                       dn_load(x + 3 * v.nb[0], dtype));
}

// ---- gates ----

__device__ inline float dn_log_decay(float g, float gate_max) {
    return g > gate_max ? gate_max : g; // a NaN stays a NaN
}
__device__ inline float dn_decay(float g, float gate_max) { return expf(dn_log_decay(g, gate_max)); }

__device__ inline float dn_beta(float x, bool logit) { return logit ? 1.0f / (1.0f + expf(-x)) : x; }

__device__ inline float dn_clamp_state(float s, float c) {
    return s > c ? c : s < -c ? -c : s; // a NaN stays a NaN
}

// ---- heads, sequences, rows ----

// Quotient of small numbers (a < 2^20, b > 0) without the long integer division: a + 1/2 is at least 1/(2b) away from
// any multiple of b, which is more than the approximate quotient's error.
__device__ inline int dn_quotient(int a, int b) { return (int)__fdividef((float)a + 0.5f, (float)b); }

__device__ inline int dn_key_head(int h, int Hk, int Hv, bool grouped) {
    const int quotient = dn_quotient(grouped ? Hv : h, Hk); // heads that a key head serves; or whole rounds below h
    return grouped ? dn_quotient(h, quotient) : h - quotient * Hk;
}

__device__ inline int64_t dn_index(const void *a, int i64, int i) {
    return i64 ? ((const int64_t *)a)[i] : (int64_t)((const int32_t *)a)[i];
}

struct dn_sequence {
    int row_in, row_out; // rows of the state pools
    int start, len;      // tokens, counted from the token axis' origin
    int index;           // the sequence's own number
    int b, bq;           // index on the sequence axis of v, g, beta, out and of q, k
};

// Bytes to element i >= 0 of an axis. Unsigned: two multiplications, not three, and one where the stride has 32 bits.
__device__ inline int64_t dn_offset(int i, int64_t nb) { return (int64_t)((uint64_t)(uint32_t)i * (uint64_t)nb); }
__device__ inline int64_t dn_offset(int i, uint32_t nb) { return (int64_t)((uint64_t)(uint32_t)i * nb); }

// False: an index points outside its pool, and the sequence must be left alone. The offsets lie in device memory, where
// the host cannot check them, so they are held inside [0, T] here.
__device__ inline bool dn_sequence_of(const dn_problem &p, int b, dn_sequence &s) {
    s.index = b;
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

// The same where DN_PLAIN says that there is nothing to look up.
__device__ inline dn_sequence dn_plain_sequence(int b, int T) {
    dn_sequence s;
    s.row_in = s.row_out = s.index = s.b = s.bq = b;
    s.start = 0;
    s.len = T;
    return s;
}

// The snapshot slot for the state after token t of a sequence of len tokens, or a negative number. P: dn_problem, dn_hot.
template <class P>
__device__ inline int dn_snapshot_slot(const P &p, int t, int len) {
    int last = len - p.snapshot_skip; // tokens that count
    if (t >= last) return -1;
    int slot = p.snapshot_order ? t - max(last - p.n_snapshots, 0) : last - 1 - t;
    return slot < p.n_snapshots ? slot : -1;
}
