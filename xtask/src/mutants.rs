//! `cargo xtask mutants`: whether the tests notice when a rule of the validator or a choice of the plan is changed.
//!
//! cargo-mutants changes one operator, value or arm at a time. It does not look into macros, where most rules are
//! (`ensure!`), so that it works on a copy of the tree in which they are written out.

use crate::command::{output, workspace};
use crate::nightly;
use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

const CARGO_MUTANTS: &str = "27.1.0";

/// What is changed.
const FILES: &[&str] = &["src/problem.rs", "src/plan.rs"];

/// Mutants that change no verdict and no answer, as they are named, each as often as it may survive.
const EQUIVALENT: &[(&str, &str)] = &[
    // How long chunks and blocks of them are is a question of speed.
    ("src/plan.rs", "replace Plan::chunk_for -> usize with 1"),
    ("src/plan.rs", "replace Plan::block_chunks -> usize with 1"),
    ("src/plan.rs", "delete match arm Isa::Avx512 in Plan::block_chunks"),
    // The check that comes after these shortcuts says the same, only later.
    ("src/problem.rs", "replace || with && in Problem::check_indices"),
    ("src/problem.rs", "replace || with && in Problem::check_indices"),
    ("src/problem.rs", "replace - with / in Problem::check_indices"),
    // Falling rows are as distinct as rising ones.
    ("src/problem.rs", "replace < with > in Problem::check_indices"),
];

/// Which mutants, and which tests.
#[derive(Args)]
pub struct Options {
    /// A part of all mutants, such as 0/4.
    #[arg(long)]
    shard: Option<String>,
    /// Leave out what an earlier run on the same tree caught.
    #[arg(long)]
    iterate: bool,
    /// Only make the tree in which the mutants are tried.
    #[arg(long)]
    prepare: bool,
    /// Test binaries.
    #[arg(default_values = ["validation", "rows", "places"])]
    tests: Vec<String>,
}

/// Makes the copy and runs cargo-mutants in it; a survivor fails.
pub fn mutants(options: &Options) -> Result<()> {
    let cargo_mutants = nightly::tool("cargo-mutants", CARGO_MUTANTS)?;
    let copy = copy(&options.tests)?;
    if options.prepare {
        println!("{}", copy.display());
        return Ok(());
    }
    let mut command = Command::new(cargo_mutants);
    command.current_dir(&copy).args(["mutants", "--in-place", "--no-shuffle", "--package", "deltanet"]);
    command.args(["--no-default-features", "--baseline=skip", "--timeout=60", "--build-timeout=600", "--output"]);
    command.arg(workspace().join("target/mutants")).args(FILES.iter().flat_map(|file| ["--file", file]));
    command.args(options.shard.iter().flat_map(|shard| ["--shard", shard]));
    if options.iterate {
        command.arg("--iterate");
    }
    command.arg("--").args(options.tests.iter().flat_map(|test| ["--test", test]));
    // Kernels are built and hardly run: compiling them is what takes the time.
    command.env("CARGO_PROFILE_DEV_OPT_LEVEL", "0").env("CARGO_PROFILE_DEV_DEBUG", "0");
    command.env("DELTANET_TEST_CASES", "60").env_remove("CARGO").env_remove("CARGO_TARGET_DIR");
    // Survivors, or only mutants that made a test hang, which is noticing them; where both are, the latter.
    const SOME_SURVIVED: i32 = 2;
    const SOME_HUNG: i32 = 3;
    match command.status().with_context(|| format!("{command:?} could not be started"))?.code() {
        Some(0 | SOME_SURVIVED | SOME_HUNG) => (),
        _ => bail!("{command:?} failed"),
    }
    let list = workspace().join("target/mutants/mutants.out/missed.txt");
    let missed = fs::read_to_string(&list).with_context(|| format!("{} cannot be read", list.display()))?;
    let unexpected = unexpected(&missed);
    println!("{} mutants survive, {} of them unexpected", missed.lines().count(), unexpected.len());
    ensure!(unexpected.is_empty(), "these change something that no test notices:\n{}", unexpected.join("\n"));
    Ok(())
}

/// The survivors that are not known to be equivalent; lines such as "src/plan.rs:57:9: replace ...".
fn unexpected(missed: &str) -> Vec<&str> {
    let mut known = EQUIVALENT.to_vec();
    let is_unknown = |line: &&str| {
        let file = line.split(':').next().unwrap_or_default();
        let what = line.split_once(": ").map_or(*line, |(_, what)| what);
        known.iter().position(|known| *known == (file, what)).map(|at| known.swap_remove(at)).is_none()
    };
    missed.lines().filter(is_unknown).collect()
}

/// The tracked files as they are, without `ensure!` in the files of interest, and without tests that are not to run.
fn copy(tests: &[String]) -> Result<PathBuf> {
    let copy = workspace().join("target/mutants/tree");
    for file in output(Command::new("git").arg("ls-files").current_dir(workspace()))?.lines() {
        let (from, to) = (workspace().join(file), copy.join(file));
        let test = file.strip_prefix("tests/").and_then(|file| file.strip_suffix(".rs"));
        if test.is_some_and(|test| !test.contains('/') && tests.iter().all(|wanted| wanted != test)) {
            let _ = fs::remove_file(&to);
            continue;
        }
        let Ok(mut content) = fs::read(&from) else { continue };
        if FILES.contains(&file) {
            let source = without_cuda(&String::from_utf8(content)?).context("a function does not end")?;
            content = written_out(&source).with_context(|| file.to_owned())?.into_bytes();
        }
        if file == "Cargo.toml" {
            // The tests need no shared library, and linking it takes as long as compiling.
            let manifest = String::from_utf8(content)?;
            content = manifest.replace(r#"["cdylib", "staticlib", "rlib"]"#, r#"["rlib"]"#).into_bytes();
        }
        // What has not changed keeps its time, so that cargo need not build it anew.
        if fs::read(&to).ok().as_ref() != Some(&content) {
            fs::create_dir_all(to.parent().unwrap_or(Path::new(".")))?;
            fs::write(&to, content)?;
        }
    }
    Ok(copy)
}

/// Empty lines for the functions that only CUDA calls: this build leaves them out, and no test could tell.
fn without_cuda(source: &str) -> Option<String> {
    const ATTRIBUTE: &str = "#[cfg(feature = \"cuda\")]";
    let (mut kept, mut rest) = (String::new(), source);
    while let Some((before, function)) = rest.split_once(ATTRIBUTE) {
        let body = function.find('{')? + 1;
        let (_, end) = arguments(&function[body..])?;
        let (function, after) = function.split_at(body + end + 1);
        kept += before;
        kept.extend(function.chars().filter(|letter| *letter == '\n'));
        rest = after;
    }
    Some(kept + rest)
}

/// `ensure!(rule, Status, words)` becomes `if !(rule) { return Err(...) }`.
fn written_out(source: &str) -> Result<String> {
    const MACRO: &str = "ensure!(";
    let (mut done, mut rest) = (String::new(), source);
    while let Some(at) = rest.find(MACRO) {
        let (before, call) = rest.split_at(at);
        let call = &call[MACRO.len()..];
        let (commas, end) = arguments(call).context("an ensure! does not end")?;
        let [first, second, ..] = commas[..] else { bail!("an ensure! has too few arguments") };
        let (rule, status, words) = (&call[..first], call[first + 1..second].trim(), &call[second + 1..end]);
        done += before;
        done += &format!(
            "if !({rule}) {{ return Err(crate::error::Error::compose(crate::error::Status::{status}, format_args!({words}))); }}"
        );
        rest = call[end + 1..].strip_prefix(';').unwrap_or(&call[end + 1..]);
    }
    Ok((done + rest)
        .replace("use crate::error::{Error, Result, Status, ensure};", "use crate::error::{Error, Result, Status};")
        .replace("use crate::error::{Result, ensure};", "use crate::error::Result;"))
}

/// Where the commas between a call's arguments are, and its closing parenthesis, or a block's brace.
fn arguments(call: &str) -> Option<(Vec<usize>, usize)> {
    let (mut depth, mut in_words, mut escaped, mut commas) = (0, false, false, Vec::new());
    for (at, byte) in call.bytes().enumerate() {
        match byte {
            _ if escaped => escaped = false,
            b'\\' => escaped = true,
            b'"' => in_words = !in_words,
            _ if in_words => (),
            b'(' | b'[' | b'{' => depth += 1,
            b')' | b'}' if depth == 0 => return Some((commas, at)),
            b')' | b']' | b'}' => depth -= 1,
            b',' if depth == 0 => commas.push(at),
            _ => (),
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::{unexpected, without_cuda, written_out};

    #[test]
    fn functions_of_cuda_are_left_out() {
        let source = "a;\n#[cfg(feature = \"cuda\")]\nfn f() -> [u8; 2] {\n    if b { c } else { d }\n}\ne";
        assert_eq!(without_cuda(source).as_deref(), Some("a;\n\n\n\n\ne"));
        assert_eq!(without_cuda("#[cfg(feature = \"cuda\")] fn f() {"), None);
    }

    #[test]
    fn survivors_are_known_as_often_as_they_are_listed() {
        let shortcut = "src/problem.rs:413:63: replace || with && in Problem::check_indices\n";
        assert!(unexpected(&shortcut.repeat(2)).is_empty());
        assert_eq!(unexpected(&shortcut.repeat(3)).len(), 1);
        let rule = "src/problem.rs:4:3: replace < with <= in Problem::check_indices";
        assert_eq!(unexpected(&format!("{shortcut}{rule}\n")), [rule]);
    }

    #[test]
    fn rules_are_written_out() {
        let written = written_out("a;\nensure!(f(1, 2) < 3, Shape, \"{x}, ) {}\", y[0]);\nb").expect("it ends");
        assert_eq!(
            written,
            "a;\nif !(f(1, 2) < 3) { return Err(crate::error::Error::compose(crate::error::Status::Shape, \
             format_args!( \"{x}, ) {}\", y[0]))); }\nb"
        );
        assert!(written_out("ensure!(true, Shape").is_err());
    }
}
