//! Moving rows and state blocks between the caller's strided tensors and contiguous f32 scratch.

use super::simd::Simd;
use crate::problem::StateView;
use crate::tensor::{Dtype, View};

/// Copies `n` channels from `channel` on, of one (head, token, sequence), into `to` as f32.
///
/// # Safety
/// The indices are inside the view, its memory is readable, `to` has room for `n`, and `S`'s features are there.
#[inline(always)]
pub unsafe fn load_row<S: Simd>(view: &View, channel: usize, n: usize, at: [usize; 3], to: *mut f32) {
    let from = view.at([channel, at[0], at[1], at[2]]);
    let nb = view.nb[0];
    // SAFETY: every access is to channel `channel + i`, i < n; vector accesses are made only on contiguous channels
    // and only while LANES of them are left.
    unsafe {
        let mut i = 0;
        if nb == view.dtype.size() {
            while i + S::LANES <= n {
                let v = match view.dtype {
                    Dtype::F16 => S::load_f16(from.cast::<u16>().add(i)),
                    Dtype::Bf16 => S::load_bf16(from.cast::<u16>().add(i)),
                    _ => S::load(from.cast::<f32>().add(i)),
                };
                S::store(to.add(i), v);
                i += S::LANES;
            }
        }
        while i < n {
            let from = from.add(i * nb);
            to.add(i).write(match view.dtype {
                Dtype::F16 => from.cast::<half::f16>().read().to_f32(),
                Dtype::Bf16 => from.cast::<half::bf16>().read().to_f32(),
                _ => from.cast::<f32>().read(),
            });
            i += 1;
        }
    }
}

/// Writes `n` channels from `channel` on, of one (head, token, sequence), rounding to the view's dtype.
///
/// # Safety
/// As for [`load_row`], with the view writable and `from` readable.
#[inline(always)]
pub unsafe fn store_row<S: Simd>(view: &View, channel: usize, n: usize, at: [usize; 3], from: *const f32) {
    let to = view.at([channel, at[0], at[1], at[2]]);
    let nb = view.nb[0];
    // SAFETY: as in load_row.
    unsafe {
        let mut i = 0;
        if nb == view.dtype.size() {
            while i + S::LANES <= n {
                let v = S::load(from.add(i));
                match view.dtype {
                    Dtype::F16 => S::store_f16(to.cast::<u16>().add(i), v),
                    Dtype::Bf16 => S::store_bf16(to.cast::<u16>().add(i), v),
                    _ => S::store(to.cast::<f32>().add(i), v),
                }
                i += S::LANES;
            }
        }
        while i < n {
            let (to, x) = (to.add(i * nb), from.add(i).read());
            match view.dtype {
                Dtype::F16 => to.cast::<half::f16>().write(half::f16::from_f32(x)),
                Dtype::Bf16 => to.cast::<half::bf16>().write(half::bf16::from_f32(x)),
                _ => to.cast::<f32>().write(x),
            }
            i += 1;
        }
    }
}

/// One head's state restricted to some value columns: where a block of scratch comes from and goes to.
#[derive(Clone, Copy)]
pub struct Columns {
    /// The element of key channel 0 and the first of the columns.
    pub data: *mut f32,
    pub nb_k: usize,
    pub nb_v: usize,
    /// Key channels.
    pub keys: usize,
    /// Value columns; a multiple of 16.
    pub width: usize,
}

impl Columns {
    /// Columns `first .. first + width` of a head.
    pub fn new(state: &StateView, head: usize, row: usize, keys: usize, first: usize, width: usize) -> Columns {
        let data = state.head(head, row).wrapping_byte_add(first * state.nb_v);
        Columns { data, nb_k: state.nb_k, nb_v: state.nb_v, keys, width }
    }

    /// `width` of the columns, from column `at` on.
    pub fn part(&self, at: usize, width: usize) -> Columns {
        Columns { data: self.data.wrapping_byte_add(at * self.nb_v), width, ..*self }
    }

    /// Reads the columns into `block`, `[key][column]` with `pitch` floats a row.
    ///
    /// # Safety
    /// The state is readable, `block` holds `keys * pitch` floats, and `S`'s features are there.
    #[inline(always)]
    pub unsafe fn load<S: Simd>(&self, block: *mut f32, pitch: usize) {
        // SAFETY: passed on.
        unsafe { self.copy::<S, true>(block, pitch) }
    }

    /// Writes `block` to the columns.
    ///
    /// # Safety
    /// As for [`Columns::load`], with the state writable.
    #[inline(always)]
    pub unsafe fn store<S: Simd>(&self, block: *mut f32, pitch: usize) {
        // SAFETY: passed on.
        unsafe { self.copy::<S, false>(block, pitch) }
    }

    /// Copies in the largest pieces that the strides allow: a vector of value columns, a square of LANES key channels by
    /// LANES columns, or single elements.
    ///
    /// # Safety
    /// As for [`Columns::load`] or [`Columns::store`].
    #[inline(always)]
    unsafe fn copy<S: Simd, const LOAD: bool>(&self, block: *mut f32, pitch: usize) {
        let at = |k: usize, v: usize| self.data.wrapping_byte_add(k * self.nb_k + v * self.nb_v);
        // SAFETY: k and v stay below the keys and the width, multiples of LANES.
        unsafe {
            if self.nb_v == 4 {
                for k in 0..self.keys {
                    for v in (0..self.width).step_by(S::LANES) {
                        let block = block.add(k * pitch + v);
                        if LOAD { S::store(block, S::load(at(k, v))) } else { S::store(at(k, v), S::load(block)) }
                    }
                }
            } else if self.nb_k == 4 {
                for v in (0..self.width).step_by(S::LANES) {
                    for k in (0..self.keys).step_by(S::LANES) {
                        let (state, block) = (at(k, v), block.add(k * pitch + v));
                        if LOAD {
                            S::transpose(state, self.nb_v / 4, block, pitch)
                        } else {
                            S::transpose(block, pitch, state, self.nb_v / 4)
                        }
                    }
                }
            } else {
                for k in 0..self.keys {
                    for v in 0..self.width {
                        let block = block.add(k * pitch + v);
                        if LOAD { block.write(at(k, v).read()) } else { at(k, v).write(block.read()) }
                    }
                }
            }
        }
    }
}
