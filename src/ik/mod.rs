//! ik_llama.cpp's fused delta net (GGML_OP_DELTA_NET), under the name that the engine calls.
//!
//! ```text
//! engine's thread ith of nth ──> iqk_fused_delta_net ──> Arguments ──> Params ──> Problem ──> Plan ──> kernel
//!                                   │     └─ engine: how many arguments this engine's calls have
//!                                   └─ what is not served goes on to the engine's own function
//! ```
//!
//! The engine calls the function on every thread of its own pool. The parts of one call must all be ours or all the
//! engine's, because the two split the work in different ways: so everything that decides is the same in every part.

mod engine;
mod probe;
mod scratch;

use crate::capi::guard;
use crate::cpu::{self, Isa};
use crate::error::{Error, Result, Status, ensure};
use crate::log;
use crate::params::{BetaKind, HeadMap, Params, SnapshotOrder, StateLayout};
use crate::plan::Plan;
use crate::problem::Problem;
use crate::tensor::{Dtype, Tensor};
use engine::{Engine, Signature};
use std::arch::naked_asm;
use std::ffi::c_void;

/// The engine's own bounds: on the gate before exp, and on the state after each token.
const GATE_MAX: f32 = 50.0;
const STATE_CLAMP: f32 = 1e6;

/// Part `ith` of `nth` of ik_llama.cpp's fused delta net, in place of the engine's function of this name:
///
/// ```c
/// bool iqk_fused_delta_net(int head_dim, int n_heads, int gqa_ratio, int repeat_type, int n_tokens, int n_seqs,
///         size_t vnb1, size_t vnb2, size_t vnb3, const float * q, const float * k, const float * v, const float * g,
///         const float * beta, const float * state_in, float * out, float * state_out, float * saved_steps,
///         int state_step_stride, int ith, int nth);
/// ```
///
/// q and k are `[head_dim, n_tokens, n_heads / gqa_ratio, n_seqs]`; v has strides in elements along tokens, heads and
/// sequences; g (log-decay) and beta (logits) are `[n_heads, n_tokens, n_seqs]`, states `[v][k]` with v innermost, out
/// is `[head_dim, n_heads, n_tokens, n_seqs]`. `repeat_type` 0 maps heads grouped, any other tiled. `state_out` may be
/// `state_in`. `saved_steps`, null or a state of all heads every `state_step_stride` elements, gets the states after
/// all tokens but the last. Engines from before May 2026 have no `saved_steps` and `state_step_stride`: whose calls
/// those are is found out at the first one.
///
/// Runs on the calling thread alone, without a lock; a thread's first call allocates its scratch. What is not served
/// (head sizes that the engine does not fuse either, arguments that break a rule) goes on to the function of the
/// engine that called, and is false where that has none.
///
/// # Safety
/// As the engine calls it: tensors as large as described, inputs not written to and outputs not touched by others
/// until all parts have returned.
// It is not in deltanet.h: the engine declares it, and its name is not ours.
// It is a trampoline because the number of arguments is known only when the caller is: nothing past a caller's
// arguments may be read, and a call that is not served must reach the engine's function as it came.
/// cbindgen:ignore
#[unsafe(naked)]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn iqk_fused_delta_net() -> bool {
    naked_asm!(
        // The frame: return address and stack arguments above rbp, the six register arguments below it, in order.
        ".cfi_startproc",
        "push rbp",
        ".cfi_def_cfa_offset 16",
        ".cfi_offset rbp, -16",
        "mov rbp, rsp",
        ".cfi_def_cfa_register rbp",
        "push r9",
        "push r8",
        "push rcx",
        "push rdx",
        "push rsi",
        "push rdi",
        "mov rdi, rsp",
        "lea rsi, [rbp + 16]",
        "mov rdx, [rbp + 8]",
        "call {serve}",
        "pop rdi",
        "pop rsi",
        "pop rdx",
        "pop rcx",
        "pop r8",
        "pop r9",
        "pop rbp",
        ".cfi_def_cfa rsp, 8",
        ".cfi_restore rbp",
        "test rax, rax",
        "jz 2f",
        "jmp rax",
        "2:",
        "mov eax, 1",
        "ret",
        ".cfi_endproc",
        serve = sym serve,
    )
}

/// Serves the call with these arguments and answers null, or answers the function that it must go on to.
///
/// # Safety
/// The arguments are as [`iqk_fused_delta_net`]'s, `caller` is the address that it returns to.
unsafe extern "C" fn serve(registers: *const [usize; 6], stack: *const usize, caller: usize) -> *const c_void {
    let mut elsewhere = refuse as extern "C" fn() -> bool as *const c_void;
    let status = guard(|| {
        let found;
        let engine = match Engine::known(caller) {
            Some(engine) => engine,
            None => {
                found = Engine::find(caller);
                &found
            }
        };
        elsewhere = engine.own.unwrap_or(elsewhere);
        let Some(signature) = engine.signature else {
            // Its calls' arguments cannot be read, so not even which part this is.
            if log::verbose() {
                log::once(format!("iqk_fused_delta_net of {} is of no known version: left to it", engine.name));
            }
            return Err(Error::new(Status::Unsupported, "this engine's iqk_fused_delta_net is of no known version"));
        };
        // SAFETY: the caller has passed as many arguments as its engine's signature says.
        let call = unsafe { Arguments::read(registers, stack, signature) };
        let described = call.params().and_then(|params| {
            // SAFETY: passed on; there are no index tensors.
            let plan = unsafe { run(&params, call.ith, call.nth)? };
            Ok((params, plan))
        });
        report(&call, engine, &described);
        described.map(drop)
    });
    if status == Status::Ok { std::ptr::null() } else { elsewhere }
}

/// The end of a call that neither this library nor the engine serves.
extern "C" fn refuse() -> bool {
    false
}

/// A call's arguments, under the engine's names.
#[derive(Clone, Copy, Debug)]
struct Arguments {
    head_dim: i32,
    n_heads: i32,
    gqa_ratio: i32,
    repeat_type: i32,
    n_tokens: i32,
    n_seqs: i32,
    /// Elements of v from token to token, head to head, sequence to sequence.
    vnb: [usize; 3],
    q: *mut f32,
    k: *mut f32,
    v: *mut f32,
    g: *mut f32,
    beta: *mut f32,
    state_in: *mut f32,
    out: *mut f32,
    state_out: *mut f32,
    saved_steps: *mut f32,
    state_step_stride: i32,
    ith: i32,
    nth: i32,
}

impl Arguments {
    /// Reads the arguments from where the System V convention of x86-64 puts them.
    ///
    /// # Safety
    /// The caller has passed as many arguments as `signature` says, the first six of them in `registers`.
    unsafe fn read(registers: *const [usize; 6], stack: *const usize, signature: Signature) -> Arguments {
        let mut at = 0;
        let mut next = || {
            // SAFETY: no more words are taken below than the signature has arguments.
            let word = unsafe { if at < 6 { (*registers)[at] } else { stack.add(at - 6).read() } };
            at += 1;
            word
        };
        macro_rules! int {
            () => {
                next() as i32
            };
        }
        macro_rules! pointer {
            () => {
                next() as *mut f32
            };
        }
        let mut call = Arguments {
            head_dim: int!(),
            n_heads: int!(),
            gqa_ratio: int!(),
            repeat_type: int!(),
            n_tokens: int!(),
            n_seqs: int!(),
            vnb: [next(), next(), next()],
            q: pointer!(),
            k: pointer!(),
            v: pointer!(),
            g: pointer!(),
            beta: pointer!(),
            state_in: pointer!(),
            out: pointer!(),
            state_out: pointer!(),
            saved_steps: std::ptr::null_mut(),
            state_step_stride: 0,
            ith: 0,
            nth: 0,
        };
        if signature == Signature::SavedSteps {
            (call.saved_steps, call.state_step_stride) = (pointer!(), int!());
        }
        (call.ith, call.nth) = (int!(), int!());
        call
    }

    /// The call as every other one is described.
    fn params(&self) -> Result<Params> {
        let Arguments { head_dim, n_heads, gqa_ratio, n_tokens, .. } = *self;
        ensure!(
            head_dim == 64 || head_dim == 128,
            Unsupported,
            "head_dim is {head_dim}; the engine fuses 64 and 128, and lays g and beta out otherwise for the rest"
        );
        ensure!(
            gqa_ratio > 0 && n_heads % gqa_ratio == 0,
            Shape,
            "gqa_ratio is {gqa_ratio}; it must be positive and divide n_heads, {n_heads}"
        );
        let [s, heads, tokens, sequences] = [head_dim, n_heads, n_tokens, self.n_seqs].map(i64::from);
        let key_heads = heads / i64::from(gqa_ratio);
        let tensor = |data: *mut f32, ne| Tensor::dense(data.cast(), Dtype::F32, ne);
        let qk = |data| {
            let mut tensor = tensor(data, [s, tokens, key_heads, sequences]);
            tensor.ne.swap(1, 2);
            tensor.nb.swap(1, 2);
            tensor
        };
        let per_head = |data| tensor(data, [1, heads, tokens, sequences]);
        let state = |data| tensor(data, [s, s, heads, sequences]);
        let rows = [s, heads, tokens, sequences];
        // What no memory can hold stays so, for the validator to refuse.
        let bytes = |elements: usize| elements.saturating_mul(size_of::<f32>());
        let [token, head, sequence] = self.vnb;
        // Every state but the last, oldest first: the last one is state_out.
        let saves = !self.saved_steps.is_null() && n_tokens > 1;
        let saved = if saves { n_tokens as u32 - 1 } else { 0 };
        Ok(Params {
            head_map: if self.repeat_type == 0 { HeadMap::Grouped } else { HeadMap::Tiled } as u32,
            state_layout: StateLayout::ValueContiguous as u32,
            beta_kind: BetaKind::Logit as u32,
            q: qk(self.q),
            k: qk(self.k),
            v: Tensor { nb: [1, head, token, sequence].map(bytes), ..tensor(self.v, rows) },
            g: per_head(self.g),
            beta: per_head(self.beta),
            state_in: state(self.state_in),
            out: tensor(self.out, rows),
            state_out: state(self.state_out),
            snapshots: if saves { state(self.saved_steps) } else { Tensor::default() },
            snapshot_stride: bytes(usize::try_from(self.state_step_stride).unwrap_or(usize::MAX)),
            snapshot_slots: saved,
            n_snapshots: saved,
            snapshot_order: SnapshotOrder::OldestFirst as u32,
            snapshot_skip: 1,
            gate_max: GATE_MAX,
            state_clamp: STATE_CLAMP,
            ..Params::default()
        })
    }
}

/// # Safety
/// `params` has no index tensors; the rest as for [`iqk_fused_delta_net`].
unsafe fn run(params: &Params, ith: i32, nth: i32) -> Result<Plan> {
    // SAFETY: there are no index tensors.
    let problem = unsafe { Problem::new(params)? };
    let plan = Plan::new(&problem, Isa::in_force()?)?;
    let part = |n: i32| usize::try_from(n).unwrap_or(usize::MAX);
    scratch::with_scratch(plan.scratch_size(), |scratch| {
        // SAFETY: passed on; the scratch is this part's for the time of the call.
        unsafe { cpu::run_part(&problem, &plan, part(ith), part(nth), scratch) }
    })?;
    Ok(plan)
}

/// Tells what became of a kind of call, from its first part.
fn report(call: &Arguments, engine: &Engine, outcome: &Result<(Params, Plan)>) {
    if call.ith != 0 || !log::verbose() {
        return;
    }
    let Arguments { head_dim, n_heads, gqa_ratio, n_tokens, n_seqs, nth, .. } = call;
    let what = format!("iqk_fused_delta_net of {}", engine.name);
    log::once(match outcome {
        Ok((params, plan)) => format!(
            "{what} runs here: head size {head_dim}, {n_heads} heads (ratio {gqa_ratio}, repeat {}), {n_tokens} tokens, \
             {n_seqs} sequences, {}, {} saved steps, {nth} threads; {plan}",
            call.repeat_type,
            if call.state_in == call.state_out { "in place" } else { "state copied" },
            params.n_snapshots
        ),
        Err(error) => format!("{what} is left to it: {error}"),
    });
}
