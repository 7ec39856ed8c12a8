//! ik_llama.cpp's fused operator as a peer, on our threads.

use super::case::{Case, Floats};
use super::team::Team;
use anyhow::{Context, Result};
use libloading::os::unix::{Library, RTLD_LOCAL, RTLD_NOW};
use std::ffi::c_int;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

/// The arguments up to `state_out`, then `rest`.
macro_rules! signature {
    ($($rest:ty),*) => {
        unsafe extern "C" fn(
            c_int, c_int, c_int, c_int, c_int, c_int, usize, usize, usize,
            *const f32, *const f32, *const f32, *const f32, *const f32, *const f32, *mut f32, *mut f32, $($rest),*
        ) -> bool
    };
}

/// With `saved_steps` and their stride before `ith` and `nth`.
type Saving = signature!(*mut f32, c_int, c_int, c_int);
/// As in earlier releases.
type Plain = signature!(c_int, c_int);

#[derive(Clone, Copy)]
enum Function {
    Saving(Saving),
    Plain(Plain),
}

/// The arguments that both have.
#[derive(Clone, Copy)]
struct Arguments {
    /// head_dim, n_heads, gqa_ratio, repeat_type, n_tokens, n_seqs
    counts: [c_int; 6],
    /// v's strides along tokens, heads and sequences
    strides: [usize; 3],
    /// q, k, v, g, beta, state_in
    inputs: [*const f32; 6],
    out: *mut f32,
    state_out: *mut f32,
}

// SAFETY: plain data; each thread writes to its own part of what the pointers point to.
unsafe impl Sync for Arguments {}

impl Function {
    /// # Safety
    /// The arguments describe live tensors, as large as the numbers say.
    unsafe fn call(self, arguments: &Arguments, ith: usize, nth: usize) -> bool {
        let Arguments { counts: [s, h, r, m, t, b], strides: [x, y, z], inputs: [q, k, v, g, l, i], out, state_out } =
            *arguments;
        let (ith, nth) = (ith as c_int, nth as c_int);
        // SAFETY: passed on.
        unsafe {
            match self {
                Function::Plain(call) => call(s, h, r, m, t, b, x, y, z, q, k, v, g, l, i, out, state_out, ith, nth),
                Function::Saving(call) => {
                    let none = std::ptr::null_mut();
                    call(s, h, r, m, t, b, x, y, z, q, k, v, g, l, i, out, state_out, none, 0, ith, nth)
                }
            }
        }
    }

    /// Which of the two a function is: told to do part 0 of 2 by the plain signature, and part 0 of 1 (with no steps to
    /// save) by the other, a plain one leaves the second of two heads alone.
    ///
    /// # Safety
    /// It is one of the two.
    unsafe fn probe(function: Saving) -> Function {
        const S: usize = 64;
        let (row, states) = ([0.0f32; 2 * S], vec![0.0f32; 2 * S * S]);
        let (mut out, mut state_out) = ([f32::NAN; 2 * S], states.clone());
        let [q, k, v, g, beta] = [row.as_ptr(); 5];
        let (out_at, states_at) = (out.as_mut_ptr(), state_out.as_mut_ptr());
        let none = std::ptr::null_mut();
        // SAFETY: two heads of one token, zeros; either signature reads no more arguments than there are.
        unsafe {
            function(
                64,
                2,
                1,
                1,
                1,
                1,
                2 * S,
                S,
                2 * S,
                q,
                k,
                v,
                g,
                beta,
                states.as_ptr(),
                out_at,
                states_at,
                none,
                2,
                0,
                1,
            );
            match out[S].is_nan() {
                true => Function::Plain(std::mem::transmute::<Saving, Plain>(function)),
                false => Function::Saving(function),
            }
        }
    }
}

/// The engine's library, and the function in it.
pub struct Ik {
    function: Function,
    _library: Library,
}

/// The case's tensors as the engine lays them out.
pub struct Call<'a> {
    ik: &'a Ik,
    q: Floats,
    k: Floats,
    logits: Floats,
    state: Floats,
    out: Floats,
}

impl Ik {
    pub fn load(path: &Path) -> Result<Ik> {
        // SAFETY: loading runs the library's initialisers, which is what the user asks for by naming it; the signature
        // is one of the two that the engine has declared.
        unsafe {
            let library = Library::open(Some(path), RTLD_NOW | RTLD_LOCAL)
                .with_context(|| format!("{} does not load", path.display()))?;
            let function = *library.get::<Saving>(b"iqk_fused_delta_net")?;
            Ok(Ik { function: Function::probe(function), _library: library })
        }
    }

    /// The call for a case with a scalar gate.
    pub fn call(&self, case: &Case) -> Call<'_> {
        let shape = &case.shape;
        let (s, heads, tokens) = (shape.head_size, shape.key_heads, shape.tokens);
        // [sequence][head][token] from our [sequence][token][head]
        let swap = |from: &[f32]| {
            Floats::new((0..from.len()).map(|at| {
                let (channel, row) = (at % s, at / s);
                let (token, head, sequence) = (row % tokens, row / tokens % heads, row / tokens / heads);
                from[((sequence * tokens + token) * heads + head) * s + channel]
            }))
        };
        Call {
            ik: self,
            q: swap(&case.q),
            k: swap(&case.k),
            logits: Floats::new(case.beta.iter().map(|beta| (beta / (1.0 - beta)).ln())),
            state: Floats::filled(case.state.len(), 0.0),
            out: Floats::filled(case.out.len(), 0.0),
        }
    }
}

impl Call<'_> {
    /// One run; in place, the state goes on from the last run's.
    pub fn run(&mut self, case: &Case, in_place: bool, team: &Team) -> Result<()> {
        let shape = case.shape;
        let [s, hv, hk, t, b] =
            [shape.head_size, shape.value_heads, shape.key_heads, shape.tokens, shape.sequences].map(|n| n as c_int);
        let token = shape.head_size * shape.value_heads;
        let state_in = if in_place { self.state.as_ptr() } else { case.state.as_ptr() };
        let arguments = Arguments {
            // Repeat type 1: tiled heads, as in our case.
            counts: [s, hv, hv / hk, 1, t, b],
            strides: [token, shape.head_size, token * shape.tokens],
            inputs: [
                self.q.as_ptr(),
                self.k.as_ptr(),
                case.v.as_ptr(),
                case.g.as_ptr(),
                self.logits.as_ptr(),
                state_in,
            ],
            out: self.out.as_mut_ptr(),
            state_out: self.state.as_mut_ptr(),
        };
        let (function, done) = (self.ik.function, AtomicBool::new(true));
        let arguments = &arguments;
        team.run(&|ith, nth| {
            // SAFETY: all tensors are as large as the engine expects for these numbers, and stay until all parts end.
            let served = unsafe { function.call(arguments, ith, nth) };
            done.fetch_and(served, Relaxed);
        });
        anyhow::ensure!(done.load(Relaxed), "ik_llama.cpp's function does not serve this shape");
        Ok(())
    }
}
