//! For programs that use ggml: the custom operation, static hosts, and what the plugin has done.

use super::guard;
use crate::error::{Result, Status, ensure};
use crate::ggml::{self, custom_op, plugin, substitute, symbols};
use crate::params::Params;
use std::ffi::{c_char, c_int, c_void};
use std::sync::atomic::Ordering;

/// ggml's own struct.
pub struct GgmlTensor {
    _tensor: ggml::Tensor,
}

/// The operator as a `ggml_custom_op_t`, for `ggml_custom_4d` with n_tasks GGML_N_TASKS_MAX. Sources: q, k, v, g, beta
/// and state, all f32, of the shapes that `ggml_gated_delta_net` takes; `dst` is contiguous f32 and holds the outputs
/// `[S, Hv, T, B]` and behind them K states of all sequences (slot 0 the newest), so `ne` is
/// `{S * Hv, T * B + K * S * B, 1, 1}`. `userdata` is null for ggml's semantics, or a `const deltanet_params *` that
/// outlives the graph and whose options apply (head map, layout, beta, scale, gate clamp, norms); its tensors are
/// ignored. ggml calls it on its own threads; each allocates its scratch once. A node that cannot be computed leaves
/// dst as it is and a line in the log: ask `deltanet_ggml_supports` while building the graph.
///
/// # Safety
/// `dst` is a tensor of a ggml graph that is being computed, all sources in host memory.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn deltanet_ggml_custom_op(dst: *mut GgmlTensor, ith: c_int, nth: c_int, userdata: *mut c_void) {
    // The status stays in this thread's message; ggml has no way to take it.
    // SAFETY: passed on.
    let _ = guard(|| unsafe { custom_op::run(dst.cast::<ggml::Tensor>(), ith, nth, userdata.cast()) });
}

/// Checks a node for `deltanet_ggml_custom_op`; its tensors need no memory yet. Any thread.
///
/// # Safety
/// `dst` is null (an error) or a tensor with its sources; `params` is what the node gets as userdata.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn deltanet_ggml_supports(dst: *const GgmlTensor, params: *const Params) -> Status {
    // SAFETY: passed on.
    guard(|| unsafe { custom_op::check(dst.cast::<ggml::Tensor>(), params) })
}

/// What a program that links ggml statically tells the plugin: functions of that ggml. Set `struct_size`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct GgmlHost {
    /// `sizeof(deltanet_ggml_host)`.
    pub struct_size: u32,
    /// Zero.
    pub reserved: u32,
    /// `ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU)`.
    pub cpu_device: *mut c_void,
    /// `ggml_op_name`.
    pub op_name: Option<unsafe extern "C" fn(c_int) -> *const c_char>,
    /// `ggml_backend_buffer_is_host`.
    pub buffer_is_host: Option<unsafe extern "C" fn(*mut c_void) -> bool>,
    /// What `ggml_tensor_overhead()` returns.
    pub tensor_overhead: usize,
}

/// Starts the plugin in a program that links ggml statically and so exports nothing to find. Call it once, before the
/// first CPU backend is made. `DELTANET_GGML`, `DELTANET_LOG` and `DELTANET_VERIFY` apply as they do to a loaded
/// plugin. Returns the registry to pass to `ggml_backend_register`, null after an error.
///
/// # Safety
/// `host` is null (an error) or points to a struct as large as its `struct_size` says, with that ggml's own functions.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn deltanet_ggml_attach(host: *const GgmlHost) -> *mut c_void {
    let mut registry = std::ptr::null_mut();
    // The status is in this thread's message; null says that there is one.
    // SAFETY: passed on.
    let _ = guard(|| unsafe { attach(host) }.map(|made| registry = made));
    registry
}

/// # Safety
/// As for [`deltanet_ggml_attach`].
unsafe fn attach(host: *const GgmlHost) -> Result<*mut c_void> {
    ensure!(!host.is_null(), NullPointer, "host is null; it must point to a deltanet_ggml_host");
    ensure!(host.is_aligned(), Misaligned, "host is {host:p}; it must be aligned to {} bytes", align_of::<GgmlHost>());
    // SAFETY: not null, aligned; the caller promises at least the leading field.
    let size = unsafe { (*host).struct_size } as usize;
    ensure!(
        size == size_of::<GgmlHost>(),
        StructSize,
        "host.struct_size is {size}; it must be sizeof(deltanet_ggml_host), {}",
        size_of::<GgmlHost>()
    );
    // SAFETY: as large as the struct.
    let host = unsafe { *host };
    ensure!(!host.cpu_device.is_null(), NullPointer, "host.cpu_device is null; it must be ggml's CPU device");
    let (Some(op_name), Some(buffer_is_host)) = (host.op_name, host.buffer_is_host) else {
        return Err(crate::error::Error::new(
            Status::NullPointer,
            "host.op_name or host.buffer_is_host is null; they must be ggml's functions",
        ));
    };
    let device = host.cpu_device.cast::<ggml::Device>();
    let (overhead, version) = (Some(host.tensor_overhead), String::new());
    // SAFETY: the caller vouches for the functions.
    let found = unsafe { symbols::Host::new(device, op_name, buffer_is_host, None, overhead, version) };
    let host = found.map_err(|why| crate::error::Error::new(Status::Unsupported, why))?;
    Ok(plugin::start(host).cast())
}

/// What the plugin has done in this process so far. Set `struct_size`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct GgmlCounters {
    /// `sizeof(deltanet_ggml_counters)`.
    pub struct_size: u32,
    /// Zero.
    pub reserved: u32,
    /// GATED_DELTA_NET nodes that ran these kernels.
    pub taken: u64,
    /// Nodes that stayed with the host.
    pub left: u64,
    /// Nodes that read their states from the cache, without GET_ROWS.
    pub reads_fused: u64,
    /// Nodes that wrote their states into the cache, without CPY.
    pub writes_fused: u64,
    /// Nodes that the host's own operator computed too, to compare.
    pub verified: u64,
    /// Those of them where the two did not agree: the host's result was used.
    pub mismatches: u64,
}

/// Reads the plugin's counters. Any thread.
///
/// # Safety
/// `counters` is null (an error) or points to a struct as large as its `struct_size` says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn deltanet_ggml_read_counters(counters: *mut GgmlCounters) -> Status {
    guard(|| {
        ensure!(!counters.is_null(), NullPointer, "counters is null; it must point to a deltanet_ggml_counters");
        ensure!(
            counters.is_aligned(),
            Misaligned,
            "counters is {counters:p}; it must be aligned to {} bytes",
            align_of::<GgmlCounters>()
        );
        // SAFETY: not null, aligned; the caller promises at least the leading field.
        let size = unsafe { (*counters).struct_size };
        let own = size_of::<GgmlCounters>() as u32;
        ensure!(
            size == own,
            StructSize,
            "counters.struct_size is {size}; it must be sizeof(deltanet_ggml_counters), {own}"
        );
        let now = &substitute::COUNTERS;
        let value = GgmlCounters {
            struct_size: size,
            reserved: 0,
            taken: now.taken.load(Ordering::Relaxed),
            left: now.left.load(Ordering::Relaxed),
            reads_fused: now.reads_fused.load(Ordering::Relaxed),
            writes_fused: now.writes_fused.load(Ordering::Relaxed),
            verified: now.verified.load(Ordering::Relaxed),
            mismatches: now.mismatches.load(Ordering::Relaxed),
        };
        // SAFETY: as large as the struct, and aligned.
        unsafe { counters.write(value) };
        Ok(())
    })
}
