//! The golden cases that the project ships: answers of other people's code, from every kernel and thread count.

use deltanet::cpu::{self, Isa};
use deltanet::{Plan, Problem};
use deltanet_cli::golden::Case;
use std::path::{Path, PathBuf};

/// As strict as the command's documented check.
const TOLERANCE: f64 = 1e-10;

fn files() -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/data");
    let entries = std::fs::read_dir(folder).expect("tests/data is there");
    let mut files: Vec<PathBuf> = entries.map(|entry| entry.expect("a readable folder").path()).collect();
    files.retain(|path| path.extension().is_some_and(|extension| extension == "safetensors"));
    files.sort();
    assert!(files.len() >= 5, "{files:?}");
    files
}

#[test]
fn golden_cases_match_on_every_instruction_set_and_thread_count() {
    for path in files() {
        let mut case = Case::load(&path).unwrap_or_else(|error| panic!("{error:#}"));
        for isa in Isa::ALL {
            if !isa.is_available() {
                println!("SKIPPED: this CPU has no {}", isa.name());
                continue;
            }
            for threads in [1, 7] {
                let params = case.params();
                // SAFETY: the case owns all memory that its params describe, and is not touched until it has run.
                unsafe {
                    let problem = Problem::new(&params).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
                    let plan = Plan::new(&problem, isa).expect("the instruction set is there");
                    cpu::run(&problem, &plan, threads).expect("a valid problem runs");
                }
                let nmse = case.nmse();
                let (name, isa) = (case.name(), isa.name());
                println!("{name} {isa} {threads} threads: out {:.2e}, state {:.2e}", nmse.out, nmse.state);
                assert!(
                    nmse.out <= TOLERANCE && nmse.state <= TOLERANCE,
                    "{name} on {isa} with {threads} threads: {nmse:?}"
                );
            }
        }
    }
}

#[test]
fn a_wrong_option_does_not_match() {
    let path = files().into_iter().find(|path| path.ends_with("hf_s128_t70.safetensors")).expect("the case is shipped");
    let mut case = Case::load(&path).unwrap_or_else(|error| panic!("{error:#}"));
    let params = case.params();
    let wrong = [
        deltanet::Params { head_map: 1 - params.head_map, ..params },
        deltanet::Params { state_layout: 1 - params.state_layout, ..params },
        deltanet::Params { qk_norm: 0, ..params },
        deltanet::Params { beta_kind: 1, ..params },
        deltanet::Params { scale: 1.0, ..params },
    ];
    for (at, params) in wrong.iter().enumerate() {
        // SAFETY: as above.
        unsafe {
            let problem = Problem::new(params).expect("valid, though not what the case says");
            let plan = Plan::new(&problem, Isa::Scalar).expect("scalar is everywhere");
            cpu::run(&problem, &plan, 1).expect("a valid problem runs");
        }
        let nmse = case.nmse();
        assert!(nmse.out > 1e-6, "option {at} made no difference: {nmse:?}");
    }
}
