/* deltanet: the gated delta net operator. SPDX-License-Identifier: MIT
 *
 * Generated from the Rust sources by cbindgen; do not edit.
 *
 * Tensors are described by pointers and byte strides and stay the caller's; nothing is copied or kept after a call.
 * Every function that can fail returns a deltanet_status; deltanet_last_error() then has a sentence that names the
 * argument, what it was and what it must be, and outputs and states are as they were. */

#ifndef DELTANET_H
#define DELTANET_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/// The major version of this header.
#define DELTANET_VERSION_MAJOR 0

/// The minor version of this header.
#define DELTANET_VERSION_MINOR 1

/// The patch version of this header.
#define DELTANET_VERSION_PATCH 0

/// The version of this header as `deltanet_version` counts: major * 1000000 + minor * 1000 + patch.
#define DELTANET_VERSION (((DELTANET_VERSION_MAJOR * 1000000) + (DELTANET_VERSION_MINOR * 1000)) + DELTANET_VERSION_PATCH)

/// What a call answers: `OK`, or the class of rule that an argument broke. `deltanet_last_error` has the words.
enum deltanet_status
#ifdef __cplusplus
  : uint32_t
#endif // __cplusplus
 {
  /// Done.
  DELTANET_STATUS_OK = 0,
  /// A pointer that must not be null is null.
  DELTANET_STATUS_NULL_POINTER = 1,
  /// A pointer or a stride is not a multiple of its element's size.
  DELTANET_STATUS_MISALIGNED = 2,
  /// `struct_size` is smaller than any released header's, or unknown fields of a newer header are in use.
  DELTANET_STATUS_STRUCT_SIZE = 3,
  /// An enumeration has a value that this version does not know.
  DELTANET_STATUS_UNKNOWN_VALUE = 4,
  /// A tensor has a dtype that its role does not allow.
  DELTANET_STATUS_DTYPE = 5,
  /// A tensor's `ne` contradicts the other tensors or the operator's rules.
  DELTANET_STATUS_SHAPE = 6,
  /// A tensor's `ne` and `nb` reach outside the address space.
  DELTANET_STATUS_STRIDE = 7,
  /// An output overlaps another tensor, or itself.
  DELTANET_STATUS_OVERLAP = 8,
  /// A state row index is outside its pool, or two sequences meet in one row that is written.
  DELTANET_STATUS_ROW = 9,
  /// `cu_seqlens` does not start at 0, decreases, or ends past the last token.
  DELTANET_STATUS_SEQUENCES = 10,
  /// `ith` is not below `nth`, or a thread count is out of range.
  DELTANET_STATUS_THREADS = 11,
  /// The scratch or workspace is null or too small.
  DELTANET_STATUS_SCRATCH = 12,
  /// The snapshot settings ask for more than the buffer holds, or contradict each other.
  DELTANET_STATUS_SNAPSHOTS = 13,
  /// A floating-point setting is out of its range.
  DELTANET_STATUS_VALUE = 14,
  /// A valid request that this build or machine cannot serve.
  DELTANET_STATUS_UNSUPPORTED = 15,
  /// Memory or threads could not be had.
  DELTANET_STATUS_OUT_OF_MEMORY = 16,
  /// The CUDA driver reported an error.
  DELTANET_STATUS_CUDA = 17,
  /// A defect in this library: a panic was caught at the boundary.
  DELTANET_STATUS_INTERNAL = 18,
};
#ifndef __cplusplus
typedef uint32_t deltanet_status;
#endif // __cplusplus

/// Element type of a tensor.
enum deltanet_dtype
#ifdef __cplusplus
  : uint32_t
#endif // __cplusplus
 {
  /// IEEE single precision.
  DELTANET_DTYPE_F32 = 0,
  /// IEEE half precision.
  DELTANET_DTYPE_F16 = 1,
  /// bfloat16.
  DELTANET_DTYPE_BF16 = 2,
  /// 32-bit signed integer (index tensors).
  DELTANET_DTYPE_I32 = 3,
  /// 64-bit signed integer (index tensors).
  DELTANET_DTYPE_I64 = 4,
};
#ifndef __cplusplus
typedef uint32_t deltanet_dtype;
#endif // __cplusplus

/// Which key head a value head uses.
enum deltanet_head_map
#ifdef __cplusplus
  : uint32_t
#endif // __cplusplus
 {
  /// Key head `h % Hk` (ggml).
  DELTANET_HEAD_MAP_TILED = 0,
  /// Key head `h / (Hv / Hk)` (HF transformers, FLA, FlashInfer).
  DELTANET_HEAD_MAP_GROUPED = 1,
};
#ifndef __cplusplus
typedef uint32_t deltanet_head_map;
#endif // __cplusplus

/// Which of a state's two channel axes comes first in its tensor.
enum deltanet_state_layout
#ifdef __cplusplus
  : uint32_t
#endif // __cplusplus
 {
  /// Axis 0 is the key channel, axis 1 the value channel: `[v][k]` (ggml).
  DELTANET_STATE_LAYOUT_KEY_CONTIGUOUS = 0,
  /// Axis 0 is the value channel, axis 1 the key channel: `[k][v]` (ik_llama.cpp, HF transformers).
  DELTANET_STATE_LAYOUT_VALUE_CONTIGUOUS = 1,
};
#ifndef __cplusplus
typedef uint32_t deltanet_state_layout;
#endif // __cplusplus

/// What the beta tensor holds.
enum deltanet_beta_kind
#ifdef __cplusplus
  : uint32_t
#endif // __cplusplus
 {
  /// beta itself.
  DELTANET_BETA_KIND_VALUE = 0,
  /// A logit: the operator applies the sigmoid.
  DELTANET_BETA_KIND_LOGIT = 1,
};
#ifndef __cplusplus
typedef uint32_t deltanet_beta_kind;
#endif // __cplusplus

/// The order of snapshot slots.
enum deltanet_snapshot_order
#ifdef __cplusplus
  : uint32_t
#endif // __cplusplus
 {
  /// Slot i is the state that i more tokens led away from (ggml).
  DELTANET_SNAPSHOT_ORDER_NEWEST_FIRST = 0,
  /// Slot 0 is the oldest of the states kept (ik_llama.cpp).
  DELTANET_SNAPSHOT_ORDER_OLDEST_FIRST = 1,
};
#ifndef __cplusplus
typedef uint32_t deltanet_snapshot_order;
#endif // __cplusplus

/// Arithmetic of the CUDA prompt kernels. Single tokens and the CPU are always exact.
enum deltanet_precision
#ifdef __cplusplus
  : uint32_t
#endif // __cplusplus
 {
  /// As accurate as f32 arithmetic.
  DELTANET_PRECISION_EXACT = 0,
  /// TF32 matrix products.
  DELTANET_PRECISION_TF32 = 1,
  /// bfloat16 matrix products.
  DELTANET_PRECISION_BF16 = 2,
};
#ifndef __cplusplus
typedef uint32_t deltanet_precision;
#endif // __cplusplus

/// ggml's own struct.
typedef struct ggml_tensor ggml_tensor;

/// A strided tensor that somebody else owns, in ggml's order: `ne[0]` and `nb[0]` belong to the innermost axis.
///
/// Axes are (channel, head, token, sequence) for q, k, v, g, beta and out; for states they are (the channel that the
/// layout names contiguous, the other channel, head, row). Index tensors use axis 0 alone. A tensor whose `data` is
/// null is absent. Strides are in bytes and not negative; inputs may use stride 0 to broadcast.
typedef struct deltanet_tensor {
  /// First element; aligned to the element's size.
  void *data;
  /// Elements along each axis.
  int64_t ne[4];
  /// Bytes between neighbours along each axis; multiples of the element's size.
  size_t nb[4];
  /// A `deltanet_dtype` value.
  uint32_t dtype;
  /// Zero.
  uint32_t reserved;
} deltanet_tensor;

/// One call of the gated delta rule (Yang et al., "Gated Delta Networks", arXiv 2412.06464; ggml's
/// GGML_OP_GATED_DELTA_NET). For every sequence b, value head h and token t, with a state S of k x v channels:
///
/// - `S <- exp(g) * S`
/// - `d <- beta * (v - S^T k)`
/// - `S <- S + k d^T`
/// - `out <- scale * S^T q`
///
/// All zeros with `struct_size` set means ggml's semantics; then fill in the tensors. S is the head size (a multiple
/// of 16 up to 1024), Hk and Hv the numbers of key and value heads, T tokens, B sequences. The struct only grows at
/// its end; fields past an older caller's `struct_size` count as zero.
///
/// Infinities and NaN in the data are no errors. On the CPU, what depends on them (outputs and states of their head,
/// from their token on) is not finite either, and everything else is what it would be without them, but for rounding.
typedef struct deltanet_params {
  /// `sizeof(deltanet_params)`.
  uint32_t struct_size;
  /// A `deltanet_head_map` value.
  uint32_t head_map;
  /// A `deltanet_state_layout` value, for state_in, state_out and snapshots.
  uint32_t state_layout;
  /// A `deltanet_beta_kind` value.
  uint32_t beta_kind;
  /// Queries `[S, Hk, T, Bq]`, f32, f16 or bf16; B is a multiple of Bq, and sequence b reads `b / (B / Bq)`.
  struct deltanet_tensor q;
  /// Keys, of q's shape.
  struct deltanet_tensor k;
  /// Values `[S, Hv, T, B]`, f32, f16 or bf16; Hv is a multiple of Hk.
  struct deltanet_tensor v;
  /// Log-decay `[1, Hv, T, B]` (gated delta net) or `[S, Hv, T, B]`, one per key channel (Kimi delta attention), f32.
  /// Minus infinity forgets the state; above 0 the state grows.
  struct deltanet_tensor g;
  /// beta `[1, Hv, T, B]`, f32, any number.
  struct deltanet_tensor beta;
  /// State before the first token `[S, S, Hv, B]`, f32; with `rows_in`, a pool `[S, S, Hv, rows]`.
  struct deltanet_tensor state_in;
  /// Output `[S, Hv, T, B]`, f32, f16 or bf16.
  struct deltanet_tensor out;
  /// State after the last token, like state_in; null where it is not wanted. It may be the same memory as state_in
  /// with the same strides (in place); any other overlap is an error.
  struct deltanet_tensor state_out;
  /// Slot 0 of the snapshots `[S, S, Hv, B]`, f32; null without snapshots.
  struct deltanet_tensor snapshots;
  /// Row of state_in that each sequence reads `[B]`, i32 or i64; null means row b.
  struct deltanet_tensor rows_in;
  /// Row of state_out that each sequence writes `[B]`, i32 or i64; null means row b. Rows are distinct, and where
  /// state_in and state_out are one pool, no sequence reads a row that another one writes.
  struct deltanet_tensor rows_out;
  /// Variable-length batch `[B + 1]`, i32 or i64: sequence b owns the tokens from `cu_seqlens[b]` to before
  /// `cu_seqlens[b + 1]` of the one sequence that q, k, v, g, beta and out then have. Starts at 0, never decreases,
  /// ends at or before T.
  struct deltanet_tensor cu_seqlens;
  /// Bytes between snapshot slots.
  size_t snapshot_stride;
  /// Slots that the snapshot buffer holds; at least n_snapshots.
  uint32_t snapshot_slots;
  /// K: how many states are kept, those after the last K tokens; slots past the tokens there are stay untouched.
  uint32_t n_snapshots;
  /// A `deltanet_snapshot_order` value.
  uint32_t snapshot_order;
  /// How many of the newest states are left out of the snapshots (ik_llama.cpp: 1, the final state goes elsewhere).
  uint32_t snapshot_skip;
  /// Factor on the output; 0 means 1/sqrt(S).
  float scale;
  /// Upper clamp on g before exp; 0 means none (ik_llama.cpp: 50).
  float gate_max;
  /// The state is clamped to `[-state_clamp, state_clamp]` after every token, whose own output comes from the state
  /// before the clamp; 0 means not (ik_llama.cpp: 1e6).
  float state_clamp;
  /// 1: q and k are L2-normalised per head inside the operator, `x / sqrt(sum(x^2) + qk_norm_eps)`; 0: they are not.
  uint32_t qk_norm;
  /// The epsilon of qk_norm (HF transformers, FLA: 1e-6).
  float qk_norm_eps;
  /// A `deltanet_precision` value; read by the CUDA kernels alone.
  uint32_t precision;
} deltanet_params;

/// What a program that links ggml statically tells the plugin: functions of that ggml. Set `struct_size`.
typedef struct deltanet_ggml_host {
  /// `sizeof(deltanet_ggml_host)`.
  uint32_t struct_size;
  /// Zero.
  uint32_t reserved;
  /// `ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU)`.
  void *cpu_device;
  /// `ggml_op_name`.
  const char *(*op_name)(int);
  /// `ggml_backend_buffer_is_host`.
  bool (*buffer_is_host)(void*);
  /// What `ggml_tensor_overhead()` returns.
  size_t tensor_overhead;
} deltanet_ggml_host;

/// What the plugin has done in this process so far. Set `struct_size`.
typedef struct deltanet_ggml_counters {
  /// `sizeof(deltanet_ggml_counters)`.
  uint32_t struct_size;
  /// Zero.
  uint32_t reserved;
  /// GATED_DELTA_NET nodes that ran these kernels.
  uint64_t taken;
  /// Nodes that stayed with the host.
  uint64_t left;
  /// Nodes that read their states from the cache, without GET_ROWS.
  uint64_t reads_fused;
  /// Nodes that wrote their states into the cache, without CPY.
  uint64_t writes_fused;
  /// Nodes that the host's own operator computed too, to compare.
  uint64_t verified;
  /// Those of them where the two did not agree: the host's result was used.
  uint64_t mismatches;
} deltanet_ggml_counters;

#ifdef __cplusplus
extern "C" {
#endif // __cplusplus

/// Checks a call on the CPU without making it: the same code as `deltanet_run`, the same status and message. Reads
/// `params` and the index tensors, touches no other data. Any thread, any number at a time.
///
/// # Safety
/// `params` is null or points to a struct as large as its `struct_size` says; rows_in, rows_out and cu_seqlens, where
/// given, are as large as described.
deltanet_status deltanet_supports(const struct deltanet_params *params);

/// Computes the operator on the CPU with `n_threads` threads of the library's own pool: 0 for one a processor, 1 for
/// the calling thread alone, at most 1024. Returns when all is written. The bits of the result do not depend on
/// `n_threads`. Any thread, any number of calls at a time; pools are kept between calls and shared. After a status
/// other than OK nothing was written.
///
/// # Safety
/// As for `deltanet_supports`; also every tensor is as large as described, and for the time of the call nobody writes
/// to the inputs or touches the outputs.
deltanet_status deltanet_run(const struct deltanet_params *params, uint32_t n_threads);

/// Tells the bytes of scratch that each part of a run with `deltanet_run_part` needs, at any alignment; it does not
/// depend on the number of parts. Any thread.
///
/// # Safety
/// As for `deltanet_supports`; `size` is null (an error) or writable.
deltanet_status deltanet_scratch_size(const struct deltanet_params *params, size_t *size);

/// Computes part `ith` of `nth` (at most 1024) on the calling thread, for engines with threads of their own: no lock,
/// no allocation, no other thread. When all parts have returned OK, on any threads in any order, the result is
/// complete, with the same bits as `deltanet_run`'s. Every part gets the same `params` and scratch of its own.
///
/// # Safety
/// As for `deltanet_run`, for the time of all parts together; `scratch` holds `scratch_size` bytes, used by this part
/// alone.
deltanet_status deltanet_run_part(const struct deltanet_params *params,
                                  uint32_t ith,
                                  uint32_t nth,
                                  void *scratch,
                                  size_t scratch_size);

/// Says in words which kernel, instruction set, tile, tasks and scratch a CPU call gets. Writes at most `size` bytes
/// to `text`, the terminating zero included; cuts what does not fit. Any thread.
///
/// # Safety
/// As for `deltanet_supports`; `text` is null (an error) or holds `size` writable bytes.
deltanet_status deltanet_describe(const struct deltanet_params *params, char *text, size_t size);

/// Loads the CUDA kernels into this thread's current context. To be called once in each context before
/// `deltanet_cuda_run`, outside of any stream capture; later calls return at once. The context may be the driver API's
/// or the runtime's (after any runtime call, such as `cudaFree(0)`). UNSUPPORTED without a driver, on devices below
/// compute capability 7.5, and in a library built without nvcc. Any thread, any number at a time.
deltanet_status deltanet_cuda_prepare(void);

/// Checks a call of `deltanet_cuda_run` without making it and tells the bytes of device memory that it needs as a
/// workspace; 0 means that `workspace` may be null. Needs no driver and no context. Any thread.
///
/// # Safety
/// `params` is null or points to a struct as large as its `struct_size` says; `size` is null (an error) or writable.
deltanet_status deltanet_cuda_workspace_size(const struct deltanet_params *params, size_t *size);

/// Says in words which kernels, precision and workspace a CUDA call gets. Writes at most `size` bytes to `text`, the
/// terminating zero included; cuts what does not fit. Needs no driver and no context. Any thread.
///
/// # Safety
/// `params` is null or points to a struct as large as its `struct_size` says; `text` is null (an error) or holds `size`
/// writable bytes.
deltanet_status deltanet_cuda_describe(const struct deltanet_params *params, char *text, size_t size);

/// Computes the operator on a CUDA stream: `stream` is a `CUstream` or `cudaStream_t` of this thread's current context,
/// or null for the default stream. All tensors, index tensors too, are in memory of that context's device. Returns when
/// the work is queued; allocates nothing, waits for nothing, and may be captured into a graph. Device memory cannot be
/// looked at from here: a sequence whose row in rows_in or rows_out is outside its pool is left out, its outputs
/// untouched, and cu_seqlens is held inside 0 to T. `workspace` has the bytes that `deltanet_cuda_workspace_size` tells
/// and is in use until the stream has done the work. Any thread, any number at a time. After a status other than OK
/// nothing was queued, unless the driver took some launches of a prompt and refused a later one: the message then says
/// so, and outputs and states are undefined. Head sizes to 256; f32, f16 and bf16 tensors; all arithmetic is f32.
///
/// # Safety
/// `params` is null or points to a struct as large as its `struct_size` says. Every tensor is as large as described,
/// and until the stream has done the work nobody writes to the inputs or touches the outputs.
deltanet_status deltanet_cuda_run(const struct deltanet_params *params,
                                  void *workspace,
                                  size_t workspace_size,
                                  void *stream);

/// The operator as a `ggml_custom_op_t`, for `ggml_custom_4d` with n_tasks GGML_N_TASKS_MAX. Sources: q, k, v, g, beta
/// and state, all f32, of the shapes that `ggml_gated_delta_net` takes; `dst` is contiguous f32 and holds the outputs
/// `[S, Hv, T, B]` and behind them K states of all sequences (slot 0 the newest), so `ne` is
/// `{S * Hv, T * B + K * S * B, 1, 1}`. `userdata` is null for ggml's semantics, or a `const deltanet_params *` that
/// outlives the graph and whose options apply (head map, layout, beta, scale, gate clamp, norms); its tensors are
/// ignored. ggml calls it on its own threads; each allocates its scratch once. A node that cannot be computed leaves
/// dst as it is and a line in the log: ask `deltanet_ggml_supports` while building the graph.
///
/// # Safety
/// `dst` is a tensor of a ggml graph that is being computed, all sources in host memory.
void deltanet_ggml_custom_op(struct ggml_tensor *dst, int ith, int nth, void *userdata);

/// Checks a node for `deltanet_ggml_custom_op`; its tensors need no memory yet. Any thread.
///
/// # Safety
/// `dst` is null (an error) or a tensor with its sources; `params` is what the node gets as userdata.
deltanet_status deltanet_ggml_supports(const struct ggml_tensor *dst, const struct deltanet_params *params);

/// Starts the plugin in a program that links ggml statically and so exports nothing to find. Call it once, before the
/// first CPU backend is made. `DELTANET_GGML`, `DELTANET_LOG` and `DELTANET_VERIFY` apply as they do to a loaded
/// plugin. Returns the registry to pass to `ggml_backend_register`, null after an error.
///
/// # Safety
/// `host` is null (an error) or points to a struct as large as its `struct_size` says, with that ggml's own functions.
void *deltanet_ggml_attach(const struct deltanet_ggml_host *host);

/// Reads the plugin's counters. Any thread.
///
/// # Safety
/// `counters` is null (an error) or points to a struct as large as its `struct_size` says.
deltanet_status deltanet_ggml_read_counters(struct deltanet_ggml_counters *counters);

/// The message of this thread's last call that did not return `DELTANET_STATUS_OK`, empty before one. It names the
/// argument, what it was and what it must be. Valid until this thread's next failing call; never null. Any thread.
const char *deltanet_last_error(void);

/// The name of a status, such as "SHAPE"; "UNKNOWN" for a number that is none. Static; never null. Any thread.
const char *deltanet_status_name(uint32_t status);

/// Major version times 1 000 000, plus minor times 1 000, plus patch, of the library in use. The header's own is
/// `DELTANET_VERSION`. Any thread.
uint32_t deltanet_version(void);

/// The version of the library in use as text, such as "0.1.0". Static; never null. Any thread.
const char *deltanet_version_string(void);

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

#endif  /* DELTANET_H */
