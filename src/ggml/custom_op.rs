//! The operator for engines that build their own ggml graphs: a `ggml_custom_op_t`.

use super::abi;
use super::tensor::{self, Operands};
use crate::cpu::{self, Isa};
use crate::error::{Error, Result, Status};
use crate::log::{self, Level};
use crate::params::Params;
use crate::plan::Plan;
use std::cell::RefCell;
use std::mem::MaybeUninit;

/// How many snapshots a custom node of this size holds: its parameters have no room to say it.
///
/// # Safety
/// `node` is null or a tensor of a host with the known layout; so are its sources.
unsafe fn snapshots(node: *const abi::Tensor) -> Result<i32> {
    let wrong = |why: &str| Error::new(Status::Shape, format!("dst {why}"));
    if node.is_null() {
        return Err(Error::new(Status::NullPointer, "dst is null; it must be a tensor of the graph"));
    }
    // SAFETY: not null; the caller's promise.
    let dst = unsafe { &*node };
    let [v, state] = [dst.src[2], dst.src[5]];
    if v.is_null() || state.is_null() {
        return Err(wrong("has fewer than six sources; they must be q, k, v, g, beta, state"));
    }
    // SAFETY: sources of a tensor are tensors.
    let (v, state) = unsafe { ((*v).elements(), (*state).elements()) };
    let states = dst.elements().saturating_sub(v);
    let count = states.checked_div(state).unwrap_or(0);
    if count == 0 || count * state != states {
        return Err(wrong(&format!(
            "has {} elements; it must have {v} for the outputs and a positive multiple of {state} for the states",
            dst.elements()
        )));
    }
    i32::try_from(count).map_err(|_| wrong("is too large"))
}

fn shape(why: String) -> Error {
    Error::new(Status::Shape, why)
}

/// The options of a call: ggml's, or those of the caller's params, whose tensors do not matter.
///
/// # Safety
/// `options` is null or points to params as large as their `struct_size` says.
unsafe fn options(options: *const Params) -> Result<Params> {
    if options.is_null() {
        return Ok(Params::default());
    }
    // SAFETY: passed on.
    unsafe { Params::read(options) }
}

/// Checks a node before its graph runs; its tensors need no memory yet.
///
/// # Safety
/// As for [`snapshots`] and [`options`].
pub unsafe fn check(node: *const abi::Tensor, params: *const Params) -> Result<()> {
    // SAFETY: passed on.
    unsafe { tensor::supports(node, snapshots(node)?, &options(params)?).map_err(shape) }
}

/// # Safety
/// As for [`check`], with all tensors in memory; the host runs the parts of one node together.
unsafe fn part(node: *const abi::Tensor, ith: usize, nth: usize, params: *const Params) -> Result<()> {
    thread_local! {
        /// Grows to the largest plan that the thread has met, then stays: no allocation in later calls.
        static SCRATCH: RefCell<Vec<MaybeUninit<u8>>> = const { RefCell::new(Vec::new()) };
    }
    // SAFETY: passed on.
    let operands: Operands = unsafe { tensor::operands(node, snapshots(node)?).map_err(shape)? };
    let places = operands.own_places();
    // SAFETY: the places outlive the problem.
    let problem = unsafe { operands.problem_with(&places, &options(params)?)? };
    let plan = Plan::new(&problem, Isa::in_force()?)?;
    SCRATCH.with_borrow_mut(|scratch| {
        let missing = plan.scratch_size().saturating_sub(scratch.len());
        let no_memory = |_| Error::new(Status::OutOfMemory, format!("{missing} bytes of scratch could not be had"));
        scratch.try_reserve_exact(missing).map_err(no_memory)?;
        scratch.resize(scratch.len() + missing, MaybeUninit::uninit());
        // SAFETY: the host's tensors live for the time of the node; this thread's scratch is its own.
        unsafe { cpu::run_part(&problem, &plan, ith, nth, scratch) }
    })
}

/// Runs one part of a node; an error, which ggml's custom operations cannot return, goes to the log, once.
///
/// # Safety
/// As for [`check`], with all tensors in memory; the host runs the parts of one node together.
pub unsafe fn run(node: *const abi::Tensor, ith: i32, nth: i32, params: *const Params) -> Result<()> {
    let (ith, nth) = (usize::try_from(ith).unwrap_or(usize::MAX), usize::try_from(nth).unwrap_or(0));
    // SAFETY: passed on.
    unsafe { part(node, ith, nth, params) }
        .inspect_err(|error| log::once_at(Level::Warning, format!("a custom node was not computed: {error}")))
}
