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
    load("cycles", &[3000], &[10_000]);
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
fn a_control_group_of_one_cpu_is_kept() {
    load("group", &[], &[]);
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

/// A host may open and close the library; its pools' threads go on in its code.
#[test]
fn closing_the_library_is_safe() {
    use deltanet::{Dtype, Params, Tensor};
    let (s, heads, tokens) = (32, 4, 3);
    let mut memory = vec![0.25f32; (4 * s * heads * tokens + 2 * heads * tokens + s * s * heads) as usize];
    let mut at = memory.as_mut_ptr();
    let mut tensor = |ne: [i64; 4]| {
        let tensor = Tensor::dense(at.cast(), Dtype::F32, ne);
        at = at.wrapping_add(ne.iter().product::<i64>() as usize);
        tensor
    };
    let row = [s, heads, tokens, 1];
    let (q, k, v, out) = (tensor(row), tensor(row), tensor(row), tensor(row));
    let (g, beta) = (tensor([1, heads, tokens, 1]), tensor([1, heads, tokens, 1]));
    let state = tensor([s, s, heads, 1]);
    let params = Params { q, k, v, g, beta, state_in: state, out, state_out: state, ..Params::default() };
    for threads in (2..5).cycle().take(12) {
        // SAFETY: the library's initialisers are the C library's and Rust's, which may run at any time.
        let library = unsafe { libloading::Library::new(library::path()) }.expect("the library loads");
        // SAFETY: deltanet_run has this type.
        let run = unsafe { library.get::<unsafe extern "C" fn(*const Params, u32) -> u32>(b"deltanet_run\0") };
        let run = run.expect("deltanet_run is exported");
        // SAFETY: the tensors are as large as described, and nobody else has them.
        assert_eq!(unsafe { run(&params, threads) }, 0);
        library.close().expect("the library closes");
    }
}
