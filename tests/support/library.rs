//! The shared library that C programs load, as cargo has just built it, and the tools that look at it.
#![allow(dead_code, reason = "each test binary uses its part")]

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// The folder of the `libdeltanet.so` that was built together with this test.
pub fn folder() -> PathBuf {
    let test = std::env::current_exe().expect("a test knows its own path");
    // Tests are in `deps`, where cargo puts what it compiles before it copies some of it up.
    let deps = test.parent().expect("a test is in a folder").to_path_buf();
    assert!(deps.join("libdeltanet.so").is_file(), "{} has no libdeltanet.so", deps.display());
    deps
}

/// `libdeltanet.so` itself.
pub fn path() -> PathBuf {
    folder().join("libdeltanet.so")
}

/// The repository.
pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Whether a program can be started at all.
pub fn has(program: &str) -> bool {
    Command::new(program).arg("--version").output().is_ok_and(|output| output.status.success())
}

/// What a command wrote; its failure is the test's.
pub fn output(command: &mut Command) -> String {
    let Output { status, stdout, stderr } =
        command.output().unwrap_or_else(|error| panic!("{command:?} could not be started: {error}"));
    let (stdout, stderr) = (String::from_utf8_lossy(&stdout), String::from_utf8_lossy(&stderr));
    assert!(status.success(), "{command:?}: {status}\n{stdout}\n{stderr}");
    stdout.into_owned()
}

/// Compiles C sources as an engine's author would, all warnings being errors.
pub fn compile(name: &str, sources: &[&str]) -> PathBuf {
    let program = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    let mut cc = Command::new("cc");
    cc.args(["-std=c11", "-O1", "-g", "-Wall", "-Wextra", "-Wpedantic", "-Wshadow", "-Wconversion", "-Werror"]);
    cc.arg("-I").arg(root().join("include")).args(sources.iter().map(|source| root().join(source)));
    cc.arg("-o").arg(&program).arg("-L").arg(folder());
    cc.arg(format!("-Wl,-rpath,{}", folder().display())).args(["-ldeltanet", "-lpthread", "-lm"]);
    output(&mut cc);
    program
}
