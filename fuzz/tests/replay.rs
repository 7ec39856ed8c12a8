//! Every input that once broke a property, the seeds, and some fresh random inputs, with any compiler.

use deltanet_fuzz::bytes::Rng;
use std::path::{Path, PathBuf};

fn kept(target: &str) -> Vec<PathBuf> {
    let folders = ["seeds", "regressions"].map(|kind| Path::new(env!("CARGO_MANIFEST_DIR")).join(kind).join(target));
    let mut files: Vec<PathBuf> = folders
        .iter()
        .flat_map(|folder| std::fs::read_dir(folder).into_iter().flatten())
        .map(|entry| entry.expect("the folder is readable").path())
        .collect();
    files.sort();
    files
}

fn replay(target: &str, property: fn(&[u8])) {
    for file in kept(target) {
        // A guard page ends the process without a word: the last line printed tells the file.
        println!("{}", file.display());
        property(&std::fs::read(&file).expect("the file is readable"));
    }
}

/// Random bytes, as a fuzzer starts with.
fn fresh(property: fn(&[u8]), count: usize) {
    let fresh = || std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_nanos() as u64;
    let seed = std::env::var("DELTANET_TEST_SEED").ok().and_then(|s| s.parse().ok()).unwrap_or_else(fresh);
    println!("DELTANET_TEST_SEED={seed}");
    let mut rng = Rng(seed);
    for _ in 0..count {
        let length = rng.bits() as usize % 160;
        let data: Vec<u8> = (0..length).map(|_| rng.bits() as u8).collect();
        property(&data);
    }
}

/// One test, because the targets share one arena.
#[test]
fn properties_of_memory() {
    replay("capi", deltanet_fuzz::capi::check);
    fresh(deltanet_fuzz::capi::check, 2000);
    replay("ggml", deltanet_fuzz::ggml::check);
    fresh(deltanet_fuzz::ggml::check, 2000);
}

#[test]
fn safetensors() {
    replay("safetensors", deltanet_fuzz::safetensors::check);
}
