//! `DELTANET_GGML=device`: the operator as an ACCEL device, ggml's official mechanism.
//!
//! It costs the host two graph splits a layer, and our thread pool runs beside its own; it exists because ggml's own
//! test harness compares devices. That is also why the device computes L2_NORM, which stands in the harness's graphs.

use super::abi::{self, Backend, Device, DeviceProps, Graph, Layout, Tensor};
use super::symbols::{Host, Ops};
use super::{substitute, tensor};
use crate::cpu::{self, Isa, pool};
use crate::error::{Error, Result, Status};
use crate::log::{self, Level};
use crate::params::Params;
use crate::plan::Plan;
use rayon::prelude::*;
use std::ffi::{c_char, c_int, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, Ordering};

/// What our device keeps.
struct Context {
    host: Arc<Host>,
    layout: Layout,
}

/// Words of the largest backend structure: an id, 16 slots, the device, a context.
const WORDS: usize = 19;

/// Our backend: first its structure as the host's version has it, behind that what we keep.
#[repr(C)]
struct OwnBackend {
    words: [usize; WORDS],
    host: Arc<Host>,
    threads: AtomicI32,
}

/// A device for this host, which lives as long as the process.
pub fn device(host: &Arc<Host>) -> std::result::Result<*mut Device, String> {
    // SAFETY: the CPU device of a host whose devices have the known layout.
    let init_backend = unsafe { (*host.cpu_device).init_backend }.ok_or("the CPU device has no init_backend")?;
    let layout = substitute::probe(host, init_backend)?;
    let context = Box::into_raw(Box::new(Context { host: Arc::clone(host), layout }));
    Ok(Box::into_raw(Box::new(Device {
        get_name: Some(get_name),
        get_description: Some(get_description),
        get_memory: Some(get_memory),
        get_type: Some(get_type),
        get_props: Some(get_props),
        init_backend: Some(init),
        get_buffer_type: Some(get_buffer_type),
        get_host_buffer_type: None,
        buffer_from_host_ptr: None,
        supports_op: Some(supports_op),
        supports_buft: Some(supports_buft),
        offload_op: None,
        event_new: std::ptr::null_mut(),
        event_free: std::ptr::null_mut(),
        event_synchronize: std::ptr::null_mut(),
        registry: std::ptr::null_mut(),
        context: context.cast(),
    })))
}

/// # Safety
/// `device` was made by [`device`].
unsafe fn context<'a>(device: *mut Device) -> &'a Context {
    // SAFETY: its context is a leaked Context.
    unsafe { &*(*device).context.cast::<Context>() }
}

unsafe extern "C" fn get_name(_: *mut Device) -> *const c_char {
    c"deltanet".as_ptr()
}

unsafe extern "C" fn get_description(_: *mut Device) -> *const c_char {
    c"deltanet: the gated delta net operator".as_ptr()
}

unsafe extern "C" fn get_memory(_: *mut Device, free: *mut usize, total: *mut usize) {
    // SAFETY: the host's variables. 0 is ggml's word for a device that has no memory of its own.
    unsafe { (*free, *total) = (0, 0) };
}

unsafe extern "C" fn get_type(_: *mut Device) -> c_int {
    abi::DEVICE_ACCEL
}

unsafe extern "C" fn get_props(device: *mut Device, props: *mut DeviceProps) {
    // SAFETY: the host's variable; every version's has these fields.
    unsafe {
        (*props).name = get_name(device);
        (*props).description = get_description(device);
        ((*props).memory_free, (*props).memory_total) = (0, 0);
        (*props).kind = abi::DEVICE_ACCEL;
        (*props).device_id = std::ptr::null();
        (&raw mut (*props).caps).write([false; 8]);
    }
}

unsafe extern "C" fn get_buffer_type(device: *mut Device) -> *mut c_void {
    // SAFETY: our device; the CPU device's own function.
    unsafe {
        let cpu = context(device).host.cpu_device;
        (*cpu).get_buffer_type.map_or(std::ptr::null_mut(), |get_buffer_type| get_buffer_type(cpu))
    }
}

unsafe extern "C" fn supports_buft(device: *mut Device, buffer_type: *mut c_void) -> bool {
    // SAFETY: our device; the CPU device's own function on the host's buffer type.
    unsafe {
        let cpu = context(device).host.cpu_device;
        (*cpu).supports_buft.is_some_and(|supports_buft| supports_buft(cpu, buffer_type))
    }
}

unsafe extern "C" fn supports_op(device: *mut Device, node: *const Tensor) -> bool {
    let supports = || {
        // SAFETY: our device and a tensor of the host.
        let (ops, tensor) = unsafe { (&context(device).host.ops, &*node) };
        if tensor.op == ops.gated_delta_net {
            // SAFETY: a node of this operator; only descriptions are read.
            unsafe { tensor::supports(node, tensor.op_params[0], &Params::default()) }.is_ok()
        } else {
            // SAFETY: a tensor of the host.
            ops.is_view(tensor.op) || tensor.op == ops.l2_norm && unsafe { l2_norm_rows(tensor) }.is_some()
        }
    };
    catch_unwind(AssertUnwindSafe(supports)).unwrap_or(false)
}

static GUID: [u8; 16] = *b"deltanet ggml 1\0";

unsafe extern "C" fn init(device: *mut Device, _: *const c_char) -> *mut Backend {
    // SAFETY: our device.
    let Context { host, layout } = unsafe { context(device) };
    let mut words = [0; WORDS];
    words[0] = GUID.as_ptr() as usize;
    words[1 + layout.get_name] = backend_name as unsafe extern "C" fn(*mut Backend) -> *const c_char as usize;
    words[1 + layout.free] = free as abi::FreeBackend as usize;
    words[1 + layout.graph_compute] = compute as abi::GraphCompute as usize;
    words[1 + layout.slots] = device as usize;
    Box::into_raw(Box::new(OwnBackend { words, host: Arc::clone(host), threads: AtomicI32::new(0) })).cast()
}

unsafe extern "C" fn backend_name(_: *mut Backend) -> *const c_char {
    c"deltanet".as_ptr()
}

unsafe extern "C" fn free(backend: *mut Backend) {
    // SAFETY: made by `init`, and freed once.
    drop(unsafe { Box::from_raw(backend.cast::<OwnBackend>()) });
}

/// What the host calls to set the number of threads.
pub unsafe extern "C" fn set_n_threads(backend: *mut Backend, threads: c_int) {
    // SAFETY: our backend: the host got this function from our registry, for our backends.
    unsafe { (*backend.cast::<OwnBackend>()).threads.store(threads.max(0), Ordering::Relaxed) };
}

unsafe extern "C" fn compute(backend: *mut Backend, graph: *mut Graph) -> c_int {
    let compute = || -> Result<()> {
        // SAFETY: our backend, and a graph of the host.
        let (own, graph) = unsafe { (&*backend.cast::<OwnBackend>(), &*graph) };
        let threads = own.threads.load(Ordering::Relaxed) as usize;
        for at in 0..usize::try_from(graph.n_nodes).unwrap_or(0) {
            // SAFETY: the graph has that many nodes.
            let node = unsafe { *graph.nodes.add(at) };
            // SAFETY: a node that `supports_op` accepted.
            unsafe { compute_node(&own.host.ops, node, threads)? };
        }
        Ok(())
    };
    match catch_unwind(AssertUnwindSafe(compute)) {
        Ok(Ok(())) => abi::STATUS_SUCCESS,
        Ok(Err(error)) => {
            log::once_at(Level::Warning, format!("a graph could not be computed: {error}"));
            abi::STATUS_FAILED
        }
        Err(_) => abi::STATUS_FAILED,
    }
}

/// # Safety
/// `node` is a node of the host whose tensors have memory.
unsafe fn compute_node(ops: &Ops, node: *mut Tensor, threads: usize) -> Result<()> {
    // SAFETY: passed on.
    let tensor = unsafe { &*node };
    if ops.is_view(tensor.op) || tensor.elements() == 0 {
        return Ok(());
    }
    if tensor.op == ops.gated_delta_net {
        let unsupported = |why: String| Error::new(Status::Unsupported, why);
        // SAFETY: passed on.
        let operands = unsafe { tensor::operands(node, tensor.op_params[0]).map_err(unsupported)? };
        let places = operands.own_places();
        // SAFETY: the places outlive the problem, and the host's tensors the call.
        return unsafe {
            let problem = operands.problem(&places)?;
            cpu::run(&problem, &Plan::new(&problem, Isa::in_force()?)?, threads)
        };
    }
    // SAFETY: passed on.
    let rows = unsafe { l2_norm_rows(tensor) }.filter(|_| tensor.op == ops.l2_norm);
    let rows = rows.ok_or_else(|| Error::new(Status::Unsupported, format!("operation {} is not ours", tensor.op)))?;
    let epsilon = f32::from_bits(tensor.op_params[0] as u32);
    let threads = if threads == 0 { pool::processors() } else { threads.min(cpu::MAX_THREADS) };
    let normalise = |row: &Row| {
        // SAFETY: rows of the node and of its source, which do not overlap other rows; `length` floats each.
        let (from, to) = unsafe {
            (
                std::slice::from_raw_parts(row.from as *const f32, row.length),
                std::slice::from_raw_parts_mut(row.to as *mut f32, row.length),
            )
        };
        let norm = from.iter().map(|x| f64::from(*x) * f64::from(*x)).sum::<f64>().sqrt() as f32;
        let factor = 1.0 / norm.max(epsilon);
        to.iter_mut().zip(from).for_each(|(to, from)| *to = from * factor);
    };
    pool::pool(threads)?.install(|| rows.par_iter().for_each(normalise));
    Ok(())
}

/// One row of L2_NORM.
struct Row {
    from: usize,
    to: usize,
    length: usize,
}

/// The rows of an L2_NORM node; `None` where its form is not a known one.
///
/// # Safety
/// A tensor of the host. Its memory is not touched.
unsafe fn l2_norm_rows(node: &Tensor) -> Option<Vec<Row>> {
    if node.src[0].is_null() {
        return None;
    }
    // SAFETY: sources of tensors are tensors.
    let source = unsafe { &*node.src[0] };
    let plain = |tensor: &Tensor| tensor.dtype == abi::TYPE_F32 && tensor.nb[0] == size_of::<f32>();
    // In place, rows would be read and written through two slices at once.
    let in_place = !node.data.is_null() && node.data == source.data;
    if !plain(node) || !plain(source) || node.ne != source.ne || in_place {
        return None;
    }
    let [length, n1, n2, n3] = node.ne.map(|ne| usize::try_from(ne).unwrap_or(0));
    let mut rows = Vec::with_capacity(n1 * n2 * n3);
    for (i3, i2, i1) in (0..n3).flat_map(|i3| (0..n2).flat_map(move |i2| (0..n1).map(move |i1| (i3, i2, i1)))) {
        let at = |tensor: &Tensor| {
            (tensor.data as usize).wrapping_add(i1 * tensor.nb[1] + i2 * tensor.nb[2] + i3 * tensor.nb[3])
        };
        rows.push(Row { from: at(source), to: at(node), length });
    }
    Some(rows)
}
