//! Small ggml graphs around the operator, one for each reason to fuse the state's way or to leave it alone.
//!
//! Every graph is computed with and without the plugin in processes of their own; the results must agree, and with the
//! plugin its counters must say what was fused. So a fusion that should not have happened shows twice.

use super::llama::{Llama, call};
use super::model::Random;
use anyhow::{Context, Result, ensure};
use std::ffi::{c_int, c_void};

type Node = *mut c_void;

const TYPE_F32: c_int = 0;
const TYPE_I32: c_int = 26;

/// Rows of the cache; rows of one rollback group.
const CELLS: usize = 36;
const GROUP: usize = 12;
/// First row that the sequences write.
const HEAD: usize = 2;
const HEAD_SIZE: usize = 32;
const KEY_HEADS: usize = 2;
const VALUE_HEADS: usize = 4;
const STATE: usize = HEAD_SIZE * HEAD_SIZE * VALUE_HEADS;

/// What is special about a graph.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Twist {
    /// llama.cpp's own form.
    None,
    /// The ids come out of an operation of the same graph.
    ComputedIds,
    /// The operator's result is an output.
    OutputResult,
    /// The gathered rows are an output.
    OutputGather,
    /// Something else reads the gathered rows.
    GatherRead,
    /// Something else reads the new states.
    StatesRead,
    /// A row is written between the gather and the operator.
    WrittenBetween,
    /// The target is read between the operator and the copy.
    ReadBetween,
    /// An eval callback asks for the operator's result, so that the copy is in another part of the graph.
    CallbackAtResult,
    /// An eval callback asks for the gathered rows.
    CallbackAtGather,
    /// All tensors are in a buffer whose type says that it is not host memory, as a GPU's does.
    ForeignMemory,
}

/// A graph, and what the plugin may do in it.
pub struct Case {
    pub name: &'static str,
    tokens: usize,
    rows: &'static [i32],
    snapshots: usize,
    channel_gate: bool,
    twist: Twist,
    /// Whether the read and the write are to be fused.
    pub read: bool,
    pub write: bool,
    /// Whether the node is the plugin's at all.
    pub taken: bool,
}

impl Case {
    /// Whether it needs K.
    pub fn needs_snapshots(&self) -> bool {
        self.snapshots > 1
    }
}

const fn case(name: &'static str, rows: &'static [i32], twist: Twist, read: bool, write: bool) -> Case {
    Case { name, tokens: 5, rows, snapshots: 1, channel_gate: false, twist, read, write, taken: true }
}

/// Rows 2, 3, 4 are written.
const IN_PLACE: &[i32] = &[2, 3, 4];

/// All graphs.
pub const CASES: &[Case] = &[
    case("in place", IN_PLACE, Twist::None, true, true),
    case("rows elsewhere", &[9, 5, 7], Twist::None, true, true),
    case("one row for all", &[8, 8, 8], Twist::None, true, true),
    Case { tokens: 1, ..case("one token", IN_PLACE, Twist::None, true, true) },
    Case { channel_gate: true, ..case("channel gate", IN_PLACE, Twist::None, true, true) },
    Case { channel_gate: true, tokens: 1, ..case("channel gate, one token", &[2], Twist::None, true, true) },
    // Sequence 0 writes row 2, which sequence 1 reads: only one of the two can be moved.
    case("rows alias across sequences", &[3, 2, 4], Twist::None, false, true),
    case("ids computed in the graph", IN_PLACE, Twist::ComputedIds, false, true),
    case("result is an output", IN_PLACE, Twist::OutputResult, true, false),
    case("gathered rows are an output", IN_PLACE, Twist::OutputGather, false, true),
    case("gathered rows read elsewhere", IN_PLACE, Twist::GatherRead, false, true),
    case("new states read elsewhere", IN_PLACE, Twist::StatesRead, true, false),
    case("rows written in between", IN_PLACE, Twist::WrittenBetween, false, true),
    case("target read in between", IN_PLACE, Twist::ReadBetween, true, false),
    case("eval callback at the result", IN_PLACE, Twist::CallbackAtResult, true, false),
    case("eval callback at the gather", IN_PLACE, Twist::CallbackAtGather, false, true),
    Case { taken: false, ..case("memory of another device", IN_PLACE, Twist::ForeignMemory, false, false) },
    Case { snapshots: 3, ..case("snapshots, in place", IN_PLACE, Twist::None, true, true) },
    Case { snapshots: 3, tokens: 2, ..case("snapshots, fewer tokens than slots", IN_PLACE, Twist::None, true, true) },
    // After a rollback the row read is in the group that slot 1 goes to: the gather has to come first.
    Case { snapshots: 3, ..case("snapshots, rows in another group", &[14, 15, 16], Twist::None, false, true) },
    Case { snapshots: 3, ..case("snapshots, result is an output", IN_PLACE, Twist::OutputResult, true, false) },
];

/// ggml's functions on one context.
struct Ggml<'a> {
    host: &'a Llama,
    context: *mut c_void,
}

#[repr(C)]
struct InitParams {
    size: usize,
    buffer: *mut c_void,
    no_alloc: bool,
}

impl Ggml<'_> {
    fn tensor(&self, kind: c_int, ne: [usize; 4]) -> Result<Node> {
        let [a, b, c, d] = ne.map(|ne| ne as i64);
        Ok(call!(
            self.host.ggml,
            b"ggml_new_tensor_4d",
            fn(*mut c_void, c_int, i64, i64, i64, i64) -> Node,
            self.context,
            kind,
            a,
            b,
            c,
            d
        ))
    }

    /// A view with strides of whole rows of `row` bytes.
    fn view(&self, of: Node, ne: [usize; 4], nb: [usize; 3], offset: usize) -> Result<Node> {
        let [a, b, c, d] = ne.map(|ne| ne as i64);
        Ok(call!(
            self.host.ggml,
            b"ggml_view_4d",
            fn(*mut c_void, Node, i64, i64, i64, i64, usize, usize, usize, usize) -> Node,
            self.context,
            of,
            a,
            b,
            c,
            d,
            nb[0],
            nb[1],
            nb[2],
            offset
        ))
    }

    fn scale(&self, of: Node, in_place: bool) -> Result<Node> {
        Ok(if in_place {
            call!(self.host.ggml, b"ggml_scale_inplace", fn(*mut c_void, Node, f32) -> Node, self.context, of, 0.5)
        } else {
            call!(self.host.ggml, b"ggml_scale", fn(*mut c_void, Node, f32) -> Node, self.context, of, 0.5)
        })
    }

    fn pair(&self, name: &[u8], a: Node, b: Node) -> Result<Node> {
        Ok(call!(self.host.ggml, name, fn(*mut c_void, Node, Node) -> Node, self.context, a, b))
    }

    /// The operator; hosts without K do not look at it.
    fn operator(&self, [q, k, v, g, beta, state]: [Node; 6], snapshots: usize) -> Result<Node> {
        Ok(call!(
            self.host.ggml,
            b"ggml_gated_delta_net",
            fn(*mut c_void, Node, Node, Node, Node, Node, Node, i64) -> Node,
            self.context,
            q,
            k,
            v,
            g,
            beta,
            state,
            snapshots as i64
        ))
    }

    fn mark(&self, name: &[u8], tensor: Node) -> Result<()> {
        call!(self.host.ggml, name, fn(Node), tensor);
        Ok(())
    }

    fn set<T>(&self, tensor: Node, data: &[T]) -> Result<()> {
        let size = size_of_val(data);
        call!(
            self.host.ggml,
            b"ggml_backend_tensor_set",
            fn(Node, *const c_void, usize, usize),
            tensor,
            data.as_ptr().cast(),
            0,
            size
        );
        Ok(())
    }

    fn get(&self, tensor: Node, length: usize) -> Result<Vec<f32>> {
        let mut data = vec![f32::NAN; length];
        call!(
            self.host.ggml,
            b"ggml_backend_tensor_get",
            fn(Node, *mut c_void, usize, usize),
            tensor,
            data.as_mut_ptr().cast(),
            0,
            length * 4
        );
        Ok(data)
    }
}

/// The tensor at which an eval callback stops the graph.
static STOP: std::sync::atomic::AtomicUsize = std::sync::atomic::AtomicUsize::new(0);

unsafe extern "C" fn stop_at(tensor: Node, ask: bool, _: *mut c_void) -> bool {
    !ask || tensor as usize == STOP.load(std::sync::atomic::Ordering::Relaxed)
}

/// Whether the host's operator has K: then a node for more snapshots has room for them.
pub fn has_snapshots(host: &Llama) -> Result<bool> {
    let memory = InitParams { size: 1 << 20, buffer: std::ptr::null_mut(), no_alloc: true };
    let context = call!(host.ggml, b"ggml_init", fn(InitParams) -> *mut c_void, memory);
    let g = Ggml { host, context };
    let elements = |snapshots| -> Result<i64> {
        let qkv = || g.tensor(TYPE_F32, [HEAD_SIZE, 1, 1, 1]);
        let scalar = || g.tensor(TYPE_F32, [1, 1, 1, 1]);
        let state = g.tensor(TYPE_F32, [HEAD_SIZE, HEAD_SIZE, 1, 1])?;
        let result = g.operator([qkv()?, qkv()?, qkv()?, scalar()?, scalar()?, state], snapshots)?;
        Ok(call!(host.ggml, b"ggml_nelements", fn(Node) -> i64, result))
    };
    let has = elements(2)? > elements(1)?;
    call!(host.ggml, b"ggml_free", fn(*mut c_void), context);
    Ok(has)
}

/// Stands in for `is_host` of a buffer type.
unsafe extern "C" fn not_host(_: *mut c_void) -> bool {
    false
}

/// A buffer's type, exchanged for a copy that says that its memory is not the host's.
struct Foreign {
    place: *mut *mut c_void,
    original: *mut c_void,
    _copy: Box<[*mut c_void; 10]>,
}

impl Foreign {
    /// Buffer types are six functions, a device and a context; plugin API 3 put two functions before `is_host`.
    fn new(host: &Llama, buffer: *mut c_void) -> Result<Foreign> {
        let original = call!(host.ggml, b"ggml_backend_buffer_get_type", fn(*mut c_void) -> *mut c_void, buffer);
        // SAFETY: the symbol is only looked up.
        let newer = unsafe { host.ggml.get::<unsafe extern "C" fn()>(b"ggml_backend_buft_alloc_buffer_n") }.is_ok();
        let (words, is_host) = if newer { (10, 7) } else { (8, 5) };
        let mut copy = Box::new([std::ptr::null_mut(); 10]);
        // SAFETY: a buffer type has that many words; a buffer names its type before it ends.
        let place = unsafe {
            std::ptr::copy_nonoverlapping(original.cast(), copy.as_mut_ptr(), words);
            (0..16).map(|word| buffer.cast::<*mut c_void>().add(word)).find(|place| **place == original)
        };
        let place = place.context("the buffer does not name its type")?;
        copy[is_host] = not_host as unsafe extern "C" fn(*mut c_void) -> bool as *mut c_void;
        // SAFETY: the word found above, of a buffer that only this thread uses.
        unsafe { *place = copy.as_mut_ptr().cast() };
        let is_host = call!(host.ggml, b"ggml_backend_buffer_is_host", fn(*mut c_void) -> bool, buffer);
        let foreign = Foreign { place, original, _copy: copy };
        ensure!(!is_host, "the buffer still counts as host memory");
        Ok(foreign)
    }
}

impl Drop for Foreign {
    fn drop(&mut self) {
        // SAFETY: as in `new`; the buffer is still there.
        unsafe { *self.place = self.original };
    }
}

/// Computes a case with `threads` threads; the cache and the outputs after it.
pub fn run(host: &Llama, case: &Case, threads: usize) -> Result<Vec<f32>> {
    let arena = InitParams { size: 1 << 22, buffer: std::ptr::null_mut(), no_alloc: true };
    let context = call!(host.ggml, b"ggml_init", fn(InitParams) -> *mut c_void, arena);
    let g = Ggml { host, context };
    let backend =
        call!(host.ggml, b"ggml_backend_init_by_type", fn(c_int, *const c_void) -> *mut c_void, 0, std::ptr::null());
    ensure!(!backend.is_null(), "no CPU backend");
    set_threads(host, backend, threads)?;

    let (t, b, k) = (case.tokens, case.rows.len(), case.snapshots);
    let gate = if case.channel_gate { HEAD_SIZE } else { 1 };
    let cache = g.tensor(TYPE_F32, [STATE, CELLS, 1, 1])?;
    let ids_leaf = g.tensor(TYPE_I32, [b, 1, 1, 1])?;
    let shapes = [
        [HEAD_SIZE, KEY_HEADS, t, b],
        [HEAD_SIZE, KEY_HEADS, t, b],
        [HEAD_SIZE, VALUE_HEADS, t, b],
        [gate, VALUE_HEADS, t, b],
        [1, VALUE_HEADS, t, b],
    ];
    let inputs = shapes.iter().map(|ne| g.tensor(TYPE_F32, *ne)).collect::<Result<Vec<_>>>()?;
    let graph = call!(host.ggml, b"ggml_new_graph", fn(*mut c_void) -> *mut c_void, context);
    let expand = |node: Node| -> Result<()> {
        call!(host.ggml, b"ggml_build_forward_expand", fn(*mut c_void, Node), graph, node);
        Ok(())
    };

    let ids = if case.twist == Twist::ComputedIds {
        let copied = g.tensor(TYPE_I32, [b, 1, 1, 1])?;
        g.pair(b"ggml_cpy", ids_leaf, copied)?
    } else {
        ids_leaf
    };
    let gathered = g.pair(b"ggml_get_rows", cache, ids)?;
    expand(gathered)?;
    let row = STATE * 4;
    let head_bytes = HEAD_SIZE * 4;
    let state_shape = [HEAD_SIZE, HEAD_SIZE, VALUE_HEADS, b];
    let state = g.view(gathered, state_shape, [head_bytes, head_bytes * HEAD_SIZE, row], 0)?;
    if case.twist == Twist::WrittenBetween {
        expand(g.scale(g.view(cache, [STATE, 1, 1, 1], [row; 3], case.rows[0] as usize * row)?, true)?)?;
    }
    let result = g.operator([inputs[0], inputs[1], inputs[2], inputs[3], inputs[4], state], k)?;
    let out_bytes = HEAD_SIZE * VALUE_HEADS * t * b * 4;
    let out_row = HEAD_SIZE * VALUE_HEADS * 4;
    let out = g.view(result, [HEAD_SIZE, VALUE_HEADS, t, b], [head_bytes, out_row, out_row * t], 0)?;
    let written = k.min(t);
    let (new, target) = if k == 1 {
        (
            g.view(result, state_shape, [head_bytes, head_bytes * HEAD_SIZE, row], out_bytes)?,
            g.view(cache, [STATE, b, 1, 1], [row; 3], HEAD * row)?,
        )
    } else {
        (
            g.view(result, [STATE, b, written, 1], [row, row * b, row * b * written], out_bytes)?,
            g.view(cache, [STATE, b, written, 1], [row, row * GROUP, row * GROUP * written], HEAD * row)?,
        )
    };
    let copy = g.pair(b"ggml_cpy", new, target)?;
    let mut results = vec![(g.scale(out, false)?, HEAD_SIZE * VALUE_HEADS * t * b)];
    match case.twist {
        Twist::OutputResult => g.mark(b"ggml_set_output", result)?,
        Twist::OutputGather => g.mark(b"ggml_set_output", gathered)?,
        Twist::GatherRead => results.push((g.scale(gathered, false)?, STATE * b)),
        Twist::StatesRead => results.push((g.scale(new, false)?, STATE * b)),
        Twist::ReadBetween => {
            expand(results[0].0)?;
            let read = g.scale(g.view(cache, [STATE, 1, 1, 1], [row; 3], HEAD * row)?, false)?;
            expand(read)?;
            results.push((read, STATE));
        }
        _ => {}
    }
    expand(copy)?;
    for (node, _) in &results {
        expand(*node)?;
    }

    let mut random = Random(41 + case.tokens as u64);
    let fill = |tensor: Node, ne: [usize; 4], value: &mut dyn FnMut() -> f32| -> Result<()> {
        let data: Vec<f32> = (0..ne.iter().product()).map(|_| value()).collect();
        g.set(tensor, &data)
    };
    let mut memory = std::ptr::null_mut();
    let schedule = if matches!(case.twist, Twist::CallbackAtResult | Twist::CallbackAtGather) {
        for tensor in inputs.iter().chain([&ids_leaf, &cache]) {
            g.mark(b"ggml_set_input", *tensor)?;
            g.mark(b"ggml_set_output", *tensor)?;
        }
        for (node, _) in &results {
            g.mark(b"ggml_set_output", *node)?;
        }
        let mut backends = [backend];
        let schedule = call!(
            host.ggml,
            b"ggml_backend_sched_new",
            fn(*mut *mut c_void, *mut c_void, c_int, usize, bool, bool) -> *mut c_void,
            backends.as_mut_ptr(),
            std::ptr::null_mut(),
            1,
            512,
            false,
            false
        );
        let stop = if case.twist == Twist::CallbackAtResult { result } else { gathered };
        STOP.store(stop as usize, std::sync::atomic::Ordering::Relaxed);
        type Callback = unsafe extern "C" fn(Node, bool, *mut c_void) -> bool;
        call!(
            host.ggml,
            b"ggml_backend_sched_set_eval_callback",
            fn(*mut c_void, Callback, *mut c_void),
            schedule,
            stop_at,
            std::ptr::null_mut()
        );
        let fits =
            call!(host.ggml, b"ggml_backend_sched_alloc_graph", fn(*mut c_void, *mut c_void) -> bool, schedule, graph);
        ensure!(fits, "the graph could not be allocated");
        Some(schedule)
    } else {
        memory = call!(
            host.ggml,
            b"ggml_backend_alloc_ctx_tensors",
            fn(*mut c_void, *mut c_void) -> *mut c_void,
            context,
            backend
        );
        ensure!(!memory.is_null(), "the tensors could not be allocated");
        None
    };
    let scale = (HEAD_SIZE as f32).powf(-0.5);
    fill(cache, [STATE, CELLS, 1, 1], &mut || random.normal())?;
    for (at, (tensor, ne)) in inputs.iter().zip(shapes).enumerate() {
        fill(*tensor, ne, &mut || match at {
            0 | 1 => random.normal() * scale,
            2 => random.normal(),
            3 => -random.uniform(),
            _ => random.uniform(),
        })?;
    }
    g.set(ids_leaf, case.rows)?;

    let foreign = (case.twist == Twist::ForeignMemory).then(|| Foreign::new(host, memory)).transpose()?;
    let status = match schedule {
        Some(schedule) => call!(
            host.ggml,
            b"ggml_backend_sched_graph_compute",
            fn(*mut c_void, *mut c_void) -> c_int,
            schedule,
            graph
        ),
        None => call!(host.ggml, b"ggml_backend_graph_compute", fn(*mut c_void, *mut c_void) -> c_int, backend, graph),
    };
    drop(foreign);
    ensure!(status == 0, "{}: the graph failed with {status}", case.name);
    let mut values = g.get(cache, STATE * CELLS)?;
    for (node, length) in results {
        values.extend(g.get(node, length)?);
    }
    if case.twist == Twist::OutputResult {
        values.extend(g.get(result, (out_bytes + written * b * row) / 4)?);
    }
    if case.twist == Twist::OutputGather {
        values.extend(g.get(gathered, STATE * b)?);
    }
    if let Some(schedule) = schedule {
        call!(host.ggml, b"ggml_backend_sched_free", fn(*mut c_void), schedule);
    }
    call!(host.ggml, b"ggml_backend_free", fn(*mut c_void), backend);
    call!(host.ggml, b"ggml_free", fn(*mut c_void), context);
    Ok(values)
}

/// Sets a CPU backend's threads, the way llama.cpp does.
fn set_threads(host: &Llama, backend: *mut c_void, threads: usize) -> Result<()> {
    let device = call!(host.ggml, b"ggml_backend_get_device", fn(*mut c_void) -> *mut c_void, backend);
    let registry = call!(host.ggml, b"ggml_backend_dev_backend_reg", fn(*mut c_void) -> *mut c_void, device);
    type Set = unsafe extern "C" fn(*mut c_void, c_int);
    let set = call!(
        host.ggml,
        b"ggml_backend_reg_get_proc_address",
        fn(*mut c_void, *const std::ffi::c_char) -> Option<Set>,
        registry,
        c"ggml_backend_set_n_threads".as_ptr()
    );
    // SAFETY: that name's function has this signature.
    unsafe { set.context("the CPU backend has no set_n_threads")?(backend, threads as c_int) };
    Ok(())
}
