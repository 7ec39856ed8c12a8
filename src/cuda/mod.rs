//! The operator on a CUDA stream.
//!
//! ```text
//! prepare:  current context ──> module cache          (modules: loads the embedded images once per context)
//! run:      Problem ──> Plan ──> arguments ──> launch  (plan: kernel and grid; abi: what kernels/problem.h describes;
//!                                                       chunked: the several launches of a prompt)
//! ```
//!
//! The driver is found when the first call comes (driver): the library needs no CUDA to build, load or run elsewhere.

#[cfg(feature = "cuda")]
mod abi;
#[cfg(feature = "cuda")]
mod chunked;
#[cfg(feature = "cuda")]
mod driver;
#[cfg(all(feature = "cuda", test))]
mod emulated;
#[cfg(feature = "cuda")]
mod modules;
#[cfg(feature = "cuda")]
mod plan;
#[cfg(feature = "cuda")]
mod run;

#[cfg(feature = "cuda")]
pub use run::{Device, describe, device, prepare, run, workspace_size};

#[cfg(not(feature = "cuda"))]
mod absent {
    use crate::error::{Error, Result, Status};
    use crate::problem::Problem;
    use std::ffi::c_void;

    fn absent<T>() -> Result<T> {
        Err(Error::new(Status::Unsupported, "this library was built without the cargo feature cuda"))
    }
    /// Answers that there is no CUDA.
    pub fn prepare() -> Result<()> {
        absent()
    }
    /// Answers that there is no CUDA.
    pub fn workspace_size(_: &Problem) -> Result<usize> {
        absent()
    }
    /// Answers that there is no CUDA.
    pub fn describe(_: &Problem) -> Result<String> {
        absent()
    }
    /// Answers that there is no CUDA.
    ///
    /// # Safety
    /// Always.
    pub unsafe fn run(_: &Problem, _: *mut c_void, _: usize, _: *mut c_void) -> Result<()> {
        absent()
    }
}
#[cfg(not(feature = "cuda"))]
pub use absent::*;
