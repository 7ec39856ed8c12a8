//! The plugin in hosts that no registry has: such as lie, change, or are not as known. They are made up here, in the
//! known structures, and register the way that a static host does.

mod device;

use super::abi::{self, Backend, CustomOpParams, Device, Graph, HashSet, Registry, Tensor};
use super::symbols::Host;
use super::{substitute, tensor, verify};
use crate::cpu::{self, Isa};
use crate::error::Status;
use crate::plan::Plan;
use std::ffi::{CStr, c_char, c_int, c_void};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicUsize, Ordering};

const NAMES: [&CStr; 11] = [
    c"NONE",
    c"RESHAPE",
    c"VIEW",
    c"PERMUTE",
    c"TRANSPOSE",
    c"CPY",
    c"GET_ROWS",
    c"L2_NORM",
    c"CUSTOM",
    c"GATED_DELTA_NET",
    c"GLU",
];
const CUSTOM: c_int = 8;
const GATED_DELTA_NET: c_int = 9;

unsafe extern "C" fn op_name(op: c_int) -> *const c_char {
    NAMES[op as usize].as_ptr()
}

unsafe extern "C" fn op_name_before_the_operator(op: c_int) -> *const c_char {
    if op == GATED_DELTA_NET { c"GLU".as_ptr() } else { NAMES[op as usize].as_ptr() }
}

/// A buffer of another device.
static FOREIGN: u8 = 0;

unsafe extern "C" fn buffer_is_host(buffer: *mut c_void) -> bool {
    !std::ptr::eq(buffer.cast(), &raw const FOREIGN)
}

/// What a made-up host is like; its device's context.
struct Nature {
    slots: usize,
    /// The operator's results are wrong.
    lies: AtomicBool,
    /// It runs the nodes in so many parts.
    threads: AtomicI32,
    /// Every graph fails after its first node.
    fails: AtomicBool,
    computed_by_host: AtomicUsize,
}

unsafe extern "C" fn name(_: *mut Backend) -> *const c_char {
    c"made up".as_ptr()
}

unsafe extern "C" fn plan(_: *mut Backend) {}

unsafe extern "C" fn free(backend: *mut Backend) {
    // SAFETY: made by `init`.
    drop(unsafe { Box::from_raw(backend.cast::<[usize; 24]>()) });
}

unsafe extern "C" fn init(device: *mut Device, _: *const c_char) -> *mut Backend {
    // SAFETY: a device of these tests.
    let slots = unsafe { (*(*device).context.cast::<Nature>()).slots };
    let mut words = Box::new([0usize; 24]);
    words[0] = 1;
    words[1] = name as unsafe extern "C" fn(*mut Backend) -> *const c_char as usize;
    words[2] = free as abi::FreeBackend as usize;
    let compute_slot = if slots == 14 { 10 } else { slots - 4 };
    for slot in [compute_slot - 4, compute_slot - 3, compute_slot - 1] {
        words[1 + slot] = plan as abi::FreeBackend as usize;
    }
    words[1 + compute_slot] = compute as abi::GraphCompute as usize;
    words[1 + slots] = device as usize;
    words[2 + slots] = device as usize;
    Box::into_raw(words).cast()
}

unsafe extern "C" fn compute(backend: *mut Backend, graph: *mut Graph) -> c_int {
    // SAFETY: backends, graphs and nodes of these tests; the first layout word that is a device is its own.
    unsafe {
        let words = &*backend.cast::<[usize; 24]>();
        let device = if words[15] != 0 { words[15] } else { words[17] } as *mut Device;
        let nature = &*(*device).context.cast::<Nature>();
        for at in 0..(*graph).n_nodes as usize {
            let node = *(*graph).nodes.add(at);
            if (*node).op == CUSTOM {
                let params = (&raw const (*node).op_params).cast::<CustomOpParams>().read_unaligned();
                let threads = nature.threads.load(Ordering::Relaxed);
                (0..threads).for_each(|ith| (params.fun)(node, ith, threads, params.userdata));
            } else if (*node).op == GATED_DELTA_NET {
                nature.computed_by_host.fetch_add(1, Ordering::Relaxed);
                // A form that no host could compute is not computed here either.
                let Ok(operands) = tensor::operands(node, (*node).op_params[0]) else { continue };
                let places = operands.own_places();
                let problem = operands.problem(&places).expect("a valid node");
                let plan = Plan::new(&problem, Isa::Scalar).expect("a plan");
                cpu::run(&problem, &plan, 1).expect("computed");
                if nature.lies.load(Ordering::Relaxed) {
                    *(*node).data.cast::<f32>() += 1.0;
                }
            }
            if nature.fails.load(Ordering::Relaxed) {
                return abi::STATUS_FAILED;
            }
        }
    }
    abi::STATUS_SUCCESS
}

/// A device of a made-up host, which lives as long as the tests.
fn device(slots: usize, api_version: c_int) -> &'static mut Device {
    let registry = Box::leak(Box::new(Registry {
        api_version,
        get_name: None,
        get_device_count: None,
        get_device: None,
        get_proc_address: None,
        context: std::ptr::null_mut(),
    }));
    let nature = Box::leak(Box::new(Nature {
        slots,
        lies: AtomicBool::new(false),
        threads: AtomicI32::new(2),
        fails: AtomicBool::new(false),
        computed_by_host: AtomicUsize::new(0),
    }));
    // SAFETY: all fields are pointers, optional functions or null.
    let mut device: Device = unsafe { std::mem::zeroed() };
    device.init_backend = Some(init);
    device.registry = registry;
    device.context = (&raw mut *nature).cast();
    Box::leak(Box::new(device))
}

fn host(device: &mut Device) -> Result<Host, String> {
    let overhead = Some(abi::TENSOR_OVERHEAD);
    // SAFETY: functions and a device of these tests, of the known structure.
    unsafe { Host::new(device, op_name, buffer_is_host, None, overhead, "made up".into()) }
}

/// One node of the operator with its memory.
struct Case {
    node: Box<Tensor>,
    memory: Vec<Vec<f32>>,
    #[allow(clippy::vec_box, reason = "nodes point to them: they must not move")]
    _sources: Vec<Box<Tensor>>,
}

const S: usize = 16;

/// A node of one sequence; `heads` tells the tests' variants apart.
fn case(heads: usize, tokens: usize) -> Case {
    let shapes = [
        [S, heads, tokens, 1],
        [S, heads, tokens, 1],
        [S, heads, tokens, 1],
        [1, heads, tokens, 1],
        [1, heads, tokens, 1],
        [S, S, heads, 1],
        [S * heads, tokens + S, 1, 1],
    ];
    let mut random = 1u32;
    let mut memory: Vec<Vec<f32>> = Vec::new();
    let mut tensors: Vec<Box<Tensor>> = Vec::new();
    for (at, ne) in shapes.into_iter().enumerate() {
        let mut values = vec![f32::NAN; ne.iter().product()];
        for value in values.iter_mut().filter(|_| at < 6) {
            random = random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            *value = (random >> 8) as f32 / (1 << 24) as f32 - if at == 3 { 1.0 } else { 0.5 };
        }
        memory.push(values);
        // SAFETY: all fields are integers or pointers.
        let mut tensor: Box<Tensor> = Box::new(unsafe { std::mem::zeroed() });
        tensor.ne = ne.map(|ne| ne as i64);
        tensor.nb[0] = 4;
        for axis in 1..4 {
            tensor.nb[axis] = tensor.nb[axis - 1] * ne[axis - 1];
        }
        tensor.data = memory[at].as_mut_ptr().cast();
        tensors.push(tensor);
    }
    let mut node = tensors.pop().expect("seven tensors");
    node.op = GATED_DELTA_NET;
    node.op_params[0] = 1;
    node.flags = abi::FLAG_COMPUTE;
    for (at, source) in tensors.iter_mut().enumerate() {
        node.src[at] = &raw mut **source;
    }
    Case { node, memory, _sources: tensors }
}

/// Computes the node as a graph of its own; the status and the result.
fn run(device: &mut Device, case: &mut Case) -> (c_int, Vec<f32>) {
    case.memory[6].fill(f32::NAN);
    let before = *case.node;
    let status = compute_graph(device, &mut [&raw mut *case.node]);
    assert_eq!((before.op, before.op_params), (case.node.op, case.node.op_params), "the graph is put back");
    (status, case.memory[6].clone())
}

/// A graph of these nodes.
fn graph(nodes: &mut [*mut Tensor]) -> Graph {
    let null = std::ptr::null_mut();
    Graph {
        size: nodes.len() as c_int,
        n_nodes: nodes.len() as c_int,
        n_leafs: 0,
        nodes: nodes.as_mut_ptr(),
        grads: null,
        grad_accs: null,
        leafs: null,
        use_counts: std::ptr::null_mut(),
        visited: HashSet { size: 0, used: std::ptr::null_mut(), keys: null },
        order: 0,
    }
}

/// Computes a graph as a host does it: init, compute through the backend's slot, free.
fn compute_graph(device: &mut Device, nodes: &mut [*mut Tensor]) -> c_int {
    let mut graph = graph(nodes);
    let init = device.init_backend.expect("a device");
    // SAFETY: a device and nodes of these tests, in the known structures.
    unsafe {
        let backend = init(device, std::ptr::null());
        let words = &*backend.cast::<[usize; 24]>();
        let compute: abi::GraphCompute = std::mem::transmute(if words[15] != 0 { words[11] } else { words[13] });
        let free: abi::FreeBackend = std::mem::transmute(words[2]);
        let status = compute(backend, &raw mut graph);
        free(backend);
        status
    }
}

fn nature(device: &Device) -> &'static Nature {
    // SAFETY: leaked by `device`.
    unsafe { &*device.context.cast::<Nature>() }
}

#[test]
fn both_structures_take_over() {
    for (slots, api_version, heads) in [(14, 2, 1), (16, 2, 2), (16, 3, 3)] {
        let device = device(slots, api_version);
        let (status, own) = run(device, &mut case(heads, 4));
        assert_eq!((status, nature(device).computed_by_host.load(Ordering::Relaxed)), (abi::STATUS_SUCCESS, 1));
        substitute::attach(Arc::new(host(device).expect("a known host"))).expect("attached");
        // Once for the proof, then not again, whatever the number of threads.
        for (threads, by_host) in [(2, 2), (1, 2), (3, 2), (700, 2)] {
            nature(device).threads.store(threads, Ordering::Relaxed);
            let (status, ours) = run(device, &mut case(heads, 4));
            assert_eq!(status, abi::STATUS_SUCCESS);
            assert_eq!(nature(device).computed_by_host.load(Ordering::Relaxed), by_host);
            let error: f32 = own.iter().zip(&ours).map(|(a, b)| (a - b).powi(2)).sum();
            assert!(error < 1e-10, "{error} with {threads} threads");
        }
    }
}

#[test]
fn a_host_that_disagrees_keeps_the_variant() {
    let device = device(16, 2);
    nature(device).lies.store(true, Ordering::Relaxed);
    let (_, own) = run(device, &mut case(5, 3));
    substitute::attach(Arc::new(host(device).expect("a known host"))).expect("attached");
    for _ in 0..3 {
        let mut case = case(5, 3);
        let (status, result) = run(device, &mut case);
        // SAFETY: the case's node.
        let operands = unsafe { tensor::operands(&raw const *case.node, 1) }.expect("a valid node");
        assert!(verify::refuted(&verify::Variant::of(&operands)));
        assert_eq!((status, result), (abi::STATUS_SUCCESS, own.clone()), "the host's own result");
    }
    assert_eq!(nature(device).computed_by_host.load(Ordering::Relaxed), 4);
}

/// Of two nodes of a kind in one graph, the first is compared; when it disagrees, the second is not tried.
#[test]
fn one_disagreement_in_a_graph_is_enough() {
    let device = device(16, 3);
    nature(device).lies.store(true, Ordering::Relaxed);
    let mut cases = [case(15, 3), case(15, 3)];
    let mut nodes = cases.each_mut().map(|case| &raw mut *case.node);
    assert_eq!(compute_graph(device, &mut nodes), abi::STATUS_SUCCESS);
    let own = cases.each_ref().map(|case| case.memory[6].clone());
    substitute::attach(Arc::new(host(device).expect("a known host"))).expect("attached");
    for by_host in [4, 6] {
        cases.iter_mut().for_each(|case| case.memory[6].fill(f32::NAN));
        assert_eq!(compute_graph(device, &mut nodes), abi::STATUS_SUCCESS);
        assert_eq!(cases.each_ref().map(|case| case.memory[6].clone()), own, "the host's own results");
        assert_eq!(nature(device).computed_by_host.load(Ordering::Relaxed), by_host);
    }
}

#[test]
fn graphs_of_unknown_structure_stay_with_the_host() {
    unsafe extern "C" fn one_more(graph: *mut Graph) -> c_int {
        // SAFETY: a graph of these tests.
        unsafe { (*graph).n_nodes + 1 }
    }
    let device = device(16, 3);
    // SAFETY: functions and a device of these tests.
    let host = unsafe { Host::new(device, op_name, buffer_is_host, Some(one_more), None, String::new()) };
    substitute::attach(Arc::new(host.expect("a known host"))).expect("attached");
    for by_host in 1..4 {
        assert_eq!(run(device, &mut case(16, 2)).0, abi::STATUS_SUCCESS);
        assert_eq!(nature(device).computed_by_host.load(Ordering::Relaxed), by_host);
    }
    assert_eq!(compute_graph(device, &mut []), abi::STATUS_SUCCESS, "nothing to do");
}

#[test]
fn devices_without_backends_are_declined() {
    unsafe extern "C" fn none(_: *mut Device, _: *const c_char) -> *mut Backend {
        std::ptr::null_mut()
    }
    let device = device(16, 3);
    let attach = |device: &mut Device| substitute::attach(Arc::new(host(device).expect("a known host")));
    let init = device.init_backend.take();
    assert!(attach(device).is_err_and(|why| why.contains("no init_backend")));
    device.init_backend = Some(none);
    assert!(attach(device).is_err_and(|why| why.contains("makes no backend")));
    device.init_backend = init;
    attach(device).expect("attached");
    let ours = device.init_backend.map(|init| init as usize);
    attach(device).expect("once is enough");
    assert_eq!(device.init_backend.map(|init| init as usize), ours);
}

#[test]
fn a_failing_graph_is_put_back() {
    let device = device(16, 3);
    nature(device).fails.store(true, Ordering::Relaxed);
    substitute::attach(Arc::new(host(device).expect("a known host"))).expect("attached");
    assert_eq!(run(device, &mut case(6, 3)).0, abi::STATUS_FAILED);
}

#[test]
fn unknown_hosts_are_declined() {
    let refused = |slots, api_version| host(device(slots, api_version)).err();
    assert!(refused(16, 4).is_some_and(|why| why.contains("API version is 4")));
    assert!(refused(16, 1).is_some_and(|why| why.contains("API version is 1")));
    assert!(refused(16, 3).is_none());
    let known = device(16, 3);
    // SAFETY: functions and a device of these tests.
    let (larger, without) = unsafe {
        (
            Host::new(known, op_name, buffer_is_host, None, Some(384), String::new()),
            Host::new(known, op_name_before_the_operator, buffer_is_host, None, None, String::new()),
        )
    };
    assert!(larger.err().is_some_and(|why| why.contains("384")));
    assert!(without.err().is_some_and(|why| why.contains("GATED_DELTA_NET")));

    let other = device(18, 3);
    let before = other.init_backend.map(|init| init as usize);
    let outcome = substitute::attach(Arc::new(host(other).expect("a known version")));
    assert!(outcome.is_err_and(|why| why.contains("structure")));
    assert_eq!(other.init_backend.map(|init| init as usize), before, "left as it was");
}

#[test]
fn a_device_in_read_only_memory_is_declined() {
    let source = device(16, 3);
    // SAFETY: a page of our own, made read-only once the device is in it.
    let device = unsafe {
        let (access, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        let page = libc::mmap(std::ptr::null_mut(), 4096, access, flags, -1, 0).cast::<Device>();
        std::ptr::copy_nonoverlapping(&raw const *source, page, 1);
        assert_eq!(libc::mprotect(page.cast(), 4096, libc::PROT_READ), 0);
        Host::new(page, op_name, buffer_is_host, None, None, String::new())
    };
    let outcome = substitute::attach(Arc::new(device.expect("a known version")));
    assert!(outcome.is_err_and(|why| why.contains("read-only")));
}

#[test]
fn nodes_that_look_wrong_stay_with_the_host() {
    let device = device(16, 2);
    substitute::attach(Arc::new(host(device).expect("a known host"))).expect("attached");
    let nature = nature(device);
    type Spoil = fn(&mut Tensor);
    let spoil: [(&str, Spoil); 8] = [
        ("K larger than the buffer", |node| node.op_params[0] = 4),
        ("a negative K", |node| node.op_params[0] = -1),
        ("a missing source", |node| node.src[3] = std::ptr::null_mut()),
        ("a seventh source", |node| node.src[6] = node.src[0]),
        ("a result that is too small", |node| node.ne[1] -= 1),
        ("another type", |node| node.dtype = 1),
        ("a result without memory", |node| node.data = std::ptr::null_mut()),
        ("a result on another device", |node| node.buffer = (&raw const FOREIGN).cast_mut().cast()),
    ];
    for (what, spoil) in spoil {
        let before = nature.computed_by_host.load(Ordering::Relaxed);
        let mut case = case(7, 2);
        spoil(&mut case.node);
        assert_eq!(run(device, &mut case).0, abi::STATUS_SUCCESS, "{what}");
        assert_eq!(nature.computed_by_host.load(Ordering::Relaxed), before + 1, "{what}: the host's own");
    }
    for source in 0..6 {
        let before = nature.computed_by_host.load(Ordering::Relaxed);
        let mut case = case(7, 2);
        // SAFETY: a tensor of the case.
        unsafe { (*case.node.src[source]).buffer = (&raw const FOREIGN).cast_mut().cast() };
        assert_eq!(run(device, &mut case).0, abi::STATUS_SUCCESS);
        let computed = nature.computed_by_host.load(Ordering::Relaxed);
        assert_eq!(computed, before + 1, "source {source} on another device: the host's own");
    }
    // A node that the host will not compute is not computed here either.
    let before = nature.computed_by_host.load(Ordering::Relaxed);
    let mut skipped = case(7, 2);
    skipped.node.flags = 0;
    run(device, &mut skipped);
    assert_eq!(nature.computed_by_host.load(Ordering::Relaxed), before + 1);
}

/// A process without a ggml that exports its symbols: this one. The plugin must still give a registry, without devices.
#[test]
fn a_host_without_symbols_is_declined() {
    let why = super::symbols::find_host().err().expect("nothing to find here");
    assert!(why.contains("ggml_backend_dev_by_type") && why.contains("deltanet_ggml_attach"), "{why}");
    let registry = super::plugin::ggml_backend_init().cast::<Registry>();
    assert!(!registry.is_null());
    // SAFETY: the plugin's own registry, which lives as long as the process.
    unsafe {
        assert!(abi::API_VERSIONS.contains(&(*registry).api_version));
        assert_eq!((*registry).get_device_count.expect("a function")(registry), 0);
        assert!((*registry).get_device.expect("a function")(registry, 0).is_null());
        assert!(
            (*registry).get_proc_address.expect("a function")(registry, c"ggml_backend_set_n_threads".as_ptr())
                .is_null()
        );
        assert!((*registry).get_proc_address.expect("a function")(registry, std::ptr::null()).is_null());
    }
}

/// What a program that links ggml statically does, with every mistake that it can make.
#[test]
fn a_static_host_attaches() {
    use crate::capi::{GgmlHost, deltanet_ggml_attach, deltanet_last_error};
    let device = device(16, 3);
    let good = GgmlHost {
        struct_size: size_of::<GgmlHost>() as u32,
        reserved: 0,
        cpu_device: (&raw mut *device).cast(),
        op_name: Some(op_name),
        buffer_is_host: Some(buffer_is_host),
        tensor_overhead: abi::TENSOR_OVERHEAD,
    };
    let refused = |host: *const GgmlHost, word: &str| {
        // SAFETY: null, or a struct as large as it says.
        let registry = unsafe { deltanet_ggml_attach(host) };
        // SAFETY: a C string of this thread.
        let words = unsafe { CStr::from_ptr(deltanet_last_error()) }.to_string_lossy().into_owned();
        assert!(registry.is_null() && words.contains(word), "{words}: want {word}");
    };
    let init = device.init_backend.map(|init| init as usize);
    refused(std::ptr::null(), "NULL_POINTER: host is null");
    refused((&raw const good).wrapping_byte_add(4), "MISALIGNED: host is 0x");
    refused(&GgmlHost { struct_size: 8, ..good }, "STRUCT_SIZE: host.struct_size is 8");
    refused(&GgmlHost { cpu_device: std::ptr::null_mut(), ..good }, "NULL_POINTER: host.cpu_device is null");
    refused(&GgmlHost { op_name: None, ..good }, "NULL_POINTER: host.op_name");
    refused(&GgmlHost { buffer_is_host: None, ..good }, "NULL_POINTER: host.op_name or host.buffer_is_host");
    refused(&GgmlHost { tensor_overhead: 384, ..good }, "UNSUPPORTED: ");
    assert_eq!(device.init_backend.map(|init| init as usize), init, "left as it was");

    // SAFETY: functions and a device of these tests.
    let registry = unsafe { deltanet_ggml_attach(&good) }.cast::<Registry>();
    assert!(!registry.is_null());
    // SAFETY: the plugin's own registry, which lives as long as the process.
    unsafe {
        assert_eq!((*registry).api_version, 3);
        let name = CStr::from_ptr((*registry).get_name.expect("a function")(registry));
        assert_eq!((name, (*registry).get_device_count.expect("a function")(registry)), (c"deltanet", 0));
    }
    let before = counters();
    for _ in 0..3 {
        assert_eq!(run(device, &mut case(13, 3)).0, abi::STATUS_SUCCESS);
    }
    let (after, by_host) = (counters(), nature(device).computed_by_host.load(Ordering::Relaxed));
    // Other tests count too.
    assert!(after.taken >= before.taken + 3 && after.verified > before.verified && by_host == 1, "{by_host}");
}

fn counters() -> crate::capi::GgmlCounters {
    use crate::capi::{GgmlCounters, deltanet_ggml_read_counters};
    let size = size_of::<GgmlCounters>() as u32;
    let mut now = GgmlCounters {
        struct_size: size,
        reserved: 7,
        taken: 0,
        left: 0,
        reads_fused: 0,
        writes_fused: 0,
        verified: 0,
        mismatches: 0,
    };
    // SAFETY: null, misaligned, too small, or a struct as large as it says.
    unsafe {
        assert_eq!(deltanet_ggml_read_counters(std::ptr::null_mut()), Status::NullPointer);
        assert_eq!(deltanet_ggml_read_counters((&raw mut now).wrapping_byte_add(4)), Status::Misaligned);
        now.struct_size = size - 8;
        assert_eq!(deltanet_ggml_read_counters(&mut now), Status::StructSize);
        assert_eq!((now.reserved, now.taken), (7, 0), "untouched");
        now.struct_size = size;
        assert_eq!(deltanet_ggml_read_counters(&mut now), Status::Ok);
    }
    assert_eq!((now.struct_size, now.reserved), (size, 0));
    now
}

/// Backends come and go while others compute, as contexts of an engine do.
#[test]
fn backends_made_and_freed_while_others_compute() {
    let device = device(16, 3);
    substitute::attach(Arc::new(host(device).expect("a known host"))).expect("attached");
    let (_, expected) = run(device, &mut case(11, 3));
    let address = &raw mut *device as usize;
    std::thread::scope(|scope| {
        for threads in 1..5 {
            let expected = &expected;
            scope.spawn(move || {
                for _ in 0..30 {
                    // SAFETY: the device is only read, but for the number of threads, which is atomic.
                    let device = unsafe { &mut *(address as *mut Device) };
                    // The number of threads changes under the other backends' feet, too.
                    nature(device).threads.store(threads, Ordering::Relaxed);
                    assert_eq!(&run(device, &mut case(11, 3)).1, expected);
                }
            });
        }
    });
}

#[test]
fn several_backends_at_once() {
    let device = device(14, 2);
    substitute::attach(Arc::new(host(device).expect("a known host"))).expect("attached");
    let (_, expected) = run(device, &mut case(9, 8));
    let address = &raw mut *device as usize;
    std::thread::scope(|scope| {
        for _ in 0..6 {
            let expected = &expected;
            scope.spawn(move || {
                for _ in 0..20 {
                    // SAFETY: the device is only read.
                    let device = unsafe { &mut *(address as *mut Device) };
                    assert_eq!(&run(device, &mut case(9, 8)).1, expected);
                }
            });
        }
    });
}
