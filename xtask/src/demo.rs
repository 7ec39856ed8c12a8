//! `cargo xtask demo`: from sources to a table of golden cases run by the C driver.

use crate::command::{cargo, golden_cases, has, output, release, run, workspace};
use anyhow::{Context, Result, ensure};
use std::collections::HashMap;
use std::path::PathBuf;
use std::process::Command;

/// Builds the library and the driver, runs every case on every instruction set that the CPU has, and prints the table.
pub fn run_demo() -> Result<()> {
    ensure!(has("cc") && has("make"), "the demo needs a C compiler (cc) and make");
    run(cargo().args(["build", "--release", "--package", "deltanet"]))?;
    let driver = build_driver()?;
    let cases = golden_cases()?;

    println!(
        "{:<20} {:<8} {:>7} {:>12} {:>10} {:>10}  result",
        "case", "ISA", "threads", "time (us)", "NMSE out", "NMSE state"
    );
    let threads = std::thread::available_parallelism().map_or(1, usize::from).max(2).to_string();
    for isa in ["scalar", "avx2", "avx512"] {
        for threads in ["1", &threads] {
            let printed =
                output(Command::new(&driver).env("DELTANET_ISA", isa).args(["-t", threads, "-r", "20"]).args(&cases))?;
            let rows = printed.lines().map(words).filter(|row| row.get("way") == Some(&"library_threads"));
            // DELTANET_ISA is a cap: on a CPU without this set, the driver names the one that ran instead.
            for row in rows.filter(|row| row.get("isa") == Some(&isa)) {
                let word = |key: &str| row.get(key).copied().context(format!("the driver names no {key}"));
                println!(
                    "{:<20} {:<8} {:>7} {:>12} {:>10} {:>10}  {}",
                    word("case")?.trim_end_matches(".safetensors"),
                    word("isa")?,
                    word("threads")?,
                    word("median_us")?,
                    word("nmse_out")?,
                    word("nmse_state")?,
                    word("result")?
                );
            }
        }
    }
    Ok(())
}

/// Builds examples/driver.c against the release library.
fn build_driver() -> Result<PathBuf> {
    let folder = release().join("examples-c");
    let examples = workspace().join("examples");
    let variable = |name: &str, path: &std::path::Path| format!("{name}={}", path.display());
    let mut make = Command::new("make");
    make.arg("--quiet").arg("-C").arg(examples);
    run(make.arg(variable("LIBDIR", &release())).arg(variable("BUILD", &folder)))?;
    Ok(folder.join("driver"))
}

/// The `key=value` words of a line.
fn words(line: &str) -> HashMap<&str, &str> {
    line.split_whitespace().filter_map(|word| word.split_once('=')).collect()
}
