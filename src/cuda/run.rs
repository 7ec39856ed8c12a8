//! Running a problem on the caller's stream.

use super::abi::DnProblem;
use super::chunked::Abilities;
use super::driver::{CUdevice, Driver, driver};
use super::modules::{self, FIRST_CHUNKED, Prepared};
use super::plan::{Launch, Plan, SHAPES, value_contiguous};
use crate::error::{Error, Result, ensure};
use crate::params::Precision;
use crate::problem::Problem;
use cudarc::driver::sys::{self, CUmemorytype_enum as MemoryType, CUpointer_attribute_enum as Pointer};
use std::ffi::{CStr, c_char, c_int, c_void};

/// Loads the kernels into the current context.
pub fn prepare() -> Result<()> {
    modules::prepare().map(drop)
}

/// Bytes of device memory that a run of `problem` needs beside its tensors.
pub fn workspace_size(problem: &Problem) -> Result<usize> {
    modules::built()?;
    Ok(Plan::new(problem)?.workspace)
}

/// Says in words which kernels `problem` gets. Needs no driver and no context.
pub fn describe(problem: &Problem) -> Result<String> {
    modules::built()?;
    let plan = Plan::new(problem)?;
    let Some(launch) = plan.launch else { return Ok("nothing to compute".into()) };
    let ([x, y, z], threads, workspace) = (launch.grid, launch.threads, plan.workspace);
    let name = SHAPES[launch.function].name.to_string_lossy();
    let serial = format!("token-serial kernel {name}, {x} x {y} x {z} blocks of {threads} threads");
    let Some(chunked) = plan.chunked else { return Ok(serial) };
    let precision = match problem.precision() {
        Precision::Exact => "exact (three bf16 products for one of f32 values)",
        Precision::Tf32 => "tf32 (computed as exact)",
        Precision::Bf16 => "bf16",
    };
    let tail = chunked.tail;
    let rest = if tail > 0 { format!(", the last {tail} tokens by the {serial}") } else { String::new() };
    Ok(format!("chunked kernels, precision {precision}{rest}, {workspace} bytes of workspace; before sm_80: {serial}"))
}

/// Runs a problem in device memory on `stream` (null: the default one) of the current context, which must have been
/// prepared. Returns when the work is queued: no allocation, no synchronisation, safe in a capture.
///
/// # Safety
/// The problem's tensors and the workspace are as large as described, and until the stream has done the work nobody
/// writes to the inputs or touches the outputs and the workspace. `stream` is null or a stream of the current context.
pub unsafe fn run(problem: &Problem, workspace: *mut c_void, workspace_size: usize, stream: *mut c_void) -> Result<()> {
    modules::built()?;
    let plan = Plan::new(problem)?;
    let prepared = modules::prepared()?;
    for (name, address) in problem.addresses() {
        on_device(name, address, prepared.device)?;
    }
    if plan.workspace > 0 {
        ensure!(
            !workspace.is_null(),
            NullPointer,
            "workspace is null; it must point to at least {} bytes of device memory",
            plan.workspace
        );
        ensure!(
            workspace_size >= plan.workspace,
            Scratch,
            "workspace_size is {workspace_size}; it must be at least {}",
            plan.workspace
        );
        on_device("workspace", workspace.cast(), prepared.device)?;
    }
    let mut queued = 0;
    each_launch(problem, plan, prepared.chunked, workspace, |launch| {
        enqueue(&prepared, launch, stream, queued)?;
        queued += 1;
        Ok(())
    })
}

/// Gives the launches of `plan` to `launch`, in order. `device` is what runs the chunked kernels, if it does.
pub(super) fn each_launch(
    problem: &Problem,
    plan: Plan,
    device: Option<Abilities>,
    workspace: *mut c_void,
    mut launch: impl FnMut(Launch) -> Result<()>,
) -> Result<()> {
    let (Some(chunked), Some(device)) = (plan.chunked, device) else {
        return plan.launch.map_or(Ok(()), launch);
    };
    let arguments = DnProblem::of(problem, value_contiguous(problem))?;
    let mut launches = chunked.launches(problem, arguments, &device, FIRST_CHUNKED, workspace);
    launches.try_for_each(&mut launch)?;
    if chunked.tail == 0 {
        return Ok(());
    }
    let rest = problem.last_tokens(chunked.tail, chunked.state_end(problem, &launches));
    Plan::new(&rest)?.launch.map_or(Ok(()), launch)
}

/// Puts one launch on the stream, after `queued` of the same call.
fn enqueue(prepared: &Prepared, mut launch: Launch, stream: *mut c_void, queued: usize) -> Result<()> {
    let driver = driver()?;
    let ([x, y, z], threads, shared) = (launch.grid, launch.threads, launch.shared);
    let function = prepared.function(launch.function);
    let overlap = prepared.chunked.is_some_and(|device| device.overlap);
    let mut arguments = [launch.argument()];
    let (arguments, none) = (arguments.as_mut_ptr(), std::ptr::null_mut());
    if !overlap {
        // SAFETY: the function belongs to the current context and takes one argument, of the type that the plan chose
        // with it; the driver copies it before it returns. `run`'s caller vouches for the memory and the stream.
        let code = unsafe { (driver.launch)(function, x, y, z, threads, 1, 1, shared, stream.cast(), arguments, none) };
        return launched(driver, code, "cuLaunchKernel", queued);
    }
    let mut attribute = sys::CUlaunchAttribute {
        id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
        pad: [0; 4],
        value: sys::CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 },
    };
    let config = sys::CUlaunchConfig {
        gridDimX: x,
        gridDimY: y,
        gridDimZ: z,
        blockDimX: threads,
        blockDimY: 1,
        blockDimZ: 1,
        sharedMemBytes: shared,
        hStream: stream.cast(),
        attrs: &mut attribute,
        numAttrs: 1,
    };
    // SAFETY: as above; the driver reads the configuration and its one attribute before it returns.
    let code = unsafe { (driver.launch_with)(&config, function, arguments, none) };
    launched(driver, code, "cuLaunchKernelEx", queued)
}

/// What a launch's result means after `queued` others of the call, which nothing takes back.
fn launched(driver: &Driver, code: u32, what: &str, queued: usize) -> Result<()> {
    if code == 0 || queued == 0 {
        return driver.check(code, what);
    }
    let words = format_args!(
        "{what}: the CUDA driver returned {} after {queued} launches of this call were queued; outputs and states are \
         undefined",
        driver.name(code)
    );
    Err(Error::compose(Driver::status(code), words))
}

/// Whether `device` can read the memory at `address` as its own.
fn on_device(name: &str, address: *mut u8, device: CUdevice) -> Result<()> {
    let driver = driver()?;
    let (mut kind, mut ordinal, mut managed) = (0u32, -1 as c_int, 0u32);
    let mut attributes = [
        Pointer::CU_POINTER_ATTRIBUTE_MEMORY_TYPE as u32,
        Pointer::CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL as u32,
        Pointer::CU_POINTER_ATTRIBUTE_IS_MANAGED as u32,
    ];
    let mut values: [*mut c_void; 3] = [(&raw mut kind).cast(), (&raw mut ordinal).cast(), (&raw mut managed).cast()];
    // SAFETY: three attributes with room for each one's value; any address is allowed.
    let code = unsafe {
        (driver.pointer_attributes)(3, attributes.as_mut_ptr(), values.as_mut_ptr(), address as usize as u64)
    };
    driver.check(code, "cuPointerGetAttributes")?;
    let known = kind == MemoryType::CU_MEMORYTYPE_DEVICE as u32 || managed != 0;
    ensure!(known, Cuda, "{name} is at {address:p}, which is host memory; it must be CUDA device memory");
    ensure!(
        managed != 0 || ordinal == device,
        Cuda,
        "{name} is on CUDA device {ordinal}; it must be on device {device}, that of the current context"
    );
    Ok(())
}

/// What `deltanet info` tells of the current context.
#[derive(Clone, Debug)]
pub struct Device {
    /// The device's name.
    pub name: String,
    /// Its compute capability.
    pub capability: (i32, i32),
    /// The CUDA version that the driver is for, major and minor.
    pub driver: (i32, i32),
    /// The architecture of the kernels that were loaded, 90 for sm_90.
    pub image: i32,
}

/// Prepares the current context and describes it.
pub fn device() -> Result<Device> {
    let prepared = modules::prepare()?;
    let driver = driver()?;
    let mut version = 0;
    // SAFETY: `version` is writable.
    driver.check(unsafe { (driver.version)(&mut version) }, "cuDriverGetVersion")?;
    let mut name = [0 as c_char; 256];
    // SAFETY: `name` has that many writable bytes.
    let code = unsafe { (driver.device_name)(name.as_mut_ptr(), name.len() as c_int, prepared.device) };
    driver.check(code, "cuDeviceGetName")?;
    // SAFETY: the driver terminates the name within its room.
    let name = unsafe { CStr::from_ptr(name.as_ptr()) }.to_string_lossy().into_owned();
    Ok(Device {
        name,
        capability: modules::capability(driver, prepared.device)?,
        driver: (version / 1000, version % 1000 / 10),
        image: modules::image_of(driver, &prepared)?,
    })
}
