//! Memory for one case: slots between pages that nobody may touch.

use std::ops::Range;
use std::sync::OnceLock;

/// Bytes of a slot.
pub const SLOT: usize = 1 << 23;

/// Slots of an arena.
pub const SLOTS: usize = 14;

/// Unreadable, unwritable bytes on both sides of every slot.
const GUARD: usize = 1 << 16;

/// What a slot holds around what is put into it.
const FILLING: u8 = 0xa5;

/// Bytes next to what is put into a slot that are checked, on the side that has no guard page.
const MARGIN: usize = 256;

/// A buffer in a slot: it ends or begins at a guard page.
#[derive(Clone, Debug)]
pub struct Buffer {
    /// Its addresses.
    pub place: Range<usize>,
    /// With the margins around it that must stay as they are.
    checked: Range<usize>,
}

/// The slots. One for a process: properties run one at a time.
pub struct Arena {
    start: usize,
}

impl Arena {
    /// The arena of this process, made on first use.
    pub fn get() -> &'static Arena {
        static ARENA: OnceLock<Arena> = OnceLock::new();
        ARENA.get_or_init(|| {
            let size = SLOTS * (SLOT + GUARD) + GUARD;
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
            // SAFETY: a fresh mapping that the kernel places.
            let start = unsafe { libc::mmap(std::ptr::null_mut(), size, libc::PROT_NONE, flags, -1, 0) };
            assert_ne!(start, libc::MAP_FAILED, "no address space for the arena");
            for slot in 0..SLOTS {
                let at = start.wrapping_byte_add(GUARD + slot * (SLOT + GUARD));
                // SAFETY: page-aligned and inside the mapping just made.
                let made = unsafe { libc::mprotect(at, SLOT, libc::PROT_READ | libc::PROT_WRITE) };
                assert_eq!(made, 0, "the arena's slot {slot} cannot be opened");
            }
            Arena { start: start as usize }
        })
    }

    /// Takes `size` bytes of a slot, at its end or at its beginning.
    pub fn take(&self, slot: usize, size: usize, at_end: bool) -> Buffer {
        assert!(slot < SLOTS && size <= SLOT, "slot {slot} cannot hold {size} bytes");
        let first = self.start + GUARD + slot * (SLOT + GUARD);
        let start = if at_end { first + SLOT - size } else { first };
        let checked = start.saturating_sub(MARGIN).max(first)..(start + size + MARGIN).min(first + SLOT);
        let buffer = Buffer { place: start..start + size, checked };
        // SAFETY: inside an open slot, which one case at a time uses.
        unsafe { std::ptr::write_bytes(buffer.checked.start as *mut u8, FILLING, buffer.checked.len()) };
        buffer
    }
}

impl Buffer {
    /// The buffer's bytes and the margins as they are.
    pub fn memory(&self) -> Vec<u8> {
        // SAFETY: inside an open slot.
        unsafe { std::slice::from_raw_parts(self.checked.start as *const u8, self.checked.len()) }.to_vec()
    }

    /// Puts back what [`Buffer::memory`] kept.
    pub fn restore(&self, memory: &[u8]) {
        assert_eq!(memory.len(), self.checked.len());
        // SAFETY: inside an open slot, of that size.
        unsafe { std::ptr::copy_nonoverlapping(memory.as_ptr(), self.checked.start as *mut u8, memory.len()) };
    }

    /// Fills the buffer with elements of `N` bytes.
    pub fn fill<const N: usize>(&self, mut element: impl FnMut(usize) -> [u8; N]) {
        assert_eq!(self.place.len() % N, 0);
        let start = self.place.start as *mut [u8; N];
        for at in 0..self.place.len() / N {
            // SAFETY: inside an open slot; arrays of bytes lie anywhere.
            unsafe { start.add(at).write(element(at)) };
        }
    }

    /// Whether `range` is inside.
    pub fn holds(&self, range: &Range<i128>) -> bool {
        self.place.start as i128 <= range.start && range.end <= self.place.end as i128
    }

    /// Panics if a bit of the buffer differs from `before` that is not set in `may`, or anything around the buffer.
    pub fn assert_intact(&self, before: &[u8], may: &[u8]) {
        let now = self.memory();
        let (first, end) = (self.place.start - self.checked.start, self.place.end - self.checked.start);
        let wrong = |((now, before), may): ((&u8, &u8), &u8)| (now ^ before) & !may;
        let pairs = || now[first..end].iter().zip(&before[first..end]).zip(may);
        assert!(
            may.len() == end - first
                && now[..first] == before[..first]
                && now[end..] == before[end..]
                && pairs().map(wrong).fold(0, |all, wrong| all | wrong) == 0,
            "byte {:?} of {:x?} was written, or bytes around it",
            pairs().position(|pair| wrong(pair) != 0),
            self.place
        );
    }
}
