//! kernels/problem.h in Rust, and a problem as the kernels see it.

use super::plan::unsupported;
use crate::error::Result;
use crate::params::{BetaKind, HeadMap, SnapshotOrder};
use crate::problem::{Index, Problem, StateView};
use crate::tensor::{Dtype, View};
use std::ffi::c_void;
use std::mem::offset_of;

#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct DnView {
    data: *mut c_void,
    nb: [i64; 4],
}

#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct DnProblem {
    sequences: i32,
    tokens: i32,
    head_size: i32,
    key_heads: i32,
    value_heads: i32,
    qk_sequences: i32,
    pub flags: u32,
    head_map: i32,
    beta_kind: i32,
    qk_norm: i32,
    n_snapshots: i32,
    scale: f32,
    gate_max: f32,
    state_clamp: f32,
    qk_norm_eps: f32,
    pub tile: i32,
    state_in: DnView,
    k: DnView,
    q: DnView,
    v: DnView,
    g: DnView,
    beta: DnView,
    out: DnView,
    state_out: DnView,
    snapshots: DnView,
    snapshot_stride: i64,
    snapshot_order: i32,
    snapshot_skip: i32,
    rows_in: *const c_void,
    rows_out: *const c_void,
    cu_seqlens: *const c_void,
    rows_in_i64: i32,
    rows_out_i64: i32,
    cu_i64: i32,
    n_rows_in: i32,
    n_rows_out: i32,
    dtype_q: i32,
    dtype_k: i32,
    dtype_v: i32,
    dtype_out: i32,
    state_layout: i32,
    gate_kind: i32,
    reserved: i32,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct DnSteps {
    token: u32,
    head: u32,
    sequence: u32,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct DnHot {
    flags: u32,
    sequences: i32,
    tokens: i32,
    key_heads: i32,
    value_heads: i32,
    scale: f32,
    gate_max: f32,
    reserved: u32,
    state_in: *mut c_void,
    state_in_nb: DnSteps,
    k_nb: DnSteps,
    k: *mut c_void,
    q: *mut c_void,
    v: *mut c_void,
    g: *mut c_void,
    beta: *mut c_void,
    out: *mut c_void,
    q_nb: DnSteps,
    v_nb: DnSteps,
    g_nb: DnSteps,
    beta_nb: DnSteps,
    out_nb: DnSteps,
    state_out_nb: DnSteps,
    state_out: *mut c_void,
    snapshots: *mut c_void,
    snapshots_nb: DnSteps,
    state_clamp: f32,
    snapshot_stride: i64,
    n_snapshots: i32,
    snapshot_order: i32,
    snapshot_skip: i32,
    reserved2: [u32; 5],
}

#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct DnFast {
    hot: DnHot,
    problem: DnProblem,
}

// The header asserts the same numbers.
const _: () = {
    assert!(size_of::<DnView>() == 40);
    assert!(offset_of!(DnProblem, flags) == 24 && offset_of!(DnProblem, scale) == 44);
    assert!(offset_of!(DnProblem, state_in) == 64 && offset_of!(DnProblem, k) == 104);
    assert!(offset_of!(DnProblem, out) == 304 && offset_of!(DnProblem, state_out) == 344);
    assert!(offset_of!(DnProblem, snapshot_stride) == 424);
    assert!(offset_of!(DnProblem, rows_in) == 440 && offset_of!(DnProblem, cu_seqlens) == 456);
    assert!(offset_of!(DnProblem, rows_in_i64) == 464 && offset_of!(DnProblem, dtype_q) == 484);
    assert!(offset_of!(DnProblem, reserved) == 508 && size_of::<DnProblem>() == 512);
    assert!(size_of::<DnSteps>() == 12 && offset_of!(DnHot, state_in) == 32 && offset_of!(DnHot, k) == 64);
    assert!(offset_of!(DnHot, q_nb) == 112 && offset_of!(DnHot, state_out) == 184 && size_of::<DnHot>() == 256);
    assert!(offset_of!(DnFast, problem) == 256 && size_of::<DnFast>() == 768);
    assert!(Dtype::F32 as u32 == 0 && Dtype::F16 as u32 == 1 && Dtype::Bf16 as u32 == 2);
    assert!(HeadMap::Tiled as u32 == 0 && HeadMap::Grouped as u32 == 1);
};

// DN_* of the header.
pub(crate) const VEC_Q: u32 = 1;
pub(crate) const VEC_K: u32 = 2;
pub(crate) const VEC_V: u32 = 4;
pub(crate) const VEC_G: u32 = 8;
pub(crate) const VEC_OUT: u32 = 16;
pub(crate) const VEC_STATE_IN: u32 = 32;
pub(crate) const VEC_STATE_OUT: u32 = 64;
pub(crate) const VEC_SNAPSHOTS: u32 = 128;
const PLAIN: u32 = 256;
const GROUPED: u32 = 512;
const LOGIT: u32 = 1024;
const NORM: u32 = 2048;
const EVENTFUL: u32 = 4096;

/// An axis of one element has no stride: what it says there may be anything.
fn stride(ne: usize, nb: usize) -> usize {
    if ne > 1 { nb } else { 0 }
}

impl DnView {
    const NONE: DnView = DnView { data: std::ptr::null_mut(), nb: [0; 4] };

    fn of(view: &View) -> DnView {
        DnView { data: view.data.cast(), nb: std::array::from_fn(|axis| stride(view.ne[axis], view.nb[axis]) as i64) }
    }

    fn of_state(state: &StateView, value_contiguous: bool, heads: usize) -> DnView {
        let (nb_k, nb_v) = (state.nb_k as i64, state.nb_v as i64);
        let (contiguous, other) = if value_contiguous { (nb_v, nb_k) } else { (nb_k, nb_v) };
        let (head, row) = (stride(heads, state.nb_head) as i64, stride(state.rows, state.nb_row) as i64);
        DnView { data: state.data.cast(), nb: [contiguous, other, head, row] }
    }

    /// Whether elements can be moved four at a time.
    fn in_fours(&self, size: usize) -> bool {
        let mask = 4 * size - 1;
        let places = self.nb[1..].iter().fold(self.data as usize, |bits, nb| bits | *nb as usize);
        self.nb[0] == size as i64 && places & mask == 0
    }

    /// The strides past the first axis, if 32 bits hold them.
    fn steps(&self, [token, head, sequence]: [usize; 3]) -> Option<DnSteps> {
        let [token, head, sequence] = [token, head, sequence].map(|axis| u32::try_from(self.nb[axis]).ok());
        Some(DnSteps { token: token?, head: head?, sequence: sequence? })
    }
}

/// Axes of (token, head, sequence) in a tensor, and of (other axis, head, row) in a state.
const TENSOR: [usize; 3] = [2, 1, 3];
const STATE: [usize; 3] = [1, 2, 3];

impl DnProblem {
    /// The problem for any kernel. `value_contiguous` is the order in which its lanes walk over states.
    pub fn of(p: &Problem, value_contiguous: bool) -> Result<DnProblem> {
        let int = |name: &str, value: usize| {
            i32::try_from(value)
                .map_err(|_| unsupported(format_args!("{name} is {value}; on CUDA it must be below 2^31")))
        };
        let state = |state: &StateView| DnView::of_state(state, value_contiguous, p.value_heads());
        let pointer =
            |index: &Option<Index>| index.map_or(std::ptr::null(), |index| index.data().cast::<c_void>().cast_const());
        let wide = |index: &Option<Index>| i32::from(index.is_some_and(|index| index.dtype() == Dtype::I64));
        let mut to = DnProblem {
            sequences: int("the number of sequences", p.sequences())?,
            tokens: int("v.ne[2] (the tokens)", p.tokens())?,
            head_size: int("v.ne[0] (the head size)", p.head_size())?,
            key_heads: int("q.ne[1] (the key heads)", p.key_heads())?,
            value_heads: int("v.ne[1] (the value heads)", p.value_heads())?,
            qk_sequences: int("q.ne[3]", p.qk_sequences())?,
            flags: 0,
            head_map: p.head_map() as i32,
            beta_kind: p.beta_kind() as i32,
            qk_norm: i32::from(p.qk_norm().is_some()),
            n_snapshots: p.snapshots.map_or(Ok(0), |s| int("n_snapshots", s.count))?,
            scale: p.scale(),
            gate_max: p.gate_max(),
            state_clamp: p.state_clamp(),
            qk_norm_eps: p.qk_norm().unwrap_or(0.0),
            tile: 0,
            state_in: state(&p.state_in),
            k: DnView::of(&p.k),
            q: DnView::of(&p.q),
            v: DnView::of(&p.v),
            g: DnView::of(&p.g),
            beta: DnView::of(&p.beta),
            out: DnView::of(&p.out),
            state_out: p.state_out.as_ref().map_or(DnView::NONE, state),
            snapshots: p.snapshots.as_ref().map_or(DnView::NONE, |s| state(&s.slot0)),
            snapshot_stride: p.snapshots.map_or(0, |s| stride(s.count, s.stride) as i64),
            snapshot_order: p.snapshots.map_or(0, |s| i32::from(s.order == SnapshotOrder::OldestFirst)),
            snapshot_skip: p.snapshots.map_or(0, |s| i32::try_from(s.skip).unwrap_or(i32::MAX)),
            rows_in: pointer(&p.rows_in),
            rows_out: pointer(&p.rows_out),
            cu_seqlens: pointer(&p.cu_seqlens),
            rows_in_i64: wide(&p.rows_in),
            rows_out_i64: wide(&p.rows_out),
            cu_i64: wide(&p.cu_seqlens),
            n_rows_in: int("the rows of state_in", p.state_in.rows)?,
            n_rows_out: p.state_out.map_or(Ok(0), |s| int("the rows of state_out", s.rows))?,
            dtype_q: p.q.dtype as i32,
            dtype_k: p.k.dtype as i32,
            dtype_v: p.v.dtype as i32,
            dtype_out: p.out.dtype as i32,
            state_layout: i32::from(value_contiguous),
            gate_kind: i32::from(p.channel_gate()),
            reserved: 0,
        };
        let size = |view: &View| view.dtype.size();
        let plain =
            p.rows_in.is_none() && p.rows_out.is_none() && p.cu_seqlens.is_none() && to.qk_sequences == to.sequences;
        to.flags = [
            (VEC_Q, to.q.in_fours(size(&p.q))),
            (VEC_K, to.k.in_fours(size(&p.k))),
            (VEC_V, to.v.in_fours(size(&p.v))),
            (VEC_G, p.channel_gate() && to.g.in_fours(4)),
            (VEC_OUT, to.out.in_fours(size(&p.out))),
            (VEC_STATE_IN, to.state_in.in_fours(4)),
            (VEC_STATE_OUT, p.state_out.is_some() && to.state_out.in_fours(4)),
            (VEC_SNAPSHOTS, p.snapshots.is_some() && to.snapshots.in_fours(4) && to.snapshot_stride % 16 == 0),
            (PLAIN, plain),
            (GROUPED, p.head_map() == HeadMap::Grouped),
            (LOGIT, p.beta_kind() == BetaKind::Logit),
            (NORM, p.qk_norm().is_some()),
            (EVENTFUL, to.n_snapshots > 0 || to.state_clamp < f32::INFINITY),
        ]
        .into_iter()
        .fold(0, |flags, (flag, set)| if set { flags | flag } else { flags });
        Ok(to)
    }

    /// Whether every sequence is one token, its own number everywhere, with nothing to do but the state and the output.
    pub fn is_single(&self) -> bool {
        self.tokens == 1 && self.flags & PLAIN != 0 && !self.is_eventful()
    }

    /// Whether there are snapshots or a clamp.
    pub fn is_eventful(&self) -> bool {
        self.flags & EVENTFUL != 0
    }

    /// The same for a fast kernel, if one can take it: f32, all in fours, strides of 32 bits.
    pub fn fast(&self) -> Option<DnFast> {
        let f32s = [self.dtype_q, self.dtype_k, self.dtype_v, self.dtype_out].iter().all(|dtype| *dtype == 0);
        let mut fours = VEC_Q | VEC_K | VEC_V | VEC_OUT | VEC_STATE_IN;
        for (flag, there) in [
            (VEC_G, self.gate_kind == 1),
            (VEC_STATE_OUT, !self.state_out.data.is_null()),
            (VEC_SNAPSHOTS, !self.snapshots.data.is_null()),
        ] {
            if there {
                fours |= flag;
            }
        }
        if !f32s || self.flags & fours != fours {
            return None;
        }
        let hot = DnHot {
            flags: self.flags,
            sequences: self.sequences,
            tokens: self.tokens,
            key_heads: self.key_heads,
            value_heads: self.value_heads,
            scale: self.scale,
            gate_max: self.gate_max,
            reserved: 0,
            state_in: self.state_in.data,
            state_in_nb: self.state_in.steps(STATE)?,
            k_nb: self.k.steps(TENSOR)?,
            k: self.k.data,
            q: self.q.data,
            v: self.v.data,
            g: self.g.data,
            beta: self.beta.data,
            out: self.out.data,
            q_nb: self.q.steps(TENSOR)?,
            v_nb: self.v.steps(TENSOR)?,
            g_nb: self.g.steps(TENSOR)?,
            beta_nb: self.beta.steps(TENSOR)?,
            out_nb: self.out.steps(TENSOR)?,
            state_out_nb: self.state_out.steps(STATE)?,
            state_out: self.state_out.data,
            snapshots: self.snapshots.data,
            snapshots_nb: self.snapshots.steps(STATE)?,
            state_clamp: self.state_clamp,
            snapshot_stride: self.snapshot_stride,
            n_snapshots: self.n_snapshots,
            snapshot_order: self.snapshot_order,
            snapshot_skip: self.snapshot_skip,
            reserved2: [0; 5],
        };
        Some(DnFast { hot, problem: *self })
    }
}
