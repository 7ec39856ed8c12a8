//! A problem with as many heads as models have, and the calls that split it by heads.

use super::Rng;
use deltanet::params::{HeadMap, StateLayout};
use deltanet::{Dtype, Params, Tensor};

pub const HK: usize = 16;
pub const HV: usize = 32;
pub const B: usize = 4;

/// The whole problem's memory.
pub struct Whole {
    pub params: Params,
    inputs: Vec<Vec<f32>>,
    out: Vec<f32>,
    pub state: Vec<f32>,
}

impl Whole {
    pub fn new(rng: &mut Rng, s: usize, tokens: usize, head_map: HeadMap, layout: StateLayout) -> Whole {
        let shapes = [[s, HK], [s, HK], [s, HV], [1, HV], [1, HV]];
        let mut inputs: Vec<Vec<f32>> = shapes
            .iter()
            .enumerate()
            .map(|(which, [channels, heads])| {
                let draw = |_| match which {
                    3 => -rng.uniform(1e-4, 3.0) as f32,
                    4 => rng.uniform(0.0, 1.0) as f32,
                    2 => rng.normal() as f32,
                    _ => (rng.normal() / (s as f64).sqrt()) as f32,
                };
                (0..channels * heads * tokens * B).map(draw).collect()
            })
            .collect();
        let mut out = vec![f32::NAN; s * HV * tokens * B];
        let mut state: Vec<f32> = (0..s * s * HV * B).map(|_| rng.normal() as f32).collect();
        let mut at = |which: usize| {
            let [channels, heads] = shapes[which];
            let ne = [channels, heads, tokens, B].map(|n| n as i64);
            Tensor::dense(inputs[which].as_mut_ptr().cast(), Dtype::F32, ne)
        };
        let states = Tensor::dense(state.as_mut_ptr().cast(), Dtype::F32, [s, s, HV, B].map(|n| n as i64));
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
            out: Tensor::dense(out.as_mut_ptr().cast(), Dtype::F32, [s, HV, tokens, B].map(|n| n as i64)),
            ..Params::default()
        };
        Whole { params, inputs, out, state }
    }

    /// Lets `run` compute from the given initial states and returns the bits of the outputs and states.
    pub fn bits(&mut self, state: &[f32], run: impl FnOnce()) -> Vec<u32> {
        self.out.fill(f32::NAN);
        self.state.copy_from_slice(state);
        assert_eq!(self.inputs.len(), 5, "the inputs live as long as the calls that point to them");
        run();
        self.out.iter().chain(&self.state).map(|x| x.to_bits()).collect()
    }
}

/// Entries `first .. first + count` along an axis.
pub fn slice(tensor: Tensor, axis: usize, first: usize, count: usize) -> Tensor {
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
pub fn shard(p: &Params, head_map: HeadMap, shard: usize, shards: usize) -> Vec<Params> {
    let (keys, repeat) = (HK / shards, HV / HK);
    let first = shard * keys;
    match head_map {
        // The value heads of a key head are neighbours.
        HeadMap::Grouped => vec![heads(p, (first, keys), (first * repeat, keys * repeat))],
        // They are Hk apart: one call for each repetition.
        HeadMap::Tiled => (0..repeat).map(|j| heads(p, (first, keys), (j * HK + first, keys))).collect(),
    }
}
