//! `cargo xtask ggml-cuda`: everything that a GPU machine needs to build llama.cpp's CUDA backend with and without the
//! drop-in of examples/ggml-cuda and to compare the two, in one folder. That machine needs CUDA's toolkit and no cargo.
//! `--check` compiles the drop-ins here, against the headers of the same sources; that needs nvcc and no GPU.

use crate::command::{output, release, run, workspace};
use crate::{cache, hosts, install, nvcc};
use anyhow::{Context, Result};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// CUDA's fp16 header includes one of these; no kernel of ours does. Pinned to the compiler's release.
const CCCL: &str = "nvidia-cuda-cccl==13.0.85";

/// The parts of llama.cpp that its libraries are built from.
const PARTS: [&str; 7] = ["CMakeLists.txt", "LICENSE", "cmake", "ggml", "include", "src", "vendor"];

/// Builds the folder target/ggml-cuda and says what to do with it.
pub fn pack() -> Result<()> {
    nvcc::fetch()?;
    install::build(None)?;
    let folder = release().parent().context("target/release has a parent")?.join("ggml-cuda");
    if folder.exists() {
        fs::remove_dir_all(&folder)?;
    }
    install::install_to(&folder.join("prefix"), Path::new("lib"))?;
    let sources = hosts::crate_sources()?;
    let archive = folder.join("llama.cpp.tar.xz");
    // Under one name, wherever they were.
    let rename = format!("--transform=s,^{},llama.cpp,", sources.file_name().unwrap_or_default().to_string_lossy());
    let parts = PARTS.map(|part| Path::new(sources.file_name().unwrap_or_default()).join(part));
    let above = sources.parent().context("the sources have a folder")?;
    run(Command::new("tar").arg("-cJf").arg(archive).arg(rename).arg("-C").arg(above).args(parts))?;
    fs::write(folder.join("source.txt"), format!("{}\n", hosts::CRATE_ABOUT))?;
    for name in ["ops.cpp", "model.cpp", "compare.py"] {
        fs::copy(workspace().join("tests/ggml_cuda").join(name), folder.join(name))?;
    }
    run(Command::new("strip").arg("-o").arg(folder.join("xtask")).arg(std::env::current_exe()?))?;
    println!("{}: copy it to a GPU machine and run ./compare.py RESULTS there", folder.display());
    Ok(())
}

/// Compiles the drop-ins, the one for ik_llama.cpp too: what it uses of ggml-cuda is the same in both.
pub fn check() -> Result<()> {
    let (nvcc, cccl) = (nvcc::fetch()?, cccl()?);
    let ggml = hosts::crate_sources()?.join("ggml");
    let scratch = std::env::temp_dir().join(format!("deltanet-ggml-cuda-{}", std::process::id()));
    fs::create_dir_all(&scratch)?;
    for name in ["gated_delta_net", "delta-net"] {
        let mut command = Command::new(&nvcc);
        command.args(["-std=c++17", "-use_fast_math", "-extended-lambda", "-arch=sm_75", "-c"]);
        command.args(["-Xcompiler", "-Wall,-Wno-unused-function", "-Werror=all-warnings"]);
        let headers = workspace().join("tests/ggml_cuda/headers");
        for folder in [ggml.join("src/ggml-cuda"), ggml.join("src"), ggml.join("include"), workspace().join("include")]
        {
            command.arg("-I").arg(folder);
        }
        command.arg("-isystem").arg(headers).arg("-isystem").arg(&cccl);
        command.arg("-o").arg(scratch.join(name)).arg(workspace().join(format!("examples/ggml-cuda/{name}.cu")));
        output(&mut command)?;
        println!("   examples/ggml-cuda/{name}.cu: compiles");
    }
    Ok(fs::remove_dir_all(scratch)?)
}

/// The folder of CCCL's headers, fetched unless it is there.
fn cccl() -> Result<PathBuf> {
    let folder = cache::root()?.join("cccl");
    let headers = folder.join("nvidia/cu13/include/cccl");
    if !headers.is_dir() {
        let install = ["-m", "pip", "install", "--quiet", "--no-deps", "--only-binary=:all:", "--upgrade", "--target"];
        run(Command::new("python3").args(install).arg(&folder).arg(CCCL))?;
    }
    Ok(headers)
}
