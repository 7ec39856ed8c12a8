//! CPU kernels: which instruction set, which algorithm, how the work is split.
//!
//! An algorithm is written once over [`simd::Simd`]; [`kernels`] instantiates it for each [`Isa`].

mod isa;
mod kernels;
mod pool;
pub(crate) mod recurrent;
mod rows;
mod run;
mod simd;

pub use isa::Isa;
pub use run::{MAX_THREADS, run, run_part};
