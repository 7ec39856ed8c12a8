//! Finding out which arguments an engine's function takes, by calling it.
//!
//! The call has one head, as part 0 of 1 under one reading of its arguments. Under the reading of every other version,
//! known or with an argument more, it is a part that has no head, and touches no memory: `ith` is then past the heads,
//! or half a pointer from addresses that make it so.

use super::engine::Signature;
use super::{Arguments, run};
use std::ffi::c_void;
use std::ptr::NonNull;

const S: usize = 64;
const TOKENS: usize = 2;

/// Any version of the function: integers and pointers take a whole register or stack slot each, and slots past a
/// version's arguments are not looked at.
#[rustfmt::skip]
type Any = unsafe extern "C" fn(
    usize, usize, usize, usize, usize, usize, usize, usize, usize, usize, usize, usize, usize, usize, usize, usize,
    usize, usize, usize, usize, usize, usize, usize, usize,
) -> bool;

/// How far a result may be from ours: two orders of operations in f32, far from another operator.
const NMSE: f64 = 1e-9;

/// Which arguments the function takes; none if it is not a known version, or computes something else than ours.
///
/// # Safety
/// `function` is the engine's `iqk_fused_delta_net`.
pub unsafe fn signature(function: *const c_void) -> Option<Signature> {
    let memory = Memory::new()?;
    // SAFETY: a function of the engine; which arguments it looks at is what the call is about.
    let function = unsafe { std::mem::transmute::<*const c_void, Any>(function) };
    [Signature::Plain, Signature::SavedSteps].into_iter().find(|signature| {
        let call = memory.call();
        let end = match signature {
            // Read with saved steps: none, stride 1, part 1 of 2.
            Signature::Plain => [0, 1, 1, 2, 2, 2, 2],
            // Read without: part «half a pointer» of «stride».
            Signature::SavedSteps => [call.saved_steps as usize, S * S, 0, 1, 2, 2, 2],
        };
        let int = |n: i32| n as usize;
        let address = |pointer: *mut f32| pointer as usize;
        // SAFETY: the memory is as large as the arguments say under the one reading in which it is touched.
        #[rustfmt::skip]
        unsafe {
            function(
                int(call.head_dim), int(call.n_heads), int(call.gqa_ratio), int(call.repeat_type), int(call.n_tokens),
                int(call.n_seqs), call.vnb[0], call.vnb[1], call.vnb[2], address(call.q), address(call.k),
                address(call.v), address(call.g), address(call.beta), address(call.state_in), address(call.out),
                address(call.state_out), end[0], end[1], end[2], end[3], end[4], end[5], end[6],
            )
        };
        memory.agrees(*signature)
    })
}

/// Memory for one call, at addresses whose low 32 bits are a positive int. The oldest versions take such a half for
/// `ith` and `nth`.
struct Memory {
    reserved: NonNull<c_void>,
    floats: NonNull<f32>,
}

/// Address space to find such addresses in, and where in it they start.
const RESERVED: usize = 2 << 32;
const LOW_HALF: usize = 1 << 28;

/// The places of the tensors in the memory, in floats.
const ROW: usize = TOKENS * S;
const STATE: usize = S * S;
const Q: usize = 0;
const K: usize = Q + ROW;
const V: usize = K + ROW;
const G: usize = V + ROW;
const BETA: usize = G + TOKENS;
const STATE_IN: usize = BETA + TOKENS;
const OUT: usize = STATE_IN + STATE;
/// Room for two: versions of early May 2026 saved their steps here.
const STATE_OUT: usize = OUT + ROW;
const SAVED: usize = STATE_OUT + 2 * STATE;
const FLOATS: usize = SAVED + STATE;

impl Memory {
    fn new() -> Option<Memory> {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a new mapping without access, which touches no other memory.
        let reserved = unsafe { libc::mmap(std::ptr::null_mut(), RESERVED, libc::PROT_NONE, flags, -1, 0) };
        if reserved == libc::MAP_FAILED {
            return None;
        }
        let ahead = (LOW_HALF as u32).wrapping_sub(reserved as usize as u32) as usize;
        let memory = Memory {
            reserved: NonNull::new(reserved)?,
            floats: NonNull::new(reserved.wrapping_byte_add(ahead).cast())?,
        };
        // SAFETY: page-aligned, because both addresses that it was made from are, and inside the mapping made above.
        let opened = unsafe {
            libc::mprotect(memory.floats.as_ptr().cast(), FLOATS * size_of::<f32>(), libc::PROT_READ | libc::PROT_WRITE)
        };
        (opened == 0).then_some(memory)
    }

    /// The arguments of part 0 of 1, with fresh inputs and NaN for outputs.
    fn call(&self) -> Arguments {
        let floats = self.floats.as_ptr();
        for at in 0..FLOATS {
            let wave = (at as f32 * 0.7).sin();
            let value = match at {
                Q..V => 0.15 * wave,
                G..BETA => -0.2 * wave.abs(),
                OUT.. => f32::NAN,
                _ => wave,
            };
            // SAFETY: inside the memory, which is writable and which nobody else has.
            unsafe { floats.add(at).write(value) };
        }
        let at = |offset: usize| floats.wrapping_add(offset);
        Arguments {
            head_dim: S as i32,
            n_heads: 1,
            gqa_ratio: 1,
            // The oldest version reads the number of sequences here.
            repeat_type: 0,
            n_tokens: TOKENS as i32,
            n_seqs: 1,
            vnb: [S, S, ROW],
            q: at(Q),
            k: at(K),
            v: at(V),
            g: at(G),
            beta: at(BETA),
            state_in: at(STATE_IN),
            out: at(OUT),
            state_out: at(STATE_OUT),
            saved_steps: at(SAVED),
            state_step_stride: STATE as i32,
            ith: 0,
            nth: 1,
        }
    }

    /// Whether the engine's function has served [`Memory::call`] under this signature, with the result that we have.
    fn agrees(&self, signature: Signature) -> bool {
        // SAFETY: readable, and the engine's call is over.
        let theirs = unsafe { std::slice::from_raw_parts(self.floats.as_ptr(), FLOATS) }.to_vec();
        let saves = signature == Signature::SavedSteps;
        let mut call = self.call();
        if !saves {
            call.saved_steps = std::ptr::null_mut();
        }
        // SAFETY: the call's own memory, which nobody else has.
        if call.params().and_then(|params| unsafe { run(&params, call.ith, call.nth) }).is_err() {
            return false;
        }
        // SAFETY: as above, and our call is over.
        let ours = unsafe { std::slice::from_raw_parts(self.floats.as_ptr(), FLOATS) };
        let agree = |from: usize, len: usize| {
            let (mut error, mut power) = (0.0, 0.0);
            for (a, b) in ours[from..][..len].iter().zip(&theirs[from..][..len]) {
                error += (f64::from(*a) - f64::from(*b)).powi(2);
                power += f64::from(*a).powi(2);
            }
            // What was not written is NaN, and a NaN agrees with nothing.
            error <= NMSE * power
        };
        agree(OUT, ROW) && agree(STATE_OUT, STATE) && (!saves || agree(SAVED, STATE))
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: mapped by `new` with this size, and unmapped once.
        unsafe { libc::munmap(self.reserved.as_ptr(), RESERVED) };
    }
}
