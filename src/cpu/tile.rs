//! The register tile that every matrix product of the chunked algorithm is made of.

use super::simd::Simd;

/// A tile of `MR` rows by `NV` vectors of columns, in registers.
pub type Tile<S, const MR: usize, const NV: usize> = [[<S as Simd>::V; NV]; MR];

/// The left matrix of a product: single floats that are broadcast.
#[derive(Clone, Copy)]
pub struct Left {
    pub at: *const f32,
    /// Floats from one row of the tile to the next.
    pub row: usize,
    /// Floats from one step of the depth to the next.
    pub step: usize,
}

/// tile += left * right, where `right` has `depth` rows of vectors, `pitch` floats apart.
///
/// # Safety
/// Both matrices are readable and `S`'s features are there.
#[inline(always)]
pub unsafe fn product<S: Simd, const MR: usize, const NV: usize>(
    tile: &mut Tile<S, MR, NV>,
    depth: usize,
    left: Left,
    right: *const f32,
    pitch: usize,
) {
    // Four steps a turn: fewer instructions beside the FMAs, which shares a core's front end better.
    const TURN: usize = 4;
    let (mut a, mut b) = (left.at, right);
    let mut rest = depth;
    // SAFETY: step d of depth reads row d of both.
    unsafe {
        while rest >= TURN {
            for i in 0..TURN {
                step::<S, MR, NV>(tile, a.add(i * left.step), left.row, b.add(i * pitch));
            }
            (a, b) = (a.add(TURN * left.step), b.add(TURN * pitch));
            rest -= TURN;
        }
        while rest > 0 {
            step::<S, MR, NV>(tile, a, left.row, b);
            (a, b) = (a.wrapping_add(left.step), b.wrapping_add(pitch));
            rest -= 1;
        }
    }
}

/// Steps between two times of asking: few enough that memory's queues have room for what is asked for.
pub const STRETCH: usize = 8;

/// The same for a depth of whole stretches, calling `ask` before each. (Between loops, not in one: compilers then move all
/// of a large tile from registers to registers each turn.)
///
/// # Safety
/// As for [`product`].
#[inline(always)]
pub unsafe fn product_beside<S: Simd, const MR: usize, const NV: usize>(
    tile: &mut Tile<S, MR, NV>,
    depth: usize,
    left: Left,
    right: *const f32,
    pitch: usize,
    mut ask: impl FnMut(),
) {
    // SAFETY: passed on.
    unsafe {
        for first in (0..depth).step_by(STRETCH) {
            ask();
            let left = Left { at: left.at.add(first * left.step), ..left };
            product::<S, MR, NV>(tile, STRETCH, left, right.add(first * pitch), pitch);
        }
    }
}

/// One step of the depth.
///
/// # Safety
/// As for [`product`].
#[inline(always)]
unsafe fn step<S: Simd, const MR: usize, const NV: usize>(
    tile: &mut Tile<S, MR, NV>,
    a: *const f32,
    row: usize,
    b: *const f32,
) {
    // SAFETY: passed on.
    unsafe {
        let mut right = [S::splat(0.0); NV];
        for n in 0..NV {
            right[n] = S::load(b.add(n * S::LANES));
        }
        for r in 0..MR {
            let left = S::splat(*a.add(r * row));
            for n in 0..NV {
                tile[r][n] = S::fma(left, right[n], tile[r][n]);
            }
        }
    }
}

/// Runs `$body` for tiles that cover rows `0..$n`, `$i` the first row and `$mr` the constant number of rows: as many of
/// `TILE_ROWS` as fit, then smaller ones.
macro_rules! tiles {
    ($simd:ident, $n:expr, $i:ident, $mr:ident, $body:expr) => {{
        let n: usize = $n;
        let mut $i = 0;
        tiles!(@all $simd, n, $i, $mr, $body, 12);
        tiles!(@all $simd, n, $i, $mr, $body, 6);
        // What is left.
        tiles!(@rest $simd, n, $i, $mr, $body, 8);
        tiles!(@rest $simd, n, $i, $mr, $body, 4);
        tiles!(@rest $simd, n, $i, $mr, $body, 2);
        tiles!(@rest $simd, n, $i, $mr, $body, 1);
        debug_assert_eq!($i, n);
    }};
    (@all $simd:ident, $n:ident, $i:ident, $mr:ident, $body:expr, $rows:literal) => {
        if $simd::TILE_ROWS == $rows {
            // Two tiles of 8 rows keep the units busier than one of 12 and one of 4.
            while $n - $i >= $rows && $n - $i != 16 {
                const $mr: usize = $rows;
                $body;
                $i += $rows;
            }
        }
    };
    (@rest $simd:ident, $n:ident, $i:ident, $mr:ident, $body:expr, $rows:literal) => {
        if $simd::TILE_ROWS >= $rows {
            while $n - $i >= $rows {
                const $mr: usize = $rows;
                $body;
                $i += $rows;
            }
        }
    };
}
pub(super) use tiles;
