//! Timing on a GPU: replays of a graph that holds many calls, by device events, beside copies of the same bytes.

use super::Precision;
use super::case::Case;
use super::plot::{OURS, Timed};
use super::seed;
use super::shape::{COLUMNS, Shape, StateUse};
use super::times::Times;
use crate::cuda::{self, Gpu, Mirror};
use anyhow::Result;
use cudarc::driver::sys::{CUevent_flags, CUgraphInstantiate_flags, CUstreamCaptureMode};
use cudarc::driver::{CudaSlice, DevicePtr};
use deltanet::params::Params;
use deltanet::problem::Place;
use deltanet::{Dtype, Problem, Tensor, reference};
use serde_json::{Value, json};
use std::ffi::c_void;

/// The first device, and what is timed there.
pub struct Cuda {
    gpu: Gpu,
    device: deltanet::cuda::Device,
    state: StateUse,
    precision: Precision,
    /// Bytes a second of a copy that no cache holds, reading and writing counted.
    bandwidth: f64,
}

/// One shape's results.
pub struct Row {
    shape: Shape,
    kernel: &'static str,
    ours: Times,
    /// A copy of as many bytes as the states have, device to device: their least traffic.
    copy: Times,
    /// All tensors' bytes, once, at the bandwidth of a large copy.
    floor: f64,
    nmse: f64,
}

/// States of all sets together are larger than any L2 cache that we know.
const ROTATE: usize = 256 << 20;
/// States below this stay in the cache from call to call in an engine too, as in a benchmark of one buffer.
const CACHED: usize = 16 << 20;
/// Heads that are compared with the oracle, each on a thread of its own: it takes a second for some 10 000 tokens.
const SAMPLE: usize = 4;

impl Cuda {
    /// Opens the device and measures its copies.
    pub fn open(state: StateUse, precision: Precision) -> Result<Cuda> {
        let gpu = Gpu::open()?;
        let device = deltanet::cuda::device()?;
        let arena = Arena::new(&gpu, 2 * ROTATE / size_of::<f32>())?;
        let seconds = replay(&gpu, 4, |_| copy(&gpu, arena.base, ROTATE))?.median();
        Ok(Cuda { gpu, device, state, precision, bandwidth: 2.0 * ROTATE as f64 / seconds })
    }

    /// What is timed on.
    pub fn title(&self) -> String {
        let deltanet::cuda::Device { name, driver: (major, minor), image, .. } = &self.device;
        let speed = self.bandwidth * 1e-9;
        format!(
            "{name}, driver for CUDA {major}.{minor}, kernels for sm_{image}, f32, graph replay, copies {speed:.0} GB/s"
        )
    }

    /// The table's headings.
    pub fn header(&self) -> String {
        format!("{COLUMNS} state                us    ±   GFLOP/s  floor copy/us      nmse")
    }

    /// Times one shape.
    pub fn time(&self, shape: Shape) -> Result<Row> {
        let Cuda { gpu, state: StateUse { layout, in_place }, precision, bandwidth, .. } = self;
        let nmse = self.nmse(shape)?;
        let Shape { key_heads, value_heads, head_size: s, tokens, sequences, .. } = shape;
        let gates = shape.gate_channels();
        let state_floats = shape.state_floats();
        let state_bytes = state_floats * size_of::<f32>();
        let sets = if state_bytes < CACHED { 1 } else { (ROTATE / state_bytes).max(2) };
        let rows = tokens * sequences;
        let input_floats = rows * (2 * key_heads * s + 2 * value_heads * s + value_heads * (gates + 1));
        let mut arena = Arena::new(gpu, sets * (2 * state_floats + input_floats + 8 * ROUND))?;
        let mut problems = Vec::new();
        for _ in 0..sets {
            let state_in = arena.take([s, s, value_heads, sequences]);
            let other = arena.take([s, s, value_heads, sequences]);
            let params = Params {
                q: arena.take([s, key_heads, tokens, sequences]),
                k: arena.take([s, key_heads, tokens, sequences]),
                v: arena.take([s, value_heads, tokens, sequences]),
                g: arena.take([gates, value_heads, tokens, sequences]),
                beta: arena.take([1, value_heads, tokens, sequences]),
                out: arena.take([s, value_heads, tokens, sequences]),
                state_in,
                state_out: if *in_place { state_in } else { other },
                state_layout: *layout as u32,
                // Every decay is exp(-5), so that random keys, which are longer than one, do not make the states grow
                // from replay to replay.
                gate_max: -5.0,
                precision: *precision as u32,
                ..Params::default()
            };
            // SAFETY: at a device, nothing is read.
            problems.push(unsafe { Problem::at(&params, Place::Device)? });
            if !in_place {
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
        let ours = replay(gpu, calls, |at| {
            let problem = &problems[at % problems.len()];
            // SAFETY: the arena holds the tensors, and is waited for before it goes.
            unsafe { deltanet::cuda::run(problem, workspace, bytes, gpu.raw_stream())? };
            Ok(())
        })?;
        // From one state of each set to the other.
        let copy = replay(gpu, 8.min(calls), |at| copy(gpu, arena.set(at % sets, sets), state_bytes))?;
        gpu.stream.synchronize()?;
        Ok(Row {
            shape,
            kernel: if bytes > 0 { "chunked" } else { "recurrent" },
            ours,
            copy,
            floor: ((2 * state_floats + input_floats) * size_of::<f32>()) as f64 / bandwidth,
            nmse,
        })
    }

    /// The error of one run against the oracle, on some heads spread over all sequences.
    fn nmse(&self, shape: Shape) -> Result<f64> {
        let mut case = Case::new(shape, seed()?);
        let params = Params { precision: self.precision as u32, ..case.params(self.state.layout, false) };
        // SAFETY: the case owns its tensors, nobody else uses them, and the mirror is waited for.
        unsafe {
            let mirror = Mirror::new(&self.gpu, &params)?;
            cuda::run(&self.gpu, &mirror)?;
            mirror.download()?;
        }
        let all = shape.value_heads * shape.sequences;
        let sampled = (0..SAMPLE.min(all)).map(|at| at * all / SAMPLE.min(all));
        let problems = sampled.map(|at| {
            let (head, sequence) = (at % shape.value_heads, at / shape.value_heads);
            // SAFETY: no index tensors.
            Ok(unsafe { Problem::new(&one_head(&params, head, sequence))? })
        });
        let problems = problems.collect::<Result<Vec<Problem>>>()?;
        let worst = std::thread::scope(|scope| {
            let threads: Vec<_> = problems
                .iter()
                .map(|problem| {
                    scope.spawn(move || {
                        // SAFETY: the case outlives the scope, and nobody writes to it meanwhile.
                        let nmse = unsafe { reference::compare(problem, &reference::evaluate(problem)) };
                        // NaN or worse is shown, never hidden.
                        if nmse.state.is_nan() { f64::NAN } else { nmse.out.max(nmse.state) }
                    })
                })
                .collect();
            threads.into_iter().map(|thread| thread.join().unwrap_or(f64::NAN)).collect::<Vec<f64>>()
        });
        drop(case);
        Ok(worst.into_iter().fold(0.0, |worst, nmse| if nmse > worst || nmse.is_nan() { nmse } else { worst }))
    }

    /// The row as a JSON object.
    pub fn json(&self, row: &Row) -> Value {
        let (major, minor) = self.device.driver;
        let us = |seconds: f64| (seconds * 1e9).round() / 1000.0;
        let fields = json!({
            "device": self.device.name,
            "driver_cuda": format!("{major}.{minor}"),
            "isa": format!("sm_{}", self.device.image),
            "kernel": row.kernel,
            "precision": self.precision.name(),
            "layout": self.state.layout_name(),
            "in_place": self.state.in_place,
            "us": us(row.ours.median()),
            "spread": (row.ours.spread() * 1e4).round() / 1e4,
            "gflops": 2e-9 * row.shape.fma() / row.ours.median(),
            "floor_us": us(row.floor),
            "copy_us": us(row.copy.median()),
            "copy_gb_per_s": 1e-9 * self.bandwidth,
            "nmse": row.nmse,
        });
        let mut object = row.shape.json();
        object.extend(fields.as_object().cloned().unwrap_or_default());
        Value::Object(object)
    }
}

impl Row {
    /// The row of the table.
    pub fn line(&self) -> String {
        format!(
            "{}  {:>16.2} {:>4.1}% {:>8.0} {:>6.2} {:>7.3} {:>9.1e}",
            self.shape.columns(),
            self.ours.median() * 1e6,
            self.ours.spread() * 100.0,
            2e-9 * self.shape.fma() / self.ours.median(),
            self.floor / self.ours.median(),
            self.copy.median() / self.ours.median(),
            self.nmse,
        )
    }

    /// What a plot shows of it.
    pub fn timed(&self) -> Timed {
        Timed { name: OURS, shape: self.shape, seconds: self.ours.median() }
    }
}

/// The arguments of one value head in one sequence: views of the same memory.
fn one_head(params: &Params, head: usize, sequence: usize) -> Params {
    let (key_heads, heads_axis, state_axis) = (params.q.ne[1] as usize, 1, 2);
    let view = |tensor: &Tensor, axis: usize, head: usize| {
        let mut view = *tensor;
        view.data = tensor.data.wrapping_byte_add(head * tensor.nb[axis] + sequence * tensor.nb[3]);
        (view.ne[axis], view.ne[3]) = (1, 1);
        view
    };
    Params {
        q: view(&params.q, heads_axis, head % key_heads),
        k: view(&params.k, heads_axis, head % key_heads),
        v: view(&params.v, heads_axis, head),
        g: view(&params.g, heads_axis, head),
        beta: view(&params.beta, heads_axis, head),
        out: view(&params.out, heads_axis, head),
        state_in: view(&params.state_in, state_axis, head),
        state_out: view(&params.state_out, state_axis, head),
        ..*params
    }
}

/// Floats that tensors in an arena begin at multiples of.
const ROUND: usize = 64;

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

    /// Where the first tensor of a set of `sets` alike lies.
    fn set(&self, at: usize, sets: usize) -> u64 {
        self.base + (self.used / sets * at * size_of::<f32>()) as u64
    }

    fn take(&mut self, ne: [usize; 4]) -> Tensor {
        let floats = ne.iter().product::<usize>().next_multiple_of(ROUND);
        let address = self.base as usize + self.used * size_of::<f32>();
        self.used += floats;
        assert!(self.used <= self.memory.len(), "the arena is large enough for its tensors");
        Tensor::dense(address as *mut c_void, Dtype::F32, ne.map(|n| n as i64))
    }
}

/// Copies `bytes` at `from` to where they end.
fn copy(gpu: &Gpu, from: u64, bytes: usize) -> Result<()> {
    // SAFETY: the caller's arena holds both.
    let code =
        unsafe { cudarc::driver::sys::cuMemcpyDtoDAsync_v2(from + bytes as u64, from, bytes, gpu.stream.cu_stream()) };
    Ok(code.result()?)
}

/// Seconds a call over replays of a graph of `calls`.
fn replay(gpu: &Gpu, calls: usize, call: impl Fn(usize) -> Result<()>) -> Result<Times> {
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
    let mut times = Times::default();
    for at in 0..REPLAYS + 2 {
        start.record(&gpu.stream)?;
        graph.launch()?;
        end.record(&gpu.stream)?;
        end.synchronize()?;
        // The first replays warm caches up, and clocks.
        if at >= 2 {
            times.0.push(f64::from(start.elapsed_ms(&end)?) * 1e-3 / calls as f64);
        }
    }
    Ok(times)
}
