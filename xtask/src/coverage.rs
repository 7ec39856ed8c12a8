//! `cargo xtask coverage`: how many lines of the code that meets other people's numbers the tests execute.

use crate::command::{output, run, workspace};
use crate::nightly;
use anyhow::{Context, Result, bail};
use std::fs;
use std::process::Command;

/// What must be covered, and how far.
const FILES: &[&str] =
    &["src/capi/cpu.rs", "src/capi/message.rs", "src/capi/mod.rs", "src/problem.rs", "src/tensor.rs"];
const LEAST: f64 = 95.0;

/// Runs the library's tests and the replay of fuzzed inputs with counters, prints a table, and fails below the limit.
pub fn coverage() -> Result<()> {
    nightly::set_up(&["llvm-tools"])?;
    let target = workspace().join("target/coverage");
    let counts = target.join("counts");
    let _ = fs::remove_dir_all(&counts);
    let cargo = || {
        let mut cargo = nightly::cargo();
        cargo.env("RUSTFLAGS", "-Cinstrument-coverage").env("DELTANET_TEST_CASES", "200");
        cargo.env("LLVM_PROFILE_FILE", counts.join("%p-%m.profraw")).args(["test", "--target-dir"]).arg(&target);
        cargo.args(["-p", "deltanet", "-p", "deltanet-fuzz", "--lib", "--tests"]);
        cargo
    };
    run(&mut cargo())?;
    let listed = output(cargo().args(["--no-run", "--message-format=json"]))?;
    let mut objects: Vec<String> = Vec::new();
    for line in listed.lines() {
        let message: serde_json::Value = serde_json::from_str(line)?;
        if let (Some(program), Some(true)) = (message["executable"].as_str(), message["profile"]["test"].as_bool()) {
            objects.push(program.to_owned());
        }
        // C programs run the shared library.
        let files = message["filenames"].as_array().into_iter().flatten().filter_map(|name| name.as_str());
        objects.extend(files.filter(|name| name.ends_with("libdeltanet.so")).map(str::to_owned));
    }
    let tools = nightly::llvm_tools()?;
    let merged = target.join("all.profdata");
    let raw = fs::read_dir(&counts)?.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>>>()?;
    run(Command::new(tools.join("llvm-profdata")).args(["merge", "-sparse", "-o"]).arg(&merged).args(raw))?;
    let mut export = Command::new(tools.join("llvm-cov"));
    export.args(["export", "-summary-only", "-instr-profile"]).arg(&merged);
    for object in &objects {
        export.args(["-object", object]);
    }
    let report: serde_json::Value = serde_json::from_str(&output(&mut export)?)?;
    let files = report["data"][0]["files"].as_array().context("llvm-cov lists no files")?;
    let mut poor = Vec::new();
    for name in FILES {
        let path = workspace().join(name);
        let file = files.iter().find(|file| file["filename"].as_str().is_some_and(|at| path.as_os_str() == at));
        let lines = &file.with_context(|| format!("{name} is not in the report"))?["summary"]["lines"];
        let percent = lines["percent"].as_f64().unwrap_or(0.0);
        println!("{name:<24} {:>5} of {:>5} lines, {percent:.1} %", lines["covered"], lines["count"]);
        if percent < LEAST {
            poor.push(*name);
        }
    }
    if !poor.is_empty() {
        bail!("less than {LEAST} % of the lines are covered: {poor:?}");
    }
    Ok(())
}
