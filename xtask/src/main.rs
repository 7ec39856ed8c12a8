//! `cargo xtask`: the project's own tasks. Each does its own set-up.

mod cache;
mod command;
mod consumers;
mod coverage;
mod demo;
mod dist;
mod docs;
mod fuzz;
mod ggml_cuda;
mod gpu;
mod hosts;
mod ik;
mod install;
mod links;
mod mutants;
mod nightly;
mod nvcc;
mod python;
mod sanitize;
mod test;

use anyhow::Result;
use clap::Parser;
use std::path::PathBuf;
use std::process::ExitCode;

/// The project's own tasks.
#[derive(Parser)]
enum Task {
    /// Build the library and the C driver, run it on the golden cases and print a table.
    Demo,
    /// Fetch what the tests need and run every test.
    Test,
    /// Run stock llama.cpp builds with and without the plugin, and compare.
    Hosts {
        /// Parts of the names of the hosts to run; none for all.
        names: Vec<String>,
        /// Only fetch, build and make what the runs need.
        #[arg(long, conflicts_with = "speed")]
        fetch: bool,
        /// Load this library instead of the release build.
        #[arg(long, conflicts_with = "speed")]
        library: Option<PathBuf>,
        /// Measure whole-model speed instead.
        #[arg(long)]
        speed: bool,
        /// Where to write the speeds as JSON.
        #[arg(long, requires = "speed")]
        json: Option<std::path::PathBuf>,
        /// Tokens to generate with more than one thread.
        #[arg(long, default_value_t = 64)]
        tokens: usize,
        /// Threads of the speed runs.
        #[arg(long, default_value_t = 2)]
        threads: usize,
        /// Alternating rounds of the speed runs.
        #[arg(long, default_value_t = 5)]
        rounds: usize,
    },
    /// Fetch CUDA's compiler from PyPI, pinned, so that builds have the CUDA kernels; no GPU and no root needed.
    Nvcc,
    /// Make target/gpu: what a GPU machine without cargo needs to check and time the CUDA kernels.
    Gpu,
    /// Make target/ggml-cuda: what a GPU machine without cargo needs to compare llama.cpp with and without the drop-in.
    GgmlCuda {
        /// Compile the drop-ins with nvcc against ggml-cuda's headers instead; needs no GPU.
        #[arg(long)]
        check: bool,
    },
    /// Run ik_llama.cpp's released wheel with and without our library, and compare.
    Ik {
        /// Measure whole-model speed instead.
        #[arg(long)]
        speed: bool,
        /// Threads of the speed runs.
        #[arg(long, default_value_t = 2)]
        threads: usize,
        /// Alternating rounds of the speed runs.
        #[arg(long, default_value_t = 5)]
        rounds: usize,
    },
    /// Install library, header, CMake and pkg-config files and the command.
    Install(install::Options),
    /// Build the examples against an installed library, with CMake and pkg-config, and run them.
    Consumers,
    /// Make the release archive in target/dist, list and test it.
    Dist(dist::Options),
    /// Build the reference pages and check the links.
    Docs,
    /// Drive one llama.cpp in this process, for `hosts`.
    #[command(hide = true)]
    Host(hosts::Drive),
    /// Write one of the random-weight models to a file, for `ggml-cuda`.
    #[command(hide = true)]
    Model { name: String, path: PathBuf },
    /// Fuzz the C interface and the readers of other people's data.
    Fuzz(fuzz::Options),
    /// Run tests under AddressSanitizer, ThreadSanitizer, valgrind and Miri.
    Sanitize(sanitize::Options),
    /// Measure the lines that tests execute where other people's numbers come in.
    Coverage(coverage::Options),
    /// Change the validator and the plan in every small way, and see whether a test notices.
    Mutants(mutants::Options),
}

fn main() -> ExitCode {
    match run(Task::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(task: Task) -> Result<()> {
    match task {
        Task::Demo => demo::run_demo(),
        Task::Test => test::run_all(),
        Task::Gpu => gpu::pack(),
        Task::GgmlCuda { check: true } => ggml_cuda::check(),
        Task::GgmlCuda { check: false } => ggml_cuda::pack(),
        Task::Model { name, path } => hosts::write_model(&name, &path),
        Task::Nvcc => nvcc::fetch().map(|nvcc| println!("{}", nvcc.display())),
        Task::Ik { speed: true, threads, rounds } => ik::speed(threads, rounds),
        Task::Ik { .. } => ik::check(),
        Task::Install(options) => install::install(&options),
        Task::Consumers => consumers::test(),
        Task::Dist(options) => dist::dist(&options),
        Task::Docs => docs::docs(),
        Task::Hosts { names, speed: true, threads, rounds, json, .. } => {
            hosts::run_speed(threads, rounds, &names, json.as_deref())
        }
        Task::Hosts { fetch: true, .. } => hosts::fetch_all(),
        Task::Hosts { names, tokens, library, .. } => hosts::run_hosts(tokens, &names, library),
        Task::Host(drive) => drive.run(),
        Task::Fuzz(options) => fuzz::fuzz(&options),
        Task::Sanitize(options) => sanitize::sanitize(&options),
        Task::Coverage(options) => coverage::coverage(&options),
        Task::Mutants(options) => mutants::mutants(&options),
    }
}
