//! `cargo xtask ik`: ik_llama.cpp's released wheel with and without our library in it.

use crate::cache;
use crate::command::{release, run, workspace};
use crate::hosts::{self, Model};
use anyhow::{Context, Result, bail, ensure};
use sha2::{Digest, Sha256};
use std::path::{Path, PathBuf};
use std::process::Command;

const PACKAGE: &str = "ik-llama-cpp-python==0.1.5";
/// The wheel for one version of Python. Its libraries do not depend on that, and no other part of it is used that does.
const WHEEL: &str = "ik_llama_cpp_python-0.1.5-cp311-cp311-manylinux_2_28_x86_64.whl";
const SHA256: &str = "52408f31dd05d16ada53b041155f14ec1fee9acd6ab0b4b4f77de04bd565bd67";

/// Tokens that must be the same with our library.
const TOKENS: usize = 64;

/// The unpacked wheel in `cache`, fetched the first time.
pub fn fetch(cache: &Path) -> Result<PathBuf> {
    let folder = cache.join("ik");
    if folder.is_dir() {
        return Ok(folder);
    }
    println!("   fetching {PACKAGE}");
    let partial = cache.join("ik.partial");
    if partial.exists() {
        std::fs::remove_dir_all(&partial)?;
    }
    std::fs::create_dir_all(&partial)?;
    let tags = ["--python-version=3.11", "--abi=cp311", "--platform=manylinux_2_28_x86_64", "--only-binary=:all:"];
    let mut download = Command::new("python3");
    download.args(["-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]).args(tags);
    run(download.arg("--dest").arg(&partial).arg(PACKAGE))?;
    let wheel = partial.join(WHEEL);
    let bytes = std::fs::read(&wheel).with_context(|| wheel.display().to_string())?;
    let found: String = Sha256::digest(&bytes).iter().map(|byte| format!("{byte:02x}")).collect();
    ensure!(found == SHA256, "{WHEEL} has SHA-256 {found}, not the pinned {SHA256}");
    run(Command::new("python3").args(["-m", "zipfile", "-e"]).arg(&wheel).arg(&partial))?;
    std::fs::remove_file(wheel)?;
    // Under its name only when it is complete.
    std::fs::rename(partial, &folder)?;
    Ok(folder)
}

/// How our library comes into the engine's process.
#[derive(Clone, Copy, PartialEq)]
enum Way {
    Without,
    Preloaded,
    /// Python loads it into the global scope first.
    LoadedFirst,
    LinkedFirst,
}

/// A program that runs the engine.
#[derive(Clone, Copy, PartialEq)]
enum Program {
    Python,
    C,
}

/// One run of a program.
struct Work<'a> {
    model: &'a Path,
    prompt: usize,
    tokens: usize,
    threads: usize,
}

/// What a run printed.
struct Ran {
    tokens: String,
    /// Seconds of the prompt, and of each token after it.
    prompt: f64,
    token: f64,
    log: String,
}

/// The engine and our library, with the C programs that were linked to them.
struct Bench {
    engine: PathBuf,
    ours: PathBuf,
    folder: PathBuf,
}

impl Bench {
    fn new(engine: &Path) -> Result<Bench> {
        let ours = release().join("libdeltanet.so");
        ensure!(ours.is_file(), "{} is not there: cargo build --release makes it", ours.display());
        let folder = release().join("ik");
        std::fs::create_dir_all(&folder)?;
        // A linked program asks for the library by its SONAME. It may stay from an earlier run.
        let _ = std::os::unix::fs::symlink(&ours, folder.join("libdeltanet.so.0"));
        let bench = Bench { engine: engine.to_path_buf(), ours, folder };
        for way in [Way::Without, Way::LinkedFirst] {
            let libraries = bench.engine.join("ik_llama_cpp/lib");
            let mut cc = Command::new("cc");
            cc.args(["-std=c11", "-O2", "-Wall", "-Wextra", "-Werror", "-o"]).arg(bench.c_program(way));
            cc.arg("-isystem")
                .arg(bench.engine.join("include"))
                .arg(workspace().join("examples/ik_llama.cpp/greedy.c"));
            if way == Way::LinkedFirst {
                cc.arg("-Wl,--no-as-needed").arg(&bench.ours);
            }
            // The wheel's libraries know where their own are; the linker need not.
            cc.arg("-L").arg(&libraries).args(["-lllama", "-Wl,--allow-shlib-undefined"]);
            run(cc.arg(format!("-Wl,-rpath,{}:{}", bench.folder.display(), libraries.display())))?;
        }
        Ok(bench)
    }

    fn c_program(&self, way: Way) -> PathBuf {
        self.folder.join(if way == Way::LinkedFirst { "greedy-linked" } else { "greedy" })
    }

    fn run(&self, program: Program, way: Way, work: &Work) -> Result<Ran> {
        let mut command = match program {
            Program::Python => {
                let mut python = Command::new("python3");
                python.arg(workspace().join("examples/ik_llama.cpp/greedy.py")).env("PYTHONPATH", &self.engine);
                python
            }
            Program::C => Command::new(self.c_program(way)),
        };
        command.arg(work.model).args([work.prompt, work.tokens, work.threads].map(|number| number.to_string()));
        match way {
            Way::Without | Way::LinkedFirst => {}
            Way::Preloaded => drop(command.env("LD_PRELOAD", &self.ours)),
            Way::LoadedFirst => drop(command.arg(&self.ours)),
        }
        // Cargo's own folders are in LD_LIBRARY_PATH, with other builds of our library.
        command.env("DELTANET_LOG", "1").env_remove("LD_LIBRARY_PATH");
        let ran = command.output().with_context(|| format!("{command:?} could not be started"))?;
        let (said, log) = (String::from_utf8_lossy(&ran.stdout), String::from_utf8_lossy(&ran.stderr).into_owned());
        if !ran.status.success() {
            bail!("{command:?} failed: {}\n{said}\n{log}", ran.status);
        }
        let line = |name: &str| {
            let found = said.lines().find_map(|line| line.strip_prefix(name));
            found.map(str::trim).with_context(|| format!("{command:?} printed no {name}\n{said}"))
        };
        let seconds = |name: &str| -> Result<f64> { Ok(line(name)?.parse()?) };
        Ok(Ran {
            tokens: line("tokens:")?.to_owned(),
            prompt: seconds("prompt seconds:")?,
            token: seconds("token seconds:")?,
            log,
        })
    }
}

/// Runs a small model in the wheel in every way, and fails unless all tokens are the same and ours ran.
pub fn check() -> Result<()> {
    let bench = Bench::new(&fetch(&cache::root()?)?)?;
    // With f32 weights: engines round activations for quantised ones, where a last bit may tip a token.
    let model = &hosts::model(Model::Qwen35)?;
    let mut expected: Option<String> = None;
    for (program, way, name) in [
        (Program::Python, Way::Without, "Python, the wheel alone"),
        (Program::Python, Way::Preloaded, "Python, LD_PRELOAD"),
        (Program::Python, Way::LoadedFirst, "Python, loaded first"),
        (Program::C, Way::Without, "C program, the engine alone"),
        (Program::C, Way::Preloaded, "C program, LD_PRELOAD"),
        (Program::C, Way::LinkedFirst, "C program, linked first"),
    ] {
        for threads in [1, 2, 3] {
            let ran = bench.run(program, way, &Work { model, prompt: 77, tokens: TOKENS, threads })?;
            let count = ran.tokens.split_whitespace().count();
            ensure!(count == TOKENS, "{name}, {threads} threads: {count} tokens, not {TOKENS}");
            let expected = expected.get_or_insert_with(|| ran.tokens.clone());
            ensure!(*expected == ran.tokens, "{name}, {threads} threads: {}\nnot {expected}", ran.tokens);
            // The prompt and the single tokens, in this many threads each.
            for tokens in [77, 1] {
                let ours = ran.log.lines().any(|line| {
                    line.contains("runs here")
                        && line.contains(&format!(", {tokens} tokens, "))
                        && line.contains(&format!(", {threads} threads;"))
                });
                ensure!(ours == (way != Way::Without), "{name}, {threads} threads: ours ran: {ours}\n{}", ran.log);
            }
        }
        println!("   {name:<30} {TOKENS} tokens, the same with 1, 2 and 3 threads");
    }
    Ok(())
}

/// Whole-model speed, preloaded and not, alternating.
pub fn speed(threads: usize, rounds: usize) -> Result<()> {
    let bench = Bench::new(&fetch(&cache::root()?)?)?;
    let model = &hosts::model(Model::Speed)?;
    let work = Work { model, prompt: 256, tokens: 32, threads };
    let mut speeds: [[Vec<f64>; 2]; 2] = Default::default();
    for _ in 0..rounds {
        for (at, way) in [Way::Without, Way::Preloaded].into_iter().enumerate() {
            let ran = bench.run(Program::C, way, &work)?;
            speeds[0][at].push(work.prompt as f64 / ran.prompt);
            speeds[1][at].push(1.0 / ran.token);
        }
    }
    println!("0.8b synthetic model, Q8_0, {threads} threads, medians of {rounds} alternating runs, tokens a second");
    for (name, [without, with]) in ["pp256", "tg32"].into_iter().zip(&mut speeds) {
        let mut ratios: Vec<f64> = with.iter().zip(without.iter()).map(|(with, without)| with / without).collect();
        let ratio = median(&mut ratios);
        println!("   {name:<8} without {:9.1}   with {:9.1}   {ratio:.3}x", median(without), median(with));
    }
    Ok(())
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}
