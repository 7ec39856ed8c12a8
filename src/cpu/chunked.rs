//! The chunked (WY) algorithm: a chunk's tokens become matrix products at nearly the FMA peak.
//!
//! With G the running log-decay inside a chunk, S the state before it and D_ij = exp(G_i - G_j) for i >= j:
//!
//! ```text
//! (I + L) U = beta (V - exp(G) K S)         L_ij = beta_i D_ij (k_i . k_j), i > j
//! O  = scale (exp(G) Q S + P U)             P_ij = D_ij (q_i . k_j), i >= j
//! S' = exp(G_end) S + K^T (exp(G_end - G) U)
//! ```
//!
//! A gate per channel puts D between the two factors: k_i . D_ij k_j, and so on. K K^T and Q K^T serve all value heads of
//! a key head where it is one number. A slab of value columns goes through K S, the forward
//! substitution, Q S and P U one register tile of tokens at a time, so that nothing between is stored but U.

use super::ahead::{Ahead, Walk, Walks};
use super::gates::Gates;
use super::pieces::{PIECE, by_head, locate};
use super::rows::{Columns, load_row, store_row};
use super::simd::Simd;
use super::step::{self, Path, Place};
use super::tile::{Left, STRETCH, Tile, product, product_beside, tiles};
use super::token::{Batch, normalise};
use crate::problem::{Problem, StateView};
use std::ops::Range;

/// Largest chunk, in tokens; also the floats between rows of the chunk's square matrices.
pub const MAX_CHUNK: usize = 64;

/// Largest head size.
pub const MAX_HEAD_SIZE: usize = 256;

/// Floats between the copied rows of K, Q, V and O: constant, so that a tile's rows are reached by displacements, and
/// no multiple of 4 KiB, so that they do not share cache sets.
pub const PITCH: usize = MAX_HEAD_SIZE + 16;

/// Floats of state that a task may keep in scratch.
const RESIDENT: usize = 1 << 16;

/// Pieces of one key head that a task may have.
pub fn most_pieces(s: usize) -> usize {
    (RESIDENT / (s * PIECE)).max(1)
}

/// Where everything is in scratch, in floats from its start.
#[derive(Clone, Copy)]
pub struct Scratch {
    pub k: usize,
    pub q: usize,
    /// V of the current head, overwritten by O.
    v: usize,
    /// K transposed: [channel][token].
    kt: usize,
    pub kk: usize,
    pub qk: usize,
    pub l: usize,
    pub p: usize,
    u: usize,
    u_end: usize,
    /// Of MAX_CHUNK floats each.
    pub vectors: usize,
    /// exp(G_end), channel by channel.
    pub whole: usize,
    /// K and Q decayed from the chunk's start, and K decayed to its end: for a gate per channel.
    pub k_start: usize,
    pub q_start: usize,
    pub k_end: usize,
    /// A token's decay.
    pub decay: usize,
    token: usize,
    states: usize,
    total: usize,
}

impl Scratch {
    fn new(s: usize) -> Scratch {
        let mut total = 0;
        let mut take = |floats: usize| {
            total += floats.next_multiple_of(16);
            total - floats.next_multiple_of(16)
        };
        let (rows, square) = (MAX_CHUNK * PITCH, MAX_CHUNK * MAX_CHUNK);
        let (k, q, v, kt) = (take(rows), take(rows), take(rows), take(MAX_CHUNK * s));
        let (kk, qk, l, p) = (take(square), take(square), take(square), take(square));
        let (u, u_end, vectors) = (take(MAX_CHUNK * PIECE), take(MAX_CHUNK * PIECE), take(8 * MAX_CHUNK));
        let (whole, k_start, q_start, k_end) = (take(s), take(rows), take(rows), take(rows));
        let (decay, token) = (take(s), take(Batch::floats(s)));
        let states = take(most_pieces(s) * s * PIECE);
        Scratch {
            k,
            q,
            v,
            kt,
            kk,
            qk,
            l,
            p,
            u,
            u_end,
            vectors,
            whole,
            k_start,
            q_start,
            k_end,
            decay,
            token,
            states,
            total,
        }
    }
}

/// Floats of scratch that a task needs.
pub fn scratch_floats(s: usize) -> usize {
    Scratch::new(s).total
}

/// One sequence and key head, some pieces of its value heads, and the tokens to run.
pub struct Task {
    pub sequence: usize,
    pub key_head: usize,
    /// At most [`most_pieces`].
    pub pieces: Range<usize>,
    /// Of the sequence; at least one.
    pub tokens: Range<usize>,
    /// Tokens of a chunk, at most [`MAX_CHUNK`].
    pub chunk: usize,
    /// The state before the first of the tokens, and its row.
    pub source: (StateView, usize),
    /// Where the state after the last of the tokens goes.
    pub destination: Option<(StateView, usize)>,
    /// The key head and the piece with which this thread goes on, from the same source.
    pub next: Option<(usize, usize)>,
}

impl Task {
    /// Columns of a piece in the state's memory.
    fn place(p: &Problem, (view, row): &(StateView, usize), head: usize, columns: &Range<usize>) -> Columns {
        Columns::new(view, head, *row, p.head_size(), columns.start, columns.len())
    }
}

/// Runs a task. A slab is `NV` vectors of columns, or `NH` where 16 columns are left.
///
/// # Safety
/// The problem has a head size up to [`MAX_HEAD_SIZE`]; its memory is as described and nobody else
/// touches what the task writes; `scratch` has room for [`scratch_floats`]; `S`'s features are there.
#[inline(always)]
pub unsafe fn run<S: Simd, const NV: usize, const NH: usize>(p: &Problem, task: &Task, scratch: *mut f32) {
    // SAFETY: passed on. Every pointer below is into scratch, in the parts that `Scratch` lays out for MAX_CHUNK
    // tokens, or made from indices below the problem's checked extents.
    unsafe {
        let s = p.head_size();
        let at = Scratch::new(s);
        let start = p.token_range(task.sequence).start;
        // With one chunk nothing has to stay: all pieces then share the memory of the first, which is near.
        let single = task.tokens.len() <= task.chunk;
        let state = |piece: usize| scratch.add(at.states + if single { 0 } else { piece * s * PIECE });
        for first in task.tokens.clone().step_by(task.chunk) {
            let length = task.chunk.min(task.tokens.end - first);
            let moves = Moves { begins: first == task.tokens.start, ends: first + length == task.tokens.end };
            let t = start + first;
            load_keys::<S>(p, task, t, length, scratch, &at);
            for (head, pieces, columns) in by_head(p, task.key_head, task.pieces.clone()) {
                let mut ahead = ahead(p, task, head, &columns, [t, length, first + length]);
                let state = |piece: usize| state(pieces.start - task.pieces.start + piece);
                head_chunk::<S, NV, NH>(p, task, head, columns, t, length, moves, state, scratch, &at, &mut ahead);
            }
        }
    }
}

/// What becomes of the states beside a chunk.
#[derive(Clone, Copy)]
struct Moves {
    /// They come from the source.
    begins: bool,
    /// They go to the destination.
    ends: bool,
}

/// Visits a piece's slabs: (first column inside the piece, columns).
#[inline(always)]
fn for_slabs<S: Simd, const NV: usize, const NH: usize>(columns: &Range<usize>, mut visit: impl FnMut(usize, usize)) {
    let (wide, narrow) = (NV * S::LANES, NH * S::LANES);
    let slab = if columns.len().is_multiple_of(wide) { wide } else { narrow };
    for offset in (0..columns.len()).step_by(slab) {
        visit(offset, slab);
    }
}

/// Copies a chunk's K and Q to scratch and, for a gate that all channels share, multiplies them: K K^T and Q K^T, lower
/// triangles.
///
/// # Safety
/// As for [`run`]; `length` tokens from `t` on exist.
#[inline(always)]
unsafe fn load_keys<S: Simd>(p: &Problem, task: &Task, t: usize, length: usize, scratch: *mut f32, at: &Scratch) {
    let s = p.head_size();
    let (qk_sequence, _) = p.tensor_sequences(task.sequence);
    // SAFETY: as in `run`.
    unsafe {
        let (k, q, kt) = (scratch.add(at.k), scratch.add(at.q), scratch.add(at.kt));
        for (view, rows) in [(&p.k, k), (&p.q, q)] {
            for i in 0..length {
                let row = rows.add(i * PITCH);
                load_row::<S>(view, 0, s, [task.key_head, t + i, qk_sequence], row);
                if let Some(eps) = p.qk_norm() {
                    normalise::<S>(row, s, eps);
                }
            }
        }
        if p.channel_gate() {
            return;
        }
        let padded = length.next_multiple_of(S::LANES);
        for i in length..padded {
            for channel in (0..s).step_by(S::LANES) {
                S::store(k.add(i * PITCH + channel), S::splat(0.0));
            }
        }
        for i in (0..padded).step_by(S::LANES) {
            for channel in (0..s).step_by(S::LANES) {
                S::transpose(k.add(i * PITCH + channel), PITCH, kt.add(channel * MAX_CHUNK + i), MAX_CHUNK);
            }
        }
        let (kk, qk) = (scratch.add(at.kk), scratch.add(at.qk));
        tiles!(S, length, i, MR, {
            for j in (0..i + MR).step_by(S::LANES) {
                grams::<S, MR>(
                    s,
                    k.add(i * PITCH),
                    q.add(i * PITCH),
                    kt.add(j),
                    [kk, qk].map(|m| m.add(i * MAX_CHUNK + j)),
                );
            }
        });
    }
}

/// `MR` rows of K K^T and of Q K^T, one vector of columns: both in one pass, for enough sums under way.
///
/// # Safety
/// As for [`run`].
#[inline(always)]
unsafe fn grams<S: Simd, const MR: usize>(s: usize, k: *const f32, q: *const f32, kt: *const f32, to: [*mut f32; 2]) {
    // SAFETY: rows and channels are inside the chunk's.
    unsafe {
        let mut kk = [S::splat(0.0); MR];
        let mut qk = [S::splat(0.0); MR];
        for channel in 0..s {
            let right = S::load(kt.add(channel * MAX_CHUNK));
            for r in 0..MR {
                kk[r] = S::fma(S::splat(*k.add(r * PITCH + channel)), right, kk[r]);
            }
            for r in 0..MR {
                qk[r] = S::fma(S::splat(*q.add(r * PITCH + channel)), right, qk[r]);
            }
        }
        for r in 0..MR {
            S::store(to[0].add(r * MAX_CHUNK), kk[r]);
            S::store(to[1].add(r * MAX_CHUNK), qk[r]);
        }
    }
}

/// What follows a head's chunk that ends before token `next`: room for its output, the next head's values, and, while
/// the last head runs, the keys and queries of the next chunk, or of the next task.
fn ahead(p: &Problem, task: &Task, head: usize, columns: &Range<usize>, [t, length, next]: [usize; 3]) -> Ahead {
    let (qk_sequence, sequence) = p.tensor_sequences(task.sequence);
    let start = p.token_range(task.sequence).start;
    let mut ahead = Ahead::new();
    ahead.add(&p.out, columns.start, columns.len(), [head, t, sequence], length, true);
    let heads = || by_head(p, task.key_head, task.pieces.clone()).map(|(head, _, columns)| (head, columns));
    let rows = |first: usize| task.chunk.min(task.tokens.end - first);
    let mut keys = |key_head: usize, first: usize| {
        ahead.add(&p.k, 0, p.head_size(), [key_head, start + first, qk_sequence], rows(first), false);
        ahead.add(&p.q, 0, p.head_size(), [key_head, start + first, qk_sequence], rows(first), false);
    };
    let values = if let Some(following) = heads().skip_while(|(other, _)| *other != head).nth(1) {
        Some((following, t - start))
    } else if next < task.tokens.end {
        keys(task.key_head, next);
        heads().next().map(|first| (first, next))
    } else if let Some((key_head, piece)) = task.next {
        keys(key_head, task.tokens.start);
        let (head, columns) = locate(p, key_head, piece);
        Some(((head, columns.start..p.head_size()), task.tokens.start))
    } else {
        None
    };
    if let Some(((head, columns), first)) = values {
        let at = [head, start + first, sequence];
        ahead.add(&p.v, columns.start, columns.len(), at, rows(first), false);
        if p.channel_gate() {
            ahead.add(&p.g, 0, p.head_size(), at, rows(first), false);
        }
    }
    ahead.start()
}

/// The states to ask for beside a piece's products: room for its own, and the next piece's.
fn walks(p: &Problem, task: &Task, head: usize, columns: &Range<usize>, moves: Moves) -> Walks {
    let own = task.destination.as_ref().map(|place| Task::place(p, place, head, columns));
    let mut pieces = task.pieces.clone().map(|piece| locate(p, task.key_head, piece));
    let next = match pieces.find(|piece| (piece.0, piece.1.start) == (head, columns.start)).and(pieces.next()) {
        Some(next) => moves.begins.then_some(next),
        None => task.next.filter(|_| moves.ends).map(|(key_head, piece)| locate(p, key_head, piece)),
    };
    let next = next.map(|(head, columns)| Task::place(p, &task.source, head, &columns));
    let walk = |place: Option<Columns>| place.map_or(Walk::NOWHERE, |place| Walk::through(&place));
    Walks::new([walk(own.filter(|_| moves.ends)), walk(next)])
}

/// One chunk of some columns of a value head, whose states lie where `state` says, piece by piece.
///
/// # Safety
/// As for [`run`].
#[inline(always)]
#[allow(clippy::too_many_arguments, reason = "the chunk's place in the problem and in scratch")]
unsafe fn head_chunk<S: Simd, const NV: usize, const NH: usize>(
    p: &Problem,
    task: &Task,
    head: usize,
    columns: Range<usize>,
    t: usize,
    length: usize,
    moves: Moves,
    state: impl Fn(usize) -> *mut f32,
    scratch: *mut f32,
    at: &Scratch,
    ahead: &mut Ahead,
) {
    let s = p.head_size();
    let (_, sequence) = p.tensor_sequences(task.sequence);
    let Range { start: first, end } = columns;
    // SAFETY: as in `run`.
    unsafe {
        let gates = Gates::load::<S>(p, head, sequence, t, length, scratch, at);
        let v = scratch.add(at.v);
        for i in 0..length {
            load_row::<S>(&p.v, first, end - first, [head, t + i, sequence], v.add(i * PITCH));
        }
        // Spread over all products with a state; over its update's tiles where those ask for states.
        let slabs = (end - first).div_ceil(NV * S::LANES);
        let stretches = 2 * length.div_ceil(S::TILE_ROWS) * (s / STRETCH);
        let each = if moves.begins || moves.ends { [0, s.div_ceil(S::TILE_ROWS)] } else { [stretches, 0] };
        let each = each.map(|parts| if parts == 0 { 0 } else { ahead.lines().div_ceil(slabs * parts) });
        for offset in (0..end - first).step_by(PIECE) {
            let columns = first + offset..end.min(first + offset + PIECE);
            let whole = columns.len().is_multiple_of(NV * S::LANES);
            let state = state(offset / PIECE);
            let source = Task::place(p, &task.source, head, &columns);
            let destination = task.destination.as_ref().map(|place| Task::place(p, place, head, &columns));
            if moves.begins {
                for_slabs::<S, NV, NH>(&columns, |at, width| {
                    source.part(at, width).load::<S>(state.add(at * s), width)
                });
            }
            let walks = walks(p, task, head, &columns, moves);
            let mut slabs =
                Slabs { p, task, head, t, length, columns: columns.clone(), v: v.add(offset), state, walks };
            if whole {
                slabs.run::<S, NV>(&gates, scratch, at, ahead, each);
            } else {
                slabs.run::<S, NH>(&gates, scratch, at, ahead, each);
            }
            if let Some(destination) = destination.filter(|_| moves.ends) {
                for_slabs::<S, NV, NH>(&columns, |at, width| {
                    destination.part(at, width).store::<S>(state.add(at * s), width)
                });
            }
        }
        for i in 0..length {
            store_row::<S>(&p.out, first, end - first, [head, t + i, sequence], v.add(i * PITCH));
        }
    }
}

/// A piece in a chunk: its columns' slabs go through the products together, so that a tile's rows of K and Q are
/// read once for all of them.
struct Slabs<'a> {
    p: &'a Problem,
    task: &'a Task,
    head: usize,
    /// The chunk's first token, in the tensors.
    t: usize,
    length: usize,
    columns: Range<usize>,
    /// V of the columns, overwritten by O.
    v: *mut f32,
    /// `[slab][channel][column]`
    state: *mut f32,
    walks: Walks,
}

impl Slabs<'_> {
    /// # Safety
    /// As for [`run`]; the columns are a multiple of `NV` vectors.
    #[inline(always)]
    unsafe fn run<S: Simd, const NV: usize>(
        &mut self,
        gates: &Gates,
        scratch: *mut f32,
        at: &Scratch,
        ahead: &mut Ahead,
        each: [usize; 2],
    ) {
        let s = self.p.head_size();
        let width = NV * S::LANES;
        let count = self.columns.len() / width;
        let states = self.state;
        let state = |slab: usize| states.wrapping_add(slab * s * width);
        // SAFETY: as in `run`; U has room for PIECE columns, slab by slab.
        unsafe {
            let u = |slab: usize| scratch.add(at.u + slab * MAX_CHUNK * width);
            let u_end = |slab: usize| scratch.add(at.u_end + slab * MAX_CHUNK * width);
            let Gates { k, q, l, p, k_end, .. } = *gates;
            let mut finite = [[S::splat(0.0); NV]; MOST_SLABS];
            tiles!(S, self.length, i, MR, {
                for slab in 0..count {
                    let rows = Rows { i, k, q, l, p, v: self.v.add(slab * width), s };
                    let mut beside = Beside { walks: &mut self.walks, ahead, each: each[0] };
                    rows.run::<S, MR, NV>(gates, state(slab), u(slab), u_end(slab), &mut finite[slab], &mut beside);
                }
            });
            for slab in 0..count {
                if !self.is_sound::<S, NV>(gates, &finite[slab], state(slab), u(slab)) {
                    self.run_serially::<S, NV>(slab, scratch, at);
                    continue;
                }
                tiles!(S, s, channel, MR, {
                    ahead.ask::<S>(each[1]);
                    update::<S, MR, NV>(
                        self.length,
                        gates.whole.add(channel),
                        k_end.add(channel),
                        u_end(slab),
                        state(slab).add(channel * width),
                    );
                });
            }
        }
    }

    /// Whether the chunk's arithmetic stands for the token-serial one: everything is finite (a NaN or infinity in one
    /// token must not reach earlier ones), and no state in between can have met the clamp.
    ///
    /// # Safety
    /// As for [`run`].
    #[inline(always)]
    unsafe fn is_sound<S: Simd, const NV: usize>(
        &self,
        gates: &Gates,
        finite: &[S::V; NV],
        state: *const f32,
        u: *const f32,
    ) -> bool {
        let width = NV * S::LANES;
        let mut columns = [0.0f32; PIECE];
        // SAFETY: as in `run`.
        unsafe {
            for v in 0..NV {
                S::store(columns.as_mut_ptr().add(v * S::LANES), finite[v]);
            }
            if columns[..width].iter().any(|x| x.is_nan()) {
                return false;
            }
            if self.p.state_clamp() == f32::INFINITY {
                return true;
            }
            // |S_t| <= growth (max |S| + sum max|k_i| |u_i|), column by column.
            let magnitude = |x| S::max(x, S::sub(S::splat(0.0), x));
            for v in 0..NV {
                let mut largest = S::splat(0.0);
                for channel in 0..self.p.head_size() {
                    largest = S::max(largest, magnitude(S::load(state.add(channel * width + v * S::LANES))));
                }
                for i in 0..self.length {
                    let u = magnitude(S::load(u.add(i * width + v * S::LANES)));
                    largest = S::fma(u, S::splat(*gates.k_max.add(i)), largest);
                }
                S::store(columns.as_mut_ptr().add(v * S::LANES), S::mul(S::splat(gates.growth), largest));
            }
            columns[..width].iter().all(|bound| *bound < 0.999 * self.p.state_clamp())
        }
    }

    /// Runs the chunk token by token for one slab.
    ///
    /// # Safety
    /// As for [`run`].
    #[inline(always)]
    unsafe fn run_serially<S: Simd, const NV: usize>(&self, slab: usize, scratch: *mut f32, at: &Scratch) {
        let (p, s, width) = (self.p, self.p.head_size(), NV * S::LANES);
        let (_, sequence) = p.tensor_sequences(self.task.sequence);
        // SAFETY: as in `run`.
        unsafe {
            let batch = Batch::new(scratch.add(at.token), s);
            let place = Place { at: self.state.add(slab * s * width), pitch: width };
            let path = Path { from: place, to: place, next: [place; 2] };
            for i in 0..self.length {
                let mut value = [0.0; PIECE];
                batch.prepare::<S>(p, self.task.sequence, self.head, self.t + i, 1);
                let first = self.columns.start + slab * width;
                load_row::<S>(&p.v, first, width, [self.head, self.t + i, sequence], value.as_mut_ptr());
                let out = self.v.add(i * PITCH + slab * width);
                step::columns::<S, NV>(&batch.token(p, 0), path, value.as_ptr(), out, s);
            }
        }
    }
}

/// Runs `$body` for constant `$j` from 0 to below `$most`, which is at most 12.
macro_rules! each {
    ($j:ident below $most:ident, $body:block) => {
        each!(@ $j $most $body 0 1 2 3 4 5 6 7 8 9 10 11)
    };
    (@ $j:ident $most:ident $body:block $($n:literal)+) => {
        $(
            if $n < $most {
                const $j: usize = $n;
                $body
            }
        )+
    };
}

/// Slabs of a piece, at most.
const MOST_SLABS: usize = 8;

/// What to ask for beside the products with a state: its walks, and where there are none the rows that come next.
struct Beside<'a> {
    walks: &'a mut Walks,
    ahead: &'a mut Ahead,
    /// Lines of rows in a stretch.
    each: usize,
}

impl Beside<'_> {
    /// Asks in a product of so many stretches.
    #[inline(always)]
    fn asking<S: Simd>(&mut self, stretches: usize) -> impl FnMut() {
        let mut walk = self.walks.take::<S>(stretches);
        move || {
            // SAFETY: `S` is the caller's.
            if walk.is_somewhere() { unsafe { walk.ask::<S>() } } else { self.ahead.ask::<S>(self.each) }
        }
    }
}

/// A tile's tokens: `i` the first of them, and the matrices they are rows of.
struct Rows {
    i: usize,
    k: *const f32,
    q: *const f32,
    l: *const f32,
    p: *const f32,
    v: *mut f32,
    s: usize,
}

impl Rows {
    /// U and O of `MR` tokens for one slab. `finite` becomes NaN in the columns where O is not finite; every number of U
    /// is a summand there.
    ///
    /// # Safety
    /// As for [`run`]; U is there for all earlier tokens.
    #[inline(always)]
    unsafe fn run<S: Simd, const MR: usize, const NV: usize>(
        &self,
        gates: &Gates,
        state: *const f32,
        u: *mut f32,
        u_end: *mut f32,
        finite: &mut [S::V; NV],
        beside: &mut Beside,
    ) {
        let (i, s, width) = (self.i, self.s, NV * S::LANES);
        // SAFETY: as in `run`.
        unsafe {
            let left = |matrix: *const f32, pitch: usize| Left { at: matrix.add(i * pitch), row: pitch, step: 1 };
            let v = self.v.add(i * PITCH);
            // U: the tile is solved in registers, after a product with what is solved already.
            let mut tile: Tile<S, MR, NV> = [[S::splat(0.0); NV]; MR];
            let ask = beside.asking::<S>(s / STRETCH);
            product_beside::<S, MR, NV>(&mut tile, s, left(self.k, PITCH), state, width, ask);
            for r in 0..MR {
                let (beta, decay) = (S::splat(*gates.beta.add(i + r)), S::splat(*gates.beta_decay.add(i + r)));
                for n in 0..NV {
                    let value = S::load(v.add(r * PITCH + n * S::LANES));
                    tile[r][n] = S::fnma(decay, tile[r][n], S::mul(beta, value));
                }
            }
            let l = left(self.l, MAX_CHUNK);
            product::<S, MR, NV>(&mut tile, i, l, u, width);
            // Not loops: with as many rows as AVX-512 has, compilers leave them some, with branches and a tile in memory.
            each!(J below MR, {
                for r in J + 1..MR {
                    let factor = S::splat(*l.at.add(r * MAX_CHUNK + i + J));
                    for n in 0..NV {
                        tile[r][n] = S::fma(factor, tile[J][n], tile[r][n]);
                    }
                }
            });
            for r in 0..MR {
                let to_end = S::splat(*gates.to_end.add(i + r));
                for n in 0..NV {
                    S::store(u.add((i + r) * width + n * S::LANES), tile[r][n]);
                    S::store(u_end.add((i + r) * width + n * S::LANES), S::mul(to_end, tile[r][n]));
                }
            }
            // O
            let mut tile: Tile<S, MR, NV> = [[S::splat(0.0); NV]; MR];
            let ask = beside.asking::<S>(s / STRETCH);
            product_beside::<S, MR, NV>(&mut tile, s, left(self.q, PITCH), state, width, ask);
            for r in 0..MR {
                let decay = S::splat(*gates.q_decay.add(i + r));
                for n in 0..NV {
                    tile[r][n] = S::mul(decay, tile[r][n]);
                }
            }
            let p = left(self.p, MAX_CHUNK);
            product::<S, MR, NV>(&mut tile, i, p, u, width);
            each!(J below MR, {
                let mut solved = [S::splat(0.0); NV];
                for n in 0..NV {
                    solved[n] = S::load(u.add((i + J) * width + n * S::LANES));
                }
                for r in J..MR {
                    let factor = S::splat(*p.at.add(r * MAX_CHUNK + i + J));
                    for n in 0..NV {
                        tile[r][n] = S::fma(factor, solved[n], tile[r][n]);
                    }
                }
            });
            for r in 0..MR {
                for n in 0..NV {
                    S::store(v.add(r * PITCH + n * S::LANES), tile[r][n]);
                    finite[n] = S::fma(tile[r][n], S::splat(0.0), finite[n]);
                }
            }
        }
    }
}

/// `MR` key channels of a slab's state, past the chunk: decayed, plus K^T times U decayed to the chunk's end.
///
/// # Safety
/// As for [`run`].
#[inline(always)]
unsafe fn update<S: Simd, const MR: usize, const NV: usize>(
    length: usize,
    whole: *const f32,
    k: *const f32,
    u_end: *const f32,
    state: *mut f32,
) {
    let width = NV * S::LANES;
    // SAFETY: as in `run`.
    unsafe {
        let mut tile: Tile<S, MR, NV> = [[S::splat(0.0); NV]; MR];
        for r in 0..MR {
            let whole = S::splat(*whole.add(r));
            for n in 0..NV {
                tile[r][n] = S::mul(whole, S::load(state.add(r * width + n * S::LANES)));
            }
        }
        product::<S, MR, NV>(&mut tile, length, Left { at: k, row: 1, step: PITCH }, u_end, width);
        for r in 0..MR {
            for n in 0..NV {
                S::store(state.add(r * width + n * S::LANES), tile[r][n]);
            }
        }
    }
}
