//! Head shards on several GPUs, or on several streams of one: every shard has its part of the heads, its own tensors and
//! its own stream, as in a tensor-parallel engine.

use super::Precision;
use super::replay::{Work, capture};
use super::shape::{COLUMNS, Shape, StateUse};
use super::times::Times;
use crate::cuda::Gpu;
use anyhow::{Result, ensure};
use cudarc::driver::CudaGraph;
use serde_json::{Value, json};
use std::time::Instant;

/// The shards' devices, the whole problem's first.
pub struct Shards {
    gpus: Vec<Gpu>,
    devices: usize,
    name: String,
    state: StateUse,
    precision: Precision,
}

/// One shape's results, seconds a call.
pub struct Row {
    shape: Shape,
    whole: Times,
    shards: Times,
}

/// Calls of one shard, ready to be launched.
struct Ready<'a> {
    gpu: &'a Gpu,
    graph: CudaGraph,
    _work: Work,
}

impl Shards {
    /// A stream for each of `count` shards, on as many devices as there are.
    pub fn open(count: usize, state: StateUse, precision: Precision) -> Result<Shards> {
        let devices = Gpu::count()?.min(count);
        ensure!(devices > 0, "there is no CUDA device");
        let gpus = (0..count).map(|at| Gpu::open(at % devices)).collect::<Result<Vec<Gpu>>>()?;
        let name = deltanet::cuda::device()?.name;
        Ok(Shards { gpus, devices, name, state, precision })
    }

    /// What is timed on.
    pub fn title(&self) -> String {
        let (shards, devices) = (self.gpus.len(), self.devices);
        format!("{} x {devices}, {shards} shards of the heads, a stream each, f32, graph launches", self.name)
    }

    /// The table's headings.
    pub fn header(&self) -> String {
        format!("{COLUMNS}       whole us    ±    shards us    ±  speedup")
    }

    /// Times the whole on one device, and the shards side by side, in turns.
    pub fn time(&self, shape: Shape) -> Result<Row> {
        let count = self.gpus.len();
        let Shape { key_heads, value_heads, .. } = shape;
        ensure!(
            key_heads % count == 0,
            "--shards {count}: {key_heads} key heads cannot be split into as many equal parts"
        );
        let part = Shape { key_heads: key_heads / count, value_heads: value_heads / count, ..shape };
        let whole = vec![self.ready(&self.gpus[0], shape, shape)?];
        let parts = self.gpus.iter().map(|gpu| self.ready(gpu, part, shape)).collect::<Result<Vec<_>>>()?;
        let calls = self.calls(shape);
        let mut row = Row { shape, whole: Times::default(), shards: Times::default() };
        for round in 0..13 {
            let times = (launch(&whole)? / calls as f64, launch(&parts)? / calls as f64);
            // The first rounds warm caches up, and clocks.
            if round >= 2 {
                row.whole.0.push(times.0);
                row.shards.0.push(times.1);
            }
        }
        Ok(row)
    }

    /// Enough for the time of a launch not to matter.
    fn calls(&self, whole: Shape) -> usize {
        (20_000 / (2 + whole.tokens * whole.sequences / 16)).clamp(8, 400)
    }

    fn ready<'a>(&self, gpu: &'a Gpu, shape: Shape, whole: Shape) -> Result<Ready<'a>> {
        gpu.make_current()?;
        let work = Work::new(gpu, shape, self.state, self.precision)?;
        let graph = capture(gpu, self.calls(whole), |at| work.call(gpu, at))?;
        Ok(Ready { gpu, graph, _work: work })
    }

    /// The row as a JSON object.
    pub fn json(&self, row: &Row) -> Value {
        let us = |seconds: f64| (seconds * 1e9).round() / 1000.0;
        let fields = json!({
            "device": self.name,
            "devices": self.devices,
            "shards": self.gpus.len(),
            "precision": self.precision.name(),
            "whole_us": us(row.whole.median()),
            "shards_us": us(row.shards.median()),
            "speedup": row.whole.median() / row.shards.median(),
        });
        let mut object = row.shape.json();
        object.extend(fields.as_object().cloned().unwrap_or_default());
        Value::Object(object)
    }
}

impl Row {
    /// The row of the table.
    pub fn line(&self) -> String {
        let columns = self.shape.columns();
        let [(whole, a), (shards, b)] =
            [&self.whole, &self.shards].map(|times| (times.median() * 1e6, times.spread() * 100.0));
        format!("{columns} {whole:>14.2} {a:>3.0}% {shards:>12.2} {b:>3.0}% {:>8.2}", whole / shards)
    }
}

/// Seconds until all have done their calls.
fn launch(all: &[Ready]) -> Result<f64> {
    let start = Instant::now();
    for ready in all {
        ready.gpu.make_current()?;
        ready.graph.launch()?;
    }
    for ready in all {
        ready.gpu.make_current()?;
        ready.gpu.stream.synchronize()?;
    }
    Ok(start.elapsed().as_secs_f64())
}
