//! Finding the host's functions at run time: this library links to no ggml, and serves any copy that loads it.
//!
//! A host may have loaded ggml globally, locally (a dlopened addon), inside its own executable, or several copies of
//! it at once. The object that called us is asked first, then everything that is loaded.

use super::abi::{DEVICE_CPU, Device, Graph, TENSOR_OVERHEAD};
use crate::log::{self, HostLog};
use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::ptr::NonNull;

/// The functions of one copy of ggml.
pub struct Host {
    pub cpu_device: *mut Device,
    pub api_version: c_int,
    pub ops: Ops,
    pub buffer_is_host: unsafe extern "C" fn(*mut c_void) -> bool,
    pub graph_n_nodes: Option<unsafe extern "C" fn(*mut Graph) -> c_int>,
    pub version: String,
}

// SAFETY: the pointers are to functions and to a device that live as long as the host's library, which is never
// unloaded while its backends are in use; nothing here is changed after it was made.
unsafe impl Send for Host {}
// SAFETY: as above.
unsafe impl Sync for Host {}

/// This host's numbers of the operations that matter here; they move between versions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ops {
    pub none: c_int,
    pub reshape: c_int,
    pub view: c_int,
    pub permute: c_int,
    pub transpose: c_int,
    pub copy: c_int,
    pub get_rows: c_int,
    pub l2_norm: c_int,
    pub custom: c_int,
    pub gated_delta_net: c_int,
}

impl Ops {
    /// Reads the host's table of names.
    ///
    /// # Safety
    /// `name` is the host's `ggml_op_name`.
    pub unsafe fn read(name: unsafe extern "C" fn(c_int) -> *const c_char) -> Result<Ops, String> {
        let mut names = Vec::new();
        // The function does not check its argument, so the reading stops at the table's last name. That is GLU in
        // every version with this operator (0.9.7, 0.21.0, 0.26.0) and in those shortly before it.
        while names.len() < 256 {
            // SAFETY: all numbers up to here were inside the table and not its last.
            let text = unsafe { name(names.len() as c_int) };
            if text.is_null() {
                break;
            }
            // SAFETY: the table holds C string literals.
            let text = unsafe { CStr::from_ptr(text) }.to_bytes();
            names.push(text);
            if text == b"GLU" || !text.iter().all(|c| c.is_ascii_uppercase() || c.is_ascii_digit() || *c == b'_') {
                break;
            }
        }
        let find = |wanted: &str| {
            let at = names.iter().position(|name| *name == wanted.as_bytes());
            at.map(|at| at as c_int).ok_or_else(|| format!("this ggml has no {wanted}"))
        };
        Ok(Ops {
            gated_delta_net: find("GATED_DELTA_NET")?,
            none: find("NONE")?,
            reshape: find("RESHAPE")?,
            view: find("VIEW")?,
            permute: find("PERMUTE")?,
            transpose: find("TRANSPOSE")?,
            copy: find("CPY")?,
            get_rows: find("GET_ROWS")?,
            l2_norm: find("L2_NORM")?,
            custom: find("CUSTOM")?,
        })
    }

    /// Whether the operation only describes memory, so that the host does nothing for it.
    pub fn is_view(&self, op: c_int) -> bool {
        [self.none, self.reshape, self.view, self.permute, self.transpose].contains(&op)
    }
}

/// A handle that dlsym can search.
struct Handle(NonNull<c_void>);

impl Drop for Handle {
    fn drop(&mut self) {
        // SAFETY: the handle came from dlopen and is closed once; the object stays loaded, others hold it.
        unsafe { libc::dlclose(self.0.as_ptr()) };
    }
}

impl Handle {
    /// The object of that name, if it is loaded already; null means the program and all global objects.
    fn loaded(name: Option<&CStr>) -> Option<Handle> {
        let (name, flags) = match name {
            Some(name) => (name.as_ptr(), libc::RTLD_LAZY | libc::RTLD_NOLOAD),
            None => (std::ptr::null(), libc::RTLD_LAZY),
        };
        // SAFETY: a C string or null; nothing is loaded that was not.
        NonNull::new(unsafe { libc::dlopen(name, flags) }).map(Handle)
    }

    fn symbol(&self, name: &CStr) -> Option<NonNull<c_void>> {
        // SAFETY: an open handle and a C string.
        NonNull::new(unsafe { libc::dlsym(self.0.as_ptr(), name.as_ptr()) })
    }
}

/// Calls `visit` with handles of loaded objects, the likeliest first, until it answers.
fn search<T>(visit: impl Fn(&Handle) -> Option<T>) -> Option<T> {
    for object in callers() {
        if let Some(found) = Handle::loaded(Some(&object)).and_then(|handle| visit(&handle)) {
            return Some(found);
        }
    }
    if let Some(found) = Handle::loaded(None).and_then(|handle| visit(&handle)) {
        return Some(found);
    }
    let mut objects = loaded_objects();
    objects.sort_by_key(|object| {
        let name = object.to_string_lossy();
        let file = name.rsplit('/').next().unwrap_or_default();
        !(file.contains("ggml") || file.contains("llama"))
    });
    objects.iter().find_map(|object| Handle::loaded(Some(object)).and_then(|handle| visit(&handle)))
}

/// Objects on the call stack, the nearest first, without this library: the ggml that loads us is there.
fn callers() -> Vec<CString> {
    let mut frames = [std::ptr::null_mut::<c_void>(); 32];
    // SAFETY: the array has room for as many frames as stated.
    let count = unsafe { libc::backtrace(frames.as_mut_ptr(), frames.len() as c_int) };
    let own = object_of(callers as fn() -> Vec<CString> as *const c_void);
    let mut objects: Vec<CString> = Vec::new();
    for frame in frames.iter().take(usize::try_from(count).unwrap_or(0)) {
        let Some(object) = object_of(*frame) else { continue };
        if Some(&object) != own.as_ref() && !objects.contains(&object) {
            objects.push(object);
        }
    }
    objects
}

/// The file of the loaded object that an address belongs to.
pub fn object_of(address: *const c_void) -> Option<CString> {
    let mut info = libc::Dl_info {
        dli_fname: std::ptr::null(),
        dli_fbase: std::ptr::null_mut(),
        dli_sname: std::ptr::null(),
        dli_saddr: std::ptr::null_mut(),
    };
    // SAFETY: dladdr takes any address, and answers 0 for one that no object has.
    if unsafe { libc::dladdr(address, &raw mut info) } == 0 || info.dli_fname.is_null() {
        return None;
    }
    // SAFETY: dladdr succeeded, so the name is a C string that lives as long as the object.
    Some(unsafe { CStr::from_ptr(info.dli_fname) }.to_owned())
}

/// Whether the object that has `address` also exports `name`.
pub fn object_exports(address: *const c_void, name: &CStr) -> bool {
    let handle = object_of(address).and_then(|object| Handle::loaded(Some(&object)));
    handle.is_some_and(|handle| handle.symbol(name).is_some())
}

fn loaded_objects() -> Vec<CString> {
    unsafe extern "C" fn push(info: *mut libc::dl_phdr_info, _: usize, data: *mut c_void) -> c_int {
        // SAFETY: dl_iterate_phdr passes a valid record, and `data` is the vector given below.
        let (objects, name) = unsafe { (&mut *data.cast::<Vec<CString>>(), (*info).dlpi_name) };
        // SAFETY: a C string of the dynamic linker, copied at once.
        if !name.is_null() && unsafe { *name } != 0 {
            // SAFETY: as above.
            objects.push(unsafe { CStr::from_ptr(name) }.to_owned());
        }
        0
    }
    let mut objects: Vec<CString> = Vec::new();
    // SAFETY: `push` has the required signature, and the vector outlives the call.
    unsafe { libc::dl_iterate_phdr(Some(push), (&raw mut objects).cast()) };
    objects
}

/// Reads a function's address as the function pointer type `F`.
///
/// # Safety
/// `F` is a function pointer type, and the function has that signature.
unsafe fn function<F: Copy>(address: NonNull<c_void>) -> F {
    const { assert!(size_of::<F>() == size_of::<*mut c_void>()) };
    // SAFETY: the sizes agree and the caller vouches for the signature.
    unsafe { std::mem::transmute_copy(&address.as_ptr()) }
}

/// Sends our lines to the log of the host that is calling, where it has one.
pub fn find_log() {
    if let Some(address) = search(|handle| handle.symbol(c"ggml_log_internal")) {
        // SAFETY: the host's variadic log function has had this signature since it exists.
        log::use_host(unsafe { function::<HostLog>(address) });
    }
}

/// The ggml that is calling, or a sentence that says what is missing.
pub fn find_host() -> Result<Host, String> {
    let by_type = search(|handle| handle.symbol(c"ggml_backend_dev_by_type"))
        .ok_or("the host exports no ggml_backend_dev_by_type (a static host calls deltanet_ggml_attach)")?;
    // SAFETY: the signature in every version that has plugins.
    let by_type: unsafe extern "C" fn(c_int) -> *mut Device = unsafe { function(by_type) };
    // SAFETY: the host's function; it takes any type number.
    let cpu_device = unsafe { by_type(DEVICE_CPU) };
    if cpu_device.is_null() {
        return Err("the host has no CPU backend".into());
    }
    // The rest must come from the same copy of ggml: the one that the function found above belongs to, or the base
    // library that this one depends on (dlsym searches dependencies too).
    let object = object_of(by_type as *const c_void);
    let handle = object.as_deref().and_then(|object| Handle::loaded(Some(object)));
    let symbol = |name: &CStr| {
        let own = handle.as_ref().and_then(|handle| handle.symbol(name));
        own.or_else(|| Handle::loaded(None).and_then(|handle| handle.symbol(name)))
    };
    let needed = |name: &CStr| symbol(name).ok_or_else(|| format!("the host exports no {}", name.to_string_lossy()));

    let overhead = needed(c"ggml_tensor_overhead")?;
    // SAFETY: the signature in every version with plugins.
    let overhead = unsafe { function::<unsafe extern "C" fn() -> usize>(overhead)() };
    // SAFETY: the signatures in every version with plugins.
    let (op_name, buffer_is_host) =
        unsafe { (function(needed(c"ggml_op_name")?), function(needed(c"ggml_backend_buffer_is_host")?)) };
    let version = symbol(c"ggml_version").map_or_else(String::new, |version| {
        // SAFETY: the function returns a string literal.
        unsafe { CStr::from_ptr(function::<unsafe extern "C" fn() -> *const c_char>(version)()) }
            .to_string_lossy()
            .into_owned()
    });
    // SAFETY: the signature in every version with plugins.
    let graph_n_nodes = symbol(c"ggml_graph_n_nodes").map(|address| unsafe { function(address) });
    // SAFETY: functions of one ggml, found by their names.
    unsafe { Host::new(cpu_device, op_name, buffer_is_host, graph_n_nodes, Some(overhead), version) }
}

impl Host {
    /// Checks a host's parts.
    ///
    /// # Safety
    /// The device and the functions belong to one ggml, the functions to the names that the fields have.
    pub unsafe fn new(
        cpu_device: *mut Device,
        op_name: unsafe extern "C" fn(c_int) -> *const c_char,
        buffer_is_host: unsafe extern "C" fn(*mut c_void) -> bool,
        graph_n_nodes: Option<unsafe extern "C" fn(*mut Graph) -> c_int>,
        tensor_overhead: Option<usize>,
        version: String,
    ) -> Result<Host, String> {
        // SAFETY: a device of the host; the registry's first field is the API version in every version.
        let api_version = unsafe {
            let registry = (*cpu_device).registry;
            if registry.is_null() { -1 } else { (*registry).api_version }
        };
        if !super::abi::API_VERSIONS.contains(&api_version) {
            return Err(format!(
                "the host's plugin API version is {api_version}; known are {:?}",
                super::abi::API_VERSIONS
            ));
        }
        if let Some(overhead) = tensor_overhead.filter(|overhead| *overhead != TENSOR_OVERHEAD) {
            return Err(format!("the host's tensors take {overhead} bytes; the known ones take {TENSOR_OVERHEAD}"));
        }
        // SAFETY: the caller vouches for the function.
        let ops = unsafe { Ops::read(op_name)? };
        Ok(Host { cpu_device, api_version, ops, buffer_is_host, graph_n_nodes, version })
    }
}
