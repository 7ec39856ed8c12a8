//! The shared library exports what the header and the plugin interfaces promise, and needs no engine and no driver.
#![cfg(target_os = "linux")]

#[path = "support/library.rs"]
mod library;

use library::{has, output, root};
use std::collections::BTreeSet;
use std::process::Command;

/// Symbols that hosts look up by name: llama.cpp's plugin loader, and ik_llama.cpp's call that we take over.
const PLUGIN: [&str; 3] = ["ggml_backend_init", "ggml_backend_score", "iqk_fused_delta_net"];

/// The functions that the header declares: names before a parenthesis, comments and macros left out.
fn promised() -> BTreeSet<String> {
    let header = std::fs::read_to_string(root().join("include/deltanet.h")).expect("the header is there");
    let code = header.lines().filter(|line| !line.trim_start().starts_with("//") && !line.starts_with('#'));
    let mut in_comment = false;
    let mut functions = BTreeSet::new();
    for line in code {
        in_comment |= line.trim_start().starts_with("/*");
        if !in_comment && let Some((before, _)) = line.split_once('(') {
            let name = before.rsplit(|c: char| !c.is_ascii_alphanumeric() && c != '_').next().unwrap_or_default();
            // A pointer to a function has no name before its parenthesis.
            if !name.is_empty() {
                functions.insert(name.to_owned());
            }
        }
        in_comment &= !line.contains("*/");
    }
    assert!(
        functions.contains("deltanet_run") && functions.iter().all(|name| name.starts_with("deltanet_")),
        "{functions:?}"
    );
    functions
}

/// The first columns but the last, and the names without versions, of what `nm` lists.
fn dynamic_symbols(option: &str) -> Option<BTreeSet<String>> {
    if !has("nm") {
        println!("SKIPPED: there is no nm");
        return None;
    }
    let listing = output(Command::new("nm").args(["-D", option]).arg(library::path()));
    let names = listing.lines().filter_map(|line| line.split_whitespace().last());
    Some(names.map(|name| name.split('@').next().unwrap_or(name).to_owned()).collect())
}

#[test]
fn exports_are_what_is_promised() {
    let Some(exported) = dynamic_symbols("--defined-only") else { return };
    let promised = promised();
    let missing: Vec<_> = promised.difference(&exported).collect();
    assert!(missing.is_empty(), "the header declares {missing:?}, the library lacks them");
    let extra: Vec<_> = exported.difference(&promised).filter(|name| !PLUGIN.contains(&name.as_str())).collect();
    assert!(extra.is_empty(), "the library exports {extra:?}, which nobody promises");
}

#[test]
fn imports_are_the_systems_alone() {
    let Some(imported) = dynamic_symbols("--undefined-only") else { return };
    // CUDA and ggml are found at run time: an import would keep the library from loading where they are not.
    let foreign: Vec<_> = imported
        .iter()
        .filter(|name| {
            let name = name.trim_start_matches('_');
            ["cu", "nv", "ggml", "gguf", "llama", "iqk", "omp_", "GOMP"].iter().any(|start| name.starts_with(start))
        })
        .collect();
    assert!(foreign.is_empty(), "the library needs {foreign:?}");
    if !has("readelf") {
        println!("SKIPPED: there is no readelf");
        return;
    }
    let dynamic = output(Command::new("readelf").args(["-d", "-W"]).arg(library::path()));
    let needed = dynamic.lines().filter(|line| line.contains("(NEEDED)"));
    let needed: Vec<&str> = needed.filter_map(|line| line.split(['[', ']']).nth(1)).collect();
    let system = ["libc.so", "libm.so", "libgcc_s.so", "libpthread.so", "libdl.so", "ld-linux"];
    assert!(needed.iter().any(|name| name.starts_with("libc.so")), "{dynamic}");
    let foreign: Vec<_> = needed.iter().filter(|name| !system.iter().any(|start| name.starts_with(start))).collect();
    assert!(foreign.is_empty(), "the library needs {foreign:?}");
}
