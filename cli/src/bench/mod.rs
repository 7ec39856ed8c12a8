//! `deltanet bench`: our time for each shape beside the machine's floors and, if their libraries are given, beside
//! ggml's and ik_llama.cpp's own operators on the same tensors, all in one process and in turns.

mod case;
mod cpu;
mod cuda;
mod ggml;
mod ik;
mod machine;
mod plot;
mod replay;
mod shape;
mod shards;
mod team;
mod times;

use crate::device::Device;
use crate::isa;
use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use cpu::Cpu;
use cuda::Cuda;
use deltanet::cpu::{Isa, MAX_THREADS};
use deltanet::params::StateLayout;
use indicatif::{ProgressBar, ProgressStyle};
use plot::Timed;
use shape::{Heads, Shape, StateUse};
use shards::Shards;
use std::io::IsTerminal;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

/// What to time.
#[derive(Args)]
pub struct Options {
    /// Where to run; on CUDA by graph replay, beside copies on the device. Threads, instruction sets and the peers'
    /// libraries are for the CPU.
    #[arg(long, default_value = "cpu", conflicts_with_all = ["isa", "ggml", "ik"])]
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
    #[command(flatten)]
    heads: Heads,
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
    /// Parts to split the heads into on CUDA, each on a device or at least a stream of its own, beside the whole.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..), conflicts_with = "plot")]
    shards: u16,
    /// Arithmetic of the prompt kernels on CUDA.
    #[arg(long, default_value = "exact")]
    precision: Precision,
    /// Print a JSON object a line.
    #[arg(long)]
    json: bool,
    /// Draw time per token against tokens, ours and the peers', as an SVG or a PNG file.
    #[arg(long, value_name = "FILE")]
    plot: Option<PathBuf>,
}

/// As `deltanet_precision` numbers them.
#[derive(Clone, Copy, PartialEq, clap::ValueEnum)]
enum Precision {
    Exact = 0,
    Tf32 = 1,
    Bf16 = 2,
}

impl Precision {
    fn name(self) -> &'static str {
        match self {
            Precision::Exact => "exact",
            Precision::Tf32 => "tf32",
            Precision::Bf16 => "bf16",
        }
    }
}

#[derive(Clone, Copy, PartialEq, clap::ValueEnum)]
enum Layout {
    Key,
    Value,
}

impl Options {
    fn state(&self) -> StateUse {
        let layout = if self.layout == Layout::Key { StateLayout::KeyContiguous } else { StateLayout::ValueContiguous };
        StateUse { layout, in_place: self.in_place }
    }

    fn cpu(&self) -> Result<Cpu> {
        let isa = isa::choose(self.isa)?;
        let available = || std::thread::available_parallelism().map_or(1, usize::from);
        let threads = if self.threads == 0 { available() } else { self.threads };
        ensure!(threads <= MAX_THREADS, "--threads {threads}: it must be at most {MAX_THREADS}");
        let peers = (self.ggml.as_deref(), self.ik.as_deref());
        Cpu::new(isa, threads, peers, self.state(), Duration::try_from_secs_f64(self.seconds)?)
    }
}

/// Times every shape.
pub fn run(options: &Options) -> Result<ExitCode> {
    let shapes = options.heads.shapes(&options.seqs, &options.tokens);
    if shapes.iter().any(|shape| shape.tokens == 0 || shape.sequences == 0) {
        bail!("--tokens and --seqs must be positive");
    }
    ensure!(
        options.device == Device::Cuda || options.shards == 1,
        "--shards {}: it is for --device cuda; on the CPU, --threads splits the work",
        options.shards
    );
    match options.device {
        Device::Cpu => {
            let cpu = options.cpu()?;
            each(options, &shapes, &cpu.title(), &cpu.header(), |shape| {
                let row = cpu.time(shape)?;
                Ok((row.line(), cpu.json(&row), row.timed().collect()))
            })
        }
        Device::Cuda if options.shards > 1 => {
            let shards = Shards::open(options.shards.into(), options.state(), options.precision)?;
            each(options, &shapes, &shards.title(), &shards.header(), |shape| {
                let row = shards.time(shape)?;
                Ok((row.line(), shards.json(&row), Vec::new()))
            })
        }
        Device::Cuda => {
            let cuda = Cuda::open(options.state(), options.precision)?;
            each(options, &shapes, &cuda.title(), &cuda.header(), |shape| {
                let row = cuda.time(shape)?;
                Ok((row.line(), cuda.json(&row), vec![row.timed()]))
            })
        }
    }?;
    Ok(ExitCode::SUCCESS)
}

/// Another one in every run.
fn seed() -> Result<u64> {
    Ok(std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?.as_nanos() as u64)
}

/// Prints a line for each shape as `time` gives it, or a JSON object, under a progress bar, and draws the plot.
fn each(
    options: &Options,
    shapes: &[Shape],
    title: &str,
    header: &str,
    mut time: impl FnMut(Shape) -> Result<(String, serde_json::Value, Vec<Timed>)>,
) -> Result<()> {
    let bar =
        if std::io::stderr().is_terminal() { ProgressBar::new(shapes.len() as u64) } else { ProgressBar::hidden() };
    bar.set_style(ProgressStyle::with_template("{wide_bar} {pos}/{len} {msg} {eta}")?);
    if !options.json {
        println!("{title}\n{header}");
    }
    let mut all = Vec::new();
    for shape in shapes {
        bar.set_message(format!("{} tokens, {} sequences", shape.tokens, shape.sequences));
        let (line, json, timed) = time(*shape)?;
        bar.suspend(|| if options.json { println!("{json}") } else { println!("{line}") });
        all.extend(timed);
        bar.inc(1);
    }
    bar.finish_and_clear();
    if let Some(file) = &options.plot {
        plot::draw(file, title, &all).with_context(|| format!("{} cannot be drawn", file.display()))?;
    }
    Ok(())
}
