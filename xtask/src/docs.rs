//! `cargo xtask docs`: reference pages from the header and the sources, warnings being errors, and links that lead
//! somewhere.

use crate::command::{cargo, has, release, run, workspace};
use crate::links;
use anyhow::{Context, Result};
use std::fs;
use std::process::Command;

/// Builds the reference pages in target/doc (Rust) and target/doc-c (C) and checks the links of the Markdown files.
pub fn docs() -> Result<()> {
    links::check(workspace())?;
    // The command shares its name with the library, and rustdoc keeps one folder a name: its parts are a library too.
    run(cargo().env("RUSTDOCFLAGS", "-D warnings").args(["doc", "--no-deps", "--workspace", "--lib"]))?;
    run(cargo().env("RUSTDOCFLAGS", "-D warnings").args(["doc", "--no-deps", "--package", "xtask"]))?;
    if !has("doxygen") {
        println!("   SKIPPED: the reference of the header (no doxygen)");
        return Ok(());
    }
    let out = release().parent().context("target/release has a parent")?.join("doc-c");
    fs::create_dir_all(&out)?;
    // OUTPUT_DIRECTORY depends on where cargo builds, so it comes from here; Doxygen reads the rest from the file.
    run(Command::new("sh")
        .current_dir(workspace())
        .arg("-c")
        .arg("{ cat docs/Doxyfile; echo \"OUTPUT_DIRECTORY = \\\"$1\\\"\"; echo \"PROJECT_NUMBER = $2\"; } | doxygen -")
        .args(["sh".as_ref(), out.as_os_str(), env!("CARGO_PKG_VERSION").as_ref()]))
}
