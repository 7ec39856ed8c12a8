//! The CUDA driver's functions that this library calls, looked up in libcuda the first time.
//!
//! cudarc finds the library and has the types. Its functions are not called: they panic where a symbol is missing, and
//! they return results as an enum, which a newer driver's numbers would break.

use crate::error::{Error, Result, Status, ensure};
use crate::spare::spare;
use cudarc::driver::sys;
use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::fmt;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

pub(crate) use sys::{CUcontext, CUdevice, CUfunction, CUmodule, CUstream};

/// `CUresult`, any number.
type Code = u32;

macro_rules! driver {
    ($($(#[$doc:meta])* $field:ident: $symbol:literal fn($($argument:ty),*);)+) => {
        /// Functions of libcuda.
        pub(crate) struct Driver {
            $($(#[$doc])* pub $field: unsafe extern "C" fn($($argument),*) -> Code,)+
        }

        impl Driver {
            fn load() -> Result<Driver> {
                // SAFETY: loading libcuda runs its initialisers, which is what its users do.
                if !unsafe { sys::is_culib_present() } {
                    return Err(Error::new(
                        Status::Unsupported,
                        "libcuda was not found: CUDA calls need NVIDIA's driver",
                    ));
                }
                // SAFETY: as above; it is there, so that cudarc does not panic.
                let library = unsafe { sys::culib() };
                Ok(Driver {
                    $($field: {
                        // SAFETY: the type is the function's in cuda.h, with the enum it returns as its integer.
                        let symbol = unsafe {
                            library.get::<unsafe extern "C" fn($($argument),*) -> Code>(concat!($symbol, "\0").as_bytes())
                        };
                        *symbol.map_err(|_| {
                            Error::new(
                                Status::Unsupported,
                                concat!("the CUDA driver is too old: it has no ", $symbol),
                            )
                        })?
                    },)+
                })
            }
        }
    };
}

driver! {
    init: "cuInit" fn(c_uint);
    version: "cuDriverGetVersion" fn(*mut c_int);
    error_name: "cuGetErrorName" fn(Code, *mut *const c_char);
    context: "cuCtxGetCurrent" fn(*mut CUcontext);
    context_id: "cuCtxGetId" fn(CUcontext, *mut u64);
    context_device: "cuCtxGetDevice" fn(*mut CUdevice);
    device_attribute: "cuDeviceGetAttribute" fn(*mut c_int, c_uint, CUdevice);
    device_name: "cuDeviceGetName" fn(*mut c_char, c_int, CUdevice);
    module_load: "cuModuleLoadData" fn(*mut CUmodule, *const c_void);
    module_unload: "cuModuleUnload" fn(CUmodule);
    module_function: "cuModuleGetFunction" fn(*mut CUfunction, CUmodule, *const c_char);
    function_attribute: "cuFuncGetAttribute" fn(*mut c_int, c_uint, CUfunction);
    set_function_attribute: "cuFuncSetAttribute" fn(CUfunction, c_uint, c_int);
    launch_with: "cuLaunchKernelEx" fn(*const sys::CUlaunchConfig, CUfunction, *mut *mut c_void, *mut *mut c_void);
    pointer_attributes: "cuPointerGetAttributes" fn(c_uint, *mut c_uint, *mut *mut c_void, u64);
    launch: "cuLaunchKernel" fn(
        CUfunction, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, CUstream, *mut *mut c_void, *mut *mut c_void
    );
}

/// The process that has started the driver; 0 before.
static STARTED: AtomicU32 = AtomicU32::new(0);

/// Threads that are loading or starting the driver (lower half), and their process (upper half).
static STARTING: AtomicU64 = AtomicU64::new(0);

/// One of those threads. A child of fork has none of its parent's, and must not wait for what they hold.
struct Starting;

impl Starting {
    fn enter() -> Result<Starting> {
        let own = u64::from(std::process::id()) << 32;
        let enter =
            |now: u64| (now as u32 == 0 || now & !0xffff_ffff == own).then_some(own | (u64::from(now as u32) + 1));
        let entered = STARTING.fetch_update(Ordering::Relaxed, Ordering::Relaxed, enter);
        entered.map(|_| Starting).map_err(|_| forked())
    }
}

impl Drop for Starting {
    fn drop(&mut self) {
        STARTING.fetch_sub(1, Ordering::Relaxed);
    }
}

/// The driver, loaded and initialised, or why not.
pub(crate) fn driver() -> Result<&'static Driver> {
    static LOADED: OnceLock<Result<Driver>> = OnceLock::new();
    if let Some(Ok(driver)) = LOADED.get()
        && STARTED.load(Ordering::Acquire) != 0
    {
        return Ok(driver);
    }
    let _starting = Starting::enter()?;
    if LOADED.get().is_none() {
        spare(64 << 10, "loading the CUDA driver")?;
    }
    let driver = LOADED.get_or_init(Driver::load).as_ref().map_err(Clone::clone)?;
    // A failure is not kept: the next call may find what this one lacks.
    // SAFETY: flags must be 0, and are.
    let code = unsafe { (driver.init)(0) };
    if code == OUT_OF_MEMORY {
        return driver.check(code, "cuInit").map(|()| driver);
    }
    ensure!(code == 0, Unsupported, "the CUDA driver does not start: cuInit returned {}", driver.name(code));
    STARTED.store(std::process::id(), Ordering::Release);
    Ok(driver)
}

/// Refuses in a child of a process that has started the driver: the driver does not go on there, and a lock that another
/// thread of the parent held would stay locked.
pub(crate) fn not_forked() -> Result<()> {
    if STARTED.load(Ordering::Acquire) == std::process::id() { Ok(()) } else { Err(forked()) }
}

fn forked() -> Error {
    Error::compose(
        Status::Cuda,
        format_args!(
            "this process was forked from one that used CUDA, and CUDA does not work there; it must be used after exec, or \
             in the children alone"
        ),
    )
}

/// CUDA_ERROR_OUT_OF_MEMORY.
const OUT_OF_MEMORY: Code = 2;

/// What an error is called, such as `CUDA_ERROR_INVALID_VALUE`.
pub(crate) enum Name {
    Known(&'static CStr),
    Number(Code),
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Name::Known(name) => f.write_str(&name.to_string_lossy()),
            Name::Number(code) => write!(f, "error {code}"),
        }
    }
}

impl Driver {
    /// The name of an error.
    pub fn name(&self, code: Code) -> Name {
        let mut name = std::ptr::null();
        // SAFETY: `name` is writable; the driver answers with a static C string, or leaves or sets it null.
        let known = unsafe { (self.error_name)(code, &mut name) } == 0 && !name.is_null();
        // SAFETY: just tested.
        if known { Name::Known(unsafe { CStr::from_ptr(name) }) } else { Name::Number(code) }
    }

    /// What `code` means for the call.
    pub fn status(code: Code) -> Status {
        if code == OUT_OF_MEMORY { Status::OutOfMemory } else { Status::Cuda }
    }

    /// An error with the driver's name for it unless `code` is success.
    pub fn check(&self, code: Code, what: &str) -> Result<()> {
        if code == 0 {
            return Ok(());
        }
        Err(Error::compose(Driver::status(code), format_args!("{what}: the CUDA driver returned {}", self.name(code))))
    }
}
