//! Our `iqk_fused_delta_net` beside ik_llama.cpp's own, from the released wheel, and both beside the f64 oracle.

mod support;

use deltanet::params::{BetaKind, HeadMap, SnapshotOrder, StateLayout};
use deltanet::reference::{self, Expected};
use deltanet::{Dtype, Params, Problem, Tensor};
use std::ffi::c_int;
use std::path::Path;
use support::{Rng, peers, seed};

/// The function before May 2026, as the wheel has it.
#[rustfmt::skip]
type Plain = unsafe extern "C" fn(
    c_int, c_int, c_int, c_int, c_int, c_int, usize, usize, usize, *const f32, *const f32, *const f32, *const f32,
    *const f32, *const f32, *mut f32, *mut f32, c_int, c_int,
) -> bool;

/// The function since, with saved_steps and state_step_stride.
#[rustfmt::skip]
type SavedSteps = unsafe extern "C" fn(
    c_int, c_int, c_int, c_int, c_int, c_int, usize, usize, usize, *const f32, *const f32, *const f32, *const f32,
    *const f32, *const f32, *mut f32, *mut f32, *mut f32, c_int, c_int, c_int,
) -> bool;

#[derive(Clone, Copy)]
enum Function {
    Plain(Plain),
    SavedSteps(SavedSteps),
}

/// Ours, as programs without an engine's definition of their own call it.
fn ours() -> Function {
    let function = deltanet::iqk_fused_delta_net as *const ();
    // SAFETY: the symbol has the newest engine's signature for such callers.
    Function::SavedSteps(unsafe { std::mem::transmute::<*const (), SavedSteps>(function) })
}

/// Between the two, and of each against the oracle.
const BOUND: f64 = 1e-10;

/// Floats around every tensor that nobody may touch.
const GUARD: usize = 32;
const GUARD_BITS: u32 = 0xa5a5_a5a5;

/// A tensor of floats between guards.
#[derive(Clone)]
struct Floats(Vec<f32>);

impl Floats {
    fn new(len: usize, value: impl FnMut(usize) -> f32) -> Floats {
        let mut memory = vec![f32::from_bits(GUARD_BITS); len + 2 * GUARD];
        memory[GUARD..GUARD + len].iter_mut().zip((0..len).map(value)).for_each(|(to, from)| *to = from);
        Floats(memory)
    }
    fn values(&self) -> &[f32] {
        &self.0[GUARD..self.0.len() - GUARD]
    }
    fn pointer(&self) -> *mut f32 {
        self.values().as_ptr().cast_mut()
    }
    fn guards_hold(&self) -> bool {
        let (low, rest) = self.0.split_at(GUARD);
        low.iter().chain(&rest[rest.len() - GUARD..]).all(|guard| guard.to_bits() == GUARD_BITS)
    }
}

/// What the numbers of a case are like.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    /// As models have them.
    Usual,
    /// Values so large that states run past the clamp.
    LargeValues,
    /// Gates above 50 and up to infinity; tiny betas, so that no rounding error decides the sign of what is clamped.
    LargeGates,
}

/// One call's arguments and memory.
#[derive(Clone)]
struct Case {
    kind: Kind,
    head_dim: usize,
    heads: usize,
    gqa: usize,
    repeat: c_int,
    tokens: usize,
    sequences: usize,
    /// Elements from token to token, head to head, sequence to sequence of v.
    v_strides: [usize; 3],
    in_place: bool,
    saves: bool,
    step_stride: usize,
    q: Floats,
    k: Floats,
    v: Floats,
    g: Floats,
    beta: Floats,
    state: Floats,
    out: Floats,
    state_out: Floats,
    saved: Floats,
}

impl Case {
    fn draw(rng: &mut Rng, kind: Kind, head_dim: usize, repeat: c_int, gqa: usize, tokens: usize) -> Case {
        let (s, key_heads, sequences) = (head_dim, 1 + rng.below(2), 1 + rng.below(3));
        let heads = key_heads * gqa;
        let gap = |rng: &mut Rng| if rng.chance(50) { 1 + rng.below(40) } else { 0 };
        // The engine's graphs have v as a part of each token's q, k, v row; other orders are as good.
        let (a, b, c) = (gap(rng), gap(rng), gap(rng));
        let v_strides = if rng.chance(60) {
            let token = s * heads + a;
            [token, s, tokens * token + b]
        } else {
            let (token, head) = (s + a, tokens * (s + a) + b);
            [token, head, heads * head + c]
        };
        let state_size = s * s * heads * sequences;
        let saves = rng.chance(50);
        let step_stride = state_size + gap(rng);
        let key_scale = 1.0 / (s as f64).sqrt();
        let rows = s * key_heads * tokens * sequences;
        let per_head = heads * tokens * sequences;
        let v_len = (tokens - 1) * v_strides[0] + (heads - 1) * v_strides[1] + (sequences - 1) * v_strides[2] + s;
        let v_scale = if kind == Kind::LargeValues { 1e8 } else { 1.0 };
        let sign = |rng: &mut Rng| if rng.chance(50) { 1.0 } else { -1.0 };
        Case {
            kind,
            head_dim,
            heads,
            gqa,
            repeat,
            tokens,
            sequences,
            v_strides,
            in_place: rng.chance(50),
            saves,
            step_stride,
            q: Floats::new(rows, |_| (rng.normal() * key_scale) as f32),
            k: Floats::new(rows, |_| (rng.normal() * key_scale) as f32),
            v: Floats::new(v_len, |_| (rng.normal() * v_scale) as f32),
            g: Floats::new(per_head, |at| match (kind, rng.below(6)) {
                // The last token has one, so that clamped states are left.
                (Kind::LargeGates, kind) if kind < 3 || at / heads % tokens == tokens - 1 => {
                    rng.pick(&[50.5, 60.0, 88.0, 1e30, f32::INFINITY])
                }
                (_, 0) => rng.uniform(-20.0, -1.0) as f32,
                (_, 1) => 0.0,
                _ => -rng.uniform(-9.0, 1.0).exp() as f32,
            }),
            beta: Floats::new(per_head, |_| match kind {
                Kind::LargeGates => rng.uniform(-13.0, -12.0) as f32,
                _ => (3.0 * rng.normal()) as f32,
            }),
            state: Floats::new(state_size, |_| match kind {
                Kind::LargeGates => (sign(rng) * rng.uniform(0.5, 1.5)) as f32,
                _ => (0.3 * rng.normal()) as f32,
            }),
            out: Floats::new(s * heads * tokens * sequences, |_| f32::NAN),
            state_out: Floats::new(state_size, |_| f32::NAN),
            saved: Floats::new(if saves { (tokens - 1) * step_stride } else { 0 }, |_| f32::NAN),
        }
    }

    fn words(&self) -> String {
        let Case { kind, head_dim, heads, gqa, repeat, tokens, sequences, v_strides, in_place, saves, .. } = self;
        format!(
            "{kind:?} S {head_dim} H {heads} gqa {gqa} repeat {repeat} T {tokens} B {sequences} v {v_strides:?} \
             in place {in_place} saves {saves}"
        )
    }

    /// The memory that the state is written to.
    fn final_state(&self) -> &Floats {
        if self.in_place { &self.state } else { &self.state_out }
    }

    /// Calls part `ith` of `nth`.
    ///
    /// # Safety
    /// No part is called twice, and nobody looks at the outputs until all parts have returned.
    unsafe fn part(&self, function: Function, ith: usize, nth: usize) -> bool {
        let int = |n: usize| c_int::try_from(n).expect("a small number");
        let [s, heads, gqa, tokens, sequences] =
            [self.head_dim, self.heads, self.gqa, self.tokens, self.sequences].map(int);
        let (repeat, [v1, v2, v3], stride) = (self.repeat, self.v_strides, int(self.step_stride));
        let [q, k, v, g, beta, state, out, state_out] =
            [&self.q, &self.k, &self.v, &self.g, &self.beta, &self.state, &self.out, self.final_state()]
                .map(Floats::pointer);
        let saved = if self.saves { self.saved.pointer() } else { std::ptr::null_mut() };
        let (ith, nth) = (int(ith), int(nth));
        // SAFETY: the case has memory as large as the arguments say; the rest is passed on.
        unsafe {
            match function {
                Function::Plain(function) => function(
                    s, heads, gqa, repeat, tokens, sequences, v1, v2, v3, q, k, v, g, beta, state, out, state_out, ith,
                    nth,
                ),
                Function::SavedSteps(function) => function(
                    s, heads, gqa, repeat, tokens, sequences, v1, v2, v3, q, k, v, g, beta, state, out, state_out,
                    saved, stride, ith, nth,
                ),
            }
        }
    }

    /// Runs the whole case with `nth` threads, and checks that nothing was written beside the outputs.
    fn run(&mut self, function: Function, nth: usize) {
        let before = self.clone();
        let this = &*self;
        std::thread::scope(|scope| {
            for ith in 0..nth {
                // SAFETY: each part once, and the scope waits for all of them.
                scope
                    .spawn(move || assert!(unsafe { this.part(function, ith, nth) }, "{ith}, {nth}: {}", this.words()));
            }
        });
        let same = |a: &Floats, b: &Floats| a.0.iter().map(|x| x.to_bits()).eq(b.0.iter().map(|x| x.to_bits()));
        for (now, then) in [
            (&self.q, &before.q),
            (&self.k, &before.k),
            (&self.v, &before.v),
            (&self.g, &before.g),
            (&self.beta, &before.beta),
        ] {
            assert!(same(now, then), "an input was written to: {}", self.words());
        }
        assert!(self.in_place || same(&self.state, &before.state), "state_in was written to: {}", self.words());
        for output in [&self.out, &self.state, &self.state_out, &self.saved] {
            assert!(output.guards_hold(), "written outside an output: {}", self.words());
        }
    }

    /// The case as the oracle takes it.
    fn problem(&self) -> Problem {
        let [s, heads, tokens, sequences] = [self.head_dim, self.heads, self.tokens, self.sequences].map(|n| n as i64);
        let key_heads = heads / self.gqa as i64;
        // Axes (channel, head, token, sequence); strides in elements.
        let tensor = |floats: &Floats, ne: [i64; 4], strides: [i64; 4]| Tensor {
            data: floats.pointer().cast(),
            ne,
            nb: strides.map(|stride| 4 * stride as usize),
            dtype: Dtype::F32 as u32,
            reserved: 0,
        };
        let qk = |floats| tensor(floats, [s, key_heads, tokens, sequences], [1, s * tokens, s, s * tokens * key_heads]);
        let per_head = |floats| tensor(floats, [1, heads, tokens, sequences], [1, 1, heads, heads * tokens]);
        let state = |floats| tensor(floats, [s, s, heads, sequences], [1, s, s * s, s * s * heads]);
        let rows = [s, heads, tokens, sequences];
        let [v_token, v_head, v_sequence] = self.v_strides.map(|stride| stride as i64);
        let saved = if self.saves { self.tokens as u32 - 1 } else { 0 };
        let params = Params {
            head_map: if self.repeat == 0 { HeadMap::Grouped } else { HeadMap::Tiled } as u32,
            state_layout: StateLayout::ValueContiguous as u32,
            beta_kind: BetaKind::Logit as u32,
            q: qk(&self.q),
            k: qk(&self.k),
            v: tensor(&self.v, rows, [1, v_head, v_token, v_sequence]),
            g: per_head(&self.g),
            beta: per_head(&self.beta),
            state_in: state(&self.state),
            out: tensor(&self.out, rows, [1, s, s * heads, s * heads * tokens]),
            state_out: state(self.final_state()),
            snapshots: state(&self.saved),
            snapshot_stride: 4 * self.step_stride,
            snapshot_slots: saved,
            n_snapshots: saved,
            snapshot_order: SnapshotOrder::OldestFirst as u32,
            snapshot_skip: 1,
            gate_max: 50.0,
            state_clamp: 1e6,
            ..Params::default()
        };
        // SAFETY: there are no index tensors.
        unsafe { Problem::new(&params) }.unwrap_or_else(|error| panic!("{error}: {}", self.words()))
    }

    /// What the oracle expects of this case.
    fn expected(&self) -> Expected {
        // SAFETY: the case owns the memory that its problem describes.
        unsafe { reference::evaluate(&self.problem()) }
    }

    /// Runs a copy of the case and compares it with the oracle.
    fn judged(&self, name: &str, function: Function, nth: usize, expected: &Expected) -> Case {
        let mut run = self.clone();
        run.run(function, nth);
        // SAFETY: the case owns the memory that its problem describes, and all parts are done.
        let nmse = unsafe { reference::compare(&run.problem(), expected) };
        assert!(nmse.within(BOUND), "{name} and the oracle: {nmse:?}, {nth} threads, {}", self.words());
        run
    }

    /// Runs both functions, compares them with the oracle and with each other, and returns the engine's run.
    fn check(&self, theirs: Function, rng: &mut Rng) -> Case {
        let nth = 1 + rng.below(5);
        let expected = self.expected();
        let own = self.judged("deltanet", ours(), nth, &expected);
        let mut plain = self.clone();
        plain.saves &= matches!(theirs, Function::SavedSteps(_));
        let engine = plain.judged("ik_llama.cpp", theirs, nth, &expected);
        let agree = |what: &str, own: &[f32], engine: &[f32]| {
            let nmse = nmse(own, engine);
            assert!(nmse <= BOUND, "{what} of the two: {nmse:e}, {nth} threads, {}", self.words());
        };
        agree("out", own.out.values(), engine.out.values());
        agree("state", own.final_state().values(), engine.final_state().values());
        if engine.saves {
            agree("saved steps", own.saved.values(), engine.saved.values());
        } else if own.saves && self.tokens > 1 {
            // An engine that saves no steps has each of them as the final state of a shorter call.
            let step = rng.below(self.tokens - 1);
            let mut shorter = plain.first_tokens(step + 1);
            shorter.run(theirs, nth);
            let saved = &own.saved.values()[step * self.step_stride..][..self.state.values().len()];
            agree("a saved step", saved, shorter.final_state().values());
        }
        engine
    }

    /// The case without the tokens from `tokens` on, its outputs not yet written.
    fn first_tokens(&self, tokens: usize) -> Case {
        // `runs` runs of tokens, one after the other, of `row` floats a token.
        let shortened = |floats: &Floats, runs: usize, row: usize| {
            let (old, new) = (self.tokens * row, tokens * row);
            Floats::new(runs * new, |at| floats.values()[at / new * old + at % new])
        };
        let (s, key_heads) = (self.head_dim, self.heads / self.gqa);
        Case {
            tokens,
            q: shortened(&self.q, key_heads * self.sequences, s),
            k: shortened(&self.k, key_heads * self.sequences, s),
            g: shortened(&self.g, self.sequences, self.heads),
            beta: shortened(&self.beta, self.sequences, self.heads),
            out: Floats::new(s * self.heads * tokens * self.sequences, |_| f32::NAN),
            ..self.clone()
        }
    }
}

/// The squared difference over the engine's square; values that neither wrote (gaps, still NaN) do not count.
fn nmse(own: &[f32], engine: &[f32]) -> f64 {
    let (mut error, mut power) = (0.0, 0.0);
    for (a, b) in own.iter().zip(engine).filter(|(a, b)| !(a.is_nan() && b.is_nan())) {
        error += (f64::from(*a) - f64::from(*b)).powi(2);
        power += f64::from(*b).powi(2);
    }
    if error == 0.0 { 0.0 } else { error / power }
}

/// Calls `test` with the engine's function: the wheel's, and that of a newer build where DELTANET_IK_NEWER names one.
fn with_engines(test: impl Fn(Function)) {
    let open = |path: &Path| {
        // SAFETY: an engine's library, whose initialisers set tables up.
        let library = unsafe { libloading::Library::new(path) }.unwrap_or_else(|error| panic!("{path:?}: {error}"));
        // SAFETY: only the address is taken here.
        let address = unsafe { library.get::<*const ()>(b"iqk_fused_delta_net") }.map(|symbol| *symbol);
        // The engine's OpenMP runtime does not survive being unloaded.
        std::mem::forget(library);
        let address = address.unwrap_or_else(|error| panic!("{path:?}: {error}"));
        assert!(address != deltanet::iqk_fused_delta_net as *const (), "{path:?} has our function");
        address
    };
    if let Some(folder) = peers::ik() {
        let address = open(&folder.join("ik_llama_cpp/lib/libggml.so"));
        // SAFETY: the released wheel's function has this signature.
        test(Function::Plain(unsafe { std::mem::transmute::<*const (), Plain>(address) }));
    }
    if let Some(path) = std::env::var_os("DELTANET_IK_NEWER") {
        let address = open(Path::new(&path));
        // SAFETY: the variable is for builds from mid-May 2026 on.
        test(Function::SavedSteps(unsafe { std::mem::transmute::<*const (), SavedSteps>(address) }));
    }
}

#[test]
fn every_kind_of_call_agrees_with_the_engine() {
    with_engines(|theirs| {
        let mut rng = Rng(seed());
        for tokens in 1..=70 {
            for head_dim in [64, 128] {
                for repeat in [0, 1] {
                    let gqa = rng.pick(&[1, 2, 4]);
                    Case::draw(&mut rng, Kind::Usual, head_dim, repeat, gqa, tokens).check(theirs, &mut rng);
                }
            }
        }
        for tokens in [1, 2, 5, 64] {
            for gqa in [1, 2, 4] {
                for (head_dim, repeat) in [(64, 0), (64, 1), (128, 0), (128, 1), (128, 7)] {
                    Case::draw(&mut rng, Kind::Usual, head_dim, repeat, gqa, tokens).check(theirs, &mut rng);
                }
            }
        }
    });
}

#[test]
fn clamps_act_as_the_engines() {
    with_engines(|theirs| {
        let mut rng = Rng(seed());
        let mut clamped_cases = 0;
        for at in 0..60 {
            let kind = [Kind::LargeValues, Kind::LargeGates][at % 2];
            let (head_dim, tokens) = (rng.pick(&[64, 128]), 3 + rng.below(if at < 30 { 6 } else { 68 }));
            let (repeat, gqa) = (rng.pick(&[0, 1]), rng.pick(&[1, 2, 4]));
            let engine = Case::draw(&mut rng, kind, head_dim, repeat, gqa, tokens).check(theirs, &mut rng);
            let clamped = |floats: &Floats| floats.values().iter().any(|x| x.abs() == 1e6);
            clamped_cases += usize::from(clamped(engine.final_state()));
            if kind == Kind::LargeGates {
                // e^50 is 5e21: an output comes from the state before the clamp, and no gate past 50 goes further.
                let largest = engine.out.values().iter().fold(0.0, |most: f32, x| most.max(x.abs()));
                assert!((1e20..1e32).contains(&largest), "{largest:e}: {}", engine.words());
            }
        }
        // Large values reach the bound in nearly every draw, not in all.
        assert!(clamped_cases > 40, "a state was clamped in {clamped_cases} of 60 cases only");
    });
}

#[test]
fn without_an_engine_saved_steps_match_the_oracle() {
    let mut rng = Rng(seed());
    for tokens in (1..=12).chain([33, 70]) {
        for (head_dim, repeat) in [(64, 0), (128, 1)] {
            let mut case = Case::draw(&mut rng, Kind::Usual, head_dim, repeat, 2, tokens);
            case.saves = true;
            case.saved = Floats::new((tokens - 1) * case.step_stride, |_| f32::NAN);
            case.judged("deltanet", ours(), 1 + rng.below(5), &case.expected());
        }
    }
}

#[test]
fn what_the_engine_refuses_is_refused() {
    // This program has no other definition of the function, so what would go on to the engine's comes back as false.
    let mut rng = Rng(seed());
    let mut valid = Case::draw(&mut rng, Kind::Usual, 64, 0, 2, 3);
    (valid.in_place, valid.saves) = (false, true);
    valid.saved = Floats::new(2 * valid.step_stride, |_| f32::NAN);
    let served = |change: &dyn Fn(&mut Case), nth| {
        let mut case = valid.clone();
        change(&mut case);
        // SAFETY: the arguments are the case's own, or refused before any memory is touched.
        let served = unsafe { case.part(ours(), 0, nth) };
        let untouched = [&case.out, &case.state_out, &case.saved].map(|f| f.values().iter().all(|x| x.is_nan()));
        assert_eq!(untouched, [!served; 3]);
        served
    };
    assert!(served(&|_| (), 1));
    assert!(!served(&|case| case.head_dim = 96, 1));
    assert!(!served(&|case| case.head_dim = 0, 1));
    assert!(!served(&|case| case.gqa = 0, 1));
    assert!(!served(&|case| case.gqa = case.heads + 1, 1));
    assert!(!served(&|case| case.heads = 0, 1));
    assert!(!served(&|case| case.v_strides[0] = usize::MAX, 1));
    assert!(!served(&|case| case.step_stride = case.state.values().len() - 1, 1), "steps that overlap");
    assert!(!served(&|_| (), 0));
    assert!(!served(&|_| (), 5000));
}
