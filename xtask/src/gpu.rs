//! `cargo xtask gpu`: everything that a GPU machine needs to check and time the CUDA kernels, in one folder. That machine
//! needs the driver and no cargo; `compute-sanitizer` is used where it is there.

use crate::command::{cargo, golden_cases, output, release, run, workspace};
use crate::nvcc;
use anyhow::{Context, Result};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Builds the folder target/gpu and says what to do with it.
pub fn pack() -> Result<()> {
    nvcc::fetch()?;
    run(cargo().args(["build", "--release", "--package", "deltanet", "--package", "deltanet-cli"]))?;
    let folder = release().parent().context("target/release has a parent")?.join("gpu");
    if folder.exists() {
        fs::remove_dir_all(&folder)?;
    }
    fs::create_dir_all(folder.join("data"))?;
    let driver = folder.join("driver_cuda");
    run(Command::new("make")
        .args(["--quiet", "-C"])
        .arg(workspace().join("examples"))
        .arg(format!("LIBDIR={}", release().display()))
        .arg(format!("BUILD={}", folder.display()))
        .arg(&driver))?;
    // Debug information is most of their size.
    for (from, name) in [
        (release().join("libdeltanet.so"), "libdeltanet.so.0"),
        (release().join("deltanet"), "deltanet"),
        (tests()?, "cuda-tests"),
    ] {
        run(Command::new("strip").arg("-o").arg(folder.join(name)).arg(from))?;
    }
    for case in golden_cases()? {
        fs::copy(&case, folder.join("data").join(case.file_name().unwrap_or_default()))?;
    }
    let script = folder.join("run.sh");
    fs::write(&script, include_str!("gpu.sh"))?;
    fs::set_permissions(&script, fs::Permissions::from_mode(0o755))?;
    println!("{}: copy it to a GPU machine and run ./run.sh RESULTS there", folder.display());
    Ok(())
}

/// The tests of cli/tests/cuda.rs as a program.
fn tests() -> Result<PathBuf> {
    let words = output(cargo().args([
        "test",
        "--release",
        "--package",
        "deltanet-cli",
        "--test",
        "cuda",
        "--no-run",
        "--message-format=json",
    ]))?;
    let program = words.lines().rev().find_map(|line| {
        let message: serde_json::Value = serde_json::from_str(line).ok()?;
        let is_it = message["target"]["name"] == "cuda";
        message["executable"].as_str().filter(|_| is_it).map(|path| Path::new(path).to_path_buf())
    });
    program.context("cargo names no program for the test cuda")
}
