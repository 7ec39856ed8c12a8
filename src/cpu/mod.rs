//! CPU kernels: which instruction set, which algorithm, how the work is split.
//!
//! An algorithm is written once over `simd::Simd`; `kernels` instantiates it for each `Isa`.

#![allow(clippy::needless_range_loop, reason = "indices count registers: loops that the compiler must unroll whole")]

mod ahead;
pub(crate) mod chunked;
mod gates;
mod isa;
mod kernels;
pub(crate) mod pieces;
pub(crate) mod pool;
pub(crate) mod recurrent;
mod rows;
mod run;
mod simd;
mod step;
mod tile;
mod token;
mod window;

pub use isa::Isa;
pub use run::{MAX_THREADS, run, run_part};
