//! `cargo xtask install`: the library where C and C++ programs look for it.
//!
//! Done here and not by cargo-c: that has no CMake package, no command and no licences, rebuilds the library under other
//! settings than the tests ran on, and is one more tool to fetch. What it does have is the fifty lines below.

use crate::command::{cargo, output, release, run, workspace};
use anyhow::{Context, Result, ensure};
use clap::Args;
use serde_json::Value;
use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Component, Path, PathBuf};
use std::process::Command;

/// The version of the library, which is the workspace's.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");

/// The number in the SONAME.
pub const SOVERSION: &str = env!("CARGO_PKG_VERSION_MAJOR");

/// Where to install and what.
#[derive(Args)]
pub struct Options {
    /// The folder that programs will find the library in, such as /usr/local.
    #[arg(long)]
    prefix: PathBuf,
    /// A folder to put in front of the prefix (packagers) [default: none, or the variable DESTDIR].
    #[arg(long, env = "DESTDIR")]
    destdir: Option<PathBuf>,
    /// The libraries' folder under the prefix.
    #[arg(long, default_value = "lib")]
    libdir: PathBuf,
    /// Features to build with, as cargo takes them.
    #[arg(long)]
    features: Option<String>,
}

/// Builds and installs.
pub fn install(options: &Options) -> Result<()> {
    ensure!(options.prefix.is_absolute(), "--prefix is {}; it must be absolute", options.prefix.display());
    let root = match &options.destdir {
        Some(destdir) if !destdir.as_os_str().is_empty() => {
            destdir.join(options.prefix.strip_prefix("/").context("--prefix must start at /")?)
        }
        _ => options.prefix.clone(),
    };
    build(options.features.as_deref())?;
    install_to(&root, &options.libdir)?;
    println!("installed deltanet {VERSION} in {}", root.display());
    Ok(())
}

/// Builds what gets installed.
pub fn build(features: Option<&str>) -> Result<()> {
    let mut command = cargo();
    command.args(["build", "--release", "--package", "deltanet", "--package", "deltanet-cli"]);
    if let Some(features) = features {
        command.args(["--features", features]);
    }
    run(&mut command)
}

/// Puts what was built under `root`.
pub fn install_to(root: &Path, libdir: &Path) -> Result<()> {
    ensure!(
        libdir.components().all(|part| matches!(part, Component::Normal(_))),
        "--libdir is {}; it must be a folder under the prefix",
        libdir.display()
    );
    let lib = root.join(libdir);
    let shared = format!("libdeltanet.so.{VERSION}");
    binary("libdeltanet.so", &lib.join(&shared))?;
    link(&shared, &lib.join(format!("libdeltanet.so.{SOVERSION}")))?;
    link(&shared, &lib.join("libdeltanet.so"))?;
    binary("libdeltanet.a", &lib.join("libdeltanet.a"))?;
    binary("deltanet", &root.join("bin/deltanet"))?;

    let source = workspace();
    file(&source.join("include/deltanet.h"), &root.join("include/deltanet.h"))?;
    let native = native_libraries()?;
    let template = |name: &str, folder: &Path| {
        let to = lib.join(folder);
        let up = libdir.components().chain(folder.components()).map(|_| "..").collect::<Vec<_>>().join("/");
        let text = fs::read_to_string(source.join("packaging").join(format!("{name}.in")))?
            .replace("@VERSION@", VERSION)
            .replace("@SOVERSION@", SOVERSION)
            .replace("@UP@", &up)
            .replace("@LIBDIR@", &libdir.to_string_lossy())
            .replace("@NATIVE_LIBS_CMAKE@", &native.join(";"))
            .replace("@NATIVE_LIBS@", &native.join(" "));
        write(&to.join(name), &text)
    };
    template("deltanet.pc", Path::new("pkgconfig"))?;
    template("deltanetConfig.cmake", Path::new("cmake/deltanet"))?;
    template("deltanetConfigVersion.cmake", Path::new("cmake/deltanet"))?;

    let licences = root.join("share/licenses/deltanet");
    file(&source.join("LICENSE"), &licences.join("LICENSE"))?;
    write(&licences.join("third-party.txt"), &third_party_licences()?)?;
    let documents = root.join("share/doc/deltanet");
    file(&source.join("README.md"), &documents.join("README.md"))?;
    for folder in ["docs", "examples"] {
        tree(&source.join(folder), &documents.join(folder))?;
    }
    Ok(())
}

/// Installs a built file without its debug information, which is most of its size.
fn binary(name: &str, to: &Path) -> Result<()> {
    file(&release().join(name), to)?;
    run(Command::new("strip").arg("--strip-debug").arg(to))
}

/// Copies a file, and replaces one that is there, whatever its links.
fn file(from: &Path, to: &Path) -> Result<()> {
    let bytes = fs::read(from).with_context(|| format!("{} cannot be read", from.display()))?;
    let executable = fs::metadata(from)?.permissions().mode() & 0o111 != 0;
    replace(to)?;
    fs::write(to, bytes).with_context(|| format!("{} cannot be written", to.display()))?;
    fs::set_permissions(to, fs::Permissions::from_mode(if executable { 0o755 } else { 0o644 }))?;
    Ok(())
}

fn write(to: &Path, text: &str) -> Result<()> {
    replace(to)?;
    fs::write(to, text).with_context(|| format!("{} cannot be written", to.display()))
}

fn link(target: &str, at: &Path) -> Result<()> {
    replace(at)?;
    symlink(target, at).with_context(|| format!("{} cannot be made", at.display()))
}

/// Makes way for a file: its folder is there, itself not. A running program keeps the old file.
fn replace(at: &Path) -> Result<()> {
    let folder = at.parent().context("a file has a folder")?;
    fs::create_dir_all(folder).with_context(|| format!("{} cannot be made", folder.display()))?;
    if at.symlink_metadata().is_ok() {
        fs::remove_file(at).with_context(|| format!("{} cannot be replaced", at.display()))?;
    }
    Ok(())
}

/// Copies a folder's files: those that git has, no build leftovers; all of them where there is no git (a source archive).
fn tree(from: &Path, to: &Path) -> Result<()> {
    if workspace().join(".git").exists() {
        let listing = output(Command::new("git").arg("-C").arg(from).args(["ls-files", "-z"]))?;
        return listing.split_terminator('\0').try_for_each(|name| file(&from.join(name), &to.join(name)));
    }
    for entry in fs::read_dir(from)? {
        let path = entry?.path();
        let to = to.join(path.file_name().context("an entry has a name")?);
        if path.is_dir() { tree(&path, &to)? } else { file(&path, &to)? }
    }
    Ok(())
}

/// What a program must link beside libdeltanet.a, as the compiler says for the standard library; deltanet itself needs
/// nothing more, which the static builds of the examples show.
fn native_libraries() -> Result<Vec<String>> {
    let scratch = std::env::temp_dir().join(format!("deltanet-native-{}", std::process::id()));
    fs::create_dir_all(&scratch)?;
    let source = scratch.join("empty.rs");
    fs::write(&source, "")?;
    let printed = Command::new("rustc")
        .current_dir(&scratch)
        .args(["--crate-type", "staticlib", "--print", "native-static-libs"])
        .arg(&source)
        .output()
        .context("rustc could not be started")?;
    fs::remove_dir_all(&scratch)?;
    let words = String::from_utf8(printed.stderr)?;
    let list = words.lines().find_map(|line| line.split_once("native-static-libs: "));
    let (_, list) = list.with_context(|| format!("rustc does not name its native libraries:\n{words}"))?;
    let mut libraries: Vec<String> = list.split_whitespace().map(str::to_owned).collect();
    libraries.dedup();
    Ok(libraries)
}

/// The licences of the crates in the binaries, as their authors wrote them.
fn third_party_licences() -> Result<String> {
    let tree = output(cargo().args(["tree", "--package", "deltanet", "--package", "deltanet-cli"]).args([
        "--edges",
        "normal,no-proc-macro",
        "--prefix",
        "none",
        "--format",
        "{p}",
    ]))?;
    let mut used: Vec<(&str, &str)> = tree.lines().filter_map(|line| name_and_version(line)).collect();
    used.sort_unstable();
    used.dedup();
    let metadata: Value = serde_json::from_str(&output(cargo().args(["metadata", "--format-version", "1"]))?)?;
    let mut text = String::from(
        "Parts of these packages and of Rust's standard library (MIT OR Apache-2.0) are in libdeltanet and the command.\n",
    );
    for package in metadata["packages"].as_array().context("cargo metadata lists packages")? {
        let word = |key: &str| package[key].as_str().unwrap_or_default();
        if package["source"].is_null() || !used.contains(&(word("name"), word("version"))) {
            continue;
        }
        let rule = "=".repeat(100);
        text += &format!("\n{rule}\n{} {}: {}\n{rule}\n", word("name"), word("version"), word("license"));
        let folder = Path::new(word("manifest_path")).parent().context("a manifest has a folder")?;
        for path in licence_files(folder)? {
            text += &format!("\n{}\n", String::from_utf8_lossy(&fs::read(path)?).trim_end());
        }
    }
    Ok(text)
}

fn name_and_version(line: &str) -> Option<(&str, &str)> {
    let (name, rest) = line.split_once(" v")?;
    Some((name, rest.split_whitespace().next()?))
}

fn licence_files(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        let name = path.file_name().map(|name| name.to_string_lossy().to_uppercase()).unwrap_or_default();
        if path.is_file() && ["LICENSE", "LICENCE", "COPYING", "NOTICE"].iter().any(|word| name.starts_with(word)) {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}
