//! `cargo xtask nvcc`: CUDA's compiler from PyPI, into the cache, where build.rs finds it. Needs no GPU and no root.

use crate::cache;
use crate::command::run;
use anyhow::{Context, Result, ensure};
use std::path::PathBuf;
use std::process::Command;

/// The compiler and what it needs, pinned together.
const PACKAGES: [&str; 4] =
    ["nvidia-cuda-nvcc==13.0.88", "nvidia-nvvm==13.0.88", "nvidia-cuda-crt==13.0.88", "nvidia-cuda-runtime==13.0.96"];

/// Fetches the compiler unless it is there.
pub fn fetch() -> Result<PathBuf> {
    let folder = cache::root()?.join("nvcc");
    let nvcc = folder.join("nvidia/cu13/bin/nvcc");
    if nvcc.is_file() {
        return Ok(nvcc);
    }
    println!("== nvcc: {PACKAGES:?} to {}", folder.display());
    // A download that breaks off leaves nothing under the final name.
    let partial = folder.with_extension(std::process::id().to_string());
    let install = ["-m", "pip", "install", "--quiet", "--no-deps", "--only-binary=:all:", "--target"];
    run(Command::new("python3").args(install).arg(&partial).args(PACKAGES))
        .context("nvcc comes from PyPI: python3 with pip and a package index are needed")?;
    if folder.exists() {
        std::fs::remove_dir_all(&folder)?;
    }
    std::fs::rename(&partial, &folder)?;
    ensure!(nvcc.is_file(), "the packages hold no {}", nvcc.display());
    Ok(nvcc)
}
