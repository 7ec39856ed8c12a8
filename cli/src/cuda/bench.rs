//! Timing on a GPU: replays of a graph that holds many calls, by device events, beside copies of the same bytes.

use super::Gpu;
use anyhow::Result;
use cudarc::driver::sys::{CUevent_flags, CUgraphInstantiate_flags, CUstreamCaptureMode};
use cudarc::driver::{CudaSlice, DevicePtr};
use deltanet::params::{Params, StateLayout};
use deltanet::problem::Place;
use deltanet::{Dtype, Problem, Tensor};
use std::ffi::c_void;
use std::process::ExitCode;

/// What is timed: f32 tensors, dense.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Hk.
    pub key_heads: usize,
    /// Hv.
    pub value_heads: usize,
    /// S.
    pub head_size: usize,
    /// One gate a key channel.
    pub channel_gate: bool,
    /// T.
    pub tokens: usize,
    /// B.
    pub sequences: usize,
    /// Which channels of a state are neighbours.
    pub layout: StateLayout,
    /// Whether the state is updated where it is.
    pub in_place: bool,
    /// A `deltanet_precision` value.
    pub precision: u32,
}

/// Microseconds.
#[derive(Clone, Copy, Debug)]
pub struct Timing {
    /// One call.
    pub us: f64,
    /// Half the distance between the quartiles, as a part of the median.
    pub spread: f64,
    /// A copy of as many bytes as the states have, device to device: their least traffic.
    pub copy_us: f64,
    /// Bytes of the states.
    pub bytes: usize,
}

/// States of all sets together are larger than any L2 cache that we know.
const ROTATE: usize = 256 << 20;
/// States below this stay in the cache from call to call in an engine too, as in a benchmark of one buffer.
const CACHED: usize = 16 << 20;

/// Times every shape and prints a line each; with `json`, an object a line.
pub fn run(shapes: &[Shape], json: bool) -> Result<ExitCode> {
    let gpu = Gpu::open()?;
    let device = deltanet::cuda::device()?;
    let ((cuda, point), image) = (device.driver, device.image);
    if !json {
        println!("{}, driver for CUDA {cuda}.{point}, kernels for sm_{image}, f32, graph replay", device.name);
        println!(
            "  heads   S gate    layout  tokens seqs place         us    ±     copy us   copy/us    GB/s of states"
        );
    }
    for shape in shapes {
        let timing = time(&gpu, *shape)?;
        let Shape { key_heads, value_heads, head_size, channel_gate, tokens, sequences, .. } = *shape;
        let gate = if channel_gate { "channel" } else { "scalar" };
        let layout = if shape.layout == StateLayout::KeyContiguous { "key" } else { "value" };
        let place = if shape.in_place { "same" } else { "other" };
        // Read once and written once.
        let speed = 2e-3 * timing.bytes as f64 / timing.us;
        if json {
            let object = serde_json::json!({
                "device": device.name,
                "driver_cuda": format!("{cuda}.{point}"),
                "image": format!("sm_{image}"),
                "hk": key_heads,
                "hv": value_heads,
                "s": head_size,
                "gate": gate,
                "layout": layout,
                "tokens": tokens,
                "seqs": sequences,
                "in_place": shape.in_place,
                "precision": shape.precision,
                "us": timing.us,
                "spread": timing.spread,
                "copy_us": timing.copy_us,
                "state_gb_per_s": speed,
            });
            println!("{object}");
        } else {
            println!(
                "{key_heads:>4}/{value_heads:<4}{head_size:>4} {gate:<8}{layout:<8}{tokens:>6}{sequences:>5} {place:<6} \
                 {:>9.2} {:>4.1}% {:>9.2} {:>9.3} {speed:>9.0}",
                timing.us,
                timing.spread * 100.0,
                timing.copy_us,
                timing.copy_us / timing.us
            );
        }
    }
    Ok(ExitCode::SUCCESS)
}

struct Arena {
    memory: CudaSlice<f32>,
    base: u64,
    used: usize,
}

impl Arena {
    /// Random numbers from -1/2 to 1/2: zeros would be faster than real data.
    fn new(gpu: &Gpu, floats: usize) -> Result<Arena> {
        let mut seed = 0x9e37_79b9_7f4a_7c15u64;
        let mut random = || {
            seed ^= seed << 13;
            seed ^= seed >> 7;
            seed ^= seed << 17;
            (seed >> 40) as f32 / (1u64 << 24) as f32 - 0.5
        };
        let piece: Vec<f32> = (0..floats.min(1 << 22)).map(|_| random()).collect();
        let mut memory = gpu.stream.alloc_zeros::<f32>(floats)?;
        for start in (0..floats).step_by(piece.len()) {
            let n = piece.len().min(floats - start);
            gpu.stream.memcpy_htod(&piece[..n], &mut memory.slice_mut(start..start + n))?;
        }
        gpu.stream.synchronize()?;
        let base = memory.device_ptr(&gpu.stream).0;
        Ok(Arena { memory, base, used: 0 })
    }

    fn take(&mut self, ne: [usize; 4]) -> Tensor {
        let floats = ne.iter().product::<usize>().next_multiple_of(64);
        let address = self.base as usize + self.used * size_of::<f32>();
        self.used += floats;
        assert!(self.used <= self.memory.len(), "the arena is large enough for its tensors");
        Tensor::dense(address as *mut c_void, Dtype::F32, ne.map(|n| n as i64))
    }
}

/// Times `shape`.
pub fn time(gpu: &Gpu, shape: Shape) -> Result<Timing> {
    let Shape { key_heads, value_heads, head_size: s, tokens, sequences, .. } = shape;
    let gate = if shape.channel_gate { s } else { 1 };
    let state_floats = s * s * value_heads * sequences;
    let state_bytes = state_floats * size_of::<f32>();
    let sets = if state_bytes < CACHED { 1 } else { (ROTATE / state_bytes).max(2) };
    let rows = tokens * sequences;
    let input_floats = rows * (2 * key_heads * s + 2 * value_heads * s + value_heads * (gate + 1)) + 8 * 64;
    let mut arena = Arena::new(gpu, sets * (2 * state_floats + input_floats))?;
    let mut problems = Vec::new();
    for _ in 0..sets {
        let state_in = arena.take([s, s, value_heads, sequences]);
        let other = arena.take([s, s, value_heads, sequences]);
        let params = Params {
            q: arena.take([s, key_heads, tokens, sequences]),
            k: arena.take([s, key_heads, tokens, sequences]),
            v: arena.take([s, value_heads, tokens, sequences]),
            g: arena.take([gate, value_heads, tokens, sequences]),
            beta: arena.take([1, value_heads, tokens, sequences]),
            out: arena.take([s, value_heads, tokens, sequences]),
            state_in,
            state_out: if shape.in_place { state_in } else { other },
            state_layout: shape.layout as u32,
            // Every decay is exp(-5), so that random keys, which are longer than one, do not make the states grow from
            // replay to replay.
            gate_max: -5.0,
            precision: shape.precision,
            ..Params::default()
        };
        // SAFETY: at a device, nothing is read.
        problems.push(unsafe { Problem::at(&params, Place::Device)? });
        if !shape.in_place {
            // Back and forth, so that no call reads what the cache has just been filled with by chance.
            let back = Params { state_in: params.state_out, state_out: params.state_in, ..params };
            // SAFETY: as above.
            problems.push(unsafe { Problem::at(&back, Place::Device)? });
        }
    }
    let bytes = deltanet::cuda::workspace_size(&problems[0])?;
    let workspace = gpu.stream.alloc_zeros::<u8>(bytes.max(1))?;
    let workspace = workspace.device_ptr(&gpu.stream).0 as *mut c_void;

    let guess = 2.0 + state_bytes as f64 * 2.0 / 2.5e6 + rows as f64 * 0.3;
    let calls = ((2000.0 / guess) as usize).clamp(4, 400).next_multiple_of(problems.len());
    let call = |at: usize| -> Result<()> {
        let problem = &problems[at % problems.len()];
        // SAFETY: the arena holds the tensors, and is waited for before it goes.
        unsafe { deltanet::cuda::run(problem, workspace, bytes, gpu.raw_stream())? };
        Ok(())
    };
    let ours = replay(gpu, calls, call)?;

    let copies = 8.min(calls);
    let copy = replay(gpu, copies, |at| {
        // From the first half of the arena to the second, in as many places as there are sets.
        let from = arena.base + ((at % sets) * 2 * state_bytes) as u64;
        // SAFETY: both are inside the arena.
        let code = unsafe {
            cudarc::driver::sys::cuMemcpyDtoDAsync_v2(
                from + state_bytes as u64,
                from,
                state_bytes,
                gpu.stream.cu_stream(),
            )
        };
        Ok(code.result()?)
    })?;
    gpu.stream.synchronize()?;
    let quantile = |times: &[f64], at: f64| times[((times.len() - 1) as f64 * at).round() as usize];
    let us = quantile(&ours, 0.5);
    Ok(Timing {
        us,
        spread: (quantile(&ours, 0.75) - quantile(&ours, 0.25)) / 2.0 / us,
        copy_us: quantile(&copy, 0.5),
        bytes: state_bytes,
    })
}

/// Microseconds a call over replays of a graph of `calls`, sorted.
fn replay(gpu: &Gpu, calls: usize, call: impl Fn(usize) -> Result<()>) -> Result<Vec<f64>> {
    const REPLAYS: usize = 21;
    call(0)?;
    gpu.stream.synchronize()?;
    gpu.stream.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)?;
    let captured = (0..calls).try_for_each(&call);
    let graph = gpu.stream.end_capture(CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH)?;
    captured?;
    let graph = graph.ok_or_else(|| anyhow::anyhow!("the capture holds nothing"))?;
    let event = || gpu.context.new_event(Some(CUevent_flags::CU_EVENT_DEFAULT));
    let (start, end) = (event()?, event()?);
    let mut times = Vec::new();
    for at in 0..REPLAYS + 2 {
        start.record(&gpu.stream)?;
        graph.launch()?;
        end.record(&gpu.stream)?;
        end.synchronize()?;
        // The first replays warm caches up, and clocks.
        if at >= 2 {
            times.push(f64::from(start.elapsed_ms(&end)?) * 1e3 / calls as f64);
        }
    }
    times.sort_by(f64::total_cmp);
    Ok(times)
}
