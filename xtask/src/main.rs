//! `cargo xtask`: the project's own tasks. Each does its own set-up.

mod cache;
mod command;
mod demo;
mod test;

use anyhow::Result;
use clap::Parser;
use std::process::ExitCode;

/// The project's own tasks.
#[derive(Parser)]
enum Task {
    /// Build the library and the C driver, run it on the golden cases and print a table.
    Demo,
    /// Fetch what the tests need and run every test.
    Test,
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
    }
}
