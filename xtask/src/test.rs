//! `cargo xtask test`: set-up, then every check that guards main.

use crate::command::{cargo, has, run};
use crate::{cache, consumers, dist, docs, fuzz, ggml_cuda, hosts, ik, nvcc, sanitize};
use anyhow::Result;
use std::path::PathBuf;
use std::process::Command;

/// Fetches what the tests need, then runs format, lints and tests.
pub fn run_all() -> Result<()> {
    set_up();
    // The kernels of every architecture are compiled below, and looked at for spills.
    nvcc::fetch()?;
    step("format", cargo().args(["fmt", "--all", "--check"]))?;
    step("lints", cargo().args(["clippy", "--workspace", "--all-targets", "--release", "--", "-D", "warnings"]))?;
    step("build", cargo().args(["build", "--workspace", "--release"]))?;
    // A test whose peer is missing skips itself, unless it is told that all of them are there.
    let peers = [("DELTANET_REQUIRE_PEERS", PathBuf::from("1")), ("DELTANET_IK", ik::fetch(&cache::root()?)?)];
    println!("== ggml-cuda drop-ins");
    ggml_cuda::check()?;
    step("tests", cargo().args(["test", "--workspace", "--release"]).envs(peers))?;
    println!("== fuzz");
    fuzz::briefly()?;
    sanitize::what_can_be_had()?;
    println!("== ik_llama.cpp");
    ik::check()?;
    println!("== llama.cpp");
    hosts::run_hosts(64, &[], None)?;
    println!("== installed");
    consumers::test()?;
    println!("== archive");
    dist::verify(&dist::pack()?)?;
    println!("== docs");
    docs::docs()?;
    Ok(())
}

/// Programs that some tests use and skip without: installed where we may, announced where not.
fn set_up() {
    let missing: Vec<&str> =
        ["valgrind", "doxygen", "pkg-config"].into_iter().filter(|program| !has(program)).collect();
    if missing.is_empty() {
        return;
    }
    println!("== set-up: {missing:?}");
    let install = || -> Result<()> {
        run(Command::new("apt-get").arg("update"))?;
        run(Command::new("apt-get").args(["install", "-y", "--no-install-recommends"]).args(&missing))
    };
    if let Err(error) = install() {
        println!("   not installed ({error:#}); tests that need it will say SKIPPED");
    }
}

fn step(name: &str, command: &mut Command) -> Result<()> {
    println!("== {name}");
    run(command)
}
