//! What servers do to a library that lives in them: tests/c/load.c, each test in a process of its own.
//!
//! Short by default; DELTANET_LOAD=full takes the counts and times of docs/reliability.md.

#[path = "support/library.rs"]
mod library;

use library::{compile, output};
use std::process::Command;

/// Runs one test of the program, with the shorter or the longer numbers.
fn load(test: &str, short: &[u32], full: &[u32]) {
    let numbers = if std::env::var("DELTANET_LOAD").is_ok_and(|kind| kind == "full") { full } else { short };
    let program = compile(&format!("load_{test}"), &["tests/c/load.c"]);
    print!("{}", output(Command::new(program).arg(test).args(numbers.iter().map(u32::to_string))));
}

#[test]
fn many_host_threads_at_once() {
    load("threads", &[64, 3], &[64, 60]);
}

#[test]
fn cycles_do_not_grow() {
    load("cycles", &[1000], &[10_000]);
}

#[test]
fn children_of_fork_run() {
    load("fork", &[20], &[200]);
}

#[test]
fn affinity_masks_are_kept() {
    load("affinity", &[], &[]);
}

#[test]
fn small_stacks_suffice() {
    load("stacks", &[24576], &[24576]);
}

#[test]
fn want_of_threads_is_a_status() {
    load("no-threads", &[], &[]);
}

#[test]
fn want_of_memory_is_a_status() {
    load("no-memory", &[], &[]);
}

#[test]
fn failing_allocations_are_survived() {
    load("faults", &[], &[]);
}

#[test]
fn denormals_are_not_slow() {
    load("denormals", &[], &[]);
}
