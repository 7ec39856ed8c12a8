//! What `DELTANET_LOG=1` prints to standard error: which engine calls our kernels serve, each kind of call once.

use std::collections::BTreeSet;
use std::io::Write;
use std::sync::{LazyLock, Mutex, PoisonError};

/// Kinds of calls that are remembered; an engine that makes ever new ones must not fill memory or the terminal.
const REMEMBERED: usize = 256;

/// Whether a report is asked for. The variable is read once.
pub fn verbose() -> bool {
    static VERBOSE: LazyLock<bool> =
        LazyLock::new(|| std::env::var_os("DELTANET_LOG").is_some_and(|value| value != "0" && !value.is_empty()));
    *VERBOSE
}

/// Prints a line, unless the very same one was printed before.
pub fn once(text: String) {
    static SAID: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());
    let mut said = SAID.lock().unwrap_or_else(PoisonError::into_inner);
    if said.len() < REMEMBERED && !said.contains(&text) {
        // One write, so that lines of several threads and of the engine do not mix. If standard error is closed,
        // there is nobody to tell.
        let _ = std::io::stderr().write_all(format!("deltanet: {text}\n").as_bytes());
        said.insert(text);
    }
}
