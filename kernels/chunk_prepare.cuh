// Stage 1 of the chunked kernel: everything of a chunk that does not depend on the state. One block per chunk, key head
// and pair of its value heads:
//
//     A = tril(beta K K^T * D, -1),  T = (I + A)^-1 diag(beta),  P = tril(Q K^T * D),  D_ij = exp(G_i - G_j)
//
// with G the running log-decay. K, Q, T and P go to the workspace as tile images. The inverse: 16 x 16
// diagonal blocks by forward substitution in f32, the blocks below them by block forward substitution in bf16x3.
#pragma once
#include "chunk_tiles.cuh"
#include "tensor_core.cuh"

// Running log-decays as a pair of floats: the difference of two entries is then as good as if formed in double, without
// double arithmetic per matrix entry.
struct LogDecay {
    float hi, lo;
};
__device__ inline float log_between(const LogDecay &to, const LogDecay &from) {
    return (to.hi - from.hi) + (to.lo - from.lo);
}

template <int S, int C, int PARTS>
struct KeyImages {
    unsigned char k[PARTS][C * S * 2], q[PARTS][C * S * 2];
};
template <int S, int C, int PARTS, int HEADS>
struct SolveSmem {
    unsigned char images[HEADS][2 * Tiles<S, C, PARTS>::T]; // T, P
    float a[HEADS][C][C + 4]; // rows padded by 16 bytes, which spreads them over banks
    float diagonal[HEADS][C / 16][16][24]; // inverses of the diagonal blocks
};
template <int S, int C, int PARTS>
struct PrepareSmem {
    union { // the images of K and Q are stored before their place is taken
        KeyImages<S, C, PARTS> image;
        SolveSmem<S, C, PARTS, 2> solve;
    };
    LogDecay g[2][C];
    float beta[2][C];
    float vec[2][2 * C];
    uint64_t arrived[2]; // mbarriers: rows of K, of Q
};

// A block's bytes from shared to global memory: by the copy engine, or 16 at a time. After a barrier that follows the
// writers' fence.
__device__ inline void flush(void *dst, const void *src, int bytes) {
#if DN_BULK_COPY
    if (threadIdx.x == 0) bulk_store(dst, smem_address(src), bytes);
#else
    for (int i = threadIdx.x * 16; i < bytes; i += blockDim.x * 16)
        *(uint4 *)((char *)dst + i) = *(const uint4 *)((const char *)src + i);
#endif
}

__device__ inline void flush_commit() {
#if DN_BULK_COPY
    if (threadIdx.x == 0) bulk_store_commit();
#endif
}
// Before the barrier after which the source is overwritten.
__device__ inline void flush_wait_read() {
#if DN_BULK_COPY
    if (threadIdx.x == 0) bulk_store_wait_read();
#endif
}

// This thread's channels of a row of K or Q, eight at a time with a stride of 32: as they lie in memory if `vec`, so that
// nothing waits for a load here; else as f32, by way of this thread's part of `scratch`.
template <int S, int THREADS>
__device__ inline void load_row(uint4 (&raw)[S / 16], const dn_view &view, const char *row, int dtype, bool vec, bool there,
                                void *scratch) {
    const int part = threadIdx.x & 3;
    const auto channel = [&](int i) { return (i / 2 * 4 + part) * 8 + i % 2 * 4; };
#pragma unroll
    for (int i = 0; i < S / 16; i++) raw[i] = make_uint4(0, 0, 0, 0);
    if (!there) return;
    if (!vec) {
        float4 *own = (float4 *)scratch + threadIdx.x;
#pragma unroll 1
        for (int i = 0; i < S / 16; i++) own[i * THREADS] = dn_load4(view, row, channel(i), dtype, false);
#pragma unroll
        for (int i = 0; i < S / 16; i++) raw[i] = *(const uint4 *)(own + i * THREADS);
    } else if (dtype == DN_F32) {
#pragma unroll
        for (int i = 0; i < S / 16; i++) raw[i] = *(const uint4 *)(row + channel(i) * 4);
    } else {
#pragma unroll
        for (int i = 0; i < S / 16; i++) {
            const uint2 x = *(const uint2 *)(row + channel(i) * 2);
            raw[i] = make_uint4(x.x, x.y, 0, 0);
        }
    }
}

// Four channels as load_row left them.
__device__ inline float4 raw4_to_f32(const uint4 &raw, int dtype) {
    if (dtype != DN_F32) return dn_unpack4(make_uint2(raw.x, raw.y), dtype);
    return make_float4(__uint_as_float(raw.x), __uint_as_float(raw.y), __uint_as_float(raw.z), __uint_as_float(raw.w));
}

// What normalises a row, from this thread's share of its sum of squares.
__device__ inline float row_scale(const dn_problem &p, float sum, bool there) {
    sum += __shfl_xor_sync(~0u, sum, 1);
    sum += __shfl_xor_sync(~0u, sum, 2);
    return there ? 1.0f / sqrtf(sum + p.qk_norm_eps) : 0.0f; // eps may be 0
}

// Normalised if asked for, split, to shared memory.
template <int S, int C, int PARTS>
__device__ inline void stage_row(const dn_problem &p, const uint4 (&raw)[S / 16], int dtype, bool there,
                                 unsigned char (&smem)[PARTS][C * S * 2]) {
    using L = Tiles<S, C, PARTS>;
    const int row = threadIdx.x >> 2, part = threadIdx.x & 3;
    float r = 1;
    if (p.qk_norm) {
        float sum = 0;
#pragma unroll
        for (int i = 0; i < S / 16; i++) {
            const float4 x = raw4_to_f32(raw[i], dtype);
            sum = fmaf(x.x, x.x, fmaf(x.y, x.y, fmaf(x.z, x.z, fmaf(x.w, x.w, sum))));
        }
        r = row_scale(p, sum, there);
    }
#pragma unroll
    for (int i = 0; i < S / 32; i++) {
        uint32_t hi[4], lo[4];
#pragma unroll
        for (int j = 0; j < 2; j++) {
            const float4 x = raw4_to_f32(raw[2 * i + j], dtype);
            split_bf16(x.x * r, x.y * r, hi[2 * j], lo[2 * j]);
            split_bf16(x.z * r, x.w * r, hi[2 * j + 1], lo[2 * j + 1]);
        }
        const int at = L::kq_offset(row, (i * 4 + part) * 8);
        *(uint4 *)(smem[0] + at) = make_uint4(hi[0], hi[1], hi[2], hi[3]);
        if (PARTS == 2) *(uint4 *)(smem[PARTS - 1] + at) = make_uint4(lo[0], lo[1], lo[2], lo[3]);
    }
}

// The usual rows, f32 in fours: a row's four threads have 64 neighbouring bytes at a time. `turn` changes their order, where
// banks ask for it: see RowCopies.
template <int S>
__device__ inline void load_row_f32(float4 (&x)[S / 16], const char *row, int turn, bool there) {
    const int part = threadIdx.x & 3;
#pragma unroll
    for (int i = 0; i < S / 16; i++)
        x[i] = there ? *(const float4 *)(row + ((i ^ turn) * 4 + part) * 16) : make_float4(0, 0, 0, 0);
}
template <int S, int C, int PARTS>
__device__ inline void stage_row_f32(const dn_problem &p, const float4 (&x)[S / 16], int turn, bool there,
                                     unsigned char (&smem)[PARTS][C * S * 2]) {
    using L = Tiles<S, C, PARTS>;
    const int row = threadIdx.x >> 2, part = threadIdx.x & 3;
    float r = 1;
    if (p.qk_norm) {
        float sum = 0;
#pragma unroll
        for (int i = 0; i < S / 16; i++)
            sum = fmaf(x[i].x, x[i].x, fmaf(x[i].y, x[i].y, fmaf(x[i].z, x[i].z, fmaf(x[i].w, x[i].w, sum))));
        r = row_scale(p, sum, there);
    }
#pragma unroll
    for (int i = 0; i < S / 16; i++) {
        uint32_t hi[2], lo[2];
        split_bf16(x[i].x * r, x[i].y * r, hi[0], lo[0]);
        split_bf16(x[i].z * r, x[i].w * r, hi[1], lo[1]);
        const int at = (L::kq_offset(row, (i * 4 + part) / 2 * 8) ^ turn << 5) + part % 2 * 8;
        *(uint2 *)(smem[0] + at) = make_uint2(hi[0], hi[1]);
        if (PARTS == 2) *(uint2 *)(smem[PARTS - 1] + at) = make_uint2(lo[0], lo[1]);
    }
}

// The usual rows again, brought to shared memory as they are by the copy engine: few instructions before they are on their
// way, and no registers. `arrived` is a barrier for that.
template <int S, int C>
struct RowCopies {
#if DN_BULK_COPY
    static constexpr bool USED = C == 64; // chunks of 32 have no room for them
#else
    static constexpr bool USED = false;
#endif
    // Of two neighbouring rows one is read from 64 bytes on where the other is from 0, and of four in a row no two are written
    // to the same 32 bytes of a line.
    __device__ static int turn(int row) { return row & 1 ? 3 : 0; }
    __device__ static void begin(uint64_t (&arrived)[2]) {
#if DN_BULK_COPY
        if (threadIdx.x < 2) mbarrier_init(smem_address(&arrived[threadIdx.x]), 1);
        async_proxy_fence();
        __syncthreads();
#endif
    }
    // Rows of K, or of Q; `once`: nobody reads them soon. A warp's threads ask one after another, so every warp has a share.
    __device__ static void fetch(unsigned char *to, uint64_t &arrived, const char *from, int64_t nb, int tokens, bool once) {
#if DN_BULK_COPY
        constexpr int SHARE = 8; // of C rows, for each of C / 8 warps
        const uint32_t bar = smem_address(&arrived);
        const int lane = threadIdx.x & 31, row = (threadIdx.x >> 5) * SHARE + lane;
        if (threadIdx.x == 0) mbarrier_expect(bar, tokens * S * 4);
        const uint64_t policy = once ? evict_first() : evict_normal();
        if (lane < SHARE && row < tokens) bulk_copy(smem_address(to) + row * S * 4, from + row * nb, S * 4, bar, policy);
#endif
    }
    __device__ static void wait(uint64_t &arrived) {
#if DN_BULK_COPY
        mbarrier_wait(smem_address(&arrived), 0);
#endif
    }
};

// The operand B = M^T for a 16 x 16 block of f32 in shared memory, rows ROW floats apart.
template <int ROW>
__device__ inline void transposed_operand(uint32_t (&hi)[4], uint32_t (&lo)[4], const float *m) {
    const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
#pragma unroll
    for (int j = 0; j < 4; j++) {
        const float2 x = *(const float2 *)(m + (g + (j >> 1) * 8) * ROW + (j & 1) * 8 + 2 * t);
        split_bf16(x.x, x.y, hi[j], lo[j]);
    }
}

// The block's sequence, chunk and slot; false when the slot is empty.
template <int C>
__device__ inline bool find_chunk(const dn_chunk_args &a, int &b, int &chunk, int &slot) {
    chunk = a.chunk0 + blockIdx.x;
    if (!a.p.cu_seqlens) {
        b = a.seq0 + blockIdx.z;
        slot = blockIdx.z * a.nchunks + blockIdx.x;
        return true;
    }
    slot = blockIdx.x;
    for (b = 0; b < a.p.B; b++) {
        const int n = chunks_of<C>(a, b);
        if (chunk < n) return true;
        chunk -= n;
    }
    return false;
}

// Smem: PrepareSmem or what has the same members.
template <int S, int C, int PARTS, class Smem>
struct Prepare {
    using L = Tiles<S, C, PARTS>;
    using Copies = RowCopies<S, C>;
    static constexpr int BLOCKS = C / 16, OWN = C / 32; // 16 x 16 blocks along a side, and that a warp has at most

    // Two neighbouring entries of an image of T or P.
    __device__ static void store_pair(unsigned char *image, int row, int column, uint32_t hi, uint32_t lo) {
        unsigned char *at = image + L::t_offset(row, column & ~7) + (column & 7) * 2;
        *(uint32_t *)at = hi;
        if (PARTS == 2) *(uint32_t *)(at + L::T_PART) = lo;
    }
    __device__ static void store_zero_block(unsigned char *image, int i, int j) {
        const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
#pragma unroll
        for (int e = 0; e < 4; e++) store_pair(image, i * 16 + (e >> 1) * 8 + g, j * 16 + (e & 1) * 8 + 2 * t, 0, 0);
    }

    // The rows of K and Q of a chunk.
    struct Rows {
        const dn_problem &p;
        const char *k, *q;
        int64_t k_nb, q_nb; // from a row to the next
        int tokens;
        bool vk, vq, usual; // in fours; f32 in fours

        __device__ Rows(const dn_problem &p, const dn_sequence &seq, int64_t token, int kh, int tokens)
            : p(p), k((const char *)p.k.data + kh * p.k.nb[1] + token * p.k.nb[2] + seq.bq * p.k.nb[3]),
              q((const char *)p.q.data + kh * p.q.nb[1] + token * p.q.nb[2] + seq.bq * p.q.nb[3]), k_nb(p.k.nb[2]),
              q_nb(p.q.nb[2]), tokens(tokens),
              vk(p.flags & DN_VEC_K), vq(p.flags & DN_VEC_Q),
              usual(vk && vq && p.dtype_k == DN_F32 && p.dtype_q == DN_F32) {}

        // Has the copy engine bring them to `smem`, if it can. `once`: nobody reads them soon.
        __device__ void fetch(Smem &sm, unsigned char *smem, bool once) const {
            if (!Copies::USED || !usual) return;
            Copies::fetch(smem, sm.arrived[0], k, k_nb, tokens, once);
            Copies::fetch(smem + C * S * 4, sm.arrived[1], q, q_nb, tokens, once);
        }
        // Makes images of them: four threads to a row, 4 C threads that WORK. Images are written in the place of rows, hence
        // barriers, for all threads of the block. All loads go out before the first is waited for.
        __device__ void stage(Smem &sm, unsigned char *smem, bool works) const {
            const int row = threadIdx.x >> 2;
            const bool there = row < tokens;
            const char *kb = k + row * k_nb, *qb = q + row * q_nb;
            if (usual && Copies::USED) {
                const int turn = Copies::turn(row);
                const auto bring = [&](uint64_t &arrived, const unsigned char *rows, unsigned char(&image)[PARTS][C * S * 2]) {
                    float4 x[S / 16];
                    if (works) {
                        Copies::wait(arrived);
                        load_row_f32<S>(x, (const char *)rows + row * S * 4, turn, there);
                    }
                    __syncthreads();
                    if (works) stage_row_f32<S, C, PARTS>(p, x, turn, there, image);
                };
                bring(sm.arrived[0], smem, sm.image.k);
                bring(sm.arrived[1], smem + C * S * 4, sm.image.q);
            } else if (usual) {
                float4 k[S / 16], q[S / 16];
                if (!works) return;
                load_row_f32<S>(k, kb, 0, there);
                load_row_f32<S>(q, qb, 0, there);
                stage_row_f32<S, C, PARTS>(p, k, 0, there, sm.image.k);
                stage_row_f32<S, C, PARTS>(p, q, 0, there, sm.image.q);
            } else {
                uint4 k[S / 16], q[S / 16];
                if (works) {
                    load_row<S, 4 * C>(k, p.k, kb, p.dtype_k, vk, there, smem);
                    load_row<S, 4 * C>(q, p.q, qb, p.dtype_q, vq, there, smem);
                }
                if (!vk || !vq) __syncthreads(); // scratch is read
                if (works) {
                    stage_row<S, C, PARTS>(p, k, vk ? p.dtype_k : DN_F32, there, sm.image.k);
                    stage_row<S, C, PARTS>(p, q, vq ? p.dtype_q : DN_F32, there, sm.image.q);
                }
            }
        }
    };

    // A warp's gates and betas of one head as they are in memory, of OWN tokens in a row to a lane; no decay and nothing
    // written past the last token.
    struct Gates {
        float gate[OWN], beta[OWN];
        __device__ void load(const dn_problem &p, const dn_sequence &seq, int64_t token, int head, int tokens) {
            const char *gb = (const char *)p.g.data + head * p.g.nb[1] + token * p.g.nb[2] + seq.b * p.g.nb[3];
            const char *bb = (const char *)p.beta.data + head * p.beta.nb[1] + token * p.beta.nb[2] + seq.b * p.beta.nb[3];
#pragma unroll
            for (int i = 0; i < OWN; i++) {
                const int row = (threadIdx.x & 31) * OWN + i;
                gate[i] = row < tokens ? *(const float *)(gb + row * p.g.nb[2]) : 0;
                beta[i] = row < tokens ? *(const float *)(bb + row * p.beta.nb[2]) : 0;
            }
        }
    };
    // Running log-decays in double, betas and decay vectors of one head, by one warp.
    __device__ static void gates(const dn_problem &p, Smem &sm, int head, const Gates &raw, int tokens) {
        const int lane = threadIdx.x & 31, row = lane * OWN;
        float beta[OWN];
        double own[OWN], sum = 0; // up to a token, from the lane's first on
#pragma unroll
        for (int i = 0; i < OWN; i++) {
            const bool there = row + i < tokens;
            const float gate = there ? dn_log_decay(raw.gate[i], p.gate_max) : 0;
            beta[i] = there ? dn_beta(raw.beta[i], p.beta_kind) : 0;
            // exp(-110) is 0 in f32: a lower bound costs nothing, and keeps -inf out of differences.
            sum += gate < -110.0f ? -110.0 : (double)gate;
            own[i] = sum;
        }
        double before = sum;
#pragma unroll
        for (int d = 1; d < 32; d *= 2) {
            const double up = __shfl_up_sync(~0u, before, d);
            if (lane >= d) before += up;
        }
        before -= sum;
        LogDecay at[OWN];
#pragma unroll
        for (int i = 0; i < OWN; i++) {
            const double total = before + own[i];
            const float hi = (float)total;
            at[i] = {hi, (float)(total - (double)hi)};
        }
        const LogDecay last = {__shfl_sync(~0u, at[OWN - 1].hi, 31), __shfl_sync(~0u, at[OWN - 1].lo, 31)};
#pragma unroll
        for (int i = 0; i < OWN; i++) {
            sm.g[head][row + i] = at[i];
            sm.beta[head][row + i] = beta[i];
            sm.vec[head][row + i] = expf(at[i].hi + at[i].lo);
            sm.vec[head][C + row + i] = expf(log_between(last, at[i]));
        }
    }

    // A warp's blocks of K K^T and Q K^T: of row tile `tile`, column blocks `parity` and every other one, N in all. As many sums
    // at a time as there are, for a product waits for the one before it.
    template <int N>
    __device__ static void products(Smem &sm, int tile, int parity, float (&kk)[OWN][2][4], float (&qk)[OWN][2][4]) {
        constexpr int PART = L::KQ_PART;
        const uint32_t keys = smem_address(sm.image.k[0]), queries = smem_address(sm.image.q[0]);
        const int lane = threadIdx.x & 31, a_row = tile * 16 + (lane & 15), a_col = (lane >> 4) * 8;
        const int b_row = parity * 16 + (lane & 7) + ((lane >> 4) << 3), b_col = ((lane >> 3) & 1) * 8;
#pragma unroll 2
        for (int ks = 0; ks < S / 16; ks++) {
            uint32_t kh[4], kl[4], qh[4], ql[4], bh[N][4], bl[N][4];
            const int at = L::kq_offset(a_row, ks * 16 + a_col);
#pragma unroll
            for (int m = 0; m < N; m++) ldmatrix4(bh[m], keys + L::kq_offset(b_row + m * 32, ks * 16 + b_col));
            ldmatrix4(kh, keys + at);
            ldmatrix4(qh, queries + at);
            if (PARTS == 2) {
                ldmatrix4(kl, keys + PART + at);
                ldmatrix4(ql, queries + PART + at);
#pragma unroll
                for (int m = 0; m < N; m++) ldmatrix4(bl[m], keys + PART + L::kq_offset(b_row + m * 32, ks * 16 + b_col));
#pragma unroll
                for (int m = 0; m < N; m++) mma_pair(kk[m], kl, bh[m]), mma_pair(qk[m], ql, bh[m]);
#pragma unroll
                for (int m = 0; m < N; m++) mma_pair(kk[m], kh, bl[m]), mma_pair(qk[m], qh, bl[m]);
            }
#pragma unroll
            for (int m = 0; m < N; m++) mma_pair(kk[m], kh, bh[m]), mma_pair(qk[m], qh, bh[m]);
        }
    }

    // A warp's share of the two products: two warps to a row tile, one takes the even column blocks up to the diagonal, one the
    // odd ones.
    struct Share {
        int tile, parity;
        float kk[OWN][2][4] = {}, qk[OWN][2][4] = {};
        __device__ explicit Share(int warp) : tile(warp >> 1), parity(warp & 1) {}
        __device__ void multiply(Smem &sm) {
            const int blocks = (tile - parity + 2) / 2; // 0 for the odd ones of the first tile
            if (OWN == 2 && blocks == 2) products<OWN>(sm, tile, parity, kk, qk);
            else if (blocks > 0) products<1>(sm, tile, parity, kk, qk);
        }
    };

    // A and P of head i in shared memory, from a warp's blocks of K K^T and Q K^T. All that is read is read first: a read waits
    // for a write before it that may be to the same place, for all that the compiler knows.
    __device__ static void decays(Smem &sm, int i, const Share &share, unsigned char *p_image) {
        const int tile = share.tile, parity = share.parity;
        const int lane = threadIdx.x & 31, r = tile * 16 + (lane >> 2), c = parity * 16 + (lane & 3) * 2;
        const LogDecay to[2] = {sm.g[i][r], sm.g[i][r + 8]};
        const float beta[2] = {sm.beta[i][r], sm.beta[i][r + 8]};
        float4 from[OWN][2]; // two columns' each
#pragma unroll
        for (int m = 0; m < OWN; m++)
#pragma unroll
            for (int j = 0; j < 2; j++) from[m][j] = *(const float4 *)&sm.g[i][c + m * 32 + j * 8];
#pragma unroll
        for (int m = 0; m < OWN; m++) {
            if (parity + 2 * m <= tile) decay_block(sm.solve.a[i], r, c + m * 32, to, from[m], beta, share.kk[m], share.qk[m], p_image);
            else store_zero_block(p_image, tile, parity + 2 * m);
        }
    }
    // One block. A difference of log-decays is selected before its exponential: above the diagonal it could overflow.
    __device__ static void decay_block(float (&a)[C][C + 4], int r0, int c0, const LogDecay (&to)[2], const float4 (&from)[2],
                                       const float (&beta)[2], const float (&kk)[2][4], const float (&qk)[2][4],
                                       unsigned char *p_image) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
#pragma unroll
            for (int j = 0; j < 2; j++) {
                const int r = r0 + half * 8, c = c0 + j * 8;
                float2 d;
                d.x = __expf(r >= c ? log_between(to[half], {from[j].x, from[j].y}) : -200.0f);
                d.y = __expf(r >= c + 1 ? log_between(to[half], {from[j].z, from[j].w}) : -200.0f);
                *(float2 *)&a[r][c] = make_float2(r > c ? beta[half] * kk[j][2 * half] * d.x : 0.0f,
                                                  r > c + 1 ? beta[half] * kk[j][2 * half + 1] * d.y : 0.0f);
                uint32_t hi, lo;
                split_bf16(r >= c ? qk[j][2 * half] * d.x : 0.0f, r >= c + 1 ? qk[j][2 * half + 1] * d.y : 0.0f, hi, lo);
                store_pair(p_image, r, c, hi, lo);
            }
        }
    }

    // The inverse of diagonal block b of I + A: a lane per column, forward substitution.
    __device__ static void invert_diagonal(Smem &sm, int i, int b) {
        const int lane = threadIdx.x & 31, c = lane & 15;
        float x[16];
#pragma unroll
        for (int r = 0; r < 16; r++) x[r] = r == c ? 1.0f : 0.0f;
#pragma unroll
        for (int j = 0; j < 16; j += 2) {
            float2 m[16];
#pragma unroll
            for (int r = j + 1; r < 16; r++) m[r] = *(const float2 *)&sm.solve.a[i][b * 16 + r][b * 16 + j];
            // Column after column: the updates of a column do not wait for one another.
#pragma unroll
            for (int r = j + 1; r < 16; r++) x[r] = fmaf(-m[r].x, x[j], x[r]);
#pragma unroll
            for (int r = j + 2; r < 16; r++) x[r] = fmaf(-m[r].y, x[j + 1], x[r]);
        }
        if (lane >= 16) return;
#pragma unroll
        for (int r = 0; r < 16; r++) sm.solve.diagonal[i][b][r][c] = x[r];
    }

    // Block column j of T, held transposed (its columns are the rows of every product, as in the scan):
    //     X_i = - (sum_{j <= k < i} X_k A_ik^T) X_ii^T
    __device__ static void block_column(Smem &sm, int i_head, int j, unsigned char *image) {
        const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
        uint32_t xh[BLOCKS][4], xl[BLOCKS][4];
        float x[BLOCKS][2][4] = {}; // stored at the end: see `decays`
#pragma unroll
        for (int i = 0; i < BLOCKS; i++) {
            if (i < j) continue;
            if (i == j) {
                const float(*d)[24] = sm.solve.diagonal[i_head][j];
#pragma unroll
                for (int n = 0; n < 2; n++)
#pragma unroll
                    for (int e = 0; e < 4; e++) x[i][n][e] = d[n * 8 + 2 * t + (e & 1)][g + (e >> 1) * 8];
            } else {
                float y[2][4] = {};
#pragma unroll
                for (int k = 0; k < i; k++) {
                    if (k < j) continue;
                    uint32_t bh[4], bl[4];
                    transposed_operand<C + 4>(bh, bl, &sm.solve.a[i_head][i * 16][k * 16]);
                    mma_split<2>(y, xh[k], xl[k], bh, bl);
                }
                uint32_t yh[4], yl[4], bh[4], bl[4];
#pragma unroll
                for (int e = 0; e < 4; e++) split_bf16(-y[e >> 1][(e & 1) * 2], -y[e >> 1][(e & 1) * 2 + 1], yh[e], yl[e]);
                transposed_operand<24>(bh, bl, &sm.solve.diagonal[i_head][i][0][0]);
                mma_split<2>(x[i], yh, yl, bh, bl);
            }
#pragma unroll
            for (int e = 0; e < 4; e++)
                split_bf16(x[i][e >> 1][(e & 1) * 2], x[i][e >> 1][(e & 1) * 2 + 1], xh[i][e], xl[i][e]);
        }
        const float beta[2] = {sm.beta[i_head][j * 16 + g], sm.beta[i_head][j * 16 + 8 + g]};
#pragma unroll
        for (int i = 0; i < BLOCKS; i++) {
            if (i < j) {
                store_zero_block(image, i, j);
                continue;
            }
#pragma unroll
            for (int e = 0; e < 4; e++) {
                const int n = e >> 1, half = e & 1;
                uint32_t hi, lo;
                split_bf16(x[i][n][half * 2] * beta[half], x[i][n][half * 2 + 1] * beta[half], hi, lo);
                store_pair(image, i * 16 + n * 8 + g, j * 16 + half * 8 + 2 * t, transpose8x8(hi), transpose8x8(lo));
            }
        }
    }
};

template <int S, int C, int PARTS>
__device__ inline void chunk_prepare(const dn_chunk_args &a) {
    using L = Tiles<S, C, PARTS>;
    using Smem = PrepareSmem<S, C, PARTS>;
    using X = Prepare<S, C, PARTS, Smem>;
    DN_SHARED(__align__(1024) unsigned char, smem_raw);
    Smem &sm = *reinterpret_cast<Smem *>(smem_raw);
    const dn_problem &p = a.p;
    const int warp = threadIdx.x >> 5;
    if (X::Copies::USED) X::Copies::begin(sm.arrived);
    // The scan that follows begins with states, of the caller or of the scan before: it must not start before those are there.
    const bool at_first = a.waits == WAITS_FIRST, to_store = a.waits == WAITS_TO_STORE;
    if (at_first && (p.cu_seqlens || p.rows_in || p.rows_out)) wait_for_previous(); // what says where everything is
    if (a.waits == WAITS_NOT) launch_next();
    const bool first = (blockIdx.x | blockIdx.y | blockIdx.z) == 0;
    int b, chunk, slot;
    dn_sequence seq;
    if (!find_chunk<C>(a, b, chunk, slot) || !dn_sequence_of(p, b, seq)) {
        if (first) wait_for_previous();
        return;
    }
    const int tokens = min(C, seq.len - a.tail - chunk * C);
    const int64_t token = (int64_t)seq.start + (int64_t)chunk * C;
    const int kh = dn_quotient(blockIdx.y, a.shares);
    typename X::Rows rows(p, seq, token, kh, tokens);
    DN_HIDE_4(rows.k, rows.q, rows.k_nb, rows.q_nb); // not later: the arguments lie in memory that is slow the first time
    if (at_first) {
        wait_for_previous();
        launch_next();
    }
    rows.fetch(sm, smem_raw, a.shares == 1 && p.T - a.tail > a.nchunks * C); // once: of a prompt of several slabs

    const int rep = dn_quotient(p.Hv, p.Hk), r0 = (blockIdx.y - kh * a.shares) * a.share, pair = min(a.share, rep - r0);
    const auto head = [&](int i) { return p.head_map ? kh * rep + r0 + i : kh + p.Hk * (r0 + i); };
    typename X::Gates raw_gates;
    if (warp < pair) raw_gates.load(p, seq, token, head(warp), tokens); // on their way now, waited for last
    rows.stage(sm, smem_raw, true);
    async_proxy_fence();
    if (to_store) {
        wait_for_previous();
        launch_next();
    }
    __syncthreads();
    if (r0 == 0) {
        unsigned char *out = (unsigned char *)a.kq + ((int64_t)slot * p.Hk + kh) * L::KQ;
        flush(out, sm.image.k, PARTS * L::KQ_PART);
        flush(out + PARTS * L::KQ_PART, sm.image.q, PARTS * L::KQ_PART);
        flush_commit();
    }

    if (warp < pair) X::gates(p, sm, warp, raw_gates, tokens); // the two warps that have the least to multiply
    typename X::Share share(warp);
    share.multiply(sm);

    flush_wait_read();
    __syncthreads(); // the images' place is free
#pragma unroll 1
    for (int i = 0; i < pair; i++) X::decays(sm, i, share, sm.solve.images[i] + L::T);
    async_proxy_fence();
    __syncthreads();
    const auto images_of = [&](int e) { return (unsigned char *)a.th + ((int64_t)slot * p.Hv + head(e)) * L::TH; };
    for (int e = 0; e < pair; e++) {
        flush(images_of(e) + L::T, sm.solve.images[e] + L::T, L::T);
        flush(images_of(e) + 2 * L::T, sm.vec[e], L::VEC);
    }
    flush_commit();
    const int i = warp / X::BLOCKS, j = warp % X::BLOCKS; // a warp per diagonal block, then per block column
    if (i < pair) X::invert_diagonal(sm, i, j);
    __syncthreads();
    if (i < pair) X::block_column(sm, i, j, sm.solve.images[i]);
    async_proxy_fence();
    __syncthreads();
    for (int e = 0; e < pair; e++) flush(images_of(e), sm.solve.images[e], L::T);
    flush_commit();
    flush_wait_read(); // shared memory is given up at the end
    // The kernel after this one waits for this one alone, and must find the one before complete as well.
    if (first) wait_for_previous();
}
