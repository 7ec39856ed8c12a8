//! The CUDA driver's functions that this library calls, looked up in libcuda the first time.
//!
//! cudarc finds the library and has the types. Its functions are not called: they panic where a symbol is missing, and
//! they return results as an enum, which a newer driver's numbers would break.

use crate::error::{Error, Result, Status};
use cudarc::driver::sys;
use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::sync::OnceLock;

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
    module_function: "cuModuleGetFunction" fn(*mut CUfunction, CUmodule, *const c_char);
    function_attribute: "cuFuncGetAttribute" fn(*mut c_int, c_uint, CUfunction);
    set_function_attribute: "cuFuncSetAttribute" fn(CUfunction, c_uint, c_int);
    launch_with: "cuLaunchKernelEx" fn(*const sys::CUlaunchConfig, CUfunction, *mut *mut c_void, *mut *mut c_void);
    pointer_attributes: "cuPointerGetAttributes" fn(c_uint, *mut c_uint, *mut *mut c_void, u64);
    launch: "cuLaunchKernel" fn(
        CUfunction, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, CUstream, *mut *mut c_void, *mut *mut c_void
    );
}

/// The driver, loaded and initialised, or why not.
pub(crate) fn driver() -> Result<&'static Driver> {
    static DRIVER: OnceLock<Result<Driver>> = OnceLock::new();
    let driver = DRIVER.get_or_init(|| {
        let driver = Driver::load()?;
        // SAFETY: flags must be 0, and are.
        let code = unsafe { (driver.init)(0) };
        match code {
            0 => Ok(driver),
            _ => Err(Error::new(
                Status::Unsupported,
                format!("the CUDA driver does not start: cuInit returned {}", driver.name(code)),
            )),
        }
    });
    driver.as_ref().map_err(Clone::clone)
}

impl Driver {
    /// The name of an error, such as `CUDA_ERROR_INVALID_VALUE`.
    pub fn name(&self, code: Code) -> String {
        let mut name = std::ptr::null();
        // SAFETY: `name` is writable; the driver answers with a static C string, or leaves or sets it null.
        let known = unsafe { (self.error_name)(code, &mut name) } == 0 && !name.is_null();
        // SAFETY: just tested.
        if known { unsafe { CStr::from_ptr(name) }.to_string_lossy().into_owned() } else { format!("error {code}") }
    }

    /// An error with the driver's name for it unless `code` is success.
    pub fn check(&self, code: Code, what: &str) -> Result<()> {
        if code == 0 {
            return Ok(());
        }
        Err(Error::compose(Status::Cuda, format_args!("{what}: the CUDA driver returned {}", self.name(code))))
    }
}
