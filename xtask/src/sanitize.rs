//! `cargo xtask sanitize`: the compilers' and valgrind's detectors, and Miri, over the parts that each can run.

use crate::command::{has, run, workspace};
use crate::nightly::{self, TARGET};
use anyhow::{Result, ensure};
use clap::{Args, ValueEnum};
use std::path::PathBuf;
use std::process::Command;

/// One detector.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Part {
    /// AddressSanitizer: the Rust tests, and the C programs against the instrumented library.
    Address,
    /// ThreadSanitizer: the C program that loads the library with threads.
    Thread,
    /// valgrind's memcheck: the C programs.
    Valgrind,
    /// Miri: validation, the C interface and the scalar kernels, also on several threads.
    Miri,
}

/// Which detectors to run.
#[derive(Args)]
pub struct Options {
    /// Detectors [default: all].
    #[arg(value_enum)]
    parts: Vec<Part>,
}

/// Runs the detectors asked for; a finding fails, and so does a detector that cannot be had.
pub fn sanitize(options: &Options) -> Result<()> {
    let parts = if options.parts.is_empty() { Part::value_variants() } else { &options.parts };
    for part in parts {
        part.set_up()?;
        part.run()?;
    }
    Ok(())
}

/// Runs every detector that this machine can have, and says which it cannot.
pub fn what_can_be_had() -> Result<()> {
    for part in Part::value_variants() {
        match part.set_up() {
            Ok(()) => part.run()?,
            Err(error) => println!("SKIPPED: {} ({error:#})", part.name()),
        }
    }
    Ok(())
}

impl Part {
    fn name(self) -> &'static str {
        match self {
            Part::Address => "AddressSanitizer",
            Part::Thread => "ThreadSanitizer",
            Part::Valgrind => "valgrind",
            Part::Miri => "Miri",
        }
    }

    fn set_up(self) -> Result<()> {
        match self {
            Part::Address => nightly::set_up(&[]),
            // Its standard library is built here.
            Part::Thread => nightly::set_up(&["rust-src"]),
            Part::Valgrind => {
                ensure!(has("valgrind"), "there is no valgrind");
                Ok(())
            }
            Part::Miri => nightly::set_up(&["miri", "rust-src"]),
        }
    }

    fn run(self) -> Result<()> {
        println!("== {}", self.name());
        match self {
            Part::Address => address(),
            Part::Thread => thread(),
            Part::Valgrind => valgrind(),
            Part::Miri => miri(),
        }
    }
}

/// Fewer random problems: instrumented code is slow.
const FEWER: (&str, &str) = ("DELTANET_TEST_CASES", "60");

fn address() -> Result<()> {
    let build = Build { name: "address", std: false };
    // Some tests ask for more memory than there is, others make devices that stay.
    const REFUSE: (&str, &str) = ("ASAN_OPTIONS", "allocator_may_return_null=1:detect_leaks=0");
    let mut tests = build.cargo("test");
    run(tests.args(["-p", "deltanet", "--lib", "--test", "oracle", "--test", "extremes"]).envs([FEWER, REFUSE]))?;
    let library = build.library()?;
    run(&mut Command::new(build.program("bad_input", &library)?))?;
    let load = build.program("load", &library)?;
    for arguments in [&["threads", "16", "3"][..], &["cycles", "500"], &["fork", "3"], &["affinity"]] {
        run(Command::new(&load).args(arguments))?;
    }
    Ok(())
}

fn thread() -> Result<()> {
    let build = Build { name: "thread", std: true };
    let library = build.library()?;
    let load = build.program("load", &library)?;
    for arguments in [&["threads", "16", "5"][..], &["cycles", "300"]] {
        run(Command::new(&load).args(arguments).env("TSAN_OPTIONS", "halt_on_error=1"))?;
    }
    Ok(())
}

/// A build with a sanitizer of its own target folder.
struct Build {
    name: &'static str,
    /// Whether the standard library needs to be instrumented too.
    std: bool,
}

impl Build {
    fn target(&self) -> PathBuf {
        workspace().join("target/sanitize").join(self.name)
    }

    fn cargo(&self, task: &str) -> Command {
        let mut cargo = nightly::cargo();
        cargo.arg(task).args(["--target", TARGET, "--target-dir"]).arg(self.target());
        cargo.args(["--no-default-features"]).env("RUSTFLAGS", format!("-Zsanitizer={}", self.name));
        // Instrumented kernels take most of the time to compile.
        cargo.env("CARGO_PROFILE_DEV_OPT_LEVEL", "1");
        if self.std {
            cargo.arg("-Zbuild-std");
        }
        cargo
    }

    /// The static library: a program then brings the one runtime that both need.
    fn library(&self) -> Result<PathBuf> {
        run(self.cargo("build").args(["-p", "deltanet", "--lib"]))?;
        Ok(self.target().join(TARGET).join("debug/libdeltanet.a"))
    }

    /// A C program of tests/c, instrumented and linked with the library.
    fn program(&self, name: &str, library: &PathBuf) -> Result<PathBuf> {
        let program = self.target().join(name);
        let object = program.with_extension("o");
        let mut cc = Command::new("cc");
        cc.args(["-std=c11", "-O1", "-g", "-DWITHOUT_FAULTS", "-c"]).arg(format!("-fsanitize={}", self.name));
        cc.arg("-I").arg(workspace().join("include")).arg(workspace().join("tests/c").join(format!("{name}.c")));
        run(cc.arg("-o").arg(&object))?;
        // With the compiler's own runtime, which has what its code calls; the C compiler's may be older.
        let runtimes = nightly::llvm_tools()?.join("../lib");
        let short = if self.name == "thread" { "tsan" } else { "asan" };
        let mut link = Command::new("cc");
        link.arg("-o").arg(&program).arg(&object).arg(library).args(["-rdynamic", "-Wl,--whole-archive"]);
        link.arg(runtimes.join(format!("librustc-nightly_rt.{short}.a"))).arg("-Wl,--no-whole-archive");
        run(link.args(["-lpthread", "-lm", "-ldl", "-lrt", "-lgcc_s"]))?;
        Ok(program)
    }
}

fn valgrind() -> Result<()> {
    run(crate::command::cargo().args(["build", "--release", "-p", "deltanet", "--lib"]))?;
    let release = crate::command::release();
    for (name, arguments) in [
        ("bad_input", &[][..]),
        ("load", &["threads", "8", "5"]),
        ("load", &["cycles", "100"]),
        ("load", &["fork", "2"]),
    ] {
        let program = release.join(format!("valgrind_{name}"));
        let mut cc = Command::new("cc");
        cc.args(["-std=c11", "-O1", "-g", "-DWITHOUT_FAULTS", "-I"]).arg(workspace().join("include"));
        cc.arg(workspace().join("tests/c").join(format!("{name}.c"))).arg("-o").arg(&program);
        cc.arg(release.join("libdeltanet.a")).args(["-lpthread", "-lm", "-ldl"]);
        run(&mut cc)?;
        let mut memcheck = Command::new("valgrind");
        memcheck.args(["--quiet", "--error-exitcode=99", "--fair-sched=yes"]);
        run(memcheck.arg(&program).args(arguments))?;
    }
    Ok(())
}

fn miri() -> Result<()> {
    let miri = |borrows: &str| {
        let mut miri = nightly::cargo();
        miri.args(["miri", "test", "--target-dir"]).arg(workspace().join("target/sanitize/miri"));
        miri.args(["-p", "deltanet", "--no-default-features"]);
        // The clock and the environment; pointers that were numbers; the same bits for the same sums.
        let flags = "-Zmiri-disable-isolation -Zmiri-permissive-provenance -Zmiri-deterministic-floats";
        miri.env("MIRIFLAGS", format!("{flags} {borrows}"));
        miri
    };
    // The thread pool's queues (crossbeam-epoch) break the older of Miri's two models of borrowing. The newer one takes
    // several times as long, and more the later it forgets borrows that are over. A pool's threads stay to the end.
    const NEWER: &str = "-Zmiri-tree-borrows -Zmiri-provenance-gc=1000 -Zmiri-ignore-leaks";
    run(miri(NEWER).args(["--lib", "--", "error", "capi::tests"]))?;
    // An interpreter uses one core: two of them at a time.
    std::thread::scope(|scope| {
        let chunks = scope.spawn(|| run(miri("").args(["--test", "interpreted", "--", "chunks", "interface"])));
        run(miri("").args(["--test", "interpreted", "--", "few"]))?;
        run(miri(NEWER).args(["--test", "interpreted", "--", "pool"]))?;
        chunks.join().expect("it returns its errors")
    })
}
