//! A few small problems for an interpreter that checks every access (`cargo xtask sanitize miri`); seconds without one.
//!
//! Strided and 16-bit tensors, state rows, snapshots, ragged batches, both kernels, parts and a pool, refused calls.

mod support;

use deltanet::cpu::{self, Isa};
use deltanet::params::StateLayout;
use deltanet::{Params, Plan, Problem, Status, deltanet_run, deltanet_run_part, deltanet_supports, reference};
use std::mem::MaybeUninit;
use support::{Case, Rng, Wish};

/// Fixed, so that the interpreter's minutes always go to the same problems; oracle.rs draws fresh ones.
const SEED: u64 = 11;

/// Runs a few problems in parts that share a scratch of no alignment, and whole where that takes little time.
fn check(tokens: &[usize], layout: StateLayout, chunked: bool) {
    let mut rng = Rng(SEED);
    for tokens in tokens {
        let wish = Wish {
            tokens: Some(*tokens),
            head_size: Some(16),
            layout: Some(layout),
            scalar_gate: chunked,
            small: true,
            ..Wish::default()
        };
        let mut case = Case::draw(&mut rng, wish);
        println!("{}", case.words);
        let problem = case.problem();
        let plan = Plan::new(&problem, Isa::Scalar).expect("scalar code runs anywhere");
        assert_eq!(plan.is_chunked(&problem), chunked, "{}", case.words);
        let before = case.memory();
        // SAFETY: the case owns all memory that its params describe.
        let expected = unsafe { reference::evaluate(&problem) };
        let mut scratch = Vec::<u8>::with_capacity(plan.scratch_size() + 1);
        for ith in 0..2 {
            // SAFETY: as above; the parts run one after the other.
            unsafe { cpu::run_part(&problem, &plan, ith, 2, &mut scratch.spare_capacity_mut()[1..]) }
                .expect("a valid part runs");
        }
        // SAFETY: as above.
        let nmse = unsafe { reference::compare(&problem, &expected) };
        case.assert_near(&nmse, &expected, case.bound.min(1e-9), "scalar");
        case.assert_intact(&before);
        if chunked {
            continue;
        }
        let parts = case.memory();
        case.restore(&before);
        // SAFETY: as above.
        unsafe { cpu::run(&problem, &plan, 1) }.expect("a valid problem runs");
        assert!(parts == case.memory(), "parts and the whole differ: {}", case.words);
    }
}

#[test]
fn few_tokens_with_contiguous_keys_stay_inside() {
    check(&[0, 1, 3], StateLayout::KeyContiguous, false);
}

#[test]
fn few_tokens_with_contiguous_values_stay_inside() {
    check(&[0, 1, 3], StateLayout::ValueContiguous, false);
}

#[test]
fn chunks_with_contiguous_keys_stay_inside() {
    check(&[18], StateLayout::KeyContiguous, true);
}

#[test]
fn chunks_with_contiguous_values_stay_inside() {
    check(&[18], StateLayout::ValueContiguous, true);
}

#[test]
fn a_pool_shares_without_races() {
    let wish = Wish { tokens: Some(1), head_size: Some(16), small: true, ..Wish::default() };
    let mut case = Case::draw(&mut Rng(SEED), wish);
    let problem = case.problem();
    let plan = Plan::new(&problem, Isa::Scalar).expect("scalar code runs anywhere");
    assert!(plan.tasks() > 1, "one task needs no pool: {}", case.words);
    let before = case.memory();
    // SAFETY: the case owns all memory that its params describe.
    unsafe { cpu::run(&problem, &plan, 2) }.expect("a valid problem runs");
    let pooled = case.memory();
    case.restore(&before);
    // SAFETY: as above.
    unsafe { cpu::run(&problem, &plan, 1) }.expect("a valid problem runs");
    assert!(pooled == case.memory(), "a pool and one thread differ: {}", case.words);
}

#[test]
fn the_c_interface_refuses_and_runs() {
    let case =
        Case::draw(&mut Rng(SEED), Wish { tokens: Some(2), head_size: Some(16), small: true, ..Wish::default() });
    let params = &raw const case.params;
    let mut scratch = [MaybeUninit::<u8>::uninit(); 8];
    // SAFETY: the case owns all memory that its params describe.
    unsafe {
        assert_eq!(deltanet_supports(params), Status::Ok);
        assert_eq!(deltanet_run(params, 1), Status::Ok);
        assert_eq!(deltanet_run_part(params, 0, 1, scratch.as_mut_ptr().cast(), 8), Status::Scratch);
        assert_eq!(deltanet_supports(std::ptr::null()), Status::NullPointer);
        let short = Params { struct_size: 8, ..case.params };
        assert_eq!(deltanet_supports(&short), Status::StructSize);
        // A newer header's struct, with a field that this version does not know.
        let size = size_of::<Params>() + 8;
        let mut newer = vec![0u64; size / 8];
        newer.as_mut_ptr().cast::<Params>().write(Params { struct_size: size as u32, ..case.params });
        assert_eq!(deltanet_supports(newer.as_ptr().cast()), Status::Ok);
        *newer.last_mut().expect("not empty") = 1;
        assert_eq!(deltanet_supports(newer.as_ptr().cast()), Status::StructSize);
        assert!(Problem::new(&Params { qk_norm: 2, ..case.params }).is_err());
    }
}
