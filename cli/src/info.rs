//! `deltanet info`: what this build finds on this machine.

use anyhow::Result;
use deltanet::cpu::Isa;
use std::fs;
use std::process::ExitCode;

/// Prints the version, the instruction sets detected and in force, the cores and the caches.
pub fn run() -> Result<ExitCode> {
    println!("deltanet   {}", env!("CARGO_PKG_VERSION"));
    println!("isa        {} detected, {} in force (DELTANET_ISA)", Isa::detected().name(), Isa::in_force()?.name());
    println!("cores      {}", std::thread::available_parallelism().map_or(1, usize::from));
    println!("processor  {}", processor().as_deref().unwrap_or("unknown"));
    for cache in caches() {
        println!("cache      {cache}");
    }
    println!("cuda       {}", cuda().unwrap_or_else(|error| format!("{error:#}")));
    Ok(ExitCode::SUCCESS)
}

/// The first GPU, its driver, and which of the kernels' images that driver took; or why there is none.
fn cuda() -> Result<String> {
    let _gpu = crate::cuda::Gpu::open(0)?;
    let device = deltanet::cuda::device()?;
    let ((major, minor), (cuda, point)) = (device.capability, device.driver);
    Ok(format!(
        "{}, compute capability {major}.{minor}, driver for CUDA {cuda}.{point}, kernels for sm_{}",
        device.name, device.image
    ))
}

fn processor() -> Option<String> {
    let words = fs::read_to_string("/proc/cpuinfo").ok()?;
    let line = words.lines().find(|line| line.starts_with("model name"))?;
    Some(line.split_once(':')?.1.trim().to_owned())
}

/// The caches of the first core, as Linux lists them.
fn caches() -> Vec<String> {
    let folder = "/sys/devices/system/cpu/cpu0/cache";
    let read =
        |at: usize, what: &str| Some(fs::read_to_string(format!("{folder}/index{at}/{what}")).ok()?.trim().to_owned());
    (0..8)
        .map_while(|at| Some(format!("L{} {} {}", read(at, "level")?, read(at, "type")?, read(at, "size")?)))
        .collect()
}
