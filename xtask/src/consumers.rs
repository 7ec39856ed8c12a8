//! The installed library as C and C++ projects see it: found by CMake and by pkg-config, shared and static, in a folder
//! that knows nothing of the source tree.

use crate::command::{golden_cases, has, output, run};
use crate::install::{Options, SOVERSION, VERSION, install};
use crate::python;
use anyhow::{Context, Result, ensure};
use clap::Parser;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The version of CMake to fetch where there is none.
const CMAKE: &str = "3.31.6";

/// The header and the examples give no warnings to those who ask for many.
const WARNINGS: &str = "-O2 -Wall -Wextra -Wpedantic -Wshadow -Wconversion -Werror";

#[derive(Parser)]
struct Line {
    #[command(flatten)]
    options: Options,
}

/// Installs with a DESTDIR, moves the prefix away, copies the examples out of it and builds and runs them there.
pub fn test() -> Result<()> {
    let scratch = std::env::temp_dir().join(format!("deltanet-consumers-{}", std::process::id()));
    let result = in_scratch(&scratch);
    if result.is_ok() {
        fs::remove_dir_all(&scratch)?;
    }
    result.with_context(|| format!("what was built is left in {}", scratch.display()))
}

fn in_scratch(scratch: &Path) -> Result<()> {
    let staged = scratch.join("staged");
    let line = ["install", "--prefix", "/opt/deltanet", "--libdir", "lib/x86_64-linux-gnu", "--destdir"];
    let line = line.into_iter().map(Into::into).chain([staged.clone().into_os_string()]);
    install(&Line::try_parse_from(line)?.options)?;
    let prefix = scratch.join("prefix");
    fs::rename(staged.join("opt/deltanet"), &prefix)?;
    let examples = scratch.join("examples");
    fs::rename(prefix.join("share/doc/deltanet/examples"), &examples)?;
    let golden = scratch.join("golden");
    fs::create_dir(&golden)?;
    for case in golden_cases()? {
        fs::copy(&case, golden.join(case.file_name().context("a case has a name")?))?;
    }

    let version = output(clean(&prefix.join("bin/deltanet"), &prefix).arg("--version"))?;
    ensure!(version.trim() == format!("deltanet {VERSION}"), "the installed command says {version}");
    run(clean(&prefix.join("bin/deltanet"), &prefix).arg("check").args(files(&golden)?))?;

    let site = Site { scratch, prefix: &prefix, examples: &examples, golden: files(&golden)? };
    site.pkg_config()?;
    site.cmake()
}

struct Site<'a> {
    scratch: &'a Path,
    prefix: &'a Path,
    examples: &'a Path,
    golden: Vec<PathBuf>,
}

impl Site<'_> {
    fn pkg_config(&self) -> Result<()> {
        if !has("pkg-config") {
            println!("   SKIPPED: the pkg-config consumer (no pkg-config)");
            return Ok(());
        }
        let version = output(self.command("pkg-config").args(["--modversion", "deltanet"]))?;
        ensure!(version.trim() == VERSION, "deltanet.pc says {version}");
        for (kind, value) in [("shared", "0"), ("static", "1")] {
            let build = self.scratch.join(format!("pkg-config-{kind}"));
            run(self
                .command("make")
                .arg("-C")
                .arg(self.examples.join("pkg-config"))
                .arg(format!("BUILD={}", build.display()))
                .arg(format!("STATIC={value}"))
                .args(["CFLAGS", "CXXFLAGS"].map(|flags| format!("{flags}={WARNINGS}"))))?;
            self.run_examples(&build, kind)?;
        }
        Ok(())
    }

    fn cmake(&self) -> Result<()> {
        let cmake = if has("cmake") {
            PathBuf::from("cmake")
        } else {
            match python::tool("cmake", CMAKE, "cmake") {
                Ok(path) => path,
                Err(error) => {
                    println!("   SKIPPED: the CMake consumer (no cmake, and none could be had: {error:#})");
                    return Ok(());
                }
            }
        };
        for kind in ["shared", "static"] {
            let build = self.scratch.join(format!("cmake-{kind}"));
            run(self
                .command(&cmake)
                .arg("-S")
                .arg(self.examples.join("cmake"))
                .arg("-B")
                .arg(&build)
                .arg(format!("-DCMAKE_PREFIX_PATH={}", self.prefix.display()))
                .arg(format!("-DDELTANET_KIND={kind}")))?;
            run(self.command(&cmake).arg("--build").arg(&build))?;
            self.run_examples(&build, kind)?;
        }
        let wrong = self
            .command(&cmake)
            .arg("-S")
            .arg(self.examples.join("cmake"))
            .arg("-B")
            .arg(self.scratch.join("cmake-wrong"))
            .arg(format!("-DCMAKE_PREFIX_PATH={}", self.prefix.display()))
            .arg("-DDELTANET_KIND=neither")
            .output()?;
        let words = String::from_utf8_lossy(&wrong.stderr).into_owned();
        ensure!(!wrong.status.success() && words.contains("neither"), "an unknown component was taken:\n{words}");
        Ok(())
    }

    fn run_examples(&self, build: &Path, kind: &str) -> Result<()> {
        run(self.command(build.join("driver")).args(&self.golden))?;
        run(&mut self.command(build.join("driver_cpp")))?;
        for program in ["driver", "driver_cpp"] {
            let needed = output(self.command("readelf").arg("-d").arg(build.join(program)))?;
            let shared = needed.contains(&format!("Shared library: [libdeltanet.so.{SOVERSION}]"));
            ensure!(shared == (kind == "shared"), "{program} was to be {kind}, and needs:\n{needed}");
        }
        Ok(())
    }

    fn command(&self, program: impl AsRef<Path>) -> Command {
        clean(program.as_ref(), self.prefix)
    }
}

/// A command that inherits nothing from cargo: neither library paths nor compiler settings.
fn clean(program: &Path, prefix: &Path) -> Command {
    let mut command = Command::new(program);
    command.env_clear().env("PKG_CONFIG_PATH", prefix.join("lib/x86_64-linux-gnu/pkgconfig"));
    for name in ["PATH", "HOME", "TMPDIR", "DELTANET_ISA"] {
        if let Some(value) = std::env::var_os(name) {
            command.env(name, value);
        }
    }
    command
}

fn files(folder: &Path) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(folder)?.collect::<std::io::Result<Vec<_>>>()?;
    Ok(entries.iter().map(|entry| entry.path()).collect())
}
