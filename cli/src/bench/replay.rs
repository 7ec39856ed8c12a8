//! Calls of one shape on a GPU, captured in a graph and replayed.

use super::Precision;
use super::shape::{Shape, StateUse};
use super::times::Times;
use crate::cuda::Gpu;
use anyhow::{Context, Result};
use cudarc::driver::sys::{CUevent_flags, CUgraphInstantiate_flags, CUstreamCaptureMode};
use cudarc::driver::{CudaGraph, CudaSlice, DevicePtr};
use deltanet::params::Params;
use deltanet::problem::Place;
use deltanet::{Dtype, Problem, Tensor};
use std::ffi::c_void;

/// States of all sets together are larger than any L2 cache that we know.
const ROTATE: usize = 256 << 20;
/// States below this stay in the cache from call to call in an engine too, as in a benchmark of one buffer.
const CACHED: usize = 16 << 20;

/// Bytes a second of a copy that no cache holds, reading and writing counted.
pub fn bandwidth(gpu: &Gpu) -> Result<f64> {
    let arena = Arena::new(gpu, 2 * ROTATE / size_of::<f32>())?;
    let seconds = replay(gpu, 4, |_| copy(gpu, arena.base, ROTATE))?.median();
    Ok(2.0 * ROTATE as f64 / seconds)
}

/// One shape's tensors, in as many sets as it takes for no cache to hold all large states.
pub struct Work {
    arena: Arena,
    problems: Vec<Problem>,
    sets: usize,
    state_bytes: usize,
    workspace: CudaSlice<u8>,
    workspace_bytes: usize,
    /// All tensors of a call, once.
    pub bytes: usize,
    /// Calls to put in a graph: some milliseconds of them.
    pub calls: usize,
}

impl Work {
    /// The tensors, in the memory of `gpu`.
    pub fn new(gpu: &Gpu, shape: Shape, state: StateUse, precision: Precision) -> Result<Work> {
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
                state_out: if state.in_place { state_in } else { other },
                state_layout: state.layout as u32,
                // Every decay is exp(-5), so that random keys, which are longer than one, do not make the states grow
                // from replay to replay.
                gate_max: -5.0,
                precision: precision as u32,
                ..Params::default()
            };
            // SAFETY: at a device, nothing is read.
            problems.push(unsafe { Problem::at(&params, Place::Device)? });
            if !state.in_place {
                // Back and forth, so that no call reads what the cache has just been filled with by chance.
                let back = Params { state_in: params.state_out, state_out: params.state_in, ..params };
                // SAFETY: as above.
                problems.push(unsafe { Problem::at(&back, Place::Device)? });
            }
        }
        let workspace_bytes = deltanet::cuda::workspace_size(&problems[0])?;
        let guess = 2.0 + state_bytes as f64 * 2.0 / 2.5e6 + rows as f64 * 0.3;
        Ok(Work {
            sets,
            state_bytes,
            workspace: gpu.stream.alloc_zeros::<u8>(workspace_bytes.max(1))?,
            workspace_bytes,
            bytes: (2 * state_floats + input_floats) * size_of::<f32>(),
            calls: ((2000.0 / guess) as usize).clamp(4, 400).next_multiple_of(problems.len()),
            problems,
            arena,
        })
    }

    /// Whether calls go through the prompt kernels, which alone need a workspace.
    pub fn is_chunked(&self) -> bool {
        self.workspace_bytes > 0
    }

    /// Queues one call, `at` of many.
    pub fn call(&self, gpu: &Gpu, at: usize) -> Result<()> {
        let workspace = self.workspace.device_ptr(&gpu.stream).0 as *mut c_void;
        let problem = &self.problems[at % self.problems.len()];
        // SAFETY: `self` holds the tensors and the workspace, and whoever calls waits for the stream.
        unsafe { deltanet::cuda::run(problem, workspace, self.workspace_bytes, gpu.raw_stream())? };
        Ok(())
    }

    /// Queues a copy of as many bytes as the states have, from one of a set to the other.
    pub fn copy(&self, gpu: &Gpu, at: usize) -> Result<()> {
        let floats = self.arena.used / self.sets * (at % self.sets);
        copy(gpu, self.arena.base + (floats * size_of::<f32>()) as u64, self.state_bytes)
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

/// A graph of calls on the GPU's stream; one call runs first, so that nothing is loaded in the capture.
pub fn capture(gpu: &Gpu, calls: usize, call: impl Fn(usize) -> Result<()>) -> Result<CudaGraph> {
    call(0)?;
    gpu.stream.synchronize()?;
    gpu.stream.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)?;
    let captured = (0..calls).try_for_each(&call);
    let graph = gpu.stream.end_capture(CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH)?;
    captured?;
    graph.context("the capture holds nothing")
}

/// Seconds a call over replays of a graph of `calls`, by device events.
pub fn replay(gpu: &Gpu, calls: usize, call: impl Fn(usize) -> Result<()>) -> Result<Times> {
    const REPLAYS: usize = 21;
    let graph = capture(gpu, calls, call)?;
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
