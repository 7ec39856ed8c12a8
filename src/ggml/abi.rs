//! The host's structures, as far as the plugin reads or writes them.
//!
//! ggml does not promise these to plugins built elsewhere, so every layout here names the versions whose headers it was
//! compared with, and [`super::symbols`] and [`Layout::of`] test at run time what a test can show. Whatever does not
//! match stays with the host.
//!
//! | structure | the same in | differs |
//! |---|---|---|
//! | [`Tensor`] | 0.9.7, 0.10.0, 0.12.0, 0.15.0, 0.21.0, 0.26.0 | |
//! | [`Graph`] | 0.9.7, 0.21.0, 0.26.0 | `uid` follows the last field from 0.10.0 on |
//! | [`Layout`] of a backend | | 14 slots in 0.9.7, 16 from 0.10.0 on (2-d copies) |
//! | [`Device`], [`Registry`] | 0.9.7, 0.21.0, 0.26.0 | |
//! | [`DeviceProps`] | 0.9.7, 0.21.0, 0.26.0 | a fifth capability after 0.21.0, inside the padding |
//! | buffer types, buffers | | plugin API 3 inserts slots: never read here, the host's functions are called |

use std::ffi::{c_char, c_int, c_void};

/// Plugin API versions that this binary serves: 2 (ggml 0.9.7 to 0.25.1) and 3 (0.26.0).
pub const API_VERSIONS: [c_int; 2] = [2, 3];

/// What `ggml_tensor_overhead` answers where a tensor has the layout below: an object header of 32 bytes, and it.
pub const TENSOR_OVERHEAD: usize = 32 + size_of::<Tensor>();

pub const TYPE_F32: c_int = 0;
pub const TYPE_I32: c_int = 26;

pub const FLAG_OUTPUT: i32 = 2;
/// Set on nodes that the host will compute; it skips the others.
pub const FLAG_COMPUTE: i32 = 16;

pub const STATUS_FAILED: c_int = -1;
pub const STATUS_SUCCESS: c_int = 0;

/// `ggml_backend_dev_type`.
pub const DEVICE_CPU: c_int = 0;
pub const DEVICE_ACCEL: c_int = 3;

/// `ggml_tensor`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Tensor {
    pub dtype: c_int,
    pub buffer: *mut c_void,
    pub ne: [i64; 4],
    pub nb: [usize; 4],
    pub op: c_int,
    pub op_params: [i32; 16],
    pub flags: i32,
    pub src: [*mut Tensor; 10],
    pub view_src: *mut Tensor,
    pub view_offs: usize,
    pub data: *mut c_void,
    pub name: [c_char; 64],
    pub extra: *mut c_void,
    pub padding: [u8; 8],
}

const _: () = {
    assert!(size_of::<Tensor>() == 336);
    assert!(std::mem::offset_of!(Tensor, op) == 80);
    assert!(std::mem::offset_of!(Tensor, src) == 152);
    assert!(std::mem::offset_of!(Tensor, data) == 248);
};

impl Tensor {
    /// Product of the extents; 0 where one is not positive or the product does not fit.
    pub fn elements(&self) -> usize {
        let product = self.ne.iter().try_fold(1usize, |product, ne| product.checked_mul(usize::try_from(*ne).ok()?));
        product.unwrap_or(0)
    }

    /// Whether the elements of this 4-byte type lie densely in ggml's order.
    pub fn is_contiguous(&self) -> bool {
        let mut expected = 4;
        for (ne, nb) in self.ne.iter().zip(self.nb) {
            if *ne != 1 && nb != expected {
                return false;
            }
            expected = expected.saturating_mul(usize::try_from(*ne).unwrap_or(0));
        }
        true
    }

    /// First byte, and the byte past the last, of what the elements cover (empty tensors cover nothing).
    pub fn span(&self) -> (usize, usize) {
        let start = self.data as usize;
        if self.elements() == 0 || start == 0 {
            return (start, start);
        }
        // A block of any type is at most nb[0] wide, so the last one ends before its own stride does.
        let last = self
            .ne
            .iter()
            .zip(self.nb)
            .fold(0usize, |last, (ne, nb)| last.saturating_add((*ne as usize - 1).saturating_mul(nb)));
        (start, start.saturating_add(last).saturating_add(self.nb[0].max(4)))
    }

    /// The tensor whose memory this one shares: itself, unless it is a view.
    pub fn root(this: *mut Tensor) -> *mut Tensor {
        // SAFETY: callers pass tensors of the host's graph; `view_src` is null or another such tensor.
        let source = unsafe { (*this).view_src };
        if source.is_null() { this } else { source }
    }
}

/// The part of `ggml_cgraph` that all versions share. The host's own are larger (`uid`), so never copied whole.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Graph {
    pub size: c_int,
    pub n_nodes: c_int,
    pub n_leafs: c_int,
    pub nodes: *mut *mut Tensor,
    pub grads: *mut *mut Tensor,
    pub grad_accs: *mut *mut Tensor,
    pub leafs: *mut *mut Tensor,
    pub use_counts: *mut i32,
    pub visited: HashSet,
    pub order: c_int,
}

/// `ggml_hash_set`: open addressing by address, linear probing.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct HashSet {
    pub size: usize,
    pub used: *mut u32,
    pub keys: *mut *mut Tensor,
}

/// A graph over some of another graph's nodes, as `ggml_graph_view` makes them, with room for fields that later
/// versions append (zero there means «not set»).
#[repr(C)]
pub struct GraphView {
    graph: Graph,
    appended: [u64; 8],
}

impl GraphView {
    pub fn new(of: &Graph, nodes: *mut *mut Tensor, count: usize) -> GraphView {
        let null = std::ptr::null_mut();
        let graph = Graph {
            size: 0,
            n_nodes: count as c_int,
            n_leafs: 0,
            nodes,
            grads: null,
            grad_accs: null,
            leafs: null,
            ..*of
        };
        GraphView { graph, appended: [0; 8] }
    }

    pub fn as_mut_ptr(&mut self) -> *mut Graph {
        &raw mut self.graph
    }
}

impl Graph {
    /// How many sources of nodes name `tensor`, over the whole graph that this one may be a part of; `None` where
    /// the graph does not say.
    ///
    /// # Safety
    /// `self` is a graph of the host, with its tables alive.
    pub unsafe fn uses(&self, tensor: *mut Tensor) -> Option<i64> {
        let HashSet { size, used, keys } = self.visited;
        if size == 0 || used.is_null() || keys.is_null() || self.use_counts.is_null() {
            return None;
        }
        let home = (tensor as usize >> 4) % size;
        for probe in 0..size {
            let at = (home + probe) % size;
            // SAFETY: `at` is below `size`, the extent of all three tables (the bit set has one bit for each).
            unsafe {
                if *used.add(at >> 5) & (1 << (at & 31)) == 0 {
                    return None;
                }
                if *keys.add(at) == tensor {
                    return Some(i64::from(*self.use_counts.add(at)));
                }
            }
        }
        None
    }
}

/// `ggml_custom_op_params`, which GGML_OP_CUSTOM keeps in `op_params`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct CustomOpParams {
    pub fun: unsafe extern "C" fn(*mut Tensor, c_int, c_int, *mut c_void),
    pub n_tasks: c_int,
    pub userdata: *mut c_void,
}

/// GGML_N_TASKS_MAX: as many tasks as threads.
pub const ALL_THREADS: c_int = -1;

const _: () = assert!(size_of::<CustomOpParams>() <= 16 * size_of::<i32>());

pub type InitBackend = unsafe extern "C" fn(*mut Device, *const c_char) -> *mut Backend;
pub type GraphCompute = unsafe extern "C" fn(*mut Backend, *mut Graph) -> c_int;
pub type FreeBackend = unsafe extern "C" fn(*mut Backend);

/// `ggml_backend_device`.
#[repr(C)]
pub struct Device {
    pub get_name: Option<unsafe extern "C" fn(*mut Device) -> *const c_char>,
    pub get_description: Option<unsafe extern "C" fn(*mut Device) -> *const c_char>,
    pub get_memory: Option<unsafe extern "C" fn(*mut Device, *mut usize, *mut usize)>,
    pub get_type: Option<unsafe extern "C" fn(*mut Device) -> c_int>,
    pub get_props: Option<unsafe extern "C" fn(*mut Device, *mut DeviceProps)>,
    pub init_backend: Option<InitBackend>,
    pub get_buffer_type: Option<unsafe extern "C" fn(*mut Device) -> *mut c_void>,
    pub get_host_buffer_type: Option<unsafe extern "C" fn(*mut Device) -> *mut c_void>,
    pub buffer_from_host_ptr: Option<unsafe extern "C" fn(*mut Device, *mut c_void, usize, usize) -> *mut c_void>,
    pub supports_op: Option<unsafe extern "C" fn(*mut Device, *const Tensor) -> bool>,
    pub supports_buft: Option<unsafe extern "C" fn(*mut Device, *mut c_void) -> bool>,
    pub offload_op: Option<unsafe extern "C" fn(*mut Device, *const Tensor) -> bool>,
    pub event_new: *mut c_void,
    pub event_free: *mut c_void,
    pub event_synchronize: *mut c_void,
    pub registry: *mut Registry,
    pub context: *mut c_void,
}

/// `ggml_backend_dev_props`.
#[repr(C)]
pub struct DeviceProps {
    pub name: *const c_char,
    pub description: *const c_char,
    pub memory_free: usize,
    pub memory_total: usize,
    pub kind: c_int,
    pub device_id: *const c_char,
    /// async, host_buffer, buffer_from_host_ptr, events, and (after 0.21.0) mmap_support; the rest is padding.
    pub caps: [bool; 8],
}

/// `ggml_backend_reg`.
#[repr(C)]
pub struct Registry {
    pub api_version: c_int,
    pub get_name: Option<unsafe extern "C" fn(*mut Registry) -> *const c_char>,
    pub get_device_count: Option<unsafe extern "C" fn(*mut Registry) -> usize>,
    pub get_device: Option<unsafe extern "C" fn(*mut Registry, usize) -> *mut Device>,
    pub get_proc_address: Option<unsafe extern "C" fn(*mut Registry, *const c_char) -> *mut c_void>,
    pub context: *mut c_void,
}

/// `ggml_backend`: an id, the slots of [`Layout`], the device, a context.
pub enum Backend {}

/// Where things stand in a backend, counted in words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    pub slots: usize,
    /// Indices among the slots.
    pub get_name: usize,
    pub free: usize,
    pub graph_plan_create: usize,
    pub graph_compute: usize,
}

/// The layouts that are known, the shortest first.
const LAYOUTS: [Layout; 2] = [
    // get_name free set_async get_async cpy_async synchronize plan x4 compute events x2 optimize: 0.9.7.
    Layout { slots: 14, get_name: 0, free: 1, graph_plan_create: 6, graph_compute: 10 },
    // Two 2-d copies after get_async: 0.10.0, 0.21.0, 0.26.0.
    Layout { slots: 16, get_name: 0, free: 1, graph_plan_create: 8, graph_compute: 12 },
];

impl Layout {
    /// The layout of a backend that `device`, a CPU device, has made: the one that has the device where it belongs,
    /// and functions exactly where the CPU backend has them (name, free, three plan functions, compute).
    ///
    /// # Safety
    /// `backend` came from `device`'s `init_backend`.
    pub unsafe fn of(backend: *mut Backend, device: *mut Device) -> Option<Layout> {
        LAYOUTS.into_iter().find(|layout| {
            // SAFETY: a backend has at least the words of the shortest layout; the layouts are tried in rising order,
            // and a longer one is only looked at once the shorter one's device word has proved to be another slot.
            let word = |at: usize| unsafe { *backend.cast::<usize>().add(at) };
            let plan = layout.graph_plan_create;
            let filled = [layout.get_name, layout.free, plan, plan + 1, plan + 3, layout.graph_compute];
            word(1 + layout.slots) == device as usize
                && (0..layout.slots).all(|slot| (word(1 + slot) != 0) == filled.contains(&slot))
        })
    }

    /// The address of a slot.
    pub fn slot(&self, backend: *mut Backend, slot: usize) -> *mut usize {
        debug_assert!(slot < self.slots);
        backend.cast::<usize>().wrapping_add(1 + slot)
    }
}
