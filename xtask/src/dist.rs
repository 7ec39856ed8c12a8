//! `cargo xtask dist`: the release archive for x86-64 Linux, listed and tested.

use crate::command::{golden_cases, output, release, run, workspace};
use crate::install::{self, VERSION};
use anyhow::{Context, Result, ensure};
use clap::Args;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// What goes into the archive.
#[derive(Args)]
pub struct Options {
    /// Features to build with, as cargo takes them.
    #[arg(long)]
    features: Option<String>,
}

/// Builds, packs and tests the archive in target/dist.
pub fn dist(options: &Options) -> Result<()> {
    install::build(options.features.as_deref())?;
    let archive = pack()?;
    verify(&archive)?;
    println!("{} ({} KiB)", archive.display(), fs::metadata(&archive)?.len() / 1024);
    Ok(())
}

/// Packs what was built; the same commit gives the same archive but for the compiler's own differences.
pub fn pack() -> Result<PathBuf> {
    ensure!(
        cfg!(all(target_os = "linux", target_arch = "x86_64")),
        "the release archive is for x86-64 Linux, and this is another machine"
    );
    let folder = release().parent().context("target/release has a parent")?.join("dist");
    let name = format!("deltanet-{VERSION}-x86_64-linux");
    let staged = folder.join(&name);
    if staged.exists() {
        fs::remove_dir_all(&staged)?;
    }
    install::install_to(&staged, Path::new("lib"))?;
    let archive = folder.join(format!("{name}.tar.gz"));
    let time = output(Command::new("git").current_dir(workspace()).args(["log", "-1", "--format=%ct"]))?;
    run(Command::new("tar")
        .current_dir(&folder)
        .args(["--sort=name", "--owner=0", "--group=0", "--numeric-owner"])
        .arg(format!("--mtime=@{}", time.trim()))
        .arg("-czf")
        .arg(&archive)
        .arg(&name))?;
    let sum = output(Command::new("sha256sum").current_dir(&folder).arg(format!("{name}.tar.gz")))?;
    fs::write(folder.join(format!("{name}.tar.gz.sha256")), sum)?;
    fs::remove_dir_all(&staged)?;
    Ok(archive)
}

/// Lists and tests an archive with packaging/test-archive.sh.
pub fn verify(archive: &Path) -> Result<()> {
    let packaging = workspace().join("packaging");
    let floor = fs::read_to_string(packaging.join("glibc-floor"))?;
    run(Command::new(packaging.join("test-archive.sh"))
        .arg(archive)
        .arg(packaging.join("contents.txt"))
        .arg(floor.trim())
        .args(golden_cases()?)
        .env_remove("LD_LIBRARY_PATH"))
}
