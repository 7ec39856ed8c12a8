// The token-serial kernel in windows of four tokens: for runs of f32 tokens that want no state in between.
//
// With S the state before a window, A_i the decay from there to token i and D_ij from token j to token i, everything that
// a window needs of S are its products with four k and four q, formed at once and reduced together:
//     d_i = beta_i (v_i - A_i S^T k_i - sum_{j<i} D_ij (k_i.k_j) d_j)
//     o_i = scale (A_i S^T q_i + sum_{j<=i} D_ij (q_i.k_j) d_j),   S <- A_3 S + sum_j D_3j k_j d_j^T
// so that the reduction's latency is paid once for four tokens. What does not depend on S, the dot products among k and
// q above all, is done by one warp per window for the whole block, and goes through shared memory.
#pragma once

namespace {

template <class X>
struct WindowShape {
    static constexpr int M = 4;                   // tokens of a window
    static constexpr int N = 2 * M * X::C;        // sums of a lane
    static constexpr int R = N > X::L ? N / X::L : 1;    // sums that are left to a lane by halving
    static constexpr int SPAN = X::L > N ? X::L / N : 1; // lanes that hold the same sum
    static constexpr int QUADS = X::QUADS;
    static_assert(R % X::C == 0 || 2 * R == X::C, "a lane has the outputs of all its columns, or of half of them");
    static_assert(X::COLS <= 32, "a lane stages one value at most");

    // Scalars of a window by place; P has four a row, zero above the diagonal.
    static constexpr int KEY = 0, QUERY = 4, WRITE = 8, DECAY = 12, MIX = 16, P = 24, SCALARS = 40;

    struct Slot {
        float k[M][X::S], q[M][X::S];                    // channel gate: times A_i
        float end[X::CHANNEL_GATE ? M : 1][X::CHANNEL_GATE ? X::S : 4]; // channel gate: k times D_3j
        float decay[X::CHANNEL_GATE ? X::S : 4];         // channel gate: A_3
        float v[M][32];                                  // times beta
        float scalars[SCALARS];
    };
    // Windows in shared memory at a time, a warp for each: as many as 48 KiB hold.
    static constexpr int FIT = 49152 / (int)sizeof(Slot);
    static constexpr int WINDOWS = X::W < FIT ? X::W : FIT;
    static_assert(FIT > 0, "a window fits");
};

// Sums of x over the lanes whose numbers differ in MASK and the bits below. Each exchange halves the sums that a lane still
// carries, from HALF on; with one left, it is added up. l is the lane's number, STEP the distance between numbers.
template <int HALF, int MASK, int STEP, int COUNT>
__device__ inline void sum_by_halves(float (&x)[COUNT], int l) {
    if constexpr (MASK > 0) {
        if constexpr (HALF > 0) {
            const bool high = l & MASK;
#pragma unroll
            for (int i = 0; i < HALF; i++) {
                const float a = x[i], b = x[i + HALF]; // by value: a choice between places would put them in memory
                x[i] = (high ? b : a) + __shfl_xor_sync(~0u, high ? a : b, MASK * STEP);
            }
        } else {
            x[0] += __shfl_xor_sync(~0u, x[0], MASK * STEP);
        }
        sum_by_halves<HALF / 2, MASK / 2, STEP>(x, l);
    }
}

// One window's tensors on their way to shared memory, four channels and one value column a lane.
template <class X>
struct PendingWindow {
    using Y = WindowShape<X>;
    float4 k[Y::M][Y::QUADS], q[Y::M][Y::QUADS], g[X::CHANNEL_GATE ? Y::M : 1][Y::QUADS];
    float v[Y::M], gate, beta; // of token `lane`, below M

    // n: tokens that are there, which may be none or more than a window has.
    __device__ void load(const dn_hot &p, const Rows &rows, int t, int n, int column0, int lane) {
        const auto row = [&](const char *base, const dn_steps &nb, int i) { return base + dn_offset(t + i, nb.token); };
#pragma unroll
        for (int i = 0; i < Y::M; i++) {
#pragma unroll
            for (int u = 0; u < Y::QUADS; u++) {
                const int channel = lane * 4 + u * 128;
                k[i][u] = q[i][u] = make_float4(0, 0, 0, 0);
                if constexpr (X::CHANNEL_GATE) g[i][u] = make_float4(0, 0, 0, 0);
                if (i < n && channel < X::S) {
                    k[i][u] = *(const float4 *)(row(rows.k, p.k_nb, i) + channel * 4);
                    q[i][u] = *(const float4 *)(row(rows.q, p.q_nb, i) + channel * 4);
                    if constexpr (X::CHANNEL_GATE) g[i][u] = *(const float4 *)(row(rows.g, p.g_nb, i) + channel * 4);
                }
            }
            v[i] = 0;
            if (i < n && lane < X::COLS && column0 + lane < X::S)
                v[i] = *(const float *)(row(rows.v, p.v_nb, i) + (column0 + lane) * 4);
        }
        gate = beta = 0;
        if (lane < Y::M && lane < n) {
            if constexpr (!X::CHANNEL_GATE) gate = *(const float *)row(rows.g, p.g_nb, lane);
            beta = *(const float *)row(rows.beta, p.beta_nb, lane);
        }
    }

    __device__ void finish(typename Y::Slot &slot, const dn_fast &f, int n, int lane) {
        constexpr int M = Y::M;
        const dn_hot &p = f.hot;
        // A token that is not there decays nothing and writes nothing.
        const bool there = lane < M && lane < n;
        const float own_beta = there ? dn_beta(beta, p.flags & DN_LOGIT) : 0;
        const float own_decay = there && !X::CHANNEL_GATE ? dn_decay(gate, p.gate_max) : 1;
        float a[M], b[M];
#pragma unroll
        for (int i = 0; i < M; i++) a[i] = __shfl_sync(~0u, own_decay, i), b[i] = __shfl_sync(~0u, own_beta, i);
        float rk[M], rq[M];
#pragma unroll
        for (int i = 0; i < M; i++) rk[i] = rq[i] = 1;
        if (p.flags & DN_NORM) {
            float squares[2 * M];
#pragma unroll
            for (int i = 0; i < M; i++) {
                squares[i] = squares[M + i] = 0;
#pragma unroll
                for (int u = 0; u < Y::QUADS; u++)
                    squares[i] += sum4(k[i][u], k[i][u]), squares[M + i] += sum4(q[i][u], q[i][u]);
            }
            sum_by_halves<M, 16, 1>(squares, lane); // lane 4 e has sum e
            const float r = inverse_norm(squares[0], f.p.qk_norm_eps);
#pragma unroll
            for (int i = 0; i < M; i++) rk[i] = __shfl_sync(~0u, r, 4 * i), rq[i] = __shfl_sync(~0u, r, 4 * (M + i));
        }

        // k_i.k_j below the diagonal, then q_i.k_j with it; with a channel gate, k_j decayed to token i.
        float dots[16];
#pragma unroll
        for (int i = 0; i < 16; i++) dots[i] = 0;
#pragma unroll
        for (int u = 0; u < Y::QUADS; u++) {
            const int channel = lane * 4 + u * 128;
            const bool own = channel < X::S;
            float4 decay[M];
            if constexpr (X::CHANNEL_GATE) {
#pragma unroll
                for (int i = 0; i < M; i++) decay[i] = i < n ? decay4(g[i][u], p.gate_max) : make_float4(1, 1, 1, 1);
            }
#pragma unroll
            for (int j = 0; j < M; j++) {
                float4 x = k[j][u];
#pragma unroll
                for (int i = j; i < M; i++) {
                    if constexpr (X::CHANNEL_GATE) {
                        if (i > j) x = mul4(x, decay[i]);
                    }
                    if (i > j) dots[i * (i - 1) / 2 + j] += sum4(k[i][u], x);
                    dots[6 + i * (i + 1) / 2 + j] += sum4(q[i][u], x);
                }
                if constexpr (X::CHANNEL_GATE) {
                    if (own) *(float4 *)&slot.end[j][channel] = x;
                }
            }
            if constexpr (X::CHANNEL_GATE) {
                float4 x = decay[0];
#pragma unroll
                for (int i = 0; i < M; i++) {
                    if (i > 0) x = mul4(x, decay[i]);
                    k[i][u] = mul4(k[i][u], x), q[i][u] = mul4(q[i][u], x);
                }
                if (own) *(float4 *)&slot.decay[channel] = x;
            }
            if (own) {
#pragma unroll
                for (int i = 0; i < M; i++) *(float4 *)&slot.k[i][channel] = k[i][u], *(float4 *)&slot.q[i][channel] = q[i][u];
            }
        }
#pragma unroll
        for (int i = 0; i < M; i++) slot.v[i][lane] = b[i] * v[i];
        sum_by_halves<8, 16, 1>(dots, lane); // lane 2 e has sum e

        // Where a lane's dot product goes, and what multiplies it.
        float factor = 0, to_row = 0, to_end = 0; // the last two: A_i and D_3i of row i = lane, below M
        int place = 0;
#pragma unroll
        for (int i = 0; i < M; i++) {
            float d = 1;
#pragma unroll
            for (int j = i; j >= 0; j--) {
                if (lane / 2 == 6 + i * (i + 1) / 2 + j) factor = p.scale * rq[i] * rk[j] * d, place = Y::P + 4 * i + j;
                if (i > j && lane / 2 == i * (i - 1) / 2 + j)
                    factor = b[i] * rk[i] * rk[j] * d, place = Y::MIX + i * (i - 1) / 2 + j;
                d *= a[j];
            }
            if (lane == i) to_row = d;
            float e = 1;
#pragma unroll
            for (int j = i + 1; j < M; j++) e *= a[j];
            if (lane == i) to_end = e;
            if (i > 0 && lane < i) slot.scalars[Y::P + 4 * lane + i] = 0; // above the diagonal
            if (lane == i) {
                slot.scalars[Y::KEY + i] = b[i] * to_row * rk[i];
                slot.scalars[Y::QUERY + i] = p.scale * to_row * rq[i];
                slot.scalars[Y::WRITE + i] = to_end * rk[i];
            }
        }
        if (lane == M - 1) slot.scalars[Y::DECAY] = to_row;
        if (lane % 2 == 0) slot.scalars[place] = factor * dots[0];
    }
};

// Four tokens. `out` is the first of them, of which n are there; the lane's first column.
template <class X>
__device__ void window_step(State<X> &s, const typename WindowShape<X>::Slot &slot, const Lane<X> &at, char *out,
                            uint32_t out_token, int n) {
    using Y = WindowShape<X>;
    constexpr int M = Y::M, C = X::C, STEP = LANE_STEP<X>;
    float x[Y::N]; // [k, q][token][column]
#pragma unroll
    for (int i = 0; i < Y::N; i++) x[i] = 0;
    float4 kept[X::CHANNEL_GATE ? 1 : M][X::K / 4];
#pragma unroll
    for (int j = 0; j < X::K / 4; j++) {
#pragma unroll
        for (int i = 0; i < M; i++) {
            const float4 k = *(const float4 *)&slot.k[i][at.key(4 * j)], q = *(const float4 *)&slot.q[i][at.key(4 * j)];
            if constexpr (!X::CHANNEL_GATE) kept[i][j] = k;
#pragma unroll
            for (int c = 0; c < C; c++) {
                float &xk = x[i * C + c], &xq = x[(M + i) * C + c];
                xk = fmaf(s[c][4 * j], k.x, xk), xq = fmaf(s[c][4 * j], q.x, xq);
                xk = fmaf(s[c][4 * j + 1], k.y, xk), xq = fmaf(s[c][4 * j + 1], q.y, xq);
                xk = fmaf(s[c][4 * j + 2], k.z, xk), xq = fmaf(s[c][4 * j + 2], q.z, xq);
                xk = fmaf(s[c][4 * j + 3], k.w, xk), xq = fmaf(s[c][4 * j + 3], q.w, xq);
            }
        }
    }

    sum_by_halves<Y::N / 2, X::L / 2, STEP>(x, at.l); // lane l has sums l R and on, or sum l / SPAN

#pragma unroll
    for (int j = 0; j < X::K / 4; j++) { // in the time of the shuffles
        float4 a;
        if constexpr (X::CHANNEL_GATE) a = *(const float4 *)&slot.decay[at.key(4 * j)];
        else a.x = a.y = a.z = a.w = slot.scalars[Y::DECAY];
#pragma unroll
        for (int c = 0; c < C; c++)
            s[c][4 * j] *= a.x, s[c][4 * j + 1] *= a.y, s[c][4 * j + 2] *= a.z, s[c][4 * j + 3] *= a.w;
    }

    const auto scalars4 = [&](int place) { return *(const float4 *)&slot.scalars[place]; };
    const float4 key = scalars4(Y::KEY), write = scalars4(Y::WRITE), mix = scalars4(Y::MIX);
    const float2 mix2 = *(const float2 *)&slot.scalars[Y::MIX + 4];
    const int first = at.lane - at.l * STEP;
    float d[M][C];
#pragma unroll
    for (int c = 0; c < C; c++) {
        float sk[M];
#pragma unroll
        for (int i = 0; i < M; i++) {
            const int e = i * C + c;
            sk[i] = __shfl_sync(~0u, x[e % Y::R], first + e / Y::R * Y::SPAN * STEP);
        }
        const int column = at.group * C + c;
        d[0][c] = slot.v[0][column] - key.x * sk[0];
        d[1][c] = slot.v[1][column] - key.y * sk[1] - mix.x * d[0][c];
        d[2][c] = (slot.v[2][column] - key.z * sk[2] - mix.y * d[0][c]) - mix.z * d[1][c];
        d[3][c] = (slot.v[3][column] - key.w * sk[3] - mix.w * d[0][c] - mix2.x * d[1][c]) - mix2.y * d[2][c];
    }

    // The outputs whose sums this lane holds.
    if (at.l >= X::L / 2 && at.l % Y::SPAN == 0) {
#pragma unroll
        for (int r = 0; r < Y::R; r++) {
            const int e = at.l / Y::SPAN * Y::R + r - M * C, i = e / C;
            // A lane has all columns of a token, or half of them.
            const bool upper = Y::R < C && e % C >= C / 2;
            const int c = r % C + (upper ? C / 2 : 0);
            float own[M];
#pragma unroll
            for (int j = 0; j < M; j++) {
                const float below = d[j][r % C], above = d[j][(r + C / 2) % C];
                own[j] = upper ? above : below;
            }
            const float4 mixed = scalars4(Y::P + 4 * i);
            const float o = slot.scalars[Y::QUERY + i] * x[r] + mixed.x * own[0] + mixed.y * own[1] + mixed.z * own[2] +
                            mixed.w * own[3];
            if (i < n && (X::S % X::COLS == 0 || at.column + c < X::S))
                *(float *)(out + dn_offset(i, out_token) + c * 4) = o;
        }
    }

#pragma unroll
    for (int c = 0; c < C; c++) d[0][c] *= write.x, d[1][c] *= write.y, d[2][c] *= write.z, d[3][c] *= write.w;
#pragma unroll
    for (int j = 0; j < X::K / 4; j++) {
#pragma unroll
        for (int i = 0; i < M; i++) {
            float4 k;
            if constexpr (X::CHANNEL_GATE) k = *(const float4 *)&slot.end[i][at.key(4 * j)];
            else k = kept[i][j];
#pragma unroll
            for (int c = 0; c < C; c++) {
                s[c][4 * j] = fmaf(k.x, d[i][c], s[c][4 * j]);
                s[c][4 * j + 1] = fmaf(k.y, d[i][c], s[c][4 * j + 1]);
                s[c][4 * j + 2] = fmaf(k.z, d[i][c], s[c][4 * j + 2]);
                s[c][4 * j + 3] = fmaf(k.w, d[i][c], s[c][4 * j + 3]);
            }
        }
    }
}

template <class X>
__device__ void recurrent_windows(const dn_fast &f) {
    using Y = WindowShape<X>;
    __shared__ __align__(16) typename Y::Slot slots[Y::WINDOWS];
    const int h = blockIdx.y, column0 = blockIdx.x * X::COLS;
    const Lane<X> at(blockIdx.x);
    const dn_hot &p = f.hot;
    const int kh = dn_key_head(h, p.Hk, p.Hv, p.flags & DN_GROUPED);
    wait_for_previous();
    launch_next();

    for (int b = blockIdx.z; b < p.B; b += gridDim.z) {
        dn_sequence seq = dn_plain_sequence(b, p.T);
        if (!(p.flags & DN_PLAIN)) {
            if (!dn_sequence_of(f.p, b, seq)) continue; // the same for the whole block
        }
        State<X> s;
        zero_state<X>(s);
        load_vectors<X>(s, row_at(p.state_in, p.state_in_nb, 0, h, seq.row_in), p.state_in_nb.token, at);
        const Rows rows = rows_of(p, seq, kh, h);
        char *out = rows.out + at.column * 4;

        PendingWindow<X> pending;
        constexpr int TILE = Y::WINDOWS * Y::M;
        const bool stages = at.warp < Y::WINDOWS;
        const int own = at.warp * Y::M; // of a tile's tokens
        if (stages) pending.load(p, rows, own, seq.len - own, column0, at.lane);
#pragma unroll 1
        for (int t0 = 0; t0 < seq.len; t0 += TILE) {
            if (stages) {
                if (t0 + own < seq.len) pending.finish(slots[at.warp], f, seq.len - t0 - own, at.lane);
                const int t = t0 + TILE + own;
                pending.load(p, rows, t, seq.len - t, column0, at.lane);
            }
            __syncthreads();
            const int windows = min(Y::WINDOWS, (seq.len - t0 + Y::M - 1) / Y::M);
#pragma unroll 1
            for (int w = 0; w < windows; w++) {
                window_step<X>(s, slots[w], at, out, p.out_nb.token, seq.len - t0 - w * Y::M);
                out += dn_offset(Y::M, p.out_nb.token);
            }
            __syncthreads(); // the slots are read
        }
        if (p.state_out)
            store_vectors<X>(s, row_at(p.state_out, p.state_out_nb, 0, h, seq.row_out), p.state_out_nb.token, at);
    }
}

} // namespace
