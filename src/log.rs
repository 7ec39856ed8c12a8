//! The few lines that users read: on standard error, or in the log of the ggml that loaded us.

use std::collections::BTreeSet;
use std::ffi::{CString, c_char, c_int};
use std::io::Write;
use std::sync::{LazyLock, Mutex, OnceLock, PoisonError};

/// ggml's `ggml_log_internal(level, format, ...)`.
pub type HostLog = unsafe extern "C" fn(c_int, *const c_char, ...);

/// How much a line matters, in ggml's numbers.
#[derive(Clone, Copy, Debug)]
pub enum Level {
    Info = 2,
    Warning = 3,
}

/// Lines that are remembered; an engine that makes ever new ones must not fill memory or the terminal.
const REMEMBERED: usize = 256;

static HOST: OnceLock<HostLog> = OnceLock::new();

/// Sends all lines to a host's log from now on.
pub fn use_host(log: HostLog) {
    // A second host in one process shares the first one's log; nothing depends on which it is.
    let _ = HOST.set(log);
}

/// Whether `DELTANET_LOG=1` asks for a report of what is served. The variable is read once.
pub fn verbose() -> bool {
    static VERBOSE: LazyLock<bool> =
        LazyLock::new(|| std::env::var_os("DELTANET_LOG").is_some_and(|value| value != "0" && !value.is_empty()));
    *VERBOSE
}

/// Writes one line.
pub fn line(level: Level, text: &str) {
    let text = format!("deltanet: {}\n", text.replace('\0', " "));
    match (HOST.get(), CString::new(text.as_bytes())) {
        // SAFETY: the host's function takes a printf format and its arguments: one C string for one %s.
        (Some(log), Ok(text)) => unsafe { log(level as c_int, c"%s".as_ptr(), text.as_ptr()) },
        // One write, so that lines of several threads and of the engine do not mix. If standard error is closed,
        // there is nobody to tell.
        _ => drop(std::io::stderr().write_all(text.as_bytes())),
    }
}

/// Writes one line, unless the very same one was written before.
pub fn once_at(level: Level, text: String) {
    static SAID: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());
    let mut said = SAID.lock().unwrap_or_else(PoisonError::into_inner);
    if said.len() < REMEMBERED && !said.contains(&text) {
        line(level, &text);
        said.insert(text);
    }
}

/// Writes one line for information, unless the very same one was written before.
pub fn once(text: String) {
    once_at(Level::Info, text);
}
