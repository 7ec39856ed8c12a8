//! `deltanet bench`: our time for each shape beside the machine's floors and, if their libraries are given, beside
//! ggml's and ik_llama.cpp's own operators on the same tensors, all in one process and in turns.

mod case;
mod ggml;
mod ik;
mod machine;
mod plot;
mod team;

use crate::cuda;
use crate::device::Device;
use crate::isa;
use anyhow::{Context, Result, bail, ensure};
use case::{Case, Shape};
use clap::Args;
use deltanet::Plan;
use deltanet::cpu::{Isa, MAX_THREADS};
use deltanet::params::StateLayout;
use indicatif::{ProgressBar, ProgressStyle};
use std::io::IsTerminal;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};
use team::Team;

/// What to time.
#[derive(Args)]
pub struct Options {
    /// Where to run; on CUDA by graph replay, beside copies on the device. Threads, instruction sets, the peers' libraries
    /// and plots are for the CPU.
    #[arg(long, default_value = "cpu", conflicts_with_all = ["isa", "ggml", "ik", "plot"])]
    device: Device,
    /// Cap the instruction set: scalar, avx2 or avx512.
    #[arg(long, value_parser = isa::parse)]
    isa: Option<Isa>,
    /// Threads; 0 for one a processor.
    #[arg(long, default_value_t = 1)]
    threads: usize,
    /// Tokens of each sequence.
    #[arg(long, value_delimiter = ',', default_value = "1,4,16,64,512,2048")]
    tokens: Vec<usize>,
    /// Sequences.
    #[arg(long, value_delimiter = ',', default_value = "1")]
    seqs: Vec<usize>,
    /// Key heads / value heads.
    #[arg(long, value_delimiter = ',', default_value = "16/32", value_parser = heads)]
    heads: Vec<(usize, usize)>,
    /// Channels of a head.
    #[arg(long, value_delimiter = ',', default_value = "128")]
    head_size: Vec<usize>,
    /// One gate a head (scalar) or one a key channel (channel).
    #[arg(long, value_delimiter = ',', default_value = "scalar")]
    gate: Vec<Gate>,
    /// State layout: key (ggml's) or value (ik_llama.cpp's) channels contiguous.
    #[arg(long, default_value = "key")]
    layout: Layout,
    /// Update the state in place (we and ik_llama.cpp; ggml's operator cannot).
    #[arg(long)]
    in_place: bool,
    /// Seconds to spend on each shape.
    #[arg(long, default_value_t = 1.0)]
    seconds: f64,
    /// Folder of a stock llama.cpp's libraries (libggml-base.so and libggml-cpu*.so), to time its operator.
    #[arg(long, value_name = "DIR")]
    ggml: Option<PathBuf>,
    /// libggml.so of ik_llama.cpp, to time its operator.
    #[arg(long, value_name = "LIB")]
    ik: Option<PathBuf>,
    /// Arithmetic of the prompt kernels on CUDA.
    #[arg(long, default_value = "exact")]
    precision: Precision,
    /// Print a JSON object a line.
    #[arg(long)]
    json: bool,
    /// Draw time per token against tokens, ours and the peers', as an SVG file.
    #[arg(long, value_name = "FILE")]
    plot: Option<PathBuf>,
}

#[derive(Clone, Copy, PartialEq, clap::ValueEnum)]
enum Gate {
    Scalar,
    Channel,
}

/// As `deltanet_precision` numbers them.
#[derive(Clone, Copy, PartialEq, clap::ValueEnum)]
enum Precision {
    Exact = 0,
    Tf32 = 1,
    Bf16 = 2,
}

#[derive(Clone, Copy, PartialEq, clap::ValueEnum)]
enum Layout {
    Key,
    Value,
}

impl Options {
    fn layout(&self) -> StateLayout {
        if self.layout == Layout::Key { StateLayout::KeyContiguous } else { StateLayout::ValueContiguous }
    }

    fn on_cuda(&self, shapes: &[Shape]) -> Vec<cuda::bench::Shape> {
        let on_cuda = |shape: &Shape| cuda::bench::Shape {
            key_heads: shape.key_heads,
            value_heads: shape.value_heads,
            head_size: shape.head_size,
            channel_gate: shape.channel_gate,
            tokens: shape.tokens,
            sequences: shape.sequences,
            layout: self.layout(),
            in_place: self.in_place,
            precision: self.precision as u32,
        };
        shapes.iter().map(on_cuda).collect()
    }
}

fn heads(text: &str) -> std::result::Result<(usize, usize), String> {
    let parsed = text.split_once('/').and_then(|(keys, values)| Some((keys.parse().ok()?, values.parse().ok()?)));
    match parsed {
        Some((keys, values)) if keys > 0 && values > 0 && values % keys == 0 => Ok((keys, values)),
        _ => Err("it must be KEYS/VALUES, as 16/32, with VALUES a multiple of KEYS".into()),
    }
}

/// Seconds that one thing took, over all rounds.
#[derive(Clone, Default)]
struct Times(Vec<f64>);

impl Times {
    fn quantile(&self, at: f64) -> f64 {
        let mut sorted = self.0.clone();
        sorted.sort_by(f64::total_cmp);
        sorted.get(((sorted.len().max(1) - 1) as f64 * at).round() as usize).copied().unwrap_or(f64::NAN)
    }
    fn median(&self) -> f64 {
        self.quantile(0.5)
    }
    /// Half the distance between the quartiles, as a part of the median.
    fn spread(&self) -> f64 {
        (self.quantile(0.75) - self.quantile(0.25)) / 2.0 / self.median()
    }
}

/// One shape's results.
struct Row {
    shape: Shape,
    kernel: &'static str,
    ours: Times,
    ggml: Option<Times>,
    ik: Option<Times>,
    /// FMAs a second, of all threads.
    peak: f64,
    copy: Times,
    nmse: f64,
}

impl Row {
    /// FMAs at their peak, or the state read and written once, whichever takes longer.
    fn floor(&self) -> f64 {
        (self.shape.fma() / self.peak).max(self.copy.median())
    }

    fn json(&self, device: &str, isa: Isa, options: &Options, threads: usize) -> serde_json::Value {
        let us = |seconds: f64| (seconds * 1e8).round() / 100.0;
        let Shape { key_heads, value_heads, head_size, channel_gate, tokens, sequences } = self.shape;
        serde_json::json!({
            "device": device,
            "isa": isa.name(),
            "kernel": self.kernel,
            "hk": key_heads,
            "hv": value_heads,
            "s": head_size,
            "gate": if channel_gate { "channel" } else { "scalar" },
            "tokens": tokens,
            "seqs": sequences,
            "threads": threads,
            "layout": if options.layout == Layout::Key { "key" } else { "value" },
            "in_place": options.in_place,
            "us": us(self.ours.median()),
            "spread": (self.ours.spread() * 1e4).round() / 1e4,
            "gflops": 2e-9 * self.shape.fma() / self.ours.median(),
            "peak_gflops": 2e-9 * self.peak,
            "memcpy_us": us(self.copy.median()),
            "floor_us": us(self.floor()),
            "nmse": self.nmse,
            "ggml_us": self.ggml.as_ref().map(|times| us(times.median())),
            "ik_us": self.ik.as_ref().map(|times| us(times.median())),
        })
    }

    fn line(&self) -> String {
        let Shape { key_heads, value_heads, head_size, channel_gate, tokens, sequences } = self.shape;
        let peer = |times: &Option<Times>| match times {
            Some(times) => format!("{:>11.1} {:>5.2}x", times.median() * 1e6, times.median() / self.ours.median()),
            None => format!("{:>11} {:>6}", "-", "-"),
        };
        format!(
            "{:>4}/{:<4}{:>4} {:<8}{:>6}{:>5}  {:>11.1} {:>4.0}% {:>8.1} {:>6.2} {:>6.2} {:>9.1e} {} {}",
            key_heads,
            value_heads,
            head_size,
            if channel_gate { "channel" } else { "scalar" },
            tokens,
            sequences,
            self.ours.median() * 1e6,
            self.ours.spread() * 100.0,
            2e-9 * self.shape.fma() / self.ours.median(),
            self.floor() / self.ours.median(),
            self.ours.median() / self.copy.median(),
            self.nmse,
            peer(&self.ggml),
            peer(&self.ik),
        )
    }
}

const HEADER: &str = "  heads   S gate    tokens seqs           us    ±   GFLOP/s  floor /memcpy      nmse     ggml us        \
                          ik us";

/// Times every shape.
pub fn run(options: &Options) -> Result<ExitCode> {
    let mut shapes = Vec::new();
    for (key_heads, value_heads) in options.heads.iter().copied() {
        for head_size in options.head_size.iter().copied() {
            for gate in &options.gate {
                for sequences in options.seqs.iter().copied() {
                    for tokens in options.tokens.iter().copied() {
                        let channel_gate = *gate == Gate::Channel;
                        shapes.push(Shape { key_heads, value_heads, head_size, channel_gate, tokens, sequences });
                    }
                }
            }
        }
    }
    if shapes.iter().any(|shape| shape.tokens == 0 || shape.sequences == 0) {
        bail!("--tokens and --seqs must be positive");
    }
    if options.device == Device::Cuda {
        return cuda::bench::run(&options.on_cuda(&shapes), options.json);
    }
    let isa = isa::choose(options.isa)?;
    let available = || std::thread::available_parallelism().map_or(1, usize::from);
    let threads = if options.threads == 0 { available() } else { options.threads };
    ensure!(threads <= MAX_THREADS, "--threads {threads}: it must be at most {MAX_THREADS}");
    let ggml = options.ggml.as_deref().map(|folder| ggml::Ggml::load(folder, isa)).transpose()?;
    let ik = options.ik.as_deref().map(ik::Ik::load).transpose()?;
    let device = device();
    let bar =
        if std::io::stderr().is_terminal() { ProgressBar::new(shapes.len() as u64) } else { ProgressBar::hidden() };
    bar.set_style(ProgressStyle::with_template("{wide_bar} {pos}/{len} {msg} {eta}")?);
    if !options.json {
        println!("{device}, {}, {threads} thread(s)\n{HEADER}", isa.name());
    }
    let team = Team::new(threads);
    let mut rows = Vec::new();
    for shape in shapes {
        bar.set_message(format!("{} tokens, {} sequences", shape.tokens, shape.sequences));
        let row = time(shape, isa, &team, threads, options, ggml.as_ref(), ik.as_ref())?;
        bar.suspend(|| match options.json {
            true => println!("{}", row.json(&device, isa, options, threads)),
            false => println!("{}", row.line()),
        });
        rows.push(row);
        bar.inc(1);
    }
    bar.finish_and_clear();
    if let Some(file) = &options.plot {
        let title = format!("{device}, {}, {threads} thread(s)", isa.name());
        plot::draw(file, &title, &lines(&rows)).with_context(|| format!("{} cannot be drawn", file.display()))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Rounds of everything in turns, so that a slow moment of the machine hits all alike.
fn time(
    shape: Shape,
    isa: Isa,
    team: &Team,
    threads: usize,
    options: &Options,
    ggml: Option<&ggml::Ggml>,
    ik: Option<&ik::Ik>,
) -> Result<Row> {
    let layout = options.layout();
    let seed = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?.as_nanos() as u64;
    let mut case = Case::new(shape, seed);
    // The oracle takes about 10 ns for each of the operator's FMAs; NaN or worse is shown, never hidden.
    let nmse = case.nmse(isa, layout, 1 + (2e8 / (shape.fma() / (shape.tokens * shape.sequences) as f64)) as usize)?;
    let graph = ggml.map(|ggml| ggml.graph(&case, threads)).transpose()?;
    // ik_llama.cpp's operator has scalar gates alone.
    let mut call = ik.filter(|_| !shape.channel_gate).map(|ik| ik.call(&case));
    if options.in_place {
        let Case { state, state_out, .. } = &mut case;
        state_out.copy_from_slice(state);
    }
    let problem = case.problem(layout, options.in_place)?;
    let plan = Plan::new(&problem, isa)?;
    case.reserve(&plan, threads);
    let mut row = Row {
        shape,
        kernel: if plan.is_chunked(&problem) { "chunked" } else { "recurrent" },
        ours: Times::default(),
        ggml: graph.is_some().then(Times::default),
        ik: call.is_some().then(Times::default),
        peak: 0.0,
        copy: Times::default(),
        nmse: nmse.out.max(nmse.state),
    };
    if nmse.out.is_nan() || nmse.state.is_nan() {
        row.nmse = f64::NAN;
    }
    let seconds = |work: &mut dyn FnMut() -> Result<()>| -> Result<f64> {
        let clock = machine::Clock::start(threads);
        work()?;
        Ok(clock.seconds())
    };
    let mut peaks = Times::default();
    let (mut copied, started) = (case::Floats::filled(case.state.len(), 0.0), Instant::now());
    let enough = Duration::from_secs_f64(options.seconds);
    for round in 0.. {
        let ours = seconds(&mut || {
            case.run(&problem, &plan, team);
            Ok(())
        })?;
        let theirs = graph.as_ref().map(|graph| seconds(&mut || graph.run())).transpose()?;
        let copy = machine::copy(&case.state, &mut copied, team, threads);
        let iks = call.as_mut().map(|call| seconds(&mut || call.run(&case, options.in_place, team))).transpose()?;
        // A few rounds are enough to see the peak; it takes longer than a token.
        if round % 8 == 0 {
            peaks.0.push(machine::fma_per_second(isa, team, threads));
        }
        // The first round warms caches and pages.
        if round == 0 {
            continue;
        }
        row.ours.0.push(ours);
        row.copy.0.push(copy);
        row.ggml.iter_mut().zip(theirs).for_each(|(times, time)| times.0.push(time));
        row.ik.iter_mut().zip(iks).for_each(|(times, time)| times.0.push(time));
        if round >= 5 && started.elapsed() > enough {
            break;
        }
    }
    row.peak = peaks.median();
    Ok(row)
}

/// The plot's lines: microseconds a token against tokens, one line for each implementation and setting.
fn lines(rows: &[Row]) -> Vec<plot::Line> {
    let mut lines: Vec<plot::Line> = Vec::new();
    for row in rows {
        let shape = row.shape;
        let several = |what: fn(&Shape) -> usize| rows.iter().any(|other| what(&other.shape) != what(&shape));
        let mut setting = format!("{}/{}", shape.key_heads, shape.value_heads);
        if several(|shape| shape.head_size) {
            setting += &format!(", S {}", shape.head_size);
        }
        if several(|shape| shape.sequences) {
            setting += &format!(", {} sequences", shape.sequences);
        }
        if several(|shape| usize::from(shape.channel_gate)) {
            setting += if shape.channel_gate { ", channel gate" } else { ", scalar gate" };
        }
        let all = [("deltanet", Some(&row.ours)), ("ggml", row.ggml.as_ref()), ("ik_llama.cpp", row.ik.as_ref())];
        for (name, times) in all.into_iter().filter_map(|(name, times)| Some((name, times?))) {
            let label = format!("{name} {setting}");
            let point = (shape.tokens as f64, times.median() * 1e6 / (shape.tokens * shape.sequences) as f64);
            match lines.iter_mut().find(|line| line.label == label) {
                Some(line) => line.points.push(point),
                None => lines.push(plot::Line { label, ours: name == "deltanet", points: vec![point] }),
            }
        }
    }
    lines
}

/// The processor's name.
fn device() -> String {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = text.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    name.map_or_else(|| std::env::consts::ARCH.to_owned(), |(_, name)| name.to_owned())
}
