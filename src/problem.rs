//! The one validator: a [`Problem`] is a call whose every rule was checked. Nothing behind it checks again.

use crate::error::{Error, Result, Status, ensure};
use crate::params::{BetaKind, HeadMap, Params, Precision, SnapshotOrder, StateLayout};
use crate::tensor::{Dtype, Tensor, View};

/// Largest head size; kernels keep a few rows of this length on their stack.
pub const MAX_HEAD_SIZE: usize = 1024;

/// Largest number of heads of all sequences together, and of tokens: products with a head size stay inside 64 bits, and
/// a count in strides of 0 cannot ask for years of work.
const MAX_COUNT: usize = i32::MAX as usize;

/// Where the tensors live, which decides whether index tensors can be read while validating.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// Memory that this thread can read.
    Host,
    /// CUDA device memory: kernels skip sequences whose index is out of range.
    Device,
}

/// The states of all sequences, addressed by key channel, value channel, head and row whatever their layout.
#[derive(Clone, Copy, Debug)]
pub(crate) struct StateView {
    pub data: *mut f32,
    /// Bytes between neighbouring key channels.
    pub nb_k: usize,
    /// Bytes between neighbouring value channels.
    pub nb_v: usize,
    pub nb_head: usize,
    pub nb_row: usize,
    pub rows: usize,
}

impl StateView {
    /// The k = v = 0 element of a head's state.
    #[inline(always)]
    pub fn head(&self, head: usize, row: usize) -> *mut f32 {
        self.data.wrapping_byte_add(head * self.nb_head + row * self.nb_row)
    }
}

/// A checked vector of row numbers or token offsets.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Index(View);

impl Index {
    /// The first element.
    #[cfg(feature = "cuda")]
    pub fn data(&self) -> *mut u8 {
        self.0.data
    }

    #[cfg(feature = "cuda")]
    pub fn dtype(&self) -> Dtype {
        self.0.dtype
    }

    /// Element `at`, which must be below the checked length. Host memory only.
    #[inline]
    pub fn get(&self, at: usize) -> i64 {
        debug_assert!(at < self.0.ne[0]);
        let element = self.0.at([at, 0, 0, 0]);
        // SAFETY: the view was checked (aligned, i32 or i64) and the caller described `ne[0]` readable elements.
        unsafe {
            match self.0.dtype {
                Dtype::I64 => element.cast::<i64>().read(),
                _ => element.cast::<i32>().read().into(),
            }
        }
    }
}

/// Which states are kept on the way, and where.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Snapshots {
    pub slot0: StateView,
    pub stride: usize,
    pub count: usize,
    pub order: SnapshotOrder,
    pub skip: usize,
}

impl Snapshots {
    /// The slot that the state after token `t` of `tokens` belongs in, if it is kept.
    #[inline]
    pub fn slot(&self, t: usize, tokens: usize) -> Option<usize> {
        let kept = tokens.saturating_sub(self.skip);
        let first = kept.saturating_sub(self.count);
        (first..kept).contains(&t).then(|| match self.order {
            SnapshotOrder::NewestFirst => kept - 1 - t,
            SnapshotOrder::OldestFirst => t - first,
        })
    }

    /// The first of `tokens` tokens whose state is kept, or `tokens`.
    pub fn first_token(&self, tokens: usize) -> usize {
        let kept = tokens.saturating_sub(self.skip);
        if self.count == 0 || kept == 0 { tokens } else { kept.saturating_sub(self.count) }
    }

    /// The view of one slot.
    #[inline]
    pub fn view(&self, slot: usize) -> StateView {
        StateView { data: self.slot0.data.wrapping_byte_add(slot * self.stride), ..self.slot0 }
    }
}

/// A validated call. It holds the caller's pointers: running it is unsafe, looking at it is not.
#[derive(Clone, Copy, Debug)]
pub struct Problem {
    pub(crate) q: View,
    pub(crate) k: View,
    pub(crate) v: View,
    pub(crate) g: View,
    pub(crate) beta: View,
    pub(crate) out: View,
    pub(crate) state_in: StateView,
    pub(crate) state_out: Option<StateView>,
    pub(crate) snapshots: Option<Snapshots>,
    pub(crate) rows_in: Option<Index>,
    pub(crate) rows_out: Option<Index>,
    pub(crate) cu_seqlens: Option<Index>,
    head_size: usize,
    key_heads: usize,
    value_heads: usize,
    tokens: usize,
    sequences: usize,
    qk_sequences: usize,
    channel_gate: bool,
    head_map: HeadMap,
    beta_kind: BetaKind,
    scale: f32,
    gate_max: f32,
    state_clamp: f32,
    qk_norm: Option<f32>,
    precision: Precision,
}

// SAFETY: a Problem is plain data; the pointers in it are used only by `run` functions, whose contracts cover threads.
unsafe impl Send for Problem {}
// SAFETY: as above; sharing a Problem shares no reference to the memory it points to.
unsafe impl Sync for Problem {}

const FLOATS: &[Dtype] = &[Dtype::F32, Dtype::F16, Dtype::Bf16];
const F32: &[Dtype] = &[Dtype::F32];
const INDEX: &[Dtype] = &[Dtype::I32, Dtype::I64];

impl Problem {
    /// Checks `params` for memory that this thread can read. Reads index tensors, touches no other data.
    ///
    /// # Safety
    /// rows_in, rows_out and cu_seqlens, where given, point to memory as large as described.
    pub unsafe fn new(params: &Params) -> Result<Problem> {
        // SAFETY: passed on.
        unsafe { Problem::at(params, Place::Host) }
    }

    /// Checks `params` for memory at `place`.
    ///
    /// # Safety
    /// At [`Place::Host`]: as for [`Problem::new`]. At [`Place::Device`] nothing is read.
    pub unsafe fn at(params: &Params, place: Place) -> Result<Problem> {
        let problem = Problem::describe(params)?;
        if place == Place::Host {
            problem.check_indices()?;
        }
        Ok(problem)
    }

    /// Checks everything but what the index tensors say; reads no tensor.
    fn describe(params: &Params) -> Result<Problem> {
        let p = params;
        let head_map = choice("head_map", p.head_map, &[HeadMap::Tiled, HeadMap::Grouped])?;
        let layout =
            choice("state_layout", p.state_layout, &[StateLayout::KeyContiguous, StateLayout::ValueContiguous])?;
        let beta_kind = choice("beta_kind", p.beta_kind, &[BetaKind::Value, BetaKind::Logit])?;
        let order =
            choice("snapshot_order", p.snapshot_order, &[SnapshotOrder::NewestFirst, SnapshotOrder::OldestFirst])?;
        let precision = choice("precision", p.precision, &[Precision::Exact, Precision::Tf32, Precision::Bf16])?;
        let qk_norm = choice("qk_norm", p.qk_norm, &[false, true])?;

        let q = View::new("q", &p.q, FLOATS)?;
        let k = View::new("k", &p.k, FLOATS)?;
        let v = View::new("v", &p.v, FLOATS)?;
        let g = View::new("g", &p.g, F32)?;
        let beta = View::new("beta", &p.beta, F32)?;
        let out = View::new("out", &p.out, FLOATS)?;
        let rows_in = index("rows_in", &p.rows_in)?;
        let rows_out = index("rows_out", &p.rows_out)?;
        let cu_seqlens = index("cu_seqlens", &p.cu_seqlens)?;

        let [head_size, value_heads, tokens, token_sequences] = v.ne;
        let [_, key_heads, _, qk_sequences] = q.ne;
        ensure!(
            head_size > 0 && head_size.is_multiple_of(16) && head_size <= MAX_HEAD_SIZE,
            Shape,
            "v.ne[0] (the head size) is {head_size}; it must be a multiple of 16 from 16 to {MAX_HEAD_SIZE}"
        );
        ensure!(key_heads > 0, Shape, "q.ne[1] (the number of key heads) is 0; it must be positive");
        ensure!(
            value_heads > 0 && value_heads.is_multiple_of(key_heads),
            Shape,
            "v.ne[1] (the number of value heads) is {value_heads}; it must be a positive multiple of q.ne[1], {key_heads}"
        );
        let sequences = match &cu_seqlens {
            None => token_sequences,
            Some(offsets) => {
                ensure!(
                    token_sequences == 1,
                    Shape,
                    "v.ne[3] is {token_sequences}; with cu_seqlens it must be 1, all tokens in one row"
                );
                offsets.0.ne[0].saturating_sub(1)
            }
        };
        ensure!(
            tokens <= MAX_COUNT,
            Shape,
            "v.ne[2] (the number of tokens) is {tokens}; it must be at most {MAX_COUNT}"
        );
        ensure!(
            value_heads.checked_mul(sequences).is_some_and(|heads| heads <= MAX_COUNT),
            Shape,
            "v.ne[1] is {value_heads} and {} is {}; value heads times sequences must be at most {MAX_COUNT}",
            if cu_seqlens.is_some() { "cu_seqlens.ne[0]" } else { "v.ne[3]" },
            if cu_seqlens.is_some() { sequences + 1 } else { sequences }
        );
        shape("q", &q, [head_size, key_heads, tokens, qk_sequences])?;
        shape("k", &k, q.ne)?;
        // Of 0, only 0 is a multiple.
        ensure!(
            token_sequences.is_multiple_of(qk_sequences),
            Shape,
            "q.ne[3] is {qk_sequences}; it must divide the number of sequences, {token_sequences}"
        );
        let channel_gate = g.ne[0] != 1;
        ensure!(
            !channel_gate || g.ne[0] == head_size,
            Shape,
            "g.ne[0] is {}; it must be 1 (one decay a head) or the head size {head_size} (one a key channel)",
            g.ne[0]
        );
        shape("g", &g, [g.ne[0], value_heads, tokens, token_sequences])?;
        shape("beta", &beta, [1, value_heads, tokens, token_sequences])?;
        shape("out", &out, v.ne)?;

        let state = |name: &str, tensor: &Tensor, rows: Option<&Index>| -> Result<(StateView, View)> {
            let view = View::new(name, tensor, F32)?;
            let wanted = if rows.is_some() { view.ne[3] } else { sequences };
            shape(name, &view, [head_size, head_size, value_heads, wanted])?;
            let (nb_k, nb_v) = match layout {
                StateLayout::KeyContiguous => (view.nb[0], view.nb[1]),
                StateLayout::ValueContiguous => (view.nb[1], view.nb[0]),
            };
            let [_, _, nb_head, nb_row] = view.nb;
            Ok((StateView { data: view.data.cast(), nb_k, nb_v, nb_head, nb_row, rows: wanted }, view))
        };
        let (state_in, state_in_view) = state("state_in", &p.state_in, rows_in.as_ref())?;
        let state_out = if p.state_out.data.is_null() {
            ensure!(
                rows_out.is_none() || sequences == 0,
                NullPointer,
                "state_out.data is null; with rows_out it must point to the pool"
            );
            None
        } else {
            Some(state("state_out", &p.state_out, rows_out.as_ref())?)
        };
        let snapshots = match (p.snapshots.data.is_null(), p.n_snapshots) {
            (_, 0) => None,
            (true, count) => {
                let words = format_args!("snapshots.data is null; n_snapshots is {count} and needs a buffer");
                return Err(Error::compose(Status::Snapshots, words));
            }
            (false, count) => {
                let (slot0, view) = state("snapshots", &p.snapshots, None)?;
                ensure!(
                    count <= p.snapshot_slots,
                    Snapshots,
                    "n_snapshots is {count}; it must not exceed snapshot_slots, the {} that the buffer holds",
                    p.snapshot_slots
                );
                ensure!(
                    p.snapshot_stride.is_multiple_of(4),
                    Misaligned,
                    "snapshot_stride is {}; it must be a multiple of the element size 4",
                    p.snapshot_stride
                );
                let mut region = view.region();
                (region.ne[4], region.nb[4]) = (count as usize, p.snapshot_stride);
                ensure!(
                    view.is_empty() || region.end().is_some(),
                    Stride,
                    "snapshot_stride is {}; {count} slots of it reach outside the address space",
                    p.snapshot_stride
                );
                let (count, skip) = (count as usize, p.snapshot_skip as usize);
                Some((Snapshots { slot0, stride: p.snapshot_stride, count, order, skip }, region))
            }
        };

        for (name, value, rule) in [("gate_max", p.gate_max, "finite"), ("scale", p.scale, "finite")] {
            ensure!(value.is_finite(), Value, "{name} is {value}; it must be {rule}");
        }
        for (name, value) in [("state_clamp", p.state_clamp), ("qk_norm_eps", p.qk_norm_eps)] {
            ensure!(value >= 0.0 && value.is_finite(), Value, "{name} is {value}; it must be finite and not negative");
        }
        let or = |value: f32, default: f32| if value == 0.0 { default } else { value };

        let problem = Problem {
            q,
            k,
            v,
            g,
            beta,
            out,
            state_in,
            state_out: state_out.map(|(state, _)| state),
            snapshots: snapshots.map(|(snapshots, _)| snapshots),
            rows_in,
            rows_out,
            cu_seqlens,
            head_size,
            key_heads,
            value_heads,
            tokens,
            sequences,
            qk_sequences,
            channel_gate,
            head_map,
            beta_kind,
            scale: or(p.scale, 1.0 / (head_size as f32).sqrt()),
            gate_max: or(p.gate_max, f32::INFINITY),
            state_clamp: or(p.state_clamp, f32::INFINITY),
            qk_norm: qk_norm.then_some(p.qk_norm_eps),
            precision,
        };
        for (name, rows) in [("rows_in", &rows_in), ("rows_out", &rows_out)] {
            if let Some(rows) = rows {
                let given = rows.0.ne[0];
                ensure!(
                    given == sequences,
                    Shape,
                    "{name}.ne[0] is {given}; it must be the number of sequences, {sequences}"
                );
            }
        }
        let inputs = [("q", &q), ("k", &k), ("v", &v), ("g", &g), ("beta", &beta)].map(|(n, v)| (n, v.region()));
        let state_in_region = ("state_in", state_in_view.region());
        let outputs = [
            Some(("out", out.region())),
            state_out.map(|(_, view)| ("state_out", view.region())),
            snapshots.map(|(_, region)| ("snapshots", region)),
        ];
        let indices = [("rows_in", &rows_in), ("rows_out", &rows_out), ("cu_seqlens", &cu_seqlens)];
        let indices = indices.map(|(name, index)| index.as_ref().map(|index| (name, index.0.region())));
        for (at, (name, region)) in outputs.iter().enumerate().filter_map(|(at, output)| output.map(|o| (at, o))) {
            ensure!(
                !region.overlaps_itself(),
                Overlap,
                "{name} has strides {:?} for ne {:?}, so that its elements share memory; an output's must not",
                region.nb,
                region.ne
            );
            let others = inputs.iter().chain(indices.iter().flatten()).chain(outputs[at + 1..].iter().flatten());
            for (other_name, other) in others {
                ensure!(
                    !region.overlaps(other),
                    Overlap,
                    "{name} overlaps {other_name}; outputs need memory of their own"
                );
            }
            let in_place = name == "state_out" && problem.one_pool();
            ensure!(
                in_place || !region.overlaps(&state_in_region.1),
                Overlap,
                "{name} overlaps state_in; it must be apart{}",
                if name == "state_out" { ", or the same memory with the same strides" } else { "" }
            );
        }
        Ok(problem)
    }

    /// Whether a run has no output: no token, and no state asked for.
    pub(crate) fn writes_nothing(&self) -> bool {
        self.tokens == 0 && self.state_out.is_none()
    }

    /// Whether state_in and state_out are the same rows of memory. Strides of axes of one element mean nothing.
    pub(crate) fn one_pool(&self) -> bool {
        self.state_out.is_some_and(|out| {
            let several = |n: usize, stride: usize| if n > 1 { stride } else { 0 };
            let rows = self.state_in.rows.min(out.rows);
            let key =
                |s: &StateView| (s.data, s.nb_k, s.nb_v, several(self.value_heads, s.nb_head), several(rows, s.nb_row));
            key(&self.state_in) == key(&out)
        })
    }

    fn check_indices(&self) -> Result<()> {
        if let Some(offsets) = &self.cu_seqlens {
            let mut before = 0;
            for at in 0..=self.sequences.min(offsets.0.ne[0].saturating_sub(1)) {
                let offset = offsets.get(at);
                ensure!(at > 0 || offset == 0, Sequences, "cu_seqlens[0] is {offset}; it must be 0");
                ensure!(
                    offset >= before && offset as usize <= self.tokens,
                    Sequences,
                    "cu_seqlens[{at}] is {offset}; it must be from {before} (the one before) to {} (the tokens)",
                    self.tokens
                );
                before = offset;
            }
        }
        let pools = [("rows_in", &self.rows_in, Some(self.state_in)), ("rows_out", &self.rows_out, self.state_out)];
        for (name, rows, pool) in pools {
            let (Some(rows), Some(pool)) = (rows, pool) else { continue };
            for b in 0..self.sequences {
                let row = rows.get(b);
                ensure!(
                    row >= 0 && (row as usize) < pool.rows,
                    Row,
                    "{name}[{b}] is {row}; it must be from 0 to {} (rows of the pool less one)",
                    pool.rows as i64 - 1
                );
            }
        }
        if self.rows_out.is_none() && (self.rows_in.is_none() || !self.one_pool()) {
            return Ok(());
        }
        // Rising rows, the usual case, need one look each.
        let rising = (1..self.sequences).all(|b| self.row_out(b - 1) < self.row_out(b));
        let identity = (0..self.sequences).all(|b| self.row_in(b) == self.row_out(b));
        if rising && (identity || !self.one_pool()) {
            return Ok(());
        }
        self.check_rows_meet_once()
    }

    /// Checks that no row is written twice, nor written by one sequence and read by another where the pool is one.
    ///
    /// The rows are gone through by windows, each with a bit a row on the stack, so that hundreds of sequences in any
    /// order cost little and no memory is asked for. Windows without a written row are skipped.
    fn check_rows_meet_once(&self) -> Result<()> {
        const WINDOW: usize = 4096;
        let meets = |b: usize, is: &dyn Fn(usize) -> bool| (0..self.sequences).find(|other| *other != b && is(*other));
        let mut next = (0..self.sequences).map(|b| self.row_out(b)).min();
        while let Some(first) = next {
            next = None;
            let mut written = [0u64; WINDOW / 64];
            for b in 0..self.sequences {
                let row = self.row_out(b);
                match row.checked_sub(first) {
                    Some(at) if at < WINDOW => {
                        let bit = 1 << (at % 64);
                        ensure!(
                            written[at / 64] & bit == 0,
                            Row,
                            "rows_out[{b}] is {row}, as is rows_out[{}]; each sequence must write a row of its own",
                            meets(b, &|other| self.row_out(other) == row).unwrap_or(b)
                        );
                        written[at / 64] |= bit;
                    }
                    Some(_) => next = Some(next.map_or(row, |least: usize| least.min(row))),
                    None => (),
                }
            }
            for b in (0..self.sequences).filter(|_| self.one_pool()) {
                let row = self.row_in(b);
                let Some(at) = row.checked_sub(first).filter(|at| *at < WINDOW) else { continue };
                ensure!(
                    written[at / 64] & 1 << (at % 64) == 0 || self.row_out(b) == row,
                    Row,
                    "rows_out[{}] is {row}, which sequence {b} reads; in one pool, a row may be written only by its reader",
                    meets(b, &|other| self.row_out(other) == row).unwrap_or(b)
                );
            }
        }
        Ok(())
    }

    /// S: channels of a key and of a value.
    pub fn head_size(&self) -> usize {
        self.head_size
    }
    /// Hk.
    pub fn key_heads(&self) -> usize {
        self.key_heads
    }
    /// Hv.
    pub fn value_heads(&self) -> usize {
        self.value_heads
    }
    /// T: tokens of each sequence, or of all together with `cu_seqlens`.
    pub fn tokens(&self) -> usize {
        self.tokens
    }
    /// B.
    pub fn sequences(&self) -> usize {
        self.sequences
    }
    /// Whether the gate has one log-decay per key channel.
    pub fn channel_gate(&self) -> bool {
        self.channel_gate
    }
    /// Which key head serves which value head.
    pub fn head_map(&self) -> HeadMap {
        self.head_map
    }
    /// What the beta tensor holds.
    pub fn beta_kind(&self) -> BetaKind {
        self.beta_kind
    }
    /// Factor on the output, the default resolved.
    pub fn scale(&self) -> f32 {
        self.scale
    }
    /// Upper clamp on the log-decay; infinity where there is none.
    pub fn gate_max(&self) -> f32 {
        self.gate_max
    }
    /// Clamp on the state after every token; infinity where there is none.
    pub fn state_clamp(&self) -> f32 {
        self.state_clamp
    }
    /// The epsilon of the L2 norm of q and k, if it is asked for.
    pub fn qk_norm(&self) -> Option<f32> {
        self.qk_norm
    }
    /// Arithmetic of the CUDA prompt kernels.
    pub fn precision(&self) -> Precision {
        self.precision
    }

    /// Bq: sequences of q and k.
    pub fn qk_sequences(&self) -> usize {
        self.qk_sequences
    }

    /// The call that is left when all but the last `tokens` tokens are done and their states are `state_in`. Not for
    /// variable-length batches.
    #[cfg(feature = "cuda")]
    pub(crate) fn last_tokens(&self, tokens: usize, state_in: StateView) -> Problem {
        let skip = self.tokens - tokens;
        let last = |view: &View| {
            let ne = [view.ne[0], view.ne[1], tokens, view.ne[3]];
            View { data: view.data.wrapping_byte_add(skip * view.nb[2]), ne, ..*view }
        };
        Problem {
            q: last(&self.q),
            k: last(&self.k),
            v: last(&self.v),
            g: last(&self.g),
            beta: last(&self.beta),
            out: last(&self.out),
            state_in,
            tokens,
            ..*self
        }
    }

    /// Where every tensor that has elements begins.
    #[cfg(feature = "cuda")]
    pub(crate) fn addresses(&self) -> impl Iterator<Item = (&'static str, *mut u8)> {
        let view = |name, view: &View| (!view.is_empty()).then_some((name, view.data));
        let state = |name, state: Option<StateView>| state.map(|state| (name, state.data.cast()));
        let index = |name, index: &Option<Index>| index.map(|index| (name, index.data()));
        let states = [
            state("state_in", Some(self.state_in)),
            state("state_out", self.state_out),
            state("snapshots", self.snapshots.map(|snapshots| snapshots.slot0)),
        ];
        let states = states.map(|state| state.filter(|_| self.sequences > 0));
        let views = [
            view("q", &self.q),
            view("k", &self.k),
            view("v", &self.v),
            view("g", &self.g),
            view("beta", &self.beta),
            view("out", &self.out),
        ];
        let indices =
            [index("rows_in", &self.rows_in), index("rows_out", &self.rows_out), index("cu_seqlens", &self.cu_seqlens)];
        views.into_iter().chain(states).chain(indices).flatten()
    }

    /// The key head of value head `head`.
    #[inline]
    pub(crate) fn key_head(&self, head: usize) -> usize {
        match self.head_map {
            HeadMap::Tiled => head % self.key_heads,
            HeadMap::Grouped => head / (self.value_heads / self.key_heads),
        }
    }

    /// The sequence of q and k that sequence `b` reads, and of v, g, beta and out.
    #[inline]
    pub(crate) fn tensor_sequences(&self, b: usize) -> (usize, usize) {
        if self.cu_seqlens.is_some() { (0, 0) } else { (b / (self.sequences / self.qk_sequences), b) }
    }

    /// The tokens of sequence `b`, host memory.
    #[inline]
    pub(crate) fn token_range(&self, b: usize) -> std::ops::Range<usize> {
        match &self.cu_seqlens {
            None => 0..self.tokens,
            // The caller may have written to the index since it was checked; kernels still stay inside the tensors.
            Some(offsets) => {
                let clamp = |offset: i64| (offset.max(0) as usize).min(self.tokens);
                let end = clamp(offsets.get(b + 1));
                clamp(offsets.get(b)).min(end)..end
            }
        }
    }

    /// The row of the pool that sequence `b` reads, host memory.
    #[inline]
    pub(crate) fn row_in(&self, b: usize) -> usize {
        self.rows_in.map_or(b, |rows| rows.get(b) as usize)
    }

    /// The row of the pool that sequence `b` writes, host memory.
    #[inline]
    pub(crate) fn row_out(&self, b: usize) -> usize {
        self.rows_out.map_or(b, |rows| rows.get(b) as usize)
    }
}

/// Finds the variant that an enumeration's number stands for.
fn choice<T: Copy + IntoCode>(name: &str, code: u32, values: &[T]) -> Result<T> {
    let found = values.iter().copied().find(|value| value.code() == code);
    found.ok_or_else(|| {
        let last = values.len() - 1;
        Error::compose(Status::UnknownValue, format_args!("{name} is {code}; it must be from 0 to {last}"))
    })
}

/// Values that travel as a `uint32_t`.
trait IntoCode {
    fn code(self) -> u32;
}
macro_rules! into_code { ($($type:ty),+) => { $(impl IntoCode for $type { fn code(self) -> u32 { self as u32 } })+ } }
into_code!(bool, HeadMap, StateLayout, BetaKind, SnapshotOrder, Precision);

fn index(name: &str, tensor: &Tensor) -> Result<Option<Index>> {
    if tensor.data.is_null() {
        return Ok(None);
    }
    let view = View::new(name, tensor, INDEX)?;
    ensure!(view.ne[1..] == [1, 1, 1], Shape, "{name}.ne is {:?}; it must be a vector, 1 along axes 1 to 3", tensor.ne);
    ensure!(
        view.ne[0] <= 1 || view.nb[0] > 0,
        Stride,
        "{name}.nb[0] is 0; it must be at least the element size: an index has an element for each sequence"
    );
    ensure!(name != "cu_seqlens" || view.ne[0] > 0, Shape, "cu_seqlens.ne[0] is 0; it must be the sequences plus 1");
    Ok(Some(Index(view)))
}

fn shape(name: &str, view: &View, wanted: [usize; 4]) -> Result<()> {
    for (axis, (got, wanted)) in view.ne.into_iter().zip(wanted).enumerate() {
        ensure!(
            got == wanted,
            Shape,
            "{name}.ne[{axis}] is {got}; it must be {wanted} to agree with the other tensors"
        );
    }
    Ok(())
}
