//! `deltanet check`: golden cases, one line each.

use crate::cuda::{self, Gpu, Mirror};
use crate::device::Device;
use crate::golden::{Case, Nmse};
use crate::isa;
use anyhow::Result;
use clap::Args;
use deltanet::cpu::{self, Isa};
use deltanet::{Plan, Problem};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// What to check and how.
#[derive(Args)]
pub struct Options {
    /// Where to run.
    #[arg(long, default_value = "cpu")]
    device: Device,
    /// Instruction set: scalar, avx2 or avx512 [default: the best there is].
    #[arg(long, value_parser = isa::parse)]
    isa: Option<Isa>,
    /// Threads; 0 means one a processor.
    #[arg(long, default_value_t = 0)]
    threads: usize,
    /// Largest squared error, relative to the square of the answer [default: 1e-10; 1e-9 on CUDA, whose products have 16 bits].
    #[arg(long)]
    tol: Option<f64>,
    /// Golden cases.
    #[arg(required = true)]
    files: Vec<PathBuf>,
}

/// Prints name, NMSE of out, NMSE of state and the verdict for each file; fails if any does.
pub fn run(options: &Options) -> Result<ExitCode> {
    let isa = isa::choose(options.isa)?;
    let gpu = if options.device == Device::Cuda { Some(Gpu::open(0)?) } else { None };
    let tolerance = options.tol.unwrap_or(if gpu.is_some() { 1e-9 } else { 1e-10 });
    let mut failed = false;
    for file in &options.files {
        let checked = match &gpu {
            Some(gpu) => check_cuda(file, gpu),
            None => check(file, isa, options.threads),
        };
        match checked {
            Ok((name, nmse)) => {
                // NaN compares as false.
                let ok = nmse.out <= tolerance && nmse.state <= tolerance;
                let verdict = if ok { "ok" } else { "FAIL" };
                println!("{name:<24} out {:>9.2e}  state {:>9.2e}  {verdict}", nmse.out, nmse.state);
                failed |= !ok;
            }
            Err(error) => {
                println!("{:<24} FAIL  {error:#}", file.display());
                failed = true;
            }
        }
    }
    Ok(ExitCode::from(u8::from(failed)))
}

fn check(file: &Path, isa: Isa, threads: usize) -> Result<(String, Nmse)> {
    let mut case = Case::load(file)?;
    let params = case.params();
    // SAFETY: params has no index tensors.
    let problem = unsafe { Problem::new(&params)? };
    let plan = Plan::new(&problem, isa)?;
    // SAFETY: the case owns the memory that its params describe, and nobody else has it.
    unsafe { cpu::run(&problem, &plan, threads)? };
    Ok((case.name().to_owned(), case.nmse()))
}

fn check_cuda(file: &Path, gpu: &Gpu) -> Result<(String, Nmse)> {
    let mut case = Case::load(file)?;
    let params = case.params();
    // SAFETY: the case owns the memory that its params describe, and nobody else has it; the mirror has it in device
    // memory, and is waited for.
    unsafe {
        let mirror = Mirror::new(gpu, &params)?;
        cuda::run(gpu, &mirror)?;
        mirror.download()?;
    }
    Ok((case.name().to_owned(), case.nmse()))
}
