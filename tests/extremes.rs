//! Numbers at the edge of what numbers are: gates of minus infinity, beta outside 0 to 1, denormals, infinities and NaN.

mod support;

use deltanet::cpu::{self, Isa};
use deltanet::{Dtype, Params, Plan, Problem, Tensor, reference};
use support::{Case, Rng, Wish, seed};

fn isas() -> impl Iterator<Item = Isa> {
    Isa::ALL.into_iter().filter(|isa| isa.is_available())
}

/// Random problems with some tensors replaced, against the oracle.
fn hold(tokens: &[usize], bound: f64, change: impl Fn(&mut Rng, &mut Case)) {
    let mut rng = Rng(seed());
    for isa in isas() {
        for tokens in tokens.iter().copied().cycle().take(36) {
            let wish = Wish {
                tokens: Some(tokens),
                head_size: Some(rng.pick(&[16, 32, 64])),
                f32_only: true,
                ..Wish::default()
            };
            let mut case = Case::draw(&mut rng, wish);
            change(&mut rng, &mut case);
            let problem = case.problem();
            let plan = Plan::new(&problem, isa).expect("the instruction set is there");
            // SAFETY: the case owns all memory that its params describe.
            let nmse = unsafe {
                let expected = reference::evaluate(&problem);
                cpu::run(&problem, &plan, 2).expect("a valid problem runs");
                reference::compare(&problem, &expected)
            };
            assert!(nmse.within(bound), "{nmse:?} {}: {}", isa.name(), case.words);
        }
    }
}

/// Among them windows of several sizes.
const LENGTHS: &[usize] = &[1, 2, 4, 7, 30, 70];

#[test]
fn a_gate_of_minus_infinity_forgets() {
    hold(LENGTHS, 1e-9, |rng, case| {
        case.buffers[3].fill(|_| if rng.chance(20) { f64::NEG_INFINITY } else { -rng.uniform(0.0, 0.5) });
    });
}

#[test]
fn beta_may_be_outside_0_to_1() {
    hold(LENGTHS, 1e-8, |rng, case| {
        if case.params.beta_kind == 0 {
            case.buffers[4].fill(|_| rng.uniform(-0.5, 1.9));
        }
        case.params.qk_norm = 1;
        case.params.qk_norm_eps = 1e-6;
    });
}

#[test]
fn states_are_clamped_token_by_token() {
    hold(&[1, 2, 3, 4, 5, 6, 7, 8, 30], 1e-9, |rng, case| case.params.state_clamp = rng.pick(&[0.1, 0.4, 2.0, 1e6]));
}

#[test]
fn gates_may_grow_the_state() {
    hold(&[1, 4, 30], 1e-8, |rng, case| case.buffers[3].fill(|_| rng.uniform(-0.5, 0.8)));
}

#[test]
fn f16_outputs_beyond_its_range_are_infinite() {
    hold(LENGTHS, 2.4e-7, |_, case| {
        case.params.out.dtype = Dtype::F16 as u32;
        case.params.scale = 1e6;
    });
}

/// Something that is not finite, and where it is put: head 1 of 2, token `at`, channel 3.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Where {
    Q,
    K,
    V,
    Gate,
    Beta,
    State,
}

const S: usize = 32;
const HEADS: usize = 2;
const CHANNEL: usize = 3;

/// One key head, two value heads, one sequence.
struct Memory {
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    g: Vec<f32>,
    beta: Vec<f32>,
    state: Vec<f32>,
    out: Vec<f32>,
    state_out: Vec<f32>,
}

impl Memory {
    fn draw(tokens: usize, rng: &mut Rng) -> Memory {
        let mut some = |n: usize, low: f64, high: f64| (0..n).map(|_| rng.uniform(low, high) as f32).collect();
        Memory {
            q: some(S * tokens, -0.2, 0.2),
            k: some(S * tokens, -0.2, 0.2),
            v: some(S * HEADS * tokens, -1.0, 1.0),
            g: some(HEADS * tokens, -0.3, 0.0),
            beta: some(HEADS * tokens, 0.1, 1.0),
            state: some(S * S * HEADS, -0.5, 0.5),
            out: vec![7.0; S * HEADS * tokens],
            state_out: vec![7.0; S * S * HEADS],
        }
    }

    /// The element that `what` names, at token `at`.
    fn element(&mut self, what: Where, at: usize) -> &mut f32 {
        match what {
            Where::Q => &mut self.q[at * S + CHANNEL],
            Where::K => &mut self.k[at * S + CHANNEL],
            Where::V => &mut self.v[(at * HEADS + 1) * S + CHANNEL],
            Where::Gate => &mut self.g[at * HEADS + 1],
            Where::Beta => &mut self.beta[at * HEADS + 1],
            // Key channel 5 of value column 3.
            Where::State => &mut self.state[(S + CHANNEL) * S + 5],
        }
    }

    fn run(&mut self, isa: Isa, threads: usize) {
        let tokens = (self.q.len() / S) as i64;
        let (s, heads) = (S as i64, HEADS as i64);
        let tensor = |data: &mut Vec<f32>, ne| Tensor::dense(data.as_mut_ptr().cast(), Dtype::F32, ne);
        let params = Params {
            q: tensor(&mut self.q, [s, 1, tokens, 1]),
            k: tensor(&mut self.k, [s, 1, tokens, 1]),
            v: tensor(&mut self.v, [s, heads, tokens, 1]),
            g: tensor(&mut self.g, [1, heads, tokens, 1]),
            beta: tensor(&mut self.beta, [1, heads, tokens, 1]),
            state_in: tensor(&mut self.state, [s, s, heads, 1]),
            out: tensor(&mut self.out, [s, heads, tokens, 1]),
            state_out: tensor(&mut self.state_out, [s, s, heads, 1]),
            ..Params::default()
        };
        // SAFETY: params has no index tensors.
        let problem = unsafe { Problem::new(&params) }.expect("a valid problem");
        let plan = Plan::new(&problem, isa).expect("the instruction set is there");
        // SAFETY: the vectors are as large as described, and nobody else has them.
        unsafe { cpu::run(&problem, &plan, threads) }.expect("a valid problem runs");
    }
}

/// What must not be finite; everything else must be what it is without the intruder, but for rounding: a chunk with an
/// intruder may take another way.
fn spoils_out(what: Where, at: usize, head: usize, token: usize, column: usize) -> bool {
    match what {
        Where::Q => token == at,
        Where::K => token >= at,
        Where::V => head == 1 && token >= at && column == CHANNEL,
        Where::Gate | Where::Beta => head == 1 && token >= at,
        Where::State => head == 1 && column == CHANNEL,
    }
}

fn same(got: f32, clean: f32) -> bool {
    (got - clean).abs() <= 1e-5
}

fn spoils_state(what: Where, head: usize, column: usize) -> bool {
    match what {
        Where::Q => false,
        Where::K => true,
        Where::Gate | Where::Beta => head == 1,
        Where::V | Where::State => head == 1 && column == CHANNEL,
    }
}

#[test]
fn what_is_not_finite_spoils_what_depends_on_it_alone() {
    let mut rng = Rng(seed());
    for isa in isas() {
        for (tokens, at) in [(1, 0), (6, 3), (40, 7), (40, 30), (101, 50)] {
            let mut clean = Memory::draw(tokens, &mut rng);
            clean.run(isa, 1);
            for what in [Where::Q, Where::K, Where::V, Where::Gate, Where::Beta, Where::State] {
                for intruder in [f32::NAN, f32::INFINITY] {
                    let mut memory = Memory {
                        q: clean.q.clone(),
                        k: clean.k.clone(),
                        v: clean.v.clone(),
                        g: clean.g.clone(),
                        beta: clean.beta.clone(),
                        state: clean.state.clone(),
                        out: vec![7.0; clean.out.len()],
                        state_out: vec![7.0; clean.state_out.len()],
                    };
                    *memory.element(what, at) = intruder;
                    memory.run(isa, 1 + rng.below(3));
                    let told = format!("{} {what:?} {intruder} at token {at} of {tokens}", isa.name());
                    for (place, (got, clean)) in memory.out.iter().zip(&clean.out).enumerate() {
                        let (column, head, token) = (place % S, place / S % HEADS, place / S / HEADS);
                        if spoils_out(what, at, head, token, column) {
                            assert!(
                                !got.is_finite(),
                                "{told}: out of head {head}, token {token}, column {column} is {got}"
                            );
                        } else {
                            assert!(
                                same(*got, *clean),
                                "{told}: out of head {head}, token {token}, column {column} is {got}, without it {clean}"
                            );
                        }
                    }
                    for (place, (got, clean)) in memory.state_out.iter().zip(&clean.state_out).enumerate() {
                        let (key, column, head) = (place % S, place / S % S, place / S / S);
                        // An infinite decay or value may meet a state of its own sign; it is not finite all the same.
                        if spoils_state(what, head, column) {
                            assert!(
                                !got.is_finite(),
                                "{told}: state of head {head}, key {key}, column {column} is {got}"
                            );
                        } else {
                            assert!(same(*got, *clean), "{told}: state of head {head}, column {column} differs");
                        }
                    }
                }
            }
        }
    }
}
