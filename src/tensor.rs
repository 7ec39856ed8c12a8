//! Tensors as engines describe them (data, dtype, extents, byte strides) and the checked views made from them.

use crate::error::{Error, Result, Status, ensure};
use std::ffi::c_void;

/// Element type of a tensor.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Dtype {
    /// IEEE single precision.
    F32 = 0,
    /// IEEE half precision.
    F16 = 1,
    /// bfloat16.
    Bf16 = 2,
    /// 32-bit signed integer (index tensors).
    I32 = 3,
    /// 64-bit signed integer (index tensors).
    I64 = 4,
}

impl Dtype {
    /// Bytes of one element.
    pub fn size(self) -> usize {
        match self {
            Dtype::F32 | Dtype::I32 => 4,
            Dtype::F16 | Dtype::Bf16 => 2,
            Dtype::I64 => 8,
        }
    }

    fn from_code(code: u32) -> Option<Dtype> {
        [Dtype::F32, Dtype::F16, Dtype::Bf16, Dtype::I32, Dtype::I64].into_iter().find(|d| *d as u32 == code)
    }
}

/// A strided tensor that somebody else owns, in ggml's order: `ne[0]` and `nb[0]` belong to the innermost axis.
///
/// Axes are (channel, head, token, sequence) for q, k, v, g, beta and out; for states they are (the channel that the
/// layout names contiguous, the other channel, head, row). Index tensors use axis 0 alone. A tensor whose `data` is
/// null is absent. Strides are in bytes and not negative; inputs may use stride 0 to broadcast.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Tensor {
    /// First element; aligned to the element's size.
    pub data: *mut c_void,
    /// Elements along each axis.
    pub ne: [i64; 4],
    /// Bytes between neighbours along each axis; multiples of the element's size.
    pub nb: [usize; 4],
    /// A `deltanet_dtype` value.
    pub dtype: u32,
    /// Zero.
    pub reserved: u32,
}

impl Default for Tensor {
    fn default() -> Self {
        Tensor { data: std::ptr::null_mut(), ne: [0; 4], nb: [0; 4], dtype: 0, reserved: 0 }
    }
}

impl Tensor {
    /// A tensor with the strides of a dense array of this shape; past the address space they saturate, and the
    /// validator refuses them.
    pub fn dense(data: *mut c_void, dtype: Dtype, ne: [i64; 4]) -> Tensor {
        let mut nb = [dtype.size(); 4];
        for axis in 1..4 {
            nb[axis] = nb[axis - 1].saturating_mul(ne[axis - 1].max(0) as usize);
        }
        Tensor { data, ne, nb, dtype: dtype as u32, reserved: 0 }
    }
}

/// A tensor whose description was checked: positive extents, aligned, inside the address space.
#[derive(Clone, Copy, Debug)]
pub(crate) struct View {
    pub data: *mut u8,
    pub dtype: Dtype,
    pub ne: [usize; 4],
    pub nb: [usize; 4],
}

impl View {
    /// Checks everything about `tensor` that does not depend on other tensors.
    pub fn new(name: &str, tensor: &Tensor, allowed: &[Dtype]) -> Result<View> {
        let Some(dtype) = Dtype::from_code(tensor.dtype) else {
            let words = format_args!("{name}.dtype is {}; it must be a deltanet_dtype", tensor.dtype);
            return Err(Error::compose(Status::Dtype, words));
        };
        ensure!(allowed.contains(&dtype), Dtype, "{name}.dtype is {dtype:?}; it must be one of {allowed:?}");
        ensure!(tensor.reserved == 0, UnknownValue, "{name}.reserved is {}; it must be 0", tensor.reserved);
        let mut ne = [0; 4];
        for (axis, (to, from)) in ne.iter_mut().zip(tensor.ne).enumerate() {
            let extent = usize::try_from(from).ok();
            ensure!(extent.is_some(), Shape, "{name}.ne[{axis}] is {from}; it must not be negative");
            *to = extent.unwrap_or(0);
        }
        let view = View { data: tensor.data.cast(), dtype, ne, nb: tensor.nb };
        if view.is_empty() {
            return Ok(view);
        }
        ensure!(!view.data.is_null(), NullPointer, "{name}.data is null; it must point to the tensor's elements");
        let address = view.data as usize;
        let size = dtype.size();
        ensure!(
            address.is_multiple_of(size),
            Misaligned,
            "{name}.data is {address:#x}; it must be aligned to {size} bytes"
        );
        for (axis, nb) in view.nb.iter().enumerate() {
            ensure!(
                view.ne[axis] == 1 || nb.is_multiple_of(size),
                Misaligned,
                "{name}.nb[{axis}] is {nb}; it must be a multiple of the element size {size}"
            );
        }
        ensure!(
            view.region().end().is_some(),
            Stride,
            "{name} with ne {:?} and nb {:?} at {address:#x} reaches outside the address space",
            view.ne,
            view.nb
        );
        Ok(view)
    }

    pub fn is_empty(&self) -> bool {
        self.ne.contains(&0)
    }

    /// The memory that the view covers.
    pub fn region(&self) -> Region {
        let [n0, n1, n2, n3] = self.ne;
        let [b0, b1, b2, b3] = self.nb;
        Region { start: self.data as usize, ne: [n0, n1, n2, n3, 1], nb: [b0, b1, b2, b3, 0], size: self.dtype.size() }
    }

    /// Byte offset of an element.
    #[inline(always)]
    pub fn offset(&self, at: [usize; 4]) -> usize {
        at[0] * self.nb[0] + at[1] * self.nb[1] + at[2] * self.nb[2] + at[3] * self.nb[3]
    }

    /// Address of an element. Within the tensor that the caller described as long as `at` is below `ne`.
    #[inline(always)]
    pub fn at(&self, at: [usize; 4]) -> *mut u8 {
        self.data.wrapping_add(self.offset(at))
    }

    /// Address of an element that need not exist, not to be read: strides of axes of one element or none may be any numbers,
    /// and multiples of theirs more than a number holds.
    #[inline(always)]
    pub fn near(&self, at: [usize; 4]) -> *const u8 {
        let offset =
            at.into_iter().zip(self.nb).fold(0usize, |offset, (at, nb)| offset.wrapping_add(at.wrapping_mul(nb)));
        self.data.wrapping_add(offset)
    }
}

/// The addresses of a strided tensor of up to five axes (the fifth: snapshot slots).
#[derive(Clone, Copy, Debug)]
pub(crate) struct Region {
    pub start: usize,
    pub ne: [usize; 5],
    pub nb: [usize; 5],
    pub size: usize,
}

impl Region {
    fn is_empty(&self) -> bool {
        self.ne.contains(&0)
    }

    /// Bytes from the first byte to past the last one over the axes that `keep` picks; `None` past `isize::MAX`.
    fn span(&self, keep: impl Fn(usize) -> bool) -> Option<usize> {
        let mut span = self.size;
        for axis in (0..5).filter(|axis| keep(*axis)) {
            span = span.checked_add(self.ne[axis].saturating_sub(1).checked_mul(self.nb[axis])?)?;
        }
        (span <= isize::MAX as usize).then_some(span)
    }

    /// Address past the last byte, or `None` where that is no address.
    pub fn end(&self) -> Option<usize> {
        self.start.checked_add(self.span(|_| true)?)
    }

    /// Whether the two may share a byte. Interleaved views of one buffer (same row stride, different columns) do not.
    pub fn overlaps(&self, other: &Region) -> bool {
        if self.is_empty() || other.is_empty() {
            return false;
        }
        let (Some(end), Some(other_end)) = (self.end(), other.end()) else { return true };
        if end <= other.start || other_end <= self.start {
            return false;
        }
        // Modulo a stride that both share, axes with multiples of it vanish; disjoint residues mean disjoint bytes.
        let disjoint_modulo = |period: usize| {
            let residue = |r: &Region| r.span(|axis| !r.nb[axis].is_multiple_of(period));
            let (Some(mine), Some(theirs)) = (residue(self), residue(other)) else { return false };
            let ahead = (other.start.wrapping_sub(self.start) as isize).rem_euclid(period as isize) as usize;
            mine <= ahead && ahead.checked_add(theirs).is_some_and(|end| end <= period)
        };
        !self.nb.iter().any(|nb| *nb > 0 && *nb <= isize::MAX as usize && other.nb.contains(nb) && disjoint_modulo(*nb))
    }

    /// Whether two different elements may share a byte: some axis' stride is less than what the smaller ones cover.
    pub fn overlaps_itself(&self) -> bool {
        // A dense tensor without elements has strides of 0 past its empty axis.
        if self.is_empty() {
            return false;
        }
        let mut axes: [(usize, usize); 5] = std::array::from_fn(|axis| (self.nb[axis], self.ne[axis]));
        axes.sort_unstable();
        let mut covered = self.size;
        for (nb, ne) in axes.into_iter().filter(|(_, ne)| *ne > 1) {
            if nb < covered {
                return true;
            }
            covered = nb.saturating_mul(ne - 1).saturating_add(covered);
        }
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn region(start: usize, ne: [usize; 5], nb: [usize; 5]) -> Region {
        Region { start, ne, nb, size: 4 }
    }

    #[test]
    fn interleaved_columns_do_not_overlap() {
        // Two 16-channel column ranges of rows of 64 floats.
        let a = region(0, [16, 1, 10, 2, 1], [4, 64, 256, 2560, 0]);
        let b = region(64, [16, 1, 10, 2, 1], [4, 64, 256, 2560, 0]);
        assert!(!a.overlaps(&b) && !b.overlaps(&a));
        let c = region(60, [16, 1, 10, 2, 1], [4, 64, 256, 2560, 0]);
        assert!(a.overlaps(&c) && c.overlaps(&a) && c.overlaps(&b));
    }

    #[test]
    fn nothing_overlaps_an_empty_tensor() {
        let empty = region(0, [16, 4, 0, 2, 1], [4, 64, 256, 0, 0]);
        assert!(!empty.overlaps_itself() && !empty.overlaps(&region(0, [16, 4, 1, 1, 1], [4, 64, 256, 0, 0])));
    }

    #[test]
    fn overlap_agrees_with_a_byte_map() {
        let bytes = |r: &Region| {
            let mut set = std::collections::BTreeMap::new();
            for i in 0..r.ne[0] {
                for j in 0..r.ne[1] {
                    for l in 0..r.ne[2] {
                        let first = r.start + i * r.nb[0] + j * r.nb[1] + l * r.nb[2];
                        (first..first + 4).for_each(|b| *set.entry(b).or_insert(0) += 1);
                    }
                }
            }
            set
        };
        let mut seed = 7u64;
        let mut draw = |n: usize| {
            seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (seed >> 33) as usize % n
        };
        for _ in 0..20000 {
            let mut one = || {
                region(
                    1000 + 4 * draw(40),
                    [1 + draw(4), 1 + draw(3), 1 + draw(3), 1, 1],
                    [4 * draw(3), 4 * draw(12), 4 * draw(30), 0, 0],
                )
            };
            let (a, b) = (one(), one());
            let (ma, mb) = (bytes(&a), bytes(&b));
            // The tests are conservative: they may see an overlap that is none, never miss one.
            if ma.keys().any(|byte| mb.contains_key(byte)) {
                assert!(a.overlaps(&b), "{a:?} {b:?}");
            }
            if ma.values().any(|count| *count > 1) {
                assert!(a.overlaps_itself(), "{a:?}");
            }
        }
    }
}
