// The token-serial kernel: decode and short runs.
//
// A block owns COLS value columns of one head of one sequence, so 32 heads of 128 columns fill 128 multiprocessors. A
// column belongs to L lanes of one warp, which hold it in registers from the first token to the last; a lane holds C
// columns at S / L keys.
//
// With S the old state and a the decay, the new output is
//     scale * S_new^T q = scale * (a S^T q + d (k.q)),   d = beta (v - a S^T k)
// so both products of the state are reduced together, once per token.
//
// Two kernels share this arithmetic and differ in how they read and write; recurrent_window.cuh has a third, for more
// tokens at a time.
// The fast one takes f32 tensors that can be read 16 bytes at a time and listed head sizes. Each lane reads its share of
// the next tokens straight into registers while it works on this one: no barrier, no shared memory.
// For a single token there is a form of it without anything that only loops, snapshots or state rows need: the first load
// leaves sooner.
// The other takes everything: any dtype, any stride, any head size up to its own. The block stages a tile of tokens in
// shared memory as f32, and dtypes, strides and norms are dealt with there.
#include "common.cuh"

namespace {

template <int S_, int L_, int C_, int W_, bool VALUE_MAJOR_, bool CHANNEL_GATE_, bool FAST_, bool ONE_ = false>
struct Shape {
    static constexpr int S = S_; // head size, or the most that a general kernel takes
    static constexpr int L = L_; // lanes of a column
    static constexpr int C = C_; // columns of a lane
    static constexpr int W = W_; // warps
    static constexpr bool VALUE_MAJOR = VALUE_MAJOR_;
    static constexpr bool CHANNEL_GATE = CHANNEL_GATE_;
    static constexpr bool FAST = FAST_;
    static constexpr bool ONE = ONE_; // a single token of a plain sequence, no snapshots, no clamp
    static constexpr int K = S / L;             // keys of a lane
    static constexpr int GROUPS = 32 / L;       // column groups of a warp
    static constexpr int WARP_COLS = GROUPS * C;
    static constexpr int COLS = W * WARP_COLS;  // columns of a block
    static constexpr int BLOCKS = (S + COLS - 1) / COLS;
    static constexpr int TILE = FAST ? 0 : 8;     // tokens staged at a time
    static constexpr int QUADS = (S + 127) / 128; // four-channel pieces that a lane stages per row
    static_assert(K % 4 == 0 && S % L == 0, "a lane's keys come in fours");
    static_assert(!VALUE_MAJOR || C == 4, "16-byte accesses along the value axis");
    static_assert(FAST || COLS <= 32, "a lane stages one value at most");

    // One staged token. v gives way to the output, column by column.
    struct Row {
        float k[S], q[S];
        float decay[CHANNEL_GATE ? S : 4]; // scalar gate: unused
        float v[32];
        float4 scalars; // decay (1 with a channel gate), beta, k.q, -
    };
};

// Warp number in a register that the compiler knows to be uniform: branches on it need no divergent form.
__device__ inline int warp_index() { return __shfl_sync(~0u, (int)threadIdx.x >> 5, 0); }

template <class X>
struct Lane {
    int lane, warp;
    int l, group, column; // lane of the column, column group in the block, first column of this lane in the head
    __device__ Lane(int column_block) {
        lane = threadIdx.x & 31, warp = warp_index();
        // Neighbouring lanes lie along the axis that is contiguous in memory.
        l = X::VALUE_MAJOR ? lane / X::GROUPS : lane % X::L;
        group = warp * X::GROUPS + (X::VALUE_MAJOR ? lane % X::GROUPS : lane / X::L);
        column = column_block * X::COLS + group * X::C;
    }
    // The j-th key that this lane holds: runs of four, so that a row is read 16 bytes at a time.
    __device__ int key(int j) const { return (j / 4) * (4 * X::L) + l * 4 + j % 4; }
};

template <class X>
using State = float[X::C][X::K];

// f(c, j, address of column c at key j) for every piece of the state that this lane accesses 16 bytes at a time; nb is
// the stride of the other axis.
template <class X, class Nb, class F>
__device__ void each_vector(char *base, Nb nb, const Lane<X> &at, F f) {
    constexpr int COLUMN_STEP = X::VALUE_MAJOR ? 4 : 1, KEY_STEP = X::VALUE_MAJOR ? 1 : 4;
#pragma unroll
    for (int c = 0; c < X::C; c += COLUMN_STEP) {
#pragma unroll
        for (int j = 0; j < X::K; j += KEY_STEP) {
            const int column = at.column + c, key = at.key(j);
            if (X::S % X::COLS != 0 && column >= X::S) continue; // the block is wider than the head
            f(c, j, base + (X::VALUE_MAJOR ? dn_offset(key, nb) + column * 4 : dn_offset(column, nb) + key * 4));
        }
    }
}

template <class X, class Nb>
__device__ void load_vectors(State<X> &s, const char *base, Nb nb, const Lane<X> &at) {
    each_vector<X>((char *)base, nb, at, [&](int c, int j, const char *p) {
        const float4 x = *(const float4 *)p;
        if constexpr (X::VALUE_MAJOR) {
            s[c][j] = x.x, s[c + 1][j] = x.y, s[c + 2][j] = x.z, s[c + 3][j] = x.w;
        } else {
            s[c][j] = x.x, s[c][j + 1] = x.y, s[c][j + 2] = x.z, s[c][j + 3] = x.w;
        }
    });
}

template <class X, class Nb>
__device__ void store_vectors(const State<X> &s, char *base, Nb nb, const Lane<X> &at) {
    each_vector<X>(base, nb, at, [&](int c, int j, char *p) {
        if constexpr (X::VALUE_MAJOR) {
            *(float4 *)p = make_float4(s[c][j], s[c + 1][j], s[c + 2][j], s[c + 3][j]);
        } else {
            *(float4 *)p = make_float4(s[c][j], s[c][j + 1], s[c][j + 2], s[c][j + 3]);
        }
    });
}

// The same, element by element, for any stride; keys and columns that pad the head up to X::S are left out.
template <class X, class F>
__device__ void each_element(const dn_state_view &v, char *base, const Lane<X> &at, int S, F f) {
    const int64_t column_nb = X::VALUE_MAJOR ? v.nb[0] : v.nb[1], key_nb = X::VALUE_MAJOR ? v.nb[1] : v.nb[0];
#pragma unroll
    for (int c = 0; c < X::C; c++) {
#pragma unroll
        for (int j = 0; j < X::K; j++) {
            if (at.column + c < S && at.key(j) < S)
                f(c, j, base + dn_offset(at.column + c, column_nb) + dn_offset(at.key(j), key_nb));
        }
    }
}

template <class X>
__device__ void zero_state(State<X> &s) {
#pragma unroll
    for (int c = 0; c < X::C; c++) {
#pragma unroll
        for (int j = 0; j < X::K; j++) s[c][j] = 0;
    }
}

template <class X>
__device__ void load_any(State<X> &s, const dn_state_view &v, char *base, const Lane<X> &at, int S, bool vec) {
    if (vec && S == X::S) {
        load_vectors<X>(s, base, v.nb[1], at);
    } else {
        each_element<X>(v, base, at, S, [&](int c, int j, const char *p) { s[c][j] = *(const float *)p; });
    }
}

template <class X>
__device__ void store_any(const State<X> &s, const dn_state_view &v, char *base, const Lane<X> &at, int S, bool vec) {
    if (vec && S == X::S) {
        store_vectors<X>(s, base, v.nb[1], at);
    } else {
        each_element<X>(v, base, at, S, [&](int c, int j, char *p) { *(float *)p = s[c][j]; });
    }
}

__device__ inline float sum4(float4 a, float4 b) { return a.x * b.x + a.y * b.y + a.z * b.z + a.w * b.w; }
__device__ inline float4 scale4(float4 a, float s) { return make_float4(a.x * s, a.y * s, a.z * s, a.w * s); }
__device__ inline float4 mul4(float4 a, float4 b) { return make_float4(a.x * b.x, a.y * b.y, a.z * b.z, a.w * b.w); }
__device__ inline float4 decay4(float4 g, float gate_max) {
    return make_float4(dn_decay(g.x, gate_max), dn_decay(g.y, gate_max), dn_decay(g.z, gate_max),
                       dn_decay(g.w, gate_max));
}
__device__ inline float inverse_norm(float sum, float eps) { return rsqrtf(sum + eps); }

// Sums of x over the lanes first + i * STEP, i < N.
template <int N, int STEP>
__device__ inline float sum_lanes(float x) {
#pragma unroll
    for (int m = N / 2; m; m /= 2) x += __shfl_xor_sync(~0u, x, m * STEP);
    return x;
}

template <class X>
constexpr int LANE_STEP = X::VALUE_MAJOR ? X::GROUPS : 1; // from a lane of a column to its next

// Where a head of a sequence begins, at its first token.
struct Rows {
    const char *q, *k, *v, *g, *beta;
    char *out;
};

// What one lane needs of a token.
template <class X>
struct Token {
    float4 k[X::K / 4], q[X::K / 4], a[X::CHANNEL_GATE ? X::K / 4 : 1];
    float v[X::C];
    float decay, beta, kq;

    __device__ void fetch(const typename X::Row &row, const Lane<X> &at) {
#pragma unroll
        for (int j = 0; j < X::K / 4; j++) {
            k[j] = *(const float4 *)&row.k[at.key(4 * j)];
            q[j] = *(const float4 *)&row.q[at.key(4 * j)];
            if constexpr (X::CHANNEL_GATE) a[j] = *(const float4 *)&row.decay[at.key(4 * j)];
        }
#pragma unroll
        for (int c = 0; c < X::C; c++) v[c] = row.v[at.group * X::C + c];
        decay = row.scalars.x, beta = row.scalars.y, kq = row.scalars.z;
    }

    // Every column group holds the whole of q and k and can sum k.q by itself.
    __device__ void sum_kq() {
        float x = 0;
#pragma unroll
        for (int j = 0; j < X::K / 4; j++) x += sum4(k[j], q[j]);
        kq = sum_lanes<X::L, LANE_STEP<X>>(x);
    }
};

// A token's tensors on their way to the registers of a column's lanes.
template <class X>
struct Incoming {
    float4 k[X::K / 4], q[X::K / 4], g[X::CHANNEL_GATE ? X::K / 4 : 1];
    float gate, beta, v[X::C];

    __device__ void load(const Rows &rows, const Lane<X> &at) {
#pragma unroll
        for (int j = 0; j < X::K / 4; j++) {
            k[j] = *(const float4 *)(rows.k + at.key(4 * j) * 4);
            q[j] = *(const float4 *)(rows.q + at.key(4 * j) * 4);
            if constexpr (X::CHANNEL_GATE) g[j] = *(const float4 *)(rows.g + at.key(4 * j) * 4);
        }
        if constexpr (!X::CHANNEL_GATE) gate = *(const float *)rows.g;
        beta = *(const float *)rows.beta;
        const char *column = rows.v + at.column * 4;
        if (X::S % X::COLS != 0 && at.column >= X::S) {
#pragma unroll
            for (int c = 0; c < X::C; c++) v[c] = 0;
        } else if constexpr (X::C == 4) {
            const float4 x = *(const float4 *)column;
            v[0] = x.x, v[1] = x.y, v[2] = x.z, v[3] = x.w;
        } else {
#pragma unroll
            for (int c = 0; c < X::C; c++) v[c] = *(const float *)(column + c * 4);
        }
    }

    __device__ void finish(Token<X> &token, const dn_fast &f) const {
#pragma unroll
        for (int j = 0; j < X::K / 4; j++) {
            token.k[j] = k[j], token.q[j] = q[j];
            if constexpr (X::CHANNEL_GATE) token.a[j] = decay4(g[j], f.hot.gate_max);
        }
#pragma unroll
        for (int c = 0; c < X::C; c++) token.v[c] = v[c];
        token.decay = X::CHANNEL_GATE ? 1 : dn_decay(gate, f.hot.gate_max);
        token.beta = dn_beta(beta, f.hot.flags & DN_LOGIT);
        if (f.hot.flags & DN_NORM) {
            float kk = 0, qq = 0;
#pragma unroll
            for (int j = 0; j < X::K / 4; j++) kk += sum4(k[j], k[j]), qq += sum4(q[j], q[j]);
            const float rk = inverse_norm(sum_lanes<X::L, LANE_STEP<X>>(kk), f.p.qk_norm_eps);
            const float rq = inverse_norm(sum_lanes<X::L, LANE_STEP<X>>(qq), f.p.qk_norm_eps);
#pragma unroll
            for (int j = 0; j < X::K / 4; j++) token.k[j] = scale4(k[j], rk), token.q[j] = scale4(q[j], rq);
        }
    }
};

// Token t into its row of the tile, by one warp.
template <class X>
__device__ void stage_row(typename X::Row &row, const dn_problem &p, const Rows &rows, int t, int column0, int lane) {
    const char *qr = rows.q + dn_offset(t, p.q.nb[2]), *kr = rows.k + dn_offset(t, p.k.nb[2]);
    const char *gr = rows.g + dn_offset(t, p.g.nb[2]), *vr = rows.v + dn_offset(t, p.v.nb[2]);
    float4 k[X::QUADS], q[X::QUADS];
    float kk = 0, qq = 0, kq = 0;
#pragma unroll
    for (int u = 0; u < X::QUADS; u++) {
        const int channel = lane * 4 + u * 128;
        k[u] = q[u] = make_float4(0, 0, 0, 0);
        if (channel < p.S) {
            k[u] = dn_load4(p.k, kr, channel, p.dtype_k, p.flags & DN_VEC_K);
            q[u] = dn_load4(p.q, qr, channel, p.dtype_q, p.flags & DN_VEC_Q);
        }
        kk += sum4(k[u], k[u]), qq += sum4(q[u], q[u]), kq += sum4(k[u], q[u]);
        if constexpr (X::CHANNEL_GATE) {
            float4 g = make_float4(0, 0, 0, 0);
            if (channel < p.S) g = dn_load4(p.g, gr, channel, DN_F32, p.flags & DN_VEC_G);
            if (channel < X::S)
                *(float4 *)&row.decay[channel] = decay4(g, p.gate_max);
        }
    }
    kq = sum_lanes<32, 1>(kq);
    float rk = 1, rq = 1;
    if (p.qk_norm) {
        rk = inverse_norm(sum_lanes<32, 1>(kk), p.qk_norm_eps);
        rq = inverse_norm(sum_lanes<32, 1>(qq), p.qk_norm_eps);
        kq *= rk * rq;
    }
#pragma unroll
    for (int u = 0; u < X::QUADS; u++) {
        const int channel = lane * 4 + u * 128;
        if (channel >= X::S) continue;
        *(float4 *)&row.k[channel] = scale4(k[u], rk);
        *(float4 *)&row.q[channel] = scale4(q[u], rq);
    }
    row.v[lane] = lane < X::COLS && column0 + lane < p.S
                      ? dn_load(vr + dn_offset(column0 + lane, p.v.nb[0]), p.dtype_v)
                      : 0;
    if (lane == 0) {
        const float decay = X::CHANNEL_GATE ? 1 : dn_decay(*(const float *)gr, p.gate_max);
        const float beta = *(const float *)(rows.beta + dn_offset(t, p.beta.nb[2]));
        row.scalars = make_float4(decay, dn_beta(beta, p.beta_kind), kq, 0);
    }
}

// Sums of ak and aq over the L lanes of a column group. Every lane gets all of ak; of aq it gets the column that it
// writes, own_column, where it is that column's writer.
template <class X>
__device__ void reduce(float (&ak)[X::C], float (&aq)[X::C], float &own_aq, int &own_column, bool &writer,
                       const Lane<X> &at) {
    constexpr int STEP = LANE_STEP<X>;
    constexpr int N = 2 * X::C;
    if constexpr (X::C == 1 || N > X::L) {
        own_column = at.l;
        writer = at.l < X::C;
        own_aq = 0;
#pragma unroll
        for (int c = 0; c < X::C; c++) {
#pragma unroll
            for (int m = X::L / 2; m; m /= 2) {
                ak[c] += __shfl_xor_sync(~0u, ak[c], m * STEP);
                aq[c] += __shfl_xor_sync(~0u, aq[c], m * STEP);
            }
            if (c == own_column) own_aq = aq[c];
        }
    } else {
        // Each exchange halves the sums that a lane still carries, so 2 C sums cost about 2 C shuffles, not 2 C log L.
        float x[N];
#pragma unroll
        for (int c = 0; c < X::C; c++) x[c] = ak[c], x[X::C + c] = aq[c];
        int m = X::L / 2;
#pragma unroll
        for (int n = N / 2; n; n /= 2, m /= 2) {
            bool high = at.l & m;
#pragma unroll
            for (int i = 0; i < n; i++) {
                float mine = high ? x[i + n] : x[i], other = high ? x[i] : x[i + n];
                x[i] = mine + __shfl_xor_sync(~0u, other, m * STEP);
            }
        }
#pragma unroll
        for (; m; m /= 2) x[0] += __shfl_xor_sync(~0u, x[0], m * STEP);
        constexpr int SPAN = X::L / N; // lanes that hold the same sum
        const int first = at.lane - at.l * STEP;
#pragma unroll
        for (int c = 0; c < X::C; c++) ak[c] = __shfl_sync(~0u, x[0], first + c * SPAN * STEP);
        own_aq = x[0];
        own_column = at.l / SPAN - X::C;
        writer = own_column >= 0 && at.l % SPAN == 0;
    }
}

// The output of the column that a lane writes, where writer.
struct Output {
    float value;
    int column; // of the lane's C
    bool writer;
};

// One token: the state and the output.
template <class X>
__device__ Output step(State<X> &s, const Token<X> &x, const Lane<X> &at) {
    if constexpr (X::CHANNEL_GATE) {
#pragma unroll
        for (int c = 0; c < X::C; c++) {
#pragma unroll
            for (int j = 0; j < X::K / 4; j++) {
                s[c][4 * j] *= x.a[j].x, s[c][4 * j + 1] *= x.a[j].y;
                s[c][4 * j + 2] *= x.a[j].z, s[c][4 * j + 3] *= x.a[j].w;
            }
        }
    }
    float ak[X::C], aq[X::C];
#pragma unroll
    for (int c = 0; c < X::C; c++) {
        float k0 = 0, k1 = 0, q0 = 0, q1 = 0; // two chains each: an addition's latency is four cycles
#pragma unroll
        for (int j = 0; j < X::K / 4; j++) {
            k0 = fmaf(s[c][4 * j], x.k[j].x, k0), q0 = fmaf(s[c][4 * j], x.q[j].x, q0);
            k1 = fmaf(s[c][4 * j + 1], x.k[j].y, k1), q1 = fmaf(s[c][4 * j + 1], x.q[j].y, q1);
            k0 = fmaf(s[c][4 * j + 2], x.k[j].z, k0), q0 = fmaf(s[c][4 * j + 2], x.q[j].z, q0);
            k1 = fmaf(s[c][4 * j + 3], x.k[j].w, k1), q1 = fmaf(s[c][4 * j + 3], x.q[j].w, q1);
        }
        ak[c] = k0 + k1, aq[c] = q0 + q1;
    }
    if constexpr (!X::CHANNEL_GATE) { // here, so that it fills the time of the shuffles
#pragma unroll
        for (int c = 0; c < X::C; c++) {
#pragma unroll
            for (int j = 0; j < X::K; j++) s[c][j] *= x.decay;
        }
    }
    Output o;
    float own_aq, own_d = 0;
    reduce<X>(ak, aq, own_aq, o.column, o.writer, at);
    float d[X::C];
#pragma unroll
    for (int c = 0; c < X::C; c++) {
        d[c] = x.beta * (x.v[c] - x.decay * ak[c]);
        if (c == o.column) own_d = d[c];
    }
#pragma unroll
    for (int c = 0; c < X::C; c++) {
#pragma unroll
        for (int j = 0; j < X::K / 4; j++) {
            s[c][4 * j] = fmaf(x.k[j].x, d[c], s[c][4 * j]);
            s[c][4 * j + 1] = fmaf(x.k[j].y, d[c], s[c][4 * j + 1]);
            s[c][4 * j + 2] = fmaf(x.k[j].z, d[c], s[c][4 * j + 2]);
            s[c][4 * j + 3] = fmaf(x.k[j].w, d[c], s[c][4 * j + 3]);
        }
    }
    o.value = x.decay * own_aq + own_d * x.kq;
    return o;
}

// What follows a token for some callers: the clamp, and the snapshot. save(slot) writes one.
template <class X, class P, class F>
__device__ void after_token(State<X> &s, const P &p, int t, int len, F save) {
    if (p.state_clamp < INFINITY) {
#pragma unroll
        for (int c = 0; c < X::C; c++) {
#pragma unroll
            for (int j = 0; j < X::K; j++) s[c][j] = dn_clamp_state(s[c][j], p.state_clamp);
        }
    }
    const int slot = p.n_snapshots > 0 ? dn_snapshot_slot(p, t, len) : -1;
    if (slot >= 0) save(slot);
}

__device__ inline char *row_at(void *data, const dn_steps &nb, int token, int head, int sequence) {
    return (char *)data + dn_offset(sequence, nb.sequence) + dn_offset(token, nb.token) + dn_offset(head, nb.head);
}
__device__ inline Rows rows_of(const dn_hot &p, const dn_sequence &seq, int kh, int h) {
    const int t = seq.start;
    return {row_at(p.q, p.q_nb, t, kh, seq.bq), row_at(p.k, p.k_nb, t, kh, seq.bq),
            row_at(p.v, p.v_nb, t, h, seq.b),   row_at(p.g, p.g_nb, t, h, seq.b),
            row_at(p.beta, p.beta_nb, t, h, seq.b), row_at(p.out, p.out_nb, t, h, seq.b)};
}

// Asks L2 for the block's columns of a state, a line a thread. The kernel ahead may still run and change them: then the line
// in L2 changes with them, which a register would not.
template <class X>
__device__ void prefetch_state(const char *base, uint32_t nb, int column_block) {
    constexpr int ROWS = X::VALUE_MAJOR ? X::S : X::COLS, LINE = 128, THREADS = 32 * X::W;
    constexpr int LINES = ((X::VALUE_MAJOR ? X::COLS : X::S) * 4 + LINE - 1) / LINE; // of a row of the block's
    if constexpr (DN_SM90 && X::S % X::COLS == 0) {
        base += X::VALUE_MAJOR ? column_block * X::COLS * 4 : dn_offset(column_block * X::COLS, nb);
#pragma unroll
        for (int i = threadIdx.x; i < ROWS * LINES; i += THREADS)
            prefetch_l2(base + dn_offset(i / LINES, nb) + i % LINES * LINE);
    }
}

template <class X>
__device__ void recurrent(const dn_fast &f) {
    const int h = blockIdx.y;
    const Lane<X> at(blockIdx.x);
    const dn_hot &p = f.hot;
    // Launched ahead, a block has time until the kernel before it is done.
    if (X::ONE) prefetch_state<X>(row_at(p.state_in, p.state_in_nb, 0, h, blockIdx.z), p.state_in_nb.token, blockIdx.x);
    wait_for_previous();
    launch_next();

    for (int b = blockIdx.z; b < p.B; b += gridDim.z) {
        dn_sequence seq = dn_plain_sequence(b, X::ONE ? 1 : p.T);
        if (!X::ONE && !(p.flags & DN_PLAIN)) {
            if (!dn_sequence_of(f.p, b, seq)) continue; // the same for the whole block
        }
        State<X> s;
        zero_state<X>(s);
        load_vectors<X>(s, row_at(p.state_in, p.state_in_nb, 0, h, seq.row_in), p.state_in_nb.token, at);

        Rows rows = rows_of(p, seq, dn_key_head(h, p.Hk, p.Hv, p.flags & DN_GROUPED), h);
        char *const state_out = p.state_out ? row_at(p.state_out, p.state_out_nb, 0, h, seq.row_out) : nullptr;

        Incoming<X> incoming;
        if (seq.len > 0) incoming.load(rows, at);
#pragma unroll 1
        for (int t = 0; t < seq.len; t++) {
            Token<X> token;
            incoming.finish(token, f);
            if (t + 1 < seq.len) {
                rows.q += p.q_nb.token, rows.k += p.k_nb.token, rows.v += p.v_nb.token;
                rows.g += p.g_nb.token, rows.beta += p.beta_nb.token;
                incoming.load(rows, at);
            }
            token.sum_kq(); // no branch from here on, so that its shuffles mingle with the state's
            const Output o = step<X>(s, token, at);
            if (o.writer && (X::S % X::COLS == 0 || at.column + o.column < X::S))
                *(float *)(rows.out + (at.column + o.column) * 4) = p.scale * o.value;
            rows.out += p.out_nb.token;
            if (!X::ONE && p.flags & DN_EVENTFUL) {
                after_token<X>(s, p, t, seq.len, [&](int slot) {
                    store_vectors<X>(s,
                                     row_at(p.snapshots, p.snapshots_nb, 0, h, seq.index) +
                                         dn_offset(slot, p.snapshot_stride),
                                     p.snapshots_nb.token, at);
                });
            }
        }
        if (state_out) store_vectors<X>(s, state_out, p.state_out_nb.token, at);
    }
}

template <class X>
__device__ void recurrent(const dn_problem &p) {
    DN_SHARED(float4, shared_memory);
    typename X::Row *const tile = (typename X::Row *)shared_memory;
    const int h = blockIdx.y, column0 = blockIdx.x * X::COLS;
    const Lane<X> at(blockIdx.x);
    wait_for_previous();
    launch_next();

    for (int b = blockIdx.z; b < p.B; b += gridDim.z) {
        dn_sequence seq;
        if (!dn_sequence_of(p, b, seq)) continue; // the same for the whole block

        auto state = [&](const dn_state_view &v, int row) {
            return (char *)v.data + dn_offset(row, v.nb[3]) + dn_offset(h, v.nb[2]);
        };
        State<X> s;
        zero_state<X>(s); // padding stays zero for ever
        load_any<X>(s, p.state_in, state(p.state_in, seq.row_in), at, p.S, p.flags & DN_VEC_STATE_IN);

        const int kh = dn_key_head(h, p.Hk, p.Hv, p.head_map);
        auto begin = [&](const dn_view &v, int head, int sequence) {
            return (char *)v.data + dn_offset(sequence, v.nb[3]) + dn_offset(seq.start, v.nb[2]) + dn_offset(head, v.nb[1]);
        };
        const Rows rows = {begin(p.q, kh, seq.bq), begin(p.k, kh, seq.bq),   begin(p.v, h, seq.b),
                           begin(p.g, h, seq.b),   begin(p.beta, h, seq.b), begin(p.out, h, seq.b)};
#pragma unroll 1
        for (int t0 = 0; t0 < seq.len; t0 += p.tile) {
            const int n = min(p.tile, seq.len - t0);
            __syncthreads(); // the last tile has been read
#pragma unroll 1
            for (int r = at.warp; r < n; r += X::W) stage_row<X>(tile[r], p, rows, t0 + r, column0, at.lane);
            __syncthreads();
#pragma unroll 1
            for (int t = 0; t < n; t++) {
                Token<X> token;
                token.fetch(tile[t], at);
                const Output o = step<X>(s, token, at);
                if (o.writer && at.column + o.column < p.S)
                    dn_store(rows.out + dn_offset(t0 + t, p.out.nb[2]) + dn_offset(at.column + o.column, p.out.nb[0]),
                             p.dtype_out, p.scale * o.value);
                if (p.flags & DN_EVENTFUL) {
                    after_token<X>(s, p, t0 + t, seq.len, [&](int slot) {
                        store_any<X>(s, p.snapshots, state(p.snapshots, seq.index) + dn_offset(slot, p.snapshot_stride),
                                     at, p.S, p.flags & DN_VEC_SNAPSHOTS);
                    });
                }
            }
        }
        __syncthreads(); // before the next sequence's staging
        if (p.state_out.data)
            store_any<X>(s, p.state_out, state(p.state_out, seq.row_out), at, p.S, p.flags & DN_VEC_STATE_OUT);
    }
}

} // namespace

#include "recurrent_window.cuh"

#ifndef DN_RECURRENT_VARIANTS
// KIND is one, window, fast or any.
#define DN_PARAMS_one dn_fast
#define DN_PARAMS_window dn_fast
#define DN_PARAMS_fast dn_fast
#define DN_PARAMS_any dn_problem
#define DN_BODY_one recurrent
#define DN_BODY_window recurrent_windows
#define DN_BODY_fast recurrent
#define DN_BODY_any recurrent
#define DN_IS_one true, true
#define DN_IS_window true, false
#define DN_IS_fast true, false
#define DN_IS_any false, false
#define DN_VALUE_MAJOR_kmajor false
#define DN_VALUE_MAJOR_vmajor true
#define DN_KERNEL(KIND, S, LAYOUT, GATE, CHANNEL, L, C, W)                                                             \
    extern "C" __global__ void __launch_bounds__(W * 32, 1) dn_recurrent_##KIND##_s##S##_##LAYOUT##_##GATE(            \
        const __grid_constant__ DN_PARAMS_##KIND p) {                                                                  \
        DN_BODY_##KIND<Shape<S, L, C, W, DN_VALUE_MAJOR_##LAYOUT, CHANNEL, DN_IS_##KIND>>(p);                               \
    }
#define DN_RECURRENT(KIND, S, LAYOUT, L, C, W)                                                                         \
    DN_KERNEL(KIND, S, LAYOUT, scalar, false, L, C, W)                                                                 \
    DN_KERNEL(KIND, S, LAYOUT, channel, true, L, C, W)
#include "recurrent_shapes.h"
#endif
