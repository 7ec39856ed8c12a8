//! What the compiler made of the kernels: wide fused multiply-adds, in the registers that each instruction set promises.
#![cfg(all(target_arch = "x86_64", target_os = "linux"))]

#[path = "support/library.rs"]
mod library;

use library::{has, output};
use std::collections::BTreeMap;
use std::process::Command;

/// What one kernel's code uses.
#[derive(Debug, Default)]
struct Use {
    /// Packed single-precision FMA on these registers.
    zmm_fma: usize,
    ymm_fma: usize,
    /// Any instruction on these registers.
    zmm: usize,
    ymm: usize,
    instructions: usize,
}

/// The kernel that a mangled symbol belongs to: `deltanet_DTYPE_ALGORITHM_ISA`, as the table of kernels names them.
/// Closures and copies of a kernel have its name in theirs and count with it.
fn kernel(symbol: &str) -> Option<String> {
    let start = symbol.find("deltanet_")?;
    let words = &symbol[start..];
    let isas = ["scalar", "avx2", "avx512"];
    // The longest match: `avx512` also begins with what is left of shorter names, and mangling may append digits.
    let end = isas.iter().filter_map(|isa| words.find(&format!("_{isa}")).map(|at| at + 1 + isa.len())).max()?;
    let name = &words[..end];
    name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_').then(|| name.to_owned())
}

/// Every kernel of the library with what its instructions use.
fn kernels() -> Option<BTreeMap<String, Use>> {
    if !has("objdump") {
        println!("SKIPPED: there is no objdump");
        return None;
    }
    let listing = output(Command::new("objdump").args(["-d", "--no-show-raw-insn"]).arg(library::path()));
    let mut kernels: BTreeMap<String, Use> = BTreeMap::new();
    let mut current = None;
    for line in listing.lines() {
        if let Some(symbol) = line.strip_suffix(">:") {
            current = kernel(symbol);
        } else if let (Some(name), Some((_, instruction))) = (&current, line.split_once(":\t")) {
            let (zmm, ymm) = (instruction.contains("%zmm"), instruction.contains("%ymm"));
            let operation = instruction.split_whitespace().next().unwrap_or_default();
            let fma = operation.starts_with("vfmadd") && operation.ends_with("ps");
            let found = kernels.entry(name.clone()).or_default();
            found.zmm_fma += usize::from(fma && zmm);
            found.ymm_fma += usize::from(fma && ymm && !zmm);
            found.zmm += usize::from(zmm);
            found.ymm += usize::from(ymm);
            found.instructions += 1;
        }
    }
    for (name, found) in &kernels {
        println!("{name}: {found:?}");
    }
    Some(kernels)
}

#[test]
fn kernels_use_their_instruction_sets() {
    let Some(kernels) = kernels() else { return };
    for (name, found) in &kernels {
        match name.rsplit('_').next() {
            Some("avx512") => assert!(found.zmm_fma > 0, "{name} has no FMA on zmm: {found:?}"),
            Some("avx2") => assert!(found.ymm_fma > 0 && found.zmm == 0, "{name} is not AVX2 with FMA: {found:?}"),
            // The baseline of the target, unless a build asks for more: it must run where the wider sets are not.
            _ if cfg!(target_feature = "avx") => {}
            _ => assert!(found.zmm == 0 && found.ymm == 0, "{name} is not scalar: {found:?}"),
        }
    }
}

#[test]
fn every_algorithm_has_every_instruction_set() {
    let Some(kernels) = kernels() else { return };
    let mut algorithms: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for (algorithm, isa) in kernels.keys().filter_map(|name| name.rsplit_once('_')) {
        algorithms.entry(algorithm).or_default().push(isa);
    }
    assert!(algorithms.contains_key("deltanet_f32_recurrent"), "{algorithms:?}");
    for (algorithm, isas) in algorithms {
        assert_eq!(isas, ["avx2", "avx512", "scalar"], "{algorithm}");
    }
}
