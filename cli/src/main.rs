//! The `deltanet` command: check golden cases, time the operator and describe the machine.

use anyhow::Result;
use clap::{Parser, Subcommand};
use deltanet_cli::{bench, check, info};
use std::process::ExitCode;

/// The gated delta net operator at the command line.
#[derive(Parser)]
#[command(name = "deltanet", version)]
struct Command {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Run golden cases and compare with the answers they carry.
    Check(check::Options),
    /// Time the operator beside the machine's floors and beside other engines' operators.
    Bench(bench::Options),
    /// Print the version, the instruction sets, the cores and the caches.
    Info,
}

fn main() -> ExitCode {
    run(Command::parse().task).unwrap_or_else(|error| {
        eprintln!("deltanet: {error:#}");
        ExitCode::FAILURE
    })
}

fn run(task: Task) -> Result<ExitCode> {
    match task {
        Task::Check(options) => check::run(&options),
        Task::Bench(options) => bench::run(&options),
        Task::Info => info::run(),
    }
}
