//! The operator for Rust programs, without unsafe: typed tensors borrow their memory, and their shapes and strides are
//! checked against it; the rest is the validator and the kernels that C programs use.
//!
//! ```
//! use deltanet::params::HeadMap;
//! use deltanet::safe::{DeltaNet, Ref, RefMut};
//!
//! // Head size 16, 1 key head, 2 value heads, 3 tokens, 1 sequence.
//! let (s, hk, hv, t, b) = (16, 1, 2, 3, 1);
//! let q = vec![0.25f32; s * hk * t * b];
//! let k = vec![0.25f32; s * hk * t * b];
//! let v = vec![1.0f32; s * hv * t * b];
//! let g = vec![0.0f32; hv * t * b];
//! let beta = vec![1.0f32; hv * t * b];
//! let mut state = vec![0.0f32; s * s * hv * b];
//! let mut out = vec![0.0f32; s * hv * t * b];
//!
//! DeltaNet::new(
//!     Ref::dense(&q, [s, hk, t, b])?,
//!     Ref::dense(&k, [s, hk, t, b])?,
//!     Ref::dense(&v, [s, hv, t, b])?,
//!     Ref::dense(&g, [1, hv, t, b])?,
//!     Ref::dense(&beta, [1, hv, t, b])?,
//!     RefMut::dense(&mut out, [s, hv, t, b])?,
//! )
//! .state(RefMut::dense(&mut state, [s, s, hv, b])?)
//! .head_map(HeadMap::Grouped)
//! .scale(1.0)
//! .run(2)?;
//!
//! // Keys are unit vectors, nothing decays and beta is 1: the state has learnt to answer the key with the value.
//! assert!(out.iter().all(|x| (x - 1.0).abs() < 1e-6));
//! assert!(state.iter().all(|x| (x - 0.25).abs() < 1e-6));
//! # Ok::<(), deltanet::Error>(())
//! ```
//!
//! Memory that is written is borrowed exclusively, so what C programs are told at run time does not compile here:
//!
//! ```compile_fail,E0502
//! use deltanet::safe::{Ref, RefMut};
//! let mut memory = vec![0.0f32; 64];
//! let out = RefMut::dense(&mut memory, [16, 2, 2, 1]);
//! let v = Ref::dense(&memory, [16, 2, 2, 1]);
//! drop(out);
//! ```

use crate::cpu::{self, Isa};
use crate::error::{Result, ensure};
use crate::params::{BetaKind, HeadMap, Params, SnapshotOrder, StateLayout};
use crate::plan::Plan;
use crate::problem::Problem;
use crate::tensor::{Dtype, Tensor};
use half::{bf16, f16};
use std::marker::PhantomData;

mod sealed {
    /// Keeps [`super::Element`] to the types whose memory is what their dtype says.
    pub trait Sealed {}
}

/// A type that tensors can have.
pub trait Element: Copy + sealed::Sealed {
    /// Its dtype.
    const DTYPE: Dtype;
}

/// Types of q, k, v and out.
pub trait Float: Element {}

/// Types of index tensors.
pub trait Integer: Element {}

macro_rules! elements {
    ($($type:ty: $dtype:ident, $kind:ident;)+) => {
        $(
            impl sealed::Sealed for $type {}
            impl Element for $type {
                const DTYPE: Dtype = Dtype::$dtype;
            }
            impl $kind for $type {}
        )+
    };
}
elements! {
    f32: F32, Float;
    f16: F16, Float;
    bf16: Bf16, Float;
    i32: I32, Integer;
    i64: I64, Integer;
}

/// A tensor to read, in a slice that it borrows. Axes are (channel, head, token, sequence), the innermost first.
#[derive(Clone, Copy, Debug)]
pub struct Ref<'a, T> {
    tensor: Tensor,
    memory: PhantomData<&'a [T]>,
}

/// A tensor to write, in a slice that it borrows exclusively.
#[derive(Debug)]
pub struct RefMut<'a, T> {
    tensor: Tensor,
    memory: PhantomData<&'a mut [T]>,
}

impl<'a, T: Element> Ref<'a, T> {
    /// A dense tensor: the slice has exactly its elements.
    pub fn dense(memory: &'a [T], ne: [usize; 4]) -> Result<Self> {
        let layout = Layout::dense(ne, 1, memory.len())?;
        Ok(Ref { tensor: layout.tensor::<T>(memory.as_ptr())?, memory: PhantomData })
    }

    /// A tensor with any strides, counted in elements; 0 repeats what the axis has.
    pub fn strided(memory: &'a [T], ne: [usize; 4], strides: [usize; 4]) -> Result<Self> {
        let layout = Layout::strided(ne, strides, 1, 0, memory.len())?;
        Ok(Ref { tensor: layout.tensor::<T>(memory.as_ptr())?, memory: PhantomData })
    }

    /// A vector, as index tensors are.
    pub fn vector(memory: &'a [T]) -> Result<Self> {
        Ref::dense(memory, [memory.len(), 1, 1, 1])
    }
}

impl<'a, T: Element> RefMut<'a, T> {
    /// A dense tensor: the slice has exactly its elements.
    pub fn dense(memory: &'a mut [T], ne: [usize; 4]) -> Result<Self> {
        let layout = Layout::dense(ne, 1, memory.len())?;
        Ok(RefMut { tensor: layout.tensor::<T>(memory.as_mut_ptr())?, memory: PhantomData })
    }

    /// A tensor with any strides, counted in elements, as long as no two of its elements are one.
    pub fn strided(memory: &'a mut [T], ne: [usize; 4], strides: [usize; 4]) -> Result<Self> {
        let layout = Layout::strided(ne, strides, 1, 0, memory.len())?;
        Ok(RefMut { tensor: layout.tensor::<T>(memory.as_mut_ptr())?, memory: PhantomData })
    }
}

/// Room for the states after the last tokens, newest first unless told otherwise.
#[derive(Debug)]
pub struct Snapshots<'a> {
    slot0: Tensor,
    stride: usize,
    slots: u32,
    keep: u32,
    order: SnapshotOrder,
    skip: u32,
    memory: PhantomData<&'a mut [f32]>,
}

impl<'a> Snapshots<'a> {
    /// `slots` dense states of shape `ne`, one behind the other.
    pub fn dense(memory: &'a mut [f32], ne: [usize; 4], slots: u32) -> Result<Self> {
        Snapshots::new(Layout::dense(ne, slots, memory.len())?, memory)
    }

    /// `slots` states with any strides, counted in elements, as long as no two of all their elements are one.
    pub fn strided(
        memory: &'a mut [f32],
        ne: [usize; 4],
        strides: [usize; 4],
        slots: u32,
        slot_stride: usize,
    ) -> Result<Self> {
        Snapshots::new(Layout::strided(ne, strides, slots, slot_stride, memory.len())?, memory)
    }

    fn new(layout: Layout, memory: &'a mut [f32]) -> Result<Self> {
        Ok(Snapshots {
            slot0: layout.tensor::<f32>(memory.as_mut_ptr())?,
            stride: layout.slot_stride_bytes::<f32>()?,
            slots: layout.slots,
            keep: layout.slots,
            order: SnapshotOrder::NewestFirst,
            skip: 0,
            memory: PhantomData,
        })
    }

    /// Keeps fewer states than there are slots.
    pub fn keep(self, keep: u32) -> Self {
        Snapshots { keep, ..self }
    }

    /// The order of the slots.
    pub fn order(self, order: SnapshotOrder) -> Self {
        Snapshots { order, ..self }
    }

    /// Leaves out the newest states.
    pub fn skip_newest(self, skip: u32) -> Self {
        Snapshots { skip, ..self }
    }
}

/// Extents and strides, in elements, that were checked to stay inside a slice.
struct Layout {
    ne: [usize; 4],
    strides: [usize; 4],
    slots: u32,
    slot_stride: usize,
}

impl Layout {
    fn dense(ne: [usize; 4], slots: u32, len: usize) -> Result<Layout> {
        let product = |n: &[usize]| n.iter().try_fold(1usize, |product, n| product.checked_mul(*n));
        let elements = product(&ne).and_then(|state| state.checked_mul(slots as usize));
        ensure!(
            elements == Some(len),
            Shape,
            "the slice has {len} elements; a dense tensor of ne {ne:?} and {slots} slots must fill it"
        );
        let mut strides = [1usize; 4];
        for axis in 1..4 {
            // An empty tensor may have any extents elsewhere; its strides are never used.
            strides[axis] = strides[axis - 1].saturating_mul(ne[axis - 1]);
        }
        Ok(Layout { ne, strides, slots, slot_stride: strides[3].saturating_mul(ne[3]) })
    }

    fn strided(ne: [usize; 4], strides: [usize; 4], slots: u32, slot_stride: usize, len: usize) -> Result<Layout> {
        let axes = ne.into_iter().zip(strides).chain([(slots as usize, slot_stride)]);
        let last = axes
            .clone()
            .try_fold(0usize, |last, (n, stride)| last.checked_add(n.saturating_sub(1).checked_mul(stride)?));
        ensure!(
            ne.contains(&0) || slots == 0 || last.is_some_and(|last| last < len),
            Stride,
            "ne {ne:?} with strides {strides:?} and {slots} slots {slot_stride} apart reaches outside its slice of {len}"
        );
        Ok(Layout { ne, strides, slots, slot_stride })
    }

    fn slot_stride_bytes<T: Element>(&self) -> Result<usize> {
        bytes::<T>(self.slot_stride, self.slots as usize)
    }

    /// The tensor at `data`, which must begin the slice that the layout was checked against.
    fn tensor<T: Element>(&self, data: *const T) -> Result<Tensor> {
        let mut tensor = Tensor { data: data.cast_mut().cast(), dtype: T::DTYPE as u32, ..Tensor::default() };
        for axis in 0..4 {
            let extent = i64::try_from(self.ne[axis]).ok();
            ensure!(extent.is_some(), Shape, "ne[{axis}] is {}; it must fit in 63 bits", self.ne[axis]);
            tensor.ne[axis] = extent.unwrap_or(0);
            tensor.nb[axis] = bytes::<T>(self.strides[axis], self.ne[axis])?;
        }
        Ok(tensor)
    }
}

/// An axis' stride in bytes; one that is never taken counts as 0.
fn bytes<T: Element>(stride: usize, extent: usize) -> Result<usize> {
    let bytes =
        if extent > 1 { stride.checked_mul(T::DTYPE.size()) } else { Some(stride.saturating_mul(T::DTYPE.size())) };
    ensure!(bytes.is_some(), Stride, "a stride is {stride}; it must be a number of bytes");
    Ok(bytes.unwrap_or(0))
}

/// One call of the operator, its tensors and its options. Without options: ggml's semantics, and no state at all is an
/// error when it runs.
#[derive(Debug)]
pub struct DeltaNet<'a> {
    params: Params,
    isa: Option<Isa>,
    memory: PhantomData<&'a mut [f32]>,
}

impl<'a> DeltaNet<'a> {
    /// The tokens' tensors, of the shapes that [`Params`] gives.
    pub fn new(
        q: Ref<'a, impl Float>,
        k: Ref<'a, impl Float>,
        v: Ref<'a, impl Float>,
        g: Ref<'a, f32>,
        beta: Ref<'a, f32>,
        out: RefMut<'a, impl Float>,
    ) -> Self {
        let (q, k, v, g) = (q.tensor, k.tensor, v.tensor, g.tensor);
        let params = Params { q, k, v, g, beta: beta.tensor, out: out.tensor, ..Params::default() };
        DeltaNet { params, isa: None, memory: PhantomData }
    }

    fn with(mut self, set: impl FnOnce(&mut Params)) -> Self {
        set(&mut self.params);
        self
    }

    /// The state `[S, S, Hv, B]`, or a pool with more rows, advanced in place.
    pub fn state(self, state: RefMut<'a, f32>) -> Self {
        self.with(|p| (p.state_in, p.state_out) = (state.tensor, state.tensor))
    }

    /// The state before the first token, only read.
    pub fn state_in(self, state: Ref<'a, f32>) -> Self {
        self.with(|p| p.state_in = state.tensor)
    }

    /// Where the state after the last token goes.
    pub fn state_out(self, state: RefMut<'a, f32>) -> Self {
        self.with(|p| p.state_out = state.tensor)
    }

    /// Keeps the states after the last tokens.
    pub fn snapshots(self, s: Snapshots<'a>) -> Self {
        self.with(|p| {
            (p.snapshots, p.snapshot_stride, p.snapshot_slots) = (s.slot0, s.stride, s.slots);
            (p.n_snapshots, p.snapshot_order, p.snapshot_skip) = (s.keep, s.order as u32, s.skip);
        })
    }

    /// Row of the state pool that each sequence reads.
    pub fn rows_in(self, rows: Ref<'a, impl Integer>) -> Self {
        self.with(|p| p.rows_in = rows.tensor)
    }

    /// Row of the state pool that each sequence writes.
    pub fn rows_out(self, rows: Ref<'a, impl Integer>) -> Self {
        self.with(|p| p.rows_out = rows.tensor)
    }

    /// Where each sequence's tokens begin in a batch of varying lengths, and where the last one's end.
    pub fn cu_seqlens(self, offsets: Ref<'a, impl Integer>) -> Self {
        self.with(|p| p.cu_seqlens = offsets.tensor)
    }

    /// Which key head a value head uses.
    pub fn head_map(self, map: HeadMap) -> Self {
        self.with(|p| p.head_map = map as u32)
    }

    /// Which channel axis of states and snapshots comes first.
    pub fn state_layout(self, layout: StateLayout) -> Self {
        self.with(|p| p.state_layout = layout as u32)
    }

    /// What the beta tensor holds.
    pub fn beta_kind(self, kind: BetaKind) -> Self {
        self.with(|p| p.beta_kind = kind as u32)
    }

    /// L2-normalises q and k, with this epsilon under the root.
    pub fn qk_norm(self, eps: f32) -> Self {
        self.with(|p| (p.qk_norm, p.qk_norm_eps) = (1, eps))
    }

    /// Factor on the output; 0 means 1/sqrt(S).
    pub fn scale(self, scale: f32) -> Self {
        self.with(|p| p.scale = scale)
    }

    /// Upper clamp on g; 0 means none.
    pub fn gate_max(self, max: f32) -> Self {
        self.with(|p| p.gate_max = max)
    }

    /// Clamp on the state after every token; 0 means none.
    pub fn state_clamp(self, limit: f32) -> Self {
        self.with(|p| p.state_clamp = limit)
    }

    /// An instruction set other than the one in force.
    pub fn isa(self, isa: Isa) -> Self {
        DeltaNet { isa: Some(isa), ..self }
    }

    /// Checks the call without making it.
    pub fn problem(&self) -> Result<Problem> {
        // SAFETY: index tensors are as large as described, since their layouts were checked against their slices.
        unsafe { Problem::new(&self.params) }
    }

    /// How the call would be run.
    pub fn plan(&self) -> Result<Plan> {
        self.plan_of(&self.problem()?)
    }

    fn plan_of(&self, problem: &Problem) -> Result<Plan> {
        Plan::new(problem, self.isa.map_or_else(Isa::in_force, Ok)?)
    }

    /// Computes outputs and states with that many threads of the library's own; 0 means one a processor. After an
    /// error nothing was written.
    pub fn run(&mut self, threads: usize) -> Result<()> {
        let problem = self.problem()?;
        // SAFETY: every tensor lies inside a slice that is borrowed for as long as `self`: shared for what is read,
        // exclusively for what is written, or both for a state in place, which the validator lets through on purpose.
        unsafe { cpu::run(&problem, &self.plan_of(&problem)?, threads) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Status;
    use crate::reference;

    const S: usize = 32;
    const HK: usize = 2;
    const HV: usize = 4;
    const T: usize = 5;
    const B: usize = 3;
    const STATE: usize = S * S * HV;

    /// Values without a pattern, in [-1, 1).
    fn draw(n: usize, seed: u32) -> Vec<f32> {
        let mut x = seed.wrapping_mul(2_654_435_769) | 1;
        let mut next = || {
            x = x.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (x >> 8) as f32 / (1 << 23) as f32 - 1.0
        };
        (0..n).map(|_| next()).collect()
    }

    /// The inputs of a call, B sequences of T tokens.
    struct Inputs {
        q: Vec<f32>,
        k: Vec<f32>,
        v: Vec<f32>,
        g: Vec<f32>,
        beta: Vec<f32>,
    }

    impl Inputs {
        fn new() -> Inputs {
            let scaled = |n, seed, factor: f32| draw(n, seed).into_iter().map(|x| x * factor).collect();
            Inputs {
                q: draw(S * HK * T * B, 1),
                k: scaled(S * HK * T * B, 2, 0.3),
                v: draw(S * HV * T * B, 3),
                g: draw(HV * T * B, 4).into_iter().map(|x| x - 1.0).collect(),
                beta: draw(HV * T * B, 5).into_iter().map(|x| 0.5 + 0.5 * x).collect(),
            }
        }

        /// A call on all sequences.
        fn call<'a>(&'a self, out: &'a mut [f32]) -> DeltaNet<'a> {
            self.shaped(out, T, B)
        }

        fn shaped<'a>(&'a self, out: &'a mut [f32], t: usize, b: usize) -> DeltaNet<'a> {
            DeltaNet::new(
                Ref::dense(&self.q, [S, HK, t, b]).unwrap(),
                Ref::dense(&self.k, [S, HK, t, b]).unwrap(),
                Ref::dense(&self.v, [S, HV, t, b]).unwrap(),
                Ref::dense(&self.g, [1, HV, t, b]).unwrap(),
                Ref::dense(&self.beta, [1, HV, t, b]).unwrap(),
                RefMut::dense(out, [S, HV, t, b]).unwrap(),
            )
        }
    }

    /// Runs a call and compares it with the oracle.
    fn check(mut call: DeltaNet, bound: f64) {
        let problem = call.problem().unwrap();
        // SAFETY: the call borrows all of the problem's memory.
        let expected = unsafe { reference::evaluate(&problem) };
        call.run(3).unwrap();
        // SAFETY: as above.
        let nmse = unsafe { reference::compare(&problem, &expected) };
        assert!(nmse.within(bound), "{nmse:?}");
    }

    fn states() -> [usize; 4] {
        [S, S, HV, B]
    }

    #[test]
    fn options_reach_the_kernels() {
        let inputs = Inputs::new();
        let state = draw(STATE * B, 6);
        let (mut out, mut after) = (vec![f32::NAN; S * HV * T * B], vec![f32::NAN; STATE * B]);
        let mut slots = vec![f32::NAN; 2 * STATE * B];
        let call = inputs.call(&mut out).state_in(Ref::dense(&state, states()).unwrap());
        let call = call.state_out(RefMut::dense(&mut after, states()).unwrap());
        let kept = Snapshots::dense(&mut slots, states(), 2).unwrap().order(SnapshotOrder::OldestFirst).skip_newest(1);
        let call = call.snapshots(kept).head_map(HeadMap::Grouped).state_layout(StateLayout::ValueContiguous);
        let call = call.beta_kind(BetaKind::Logit).qk_norm(1e-6).scale(0.7).gate_max(-0.1).state_clamp(0.8);
        let problem = call.problem().unwrap();
        assert_eq!((problem.head_map(), problem.beta_kind()), (HeadMap::Grouped, BetaKind::Logit));
        assert_eq!((problem.scale(), problem.gate_max(), problem.state_clamp()), (0.7, -0.1, 0.8));
        assert_eq!(problem.qk_norm(), Some(1e-6));
        let plan = call.isa(Isa::Scalar);
        assert_eq!(plan.plan().unwrap().isa(), Isa::Scalar);
        check(plan, 1e-11);
        assert!(slots.iter().all(|x| x.is_finite()));
    }

    #[test]
    fn sixteen_bit_tensors() {
        let inputs = Inputs::new();
        let q: Vec<bf16> = inputs.q.iter().map(|x| bf16::from_f32(*x)).collect();
        let k: Vec<f16> = inputs.k.iter().map(|x| f16::from_f32(*x)).collect();
        let mut out = vec![f16::NAN; S * HV * T * B];
        let mut state = draw(STATE * B, 6);
        let call = DeltaNet::new(
            Ref::dense(&q, [S, HK, T, B]).unwrap(),
            Ref::dense(&k, [S, HK, T, B]).unwrap(),
            Ref::dense(&inputs.v, [S, HV, T, B]).unwrap(),
            Ref::dense(&inputs.g, [1, HV, T, B]).unwrap(),
            Ref::dense(&inputs.beta, [1, HV, T, B]).unwrap(),
            RefMut::dense(&mut out, [S, HV, T, B]).unwrap(),
        );
        // Half a unit in the last place of 11 bits, squared.
        check(call.state(RefMut::dense(&mut state, states()).unwrap()), 1e-7);
    }

    #[test]
    fn rows_of_a_pool() {
        let inputs = Inputs::new();
        let rows = 5;
        let start = draw(STATE * rows, 6);
        let (rows_in, rows_out) = ([4i32, 0, 2], [1i64, 0, 2]);
        let (mut out, mut pool) = (vec![f32::NAN; S * HV * T * B], start.clone());
        let call = inputs.call(&mut out).state(RefMut::dense(&mut pool, [S, S, HV, rows]).unwrap());
        check(call.rows_in(Ref::vector(&rows_in).unwrap()).rows_out(Ref::vector(&rows_out).unwrap()), 1e-11);
        for row in 0..rows {
            let at = row * STATE..(row + 1) * STATE;
            assert_eq!(pool[at.clone()] == start[at], row == 3 || row == 4, "row {row}");
        }
        let before = out.clone();
        for (rows_in, status) in [([4i32, 0, 5], Status::Row), ([-1, 0, 2], Status::Row), ([1, 0, 0], Status::Row)] {
            let mut same = pool.clone();
            let call = inputs.call(&mut out).state(RefMut::dense(&mut same, [S, S, HV, rows]).unwrap());
            let mut call = call.rows_in(Ref::vector(&rows_in).unwrap()).rows_out(Ref::vector(&rows_out).unwrap());
            assert_eq!(call.run(2).unwrap_err().status(), status, "{rows_in:?}");
            assert!(same == pool && out == before, "{rows_in:?} was written");
        }
    }

    #[test]
    fn ragged_batch_is_its_sequences() {
        let inputs = Inputs::new();
        let (mut out, mut state) = (vec![f32::NAN; S * HV * T * B], draw(STATE * 2, 6));
        let offsets = [0i64, 4, (T * B) as i64];
        let call = inputs.shaped(&mut out, T * B, 1).state(RefMut::dense(&mut state, [S, S, HV, 2]).unwrap());
        check(call.cu_seqlens(Ref::vector(&offsets).unwrap()), 1e-11);
        let call = inputs.shaped(&mut out, T * B, 1).state(RefMut::dense(&mut state, [S, S, HV, 2]).unwrap());
        let error = call.cu_seqlens(Ref::vector(&[0i32, 4, 16]).unwrap()).run(1).unwrap_err();
        assert_eq!(error.status(), Status::Sequences);
        assert!(error.message().contains("cu_seqlens[2] is 16"), "{error}");
    }

    #[test]
    fn strides_are_those_of_the_slice() {
        let inputs = Inputs::new();
        let (mut plain, mut out) = (vec![f32::NAN; S * HV * T * B], vec![f32::NAN; 2 * S * HV * T * B]);
        let state = draw(STATE * B, 6);
        let state_in = || Ref::dense(&state, states()).unwrap();
        inputs.call(&mut plain).state_in(state_in()).run(2).unwrap();
        let call = DeltaNet::new(
            Ref::dense(&inputs.q, [S, HK, T, B]).unwrap(),
            Ref::dense(&inputs.k, [S, HK, T, B]).unwrap(),
            Ref::dense(&inputs.v, [S, HV, T, B]).unwrap(),
            Ref::dense(&inputs.g, [1, HV, T, B]).unwrap(),
            Ref::dense(&inputs.beta, [1, HV, T, B]).unwrap(),
            RefMut::strided(&mut out, [S, HV, T, B], [2, 2 * S, 2 * S * HV, 2 * S * HV * T]).unwrap(),
        );
        call.state_in(state_in()).run(2).unwrap();
        assert!(out.chunks(2).zip(&plain).all(|(pair, x)| pair[0] == *x && pair[1].is_nan()));
    }

    #[test]
    fn nothing_reaches_outside_its_slice() {
        let status = |result: Result<Ref<f32>>| result.unwrap_err().status();
        let memory = vec![0.0f32; 64];
        assert!(Ref::strided(&memory, [16, 2, 2, 1], [1, 16, 32, 0]).is_ok());
        assert!(Ref::strided(&memory, [16, 2, 2, 100], [1, 16, 32, 0]).is_ok());
        assert_eq!(status(Ref::strided(&memory, [16, 2, 2, 1], [1, 17, 32, 0])), Status::Stride);
        assert_eq!(status(Ref::strided(&memory, [16, 2, 2, 2], [1, 16, 32, 1])), Status::Stride);
        assert_eq!(status(Ref::strided(&memory, [16, usize::MAX, 2, 1], [1, usize::MAX, 32, 0])), Status::Stride);
        assert_eq!(status(Ref::strided(&memory, [2, 2, 1, 1], [usize::MAX, 1, 0, 0])), Status::Stride);
        assert_eq!(status(Ref::strided(&memory[..0], [1, 1, 1, 1], [1; 4])), Status::Stride);
        assert_eq!(status(Ref::dense(&memory, [16, 2, 1, 1])), Status::Shape);
        assert_eq!(status(Ref::dense(&memory, [16, 2, 4, 1])), Status::Shape);
        assert_eq!(status(Ref::dense(&memory, [1 << 32, 1 << 32, 1, 1])), Status::Shape);
        assert_eq!(status(Ref::strided(&memory, [0, usize::MAX, 1, 1], [1; 4])), Status::Shape);
        let mut slots = vec![0.0f32; 200];
        assert!(Snapshots::strided(&mut slots, [8, 8, 1, 1], [1, 8, 0, 0], 3, 68).is_ok());
        assert!(Snapshots::strided(&mut slots, [8, 8, 1, 1], [1, 8, 0, 0], 3, 69).is_err());
        assert!(Snapshots::dense(&mut slots, [8, 8, 1, 1], 3).is_err());
        assert!(Snapshots::dense(&mut slots[..192], [8, 8, 1, 1], 3).is_ok());
    }

    #[test]
    fn outputs_that_share_elements_are_refused() {
        let inputs = Inputs::new();
        let (mut out, state) = (vec![0.0f32; S * HV * T * B], vec![0.0f32; STATE * B]);
        let before = out.clone();
        let call = DeltaNet::new(
            Ref::dense(&inputs.q, [S, HK, T, B]).unwrap(),
            Ref::dense(&inputs.k, [S, HK, T, B]).unwrap(),
            Ref::dense(&inputs.v, [S, HV, T, B]).unwrap(),
            Ref::dense(&inputs.g, [1, HV, T, B]).unwrap(),
            Ref::dense(&inputs.beta, [1, HV, T, B]).unwrap(),
            RefMut::strided(&mut out, [S, HV, T, B], [1, S, 0, S * HV]).unwrap(),
        );
        let error = call.state_in(Ref::dense(&state, states()).unwrap()).run(1).unwrap_err();
        assert_eq!(error.status(), Status::Overlap);
        assert_eq!(out, before);
    }

    #[test]
    fn a_call_needs_a_state_and_can_be_made_again() {
        let inputs = Inputs::new();
        let mut out = vec![0.0f32; S * HV * T * B];
        assert_eq!(inputs.call(&mut out).run(1).unwrap_err().status(), Status::Shape);
        let (mut twice, mut once) = (vec![0.0f32; STATE * B], vec![0.0f32; STATE * B]);
        let mut call = inputs.call(&mut out).state(RefMut::dense(&mut twice, states()).unwrap());
        call.run(1).unwrap();
        call.run(2).unwrap();
        inputs.call(&mut out).state(RefMut::dense(&mut once, states()).unwrap()).run(1).unwrap();
        inputs.call(&mut out).state(RefMut::dense(&mut once, states()).unwrap()).run(1).unwrap();
        assert_eq!(once, twice);
    }
}
