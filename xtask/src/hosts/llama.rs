//! One llama.cpp in this process, loaded from a folder: what `cargo xtask host` runs.
//!
//! Its functions are looked up by name, so one driver serves every version. The parameter structs differ between
//! versions in their later fields: they travel as opaque bytes, which is how C passes large structs by value anyway,
//! and only the leading fields, the same in all versions tried, are set.

use anyhow::{Context as _, Result, bail, ensure};
use libloading::Library;
use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

/// Room for the largest parameter struct.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Blob([u32; 192]);

/// `llama_batch`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Batch {
    n_tokens: i32,
    token: *mut i32,
    embd: *mut f32,
    pos: *mut i32,
    n_seq_id: *mut i32,
    seq_id: *mut *mut i32,
    logits: *mut i8,
}

/// Indices of 32-bit fields in `llama_context_params`.
const N_CTX: usize = 0;
const N_BATCH: usize = 1;
const N_UBATCH: usize = 2;
const N_SEQ_MAX: usize = 3;
/// Where the version exports `llama_n_rs_seq`.
const N_RS_SEQ: usize = 4;

/// Index of the first half of a pointer in `llama_model_params`, in the one version whose models are split here.
const TENSOR_SPLIT: usize = 10;

/// The libraries of one llama.cpp.
pub struct Llama {
    llama: Library,
    pub ggml: Library,
}

/// A model in memory.
pub struct Model<'a> {
    llama: &'a Llama,
    model: *mut c_void,
    vocabulary: usize,
}

/// What one run produced.
pub struct Run {
    pub tokens: Vec<i32>,
    pub logits: Vec<f32>,
}

static LINES: Mutex<Vec<String>> = Mutex::new(Vec::new());
static PRINT: AtomicBool = AtomicBool::new(false);

/// Keeps the plugin's lines and everything from warnings up.
unsafe extern "C" fn keep_log(level: c_int, text: *const c_char, _: *mut c_void) {
    // SAFETY: the engine passes a C string.
    let text = unsafe { CStr::from_ptr(text) }.to_string_lossy();
    if std::env::var_os("VERBOSE").is_some() {
        eprint!("{text}");
    }
    let is_ours = text.starts_with("deltanet: ");
    if is_ours && PRINT.load(Ordering::Relaxed) {
        println!("log: {}", text.trim_end());
    }
    if let (true, Ok(mut lines)) = (is_ours || level == 4, LINES.lock()) {
        lines.push(text.trim_end().to_owned());
    }
}

/// Prints the plugin's lines as they come, for a process that does not end by itself.
pub fn print_log() {
    PRINT.store(true, Ordering::Relaxed);
}

/// The log lines so far, and forgets them.
pub fn take_log() -> Vec<String> {
    LINES.lock().map(|mut lines| std::mem::take(&mut *lines)).unwrap_or_default()
}

/// Calls a function of a library by name, with the signature given.
macro_rules! call {
    ($library:expr, $name:expr, fn($($type:ty),*) $(-> $result:ty)?, $($argument:expr),*) => {{
        // SAFETY: the name has this signature in every version that the tests pin.
        let function = unsafe { $library.get::<unsafe extern "C" fn($($type),*) $(-> $result)?>($name) };
        let function = function.with_context(|| format!("{} is missing", String::from_utf8_lossy($name)))?;
        // SAFETY: as above; the arguments are the caller's to answer for, as in C.
        unsafe { function($($argument),*) }
    }};
}
pub(crate) use call;

/// The library in `folder` whose name starts so.
fn find(folder: &Path, stem: &str) -> Result<PathBuf> {
    let mut found: Vec<PathBuf> = std::fs::read_dir(folder)?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| {
            let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            name.strip_prefix(stem).is_some_and(|rest| rest.starts_with('.')) && name.contains(".so")
        })
        .collect();
    found.sort();
    found.into_iter().next().with_context(|| format!("no {stem} in {}", folder.display()))
}

impl Llama {
    /// Loads the libraries in `folder` and their backends, and the plugin that `GGML_BACKEND_PATH` names.
    pub fn load(folder: &Path) -> Result<Llama> {
        // SAFETY: the engine's libraries; their initialisers are meant to run on load.
        let (llama, ggml) =
            unsafe { (Library::new(find(folder, "libllama")?)?, Library::new(find(folder, "libggml")?)?) };
        let loaded = Llama { llama, ggml };
        type Log = unsafe extern "C" fn(c_int, *const c_char, *mut c_void);
        call!(loaded.llama, b"llama_log_set", fn(Log, *mut c_void), keep_log, std::ptr::null_mut());
        let path = CString::new(folder.to_string_lossy().as_bytes())?;
        call!(loaded.ggml, b"ggml_backend_load_all_from_path", fn(*const c_char), path.as_ptr());
        call!(loaded.llama, b"llama_backend_init", fn(),);
        Ok(loaded)
    }

    /// Unloads the plugin, as a host may at any time.
    pub fn unload_plugin(&self) -> Result<()> {
        let registry =
            call!(self.ggml, b"ggml_backend_reg_by_name", fn(*const c_char) -> *mut c_void, c"deltanet".as_ptr());
        ensure!(!registry.is_null(), "the plugin is not registered");
        call!(self.ggml, b"ggml_backend_unload", fn(*mut c_void), registry);
        let registry =
            call!(self.ggml, b"ggml_backend_reg_by_name", fn(*const c_char) -> *mut c_void, c"deltanet".as_ptr());
        ensure!(registry.is_null(), "the plugin is still registered");
        Ok(())
    }

    /// A function of the RPC backend; the library that has it is loaded with the others.
    fn rpc_function<F: Copy>(&self, name: &CStr) -> Result<F> {
        let registry = call!(self.ggml, b"ggml_backend_reg_by_name", fn(*const c_char) -> *mut c_void, c"RPC".as_ptr());
        ensure!(!registry.is_null(), "this llama.cpp has no RPC backend");
        let function = call!(
            self.ggml,
            b"ggml_backend_reg_get_proc_address",
            fn(*mut c_void, *const c_char) -> *mut c_void,
            registry,
            name.as_ptr()
        );
        ensure!(!function.is_null(), "the RPC backend has no {}", name.to_string_lossy());
        const { assert!(size_of::<F>() == size_of::<*mut c_void>()) };
        // SAFETY: a function pointer in a type of its size; the callers give the name's signature.
        Ok(unsafe { std::mem::transmute_copy(&function) })
    }

    /// Makes an RPC server's devices devices of this process.
    pub fn add_server(&self, endpoint: &str) -> Result<()> {
        type Add = unsafe extern "C" fn(*const c_char) -> *mut c_void;
        let add: Add = self.rpc_function(c"ggml_backend_rpc_add_server")?;
        let name = CString::new(endpoint)?;
        // SAFETY: the RPC backend's function of that name; a C string.
        let registry = unsafe { add(name.as_ptr()) };
        ensure!(!registry.is_null(), "no RPC server at {endpoint}");
        call!(self.ggml, b"ggml_backend_register", fn(*mut c_void), registry);
        Ok(())
    }

    /// Serves the CPU device to RPC clients, until the process is ended.
    pub fn serve(&self, endpoint: &str) -> Result<()> {
        type Start = unsafe extern "C" fn(*const c_char, *const c_char, usize, usize, *mut *mut c_void);
        let start: Start = self.rpc_function(c"ggml_backend_rpc_start_server")?;
        let mut device = call!(self.ggml, b"ggml_backend_dev_by_type", fn(c_int) -> *mut c_void, 0);
        let name = CString::new(endpoint)?;
        // SAFETY: the RPC backend's function of that name: C strings, one thread, one device.
        unsafe { start(name.as_ptr(), std::ptr::null(), 1, 1, &raw mut device) };
        bail!("the RPC server at {endpoint} ended")
    }

    /// Reads a model; `shares` says which part of the layers each of several devices gets.
    pub fn model(&self, path: &Path, shares: &[f32]) -> Result<Model<'_>> {
        // llama.cpp reads as many shares as it can have devices.
        let mut split = [0f32; 64];
        split[..shares.len()].copy_from_slice(shares);
        let mut params = call!(self.llama, b"llama_model_default_params", fn() -> Blob,);
        if !shares.is_empty() {
            let address = split.as_ptr() as usize as u64;
            (params.0[TENSOR_SPLIT], params.0[TENSOR_SPLIT + 1]) = (address as u32, (address >> 32) as u32);
        }
        let file = CString::new(path.to_string_lossy().as_bytes())?;
        let load = b"llama_model_load_from_file";
        let model = call!(
            self.llama,
            b"llama_model_load_from_file",
            fn(*const c_char, Blob) -> *mut c_void,
            file.as_ptr(),
            params
        );
        ensure!(!model.is_null(), "{}: {}\n{}", String::from_utf8_lossy(load), path.display(), take_log().join("\n"));
        let vocabulary = call!(self.llama, b"llama_model_get_vocab", fn(*mut c_void) -> *mut c_void, model);
        let count = call!(self.llama, b"llama_vocab_n_tokens", fn(*mut c_void) -> i32, vocabulary);
        Ok(Model { llama: self, model, vocabulary: count as usize })
    }
}

impl Drop for Model<'_> {
    fn drop(&mut self) {
        let free = || -> Result<()> {
            call!(self.llama.llama, b"llama_model_free", fn(*mut c_void), self.model);
            Ok(())
        };
        // A version without the function leaks the model until the process ends.
        let _ = free();
    }
}

/// What a context is made for.
#[derive(Clone, Copy)]
pub struct Shape {
    pub sequences: usize,
    pub tokens: usize,
    /// How many rollback states llama.cpp keeps (K - 1), where it can.
    pub rollback: usize,
}

/// A context: one or more sequences of a model.
pub struct Context<'a> {
    model: &'a Model<'a>,
    context: *mut c_void,
    batch: Batch,
    capacity: usize,
}

impl<'a> Model<'a> {
    /// Makes a context; `None` where rollback states are asked for and this version keeps none.
    pub fn context(&'a self, shape: Shape) -> Result<Option<Context<'a>>> {
        let library = &self.llama.llama;
        let mut params = call!(library, b"llama_context_default_params", fn() -> Blob,);
        let capacity = shape.tokens * shape.sequences;
        params.0[N_CTX] = (shape.sequences * shape.tokens.next_multiple_of(256)) as u32;
        params.0[N_BATCH] = capacity as u32;
        params.0[N_UBATCH] = 512;
        params.0[N_SEQ_MAX] = shape.sequences as u32;
        if shape.rollback > 0 {
            // SAFETY: the symbol is only looked up.
            if unsafe { library.get::<unsafe extern "C" fn()>(b"llama_n_rs_seq") }.is_err() {
                return Ok(None);
            }
            params.0[N_RS_SEQ] = shape.rollback as u32;
        }
        let context =
            call!(library, b"llama_init_from_model", fn(*mut c_void, Blob) -> *mut c_void, self.model, params);
        ensure!(!context.is_null(), "llama_init_from_model failed\n{}", take_log().join("\n"));
        if shape.rollback > 0 {
            let kept = call!(library, b"llama_n_rs_seq", fn(*mut c_void) -> u32, context);
            if kept as usize != shape.rollback {
                call!(library, b"llama_free", fn(*mut c_void), context);
                return Ok(None);
            }
        }
        let batch = call!(library, b"llama_batch_init", fn(i32, i32, i32) -> Batch, capacity as i32, 0, 1);
        Ok(Some(Context { model: self, context, batch, capacity }))
    }
}

impl Drop for Context<'_> {
    fn drop(&mut self) {
        let free = || -> Result<()> {
            call!(self.model.llama.llama, b"llama_batch_free", fn(Batch), self.batch);
            call!(self.model.llama.llama, b"llama_free", fn(*mut c_void), self.context);
            Ok(())
        };
        // Looked up by name when the context was made; a failure here leaks until the process ends.
        let _ = free();
    }
}

/// One token of a batch.
#[derive(Clone, Copy)]
pub struct Item {
    pub token: i32,
    pub position: usize,
    pub sequence: usize,
    pub wants_logits: bool,
}

impl Context<'_> {
    /// Sets the thread count of later calls.
    pub fn set_threads(&self, threads: usize) -> Result<()> {
        let threads = threads as i32;
        let library = &self.model.llama.llama;
        call!(library, b"llama_set_n_threads", fn(*mut c_void, i32, i32), self.context, threads, threads);
        Ok(())
    }

    /// Forgets all sequences.
    pub fn clear(&self) -> Result<()> {
        let library = &self.model.llama.llama;
        let memory = call!(library, b"llama_get_memory", fn(*mut c_void) -> *mut c_void, self.context);
        call!(library, b"llama_memory_clear", fn(*mut c_void, bool), memory, true);
        Ok(())
    }

    /// Makes sequence `to` a copy of sequence `from`.
    pub fn copy_sequence(&self, from: usize, to: usize) -> Result<()> {
        let library = &self.model.llama.llama;
        let memory = call!(library, b"llama_get_memory", fn(*mut c_void) -> *mut c_void, self.context);
        let (from, to) = (from as i32, to as i32);
        call!(library, b"llama_memory_seq_rm", fn(*mut c_void, i32, i32, i32) -> bool, memory, to, -1, -1);
        call!(library, b"llama_memory_seq_cp", fn(*mut c_void, i32, i32, i32, i32), memory, from, to, -1, -1);
        Ok(())
    }

    /// Computes a batch.
    pub fn decode(&mut self, items: &[Item]) -> Result<()> {
        ensure!(items.len() <= self.capacity, "the batch holds {} tokens", self.capacity);
        self.batch.n_tokens = items.len() as i32;
        for (at, item) in items.iter().enumerate() {
            // SAFETY: llama_batch_init made arrays of `capacity` elements, with one sequence each.
            unsafe {
                *self.batch.token.add(at) = item.token;
                *self.batch.pos.add(at) = item.position as i32;
                *self.batch.n_seq_id.add(at) = 1;
                **self.batch.seq_id.add(at) = item.sequence as i32;
                *self.batch.logits.add(at) = i8::from(item.wants_logits);
            }
        }
        let library = &self.model.llama.llama;
        let status = call!(library, b"llama_decode", fn(*mut c_void, Batch) -> i32, self.context, self.batch);
        if status != 0 {
            bail!("llama_decode answered {status}\n{}", take_log().join("\n"));
        }
        call!(library, b"llama_synchronize", fn(*mut c_void), self.context);
        Ok(())
    }

    /// The logits of the batch's item `at`.
    pub fn logits(&self, at: usize) -> Result<&[f32]> {
        let library = &self.model.llama.llama;
        let logits =
            call!(library, b"llama_get_logits_ith", fn(*mut c_void, i32) -> *const f32, self.context, at as i32);
        ensure!(!logits.is_null(), "no logits for item {at}");
        // SAFETY: one row of the vocabulary's size, valid until the next decode, which needs `&mut self`.
        Ok(unsafe { std::slice::from_raw_parts(logits, self.model.vocabulary) })
    }

    /// A prompt in every sequence, then greedy tokens; all logits on the way.
    pub fn generate(&mut self, sequences: usize, prompt: usize, count: usize) -> Result<Run> {
        self.clear()?;
        let token = |sequence: usize, at: usize| (7 + sequence * 131 + at * 37 + at * at % 101) as i32 % 256;
        let mut items = Vec::new();
        for sequence in 0..sequences {
            items.extend((0..prompt).map(|at| Item {
                token: token(sequence, at),
                position: at,
                sequence,
                wants_logits: at + 1 == prompt,
            }));
        }
        let mut run = Run { tokens: Vec::new(), logits: Vec::new() };
        for step in 0..count {
            self.decode(&items)?;
            let wanted: Vec<(usize, usize)> = items
                .iter()
                .enumerate()
                .filter(|(_, item)| item.wants_logits)
                .map(|(at, item)| (at, item.sequence))
                .collect();
            let mut next = Vec::new();
            for (at, sequence) in wanted {
                let logits = self.logits(at)?;
                let best = (0..logits.len()).max_by(|a, b| logits[*a].total_cmp(&logits[*b])).unwrap_or(0);
                run.logits.extend(logits);
                run.tokens.push(best as i32);
                next.push(Item { token: best as i32, position: prompt + step, sequence, wants_logits: true });
            }
            items = next;
        }
        Ok(run)
    }
}
