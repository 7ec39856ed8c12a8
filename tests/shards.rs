//! An engine that shards heads or sequences gets the bits of the whole run, from strided views of the same tensors.

mod support;

use deltanet::cpu::{self, Isa};
use deltanet::params::{HeadMap, StateLayout};
use deltanet::{Dtype, Params, Plan, Problem, Tensor};
use support::{Rng, seed};

const S: usize = 32;
const HK: usize = 16;
const HV: usize = 32;
const B: usize = 4;

/// The whole problem's memory.
struct Whole {
    params: Params,
    inputs: Vec<Vec<f32>>,
    out: Vec<f32>,
    state: Vec<f32>,
}

impl Whole {
    fn new(rng: &mut Rng, tokens: usize, head_map: HeadMap, layout: StateLayout) -> Whole {
        let shapes = [[S, HK], [S, HK], [S, HV], [1, HV], [1, HV]];
        let mut inputs: Vec<Vec<f32>> = shapes
            .iter()
            .enumerate()
            .map(|(which, [channels, heads])| {
                let draw = |_| match which {
                    3 => -rng.uniform(1e-4, 3.0) as f32,
                    4 => rng.uniform(0.0, 1.0) as f32,
                    2 => rng.normal() as f32,
                    _ => (rng.normal() / (S as f64).sqrt()) as f32,
                };
                (0..channels * heads * tokens * B).map(draw).collect()
            })
            .collect();
        let mut out = vec![f32::NAN; S * HV * tokens * B];
        let mut state: Vec<f32> = (0..S * S * HV * B).map(|_| rng.normal() as f32).collect();
        let mut at = |which: usize| {
            let [channels, heads] = shapes[which];
            let ne = [channels, heads, tokens, B].map(|n| n as i64);
            Tensor::dense(inputs[which].as_mut_ptr().cast(), Dtype::F32, ne)
        };
        let states = Tensor::dense(state.as_mut_ptr().cast(), Dtype::F32, [S, S, HV, B].map(|n| n as i64));
        let params = Params {
            head_map: head_map as u32,
            state_layout: layout as u32,
            q: at(0),
            k: at(1),
            v: at(2),
            g: at(3),
            beta: at(4),
            state_in: states,
            state_out: states,
            out: Tensor::dense(out.as_mut_ptr().cast(), Dtype::F32, [S, HV, tokens, B].map(|n| n as i64)),
            ..Params::default()
        };
        Whole { params, inputs, out, state }
    }

    /// Runs `calls` one after the other from the given initial states and returns the bits of the outputs and states.
    fn run(&mut self, isa: Isa, state: &[f32], calls: &[Params]) -> Vec<u32> {
        self.out.fill(f32::NAN);
        self.state.copy_from_slice(state);
        assert_eq!(self.inputs.len(), 5, "the inputs live as long as the calls that point to them");
        for call in calls {
            // SAFETY: there are no index tensors.
            let problem = unsafe { Problem::new(call) }.expect("a shard is a valid problem");
            let plan = Plan::new(&problem, isa).expect("the instruction set is there");
            // SAFETY: the params describe memory that `self` owns and nobody else uses.
            unsafe { cpu::run(&problem, &plan, 2) }.expect("a valid problem runs");
        }
        self.out.iter().chain(&self.state).map(|x| x.to_bits()).collect()
    }
}

/// Entries `first .. first + count` along an axis.
fn slice(tensor: Tensor, axis: usize, first: usize, count: usize) -> Tensor {
    let mut part = tensor;
    part.data = part.data.wrapping_byte_add(first * part.nb[axis]);
    part.ne[axis] = count as i64;
    part
}

/// The problem with key heads `keys` and value heads `values` alone.
fn heads(p: &Params, keys: (usize, usize), values: (usize, usize)) -> Params {
    let key = |tensor| slice(tensor, 1, keys.0, keys.1);
    let value = |tensor| slice(tensor, 1, values.0, values.1);
    let state = |tensor| slice(tensor, 2, values.0, values.1);
    Params {
        q: key(p.q),
        k: key(p.k),
        v: value(p.v),
        g: value(p.g),
        beta: value(p.beta),
        out: value(p.out),
        state_in: state(p.state_in),
        state_out: state(p.state_out),
        ..*p
    }
}

/// The calls of shard `shard` of `shards` that owns a range of key heads and all value heads of those.
fn shard(p: &Params, head_map: HeadMap, shard: usize, shards: usize) -> Vec<Params> {
    let (keys, repeat) = (HK / shards, HV / HK);
    let first = shard * keys;
    match head_map {
        // The value heads of a key head are neighbours.
        HeadMap::Grouped => vec![heads(p, (first, keys), (first * repeat, keys * repeat))],
        // They are Hk apart: one call for each repetition.
        HeadMap::Tiled => (0..repeat).map(|j| heads(p, (first, keys), (j * HK + first, keys))).collect(),
    }
}

#[test]
fn head_shards_have_the_bits_of_the_whole() {
    let mut rng = Rng(seed());
    for isa in Isa::ALL.into_iter().filter(|isa| isa.is_available()) {
        for layout in [StateLayout::KeyContiguous, StateLayout::ValueContiguous] {
            for head_map in [HeadMap::Tiled, HeadMap::Grouped] {
                for tokens in [1, 5, 16, 97] {
                    let mut whole = Whole::new(&mut rng, tokens, head_map, layout);
                    let (params, state) = (whole.params, whole.state.clone());
                    let expected = whole.run(isa, &state, &[params]);
                    for shards in [2, 4, 16] {
                        let calls: Vec<Params> =
                            (0..shards).flat_map(|at| shard(&params, head_map, at, shards)).collect();
                        let bits = whole.run(isa, &state, &calls);
                        assert!(
                            bits == expected,
                            "{shards} shards, {tokens} tokens, {head_map:?}, {layout:?}, {isa:?}"
                        );
                    }
                }
            }
        }
    }
}

#[test]
fn sequence_shards_through_rows_have_the_bits_of_the_whole() {
    let mut rng = Rng(seed());
    for isa in Isa::ALL.into_iter().filter(|isa| isa.is_available()) {
        for tokens in [1, 16, 70] {
            let mut whole = Whole::new(&mut rng, tokens, HeadMap::Tiled, StateLayout::KeyContiguous);
            let (params, state) = (whole.params, whole.state.clone());
            let expected = whole.run(isa, &state, &[params]);
            let rows: Vec<[i32; 1]> = (0..B as i32).map(|row| [row]).collect();
            let calls: Vec<Params> = (0..B)
                .map(|b| {
                    let token = |tensor| slice(tensor, 3, b, 1);
                    let row = Tensor::dense(rows[b].as_ptr().cast_mut().cast(), Dtype::I32, [1, 1, 1, 1]);
                    // The states stay one pool: each shard names its row of it.
                    Params {
                        q: token(params.q),
                        k: token(params.k),
                        v: token(params.v),
                        g: token(params.g),
                        beta: token(params.beta),
                        out: token(params.out),
                        rows_in: row,
                        rows_out: row,
                        ..params
                    }
                })
                .collect();
            assert!(whole.run(isa, &state, &calls) == expected, "{tokens} tokens, {isa:?}");
        }
    }
}
