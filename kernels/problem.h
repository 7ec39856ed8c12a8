// The view of a validated problem that a kernel receives, by value, as its only argument.
//
// src/cuda/abi.rs holds the same structures as repr(C); the asserts at the end stand on both sides, so a change on one
// side alone does not compile. All strides are in bytes, all pointers are device memory.
#pragma once
#include <stdint.h>

// Axes: channel, head, token, sequence. A tensor that an option leaves out has data == NULL.
typedef struct {
    void *data;
    int64_t nb[4];
} dn_view;

// Axes: the axis that is contiguous in the named layout, the other one, head, row of the pool.
typedef struct {
    void *data;
    int64_t nb[4];
} dn_state_view;

typedef struct {
    int32_t B, T;                                 // T: tokens of a sequence, or of all of them with cu_seqlens
    int32_t S, Hk, Hv, Bq;
    uint32_t flags;                               // DN_*
    int32_t head_map;                             // 0 tiled: h % Hk, 1 grouped: h / (Hv / Hk)
    int32_t beta_kind;                            // 0 as given, 1 a logit
    int32_t qk_norm;                              // 1: q and k are L2-normalised here
    int32_t n_snapshots;
    float scale, gate_max, state_clamp;           // gate_max, state_clamp: +inf = off
    float qk_norm_eps;
    int32_t tile;                                 // tokens staged in shared memory at a time
    dn_state_view state_in;
    dn_view k, q, v, g, beta, out;
    dn_state_view state_out, snapshots;           // NULL = not wanted
    int64_t snapshot_stride;                      // from one snapshot slot to the next
    int32_t snapshot_order, snapshot_skip;        // order: 0 newest first, 1 oldest first; newest tokens without one
    const void *rows_in, *rows_out;               // row of the pool per sequence; NULL = the sequence's own number
    const void *cu_seqlens;                       // B + 1 token offsets; NULL = T tokens in every sequence
    int32_t rows_in_i64, rows_out_i64, cu_i64;    // width of an index: 0 = int32, 1 = int64
    int32_t n_rows_in, n_rows_out;                // rows of the pools: an index outside skips its sequence
    int32_t dtype_q, dtype_k, dtype_v, dtype_out; // DN_F32, DN_F16, DN_BF16
    int32_t state_layout;                         // 0 key-contiguous [v][k], 1 value-contiguous [k][v]
    int32_t gate_kind;                            // 0 one log-decay per head, 1 one per key channel
    int32_t reserved;                             // 0
} dn_problem;

enum { DN_F32 = 0, DN_F16 = 1, DN_BF16 = 2 };

enum {
    // Tensors whose rows may be read or written four elements at a time: contiguous and aligned to four elements.
    DN_VEC_Q = 1,
    DN_VEC_K = 2,
    DN_VEC_V = 4,
    DN_VEC_G = 8,
    DN_VEC_OUT = 16,
    DN_VEC_STATE_IN = 32,
    DN_VEC_STATE_OUT = 64,
    DN_VEC_SNAPSHOTS = 128,
    // No rows_in, rows_out, cu_seqlens; Bq == B: a sequence is its own number everywhere.
    DN_PLAIN = 256,
    DN_GROUPED = 512,   // head_map is 1
    DN_LOGIT = 1024,    // beta_kind is 1
    DN_NORM = 2048,     // qk_norm is 1
    DN_EVENTFUL = 4096, // there are snapshots or a clamp
};

// What every call of a fast kernel reads, packed into four lines of constant memory, the last of which single tokens do
// without: a kernel of two microseconds feels each line that it has to wait for. Strides in bytes; the host takes another
// kernel where one needs more than 32 bits.
typedef struct {
    uint32_t token, head, sequence; // of a state: of the other axis, head, row
} dn_steps;

typedef struct {
    uint32_t flags;
    int32_t B, T, Hk, Hv;
    float scale, gate_max;
    uint32_t reserved;
    void *state_in;
    dn_steps state_in_nb, k_nb;
    void *k, *q, *v, *g, *beta, *out;
    dn_steps q_nb, v_nb, g_nb, beta_nb, out_nb, state_out_nb;
    void *state_out;
    void *snapshots;
    dn_steps snapshots_nb;
    float state_clamp;
    int64_t snapshot_stride;
    int32_t n_snapshots, snapshot_order, snapshot_skip;
    uint32_t reserved2[5];
} dn_hot;

typedef struct {
    dn_hot hot;
    dn_problem p; // rows, sequences, norm
} dn_fast;

#ifdef __cplusplus
#include <stddef.h>
static_assert(sizeof(dn_view) == 40 && sizeof(dn_state_view) == 40, "view");
static_assert(offsetof(dn_problem, flags) == 24 && offsetof(dn_problem, scale) == 44, "scalars");
static_assert(offsetof(dn_problem, state_in) == 64 && offsetof(dn_problem, k) == 104, "inputs");
static_assert(offsetof(dn_problem, out) == 304 && offsetof(dn_problem, state_out) == 344, "outputs");
static_assert(offsetof(dn_problem, snapshot_stride) == 424, "snapshots");
static_assert(offsetof(dn_problem, rows_in) == 440 && offsetof(dn_problem, cu_seqlens) == 456, "indices");
static_assert(offsetof(dn_problem, rows_in_i64) == 464 && offsetof(dn_problem, dtype_q) == 484, "dtypes");
static_assert(offsetof(dn_problem, reserved) == 508 && sizeof(dn_problem) == 512, "size");
static_assert(sizeof(dn_steps) == 12 && offsetof(dn_hot, state_in) == 32 && offsetof(dn_hot, k) == 64, "hot");
static_assert(offsetof(dn_hot, q_nb) == 112 && offsetof(dn_hot, state_out) == 184 && sizeof(dn_hot) == 256, "hot");
static_assert(offsetof(dn_fast, p) == 256 && sizeof(dn_fast) == 768, "fast");
#endif
