//! Running a plan: one part on the caller's thread, or all parts on a pool of ours.

use super::pool::{pool, processors};
use super::{chunked, kernels, pieces, recurrent};
use crate::error::{Error, Result, Status, ensure};
use crate::plan::{Plan, SCRATCH_ALIGN};
use crate::problem::Problem;
use std::mem::MaybeUninit;
use std::ops::Range;
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
    let per_key_head = pieces::per_key_head(problem);
    let split = |part: usize| (plan.tasks() as u128 * part as u128 / nth as u128) as usize;
    let (mut next, end) = (split(ith), split(ith + 1));
    while next < end {
        let group = next / per_key_head;
        let last = ((group + 1) * per_key_head).min(end);
        let (sequence, key_head) = (group / problem.key_heads(), group % problem.key_heads());
        let first = group * per_key_head;
        // SAFETY: the caller vouches for the memory; pieces write to disjoint columns; the plan checked the CPU and
        // sized the scratch, alignment included.
        unsafe { run_pieces(problem, plan, sequence, key_head, next - first..last - first, scratch) };
        next = last;
    }
    Ok(())
}

/// Runs pieces of one sequence and key head: as many tokens as the plan says by the chunked kernel, the rest (all, or
/// those whose states are kept) by the recurrent one.
///
/// # Safety
/// As for [`run_part`], with scratch as the plan wants it.
unsafe fn run_pieces(p: &Problem, plan: &Plan, b: usize, key_head: usize, pieces: Range<usize>, scratch: *mut f32) {
    let kernels = kernels::of(plan.isa());
    let tokens = p.token_range(b).len();
    let prefix = plan.chunked_tokens(p, tokens);
    let mut source = (p.state_in, p.row_in(b));
    let mut destination = p.state_out.map(|state| (state, p.row_out(b)));
    if prefix > 0 {
        if destination.is_none() && prefix < tokens {
            // The slot of the first state that is kept carries the state over to its token.
            destination = p.snapshots.and_then(|kept| kept.slot(prefix, tokens).map(|slot| (kept.view(slot), b)));
        }
        for first in pieces.clone().step_by(chunked::most_pieces(p.head_size())) {
            let pieces = first..pieces.end.min(first + chunked::most_pieces(p.head_size()));
            let task =
                chunked::Task { sequence: b, key_head, pieces, tokens: prefix, chunk: plan.chunk(), destination };
            // SAFETY: passed on; the plan allows the kernel for this problem.
            unsafe { (kernels.chunked)(p, &task, scratch) };
        }
        if prefix == tokens {
            return;
        }
        source = destination.unwrap_or(source);
    }
    for (head, _, columns) in pieces::by_head(p, key_head, pieces) {
        let run = recurrent::Run { sequence: b, head, columns, tokens: prefix..tokens, source };
        // SAFETY: passed on.
        unsafe { (kernels.recurrent)(p, &run, scratch) };
    }
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
