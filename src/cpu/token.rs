//! What one token does to a head's state, ready for the token-serial kernels: its rows in f32, normalised and decayed.

use super::rows::load_row;
use super::simd::{MAX_LANES, Simd};
use crate::params::BetaKind;
use crate::problem::Problem;

/// Tokens of one head that are prepared at a time.
pub const BATCH: usize = 16;

/// One token's inputs; the rows hold a head's channels.
#[derive(Clone, Copy)]
pub struct Token {
    pub q: *const f32,
    pub k: *const f32,
    /// exp(g) of each key channel.
    pub decay: *const f32,
    pub decayed_q: *const f32,
    pub decayed_k: *const f32,
    /// k . q
    pub kq: f32,
    pub beta: f32,
    pub scale: f32,
    /// The state's clamp; infinity where there is none.
    pub limit: f32,
}

/// Up to [`BATCH`] prepared tokens in scratch.
#[derive(Clone, Copy)]
pub struct Batch {
    rows: *mut f32,
    s: usize,
}

impl Batch {
    /// Floats of scratch.
    pub const fn floats(s: usize) -> usize {
        BATCH * (5 * s + 2)
    }

    /// A batch that lives at `scratch`, which must hold [`Batch::floats`].
    pub fn new(scratch: *mut f32, s: usize) -> Batch {
        Batch { rows: scratch, s }
    }

    /// Prepares `count` tokens of the tensors from token `first` on.
    ///
    /// # Safety
    /// The tokens exist, `count` is at most [`BATCH`], the problem's memory is readable, `S`'s features are there.
    #[inline(always)]
    pub unsafe fn prepare<S: Simd>(&self, p: &Problem, b: usize, head: usize, first: usize, count: usize) {
        let s = self.s;
        let key_head = p.key_head(head);
        let (qk_sequence, sequence) = p.tensor_sequences(b);
        for i in 0..count {
            let t = first + i;
            // SAFETY: i < BATCH keeps the rows and scalars inside `floats`; the indices are below the checked extents.
            unsafe {
                let q = self.rows.add(i * 5 * s);
                let (k, decay, decayed_q, decayed_k) = (q.add(s), q.add(2 * s), q.add(3 * s), q.add(4 * s));
                load_row::<S>(&p.q, 0, s, [key_head, t, qk_sequence], q);
                load_row::<S>(&p.k, 0, s, [key_head, t, qk_sequence], k);
                if let Some(eps) = p.qk_norm() {
                    normalise::<S>(q, s, eps);
                    normalise::<S>(k, s, eps);
                }
                load_decay::<S>(p, head, t, sequence, decay);
                multiply::<S>(decay, q, decayed_q, s);
                multiply::<S>(decay, k, decayed_k, s);
                let scalars = self.rows.add(BATCH * 5 * s + 2 * i);
                scalars.write(dot::<S>(k, q, s));
                scalars.add(1).write(load_beta(p, head, t, sequence));
            }
        }
    }

    /// Token `i` of those prepared.
    ///
    /// # Safety
    /// It was prepared.
    #[inline(always)]
    pub unsafe fn token(&self, p: &Problem, i: usize) -> Token {
        let s = self.s;
        // SAFETY: as in `prepare`.
        unsafe {
            let q = self.rows.add(i * 5 * s);
            let scalars = self.rows.add(BATCH * 5 * s + 2 * i);
            Token {
                q,
                k: q.add(s),
                decay: q.add(2 * s),
                decayed_q: q.add(3 * s),
                decayed_k: q.add(4 * s),
                kq: scalars.read(),
                beta: scalars.add(1).read(),
                scale: p.scale(),
                limit: p.state_clamp(),
            }
        }
    }
}

/// exp of the clamped gate: one value repeated, or one a key channel.
///
/// # Safety
/// The indices are inside g, and `decay` has room for a head's channels.
#[inline(always)]
pub unsafe fn load_decay<S: Simd>(p: &Problem, head: usize, t: usize, sequence: usize, decay: *mut f32) {
    let s = p.head_size();
    // SAFETY: as promised; accesses stay below s, a multiple of LANES.
    unsafe {
        let channels = if p.channel_gate() { s } else { S::LANES };
        if p.channel_gate() {
            load_row::<S>(&p.g, 0, s, [head, t, sequence], decay);
        } else {
            S::store(decay, S::splat(p.g.at([0, head, t, sequence]).cast::<f32>().read()));
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
pub unsafe fn load_beta(p: &Problem, head: usize, t: usize, sequence: usize) -> f32 {
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
pub unsafe fn dot<S: Simd>(a: *const f32, b: *const f32, n: usize) -> f32 {
    // SAFETY: as promised; `lanes` has room for any LANES.
    unsafe {
        let mut sum = S::splat(0.0);
        for i in (0..n).step_by(S::LANES) {
            sum = S::fma(S::load(a.add(i)), S::load(b.add(i)), sum);
        }
        let mut lanes = [0.0; MAX_LANES];
        S::store(lanes.as_mut_ptr(), sum);
        lanes.iter().sum()
    }
}

/// x / sqrt(sum(x^2) + eps), in place.
///
/// # Safety
/// The row holds `n` floats, a multiple of LANES.
#[inline(always)]
pub unsafe fn normalise<S: Simd>(row: *mut f32, n: usize, eps: f32) {
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
pub unsafe fn multiply<S: Simd>(a: *const f32, b: *const f32, to: *mut f32, n: usize) {
    // SAFETY: as promised.
    unsafe {
        for i in (0..n).step_by(S::LANES) {
            S::store(to.add(i), S::mul(S::load(a.add(i)), S::load(b.add(i))));
        }
    }
}
