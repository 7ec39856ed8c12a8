//! The one description of a call, as C programs fill it in.

use crate::error::{Result, ensure};
use crate::tensor::Tensor;

/// Which key head a value head uses.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum HeadMap {
    /// Key head `h % Hk` (ggml).
    Tiled = 0,
    /// Key head `h / (Hv / Hk)` (HF transformers, FLA, FlashInfer).
    Grouped = 1,
}

/// Which of a state's two channel axes comes first in its tensor.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum StateLayout {
    /// Axis 0 is the key channel, axis 1 the value channel: `[v][k]` (ggml).
    KeyContiguous = 0,
    /// Axis 0 is the value channel, axis 1 the key channel: `[k][v]` (ik_llama.cpp, HF transformers).
    ValueContiguous = 1,
}

/// What the beta tensor holds.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum BetaKind {
    /// beta itself.
    Value = 0,
    /// A logit: the operator applies the sigmoid.
    Logit = 1,
}

/// The order of snapshot slots.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SnapshotOrder {
    /// Slot i is the state that i more tokens led away from (ggml).
    NewestFirst = 0,
    /// Slot 0 is the oldest of the states kept (ik_llama.cpp).
    OldestFirst = 1,
}

/// Arithmetic of the CUDA prompt kernels. Single tokens and the CPU are always exact.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Precision {
    /// As accurate as f32 arithmetic.
    Exact = 0,
    /// TF32 matrix products.
    Tf32 = 1,
    /// bfloat16 matrix products.
    Bf16 = 2,
}

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
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Params {
    /// `sizeof(deltanet_params)`.
    pub struct_size: u32,
    /// A `deltanet_head_map` value.
    pub head_map: u32,
    /// A `deltanet_state_layout` value, for state_in, state_out and snapshots.
    pub state_layout: u32,
    /// A `deltanet_beta_kind` value.
    pub beta_kind: u32,
    /// Queries `[S, Hk, T, Bq]`, f32, f16 or bf16; B is a multiple of Bq, and sequence b reads `b / (B / Bq)`.
    pub q: Tensor,
    /// Keys, of q's shape.
    pub k: Tensor,
    /// Values `[S, Hv, T, B]`, f32, f16 or bf16; Hv is a multiple of Hk.
    pub v: Tensor,
    /// Log-decay `[1, Hv, T, B]` (gated delta net) or `[S, Hv, T, B]`, one per key channel (Kimi delta attention), f32.
    /// Minus infinity forgets the state; above 0 the state grows.
    pub g: Tensor,
    /// beta `[1, Hv, T, B]`, f32, any number.
    pub beta: Tensor,
    /// State before the first token `[S, S, Hv, B]`, f32; with `rows_in`, a pool `[S, S, Hv, rows]`.
    pub state_in: Tensor,
    /// Output `[S, Hv, T, B]`, f32, f16 or bf16.
    pub out: Tensor,
    /// State after the last token, like state_in; null where it is not wanted. It may be the same memory as state_in
    /// with the same strides (in place); any other overlap is an error.
    pub state_out: Tensor,
    /// Slot 0 of the snapshots `[S, S, Hv, B]`, f32; null without snapshots.
    pub snapshots: Tensor,
    /// Row of state_in that each sequence reads `[B]`, i32 or i64; null means row b.
    pub rows_in: Tensor,
    /// Row of state_out that each sequence writes `[B]`, i32 or i64; null means row b. Rows are distinct, and where
    /// state_in and state_out are one pool, no sequence reads a row that another one writes.
    pub rows_out: Tensor,
    /// Variable-length batch `[B + 1]`, i32 or i64: sequence b owns the tokens from `cu_seqlens[b]` to before
    /// `cu_seqlens[b + 1]` of the one sequence that q, k, v, g, beta and out then have. Starts at 0, never decreases,
    /// ends at or before T.
    pub cu_seqlens: Tensor,
    /// Bytes between snapshot slots.
    pub snapshot_stride: usize,
    /// Slots that the snapshot buffer holds; at least n_snapshots.
    pub snapshot_slots: u32,
    /// K: how many states are kept, those after the last K tokens; slots past the tokens there are stay untouched.
    pub n_snapshots: u32,
    /// A `deltanet_snapshot_order` value.
    pub snapshot_order: u32,
    /// How many of the newest states are left out of the snapshots (ik_llama.cpp: 1, the final state goes elsewhere).
    pub snapshot_skip: u32,
    /// Factor on the output; 0 means 1/sqrt(S).
    pub scale: f32,
    /// Upper clamp on g before exp; 0 means none (ik_llama.cpp: 50).
    pub gate_max: f32,
    /// The state is clamped to `[-state_clamp, state_clamp]` after every token, whose own output comes from the state
    /// before the clamp; 0 means not (ik_llama.cpp: 1e6).
    pub state_clamp: f32,
    /// 1: q and k are L2-normalised per head inside the operator, `x / sqrt(sum(x^2) + qk_norm_eps)`; 0: they are not.
    pub qk_norm: u32,
    /// The epsilon of qk_norm (HF transformers, FLA: 1e-6).
    pub qk_norm_eps: f32,
    /// A `deltanet_precision` value; read by the CUDA kernels alone.
    pub precision: u32,
}

impl Default for Params {
    fn default() -> Self {
        let none = Tensor::default();
        Params {
            struct_size: size_of::<Params>() as u32,
            head_map: 0,
            state_layout: 0,
            beta_kind: 0,
            q: none,
            k: none,
            v: none,
            g: none,
            beta: none,
            state_in: none,
            out: none,
            state_out: none,
            snapshots: none,
            rows_in: none,
            rows_out: none,
            cu_seqlens: none,
            snapshot_stride: 0,
            snapshot_slots: 0,
            n_snapshots: 0,
            snapshot_order: 0,
            snapshot_skip: 0,
            scale: 0.0,
            gate_max: 0.0,
            state_clamp: 0.0,
            qk_norm: 0,
            qk_norm_eps: 0.0,
            precision: 0,
        }
    }
}

/// The size of the struct in the first release: a caller cannot have an older one.
const FIRST_SIZE: usize = size_of::<Params>();

/// No released header comes near this; a larger value is an uninitialised struct.
const LARGEST_SIZE: usize = 1 << 14;

impl Params {
    /// Reads a caller's struct of the size that it states itself: an older header's missing fields become zero, a
    /// newer header's extra fields must be zero.
    ///
    /// # Safety
    /// `params` is null or points to a struct that is as large as its `struct_size` says.
    pub unsafe fn read(params: *const Params) -> Result<Params> {
        ensure!(!params.is_null(), NullPointer, "params is null; it must point to a deltanet_params");
        ensure!(
            params.is_aligned(),
            Misaligned,
            "params is {params:p}; it must be aligned to {} bytes",
            align_of::<Params>()
        );
        // SAFETY: not null, aligned, and the caller promises at least the leading struct_size field.
        let size = unsafe { (*params).struct_size } as usize;
        ensure!(
            (FIRST_SIZE..=LARGEST_SIZE).contains(&size),
            StructSize,
            "params.struct_size is {size}; it must be sizeof(deltanet_params), {} in this version and at least {FIRST_SIZE}",
            size_of::<Params>()
        );
        let known = size.min(size_of::<Params>());
        let mut copy = Params::default();
        // SAFETY: the caller promises `size` readable bytes; `copy` has room for the `known` of them, and every bit
        // pattern is a valid Params (integers, floats and raw pointers only).
        let extra = unsafe {
            std::ptr::copy_nonoverlapping(params.cast::<u8>(), (&raw mut copy).cast::<u8>(), known);
            std::slice::from_raw_parts(params.cast::<u8>().add(known), size - known)
        };
        ensure!(
            extra.iter().all(|byte| *byte == 0),
            StructSize,
            "params.struct_size is {size}, and fields past the {} bytes that this version knows are in use; they must be zero",
            size_of::<Params>()
        );
        copy.struct_size = size_of::<Params>() as u32;
        Ok(copy)
    }
}
