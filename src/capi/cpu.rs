//! Running on the CPU.

use super::{guard, message};
use crate::cpu::{self, Isa};
use crate::error::{Result, Status, ensure};
use crate::params::Params;
use crate::plan::Plan;
use crate::problem::Problem;
use std::ffi::c_char;
use std::mem::MaybeUninit;

/// # Safety
/// As for `deltanet_supports`.
unsafe fn plan(params: *const Params) -> Result<(Problem, Plan)> {
    // SAFETY: passed on.
    let problem = unsafe { Problem::new(&Params::read(params)?)? };
    Ok((problem, Plan::new(&problem, Isa::in_force()?)?))
}

/// Checks a call on the CPU without making it: the same code as `deltanet_run`, the same status and message. Reads
/// `params` and the index tensors, touches no other data. Any thread, any number at a time.
///
/// # Safety
/// `params` is null or points to a struct as large as its `struct_size` says; rows_in, rows_out and cu_seqlens, where
/// given, are as large as described.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn deltanet_supports(params: *const Params) -> Status {
    // SAFETY: passed on.
    guard(|| unsafe { plan(params) }.map(drop))
}

/// Computes the operator on the CPU with `n_threads` threads of the library's own pool: 0 for one a processor, 1 for
/// the calling thread alone, at most 1024. Returns when all is written. The bits of the result do not depend on
/// `n_threads`. Any thread, any number of calls at a time; pools are kept between calls and shared. After a status
/// other than OK nothing was written.
///
/// # Safety
/// As for `deltanet_supports`; also every tensor is as large as described, and for the time of the call nobody writes
/// to the inputs or touches the outputs.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn deltanet_run(params: *const Params, n_threads: u32) -> Status {
    guard(|| {
        // SAFETY: passed on.
        let (problem, plan) = unsafe { plan(params)? };
        // SAFETY: passed on.
        unsafe { cpu::run(&problem, &plan, n_threads as usize) }
    })
}

/// Tells the bytes of scratch that each part of a run with `deltanet_run_part` needs, at any alignment; it does not
/// depend on the number of parts. Any thread.
///
/// # Safety
/// As for `deltanet_supports`; `size` is null (an error) or writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn deltanet_scratch_size(params: *const Params, size: *mut usize) -> Status {
    guard(|| {
        ensure!(!size.is_null(), NullPointer, "size is null; it must point to a size_t");
        // SAFETY: passed on.
        let (_, plan) = unsafe { plan(params)? };
        // SAFETY: not null, and the caller promises that it is writable; C may not have aligned it.
        unsafe { size.write_unaligned(plan.scratch_size()) };
        Ok(())
    })
}

/// Computes part `ith` of `nth` (at most 1024) on the calling thread, for engines with threads of their own: no lock,
/// no allocation, no other thread. When all parts have returned OK, on any threads in any order, the result is
/// complete, with the same bits as `deltanet_run`'s. Every part gets the same `params` and scratch of its own.
///
/// # Safety
/// As for `deltanet_run`, for the time of all parts together; `scratch` holds `scratch_size` bytes, used by this part
/// alone.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn deltanet_run_part(
    params: *const Params,
    ith: u32,
    nth: u32,
    scratch: *mut std::ffi::c_void,
    scratch_size: usize,
) -> Status {
    guard(|| {
        // SAFETY: passed on.
        let (problem, plan) = unsafe { plan(params)? };
        ensure!(
            !scratch.is_null(),
            Scratch,
            "scratch is null; it must point to at least {} bytes",
            plan.scratch_size()
        );
        ensure!(
            scratch_size <= isize::MAX as usize,
            Scratch,
            "scratch_size is {scratch_size}; it must be the size of a buffer, at least {}",
            plan.scratch_size()
        );
        // SAFETY: not null, and the caller promises that many bytes for this part alone; bytes need no initialisation.
        let scratch = unsafe { std::slice::from_raw_parts_mut(scratch.cast::<MaybeUninit<u8>>(), scratch_size) };
        // SAFETY: passed on.
        unsafe { cpu::run_part(&problem, &plan, ith as usize, nth as usize, scratch) }
    })
}

/// Says in words which kernel, instruction set, tile, tasks and scratch a CPU call gets. Writes at most `size` bytes
/// to `text`, the terminating zero included; cuts what does not fit. Any thread.
///
/// # Safety
/// As for `deltanet_supports`; `text` is null (an error) or holds `size` writable bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn deltanet_describe(params: *const Params, text: *mut c_char, size: usize) -> Status {
    guard(|| {
        // SAFETY: passed on.
        let (_, plan) = unsafe { plan(params)? };
        // SAFETY: passed on.
        unsafe { message::put(&plan.to_string(), text, size) }
    })
}
