//! Pools of threads of our own, kept between calls, and how many threads a call gets.
//!
//! A process may fork at any moment, also while another of its threads is in here. Only that thread's copy of the
//! memory goes on then: locks stay as they were, and the pools' threads are gone. So everything hangs on one pointer
//! with the process' number behind it, and a child leaves its parent's pools where they are and starts with none.

use crate::error::{Error, Result, Status};
use std::sync::atomic::{AtomicPtr, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// Thread counts that a process uses at a time; a host that tries many must not pile up idle threads.
const KEPT: usize = 4;

/// What one process has of pools. Never freed: another thread may be about to look.
struct Pools {
    process: u32,
    /// CPUs that the process may use at most, control groups included. Finding out reads files, so it is done once.
    processors: usize,
    /// Used last comes first.
    kept: Mutex<Vec<Arc<rayon::ThreadPool>>>,
}

impl Pools {
    /// Those of this process.
    fn get() -> &'static Pools {
        static CURRENT: AtomicPtr<Pools> = AtomicPtr::new(std::ptr::null_mut());
        let process = std::process::id();
        let mut current = CURRENT.load(Ordering::Acquire);
        loop {
            // SAFETY: null, or a box that was published whole and is never freed.
            if let Some(pools) = unsafe { current.as_ref() }
                && pools.process == process
            {
                return pools;
            }
            let fresh = Box::into_raw(Box::new(Pools {
                process,
                processors: std::thread::available_parallelism().map_or(1, usize::from),
                kept: Mutex::new(Vec::with_capacity(KEPT + 1)),
            }));
            match CURRENT.compare_exchange(current, fresh, Ordering::AcqRel, Ordering::Acquire) {
                // SAFETY: it was just made, and from now on nobody frees it.
                Ok(_) => return unsafe { &*fresh },
                Err(other) => {
                    // SAFETY: it was just made and nobody else saw it.
                    drop(unsafe { Box::from_raw(fresh) });
                    current = other;
                }
            }
        }
    }
}

/// CPUs that the calling thread may use: its affinity mask, and the limits of the process' control group.
pub fn processors() -> usize {
    let most = Pools::get().processors;
    // SAFETY: an all-zero cpu_set_t is an empty set; the kernel writes at most its size.
    let mask = unsafe {
        let mut mask: libc::cpu_set_t = std::mem::zeroed();
        let got = libc::sched_getaffinity(0, size_of::<libc::cpu_set_t>(), &mut mask);
        (got == 0).then(|| libc::CPU_COUNT(&mask) as usize)
    };
    mask.unwrap_or(most).min(most).max(1)
}

/// A pool of that many threads, from the few used last.
pub fn pool(threads: usize) -> Result<Arc<rayon::ThreadPool>> {
    let mut kept = Pools::get().kept.lock().unwrap_or_else(PoisonError::into_inner);
    let pool = match kept.iter().position(|pool| pool.current_num_threads() == threads) {
        Some(at) => kept.remove(at),
        None => {
            let named = rayon::ThreadPoolBuilder::new().num_threads(threads).thread_name(|i| format!("deltanet-{i}"));
            Arc::new(named.build().map_err(|error| {
                let words = format_args!("a pool of {threads} threads could not be started: {error}");
                Error::compose(Status::OutOfMemory, words)
            })?)
        }
    };
    kept.insert(0, Arc::clone(&pool));
    kept.truncate(KEPT);
    Ok(pool)
}
