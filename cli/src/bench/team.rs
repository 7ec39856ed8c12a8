//! Threads that wait for work in a spin, as an engine's do: waking sleepers would take longer than a token.

use std::sync::atomic::{AtomicUsize, Ordering::*};

/// What a part of the work gets: its number and the count.
pub type Part<'a> = &'a (dyn Fn(usize, usize) + Sync);

/// A caller with helpers.
pub struct Team {
    parts: usize,
    state: &'static State,
}

/// Shared with the helpers, which are never joined: it lives as long as the process.
struct State {
    /// Counts rounds of work; the last one ends the helpers.
    round: AtomicUsize,
    running: AtomicUsize,
    work: std::sync::Mutex<Option<Part<'static>>>,
}

const END: usize = usize::MAX;

impl Team {
    /// A team of `parts` threads, the caller among them.
    pub fn new(parts: usize) -> Team {
        let state: &State = Box::leak(Box::new(State {
            round: AtomicUsize::new(0),
            running: AtomicUsize::new(0),
            work: std::sync::Mutex::new(None),
        }));
        for ith in 1..parts {
            std::thread::spawn(move || {
                let mut seen = 0;
                loop {
                    let round = state.round.load(Acquire);
                    if round == END {
                        return;
                    }
                    if round == seen {
                        std::hint::spin_loop();
                        continue;
                    }
                    seen = round;
                    let work = *state.work.lock().expect("nobody panics with the lock");
                    if let Some(work) = work {
                        work(ith, parts);
                    }
                    state.running.fetch_sub(1, AcqRel);
                }
            });
        }
        Team { parts, state }
    }

    /// Runs all parts, the caller's too, and returns when all are done.
    pub fn run(&self, work: Part) {
        if self.parts == 1 {
            return work(0, 1);
        }
        // SAFETY: only the lifetime changes; no helper uses the reference after `running` is back at zero, which this
        // function waits for.
        let work: Part<'static> = unsafe { std::mem::transmute(work) };
        *self.state.work.lock().expect("nobody panics with the lock") = Some(work);
        self.state.running.store(self.parts - 1, Relaxed);
        self.state.round.fetch_add(1, Release);
        work(0, self.parts);
        while self.state.running.load(Acquire) > 0 {
            std::hint::spin_loop();
        }
    }
}

impl Drop for Team {
    fn drop(&mut self) {
        self.state.round.store(END, Release);
    }
}
