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
    let per_sequence = pieces::per_key_head(problem) * problem.key_heads();
    let split = |part: usize| (plan.tasks() as u128 * part as u128 / nth as u128) as usize;
    let (mut next, end) = (split(ith), split(ith + 1));
    while next < end {
        let sequence = next / per_sequence;
        let last = ((sequence + 1) * per_sequence).min(end);
        let first = sequence * per_sequence;
        // SAFETY: the caller vouches for the memory; pieces write to disjoint columns; the plan checked the CPU and
        // sized the scratch, alignment included.
        unsafe { run_sequence(problem, plan, sequence, next - first..last - first, scratch) };
        next = last;
    }
    Ok(())
}

/// Runs pieces of one sequence: as many tokens as the plan says by the chunked kernel, the rest (all, or those whose
/// states are kept) by the recurrent one.
///
/// # Safety
/// As for [`run_part`], with scratch as the plan wants it.
unsafe fn run_sequence(p: &Problem, plan: &Plan, b: usize, pieces: Range<usize>, scratch: *mut f32) {
    let kernels = kernels::of(plan.isa());
    let tokens = p.token_range(b).len();
    let prefix = plan.chunked_tokens(p, tokens);
    let mut source = (p.state_in, p.row_in(b));
    let mut destination = p.state_out.map(|state| (state, p.row_out(b)));
    if destination.is_none() && prefix < tokens {
        // The slot of the first state that is kept carries the state over to its token.
        destination = p.snapshots.and_then(|kept| kept.slot(prefix, tokens).map(|slot| (kept.view(slot), b)));
    }
    let per_key_head = pieces::per_key_head(p);
    let by_key_head = || {
        let mut next = pieces.start;
        std::iter::from_fn(move || {
            let (key_head, first) = (next / per_key_head, next % per_key_head);
            let last = per_key_head.min(first + pieces.end - next);
            next += last - first;
            (first < last).then_some((key_head, first..last))
        })
    };
    let chunk = plan.chunk_for(prefix);
    // Rows of neighbouring heads share pages. Going through all heads block of tokens by block of tokens finds a page's
    // address translation still there for the next head; the states' way to memory and back costs less.
    let several = by_key_head().nth(1).is_some() && destination.is_some();
    let block = if several { chunk * plan.block_chunks() } else { prefix };
    for first in (0..prefix).step_by(block.max(1)) {
        let tokens = first..prefix.min(first + block);
        let mut heads = by_key_head().peekable();
        while let Some((key_head, pieces)) = heads.next() {
            let end = pieces.end;
            for at in pieces.step_by(chunked::most_pieces(p.head_size())) {
                let pieces = at..end.min(at + chunked::most_pieces(p.head_size()));
                let more = (pieces.end < end).then_some((key_head, pieces.end));
                let next = more.or(heads.peek().map(|(key_head, pieces)| (*key_head, pieces.start)));
                let tokens = tokens.clone();
                let task = chunked::Task { sequence: b, key_head, pieces, tokens, chunk, source, destination, next };
                // SAFETY: passed on; the plan allows the kernel for this problem.
                unsafe { (kernels.chunked)(p, &task, scratch) };
            }
        }
        source = destination.unwrap_or(source);
    }
    if prefix == tokens && prefix > 0 {
        return;
    }
    let mut heads = by_key_head().flat_map(|(key_head, pieces)| pieces::by_head(p, key_head, pieces)).peekable();
    while let Some((head, _, columns)) = heads.next() {
        let next = heads.peek().map(|(head, _, columns)| (*head, columns.start));
        let run = recurrent::Run { sequence: b, head, columns, tokens: prefix..tokens, source, next };
        // SAFETY: passed on.
        unsafe { (kernels.recurrent)(p, &run, scratch) };
    }
}

/// Runs the whole problem on this thread and `threads` less one of a pool of our own (0: as many as there are
/// processors). Pools are kept for later calls.
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
    let run_part = |ith: usize, part: &mut [MaybeUninit<u8>]| {
        // SAFETY: passed on; each part has scratch of its own.
        if let Err(error) = unsafe { run_part(problem, plan, ith, threads, part) } {
            *results.lock().unwrap_or_else(PoisonError::into_inner) = Err(error);
        }
    };
    let (own, others) = scratch.0.split_at_mut(plan.scratch_size());
    // The calling thread takes a part, too: it has nothing better to do, and is awake.
    pool(threads - 1)?.in_place_scope(|scope| {
        for (at, part) in others.chunks_mut(plan.scratch_size()).enumerate() {
            let run_part = &run_part;
            scope.spawn(move |_| run_part(at + 1, part));
        }
        run_part(0, own);
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
