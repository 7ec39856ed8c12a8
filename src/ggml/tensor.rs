//! From a GATED_DELTA_NET node to a [`Problem`].
//!
//! Sources: q, k `[S, Hk, T, Bq]`, v `[S, Hv, T, B]`, g `[1 or S, Hv, T, B]`, beta `[1, Hv, T, B]`, state
//! `[S, S, Hv, B]`. The result holds the outputs `[S, Hv, T, B]` and behind them K states per sequence, slot 0 the
//! newest. Here is only what the [`Problem`] cannot know: which tensors these are and where the states lie.

use super::abi::{TYPE_F32, Tensor as Node};
use crate::cpu::Isa;
use crate::error::Result;
use crate::params::{Params, SnapshotOrder};
use crate::plan::Plan;
use crate::problem::Problem;
use crate::tensor::{Dtype, Tensor};
use std::ffi::c_void;

/// The parts of a node, its own consistency checked.
#[derive(Clone, Copy)]
pub struct Operands {
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    out: Tensor,
    pub state: *mut Node,
    pub head_size: usize,
    pub key_heads: usize,
    pub value_heads: usize,
    pub tokens: usize,
    pub sequences: usize,
    pub qk_sequences: usize,
    pub channel_gate: bool,
    /// K.
    pub snapshots: usize,
    /// Bytes of the outputs, which the states follow.
    pub out_bytes: usize,
}

/// States `[S, S, Hv, rows]` in somebody's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct States {
    pub data: *mut u8,
    pub rows: usize,
    pub row_stride: usize,
}

/// Where a run reads and writes states: in the node's own tensors, or in the cache itself.
pub struct Places {
    pub source: States,
    /// Which row of `source` each sequence reads; none for row b.
    pub rows_in: Option<Box<[i32]>>,
    /// Slot 0, the state after the last token.
    pub target: States,
    /// Which row of `target` each sequence writes; none for row b.
    pub rows_out: Option<Box<[i32]>>,
    /// Bytes from a state of slot i to that of slot i + 1.
    pub slot_stride: usize,
}

impl Places {
    /// The state of `sequence` in `slot`, where a run has written it.
    pub fn written(&self, slot: usize, sequence: usize) -> *const u8 {
        let row = self.rows_out.as_ref().map_or(sequence, |rows| rows[sequence] as usize);
        self.target.data.wrapping_add(slot * self.slot_stride + row * self.target.row_stride)
    }
}

/// Reads a node's sources; the error says what is not as this library knows it. `declared` is K as the host says it,
/// 0 where it says nothing: before K existed, one state is what a node meant.
///
/// # Safety
/// `node` is a node of this operator, of a host whose tensors have the known layout.
pub unsafe fn operands(node: *const Node, declared: i32) -> std::result::Result<Operands, String> {
    // SAFETY: passed on.
    let operands = unsafe { describe(node, declared)? };
    // SAFETY: `describe` found the node and its sources present.
    let without = unsafe { (&(*node).src)[..6].iter().position(|source| (**source).data.is_null()) };
    match without {
        Some(source) => Err(format!("source {source} has no memory")),
        None if operands.out.data.is_null() => Err("the result has no memory".into()),
        None => Ok(operands),
    }
}

/// Bytes between the addresses that stand for memory to come, so that no tensor reaches another one's.
const APART: usize = 1 << 52;

/// Whether a node that may have no memory yet is one that a run will accept.
///
/// # Safety
/// As for [`operands`].
pub unsafe fn supports(node: *const Node, declared: i32, options: &Params) -> std::result::Result<(), String> {
    // SAFETY: passed on.
    let mut operands = unsafe { describe(node, declared)? };
    // Addresses far apart stand for memory to come: nothing is read or written through them.
    let mut place = 0;
    let mut next = || {
        place += APART;
        place as *mut c_void
    };
    for tensor in [&mut operands.q, &mut operands.k, &mut operands.v, &mut operands.g, &mut operands.beta] {
        tensor.data = next();
    }
    operands.out.data = next();
    let mut places = operands.own_places();
    places.source.data = next().cast();
    // SAFETY: there are no rows.
    let problem = unsafe { operands.problem_with(&places, options) }.map_err(|error| error.to_string())?;
    Plan::new(&problem, Isa::in_force().map_err(|error| error.to_string())?).map_err(|error| error.to_string())?;
    Ok(())
}

/// # Safety
/// As for [`operands`].
unsafe fn describe(node: *const Node, declared: i32) -> std::result::Result<Operands, String> {
    // SAFETY: the caller's promise.
    let dst = unsafe { &*node };
    let mut sources = [std::ptr::null_mut::<Node>(); 6];
    for (at, source) in sources.iter_mut().enumerate() {
        *source = dst.src[at];
        if source.is_null() {
            return Err(format!("source {at} is missing"));
        }
    }
    if dst.src[6..].iter().any(|source| !source.is_null()) {
        return Err("it has more than six sources".into());
    }
    // SAFETY: sources of a node are tensors.
    let [q, k, v, g, beta, state] = sources.map(|source| unsafe { &*source });
    for (name, tensor) in
        [("q", q), ("k", k), ("v", v), ("g", g), ("beta", beta), ("state", state), ("the result", dst)]
    {
        if tensor.dtype != TYPE_F32 {
            return Err(format!("{name} has type {}, not f32", tensor.dtype));
        }
        if tensor.elements() == 0 {
            return Err(format!("{name} is empty"));
        }
    }
    let [s, hv, t, b] = v.ne.map(|ne| ne as usize);
    let snapshots = match declared {
        0 => 1,
        count => usize::try_from(count).map_err(|_| format!("K is {count}"))?,
    };
    let state_elements = s.saturating_mul(s).saturating_mul(hv).saturating_mul(b);
    let wanted = state_elements.saturating_mul(snapshots).saturating_add(v.elements());
    if !dst.is_contiguous() || dst.elements() != wanted {
        return Err(format!("the result has {} elements; K = {snapshots} snapshots need {wanted}", dst.elements()));
    }
    if state.elements() != state_elements || !state.is_contiguous() {
        return Err(format!("the state has shape {:?} and strides {:?}", state.ne, state.nb));
    }
    let out_bytes = v.elements() * size_of::<f32>();
    Ok(Operands {
        q: view(q),
        k: view(k),
        v: view(v),
        g: view(g),
        beta: view(beta),
        out: Tensor::dense(dst.data, Dtype::F32, v.ne),
        state: sources[5],
        head_size: s,
        key_heads: q.ne[1] as usize,
        value_heads: hv,
        tokens: t,
        sequences: b,
        qk_sequences: q.ne[3] as usize,
        channel_gate: g.ne[0] != 1,
        snapshots,
        out_bytes,
    })
}

impl Operands {
    /// Elements of one sequence's state.
    pub fn state_elements(&self) -> usize {
        self.head_size * self.head_size * self.value_heads
    }

    /// Bytes of one sequence's state.
    pub fn state_bytes(&self) -> usize {
        self.state_elements() * size_of::<f32>()
    }

    /// How many slots a run writes.
    pub fn written_slots(&self) -> usize {
        self.snapshots.min(self.tokens)
    }

    /// The states where the node itself has them: the gathered source, and behind the outputs.
    pub fn own_places(&self) -> Places {
        let row_stride = self.state_bytes();
        // SAFETY: `operands` checked that the source is there.
        let source = unsafe { (*self.state).data }.cast();
        Places {
            source: States { data: source, rows: self.sequences, row_stride },
            rows_in: None,
            target: States {
                data: self.out.data.cast::<u8>().wrapping_add(self.out_bytes),
                rows: self.sequences,
                row_stride,
            },
            rows_out: None,
            slot_stride: row_stride * self.sequences,
        }
    }

    /// The checked problem, with ggml's semantics.
    ///
    /// # Safety
    /// The rows in `places` stay where they are while the problem is in use.
    pub unsafe fn problem(&self, places: &Places) -> Result<Problem> {
        // SAFETY: passed on.
        unsafe { self.problem_with(places, &Params::default()) }
    }

    /// The checked problem, with the options of `options`; its tensors do not matter.
    ///
    /// # Safety
    /// As for [`Operands::problem`].
    pub unsafe fn problem_with(&self, places: &Places, options: &Params) -> Result<Problem> {
        let mut params = Params {
            q: self.q,
            k: self.k,
            v: self.v,
            g: self.g,
            beta: self.beta,
            out: self.out,
            state_in: self.states(&places.source),
            state_out: self.states(&places.target),
            rows_in: index(places.rows_in.as_deref()),
            rows_out: index(places.rows_out.as_deref()),
            cu_seqlens: Tensor::default(),
            snapshots: Tensor::default(),
            n_snapshots: 0,
            ..*options
        };
        if self.snapshots > 1 {
            // Slot 0 is the final state, which may go where the first one came from; the others start at slot 1.
            let slot1 = places.written(1, 0).cast_mut();
            params.snapshots =
                self.states(&States { data: slot1, rows: self.sequences, row_stride: places.target.row_stride });
            params.snapshot_stride = places.slot_stride;
            params.snapshot_slots = (self.snapshots - 1) as u32;
            params.n_snapshots = params.snapshot_slots;
            params.snapshot_skip = 1;
            params.snapshot_order = SnapshotOrder::NewestFirst as u32;
        }
        // SAFETY: the index tensors are `places`' own.
        unsafe { Problem::new(&params) }
    }

    fn states(&self, states: &States) -> Tensor {
        let s = self.head_size;
        let mut tensor = Tensor::dense(
            states.data.cast(),
            Dtype::F32,
            [s as i64, s as i64, self.value_heads as i64, states.rows as i64],
        );
        tensor.nb[3] = states.row_stride;
        tensor
    }
}

fn view(node: &Node) -> Tensor {
    Tensor { data: node.data, ne: node.ne, nb: node.nb, dtype: Dtype::F32 as u32, reserved: 0 }
}

fn index(rows: Option<&[i32]>) -> Tensor {
    rows.map_or_else(Tensor::default, |rows| {
        Tensor::dense(rows.as_ptr().cast_mut().cast::<c_void>(), Dtype::I32, [rows.len() as i64, 1, 1, 1])
    })
}
