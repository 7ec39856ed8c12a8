//! The table of kernels: each algorithm instantiated for each instruction set.

use super::isa::Isa;
use super::recurrent;
use super::simd;
use crate::problem::Problem;

/// A kernel for one block of columns: (problem, sequence, head, first column, width, scratch).
pub type Kernel = unsafe fn(&Problem, usize, usize, usize, usize, *mut f32);

macro_rules! instantiate {
    ($name:ident, $($feature:literal)?, $simd:ty, $vectors:literal) => {
        $(#[target_feature(enable = $feature)])?
        unsafe fn $name(p: &Problem, b: usize, head: usize, first: usize, width: usize, scratch: *mut f32) {
            // SAFETY: the caller's promises are those of the algorithm; the features are enabled here.
            unsafe { recurrent::run::<$simd, $vectors>(p, b, head, first, width, scratch) }
        }
    };
}

instantiate!(deltanet_f32_recurrent_scalar, , simd::Scalar, 16);
#[cfg(target_arch = "x86_64")]
instantiate!(deltanet_f32_recurrent_avx2, "avx2,fma,f16c", simd::Avx2, 2);
#[cfg(target_arch = "x86_64")]
instantiate!(deltanet_f32_recurrent_avx512, "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl", simd::Avx512, 1);

/// The token-serial kernel of an instruction set. Calling it needs a CPU that has the set.
pub fn recurrent(isa: Isa) -> Kernel {
    match isa {
        Isa::Scalar => deltanet_f32_recurrent_scalar,
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => deltanet_f32_recurrent_avx2,
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => deltanet_f32_recurrent_avx512,
        #[cfg(not(target_arch = "x86_64"))]
        _ => deltanet_f32_recurrent_scalar,
    }
}
