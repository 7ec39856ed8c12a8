//! What cargo cannot do by itself: the shared library's SONAME (docs/versioning.md), and the CUDA kernels.
//!
//! The kernels are compiled ahead of time and for every architecture into fat binaries that src/cuda embeds.
//! nvcc is looked for in `NVCC`, `DELTANET_NVCC_DIR`, `CUDA_HOME`, `PATH` and the folder that `cargo xtask nvcc` fills.
//! Without one the library builds all the same, says so in one warning, and its CUDA functions answer UNSUPPORTED.
//! `DELTANET_CUDA_ARCHS` (such as "90a" or "86,90a") names other architectures, to build faster while developing.

use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::{env, fs};

/// Sources, and the oldest architecture that each is for.
const KERNELS: &[(&str, u32)] = &[("recurrent", 75), ("chunked", 80)];
const ARCHS: &str = "75,80,86,89,90a,100,120";

fn main() -> ExitCode {
    set_soname();
    println!("cargo::rustc-check-cfg=cfg(deltanet_nvcc)");
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=kernels");
    for variable in
        ["NVCC", "DELTANET_NVCC_DIR", "CUDA_HOME", "PATH", "DELTANET_CACHE", "XDG_CACHE_HOME", "DELTANET_CUDA_ARCHS"]
    {
        println!("cargo::rerun-if-env-changed={variable}");
    }
    if env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return ExitCode::SUCCESS;
    }
    match build() {
        Ok(()) => ExitCode::SUCCESS,
        Err(words) => {
            println!("cargo::error={words}");
            ExitCode::FAILURE
        }
    }
}

fn build() -> Result<(), String> {
    let out = PathBuf::from(env::var_os("OUT_DIR").ok_or("OUT_DIR is not set")?);
    write(&out.join("recurrent_shapes.rs"), &recurrent_shapes()?)?;
    let Some(nvcc) = nvcc() else {
        println!(
            "cargo::warning=no nvcc: the CUDA kernels are left out, and CUDA calls will answer UNSUPPORTED \
             (`cargo xtask nvcc` fetches one)"
        );
        return Ok(());
    };
    let version = Command::new(&nvcc).arg("--version").output().map_err(|e| format!("{}: {e}", nvcc.display()))?;
    let archs = env::var("DELTANET_CUDA_ARCHS").unwrap_or_else(|_| ARCHS.into());
    for (kernel, oldest) in KERNELS {
        let archs = archs_from(&archs, *oldest);
        let mut files = BTreeMap::new();
        sources(&format!("{kernel}.cu"), &mut files)?;
        let mut hasher = DefaultHasher::new();
        (&version.stdout, &archs, &files).hash(&mut hasher);
        let key = hasher.finish();
        let image = out.join(format!("{kernel}.fatbin"));
        let log = image.with_extension("ptxas");
        // Compiling takes minutes, and cargo makes build scripts run again for other profiles and lints.
        let kept = cache().map(|cache| cache.join(format!("kernels/{kernel}-{key:016x}.fatbin")));
        if let Some(kept) = kept.as_ref().filter(|kept| kept.is_file()) {
            for (from, to) in [(kept, &image), (&kept.with_extension("ptxas"), &log)] {
                fs::copy(from, to).map_err(|e| format!("{}: {e}", from.display()))?;
            }
            continue;
        }
        write(&log, &compile(&nvcc, kernel, &archs, &image)?)?;
        if let Some(kept) = kept {
            keep(&log, &kept.with_extension("ptxas"));
            keep(&image, &kept);
        }
    }
    println!("cargo::rustc-env=DELTANET_KERNELS={}", out.display());
    println!("cargo::rustc-cfg=deltanet_nvcc");
    Ok(())
}

/// Those of `archs` that are not older than `oldest`; `oldest` itself where all are.
fn archs_from(archs: &str, oldest: u32) -> String {
    let number = |arch: &&str| arch.trim_end_matches(|c: char| !c.is_ascii_digit()).parse::<u32>().unwrap_or(u32::MAX);
    let kept: Vec<&str> = archs.split(',').filter(|arch| number(arch) >= oldest).collect();
    if kept.is_empty() { oldest.to_string() } else { kept.join(",") }
}

/// Adds `file` of kernels/ and all that it includes from there to `into`.
fn sources(file: &str, into: &mut BTreeMap<String, String>) -> Result<(), String> {
    if into.contains_key(file) {
        return Ok(());
    }
    let text = fs::read_to_string(format!("kernels/{file}")).map_err(|e| format!("kernels/{file}: {e}"))?;
    let included = |line: &str| Some(line.strip_prefix("#include \"")?.split_once('"')?.0.to_string());
    let next: Vec<String> = text.lines().filter_map(included).collect();
    into.insert(file.into(), text);
    next.iter().try_for_each(|file| sources(file, into))
}

/// Makes the image and returns what ptxas says of registers and spills, which a test reads.
fn compile(nvcc: &Path, kernel: &str, archs: &str, image: &Path) -> Result<String, String> {
    let jobs = env::var("NUM_JOBS").unwrap_or_else(|_| "1".into());
    let mut command = Command::new(nvcc);
    // exp, division and square roots stay exact: no --use_fast_math.
    command.args([
        "-fatbin",
        "-O3",
        "-std=c++17",
        "-diag-suppress",
        "177",
        "-compress-mode=size",
        "-Xptxas",
        "-v",
        "--threads",
        &jobs,
        "-I",
        "kernels",
    ]);
    for arch in archs.split(',') {
        command.arg(format!("-gencode=arch=compute_{arch},code=sm_{arch}"));
    }
    // PTX of the newest, for architectures to come; an "a" architecture's runs nowhere else.
    if let Some(newest) = archs.split(',').next_back().filter(|arch| !arch.ends_with('a')) {
        command.arg(format!("-gencode=arch=compute_{newest},code=compute_{newest}"));
    }
    command.arg("-o").arg(image).arg(format!("kernels/{kernel}.cu"));
    let output = command.output().map_err(|e| format!("{command:?} could not be started: {e}"))?;
    if !output.status.success() {
        let words = String::from_utf8_lossy(&output.stderr).replace('\n', " | ");
        return Err(format!("{command:?} failed: {words}"));
    }
    Ok(String::from_utf8_lossy(&output.stderr).into_owned())
}

/// Keeps an image for the next build. A cache that cannot be written to is no error.
fn keep(image: &Path, kept: &Path) {
    let partial = kept.with_extension(std::process::id().to_string());
    let folder = kept.parent().map_or(Ok(()), fs::create_dir_all);
    if folder.is_ok() && fs::copy(image, &partial).is_ok() {
        let _ = fs::rename(&partial, kept); // at once, for builds beside this one
    }
}

/// kernels/recurrent_shapes.h as a Rust table.
fn recurrent_shapes() -> Result<String, String> {
    let header = fs::read_to_string("kernels/recurrent_shapes.h").map_err(|e| e.to_string())?;
    let mut table = String::from("&[\n");
    for line in header.lines().filter_map(|line| line.strip_prefix("DN_RECURRENT(")) {
        let fields: Vec<&str> = line.trim_end_matches(')').split(',').map(str::trim).collect();
        let [kind, head, layout, lanes, columns, warps] = fields[..] else {
            return Err(format!("kernels/recurrent_shapes.h: {line} does not have six fields"));
        };
        for gate in ["scalar", "channel"] {
            table += &format!(
                "    Shape {{ name: c\"dn_recurrent_{kind}_s{head}_{layout}_{gate}\", kind: Kind::{}, head_size: {head}, \
                 value_contiguous: {}, channel_gate: {}, lanes: {lanes}, columns: {columns}, warps: {warps} }},\n",
                match kind {
                    "one" => "One",
                    "window" => "Window",
                    "fast" => "Fast",
                    _ => "Any",
                },
                layout == "vmajor",
                gate == "channel"
            );
        }
    }
    Ok(table + "]\n")
}

fn nvcc() -> Option<PathBuf> {
    let variable = |name: &str| env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let under = |folder: PathBuf| {
        ["bin/nvcc", "nvidia/cu13/bin/nvcc"].map(|at| folder.join(at)).into_iter().find(|nvcc| nvcc.is_file())
    };
    variable("NVCC")
        .or_else(|| variable("DELTANET_NVCC_DIR").and_then(under))
        .or_else(|| variable("CUDA_HOME").and_then(under))
        .or_else(|| {
            let path = env::var_os("PATH")?;
            env::split_paths(&path).map(|folder| folder.join("nvcc")).find(|nvcc| nvcc.is_file())
        })
        .or_else(|| under(cache()?.join("nvcc")))
}

/// The folder that `cargo xtask` keeps downloads in, as xtask/src/cache.rs finds it; only if it is there.
fn cache() -> Option<PathBuf> {
    let named = |name: &str| env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    named("DELTANET_CACHE")
        .or_else(|| named("XDG_CACHE_HOME").map(|cache| cache.join("deltanet")))
        .or_else(|| named("HOME").map(|home| home.join(".cache/deltanet")))
        .filter(|cache| cache.is_dir())
}

fn write(path: &Path, words: &str) -> Result<(), String> {
    fs::write(path, words).map_err(|e| format!("{}: {e}", path.display()))
}

/// Gives the shared library its SONAME, and the build folders links of that name, so that programs linked with the
/// `libdeltanet.so` there find it without an installation.
fn set_soname() {
    if env::var("CARGO_CFG_TARGET_OS").as_deref() != Ok("linux") {
        return;
    }
    let soname = format!("libdeltanet.so.{}", env!("CARGO_PKG_VERSION_MAJOR"));
    println!("cargo::rustc-cdylib-link-arg=-Wl,-soname,{soname}");
    // Pools keep threads in the library's code; a host that closes it must not pull that code from under them.
    println!("cargo::rustc-cdylib-link-arg=-Wl,-z,nodelete");
    // OUT_DIR is <profile folder>/build/<package>/out. Where that is not so, the links are only a convenience missed.
    let out = env::var("OUT_DIR").unwrap_or_default();
    if let Some(folder) = Path::new(&out).ancestors().nth(3) {
        // Tests link with the copy in `deps`, everybody else with the one above it.
        for link in [folder.join(&soname), folder.join("deps").join(&soname)] {
            if std::fs::read_link(&link).is_err() {
                let _ = std::os::unix::fs::symlink("libdeltanet.so", link);
            }
        }
    }
}
