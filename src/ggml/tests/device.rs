//! `DELTANET_GGML=device`: a made-up host looks at our device, makes backends of it, and has graphs computed.

use super::super::abi::{self, Backend, Device, DeviceProps, Registry, Tensor};
use super::super::device::set_n_threads;
use super::super::{device, plugin};
use super::{CUSTOM, Case, FOREIGN, GATED_DELTA_NET, case, graph, host, run};
use std::ffi::{CStr, c_int, c_void};
use std::sync::Arc;

const VIEW: c_int = 2;
const L2_NORM: c_int = 7;

static BUFFERS: u8 = 0;

unsafe extern "C" fn get_buffer_type(_: *mut Device) -> *mut c_void {
    (&raw const BUFFERS).cast_mut().cast()
}

unsafe extern "C" fn supports_buft(_: *mut Device, buffer_type: *mut c_void) -> bool {
    std::ptr::eq(buffer_type.cast(), &raw const BUFFERS)
}

/// A host's CPU device, and ours beside it.
fn devices(slots: usize, api_version: c_int) -> (&'static mut Device, &'static mut Device) {
    let cpu = super::device(slots, api_version);
    let ours = device::device(&Arc::new(host(cpu).expect("a known host"))).expect("a device");
    // SAFETY: made for the life of the process, and nobody else has it.
    (cpu, unsafe { &mut *ours })
}

#[test]
fn it_is_described() {
    let (cpu, ours) = devices(16, 3);
    let (mut free, mut total) = (1, 1);
    // SAFETY: our device's own functions, with room for what they write.
    unsafe {
        let ours = &raw mut *ours;
        assert_eq!(CStr::from_ptr((*ours).get_name.expect("a function")(ours)), c"deltanet");
        let about = CStr::from_ptr((*ours).get_description.expect("a function")(ours));
        assert!(about.to_str().is_ok_and(|about| about.contains("gated delta net")));
        assert_eq!((*ours).get_type.expect("a function")(ours), abi::DEVICE_ACCEL);
        (*ours).get_memory.expect("a function")(ours, &mut free, &mut total);
        assert_eq!((free, total), (0, 0));
        let mut props: DeviceProps = std::mem::zeroed();
        props.memory_free = 1;
        props.caps = [true; 8];
        (*ours).get_props.expect("a function")(ours, &mut props);
        assert_eq!((props.memory_free, props.kind, props.caps), (0, abi::DEVICE_ACCEL, [false; 8]));
        assert_eq!(CStr::from_ptr(props.name), c"deltanet");
        // Memory is the CPU device's.
        let get = (*ours).get_buffer_type.expect("a function");
        let supports = (*ours).supports_buft.expect("a function");
        assert!(get(ours).is_null() && !supports(ours, std::ptr::null_mut()));
        cpu.get_buffer_type = Some(get_buffer_type);
        cpu.supports_buft = Some(supports_buft);
        assert!(supports(ours, get(ours)) && !supports(ours, (&raw const FOREIGN).cast_mut().cast()));
    }
}

#[test]
fn unknown_backends_make_no_device() {
    let cpu = super::device(18, 3);
    let why = device::device(&Arc::new(host(cpu).expect("a known version"))).expect_err("no known structure");
    assert!(why.contains("structure"), "{why}");
    cpu.init_backend = None;
    let why = device::device(&Arc::new(host(cpu).expect("a known version"))).expect_err("nothing to call");
    assert!(why.contains("init_backend"), "{why}");
}

#[test]
fn the_operator_agrees_with_the_host() {
    for (slots, api_version, heads) in [(14, 2, 1), (16, 2, 2), (16, 3, 5)] {
        let (cpu, ours) = devices(slots, api_version);
        for tokens in [1, 4, 40] {
            let (status, own) = run(cpu, &mut case(heads, tokens));
            let (ours_status, result) = run(ours, &mut case(heads, tokens));
            assert_eq!((status, ours_status), (abi::STATUS_SUCCESS, abi::STATUS_SUCCESS));
            let error: f32 = own.iter().zip(&result).map(|(a, b)| (a - b).powi(2)).sum();
            assert!(error < 1e-9, "{error} with {tokens} tokens"); // false for a NaN
        }
    }
}

/// What the node is for our device.
fn supported(ours: &mut Device, node: *const Tensor) -> bool {
    let supports = ours.supports_op.expect("a function");
    // SAFETY: our device and a tensor of the test.
    unsafe { supports(ours, node) }
}

#[test]
fn it_takes_what_it_can_compute() {
    let (_, ours) = devices(16, 3);
    let mut good = case(2, 3);
    assert!(supported(ours, &raw const *good.node));
    // Before memory is there, as hosts ask.
    good.node.data = std::ptr::null_mut();
    assert!(supported(ours, &raw const *good.node));
    type Spoil = fn(&mut Tensor);
    let spoil: [(&str, Spoil); 4] = [
        ("a negative K", |node| node.op_params[0] = -1),
        ("a missing source", |node| node.src[0] = std::ptr::null_mut()),
        ("another type", |node| node.dtype = 1),
        ("another operation", |node| node.op = CUSTOM),
    ];
    for (what, spoil) in spoil {
        let mut bad = case(2, 3);
        spoil(&mut bad.node);
        assert!(!supported(ours, &raw const *bad.node), "{what}");
        // A host that does not ask, or does not listen.
        if bad.node.op != CUSTOM {
            assert_eq!(run(ours, &mut bad).0, abi::STATUS_FAILED, "{what}");
        }
    }
    let mut view = case(2, 3);
    view.node.op = VIEW;
    assert!(supported(ours, &raw const *view.node));
    let (status, untouched) = run(ours, &mut view);
    assert!(status == abi::STATUS_SUCCESS && untouched.iter().all(|x| x.is_nan()));
}

/// Rows of 16 floats, each a stride of 24 apart, and where their norms go.
fn rows(n: [i64; 4]) -> Case {
    let mut norm = case(1, 1);
    let count = n[1..].iter().product::<i64>() as usize;
    norm.memory[0] = (0..24 * count).map(|i| ((i * 37 % 101) as f32 - 50.0) / 7.0).collect();
    norm.memory[0][..n[0] as usize].fill(0.0); // nothing to divide by
    norm.memory[6] = vec![f32::NAN; 16 * count];
    let (from, to) = (norm.memory[0].as_mut_ptr(), norm.memory[6].as_mut_ptr());
    let source = norm.node.src[0];
    norm.node.src = [std::ptr::null_mut(); 10];
    norm.node.src[0] = source;
    norm.node.op = L2_NORM;
    norm.node.op_params[0] = 1e-6f32.to_bits() as i32;
    // SAFETY: a tensor of the case, which nobody else looks at.
    let source = unsafe { &mut *source };
    for (tensor, data, row) in [(source, from, 24), (&mut *norm.node, to, 16)] {
        tensor.ne = n;
        tensor.nb = [4, 4 * row, 4 * row * n[1] as usize, 4 * row * (n[1] * n[2]) as usize];
        tensor.data = data.cast();
    }
    norm
}

#[test]
fn norms_are_those_of_the_equation() {
    let (_, ours) = devices(16, 2);
    let mut norm = rows([16, 3, 2, 2]);
    assert!(supported(ours, &raw const *norm.node));
    let expected: Vec<f64> = (norm.memory[0].chunks_exact(24))
        .flat_map(|row| {
            let length = row[..16].iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt();
            row[..16].iter().map(move |x| f64::from(*x) / length.max(1e-6)).collect::<Vec<_>>()
        })
        .collect();
    let (status, got) = run(ours, &mut norm);
    assert_eq!((status, got.len()), (abi::STATUS_SUCCESS, expected.len()));
    assert!(got.iter().zip(&expected).all(|(got, expected)| (f64::from(*got) - expected).abs() < 1e-6));
    // Nothing to compute.
    let mut empty = rows([16, 3, 2, 2]);
    empty.node.ne[1] = 0;
    let (status, untouched) = run(ours, &mut empty);
    assert!(status == abi::STATUS_SUCCESS && untouched.iter().all(|x| x.is_nan()));
    type Spoil = fn(&mut Tensor);
    let spoil: [(&str, Spoil); 4] = [
        ("other extents", |node| node.ne[1] -= 1),
        ("another type", |node| node.dtype = 1),
        // SAFETY: the case's source.
        ("in place", |node| node.data = unsafe { (*node.src[0]).data }),
        ("no source", |node| node.src[0] = std::ptr::null_mut()),
    ];
    for (what, spoil) in spoil {
        let mut bad = rows([16, 3, 2, 2]);
        spoil(&mut bad.node);
        assert!(!supported(ours, &raw const *bad.node), "{what}");
        assert_eq!(run(ours, &mut bad).0, abi::STATUS_FAILED, "{what}");
    }
}

/// What a host does with a device of a plugin: it finds it in the registry, sets threads, and computes graphs.
#[test]
fn its_registry_has_it_and_its_threads() {
    let (_, ours) = devices(16, 3);
    let registry = plugin::registry(3, Some(&raw mut *ours));
    assert_eq!(plugin::registry(3, Some(&raw mut *ours)), registry, "one for a device");
    let mut nodes: Vec<Case> = vec![rows([16, 5, 1, 1]), case(3, 7)];
    // SAFETY: the plugin's own registry and functions, called as a host does.
    unsafe {
        assert_eq!(ours.registry, registry);
        let functions: &Registry = &*registry;
        assert_eq!(functions.get_device_count.expect("a function")(registry), 1);
        assert!(std::ptr::eq(functions.get_device.expect("a function")(registry, 0), ours));
        assert!(functions.get_device.expect("a function")(registry, 1).is_null());
        let find = functions.get_proc_address.expect("a function");
        assert!(find(registry, c"ggml_backend_other".as_ptr()).is_null());
        let set = find(registry, c"ggml_backend_set_n_threads".as_ptr());
        assert_eq!(set as usize, set_n_threads as *mut c_void as usize);

        let backend: *mut Backend = ours.init_backend.expect("a function")(ours, std::ptr::null());
        let words = &*backend.cast::<[usize; 19]>();
        assert_eq!(words[17], &raw mut *ours as usize);
        let name: unsafe extern "C" fn(*mut Backend) -> *const std::ffi::c_char = std::mem::transmute(words[1]);
        assert_eq!(CStr::from_ptr(name(backend)), c"deltanet");
        let compute: abi::GraphCompute = std::mem::transmute(words[13]);
        let free: abi::FreeBackend = std::mem::transmute(words[2]);
        let mut results: Vec<Vec<f32>> = Vec::new();
        // Threads below zero are as many as there are processors, and too many no more than a pool may have.
        for threads in [0, 1, 2, 3, -5] {
            set_n_threads(backend, threads);
            let mut pointers: Vec<*mut Tensor> = nodes.iter_mut().map(|case| &raw mut *case.node).collect();
            let mut graph = graph(&mut pointers);
            assert_eq!(compute(backend, &mut graph), abi::STATUS_SUCCESS, "{threads} threads");
            let written = nodes.iter_mut().flat_map(|case| std::mem::take(&mut case.memory[6]));
            results.push(written.collect());
            for (case, fresh) in nodes.iter_mut().zip([rows([16, 5, 1, 1]), super::case(3, 7)]) {
                case.memory[6] = vec![f32::NAN; fresh.memory[6].len()];
                case.node.data = case.memory[6].as_mut_ptr().cast();
            }
        }
        assert!(results[0].iter().all(|x| x.is_finite()));
        assert!(results.iter().all(|result| result == &results[0]), "the bits of any number of threads");
        set_n_threads(backend, c_int::MAX);
        let mut pointers = vec![&raw mut *nodes[1].node];
        assert_eq!(compute(backend, &mut graph(&mut pointers)), abi::STATUS_FAILED, "more threads than there may be");
        assert!(nodes[1].memory[6].iter().all(|x| x.is_nan()), "a node that is refused writes nothing");
        free(backend);
    }
    assert_eq!(nodes[1].node.op, GATED_DELTA_NET);
}
