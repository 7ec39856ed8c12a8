//! Versions agree wherever they are written, and programs built with the oldest released header still run.
#![cfg(target_os = "linux")]

#[path = "support/library.rs"]
mod library;

use library::{folder, has, output, root};
use std::path::{Path, PathBuf};
use std::process::Command;

fn compile(name: &str) -> PathBuf {
    let program = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    let mut cc = Command::new("cc");
    cc.args(["-std=c11", "-O1", "-g", "-Wall", "-Wextra", "-Wpedantic", "-Werror"]);
    cc.arg("-I").arg(root().join("include")).arg(root().join(format!("tests/c/{name}.c")));
    cc.arg("-o").arg(&program).arg("-L").arg(folder());
    cc.arg(format!("-Wl,-rpath,{}", folder().display())).args(["-ldeltanet", "-lm"]);
    output(&mut cc);
    program
}

#[test]
fn header_library_and_cargo_agree() {
    let printed = output(&mut Command::new(compile("version")));
    let numbers = [env!("CARGO_PKG_VERSION_MAJOR"), env!("CARGO_PKG_VERSION_MINOR"), env!("CARGO_PKG_VERSION_PATCH")];
    let [major, minor, patch] = numbers.map(|number| number.parse::<u32>().expect("a number"));
    let number = major * 1_000_000 + minor * 1_000 + patch;
    let cargo = env!("CARGO_PKG_VERSION");
    assert_eq!(printed.trim(), format!("{cargo} {number} {number} {cargo}"));
}

#[test]
fn soname_has_the_major_version() {
    if !has("readelf") {
        println!("SKIPPED: there is no readelf");
        return;
    }
    let dynamic = output(Command::new("readelf").args(["-d", "-W"]).arg(library::path()));
    let wanted = format!("Library soname: [libdeltanet.so.{}]", env!("CARGO_PKG_VERSION_MAJOR"));
    assert!(dynamic.contains(&wanted), "{dynamic}");
}

#[test]
fn oldest_layout_still_runs() {
    let printed = output(&mut Command::new(compile("layout_0_1")));
    assert_eq!(printed.matches("result=ok").count(), 2, "{printed}");
}
