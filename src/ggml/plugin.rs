//! The plugin as a host sees it: what `GGML_BACKEND_PATH` loads, and what a static host calls instead.

use super::abi::{API_VERSIONS, Device, Registry};
use super::symbols::{self, Host};
use super::{device, substitute};
use crate::log::{self, Level};
use std::ffi::{CStr, c_char, c_int, c_void};
use std::panic::catch_unwind;
use std::sync::{Arc, Mutex, PoisonError};

/// `DELTANET_GGML`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    /// Inside the CPU backend's graphs.
    Inline,
    /// As a device of our own.
    Device,
    Off,
}

fn mode() -> Mode {
    match std::env::var("DELTANET_GGML").as_deref() {
        Ok("off" | "0") => Mode::Off,
        Ok("device") => Mode::Device,
        _ => Mode::Inline,
    }
}

/// How well the plugin suits this machine; 0 makes the host drop it.
#[unsafe(no_mangle)]
extern "C" fn ggml_backend_score() -> c_int {
    catch_unwind(|| {
        symbols::find_log();
        if mode() == Mode::Off {
            log::line(Level::Info, "off, as DELTANET_GGML says");
            return 0;
        }
        1
    })
    .unwrap_or(0)
}

/// The plugin's registry. Whatever happens, the host goes on as without us, with one line that says why.
#[unsafe(no_mangle)]
pub(super) extern "C" fn ggml_backend_init() -> *mut c_void {
    catch_unwind(|| {
        symbols::find_log();
        match symbols::find_host() {
            Ok(host) => start(host),
            Err(why) => {
                log::line(Level::Warning, &format!("not active: {why}"));
                // A host of an unknown version refuses this registry by its number, before it reads anything else.
                registry(API_VERSIONS[0], None)
            }
        }
    })
    .unwrap_or(std::ptr::null_mut())
    .cast()
}

/// Starts working for a host and answers the registry that it gets. Never fails: what cannot be done is said.
pub fn start(host: Host) -> *mut Registry {
    let api_version = host.api_version;
    // A host that attaches us says no version.
    let version = if host.version.is_empty() { String::new() } else { format!(" {}", host.version) };
    let about = format!("ggml{version}, plugin API {api_version}");
    // The host may unload us, but its CPU device and its backends have our functions from now on.
    if !stay_loaded() {
        log::line(Level::Warning, "not active: this library cannot be kept loaded");
        return registry(api_version, None);
    }
    let host = Arc::new(host);
    let mut own_device = None;
    let outcome = match mode() {
        Mode::Off => Err("off, as DELTANET_GGML says".to_owned()),
        Mode::Inline => substitute::attach(Arc::clone(&host)).map(|()| "GATED_DELTA_NET runs inside the CPU backend"),
        Mode::Device => device::device(&host).map(|device| {
            own_device = Some(device);
            "GATED_DELTA_NET runs on a device of its own"
        }),
    };
    match outcome {
        Ok(what) => log::once(format!("active ({about}): {what}")),
        Err(why) => log::line(Level::Warning, &format!("not active ({about}): {why}")),
    }
    registry(api_version, own_device)
}

/// A registry of that version, with one device or none. One each is enough: the host may ask again.
pub(super) fn registry(api_version: c_int, device: Option<*mut Device>) -> *mut Registry {
    struct Made(c_int, Option<usize>, usize);
    static MADE: Mutex<Vec<Made>> = Mutex::new(Vec::new());
    let mut made = MADE.lock().unwrap_or_else(PoisonError::into_inner);
    let device = device.map(|device| device as usize);
    if let Some(Made(.., registry)) = made.iter().find(|made| made.0 == api_version && made.1 == device) {
        return *registry as *mut Registry;
    }
    let registry = Box::into_raw(Box::new(Registry {
        api_version,
        get_name: Some(get_name),
        get_device_count: Some(get_device_count),
        get_device: Some(get_device),
        get_proc_address: Some(get_proc_address),
        context: device.unwrap_or(0) as *mut c_void,
    }));
    if let Some(device) = device {
        // SAFETY: a device of ours, which no host has seen yet.
        unsafe { (*(device as *mut Device)).registry = registry };
    }
    made.push(Made(api_version, device, registry as usize));
    registry
}

unsafe extern "C" fn get_name(_: *mut Registry) -> *const c_char {
    c"deltanet".as_ptr()
}

unsafe extern "C" fn get_device_count(registry: *mut Registry) -> usize {
    // SAFETY: a registry made above.
    usize::from(unsafe { !(*registry).context.is_null() })
}

unsafe extern "C" fn get_device(registry: *mut Registry, index: usize) -> *mut Device {
    // SAFETY: a registry made above.
    if index == 0 { unsafe { (*registry).context.cast() } } else { std::ptr::null_mut() }
}

unsafe extern "C" fn get_proc_address(registry: *mut Registry, name: *const c_char) -> *mut c_void {
    // SAFETY: a registry made above, and the host's C string.
    let (has_device, name) = unsafe {
        if name.is_null() {
            return std::ptr::null_mut();
        }
        (!(*registry).context.is_null(), CStr::from_ptr(name))
    };
    match name {
        name if has_device && name == c"ggml_backend_set_n_threads" => device::set_n_threads as *mut c_void,
        _ => std::ptr::null_mut(),
    }
}

/// Pins this library in memory for the life of the process.
fn stay_loaded() -> bool {
    let Some(own) = symbols::object_of(stay_loaded as fn() -> bool as *const c_void) else { return false };
    let flags = libc::RTLD_NOW | libc::RTLD_NOLOAD | libc::RTLD_NODELETE;
    // SAFETY: the name is a loaded object's. The handle is kept on purpose.
    let pinned = unsafe { !libc::dlopen(own.as_ptr(), flags).is_null() };
    // Linked into a program, this code belongs to the program itself, which is not a name to open but never leaves.
    // SAFETY: null stands for the program.
    pinned || unsafe { !libc::dlopen(std::ptr::null(), libc::RTLD_NOW).is_null() && is_program(&own) }
}

fn is_program(object: &CStr) -> bool {
    let program = std::fs::read_link("/proc/self/exe");
    let object = std::fs::canonicalize(object.to_string_lossy().as_ref());
    matches!((program, object), (Ok(program), Ok(object)) if program == object)
}
