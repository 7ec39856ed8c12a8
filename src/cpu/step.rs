//! One token's step on some value columns of a state: the token-serial arithmetic, once for each way the state lies.
//!
//! S'^T q = (decay S)^T q + delta (k.q): both products need only the old state, so it is read once for them and once
//! more, out of L1, to be updated. Decay goes into k and q beforehand; a gate per channel then costs nothing extra.

use super::simd::{MAX_LANES, Simd};
use super::token::Token;

/// Where a state's columns lie: `pitch` floats between neighbours along the axis that is not contiguous.
#[derive(Clone, Copy)]
pub struct Place {
    pub at: *mut f32,
    pub pitch: usize,
}

/// Floats of a cache line.
const LINE: usize = 16;

impl Place {
    /// None.
    pub const NULL: Place = Place { at: std::ptr::null_mut(), pitch: 0 };

    /// The place `floats` further on.
    pub fn right(self, floats: usize) -> Place {
        Place { at: self.at.wrapping_add(floats), ..self }
    }
}

/// A step's way through memory: `from` and `to` are the same or apart; `next` is what will be read and written after
/// this block, or null.
#[derive(Clone, Copy)]
pub struct Path {
    pub from: Place,
    pub to: Place,
    pub next: [Place; 2],
}

/// Columns that [`rows`] advances.
pub const ROWS: usize = 16;

/// Advances `ROWS` value columns whose key channels are contiguous. Rows are too short for the processor's own
/// prefetching: the next block is asked for here.
///
/// # Safety
/// `from` and `to` are `ROWS` rows of `s` floats, the same or apart, `value` and `out` hold `ROWS`; LANES is at
/// least 2.
#[inline(always)]
pub unsafe fn rows<S: Simd>(token: &Token, path: Path, value: *const f32, out: *mut f32, s: usize) {
    let Path { from, to, next } = path;
    let group = S::LANES / 2;
    let mut sums = [0.0; 2 * ROWS];
    let mut delta = [0.0; ROWS];
    // SAFETY: rows and channels stay below ROWS and s; `sums` gets LANES floats for every LANES / 2 rows.
    unsafe {
        for first in (0..ROWS).step_by(group) {
            let mut acc = [S::splat(0.0); MAX_LANES];
            let row = from.at.add(first * from.pitch);
            for i in (0..s).step_by(S::LANES) {
                let (k, q) = (S::load(token.decayed_k.add(i)), S::load(token.decayed_q.add(i)));
                for r in 0..group {
                    let state = S::load(row.add(r * from.pitch + i));
                    acc[r] = S::fma(state, k, acc[r]);
                    acc[group + r] = S::fma(state, q, acc[group + r]);
                }
            }
            S::sums(acc.as_ptr(), sums.as_mut_ptr().add(2 * first));
        }
        for (r, delta) in delta.iter_mut().enumerate() {
            let at = r / group * 2 * group + r % group;
            *delta = token.beta * (*value.add(r) - sums[at]);
            *out.add(r) = token.scale * (sums[at + group] + *delta * token.kq);
        }
        let clamps = token.limit < f32::INFINITY;
        for first in (0..ROWS).step_by(group) {
            let mut d = [S::splat(0.0); MAX_LANES];
            for r in 0..group {
                d[r] = S::splat(delta[first + r]);
            }
            if !next[0].at.is_null() {
                ask::<S>(next, first, group, s);
            }
            let (row, new) = (from.at.add(first * from.pitch), to.at.add(first * to.pitch));
            for i in (0..s).step_by(S::LANES) {
                let (k, decay) = (S::load(token.k.add(i)), S::load(token.decay.add(i)));
                for r in 0..group {
                    let state = S::mul(decay, S::load(row.add(r * from.pitch + i)));
                    let state = S::fma(d[r], k, state);
                    S::store(new.add(r * to.pitch + i), if clamps { clamp::<S>(token.limit, state) } else { state });
                }
            }
        }
    }
}

/// Asks for rows `first .. first + count` of what comes next.
///
/// # Safety
/// `S`'s features are there.
#[inline(always)]
unsafe fn ask<S: Simd>(next: [Place; 2], first: usize, count: usize, s: usize) {
    for r in first..first + count {
        let [from, to] = next.map(|place| place.at.wrapping_add(r * place.pitch));
        for i in (0..s).step_by(LINE) {
            // SAFETY: prefetching takes any address.
            unsafe {
                if from != to {
                    S::prefetch(from.wrapping_add(i));
                }
                S::prefetch_to_write(to.wrapping_add(i));
            }
        }
    }
}

/// Advances `NV` vectors of value columns that are contiguous.
///
/// # Safety
/// `from` and `to` are `s` rows of `NV * LANES` floats, the same or apart, `value` and `out` hold as many.
#[inline(always)]
pub unsafe fn columns<S: Simd, const NV: usize>(token: &Token, path: Path, value: *const f32, out: *mut f32, s: usize) {
    let Path { from, to, .. } = path;
    // SAFETY: i < s and v < NV keep every access inside what the caller promises.
    unsafe {
        let old = |i: usize, v: usize| from.at.add(i * from.pitch + v * S::LANES);
        let new = |i: usize, v: usize| to.at.add(i * to.pitch + v * S::LANES);
        let mut predicted = [[S::splat(0.0); NV]; 2];
        let mut recalled = [[S::splat(0.0); NV]; 2];
        for i in (0..s).step_by(S::CHAINS) {
            for c in 0..S::CHAINS {
                let (k, q) = (S::splat(*token.decayed_k.add(i + c)), S::splat(*token.decayed_q.add(i + c)));
                for v in 0..NV {
                    let state = S::load(old(i + c, v));
                    predicted[c][v] = S::fma(state, k, predicted[c][v]);
                    recalled[c][v] = S::fma(state, q, recalled[c][v]);
                }
            }
        }
        let mut delta = [S::splat(0.0); NV];
        for v in 0..NV {
            if S::CHAINS == 2 {
                predicted[0][v] = S::add(predicted[0][v], predicted[1][v]);
                recalled[0][v] = S::add(recalled[0][v], recalled[1][v]);
            }
            let error = S::sub(S::load(value.add(v * S::LANES)), predicted[0][v]);
            delta[v] = S::mul(S::splat(token.beta), error);
            recalled[0][v] = S::fma(delta[v], S::splat(token.kq), recalled[0][v]);
        }
        let clamps = token.limit < f32::INFINITY;
        for i in 0..s {
            let (decay, k) = (S::splat(*token.decay.add(i)), S::splat(*token.k.add(i)));
            for v in 0..NV {
                let state = S::fma(delta[v], k, S::mul(decay, S::load(old(i, v))));
                S::store(new(i, v), if clamps { clamp::<S>(token.limit, state) } else { state });
            }
        }
        for v in 0..NV {
            S::store(out.add(v * S::LANES), S::mul(S::splat(token.scale), recalled[0][v]));
        }
    }
}

/// # Safety
/// `S`'s features are there.
#[inline(always)]
unsafe fn clamp<S: Simd>(limit: f32, x: S::V) -> S::V {
    // SAFETY: passed on. The limit comes first, so that NaN stays.
    unsafe { S::max(S::splat(-limit), S::min(S::splat(limit), x)) }
}
