//! Pools of threads of our own, kept between calls, and how many threads a call gets.
//!
//! A process may fork at any moment, also while another of its threads is in here. Only that thread's copy of the
//! memory goes on then: locks stay as they were, and the pools' threads are gone. So everything hangs on one pointer
//! with the process' number behind it, and a child leaves its parent's pools where they are and starts with none.

use crate::error::{Error, Result, Status};
use crate::spare::spare;
use std::sync::atomic::{AtomicPtr, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// Thread counts that a process uses at a time; a host that tries many must not pile up idle threads.
const KEPT: usize = 4;

/// What one process has of pools. Never freed: another thread may be about to look.
struct Pools {
    process: u32,
    /// CPUs in the affinity mask that was looked at last (upper half), and how many threads that means under the limits
    /// of the control group. Finding the limits reads files, so that it is done again only for another mask.
    processors: AtomicU64,
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
                processors: AtomicU64::new(0),
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
    // SAFETY: an all-zero cpu_set_t is an empty set; the kernel writes at most its size.
    let mask = unsafe {
        let mut mask: libc::cpu_set_t = std::mem::zeroed();
        let got = libc::sched_getaffinity(0, size_of::<libc::cpu_set_t>(), &mut mask);
        if got == 0 { libc::CPU_COUNT(&mask) as u32 } else { u32::MAX }
    };
    let seen = &Pools::get().processors;
    let known = seen.load(Ordering::Relaxed);
    if (known >> 32) as u32 == mask {
        return (known as u32) as usize;
    }
    let processors = std::thread::available_parallelism().map_or(1, usize::from).min(super::MAX_THREADS);
    seen.store(u64::from(mask) << 32 | processors as u64, Ordering::Relaxed);
    processors
}

/// What the memory is for that is set aside first.
const STARTING: &str = "starting threads";

/// A pool of that many threads, from the few used last.
pub fn pool(threads: usize) -> Result<Arc<rayon::ThreadPool>> {
    spare((16 << 10) + threads * (1 << 10), STARTING)?;
    let mut kept = Pools::get().kept.lock().unwrap_or_else(PoisonError::into_inner);
    let pool = match kept.iter().position(|pool| pool.current_num_threads() == threads) {
        Some(at) => kept.remove(at),
        None => {
            spare((64 << 10) + threads * (8 << 10), STARTING)?;
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
