//! One shape with its tensors, run by us.

use super::shape::Shape;
use super::team::Team;
use anyhow::Result;
use deltanet::cpu::{self, Isa};
use deltanet::params::StateLayout;
use deltanet::reference::{self, Nmse};
use deltanet::{Dtype, Params, Plan, Problem, Tensor};
use std::mem::MaybeUninit;

/// Floats on a cache line's boundary, as engines align their tensors.
pub struct Floats {
    memory: Vec<f32>,
    first: usize,
}

impl Floats {
    pub fn new(values: impl ExactSizeIterator<Item = f32>) -> Floats {
        let mut memory: Vec<f32> = Vec::with_capacity(values.len() + 16);
        let first = memory.as_ptr().align_offset(64);
        memory.resize(first, 0.0);
        memory.extend(values);
        Floats { memory, first }
    }

    pub fn filled(n: usize, value: f32) -> Floats {
        Floats::new(std::iter::repeat_n(value, n))
    }
}

impl std::ops::Deref for Floats {
    type Target = [f32];
    fn deref(&self) -> &[f32] {
        &self.memory[self.first..]
    }
}

impl std::ops::DerefMut for Floats {
    fn deref_mut(&mut self) -> &mut [f32] {
        &mut self.memory[self.first..]
    }
}

/// Dense random tensors in ggml's order, and room for the results.
pub struct Case {
    pub shape: Shape,
    pub q: Floats,
    pub k: Floats,
    pub v: Floats,
    pub g: Floats,
    pub beta: Floats,
    /// Key-contiguous, whatever layout is timed: random numbers have no order.
    pub state: Floats,
    pub state_out: Floats,
    pub out: Floats,
    scratch: Vec<MaybeUninit<u8>>,
}

impl Case {
    pub fn new(shape: Shape, seed: u64) -> Case {
        let Shape { key_heads, value_heads, head_size: s, tokens, sequences, .. } = shape;
        let mut state = seed;
        let mut uniform = move || {
            // SplitMix64
            state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut z = state;
            z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            ((z ^ (z >> 31)) >> 40) as f32 / (1u32 << 24) as f32
        };
        let mut random = |n: usize, value: &dyn Fn(f32) -> f32| Floats::new((0..n).map(|_| value(uniform())));
        let centred = |width: f32| move |x: f32| width * (x - 0.5);
        let (keys, values) = (key_heads * tokens * sequences, value_heads * tokens * sequences);
        // Rows of q and k of about unit length, as models have them.
        let unit = (12.0 / s as f32).sqrt();
        Case {
            shape,
            q: random(keys * s, &centred(unit)),
            k: random(keys * s, &centred(unit)),
            v: random(values * s, &centred(2.0)),
            g: random(values * shape.gate_channels(), &|x| -0.01 - 0.2 * x),
            beta: random(values, &|x| 0.05 + 0.9 * x),
            state: random(shape.state_floats(), &centred(1.0)),
            state_out: Floats::filled(shape.state_floats(), f32::NAN),
            out: Floats::filled(values * s, f32::NAN),
            scratch: Vec::new(),
        }
    }

    /// The arguments; in place, `state_out` is both.
    pub fn params(&mut self, layout: StateLayout, in_place: bool) -> Params {
        let Shape { key_heads, value_heads, head_size: s, tokens, sequences, .. } = self.shape;
        let dense = |data: &[f32], ne: [usize; 4]| {
            Tensor::dense(data.as_ptr().cast_mut().cast(), Dtype::F32, ne.map(|n| n as i64))
        };
        let states = [s, s, value_heads, sequences];
        Params {
            state_layout: layout as u32,
            q: dense(&self.q, [s, key_heads, tokens, sequences]),
            k: dense(&self.k, [s, key_heads, tokens, sequences]),
            v: dense(&self.v, [s, value_heads, tokens, sequences]),
            g: dense(&self.g, [self.shape.gate_channels(), value_heads, tokens, sequences]),
            beta: dense(&self.beta, [1, value_heads, tokens, sequences]),
            out: dense(&self.out, [s, value_heads, tokens, sequences]),
            state_in: dense(if in_place { &self.state_out } else { &self.state }, states),
            state_out: dense(&self.state_out, states),
            ..Params::default()
        }
    }

    /// The problem; in place, `state_out` is both.
    pub fn problem(&mut self, layout: StateLayout, in_place: bool) -> Result<Problem> {
        // SAFETY: no index tensors.
        Ok(unsafe { Problem::new(&self.params(layout, in_place))? })
    }

    /// Room for every thread.
    pub fn reserve(&mut self, plan: &Plan, threads: usize) {
        self.scratch.resize(plan.scratch_size() * threads, MaybeUninit::new(0));
    }

    /// One run.
    pub fn run(&mut self, problem: &Problem, plan: &Plan, team: &Team) {
        let (size, scratch) = (plan.scratch_size(), self.scratch.as_mut_ptr() as usize);
        team.run(&|ith, nth| {
            // SAFETY: `reserve` made a part for each thread.
            let part =
                unsafe { std::slice::from_raw_parts_mut((scratch as *mut MaybeUninit<u8>).add(ith * size), size) };
            // SAFETY: the tensors are this case's, borrowed mutably.
            unsafe { cpu::run_part(problem, plan, ith, nth, part) }.expect("the plan was made for the problem");
        });
    }

    /// Compares one run with the oracle, on at most `most` tokens of it (the oracle is slow).
    pub fn nmse(&mut self, isa: Isa, layout: StateLayout, most: usize) -> Result<Nmse> {
        let whole = self.shape;
        self.shape.tokens = whole.tokens.min(most);
        self.shape.sequences = 1;
        let problem = self.problem(layout, false);
        self.shape = whole;
        let problem = problem?;
        let plan = Plan::new(&problem, isa)?;
        self.reserve(&plan, 1);
        // SAFETY: the tensors are this case's, borrowed mutably; a prefix of them has the shorter shape.
        let expected = unsafe { reference::evaluate(&problem) };
        self.run(&problem, &plan, &Team::new(1));
        // SAFETY: as above.
        Ok(unsafe { reference::compare(&problem, &expected) })
    }
}
