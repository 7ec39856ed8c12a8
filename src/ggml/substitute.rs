//! Our kernels inside the host's own graph.
//!
//! The CPU backend's `graph_compute` is wrapped. For the time of one call the operator's nodes become GGML_OP_CUSTOM
//! nodes with our function, and what we fuse becomes GGML_OP_NONE; then everything is put back. So the operator runs in
//! the host's threads, at its place in the graph: no split, no copy, no second pool.

use super::abi::{self, Backend, CustomOpParams, Device, Graph, GraphView, Layout, Tensor};
use super::fuse::{Fusion, Surroundings};
use super::scratch::{self, Scratch};
use super::symbols::{Host, Ops};
use super::tensor::{self, Operands, Places};
use super::verify::{self, Variant};
use crate::cpu::{self, Isa};
use crate::log::{self, Level};
use crate::plan::Plan;
use crate::problem::Problem;
use std::collections::HashMap;
use std::ffi::{c_char, c_int, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, LazyLock, Mutex, PoisonError, RwLock, TryLockError};

/// What the plugin has done so far in this process, all hosts and backends together.
#[derive(Default)]
pub struct Counters {
    /// Nodes that ran our kernels.
    pub taken: AtomicU64,
    /// Nodes that stayed with the host.
    pub left: AtomicU64,
    /// State reads and writes that needed no GET_ROWS and no CPY.
    pub reads_fused: AtomicU64,
    pub writes_fused: AtomicU64,
    /// Nodes that were computed by the host too, and those of them that did not agree.
    pub verified: AtomicU64,
    pub mismatches: AtomicU64,
}

pub static COUNTERS: LazyLock<Counters> = LazyLock::new(Counters::default);

/// A host whose CPU device makes wrapped backends.
struct Attached {
    host: Arc<Host>,
    init_backend: abi::InitBackend,
}

static HOSTS: RwLock<Vec<Attached>> = RwLock::new(Vec::new());

/// One wrapped backend.
struct Wrapped {
    host: Arc<Host>,
    graph_compute: abi::GraphCompute,
    free: abi::FreeBackend,
    work: Mutex<Work>,
}

/// What a backend keeps between calls.
#[derive(Default)]
struct Work {
    scratch: Scratch,
}

static BACKENDS: LazyLock<RwLock<HashMap<usize, Arc<Wrapped>>>> = LazyLock::new(RwLock::default);

/// Wraps the CPU device of `host`, once; the error says why not.
pub fn attach(host: Arc<Host>) -> Result<(), String> {
    let mut hosts = HOSTS.write().unwrap_or_else(PoisonError::into_inner);
    if hosts.iter().any(|attached| attached.host.cpu_device == host.cpu_device) {
        return Ok(());
    }
    // SAFETY: the CPU device of a host whose devices have the known layout.
    let slot = unsafe { &raw mut (*host.cpu_device).init_backend };
    // SAFETY: as above.
    let Some(original) = (unsafe { slot.read() }) else {
        return Err("the CPU device has no init_backend".into());
    };
    if super::symbols::object_exports(original as *const c_void, c"deltanet_ggml_custom_op") {
        return Err("another copy of deltanet is active in this process".into());
    }
    probe(&host, original)?;
    if !is_writable(slot as usize) {
        return Err("the CPU device is in read-only memory".into());
    }
    hosts.push(Attached { host, init_backend: original });
    // SAFETY: a pointer-sized slot in writable memory, which other threads may read while we change it: hence atomic.
    unsafe { AtomicUsize::from_ptr(slot.cast()) }.store(init_backend as abi::InitBackend as usize, Ordering::Release);
    Ok(())
}

/// Makes a backend of the CPU device and looks at it: the layout is known before anything is promised.
pub fn probe(host: &Host, init_backend: abi::InitBackend) -> Result<Layout, String> {
    // SAFETY: the host's own function, on its own device, as the host calls it.
    let backend = unsafe { init_backend(host.cpu_device, std::ptr::null()) };
    if backend.is_null() {
        return Err("the CPU device makes no backend".into());
    }
    // SAFETY: made by that device.
    let Some(layout) = (unsafe { Layout::of(backend, host.cpu_device) }) else {
        // Not freed: where the structure is unknown, so is its free function. This happens once at most.
        return Err("the CPU backend's structure is not one of the known ones".into());
    };
    // SAFETY: the layout holds, so this slot has the backend's own free function.
    unsafe {
        let free: abi::FreeBackend = std::mem::transmute(layout.slot(backend, layout.free).read());
        free(backend);
    }
    Ok(layout)
}

/// Whether the address is in memory that this process may write.
fn is_writable(address: usize) -> bool {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap_or_default();
    maps.lines().any(|line| {
        let mut fields = line.split_whitespace();
        let range = fields.next().and_then(|range| range.split_once('-'));
        let bounds = range.and_then(|(start, end)| {
            Some(usize::from_str_radix(start, 16).ok()?..usize::from_str_radix(end, 16).ok()?)
        });
        bounds.is_some_and(|bounds| bounds.contains(&address))
            && fields.next().is_some_and(|access| access.contains('w'))
    })
}

/// Stands in for the CPU device's `init_backend`.
unsafe extern "C" fn init_backend(device: *mut Device, params: *const c_char) -> *mut Backend {
    let attached = {
        let hosts = HOSTS.read().unwrap_or_else(PoisonError::into_inner);
        let attached = hosts.iter().find(|attached| attached.host.cpu_device == device);
        attached.map(|attached| (Arc::clone(&attached.host), attached.init_backend))
    };
    let Some((host, original)) = attached else { return std::ptr::null_mut() };
    // SAFETY: the host's function with the host's arguments.
    let backend = unsafe { original(device, params) };
    if !backend.is_null() {
        // A panic must not reach the host; what could not be wrapped works as before.
        // SAFETY: the device made this backend.
        let _ = catch_unwind(AssertUnwindSafe(|| unsafe { wrap(host, device, backend) }));
    }
    backend
}

/// # Safety
/// `device` is the host's CPU device and has just made `backend`.
unsafe fn wrap(host: Arc<Host>, device: *mut Device, backend: *mut Backend) {
    // SAFETY: passed on.
    let Some(layout) = (unsafe { Layout::of(backend, device) }) else {
        log::once_at(
            Level::Warning,
            "a CPU backend's structure is not one of the known ones; it stays as it is".into(),
        );
        return;
    };
    let (compute, free) = (layout.slot(backend, layout.graph_compute), layout.slot(backend, layout.free));
    // SAFETY: the layout holds, so these slots have functions of these types; the backend is in the host's heap and
    // nobody else has it yet.
    unsafe {
        let wrapped = Wrapped {
            host,
            graph_compute: std::mem::transmute::<usize, abi::GraphCompute>(compute.read()),
            free: std::mem::transmute::<usize, abi::FreeBackend>(free.read()),
            work: Mutex::default(),
        };
        BACKENDS.write().unwrap_or_else(PoisonError::into_inner).insert(backend as usize, Arc::new(wrapped));
        compute.write(graph_compute as abi::GraphCompute as usize);
        free.write(free_backend as abi::FreeBackend as usize);
    }
}

fn wrapped(backend: *mut Backend) -> Option<Arc<Wrapped>> {
    BACKENDS.read().unwrap_or_else(PoisonError::into_inner).get(&(backend as usize)).map(Arc::clone)
}

/// Stands in for a CPU backend's `free`.
unsafe extern "C" fn free_backend(backend: *mut Backend) {
    let wrapped = BACKENDS.write().unwrap_or_else(PoisonError::into_inner).remove(&(backend as usize));
    if let Some(wrapped) = wrapped {
        // SAFETY: the function that was in this slot, with its argument.
        unsafe { (wrapped.free)(backend) };
    }
}

/// Stands in for a CPU backend's `graph_compute`.
unsafe extern "C" fn graph_compute(backend: *mut Backend, graph: *mut Graph) -> c_int {
    let Some(wrapped) = wrapped(backend) else { return abi::STATUS_FAILED };
    let guard = match wrapped.work.try_lock() {
        Ok(guard) => Some(guard),
        Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
        // Two calls at once on one backend: the host's business, and its own operator's.
        Err(TryLockError::WouldBlock) => None,
    };
    if let Some(mut work) = guard {
        let mut call = Call { wrapped: &wrapped, backend, graph, jobs: Vec::new(), undo: Vec::new() };
        // SAFETY: the host's graph for its own backend.
        let prepared = catch_unwind(AssertUnwindSafe(|| unsafe { call.prepare(&mut work) }));
        if prepared.is_ok_and(|jobs| jobs > 0) {
            // SAFETY: prepared for this very graph. No panic can come from here on that would leave it changed:
            // `Call` puts everything back when it is dropped.
            let status = catch_unwind(AssertUnwindSafe(|| unsafe { call.run() }));
            return status.unwrap_or(abi::STATUS_FAILED);
        }
    }
    // SAFETY: the host's function with the host's arguments.
    unsafe { (wrapped.graph_compute)(backend, graph) }
}

/// One node of the operator in one call.
struct Job {
    index: usize,
    node: *mut Tensor,
    operands: Operands,
    variant: Variant,
    /// The GET_ROWS and CPY that the run replaces.
    gather: Option<*mut Tensor>,
    copy: Option<*mut Tensor>,
    places: Places,
    kernel: Box<Kernel>,
}

/// What our function gets through the node's user data.
struct Kernel {
    problem: Problem,
    plan: Plan,
    scratch: *mut u8,
    scratch_each: usize,
    failed: AtomicBool,
}

/// GGML_OP_CUSTOM's function: part `ith` of `nth`, on one of the host's threads.
unsafe extern "C" fn compute(_: *mut Tensor, ith: c_int, nth: c_int, kernel: *mut c_void) {
    // SAFETY: the user data of a node that `Call::substitute` changed; the call outlives the host's threads' work.
    let kernel = unsafe { &*kernel.cast::<Kernel>() };
    let (ith, nth) = (ith as usize, (nth as usize).min(scratch::MAX_THREADS));
    if ith < nth {
        // SAFETY: scratch has a share for each of MAX_THREADS threads; this part alone uses this one.
        let scratch = unsafe { scratch::share(kernel.scratch, kernel.scratch_each, ith) };
        // SAFETY: the problem was made from this node in this call; the host keeps its tensors alive, runs the parts
        // of a node together, and no other node meanwhile. The scratch has the plan's size, so this cannot fail.
        let run = || unsafe { cpu::run_part(&kernel.problem, &kernel.plan, ith, nth, scratch) };
        // A panic must not reach the host's thread; the call reports it as a failed graph.
        if !matches!(catch_unwind(AssertUnwindSafe(run)), Ok(Ok(()))) {
            kernel.failed.store(true, Ordering::Relaxed);
        }
    }
}

/// What a changed node looked like.
struct Undo {
    node: *mut Tensor,
    op: c_int,
    op_params: [i32; 16],
}

struct Call<'a> {
    wrapped: &'a Wrapped,
    backend: *mut Backend,
    graph: *mut Graph,
    jobs: Vec<Job>,
    undo: Vec<Undo>,
}

impl Drop for Call<'_> {
    fn drop(&mut self) {
        for undo in self.undo.drain(..).rev() {
            // SAFETY: a node of the graph that this call has changed; the host waits for this call.
            unsafe {
                (*undo.node).op = undo.op;
                (*undo.node).op_params = undo.op_params;
            }
        }
    }
}

impl Call<'_> {
    /// Finds the operator's nodes and decides about each. Returns how many are ours; changes nothing.
    ///
    /// # Safety
    /// `self.graph` is a graph that the host wants computed.
    unsafe fn prepare(&mut self, work: &mut Work) -> usize {
        let host = &self.wrapped.host;
        // SAFETY: the caller's promise.
        let graph = unsafe { &*self.graph };
        // SAFETY: the host's function on the host's graph.
        let count = host.graph_n_nodes.map_or(graph.n_nodes, |n_nodes| unsafe { n_nodes(self.graph) });
        if count != graph.n_nodes || count <= 0 || graph.nodes.is_null() {
            if count != graph.n_nodes {
                log::once_at(
                    Level::Warning,
                    "the host's graphs have an unknown structure; they stay as they are".into(),
                );
            }
            return 0;
        }
        // SAFETY: the graph has that many nodes; nobody else writes to the array during this call.
        let nodes = unsafe { std::slice::from_raw_parts(graph.nodes, count as usize) };
        let mut taken = Vec::new();
        let mut left = Vec::new();
        for (index, node) in nodes.iter().enumerate() {
            // SAFETY: nodes of a graph are tensors.
            let tensor = unsafe { &**node };
            if tensor.op != host.ops.gated_delta_net || tensor.flags & abi::FLAG_COMPUTE == 0 {
                continue;
            }
            // SAFETY: a node of this operator.
            match unsafe { self.operands(*node) } {
                Ok(operands) => taken.push((index, operands)),
                Err(why) => left.push(why),
            }
        }
        if !taken.is_empty() {
            let isa = match Isa::in_force() {
                Ok(isa) => isa,
                Err(error) => {
                    log::once_at(Level::Warning, format!("left to the host: {error}"));
                    return 0;
                }
            };
            // SAFETY: the host's graph and nodes.
            let surroundings = unsafe { Surroundings::new(graph, nodes, &host.ops, &taken) };
            let mut in_use = SpansInUse::default();
            let mut unfused = Vec::new();
            for (index, operands) in &taken {
                let variant = Variant::of(operands);
                if verify::refuted(&variant) {
                    left.push("its results did not agree with the host's".into());
                    continue;
                }
                // SAFETY: the host's graph and nodes.
                let fusion = unsafe { surroundings.fusion(*index, operands, |tensor| self.is_host(tensor)) };
                unfused.extend(fusion.why_not.iter().copied());
                // SAFETY: a node of the graph and its operands.
                match unsafe { job(*index, nodes[*index], *operands, variant, &fusion, isa, &mut in_use) } {
                    Ok(job) => self.jobs.push(job),
                    Err(why) => left.push(why),
                }
            }
            let size = self.jobs.iter().map(|job| job.kernel.plan.scratch_size()).max().unwrap_or(0);
            if !work.scratch.reserve(size) {
                left.extend(self.jobs.drain(..).map(|_| format!("{size} bytes of scratch a thread could not be had")));
            }
            let (first, each) = work.scratch.shares();
            for job in &mut self.jobs {
                (job.kernel.scratch, job.kernel.scratch_each) = (first, each);
            }
            self.report(&unfused);
        }
        for why in &left {
            log::once_at(Level::Warning, format!("a GATED_DELTA_NET node stays with the host: {why}"));
        }
        COUNTERS.left.fetch_add(left.len() as u64, Ordering::Relaxed);
        self.jobs.len()
    }

    /// # Safety
    /// `node` is a node of this operator in the host's graph.
    unsafe fn operands(&self, node: *mut Tensor) -> Result<Operands, String> {
        // SAFETY: passed on.
        let operands = unsafe { tensor::operands(node, (*node).op_params[0])? };
        // SAFETY: a node and its sources, which `operands` found present.
        let foreign = unsafe { (&(*node).src)[..6].iter().chain([&node]).any(|tensor| !self.is_host(&**tensor)) };
        if foreign { Err("a tensor is not in host memory".into()) } else { Ok(operands) }
    }

    /// Whether the tensor's buffer is ordinary memory of this process.
    fn is_host(&self, tensor: &Tensor) -> bool {
        let mut buffer = tensor.buffer;
        if buffer.is_null() && !tensor.view_src.is_null() {
            // SAFETY: views share the buffer of what they view, a tensor of the graph.
            buffer = unsafe { (*tensor.view_src).buffer };
        }
        // A tensor without a buffer has memory that its maker allocated for the CPU (ggml contexts with data).
        // SAFETY: the host's function on the host's buffer.
        buffer.is_null() || unsafe { (self.wrapped.host.buffer_is_host)(buffer) }
    }

    fn report(&self, unfused: &[&str]) {
        let Some(first) = self.jobs.first().filter(|_| log::verbose()) else { return };
        let o = &first.operands;
        let count = |fused: fn(&Job) -> bool| self.jobs.iter().filter(|job| fused(job)).count();
        let mut text = format!(
            "took {} GATED_DELTA_NET nodes (S {}, heads {}/{}, {} gate, T {}, B {}, K {}; {}), {} state reads and {} state writes fused",
            self.jobs.len(),
            o.head_size,
            o.key_heads,
            o.value_heads,
            if o.channel_gate { "channel" } else { "scalar" },
            o.tokens,
            o.sequences,
            o.snapshots,
            first.kernel.plan,
            count(|job| job.gather.is_some()),
            count(|job| job.copy.is_some()),
        );
        let mut reasons = unfused.to_vec();
        reasons.sort_unstable();
        reasons.dedup();
        for reason in reasons {
            text.push_str("; ");
            text.push_str(reason);
        }
        log::once(text);
    }

    /// Computes the graph with our jobs in it, and puts the graph back.
    ///
    /// # Safety
    /// [`Call::prepare`] has prepared this graph just now.
    unsafe fn run(&mut self) -> c_int {
        // SAFETY: the host's graph.
        let (graph, count) = unsafe { (&*self.graph, (*self.graph).n_nodes as usize) };
        let jobs = std::mem::take(&mut self.jobs);
        // SAFETY: passed on.
        let status = unsafe { self.run_jobs(graph, count, &jobs) };
        let failed = jobs.iter().any(|job| job.kernel.failed.load(Ordering::Relaxed));
        if failed { abi::STATUS_FAILED } else { status }
    }

    /// # Safety
    /// As for [`Call::run`]; the graph has `count` nodes.
    unsafe fn run_jobs(&mut self, graph: &Graph, count: usize, jobs: &[Job]) -> c_int {
        let mut proofs = Vec::new();
        for (at, job) in jobs.iter().enumerate() {
            if verify::unproven(&job.variant, job.gather.is_some(), job.copy.is_some()) {
                proofs.push(at);
                // One proof serves all nodes of its kind in this graph, unless every node is to be checked.
                if verify::Mode::in_force() == verify::Mode::First {
                    let same = |other: &Job| {
                        other.variant == job.variant
                            && other.gather.is_some() == job.gather.is_some()
                            && other.copy.is_some() == job.copy.is_some()
                    };
                    if proofs[..proofs.len() - 1].iter().any(|before| same(&jobs[*before])) {
                        proofs.pop();
                    }
                }
            }
        }
        // SAFETY: nodes of the host's graph, which waits for this call.
        unsafe {
            if proofs.is_empty() {
                jobs.iter().for_each(|job| self.substitute(job));
                let status = (self.wrapped.graph_compute)(self.backend, self.graph);
                jobs.iter().for_each(count_taken);
                return status;
            }
            let mut start = 0;
            let mut refuted: Vec<Variant> = Vec::new();
            for (at, job) in jobs.iter().enumerate() {
                if refuted.contains(&job.variant) {
                    COUNTERS.left.fetch_add(1, Ordering::Relaxed);
                    continue;
                }
                if !proofs.contains(&at) {
                    self.substitute(job);
                    count_taken(job);
                    continue;
                }
                let status = self.compute_nodes(graph, graph.nodes.add(start), job.index - start);
                if status != abi::STATUS_SUCCESS {
                    return status;
                }
                match self.prove(graph, job) {
                    Ok(true) => count_taken(job),
                    Ok(false) => refuted.push(job.variant),
                    Err(status) => return status,
                }
                start = job.index + 1;
            }
            self.compute_nodes(graph, graph.nodes.add(start), count - start)
        }
    }

    /// Computes `count` nodes with the host's own function.
    ///
    /// # Safety
    /// `nodes` points to that many nodes of the host's graph.
    unsafe fn compute_nodes(&self, graph: &Graph, nodes: *mut *mut Tensor, count: usize) -> c_int {
        if count == 0 {
            return abi::STATUS_SUCCESS;
        }
        let mut view = GraphView::new(graph, nodes, count);
        // SAFETY: a graph over nodes of the host, in the form that the host itself uses for parts of graphs.
        unsafe { (self.wrapped.graph_compute)(self.backend, view.as_mut_ptr()) }
    }

    /// Runs the host's operator and ours on the same inputs and compares. When they agree, our result stays;
    /// otherwise the host's does, and its copy will run. The error is a status that ends the call.
    ///
    /// # Safety
    /// All nodes before the job's have been computed, its own gather included; the later ones have not.
    unsafe fn prove(&mut self, graph: &Graph, job: &Job) -> Result<bool, c_int> {
        let mut own: Vec<f32> = Vec::new();
        // SAFETY: nodes of the host's graph throughout.
        unsafe {
            let elements = (*job.node).elements();
            if own.try_reserve_exact(elements).is_err() {
                return Err(abi::STATUS_FAILED);
            }
            own.resize(elements, 0.0);
            let mut host_node = *job.node;
            host_node.data = own.as_mut_ptr().cast();
            host_node.extra = std::ptr::null_mut();
            let mut nodes = [&raw mut host_node];
            let status = self.compute_nodes(graph, nodes.as_mut_ptr(), 1);
            if status != abi::STATUS_SUCCESS {
                return Err(status);
            }
            // The gather has run; only the node itself is replaced until the result is known.
            self.replace(job.node, self.wrapped.host.ops.custom, Some(&job.kernel));
            let mut nodes = [job.node];
            let status = self.compute_nodes(graph, nodes.as_mut_ptr(), 1);
            if status != abi::STATUS_SUCCESS {
                return Err(status);
            }
            let data = (*job.node).data.cast::<f32>();
            let outcome = verify::compare(&own, &job.operands, data, &job.places);
            COUNTERS.verified.fetch_add(1, Ordering::Relaxed);
            verify::decide(&job.variant, job.gather.is_some(), job.copy.is_some(), outcome.is_ok());
            let Err(difference) = outcome else {
                if let Some(copy) = job.copy {
                    self.replace(copy, self.wrapped.host.ops.none, None);
                }
                return Ok(true);
            };
            COUNTERS.mismatches.fetch_add(1, Ordering::Relaxed);
            log::line(
                Level::Warning,
                &format!("{:?} goes back to the host for good: {difference} from the host's own", job.variant),
            );
            // Slots that no run writes keep what they had.
            let written = job.operands.out_bytes
                + job.operands.state_bytes() * job.operands.sequences * job.operands.written_slots();
            std::ptr::copy_nonoverlapping(own.as_ptr().cast::<u8>(), data.cast::<u8>(), written);
            Ok(false)
        }
    }

    /// Puts our function in the job's place, and nothing in the place of what it fuses.
    ///
    /// # Safety
    /// The job's nodes are of the host's graph.
    unsafe fn substitute(&mut self, job: &Job) {
        let Ops { custom, none, .. } = self.wrapped.host.ops;
        // SAFETY: passed on.
        unsafe {
            self.replace(job.node, custom, Some(&job.kernel));
            for node in [job.gather, job.copy].into_iter().flatten() {
                self.replace(node, none, None);
            }
        }
    }

    /// # Safety
    /// `node` is a node of the host's graph; `kernel` lives until the call is over.
    unsafe fn replace(&mut self, node: *mut Tensor, op: c_int, kernel: Option<&Kernel>) {
        // SAFETY: passed on; op_params has room for the custom op's parameters (asserted), which need not be aligned.
        unsafe {
            self.undo.push(Undo { node, op: (*node).op, op_params: (*node).op_params });
            (*node).op = op;
            if let Some(kernel) = kernel {
                let userdata = (&raw const *kernel).cast_mut().cast();
                let params = CustomOpParams { fun: compute, n_tasks: abi::ALL_THREADS, userdata };
                (&raw mut (*node).op_params).cast::<CustomOpParams>().write_unaligned(params);
            }
        }
    }
}

fn count_taken(job: &Job) {
    COUNTERS.taken.fetch_add(1, Ordering::Relaxed);
    COUNTERS.reads_fused.fetch_add(u64::from(job.gather.is_some()), Ordering::Relaxed);
    COUNTERS.writes_fused.fetch_add(u64::from(job.copy.is_some()), Ordering::Relaxed);
}

/// Cache memory that fused nodes of one graph read and write at changed times: no two of them may meet there.
#[derive(Default)]
struct SpansInUse {
    read: Vec<(usize, usize)>,
    written: Vec<(usize, usize)>,
}

impl SpansInUse {
    /// Adds a node's spans, unless they meet another node's.
    fn add(&mut self, read: Option<(usize, usize)>, written: Option<(usize, usize)>) -> bool {
        let meets = |spans: &[(usize, usize)], span: Option<(usize, usize)>| {
            span.is_some_and(|span| spans.iter().any(|other| other.0 < span.1 && span.0 < other.1))
        };
        if meets(&self.written, read) || meets(&self.written, written) || meets(&self.read, written) {
            return false;
        }
        self.read.extend(read);
        self.written.extend(written);
        true
    }
}

/// The job for a node, with as much fused as its problem allows.
///
/// # Safety
/// `operands` and `fusion` were read from `node`, a node of the host's graph.
unsafe fn job(
    index: usize,
    node: *mut Tensor,
    operands: Operands,
    variant: Variant,
    fusion: &Fusion,
    isa: Isa,
    in_use: &mut SpansInUse,
) -> Result<Job, String> {
    let mut why = String::new();
    for (read, write) in [(true, true), (false, true), (true, false), (false, false)] {
        let Some(places) = fusion.places(&operands, read, write) else { continue };
        // SAFETY: the rows stay in `places`, which the job keeps beside the problem.
        let problem = match unsafe { operands.problem(&places) } {
            Ok(problem) => problem,
            Err(error) => {
                why = error.to_string();
                continue;
            }
        };
        let read_part = fusion.read.as_ref().filter(|_| read);
        let write_part = fusion.write.as_ref().filter(|_| write);
        if !in_use.add(read_part.map(|part| part.span), write_part.map(|part| part.span)) {
            continue;
        }
        let plan = Plan::new(&problem, isa).map_err(|error| error.to_string())?;
        let (gather, copy) = (read_part.map(|part| part.gather), write_part.map(|part| part.copy));
        let kernel = Box::new(Kernel {
            problem,
            plan,
            scratch: std::ptr::null_mut(),
            scratch_each: 0,
            failed: AtomicBool::new(false),
        });
        return Ok(Job { index, node, operands, variant, gather, copy, places, kernel });
    }
    Err(why)
}
