//! The token-serial algorithm, with every option of the operator.
//!
//! A task is one sequence, one value head and a block of value columns, whose state stays in scratch (L1) for all
//! tokens. Columns do not depend on each other, and a column's arithmetic does not depend on the block it is in.

#![allow(clippy::needless_range_loop, reason = "vector registers are indexed side by side")]

use super::rows::{Columns, load_row, store_row};
use super::simd::Simd;
use crate::params::BetaKind;
use crate::problem::{Problem, StateView};

/// Value columns of a task's block: 128 key channels of it are half of a 32 KiB L1.
pub const BLOCK: usize = 32;

/// Floats of scratch that a task needs.
pub fn scratch_floats(head_size: usize) -> usize {
    head_size * BLOCK + 5 * head_size + 2 * BLOCK
}

/// Columns that one visit of the state keeps in registers; head sizes and blocks are multiples of it.
const GROUP: usize = 16;

/// Runs columns `first .. first + width` of one sequence and head. `NV` is `GROUP / LANES`.
///
/// # Safety
/// The problem's memory is as described and nobody else touches what this task writes; `scratch` has room for
/// [`scratch_floats`]; `S`'s features are there.
#[inline(always)]
pub unsafe fn run<S: Simd, const NV: usize>(
    p: &Problem,
    b: usize,
    head: usize,
    first: usize,
    width: usize,
    scratch: *mut f32,
) {
    const { assert!(NV * S::LANES == GROUP) };
    let s = p.head_size();
    let (qk_sequence, sequence) = p.tensor_sequences(b);
    let range = p.token_range(b);
    let key_head = p.key_head(head);
    let columns = |state: &StateView, row| Columns::new(state, head, row, s, first, width);
    // SAFETY: all pointers below are into scratch, within the sizes that scratch_floats adds up, or made by the rows
    // helpers from indices below the problem's checked extents.
    unsafe {
        let block = scratch;
        let q = block.add(s * BLOCK);
        let k = q.add(s);
        let decayed_q = k.add(s);
        let decayed_k = decayed_q.add(s);
        let decay = decayed_k.add(s);
        let value = decay.add(s);
        let out = value.add(BLOCK);

        columns(&p.state_in, p.row_in(b)).load::<S>(block, BLOCK);
        for t in range.clone() {
            load_row::<S>(&p.q, 0, s, [key_head, t, qk_sequence], q);
            load_row::<S>(&p.k, 0, s, [key_head, t, qk_sequence], k);
            if let Some(eps) = p.qk_norm() {
                normalise::<S>(q, s, eps);
                normalise::<S>(k, s, eps);
            }
            load_decay::<S>(p, head, t, sequence, decay);
            scale_rows::<S>(decay, q, decayed_q, s);
            scale_rows::<S>(decay, k, decayed_k, s);
            let kq = dot::<S>(k, q, s);
            let beta = load_beta(p, head, t, sequence);
            load_row::<S>(&p.v, first, width, [head, t, sequence], value);
            let (scale, limit) = (p.scale(), p.state_clamp());
            for column in (0..width).step_by(GROUP) {
                let token = Token { k, decayed_q, decayed_k, decay, kq, beta, scale, limit };
                token.step::<S, NV>(block.add(column), value.add(column), out.add(column), s);
            }
            store_row::<S>(&p.out, first, width, [head, t, sequence], out);
            if let Some(snapshots) = &p.snapshots
                && let Some(slot) = snapshots.slot(t - range.start, range.len())
            {
                columns(&snapshots.view(slot), b).store::<S>(block, BLOCK);
            }
        }
        if let Some(state_out) = &p.state_out {
            columns(state_out, p.row_out(b)).store::<S>(block, BLOCK);
        }
    }
}

/// One token's inputs, in scratch.
struct Token {
    k: *const f32,
    decayed_q: *const f32,
    decayed_k: *const f32,
    decay: *const f32,
    kq: f32,
    beta: f32,
    scale: f32,
    limit: f32,
}

impl Token {
    /// Advances `GROUP` columns by one token.
    ///
    /// Both products need only the old state, since S'^T q = (decay S)^T q + delta (k.q), so the state is read once
    /// for them and once to be updated. A clamp does not disturb that: it applies to the state that is kept, not to the
    /// token's output.
    ///
    /// # Safety
    /// The rows hold `s` floats, `block` `s` rows of `BLOCK`, `value` and `out` `GROUP`.
    #[inline(always)]
    unsafe fn step<S: Simd, const NV: usize>(&self, block: *mut f32, value: *const f32, out: *mut f32, s: usize) {
        // SAFETY: i < s and v < NV keep every access inside what the caller promises.
        unsafe {
            let at = |i: usize, v: usize| block.add(i * BLOCK + v * S::LANES);
            let clamps = self.limit != f32::INFINITY;
            let mut predicted = [S::splat(0.0); NV];
            let mut recalled = [S::splat(0.0); NV];
            for i in 0..s {
                let (k, q) = (S::splat(*self.decayed_k.add(i)), S::splat(*self.decayed_q.add(i)));
                for v in 0..NV {
                    let state = S::load(at(i, v));
                    predicted[v] = S::fma(state, k, predicted[v]);
                    recalled[v] = S::fma(state, q, recalled[v]);
                }
            }
            let mut delta = [S::splat(0.0); NV];
            for v in 0..NV {
                let error = S::sub(S::load(value.add(v * S::LANES)), predicted[v]);
                delta[v] = S::mul(S::splat(self.beta), error);
                recalled[v] = S::fma(delta[v], S::splat(self.kq), recalled[v]);
            }
            let (low, high) = (S::splat(-self.limit), S::splat(self.limit));
            for i in 0..s {
                let (decay, k) = (S::splat(*self.decay.add(i)), S::splat(*self.k.add(i)));
                for v in 0..NV {
                    let state = S::fma(delta[v], k, S::mul(decay, S::load(at(i, v))));
                    // The limit comes first, so that a NaN state stays one.
                    let clamped = if clamps { S::max(low, S::min(high, state)) } else { state };
                    S::store(at(i, v), clamped);
                }
            }
            for v in 0..NV {
                S::store(out.add(v * S::LANES), S::mul(S::splat(self.scale), recalled[v]));
            }
        }
    }
}

/// exp of the clamped gate: one value repeated, or one a key channel.
///
/// # Safety
/// The indices are inside g, and `decay` has room for a head's channels.
#[inline(always)]
unsafe fn load_decay<S: Simd>(p: &Problem, head: usize, t: usize, sequence: usize, decay: *mut f32) {
    let s = p.head_size();
    // SAFETY: as promised; accesses stay below s, a multiple of LANES.
    unsafe {
        let channels = if p.channel_gate() { s } else { S::LANES };
        if p.channel_gate() {
            load_row::<S>(&p.g, 0, s, [head, t, sequence], decay);
        } else {
            let mut g = 0.0;
            load_row::<S>(&p.g, 0, 1, [head, t, sequence], &raw mut g);
            S::store(decay, S::splat(g));
        }
        for i in (0..channels).step_by(S::LANES) {
            S::store(decay.add(i), S::exp(S::min(S::splat(p.gate_max()), S::load(decay.add(i)))));
        }
        if !p.channel_gate() {
            let all = S::load(decay);
            for i in (0..s).step_by(S::LANES) {
                S::store(decay.add(i), all);
            }
        }
    }
}

/// beta, through the sigmoid if it is a logit.
///
/// # Safety
/// The indices are inside beta.
#[inline(always)]
unsafe fn load_beta(p: &Problem, head: usize, t: usize, sequence: usize) -> f32 {
    // SAFETY: passed on; beta is f32.
    let beta = unsafe { p.beta.at([0, head, t, sequence]).cast::<f32>().read() };
    match p.beta_kind() {
        BetaKind::Value => beta,
        BetaKind::Logit => 1.0 / (1.0 + (-beta).exp()),
    }
}

/// The dot product of two rows.
///
/// # Safety
/// Both hold `n` floats, a multiple of LANES.
#[inline(always)]
unsafe fn dot<S: Simd>(a: *const f32, b: *const f32, n: usize) -> f32 {
    // SAFETY: as promised; `lanes` has room for any LANES.
    unsafe {
        let mut sum = S::splat(0.0);
        for i in (0..n).step_by(S::LANES) {
            sum = S::fma(S::load(a.add(i)), S::load(b.add(i)), sum);
        }
        let mut lanes = [0.0; super::simd::MAX_LANES];
        S::store(lanes.as_mut_ptr(), sum);
        lanes.iter().sum()
    }
}

/// x / sqrt(sum(x^2) + eps), in place.
///
/// # Safety
/// The row holds `n` floats, a multiple of LANES.
#[inline(always)]
unsafe fn normalise<S: Simd>(row: *mut f32, n: usize, eps: f32) {
    // SAFETY: as promised.
    unsafe {
        let factor = S::splat(1.0 / (dot::<S>(row, row, n) + eps).sqrt());
        for i in (0..n).step_by(S::LANES) {
            S::store(row.add(i), S::mul(factor, S::load(row.add(i))));
        }
    }
}

/// to = a * b, element by element.
///
/// # Safety
/// All hold `n` floats, a multiple of LANES.
#[inline(always)]
unsafe fn scale_rows<S: Simd>(a: *const f32, b: *const f32, to: *mut f32, n: usize) {
    // SAFETY: as promised.
    unsafe {
        for i in (0..n).step_by(S::LANES) {
            S::store(to.add(i), S::mul(S::load(a.add(i)), S::load(b.add(i))));
        }
    }
}
