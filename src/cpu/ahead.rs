//! Asking for memory before it is needed: rows of a chunk lie far apart, and each is over before the processor's own
//! prefetching has noticed it.

use super::rows::Columns;
use super::simd::Simd;
use crate::tensor::View;

/// Streams at a time.
const MOST: usize = 5;

/// Bytes of a cache line.
const LINE: usize = 64;

/// Rows of one tensor, line by line.
#[derive(Clone, Copy)]
struct Stream {
    row: *const u8,
    /// Bytes from one token's row to the next.
    pitch: usize,
    rows: usize,
    length: usize,
    offset: usize,
    write: bool,
}

/// What will be needed soon, handed out a few lines at a time between products that run from L1.
pub struct Ahead {
    streams: [Stream; MOST],
    at: usize,
}

impl Ahead {
    pub fn new() -> Ahead {
        let none = Stream { row: std::ptr::null(), pitch: 0, rows: 0, length: 0, offset: 0, write: false };
        Ahead { streams: [none; MOST], at: 0 }
    }

    /// Adds channels from `first` on, of `rows` tokens from the one at `at` (head, token, sequence). The tokens need not
    /// exist. At most five times.
    #[inline(always)]
    pub fn add(&mut self, view: &View, first: usize, channels: usize, at: [usize; 3], rows: usize, write: bool) {
        let row = view.near([first, at[0], at[1], at[2]]);
        // Where channels lie apart, their first lines are a start.
        let length = channels * view.dtype.size();
        self.streams[self.at] = Stream { row, pitch: view.nb[2], rows, length, offset: 0, write };
        self.at += 1;
    }

    /// Everything is added.
    #[inline(always)]
    pub fn start(mut self) -> Ahead {
        self.at = 0;
        self
    }

    /// Lines that remain, about.
    #[inline(always)]
    pub fn lines(&self) -> usize {
        self.streams.iter().map(|stream| stream.rows * stream.length.div_ceil(LINE)).sum()
    }

    /// Asks for the next `lines` lines.
    #[inline(always)]
    pub fn ask<S: Simd>(&mut self, lines: usize) {
        for _ in 0..lines {
            while self.at < MOST && self.streams[self.at].rows == 0 {
                self.at += 1;
            }
            let Some(stream) = self.streams.get_mut(self.at) else { return };
            let line = stream.row.wrapping_add(stream.offset);
            // SAFETY: prefetching takes any address; `S` is the caller's.
            unsafe { if stream.write { S::prefetch_to_write(line.cast()) } else { S::prefetch_far(line.cast()) } };
            stream.offset += LINE;
            if stream.offset >= stream.length {
                stream.offset = 0;
                stream.row = stream.row.wrapping_add(stream.pitch);
                stream.rows -= 1;
            }
        }
    }
}

/// Pairs of cache lines at a pitch, to be asked for one after another.
#[derive(Clone, Copy)]
pub struct Walk {
    at: *const f32,
    /// Floats from one pair to the next.
    pitch: usize,
    pairs: usize,
}

/// Floats of a pair of lines.
const PAIR: usize = 2 * LINE / size_of::<f32>();

impl Walk {
    /// Nothing to ask for.
    pub const NOWHERE: Walk = Walk { at: std::ptr::null(), pitch: 0, pairs: 0 };

    /// The lines of a state's columns; nowhere if they do not lie in pairs.
    #[inline(always)]
    pub fn through(columns: &Columns) -> Walk {
        let Columns { data, nb_k, nb_v, keys, width } = *columns;
        if nb_k == size_of::<f32>() && nb_v == keys * size_of::<f32>() {
            Walk { at: data, pitch: PAIR, pairs: (keys * width).div_ceil(PAIR) }
        } else if nb_v == size_of::<f32>() && width <= PAIR {
            Walk { at: data, pitch: nb_k / size_of::<f32>(), pairs: keys }
        } else {
            Walk::NOWHERE
        }
    }

    /// Whether there is anything to ask for.
    #[inline(always)]
    pub fn is_somewhere(&self) -> bool {
        self.pitch > 0
    }

    /// Asks for the next [`Simd::PAIRS`] pairs, whether or not they are still part of the walk.
    ///
    /// # Safety
    /// `S`'s features are there.
    #[inline(always)]
    pub unsafe fn ask<S: Simd>(&mut self) {
        for i in 0..S::PAIRS {
            let pair = self.at.wrapping_add(i * self.pitch);
            // SAFETY: prefetching takes any address; `S` is the caller's.
            unsafe {
                S::prefetch_far(pair);
                S::prefetch_far(pair.wrapping_add(PAIR / 2));
            }
        }
        self.at = self.at.wrapping_add(S::PAIRS * self.pitch);
    }
}

/// Walks one after another, product by product.
pub struct Walks([Walk; 2]);

impl Walks {
    pub fn new(walks: [Walk; 2]) -> Walks {
        Walks(walks)
    }

    /// What to ask for in so many stretches.
    #[inline(always)]
    pub fn take<S: Simd>(&mut self, stretches: usize) -> Walk {
        let Some(walk) = self.0.iter_mut().find(|walk| walk.pairs > 0) else { return Walk::NOWHERE };
        let taken = *walk;
        walk.at = walk.at.wrapping_add(stretches * S::PAIRS * walk.pitch);
        walk.pairs = walk.pairs.saturating_sub(stretches * S::PAIRS);
        taken
    }
}
