// Stage 2 of the chunked kernel on Hopper: the scan of chunk_scan.cuh in blocks of 32 value columns, so that 32 heads keep
// a whole device busy and a chunk takes half as long. Two blocks of a head are a cluster: each fetches half of the tiles for
// both, or else L2 could not keep up.
//
// Products are transposed as there, columns being the rows of A, in registers. A warp's slice of A has sixteen rows: the high
// parts of its eight columns in rows 0 to 7, the low parts of the same columns in rows 8 to 15. One product with a tile is
// then both of theirs, and a thread finds the two sums of an entry in its own accumulators: rows g and g + 8. Of four parts'
// products that is all four, where three would do: a third more work than chunk_scan.cuh, for half of the chain.
//
// One warpgroup has the chain, with one warp to a scheduler: whatever else it does is time that the tensor cores wait. So a
// second one brings the tiles and V, and takes the outputs away.
#pragma once
#include "chunk_scan.cuh"

template <int S, int PARTS>
struct ClusterSmem {
    static constexpr int C = 64, COLS = 32, BLOCKS = 2, WARPS = 4;
    using L = Tiles<S, C, PARTS>;
    // A stage, twice: K, Q, T, P, decay vectors, as in the workspace. Then V, twice, and O, in f32.
    static constexpr int T = L::KQ, P = T + L::T, VEC = P + L::T;
    static constexpr int STAGE = (VEC + L::VEC + 1023) / 1024 * 1024;
    static constexpr int ROW = COLS * 4, V = 2 * STAGE, O = V + 2 * C * ROW;
    static constexpr int BARS = O + C * ROW, EMPTY = 64, SCRATCH = BARS + 2 * EMPTY, BYTES = SCRATCH + 16;
    // Byte of a row of V or O. The four pairs of rows that a warp's lanes have in their hands lie in banks of their own.
    __device__ static int row_offset(int row, int byte) { return row * ROW + (byte ^ (((row >> 1) & 3) << 5)); }
};
// What has an mbarrier for being there, and EMPTY bytes on one for being read: K and Q of both stages; T and P; V and the decay
// vectors; O. Tiles are read in all blocks of the cluster. The first chunk's K has one of its own, for being there. (Named
// barriers would do for V and O, but racecheck loses count of them.)
enum ClusterPlace { PLACE_KQ = 0, PLACE_TH = 2, PLACE_V = 4, PLACE_O = 6, PLACE_FIRST_K = 7, PLACES = 8 };

#if DN_WGMMA

// acc (+)= A B for one k-step, B a tile image in parts.
template <int PARTS, int TRANS>
__device__ inline void cluster_step(float (*acc)[4], const uint32_t (&a)[4], uint64_t b, int part_bytes, bool fresh) {
    if (PARTS == 2) wgmma<64, TRANS>(acc, a, b + (part_bytes >> 4), !fresh);
    wgmma<64, TRANS>(acc, a, b, PARTS == 2 || !fresh);
}
// K or Q by A's keys: k-steps KS0 to KS1.
template <int S, int PARTS, int KS0, int KS1>
__device__ inline void cluster_rows(float (&acc)[8][4], const uint32_t (&a)[S / 16][4], uint32_t tile) {
    using L = Tiles<S, 64, PARTS>;
    const uint64_t d = wgmma_descriptor(tile, 16);
#pragma unroll
    for (int ks = KS0; ks < KS1; ks++)
        cluster_step<PARTS, 0>(acc, a[ks], d + (((ks / 4) * L::SUB + (ks % 4) * 32) >> 4), L::KQ_PART, ks == 0);
}
// T or P by A's tokens.
template <int S, int PARTS, bool FRESH>
__device__ inline void cluster_triangle(float (&acc)[8][4], const uint32_t (&a)[4][4], uint32_t tile) {
    using L = Tiles<S, 64, PARTS>;
    const uint64_t d = wgmma_descriptor(tile, 16);
#pragma unroll
    for (int s = 0; s < 4; s++) cluster_step<PARTS, 0>(acc, a[s], d + (s * 32 >> 4), L::T_PART, FRESH && s == 0);
}
// K^T by A's tokens, for 64 keys.
template <int S, int PARTS>
__device__ inline void cluster_columns(float (&acc)[8][4], const uint32_t (&a)[4][4], uint32_t tile, int half) {
    using L = Tiles<S, 64, PARTS>;
    const uint64_t d = wgmma_descriptor(tile + half * L::SUB, L::SUB);
#pragma unroll
    for (int s = 0; s < 4; s++) cluster_step<PARTS, 1>(acc, a[s], d + (s * 2048 >> 4), L::KQ_PART, s == 0);
}

// Neighbouring entries of column g as high and low parts in operand `a`: f32 accuracy on the side of the states, values and
// updates costs no product here.
__device__ inline void cluster_operand(uint32_t (&a)[4], int n, float x0, float x1) {
    split_bf16(x0, x1, a[(n & 1) * 2], a[(n & 1) * 2 + 1]);
}

// The second warpgroup. Each of its warps has one of these jobs.
template <int S, int PARTS, int IO>
struct ClusterHelp {
    using M = ClusterSmem<S, PARTS>;
    using L = typename M::L;
    static constexpr int C = M::C;
    unsigned char *smem;
    uint32_t at; // the same as an address
    int count;   // chunks

    __device__ uint32_t full(int place) const { return at + M::BARS + place * 8; }
    // Before what is at a place is replaced for the `use`-th time.
    __device__ void wait_read(int place, int use) const {
        if (use > 0) mbarrier_wait(full(place) + M::EMPTY, (use - 1) & 1);
    }

    // This block's share of the tiles, for all blocks of the cluster, as soon as all have read what was in their place. One
    // thread.
    __device__ void tiles(const unsigned char *kq, const unsigned char *th, int64_t kq_step, int64_t th_step) const {
        const uint32_t rank = cluster_rank();
        const auto fetch = [&](int place, int dst, const unsigned char *src, int bytes) {
            mbarrier_expect(full(place), bytes);
            bytes /= M::BLOCKS;
            bulk_multicast(at + dst + rank * bytes, src + rank * bytes, bytes, full(place), (1 << M::BLOCKS) - 1);
        };
#pragma unroll 1
        for (int c = 0; c < count; c++) {
            const int stage = c & 1;
            wait_read(PLACE_KQ + stage, c >> 1);
            if (c == 0) fetch(PLACE_FIRST_K, 0, kq, L::KQ / 2);
            const int had = c == 0 ? L::KQ / 2 : 0;
            fetch(PLACE_KQ + stage, stage * M::STAGE + had, kq + had, L::KQ - had);
            wait_read(PLACE_TH + stage, c >> 1);
            fetch(PLACE_TH + stage, stage * M::STAGE + M::T, th, 2 * L::T);
            if (c == 0) mbarrier_wait(full(PLACE_TH), 0); // the whole device begins now: first chunks first
            kq += kq_step;
            th += th_step;
        }
    }

    // Rows of V, from `src` on, this block's first column, zeros past the end; and decay vectors. A warp. (The vectors are not
    // among the tiles because threads read them: racecheck takes a thread's read of what the copy engine wrote for a race.)
    __device__ void values(const dn_problem &p, const char *src, int left, const unsigned char *vectors, int64_t step) const {
        static_assert(L::VEC == 32 * 16, "sixteen bytes a lane");
        const int lane = threadIdx.x & 31, part = lane & 7;
        const int64_t token = p.v.nb[2];
        const uint64_t once = evict_first();
        src += (lane >> 3) * token + part * 4 * p.v.nb[0];
        const auto decays = [&](int stage) {
            const int vector = stage * M::STAGE + M::VEC + lane * 16;
            if (IO == IO_F32) cp_async<16>(at + vector, vectors + lane * 16);
            else *(uint4 *)(smem + vector) = __ldcg((const uint4 *)(vectors + lane * 16));
            vectors += step;
        };
#pragma unroll 1
        for (int c = 0; c < count; c++, left -= C) {
            const int stage = c & 1;
            wait_read(PLACE_V + stage, c >> 1);
            if (c > 0) decays(stage);
#pragma unroll 4
            for (int i = 0; i < C / 4; i++, src += 4 * token) {
                const int row = i * 4 + (lane >> 3), to = M::V + M::row_offset(stage * C + row, part * 16);
                if (IO == IO_F32) {
                    cp_async_once(at + to, src, row < left, once);
                } else {
                    *(float4 *)(smem + to) =
                        row < left ? dn_load4(p.v, src, 0, p.dtype_v, p.flags & DN_VEC_V) : make_float4(0, 0, 0, 0);
                }
            }
            if (c == 0) { // V is the caller's, decays are stage 1's
                wait_for_previous();
                decays(stage);
            }
            if (IO == IO_F32) mbarrier_arrive_copied(full(PLACE_V + stage));
            else mbarrier_arrive(full(PLACE_V + stage));
        }
    }

    // Rows of the output to `out`, this block's first column. Two warps: `which` of them this is.
    __device__ void outputs(const dn_problem &p, char *out, int left, int which) const {
        const int lane = threadIdx.x & 31, part = lane & 7, row0 = which * 4 + (lane >> 3);
        const int64_t token = p.out.nb[2];
        out += row0 * token + part * 4 * p.out.nb[0];
#pragma unroll 1
        for (int c = 0; c < count; c++, left -= C) {
            mbarrier_wait(full(PLACE_O), c & 1);
            float4 rows[C / 8];
#pragma unroll
            for (int i = 0; i < C / 8; i++)
                rows[i] = *(const float4 *)(smem + M::O + M::row_offset(i * 8 + row0, part * 16));
            mbarrier_arrive(full(PLACE_O) + M::EMPTY);
#pragma unroll
            for (int i = 0; i < C / 8; i++, out += 8 * token) {
                float4 x = rows[i];
                x.x *= p.scale, x.y *= p.scale, x.z *= p.scale, x.w *= p.scale;
                if (i * 8 + row0 >= left) continue;
                if (IO == IO_F32) {
                    store_once((float4 *)out, x);
                } else if (p.dtype_out == DN_F32) {
                    const float each[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
                    for (int j = 0; j < 4; j++) *(float *)(out + j * p.out.nb[0]) = each[j];
                } else {
                    const uint2 pairs = make_uint2(pack_16(x.x, x.y, p.dtype_out), pack_16(x.z, x.w, p.dtype_out));
                    if (p.flags & DN_VEC_OUT) {
                        *(uint2 *)out = pairs;
                        continue;
                    }
#pragma unroll
                    for (int j = 0; j < 4; j++)
                        *(uint16_t *)(out + j * p.out.nb[0]) = (uint16_t)((j < 2 ? pairs.x : pairs.y) >> j % 2 * 16);
                }
            }
        }
    }
};

template <int S, int PARTS, int IO>
__device__ inline void chunk_cluster(const dn_chunk_args &a) {
    using M = ClusterSmem<S, PARTS>;
    using L = typename M::L;
    constexpr int C = M::C;
    DN_SHARED(__align__(1024) unsigned char, smem_raw);
    const dn_problem &p = a.p;
    const ScanPlace place = scan_place<S, M::COLS, false>(a);
    const int h = place.head;
    const int kh = dn_key_head(h, p.Hk, p.Hv, p.head_map);
    const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
    const int warp = __shfl_sync(~0u, threadIdx.x >> 5, 0); // the compiler sees that a warp's threads agree
    const int column0 = place.column_block * M::COLS, column = column0 + warp * 8 + g;
    const uint32_t smem = smem_address(smem_raw);
    const auto full = [&](int place) { return smem + M::BARS + place * 8; };
    if (threadIdx.x == 0) {
#pragma unroll
        for (int place = PLACE_KQ; place < PLACE_V; place++) {
            mbarrier_init(full(place), 1);
            mbarrier_init(full(place) + M::EMPTY, M::WARPS * M::BLOCKS);
        }
#pragma unroll
        for (int place = PLACE_V; place < PLACE_O; place++) {
            mbarrier_init(full(place), 32);
            mbarrier_init(full(place) + M::EMPTY, 32 * M::WARPS);
        }
        mbarrier_init(full(PLACE_FIRST_K), 1);
        mbarrier_init(full(PLACE_O), 32 * M::WARPS);
        mbarrier_init(full(PLACE_O) + M::EMPTY, 32 * 2);
        mbarrier_init_fence();
    }
    cluster_sync();
    // Where everything is, before the wait: the arguments lie in memory that is slow the first time, and what else says where
    // is not stage 1's.
    dn_sequence seq = {};
    const bool there = dn_sequence_of(p, a.seq0 + place.sequence, seq);
    const ScanWalk walk = there ? scan_walk<C, false>(a, place) : ScanWalk{};
    const int count = walk.count, left = seq.len - a.tail - walk.first * C;
    const int64_t token = (int64_t)seq.start + (int64_t)walk.first * C;
    const unsigned char *kq = (const unsigned char *)a.kq + ((int64_t)walk.slot * p.Hk + kh) * L::KQ;
    const unsigned char *th = (const unsigned char *)a.th + ((int64_t)walk.slot * p.Hv + h) * L::TH;
    const auto column_of = [&](const dn_view &x) {
        return (char *)x.data + h * x.nb[1] + token * x.nb[2] + seq.b * x.nb[3] + column0 * x.nb[0];
    };
    const char *v = column_of(p.v);
    char *out = column_of(p.out);
    StateAt begin = walk.begins ? state_at(p, p.state_in, h, seq.row_in) : carry_at<S>(a, walk.carry_in, h);
    DN_HIDE_5(kq, th, v, out, begin.base); // not later
    // Stage 1 has waited for the kernel before it, the caller's or the scan before, and then let this one start: states may be
    // read at once. (Not so where it runs beside the scan before.) V may in any case.
    const bool early = warp < M::WARPS ? a.waits != WAITS_NOT : warp == M::WARPS + 1;
    if (!early) wait_for_previous();
    launch_next();
    if (!there || !walk.begins && p.cu_seqlens && count == 0) return;

    if (warp >= M::WARPS) {
        const ClusterHelp<S, PARTS, IO> help{smem_raw, smem, count};
        const int64_t th_step = (int64_t)p.Hv * L::TH;
        if (warp == M::WARPS) {
            if (lane == 0) help.tiles(kq, th, (int64_t)p.Hk * L::KQ, th_step);
        } else if (warp == M::WARPS + 1) {
            help.values(p, v, left, th + 2 * L::T, th_step);
        } else {
            help.outputs(p, out, left, warp - M::WARPS - 2);
        }
        __syncwarp();
        cluster_sync();
        return;
    }

    float s[S / 8][2];
    load_fragments<true>(s, begin, column);
    if (early) wait_for_previous();
    uint32_t state[S / 16][4];
#pragma unroll
    for (int n = 0; n < S / 8; n++) cluster_operand(state[n / 2], n, s[n][0], s[n][1]);

    // This warp has read a tile.
    const auto release = [&](int place) {
        __syncwarp();
        if (lane < M::BLOCKS) remote_arrive(full(place) + M::EMPTY, lane);
    };
    // Half of Q S runs beside each of R and U; for 64 channels all of it beside R.
    constexpr int FIRST = 4;
    // This thread's part of V and O: tokens 8 n + 2 t + j are n * 8 * ROW + j * ROW bytes on.
    unsigned char *const own = smem_raw + M::row_offset(2 * t, (warp * 8 + g) * 4);
#pragma unroll 1
    for (int c = 0; c < count; c++) {
        const int stage = c & 1, phase = (c >> 1) & 1;
        const uint32_t k = smem + stage * M::STAGE, q = k + PARTS * L::KQ_PART;
        const auto decays = [&](float2 (&x)[8], int which) {
#pragma unroll
            for (int n = 0; n < 8; n++)
                x[n] = *(const float2 *)(smem_raw + stage * M::STAGE + M::VEC + which * C * 4 + (n * 8 + 2 * t) * 4);
        };
        float acc[8][4], o[8][4];
        mbarrier_wait(full(c > 0 ? PLACE_KQ + stage : PLACE_FIRST_K), phase);
        wgmma_fence();
        cluster_rows<S, PARTS, 0, S / 16>(acc, state, k);
        wgmma_commit();
        if (c == 0) mbarrier_wait(full(PLACE_KQ), 0);
        cluster_rows<S, PARTS, 0, FIRST>(o, state, q);
        wgmma_commit();
        float2 gamma[8];
        float v[8][2];
        mbarrier_wait(full(PLACE_V + stage), phase);
        decays(gamma, 0);
        const float decay = __shfl_sync(~0u, gamma[7].y, 3); // of the whole chunk
#pragma unroll
        for (int n = 0; n < 8; n++)
#pragma unroll
            for (int j = 0; j < 2; j++) v[n][j] = *(const float *)(own + M::V + (stage * C + n * 8 + j) * M::ROW);
        wgmma_wait<1>();
        wgmma_touch(acc);

        uint32_t r[4][4];
#pragma unroll
        for (int n = 0; n < 8; n++)
            cluster_operand(r[n / 2], n, fmaf(-gamma[n].x, acc[n][0] + acc[n][2], v[n][0]),
                            fmaf(-gamma[n].y, acc[n][1] + acc[n][3], v[n][1]));
        float u[8][4];
        mbarrier_wait(full(PLACE_TH + stage), phase);
        wgmma_fence();
        cluster_triangle<S, PARTS, true>(u, r, k + M::T);
        wgmma_commit();
        if constexpr (FIRST < S / 16) cluster_rows<S, PARTS, FIRST, S / 16>(o, state, q);
        wgmma_commit();
        float2 later[8]; // gamma of the chunk over that of a token
        decays(later, 1);
        mbarrier_arrive(full(PLACE_V + stage) + M::EMPTY);
        wgmma_wait<1>();
        wgmma_touch(u);

        uint32_t w[4][4];
#pragma unroll
        for (int n = 0; n < 8; n++) {
            u[n][0] += u[n][2];
            u[n][1] += u[n][3];
            cluster_operand(w[n / 2], n, u[n][0] * later[n].x, u[n][1] * later[n].y);
        }
        // The state in halves of 64 keys: one is added up and split while the next one's product runs.
        float ds[S / 64][8][4];
        wgmma_fence();
#pragma unroll
        for (int half = 0; half < S / 64; half++) {
            cluster_columns<S, PARTS>(ds[half], w, k, half);
            wgmma_commit();
        }
        uint32_t x[4][4];
#pragma unroll
        for (int n = 0; n < 8; n++) cluster_operand(x[n / 2], n, u[n][0], u[n][1]);
        wgmma_wait<S / 64>(); // all of Q S
        wgmma_touch(o);
#pragma unroll
        for (int n = 0; n < 8; n++) {
            o[n][0] *= gamma[n].x;
            o[n][1] *= gamma[n].y;
            o[n][2] *= gamma[n].x;
            o[n][3] *= gamma[n].y;
        }
        wgmma_fence();
        cluster_triangle<S, PARTS, false>(o, x, k + M::P);
        wgmma_commit();
        const auto add = [&](int half) {
#pragma unroll
            for (int n = 0; n < 8; n++) {
                float(&to)[2] = s[half * 8 + n];
#pragma unroll
                for (int j = 0; j < 2; j++) to[j] = fmaf(decay, to[j], ds[half][n][j] + ds[half][n][j + 2]);
                cluster_operand(state[half * 4 + n / 2], n, to[0], to[1]);
            }
        };
        if constexpr (S == 128) {
            wgmma_wait<2>();
            wgmma_touch(ds[0]);
            add(0);
        }
        wgmma_wait<1>();
        wgmma_touch(ds[S / 64 - 1]);
        release(PLACE_KQ + stage);
        add(S / 64 - 1);
        finish_here<1, S / 16>(state, state, smem + M::SCRATCH);
        wgmma_wait<0>();
        wgmma_touch(o);
        release(PLACE_TH + stage);
        if (c > 0) mbarrier_wait(full(PLACE_O) + M::EMPTY, (c - 1) & 1);
#pragma unroll
        for (int n = 0; n < 8; n++)
#pragma unroll
            for (int j = 0; j < 2; j++) *(float *)(own + M::O + (n * 8 + j) * M::ROW) = o[n][j] + o[n][j + 2];
        mbarrier_arrive(full(PLACE_O));
    }
    scan_end<S, C, M::COLS, false>(a, false, [&](const StateAt &at, int first) {
        store_fragments(s, at, first + warp * 8 + g);
    });
    cluster_sync(); // a block's memory lives as long as another one writes to it
}
#endif
