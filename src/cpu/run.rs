//! Running a plan: one part on the caller's thread, or all parts on a pool of ours.

use super::kernels;
use super::pool::{pool, processors};
use crate::error::{Error, Result, Status, ensure};
use crate::plan::{Plan, SCRATCH_ALIGN};
use crate::problem::Problem;
use std::mem::MaybeUninit;
use std::sync::{Mutex, PoisonError};

/// Largest number of threads or parts of one call.
pub const MAX_THREADS: usize = 1024;

/// Runs part `ith` of `nth` on this thread: no lock, no allocation, no other thread. All parts together, in any order
/// and on any threads, are the whole run; when all have returned, outputs and states are complete.
///
/// # Safety
/// The problem's tensors are as large as described, inputs are not written to and outputs not accessed by anyone but
/// the other parts of this run, and each part has scratch of its own.
pub unsafe fn run_part(
    problem: &Problem,
    plan: &Plan,
    ith: usize,
    nth: usize,
    scratch: &mut [MaybeUninit<u8>],
) -> Result<()> {
    ensure!((1..=MAX_THREADS).contains(&nth), Threads, "nth is {nth}; it must be from 1 to {MAX_THREADS}");
    ensure!(ith < nth, Threads, "ith is {ith}; it must be below nth, {nth}");
    let needed = plan.scratch_size();
    ensure!(scratch.len() >= needed, Scratch, "scratch_size is {}; it must be at least {needed}", scratch.len());
    let scratch = scratch.as_mut_ptr();
    let scratch = scratch.wrapping_add(scratch.align_offset(SCRATCH_ALIGN)).cast::<f32>();
    let kernel = kernels::recurrent(plan.isa());
    let s = problem.head_size();
    let (heads, blocks) = (problem.value_heads(), s.div_ceil(plan.columns()));
    let split = |part: usize| (plan.tasks() as u128 * part as u128 / nth as u128) as usize;
    for task in split(ith)..split(ith + 1) {
        let (b, head, first) = (task / blocks / heads, task / blocks % heads, task % blocks * plan.columns());
        // SAFETY: the caller vouches for the memory; tasks write to disjoint columns; the plan checked the CPU and
        // sized the scratch, alignment included.
        unsafe { kernel(problem, b, head, first, plan.columns().min(s - first), scratch) };
    }
    Ok(())
}

/// Runs the whole problem on a pool of `threads` threads of our own (0: as many as there are processors), or on this
/// thread alone for 1. Pools are kept for later calls.
///
/// # Safety
/// As for [`run_part`].
pub unsafe fn run(problem: &Problem, plan: &Plan, threads: usize) -> Result<()> {
    ensure!(threads <= MAX_THREADS, Threads, "n_threads is {threads}; it must be at most {MAX_THREADS}");
    let threads = if threads == 0 { processors() } else { threads }.min(plan.tasks()).max(1);
    let mut scratch = Scratch::new(plan.scratch_size(), threads)?;
    if threads == 1 {
        // SAFETY: passed on.
        return unsafe { run_part(problem, plan, 0, 1, scratch.0.as_mut_slice()) };
    }
    let results = Mutex::new(Ok(()));
    pool(threads)?.in_place_scope(|scope| {
        for (ith, part) in scratch.0.chunks_mut(plan.scratch_size()).enumerate() {
            let results = &results;
            scope.spawn(move |_| {
                // SAFETY: passed on; `chunks_mut` gives each part scratch of its own.
                if let Err(error) = unsafe { run_part(problem, plan, ith, threads, part) } {
                    *results.lock().unwrap_or_else(PoisonError::into_inner) = Err(error);
                }
            });
        }
    });
    results.into_inner().unwrap_or_else(PoisonError::into_inner)
}

/// Uninitialised memory for all parts.
struct Scratch(Vec<MaybeUninit<u8>>);

impl Scratch {
    fn new(size: usize, parts: usize) -> Result<Scratch> {
        let mut memory = Vec::new();
        let total = size * parts;
        memory.try_reserve_exact(total).map_err(|_| {
            let words = format_args!("{total} bytes of scratch for {parts} threads could not be had");
            Error::compose(Status::OutOfMemory, words)
        })?;
        // SAFETY: the capacity is there, and uninitialised bytes are valid MaybeUninit.
        unsafe { memory.set_len(total) };
        Ok(Scratch(memory))
    }
}
