//! The smallest parts of the work: blocks of value columns of one head. Heads that share a key head are neighbours, so
//! that a run of pieces can share what depends on the keys alone.

use crate::params::HeadMap;
use crate::problem::Problem;
use std::ops::Range;

/// Value columns of a piece (the last one of a head may have 16).
pub const PIECE: usize = 32;

/// Pieces of one head.
pub fn per_head(p: &Problem) -> usize {
    p.head_size().div_ceil(PIECE)
}

/// Pieces of all value heads of one key head.
pub fn per_key_head(p: &Problem) -> usize {
    p.value_heads() / p.key_heads() * per_head(p)
}

/// The value head and the columns of a key head's piece.
#[inline]
pub fn locate(p: &Problem, key_head: usize, piece: usize) -> (usize, Range<usize>) {
    let (member, block) = (piece / per_head(p), piece % per_head(p));
    let head = match p.head_map() {
        HeadMap::Tiled => member * p.key_heads() + key_head,
        HeadMap::Grouped => key_head * (p.value_heads() / p.key_heads()) + member,
    };
    (head, block * PIECE..((block + 1) * PIECE).min(p.head_size()))
}

/// Splits a run of pieces by head: (head, the pieces, their columns).
pub fn by_head(
    p: &Problem,
    key_head: usize,
    pieces: Range<usize>,
) -> impl Iterator<Item = (usize, Range<usize>, Range<usize>)> {
    let mut next = pieces.start;
    std::iter::from_fn(move || {
        let first = next;
        (first < pieces.end).then(|| {
            next = ((first / per_head(p) + 1) * per_head(p)).min(pieces.end);
            let (head, columns) = locate(p, key_head, first);
            let end = locate(p, key_head, next - 1).1.end;
            (head, first..next, columns.start..end)
        })
    })
}
