// Stage 2 of the chunked kernel: the scan over chunks. A block owns 64 value columns of one head of one sequence; each of
// its four warps 16 of them, and keeps their state, transposed, as f32 accumulator fragments from the first chunk to the
// last. Everything is formed transposed (columns are the rows of every product), because an accumulator fragment is then,
// split into bf16, the register operand of the next product: the chain of a chunk never leaves registers.
//
//     R = V - gamma (K S),   U = T R,   O = scale (gamma (Q S) + P U),   S = gamma_C S + K^T (U gamma_C / gamma)
//
// The increment of S is accumulated from zero and added in f32: tensor cores round toward zero.
// The order below keeps the tensor cores busy while R, U and S are split: half of Q S runs beside each of R and U.
#pragma once
#include "chunk_tiles.cuh"
#include "tensor_core.cuh"

// How the tensors v and out lie in memory: f32 with aligned rows, 16-bit with aligned rows, or anything.
enum ScanIo { IO_F32 = 0, IO_16 = 1, IO_ANY = 2 };

template <int S, int C, int PARTS>
struct ScanSmem {
    using L = Tiles<S, C, PARTS>;
    static constexpr int COLS = 64;
    static constexpr int V_ROW = COLS * 4;
    // A stage: K, Q, T, P, decay vectors, as in the workspace. Two of them, and two of V.
    static constexpr int T = L::KQ, P = T + L::T, VEC = P + L::T;
    static constexpr int STAGE = (VEC + L::VEC + 1023) / 1024 * 1024;
    static constexpr int V = 2 * STAGE;
    static constexpr int V_STAGE = C * V_ROW;
    static constexpr int BARS = V + 2 * V_STAGE;
    static constexpr int SCRATCH = BARS + 16;
    static constexpr int BYTES = SCRATCH + 16;
    // Rows 2 i and 2 i + 1 share their place in the banks; the four pairs that a half warp reads do not.
    __device__ static int v_offset(int row, int byte) { return row * V_ROW + (byte ^ (((row >> 1) & 3) << 5)); }
};

// This thread's lane. On sm_120 the compiler may not know it from one use to the next: it would form all addresses ahead of
// the loop over chunks, and spill.
__device__ inline int lane_here() {
    int lane = threadIdx.x & 31;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1200
    hide(lane);
#endif
    return lane;
}

#if !DN_WGMMA
// acc += A B for one k-step and 16 columns, B at `at` in a tile image, its low part `part` bytes on. TRANS: B's columns lie
// along the rows there.
template <int PARTS, bool TRANS>
__device__ inline void mma_step(float (*acc)[4], const uint32_t (&ah)[4], const uint32_t (&al)[4], uint32_t at, int part) {
    const auto load = [](uint32_t(&b)[4], uint32_t from) { TRANS ? ldmatrix4_trans(b, from) : ldmatrix4(b, from); };
    uint32_t bh[4], bl[4];
    load(bh, at);
    if (PARTS == 2) load(bl, at + part);
    mma_split<PARTS>(acc, ah, al, bh, bl);
}
#endif

// acc[rows][n] (+)= A[rows][k] B[k][n], with B held k-contiguous ([n][k], as K, Q): k-steps KS0 to KS1 of S / 16.
template <int S, int C, int PARTS, int KS0, int KS1>
__device__ inline void product_rows(float (&acc)[C / 8][4], const uint32_t (&ah)[S / 16][4],
                                    const uint32_t (&al)[S / 16][4], uint32_t tile) {
    using L = Tiles<S, C, PARTS>;
#if DN_WGMMA
    const uint64_t d = wgmma_descriptor(tile, 16);
#pragma unroll
    for (int ks = KS0; ks < KS1; ks++) {
        const uint64_t bh = d + (((ks / 4) * L::SUB + (ks % 4) * 32) >> 4), bl = bh + (L::KQ_PART >> 4);
        if (PARTS == 2) {
            wgmma<C, 0>(acc, al[ks], bh, ks != 0);
            wgmma<C, 0>(acc, ah[ks], bl, 1);
        }
        wgmma<C, 0>(acc, ah[ks], bh, PARTS == 2 || ks != 0);
    }
#else
    const int lane = lane_here();
    const int row = (lane & 7) + ((lane >> 4) << 3), col = ((lane >> 3) & 1) * 8;
    if (KS0 == 0) {
#pragma unroll
        for (int n = 0; n < C / 8; n++) acc[n][0] = acc[n][1] = acc[n][2] = acc[n][3] = 0;
    }
#pragma unroll
    for (int ks = KS0; ks < KS1; ks++) {
#pragma unroll
        for (int n = 0; n < C / 16; n++)
            mma_step<PARTS, false>(&acc[2 * n], ah[ks], al[ks], tile + L::kq_offset(n * 16 + row, ks * 16 + col), L::KQ_PART);
    }
#endif
}

// acc[rows][i] (+)= sum_j A[rows][j] M[i][j] for a lower triangular M (T, P): k-step s only touches i >= 16 s.
template <int S, int C, int PARTS, bool FRESH>
__device__ inline void product_triangle(float (&acc)[C / 8][4], const uint32_t (&ah)[C / 16][4],
                                        const uint32_t (&al)[C / 16][4], uint32_t tile) {
    using L = Tiles<S, C, PARTS>;
#if DN_WGMMA
    const uint64_t d = wgmma_descriptor(tile, 16);
    auto step = [&](auto index) {
        constexpr int s = decltype(index)::value;
        if constexpr (s < C / 16) {
            constexpr int N = C; // the zero half too: products over parts of an accumulator get serialised
            const uint64_t bh = d + (((C - N) * L::ROW + s * 32) >> 4), bl = bh + (L::T_PART >> 4);
            float(*part)[4] = &acc[(C - N) / 8];
            if (PARTS == 2) {
                wgmma<N, 0>(part, al[s], bh, !FRESH || s != 0);
                wgmma<N, 0>(part, ah[s], bl, 1);
            }
            wgmma<N, 0>(part, ah[s], bh, !FRESH || PARTS == 2 || s != 0);
        }
    };
    step(Index<0>());
    step(Index<1>());
    step(Index<2>());
    step(Index<3>());
#else
    const int lane = threadIdx.x & 31;
    const int row = (lane & 7) + ((lane >> 4) << 3), col = ((lane >> 3) & 1) * 8;
    if (FRESH) {
#pragma unroll
        for (int n = 0; n < C / 8; n++) acc[n][0] = acc[n][1] = acc[n][2] = acc[n][3] = 0;
    }
#pragma unroll
    for (int s = 0; s < C / 16; s++) {
#pragma unroll
        for (int n = s; n < C / 16; n++)
            mma_step<PARTS, false>(&acc[2 * n], ah[s], al[s], tile + L::t_offset(n * 16 + row, s * 16 + col), L::T_PART);
    }
#endif
}

// acc[rows][n] = sum_j A[rows][j] K[j][n]: the same image of K, read along the other axis.
template <int S, int C, int PARTS>
__device__ inline void product_columns(float (&acc)[S / 8][4], const uint32_t (&ah)[C / 16][4],
                                       const uint32_t (&al)[C / 16][4], uint32_t tile) {
    using L = Tiles<S, C, PARTS>;
#if DN_WGMMA
    const uint64_t d = wgmma_descriptor(tile, L::SUB);
#pragma unroll
    for (int s = 0; s < C / 16; s++) {
#pragma unroll
        for (int half = 0; half < S / 64; half++) {
            const uint64_t bh = d + ((half * L::SUB + s * 2048) >> 4), bl = bh + (L::KQ_PART >> 4);
            float(*part)[4] = &acc[half * 8];
            if (PARTS == 2) {
                wgmma<64, 1>(part, al[s], bh, s != 0);
                wgmma<64, 1>(part, ah[s], bl, 1);
            }
            wgmma<64, 1>(part, ah[s], bh, PARTS == 2 || s != 0);
        }
    }
#else
    const int lane = threadIdx.x & 31;
    const int row = lane & 15, col = (lane >> 4) * 8;
#pragma unroll
    for (int n = 0; n < S / 8; n++) acc[n][0] = acc[n][1] = acc[n][2] = acc[n][3] = 0;
#pragma unroll
    for (int s = 0; s < C / 16; s++) {
#pragma unroll
        for (int n = 0; n < S / 16; n++)
            mma_step<PARTS, true>(&acc[2 * n], ah[s], al[s], tile + L::kq_offset(s * 16 + row, n * 16 + col), L::KQ_PART);
    }
#endif
}

// Two accumulator tiles are one operand fragment; `scale(column)` multiplies a column on the way.
template <int PARTS, int NT, class F>
__device__ inline void to_operand(uint32_t (&hi)[NT / 2][4], uint32_t (&lo)[NT / 2][4], const float (&x)[NT][4], F scale) {
    const int t = threadIdx.x & 3;
#pragma unroll
    for (int n = 0; n < NT; n++) {
        const float2 f = scale(n * 8 + 2 * t);
#pragma unroll
        for (int j = 0; j < 2; j++) {
            const float x0 = x[n][2 * j] * f.x, x1 = x[n][2 * j + 1] * f.y;
            if (PARTS == 2) split_bf16(x0, x1, hi[n / 2][(n & 1) * 2 + j], lo[n / 2][(n & 1) * 2 + j]);
            else hi[n / 2][(n & 1) * 2 + j] = pack_bf16(x0, x1);
        }
    }
}

// Has the operands of the next chunk finished here, beside the product that still runs: left to itself the compiler puts
// the work behind the wait.
template <int PARTS, int KS>
__device__ inline void finish_here(const uint32_t (&hi)[KS][4], const uint32_t (&lo)[KS][4], uint32_t scratch) {
#if DN_WGMMA
    uint32_t z = ~0u;
#pragma unroll
    for (int i = 0; i < KS; i++) {
        z &= hi[i][0] & hi[i][1] & hi[i][2] & hi[i][3];
        if (PARTS == 2) z &= lo[i][0] & lo[i][1] & lo[i][2] & lo[i][3];
    }
    form_here(z, scratch);
#endif
}

template <int S, int C, int PARTS, int IO>
struct Scan {
    using L = Tiles<S, C, PARTS>;
    using M = ScanSmem<S, C, PARTS>;

    const dn_chunk_args &a;
    unsigned char *smem;
    uint32_t smem_at;
    const unsigned char *kq, *th; // of this head, next chunk to fetch
    int64_t kq_step, th_step;
    const char *v; // of this head, column block and slab; for this thread's pieces
    int tokens;    // of the sequence in this slab

    // Contiguous bytes of the workspace to shared memory: one bulk copy by one thread, or 16 bytes per thread at a time.
    __device__ void fetch(int dst, const unsigned char *src, int bytes, int stage) {
#if DN_BULK_COPY
        bulk_copy(smem_at + dst, src, bytes, smem_at + M::BARS + stage * 8);
#else
        for (int i = threadIdx.x * 16; i < bytes; i += 128 * 16) cp_async<16>(smem_at + dst + i, src + i);
#endif
    }
    // The next chunk's tiles.
    __device__ void fetch_tiles(int stage) {
#if DN_BULK_COPY
        if (threadIdx.x == 0) {
            mbarrier_expect(smem_at + M::BARS + stage * 8, L::KQ + L::TH);
#else
        {
#endif
            fetch(stage * M::STAGE, kq, L::KQ, stage);
            fetch(stage * M::STAGE + M::T, th, L::TH, stage);
        }
        kq += kq_step;
        th += th_step;
    }
    // Value rows of 64 columns: 16-bit types as they are, f32 or anything else as f32. Tokens past the end are zero.
    __device__ void fetch_v(int chunk, int stage) {
        const dn_problem &p = a.p;
        constexpr int ROWS = 8; // rows in a pass of the block
        const int row0 = threadIdx.x >> 4, c = threadIdx.x & 15;
        const int64_t step = p.v.nb[2] * ROWS;
        const char *src = v + (int64_t)chunk * C * p.v.nb[2];
        const int left = tokens - chunk * C;
        unsigned char *tile = smem + M::V + stage * M::V_STAGE;
        if (IO == IO_ANY) {
#pragma unroll 1
            for (int row = row0; row < C; row += ROWS, src += step) {
                float4 x = make_float4(0, 0, 0, 0);
                if (row < left) x = dn_load4(p.v, src, 0, p.dtype_v, false);
                *(float4 *)(tile + M::v_offset(row, c * 16)) = x;
            }
            return;
        }
#pragma unroll
        for (int i = 0; i < C / ROWS; i++) {
            const int row = row0 + i * ROWS;
            constexpr int BYTES = IO == IO_F32 ? 16 : 8;
            const uint32_t dst = smem_at + M::V + stage * M::V_STAGE + M::v_offset(row, c * BYTES);
            cp_async_or_zero<BYTES>(dst, src, row < left);
            src += step;
        }
    }
    __device__ float2 value(int stage, int row, int column) const {
        const unsigned char *tile = smem + M::V + stage * M::V_STAGE;
        if (IO != IO_16) return *(const float2 *)(tile + M::v_offset(row, column * 4));
        const uint32_t x = *(const uint32_t *)(tile + M::v_offset(row, column * 2));
        if (a.p.dtype_v == DN_F16) return make_float2(dn_f16_to_f32((uint16_t)x), dn_f16_to_f32((uint16_t)(x >> 16)));
        return make_float2(__uint_as_float(x << 16), __uint_as_float(x & 0xffff0000u));
    }
    __device__ float2 decays(int stage, int which, int i) const { // entries i, i + 1 of a decay vector
        return *(const float2 *)(smem + stage * M::STAGE + M::VEC + which * C * 4 + i * 4);
    }
};

// Where a warp's state fragments live in memory: rows of the fragment are value columns, columns are keys. Fragment rows
// r and r + 8 are neighbouring value columns, so that a thread's outputs for a token are neighbours.
struct StateAt {
    char *base;
    int64_t key_nb, column_nb;
};
// f(n, j, address) for neighbouring keys j and j + 1 of fragment n, of a column (W = 2) or of two neighbouring ones (W = 4).
template <int NT, int W, class F>
__device__ inline void each_pair(const StateAt &m, int column, F f) {
    char *at = m.base + column * m.column_nb + (threadIdx.x & 3) * 2 * m.key_nb;
#pragma unroll
    for (int n = 0; n < NT; n++)
#pragma unroll
        for (int j = 0; j < W; j += 2) f(n, j, at + n * 8 * m.key_nb + (j >> 1) * m.column_nb);
}
// Whether keys are neighbours, and pairs of them aligned.
__device__ inline bool in_pairs(const StateAt &m) {
    return m.key_nb == 4 && (((uintptr_t)m.base | (uintptr_t)m.column_nb) & 7) == 0;
}
// EARLY: before the wait for the kernel ahead, when what L1 has may be older than the state; so from L2.
template <bool EARLY, int NT, int W>
__device__ inline void load_fragments(float (&s)[NT][W], const StateAt &m, int column) {
    const auto load = [](auto *at) { return EARLY ? __ldcg(at) : *at; };
    if (in_pairs(m)) {
        each_pair<NT, W>(m, column, [&](int n, int j, const char *at) {
            const float2 x = load((const float2 *)at);
            s[n][j] = x.x, s[n][j + 1] = x.y;
        });
    } else {
        each_pair<NT, W>(m, column, [&](int n, int j, const char *at) {
            s[n][j] = load((const float *)at), s[n][j + 1] = load((const float *)(at + m.key_nb));
        });
    }
}
template <int NT, int W>
__device__ inline void store_fragments(const float (&s)[NT][W], const StateAt &m, int column) {
    if (in_pairs(m)) {
        each_pair<NT, W>(m, column, [&](int n, int j, char *at) { *(float2 *)at = make_float2(s[n][j], s[n][j + 1]); });
    } else {
        each_pair<NT, W>(m, column, [&](int n, int j, char *at) {
            *(float *)at = s[n][j], *(float *)(at + m.key_nb) = s[n][j + 1];
        });
    }
}
__device__ inline StateAt state_at(const dn_problem &p, const dn_state_view &v, int h, int row) {
    char *base = (char *)v.data + h * v.nb[2] + (int64_t)row * v.nb[3];
    return p.state_layout ? StateAt{base, v.nb[1], v.nb[0]} : StateAt{base, v.nb[0], v.nb[1]};
}

// The outputs of one chunk; `out` is the first column's at the chunk's token 2 t.
template <int C, int IO>
__device__ inline void store_output(const dn_problem &p, char *out, const float (&o)[C / 8][4], int left) {
    const int64_t token = p.out.nb[2], step = 7 * token;
    if (IO == IO_F32 && left >= C) { // the usual case, without a test per token
#pragma unroll
        for (int n = 0; n < C / 8; n++) {
            *(float2 *)out = make_float2(o[n][0], o[n][2]);
            out += token;
            *(float2 *)out = make_float2(o[n][1], o[n][3]);
            out += step;
        }
        return;
    }
    const int t = threadIdx.x & 3;
#pragma unroll
    for (int n = 0; n < C / 8; n++) {
#pragma unroll
        for (int j = 0; j < 2; j++) {
            if (n * 8 + 2 * t + j < left) {
                const float x = o[n][j], y = o[n][2 + j];
                if (IO == IO_F32) {
                    *(float2 *)out = make_float2(x, y);
                } else if (IO == IO_16) {
                    *(uint32_t *)out = pack_16(x, y, p.dtype_out);
                } else {
                    dn_store(out, p.dtype_out, x);
                    dn_store(out + p.out.nb[0], p.dtype_out, y);
                }
            }
            out += j ? step : token;
        }
    }
}

// What a block scans.
struct ScanPlace {
    int column_block, head, sequence, piece; // value columns, value head, sequence of the launch, piece of the slab
};
template <int S, int COLS, bool TRANSITION>
__device__ inline ScanPlace scan_place(const dn_chunk_args &a) {
    int x, y, z;
    block_here(x, y, z);
    const int pieces = TRANSITION ? a.pieces - 1 : a.pieces; // all pieces but the last have a transition
    return {TRANSITION ? x % (S / COLS) : x, y, z / pieces, z % pieces};
}

// The chunks of its sequence that a block scans: the first one, how many, the slot of the first in the workspace; whether
// they are the sequence's first and last; slots of carry.
struct ScanWalk {
    int first, count, slot;
    bool begins, ends;
    int carry_in, carry_out;
};
template <int C, bool TRANSITION>
__device__ inline ScanWalk scan_walk(const dn_chunk_args &a, const ScanPlace &at) {
    const int b = a.seq0 + at.sequence, all = chunks_of<C>(a, b);
    if (a.p.cu_seqlens) {
        int base = 0;
        for (int i = 0; i < b; i++) base += chunks_of<C>(a, i);
        const int first = max(a.chunk0 - base, 0), end = a.chunk0 + a.nchunks;
        const int count = max(min(base + all, end) - (base + first), 0);
        const bool begins = base >= a.chunk0 && base < end;
        return {first, count, base + first - a.chunk0, begins, base + all <= end, a.carry_in, a.carry_out};
    }
    const auto slot_of = [&](int slot) { return slot * a.nseq + at.sequence; };
    const int first = a.chunk0 + at.piece * a.per_piece;
    const int end = at.piece + 1 < a.pieces ? first + a.per_piece : a.chunk0 + a.nchunks;
    return {first,
            max(min(all, end) - first, 0),
            at.sequence * a.nchunks + at.piece * a.per_piece,
            first == 0,
            all <= end,
            slot_of(at.piece > 0 ? 1 + at.piece : a.carry_in),
            slot_of(TRANSITION ? 2 + at.piece : a.carry_out)};
}

template <int S>
__device__ inline StateAt carry_at(const dn_chunk_args &a, int slot, int head) {
    return {(char *)a.carry + ((int64_t)slot * a.p.Hv + head) * S * S * 4, 4, S * 4};
}

// What a block leaves: its last state, which `store(where, first column)` puts there.
template <int S, int C, int COLS, bool TRANSITION, class F>
__device__ inline void scan_end(const dn_chunk_args &a, bool identity, F store) {
    const dn_problem &p = a.p;
    const ScanPlace place = scan_place<S, COLS, TRANSITION>(a);
    const ScanWalk walk = scan_walk<C, TRANSITION>(a, place);
    const int h = place.head, b = a.seq0 + place.sequence;
    const auto put = [&](const StateAt &at) { store(at, place.column_block * COLS); };
    dn_sequence seq;
    if (!dn_sequence_of(p, b, seq)) return;
    if (TRANSITION) {
        const int64_t index = identity ? (place.piece - 1) * a.nseq + place.sequence : walk.carry_out;
        put({(char *)(identity ? a.transitions : a.carry) + (index * p.Hv + h) * S * S * 4, 4, S * 4});
    } else if (place.piece + 1 < a.pieces) {
        // The next one's state comes from the transitions.
    } else if (!walk.ends) {
        put(carry_at<S>(a, walk.carry_out, h));
    } else if (a.state_end) { // the token-serial kernel goes on from here
        put({(char *)a.state_end + ((int64_t)b * p.Hv + h) * S * S * 4, 4, S * 4});
    } else {
        if (p.state_out.data) put(state_at(p, p.state_out, h, seq.row_out));
        // One snapshot of the newest state is the same thing; more of them are the token-serial kernel's.
        if (p.snapshots.data && seq.len > 0) put(state_at(p, p.snapshots, h, b));
    }
}

// TRANSITION: not the outputs, but what a piece of a slab does to a state. Half of the column blocks scan V from a zero
// state (in the first piece, from its own state), the other half the columns of the identity without V.
template <int S, int C, int PARTS, int IO, bool TRANSITION>
__device__ inline void chunk_scan(const dn_chunk_args &a) {
    using L = Tiles<S, C, PARTS>;
    using M = ScanSmem<S, C, PARTS>;
    DN_SHARED(__align__(1024) unsigned char, smem_raw);
    const dn_problem &p = a.p;
    const ScanPlace place = scan_place<S, M::COLS, TRANSITION>(a);
    const int h = place.head, piece = place.piece;
    // All of a transition but the first, whose state is known.
    const bool identity = TRANSITION && blockIdx.x >= S / 64;
    if (identity && piece == 0) {
        wait_for_previous();
        return;
    }
    const int kh = dn_key_head(h, p.Hk, p.Hv, p.head_map);
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
    const int column = place.column_block * 64 + warp * 16 + 2 * g; // and the one after it
    // Where everything is, before the wait: the arguments lie in memory that is slow the first time, and what else says where
    // is not the previous kernel's.
    dn_sequence seq = {};
    const bool there = dn_sequence_of(p, a.seq0 + place.sequence, seq);
    const ScanWalk walk = there ? scan_walk<C, TRANSITION>(a, place) : ScanWalk{};
    const int first = walk.first, count = walk.count, slot = walk.slot;

    Scan<S, C, PARTS, IO> x{a, smem_raw, smem_address(smem_raw)};
    x.kq = (const unsigned char *)a.kq + ((int64_t)slot * p.Hk + kh) * L::KQ;
    x.th = (const unsigned char *)a.th + ((int64_t)slot * p.Hv + h) * L::TH;
    x.kq_step = (int64_t)p.Hk * L::KQ;
    x.th_step = (int64_t)p.Hv * L::TH;
    const int64_t token = (int64_t)seq.start + (int64_t)first * C;
    x.tokens = seq.len - a.tail - first * C;
    x.v = (const char *)p.v.data + h * p.v.nb[1] + (token + (threadIdx.x >> 4)) * p.v.nb[2] + seq.b * p.v.nb[3] +
          (place.column_block * 64 + (threadIdx.x & 15) * 4) * p.v.nb[0];
    char *out = (char *)p.out.data + h * p.out.nb[1] + (token + 2 * t) * p.out.nb[2] + seq.b * p.out.nb[3] +
                column * p.out.nb[0];
    DN_HIDE_4(x.kq, x.th, x.v, out); // not later

#if DN_BULK_COPY
    const uint32_t bars = x.smem_at + M::BARS;
    if (threadIdx.x == 0) {
        mbarrier_init(bars, 1);
        mbarrier_init(bars + 8, 1);
        mbarrier_init_fence();
    }
    __syncthreads();
#endif
    // Before anything is read that the previous kernel writes, and before any return: done is done for both.
    wait_for_previous();
    launch_next();
    if (!there || !walk.begins && p.cu_seqlens && count == 0) return;
    if (count > 0) {
        x.fetch_tiles(0);
        x.fetch_v(0, 0);
    }
    cp_async_commit();
    if (count > 1) x.fetch_tiles(1);
    cp_async_commit();

    float s[S / 8][4];
    if (TRANSITION && piece > 0) {
#pragma unroll
        for (int n = 0; n < S / 8; n++)
#pragma unroll
            for (int j = 0; j < 4; j++) s[n][j] = identity && n * 8 + 2 * t + (j & 1) == column + (j >> 1) ? 1.0f : 0.0f;
    } else {
        // A state in place: the last piece may have stored it before the first one loads it. So the transition of the first
        // piece, a launch ahead, leaves a copy where a later slab's first state is.
        const bool from_caller = walk.begins && (TRANSITION || a.pieces == 1);
        load_fragments<false>(s, from_caller ? state_at(p, p.state_in, h, seq.row_in) : carry_at<S>(a, walk.carry_in, h), column);
        if (TRANSITION && walk.begins) store_fragments(s, carry_at<S>(a, walk.carry_in, h), column);
    }

    const auto one = [](int) { return make_float2(1, 1); };
    uint32_t sh[S / 16][4], sl[S / 16][4];
    to_operand<PARTS, S / 8>(sh, sl, s, one);
    // Outputs are stored while the next chunk's products run; at once where registers are short and products do not run by
    // themselves.
    constexpr bool LATER = DN_WGMMA;
    float done[C / 8][4];
    for (int c = 0; c < count; c++) {
        const int stage = c & 1;
        const uint32_t k = x.smem_at + stage * M::STAGE, q = k + PARTS * L::KQ_PART;
#if DN_BULK_COPY
        mbarrier_wait(bars + stage * 8, (c >> 1) & 1);
#else
        cp_async_wait<1>();
        __syncthreads();
#endif
        float acc[C / 8][4], o[C / 8][4];
        wgmma_fence();
        product_rows<S, C, PARTS, 0, S / 16>(acc, sh, sl, k);
        wgmma_commit();
        if constexpr (!TRANSITION) product_rows<S, C, PARTS, 0, S / 32>(o, sh, sl, q);
        wgmma_commit();
        if (c > 0) {
            if (c + 1 < count) x.fetch_tiles(stage ^ 1);
            if (LATER && !TRANSITION) {
                store_output<C, IO>(p, out, done, x.tokens - (c - 1) * C);
                out += C * p.out.nb[2];
            }
        }
        cp_async_commit();
        if (c + 1 < count) x.fetch_v(c + 1, stage ^ 1);
        cp_async_commit();
        cp_async_wait<2>();
        __syncthreads(); // V of this chunk is there for all
        wgmma_wait<1>();
        wgmma_touch(acc);

        // R, over K S.
#pragma unroll
        for (int n = 0; n < C / 8; n++) {
            const int i = n * 8 + 2 * t;
            const float2 gamma = x.decays(stage, 0, i);
            float2 v0 = x.value(stage, i, warp * 16 + 2 * g), v1 = x.value(stage, i + 1, warp * 16 + 2 * g);
            if (identity) v0 = v1 = make_float2(0, 0);
            acc[n][0] = fmaf(-gamma.x, acc[n][0], v0.x);
            acc[n][1] = fmaf(-gamma.y, acc[n][1], v1.x);
            acc[n][2] = fmaf(-gamma.x, acc[n][2], v0.y);
            acc[n][3] = fmaf(-gamma.y, acc[n][3], v1.y);
        }
        uint32_t rh[C / 16][4], rl[C / 16][4];
        to_operand<PARTS, C / 8>(rh, rl, acc, one);

        float u[C / 8][4];
        wgmma_fence();
        product_triangle<S, C, PARTS, true>(u, rh, rl, k + M::T);
        wgmma_commit();
        if constexpr (!TRANSITION) product_rows<S, C, PARTS, S / 32, S / 16>(o, sh, sl, q);
        wgmma_commit();
        wgmma_wait<1>();
        wgmma_touch(u);

        float ds[S / 8][4];
        uint32_t uh[C / 16][4], ul[C / 16][4], wh[C / 16][4], wl[C / 16][4];
        to_operand<PARTS, C / 8>(wh, wl, u, [&](int i) { return x.decays(stage, 1, i); });
        wgmma_wait<0>(); // all of Q S: its operands' registers are wanted
        if constexpr (!TRANSITION) wgmma_touch(o);
        wgmma_fence();
        product_columns<S, C, PARTS>(ds, wh, wl, k);
        wgmma_commit();
        if constexpr (!TRANSITION) {
            to_operand<PARTS, C / 8>(uh, ul, u, one);
#pragma unroll
            for (int n = 0; n < C / 8; n++) {
                const float2 gamma = x.decays(stage, 0, n * 8 + 2 * t);
                o[n][0] *= gamma.x;
                o[n][1] *= gamma.y;
                o[n][2] *= gamma.x;
                o[n][3] *= gamma.y;
            }
            wgmma_fence();
            product_triangle<S, C, PARTS, false>(o, uh, ul, k + M::P);
        }
        wgmma_commit();
        const float decay = x.decays(stage, 0, C - 2).y;
        wgmma_wait<1>(); // the increment
        wgmma_touch(ds);
#pragma unroll
        for (int n = 0; n < S / 8; n++)
#pragma unroll
            for (int j = 0; j < 4; j++) s[n][j] = fmaf(decay, s[n][j], ds[n][j]);
        to_operand<PARTS, S / 8>(sh, sl, s, one);
        finish_here<PARTS>(sh, sl, x.smem_at + M::SCRATCH);
        wgmma_wait<0>();
        if constexpr (!TRANSITION) wgmma_touch(o);
        __syncthreads(); // this stage is read
        if constexpr (!TRANSITION) {
#pragma unroll
            for (int n = 0; n < C / 8; n++)
#pragma unroll
                for (int j = 0; j < 4; j++) done[n][j] = o[n][j] * p.scale;
            if (!LATER) {
                store_output<C, IO>(p, out, done, x.tokens - c * C);
                out += C * p.out.nb[2];
            }
        }
    }
    if (LATER && !TRANSITION && count > 0) store_output<C, IO>(p, out, done, x.tokens - (count - 1) * C);
    cp_async_wait<0>();
    scan_end<S, C, M::COLS, TRANSITION>(a, identity, [&](const StateAt &at, int first) {
        store_fragments(s, at, first + (threadIdx.x >> 5) * 16 + 2 * ((threadIdx.x & 31) >> 2));
    });
}
