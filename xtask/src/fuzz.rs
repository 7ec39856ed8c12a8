//! `cargo xtask fuzz`: libFuzzer over the properties of fuzz/, each target for some time.

use crate::command::{cargo, run, workspace};
use crate::{cache, nightly};
use anyhow::{Context, Result, bail};
use clap::Args;
use std::fs;

const CARGO_FUZZ: &str = "0.13.2";

/// The targets, with the longest input that each makes use of.
const TARGETS: [(&str, usize); 3] = [("capi", 400), ("ggml", 200), ("safetensors", 16384)];

/// What to fuzz, and for how long.
#[derive(Args)]
pub struct Options {
    /// Seconds for each target.
    #[arg(long, default_value_t = 60)]
    pub seconds: u32,
    /// Targets [default: all].
    targets: Vec<String>,
}

/// A minute for each target: by libFuzzer, or without a nightly compiler by the same properties' own loop.
pub fn briefly() -> Result<()> {
    const SECONDS: u32 = 60;
    let have = nightly::set_up(&[]).and_then(|()| nightly::tool("cargo-fuzz", CARGO_FUZZ));
    let Err(error) = have else { return fuzz(&Options { seconds: SECONDS, targets: Vec::new() }) };
    println!("no libFuzzer ({error:#}); the stable compiler's loop runs instead");
    let mut replay = cargo();
    replay.args(["test", "--release", "-p", "deltanet-fuzz", "--test", "replay", "--", "--nocapture"]);
    run(replay.env("DELTANET_FUZZ_SECONDS", SECONDS.to_string()))
}

/// Fuzzes; an input that breaks a property is left in fuzz/regressions, where the replay test finds it.
pub fn fuzz(options: &Options) -> Result<()> {
    nightly::set_up(&[])?;
    let cargo_fuzz = nightly::tool("cargo-fuzz", CARGO_FUZZ)?;
    if let Some(unknown) = options.targets.iter().find(|asked| TARGETS.iter().all(|(name, _)| name != *asked)) {
        bail!("there is no target {unknown}; there are {:?}", TARGETS.map(|(name, _)| name));
    }
    for (target, longest) in TARGETS {
        if !options.targets.is_empty() && options.targets.iter().all(|asked| asked != target) {
            continue;
        }
        println!("== fuzz {target}, {} s", options.seconds);
        let corpus = cache::root()?.join("corpus").join(target);
        let seeds = workspace().join("fuzz/seeds").join(target);
        let regressions = workspace().join("fuzz/regressions").join(target);
        for folder in [&corpus, &seeds, &regressions] {
            fs::create_dir_all(folder).with_context(|| format!("{} cannot be made", folder.display()))?;
        }
        let mut command = nightly::command(&cargo_fuzz);
        command.args(["run", "--fuzz-dir", "fuzz", "--target-dir", "target/fuzz", "--features", "libfuzzer"]);
        // Telling libFuzzer of every comparison takes half the time, most of it in kernels and the oracle.
        command.args(["--no-trace-compares", target]);
        // What once broke a property starts every run: here sums are checked, in the replay of release builds they are not.
        command.arg(&corpus).arg(&seeds).arg(&regressions).arg("--");
        command.args([format!("-max_total_time={}", options.seconds), format!("-max_len={longest}")]);
        command.args(["-len_control=0", "-timeout=60", "-rss_limit_mb=4096", "-print_final_stats=1", "-verbosity=1"]);
        // Pools of threads stay between calls; looking for leaks after each input would take most of the time.
        command.arg("-detect_leaks=0");
        command.arg(format!("-artifact_prefix={}/", regressions.display()));
        run(&mut command).with_context(|| format!("{target}: see the newest file in {}", regressions.display()))?;
    }
    Ok(())
}
