//! The exported C functions: each turns its arguments into a [`Problem`] and its result into a status.

mod cpu;
mod cuda;
mod ggml;
mod message;

pub use cpu::*;
pub use cuda::*;
pub use ggml::*;
pub use message::*;

use crate::error::{Error, Result, Status};
use std::panic::{AssertUnwindSafe, catch_unwind};

/// Runs the body of an exported function: a status out, the message kept for this thread, no panic past here.
pub(crate) fn guard(body: impl FnOnce() -> Result<()>) -> Status {
    let result = catch_unwind(AssertUnwindSafe(body)).unwrap_or_else(|panic| {
        let words = panic
            .downcast_ref::<String>()
            .map(String::as_str)
            .or_else(|| panic.downcast_ref::<&str>().copied())
            .unwrap_or("no message");
        Err(Error::compose(Status::Internal, format_args!("a defect in this library: {words}")))
    });
    match result {
        Ok(()) => Status::Ok,
        Err(error) => {
            message::remember(&error);
            error.status()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_becomes_a_status() {
        assert_eq!(guard(|| panic!("forced")), Status::Internal);
        // SAFETY: the message is a C string of this thread.
        let message = unsafe { std::ffi::CStr::from_ptr(deltanet_last_error()) };
        assert!(message.to_str().is_ok_and(|m| m.contains("forced")));
    }

    #[test]
    fn a_panic_in_a_pool_thread_becomes_a_status() {
        let status = guard(|| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(2).build().expect("two threads");
            pool.scope(|scope| scope.spawn(|_| panic!("in a worker")));
            Ok(())
        });
        assert_eq!(status, Status::Internal);
    }
}
