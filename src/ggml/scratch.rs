//! Memory for the kernels inside the host's threads: reserved before a graph runs, so that nothing is allocated in it.

use std::mem::MaybeUninit;
use std::ptr::NonNull;

/// ggml's own limit on threads (GGML_MAX_N_THREADS).
pub const MAX_THREADS: usize = 512;

/// Address space for [`MAX_THREADS`] threads. Pages become memory when a thread first touches them, so it costs what
/// the threads in use need, and the host's thread count may change from call to call.
#[derive(Default)]
pub struct Scratch {
    memory: Option<(NonNull<u8>, usize)>,
    each: usize,
}

// SAFETY: plain memory that this struct owns.
unsafe impl Send for Scratch {}

impl Scratch {
    /// Makes room for `size` bytes a thread; false where the system gives none.
    pub fn reserve(&mut self, size: usize) -> bool {
        if self.memory.is_some() && size <= self.each {
            return true;
        }
        let each = size.max(1).next_multiple_of(4096);
        let Some(total) = each.checked_mul(MAX_THREADS) else { return false };
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a new anonymous mapping, which touches no other memory.
        let memory =
            unsafe { libc::mmap(std::ptr::null_mut(), total, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0) };
        if memory == libc::MAP_FAILED {
            return false;
        }
        let Some(memory) = NonNull::new(memory.cast()) else { return false };
        self.release();
        (self.memory, self.each) = (Some((memory, total)), each);
        true
    }

    /// The share of each thread: its first byte for thread 0, and its size.
    pub fn shares(&self) -> (*mut u8, usize) {
        (self.memory.map_or(std::ptr::null_mut(), |(memory, _)| memory.as_ptr()), self.each)
    }

    fn release(&mut self) {
        if let Some((memory, total)) = self.memory.take() {
            // SAFETY: mapped above with this size, and unmapped once. That it fails leaves it mapped, nothing else.
            unsafe { libc::munmap(memory.as_ptr().cast(), total) };
        }
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        self.release();
    }
}

/// The share of thread `ith`.
///
/// # Safety
/// `first` and `each` are a live [`Scratch`]'s shares, `ith` is below [`MAX_THREADS`], and one thread at a time uses it.
pub unsafe fn share<'a>(first: *mut u8, each: usize, ith: usize) -> &'a mut [MaybeUninit<u8>] {
    // SAFETY: the mapping has MAX_THREADS shares of that size.
    unsafe { std::slice::from_raw_parts_mut(first.add(ith * each).cast(), each) }
}
