//! A few small problems for an interpreter that checks every access (`cargo xtask sanitize miri`); seconds without one.
//!
//! Strided and 16-bit tensors, state rows, snapshots, ragged batches, both kernels, parts and a pool, refused calls.

mod support;

use deltanet::cpu::{self, Isa};
use deltanet::{Params, Plan, Problem, Status, deltanet_run, deltanet_run_part, deltanet_supports, reference};
use std::mem::MaybeUninit;
use support::{Case, Rng, Wish};

/// Fixed, so that the interpreter's minutes always go to the same problems; oracle.rs draws fresh ones.
const SEED: u64 = 11;

#[test]
fn parts_and_pools_stay_inside() {
    let mut rng = Rng(SEED);
    for tokens in [0, 1, 3, 18] {
        let mut case = Case::draw(&mut rng, Wish { tokens: Some(tokens), head_size: Some(16), ..Wish::default() });
        let problem = case.problem();
        let plan = Plan::new(&problem, Isa::Scalar).expect("scalar code runs anywhere");
        let before = case.memory();
        // SAFETY: the case owns all memory that its params describe.
        let expected = unsafe { reference::evaluate(&problem) };
        // SAFETY: as above.
        unsafe { cpu::run(&problem, &plan, 2) }.expect("a valid problem runs");
        // SAFETY: as above.
        let nmse = unsafe { reference::compare(&problem, &expected) };
        assert!(nmse.state <= 1e-9 && nmse.out <= 1e-5, "{nmse:?}: {}", case.words);
        let pooled = case.memory();
        case.assert_intact(&before);
        case.restore(&before);
        let mut scratch = vec![MaybeUninit::new(0xffu8); plan.scratch_size() + 1];
        for ith in 0..3 {
            // SAFETY: as above; the parts run one after the other.
            unsafe { cpu::run_part(&problem, &plan, ith, 3, &mut scratch[1..]) }.expect("a valid part runs");
        }
        assert!(pooled == case.memory(), "parts and pool differ: {}", case.words);
    }
}

#[test]
fn the_c_interface_refuses_and_runs() {
    let case = Case::draw(&mut Rng(SEED), Wish { tokens: Some(2), head_size: Some(16), ..Wish::default() });
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
