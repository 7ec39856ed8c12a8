//! The nightly toolchain, its components, and pinned tools: fetched on first use, kept in the cache.

use crate::cache;
use crate::command::{output, run, workspace};
use anyhow::{Context, Result};
use std::path::PathBuf;
use std::process::Command;

/// The platform that everything here is built for.
pub const TARGET: &str = "x86_64-unknown-linux-gnu";

/// Sees to a nightly toolchain with the components asked for.
pub fn set_up(components: &[&str]) -> Result<()> {
    let rustup = || Command::new("rustup");
    if output(rustup().args(["run", "nightly", "rustc", "--version"])).is_err() {
        run(rustup().args(["toolchain", "install", "nightly", "--profile", "minimal"]))
            .context("there is no nightly toolchain, and none could be installed")?;
    }
    let installed = output(rustup().args(["component", "list", "--toolchain", "nightly", "--installed"]))?;
    for component in components {
        if !installed.lines().any(|line| line.starts_with(component)) {
            run(rustup().args(["component", "add", "--toolchain", "nightly", component]))?;
        }
    }
    Ok(())
}

/// A program that uses the nightly toolchain, in the workspace. The cargo that runs us must not be handed down.
pub fn command(program: impl AsRef<std::ffi::OsStr>) -> Command {
    let mut command = Command::new(program);
    command.current_dir(workspace()).env("RUSTUP_TOOLCHAIN", "nightly");
    for variable in ["CARGO", "RUSTC", "RUSTDOC", "RUSTFLAGS", "CARGO_TARGET_DIR"] {
        command.env_remove(variable);
    }
    command
}

/// Nightly's cargo.
pub fn cargo() -> Command {
    command("cargo")
}

/// The folder of nightly's own tools, such as llvm-cov.
pub fn llvm_tools() -> Result<PathBuf> {
    let sysroot = output(command("rustc").args(["--print", "sysroot"]))?;
    Ok(PathBuf::from(sysroot.trim()).join("lib/rustlib").join(TARGET).join("bin"))
}

/// A tool of exactly that version from the registry.
pub fn tool(name: &str, version: &str) -> Result<PathBuf> {
    let root = cache::root()?.join("tools").join(format!("{name}-{version}"));
    let program = root.join("bin").join(name);
    if !program.is_file() {
        let mut install = Command::new("cargo");
        install.args(["install", "--locked", "--version", version, "--root"]).arg(&root).arg(name);
        run(install.env_remove("CARGO").env_remove("RUSTFLAGS"))?;
    }
    Ok(program)
}
