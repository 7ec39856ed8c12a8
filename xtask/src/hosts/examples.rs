//! The examples that are programs with a ggml in them, compiled against ggml 0.26.0.

use super::fetch::{self, HOSTS};
use crate::command::{output, release, run, workspace};
use anyhow::{Result, ensure};
use std::path::{Path, PathBuf};
use std::process::Command;

/// Builds and runs them; `model` is a small one with f32 weights.
pub fn check(model: &Path) -> Result<()> {
    println!("== examples/ggml");
    print!("   {}", output(&mut Command::new(compile("ggml/custom_op.c", &[])?))?);
    println!("== examples/llama.cpp");
    let program = compile("llama.cpp/greedy.c", &["-lllama"])?;
    let greedy = |last: &[&str]| output(Command::new(&program).arg(model).args(["100", "64", "1"]).args(last));
    let (with, without) = (greedy(&[])?, greedy(&["off"])?);
    let tokens = |said: &str| said.lines().next().unwrap_or_default().to_owned();
    ensure!(tokens(&with) == tokens(&without), "greedy tokens differ\n{with}{without}");
    ensure!(without.ends_with("taken: 0\n") && !with.ends_with("taken: 0\n"), "not taken over\n{with}{without}");
    print!("   64 tokens the same, nodes {}", with.lines().skip(1).map(|line| format!("{line}\n")).collect::<String>());
    Ok(())
}

/// The library itself is linked statically: an example needs none of its folders.
fn compile(source: &str, before: &[&str]) -> Result<PathBuf> {
    let (sources, libraries) = (fetch::crate_sources()?, HOSTS[HOSTS.len() - 1].libraries()?);
    let source = workspace().join("examples").join(source);
    let program = release().join(source.file_stem().unwrap_or_default());
    let mut compiler = Command::new("cc");
    compiler.args(["-std=c11", "-O2", "-Wall", "-Wextra", "-Werror"]).arg(source);
    compiler.arg("-I").arg(workspace().join("include"));
    compiler.arg("-isystem").arg(sources.join("include")).arg("-isystem").arg(sources.join("ggml/include"));
    compiler.arg("-L").arg(&libraries).args(before).args(["-lggml", "-lggml-cpu", "-lggml-base"]);
    compiler.arg(release().join("libdeltanet.a")).args(["-lpthread", "-ldl", "-lm"]);
    run(compiler.arg(format!("-Wl,-rpath,{}", libraries.display())).arg("-o").arg(&program))?;
    Ok(program)
}
