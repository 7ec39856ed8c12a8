//! Running on a CUDA stream.

use super::guard;
use crate::cuda;
use crate::error::{Result, Status, ensure};
use crate::params::Params;
use crate::problem::{Place, Problem};
use std::ffi::c_void;

/// # Safety
/// `params` is null or points to a struct as large as its `struct_size` says.
unsafe fn problem(params: *const Params) -> Result<Problem> {
    // SAFETY: passed on; nothing in device memory is read.
    unsafe { Problem::at(&Params::read(params)?, Place::Device) }
}

/// Loads the CUDA kernels into this thread's current context. To be called once in each context before
/// `deltanet_cuda_run`, outside of any stream capture; later calls return at once. The context may be the driver API's
/// or the runtime's (after any runtime call, such as `cudaFree(0)`). UNSUPPORTED without a driver, on devices below
/// compute capability 7.5, and in a library built without nvcc. Any thread, any number at a time.
#[unsafe(no_mangle)]
pub extern "C" fn deltanet_cuda_prepare() -> Status {
    guard(cuda::prepare)
}

/// Checks a call of `deltanet_cuda_run` without making it and tells the bytes of device memory that it needs as a
/// workspace; 0 means that `workspace` may be null. Needs no driver and no context. Any thread.
///
/// # Safety
/// `params` is null or points to a struct as large as its `struct_size` says; `size` is null (an error) or writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn deltanet_cuda_workspace_size(params: *const Params, size: *mut usize) -> Status {
    guard(|| {
        ensure!(!size.is_null(), NullPointer, "size is null; it must point to a size_t");
        // SAFETY: passed on.
        let bytes = cuda::workspace_size(&unsafe { problem(params)? })?;
        // SAFETY: not null, and the caller promises that it is writable; C may not have aligned it.
        unsafe { size.write_unaligned(bytes) };
        Ok(())
    })
}

/// Computes the operator on a CUDA stream: `stream` is a `CUstream` or `cudaStream_t` of this thread's current context,
/// or null for the default stream. All tensors, index tensors too, are in memory of that context's device. Returns when
/// the work is queued; allocates nothing, waits for nothing, and may be captured into a graph. Device memory cannot be
/// looked at from here: a sequence whose row in rows_in or rows_out is outside its pool is left out, its outputs
/// untouched, and cu_seqlens is held inside 0 to T. `workspace` has the bytes that `deltanet_cuda_workspace_size` tells
/// and is in use until the stream has done the work. Any thread, any number at a time. After a status other than OK
/// nothing was queued. Head sizes to 256; f32, f16 and bf16 tensors; all arithmetic is f32.
///
/// # Safety
/// `params` is null or points to a struct as large as its `struct_size` says. Every tensor is as large as described,
/// and until the stream has done the work nobody writes to the inputs or touches the outputs.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn deltanet_cuda_run(
    params: *const Params,
    workspace: *mut c_void,
    workspace_size: usize,
    stream: *mut c_void,
) -> Status {
    // SAFETY: passed on.
    guard(|| unsafe { cuda::run(&problem(params)?, workspace, workspace_size, stream) })
}
