//! `cargo xtask hosts --speed`: whole-model speed with and without the plugin, alternating, medians.

use super::{drive, fetch, plugin};
use crate::hosts::fetch::{BEFORE, HOSTS};
use crate::hosts::model::Model;
use anyhow::{Context, Result};
use std::path::Path;

/// A shape of work: prompt tokens, steps, sequences.
struct Work {
    name: &'static str,
    prompt: usize,
    steps: usize,
    sequences: usize,
}

const WORKS: [Work; 4] = [
    Work { name: "pp256", prompt: 256, steps: 0, sequences: 1 },
    Work { name: "pp512", prompt: 512, steps: 0, sequences: 1 },
    Work { name: "tg, 1 sequence", prompt: 0, steps: 48, sequences: 1 },
    Work { name: "tg, 16 sequences", prompt: 0, steps: 16, sequences: 16 },
];

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

/// Tokens a second of one run.
fn measure(libraries: &Path, model: &str, work: &Work, threads: usize, plugin: Option<&Path>) -> Result<f64> {
    let numbers = [threads, work.prompt, work.steps, work.sequences].map(|number| number.to_string());
    let [threads, prompt, steps, sequences] = &numbers;
    let arguments = [model, "--threads", threads, "--prompt", prompt, "--steps", steps, "--sequences", sequences];
    let report = drive(libraries, "speed", &arguments, plugin, &[])?;
    let (name, tokens) =
        if work.steps == 0 { ("prompt seconds", work.prompt) } else { ("step seconds", work.sequences) };
    let seconds: f64 = report.said.get(name).context("no time")?.parse()?;
    Ok(tokens as f64 / seconds)
}

/// Runs the 0.8b model on every host `rounds` times, alternating, and prints medians of tokens a second.
pub fn run_speed(threads: usize, rounds: usize, only: &[String]) -> Result<()> {
    let plugin = plugin()?;
    let model = fetch::model(Model::Speed)?;
    let model = model.to_string_lossy();
    println!("0.8b synthetic model, Q8_0, {threads} threads, medians of {rounds} alternating runs, tokens a second");
    let picked = |host: &&fetch::Host| only.is_empty() || only.iter().any(|part| host.name.contains(part.as_str()));
    for host in HOSTS.iter().rev().chain([&BEFORE]).filter(picked) {
        println!("== {} ({})", host.name, host.about);
        let libraries = host.libraries()?;
        for work in &WORKS {
            let (mut without, mut with, mut ratios) = (Vec::new(), Vec::new(), Vec::new());
            for _ in 0..rounds {
                let alone = measure(&libraries, &model, work, threads, None)?;
                let ours = measure(&libraries, &model, work, threads, Some(&plugin))?;
                without.push(alone);
                with.push(ours);
                ratios.push(ours / alone);
            }
            println!(
                "   {:<18} without {:8.1}   with {:8.1}   {:.3}x",
                work.name,
                median(without),
                median(with),
                median(ratios)
            );
        }
    }
    Ok(())
}
