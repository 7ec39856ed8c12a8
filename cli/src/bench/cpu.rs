//! Timing on the CPU: beside an FMA loop, copies and the peers, all in one process and in turns.

use super::case::{Case, Floats};
use super::ggml::Ggml;
use super::ik::Ik;
use super::machine;
use super::plot::{OURS, Timed};
use super::seed;
use super::shape::{COLUMNS, Shape, StateUse};
use super::team::Team;
use super::times::Times;
use crate::models::Gate;
use anyhow::Result;
use deltanet::Plan;
use deltanet::cpu::Isa;
use serde_json::{Value, json};
use std::hint::black_box;
use std::path::Path;
use std::time::{Duration, Instant};

/// A machine's threads and the peers to time beside.
pub struct Cpu {
    device: String,
    isa: Isa,
    threads: usize,
    team: Team,
    ggml: Option<Ggml>,
    ik: Option<Ik>,
    state: StateUse,
    budget: Duration,
}

/// One shape's results.
pub struct Row {
    shape: Shape,
    kernel: &'static str,
    ours: Times,
    ggml: Option<Times>,
    ik: Option<Times>,
    /// FMAs a second, of all threads.
    peak: f64,
    copy: Times,
    /// As many numbers as the states have multiplied where they are; for states updated in place.
    sweep: Option<Times>,
    nmse: f64,
}

impl Cpu {
    /// Loads the peers' libraries and starts the threads. `budget` is for one shape.
    pub fn new(
        isa: Isa,
        threads: usize,
        peers: (Option<&Path>, Option<&Path>),
        state: StateUse,
        budget: Duration,
    ) -> Result<Cpu> {
        Ok(Cpu {
            device: device(),
            isa,
            threads,
            team: Team::new(threads),
            ggml: peers.0.map(|folder| Ggml::load(folder, isa)).transpose()?,
            ik: peers.1.map(Ik::load).transpose()?,
            state,
            budget,
        })
    }

    /// What is timed on.
    pub fn title(&self) -> String {
        format!("{}, {}, {} thread(s)", self.device, self.isa.name(), self.threads)
    }

    /// The table's headings.
    pub fn header(&self) -> String {
        format!("{COLUMNS}           us    ±   GFLOP/s  floor /memcpy      nmse     ggml us               ik us")
    }

    /// Times one shape: rounds of everything in turns, so that a slow moment of the machine hits all alike.
    pub fn time(&self, shape: Shape) -> Result<Row> {
        let Cpu { isa, threads, ref team, state: StateUse { layout, in_place }, .. } = *self;
        let mut case = Case::new(shape, seed()?);
        // The oracle takes about 10 ns for each of the operator's FMAs; NaN or worse is shown, never hidden.
        let nmse =
            case.nmse(isa, layout, 1 + (2e8 / (shape.fma() / (shape.tokens * shape.sequences) as f64)) as usize)?;
        let graph = self.ggml.as_ref().map(|ggml| ggml.graph(&case, threads)).transpose()?;
        // ik_llama.cpp's operator has scalar gates alone.
        let mut call = self.ik.as_ref().filter(|_| shape.gate == Gate::Head).map(|ik| ik.call(&case));
        if in_place {
            let Case { state, state_out, .. } = &mut case;
            state_out.copy_from_slice(state);
        }
        let problem = case.problem(layout, in_place)?;
        let plan = Plan::new(&problem, isa)?;
        case.reserve(&plan, threads);
        let mut row = Row {
            shape,
            kernel: if plan.is_chunked(&problem) { "chunked" } else { "recurrent" },
            ours: Times::default(),
            ggml: graph.is_some().then(Times::default),
            ik: call.is_some().then(Times::default),
            peak: 0.0,
            copy: Times::default(),
            sweep: in_place.then(Times::default),
            nmse: nmse.out.max(nmse.state),
        };
        if nmse.out.is_nan() || nmse.state.is_nan() {
            row.nmse = f64::NAN;
        }
        let seconds = |work: &mut dyn FnMut() -> Result<()>| -> Result<f64> {
            let clock = machine::Clock::start(threads);
            work()?;
            Ok(clock.seconds())
        };
        let mut peaks = Times::default();
        let [mut copied, mut swept] = [0.0, 1.0].map(|value| Floats::filled(case.state.len(), value));
        let started = Instant::now();
        for round in 0.. {
            let ours = seconds(&mut || {
                case.run(&problem, &plan, team);
                Ok(())
            })?;
            let theirs = graph.as_ref().map(|graph| seconds(&mut || graph.run())).transpose()?;
            // Each on memory of its own, which everything before it has driven out of near caches.
            let copy = machine::copy(&case.state, &mut copied, team, threads);
            let sweep = in_place.then(|| machine::sweep(&mut swept, black_box(1.0), team, threads));
            let iks = call.as_mut().map(|call| seconds(&mut || call.run(&case, in_place, team))).transpose()?;
            // A few rounds are enough to see the peak; it takes longer than a token.
            if round % 8 == 0 {
                peaks.0.push(machine::fma_per_second(isa, team, threads));
            }
            // The first round warms caches and pages.
            if round == 0 {
                continue;
            }
            row.ours.0.push(ours);
            row.copy.0.push(copy);
            row.sweep.iter_mut().zip(sweep).for_each(|(times, time)| times.0.push(time));
            row.ggml.iter_mut().zip(theirs).for_each(|(times, time)| times.0.push(time));
            row.ik.iter_mut().zip(iks).for_each(|(times, time)| times.0.push(time));
            if round >= 5 && started.elapsed() > self.budget {
                break;
            }
        }
        row.peak = peaks.median();
        Ok(row)
    }

    /// The row as a JSON object.
    pub fn json(&self, row: &Row) -> Value {
        let us = |seconds: f64| (seconds * 1e8).round() / 100.0;
        let fields = json!({
            "device": self.device,
            "isa": self.isa.name(),
            "kernel": row.kernel,
            "threads": self.threads,
            "layout": self.state.layout_name(),
            "in_place": self.state.in_place,
            "us": us(row.ours.median()),
            "spread": (row.ours.spread() * 1e4).round() / 1e4,
            "gflops": 2e-9 * row.shape.fma() / row.ours.median(),
            "peak_gflops": 2e-9 * row.peak,
            "memcpy_us": us(row.copy.median()),
            "sweep_us": row.sweep.as_ref().map(|times| us(times.median())),
            "floor_us": us(row.floor()),
            "nmse": row.nmse,
            "ggml_us": row.ggml.as_ref().map(|times| us(times.median())),
            "ik_us": row.ik.as_ref().map(|times| us(times.median())),
        });
        let mut object = row.shape.json();
        object.extend(fields.as_object().cloned().unwrap_or_default());
        Value::Object(object)
    }
}

impl Row {
    /// FMAs at their peak, or the state read and written once (in place or not), whichever takes longer.
    fn floor(&self) -> f64 {
        (self.shape.fma() / self.peak).max(self.sweep.as_ref().unwrap_or(&self.copy).median())
    }

    /// The row of the table.
    pub fn line(&self) -> String {
        let peer = |times: &Option<Times>| match times {
            Some(times) => format!("{:>11.1} {:>5.2}x", times.median() * 1e6, times.median() / self.ours.median()),
            None => format!("{:>11} {:>6}", "-", "-"),
        };
        format!(
            "{}  {:>11.1} {:>4.0}% {:>8.1} {:>6.2} {:>6.2} {:>9.1e} {} {}",
            self.shape.columns(),
            self.ours.median() * 1e6,
            self.ours.spread() * 100.0,
            2e-9 * self.shape.fma() / self.ours.median(),
            self.floor() / self.ours.median(),
            self.ours.median() / self.copy.median(),
            self.nmse,
            peer(&self.ggml),
            peer(&self.ik),
        )
    }

    /// What a plot shows of it.
    pub fn timed(&self) -> impl Iterator<Item = Timed> {
        let all = [(OURS, Some(&self.ours)), ("ggml", self.ggml.as_ref()), ("ik_llama.cpp", self.ik.as_ref())];
        let shape = self.shape;
        all.into_iter().filter_map(move |(name, times)| Some(Timed { name, shape, seconds: times?.median() }))
    }
}

/// The processor's name.
fn device() -> String {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = text.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    name.map_or_else(|| std::env::consts::ARCH.to_owned(), |(_, name)| name.to_owned())
}
