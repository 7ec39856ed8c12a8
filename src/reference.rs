//! The equations in f64, plain loops, no tricks: the oracle that every kernel is compared with.

use crate::params::BetaKind;
use crate::problem::{Problem, StateView};
use crate::tensor::{Dtype, View};

/// What a run of a problem must produce, in f64.
#[derive(Clone, Debug)]
pub struct Expected {
    /// Outputs by (token sequence, token, value head, channel); `None` for tokens that no sequence owns.
    out: Vec<Option<f64>>,
    /// Final states by (sequence, value head, key channel, value channel).
    state: Vec<f64>,
    /// Each slot's states like `state`; `None` for a slot that stays untouched in that sequence.
    snapshots: Vec<Vec<Option<f64>>>,
    /// Sum of the squares of all products that were added up to outputs.
    out_terms: f64,
}

impl Expected {
    /// The mean square of the outputs; 0 where there are none.
    pub fn out_mean_square(&self) -> f64 {
        self.out_square() / self.out.iter().flatten().count().max(1) as f64
    }

    /// By how much the outputs' NMSE can exceed that of what was added up to them: the squares of the terms over those of the
    /// sums. About 1, unless all sums happen to be small, as those of a lone token are whose query and key are orthogonal.
    pub fn out_cancellation(&self) -> f64 {
        let sums = self.out_square();
        if sums > 0.0 { self.out_terms / sums } else { 1.0 }
    }

    fn out_square(&self) -> f64 {
        self.out.iter().flatten().map(|x| x * x).sum()
    }
}

/// How far a run is from the oracle: the squared error over the squared expectation, 0 for an absent tensor.
#[derive(Clone, Copy, Debug)]
pub struct Nmse {
    /// Of `out`.
    pub out: f64,
    /// Of `state_out` and all snapshots together.
    pub state: f64,
}

impl Nmse {
    /// Whether both are at most `bound`; a NaN is not.
    pub fn within(&self, bound: f64) -> bool {
        self.out <= bound && self.state <= bound
    }
}

/// Computes what `problem` must produce.
///
/// # Safety
/// The problem's tensors are as large as described, readable, and nobody writes to them meanwhile.
pub unsafe fn evaluate(problem: &Problem) -> Expected {
    let p = problem;
    let (s, hv) = (p.head_size(), p.value_heads());
    let [_, _, tokens, token_sequences] = p.v.ne;
    let slots = p.snapshots.map_or(0, |snapshots| snapshots.count);
    let mut expected = Expected {
        out: vec![None; token_sequences * tokens * hv * s],
        state: vec![0.0; p.sequences() * hv * s * s],
        snapshots: vec![vec![None; p.sequences() * hv * s * s]; slots],
        out_terms: 0.0,
    };
    for b in 0..p.sequences() {
        for h in 0..hv {
            // SAFETY: passed on.
            unsafe { evaluate_head(p, b, h, &mut expected) };
        }
    }
    expected
}

/// One sequence and value head.
///
/// # Safety
/// As for [`evaluate`].
unsafe fn evaluate_head(p: &Problem, b: usize, h: usize, expected: &mut Expected) {
    let (s, hv) = (p.head_size(), p.value_heads());
    // SAFETY: indices are below the checked extents in every call below, and the caller vouches for the memory.
    let load = |view: &View, at: [usize; 4]| unsafe { load(view, at) };
    let (qk_sequence, sequence) = p.tensor_sequences(b);
    let range = p.token_range(b);
    let mut state = vec![0.0; s * s];
    for (at, element) in state.iter_mut().enumerate() {
        // SAFETY: as above.
        *element = unsafe { load_state(&p.state_in, at / s, at % s, h, p.row_in(b)) };
    }
    let head = (b * hv + h) * s * s;
    for t in range.clone() {
        let row = |view: &View| -> Vec<f64> {
            let raw: Vec<f64> = (0..s).map(|i| load(view, [i, p.key_head(h), t, qk_sequence])).collect();
            let norm = p.qk_norm().map_or(1.0, |eps| (raw.iter().map(|x| x * x).sum::<f64>() + f64::from(eps)).sqrt());
            raw.iter().map(|x| x / norm).collect()
        };
        let (q, k) = (row(&p.q), row(&p.k));
        let beta = match (p.beta_kind(), load(&p.beta, [0, h, t, sequence])) {
            (BetaKind::Value, beta) => beta,
            (BetaKind::Logit, logit) => 1.0 / (1.0 + (-logit).exp()),
        };
        let decay = |i: usize| {
            let g = load(&p.g, [if p.channel_gate() { i } else { 0 }, h, t, sequence]);
            at_most(g, f64::from(p.gate_max())).exp()
        };
        let decays: Vec<f64> = if p.channel_gate() { (0..s).map(decay).collect() } else { vec![decay(0); s] };
        // S^T k and S^T q by rows of the state, so that value channels, which are independent, are the inner loop.
        let mut predicted = vec![0.0; s];
        for ((row, decay), k) in state.chunks_exact_mut(s).zip(&decays).zip(&k) {
            for (x, sum) in row.iter_mut().zip(&mut predicted) {
                *x *= decay;
                *sum += *x * k;
            }
        }
        let delta: Vec<f64> =
            predicted.iter().enumerate().map(|(j, sum)| beta * (load(&p.v, [j, h, t, sequence]) - sum)).collect();
        let (mut out, mut terms) = (vec![0.0; s], vec![0.0; s]);
        for ((row, k), q) in state.chunks_exact_mut(s).zip(&k).zip(&q) {
            for (((x, delta), sum), squares) in row.iter_mut().zip(&delta).zip(&mut out).zip(&mut terms) {
                *x += k * delta;
                let term = *x * q;
                *sum += term;
                *squares += term * term;
            }
        }
        expected.out_terms += f64::from(p.scale()).powi(2) * terms.iter().sum::<f64>();
        for (j, o) in out.into_iter().enumerate() {
            expected.out[((sequence * p.v.ne[2] + t) * hv + h) * s + j] = Some(f64::from(p.scale()) * o);
        }
        // As in ik_llama.cpp, the token's own output comes from the state before the clamp.
        let limit = f64::from(p.state_clamp());
        state.iter_mut().for_each(|x| *x = -at_most(-at_most(*x, limit), limit));
        if let Some(slot) = p.snapshots.and_then(|snapshots| snapshots.slot(t - range.start, range.len())) {
            for (to, from) in expected.snapshots[slot][head..].iter_mut().zip(&state) {
                *to = Some(*from);
            }
        }
    }
    expected.state[head..][..s * s].copy_from_slice(&state);
}

/// Compares what stands in the problem's outputs with what must stand there.
///
/// # Safety
/// The problem's outputs are as large as described, readable, and nobody writes to them meanwhile.
pub unsafe fn compare(problem: &Problem, expected: &Expected) -> Nmse {
    let p = problem;
    let (s, hv) = (p.head_size(), p.value_heads());
    let tokens = p.v.ne[2];
    let mut out = Error::default();
    for (at, expected) in expected.out.iter().enumerate() {
        let (channel, h, t, sequence) = (at % s, at / s % hv, at / s / hv % tokens, at / s / hv / tokens);
        if let Some(expected) = expected {
            // SAFETY: indices are below the checked extents, and the caller vouches for the memory.
            out.add(unsafe { load(&p.out, [channel, h, t, sequence]) }, *expected, largest(p.out.dtype));
        }
    }
    let mut state = Error::default();
    let mut states =
        |view: &StateView, row: &dyn Fn(usize) -> usize, expected: &mut dyn Iterator<Item = Option<f64>>| {
            for (at, expected) in expected.enumerate() {
                let (j, i, h, b) = (at % s, at / s % s, at / s / s % hv, at / s / s / hv);
                if let Some(expected) = expected {
                    // SAFETY: as above.
                    state.add(unsafe { load_state(view, i, j, h, row(b)) }, expected, largest(Dtype::F32));
                }
            }
        };
    if let Some(view) = &p.state_out {
        states(view, &|b| p.row_out(b), &mut expected.state.iter().copied().map(Some));
    }
    if let Some(snapshots) = &p.snapshots {
        for (slot, expected) in expected.snapshots.iter().enumerate() {
            states(&snapshots.view(slot), &|b| b, &mut expected.iter().copied());
        }
    }
    Nmse { out: out.nmse(), state: state.nmse() }
}

/// The smaller of the two, or NaN where `x` is (`f64::min` would drop it).
fn at_most(x: f64, limit: f64) -> f64 {
    if x > limit { limit } else { x }
}

/// The largest finite number of a type of floats.
fn largest(dtype: Dtype) -> f64 {
    match dtype {
        Dtype::F16 => half::f16::MAX.to_f64(),
        Dtype::Bf16 => half::bf16::MAX.to_f64(),
        _ => f32::MAX.into(),
    }
}

/// # Safety
/// `at` is below the view's extents and the memory is readable.
unsafe fn load(view: &View, at: [usize; 4]) -> f64 {
    let element = view.at(at);
    // SAFETY: the view is aligned for its dtype; the rest is passed on.
    unsafe {
        match view.dtype {
            Dtype::F16 => element.cast::<half::f16>().read().to_f64(),
            Dtype::Bf16 => element.cast::<half::bf16>().read().to_f64(),
            _ => element.cast::<f32>().read().into(),
        }
    }
}

/// # Safety
/// As for [`load`].
unsafe fn load_state(view: &StateView, key: usize, value: usize, head: usize, row: usize) -> f64 {
    // SAFETY: passed on.
    unsafe { view.head(head, row).wrapping_byte_add(key * view.nb_k + value * view.nb_v).read().into() }
}

/// Sums of squares of an error and of the expectation.
#[derive(Default)]
struct Error {
    error: f64,
    power: f64,
}

impl Error {
    /// `largest` is the largest finite number that the actual value's type has.
    fn add(&mut self, actual: f64, expected: f64, largest: f64) {
        // What IEEE defines as NaN or infinite must come out so; it would otherwise drown every other element.
        let infinite = actual.is_infinite() && expected.abs() > largest && actual.signum() == expected.signum();
        if infinite || actual.is_nan() && expected.is_nan() {
            return;
        }
        self.error += (actual - expected) * (actual - expected);
        self.power += expected * expected;
    }

    fn nmse(&self) -> f64 {
        if self.error == 0.0 { 0.0 } else { self.error / self.power }
    }
}
