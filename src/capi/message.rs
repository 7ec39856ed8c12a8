//! What a program can ask without a problem at hand: version, status names, the last error's words.

use crate::error::{Error, Status};
use std::cell::RefCell;
use std::ffi::{CString, c_char};

thread_local! {
    static LAST: RefCell<CString> = RefCell::default();
}

/// Keeps an error's message for [`deltanet_last_error`].
pub(crate) fn remember(error: &Error) {
    let words = format!("deltanet: {error}").replace('\0', " ");
    // Without thread-local storage (a thread on its way out) the status alone has to do.
    let _ = LAST.try_with(|last| *last.borrow_mut() = CString::new(words).unwrap_or_default());
}

/// The message of this thread's last call that did not return `DELTANET_STATUS_OK`, empty before one. It names the
/// argument, what it was and what it must be. Valid until this thread's next failing call; never null. Any thread.
#[unsafe(no_mangle)]
pub extern "C" fn deltanet_last_error() -> *const c_char {
    LAST.try_with(|last| last.borrow().as_ptr()).unwrap_or(c"".as_ptr())
}

/// The name of a status, such as "SHAPE"; "UNKNOWN" for a number that is none. Static; never null. Any thread.
#[unsafe(no_mangle)]
pub extern "C" fn deltanet_status_name(status: u32) -> *const c_char {
    let known = Status::ALL.into_iter().find(|known| *known as u32 == status);
    known.map_or(c"UNKNOWN", Status::c_name).as_ptr()
}

/// Major version times 1 000 000, plus minor times 1 000, plus patch, of the library in use. The header's own is
/// `DELTANET_VERSION`. Any thread.
#[unsafe(no_mangle)]
pub extern "C" fn deltanet_version() -> u32 {
    DELTANET_VERSION
}

/// The version of this header as `deltanet_version` counts: major * 1000000 + minor * 1000 + patch.
pub const DELTANET_VERSION: u32 = 1_000;
