//! The operator on a GPU, for the command and for tests: a context with the kernels loaded, and problems whose tensors
//! are mirrored in device memory.

use anyhow::{Context, Result, ensure};
use cudarc::driver::{CudaContext, CudaSlice, CudaStream, DevicePtr, sys};
use deltanet::params::Params;
use deltanet::{Dtype, Tensor};
use std::ffi::c_void;
use std::sync::Arc;

/// A device, its primary context with deltanet's kernels loaded.
pub struct Gpu {
    /// The device's primary context.
    pub context: Arc<CudaContext>,
    /// A stream of its own.
    pub stream: Arc<CudaStream>,
}

impl Gpu {
    /// How many devices there are.
    pub fn count() -> Result<usize> {
        // SAFETY: loading libcuda runs its initialisers, which is what its users do.
        ensure!(unsafe { sys::is_culib_present() }, "libcuda was not found: a GPU needs NVIDIA's driver");
        Ok(CudaContext::device_count().context("there is no CUDA device")? as usize)
    }

    /// Opens a device, and makes its context current on this thread.
    pub fn open(ordinal: usize) -> Result<Gpu> {
        ensure!(ordinal < Gpu::count()?, "there is no CUDA device {ordinal}");
        let context = CudaContext::new(ordinal)?;
        // SAFETY: every buffer is used on one stream at a time, and waited for before it is dropped; the events that
        // cudarc would put between streams may not be recorded in a capture.
        unsafe { context.disable_event_tracking() };
        let stream = context.new_stream()?;
        deltanet::cuda::prepare()?;
        Ok(Gpu { context, stream })
    }

    /// Makes its context current on this thread.
    pub fn make_current(&self) -> Result<()> {
        Ok(self.context.bind_to_thread()?)
    }

    /// The stream as deltanet takes it.
    pub fn raw_stream(&self) -> *mut c_void {
        self.stream.cu_stream().cast()
    }
}

/// Bytes of guard on both sides of a mirrored tensor.
const GUARD: usize = 256;
const GUARD_BYTE: u8 = 0x5a;

/// One of the tensors of a problem.
type Field = fn(&mut Params) -> &mut Tensor;

struct Buffer {
    host: *mut u8,
    bytes: usize,
    /// Where the tensor begins in the device buffer: as far from a multiple of 64 as on the host.
    offset: usize,
    device: CudaSlice<u8>,
}

/// A host problem's tensors in device memory, with the same strides and the same alignment.
pub struct Mirror {
    /// The problem with device pointers.
    pub params: Params,
    stream: Arc<CudaStream>,
    buffers: Vec<Buffer>,
}

impl Mirror {
    /// Copies every tensor of `host` to the device.
    ///
    /// # Safety
    /// The tensors are as large as described.
    pub unsafe fn new(gpu: &Gpu, host: &Params) -> Result<Mirror> {
        let mut mirror = Mirror { params: *host, stream: gpu.stream.clone(), buffers: Vec::new() };
        let slots = (host.n_snapshots as usize, host.snapshot_stride);
        let tensors: [(Field, (usize, usize)); 12] = [
            (|p| &mut p.q, (1, 0)),
            (|p| &mut p.k, (1, 0)),
            (|p| &mut p.v, (1, 0)),
            (|p| &mut p.g, (1, 0)),
            (|p| &mut p.beta, (1, 0)),
            (|p| &mut p.state_in, (1, 0)),
            (|p| &mut p.rows_in, (1, 0)),
            (|p| &mut p.rows_out, (1, 0)),
            (|p| &mut p.cu_seqlens, (1, 0)),
            (|p| &mut p.out, (1, 0)),
            (|p| &mut p.state_out, (1, 0)),
            (|p| &mut p.snapshots, slots),
        ];
        for (tensor, slots) in tensors {
            let tensor = tensor(&mut mirror.params);
            if tensor.data.is_null() {
                continue;
            }
            let in_place = mirror.buffers.iter().find(|buffer| buffer.host == tensor.data.cast());
            let address = match in_place {
                Some(buffer) => buffer.address(&mirror.stream),
                None => {
                    // SAFETY: passed on.
                    let buffer = unsafe { Buffer::upload(&mirror.stream, tensor, slots)? };
                    let address = buffer.address(&mirror.stream);
                    mirror.buffers.push(buffer);
                    address
                }
            };
            tensor.data = address;
        }
        mirror.stream.synchronize()?;
        Ok(mirror)
    }

    /// Copies every tensor back to where it came from; fails if the memory around one was written to.
    ///
    /// # Safety
    /// The host tensors are still there, and nobody else looks at them.
    pub unsafe fn download(&self) -> Result<()> {
        self.stream.synchronize()?;
        for buffer in &self.buffers {
            let all = self.stream.clone_dtoh(&buffer.device)?;
            self.stream.synchronize()?;
            let (before, rest) = all.split_at(buffer.offset);
            let (tensor, after) = rest.split_at(buffer.bytes);
            let intact = before.iter().chain(after).all(|byte| *byte == GUARD_BYTE);
            ensure!(intact, "device memory beside a tensor of {} bytes was written to", buffer.bytes);
            // SAFETY: passed on.
            unsafe { std::ptr::copy_nonoverlapping(tensor.as_ptr(), buffer.host, buffer.bytes) };
        }
        Ok(())
    }
}

impl Buffer {
    unsafe fn upload(stream: &Arc<CudaStream>, tensor: &Tensor, (slots, stride): (usize, usize)) -> Result<Buffer> {
        let host: *mut u8 = tensor.data.cast();
        let size = [Dtype::F32, Dtype::F16, Dtype::Bf16, Dtype::I32, Dtype::I64]
            .into_iter()
            .find(|dtype| *dtype as u32 == tensor.dtype)
            .context("a tensor has no dtype")?
            .size();
        let extents = || tensor.ne.iter().zip(tensor.nb).map(|(ne, nb)| (*ne as usize, nb)).chain([(slots, stride)]);
        let empty = extents().any(|(ne, _)| ne == 0);
        let bytes = if empty { 0 } else { extents().map(|(ne, nb)| (ne - 1) * nb).sum::<usize>() + size };
        let offset = GUARD + host as usize % 64;
        let mut all = vec![GUARD_BYTE; bytes + 2 * GUARD + 64];
        // SAFETY: passed on; what lies between strided elements is inside the tensor's span.
        unsafe { std::ptr::copy_nonoverlapping(host, all[offset..].as_mut_ptr(), bytes) };
        Ok(Buffer { host, bytes, offset, device: stream.clone_htod(&all)? })
    }

    fn address(&self, stream: &CudaStream) -> *mut c_void {
        let (address, _guard) = self.device.device_ptr(stream);
        (address as usize + self.offset) as *mut c_void
    }
}

/// Queues a problem in device memory on the stream, with a workspace of its own, which must live until the stream has
/// done the work.
///
/// # Safety
/// As for [`deltanet::cuda::run`].
pub unsafe fn queue(gpu: &Gpu, params: &Params) -> Result<CudaSlice<u8>> {
    // SAFETY: at a device, nothing is read.
    let problem = unsafe { deltanet::Problem::at(params, deltanet::problem::Place::Device)? };
    let bytes = deltanet::cuda::workspace_size(&problem)?;
    // Garbage, as a caller's would be.
    let workspace = gpu.stream.clone_htod(&vec![0xffu8; bytes.max(1)])?;
    let address = workspace.device_ptr(&gpu.stream).0 as *mut c_void;
    // SAFETY: passed on.
    unsafe { deltanet::cuda::run(&problem, address, bytes, gpu.raw_stream())? };
    Ok(workspace)
}

/// Runs the mirrored problem on the stream with a workspace of its own, and waits.
///
/// # Safety
/// As for [`deltanet::cuda::run`].
pub unsafe fn run(gpu: &Gpu, mirror: &Mirror) -> Result<()> {
    // SAFETY: passed on; the workspace lives until the stream is done.
    let _workspace = unsafe { queue(gpu, &mirror.params)? };
    gpu.stream.synchronize()?;
    Ok(())
}
