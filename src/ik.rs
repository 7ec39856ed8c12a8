//! ik_llama.cpp's fused delta net (GGML_OP_DELTA_NET), under the name that the engine calls.
//!
//! The engine calls [`iqk_fused_delta_net`] on every thread of its own pool, as part `ith` of `nth`. Here the arguments
//! become a [`Params`] and take the way of every other call; nothing else happens between the engine and the kernel.

use crate::capi::guard;
use crate::cpu::{self, Isa};
use crate::error::{Result, Status, ensure};
use crate::log;
use crate::params::{BetaKind, HeadMap, Params, SnapshotOrder, StateLayout};
use crate::plan::Plan;
use crate::problem::Problem;
use crate::tensor::{Dtype, Tensor};
use std::cell::RefCell;
use std::ffi::{c_int, c_void};
use std::mem::MaybeUninit;
use std::sync::{Mutex, PoisonError};

/// The engine's own bounds: on the gate before exp, and on the state after each token.
const GATE_MAX: f32 = 50.0;
const STATE_CLAMP: f32 = 1e6;

/// Part `ith` of `nth` of the fused delta net of ik_llama.cpp, in place of the engine's function of this name and
/// signature. Runs on the calling thread alone; all parts together are the whole, in any order.
///
/// q and k are `[head_dim, n_tokens, n_heads / gqa_ratio, n_seqs]`, v has strides in elements along tokens, heads and
/// sequences, g (log-decay) and beta (logits) are `[n_heads, n_tokens, n_seqs]`, states `[v][k]` with v innermost, out
/// `[head_dim, n_heads, n_tokens, n_seqs]`. `repeat_type` 0 maps heads grouped, any other tiled. `state_out` may be
/// `state_in`. `saved_steps`, null or one state of all heads every `state_step_stride` elements, gets the states after
/// all tokens but the last.
///
/// Head sizes other than the engine's two, 64 and 128, and arguments that break a rule go to the next definition of the
/// function in the process, the engine's own; false where there is none. Every part decides that alike.
///
/// # Safety
/// As the engine calls it: tensors as large as described, inputs not written to and outputs not touched by others
/// until all parts have returned.
// Not in deltanet.h: the engine declares it, and its name is not ours.
/// cbindgen:ignore
#[unsafe(no_mangle)]
#[allow(clippy::too_many_arguments, reason = "the engine's signature")]
pub unsafe extern "C" fn iqk_fused_delta_net(
    head_dim: c_int,
    n_heads: c_int,
    gqa_ratio: c_int,
    repeat_type: c_int,
    n_tokens: c_int,
    n_seqs: c_int,
    vnb1: usize,
    vnb2: usize,
    vnb3: usize,
    q: *const f32,
    k: *const f32,
    v: *const f32,
    g: *const f32,
    beta: *const f32,
    state_in: *const f32,
    out: *mut f32,
    state_out: *mut f32,
    saved_steps: *mut f32,
    state_step_stride: c_int,
    ith: c_int,
    nth: c_int,
) -> bool {
    let status = guard(|| {
        ensure!(
            head_dim == 64 || head_dim == 128,
            Unsupported,
            "head_dim is {head_dim}; ik_llama.cpp fuses 64 and 128 alone, and lays g and beta out otherwise for others"
        );
        ensure!(
            gqa_ratio > 0 && n_heads % gqa_ratio == 0,
            Shape,
            "gqa_ratio is {gqa_ratio}; it must be positive and divide n_heads, {n_heads}"
        );
        let [s, heads, tokens, sequences] = [head_dim, n_heads, n_tokens, n_seqs].map(i64::from);
        let key_heads = heads / i64::from(gqa_ratio);
        let tensor = |data: *const f32, ne| Tensor::dense(data.cast_mut().cast(), Dtype::F32, ne);
        let qk = |data| {
            let mut tensor = tensor(data, [s, tokens, key_heads, sequences]);
            tensor.ne.swap(1, 2);
            tensor.nb.swap(1, 2);
            tensor
        };
        let per_head = |data| tensor(data, [1, heads, tokens, sequences]);
        let state = |data| tensor(data, [s, s, heads, sequences]);
        let rows = [s, heads, tokens, sequences];
        let values = Tensor { nb: [1, vnb2, vnb1, vnb3].map(bytes), ..tensor(v, rows) };
        // Every state but the last, oldest first: the last one is state_out.
        let saved = if saved_steps.is_null() { 0 } else { u32::try_from(n_tokens).unwrap_or(0).saturating_sub(1) };
        let params = Params {
            head_map: if repeat_type == 0 { HeadMap::Grouped } else { HeadMap::Tiled } as u32,
            state_layout: StateLayout::ValueContiguous as u32,
            beta_kind: BetaKind::Logit as u32,
            q: qk(q),
            k: qk(k),
            v: values,
            g: per_head(g),
            beta: per_head(beta),
            state_in: state(state_in),
            out: tensor(out, rows),
            state_out: state(state_out),
            snapshots: if saved > 0 { state(saved_steps) } else { Tensor::default() },
            snapshot_stride: if saved > 1 { bytes(state_step_stride.try_into().unwrap_or(usize::MAX)) } else { 0 },
            snapshot_slots: saved,
            n_snapshots: saved,
            snapshot_order: SnapshotOrder::OldestFirst as u32,
            snapshot_skip: 1,
            gate_max: GATE_MAX,
            state_clamp: STATE_CLAMP,
            ..Params::default()
        };
        // SAFETY: passed on; there are no index tensors.
        unsafe { run(&params, ith, nth) }
            .inspect_err(|error| report(ith, || format!("goes to the engine's own function: {error}")))
    });
    if status == Status::Ok {
        return true;
    }
    // SAFETY: the next definition has the same contract.
    next().is_some_and(|next| unsafe {
        next(
            head_dim,
            n_heads,
            gqa_ratio,
            repeat_type,
            n_tokens,
            n_seqs,
            vnb1,
            vnb2,
            vnb3,
            q,
            k,
            v,
            g,
            beta,
            state_in,
            out,
            state_out,
            saved_steps,
            state_step_stride,
            ith,
            nth,
        )
    })
}

/// Bytes of that many f32; what no memory can hold stays so, for the validator to refuse.
fn bytes(elements: usize) -> usize {
    elements.saturating_mul(size_of::<f32>())
}

/// # Safety
/// As for [`iqk_fused_delta_net`].
unsafe fn run(params: &Params, ith: c_int, nth: c_int) -> Result<()> {
    // SAFETY: there are no index tensors.
    let problem = unsafe { Problem::new(params)? };
    let plan = Plan::new(&problem, Isa::in_force()?)?;
    let part = |n: c_int| usize::try_from(n).unwrap_or(usize::MAX);
    with_scratch(plan.scratch_size(), |scratch| {
        // SAFETY: passed on; the scratch is this part's for the time of the call.
        unsafe { cpu::run_part(&problem, &plan, part(ith), part(nth), scratch) }
    })?;
    report(ith, || {
        format!(
            "runs here: head size {}, heads {}/{} {:?}, {} tokens, {} sequences, {}, {} saved steps; {plan}",
            problem.head_size(),
            problem.key_heads(),
            problem.value_heads(),
            problem.head_map(),
            problem.tokens(),
            problem.sequences(),
            if problem.one_pool() { "in place" } else { "to another state" },
            params.n_snapshots
        )
    });
    Ok(())
}

/// Tells what becomes of a kind of call, from its first part.
fn report(ith: c_int, words: impl FnOnce() -> String) {
    if ith == 0 && log::verbose() {
        log::once(format!("iqk_fused_delta_net {}", words()));
    }
}

/// What a part gets where its thread cannot have memory of its own. It bounds the scratch of calls that run here.
const LAST_RESORT: usize = 1 << 20;

/// Runs a part with scratch. The engine hands none over, and its threads come back for every layer: so each keeps a
/// buffer, which grows once and is not allocated again. A part that failed for want of memory could not be passed on,
/// because the engine's function splits the work otherwise; such parts take turns with one static buffer instead.
fn with_scratch(size: usize, run: impl Fn(&mut [MaybeUninit<u8>]) -> Result<()>) -> Result<()> {
    thread_local! {
        static OWN: RefCell<Vec<MaybeUninit<u8>>> = const { RefCell::new(Vec::new()) };
    }
    static SHARED: Mutex<[MaybeUninit<u8>; LAST_RESORT]> = Mutex::new([MaybeUninit::uninit(); LAST_RESORT]);
    ensure!(size <= LAST_RESORT, Unsupported, "the kernel wants {size} bytes of scratch; here it gets {LAST_RESORT}");
    // A thread that is on its way out may have lost its buffer already.
    let own = OWN.try_with(|own| {
        let mut own = own.borrow_mut();
        grow(&mut own, size).then(|| run(&mut own[..size]))
    });
    match own {
        Ok(Some(result)) => result,
        _ => run(&mut SHARED.lock().unwrap_or_else(PoisonError::into_inner)[..size]),
    }
}

/// Makes `memory` at least `size` long; false where there is not that much.
fn grow(memory: &mut Vec<MaybeUninit<u8>>, size: usize) -> bool {
    let missing = size.saturating_sub(memory.len());
    if memory.try_reserve_exact(missing).is_err() {
        return false;
    }
    // SAFETY: reserved just now, or longer before; uninitialised bytes are valid MaybeUninit.
    unsafe { memory.set_len(memory.len().max(size)) };
    true
}

/// The definition of the function that a call would have reached without this library.
fn next() -> Option<Function> {
    // SAFETY: a C string; the dynamic linker looks through the objects after the one that has this code.
    let address = unsafe { libc::dlsym(libc::RTLD_NEXT, c"iqk_fused_delta_net".as_ptr()) };
    // SAFETY: null is None; anything else is the engine's function, of this signature.
    unsafe { std::mem::transmute::<*mut c_void, Option<Function>>(address) }
}

type Function = unsafe extern "C" fn(
    c_int,
    c_int,
    c_int,
    c_int,
    c_int,
    c_int,
    usize,
    usize,
    usize,
    *const f32,
    *const f32,
    *const f32,
    *const f32,
    *const f32,
    *const f32,
    *mut f32,
    *mut f32,
    *mut f32,
    c_int,
    c_int,
    c_int,
) -> bool;

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;
    use std::sync::mpsc;

    #[test]
    fn scratch_grows_once_and_has_a_last_resort() {
        let address = |size| {
            let found = Cell::new(0);
            let result = with_scratch(size, |scratch| {
                assert_eq!(scratch.len(), size);
                found.set(scratch.as_ptr() as usize);
                Ok(())
            });
            result.map(|()| found.get()).expect("there is scratch")
        };
        let first = address(5000);
        assert_eq!([address(100), address(5000)], [first; 2], "a buffer that is large enough stays");
        assert!(with_scratch(LAST_RESORT + 1, |_| Ok(())).is_err());
        assert!(!grow(&mut Vec::new(), isize::MAX as usize));

        // Destructors of other thread-local values may run after the buffer's own.
        struct Late(mpsc::Sender<usize>);
        impl Drop for Late {
            fn drop(&mut self) {
                let _ = with_scratch(7777, |scratch| {
                    let _ = self.0.send(scratch.len());
                    Ok(())
                });
            }
        }
        thread_local! { static LATE: RefCell<Vec<Late>> = const { RefCell::new(Vec::new()) }; }
        for buffer_first in [true, false] {
            let (sender, receiver) = mpsc::channel();
            let thread = std::thread::spawn(move || {
                let use_buffer = || with_scratch(64, |_| Ok(())).is_ok();
                let early = buffer_first && use_buffer();
                LATE.with(|late| late.borrow_mut().push(Late(sender)));
                early || use_buffer()
            });
            assert!(thread.join().expect("the thread ends well"));
            assert_eq!(receiver.recv(), Ok(7777));
        }
    }
}
