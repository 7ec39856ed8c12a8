//! Timing on a GPU: replays of a graph that holds many calls, by device events, beside copies of the same bytes.

use super::Precision;
use super::case::Case;
use super::plot::{OURS, Timed};
use super::replay::{self, Work, replay};
use super::seed;
use super::shape::{COLUMNS, Shape, StateUse};
use super::times::Times;
use crate::cuda::{self, Gpu, Mirror};
use anyhow::Result;
use deltanet::params::Params;
use deltanet::{Problem, Tensor, reference};
use serde_json::{Value, json};

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

/// Heads that are compared with the oracle, each on a thread of its own: it takes a second for some 10 000 tokens.
const SAMPLE: usize = 4;

impl Cuda {
    /// Opens the device and measures its copies.
    pub fn open(state: StateUse, precision: Precision) -> Result<Cuda> {
        let gpu = Gpu::open(0)?;
        let device = deltanet::cuda::device()?;
        let bandwidth = replay::bandwidth(&gpu)?;
        Ok(Cuda { gpu, device, state, precision, bandwidth })
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
        let nmse = self.nmse(shape)?;
        let work = Work::new(&self.gpu, shape, self.state, self.precision)?;
        let ours = replay(&self.gpu, work.calls, |at| work.call(&self.gpu, at))?;
        let copy = replay(&self.gpu, 8.min(work.calls), |at| work.copy(&self.gpu, at))?;
        self.gpu.stream.synchronize()?;
        Ok(Row {
            shape,
            kernel: if work.is_chunked() { "chunked" } else { "recurrent" },
            ours,
            copy,
            floor: work.bytes as f64 / self.bandwidth,
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
