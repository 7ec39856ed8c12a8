//! One token's step on some value columns of a state: the token-serial arithmetic, once for each way the state lies.
//!
//! S'^T q = (decay S)^T q + delta (k.q): both products need only the old state, so it is read once for them and once
//! more, out of a near cache, to be updated. Decay goes into k and q beforehand; a gate per channel then costs nothing
//! extra. Memory is asked ahead for what comes next, evenly over both passes: bursts would wait for each other.

use super::simd::{MAX_LANES, Simd};
use super::token::Token;

/// Where a state's columns lie: `pitch` floats between neighbours along the axis that is not contiguous.
#[derive(Clone, Copy)]
pub struct Place {
    pub at: *mut f32,
    pub pitch: usize,
}

/// Floats of a cache line.
pub const LINE: usize = 16;

/// The head size that instructions are written for: with it, and a state without gaps, a row's distance is part of an
/// instruction.
pub const COMMON: usize = 128;

impl Place {
    /// The place `floats` further on.
    pub fn right(self, floats: usize) -> Place {
        Place { at: self.at.wrapping_add(floats), ..self }
    }
}

/// A step's way through memory: `from` and `to` are the same or apart; `next` is what will be read and written after
/// this block. It need not exist.
#[derive(Clone, Copy)]
pub struct Path {
    pub from: Place,
    pub to: Place,
    pub next: [Place; 2],
}

/// What is known of a step beforehand; nothing may be promised that does not hold.
pub trait Known {
    /// Head size and pitches are [`COMMON`].
    const COMMON: bool;
    /// The state is clamped.
    const CLAMPS: bool;
    /// What comes next is not updated in place.
    const APART: bool;

    /// The head size, as a constant where it is known.
    #[inline(always)]
    fn head_size(s: usize) -> usize {
        if Self::COMMON { COMMON } else { s }
    }
}

pub struct Fast<const CLAMPS: bool, const APART: bool>;

impl<const CLAMPS: bool, const APART: bool> Known for Fast<CLAMPS, APART> {
    const COMMON: bool = true;
    const CLAMPS: bool = CLAMPS;
    const APART: bool = APART;
}

/// Nothing is known, everything is provided for.
pub struct Any;

impl Known for Any {
    const COMMON: bool = false;
    const CLAMPS: bool = true;
    const APART: bool = true;
}

/// Calls `$step` with the type that says what is known of its token and path.
macro_rules! with_known {
    ($token:expr, $path:expr, $s:expr, $step:ident::<$simd:ty>($($rest:expr),*)) => {{
        let common = $s == COMMON && $path.from.pitch == COMMON && $path.to.pitch == COMMON;
        match (common, $token.limit < f32::INFINITY, $path.next[0].at != $path.next[1].at) {
            (true, false, false) => $step::<$simd, Fast<false, false>>($token, $path, $($rest),*),
            (true, false, true) => $step::<$simd, Fast<false, true>>($token, $path, $($rest),*),
            (true, true, false) => $step::<$simd, Fast<true, false>>($token, $path, $($rest),*),
            (true, true, true) => $step::<$simd, Fast<true, true>>($token, $path, $($rest),*),
            _ => $step::<$simd, Any>($token, $path, $($rest),*),
        }
    }};
}
impl Path {
    /// With constants where they are known.
    #[inline(always)]
    pub fn known<K: Known>(self) -> Path {
        let known = |place: Place| if K::COMMON { Place { pitch: COMMON, ..place } } else { place };
        Path { from: known(self.from), to: known(self.to), next: self.next.map(known) }
    }

    /// Asks for the line at `row` and `float` of what comes next, as far as L1 or only L2.
    #[inline(always)]
    pub unsafe fn ask<S: Simd, K: Known, const FAR: bool>(&self, row: usize, float: usize) {
        let line = |place: Place| place.at.wrapping_add(row * place.pitch + float).cast_const();
        let [from, to] = self.next.map(line);
        // SAFETY: prefetching takes any address; `S`'s features are there.
        unsafe {
            if K::APART {
                if FAR { S::prefetch_far(from) } else { S::prefetch(from) }
            }
            if FAR { S::prefetch_far(to) } else { S::prefetch_to_write(to) }
        }
    }
}

/// Sums of squares that tell whether a clamp may have been met: one operation an element instead of two.
pub struct Guard<S: Simd>([S::V; 4]);

impl<S: Simd> Guard<S> {
    /// # Safety
    /// `S`'s features are there.
    #[inline(always)]
    pub unsafe fn new() -> Guard<S> {
        // SAFETY: passed on.
        Guard([unsafe { S::splat(0.0) }; 4])
    }

    /// # Safety
    /// As for [`Guard::new`].
    #[inline(always)]
    pub unsafe fn see(&mut self, at: usize, x: S::V) {
        // SAFETY: passed on.
        unsafe { self.0[at % 4] = S::fma(x, x, self.0[at % 4]) }
    }

    /// The sum of the squares of all that was seen: at least each of them; NaN if one was.
    ///
    /// # Safety
    /// As for [`Guard::new`].
    #[inline(always)]
    pub unsafe fn squares(&self) -> f32 {
        let mut lanes = [0.0f32; MAX_LANES];
        // SAFETY: passed on; `lanes` has room for any LANES.
        unsafe {
            let all = S::add(S::add(self.0[0], self.0[1]), S::add(self.0[2], self.0[3]));
            S::store(lanes.as_mut_ptr(), all);
        }
        lanes.iter().sum()
    }

    /// Whether every number seen was below the limit.
    ///
    /// # Safety
    /// As for [`Guard::new`].
    #[inline(always)]
    unsafe fn is_below(&self, limit: f32) -> bool {
        // SAFETY: passed on.
        unsafe { self.squares() < 0.99 * limit * limit }
    }
}

/// Columns that [`rows`] advances.
pub const ROWS: usize = 16;

/// Advances `ROWS` value columns whose key channels are contiguous.
///
/// # Safety
/// `from` and `to` are `ROWS` rows of `s` floats, the same or apart, `value` and `out` hold `ROWS`; LANES is at
/// least 2.
#[inline(always)]
pub unsafe fn rows<S: Simd>(token: &Token, path: Path, value: *const f32, out: *mut f32, s: usize) {
    // SAFETY: passed on.
    unsafe { with_known!(token, path, s, rows_known::<S>(value, out, s)) }
}

/// # Safety
/// As for [`rows`].
#[inline(always)]
unsafe fn rows_known<S: Simd, K: Known>(token: &Token, path: Path, value: *const f32, out: *mut f32, s: usize) {
    let s = K::head_size(s);
    let path = path.known::<K>();
    let Path { from, to, .. } = path;
    let group = S::LANES / 2;
    let (mut predicted, mut recalled) = ([0.0f32; ROWS], [0.0f32; ROWS]);
    let mut delta = [0.0f32; ROWS];
    // SAFETY: rows and channels stay below ROWS and s; ROWS is a multiple of LANES.
    unsafe {
        for first in (0..ROWS).step_by(group) {
            let mut acc = [S::splat(0.0); MAX_LANES];
            let row = from.at.add(first * from.pitch);
            for line in (0..s).step_by(LINE) {
                for i in (line..line + LINE).step_by(S::LANES) {
                    let (k, q) = (S::load(token.decayed_k.add(i)), S::load(token.decayed_q.add(i)));
                    for r in 0..group {
                        let state = S::load(row.add(r * from.pitch + i));
                        acc[r] = S::fma(state, k, acc[r]);
                        acc[group + r] = S::fma(state, q, acc[group + r]);
                    }
                }
                for r in 0..group / 2 {
                    path.ask::<S, K, false>(first + r, line);
                }
            }
            let mut sums = [0.0f32; MAX_LANES];
            S::sums(acc.as_ptr(), sums.as_mut_ptr());
            predicted[first..first + group].copy_from_slice(&sums[..group]);
            recalled[first..first + group].copy_from_slice(&sums[group..2 * group]);
        }
        for r in (0..ROWS).step_by(S::LANES) {
            let error = S::sub(S::load(value.add(r)), S::load(predicted.as_ptr().add(r)));
            let d = S::mul(S::splat(token.beta), error);
            let o = S::fma(d, S::splat(token.kq), S::load(recalled.as_ptr().add(r)));
            S::store(delta.as_mut_ptr().add(r), d);
            S::store(out.add(r), S::mul(S::splat(token.scale), o));
        }
        const GROUP: usize = 8;
        let mut guard = Guard::<S>::new();
        for first in (0..ROWS).step_by(GROUP) {
            let mut d = [S::splat(0.0); GROUP];
            for r in 0..GROUP {
                d[r] = S::splat(delta[first + r]);
            }
            let (row, new) = (from.at.add(first * from.pitch), to.at.add(first * to.pitch));
            for line in (0..s).step_by(LINE) {
                for i in (line..line + LINE).step_by(S::LANES) {
                    let (k, decay) = (S::load(token.k.add(i)), S::load(token.decay.add(i)));
                    for r in 0..GROUP {
                        let state = S::mul(decay, S::load(row.add(r * from.pitch + i)));
                        let state = S::fma(d[r], k, state);
                        S::store(new.add(r * to.pitch + i), state);
                        if K::CLAMPS {
                            guard.see(r, state);
                        }
                    }
                }
                // The rows that the first pass left out.
                for r in 0..GROUP {
                    if r % group >= group / 2 {
                        path.ask::<S, K, false>(first + r, line);
                    }
                }
            }
        }
        if K::CLAMPS && !guard.is_below(token.limit) {
            clamp_all::<S>(to, ROWS, s, token.limit);
        }
    }
}

/// Advances `width` value columns that are contiguous, all of them one group of key channels after another: memory is
/// walked through as it lies. (A block of columns would be no nearer: its rows' distance puts them into few sets of a
/// cache.)
///
/// # Safety
/// `from` and `to` are `s` rows of `width` floats, the same or apart, `value` and `out` hold as many, and `sums` twice as
/// many; `width` is a multiple of LANES.
#[inline(always)]
pub unsafe fn streamed<S: Simd>(
    token: &Token,
    path: Path,
    value: *const f32,
    out: *mut f32,
    sums: *mut f32,
    s: usize,
    width: usize,
) {
    // SAFETY: passed on.
    unsafe { with_known!(token, path, s, streamed_known::<S>(value, out, sums, s, width)) }
}

/// # Safety
/// As for [`streamed`].
#[inline(always)]
unsafe fn streamed_known<S: Simd, K: Known>(
    token: &Token,
    path: Path,
    value: *const f32,
    out: *mut f32,
    sums: *mut f32,
    s: usize,
    width: usize,
) {
    const MOST: usize = 8;
    /// Lines of what comes next are asked for over two passes.
    const PASSES: usize = 2;
    let s = K::head_size(s);
    let path = path.known::<K>();
    let Path { from, to, .. } = path;
    // SAFETY: i < s and v < width keep every access inside what the caller promises; groups divide s.
    unsafe {
        let (predicted, recalled) = (sums, sums.add(width));
        for v in (0..2 * width).step_by(S::LANES) {
            S::store(sums.add(v), S::splat(0.0));
        }
        let group = S::KEYS;
        for i in (0..s).step_by(group) {
            let (mut k, mut q) = ([S::splat(0.0); MOST], [S::splat(0.0); MOST]);
            for c in 0..group {
                k[c] = S::splat(*token.decayed_k.add(i + c));
                q[c] = S::splat(*token.decayed_q.add(i + c));
            }
            let row = from.at.add(i * from.pitch);
            for line in (0..width).step_by(LINE) {
                for v in (line..line + LINE).step_by(S::LANES) {
                    let mut p = S::load(predicted.add(v));
                    let mut r = S::load(recalled.add(v));
                    for c in 0..group {
                        let state = S::load(row.add(c * from.pitch + v));
                        p = S::fma(state, k[c], p);
                        r = S::fma(state, q[c], r);
                    }
                    S::store(predicted.add(v), p);
                    S::store(recalled.add(v), r);
                }
                for c in 0..group / PASSES {
                    path.ask::<S, K, true>(i / PASSES + c, line);
                }
            }
        }
        for v in (0..width).step_by(S::LANES) {
            let error = S::sub(S::load(value.add(v)), S::load(predicted.add(v)));
            let delta = S::mul(S::splat(token.beta), error);
            let o = S::fma(delta, S::splat(token.kq), S::load(recalled.add(v)));
            S::store(predicted.add(v), delta);
            S::store(out.add(v), S::mul(S::splat(token.scale), o));
        }
        let delta = predicted;
        let mut guard = Guard::<S>::new();
        // Backwards: what the first pass read last is still near.
        for asked in (0..s).step_by(group) {
            let i = s - group - asked;
            let (mut k, mut decay) = ([S::splat(0.0); MOST], [S::splat(0.0); MOST]);
            for c in 0..group {
                k[c] = S::splat(*token.k.add(i + c));
                decay[c] = S::splat(*token.decay.add(i + c));
            }
            let (row, new) = (from.at.add(i * from.pitch), to.at.add(i * to.pitch));
            for line in (0..width).step_by(LINE) {
                for v in (line..line + LINE).step_by(S::LANES) {
                    let d = S::load(delta.add(v));
                    for c in 0..group {
                        let state = S::fma(d, k[c], S::mul(decay[c], S::load(row.add(c * from.pitch + v))));
                        S::store(new.add(c * to.pitch + v), state);
                        if K::CLAMPS {
                            guard.see(c, state);
                        }
                    }
                }
                for c in 0..group / PASSES {
                    path.ask::<S, K, true>((s + asked) / PASSES + c, line);
                }
            }
        }
        if K::CLAMPS && !guard.is_below(token.limit) {
            clamp_all::<S>(to, s, width, token.limit);
        }
    }
}

/// Clamps `rows` rows of `n` floats.
///
/// # Safety
/// The rows are there, `n` is a multiple of LANES.
#[cold]
#[inline(always)]
unsafe fn clamp_all<S: Simd>(place: Place, rows: usize, n: usize, limit: f32) {
    // SAFETY: as promised.
    unsafe {
        for r in 0..rows {
            for i in (0..n).step_by(S::LANES) {
                let at = place.at.add(r * place.pitch + i);
                S::store(at, clamp::<S>(limit, S::load(at)));
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
