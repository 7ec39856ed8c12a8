//! The operator on a GPU: every option against the f64 oracle, graphs, streams, bad input. On a machine without one,
//! what the calls answer there. A GPU machine needs no cargo to run this: the binary needs nothing but the driver.

#[path = "../../tests/support/mod.rs"]
mod support;

use cudarc::driver::CudaContext;
use cudarc::driver::sys::{CUgraphInstantiate_flags, CUstreamCaptureMode};
use deltanet::params::{HeadMap, StateLayout};
use deltanet::problem::Place;
use deltanet::{Params, Problem, Status, reference};
use deltanet_cli::cuda::{self, Gpu, Mirror};
use std::sync::{Mutex, MutexGuard, PoisonError};
use support::sharded::{Whole, shard};
use support::{Case, Rng, Wish, cases, seed};

/// One test at a time has the GPU: a capture forbids other threads what their set-up does.
static TURN: Mutex<()> = Mutex::new(());

/// The GPU, or `None` and a word about it. Under `DELTANET_TEST_GPU=1` there must be one.
fn gpu() -> Option<(MutexGuard<'static, ()>, Gpu)> {
    let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    match Gpu::open(0) {
        Ok(gpu) => Some((turn, gpu)),
        Err(error) => {
            assert!(std::env::var_os("DELTANET_TEST_GPU").is_none(), "{error:#}");
            println!("SKIPPED: {error:#}");
            None
        }
    }
}

fn expect(case: &Case, expected: &reference::Expected, before: &[Vec<u8>], how: &str) {
    let problem = case.problem();
    // SAFETY: the case owns all memory that its params describe.
    let nmse = unsafe { reference::compare(&problem, expected) };
    let chunked = deltanet::cuda::workspace_size(&problem).is_ok_and(|bytes| bytes > 0);
    case.assert_near(&nmse, expected, case.bound_on_cuda(chunked), how);
    case.assert_intact(before);
}

/// Mirrors a case, runs it on the GPU and compares.
fn check(gpu: &Gpu, case: &mut Case) {
    let before = case.memory();
    // SAFETY: the case owns all memory that its params describe; the mirror is waited for.
    let expected = unsafe {
        let expected = reference::evaluate(&case.problem());
        let mirror = Mirror::new(gpu, &case.params).expect("the tensors fit");
        cuda::run(gpu, &mirror).unwrap_or_else(|error| panic!("{error:#}: {}", case.words));
        mirror.download().unwrap_or_else(|error| panic!("{error:#}: {}", case.words));
        expected
    };
    expect(case, &expected, &before, "one run");
}

#[test]
fn random_problems_match_the_oracle() {
    let Some((_turn, gpu)) = gpu() else { return };
    let mut rng = Rng(seed());
    for at in 0..cases(2000) {
        // Half of them for the fast kernels, dense or not.
        let wish = Wish { f32_only: at % 2 == 0, ..Wish::default() };
        check(&gpu, &mut Case::draw(&mut rng, wish));
    }
}

#[test]
fn decode_shapes_match_the_oracle() {
    let Some((_turn, gpu)) = gpu() else { return };
    let mut rng = Rng(seed());
    for head_size in [16, 32, 64, 128, 256] {
        for tokens in [1, 2, 3, 4, 5, 8, 16, 17, 33] {
            for in_place in [false, true] {
                let (head_size, tokens) = (Some(head_size), Some(tokens));
                check(
                    &gpu,
                    &mut Case::draw(&mut rng, Wish { tokens, head_size, f32_only: true, in_place, ..Wish::default() }),
                );
            }
        }
    }
}

/// Prompts of several slabs' worth of chunks, half of them of so few heads that they are scanned in pieces.
#[test]
fn long_prompts_match_the_oracle() {
    let Some((_turn, gpu)) = gpu() else { return };
    let mut rng = Rng(seed());
    for at in 0..cases(2000).div_ceil(50) {
        let head_size = rng.pick(&[32, 64, 128, 128]);
        let (head_size, tokens) = if at % 2 == 0 { (64 << (at / 2 % 2), 520) } else { (head_size, 200) };
        let tokens = tokens + rng.below(1000);
        let wish = Wish {
            tokens: Some(tokens),
            head_size: Some(head_size),
            f32_only: at % 4 < 2,
            scalar_gate: at % 8 != 7,
            ..Wish::default()
        };
        let mut case = loop {
            let case = Case::draw(&mut rng, wish);
            let problem = case.problem();
            let heads = problem.value_heads() * problem.sequences();
            if at % 2 == 1 || case.params.cu_seqlens.data.is_null() && heads * head_size <= 1024 {
                break case;
            }
        };
        check(&gpu, &mut case);
    }
}

#[test]
fn rows_outside_the_pool_are_left_out() {
    let Some((_turn, gpu)) = gpu() else { return };
    let mut rng = Rng(seed());
    let mut seen = 0;
    while seen < cases(2000).div_ceil(100) {
        let mut case = Case::draw(&mut rng, Wish::default());
        let sequences = case.problem().sequences();
        if case.params.rows_in.data.is_null() || case.params.rows_out.data.is_null() || sequences == 0 {
            continue;
        }
        seen += 1;
        let params = case.params;
        let which = if rng.chance(50) { params.rows_in } else { params.rows_out };
        let outside = rng.pick(&[-1i64, params.state_in.ne[3], i64::from(i32::MAX)]);
        for at in 0..sequences {
            let element = which.data.wrapping_byte_add(at * which.nb[0]);
            // SAFETY: inside the case's index tensor, of 32 or 64 bits an element.
            unsafe {
                match which.dtype {
                    3 => element.cast::<i32>().write(outside as i32),
                    _ => element.cast::<i64>().write(outside),
                }
            }
        }
        let before = case.memory();
        // SAFETY: the case owns all memory that its params describe; the mirror is waited for.
        unsafe {
            let mirror = Mirror::new(&gpu, &case.params).expect("the tensors fit");
            cuda::run(&gpu, &mirror).expect("rows on the device cannot be looked at");
            mirror.download().expect("nothing beside the tensors is written to");
        }
        assert!(before == case.memory(), "something was written: {}", case.words);
        case.restore(&before);
    }
}

#[test]
fn graphs_and_streams_give_the_same() {
    let Some((_turn, gpu)) = gpu() else { return };
    let mut rng = Rng(seed());
    for at in 0..cases(2000).div_ceil(50) {
        let mut case = Case::draw(&mut rng, Wish { f32_only: at % 2 == 0, ..Wish::default() });
        let before = case.memory();
        // SAFETY: the case owns all memory that its params describe; the mirrors are waited for.
        unsafe {
            let expected = reference::evaluate(&case.problem());
            let mirror = Mirror::new(&gpu, &case.params).expect("the tensors fit");
            let problem = on_device(&mirror.params);
            let bytes = deltanet::cuda::workspace_size(&problem).expect("the GPU takes every case");
            let workspace = gpu.stream.alloc_zeros::<u8>(bytes.max(1)).expect("there is memory");
            let address = cudarc::driver::DevicePtr::device_ptr(&workspace, &gpu.stream).0 as *mut _;
            gpu.stream.synchronize().expect("the stream works");
            let mode = CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_GLOBAL;
            gpu.stream.begin_capture(mode).expect("a capture starts");
            let captured = deltanet::cuda::run(&problem, address, bytes, gpu.raw_stream());
            let flags = CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH;
            let graph = gpu.stream.end_capture(flags).expect("nothing forbidden happened in the capture");
            captured.expect("a capture is like a run");
            // A problem without tokens or sequences may have nothing to launch.
            if let Some(graph) = graph {
                graph.launch().expect("the graph runs");
            }
            mirror.download().expect("nothing beside the tensors is written to");
            expect(&case, &expected, &before, "a graph");
        }
        case.restore(&before);
    }
    // Two threads on two streams of one context at a time.
    std::thread::scope(|scope| {
        for _ in 0..2 {
            let (seed, context) = (rng.next(), gpu.context.clone());
            scope.spawn(move || {
                context.bind_to_thread().expect("the context is there");
                let stream = context.new_stream().expect("a second stream");
                let gpu = Gpu { context, stream };
                let mut rng = Rng(seed);
                (0..cases(2000).div_ceil(40)).for_each(|_| check(&gpu, &mut Case::draw(&mut rng, Wish::default())));
            });
        }
    });
}

fn on_device(params: &Params) -> Problem {
    // SAFETY: at a device nothing is read.
    unsafe { Problem::at(params, Place::Device) }.expect("the case is valid")
}

/// Status and message of a run that is to be refused.
fn refused(problem: &Problem, stream: *mut std::ffi::c_void) -> (Status, String) {
    // SAFETY: the run is to be refused, or else writes to the case's mirror.
    let result = unsafe { deltanet::cuda::run(problem, std::ptr::null_mut(), 0, stream) };
    let error = result.expect_err("the run is refused");
    (error.status(), error.message().to_owned())
}

#[test]
fn bad_memory_and_contexts_are_refused() {
    let Some((_turn, gpu)) = gpu() else { return };
    let mut rng = Rng(seed());
    let wish = Wish { tokens: Some(3), head_size: Some(32), ..Wish::default() };
    let case = loop {
        let case = Case::draw(&mut rng, wish);
        if case.problem().sequences() > 0 && !case.params.state_out.data.is_null() {
            break case;
        }
    };
    let (status, words) = refused(&on_device(&case.params), gpu.raw_stream());
    assert_eq!(status, Status::Cuda);
    assert!(words.contains("host memory"), "{words}");

    // SAFETY: the case owns all memory that its params describe.
    let mirror = unsafe { Mirror::new(&gpu, &case.params).expect("the tensors fit") };
    let one_on_host = Params { beta: case.params.beta, ..mirror.params };
    let (status, words) = refused(&on_device(&one_on_host), gpu.raw_stream());
    assert!(status == Status::Cuda && words.contains("beta"), "{words}");

    let problem = on_device(&mirror.params);
    std::thread::scope(|scope| {
        let no_context = scope.spawn(|| refused(&problem, std::ptr::null_mut()));
        let (status, words) = no_context.join().expect("no panic");
        assert!(status == Status::Cuda && words.contains("no current CUDA context"), "{words}");
    });

    // A second context, in which nothing was prepared: nothing is loaded on the way, and nothing launched.
    let other = CudaContext::new_non_primary(0, 0).expect("a second context");
    other.bind_to_thread().expect("it can be current");
    let stream = other.new_stream().expect("it has streams");
    stream.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_GLOBAL).expect("a capture starts");
    let (status, words) = refused(&problem, stream.cu_stream().cast());
    assert!(status == Status::Cuda && words.contains("deltanet_cuda_prepare"), "{words}");
    stream
        .end_capture(CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH)
        .expect("it is intact");
    deltanet::cuda::prepare().expect("the kernels load into any context");
    gpu.context.bind_to_thread().expect("the first context is still there");
    // SAFETY: the mirror is in the first context's memory and is waited for.
    unsafe { cuda::run(&gpu, &mirror).expect("the first context still works") };
}

#[test]
fn head_sizes_past_256_are_unsupported() {
    let mut rng = Rng(seed());
    let wish = Wish { tokens: Some(2), head_size: Some(272), ..Wish::default() };
    let case = loop {
        let case = Case::draw(&mut rng, wish);
        if case.problem().sequences() > 0 {
            break case;
        }
    };
    let error = deltanet::cuda::workspace_size(&case.problem()).expect_err("272 is too large");
    assert_eq!(error.status(), Status::Unsupported);
    // Without nvcc at build time there is an earlier reason.
    assert!(error.message().contains("272") || error.message().contains("nvcc"), "{error}");
}

#[test]
fn a_machine_without_a_driver_gets_a_status() {
    // SAFETY: loading libcuda runs its initialisers, which is what its users do.
    if unsafe { cudarc::driver::sys::is_culib_present() } {
        println!("SKIPPED: there is a driver");
        return;
    }
    let mut rng = Rng(seed());
    let case = Case::draw(&mut rng, Wish { tokens: Some(1), ..Wish::default() });
    for error in [deltanet::cuda::prepare().expect_err("no driver"), {
        // SAFETY: refused before anything is looked at.
        unsafe { deltanet::cuda::run(&case.problem(), std::ptr::null_mut(), 0, std::ptr::null_mut()) }
            .expect_err("no driver")
    }] {
        assert_eq!(error.status(), Status::Unsupported);
        assert!(error.message().contains("libcuda") || error.message().contains("nvcc"), "{error}");
    }
    // SAFETY: null is an error, and no more is read.
    let status =
        unsafe { deltanet::deltanet_cuda_run(std::ptr::null(), std::ptr::null_mut(), 0, std::ptr::null_mut()) };
    assert_eq!(status, Status::NullPointer);
    assert_eq!(deltanet::deltanet_cuda_prepare(), Status::Unsupported);
}

/// The same kernel gives a shard the bits of the whole. Which of the chunked kernels scans a prompt depends on how many heads
/// and sequences there are: there the answers agree as well as both agree with the oracle.
#[test]
fn shards_have_the_answers_of_the_whole() {
    let Some((_turn, gpu)) = gpu() else { return };
    // A stream for each half, as on two devices.
    let other = Gpu { context: gpu.context.clone(), stream: gpu.context.new_stream().expect("a second stream") };
    let mut rng = Rng(seed());
    for layout in [StateLayout::KeyContiguous, StateLayout::ValueContiguous] {
        for head_map in [HeadMap::Tiled, HeadMap::Grouped] {
            for (head_size, tokens) in [(32, 1), (128, 1), (128, 20), (64, 200), (128, 200)] {
                let mut whole = Whole::new(&mut rng, head_size, tokens, head_map, layout);
                let (params, state) = (whole.params, whole.state.clone());
                let mut bits = |shards: usize| {
                    whole.bits(&state, || {
                        // SAFETY: the whole owns all memory that its params describe, and is not looked at meanwhile.
                        unsafe {
                            let mirror = Mirror::new(&gpu, &params).expect("the tensors fit");
                            let mut workspaces = Vec::new();
                            for at in 0..shards {
                                let gpu = [&gpu, &other][at % 2];
                                for call in shard(&mirror.params, head_map, at, shards) {
                                    workspaces.push(cuda::queue(gpu, &call).expect("a shard is a valid problem"));
                                }
                            }
                            other.stream.synchronize().expect("the stream works");
                            mirror.download().expect("nothing beside the tensors was written to");
                        }
                    })
                };
                let expected = bits(1);
                const PROMPT: usize = 48; // from which on a kernel may be a chunked one
                for shards in [2, 4, 16] {
                    let how =
                        format!("{shards} shards, {head_size} channels, {tokens} tokens, {head_map:?}, {layout:?}");
                    let got = bits(shards);
                    if tokens < PROMPT {
                        assert!(got == expected, "{how}");
                    } else {
                        let value = |bits: &u32| f64::from(f32::from_bits(*bits));
                        let square = |x: f64| x * x;
                        let error: f64 = got.iter().zip(&expected).map(|(a, b)| square(value(a) - value(b))).sum();
                        let all: f64 = expected.iter().map(|x| square(value(x))).sum();
                        assert!(error <= 1e-9 * all, "{how}: NMSE {:e}", error / all);
                    }
                }
            }
        }
    }
}
