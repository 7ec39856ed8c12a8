//! Pools of threads of our own, kept between calls, and how many threads a call gets.
//!
//! Want of memory or threads is a status here, never the end of the process: memory is asked for in ways that can say
//! no, threads are the C library's, and a call on a pool that is there allocates nothing. (Thread pools and threads of
//! Rust's ecosystem allocate in small pieces, and abort when that fails.)
//!
//! A process may fork at any moment, also while another of its threads is in here. Only that thread's copy of the
//! memory goes on then: locks stay as they were, and the pools' threads are gone. So everything hangs on one pointer
//! with the process' number behind it, and a child leaves its parent's pools where they are and starts with none.

use super::processors;
use crate::error::{Error, Result, Status, ensure};
use std::alloc::Layout;
use std::cell::UnsafeCell;
use std::ffi::c_void;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU32, AtomicU64, AtomicUsize, Ordering, fence};
use std::sync::{Mutex, PoisonError};

/// Thread counts that a process uses at a time; a host that tries many must not pile up idle threads.
const KEPT: usize = 4;

/// What one process has of pools. Never freed: another thread may be about to look.
struct Pools {
    process: u32,
    /// CPUs in the affinity mask that was looked at last (upper half), and how many threads that means under the limits
    /// of the control group. Finding the limits reads files, so that it is done again only for another mask.
    processors: AtomicU64,
    /// Used last comes first.
    kept: Mutex<[Option<Handle>; KEPT]>,
}

impl Pools {
    /// Those of this process.
    fn get() -> Result<&'static Pools> {
        static CURRENT: AtomicPtr<Pools> = AtomicPtr::new(std::ptr::null_mut());
        let process = std::process::id();
        let mut current = CURRENT.load(Ordering::Acquire);
        loop {
            // SAFETY: null, or a box that was published whole and is never freed.
            if let Some(pools) = unsafe { current.as_ref() }
                && pools.process == process
            {
                return Ok(pools);
            }
            let kept = Mutex::new([const { None }; KEPT]);
            let fresh = Box::into_raw(boxed(Pools { process, processors: AtomicU64::new(0), kept })?);
            match CURRENT.compare_exchange(current, fresh, Ordering::AcqRel, Ordering::Acquire) {
                // SAFETY: it was just made, and from now on nobody frees it.
                Ok(_) => return Ok(unsafe { &*fresh }),
                Err(other) => {
                    // SAFETY: it was just made and nobody else saw it.
                    drop(unsafe { Box::from_raw(fresh) });
                    current = other;
                }
            }
        }
    }

    /// A pool of that many threads.
    fn pool(&self, threads: usize) -> Result<Handle> {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        let known = kept.iter().position(|pool| pool.as_ref().is_some_and(|pool| pool.threads == threads));
        let evicted = match known {
            Some(at) => {
                kept[..=at].rotate_right(1);
                None
            }
            None => {
                let fresh = Handle::new(threads)?;
                kept.rotate_right(1);
                kept[0].replace(fresh)
            }
        };
        let pool = kept[0].clone();
        drop(kept);
        drop(evicted);
        pool.ok_or_else(|| Error::compose(Status::Internal, format_args!("the pool in use is not kept")))
    }
}

/// A box, where there is memory for it.
fn boxed<T>(value: T) -> Result<Box<T>> {
    const { assert!(size_of::<T>() > 0) };
    // SAFETY: the layout has a size.
    let place = unsafe { std::alloc::alloc(Layout::new::<T>()) }.cast::<T>();
    ensure!(!place.is_null(), OutOfMemory, "{} bytes that starting threads takes could not be had", size_of::<T>());
    // SAFETY: fresh memory of that layout from the allocator that boxes use.
    unsafe {
        place.write(value);
        Ok(Box::from_raw(place))
    }
}

/// CPUs that the calling thread may use: its affinity mask, and the limits of the process' control group.
pub fn processors() -> usize {
    let mask = processors::in_mask();
    let Ok(Pools { processors: seen, .. }) = Pools::get() else { return processors::within_limits(mask) };
    let known = seen.load(Ordering::Relaxed);
    if known >> 32 == mask as u64 {
        return (known as u32) as usize;
    }
    let processors = processors::within_limits(mask);
    seen.store((mask as u64) << 32 | processors as u64, Ordering::Relaxed);
    processors
}

/// Runs `part` for 0 to `threads` less one on a pool of that many threads, of which the calling thread is one, and
/// returns when all are done. A panic in a part is the caller's, after that.
pub fn parts(threads: usize, part: &(dyn Fn(usize) + Sync)) -> Result<()> {
    if threads <= 1 {
        part(0);
        return Ok(());
    }
    Pools::get()?.pool(threads)?.run(part);
    Ok(())
}

/// What a pool works on.
#[derive(Clone, Copy)]
struct Call {
    parts: u32,
    /// Valid until every part is finished.
    part: *const (dyn Fn(usize) + Sync),
}

/// The state of a pool, apart so that threads that wait do not disturb those that work.
#[repr(align(64))]
struct Apart<T>(T);

struct Pool {
    /// Workers, and the caller.
    threads: usize,
    /// Held by the caller whose call it is.
    turn: Mutex<()>,
    /// Written by who has the turn, while no part can be taken; read by who took a part, until it is finished.
    call: UnsafeCell<Option<Call>>,
    /// The number of the call (upper half), and its parts that nobody has taken.
    ticket: Apart<AtomicU64>,
    /// Counts calls, and the end: what idle workers wait for.
    signal: Apart<AtomicU32>,
    asleep: AtomicU32,
    /// Parts that are not finished, and whether the caller sleeps.
    unfinished: Apart<AtomicU32>,
    panicked: AtomicBool,
    /// Set when there are no handles any more.
    closed: AtomicBool,
    handles: AtomicUsize,
    /// All handles together are one, each worker is one. Nobody left: freed.
    owners: AtomicUsize,
}

// SAFETY: `call` is shared as its comment says, everything else is atomic or a lock.
unsafe impl Sync for Pool {}

/// The caller's bit in `unfinished`.
const CALLER_SLEEPS: u32 = 1 << 31;

/// How often to look before sleeping: some microseconds at once, then as long as others want the CPU.
const LOOKS: usize = 100;
const LOOKS_BETWEEN_OTHERS: usize = 30;

/// Looks a while whether `done`.
fn soon(done: impl Fn() -> bool) -> bool {
    for look in 0..LOOKS + LOOKS_BETWEEN_OTHERS {
        if done() {
            return true;
        }
        if look < LOOKS { std::hint::spin_loop() } else { std::thread::yield_now() }
    }
    false
}

impl Pool {
    /// Takes a part of the call that is on, if one is left.
    fn take(&self) -> Option<(Call, usize)> {
        let mut ticket = self.ticket.0.load(Ordering::Acquire);
        loop {
            let left = ticket as u32;
            if left == 0 {
                return None;
            }
            match self.ticket.0.compare_exchange_weak(ticket, ticket - 1, Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => {
                    // SAFETY: the part is taken and not finished, so that the call is on; its caller wrote it before.
                    let call = unsafe { *self.call.get() }?;
                    return Some((call, (call.parts - left) as usize));
                }
                Err(now) => ticket = now,
            }
        }
    }

    /// Works as long as there are parts.
    fn work(&self) {
        while let Some((call, part)) = self.take() {
            // SAFETY: the caller keeps the closure until this part is finished.
            let body = unsafe { &*call.part };
            if catch_unwind(AssertUnwindSafe(|| body(part))).is_err() {
                self.panicked.store(true, Ordering::Relaxed);
            }
            if self.unfinished.0.fetch_sub(1, Ordering::AcqRel) == CALLER_SLEEPS + 1 {
                wake(&self.unfinished.0, 1);
            }
        }
    }

    fn run(&self, part: &(dyn Fn(usize) + Sync)) {
        let turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        let parts = self.threads as u32;
        // SAFETY: only the lifetime changes; the closure is used until all parts are finished, and this waits for that.
        let part = unsafe { std::mem::transmute::<&(dyn Fn(usize) + Sync), *const (dyn Fn(usize) + Sync)>(part) };
        // SAFETY: this thread has the turn, and all parts of the call before are finished.
        unsafe { *self.call.get() = Some(Call { parts, part }) };
        self.unfinished.0.store(parts, Ordering::Relaxed);
        let number = (self.ticket.0.load(Ordering::Relaxed) >> 32).wrapping_add(1);
        self.ticket.0.store(number << 32 | u64::from(parts), Ordering::Release);
        // A worker counts itself before it sleeps, and does not sleep when the signal has changed: it is woken, or sees.
        self.signal.0.fetch_add(1, Ordering::SeqCst);
        if self.asleep.load(Ordering::SeqCst) > 0 {
            wake(&self.signal.0, parts - 1);
        }
        self.work();
        let left = || self.unfinished.0.load(Ordering::Acquire);
        if !soon(|| left() == 0) {
            loop {
                let now = left();
                if now & !CALLER_SLEEPS == 0 {
                    break;
                }
                let asleep = now | CALLER_SLEEPS;
                if self.unfinished.0.compare_exchange(now, asleep, Ordering::AcqRel, Ordering::Relaxed).is_ok() {
                    wait(&self.unfinished.0, asleep);
                }
            }
        }
        let panicked = self.panicked.swap(false, Ordering::Relaxed);
        drop(turn);
        assert!(!panicked, "a part of the work panicked");
    }

    /// A worker's life.
    fn serve(&self) {
        loop {
            let seen = self.signal.0.load(Ordering::SeqCst);
            self.work();
            if self.closed.load(Ordering::Acquire) {
                return;
            }
            if !soon(|| self.signal.0.load(Ordering::Relaxed) != seen) {
                self.asleep.fetch_add(1, Ordering::SeqCst);
                wait(&self.signal.0, seen);
                self.asleep.fetch_sub(1, Ordering::SeqCst);
            }
        }
    }

    /// Gives up one owner's share.
    ///
    /// # Safety
    /// `pool` was made by [`Handle::new`], and the share is the caller's own.
    unsafe fn leave(pool: NonNull<Pool>) {
        // SAFETY: it is there as long as the share is.
        if unsafe { pool.as_ref() }.owners.fetch_sub(1, Ordering::Release) == 1 {
            fence(Ordering::Acquire);
            // SAFETY: it was made as a box, and this was the last share.
            drop(unsafe { Box::from_raw(pool.as_ptr()) });
        }
    }
}

/// A counted reference to a pool; its threads end after the last one.
struct Handle(NonNull<Pool>);

// SAFETY: a pool may be used from any thread, and the count is atomic.
unsafe impl Send for Handle {}

impl std::ops::Deref for Handle {
    type Target = Pool;
    fn deref(&self) -> &Pool {
        // SAFETY: handles are an owner.
        unsafe { self.0.as_ref() }
    }
}

impl Clone for Handle {
    fn clone(&self) -> Handle {
        self.handles.fetch_add(1, Ordering::Relaxed);
        Handle(self.0)
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        if self.handles.fetch_sub(1, Ordering::AcqRel) > 1 {
            return;
        }
        self.closed.store(true, Ordering::Release);
        self.signal.0.fetch_add(1, Ordering::SeqCst);
        wake(&self.signal.0, i32::MAX as u32);
        // SAFETY: the share of the handles, of which this was the last.
        unsafe { Pool::leave(self.0) };
    }
}

impl Handle {
    fn new(threads: usize) -> Result<Handle> {
        let pool = Handle(NonNull::from(Box::leak(boxed(Pool {
            threads,
            turn: Mutex::new(()),
            call: UnsafeCell::new(None),
            ticket: Apart(AtomicU64::new(0)),
            signal: Apart(AtomicU32::new(0)),
            asleep: AtomicU32::new(0),
            unfinished: Apart(AtomicU32::new(0)),
            panicked: AtomicBool::new(false),
            closed: AtomicBool::new(false),
            handles: AtomicUsize::new(1),
            owners: AtomicUsize::new(1),
        })?)));
        for _ in 1..threads {
            pool.owners.fetch_add(1, Ordering::Relaxed);
            let code = start(pool.0);
            if code != 0 {
                // SAFETY: the share of the thread that is not there. Those that are end with the handle.
                unsafe { Pool::leave(pool.0) };
                let why = if code == libc::EAGAIN { "the system has no more memory or threads" } else { "an error" };
                let words = format_args!("a pool of {threads} threads could not be started: {why} (errno {code})");
                return Err(Error::compose(Status::OutOfMemory, words));
            }
        }
        Ok(pool)
    }
}

/// Starts a worker, which has a share in `pool`. Returns 0 or the error's number.
fn start(pool: NonNull<Pool>) -> i32 {
    extern "C" fn begin(pool: *mut c_void) -> *mut c_void {
        let pool = pool.cast::<Pool>();
        // SAFETY: the C library copies the name. A thread without it works, too.
        unsafe { libc::pthread_setname_np(libc::pthread_self(), c"deltanet".as_ptr()) };
        if let Some(pool) = NonNull::new(pool) {
            // SAFETY: the worker's share, which is given up after the last use.
            unsafe {
                pool.as_ref().serve();
                Pool::leave(pool);
            }
        }
        std::ptr::null_mut()
    }
    // Kernels need 24 KiB; the rest is for the thread-local storage of a large host, which comes out of it.
    const STACK: usize = 1 << 20;
    let mut thread = std::mem::MaybeUninit::uninit();
    // SAFETY: attributes that are initialised, used and destroyed here; the thread gets a pool that it has a share in.
    unsafe {
        let mut attributes = std::mem::MaybeUninit::<libc::pthread_attr_t>::uninit();
        let plain = cfg!(miri) || libc::pthread_attr_init(attributes.as_mut_ptr()) != 0;
        let how = if plain { std::ptr::null() } else { attributes.as_ptr() };
        if !plain {
            libc::pthread_attr_setstacksize(attributes.as_mut_ptr(), STACK);
        }
        let code = libc::pthread_create(thread.as_mut_ptr(), how, begin, pool.as_ptr().cast());
        if !plain {
            libc::pthread_attr_destroy(attributes.as_mut_ptr());
        }
        if code == 0 {
            libc::pthread_detach(thread.assume_init());
        }
        code
    }
}

/// Sleeps until somebody wakes this word's sleepers, unless it is not `seen` any more. May return early.
fn wait(word: &AtomicU32, seen: u32) {
    let no_limit = std::ptr::null::<libc::timespec>();
    // SAFETY: the word outlives the call.
    unsafe {
        libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAIT | libc::FUTEX_PRIVATE_FLAG, seen, no_limit)
    };
}

/// Wakes at most so many that sleep at this word.
fn wake(word: &AtomicU32, most: u32) {
    // SAFETY: the word outlives the call.
    unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAKE | libc::FUTEX_PRIVATE_FLAG, most) };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_part_runs_once() {
        for threads in [1, 2, 3, 7, 2, 5, 3, 6, 2] {
            for _ in 0..200 {
                let counts: Vec<AtomicU32> = (0..threads).map(|_| AtomicU32::new(0)).collect();
                parts(threads, &|part| {
                    counts[part].fetch_add(1, Ordering::Relaxed);
                })
                .expect("threads can be had");
                assert!(counts.iter().all(|count| count.load(Ordering::Relaxed) == 1));
            }
        }
    }

    #[test]
    fn callers_take_turns() {
        std::thread::scope(|scope| {
            for caller in 0..4 {
                scope.spawn(move || {
                    for round in 0..300 {
                        let sum = AtomicUsize::new(0);
                        let threads = 2 + (caller + round) % 4;
                        parts(threads, &|part| {
                            sum.fetch_add(part + 1, Ordering::Relaxed);
                        })
                        .expect("threads can be had");
                        assert_eq!(sum.into_inner(), threads * (threads + 1) / 2);
                    }
                });
            }
        });
    }

    #[test]
    fn a_panic_waits_for_the_others_and_leaves_the_pool_whole() {
        for _ in 0..20 {
            let done = AtomicUsize::new(0);
            let body = |part: usize| {
                assert!(part != 1, "forced");
                std::thread::sleep(std::time::Duration::from_millis(1));
                done.fetch_add(1, Ordering::Relaxed);
            };
            assert!(catch_unwind(AssertUnwindSafe(|| parts(4, &body))).is_err());
            assert_eq!(done.load(Ordering::Relaxed), 3);
            parts(4, &|_| ()).expect("the pool works on");
        }
    }
}
