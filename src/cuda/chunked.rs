//! How the chunked kernels (kernels/chunked.cu) are launched: which problems they take, and for those the workspace, the
//! slabs and the grids. Plain arithmetic on shapes; nothing here talks to a device.
//!
//! A prompt runs as pairs of launches, one pair a slab of chunks: `prepare` (P) writes what does not depend on the state
//! to the workspace, `scan` (S) walks over it with the state. The order is P0 S0 P1 S1 P2 S2 ..., and a device that can
//! overlap launches runs each P beside the S before it, hence two buffers. (With one, P's blocks may come early too, but wait
//! with their stores.) On Hopper the blocks of a scan that all fit on the device at once are small and in clusters
//! (kernels/chunk_cluster.cuh); where sequences have one chunk besides, one launch does both (kernels/chunk_single.cuh). Few
//! heads are few blocks: then a slab is cut into pieces that are scanned side by side, and X and J before each S find out what
//! states the pieces start from (kernels/chunk_join.cuh).

use super::abi::{DnProblem, VEC_OUT, VEC_V};
use super::plan::{Arguments, Launch};
use crate::params::Precision;
use crate::problem::{Problem, StateView};
use crate::tensor::Dtype;
#[cfg(any(deltanet_nvcc, test))]
use std::ffi::CStr;
use std::ffi::c_void;

/// Variable-length batches above this many sequences stay with the token-serial kernel: a block finds its chunk by
/// walking over them.
const MOST_RAGGED: usize = 1024;
/// CUDA's limit on the later axes of a grid.
const GRID_LIMIT: usize = 65535;
/// Value columns of a block of the scan, and its threads.
const COLUMNS: usize = 64;
const THREADS: usize = 128;
/// The same where blocks are in clusters (kernels/chunk_cluster.cuh).
const CLUSTER_COLUMNS: usize = 32;
const CLUSTER_THREADS: usize = 256;
/// The same where one launch does both stages (kernels/chunk_single.cuh).
const SINGLE_THREADS: usize = 384;
/// Chunks that a device must be able to prepare at a time beside a scan in clusters. With less room the two take turns, which
/// needs one buffer, so that slabs are larger.
const BESIDE: usize = 8;
/// Value heads of a block of `prepare`, where not every head's has a multiprocessor to itself.
const SHARE: usize = 2;
/// Blocks that fill a large device: as many sequences go into a slab.
const FULL: usize = 128;
/// Blocks of a scan up to which a slab is cut into pieces: with more, the work for that is more than what it saves.
const FEW: usize = 16;
/// Chunks that a piece has at least, and a slab that is cut.
const PIECE: usize = 2;
const CUT: usize = 8;
/// Chunks of a sequence from which its slabs are cut where the scan would otherwise be in clusters.
const CUT_OF_CLUSTERS: usize = 20;
/// Value columns of a block of the join: JOIN_ROWS in its source.
const JOIN_ROWS: usize = 4;
/// Buffers of a workspace that holds several slabs.
const BUFFERS: usize = 2;
/// Alignment of everything in the workspace, and what is added so that its start may be anywhere.
const ALIGN: usize = 256;

/// kernels/chunk_tiles.cuh: dn_chunk_args.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct ChunkArgs {
    problem: DnProblem,
    kq: *mut c_void,
    th: *mut c_void,
    carry: *mut c_void,
    transitions: *mut c_void,
    state_end: *mut c_void,
    seq0: i32,
    nseq: i32,
    chunk0: i32,
    nchunks: i32,
    tail: i32,
    carry_in: i32,
    carry_out: i32,
    waits: i32,
    pieces: i32,
    per_piece: i32,
    shares: i32,
    share: i32,
}
const _: () = assert!(size_of::<ChunkArgs>() == 600);

/// `ChunkArgs::waits`, as in kernels/chunk_tiles.cuh.
const WAITS_NOT: i32 = 0;
const WAITS_FIRST: i32 = 1;
const WAITS_TO_STORE: i32 = 2;

/// Kernels of a configuration: prepare, scans by where v and out lie, transitions by where v lies.
const KINDS: usize = 6;
const TRANSITION: usize = 4;
/// The last part of a scan's name.
const IO_F32: usize = 0;
const IO_16: usize = 1;
const IO_ANY: usize = 2;

#[cfg(any(deltanet_nvcc, test))]
macro_rules! names {
    ($(($mode:literal, $s:literal, $c:literal)),+ ; $(($cmode:literal, $cs:literal)),+ ; $($join:literal),+) => {
        [$(
            name(concat!("dn_chunk_prepare_", $mode, "_s", $s, "_c", $c, "\0")),
            name(concat!("dn_chunk_scan_", $mode, "_s", $s, "_c", $c, "_f32\0")),
            name(concat!("dn_chunk_scan_", $mode, "_s", $s, "_c", $c, "_h16\0")),
            name(concat!("dn_chunk_scan_", $mode, "_s", $s, "_c", $c, "_any\0")),
            name(concat!("dn_chunk_transition_", $mode, "_s", $s, "_c", $c, "_f32\0")),
            name(concat!("dn_chunk_transition_", $mode, "_s", $s, "_c", $c, "_any\0")),
        )+ $(
            name(concat!("dn_chunk_cluster_", $cmode, "_s", $cs, "_f32\0")),
            name(concat!("dn_chunk_cluster_", $cmode, "_s", $cs, "_any\0")),
            name(concat!("dn_chunk_single_", $cmode, "_s", $cs, "\0")),
        )+ $(name(concat!("dn_chunk_join_s", $join, "\0")),)+]
    };
}

/// Every chunked kernel: those of each configuration, then those for Hopper, then the joins.
#[cfg(any(deltanet_nvcc, test))]
pub(crate) static NAMES: [&CStr; JOIN + 2] = names![
    ("exact", 128, 64),
    ("exact", 128, 32),
    ("exact", 64, 64),
    ("exact", 64, 32),
    ("bf16", 128, 64),
    ("bf16", 128, 32),
    ("bf16", 64, 64),
    ("bf16", 64, 32);
    ("exact", 128),
    ("exact", 64),
    ("bf16", 128),
    ("bf16", 64);
    128, 64
];
/// Kernels of a configuration for Hopper: two scans in clusters and the one for a single chunk.
const HOPPER_KINDS: usize = 3;
const SINGLE: usize = 2;
/// The first of those in `NAMES`, and the first join.
const HOPPER: usize = 8 * KINDS;
const JOIN: usize = HOPPER + 4 * HOPPER_KINDS;

/// Blocks of a cluster of a kernel of `NAMES`, as its source has it.
#[cfg(test)]
pub(crate) fn cluster_size(function: usize) -> u32 {
    let in_clusters = (HOPPER..JOIN).contains(&function) && (function - HOPPER) % HOPPER_KINDS != SINGLE;
    if in_clusters { 2 } else { 1 }
}

#[cfg(any(deltanet_nvcc, test))]
const fn name(words: &'static str) -> &'static CStr {
    match CStr::from_bytes_with_nul(words.as_bytes()) {
        Ok(name) => name,
        Err(_) => panic!("names end with their only zero"),
    }
}

/// What the launch needs to know of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Abilities {
    /// Tokens of a chunk in the kernels that were loaded: 64 or 32.
    pub chunk: usize,
    /// Bytes of shared memory that a block may have.
    pub shared: usize,
    /// Multiprocessors.
    pub processors: usize,
    /// Whether a kernel may start before the one ahead of it is done.
    pub overlap: bool,
    /// Whether scans can be in clusters of blocks.
    pub clusters: bool,
}

impl Abilities {
    /// For kernels compiled for `arch` (90 for sm_90), as kernels/chunked.cu has it.
    pub fn new(arch: i32, shared: usize, processors: usize, overlap: bool) -> Abilities {
        let chunk = if (90..120).contains(&arch) { 64 } else { 32 };
        Abilities { chunk, shared, processors, overlap: overlap && arch >= 90, clusters: arch == 90 }
    }
}

/// A kernel's shape, as in its name.
#[derive(Clone, Copy)]
struct Shape {
    head_size: usize,
    chunk: usize,
    parts: usize,
}

impl Shape {
    fn of(problem: &Problem, chunk: usize) -> Shape {
        // TF32 asks for less than exact gives. It has no kernel of its own: on tensor cores it costs two thirds of it.
        let parts = if problem.precision() == Precision::Bf16 { 1 } else { 2 };
        Shape { head_size: problem.head_size(), chunk, parts }
    }

    /// The index of the first kernel for Hopper in `NAMES`.
    fn hopper(&self) -> usize {
        HOPPER + HOPPER_KINDS * (2 * usize::from(self.parts == 1) + usize::from(self.head_size == 64))
    }

    /// The index of the configuration in `NAMES`.
    fn index(&self) -> usize {
        let choice = |first: bool| usize::from(!first);
        4 * choice(self.parts == 2) + 2 * choice(self.head_size == 128) + choice(self.chunk == 64)
    }

    /// Bytes of the images of T or P.
    fn triangle(&self) -> usize {
        self.chunk * self.chunk * 2 * self.parts
    }
    /// Bytes of the decay vectors.
    fn vectors(&self) -> usize {
        2 * self.chunk * 4
    }
    /// Bytes of the images of K and Q.
    fn kq(&self) -> usize {
        2 * self.chunk * self.head_size * 2 * self.parts
    }
    /// Bytes of T, P and the decay vectors.
    fn th(&self) -> usize {
        2 * self.triangle() + self.vectors()
    }
    /// Bytes of a chunk of all heads.
    fn slot(&self, problem: &Problem) -> usize {
        problem.key_heads() * self.kq() + problem.value_heads() * self.th()
    }

    /// Blocks of `prepare` for a chunk of one sequence and key head, each for `share` of its value heads.
    fn shares(&self, problem: &Problem, share: usize) -> usize {
        (problem.value_heads() / problem.key_heads()).div_ceil(share)
    }
    /// Blocks of `prepare` for a chunk of one sequence.
    fn prepare_blocks(&self, problem: &Problem) -> usize {
        problem.key_heads() * self.shares(problem, SHARE)
    }

    /// Chunks of one sequence that so many multiprocessors prepare at a time.
    fn at_a_time(&self, problem: &Problem, processors: usize) -> usize {
        processors * if self.chunk == 64 { 2 } else { 3 } / self.prepare_blocks(problem).max(1)
    }

    /// Shared memory for T and P of a value head, and its gates.
    fn solve(&self) -> (usize, usize) {
        let triangles = 2 * self.triangle() + self.chunk * (self.chunk + 4) * 4 + self.chunk * 24 * 4;
        (triangles, self.chunk * (8 + 4) + self.vectors())
    }
    /// Shared memory of `prepare`.
    fn prepare_shared(&self) -> usize {
        let (triangles, gates) = self.solve();
        self.kq().max(2 * triangles) + 2 * gates + 16
    }
    /// The same for a block that is to have a multiprocessor to itself, where that is not much more.
    fn prepare_alone_shared(&self) -> usize {
        if self.chunk == 64 { 114 << 10 } else { self.prepare_shared() }
    }
    /// Shared memory where one launch does both stages.
    fn single_shared(&self) -> usize {
        let (triangles, gates) = self.solve();
        self.kq() + triangles + gates + 16
    }
    /// Shared memory of the tiles of two chunks.
    fn stages(&self) -> usize {
        2 * (self.kq() + self.th()).next_multiple_of(1024)
    }
    /// Shared memory of `scan`.
    fn scan_shared(&self) -> usize {
        self.stages() + 2 * self.chunk * COLUMNS * 4 + 32
    }
    /// The same of a scan in clusters.
    fn cluster_shared(&self) -> usize {
        self.stages() + 3 * self.chunk * CLUSTER_COLUMNS * 4 + 144
    }
}

/// Whether `device` has shared memory for every chunked kernel that its architecture has.
pub(crate) fn fits(device: &Abilities) -> bool {
    let largest = Shape { head_size: 128, chunk: device.chunk, parts: 2 };
    largest.scan_shared().max(largest.prepare_shared()) <= device.shared
}

/// Shared memory of each kernel of `NAMES`.
pub(crate) fn shared_sizes() -> impl Iterator<Item = usize> {
    let shapes = [2, 1].into_iter().flat_map(|parts| {
        [128, 64].into_iter().flat_map(move |head_size| [64, 32].map(|chunk| Shape { head_size, chunk, parts }))
    });
    let kernels = shapes.clone().flat_map(|shape| {
        let scan = shape.scan_shared();
        [shape.prepare_alone_shared(), scan, scan, scan, scan, scan]
    });
    let hopper = shapes
        .filter(|shape| shape.chunk == 64)
        .flat_map(|shape| [shape.cluster_shared(), shape.cluster_shared(), shape.single_shared()]);
    kernels.chain(hopper).chain([0, 0])
}

/// Tokens at the end of every sequence that the token-serial kernel does, because states after them are kept. The newest
/// state alone is the scan's.
fn tail(problem: &Problem) -> usize {
    match &problem.snapshots {
        Some(kept) if (kept.count, kept.skip) != (1, 0) => problem.tokens() - kept.first_token(problem.tokens()),
        _ => 0,
    }
}

/// How a problem's prompts go through the chunked kernels.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Chunked {
    /// Tokens at the end of every sequence that are left.
    pub tail: usize,
    /// Bytes of workspace, the same on every device.
    pub workspace: usize,
    /// Bytes of it for states between slabs and at the end.
    carry: usize,
    transitions: usize,
    state_end: usize,
    /// Sequences of a slab.
    group: usize,
    /// Pieces that a slab is cut into at most.
    pieces: usize,
}

impl Chunked {
    /// None where the token-serial kernel does the whole problem: sequences of fewer tokens than a `prompt` has, or what
    /// there is no chunked kernel for.
    pub fn new(problem: &Problem, prompt: usize) -> Option<Chunked> {
        let (tokens, sequences, heads) = (problem.tokens(), problem.sequences(), problem.value_heads());
        let (s, tail) = (problem.head_size(), tail(problem));
        let ragged = problem.cu_seqlens.is_some();
        let length = if ragged { tokens / sequences.max(1) } else { tokens - tail };
        let fits = matches!(s, 64 | 128)
            && !problem.channel_gate()
            && problem.state_clamp() == f32::INFINITY
            && length >= prompt
            && sequences <= if ragged { MOST_RAGGED } else { GRID_LIMIT }
            && heads <= GRID_LIMIT / 2
            // The last tokens' states start from dense rows, where no index can say that a sequence is to be left out.
            && (tail == 0 || !ragged && problem.rows_in.is_none());
        if !fits {
            return None;
        }
        let state = heads * s * s * size_of::<f32>();
        let group = if ragged { sequences } else { (FULL / (heads * s / COLUMNS).max(1)).clamp(1, sequences) };
        let blocks = sequences * heads * s / COLUMNS;
        // A transition has twice a scan's blocks, for all pieces but the last.
        let pieces = if !ragged && (1..=FEW).contains(&blocks) { 1 + FULL / (2 * blocks) } else { 1 };
        let carry = match pieces {
            _ if ragged => 2 * state,
            1 => group * state,
            _ => (pieces + 1) * group * state,
        };
        let transitions = pieces.saturating_sub(2) * group * state;
        let state_end = if tail > 0 { sequences * state } else { 0 };
        // 64 MiB with its carry for a sequence of 32 heads of 128 channels; five sequences' worth at most, which is 2048
        // tokens of two, twice.
        let several = if ragged { 1 } else { sequences.min(5) };
        let least = if pieces > 1 { 64 << 20 } else { 32 << 20 };
        let mut chunked = Chunked { tail, workspace: 0, carry, transitions, state_end, group, pieces };
        let budget = ((heads << 21).max(least) * several).saturating_sub(chunked.states() + 2 * ALIGN);
        for chunk in [64, 32] {
            let shape = Shape::of(problem, chunk);
            let slot = shape.slot(problem);
            let least = BUFFERS * slot * if ragged { 1 } else { group };
            let images = (chunked.slots(problem, chunk) * slot).min(budget.max(least));
            chunked.workspace = chunked.workspace.max(images + chunked.states());
        }
        Some(chunked)
    }

    /// Bytes of the workspace that are not images, with what aligns everything.
    fn states(&self) -> usize {
        self.carry.next_multiple_of(ALIGN) + self.transitions.next_multiple_of(ALIGN) + self.state_end + 4 * ALIGN
    }

    /// Chunks of a sequence; of all of them where their lengths are not known here, and one more, so that a sequence
    /// without tokens at the end begins somewhere.
    fn chunks(&self, problem: &Problem, chunk: usize) -> usize {
        match problem.cu_seqlens {
            Some(_) => problem.tokens() / chunk + problem.sequences() + 1,
            None => (problem.tokens() - self.tail).div_ceil(chunk),
        }
    }

    /// Chunks that are in the workspace at a time, if there is room.
    fn slots(&self, problem: &Problem, chunk: usize) -> usize {
        let chunks = self.chunks(problem, chunk);
        match problem.cu_seqlens {
            Some(_) => chunks,
            None if problem.sequences() <= self.group => chunks * self.group,
            None => chunks * self.group * BUFFERS,
        }
    }

    /// Chunks that a device prepares at a time, on the multiprocessors that a scan leaves free.
    fn wave(&self, problem: &Problem, shape: &Shape, device: &Abilities, columns: usize) -> usize {
        let scans = self.group * problem.value_heads() * problem.head_size() / columns;
        shape.at_a_time(problem, device.processors.saturating_sub(scans)) / self.group
    }

    /// The launches on `device`, in order. `first_function` is the index of the first of `NAMES` among all kernels;
    /// `workspace` has `self.workspace` bytes.
    pub fn launches<'a>(
        &self,
        problem: &'a Problem,
        arguments: DnProblem,
        device: &Abilities,
        first_function: usize,
        workspace: *mut c_void,
    ) -> Launches<'a> {
        let shape = Shape::of(problem, device.chunk);
        let ragged = problem.cu_seqlens.is_some();
        let (chunks, group) = (self.chunks(problem, shape.chunk), if ragged { 1 } else { self.group });
        let room = (self.workspace - self.states()) / shape.slot(problem);
        let groups = if ragged { 1 } else { problem.sequences().div_ceil(group) };
        // Clusters make a scan's chain short and its work larger: they pay while every block has a multiprocessor to itself.
        let blocks = problem.sequences() * problem.value_heads() * problem.head_size() / CLUSTER_COLUMNS;
        let cut = if device.clusters { CUT_OF_CLUSTERS } else { CUT };
        let pieces = if chunks < cut { 1 } else { self.pieces };
        let clusters = device.clusters && pieces == 1 && blocks <= device.processors;
        let single = clusters && !ragged && chunks == 1;
        let wave = self.wave(problem, &shape, device, if clusters { CLUSTER_COLUMNS } else { COLUMNS });
        let one = groups == 1 && chunks * group <= room;
        let turns = clusters && wave < BESIDE;
        let buffers =
            if turns || one && (ragged || !device.overlap || wave == 0 || chunks <= 2 * wave) { 1 } else { BUFFERS };
        let mut most = (room / buffers / group).clamp(1, chunks.max(1));
        if buffers > 1 && wave > 0 {
            most = most.min(2 * wave); // a prepare beside each scan in two waves; more only delay the first scan
        }
        if turns && chunks > most {
            let full = shape.at_a_time(problem, device.processors) / group; // a prepare's blocks leave none idle
            most -= most % full.clamp(1, most);
        }
        let per_slab = chunks.div_ceil(chunks.div_ceil(most).max(1)).max(1);
        let at = |bytes: usize| workspace.wrapping_byte_add(workspace.align_offset(ALIGN)).wrapping_byte_add(bytes);
        let slots = buffers * per_slab * group;
        let th = (slots * problem.key_heads() * shape.kq()).next_multiple_of(ALIGN);
        let carry = (th + slots * problem.value_heads() * shape.th()).next_multiple_of(ALIGN);
        let transitions = carry + self.carry.next_multiple_of(ALIGN);
        let end = transitions + self.transitions.next_multiple_of(ALIGN);
        let in_fours = arguments.flags & (VEC_V | VEC_OUT) == VEC_V | VEC_OUT;
        let half = |dtype| dtype != Dtype::F32;
        let io = match (in_fours, half(problem.v.dtype), half(problem.out.dtype)) {
            (true, false, false) => IO_F32,
            (true, true, true) => IO_16,
            _ => IO_ANY,
        };
        Launches {
            problem,
            shape,
            chunks,
            group,
            per_slab,
            buffers,
            slabs_of_group: chunks.div_ceil(per_slab),
            slabs: groups * chunks.div_ceil(per_slab),
            ragged,
            pieces,
            processors: device.processors,
            prepare: first_function + shape.index() * KINDS,
            clusters,
            single,
            scan: first_function
                + match (single, clusters) {
                    (true, _) => shape.hopper() + SINGLE,
                    (_, true) => shape.hopper() + usize::from(io != IO_F32),
                    _ => shape.index() * KINDS + 1 + io,
                },
            transition: first_function + shape.index() * KINDS + TRANSITION + usize::from(io != IO_F32),
            join: first_function + JOIN + usize::from(shape.head_size != 128),
            kq: at(0),
            th: at(th),
            arguments: ChunkArgs {
                problem: arguments,
                kq: at(0),
                th: at(th),
                carry: at(carry),
                transitions: at(transitions),
                state_end: if self.state_end > 0 { at(end) } else { std::ptr::null_mut() },
                seq0: 0,
                nseq: 0,
                chunk0: 0,
                nchunks: 0,
                tail: self.tail as i32,
                carry_in: 0,
                carry_out: 0,
                waits: 0,
                pieces: 1,
                per_piece: 0,
                shares: 0,
                share: 0,
            },
            next: 0,
        }
    }

    /// The states that the last tokens start from, once the launches have run.
    pub fn state_end(&self, problem: &Problem, launches: &Launches) -> StateView {
        let s = problem.head_size();
        let nb_head = s * s * size_of::<f32>();
        StateView {
            data: launches.arguments.state_end.cast(),
            nb_k: size_of::<f32>(),
            nb_v: s * size_of::<f32>(),
            nb_head,
            nb_row: problem.value_heads() * nb_head,
            rows: problem.sequences(),
        }
    }
}

/// The launches of a problem's prompts.
pub(crate) struct Launches<'a> {
    problem: &'a Problem,
    shape: Shape,
    chunks: usize,
    group: usize,
    per_slab: usize,
    buffers: usize,
    slabs_of_group: usize,
    slabs: usize,
    ragged: bool,
    pieces: usize,
    processors: usize,
    /// Whether scans are in clusters.
    clusters: bool,
    /// Whether one launch does both stages.
    single: bool,
    prepare: usize,
    scan: usize,
    transition: usize,
    join: usize,
    kq: *mut c_void,
    th: *mut c_void,
    arguments: ChunkArgs,
    next: usize,
}

impl Launches<'_> {
    /// The arguments of a slab.
    fn slab(&self, slab: usize) -> ChunkArgs {
        let (group, part) = (slab / self.slabs_of_group, slab % self.slabs_of_group);
        let (seq0, chunk0) = (group * self.group, part * self.per_slab);
        let nseq = if self.ragged { self.problem.sequences() } else { self.group.min(self.problem.sequences() - seq0) };
        let nchunks = self.per_slab.min(self.chunks - chunk0);
        let first = slab % self.buffers * self.per_slab * self.group;
        let two = self.ragged || self.pieces > 1;
        let per_piece =
            if self.pieces > 1 && nchunks >= CUT { nchunks.div_ceil(self.pieces).max(PIECE) } else { nchunks };
        ChunkArgs {
            kq: self.kq.wrapping_byte_add(first * self.problem.key_heads() * self.shape.kq()),
            th: self.th.wrapping_byte_add(first * self.problem.value_heads() * self.shape.th()),
            seq0: seq0 as i32,
            nseq: nseq as i32,
            chunk0: chunk0 as i32,
            nchunks: nchunks as i32,
            carry_in: if two { slab % 2 } else { 0 } as i32,
            carry_out: if two { (slab + 1) % 2 } else { 0 } as i32,
            waits: match (slab, self.buffers) {
                (0, _) => WAITS_FIRST,
                (_, 1) => WAITS_TO_STORE,
                _ => WAITS_NOT,
            },
            pieces: nchunks.div_ceil(per_piece) as i32,
            per_piece: per_piece as i32,
            ..self.arguments
        }
    }

    fn launch_prepare(&self, slab: usize) -> Launch {
        let mut arguments = self.slab(slab);
        let chunks = arguments.nchunks as usize;
        let sequences = if self.ragged { 1 } else { arguments.nseq as usize };
        // A block with one head is done earlier.
        let share = if chunks * sequences * self.problem.value_heads() <= self.processors { 1 } else { SHARE };
        let shares = self.shape.shares(self.problem, share);
        (arguments.shares, arguments.share) = (shares as i32, share as i32);
        let grid = [chunks, self.problem.key_heads() * shares, sequences];
        // Launched ahead, blocks would share the first multiprocessors that the kernel before them leaves.
        let alone = grid.iter().product::<usize>() <= self.processors;
        let shared = if alone { self.shape.prepare_alone_shared() } else { self.shape.prepare_shared() };
        Launch {
            function: self.prepare,
            grid: grid.map(|blocks| blocks as u32),
            threads: 4 * self.shape.chunk as u32,
            shared: shared as u32,
            arguments: Arguments::Chunk(arguments),
        }
    }

    /// A scan or a transition: blocks for `columns` value columns and `pieces` of a slab.
    fn launch_blocks(&self, function: usize, columns: usize, pieces: i32, arguments: ChunkArgs) -> Launch {
        Launch {
            function,
            grid: [(columns / COLUMNS) as u32, self.problem.value_heads() as u32, (arguments.nseq * pieces) as u32],
            threads: THREADS as u32,
            shared: self.shape.scan_shared() as u32,
            arguments: Arguments::Chunk(arguments),
        }
    }

    fn launch_scan(&self, slab: usize) -> Launch {
        let arguments = self.slab(slab);
        let launch = self.launch_blocks(self.scan, self.problem.head_size(), arguments.pieces, arguments);
        if !self.clusters {
            return launch;
        }
        let (threads, shared) = if self.single {
            (SINGLE_THREADS, self.shape.single_shared())
        } else {
            (CLUSTER_THREADS, self.shape.cluster_shared())
        };
        Launch {
            grid: [(self.problem.head_size() / CLUSTER_COLUMNS) as u32, launch.grid[1], launch.grid[2]],
            threads: threads as u32,
            shared: shared as u32,
            ..launch
        }
    }

    fn launch_transition(&self, slab: usize) -> Launch {
        let arguments = self.slab(slab);
        self.launch_blocks(self.transition, 2 * self.problem.head_size(), arguments.pieces - 1, arguments)
    }

    fn launch_join(&self, slab: usize) -> Launch {
        let arguments = self.slab(slab);
        let s = self.problem.head_size();
        Launch {
            function: self.join,
            grid: [(s / JOIN_ROWS) as u32, self.problem.value_heads() as u32, arguments.nseq as u32],
            threads: 2 * s as u32,
            shared: 0,
            arguments: Arguments::Chunk(arguments),
        }
    }
}

impl Iterator for Launches<'_> {
    type Item = Launch;

    fn next(&mut self) -> Option<Launch> {
        loop {
            let (slab, phase) = (self.next / 4, self.next % 4);
            self.next += 1;
            if slab >= self.slabs {
                return None;
            }
            let pieces = self.slab(slab).pieces;
            match phase {
                0 if !self.single => return Some(self.launch_prepare(slab)),
                1 if pieces > 1 => return Some(self.launch_transition(slab)),
                2 if pieces > 2 => return Some(self.launch_join(slab)),
                3 => return Some(self.launch_scan(slab)),
                _ => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cuda::plan::{PROMPT, Plan};
    use crate::params::Params;
    use crate::problem::Place;
    use crate::tensor::Tensor;

    const H100: Abilities = Abilities { chunk: 64, shared: 232448, processors: 132, overlap: true, clusters: true };
    /// A slice of such a device.
    const SLICE: Abilities = Abilities { processors: 16, ..H100 };
    const ADA: Abilities = Abilities { chunk: 32, shared: 101376, processors: 128, overlap: false, clusters: false };

    struct Case {
        s: usize,
        hk: usize,
        hv: usize,
        t: usize,
        b: usize,
        snapshots: u32,
        skip: u32,
        ragged: bool,
        precision: Precision,
    }

    const CASE: Case = Case {
        s: 128,
        hk: 16,
        hv: 32,
        t: 4096,
        b: 1,
        snapshots: 0,
        skip: 0,
        ragged: false,
        precision: Precision::Exact,
    };

    impl Case {
        /// Nothing is read at a device, so that any address does.
        fn problem(&self) -> Problem {
            let mut next = 1usize << 40;
            let mut tensor = |dtype, ne: [usize; 4]| {
                let at = next;
                next += (ne.iter().product::<usize>() * 8).next_multiple_of(4096);
                Tensor::dense(at as *mut c_void, dtype, ne.map(|n| n as i64))
            };
            let &Case { s, hk, hv, t, b, .. } = self;
            let axis = if self.ragged { 1 } else { b };
            let f32 = Dtype::F32;
            let none = Tensor::default();
            let cu_seqlens = if self.ragged { tensor(Dtype::I32, [b + 1, 1, 1, 1]) } else { none };
            // The snapshots come last, so that their later slots have room.
            let params = Params {
                q: tensor(f32, [s, hk, t, axis]),
                k: tensor(f32, [s, hk, t, axis]),
                v: tensor(f32, [s, hv, t, axis]),
                g: tensor(f32, [1, hv, t, axis]),
                beta: tensor(f32, [1, hv, t, axis]),
                out: tensor(f32, [s, hv, t, axis]),
                state_in: tensor(f32, [s, s, hv, b]),
                state_out: tensor(f32, [s, s, hv, b]),
                snapshots: if self.snapshots > 0 { tensor(f32, [s, s, hv, b]) } else { none },
                snapshot_stride: s * s * hv * b * 4,
                snapshot_slots: self.snapshots,
                n_snapshots: self.snapshots,
                snapshot_skip: self.skip,
                cu_seqlens,
                precision: self.precision as u32,
                ..Params::default()
            };
            // SAFETY: at a device, nothing is read.
            unsafe { Problem::at(&params, Place::Device) }.expect("a valid case")
        }
    }

    fn launches(problem: &Problem, device: &Abilities) -> (Chunked, Vec<Launch>) {
        let chunked = Chunked::new(problem, PROMPT).expect("a prompt");
        let arguments = DnProblem::of(problem, false).expect("small numbers");
        let all = chunked.launches(problem, arguments, device, 100, 0x1000_0010 as *mut c_void).collect();
        (chunked, all)
    }

    fn arguments(launch: &Launch) -> ChunkArgs {
        match launch.arguments {
            Arguments::Chunk(arguments) => arguments,
            _ => panic!("not a chunked kernel"),
        }
    }

    /// 0 for a prepare, 1 for a scan, 2 for a transition, 3 for a join, 4 for both stages at once.
    fn kind(launch: &Launch) -> usize {
        match launch.function - 100 {
            function if function >= JOIN => 3,
            function if function >= HOPPER => [1, 1, 4][(function - HOPPER) % HOPPER_KINDS],
            function => [0, 1, 1, 1, 2, 2][function % KINDS],
        }
    }

    #[test]
    fn sizes_are_those_that_the_kernels_assert() {
        let sizes = |head_size, chunk, parts| {
            let shape = Shape { head_size, chunk, parts };
            (shape.prepare_shared(), shape.scan_shared(), shape.kq(), shape.th())
        };
        assert_eq!(sizes(128, 64, 2), (115216, 231456, 65536, 33280));
        assert_eq!(sizes(128, 64, 1), (82448, 133152, 32768, 16896));
        assert_eq!(sizes(64, 64, 2), (115216, 165920, 32768, 33280));
        assert_eq!(sizes(64, 64, 1), (82448, 100384, 16384, 16896));
        assert_eq!(sizes(128, 32, 2), (34064, 100384, 32768, 8448));
        assert_eq!(sizes(128, 32, 1), (24848, 59424, 16384, 4352));
        assert_eq!(sizes(64, 32, 2), (33040, 67616, 16384, 8448));
        assert_eq!(sizes(64, 32, 1), (24848, 43040, 8192, 4352));
        let cluster = |head_size, parts| Shape { head_size, chunk: 64, parts }.cluster_shared();
        assert_eq!(
            [cluster(128, 2), cluster(128, 1), cluster(64, 2), cluster(64, 1)],
            [223_376, 125_072, 157_840, 92_304]
        );
        let single = |head_size, parts| Shape { head_size, chunk: 64, parts }.single_shared();
        assert_eq!([single(128, 2), single(128, 1), single(64, 2), single(64, 1)], [123_152, 74_000, 90_384, 57_616]);
        assert!(fits(&H100) && fits(&ADA) && !fits(&Abilities { shared: 65536, ..ADA }));
        assert_eq!(shared_sizes().count(), NAMES.len());
    }

    #[test]
    fn kernels_are_picked_by_name() {
        for (precision, mode) in [(Precision::Exact, "exact"), (Precision::Tf32, "exact"), (Precision::Bf16, "bf16")] {
            for (device, chunk) in [(H100, 64), (ADA, 32)] {
                for s in [64, 128] {
                    let (_, all) = launches(&Case { s, precision, t: 300, ..CASE }.problem(), &device);
                    let name = |at: usize| NAMES[all[at].function - 100].to_str().expect("ascii");
                    assert_eq!(name(0), format!("dn_chunk_prepare_{mode}_s{s}_c{chunk}"));
                    let scan = match chunk {
                        64 => format!("dn_chunk_cluster_{mode}_s{s}_f32"),
                        _ => format!("dn_chunk_scan_{mode}_s{s}_c{chunk}_f32"),
                    };
                    assert_eq!(name(1), scan);
                    let sizes: Vec<_> = shared_sizes().collect();
                    assert!(all.iter().all(|launch| launch.shared as usize == sizes[launch.function - 100]));
                }
            }
        }
    }

    #[test]
    fn a_sequence_of_any_length_needs_no_more_than_64_mib() {
        for t in [PROMPT, 100, 2048, 4096, 32768, 1 << 20] {
            for precision in [Precision::Exact, Precision::Bf16] {
                let chunked = Chunked::new(&Case { t, precision, ..CASE }.problem(), PROMPT).expect("a prompt");
                assert!(chunked.workspace <= 64 << 20, "{t} tokens: {}", chunked.workspace);
            }
        }
    }

    /// Every chunk of every sequence is prepared and scanned once and in order, in the workspace, and no prepare writes to
    /// what a scan that may still run reads.
    #[test]
    fn slabs_cover_all_chunks() {
        let cases = [
            Case { t: 48, ..CASE },
            CASE,
            Case { t: 5000, b: 7, ..CASE },
            Case { t: 100_000, hk: 2, hv: 4, ..CASE },
            Case { t: 3000, b: 5, s: 64, hk: 3, hv: 9, ..CASE },
            Case { t: 70, b: 40, hv: 16, precision: Precision::Bf16, ..CASE },
            Case { t: 9000, snapshots: 5, ..CASE },
            Case { t: 64 * 16, hk: 1, hv: 1, ..CASE },
            Case { t: 4000, hk: 2, hv: 4, s: 64, b: 2, ..CASE },
            Case { t: 9000, hk: 16, hv: 16, ..CASE },
            Case { t: 1200, hk: 2, hv: 4, ..CASE },
        ];
        for case in &cases {
            for device in [H100, SLICE, ADA] {
                let problem = case.problem();
                let (chunked, all) = launches(&problem, &device);
                let shape = Shape::of(&problem, device.chunk);
                let chunks = (case.t - chunked.tail).div_ceil(device.chunk);
                let mut next = vec![0; case.b];
                let range = |launch: &Launch| {
                    let a = arguments(launch);
                    let slots = (a.nchunks * a.nseq) as usize;
                    (a.kq as usize, a.kq as usize + slots * case.hk * shape.kq())
                };
                let mut prepared: Vec<(i32, i32)> = Vec::new();
                for (at, launch) in all.iter().enumerate() {
                    let a = arguments(launch);
                    let key = (a.seq0, a.chunk0);
                    assert!(a.nchunks > 0 && a.nseq > 0);
                    let end = a.th as usize + (a.nchunks * a.nseq) as usize * case.hv * shape.th();
                    assert!(end <= a.carry as usize && range(launch).1 <= a.th as usize);
                    let states = a.carry as usize + chunked.carry + chunked.transitions + chunked.state_end;
                    assert!(states <= 0x1000_0010 + chunked.workspace);
                    if a.pieces > 1 {
                        // Slots 0 and 1, one for every piece after the first; transitions of all but the first and last.
                        let state = a.nseq as usize * case.hv * case.s * case.s * 4;
                        assert!((a.pieces as usize + 1) * state <= chunked.carry && a.carry_in != a.carry_out);
                        assert!((a.pieces as usize - 2) * state <= chunked.transitions);
                        assert!((a.pieces - 1) * a.per_piece < a.nchunks && a.nchunks <= a.pieces * a.per_piece);
                    }
                    if [2, 3].contains(&kind(launch)) {
                        continue;
                    }
                    assert!(launch.grid[1] <= 65535 && launch.grid[2] <= 65535);
                    if kind(launch) == 0 {
                        prepared.push(key);
                        assert_eq!((launch.grid[0], launch.grid[2]), (a.nchunks as u32, a.nseq as u32));
                        // The two launches ahead may still be running when it stores, unless it waits for them.
                        let waits = a.waits != WAITS_NOT;
                        for other in &all[if waits { at } else { at.saturating_sub(2) }..at] {
                            let (mine, theirs) = (range(launch), range(other));
                            assert!(mine.1 <= theirs.0 || theirs.1 <= mine.0, "a prepare writes to what is read");
                        }
                        continue;
                    }
                    assert!(kind(launch) == 4 || prepared.contains(&key), "a scan comes after its prepare");
                    for b in a.seq0..a.seq0 + a.nseq {
                        assert_eq!(next[b as usize], a.chunk0, "in order");
                        next[b as usize] += a.nchunks;
                    }
                }
                assert!(next.iter().all(|n| *n as usize == chunks));
                assert_eq!(arguments(&all[0]).waits, WAITS_FIRST);
            }
        }
    }

    #[test]
    fn slabs_are_alike() {
        let grids = |case: &Case| {
            let (_, all) = launches(&case.problem(), &H100);
            all.iter().filter(|launch| kind(launch) == 0).map(|launch| launch.grid[0]).collect::<Vec<_>>()
        };
        // The scan's 128 blocks leave no room for a prepare: the two take turns. 29 chunks fit, and 16 of them are two blocks
        // for each multiprocessor.
        assert_eq!(grids(&CASE), [16, 16, 16, 16]);
        assert_eq!(grids(&Case { t: 2048, ..CASE }), [16, 16]);
        assert_eq!(grids(&Case { t: 1600, ..CASE }), [25]);
        assert_eq!(grids(&Case { precision: Precision::Bf16, ..CASE }), [32, 32]);
        // 64 blocks leave 68 multiprocessors, room for 17 chunks of 8 blocks at a time.
        assert_eq!(grids(&Case { hk: 8, hv: 16, ..CASE }).len(), 5);
        // Two sequences are 128 blocks of the other scan. 4 multiprocessors have no room for a chunk of both.
        assert_eq!(grids(&Case { b: 2, ..CASE }).len(), 5);
    }

    #[test]
    fn few_heads_are_scanned_in_pieces() {
        let kinds = |case: &Case| launches(&case.problem(), &H100).1.iter().map(kind).collect::<Vec<_>>();
        assert_eq!(kinds(&Case { hk: 2, hv: 4, ..CASE }), [0, 2, 3, 1]);
        assert_eq!(kinds(&Case { hk: 2, hv: 4, t: 400, ..CASE }), [0, 1], "too short");
        assert_eq!(kinds(&Case { t: 1024, ..CASE }), [0, 1], "enough heads");
        let (_, all) = launches(&Case { hk: 2, hv: 4, ..CASE }.problem(), &H100);
        // 64 chunks in 8 pieces.
        assert_eq!(all[1].grid, [4, 4, 7]);
        assert_eq!(all[2].grid, [32, 4, 1]);
        assert_eq!(all[3].grid, [2, 4, 8]);
    }

    #[test]
    fn one_chunk_is_one_launch() {
        let kinds = |case: &Case, device| launches(&case.problem(), device).1.iter().map(kind).collect::<Vec<_>>();
        let case = Case { t: 64, ..CASE };
        assert_eq!(kinds(&case, &H100), [4]);
        assert_eq!(kinds(&Case { t: 65, ..case }, &H100), [0, 1]);
        assert_eq!(kinds(&Case { t: 67, snapshots: 3, ..case }, &H100), [4], "the rest is token-serial");
        assert_eq!(kinds(&Case { b: 2, ..case }, &H100), [0, 1], "more blocks than multiprocessors");
        assert_eq!(kinds(&Case { b: 2, hk: 8, hv: 16, ..case }, &H100), [4]);
        assert_eq!(kinds(&case, &SLICE), [0, 1]);
        assert_eq!(kinds(&case, &ADA), [0, 1]);
    }

    #[test]
    fn variable_lengths_are_cut_by_chunks_of_all() {
        let problem = Case { t: 10_000, b: 9, ragged: true, ..CASE }.problem();
        for device in [H100, ADA] {
            let (_, all) = launches(&problem, &device);
            let mut next = 0;
            for launch in all.iter().filter(|launch| launch.grid[2] == 9) {
                let a = arguments(launch);
                assert_eq!((a.chunk0, a.seq0, a.nseq), (next, 0, 9));
                assert_ne!(a.carry_in, a.carry_out);
                next += a.nchunks;
            }
            assert_eq!(next as usize, 10_000 / device.chunk + 10);
        }
    }

    #[test]
    fn what_the_chunked_kernels_do_not_take() {
        let takes = |case: &Case| Chunked::new(&case.problem(), PROMPT).is_some();
        assert!(takes(&CASE));
        assert!(!takes(&Case { t: PROMPT - 1, ..CASE }));
        assert!(!takes(&Case { s: 32, ..CASE }));
        assert!(!takes(&Case { t: 50, snapshots: 4, ..CASE }), "too few tokens before the snapshots");
        assert!(!takes(&Case { ragged: true, snapshots: 2, ..CASE }));
        assert!(takes(&Case { ragged: true, snapshots: 1, ..CASE }));
        assert!(!takes(&Case { ragged: true, b: 400, ..CASE }), "short sequences");
        let tail =
            |snapshots, skip| Chunked::new(&Case { snapshots, skip, ..CASE }.problem(), PROMPT).expect("a prompt").tail;
        assert_eq!([tail(0, 0), tail(1, 0), tail(1, 1), tail(4, 0), tail(4, 1)], [0, 0, 2, 4, 5]);
    }

    #[test]
    fn windows_keep_what_they_are_faster_for() {
        let chunked = |case: &Case| Plan::new(&case.problem()).expect("a plan").chunked.is_some();
        let exact = |t| chunked(&Case { t, ..CASE });
        assert!(!exact(40) && exact(41) && exact(64) && !exact(65) && !exact(67) && exact(68));
        let bf16 = |t| chunked(&Case { t, precision: Precision::Bf16, ..CASE });
        assert!(!bf16(32) && bf16(33) && bf16(65));
        let batch = |b, t| chunked(&Case { b, t, ..CASE });
        assert!(!batch(2, 47) && batch(2, 48) && !batch(8, 56) && batch(8, 57));
    }

    #[test]
    fn blocks_that_fit_have_a_multiprocessor_each() {
        /// Shared memory of one, and what of it goes with every block.
        const ALL: u32 = 228 << 10;
        const EACH: u32 = 1 << 10;
        for (t, together, share) in [(128, 1, 1), (256, 1, 1), (512, 1, 2), (1024, 2, 2)] {
            for precision in [Precision::Exact, Precision::Bf16] {
                let problem = Case { t, precision, ..CASE }.problem();
                let first = &launches(&problem, &H100).1[0];
                assert_eq!(ALL / (first.shared + EACH), together, "{t} tokens");
                assert_eq!(arguments(first).share, share);
                assert_eq!(first.grid[1], 32 / share as u32);
            }
        }
    }
}
