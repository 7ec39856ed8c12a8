//! Running on a CUDA stream.

use super::{guard, message};
use crate::cuda;
use crate::error::{Result, Status, ensure};
use crate::params::Params;
use crate::problem::{Place, Problem};
use std::ffi::{c_char, c_void};

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

/// Says in words which kernels, precision and workspace a CUDA call gets. Writes at most `size` bytes to `text`, the
/// terminating zero included; cuts what does not fit. Needs no driver and no context. Any thread.
///
/// # Safety
/// `params` is null or points to a struct as large as its `struct_size` says; `text` is null (an error) or holds `size`
/// writable bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn deltanet_cuda_describe(params: *const Params, text: *mut c_char, size: usize) -> Status {
    // SAFETY: passed on.
    guard(|| unsafe { message::put(&cuda::describe(&problem(params)?)?, text, size) })
}

/// Computes the operator on a CUDA stream: `stream` is a `CUstream` or `cudaStream_t` of this thread's current context,
/// or null for the default stream. All tensors, index tensors too, are in memory of that context's device. Returns when
/// the work is queued; allocates nothing, waits for nothing, and may be captured into a graph. Device memory cannot be
/// looked at from here: a sequence whose row in rows_in or rows_out is outside its pool is left out, its outputs
/// untouched, and cu_seqlens is held inside 0 to T. `workspace` has the bytes that `deltanet_cuda_workspace_size` tells
/// and is in use until the stream has done the work. Any thread, any number at a time. After a status other than OK
/// nothing was queued, unless the driver took some launches of a prompt and refused a later one: the message then says
/// so, and outputs and states are undefined. Head sizes to 256; f32, f16 and bf16 tensors; all arithmetic is f32.
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::capi::deltanet_last_error;
    use crate::params::Precision;
    use crate::tensor::{Dtype, Tensor};
    use std::ffi::CStr;

    /// Arguments at addresses that nobody reads: four heads of 128 channels.
    fn params(tokens: i64) -> Params {
        let mut address = 1usize << 40;
        let mut tensor = |ne: [i64; 4]| {
            address += 1 << 32;
            Tensor::dense(address as *mut c_void, Dtype::F32, ne)
        };
        Params {
            q: tensor([128, 2, tokens, 1]),
            k: tensor([128, 2, tokens, 1]),
            v: tensor([128, 4, tokens, 1]),
            g: tensor([1, 4, tokens, 1]),
            beta: tensor([1, 4, tokens, 1]),
            state_in: tensor([128, 128, 4, 1]),
            state_out: tensor([128, 128, 4, 1]),
            out: tensor([128, 4, tokens, 1]),
            ..Params::default()
        }
    }

    fn words(params: &Params, size: usize) -> std::result::Result<String, String> {
        let mut text = vec![0x55 as c_char; 512];
        // SAFETY: the text has room, and both strings end.
        let (status, said, error) = unsafe {
            let status = deltanet_cuda_describe(params, text.as_mut_ptr(), size);
            let error = CStr::from_ptr(deltanet_last_error()).to_string_lossy().into_owned();
            (status, text[..].iter().take_while(|c| **c != 0).map(|c| *c as u8 as char).collect::<String>(), error)
        };
        if status == Status::Ok { Ok(said) } else { Err(error) }
    }

    #[test]
    fn kernels_and_precision_are_named() {
        let Ok(one) = words(&params(1), 512) else {
            assert!(words(&params(1), 512).is_err_and(|error| error.contains("nvcc") || error.contains("feature")));
            println!("SKIPPED: this build has no CUDA kernels");
            return;
        };
        assert!(one.starts_with("token-serial kernel dn_") && one.contains("threads"), "{one}");
        let prompt = words(&params(4096), 512).expect("a long prompt");
        assert!(prompt.starts_with("chunked kernels, precision exact") && prompt.contains("workspace"), "{prompt}");
        let fast = Params { precision: Precision::Bf16 as u32, ..params(4096) };
        assert!(words(&fast, 512).is_ok_and(|words| words.contains("precision bf16")));
        assert_eq!(words(&params(4096), 8).as_deref(), Ok("chunked"), "cut, and ended");
        assert!(words(&params(4096), 0).is_err_and(|error| error.contains("size is 0")));
        assert!(words(&Params { v: params(2).v, ..params(1) }, 512).is_err());
    }
}
