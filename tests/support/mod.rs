//! Random problems with memory of their own: strided tensors between guard zones, poisoned outputs.
#![allow(dead_code, reason = "each test binary uses its part")]

pub mod peers;
pub mod sharded;

use deltanet::params::{BetaKind, HeadMap, Precision, SnapshotOrder, StateLayout};
use deltanet::reference::{Expected, Nmse};
use deltanet::{Dtype, Params, Problem, Tensor};

/// A small generator of our own, so that a printed seed means the same problem for ever (SplitMix64).
#[derive(Clone)]
pub struct Rng(pub u64);

impl Rng {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
    /// Below `n`.
    pub fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }
    pub fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len())]
    }
    pub fn chance(&mut self, percent: usize) -> bool {
        self.below(100) < percent
    }
    pub fn uniform(&mut self, low: f64, high: f64) -> f64 {
        low + (high - low) * (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }
    pub fn normal(&mut self) -> f64 {
        let (u, v) = (self.uniform(1e-300, 1.0), self.uniform(0.0, std::f64::consts::TAU));
        (-2.0 * u.ln()).sqrt() * v.cos()
    }
}

/// A seed for this run: from DELTANET_TEST_SEED, or fresh; printed, so that a failure can be repeated.
pub fn seed() -> u64 {
    let fresh = || std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_nanos() as u64;
    let seed = std::env::var("DELTANET_TEST_SEED").ok().and_then(|s| s.parse().ok()).unwrap_or_else(fresh);
    println!("DELTANET_TEST_SEED={seed}");
    seed
}

/// How many random problems a test draws: from DELTANET_TEST_CASES, or `default`.
pub fn cases(default: usize) -> usize {
    std::env::var("DELTANET_TEST_CASES").ok().and_then(|n| n.parse().ok()).unwrap_or(default)
}

/// What guard zones and gaps between strided elements hold: nobody may change it.
const GUARD: u8 = 0xa5;
/// What outputs hold before a run: a NaN in every dtype.
const POISON: u8 = 0xff;
const GUARD_BYTES: usize = 256;

/// One allocation with a strided tensor (and snapshot slots) inside, and guards around and between.
pub struct Buffer {
    memory: Vec<u64>,
    pub tensor: Tensor,
    slots: usize,
    slot_stride: usize,
    written: Vec<bool>,
}

impl Buffer {
    /// A tensor of `ne`, axes laid out in memory in the order that `rng` draws (the first `fixed` axes stay innermost),
    /// with random gaps between rows. Gaps and the beginning are multiples of `granule` elements.
    pub fn new(rng: &mut Rng, dtype: Dtype, ne: [usize; 4], fixed: usize, slots: usize, granule: usize) -> Buffer {
        let (size, granule) = (dtype.size(), dtype.size() * granule);
        let mut order = [0, 1, 2, 3, 4];
        for i in (fixed + 1..5).rev() {
            order.swap(i, fixed + rng.below(i - fixed + 1));
        }
        let extents = [ne[0], ne[1], ne[2], ne[3], slots.max(1)];
        let mut nb = [0; 5];
        let mut stride = size;
        for (place, axis) in order.into_iter().enumerate() {
            nb[axis] = stride;
            let gap = if place + 1 >= fixed && rng.chance(30) { granule * rng.below(5) } else { 0 };
            stride = stride * extents[axis].max(1) + gap;
        }
        let bytes = stride + 2 * GUARD_BYTES;
        let mut memory = vec![u64::from_ne_bytes([GUARD; 8]); bytes.div_ceil(8)];
        let written = vec![false; memory.len() * 8];
        let offset = GUARD_BYTES + granule * rng.below(64 / granule);
        assert!(offset + stride <= memory.len() * 8);
        let data = memory.as_mut_ptr().cast::<u8>().wrapping_add(offset);
        let tensor = Tensor {
            data: data.cast(),
            ne: ne.map(|n| n as i64),
            nb: [nb[0], nb[1], nb[2], nb[3]],
            dtype: dtype as u32,
            reserved: 0,
        };
        Buffer { memory, tensor, slots: slots.max(1), slot_stride: nb[4], written }
    }

    pub fn slot_stride(&self) -> usize {
        self.slot_stride
    }

    fn size(&self) -> usize {
        match self.tensor.dtype {
            0 | 3 => 4,
            4 => 8,
            _ => 2,
        }
    }

    fn offset(&self, at: [usize; 4], slot: usize) -> usize {
        let base = self.tensor.data as usize - self.memory.as_ptr() as usize;
        base + (0..4).map(|axis| at[axis] * self.tensor.nb[axis]).sum::<usize>() + slot * self.slot_stride
    }

    pub fn bytes(&self) -> &[u8] {
        // SAFETY: the vector's own memory, seen as bytes.
        unsafe { std::slice::from_raw_parts(self.memory.as_ptr().cast(), self.memory.len() * 8) }
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `bytes`.
        unsafe { std::slice::from_raw_parts_mut(self.memory.as_mut_ptr().cast(), self.memory.len() * 8) }
    }

    /// Calls `each` for every element's indices.
    pub fn for_each(&self, mut each: impl FnMut([usize; 4], usize)) {
        let ne = self.tensor.ne.map(|n| n as usize);
        for slot in 0..self.slots {
            for i3 in 0..ne[3] {
                for i2 in 0..ne[2] {
                    for i1 in 0..ne[1] {
                        for i0 in 0..ne[0] {
                            each([i0, i1, i2, i3], slot);
                        }
                    }
                }
            }
        }
    }

    /// Writes an element, or part of one, by address: an interpreter keeps a record of every borrow.
    fn put<const N: usize>(&mut self, offset: usize, bytes: [u8; N]) {
        assert!(offset + N <= self.memory.len() * 8);
        // SAFETY: inside the vector's own memory.
        unsafe { self.memory.as_mut_ptr().cast::<u8>().add(offset).cast::<[u8; N]>().write_unaligned(bytes) };
    }

    /// Fills the tensor's elements.
    pub fn fill(&mut self, mut value: impl FnMut([usize; 4]) -> f64) {
        let mut values = Vec::new();
        self.for_each(|at, slot| values.push((self.offset(at, slot), value(at))));
        for (offset, value) in values {
            match self.tensor.dtype {
                0 => self.put(offset, (value as f32).to_ne_bytes()),
                1 => self.put(offset, half::f16::from_f64(value).to_ne_bytes()),
                2 => self.put(offset, half::bf16::from_f64(value).to_ne_bytes()),
                3 => self.put(offset, (value as i32).to_ne_bytes()),
                _ => self.put(offset, (value as i64).to_ne_bytes()),
            }
        }
    }

    /// An element's value.
    pub fn get(&self, at: [usize; 4], slot: usize) -> f64 {
        let bytes = &self.bytes()[self.offset(at, slot)..][..self.size()];
        match (self.tensor.dtype, bytes) {
            (0, &[a, b, c, d]) => f32::from_ne_bytes([a, b, c, d]).into(),
            (1, &[a, b]) => half::f16::from_ne_bytes([a, b]).to_f64(),
            (2, &[a, b]) => half::bf16::from_ne_bytes([a, b]).to_f64(),
            (3, &[a, b, c, d]) => i32::from_ne_bytes([a, b, c, d]).into(),
            (_, bytes) => i64::from_ne_bytes(bytes.try_into().expect("eight bytes")) as f64,
        }
    }

    /// Poisons the elements for which `select` holds and allows them to be written; everything else is guarded.
    pub fn poison(&mut self, poison: bool, select: impl Fn([usize; 4], usize) -> bool) {
        let size = self.size();
        let mut offsets = Vec::new();
        self.for_each(|at, slot| {
            if select(at, slot) {
                offsets.push(self.offset(at, slot));
            }
        });
        for offset in offsets {
            for at in offset..offset + size {
                self.written[at] = true;
                if poison {
                    self.put(at, [POISON]);
                }
            }
        }
    }

    /// Whether bytes that nobody may write are as in `before`.
    pub fn intact(&self, before: &[u8]) -> bool {
        self.bytes().iter().zip(before).zip(&self.written).all(|((now, before), written)| *written || now == before)
    }
}

/// A random problem and its memory.
pub struct Case {
    pub params: Params,
    pub buffers: Vec<Buffer>,
    /// Bound on the NMSE of out and of the states.
    pub bound: f64,
    /// Whether the keys are nearly parallel, which makes the operator ill-conditioned.
    pub collinear: bool,
    pub words: String,
}

/// What a test wants of its problems; the rest is drawn.
#[derive(Clone, Copy, Default)]
pub struct Wish {
    pub tokens: Option<usize>,
    pub head_size: Option<usize>,
    pub f32_only: bool,
    pub scalar_gate: bool,
    pub in_place: bool,
    pub layout: Option<StateLayout>,
    /// As few heads, sequences and snapshots as there can be of each kind: for an interpreter.
    pub small: bool,
}

impl Case {
    /// Bound on the NMSE of out. An f16 below 2^-14 is rounded to a multiple of 2^-24, however small it is, and a case may
    /// have no other outputs.
    fn out_bound(&self, expected: &Expected) -> f64 {
        let square = expected.out_mean_square();
        let tiny = self.params.out.dtype == Dtype::F16 as u32 && square > 0.0;
        self.bound + if tiny { 2f64.powi(-50) / square } else { 0.0 }
    }

    /// Panics where a result is further from the oracle's than rounding explains: f32 states by `state`, outputs by that, or
    /// more where they are small differences, or by what their type costs. `by` says whose result it is.
    pub fn assert_near(&self, nmse: &Nmse, expected: &Expected, state: f64, by: &str) {
        let out = self.out_bound(expected).max(state * (expected.out_cancellation() / 8.0).max(1.0));
        assert!(nmse.out <= out && nmse.state <= state, "{nmse:?}, bounds {out:e} {state:e}, {by}: {}", self.words);
    }

    /// Bound on the NMSE of the states where CUDA kernels run it. Prompts go through products of bf16 pairs, or of bf16 alone,
    /// everything else through f32 arithmetic.
    pub fn bound_on_cuda(&self, chunked: bool) -> f64 {
        let bf16 = self.params.precision == Precision::Bf16 as u32;
        match (chunked, bf16, self.collinear) {
            (false, _, false) => 1e-11,
            (false, _, true) | (true, false, false) => 1e-9,
            (true, false, true) => 1e-7,
            (true, true, false) => 5e-5,
            (true, true, true) => 5e-3,
        }
    }

    /// Draws a problem: every option of the operator, odd lengths, permuted strides, hard gates.
    pub fn draw(rng: &mut Rng, wish: Wish) -> Case {
        let s = wish.head_size.unwrap_or_else(|| rng.pick(&[16, 16, 32, 32, 48, 64, 64, 80, 128, 128, 256]));
        let tokens = wish.tokens.unwrap_or_else(|| match rng.below(10) {
            0 => 0,
            1..=3 => 1,
            4..=6 => 2 + rng.below(8),
            7 | 8 => 10 + rng.below(40),
            _ => 50 + rng.below(if s > 64 { 60 } else { 150 }),
        });
        let at_most = |rng: &mut Rng, most: usize, small: usize| 1 + rng.below(if wish.small { small } else { most });
        let key_heads = at_most(rng, 3, 1);
        let value_heads = key_heads * at_most(rng, 3, 2);
        let ragged = rng.chance(15);
        let qk_sequences = if ragged { 1 } else { at_most(rng, 2, 1) };
        let token_sequences = if ragged { 1 } else { qk_sequences * at_most(rng, 3, 2) };
        let sequences = if ragged { at_most(rng, 4, 2) } else { token_sequences };
        let floats = |rng: &mut Rng| {
            if wish.f32_only { Dtype::F32 } else { rng.pick(&[Dtype::F32, Dtype::F32, Dtype::F16, Dtype::Bf16]) }
        };
        let channel_gate = !wish.scalar_gate && rng.chance(35);
        let near_collinear = rng.chance(20);
        let gate_kind = if near_collinear { 0 } else { rng.below(4) };
        let out_dtype = floats(rng);
        let has_norm = rng.chance(40);
        let layouts = [StateLayout::KeyContiguous, StateLayout::ValueContiguous];
        let layout = wish.layout.unwrap_or_else(|| rng.pick(&layouts));
        let head_map = rng.pick(&[HeadMap::Tiled, HeadMap::Grouped]);
        let logit = rng.chance(30);
        let precision = if rng.chance(25) { Precision::Bf16 } else { Precision::Exact };

        // Kernels that read and write four elements at a time want all rows aligned to that, which chance alone seldom brings.
        let granule = if rng.chance(50) { 4 } else { 1 };
        let fixed = |rng: &mut Rng| if rng.chance(85) { 1 } else { 0 };
        let row = |rng: &mut Rng, dtype, ne| {
            let fixed = fixed(rng);
            Buffer::new(rng, dtype, ne, fixed, 1, granule)
        };
        let dtypes = [floats(rng), floats(rng), floats(rng)];
        let mut q = row(rng, dtypes[0], [s, key_heads, tokens, qk_sequences]);
        let mut k = row(rng, dtypes[1], [s, key_heads, tokens, qk_sequences]);
        let mut v = row(rng, dtypes[2], [s, value_heads, tokens, token_sequences]);
        let gate_channels = if channel_gate { s } else { 1 };
        let mut g = row(rng, Dtype::F32, [gate_channels, value_heads, tokens, token_sequences]);
        let mut beta = row(rng, Dtype::F32, [1, value_heads, tokens, token_sequences]);
        let mut out = row(rng, out_dtype, [s, value_heads, tokens, token_sequences]);

        let norm = if has_norm { 1.0 } else { 1.0 / (s as f64).sqrt() };
        q.fill(|_| rng.normal() * norm);
        let directions: Vec<f64> = (0..s).map(|_| rng.normal()).collect();
        if near_collinear {
            k.fill(|at| (directions[at[0]] + 0.05 * rng.normal()) * norm);
        } else {
            k.fill(|_| rng.normal() * norm);
        }
        v.fill(|_| rng.normal());
        g.fill(|_| match gate_kind {
            _ if near_collinear => -1e-3 * rng.uniform(0.1, 1.0),
            0 => rng.uniform(-20.0, -1e-4),
            1 => -rng.uniform(-9.0, 3.0).exp(),
            2 => -rng.uniform(0.0, 0.01),
            _ => *[-rng.uniform(0.0, 2.0), -200.0, 0.0].get(rng.below(12)).unwrap_or(&-0.1),
        });
        beta.fill(|_| match (logit, near_collinear) {
            (false, false) => rng.uniform(0.0, 1.0),
            (false, true) => rng.uniform(0.835, 1.0),
            (true, false) => 3.0 * rng.normal(),
            (true, true) => rng.uniform(2.0, 8.0),
        });
        out.poison(true, |at, _| at[2] < tokens);

        let pool = rng.chance(25);
        let in_place = wish.in_place || rng.chance(40);
        let pool_rows = if pool { sequences + rng.below(4) } else { sequences };
        let mut rows: Vec<usize> = (0..pool_rows).collect();
        for i in (1..rows.len()).rev() {
            rows.swap(i, rng.below(i + 1));
        }
        let other_rows: Vec<usize> = if in_place { rows.clone() } else { rows.iter().rev().copied().collect() };
        let state_fixed = if rng.chance(90) { 2 } else { 0 };
        let mut state_in = Buffer::new(rng, Dtype::F32, [s, s, value_heads, pool_rows], state_fixed, 1, granule);
        state_in.fill(|_| rng.normal() * 0.3);
        let written = |at: [usize; 4], pool: bool, rows: &[usize]| !pool || rows[..sequences].contains(&at[3]);
        let mut state_out = Buffer::new(rng, Dtype::F32, [s, s, value_heads, pool_rows], state_fixed, 1, granule);
        if in_place {
            state_in.poison(false, |at, _| written(at, pool, &rows));
        } else {
            state_out.poison(true, |at, _| written(at, pool, &other_rows));
        }
        let index = |rng: &mut Rng, values: &[usize]| {
            let dtype = rng.pick(&[Dtype::I32, Dtype::I64]);
            let mut buffer = Buffer::new(rng, dtype, [values.len(), 1, 1, 1], 1, 1, 1);
            buffer.fill(|at| values[at[0]] as f64);
            buffer
        };
        let rows_in = index(rng, &rows[..sequences]);
        let rows_out = index(rng, &other_rows[..sequences]);
        let mut cuts: Vec<usize> = (0..sequences).map(|_| rng.below(tokens + 1)).collect();
        cuts.sort_unstable();
        cuts.insert(0, 0);
        let cu_seqlens = index(rng, &cuts);

        let n_snapshots = if rng.chance(35) { at_most(rng, 6, 2) } else { 0 };
        let order = rng.pick(&[SnapshotOrder::NewestFirst, SnapshotOrder::OldestFirst]);
        let skip = if rng.chance(30) { 1 } else { 0 };
        let slots = n_snapshots + rng.below(2);
        let mut snapshots = Buffer::new(rng, Dtype::F32, [s, s, value_heads, sequences], state_fixed, slots, granule);
        let length = |b: usize| if ragged { cuts[b + 1] - cuts[b] } else { tokens };
        snapshots
            .poison(true, |at, slot| slot < n_snapshots.min((length(at[3]) as isize - skip as isize).max(0) as usize));

        let none = Tensor::default();
        let wants_state = in_place || n_snapshots == 0 || rng.chance(80);
        let params = Params {
            head_map: head_map as u32,
            state_layout: layout as u32,
            beta_kind: if logit { BetaKind::Logit } else { BetaKind::Value } as u32,
            q: q.tensor,
            k: k.tensor,
            v: v.tensor,
            g: g.tensor,
            beta: beta.tensor,
            state_in: state_in.tensor,
            out: out.tensor,
            state_out: match (wants_state, in_place) {
                (false, _) => none,
                (true, true) => state_in.tensor,
                (true, false) => state_out.tensor,
            },
            snapshots: if n_snapshots > 0 { snapshots.tensor } else { none },
            rows_in: if pool { rows_in.tensor } else { none },
            rows_out: if pool && wants_state { rows_out.tensor } else { none },
            cu_seqlens: if ragged { cu_seqlens.tensor } else { none },
            snapshot_stride: snapshots.slot_stride(),
            snapshot_slots: slots as u32,
            n_snapshots: n_snapshots as u32,
            snapshot_order: order as u32,
            snapshot_skip: skip,
            scale: if rng.chance(30) { rng.uniform(0.1, 2.0) as f32 } else { 0.0 },
            gate_max: if rng.chance(30) { rng.pick(&[50.0, -0.5]) } else { 0.0 },
            state_clamp: if rng.chance(20) { rng.pick(&[1e6, 0.4]) } else { 0.0 },
            precision: precision as u32,
            qk_norm: u32::from(has_norm),
            qk_norm_eps: if has_norm { 1e-6 } else { 0.0 },
            ..Params::default()
        };
        // 16-bit outputs are rounded: half a unit in the last place is at most 2^-8 (bf16) or 2^-11 (f16) of a value.
        let bound = match (out_dtype, near_collinear) {
            (Dtype::Bf16, _) => 1.6e-5,
            (Dtype::F16, _) => 2.4e-7,
            (_, true) => 1e-9,
            (_, false) => 1e-11,
        };
        let words = format!(
            "S {s} T {tokens} Hk {key_heads} Hv {value_heads} B {sequences} Bq {qk_sequences} ragged {ragged} pool {pool} \
             in place {in_place} channel gate {channel_gate} gates {gate_kind} collinear {near_collinear} norm {has_norm} \
             layout {layout:?} {head_map:?} logit {logit} {precision:?} snapshots {n_snapshots} {order:?} skip {skip} \
             out {out_dtype:?} q,k,v {dtypes:?} clamp {} gate max {}",
            params.state_clamp, params.gate_max
        );
        let buffers = vec![q, k, v, g, beta, state_in, out, state_out, snapshots, rows_in, rows_out, cu_seqlens];
        Case { params, buffers, bound, collinear: near_collinear, words }
    }

    /// All memory of the case, to compare or to restore.
    pub fn memory(&self) -> Vec<Vec<u8>> {
        self.buffers.iter().map(|buffer| buffer.bytes().to_vec()).collect()
    }

    /// Puts back what [`Case::memory`] kept.
    pub fn restore(&mut self, memory: &[Vec<u8>]) {
        for (buffer, memory) in self.buffers.iter_mut().zip(memory) {
            buffer.bytes_mut().copy_from_slice(memory);
        }
    }

    /// Panics unless everything that may not be written is as before.
    pub fn assert_intact(&self, before: &[Vec<u8>]) {
        for (at, (buffer, before)) in self.buffers.iter().zip(before).enumerate() {
            assert!(buffer.intact(before), "buffer {at} was written outside its elements: {}", self.words);
        }
    }

    /// The validated problem.
    pub fn problem(&self) -> Problem {
        // SAFETY: the case owns the index tensors that its params describe.
        unsafe { Problem::new(&self.params) }.unwrap_or_else(|error| panic!("{error}: {}", self.words))
    }
}
