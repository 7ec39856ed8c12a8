//! The hosts, fetched from package registries and kept in the cache, pinned by version and checksum.

use super::model::Model;
use crate::cache;
use crate::command::{cargo, output, run, workspace};
use anyhow::{Context, Result, ensure};
use sha2::{Digest, Sha256};
use std::path::{Path, PathBuf};
use std::process::Command;

/// A llama.cpp to load the plugin into.
pub struct Host {
    pub name: &'static str,
    /// What the version is called elsewhere.
    pub about: &'static str,
    source: Source,
}

enum Source {
    /// Prebuilt in npm's @node-llama-cpp/linux-x64: version and SHA-256 of the archive.
    Npm(&'static str, &'static str),
    /// Built from the sources in the crate llama-cpp-sys-2.
    Crate,
}

/// The first has no fused operator; it is the baseline of the field.
pub const BEFORE: Host = Host {
    name: "npm-3.17.1",
    about: "llama.cpp b8179, without the fused operator",
    source: Source::Npm("3.17.1", "1376a5ff4a8ca222eee9927152ecf6062080f0adbbe5408d5c78eac3e7b8c93d"),
};

/// The hosts that must take over.
pub const HOSTS: [Host; 4] = [
    Host {
        name: "npm-3.18.1",
        about: "llama.cpp b8390, ggml 0.9.7, plugin API 2",
        source: Source::Npm("3.18.1", "0b662aabf9794140ff71d2c34970662ac30f95cacaaa98e03b9967d21ea816d0"),
    },
    Host {
        name: "npm-3.21.1",
        about: "llama.cpp v0.4.0, ggml 0.23.0, plugin API 2",
        source: Source::Npm("3.21.1", "4b5b65a8b2611d8af94349b02d815c0f424a30a0a19aef2be5db25ecfef6730f"),
    },
    Host {
        name: "npm-3.22.1",
        about: "llama.cpp v0.5.0, ggml 0.25.1, plugin API 2",
        source: Source::Npm("3.22.1", "0d953e1503d5ab4608d8ed5b739132308c81ac05ffeb760d2a7f30e08a9f90e0"),
    },
    Host {
        name: "crate-0.1.161",
        about: "llama.cpp in llama-cpp-sys-2, ggml 0.26.0, plugin API 3",
        source: Source::Crate,
    },
];

const CRATE: &str = "llama-cpp-sys-2";
const CRATE_VERSION: &str = "0.1.161";
const CRATE_SHA256: &str = "e9bea77fde41bbc15a278891cd5edd2ba07c5260d162614b41080ba1f100b39b";
/// The crate's sources in words.
pub const CRATE_ABOUT: &str = "llama.cpp v0.6.0, ggml 0.26.0, of the crate llama-cpp-sys-2 0.1.161";
/// pip takes these alone: the wheels for x86-64 Linux.
const BUILD_TOOLS: &str = "\
cmake==4.4.4 --hash=sha256:f773a0544c66370408f451acd487c2c643b0dfebb48c5d64f3638bc1bb820238
ninja==1.13.2 --hash=sha256:65a24341b5ac09fcadcc37082660be40a94174e51a937fabf6e2cae26225fa2c
";

impl Host {
    /// The folder with its libraries, fetched or built if it is not in the cache.
    pub fn libraries(&self) -> Result<PathBuf> {
        match self.source {
            Source::Npm(version, sha256) => npm(version, sha256),
            Source::Crate => build_crate(),
        }
    }
}

fn check(file: &Path, sha256: &str) -> Result<()> {
    let bytes = std::fs::read(file).with_context(|| file.display().to_string())?;
    let found: String = Sha256::digest(&bytes).iter().map(|byte| format!("{byte:02x}")).collect();
    ensure!(found == sha256, "{} has SHA-256 {found}, not the pinned {sha256}", file.display());
    Ok(())
}

/// Runs `make` unless `folder` is there; a folder appears under its name only when it is complete.
fn once(folder: &Path, make: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    if folder.is_dir() {
        return Ok(());
    }
    println!("   fetching {}", folder.display());
    let partial = folder.with_extension("partial");
    if partial.exists() {
        std::fs::remove_dir_all(&partial)?;
    }
    std::fs::create_dir_all(&partial)?;
    make(&partial)?;
    Ok(std::fs::rename(partial, folder)?)
}

/// Fetches, builds and makes everything.
pub fn all() -> Result<()> {
    for host in HOSTS.iter().chain([&BEFORE]) {
        host.libraries()?;
    }
    node_llama_cpp()?;
    Model::TINY.into_iter().chain([Model::Speed]).try_for_each(|kind| model(kind).map(drop))
}

fn npm(version: &str, sha256: &str) -> Result<PathBuf> {
    let folder = cache::root()?.join(format!("hosts/npm-{version}"));
    once(&folder, |partial| {
        let package = format!("@node-llama-cpp/linux-x64@{version}");
        run(Command::new("npm").args(["pack", "--silent", &package]).current_dir(partial))?;
        let archive = format!("node-llama-cpp-linux-x64-{version}.tgz");
        check(&partial.join(&archive), sha256)?;
        run(Command::new("tar").args(["xzf", &archive]).current_dir(partial))?;
        Ok(std::fs::remove_file(partial.join(archive))?)
    })?;
    Ok(folder.join("package/bins/linux-x64"))
}

/// The crate's sources, through a package of ours that depends on it: cargo checks them against its index.
pub fn crate_sources() -> Result<PathBuf> {
    let folder = cache::root()?.join(format!("hosts/{CRATE}-{CRATE_VERSION}"));
    once(&folder, |partial| {
        let manifest = format!(
            "[package]\nname = \"sources\"\nversion = \"0.0.0\"\nedition = \"2024\"\n\n[workspace]\n\n[dependencies]\n{CRATE} = \"={CRATE_VERSION}\"\n"
        );
        std::fs::create_dir_all(partial.join("src"))?;
        std::fs::write(partial.join("src/lib.rs"), "")?;
        std::fs::write(partial.join("Cargo.toml"), manifest)?;
        run(cargo().args(["vendor", "--quiet", "vendor"]).current_dir(partial).stdout(std::process::Stdio::null()))?;
        let lock = std::fs::read_to_string(partial.join("Cargo.lock"))?;
        ensure!(
            lock.contains(CRATE_SHA256),
            "{CRATE} {CRATE_VERSION} has another checksum than the pinned {CRATE_SHA256}"
        );
        Ok(())
    })?;
    Ok(folder.join("vendor").join(CRATE).join("llama.cpp"))
}

/// cmake and ninja, in a Python environment of the cache's own.
fn build_tools() -> Result<PathBuf> {
    let folder = cache::root()?.join("hosts/build-tools");
    if !folder.join("bin/ninja").exists() {
        run(Command::new("python3").args(["-m", "venv"]).arg(&folder))?;
        let requirements = folder.join("requirements.txt");
        std::fs::write(&requirements, BUILD_TOOLS)?;
        let mut pip = Command::new(folder.join("bin/pip"));
        pip.args(["install", "--quiet", "--disable-pip-version-check", "--only-binary", ":all:", "--require-hashes"]);
        run(pip.arg("-r").arg(requirements))?;
    }
    Ok(folder.join("bin"))
}

/// With the RPC backend, which is one more library and changes nothing where no server is named.
fn build_crate() -> Result<PathBuf> {
    let sources = crate_sources()?;
    let build = cache::root()?.join(format!("hosts/{CRATE}-{CRATE_VERSION}-rpc"));
    let done = build.join("done");
    if !done.exists() {
        println!("   building {}", sources.display());
        let tools = build_tools()?;
        let parts = ["COMMON", "APP", "TOOLS", "TESTS", "EXAMPLES", "SERVER"];
        let without = parts.map(|part| format!("-DLLAMA_BUILD_{part}=OFF"));
        let mut configure = Command::new(tools.join("cmake"));
        configure.arg("-S").arg(&sources).arg("-B").arg(&build).args(["-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release"]);
        configure.arg(format!("-DCMAKE_MAKE_PROGRAM={}", tools.join("ninja").display()));
        configure.args(["-DLLAMA_CURL=OFF", "-DGGML_NATIVE=ON", "-DGGML_RPC=ON"]).args(without);
        output(&mut configure)?;
        output(Command::new(tools.join("ninja")).arg("-C").arg(&build))?;
        std::fs::write(done, "")?;
    }
    Ok(build.join("bin"))
}

/// The application: a folder where node finds node-llama-cpp, its versions and checksums those of the lock file.
pub fn node_llama_cpp() -> Result<PathBuf> {
    let pinned = workspace().join("tests/hosts");
    let lock = std::fs::read(pinned.join("package-lock.json"))?;
    let version: String = Sha256::digest(&lock).iter().take(4).map(|byte| format!("{byte:02x}")).collect();
    let folder = cache::root()?.join(format!("hosts/node-llama-cpp-{version}"));
    once(&folder, |partial| {
        for file in ["package.json", "package-lock.json"] {
            std::fs::copy(pinned.join(file), partial.join(file))?;
        }
        let mut install = Command::new("npm");
        // Its optional packages are builds for other systems and devices; the one for this system is named. They are not
        // in the lock file, which `npm ci` would take for a mistake.
        install.args(["install", "--ignore-scripts", "--omit=optional", "--no-audit", "--no-fund", "--silent"]);
        run(install.current_dir(partial))
    })?;
    Ok(folder)
}

/// The file of a model, made if it is not in the cache.
pub fn model(model: Model) -> Result<PathBuf> {
    let folder = cache::root()?.join("models");
    std::fs::create_dir_all(&folder)?;
    let path = folder.join(format!("{}.gguf", model.name()));
    if !path.exists() {
        println!("   making {}", path.display());
        model.write(&path)?;
    }
    Ok(path)
}
