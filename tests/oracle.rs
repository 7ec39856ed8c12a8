//! Every kernel and option against the f64 oracle, on fresh random problems.

mod support;

use deltanet::cpu::{self, Isa};
use deltanet::{Plan, reference};
use std::mem::MaybeUninit;
use support::{Case, Rng, Wish, cases, seed};

/// Runs a case on one instruction set in several ways; all must agree to the bit and with the oracle.
fn check(case: &mut Case, isa: Isa, rng: &mut Rng) {
    let problem = case.problem();
    let plan = Plan::new(&problem, isa).expect("the instruction set is there");
    let before = case.memory();
    // SAFETY: the case owns all memory that its params describe.
    let expected = unsafe { reference::evaluate(&problem) };
    let threads = 1 + rng.below(7);
    // SAFETY: as above, and nobody else has the case.
    unsafe { cpu::run(&problem, &plan, threads) }.expect("a valid problem runs");
    // SAFETY: as above.
    let nmse = unsafe { reference::compare(&problem, &expected) };
    case.assert_near(&nmse, &expected, case.bound.min(1e-9), isa.name());
    case.assert_intact(&before);
    let pooled = case.memory();

    case.restore(&before);
    let nth = 1 + rng.below(5);
    // An odd address and stale NaN: scratch needs neither alignment nor zeros.
    let mut scratch = vec![MaybeUninit::new(0xffu8); plan.scratch_size() + 1];
    for ith in (0..nth).rev() {
        // SAFETY: as above; the parts run one after the other.
        unsafe { cpu::run_part(&problem, &plan, ith, nth, &mut scratch[1..]) }.expect("a valid part runs");
    }
    assert!(pooled == case.memory(), "{threads} threads and {nth} parts differ, {}: {}", isa.name(), case.words);
}

fn isas() -> Vec<Isa> {
    let (there, missing): (Vec<Isa>, Vec<Isa>) = Isa::ALL.into_iter().partition(|isa| isa.is_available());
    missing.iter().for_each(|isa| println!("SKIPPED: this CPU has no {}", isa.name()));
    there
}

#[test]
fn random_problems_match_the_oracle() {
    let mut rng = Rng(seed());
    let isas = isas();
    for at in 0..cases(2000) {
        let isa = isas[at % isas.len()];
        check(&mut Case::draw(&mut rng, Wish::default()), isa, &mut rng);
    }
}

#[test]
fn every_length_matches_the_oracle() {
    let mut rng = Rng(seed());
    for isa in isas() {
        for tokens in (0..=200).chain([211, 251, 257, 509]) {
            let head_size = Some(rng.pick(&[16, 32, 64]));
            let wish = Wish { tokens: Some(tokens), head_size, scalar_gate: true, ..Wish::default() };
            check(&mut Case::draw(&mut rng, wish), isa, &mut rng);
        }
    }
}

#[test]
fn instruction_sets_agree() {
    let mut rng = Rng(seed());
    for _ in 0..50 {
        let mut case = Case::draw(&mut rng, Wish { f32_only: true, ..Wish::default() });
        let problem = case.problem();
        let before = case.memory();
        for isa in isas() {
            case.restore(&before);
            let plan = Plan::new(&problem, isa).expect("the instruction set is there");
            // SAFETY: the case owns all memory that its params describe.
            let nmse = unsafe {
                let expected = reference::evaluate(&problem);
                cpu::run(&problem, &plan, 2).expect("a valid problem runs");
                reference::compare(&problem, &expected)
            };
            assert!(nmse.within(case.bound), "{nmse:?} {}: {}", isa.name(), case.words);
        }
    }
}
