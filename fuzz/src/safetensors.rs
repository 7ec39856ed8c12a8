//! Files given to the command: any bytes are a golden case that runs, or are refused with words; nothing else.

use crate::golden::Case;
use deltanet::cpu::{self, Isa};
use deltanet::{Plan, Problem};

use std::path::Path;

/// The property. Panics where it does not hold.
pub fn check(data: &[u8]) {
    // What `deltanet check` does with a file's bytes.
    let Ok(mut case) = Case::parse(Path::new("fuzzed.safetensors"), data) else { return };
    let params = case.params();
    // SAFETY: params has no index tensors.
    let Ok(problem) = (unsafe { Problem::new(&params) }) else { return };
    let plan = Plan::new(&problem, Isa::detected()).expect("the instruction set is there");
    // SAFETY: the case owns the memory that its params describe, and nobody else has it.
    unsafe { cpu::run(&problem, &plan, 1) }.expect("a valid problem runs");
    let _ = case.nmse();
}
