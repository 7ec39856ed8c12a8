//! ggml's own operator as a peer, through its public API and with a thread pool that stays.

use super::case::Case;
use anyhow::{Context, Result, bail, ensure};
use deltanet::cpu::Isa;
use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};
use std::ffi::c_void;
use std::path::{Path, PathBuf};
use std::ptr::null_mut;

type Pointer = *mut c_void;

#[repr(C)]
struct InitParams {
    mem_size: usize,
    mem_buffer: Pointer,
    no_alloc: bool,
}

/// The libraries of a llama.cpp, loaded.
pub struct Ggml {
    base: Library,
    cpu: Library,
}

/// A graph of one operator, ready to run.
pub struct Graph<'a> {
    ggml: &'a Ggml,
    context: Pointer,
    graph: Pointer,
    backend: Pointer,
    buffer: Pointer,
    pool: Pointer,
}

/// A function of a library, called with the given argument types.
macro_rules! call {
    ($library:expr, $name:literal, ($($kind:ty),*) $(-> $result:ty)?, ($($argument:expr),*)) => {{
        // SAFETY: the signature is that of ggml.h, ggml-cpu.h or ggml-backend.h, the same in all releases with this
        // operator; arguments are live objects of the library.
        unsafe {
            let function = $library
                .get::<unsafe extern "C" fn($($kind),*) $(-> $result)?>($name)
                .with_context(|| format!("ggml has no {}", String::from_utf8_lossy($name)))?;
            function($($argument),*)
        }
    }};
}

/// The file in `folder` whose name begins with `stem`, the shortest name if there are several.
fn find(folder: &Path, stem: &str) -> Result<Option<PathBuf>> {
    let mut found: Vec<PathBuf> = std::fs::read_dir(folder)
        .with_context(|| format!("{} cannot be read", folder.display()))?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| {
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            name.strip_prefix(stem).is_some_and(|rest| rest == ".so" || rest.starts_with(".so."))
        })
        .collect();
    found.sort_by_key(|path| path.as_os_str().len());
    Ok(found.into_iter().next())
}

impl Ggml {
    /// Loads ggml from `folder`: the build of its CPU backend that is nearest to `isa`.
    pub fn load(folder: &Path, isa: Isa) -> Result<Ggml> {
        let builds: &[&str] = match isa {
            Isa::Scalar => &["libggml-cpu-x64", "libggml-cpu"],
            Isa::Avx2 => &["libggml-cpu-haswell", "libggml-cpu"],
            Isa::Avx512 => &["libggml-cpu-zen4", "libggml-cpu-skylakex", "libggml-cpu"],
        };
        let mut cpu = None;
        for build in builds {
            cpu = cpu.or(find(folder, build)?);
        }
        let (Some(base), Some(cpu)) = (find(folder, "libggml-base")?, cpu) else {
            bail!("{} has no libggml-base.so with one of {builds:?}", folder.display());
        };
        // SAFETY: loading runs the libraries' initialisers, which is what the user asks for by naming the folder.
        unsafe {
            let open = |path: &Path| {
                Library::open(Some(path), RTLD_NOW | RTLD_GLOBAL)
                    .with_context(|| format!("{} does not load", path.display()))
            };
            // The base first: the CPU backend then finds it under its own name.
            let base = open(&base)?;
            Ok(Ggml { cpu: open(&cpu)?, base })
        }
    }

    /// The operator on a copy of the case's tensors.
    pub fn graph(&self, case: &Case, threads: usize) -> Result<Graph<'_>> {
        let shape = &case.shape;
        let (s, hk, hv) = (shape.head_size as i64, shape.key_heads as i64, shape.value_heads as i64);
        let (t, b) = (shape.tokens as i64, shape.sequences as i64);
        // Tensors get memory from the backend, aligned as an engine has them; the context holds their descriptions.
        let params = InitParams { mem_size: 4 << 20, mem_buffer: null_mut(), no_alloc: true };
        call!(self.cpu, b"ggml_cpu_init", (), ());
        let context = call!(self.base, b"ggml_init", (InitParams) -> Pointer, (params));
        let tensor = |ne: [i64; 4]| -> Result<Pointer> {
            const F32: i32 = 0;
            Ok(call!(
                self.base, b"ggml_new_tensor_4d", (Pointer, i32, i64, i64, i64, i64) -> Pointer,
                (context, F32, ne[0], ne[1], ne[2], ne[3])
            ))
        };
        let q = tensor([s, hk, t, b])?;
        let k = tensor([s, hk, t, b])?;
        let v = tensor([s, hv, t, b])?;
        let g = tensor([shape.gate_channels() as i64, hv, t, b])?;
        let beta = tensor([1, hv, t, b])?;
        let state = tensor([s, s, hv, b])?;
        // Releases without snapshots have no last argument, and do not see it.
        let result = call!(
            self.base, b"ggml_gated_delta_net",
            (Pointer, Pointer, Pointer, Pointer, Pointer, Pointer, Pointer, i64) -> Pointer,
            (context, q, k, v, g, beta, state, 1)
        );
        let graph = call!(self.base, b"ggml_new_graph", (Pointer) -> Pointer, (context));
        call!(self.base, b"ggml_build_forward_expand", (Pointer, Pointer), (graph, result));
        let backend = call!(self.cpu, b"ggml_backend_cpu_init", () -> Pointer, ());
        let buffer =
            call!(self.base, b"ggml_backend_alloc_ctx_tensors", (Pointer, Pointer) -> Pointer, (context, backend));
        ensure!(!buffer.is_null(), "ggml could not allocate the tensors");
        let inputs = [(q, &case.q), (k, &case.k), (v, &case.v), (g, &case.g), (beta, &case.beta), (state, &case.state)];
        for (tensor, data) in inputs {
            let data: &[f32] = data;
            let to = call!(self.base, b"ggml_get_data", (Pointer) -> Pointer, (tensor));
            // SAFETY: the tensor was made with as many elements, in memory of the CPU backend.
            unsafe { std::ptr::copy_nonoverlapping(data.as_ptr(), to.cast(), data.len()) };
        }
        // ggml_threadpool_params: larger than any release's.
        let mut pool_params = [0u64; 256];
        let pool_params: Pointer = pool_params.as_mut_ptr().cast();
        call!(self.base, b"ggml_threadpool_params_init", (Pointer, i32), (pool_params, threads as i32));
        let pool = call!(self.cpu, b"ggml_threadpool_new", (Pointer) -> Pointer, (pool_params));
        call!(self.cpu, b"ggml_backend_cpu_set_n_threads", (Pointer, i32), (backend, threads as i32));
        call!(self.cpu, b"ggml_backend_cpu_set_threadpool", (Pointer, Pointer), (backend, pool));
        Ok(Graph { ggml: self, context, graph, backend, buffer, pool })
    }
}

impl Graph<'_> {
    /// One run.
    pub fn run(&self) -> Result<()> {
        let (backend, graph) = (self.backend, self.graph);
        let status = call!(self.ggml.base, b"ggml_backend_graph_compute", (Pointer, Pointer) -> i32, (backend, graph));
        ensure!(status == 0, "ggml's run failed with status {status}");
        Ok(())
    }

    fn free(&self) -> Result<()> {
        call!(self.ggml.base, b"ggml_backend_buffer_free", (Pointer), (self.buffer));
        call!(self.ggml.base, b"ggml_backend_free", (Pointer), (self.backend));
        call!(self.ggml.cpu, b"ggml_threadpool_free", (Pointer), (self.pool));
        call!(self.ggml.base, b"ggml_free", (Pointer), (self.context));
        Ok(())
    }
}

impl Drop for Graph<'_> {
    fn drop(&mut self) {
        if let Err(error) = self.free() {
            eprintln!("deltanet: {error:#}");
        }
    }
}
