//! Our `iqk_fused_delta_net` inside a process with an engine: the three ways in, and every version of the function that
//! an engine may have. The engines are stand-ins (ik/engine.c); `cargo xtask ik` runs the real one.
#![cfg(target_os = "linux")]

#[path = "support/library.rs"]
mod library;

use library::{output, root};
use std::path::PathBuf;
use std::process::Command;

/// How deltanet comes into the process.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Way {
    /// Not at all.
    None,
    /// LD_PRELOAD with an unmodified program.
    Preload,
    /// Linked before the engine.
    Link,
    /// The engine itself calls it and has no function of its own.
    Patch,
}

/// What the engine's own function did in one round.
#[derive(Debug, PartialEq)]
struct Own {
    heads: usize,
    calls: usize,
}

/// Heads of the stand-in's operator (4 heads, 2 sequences) and its parts.
const HEADS: usize = 8;
const PARTS: usize = 3;

/// Builds a program with the engine of that version, runs it, and returns what its own function did in each of two
/// rounds, and what was logged. The program itself checks the results.
fn run(version: u32, way: Way, head_size: u32) -> ([Own; 2], String) {
    let folder = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("ik-{version}-{way:?}-{head_size}"));
    std::fs::create_dir_all(&folder).expect("the scratch folder is writable");
    let sources = root().join("tests/ik");
    let compiler = || {
        let mut cc = Command::new("cc");
        // Contracted to FMA or not, loops this long agree with ours; without, the bits are the same on all machines.
        cc.args(["-std=c11", "-Wall", "-Wextra", "-Werror", "-O2", "-ffp-contract=off", "-fPIC"]);
        cc.arg(format!("-DVERSION={}", if way == Way::Patch { 0 } else { version }));
        cc
    };
    let deltanet = |cc: &mut Command| {
        // A program asks for the library by its SONAME. It may stay from an earlier run.
        let _ = std::os::unix::fs::symlink(library::path(), folder.join("libdeltanet.so.0"));
        // Nothing in the program refers to deltanet, which the linker would take as a reason to drop it.
        cc.arg("-Wl,--no-as-needed").arg(library::path()).arg(format!("-Wl,-rpath,{}", folder.display()));
    };
    let program = folder.join("program");
    let mut link = compiler();
    link.arg("-o").arg(&program).arg(sources.join("main.c"));
    if way == Way::Patch {
        link.arg(sources.join("engine.c"));
        deltanet(&mut link);
    } else {
        let engine = folder.join("libengine.so");
        output(compiler().arg("-shared").arg("-o").arg(&engine).arg(sources.join("engine.c")).arg("-lm"));
        if way == Way::Link {
            deltanet(&mut link);
        }
        link.arg(&engine);
    }
    output(link.arg("-lm"));
    let mut command = Command::new(&program);
    command.arg(head_size.to_string()).env("DELTANET_LOG", "1").env_remove("DELTANET_ISA");
    // Cargo has its own folders there, with libraries of earlier builds.
    command.env_remove("LD_LIBRARY_PATH");
    if way == Way::Preload {
        command.env("LD_PRELOAD", library::path());
    }
    let ran = command.output().expect("the program starts");
    let (said, log) = (String::from_utf8_lossy(&ran.stdout), String::from_utf8_lossy(&ran.stderr));
    assert!(ran.status.success(), "version {version}, {way:?}, {head_size}: {}\n{said}\n{log}", ran.status);
    let rounds: Vec<Own> = said
        .lines()
        .filter(|line| line.starts_with("round"))
        .map(|line| {
            let numbers: Vec<usize> = line.split_whitespace().filter_map(|word| word.parse().ok()).collect();
            Own { heads: numbers[0], calls: numbers[1] }
        })
        .collect();
    (rounds.try_into().expect("two rounds"), log.into_owned())
}

#[test]
fn known_versions_are_served() {
    for version in [3, 5] {
        let (rounds, log) = run(version, Way::None, 64);
        assert_eq!(rounds, [Own { heads: HEADS, calls: PARTS }, Own { heads: HEADS, calls: PARTS }]);
        assert_eq!(log, "");
        for way in [Way::Preload, Way::Link] {
            for head_size in [64, 128] {
                let ([first, second], log) = run(version, way, head_size);
                // The engine's own function is asked once what it is, with one head; after that it has nothing to do.
                assert!(first.heads == 1 && first.calls <= 2, "version {version}, {way:?}: {first:?}");
                assert_eq!(second, Own { heads: 0, calls: 0 }, "version {version}, {way:?}");
                assert!(log.contains(&format!("runs here: head size {head_size}, 4 heads")), "{log}");
            }
        }
    }
}

#[test]
fn a_patched_engine_is_served() {
    let ([first, second], log) = run(0, Way::Patch, 128);
    assert_eq!([first, second], [Own { heads: 0, calls: 0 }, Own { heads: 0, calls: 0 }]);
    assert!(log.contains("runs here: head size 128"), "{log}");
    // There is nobody else for what it does not fuse.
    let (_, log) = run(0, Way::Patch, 96);
    assert!(log.contains("head_dim is 96"), "{log}");
}

#[test]
fn other_versions_keep_their_own_function() {
    // The oldest two, the one of early May 2026, one with an argument more, and one that computes something else.
    for version in [1, 2, 4, 6, 7] {
        let ([first, second], log) = run(version, Way::Preload, 64);
        assert!(first.heads <= HEADS + 1 && first.calls <= PARTS + 2, "version {version}: {first:?}");
        assert_eq!(second, Own { heads: HEADS, calls: PARTS }, "version {version}");
        assert!(log.contains("of no known version"), "{log}");
    }
}

#[test]
fn sizes_that_are_not_fused_stay_with_the_engine() {
    for way in [Way::Preload, Way::Link] {
        let ([_, second], log) = run(5, way, 96);
        assert_eq!(second, Own { heads: 0, calls: PARTS }, "{way:?}");
        assert!(log.contains("is left to it: UNSUPPORTED: head_dim is 96"), "{log}");
    }
}
