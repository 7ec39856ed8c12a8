//! deltanet: the gated delta net operator for inference engines.
//!
//! How a value flows:
//!
//! ```text
//! deltanet_params ──> Params ──> Problem ──> Plan ──> kernel ──> status
//!   (C struct)       (params)   (problem:    (plan:   (cpu,      (error,
//!                               validated)   chosen)   cuda)      capi)
//! ```
//!
//! [`params`] is what a caller writes, [`problem`] the only validator, [`plan`] the only place that chooses a kernel,
//! [`cpu`] the kernels and how they are spread over threads, [`cuda`] the kernels and how they get onto a stream,
//! [`mod@reference`] the same equations in f64 as the oracle of
//! every test, `capi` the exported functions, [`safe`] the same for Rust programs. Engines' own structures are
//! translated to [`params::Params`] at the edge and nowhere else.

#[cfg(test)]
extern crate self as deltanet; // what tests share is written for users of the crate
mod capi;
/// cbindgen:ignore
pub mod cpu;
/// cbindgen:ignore
pub mod cuda;
mod error;
/// cbindgen:ignore
mod ggml;
mod ik;
mod log;
pub mod params;
pub mod plan;
/// cbindgen:ignore
pub mod problem;
pub mod reference;
pub mod safe;
mod spare;
mod tensor;

pub use capi::*;
pub use error::{Error, Result, Status};
pub use half;
pub use ik::iqk_fused_delta_net;
pub use params::Params;
pub use plan::Plan;
pub use problem::Problem;
pub use tensor::{Dtype, Tensor};
