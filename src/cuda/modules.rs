//! The embedded kernels, loaded once into each context that asks.

use super::chunked::{self, Abilities};
use super::driver::{CUcontext, CUdevice, CUfunction, CUmodule, Driver, driver, not_forked};
use super::plan::SHAPES;
use crate::error::{Error, Result, Status, ensure};
use cudarc::driver::sys::{CUdevice_attribute_enum as Device, CUfunction_attribute_enum as Function};
use std::collections::TryReserveError;
use std::ffi::{CStr, c_int};
use std::sync::{Mutex, PoisonError, RwLock};

/// A fat binary for every architecture from `oldest` on, with the names of the kernels in it.
struct Image {
    bytes: &'static Aligned<[u8]>,
    kernel: fn(usize) -> Option<&'static CStr>,
    oldest: c_int,
}

/// The driver reads the image's header as integers.
#[repr(C, align(16))]
struct Aligned<T: ?Sized>(T);

#[cfg(deltanet_nvcc)]
const IMAGES: &[Image] = &[
    Image {
        bytes: &Aligned(*include_bytes!(concat!(env!("OUT_DIR"), "/recurrent.fatbin"))),
        kernel: |at| SHAPES.get(at).map(|shape| shape.name),
        oldest: OLDEST,
    },
    Image {
        bytes: &Aligned(*include_bytes!(concat!(env!("OUT_DIR"), "/chunked.fatbin"))),
        kernel: |at| chunked::NAMES.get(at).copied(),
        oldest: 80, // bf16 matrix products
    },
];
#[cfg(not(deltanet_nvcc))]
const IMAGES: &[Image] = &[];

/// The oldest architecture with kernels: compute capability 7.5.
const OLDEST: c_int = 75;
/// The first of the chunked kernels among all.
pub(crate) const FIRST_CHUNKED: usize = SHAPES.len();
/// The first CUDA version that captures overlapping launches.
const OVERLAP: c_int = 12030;

/// What a context has after `prepare`.
#[derive(Clone, Copy)]
pub(crate) struct Prepared {
    context: u64,
    pub device: CUdevice,
    /// What the chunked kernels may do here; none where there are none.
    pub chunked: Option<Abilities>,
    /// In the order of the images and of the kernels in them.
    functions: &'static [Loaded],
}

#[derive(Clone, Copy)]
struct Loaded(CUfunction);
// SAFETY: a function's handle is a name that any thread may pass to the driver.
unsafe impl Send for Loaded {}
// SAFETY: as above.
unsafe impl Sync for Loaded {}

impl Prepared {
    pub fn function(&self, index: usize) -> CUfunction {
        self.functions[index].0
    }
}

/// Contexts are told apart by their id: unlike its address, a dead context's id never comes back.
static CONTEXTS: RwLock<Vec<Prepared>> = RwLock::new(Vec::new());

/// Whether there are kernels in this build.
pub(crate) fn built() -> Result<()> {
    ensure!(
        !IMAGES.is_empty(),
        Unsupported,
        "this library was built without nvcc and has no CUDA kernels; `cargo xtask nvcc` fetches a compiler"
    );
    Ok(())
}

/// The current context's kernels, if they were prepared. Takes no lock that a load holds for long, allocates nothing.
pub(crate) fn prepared() -> Result<Prepared> {
    let (_, id) = current(driver()?)?;
    known(id).ok_or_else(|| {
        Error::compose(
            Status::Cuda,
            format_args!(
                "the current CUDA context has no kernels loaded; deltanet_cuda_prepare must be called in it first, \
                 outside of any stream capture"
            ),
        )
    })
}

fn known(id: u64) -> Option<Prepared> {
    let contexts = CONTEXTS.read().unwrap_or_else(PoisonError::into_inner);
    contexts.iter().find(|known| known.context == id).copied()
}

/// Loads the kernels into the current context, unless they are there.
pub(crate) fn prepare() -> Result<Prepared> {
    // Not the list's own lock: loading takes long, and runs in other contexts look at the list.
    static LOADING: Mutex<()> = Mutex::new(());
    built()?;
    let driver = driver()?;
    let (_, id) = current(driver)?;
    if let Some(prepared) = known(id) {
        return Ok(prepared);
    }
    let _loading = LOADING.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(prepared) = known(id) {
        return Ok(prepared); // another thread was faster
    }
    let mut device = 0;
    // SAFETY: `device` is writable.
    driver.check(unsafe { (driver.context_device)(&mut device) }, "cuCtxGetDevice")?;
    let (major, minor) = capability(driver, device)?;
    ensure!(
        major * 10 + minor >= OLDEST,
        Unsupported,
        "the current context's device has compute capability {major}.{minor}; it must be at least 7.5"
    );
    CONTEXTS.write().unwrap_or_else(PoisonError::into_inner).try_reserve(1).map_err(no_memory)?;
    let mut modules = Modules { driver, loaded: [std::ptr::null_mut(); IMAGES.len()] };
    let mut functions = Vec::new();
    for (image, module) in
        IMAGES.iter().zip(&mut modules.loaded).filter(|(image, _)| major * 10 + minor >= image.oldest)
    {
        load(driver, image, module, &mut functions)?;
    }
    let chunked = chunked_abilities(driver, device, functions.get(FIRST_CHUNKED..).unwrap_or_default())?;
    // Kept for the life of the process: a context's functions may be in use by any thread until it is destroyed.
    let prepared = Prepared { context: id, device, chunked, functions: functions.leak() };
    std::mem::forget(modules);
    CONTEXTS.write().unwrap_or_else(PoisonError::into_inner).push(prepared);
    Ok(prepared)
}

/// Modules that are unloaded again unless all goes well: a host that tries again must not fill up its device.
struct Modules<'a> {
    driver: &'a Driver,
    loaded: [CUmodule; IMAGES.len()],
}

impl Drop for Modules<'_> {
    fn drop(&mut self) {
        for module in self.loaded.into_iter().filter(|module| !module.is_null()) {
            // SAFETY: it was loaded into the current context, and nobody has its functions. Where the context is broken
            // the driver refuses, and there is nothing to keep.
            unsafe { (self.driver.module_unload)(module) };
        }
    }
}

fn no_memory(_: TryReserveError) -> Error {
    Error::compose(Status::OutOfMemory, format_args!("memory for the table of CUDA kernels could not be had"))
}

fn load(driver: &Driver, image: &Image, module: &mut CUmodule, functions: &mut Vec<Loaded>) -> Result<()> {
    /// Statuses that say that the image and the driver do not go together.
    const MISMATCH: [u32; 4] = [209, 218, 221, 222]; // no binary for the GPU, PTX: invalid, no compiler, too new
    let mut loaded = std::ptr::null_mut();
    // SAFETY: `loaded` is writable, the image is an aligned fat binary, whose header holds its own size.
    let code = unsafe { (driver.module_load)(&mut loaded, image.bytes.0.as_ptr().cast()) };
    if MISMATCH.contains(&code) {
        let mut version = 0;
        // SAFETY: `version` is writable.
        unsafe { (driver.version)(&mut version) };
        return Err(Error::compose(
            Status::Unsupported,
            format_args!(
                "the CUDA driver (for CUDA {}.{}) cannot load the kernels for this device: {}; a newer driver is needed",
                version / 1000,
                version % 1000 / 10,
                driver.name(code)
            ),
        ));
    }
    driver.check(code, "cuModuleLoadData")?;
    *module = loaded;
    for name in (0..).map_while(image.kernel) {
        let mut function = std::ptr::null_mut();
        // SAFETY: `function` is writable, the module was loaded and the name is a C string.
        let code = unsafe { (driver.module_function)(&mut function, loaded, name.as_ptr()) };
        driver.check(code, "cuModuleGetFunction")?;
        // Asking for an attribute loads the kernel's code, which lazy loading would leave to the first launch: that may
        // be in a capture.
        attribute(driver, Function::CU_FUNC_ATTRIBUTE_NUM_REGS, function)?;
        functions.try_reserve(1).map_err(no_memory)?;
        functions.push(Loaded(function));
    }
    Ok(())
}

/// What the chunked kernels may do on `device`, having allowed them the shared memory that they use.
fn chunked_abilities(driver: &Driver, device: CUdevice, functions: &[Loaded]) -> Result<Option<Abilities>> {
    let Some(first) = functions.first() else { return Ok(None) };
    let arch = attribute(driver, Function::CU_FUNC_ATTRIBUTE_PTX_VERSION, first.0)?;
    let (mut shared, mut processors, mut version) = (0, 0, 0);
    let optin = Device::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN;
    // SAFETY: both are writable; a bad device is an error code.
    driver.check(unsafe { (driver.device_attribute)(&mut shared, optin as u32, device) }, "cuDeviceGetAttribute")?;
    let count = Device::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT;
    // SAFETY: as above.
    let code = unsafe { (driver.device_attribute)(&mut processors, count as u32, device) };
    driver.check(code, "cuDeviceGetAttribute")?;
    // SAFETY: as above.
    driver.check(unsafe { (driver.version)(&mut version) }, "cuDriverGetVersion")?;
    let abilities = Abilities::new(arch, shared as usize, processors as usize, version >= OVERLAP);
    if !chunked::fits(&abilities) {
        return Ok(None);
    }
    let limit = Function::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
    for (function, bytes) in functions.iter().zip(chunked::shared_sizes()) {
        if bytes > shared as usize {
            continue; // of the chunk length that is not this architecture's
        }
        // SAFETY: the function was loaded.
        let code = unsafe { (driver.set_function_attribute)(function.0, limit as u32, bytes as c_int) };
        driver.check(code, "cuFuncSetAttribute")?;
    }
    Ok(Some(abilities))
}

/// The current context and its id.
fn current(driver: &Driver) -> Result<(CUcontext, u64)> {
    not_forked()?;
    let mut context = std::ptr::null_mut();
    // SAFETY: `context` is writable.
    driver.check(unsafe { (driver.context)(&mut context) }, "cuCtxGetCurrent")?;
    ensure!(!context.is_null(), Cuda, "this thread has no current CUDA context; it must have one");
    let mut id = 0;
    // SAFETY: the context is current, `id` is writable.
    driver.check(unsafe { (driver.context_id)(context, &mut id) }, "cuCtxGetId")?;
    Ok((context, id))
}

/// Compute capability.
pub(crate) fn capability(driver: &Driver, device: CUdevice) -> Result<(c_int, c_int)> {
    let of = |attribute: Device| {
        let mut value = 0;
        // SAFETY: `value` is writable; a bad device is an error code.
        let code = unsafe { (driver.device_attribute)(&mut value, attribute as u32, device) };
        driver.check(code, "cuDeviceGetAttribute").map(|()| value)
    };
    Ok((
        of(Device::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
        of(Device::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
    ))
}

/// The architecture whose code was loaded, as in sm_90, and whether it was compiled from PTX.
pub(crate) fn image_of(driver: &Driver, prepared: &Prepared) -> Result<c_int> {
    attribute(driver, Function::CU_FUNC_ATTRIBUTE_BINARY_VERSION, prepared.function(0))
}

fn attribute(driver: &Driver, attribute: Function, function: CUfunction) -> Result<c_int> {
    let mut value = 0;
    // SAFETY: `value` is writable, the function was loaded.
    let code = unsafe { (driver.function_attribute)(&mut value, attribute as u32, function) };
    driver.check(code, "cuFuncGetAttribute")?;
    Ok(value)
}

#[cfg(test)]
mod tests {
    /// A spilled register is a trip to memory in the innermost loop.
    #[cfg(deltanet_nvcc)]
    #[test]
    fn kernels_do_not_spill() {
        let recurrent = concat!(env!("DELTANET_KERNELS"), "/recurrent.ptxas");
        let chunked = concat!(env!("DELTANET_KERNELS"), "/chunked.ptxas");
        for (log, kernels) in [(recurrent, super::SHAPES.len()), (chunked, super::chunked::NAMES.len())] {
            let log = std::fs::read_to_string(log).expect("build.rs wrote it");
            assert!(!log.contains("serialized"), "warpgroup products wait for each other");
            let (mut kernel, mut looked_at) = ("", 0);
            for line in log.lines() {
                if line.contains("Compiling entry function") {
                    kernel = line;
                }
                if line.contains("spill stores") {
                    looked_at += 1;
                    assert!(line.contains(" 0 bytes spill stores, 0 bytes spill loads"), "{kernel}: {line}");
                }
            }
            assert!(looked_at >= kernels, "{looked_at} kernels in the log");
        }
    }

    #[test]
    fn every_kernel_has_its_own_name() {
        let mut names: Vec<_> = super::SHAPES.iter().map(|shape| shape.name).chain(super::chunked::NAMES).collect();
        let all = names.len();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), all);
    }
}
