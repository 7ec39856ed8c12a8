//! `cargo xtask hosts --speed`: whole-model speed with and without the plugin, alternating, medians.

use super::{drive, fetch, plugin};
use crate::hosts::fetch::{BEFORE, HOSTS};
use crate::hosts::model::Model;
use anyhow::{Context, Result};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};

/// A shape of work: prompt tokens, steps, sequences.
struct Work {
    name: &'static str,
    prompt: usize,
    steps: usize,
    sequences: usize,
}

/// Prompts, one sequence and many, with and without the plugin.
const WORKS: [Work; 3] = [
    Work { name: "pp256", prompt: 256, steps: 0, sequences: 1 },
    Work { name: "tg, 1 sequence", prompt: 0, steps: 48, sequences: 1 },
    Work { name: "tg, 16 sequences", prompt: 0, steps: 16, sequences: 16 },
];

/// The usual two figures of llama-bench, for the unfused graph, the host's fused operator and ours.
const FIELD: [Work; 2] = [
    Work { name: "pp512", prompt: 512, steps: 0, sequences: 1 },
    Work { name: "tg128", prompt: 0, steps: 128, sequences: 1 },
];

/// One way to run a work.
struct Variant {
    name: &'static str,
    libraries: PathBuf,
    with_plugin: bool,
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

/// What all measurements share.
struct Bench {
    model: String,
    plugin: PathBuf,
    threads: usize,
    rounds: usize,
}

impl Bench {
    /// Tokens a second of one run.
    fn measure(&self, variant: &Variant, work: &Work) -> Result<f64> {
        let numbers = [self.threads, work.prompt, work.steps, work.sequences].map(|number| number.to_string());
        let [threads, prompt, steps, sequences] = &numbers;
        let arguments =
            [&*self.model, "--threads", threads, "--prompt", prompt, "--steps", steps, "--sequences", sequences];
        let plugin = variant.with_plugin.then_some(self.plugin.as_path());
        let report = drive(&variant.libraries, "speed", &arguments, plugin, &[])?;
        let (name, tokens) =
            if work.steps == 0 { ("prompt seconds", work.prompt) } else { ("step seconds", work.sequences) };
        let seconds: f64 = report.said.get(name).context("no time")?.parse()?;
        Ok(tokens as f64 / seconds)
    }

    /// Runs the variants in turn, round for round; ratios are within a round, to the first of them.
    fn compare(&self, about: &str, variants: &[Variant], works: &[Work]) -> Result<Vec<Value>> {
        println!("== {about}");
        let mut results = Vec::new();
        for work in works {
            let mut speeds = vec![Vec::new(); variants.len()];
            for _ in 0..self.rounds {
                for (variant, speeds) in variants.iter().zip(&mut speeds) {
                    speeds.push(self.measure(variant, work)?);
                }
            }
            let mut line = format!("   {:<18}", work.name);
            for (variant, own) in variants.iter().zip(&speeds) {
                let ratio = median(own.iter().zip(&speeds[0]).map(|(own, first)| own / first).collect());
                let speed = median(own.clone());
                line += &format!("  {} {speed:.1} ({ratio:.3}x)", variant.name);
                results.push(json!({
                    "comparison": about, "work": work.name, "variant": variant.name,
                    "tokens_per_second": speed, "ratio": ratio, "rounds": own,
                }));
            }
            println!("{line}");
        }
        Ok(results)
    }
}

/// Runs the 0.8b model `rounds` times each way, alternating, and prints medians of tokens a second, and of the ratios
/// within the rounds. Without names: the newest prebuilt host and the one built here.
pub fn run_speed(threads: usize, rounds: usize, only: &[String], json: Option<&Path>) -> Result<()> {
    let bench =
        Bench { model: fetch::model(Model::Speed)?.to_string_lossy().into_owned(), plugin: plugin()?, threads, rounds };
    println!("0.8b synthetic model, Q8_0, {threads} threads, medians of {rounds} alternating runs, tokens a second");
    let picked = |name: &str| {
        let default = only.is_empty() && (name == "field" || HOSTS[2..].iter().any(|host| host.name == name));
        default || only.iter().any(|part| name.contains(part.as_str()))
    };
    let mut results = Vec::new();
    for host in HOSTS.iter().rev().filter(|host| picked(host.name)) {
        let libraries = host.libraries()?;
        let variant = |name, with_plugin| Variant { name, libraries: libraries.clone(), with_plugin };
        let variants = [variant("without", false), variant("deltanet", true)];
        results.extend(bench.compare(&format!("{} ({})", host.name, host.about), &variants, &WORKS)?);
    }
    if picked("field") {
        let fused = HOSTS[2].libraries()?;
        let variants = [
            Variant { name: "unfused (npm 3.17.1)", libraries: BEFORE.libraries()?, with_plugin: false },
            Variant { name: "fused (npm 3.22.1)", libraries: fused.clone(), with_plugin: false },
            Variant { name: "deltanet (npm 3.22.1)", libraries: fused, with_plugin: true },
        ];
        results.extend(bench.compare("field", &variants, &FIELD)?);
    }
    if let Some(path) = json {
        std::fs::write(path, serde_json::to_string_pretty(&results)?)?;
    }
    Ok(())
}
