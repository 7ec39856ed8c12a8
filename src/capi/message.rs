//! What a program can ask without a problem at hand: version, status names, the last error's words.

use crate::error::{Error, Result, Status, ensure};
use std::cell::RefCell;
use std::ffi::c_char;
use std::fmt::Write;

/// Longest message, with its terminating zero.
const LENGTH: usize = 512;

/// A C string in place: nothing to allocate when memory is short, nothing to drop when the thread ends.
struct Message([u8; LENGTH]);

thread_local! {
    static LAST: RefCell<Message> = const { RefCell::new(Message([0; LENGTH])) };
}

/// Appends to a message as long as there is room.
struct Writer<'a> {
    message: &'a mut Message,
    length: usize,
}

impl Write for Writer<'_> {
    fn write_str(&mut self, words: &str) -> std::fmt::Result {
        for byte in words.bytes().take(LENGTH - 1 - self.length) {
            self.message.0[self.length] = if byte == 0 { b' ' } else { byte };
            self.length += 1;
        }
        self.message.0[self.length] = 0;
        Ok(())
    }
}

/// Keeps an error's message for [`deltanet_last_error`].
pub(crate) fn remember(error: &Error) {
    // Without thread-local storage (a thread on its way out) the status alone has to do.
    let _ = LAST.try_with(|last| {
        let mut writer = Writer { message: &mut last.borrow_mut(), length: 0 };
        let _ = write!(writer, "deltanet: {error}");
    });
}

/// Writes words to a caller's buffer as a C string, cut where they do not fit.
///
/// # Safety
/// `text` is null (an error) or holds `size` writable bytes.
pub(crate) unsafe fn put(words: &str, text: *mut c_char, size: usize) -> Result<()> {
    ensure!(!text.is_null(), NullPointer, "text is null; it must point to a buffer");
    ensure!(size > 0, Scratch, "size is 0; it must be at least 1 for the terminating zero");
    let kept = words.len().min(size - 1);
    // SAFETY: kept + 1 <= size bytes are writable, as the caller promises.
    unsafe {
        std::ptr::copy_nonoverlapping(words.as_ptr(), text.cast(), kept);
        text.add(kept).write(0);
    }
    Ok(())
}

/// The message of this thread's last call that did not return `DELTANET_STATUS_OK`, empty before one. It names the
/// argument, what it was and what it must be. Valid until this thread's next failing call; never null. Any thread.
#[unsafe(no_mangle)]
pub extern "C" fn deltanet_last_error() -> *const c_char {
    LAST.try_with(|last| last.borrow().0.as_ptr().cast()).unwrap_or(c"".as_ptr())
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

/// The version of the library in use as text, such as "0.1.0". Static; never null. Any thread.
#[unsafe(no_mangle)]
pub extern "C" fn deltanet_version_string() -> *const c_char {
    const TEXT: &str = concat!(env!("CARGO_PKG_VERSION"), "\0");
    TEXT.as_ptr().cast()
}

/// The major version of this header.
pub const DELTANET_VERSION_MAJOR: u32 = 0;

/// The minor version of this header.
pub const DELTANET_VERSION_MINOR: u32 = 1;

/// The patch version of this header.
pub const DELTANET_VERSION_PATCH: u32 = 0;

/// The version of this header as `deltanet_version` counts: major * 1000000 + minor * 1000 + patch.
pub const DELTANET_VERSION: u32 =
    DELTANET_VERSION_MAJOR * 1000000 + DELTANET_VERSION_MINOR * 1000 + DELTANET_VERSION_PATCH;
