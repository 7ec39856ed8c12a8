//! Which kernel a problem gets, and how it is launched. The one place where shape chooses a CUDA kernel.

use super::abi::{DnFast, DnProblem};
use super::chunked::{ChunkArgs, Chunked};
use crate::error::{Error, Result, Status};
use crate::params::Precision;
use crate::problem::Problem;
use std::ffi::{CStr, c_void};
use std::fmt;

/// What a token-serial kernel takes.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// A single token of plain sequences, f32 in fours, no snapshots, no clamp.
    One,
    /// More than a few tokens, f32 in fours, no snapshots, no clamp.
    Window,
    /// f32 in fours.
    Fast,
    /// Everything.
    Any,
}

/// A token-serial kernel, as kernels/recurrent_shapes.h lists it.
pub(crate) struct Shape {
    #[cfg_attr(not(deltanet_nvcc), allow(dead_code, reason = "only loading looks kernels up"))]
    pub name: &'static CStr,
    kind: Kind,
    head_size: usize,
    value_contiguous: bool,
    channel_gate: bool,
    lanes: usize,
    columns: usize,
    warps: usize,
}

/// Every token-serial kernel.
pub(crate) static SHAPES: &[Shape] = include!(concat!(env!("OUT_DIR"), "/recurrent_shapes.rs"));

/// Tokens a sequence from which the kernel for windows is faster than the one that goes token by token.
const WINDOWED: usize = 5;

/// Tokens a sequence from which the chunked kernels are faster than the token-serial ones.
pub(super) const PROMPT: usize = 48;

/// The same beside the kernel for windows with `blocks` blocks, for sequences of about `tokens`. Chunks are whole, 64 tokens on
/// an H100, where this was measured; the first one takes a single launch where every block has a multiprocessor, and a second
/// one as long as another thirteen tokens in windows.
fn prompt_beside_windows(blocks: usize, tokens: usize, precision: Precision) -> usize {
    /// Blocks that have a multiprocessor each on a large device, and those that are on it at once.
    const ALONE: usize = 132;
    const AT_ONCE: usize = 264;
    let (one_chunk, two_chunks) = match precision {
        Precision::Bf16 => (33, 65),
        _ => (41, 68),
    };
    if blocks > AT_ONCE {
        57
    } else if blocks > ALONE {
        PROMPT
    } else if tokens <= 64 {
        one_chunk
    } else {
        two_chunks
    }
}

/// Tokens that a general kernel stages in shared memory at a time.
const TILE: usize = 8;

/// CUDA's limit on the second and third axis of a grid. Kernels walk over the sequences past it, not over heads.
const GRID_LIMIT: usize = 65535;

impl Shape {
    fn threads(&self) -> usize {
        32 * self.warps
    }

    /// Value columns of one block.
    fn block_columns(&self) -> usize {
        self.warps * (32 / self.lanes) * self.columns
    }

    /// Bytes of a staged token: k, q, the decays, the block's values, and four scalars.
    fn row_bytes(&self) -> usize {
        let decays = if self.channel_gate { self.head_size } else { 4 };
        (2 * self.head_size + decays + 32 + 4) * size_of::<f32>()
    }
}

/// A kernel's only argument.
pub(crate) enum Arguments {
    Fast(DnFast),
    Any(DnProblem),
    Chunk(ChunkArgs),
}

/// One kernel launch. It may start before the launch ahead of it is done: the kernel waits for that itself.
pub(crate) struct Launch {
    /// Index of the kernel among all.
    pub function: usize,
    pub grid: [u32; 3],
    pub threads: u32,
    /// Bytes of dynamic shared memory.
    pub shared: u32,
    pub arguments: Arguments,
}

impl Launch {
    pub fn argument(&mut self) -> *mut c_void {
        match &mut self.arguments {
            Arguments::Fast(arguments) => (&raw mut *arguments).cast(),
            Arguments::Any(arguments) => (&raw mut *arguments).cast(),
            Arguments::Chunk(arguments) => (&raw mut *arguments).cast(),
        }
    }
}

/// How a problem is run on CUDA.
pub(crate) struct Plan {
    /// The token-serial kernel for all tokens; none where there is nothing to compute.
    pub launch: Option<Launch>,
    /// The chunked kernels instead, on devices that have them.
    pub chunked: Option<Chunked>,
    /// Bytes of device memory that the kernels need beside the tensors, the same on every device.
    pub workspace: usize,
}

/// States whose value channels are neighbours are walked along those; for all others the order does not matter.
pub(crate) fn value_contiguous(problem: &Problem) -> bool {
    problem.state_in.nb_v == size_of::<f32>() && problem.state_in.nb_k != size_of::<f32>()
}

/// An error that says what CUDA cannot do.
pub(crate) fn unsupported(words: fmt::Arguments<'_>) -> Error {
    Error::compose(Status::Unsupported, words)
}

impl Plan {
    /// The plan for `problem`.
    pub fn new(problem: &Problem) -> Result<Plan> {
        let (s, heads) = (problem.head_size(), problem.value_heads());
        let value_contiguous = value_contiguous(problem);
        let mut any = DnProblem::of(problem, value_contiguous)?;
        let fast = any.fast();
        let length =
            if problem.cu_seqlens.is_some() { problem.tokens() / problem.sequences().max(1) } else { problem.tokens() };
        let windowed = fast.is_some() && !any.is_eventful() && length >= WINDOWED;
        let fits = |shape: &&Shape| {
            shape.value_contiguous == value_contiguous
                && shape.channel_gate == problem.channel_gate()
                && match shape.kind {
                    Kind::One => any.is_single() && fast.is_some() && shape.head_size == s,
                    Kind::Window => windowed && shape.head_size == s,
                    Kind::Fast => fast.is_some() && shape.head_size == s,
                    Kind::Any => shape.head_size >= s,
                }
        };
        // The table goes from the narrowest kind to the widest, and up in head sizes.
        let Some(function) = SHAPES.iter().position(|shape| fits(&shape)) else {
            return Err(unsupported(format_args!("v.ne[0] (the head size) is {s}; on CUDA it must be at most 256")));
        };
        if heads > GRID_LIMIT {
            return Err(unsupported(format_args!(
                "v.ne[1] (the value heads) is {heads}; on CUDA it must be at most 65535"
            )));
        }
        if problem.sequences() == 0 || problem.writes_nothing() {
            return Ok(Plan { launch: None, chunked: None, workspace: 0 });
        }
        let shape = &SHAPES[function];
        let tile = TILE.min(problem.tokens()).max(1);
        any.tile = tile as i32;
        let (shared, arguments) = match fast {
            Some(fast) if shape.kind != Kind::Any => (0, Arguments::Fast(fast)),
            _ => (tile * shape.row_bytes(), Arguments::Any(any)),
        };
        let grid = [s.div_ceil(shape.block_columns()), heads, problem.sequences().min(GRID_LIMIT)];
        let launch = Launch {
            function,
            grid: grid.map(|blocks| blocks as u32),
            threads: shape.threads() as u32,
            shared: shared as u32,
            arguments,
        };
        let prompt = match shape.kind {
            Kind::Window => prompt_beside_windows(grid[0] * heads * problem.sequences(), length, problem.precision()),
            _ => PROMPT,
        };
        let chunked = Chunked::new(problem, prompt);
        Ok(Plan { launch: Some(launch), chunked, workspace: chunked.map_or(0, |chunked| chunked.workspace) })
    }
}
