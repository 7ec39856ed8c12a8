//! Memory for code that can only abort when an allocation fails.

use crate::error::{Error, Result, Status};

/// Refuses where memory is so short that `bytes` cannot be had. What follows, `what`, allocates less than that in small
/// pieces by code that is not ours and aborts without them.
pub(crate) fn spare(bytes: usize, what: &str) -> Result<()> {
    let mut memory = Vec::<u8>::new();
    let reserved = memory.try_reserve_exact(bytes);
    // Compilers may leave out an allocation that nobody looks at.
    std::hint::black_box(memory.as_ptr());
    reserved.map_err(|_| {
        let words = format_args!("{bytes} bytes that {what} takes could not be had");
        Error::compose(Status::OutOfMemory, words)
    })
}
