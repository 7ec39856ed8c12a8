//! `cargo xtask host`: one llama.cpp in this process, driven for the parent that compares.

use super::graphs;
use super::llama::{self, Item, Llama, Shape, call};
use anyhow::{Context, Result, bail, ensure};
use clap::{Args, Subcommand};
use std::ffi::{CString, c_char, c_void};
use std::io::Write;
use std::path::{Path, PathBuf};

/// What a driver process does.
#[derive(Args)]
pub struct Drive {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Greedy tokens of a model with several thread counts and numbers of sequences.
    Tokens {
        libraries: PathBuf,
        model: PathBuf,
        /// One run instead of all.
        #[arg(long)]
        short: bool,
        /// Tokens to generate with two threads.
        #[arg(long, default_value_t = GENERATED)]
        two_threads: usize,
        /// Tokens to generate with four threads.
        #[arg(long, default_value_t = GENERATED)]
        four_threads: usize,
        /// A second plugin to load.
        #[arg(long)]
        second: Option<PathBuf>,
        /// Unload the plugin before the model is read.
        #[arg(long)]
        unload: bool,
        /// RPC servers that compute the model.
        #[arg(long)]
        server: Vec<String>,
        /// The part of the layers that each server gets.
        #[arg(long)]
        share: Vec<f32>,
        #[arg(long)]
        values: PathBuf,
    },
    /// Serves the CPU device to RPC clients, until the process is ended.
    Serve { libraries: PathBuf, endpoint: String },
    /// Single graphs around the operator.
    Graphs {
        libraries: PathBuf,
        #[arg(long)]
        values: PathBuf,
    },
    /// Seconds of one prompt and of each of many steps.
    Speed {
        libraries: PathBuf,
        model: PathBuf,
        #[arg(long)]
        threads: usize,
        #[arg(long)]
        prompt: usize,
        #[arg(long)]
        steps: usize,
        #[arg(long)]
        sequences: usize,
        #[arg(long)]
        values: PathBuf,
    },
}

/// `deltanet_ggml_counters`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Counters {
    struct_size: u32,
    reserved: u32,
    taken: u64,
    left: u64,
    reads_fused: u64,
    writes_fused: u64,
    verified: u64,
    mismatches: u64,
}

/// The counters of the plugin in this process; zeros without one.
fn counters() -> Result<Counters> {
    let mut counters = Counters { struct_size: size_of::<Counters>() as u32, ..Counters::default() };
    if let Some(plugin) = std::env::var_os("GGML_BACKEND_PATH") {
        // SAFETY: loaded already, by the host; the function has this signature.
        let status = unsafe {
            let plugin = libloading::Library::new(plugin)?;
            let read = plugin.get::<unsafe extern "C" fn(*mut Counters) -> u32>(b"deltanet_ggml_read_counters")?;
            read(&raw mut counters)
        };
        ensure!(status == 0, "deltanet_ggml_read_counters answered {status}");
    }
    Ok(counters)
}

fn write_values(path: &Path, values: &[f32]) -> Result<()> {
    let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
    Ok(std::fs::write(path, bytes)?)
}

fn finish(path: &Path, values: &[f32]) -> Result<()> {
    write_values(path, values)?;
    let now = counters()?;
    let mut out = std::io::stdout().lock();
    for (name, count) in [
        ("taken", now.taken),
        ("left", now.left),
        ("reads fused", now.reads_fused),
        ("writes fused", now.writes_fused),
        ("verified", now.verified),
        ("mismatches", now.mismatches),
    ] {
        writeln!(out, "{name}: {count}")?;
    }
    for line in llama::take_log() {
        writeln!(out, "log: {line}")?;
    }
    Ok(())
}

impl Drive {
    /// Does it, printing `name: value` lines.
    pub fn run(&self) -> Result<()> {
        die_with_the_parent();
        match &self.verb {
            Verb::Tokens {
                libraries,
                model,
                short,
                two_threads,
                four_threads,
                second,
                unload,
                server,
                share,
                values,
            } => {
                let generated = if *short {
                    vec![(1, GENERATED)]
                } else {
                    vec![(1, GENERATED), (2, *two_threads), (4, *four_threads)]
                };
                let host = Llama::load(libraries)?;
                if let Some(second) = second {
                    load_second(&host, second)?;
                }
                if *unload {
                    host.unload_plugin()?;
                }
                server.iter().try_for_each(|server| host.add_server(server))?;
                finish(values, &tokens(&host, model, share, &generated)?)
            }
            Verb::Serve { libraries, endpoint } => {
                llama::print_log();
                Llama::load(libraries)?.serve(endpoint)
            }
            Verb::Graphs { libraries, values } => run_graphs(libraries, values),
            Verb::Speed { libraries, model, threads, prompt, steps, sequences, values } => {
                speed(libraries, model, *threads, *prompt, *steps, *sequences)?;
                finish(values, &[])
            }
        }
    }
}

const PROMPT: usize = 100;
const GENERATED: usize = 64;

/// Ends this process when the one that started it ends, however that happens.
fn die_with_the_parent() {
    // SAFETY: takes numbers only. Where it fails, the process ends by itself or by its parent's hand.
    unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
}

fn load_second(host: &Llama, plugin: &Path) -> Result<()> {
    let path = CString::new(plugin.to_string_lossy().as_bytes())?;
    call!(host.ggml, b"ggml_backend_load", fn(*const c_char) -> *mut c_void, path.as_ptr());
    Ok(())
}

fn tokens(host: &Llama, model: &Path, shares: &[f32], generated: &[(usize, usize)]) -> Result<Vec<f32>> {
    let model = host.model(model, shares)?;
    let mut logits = Vec::new();
    let short = generated.len() == 1;
    let counts: &[usize] = if short { &[1] } else { &[1, 5] };
    for sequences in counts {
        // One context for all thread counts: they change from call to call.
        let shape = Shape { sequences: *sequences, tokens: PROMPT + GENERATED, rollback: 0 };
        let mut context = model.context(shape)?.context("no context")?;
        for (threads, generated) in generated.iter().filter(|(_, generated)| *generated > 0) {
            context.set_threads(*threads)?;
            let run = context.generate(*sequences, PROMPT, *generated)?;
            println!("tokens {sequences} sequences, {threads} threads: {:?}", run.tokens);
            logits.extend(run.logits);
        }
    }
    if !short {
        logits.extend(copied_sequences(&model)?);
        logits.extend(rollback(&model)?);
        logits.extend(contexts_at_once(&model)?);
    }
    Ok(logits)
}

/// Sequences that begin as copies of another: their states are rows that others still read.
fn copied_sequences(model: &llama::Model<'_>) -> Result<Vec<f32>> {
    let shape = Shape { sequences: 5, tokens: 256, rollback: 0 };
    let mut context = model.context(shape)?.context("no context")?;
    context.set_threads(1)?;
    let mut logits = context.generate(1, 40, 1)?.logits;
    for to in 1..5 {
        context.copy_sequence(0, to)?;
    }
    for step in 0..6 {
        // The sequences take turns in leaving a step out, so that rows move in the cache.
        let items: Vec<Item> = (0..5)
            .filter(|sequence| (sequence + step) % 3 != 0 || step < 2)
            .map(|sequence| {
                let skipped = (2..step).filter(|step| (sequence + step) % 3 == 0).count();
                Item {
                    token: (sequence * 17 + step * 5) as i32,
                    position: 40 + step - skipped,
                    sequence,
                    wants_logits: true,
                }
            })
            .collect();
        context.decode(&items)?;
        for at in 0..items.len() {
            logits.extend(context.logits(at)?);
        }
    }
    Ok(logits)
}

/// A context that keeps rollback states (K = 4), where the host can.
fn rollback(model: &llama::Model<'_>) -> Result<Vec<f32>> {
    let mut logits = Vec::new();
    for sequences in [1, 3] {
        let shape = Shape { sequences, tokens: PROMPT + GENERATED, rollback: 3 };
        let Some(mut context) = model.context(shape)? else { continue };
        context.set_threads(1)?;
        let run = context.generate(sequences, 30, 12)?;
        println!("tokens {sequences} sequences with rollback: {:?}", run.tokens);
        logits.extend(run.logits);
    }
    Ok(logits)
}

/// Three contexts in three threads at the same time.
fn contexts_at_once(model: &llama::Model<'_>) -> Result<Vec<f32>> {
    struct Shared<'a>(&'a llama::Model<'a>);
    // SAFETY: llama.cpp's models are read-only and may be used by contexts of several threads.
    unsafe impl Sync for Shared<'_> {}
    let shared = &Shared(model);
    let results = std::thread::scope(|scope| {
        let threads: Vec<_> = (1..4)
            .map(|sequences| {
                scope.spawn(move || -> Result<Vec<f32>> {
                    let shape = Shape { sequences, tokens: 64, rollback: 0 };
                    let mut context = shared.0.context(shape)?.context("no context")?;
                    context.set_threads(1)?;
                    Ok(context.generate(sequences, 20, 8)?.logits)
                })
            })
            .collect();
        threads.into_iter().map(|thread| thread.join()).collect::<Vec<_>>()
    });
    let mut logits = Vec::new();
    for result in results {
        match result {
            Ok(values) => logits.extend(values?),
            Err(_) => bail!("a thread panicked"),
        }
    }
    Ok(logits)
}

fn run_graphs(libraries: &Path, values: &Path) -> Result<()> {
    let host = Llama::load(libraries)?;
    let mut results = Vec::new();
    let has_snapshots = graphs::has_snapshots(&host)?;
    for (at, case) in graphs::CASES.iter().enumerate() {
        if case.needs_snapshots() && !has_snapshots {
            continue;
        }
        let before = counters()?;
        results.extend(graphs::run(&host, case, 1 + at % 3)?);
        let after = counters()?;
        println!(
            "case {}: taken {}, left {}, reads {}, writes {}",
            case.name,
            after.taken - before.taken,
            after.left - before.left,
            after.reads_fused - before.reads_fused,
            after.writes_fused - before.writes_fused
        );
    }
    finish(values, &results)
}

/// Medians over several rounds, the first left out: a prompt in one sequence, and steps of all sequences.
fn speed(libraries: &Path, model: &Path, threads: usize, prompt: usize, steps: usize, sequences: usize) -> Result<()> {
    let host = Llama::load(libraries)?;
    let model = host.model(model, &[])?;
    let shape = Shape { sequences, tokens: prompt + steps + 16, rollback: 0 };
    let mut context = model.context(shape)?.context("no context")?;
    context.set_threads(threads)?;
    let (mut prompts, mut stepped) = (Vec::new(), Vec::new());
    for round in 0..3 {
        context.clear()?;
        if prompt > 0 {
            let token = |at: usize| (at * 37 % 251) as i32;
            let item = |at| Item { token: token(at), position: at, sequence: 0, wants_logits: at + 1 == prompt };
            let items: Vec<Item> = (0..prompt).map(item).collect();
            let start = std::time::Instant::now();
            context.decode(&items)?;
            if round > 0 {
                prompts.push(start.elapsed().as_secs_f64());
            }
        }
        for step in 0..steps {
            let position = |sequence| if sequence == 0 { prompt + step } else { step };
            let item = |sequence| Item {
                token: ((step * 7919 + sequence * 31) % 256) as i32,
                position: position(sequence),
                sequence,
                wants_logits: true,
            };
            let items: Vec<Item> = (0..sequences).map(item).collect();
            let start = std::time::Instant::now();
            context.decode(&items)?;
            if round > 0 && step > 0 {
                stepped.push(start.elapsed().as_secs_f64());
            }
        }
    }
    let median = |mut times: Vec<f64>| -> f64 {
        times.sort_by(f64::total_cmp);
        times.get(times.len() / 2).copied().unwrap_or(f64::NAN)
    };
    println!("prompt seconds: {}", median(prompts));
    println!("step seconds: {}", median(stepped));
    Ok(())
}
