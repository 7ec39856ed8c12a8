//! What the CUDA functions do when the driver fails: tests/c/cuda_faults.c with a made-up libcuda, each test in a process
//! of its own. No GPU and no driver are needed; a build without CUDA kernels skips.

#[path = "support/library.rs"]
mod library;

use library::{compile, output, root};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

/// The driver's functions that the library looks up, as its source names them.
fn symbols() -> Vec<String> {
    let source = std::fs::read_to_string(root().join("src/cuda/driver.rs")).expect("the source is there");
    let table = source.split_once("\ndriver! {").expect("a table of functions").1;
    let symbols: Vec<_> = table.split('"').skip(1).step_by(2).take_while(|word| word.starts_with("cu")).collect();
    assert!(symbols.len() > 10 && symbols.contains(&"cuInit") && symbols.contains(&"cuLaunchKernel"), "{symbols:?}");
    symbols.into_iter().map(str::to_owned).collect()
}

/// Compiles a libcuda without one of its functions, into a folder of its own.
fn driver(name: &str, without: &str) -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    std::fs::create_dir_all(&folder).expect("the scratch folder is writable");
    let file = folder.join("libcuda.so.1");
    let mut cc = Command::new("cc");
    cc.args(["-std=c11", "-O1", "-g", "-Wall", "-Wextra", "-Wpedantic", "-Wshadow", "-Wconversion", "-Werror"]);
    cc.args(["-shared", "-fPIC", "-Wl,-soname,libcuda.so.1"]);
    if !without.is_empty() {
        cc.arg(format!("-D{without}=is_not_there"));
    }
    output(cc.arg(root().join("tests/c/fake_cuda.c")).arg("-o").arg(&file).arg("-lpthread"));
    // The names that a driver may have: an installed one must not be found first.
    let _ = std::fs::remove_file(folder.join("libcuda.so"));
    std::os::unix::fs::symlink("libcuda.so.1", folder.join("libcuda.so")).expect("the scratch folder is writable");
    folder
}

/// Runs one test of the program with the libcuda in `folder`.
fn run(test: &[&str], folder: &Path, variables: &[(&str, &str)]) {
    if let Err(error) = deltanet::cuda::describe(&nothing())
        && error.status() == deltanet::Status::Unsupported
    {
        println!("SKIPPED: {error}");
        return;
    }
    static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
    let mut command = Command::new(PROGRAM.get_or_init(|| compile("cuda_faults", &["tests/c/cuda_faults.c"])));
    command.args(test).env("LD_LIBRARY_PATH", folder).envs(variables.iter().copied());
    print!("{}", output(&mut command));
}

/// A problem without a token.
fn nothing() -> deltanet::Problem {
    use deltanet::{Dtype, Params, Tensor};
    let tensor = |ne| Tensor::dense(std::ptr::without_provenance_mut(1 << 40), Dtype::F32, ne);
    let row = tensor([16, 1, 0, 1]);
    let gate = tensor([1, 1, 0, 1]);
    let params = Params {
        q: row,
        k: row,
        v: row,
        out: row,
        g: gate,
        beta: gate,
        state_in: tensor([16, 16, 1, 1]),
        ..Params::default()
    };
    // SAFETY: there are no index tensors.
    unsafe { deltanet::Problem::new(&params) }.expect("a valid problem")
}

fn with_driver(test: &str) {
    run(&[test], &driver(&format!("driver_{test}"), ""), &[]);
}

#[test]
fn each_driver_call_of_a_prepare_fails() {
    with_driver("prepare");
}

#[test]
fn each_driver_call_of_a_run_fails() {
    with_driver("run");
}

#[test]
fn a_broken_context_is_told() {
    with_driver("sticky");
}

#[test]
fn a_driver_may_start_late() {
    with_driver("start");
}

#[test]
fn devices_get_their_kernels_or_are_refused() {
    with_driver("devices");
}

#[test]
fn memory_of_others_is_refused() {
    with_driver("memory");
}

#[test]
fn captures_need_a_prepared_context() {
    with_driver("capture");
}

#[test]
fn contexts_do_not_mix() {
    with_driver("contexts");
}

#[test]
fn a_load_that_hangs_stops_no_other_context() {
    with_driver("hold");
}

#[test]
fn children_of_fork_do_not_wait() {
    run(&["fork"], &driver("driver_fork", ""), &[("FAKE_CUDA_LOADS_IN", "1500")]);
    with_driver("fork-start");
}

#[test]
fn failing_allocations_are_survived() {
    with_driver("allocations");
}

#[test]
fn drivers_that_are_too_old_or_absent_are_told() {
    for symbol in symbols() {
        run(&["missing", &symbol], &driver(&format!("driver_without_{symbol}"), &symbol), &[]);
    }
    let empty = Path::new(env!("CARGO_TARGET_TMPDIR")).join("driver_none");
    std::fs::create_dir_all(&empty).expect("the scratch folder is writable");
    run(&["missing", ""], &empty, &[]);
}
