// Sequences of one chunk on Hopper: both stages in one launch. A block has 32 value columns of one head, as in
// chunk_cluster.cuh, and makes what stage 1 makes of the chunk for itself: four blocks of a head do the same work, on
// multiprocessors that would have nothing else to do. Nothing goes through memory between the stages then, and while two
// warpgroups solve, a third one multiplies the state by K and Q.
#pragma once
#include "chunk_cluster.cuh"
#include "chunk_prepare.cuh"

template <int S, int PARTS>
struct SingleSmem {
    static constexpr int C = 64, COLS = 32, WORKERS = 4 * C, THREADS = WORKERS + 128;
    KeyImages<S, C, PARTS> image; // first the rows of K and Q, which may be larger and reach into what comes next
    SolveSmem<S, C, PARTS, 1> solve;
    LogDecay g[1][C];
    float beta[1][C];
    float vec[1][2 * C];
    uint64_t arrived[2];
    static_assert(sizeof(image) + sizeof(solve) >= 2 * C * S * 4, "room for rows");
};

#if DN_WGMMA
template <int S, int PARTS>
__device__ inline void chunk_single(const dn_chunk_args &a) {
    using L = Tiles<S, 64, PARTS>;
    using Smem = SingleSmem<S, PARTS>;
    using X = Prepare<S, 64, PARTS, Smem>;
    constexpr int HALVES = S / 64;
    DN_SHARED(__align__(1024) unsigned char, smem_raw);
    Smem &sm = *reinterpret_cast<Smem *>(smem_raw);
    const dn_problem &p = a.p;
    const int warp = __shfl_sync(~0u, threadIdx.x >> 5, 0); // the compiler sees that a warp's threads agree
    // Warps of the first two warpgroups make T and P; those of the third one have the state, eight columns each.
    const bool works = warp < Smem::WORKERS / 32;
    const ScanPlace place = scan_place<S, Smem::COLS, false>(a);
    const int h = place.head, kh = dn_key_head(h, p.Hk, p.Hv, p.head_map);
    const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
    const int column = place.column_block * Smem::COLS + (warp - Smem::WORKERS / 32) * 8 + g;
    X::Copies::begin(sm.arrived);
    // Where everything is, before the wait: the arguments lie in memory that is slow the first time.
    if (p.rows_in || p.rows_out) wait_for_previous(); // what says where states are
    dn_sequence seq = {};
    const bool there = dn_sequence_of(p, a.seq0 + place.sequence, seq);
    const int tokens = seq.len - a.tail;
    typename X::Rows rows(p, seq, seq.start, kh, tokens);
    const auto row_of = [&](const dn_view &x) { // of this thread's tokens 8 n + 2 t + j the first
        return (char *)x.data + h * x.nb[1] + (seq.start + 2 * t) * x.nb[2] + seq.b * x.nb[3] + column * x.nb[0];
    };
    const char *value = row_of(p.v);
    char *out = row_of(p.out);
    StateAt begin = state_at(p, p.state_in, h, seq.row_in);
    DN_HIDE_5(rows.k, rows.q, value, out, begin.base); // not later
    wait_for_previous();
    launch_next();
    if (!there) return;

    // Barriers of the one side are those of the other.
    if (works) {
        rows.fetch(sm, smem_raw, false);
        typename X::Gates gates;
        const bool has_gates = warp == 1; // which has the least to multiply
        if (has_gates) gates.load(p, seq, seq.start, h, tokens);
        rows.stage(sm, smem_raw, true);
        async_proxy_fence();
        __syncthreads(); // images of K and Q are there
        if (has_gates) X::gates(p, sm, 0, gates, tokens);
        typename X::Share share(warp);
        share.multiply(sm);
        __syncthreads(); // and gates
        X::decays(sm, 0, share, sm.solve.images[0] + L::T);
        __syncthreads(); // A and P
        if (warp < X::BLOCKS) X::invert_diagonal(sm, 0, warp);
        __syncthreads();
        if (warp < X::BLOCKS) X::block_column(sm, 0, warp, sm.solve.images[0]);
        async_proxy_fence();
        __syncthreads(); // and T
        return;
    }

    float s[S / 8][2], v[8][2];
    load_fragments<false>(s, begin, column);
#pragma unroll
    for (int n = 0; n < 8; n++, value += 8 * p.v.nb[2])
#pragma unroll
        for (int j = 0; j < 2; j++)
            v[n][j] = n * 8 + 2 * t + j < tokens ? dn_load(value + j * p.v.nb[2], p.dtype_v) : 0;
    uint32_t state[S / 16][4];
#pragma unroll
    for (int n = 0; n < S / 8; n++) cluster_operand(state[n / 2], n, s[n][0], s[n][1]);
    rows.stage(sm, smem_raw, false);
    __syncthreads(); // images of K and Q are there
    __syncthreads(); // and gates; nobody else multiplies now
    float ks[8][2], o[8][4];
    const auto by_state = [&](float(&to)[8][4], const unsigned char *tile) {
        wgmma_fence();
        cluster_rows<S, PARTS, 0, S / 16>(to, state, smem_address(tile));
        wgmma_commit();
        wgmma_wait<0>();
        wgmma_touch(to);
    };
    by_state(o, sm.image.k[0]);
#pragma unroll
    for (int n = 0; n < 8; n++) ks[n][0] = o[n][0] + o[n][2], ks[n][1] = o[n][1] + o[n][3];
    by_state(o, sm.image.q[0]);
    uint32_t r[4][4];
#pragma unroll
    for (int n = 0; n < 8; n++) {
        const float2 gamma = *(const float2 *)&sm.vec[0][n * 8 + 2 * t];
        cluster_operand(r[n / 2], n, fmaf(-gamma.x, ks[n][0], v[n][0]), fmaf(-gamma.y, ks[n][1], v[n][1]));
        o[n][0] *= gamma.x;
        o[n][1] *= gamma.y;
        o[n][2] *= gamma.x;
        o[n][3] *= gamma.y;
    }
    __syncthreads(); // A and P
    __syncthreads();
    __syncthreads(); // and T

    const uint32_t triangles = smem_address(sm.solve.images[0]), keys = smem_address(sm.image.k);
    float u[8][4];
    wgmma_fence();
    cluster_triangle<S, PARTS, true>(u, r, triangles);
    wgmma_commit();
    wgmma_wait<0>();
    wgmma_touch(u);
    uint32_t x[4][4], w[4][4];
#pragma unroll
    for (int n = 0; n < 8; n++) {
        u[n][0] += u[n][2];
        u[n][1] += u[n][3];
        cluster_operand(x[n / 2], n, u[n][0], u[n][1]);
    }
    wgmma_fence();
    cluster_triangle<S, PARTS, false>(o, x, triangles + L::T);
    wgmma_commit();
#pragma unroll
    for (int n = 0; n < 8; n++) {
        const float2 later = *(const float2 *)&sm.vec[0][64 + n * 8 + 2 * t]; // gamma of the chunk over that of a token
        cluster_operand(w[n / 2], n, u[n][0] * later.x, u[n][1] * later.y);
    }
    float ds[HALVES][8][4]; // the state in halves of 64 keys
    wgmma_fence();
    cluster_columns<S, PARTS>(ds[0], w, keys, 0);
    wgmma_commit();
    const float decay = sm.vec[0][63];
    wgmma_wait<1>();
    wgmma_touch(o);
    const auto each_output = [&](auto store) {
#pragma unroll
        for (int n = 0; n < 8; n++, out += 8 * p.out.nb[2])
#pragma unroll
            for (int j = 0; j < 2; j++)
                if (n * 8 + 2 * t + j < tokens) store(out + j * p.out.nb[2], (o[n][j] + o[n][j + 2]) * p.scale);
    };
    // The usual ones without a branch for each.
    if (p.dtype_out == DN_F32) each_output([](char *at, float x) { *(float *)at = x; });
    else each_output([&](char *at, float x) { dn_store(at, p.dtype_out, x); });
    if constexpr (HALVES == 2) { // in the registers of the outputs
        wgmma_fence();
        cluster_columns<S, PARTS>(ds[HALVES - 1], w, keys, HALVES - 1);
        wgmma_commit();
    }
    wgmma_wait<0>();
#pragma unroll
    for (int half = 0; half < HALVES; half++) {
        wgmma_touch(ds[half]);
#pragma unroll
        for (int n = 0; n < 8; n++)
#pragma unroll
            for (int j = 0; j < 2; j++) {
                float &to = s[half * 8 + n][j];
                to = fmaf(decay, to, ds[half][n][j] + ds[half][n][j + 2]);
            }
    }
    scan_end<S, 64, Smem::COLS, false>(a, false, [&](const StateAt &at, int) { store_fragments(s, at, column); });
}
#endif
