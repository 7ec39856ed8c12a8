//! `cargo xtask coverage`: how many lines of the code that meets other people's numbers the tests execute.

use crate::command::{output, run, workspace};
use crate::{nightly, nvcc};
use anyhow::{Context, Result, ensure};
use clap::Args;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Files and folders, and the least share of their lines in percent that must be covered.
const PARTS: &[(&str, f64)] =
    &[("src/capi", 95.0), ("src/problem.rs", 95.0), ("src/tensor.rs", 95.0), ("src/ggml", 75.0), ("src/cuda", 90.0)];

/// What to run.
#[derive(Args)]
pub struct Options {
    /// Also run the plugin in two llama.cpp builds, with the operator and from before it.
    #[arg(long)]
    hosts: bool,
}

/// Lines of a file with code, and how often each was executed.
type Lines = BTreeMap<usize, u64>;

/// Runs the library's tests and the replay of fuzzed inputs with counters, prints a table, and fails below the limit.
/// CUDA's part runs with a made-up driver (tests/cuda_faults.rs): no GPU is needed.
pub fn coverage(options: &Options) -> Result<()> {
    nightly::set_up(&["llvm-tools"])?;
    // Without kernels the CUDA functions refuse everything; which architecture they are for makes no difference here.
    nvcc::fetch()?;
    let archs = std::env::var("DELTANET_CUDA_ARCHS").unwrap_or_else(|_| "90a".into());
    let target = workspace().join("target/coverage");
    let counts = target.join("counts");
    let _ = fs::remove_dir_all(&counts);
    let cargo = || {
        let mut cargo = nightly::cargo();
        cargo.env("RUSTFLAGS", "-Cinstrument-coverage").env("DELTANET_TEST_CASES", "200");
        cargo.env("DELTANET_CUDA_ARCHS", &archs).env("LLVM_PROFILE_FILE", counts.join("%p-%m.profraw"));
        cargo.args(["test", "--target-dir"]).arg(&target);
        cargo.args(["-p", "deltanet", "-p", "deltanet-fuzz", "--lib", "--tests"]);
        cargo
    };
    // Every length goes the way that a few of them go.
    run(cargo().args(["--", "--skip", "every_length_matches_the_oracle"]))?;
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
    if options.hosts {
        let library = objects.iter().find(|name| name.ends_with("libdeltanet.so")).context("there is no library")?;
        let mut hosts = Command::new(std::env::current_exe()?);
        hosts.args(["hosts", "npm-3.22.1", "npm-3.17.1", "--tokens", "4", "--library", library]);
        run(hosts.env("LLVM_PROFILE_FILE", counts.join("%p-%m.profraw")))?;
    }
    let tools = nightly::llvm_tools()?;
    let merged = target.join("all.profdata");
    let raw = fs::read_dir(&counts)?.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>>>()?;
    run(Command::new(tools.join("llvm-profdata")).args(["merge", "-sparse", "-o"]).arg(&merged).args(raw))?;
    let mut export = Command::new(tools.join("llvm-cov"));
    export.args(["export", "-format=lcov", "-instr-profile"]).arg(&merged);
    for object in &objects {
        export.args(["-object", object]);
    }
    report(&lines(&output(&mut export)?)?)
}

/// The lines of each file of the workspace in a report in lcov's format, without those of test modules.
fn lines(report: &str) -> Result<BTreeMap<PathBuf, Lines>> {
    let mut files = BTreeMap::new();
    let mut here: Option<(PathBuf, usize, Lines)> = None;
    for line in report.lines() {
        if let Some(path) = line.strip_prefix("SF:").and_then(|path| Path::new(path).strip_prefix(workspace()).ok()) {
            let source = fs::read_to_string(workspace().join(path))?;
            let tests = source.lines().position(|line| line == "mod tests {").unwrap_or(usize::MAX);
            here = Some((path.to_path_buf(), tests, Lines::new()));
        } else if let (Some(data), Some((_, tests, lines))) = (line.strip_prefix("DA:"), &mut here) {
            let mut numbers = data.split(',').map(str::parse::<u64>);
            let (Some(Ok(at)), Some(Ok(count))) = (numbers.next(), numbers.next()) else {
                anyhow::bail!("\"{line}\" is no line of a report");
            };
            if (at as usize) <= *tests {
                lines.insert(at as usize, count);
            }
        } else if line == "end_of_record"
            && let Some((path, _, lines)) = here.take()
        {
            files.insert(path, lines);
        }
    }
    Ok(files)
}

/// Prints a line for each file and part, and fails where a part is below its limit.
fn report(files: &BTreeMap<PathBuf, Lines>) -> Result<()> {
    let mut poor = Vec::new();
    for (part, least) in PARTS {
        let is_test = |path: &Path| path.ends_with("tests.rs") || path.iter().any(|folder| folder == "tests");
        let of_part = || files.iter().filter(|(path, _)| path.starts_with(part) && !is_test(path));
        for (path, lines) in of_part() {
            let missing: Vec<usize> = lines.iter().filter(|(_, count)| **count == 0).map(|(at, _)| *at).collect();
            let words = if missing.is_empty() { String::new() } else { format!("; not {}", ranges(&missing)) };
            println!("{:<26} {}{words}", path.display(), share(lines.len() - missing.len(), lines.len()));
        }
        let all: Vec<u64> = of_part().flat_map(|(_, lines)| lines.values().copied()).collect();
        ensure!(!all.is_empty(), "{part} is not in the report");
        let covered = all.iter().filter(|count| **count > 0).count();
        if of_part().count() > 1 {
            println!("{part:<26} {}", share(covered, all.len()));
        }
        if (covered as f64) < least / 100.0 * all.len() as f64 {
            poor.push(format!("{part}: {}", share(covered, all.len())));
        }
    }
    ensure!(poor.is_empty(), "too few lines are covered: {poor:?}");
    Ok(())
}

fn share(covered: usize, all: usize) -> String {
    format!("{covered:>5} of {all:>5} lines, {:.1} %", 100.0 * covered as f64 / all as f64)
}

/// Numbers in words, such as "3, 7-9".
fn ranges(numbers: &[usize]) -> String {
    let runs = numbers.chunk_by(|a, b| a + 1 == *b);
    let words = runs.map(|run| match run {
        [one] => one.to_string(),
        _ => format!("{}-{}", run[0], run[run.len() - 1]),
    });
    words.collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reports_are_read() {
        let path = workspace().join("src/error.rs");
        let text = format!(
            "TN:\nSF:/elsewhere/a.rs\nDA:1,1\nend_of_record\nSF:{}\nDA:3,0\nDA:4,12\nDA:5,0\nend_of_record\n",
            path.display()
        );
        let files = lines(&text).expect("a report");
        assert_eq!(files.len(), 1);
        assert_eq!(files[Path::new("src/error.rs")], Lines::from([(3, 0), (4, 12), (5, 0)]));
        assert!(lines(&text.replace("12", "x")).is_err());
        assert_eq!(ranges(&[3, 5, 6, 7, 9]), "3, 5-7, 9");
    }
}
