//! The engine behind a call: its own function, and which arguments its calls have.
//!
//! The function's name stayed while its arguments changed. An engine calls its own function with the arguments that
//! this function takes; so the function is asked once, with a call of one head that every known version survives, and
//! what it has written tells its version. Its result must also be ours, or the engine's calls stay its own.

use std::ffi::{CStr, c_void};
use std::sync::OnceLock;

/// The arguments after state_out and before ith and nth.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Signature {
    /// None (March to May 2026).
    Plain,
    /// saved_steps and state_step_stride (since 11 May 2026).
    SavedSteps,
}

/// What is known of an engine in this process.
#[derive(Debug)]
pub struct Engine {
    /// Its own definition of the function.
    pub own: Option<*const c_void>,
    /// None where its calls cannot be served.
    pub signature: Option<Signature>,
    /// Its file, for reports.
    pub name: String,
}

// SAFETY: the pointer is a function's, of an object that is calling us and so stays loaded; it is never written to.
unsafe impl Send for Engine {}
// SAFETY: as above.
unsafe impl Sync for Engine {}

/// Call sites that are told apart. An engine has one or two, a process one engine, rarely more.
const CALL_SITES: usize = 16;

static KNOWN: [OnceLock<(usize, Engine)>; CALL_SITES] = [const { OnceLock::new() }; CALL_SITES];

impl Engine {
    /// The engine whose code at `caller` is calling. Found out once for each call site, looked up without a lock after;
    /// none for call sites beyond those that are remembered.
    pub fn known(caller: usize) -> Option<&'static Engine> {
        let slots = KNOWN.iter().map(|slot| slot.get_or_init(|| (caller, Engine::find(caller))));
        slots.into_iter().find(|(known, _)| *known == caller).map(|(_, engine)| engine)
    }

    /// Finds out what is calling from `caller`.
    pub fn find(caller: usize) -> Engine {
        let (own, name) = definition_beside(caller);
        // A program without a definition of its own was written for this one: it has the newest arguments.
        let signature = own.map_or(Some(Signature::SavedSteps), |own| {
            // SAFETY: the engine's function, still on its way into its first call.
            unsafe { super::probe::signature(own) }
        });
        Engine { own, signature, name }
    }
}

/// The definition of the function in the object that has this code, and the object's file.
///
/// A definition is looked for in the caller's object, not with RTLD_NEXT: that sees only objects of the global scope,
/// and hosts such as Python load their libraries outside it.
fn definition_beside(code: usize) -> (Option<*const c_void>, String) {
    let mut info = libc::Dl_info {
        dli_fname: std::ptr::null(),
        dli_fbase: std::ptr::null_mut(),
        dli_sname: std::ptr::null(),
        dli_saddr: std::ptr::null_mut(),
    };
    // SAFETY: dladdr takes any address and answers 0 for one that no object has.
    if unsafe { libc::dladdr(code as *const c_void, &raw mut info) } == 0 || info.dli_fname.is_null() {
        return (None, "unknown code".into());
    }
    // SAFETY: dladdr found the object, whose name is a C string as long as it is loaded.
    let file = unsafe { CStr::from_ptr(info.dli_fname) };
    let name = file.to_string_lossy().into_owned();
    // SAFETY: a C string; nothing is loaded that was not.
    let handle = unsafe { libc::dlopen(file.as_ptr(), libc::RTLD_LAZY | libc::RTLD_NOLOAD) };
    if handle.is_null() {
        return (None, name);
    }
    // SAFETY: an open handle and a C string. The handle's search starts in the object itself. Closing the handle does
    // not unload the object, which is calling us.
    let address = unsafe {
        let address = libc::dlsym(handle, c"iqk_fused_delta_net".as_ptr());
        libc::dlclose(handle);
        address.cast_const()
    };
    let ours = super::iqk_fused_delta_net as *const c_void;
    ((!address.is_null() && address != ours).then_some(address), name)
}
