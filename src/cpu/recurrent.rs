//! The token-serial algorithm, with every option of the operator: decode, short prompts, gates per channel, snapshots.
//!
//! Value columns do not depend on each other, and a column's arithmetic does not depend on the block it is in. Short
//! runs read the caller's state once and write it once, with what lies between in L1; longer ones keep the state in
//! scratch and visit it block by block.

use super::ahead::Ahead;
use super::rows::{Columns, load_row, store_row};
use super::simd::Simd;
use super::step::{self, Path, Place};
use super::token::{BATCH, Batch, Token};
use super::window::{self, Io, UNIT, Window};
use crate::problem::{Problem, StateView};
use std::mem::MaybeUninit;
use std::ops::Range;

/// Value columns that [`step::columns`] advances at a time.
const BLOCK: usize = 32;

/// Value columns that [`step::streamed`] advances at a time.
const WIDE: usize = 128;

/// Floats of state that a run keeps in scratch.
const RESIDENT: usize = 1 << 16;

/// Floats of states in scratch.
fn state_floats(s: usize) -> usize {
    (s * s).min(RESIDENT).max(s * WIDE.min(s)).max(s * BLOCK)
}

/// Floats of scratch that a run needs.
pub fn scratch_floats(s: usize) -> usize {
    Batch::floats(s) + state_floats(s) + BATCH * window::floats_a_token(s) + (2 * window::MOST + window::SUMS) * WIDE
}

/// Columns of one head of one sequence, and the tokens of it to run: up to the sequence's last.
#[derive(Clone)]
pub struct Run {
    pub sequence: usize,
    pub head: usize,
    pub columns: Range<usize>,
    pub tokens: Range<usize>,
    /// The state before the first of the tokens, and its row.
    pub source: (StateView, usize),
    /// The head and the column with which this thread goes on.
    pub next: Option<(usize, usize)>,
}

/// How the states lie in memory.
#[derive(PartialEq)]
enum Layout {
    /// Key channels contiguous everywhere.
    Rows,
    /// Value channels contiguous everywhere.
    Columns,
    Mixed,
}

fn layout(p: &Problem) -> Layout {
    let all = |test: fn(&StateView) -> bool| {
        test(&p.state_in) && p.state_out.iter().all(test) && p.snapshots.iter().all(|snapshots| test(&snapshots.slot0))
    };
    if all(|state| state.nb_k == 4) {
        Layout::Rows
    } else if all(|state| state.nb_v == 4) {
        Layout::Columns
    } else {
        Layout::Mixed
    }
}

/// Runs columns of one head. `NV` vectors are [`BLOCK`] columns (16 for one lane), `NH` are 16.
///
/// # Safety
/// The problem's memory is as described and nobody else touches what this run writes; `scratch` has room for
/// [`scratch_floats`]; `S`'s features are there.
#[inline(always)]
pub unsafe fn run<S: Simd, const NV: usize, const NH: usize>(p: &Problem, run: &Run, scratch: *mut f32) {
    const { assert!(NH * S::LANES == 16 && NV * S::LANES <= BLOCK) };
    let in_memory = run.tokens.len() <= BATCH;
    let length = p.token_range(run.sequence).len();
    let is_kept = |t: usize| p.snapshots.is_some_and(|kept| kept.slot(t, length).is_some());
    let windows = run.tokens.len() > 1 && !(run.tokens.start..run.tokens.end - 1).all(is_kept);
    // SAFETY: passed on.
    unsafe {
        match layout(p) {
            // Rows are summed across lanes, a few at a time.
            Layout::Rows if in_memory && S::LANES > 1 => match windows {
                true => direct::<S, AsRows, true>(p, run, scratch),
                false => direct::<S, AsRows, false>(p, run, scratch),
            },
            Layout::Columns if in_memory && S::LANES > 1 => match windows {
                true => direct::<S, AsWhole, true>(p, run, scratch),
                false => direct::<S, AsWhole, false>(p, run, scratch),
            },
            _ => {
                let most = (RESIDENT / p.head_size()).max(BLOCK);
                for first in run.columns.clone().step_by(most) {
                    let columns = first..run.columns.end.min(first + most);
                    resident::<S, NV, NH>(p, &Run { columns, ..run.clone() }, scratch);
                }
            }
        }
    }
}

/// Steps on a block of columns, by how they lie.
trait Advance {
    /// Columns of a block.
    const WIDTH: usize;
    /// Whether `pitch` goes from one value column to the next, and not from one key channel to the next.
    const ROWS: bool;

    /// # Safety
    /// As for the step behind it, with `width` columns, a multiple of 16.
    unsafe fn step<S: Simd>(t: &Token, path: Path, value: *const f32, out: *mut f32, s: usize, width: usize);

    /// The same for a window's tokens. A bit is set for each [`UNIT`] columns that must go token by token.
    ///
    /// # Safety
    /// As for the step, for the values and outputs of each token; `sums` has room for [`window::SUMS`] times the width.
    unsafe fn window<S: Simd>(w: &Window, path: Path, io: Io, sums: *mut f32, s: usize, width: usize) -> u32;

    /// A path's part for [`UNIT`] columns, `at` columns further on.
    fn part(path: Path, at: usize) -> Path;
}

struct AsRows;

impl Advance for AsRows {
    const WIDTH: usize = step::ROWS;
    const ROWS: bool = true;

    #[inline(always)]
    unsafe fn step<S: Simd>(t: &Token, path: Path, value: *const f32, out: *mut f32, s: usize, _: usize) {
        // SAFETY: passed on; the width is 16.
        unsafe { step::rows::<S>(t, path, value, out, s) }
    }

    #[inline(always)]
    unsafe fn window<S: Simd>(w: &Window, path: Path, io: Io, sums: *mut f32, s: usize, _: usize) -> u32 {
        // SAFETY: passed on; the width is 16.
        unsafe { u32::from(!window::rows::<S>(w, path, io, sums, s)) }
    }

    #[inline(always)]
    fn part(path: Path, _: usize) -> Path {
        path
    }
}

struct AsWhole;

impl Advance for AsWhole {
    const WIDTH: usize = WIDE;
    const ROWS: bool = false;

    #[inline(always)]
    unsafe fn step<S: Simd>(t: &Token, path: Path, value: *const f32, out: *mut f32, s: usize, width: usize) {
        let mut sums = [MaybeUninit::<f32>::uninit(); 2 * WIDE];
        // SAFETY: passed on; the width is at most WIDE.
        unsafe { step::streamed::<S>(t, path, value, out, sums.as_mut_ptr().cast(), s, width) }
    }

    #[inline(always)]
    unsafe fn window<S: Simd>(w: &Window, path: Path, io: Io, sums: *mut f32, s: usize, width: usize) -> u32 {
        // SAFETY: passed on.
        unsafe { window::columns::<S>(w, path, io, sums, s, width) }
    }

    #[inline(always)]
    fn part(path: Path, at: usize) -> Path {
        Path { from: path.from.right(at), to: path.to.right(at), ..path }
    }
}

/// Runs at most [`BATCH`] tokens from memory to memory, block by block, one by one or in windows: the first reads the
/// source, one with a snapshot ends a window and writes its slot, the last one writes the destination, all others scratch.
///
/// # Safety
/// As for [`run`]; all states lie as the step needs them.
#[inline(always)]
unsafe fn direct<S: Simd, A: Advance, const WINDOWS: bool>(p: &Problem, run: &Run, scratch: *mut f32) {
    let s = p.head_size();
    let Run { sequence: b, head, .. } = *run;
    let (_, sequence) = p.tensor_sequences(b);
    let range = p.token_range(b);
    let place = |(view, row): (StateView, usize), (head, column): (usize, usize)| Place {
        at: view.head(head, row).wrapping_byte_add(column * view.nb_v),
        pitch: if A::ROWS { view.nb_v } else { view.nb_k } / 4,
    };
    let slot = |t: usize| p.snapshots.and_then(|kept| kept.slot(t, range.len()).map(|slot| (kept.view(slot), b)));
    let destination = p.state_out.map(|view| (view, p.row_out(b)));
    // The tokens of the window from token `t` on: windows of nearly the same length.
    let tokens = |t: usize| {
        let rest = if WINDOWS { run.tokens.end - t } else { return 1 };
        let most = t + rest.div_ceil(rest.div_ceil(S::WINDOW));
        (t..most).find(|t| slot(*t).is_some()).map_or(most, |last| last + 1) - t
    };
    let batch = Batch::new(scratch, s);
    let steps = run.columns.len().div_ceil(A::WIDTH) * run.tokens.len();
    let mut ahead = run.next.map_or(Ahead::new(), |next| ahead(p, run, next));
    let each = ahead.lines().div_ceil(steps.max(1));
    // SAFETY: the batch holds the tokens; places are columns of states inside the problem's, or scratch behind the
    // batch, which has room for WIDTH columns (at most s); windows have room behind those, token by token; values and
    // outs have room for WIDE columns of a token, or behind the windows for those of all a window's.
    unsafe {
        let states = scratch.add(Batch::floats(s));
        let prepared = states.add(state_floats(s));
        let values = prepared.add(BATCH * window::floats_a_token(s));
        let outs = values.add(window::MOST * WIDE);
        let sums = outs.add(window::MOST * WIDE);
        let between = Place { at: states, pitch: if A::ROWS { s } else { A::WIDTH.min(s) } };
        batch.prepare::<S>(p, b, head, range.start + run.tokens.start, run.tokens.len());
        // Of two tokens at least.
        let mut windows = [None; BATCH / 2];
        let mut t = run.tokens.start;
        while WINDOWS && t < run.tokens.end {
            let (count, at) = (tokens(t), t - run.tokens.start);
            if count > 1 {
                let rows = prepared.add(at * window::floats_a_token(s));
                windows[at / 2] = Window::new::<S>(p, &batch, at, count, rows);
            }
            t += count;
        }
        for column in run.columns.clone().step_by(A::WIDTH) {
            let width = A::WIDTH.min(run.columns.end - column);
            let mut state = place(run.source, (head, column));
            let after = if column + width < run.columns.end { Some((head, column + width)) } else { run.next };
            let mut t = run.tokens.start;
            while t < run.tokens.end {
                let (count, at) = (tokens(t), t - run.tokens.start);
                let end = t + count;
                let mut rows = [[MaybeUninit::<f32>::uninit(); WIDE]; 2];
                let [value, out] = rows.each_mut().map(|row| row.as_mut_ptr().cast::<f32>());
                let (value, out) = if WINDOWS { (values, outs) } else { (value, out) };
                let io = Io { value, out, pitch: WIDE };
                for i in 0..count {
                    load_row::<S>(&p.v, column, width, [head, range.start + t + i, sequence], value.add(i * WIDE));
                }
                let last = if end == range.len() { destination } else { None };
                let to = slot(end - 1).or(last).map_or(between, |state| place(state, (head, column)));
                // Where nothing follows, what is near already is asked for.
                let next = match after.filter(|_| end == run.tokens.end) {
                    Some(after) => [place(run.source, after), destination.map_or(to, |state| place(state, after))],
                    None => [state, to],
                };
                let path = Path { from: state, to, next };
                ahead.ask::<S>(each * count);
                if WINDOWS {
                    // Not in a closure, which would not have the features.
                    let (unit, left) = match &windows[at / 2] {
                        Some(window) if count > 1 => (UNIT, A::window::<S>(window, path, io, sums, s, width)),
                        _ => (width, 1),
                    };
                    for column in (0..width).step_by(unit).filter(|column| left >> (column / unit) & 1 == 1) {
                        let mut path = A::part(path, column);
                        for i in 0..count {
                            let (value, out) = (value.add(i * WIDE + column), out.add(i * WIDE + column));
                            A::step::<S>(&batch.token(p, at + i), path, value, out, s, unit);
                            path.from = path.to;
                        }
                    }
                } else {
                    A::step::<S>(&batch.token(p, at), path, value, out, s, width);
                }
                for i in 0..count {
                    store_row::<S>(&p.out, column, width, [head, range.start + t + i, sequence], out.add(i * WIDE));
                }
                (t, state) = (end, to);
            }
            if let Some(destination) = destination {
                let to = place(destination, (head, column));
                let (count, length) = if A::ROWS { (width, s) } else { (s, width) };
                // Only without tokens, or where the last state has a slot too, is it not there yet.
                for i in 0..if state.at == to.at { 0 } else { count } {
                    std::ptr::copy(state.at.add(i * state.pitch), to.at.add(i * to.pitch), length);
                }
            }
        }
    }
}

/// The rows of the tokens of the head that comes next.
fn ahead(p: &Problem, run: &Run, (head, column): (usize, usize)) -> Ahead {
    let (qk_sequence, sequence) = p.tensor_sequences(run.sequence);
    let (s, t, rows) = (p.head_size(), p.token_range(run.sequence).start + run.tokens.start, run.tokens.len());
    let mut ahead = Ahead::new();
    if p.key_head(head) != p.key_head(run.head) {
        ahead.add(&p.k, 0, s, [p.key_head(head), t, qk_sequence], rows, false);
        ahead.add(&p.q, 0, s, [p.key_head(head), t, qk_sequence], rows, false);
    }
    if p.channel_gate() {
        ahead.add(&p.g, 0, s, [head, t, sequence], rows, false);
    }
    ahead.add(&p.v, column, s - column, [head, t, sequence], rows, false);
    ahead.add(&p.out, column, s - column, [head, t, sequence], rows, true);
    ahead.start()
}

/// A token's step on `width` columns that are contiguous, a multiple of 16.
///
/// # Safety
/// As for [`step::columns`].
#[inline(always)]
unsafe fn columns<S: Simd, const NV: usize, const NH: usize>(
    t: &Token,
    path: Path,
    value: *const f32,
    out: *mut f32,
    s: usize,
    width: usize,
) {
    let right = |at: usize| Path { from: path.from.right(at), to: path.to.right(at), ..path };
    let mut at = 0;
    // SAFETY: passed on; the pieces lie inside the width.
    unsafe {
        while at + NV * S::LANES <= width {
            step::columns::<S, NV>(t, right(at), value.add(at), out.add(at), s);
            at += NV * S::LANES;
        }
        while at < width {
            step::columns::<S, NH>(t, right(at), value.add(at), out.add(at), s);
            at += NH * S::LANES;
        }
    }
}

/// Runs any number of tokens with the columns' state in scratch.
///
/// # Safety
/// As for [`run`]; at most [`RESIDENT`] floats of state, or [`BLOCK`] columns.
#[inline(always)]
unsafe fn resident<S: Simd, const NV: usize, const NH: usize>(p: &Problem, run: &Run, scratch: *mut f32) {
    let s = p.head_size();
    let Run { sequence: b, head, .. } = *run;
    let (_, sequence) = p.tensor_sequences(b);
    let range = p.token_range(b);
    let batch = Batch::new(scratch, s);
    let blocks = || run.columns.clone().step_by(BLOCK).map(|first| (first, BLOCK.min(run.columns.end - first)));
    // SAFETY: the blocks lie behind the batch, `s` rows of at most BLOCK columns each; the rest as in `direct`.
    unsafe {
        let states = scratch.add(Batch::floats(s));
        let block = |first: usize| states.add((first - run.columns.start) * s);
        let columns_of = |view: &StateView, row, first, width| Columns::new(view, head, row, s, first, width);
        for (first, width) in blocks() {
            columns_of(&run.source.0, run.source.1, first, width).load::<S>(block(first), width);
        }
        for start in run.tokens.clone().step_by(BATCH) {
            let count = BATCH.min(run.tokens.end - start);
            batch.prepare::<S>(p, b, head, range.start + start, count);
            for (first, width) in blocks() {
                let place = Place { at: block(first), pitch: width };
                let path = Path { from: place, to: place, next: [place; 2] };
                for t in start..start + count {
                    let (mut value, mut out) = ([0.0; BLOCK], [0.0; BLOCK]);
                    let at = [head, range.start + t, sequence];
                    load_row::<S>(&p.v, first, width, at, value.as_mut_ptr());
                    let token = batch.token(p, t - start);
                    columns::<S, NV, NH>(&token, path, value.as_ptr(), out.as_mut_ptr(), s, width);
                    store_row::<S>(&p.out, first, width, at, out.as_ptr());
                    if let Some(kept) = &p.snapshots
                        && let Some(slot) = kept.slot(t, range.len())
                    {
                        columns_of(&kept.view(slot), b, first, width).store::<S>(place.at, width);
                    }
                }
            }
        }
        if let Some(state_out) = &p.state_out {
            for (first, width) in blocks() {
                columns_of(state_out, p.row_out(b), first, width).store::<S>(block(first), width);
            }
        }
    }
}
