//! What stands where: answers by the test's own sums of strides, heads, rows and slots. The oracle takes these from the
//! problem, as the kernels do, and would not notice if both were wrong.

mod support;

use deltanet::cpu::{self, Isa};
use deltanet::{Plan, Tensor};
use support::{Case, Rng, Wish, seed};

// Places of the tensors among a case's buffers.
const Q: usize = 0;
const K: usize = 1;
const V: usize = 2;
const G: usize = 3;
const BETA: usize = 4;
const STATE_IN: usize = 5;
const OUT: usize = 6;
const STATE_OUT: usize = 7;
const SNAPSHOTS: usize = 8;
const ROWS_IN: usize = 9;
const ROWS_OUT: usize = 10;
const CUTS: usize = 11;

/// What an element of a buffer's slot must be.
struct Element {
    buffer: usize,
    at: [usize; 4],
    slot: usize,
    value: f64,
}

/// Every element that a run writes.
fn expected(case: &Case) -> Vec<Element> {
    let p = &case.params;
    let get = |buffer: usize, at| case.buffers[buffer].get(at, 0);
    let index = |tensor: &Tensor, buffer, at: usize| {
        if tensor.data.is_null() { at } else { get(buffer, [at, 0, 0, 0]) as usize }
    };
    let [s, hv, tokens, mut sequences] = p.v.ne.map(|n| n as usize);
    let [_, hk, _, bq] = p.q.ne.map(|n| n as usize);
    let ragged = !p.cu_seqlens.data.is_null();
    if ragged {
        sequences = p.cu_seqlens.ne[0] as usize - 1;
    }
    let in_place = p.state_out.data == p.state_in.data;
    let state_out = if in_place { STATE_IN } else { STATE_OUT };
    let place = |key, value, head, row| {
        if p.state_layout == 0 { [key, value, head, row] } else { [value, key, head, row] }
    };
    let scale = if p.scale == 0.0 { 1.0 / (s as f64).sqrt() } else { f64::from(p.scale) };
    let mut elements = Vec::new();
    for (b, h) in (0..sequences).flat_map(|b| (0..hv).map(move |h| (b, h))) {
        let (column, qk_column) = if ragged { (0, 0) } else { (b, b * bq / sequences) };
        let key_head = if p.head_map == 0 { h % hk } else { h * hk / hv };
        let (first, end) =
            if ragged { (index(&p.cu_seqlens, CUTS, b), index(&p.cu_seqlens, CUTS, b + 1)) } else { (0, tokens) };
        let row_in = index(&p.rows_in, ROWS_IN, b);
        let mut state: Vec<Vec<f64>> =
            (0..s).map(|key| (0..s).map(|value| get(STATE_IN, place(key, value, h, row_in))).collect()).collect();
        let mut keep = |buffer, slot, row, state: &[Vec<f64>]| {
            for (key, row_of_state) in state.iter().enumerate() {
                for (value, x) in row_of_state.iter().enumerate() {
                    elements.push(Element { buffer, at: place(key, value, h, row), slot, value: *x });
                }
            }
        };
        let mut outs = Vec::new();
        for t in first..end {
            let unit = |buffer| -> Vec<f64> {
                let raw: Vec<f64> = (0..s).map(|i| get(buffer, [i, key_head, t, qk_column])).collect();
                let power: f64 = raw.iter().map(|x| x * x).sum::<f64>() + f64::from(p.qk_norm_eps);
                raw.iter().map(|x| if p.qk_norm == 1 { x / power.sqrt() } else { *x }).collect()
            };
            let (q, k) = (unit(Q), unit(K));
            let beta = get(BETA, [0, h, t, column]);
            let beta = if p.beta_kind == 0 { beta } else { 1.0 / (1.0 + (-beta).exp()) };
            for (key, row) in state.iter_mut().enumerate() {
                let g = get(G, [if p.g.ne[0] == 1 { 0 } else { key }, h, t, column]);
                let g = if p.gate_max == 0.0 { g } else { g.min(f64::from(p.gate_max)) };
                row.iter_mut().for_each(|x| *x *= g.exp());
            }
            outs.extend((0..s).map(|value| {
                let seen: f64 = (0..s).map(|key| state[key][value] * k[key]).sum();
                let delta = beta * (get(V, [value, h, t, column]) - seen);
                (0..s).for_each(|key| state[key][value] += k[key] * delta);
                let out: f64 = (0..s).map(|key| state[key][value] * q[key]).sum();
                Element { buffer: OUT, at: [value, h, t, column], slot: 0, value: scale * out }
            }));
            if p.state_clamp > 0.0 {
                let limit = f64::from(p.state_clamp);
                state.iter_mut().flatten().for_each(|x| *x = x.clamp(-limit, limit));
            }
            // Tokens that follow the last one whose state is kept, and how many of those there are.
            let (count, skip) = (p.n_snapshots as usize, p.snapshot_skip as usize);
            let there = (end - first).saturating_sub(skip).min(count);
            if let Some(newer) = (end - 1 - t).checked_sub(skip).filter(|newer| *newer < there) {
                let slot = if p.snapshot_order == 0 { newer } else { there - 1 - newer };
                keep(SNAPSHOTS, slot, b, &state);
            }
        }
        if !p.state_out.data.is_null() {
            keep(state_out, 0, index(&p.rows_out, ROWS_OUT, b), &state);
        }
        elements.append(&mut outs);
    }
    elements
}

#[test]
fn everything_is_where_it_belongs() {
    let mut rng = Rng(seed());
    let count = support::cases(300);
    for _ in 0..count {
        let head_size = Some(rng.pick(&[16, 16, 32]));
        let case = Case::draw(&mut rng, Wish { head_size, ..Wish::default() });
        let problem = case.problem();
        let isa = rng.pick(&[Isa::Scalar, Isa::detected()]);
        let plan = Plan::new(&problem, isa).expect("the instruction set is there");
        let (expected, before) = (expected(&case), case.memory());
        // SAFETY: the case owns all memory that its params describe, and nobody else has it.
        unsafe { cpu::run(&problem, &plan, 1 + rng.below(3)) }.expect("a valid problem runs");
        case.assert_intact(&before);
        let (mut error, mut power) = ([0.0; 2], [0.0; 2]);
        for Element { buffer, at, slot, value } in expected {
            let got = case.buffers[buffer].get(at, slot);
            error[usize::from(buffer == OUT)] += (got - value).powi(2);
            power[usize::from(buffer == OUT)] += value.powi(2);
        }
        for (error, power, bound) in [(error[0], power[0], 1e-9), (error[1], power[1], case.bound.max(1e-9))] {
            assert!(error <= bound * power, "{error:e} of {power:e} on {}: {}", isa.name(), case.words);
        }
    }
}
