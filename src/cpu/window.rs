//! A few tokens in one pass over a state: what they read of it does not depend on each other, and they change it together.
//!
//! With D_j the decay from the window's start to after token j, and S the state before it:
//!
//! ```text
//! d_j = beta_j (v_j - S^T (D_j k_j) - sum over i < j of (k_i . D_j/D_i k_j) d_i)
//! o_j = scale (S^T (D_j q_j) + sum over i <= j of (k_i . D_j/D_i q_j) d_i)
//! S'  = D_W S + sum over i of (D_W/D_i k_i) d_i^T
//! ```
//!
//! No quotient is taken: each D_j/D_i is a product of decays.

use super::simd::{MAX_LANES, Simd};
use super::step::{Any, COMMON, Fast, Guard, Known, LINE, Path, ROWS};
use super::token::{Batch, dot, multiply};
use crate::problem::Problem;

/// Tokens of a window, at most, whatever the instruction set.
pub const MOST: usize = 8;

/// Value columns that are advanced or left as they are together.
pub const UNIT: usize = ROWS;

/// Floats of scratch that a window needs for each of its tokens.
pub const fn floats_a_token(s: usize) -> usize {
    // Three rows a token and one a window, which has two tokens at least; a row of either matrix, beta and a magnitude.
    3 * s + s.div_ceil(2) + 2 * MOST + 2
}

/// What a window's tokens do to a head's state.
#[derive(Clone, Copy)]
pub struct Window {
    /// Rows of a head's channels: `tokens` keys and as many queries, decayed from the window's start to the token; keys
    /// decayed from their token to the window's end; the whole window's decay.
    rows: *const f32,
    tokens: usize,
    /// `[j][i]`: what token j finds of token i's key with its own key, i < j.
    keys: *const f32,
    /// The same with its query, i <= j.
    queries: *const f32,
    beta: *const f32,
    /// The largest magnitude of each token's key, where there is a clamp.
    largest: *const f32,
    scale: f32,
    limit: f32,
    /// No state grows by more within the window.
    growth: f32,
}

/// Where a window's tokens have their values and outputs: a row each, so many floats apart.
#[derive(Clone, Copy)]
pub struct Io {
    pub value: *const f32,
    pub out: *mut f32,
    pub pitch: usize,
}

impl Window {
    /// The window of `count` tokens of a batch from `first` on; none where a number in it is not finite, or would not be:
    /// one token at a time, each must harm only what it touches.
    ///
    /// # Safety
    /// The tokens are prepared, `rows` has room for [`floats_a_token`] for each, `count` is 2 to [`MOST`], `S`'s
    /// features are there.
    #[inline(always)]
    pub unsafe fn new<S: Simd>(
        p: &Problem,
        batch: &Batch,
        first: usize,
        count: usize,
        rows: *mut f32,
    ) -> Option<Window> {
        let s = p.head_size();
        let limit = p.state_clamp();
        let mut growth = 1.0;
        // SAFETY: rows of s floats, and what comes behind them, inside of what the caller promises; prepared tokens.
        unsafe {
            let row = |at: usize| rows.add(at * s);
            let end = |i: usize| row(2 * count + i);
            let decay = row(3 * count);
            let keys = row(3 * count + 1);
            let queries = keys.add(count * count);
            let beta = queries.add(count * count);
            let largest = beta.add(count);
            for j in 0..count {
                let token = batch.token(p, first + j);
                if j == 0 {
                    std::ptr::copy_nonoverlapping(token.decay, decay, s);
                } else {
                    multiply::<S>(decay, token.decay, decay, s);
                }
                multiply::<S>(decay, token.k, row(j), s);
                multiply::<S>(decay, token.q, row(count + j), s);
                for i in 0..j {
                    multiply::<S>(end(i), token.decay, end(i), s);
                    keys.add(j * count + i).write(dot::<S>(end(i), token.k, s));
                    queries.add(j * count + i).write(dot::<S>(end(i), token.q, s));
                }
                for i in j..count {
                    keys.add(j * count + i).write(0.0);
                    queries.add(j * count + i).write(if i == j { token.kq } else { 0.0 });
                }
                std::ptr::copy_nonoverlapping(token.k, end(j), s);
                beta.add(j).write(token.beta);
                largest.add(j).write(0.0);
                if limit < f32::INFINITY {
                    growth *= largest_of::<S>(token.decay, s).max(1.0);
                    largest.add(j).write(largest_of::<S>(token.k, s));
                }
            }
            let mut finite = S::splat(0.0);
            for at in (0..(3 * count + 1) * s).step_by(S::LANES) {
                finite = S::fma(S::load(rows.add(at)), S::splat(0.0), finite);
            }
            let mut lanes = [0.0f32; MAX_LANES];
            S::store(lanes.as_mut_ptr(), finite);
            let matrices = std::slice::from_raw_parts(keys, 2 * count * count);
            let is_finite = matrices.iter().chain(&lanes).all(|x| x.is_finite());
            let scale = p.scale();
            is_finite.then_some(Window { rows, tokens: count, keys, queries, beta, largest, scale, limit, growth })
        }
    }

    /// Whether 16 columns' states stay below the clamp, token by token: `squares` are at least the squares of each
    /// column's numbers, `delta` its d of each token.
    ///
    /// # Safety
    /// Both hold [`UNIT`] floats, `delta` for each token, `pitch` apart; `S`'s features are there.
    #[inline(always)]
    unsafe fn stays_below<S: Simd, const W: usize>(
        &self,
        squares: *const f32,
        delta: *const f32,
        pitch: usize,
    ) -> bool {
        let mut room = [0.0f32; UNIT];
        // SAFETY: as promised.
        unsafe {
            for v in (0..UNIT).step_by(S::LANES) {
                // |S_j| <= growth (|S| + sum of max|k_i| |d_i|)
                let mut most = S::splat(0.99 * self.limit / self.growth);
                for j in 0..W {
                    let d = S::load(delta.add(j * pitch + v));
                    let magnitude = S::max(d, S::sub(S::splat(0.0), d));
                    most = S::fnma(S::splat(*self.largest.add(j)), magnitude, most);
                }
                let most = S::max(S::splat(0.0), most);
                S::store(room.as_mut_ptr().add(v), S::sub(S::mul(most, most), S::load(squares.add(v))));
            }
        }
        room.iter().all(|room| *room > 0.0)
    }
}

/// The largest magnitude in a row.
///
/// # Safety
/// It holds `n` floats, a multiple of LANES; `S`'s features are there.
#[inline(always)]
unsafe fn largest_of<S: Simd>(row: *const f32, n: usize) -> f32 {
    let mut lanes = [0.0f32; MAX_LANES];
    // SAFETY: as promised.
    unsafe {
        let mut largest = S::splat(0.0);
        for i in (0..n).step_by(S::LANES) {
            let x = S::load(row.add(i));
            largest = S::max(largest, S::max(x, S::sub(S::splat(0.0), x)));
        }
        S::store(lanes.as_mut_ptr(), largest);
    }
    lanes.into_iter().fold(0.0, f32::max)
}

/// The tokens' d and outputs for [`UNIT`] columns, from their products with the old state: `[2 W][pitch]`, keys' first. The
/// keys' become d.
///
/// # Safety
/// All rows hold [`UNIT`] floats from the pointers on; `S`'s features are there.
#[inline(always)]
unsafe fn solve<S: Simd, const W: usize>(w: &Window, products: *mut f32, pitch: usize, io: Io) {
    // SAFETY: as promised.
    unsafe {
        for v in (0..UNIT).step_by(S::LANES) {
            let mut delta = [S::splat(0.0); W];
            for j in 0..W {
                let predicted = products.add(j * pitch + v);
                let mut error = S::sub(S::load(io.value.add(j * io.pitch + v)), S::load(predicted));
                for i in 0..j {
                    error = S::fnma(S::splat(*w.keys.add(j * W + i)), delta[i], error);
                }
                delta[j] = S::mul(S::splat(*w.beta.add(j)), error);
                S::store(predicted, delta[j]);
                let mut o = S::load(products.add((W + j) * pitch + v));
                for i in 0..=j {
                    o = S::fma(S::splat(*w.queries.add(j * W + i)), delta[i], o);
                }
                S::store(io.out.add(j * io.pitch + v), S::mul(S::splat(w.scale), o));
            }
        }
    }
}

/// Calls `$step` with the window's number of tokens as a constant, and the type that says what is known.
macro_rules! with_tokens {
    ($w:expr, $path:expr, $s:expr, $step:ident::<$simd:tt>($($rest:expr),*)) => {
        match $w.tokens {
            2 => with_tokens!(@ $w, $path, $s, $step::<$simd, 2>($($rest),*)),
            3 => with_tokens!(@ $w, $path, $s, $step::<$simd, 3>($($rest),*)),
            4 => with_tokens!(@ $w, $path, $s, $step::<$simd, 4>($($rest),*)),
            // Windows are not longer than the instruction set's.
            5 if $simd::WINDOW > 4 => with_tokens!(@ $w, $path, $s, $step::<$simd, 5>($($rest),*)),
            6 if $simd::WINDOW > 4 => with_tokens!(@ $w, $path, $s, $step::<$simd, 6>($($rest),*)),
            7 if $simd::WINDOW > 4 => with_tokens!(@ $w, $path, $s, $step::<$simd, 7>($($rest),*)),
            _ if $simd::WINDOW > 4 => with_tokens!(@ $w, $path, $s, $step::<$simd, 8>($($rest),*)),
            _ => unreachable!(),
        }
    };
    // There are many of these: what is asked for may lie apart in all of them.
    (@ $w:expr, $path:expr, $s:expr, $step:ident::<$simd:tt, $tokens:literal>($($rest:expr),*)) => {
        match ($s == COMMON && $path.from.pitch == COMMON && $path.to.pitch == COMMON, $w.limit < f32::INFINITY) {
            (true, false) => $step::<$simd, $tokens, Fast<false, true>>($w, $path, $($rest),*),
            (true, true) => $step::<$simd, $tokens, Fast<true, true>>($w, $path, $($rest),*),
            (false, _) => $step::<$simd, $tokens, Any>($w, $path, $($rest),*),
        }
    };
}

/// Advances [`UNIT`] value columns whose key channels are contiguous by a window's tokens. False where one of them may meet
/// the clamp: their states are then what they were, and their outputs void.
///
/// # Safety
/// As for [`super::step::rows`], for the values and outputs of each token; `products` has room for [`SUMS`] times [`UNIT`].
#[inline(always)]
pub unsafe fn rows<S: Simd>(w: &Window, path: Path, io: Io, products: *mut f32, s: usize) -> bool {
    // SAFETY: passed on.
    unsafe { with_tokens!(w, path, s, rows_known::<S>(io, products, s)) }
}

/// # Safety
/// As for [`rows`].
#[inline(always)]
unsafe fn rows_known<S: Simd, const W: usize, K: Known>(
    w: &Window,
    path: Path,
    io: Io,
    products: *mut f32,
    s: usize,
) -> bool {
    let s = K::head_size(s);
    let path = path.known::<K>();
    let Path { from, to, .. } = path;
    let (starts, ends) = (w.rows, w.rows.wrapping_add(2 * W * s));
    let decays = ends.wrapping_add(W * s);
    // As many rows at a time as make a whole vector of sums.
    let group = (S::LANES / (2 * W)).max(1);
    // SAFETY: rows and channels stay below UNIT and s; groups divide UNIT.
    unsafe {
        let mut guard = Guard::<S>::new();
        for first in (0..UNIT).step_by(group) {
            let mut acc = [S::splat(0.0); MAX_LANES];
            let row = from.at.add(first * from.pitch);
            for line in (0..s).step_by(LINE) {
                for i in (line..line + LINE).step_by(S::LANES) {
                    let mut state = [S::splat(0.0); MAX_LANES];
                    for r in 0..group {
                        state[r] = S::load(row.add(r * from.pitch + i));
                        if K::CLAMPS {
                            guard.see(r, state[r]);
                        }
                    }
                    for j in 0..2 * W {
                        let start = S::load(starts.add(j * s + i));
                        for r in 0..group {
                            acc[j * group + r] = S::fma(state[r], start, acc[j * group + r]);
                        }
                    }
                }
                for r in 0..group {
                    if (first + r).is_multiple_of(2) {
                        path.ask::<S, K, false>(first + r, line);
                    }
                }
            }
            let mut sums = [0.0f32; MAX_LANES];
            for at in (0..2 * W * group).step_by(S::LANES) {
                S::sums(acc.as_ptr().add(at), sums.as_mut_ptr().add(at));
            }
            for j in 0..2 * W {
                std::ptr::copy_nonoverlapping(sums.as_ptr().add(j * group), products.add(j * UNIT + first), group);
            }
        }
        solve::<S, W>(w, products, UNIT, io);
        if K::CLAMPS {
            let squares = [guard.squares(); UNIT];
            if !w.stays_below::<S, W>(squares.as_ptr(), products, UNIT) {
                return false;
            }
        }
        let group = update_group::<S, W>();
        for first in (0..UNIT).step_by(group) {
            let mut delta = [[S::splat(0.0); MOST_GROUP]; W];
            for j in 0..W {
                for r in 0..group {
                    delta[j][r] = S::splat(*products.add(j * UNIT + first + r));
                }
            }
            let (row, new) = (from.at.add(first * from.pitch), to.at.add(first * to.pitch));
            for line in (0..s).step_by(LINE) {
                for i in (line..line + LINE).step_by(S::LANES) {
                    let decay = S::load(decays.add(i));
                    let mut end = [S::splat(0.0); W];
                    for j in 0..W {
                        end[j] = S::load(ends.add(j * s + i));
                    }
                    for r in 0..group {
                        let mut state = S::mul(decay, S::load(row.add(r * from.pitch + i)));
                        for j in 0..W {
                            state = S::fma(delta[j][r], end[j], state);
                        }
                        S::store(new.add(r * to.pitch + i), state);
                    }
                }
                for r in 0..group {
                    if !(first + r).is_multiple_of(2) {
                        path.ask::<S, K, false>(first + r, line);
                    }
                }
            }
        }
    }
    true
}

/// The largest [`update_group`].
const MOST_GROUP: usize = MAX_LANES / 4;

/// Rows of the state that are updated at a time: their factors stay in registers.
const fn update_group<S: Simd, const W: usize>() -> usize {
    let most = if W > 4 { S::LANES / 8 } else { S::LANES / 4 };
    if most == 0 { 1 } else { most }
}

/// Floats that [`columns`] needs for each column.
pub const SUMS: usize = 2 * MOST + 1;

/// Advances `width` value columns that are contiguous by a window's tokens. A bit is set for each [`UNIT`] of them where one
/// may meet the clamp: their states are then what they were, and their outputs void.
///
/// # Safety
/// As for [`super::step::streamed`], for the values and outputs of each token; `sums` has room for [`SUMS`] times the
/// width, a multiple of [`UNIT`] and at most 32 times that.
#[inline(always)]
pub unsafe fn columns<S: Simd>(w: &Window, path: Path, io: Io, sums: *mut f32, s: usize, width: usize) -> u32 {
    // SAFETY: passed on.
    unsafe { with_tokens!(w, path, s, columns_known::<S>(io, sums, s, width)) }
}

/// # Safety
/// As for [`columns`].
#[inline(always)]
unsafe fn columns_known<S: Simd, const W: usize, K: Known>(
    w: &Window,
    path: Path,
    io: Io,
    sums: *mut f32,
    s: usize,
    width: usize,
) -> u32 {
    let s = K::head_size(s);
    let path = path.known::<K>();
    let from = path.from;
    let starts = w.rows;
    let group = S::KEYS;
    let mut left = 0;
    // SAFETY: channels and columns stay below s and the width; groups divide s.
    unsafe {
        let squares = sums.add(2 * W * width);
        for v in (0..(2 * W + 1) * width).step_by(S::LANES) {
            S::store(sums.add(v), S::splat(0.0));
        }
        for i in (0..s).step_by(group) {
            let row = from.at.add(i * from.pitch);
            for line in (0..width).step_by(LINE) {
                for v in (line..line + LINE).step_by(S::LANES) {
                    let mut acc = [[S::splat(0.0); W]; 2];
                    for j in 0..2 * W {
                        acc[j / W][j % W] = S::load(sums.add(j * width + v));
                    }
                    let mut square = S::splat(0.0);
                    for c in 0..group {
                        let state = S::load(row.add(c * from.pitch + v));
                        for j in 0..2 * W {
                            let start = S::splat(*starts.add(j * s + i + c));
                            acc[j / W][j % W] = S::fma(state, start, acc[j / W][j % W]);
                        }
                        if K::CLAMPS {
                            square = S::fma(state, state, square);
                        }
                    }
                    for j in 0..2 * W {
                        S::store(sums.add(j * width + v), acc[j / W][j % W]);
                    }
                    if K::CLAMPS {
                        S::store(squares.add(v), S::add(S::load(squares.add(v)), square));
                    }
                }
                for c in 0..group / 2 {
                    path.ask::<S, K, true>(i / 2 + c, line);
                }
            }
        }
        for v in (0..width).step_by(UNIT) {
            solve::<S, W>(w, sums.add(v), width, Io { value: io.value.add(v), out: io.out.add(v), ..io });
            if K::CLAMPS && !w.stays_below::<S, W>(squares.add(v), sums.add(v), width) {
                left |= 1 << (v / UNIT);
            }
        }
        if left == 0 {
            columns_update::<S, W, K>(w, path, sums, s, 0..width, width);
        } else {
            for v in (0..width).step_by(UNIT).filter(|v| left >> (v / UNIT) & 1 == 0) {
                columns_update::<S, W, K>(w, path, sums, s, v..v + UNIT, width);
            }
        }
    }
    left
}

/// The states of some of the columns after the window.
///
/// # Safety
/// As for [`columns`]; `delta` holds the tokens' d, `pitch` floats apart.
#[inline(always)]
unsafe fn columns_update<S: Simd, const W: usize, K: Known>(
    w: &Window,
    path: Path,
    delta: *const f32,
    s: usize,
    columns: std::ops::Range<usize>,
    pitch: usize,
) {
    let Path { from, to, .. } = path;
    let ends = w.rows.wrapping_add(2 * W * s);
    let decays = ends.wrapping_add(W * s);
    // Two at least: half of them ask for a row each.
    let group = update_group::<S, W>().max(2);
    // SAFETY: as in `columns_known`.
    unsafe {
        // Backwards: what the first pass read last is still near.
        for asked in (0..s).step_by(group) {
            let i = s - group - asked;
            let (mut decay, mut end) = ([S::splat(0.0); MOST_GROUP], [[S::splat(0.0); MOST_GROUP]; W]);
            for c in 0..group {
                decay[c] = S::splat(*decays.add(i + c));
                for j in 0..W {
                    end[j][c] = S::splat(*ends.add(j * s + i + c));
                }
            }
            let (row, new) = (from.at.add(i * from.pitch), to.at.add(i * to.pitch));
            for line in columns.clone().step_by(LINE) {
                for v in (line..line + LINE).step_by(S::LANES) {
                    let mut d = [S::splat(0.0); W];
                    for j in 0..W {
                        d[j] = S::load(delta.add(j * pitch + v));
                    }
                    for c in 0..group {
                        let mut state = S::mul(decay[c], S::load(row.add(c * from.pitch + v)));
                        for j in 0..W {
                            state = S::fma(d[j], end[j][c], state);
                        }
                        S::store(new.add(c * to.pitch + v), state);
                    }
                }
                for c in 0..group / 2 {
                    path.ask::<S, K, true>((s + asked) / 2 + c, line);
                }
            }
        }
    }
}
