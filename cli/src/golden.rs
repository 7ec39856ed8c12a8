//! Golden cases: safetensors files with a problem and the answer that somebody else's code gave.
//!
//! Tensors q, k `[B, T, Hk, S]`, v, out `[B, T, Hv, S]`, g `[B, T, Hv]` or `[B, T, Hv, S]`, beta `[B, T, Hv]`, state_in
//! and state_out `[B, Hv, Sk, Sv]` (or `[B, Hv, Sv, Sk]`, as the metadata's `state` says). Metadata: `head_map` is
//! grouped, tiled or one-to-one, `l2norm` is none or the epsilon of the norm of q and k.

use anyhow::{Context, Result, bail, ensure};
use deltanet::params::{HeadMap, StateLayout};
use deltanet::{Dtype, Params, Tensor};
use safetensors::SafeTensors;
use std::collections::HashMap;
use std::path::Path;

/// A tensor of a file, copied to aligned memory.
struct Stored {
    memory: Vec<u64>,
    dtype: Dtype,
    shape: Vec<usize>,
}

/// A golden case with room for our own answer.
pub struct Case {
    name: String,
    inputs: HashMap<&'static str, Stored>,
    out: Vec<f32>,
    state: Vec<f32>,
    expected_out: Vec<f64>,
    expected_state: Vec<f64>,
    head_map: HeadMap,
    layout: StateLayout,
    norm: Option<f32>,
}

/// Squared error of our answer over the square of the golden one.
#[derive(Clone, Copy, Debug)]
pub struct Nmse {
    /// Of the outputs.
    pub out: f64,
    /// Of the final states.
    pub state: f64,
}

impl Case {
    /// Reads and checks a file.
    pub fn load(path: &Path) -> Result<Case> {
        let bytes = std::fs::read(path).with_context(|| format!("{} cannot be read", path.display()))?;
        Case::parse(path, &bytes).with_context(|| format!("{} is no golden case", path.display()))
    }

    /// Checks the bytes of a file; `path` gives the case its name.
    pub fn parse(path: &Path, bytes: &[u8]) -> Result<Case> {
        let (_, header) = SafeTensors::read_metadata(bytes)?;
        let file = SafeTensors::deserialize(bytes)?;
        let metadata = header.metadata().clone().unwrap_or_default();
        let word = |name: &str, default: &'static str| metadata.get(name).map_or(default, |word| word.as_str());

        let mut inputs = HashMap::new();
        for name in ["q", "k", "v", "g", "beta", "state_in"] {
            inputs.insert(name, Stored::read(&file, name)?);
        }
        let out = Stored::read(&file, "out")?;
        let state = Stored::read(&file, "state_out")?;
        ensure!(out.shape == inputs["v"].shape, "out is {:?} and v {:?}", out.shape, inputs["v"].shape);
        let state_in = &inputs["state_in"].shape;
        ensure!(state.shape == *state_in, "state_out is {:?} and state_in {state_in:?}", state.shape);
        Ok(Case {
            name: path.file_stem().map_or_else(String::new, |stem| stem.to_string_lossy().into_owned()),
            out: vec![f32::NAN; out.len()],
            state: vec![f32::NAN; state.len()],
            expected_out: out.values(),
            expected_state: state.values(),
            head_map: match word("head_map", "tiled") {
                "grouped" => HeadMap::Grouped,
                "tiled" | "one-to-one" => HeadMap::Tiled,
                other => bail!("head_map is {other}; it must be grouped, tiled or one-to-one"),
            },
            layout: if word("state", "").ends_with("Sv,Sk]") {
                StateLayout::KeyContiguous
            } else {
                StateLayout::ValueContiguous
            },
            norm: match word("l2norm", "none") {
                "none" => None,
                eps => Some(eps.parse().with_context(|| format!("l2norm is {eps}; it must be none or a number"))?),
            },
            inputs,
        })
    }

    /// The file's name without its ending.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The call that the case describes, writing to the case's own memory. Valid while the case is not moved or read.
    pub fn params(&mut self) -> Params {
        self.out.fill(f32::NAN);
        self.state.fill(f32::NAN);
        let tokens = |name: &str| self.inputs[name].tensor(if name == "g" || name == "beta" { 3 } else { 4 });
        let state_in = self.inputs["state_in"].tensor(4);
        Params {
            head_map: self.head_map as u32,
            state_layout: self.layout as u32,
            q: tokens("q"),
            k: tokens("k"),
            v: tokens("v"),
            g: tokens("g"),
            beta: tokens("beta"),
            state_in,
            out: Tensor::dense(self.out.as_mut_ptr().cast(), Dtype::F32, tokens("v").ne),
            state_out: Tensor::dense(self.state.as_mut_ptr().cast(), Dtype::F32, state_in.ne),
            qk_norm: u32::from(self.norm.is_some()),
            qk_norm_eps: self.norm.unwrap_or(0.0),
            ..Params::default()
        }
    }

    /// Where the answer goes, for a run elsewhere (a GPU) that copies it back: out and the final states.
    pub fn answer_mut(&mut self) -> (&mut [f32], &mut [f32]) {
        (&mut self.out, &mut self.state)
    }

    /// How far the answer of the last run is from the golden one.
    pub fn nmse(&self) -> Nmse {
        Nmse { out: nmse(&self.out, &self.expected_out), state: nmse(&self.state, &self.expected_state) }
    }
}

fn nmse(actual: &[f32], expected: &[f64]) -> f64 {
    let square = |x: f64| x * x;
    let error: f64 = actual.iter().zip(expected).map(|(a, e)| square(f64::from(*a) - e)).sum();
    let power: f64 = expected.iter().copied().map(square).sum();
    if error == 0.0 { 0.0 } else { error / power }
}

impl Stored {
    fn read(file: &SafeTensors, name: &str) -> Result<Stored> {
        let view = file.tensor(name).with_context(|| format!("tensor {name}"))?;
        let dtype = match view.dtype() {
            safetensors::Dtype::F32 => Dtype::F32,
            safetensors::Dtype::F16 => Dtype::F16,
            safetensors::Dtype::BF16 => Dtype::Bf16,
            other => bail!("{name} is {other:?}; it must be F32, F16 or BF16"),
        };
        ensure!((1..=4).contains(&view.shape().len()), "{name} has {} axes", view.shape().len());
        let bytes = view.data();
        let mut memory = vec![0u64; bytes.len().div_ceil(8)];
        for (word, chunk) in memory.iter_mut().zip(bytes.chunks(8)) {
            let mut padded = [0; 8];
            padded[..chunk.len()].copy_from_slice(chunk);
            *word = u64::from_ne_bytes(padded);
        }
        Ok(Stored { memory, dtype, shape: view.shape().to_vec() })
    }

    fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// The elements as f64, whatever the dtype.
    fn values(&self) -> Vec<f64> {
        let bytes: Vec<u8> = self.memory.iter().flat_map(|word| word.to_ne_bytes()).collect();
        let elements = bytes.chunks_exact(self.dtype.size()).take(self.len());
        elements
            .map(|e| match self.dtype {
                Dtype::F16 => half::f16::from_ne_bytes([e[0], e[1]]).to_f64(),
                Dtype::Bf16 => half::bf16::from_ne_bytes([e[0], e[1]]).to_f64(),
                _ => f32::from_ne_bytes([e[0], e[1], e[2], e[3]]).into(),
            })
            .collect()
    }

    /// The dense tensor; a row-major shape of fewer than `axes` + 1 axes has no channel axis of its own (g, beta).
    fn tensor(&self, axes: usize) -> Tensor {
        let mut ne: Vec<i64> = self.shape.iter().rev().map(|n| *n as i64).collect();
        if axes == 3 && ne.len() == 3 {
            ne.insert(0, 1);
        }
        ne.resize(4, 1);
        Tensor::dense(self.memory.as_ptr().cast_mut().cast(), self.dtype, [ne[0], ne[1], ne[2], ne[3]])
    }
}
