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
    dn_view q, k, v, g, beta, out;
    dn_state_view state_in, state_out, snapshots; // state_out, snapshots: NULL = not wanted
    const void *rows_in, *rows_out;               // row of the pool per sequence; NULL = the sequence's own number
    const void *cu_seqlens;                       // B + 1 token offsets; NULL = T tokens in every sequence
    int64_t snapshot_stride;                      // from one snapshot slot to the next
    int32_t S, Hk, Hv, T, B, Bq;                  // T: tokens of a sequence, or of all of them with cu_seqlens
    int32_t dtype_q, dtype_k, dtype_v, dtype_out; // DN_F32, DN_F16, DN_BF16
    int32_t rows_in_i64, rows_out_i64, cu_i64;    // width of an index: 0 = int32, 1 = int64
    int32_t head_map;                             // 0 tiled: h % Hk, 1 grouped: h / (Hv / Hk)
    int32_t state_layout;                         // 0 key-contiguous [v][k], 1 value-contiguous [k][v]
    int32_t gate_kind;                            // 0 one log-decay per head, 1 one per key channel
    int32_t beta_kind;                            // 0 as given, 1 a logit
    int32_t qk_norm;                              // 1: q and k are L2-normalised here
    int32_t n_snapshots, snapshot_order;          // order: 0 newest first, 1 oldest first
    int32_t snapshot_skip;                        // newest tokens that get no snapshot
    int32_t n_rows_in, n_rows_out;                // rows of the pools: an index outside skips its sequence
    float scale, gate_max, state_clamp;           // gate_max, state_clamp: +inf = off
    float qk_norm_eps;
    uint32_t vec;  // DN_VEC_*: tensors that may be read or written 16 bytes (16-bit types: 8 bytes) at a time
    int32_t tile;  // tokens staged in shared memory at a time
} dn_problem;

enum { DN_F32 = 0, DN_F16 = 1, DN_BF16 = 2 };

enum {
    DN_VEC_Q = 1,
    DN_VEC_K = 2,
    DN_VEC_G = 4,
    DN_VEC_STATE_IN = 8,
    DN_VEC_STATE_OUT = 16,
    DN_VEC_SNAPSHOTS = 32,
    DN_VEC_V = 64,
    DN_VEC_OUT = 128,
};

#ifdef __cplusplus
#include <stddef.h>
static_assert(sizeof(dn_view) == 40 && sizeof(dn_state_view) == 40, "view");
static_assert(offsetof(dn_problem, state_in) == 240, "state_in");
static_assert(offsetof(dn_problem, rows_in) == 360, "rows_in");
static_assert(offsetof(dn_problem, snapshot_stride) == 384, "snapshot_stride");
static_assert(offsetof(dn_problem, S) == 392, "S");
static_assert(offsetof(dn_problem, dtype_q) == 416, "dtype_q");
static_assert(offsetof(dn_problem, rows_in_i64) == 432, "rows_in_i64");
static_assert(offsetof(dn_problem, head_map) == 444, "head_map");
static_assert(offsetof(dn_problem, n_snapshots) == 464, "n_snapshots");
static_assert(offsetof(dn_problem, n_rows_in) == 476, "n_rows_in");
static_assert(offsetof(dn_problem, scale) == 484, "scale");
static_assert(offsetof(dn_problem, vec) == 500, "vec");
static_assert(sizeof(dn_problem) == 512, "size");
#endif
