//! How many instructions the AVX2 kernels take for a token of a head, counted by callgrind: a regression check that no
//! busy machine can fool. A number that grew means a slower kernel, or a reason to raise the bound in the same commit.
#![cfg(all(target_arch = "x86_64", target_os = "linux"))]

#[path = "support/library.rs"]
mod library;

use deltanet::cpu::{self, Isa};
use deltanet::params::StateLayout;
use deltanet::{Dtype, Params, Plan, Problem, Tensor};
use library::has;
use std::mem::MaybeUninit;
use std::process::Command;

/// A problem, and the most instructions that one of its tokens may take for one of its heads.
struct Case {
    name: &'static str,
    tokens: usize,
    layout: StateLayout,
    channel_gate: bool,
    most: usize,
}

const S: usize = 128;
const KEY_HEADS: usize = 1;
const VALUE_HEADS: usize = 2;

/// For scale: the token-serial form is 4 S^2 FMAs, 8192 instructions of 8 lanes. Bounds are 7% over what was counted.
const CASES: [Case; 8] = [
    Case { name: "prompt", tokens: 96, layout: StateLayout::KeyContiguous, channel_gate: false, most: 16_000 },
    Case { name: "short-prompt", tokens: 16, layout: StateLayout::KeyContiguous, channel_gate: false, most: 17_900 },
    Case { name: "token-rows", tokens: 1, layout: StateLayout::KeyContiguous, channel_gate: false, most: 23_200 },
    Case { name: "token-columns", tokens: 1, layout: StateLayout::ValueContiguous, channel_gate: false, most: 23_800 },
    Case { name: "window-rows", tokens: 4, layout: StateLayout::KeyContiguous, channel_gate: false, most: 16_900 },
    Case { name: "window-columns", tokens: 4, layout: StateLayout::ValueContiguous, channel_gate: false, most: 21_000 },
    Case {
        name: "channel-gate-token",
        tokens: 1,
        layout: StateLayout::KeyContiguous,
        channel_gate: true,
        most: 24_000,
    },
    Case {
        name: "channel-gate-prompt",
        tokens: 64,
        layout: StateLayout::KeyContiguous,
        channel_gate: true,
        most: 18_300,
    },
];

/// The case that this process is to run under callgrind, if it was started for that.
const WORKER: &str = "DELTANET_COUNTED_CASE";

/// Runs a case once, on this thread.
fn run(case: &Case) {
    let gates = if case.channel_gate { S } else { 1 };
    let floats = |n: usize, value: f32| vec![value; n];
    let (rows, values) = (KEY_HEADS * case.tokens, VALUE_HEADS * case.tokens);
    let (q, k, v) = (floats(rows * S, 0.08), floats(rows * S, 0.09), floats(values * S, 0.5));
    let (g, beta) = (floats(values * gates, -0.1), floats(values, 0.5));
    let state = floats(VALUE_HEADS * S * S, 0.1);
    let (mut out, mut state_out) = (floats(values * S, f32::NAN), floats(state.len(), f32::NAN));
    let tensor =
        |data: *const f32, ne: [usize; 4]| Tensor::dense(data.cast_mut().cast(), Dtype::F32, ne.map(|n| n as i64));
    let params = Params {
        state_layout: case.layout as u32,
        q: tensor(q.as_ptr(), [S, KEY_HEADS, case.tokens, 1]),
        k: tensor(k.as_ptr(), [S, KEY_HEADS, case.tokens, 1]),
        v: tensor(v.as_ptr(), [S, VALUE_HEADS, case.tokens, 1]),
        g: tensor(g.as_ptr(), [gates, VALUE_HEADS, case.tokens, 1]),
        beta: tensor(beta.as_ptr(), [1, VALUE_HEADS, case.tokens, 1]),
        out: tensor(out.as_mut_ptr(), [S, VALUE_HEADS, case.tokens, 1]),
        state_in: tensor(state.as_ptr(), [S, S, VALUE_HEADS, 1]),
        state_out: tensor(state_out.as_mut_ptr(), [S, S, VALUE_HEADS, 1]),
        ..Params::default()
    };
    // SAFETY: there are no index tensors.
    let problem = unsafe { Problem::new(&params) }.expect("a valid problem");
    let plan = Plan::new(&problem, Isa::Avx2).expect("the caller looked");
    let mut scratch = vec![MaybeUninit::new(0u8); plan.scratch_size()];
    // SAFETY: the vectors are as large as described, and this function's own.
    unsafe { cpu::run_part(&problem, &plan, 0, 1, &mut scratch) }.expect("a valid part");
    assert!(out.iter().chain(&state_out).all(|x| x.is_finite()), "{}: not everything was written", case.name);
}

/// Instructions that callgrind sees inside the kernels while this binary runs `case`.
fn count(case: &Case) -> usize {
    let program = std::env::current_exe().expect("a test knows its own path");
    let output = Command::new("valgrind")
        .args(["--tool=callgrind", "--callgrind-out-file=/dev/null", "--toggle-collect=*deltanet_f32_*"])
        .arg(program)
        .args(["--exact", "kernels_take_no_more_instructions", "--nocapture", "--test-threads=1"])
        .env(WORKER, case.name)
        .output()
        .expect("valgrind was started before");
    let text = String::from_utf8_lossy(&output.stderr).into_owned() + &String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{}: {text}", case.name);
    let number = text.lines().find_map(|line| line.split_once("Collected :")?.1.trim().parse().ok());
    number.unwrap_or_else(|| panic!("callgrind did not say what it collected: {text}"))
}

#[test]
fn kernels_take_no_more_instructions() {
    if let Ok(name) = std::env::var(WORKER) {
        return run(CASES.iter().find(|case| case.name == name).expect("one of the cases"));
    }
    if !has("valgrind") || !Isa::Avx2.is_available() {
        println!("SKIPPED: there is no valgrind, or no AVX2");
        return;
    }
    if cfg!(debug_assertions) {
        println!("SKIPPED: the bounds are those of a release build");
        return;
    }
    let mut grown = Vec::new();
    for case in &CASES {
        let each = count(case) / (case.tokens * VALUE_HEADS);
        println!("{}: {each} instructions a token and head, at most {}", case.name, case.most);
        // Two thirds of the token-serial form's FMAs are needed whatever the algorithm: less was not counted.
        assert!(each > 4 * S * S / 8 * 2 / 3, "{}: {each} instructions cannot be all", case.name);
        if each > case.most {
            grown.push(format!("{}: {each} instructions a token and head; at most {}", case.name, case.most));
        }
    }
    assert!(grown.is_empty(), "{grown:#?}");
}
