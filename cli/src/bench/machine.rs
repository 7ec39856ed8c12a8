//! What the machine can do at best: fused multiply-adds and copies, measured in this process, on the same threads.

use super::team::Team;
use deltanet::cpu::Isa;
use std::time::Duration;

/// A running clock. For one thread it counts that thread's own time, so that other processes on the machine do not.
pub struct Clock {
    clock: libc::clockid_t,
    start: Duration,
}

impl Clock {
    pub fn start(threads: usize) -> Clock {
        let clock = if threads == 1 { libc::CLOCK_THREAD_CPUTIME_ID } else { libc::CLOCK_MONOTONIC };
        Clock { clock, start: now(clock) }
    }

    pub fn seconds(&self) -> f64 {
        (now(self.clock) - self.start).as_secs_f64()
    }
}

fn now(clock: libc::clockid_t) -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` is writable; these clocks always exist.
    unsafe { libc::clock_gettime(clock, &mut time) };
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

/// FMAs (two flops each) a second of all threads together, on the registers of an instruction set.
pub fn fma_per_second(isa: Isa, team: &Team, threads: usize) -> f64 {
    const TURNS: u64 = 400_000;
    let per_turn = match isa {
        Isa::Scalar => 12.0,
        Isa::Avx2 => 12.0 * 8.0,
        Isa::Avx512 => 12.0 * 16.0,
    };
    let clock = Clock::start(threads);
    team.run(&|_, _| turns(isa, TURNS));
    TURNS as f64 * per_turn * threads as f64 / clock.seconds()
}

/// `TURNS` of twelve independent FMAs; for one lane, of twelve multiplications and additions.
#[cfg(target_arch = "x86_64")]
fn turns(isa: Isa, turns: u64) {
    macro_rules! turns {
        ($($line:expr),+) => {
            // SAFETY: registers only; the vector registers are declared as overwritten; the CPU has the set.
            unsafe {
                std::arch::asm!("2:", $($line),+, "dec {n}", "jnz 2b", n = inout(reg) turns => _,
                    out("xmm0") _, options(nomem, nostack),
                    out("xmm1") _, out("xmm2") _, out("xmm3") _, out("xmm4") _, out("xmm5") _, out("xmm6") _,
                    out("xmm7") _, out("xmm8") _, out("xmm9") _, out("xmm10") _, out("xmm11") _, out("xmm12") _,
                    out("xmm13") _, out("xmm14") _, out("xmm15") _)
            }
        };
    }
    // Twelve registers, so that no instruction waits for the one before it.
    macro_rules! on_all {
        ($line:ident, $width:tt) => {
            turns!(
                $line!($width, "0"),
                $line!($width, "1"),
                $line!($width, "2"),
                $line!($width, "3"),
                $line!($width, "4"),
                $line!($width, "5"),
                $line!($width, "6"),
                $line!($width, "7"),
                $line!($width, "8"),
                $line!($width, "9"),
                $line!($width, "10"),
                $line!($width, "11")
            )
        };
    }
    macro_rules! fma {
        ($width:tt, $at:tt) => {
            concat!("vfmadd231ps ", $width, "mm", $at, ", ", $width, "mm14, ", $width, "mm15")
        };
    }
    macro_rules! multiply_add {
        ($width:tt, $at:tt) => {
            concat!("mulss ", $width, "mm", $at, ", xmm15\naddss ", $width, "mm", $at, ", xmm15")
        };
    }
    match isa {
        Isa::Scalar => on_all!(multiply_add, "x"),
        Isa::Avx2 => on_all!(fma, "y"),
        Isa::Avx512 => on_all!(fma, "z"),
    }
}

/// Twelve independent multiply-adds a turn, as the compiler has them.
#[cfg(not(target_arch = "x86_64"))]
fn turns(_: Isa, turns: u64) {
    let mut sums = [0.0f32; 12];
    for _ in 0..turns {
        sums.iter_mut().for_each(|sum| *sum = std::hint::black_box(*sum) * 0.5 + 1.0);
    }
    std::hint::black_box(sums);
}

/// Seconds to copy `from` to `to`, each thread a part.
pub fn copy(from: &[f32], to: &mut [f32], team: &Team, threads: usize) -> f64 {
    let (source, target, n) = (from.as_ptr() as usize, to.as_mut_ptr() as usize, from.len().min(to.len()));
    let clock = Clock::start(threads);
    team.run(&|ith, nth| {
        let (first, end) = (n * ith / nth, n * (ith + 1) / nth);
        // SAFETY: the parts are disjoint and inside both slices, which are borrowed until all parts are done.
        unsafe {
            std::ptr::copy_nonoverlapping(
                (source as *const f32).add(first),
                (target as *mut f32).add(first),
                end - first,
            )
        }
    });
    clock.seconds()
}

/// Seconds to read and write `memory` once, in place, each thread a part: every number times `factor`.
pub fn sweep(memory: &mut [f32], factor: f32, team: &Team, threads: usize) -> f64 {
    let (start, n) = (memory.as_mut_ptr() as usize, memory.len());
    let clock = Clock::start(threads);
    team.run(&|ith, nth| {
        let (first, end) = (n * ith / nth, n * (ith + 1) / nth);
        // SAFETY: the parts are disjoint and inside the slice, which is borrowed until all parts are done.
        let part = unsafe { std::slice::from_raw_parts_mut((start as *mut f32).add(first), end - first) };
        #[cfg(target_arch = "x86_64")]
        if is_x86_feature_detected!("avx2") {
            // SAFETY: the CPU has it.
            return unsafe { multiply_avx2(part, factor) };
        }
        multiply(part, factor);
    });
    clock.seconds()
}

#[inline(always)]
fn multiply(part: &mut [f32], factor: f32) {
    part.iter_mut().for_each(|x| *x *= factor);
}

/// The same in wider vectors, so that memory alone is in its way.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn multiply_avx2(part: &mut [f32], factor: f32) {
    multiply(part, factor);
}
