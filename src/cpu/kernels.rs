//! The table of kernels: each algorithm instantiated for each instruction set.

use super::isa::Isa;
use super::simd::{self, Simd};
use super::{chunked, recurrent};
use crate::problem::Problem;

/// The kernels of an instruction set. Calling one needs a CPU that has the set, and what the algorithm asks for.
#[derive(Clone, Copy)]
pub struct Kernels {
    pub recurrent: unsafe fn(&Problem, &recurrent::Run, *mut f32),
    pub chunked: unsafe fn(&Problem, &chunked::Task, *mut f32),
}

/// Kernels named for dtype, algorithm and instruction set; then the vectors of 32 (or all that one lane gets) and of 16
/// columns for the recurrent one, and of a wide and a narrow slab for the chunked one.
macro_rules! instantiate {
    ($table:ident, $recurrent:ident, $chunked:ident, $($feature:literal)?, $simd:ty, [$nv:literal, $nh:literal], [$wide:literal, $narrow:literal]) => {
        $(#[target_feature(enable = $feature)])?
        unsafe fn $recurrent(p: &Problem, run: &recurrent::Run, scratch: *mut f32) {
            // SAFETY: the caller's promises are those of the algorithm; the features are enabled here.
            unsafe { recurrent::run::<$simd, $nv, $nh>(p, run, scratch) }
        }

        $(#[target_feature(enable = $feature)])?
        unsafe fn $chunked(p: &Problem, task: &chunked::Task, scratch: *mut f32) {
            // SAFETY: as above.
            unsafe { chunked::run::<$simd, $wide, $narrow>(p, task, scratch) }
        }

        const $table: Kernels = Kernels { recurrent: $recurrent, chunked: $chunked };
    };
}

instantiate!(SCALAR, deltanet_f32_recurrent_scalar, deltanet_f32_chunked_scalar, , simd::Scalar, [16, 16], [4, 4]);
#[cfg(target_arch = "x86_64")]
instantiate!(AVX2, deltanet_f32_recurrent_avx2, deltanet_f32_chunked_avx2, "avx2,fma,f16c", simd::Avx2, [4, 2], [2, 2]);
#[cfg(target_arch = "x86_64")]
instantiate!(
    AVX512,
    deltanet_f32_recurrent_avx512,
    deltanet_f32_chunked_avx512,
    "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl",
    simd::Avx512,
    [2, 1],
    [2, 1]
);

impl Isa {
    /// Rows of its register tile.
    pub fn tile_rows(self) -> usize {
        match self {
            Isa::Scalar => simd::Scalar::TILE_ROWS,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => simd::Avx2::TILE_ROWS,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => simd::Avx512::TILE_ROWS,
            #[cfg(not(target_arch = "x86_64"))]
            _ => simd::Scalar::TILE_ROWS,
        }
    }
}

/// The kernels of an instruction set.
pub fn of(isa: Isa) -> Kernels {
    match isa {
        Isa::Scalar => SCALAR,
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => AVX2,
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => AVX512,
        #[cfg(not(target_arch = "x86_64"))]
        _ => SCALAR,
    }
}
