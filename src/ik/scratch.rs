//! Memory for the kernels on threads that are the engine's, in calls that bring none.

use crate::error::{Result, ensure};
use std::cell::RefCell;
use std::mem::MaybeUninit;
use std::sync::{Mutex, PoisonError};

/// What a part gets where its thread cannot have memory of its own. It bounds the scratch of calls that run here.
const LAST_RESORT: usize = 1 << 20;

/// Runs a part with scratch. The engine hands none over, and its threads come back for every layer: so each keeps a
/// buffer, which grows once and is not allocated again. A part that failed for want of memory could not be passed on,
/// because the engine's function splits the work otherwise; such parts take turns with one static buffer instead.
pub fn with_scratch(size: usize, run: impl Fn(&mut [MaybeUninit<u8>]) -> Result<()>) -> Result<()> {
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
