//! Every input that once broke a property, the seeds, and fresh inputs, with any compiler: some of them, or as many as
//! there are in `DELTANET_FUZZ_SECONDS` for each target.

use deltanet::cpu::{self, Isa};
use deltanet::{Plan, Problem};
use deltanet_fuzz::bytes::Rng;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

fn files(kind: &str, target: &str) -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join(kind).join(target);
    let mut files: Vec<PathBuf> = std::fs::read_dir(folder)
        .into_iter()
        .flatten()
        .map(|entry| entry.expect("the folder is readable").path())
        .collect();
    files.sort();
    files
}

fn read(file: &Path) -> Vec<u8> {
    std::fs::read(file).expect("the file is readable")
}

fn replay(target: &str, property: fn(&[u8])) {
    for file in ["seeds", "regressions"].iter().flat_map(|kind| files(kind, target)) {
        // A guard page ends the process without a word: the last line printed tells the file.
        println!("{}", file.display());
        property(&read(&file));
    }
}

/// Random bytes, as a fuzzer starts with, and seeds with a few changes.
fn fresh(target: &str, property: fn(&[u8]), count: usize) {
    let time = || std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_nanos() as u64;
    let number = |name: &str| std::env::var(name).ok().and_then(|number| number.parse().ok());
    let seed = number("DELTANET_TEST_SEED").unwrap_or_else(time);
    println!("{target}: DELTANET_TEST_SEED={seed}");
    let limit = number("DELTANET_FUZZ_SECONDS").map(Duration::from_secs);
    let seeds: Vec<Vec<u8>> = files("seeds", target).iter().map(|file| read(file)).collect();
    let mut rng = Rng(seed);
    let (start, mut done) = (Instant::now(), 0);
    while limit.map_or(done < count, |limit| start.elapsed() < limit) {
        let random = seeds.is_empty() || rng.bits().is_multiple_of(4);
        let length = rng.bits() as usize % 160;
        let mut data: Vec<u8> = match random {
            true => (0..length).map(|_| rng.bits() as u8).collect(),
            false => seeds[rng.bits() as usize % seeds.len()].clone(),
        };
        for _ in 0..if random { 0 } else { rng.bits() % 5 } {
            change(&mut data, &mut rng);
        }
        property(&data);
        done += 1;
    }
    println!("{target}: {done} fresh inputs in {:.1} s", start.elapsed().as_secs_f64());
}

/// One of the changes that fuzzers make. A file's header comes first, so that they are often near the beginning.
fn change(data: &mut Vec<u8>, rng: &mut Rng) {
    let range = if rng.bits().is_multiple_of(2) { data.len() } else { data.len().min(700) };
    let at = rng.bits() as usize % range.max(1);
    let bits = rng.bits();
    match rng.bits() % 6 {
        0 if at < data.len() => data[at] ^= 1 << (bits % 8),
        1 if at < data.len() => data[at] = bits as u8,
        // A digit of an extent or an offset.
        2 if data.get(at).is_some_and(u8::is_ascii_digit) => data[at] = b'0' + (bits % 10) as u8,
        3 => data.truncate(at),
        4 => data.insert(at.min(data.len()), bits as u8),
        5 if at < data.len() => drop(data.remove(at)),
        _ => data.extend(bits.to_le_bytes()),
    }
}

/// One test, because the targets share one arena.
#[test]
fn properties_of_memory() {
    replay("capi", deltanet_fuzz::capi::check);
    fresh("capi", deltanet_fuzz::capi::check, 2000);
    replay("ggml", deltanet_fuzz::ggml::check);
    fresh("ggml", deltanet_fuzz::ggml::check, 2000);
}

#[test]
fn safetensors() {
    replay("safetensors", deltanet_fuzz::safetensors::check);
    fresh("safetensors", deltanet_fuzz::safetensors::check, 20_000);
}

/// Changes to what is refused anyway would find little.
#[test]
fn the_files_to_start_from_are_golden_cases() {
    let seeds = files("seeds", "safetensors");
    assert!(!seeds.is_empty());
    for file in seeds {
        let mut case = deltanet_fuzz::golden::Case::load(&file).expect("a golden case");
        let params = case.params();
        // SAFETY: params has no index tensors.
        let problem = unsafe { Problem::new(&params) }.expect("a valid problem");
        let plan = Plan::new(&problem, Isa::detected()).expect("the instruction set is there");
        // SAFETY: the case owns the memory that its params describe, and nobody else has it.
        unsafe { cpu::run(&problem, &plan, 1) }.expect("a valid problem runs");
        let nmse = case.nmse();
        assert!(nmse.out <= 1e-10 && nmse.state <= 1e-10, "{}: {nmse:?}", file.display());
    }
}
