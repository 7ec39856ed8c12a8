//! What a problem gets: kernel, tile, tasks and scratch. The one place where hardware and shape choose a kernel.
//!
//! A plan depends on the problem and the instruction set alone, never on the number of threads, so that results have
//! the same bits for any number.

use crate::cpu::{Isa, chunked, pieces, recurrent};
use crate::error::{Result, ensure};
use crate::problem::Problem;
use std::fmt;

/// How a problem is run on the CPU.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    isa: Isa,
    chunk: usize,
    /// Tokens from which the chunked kernel is faster.
    crossover: usize,
    tasks: usize,
    scratch: usize,
}

/// Alignment of each part's scratch: a cache line and the widest vector.
pub(crate) const SCRATCH_ALIGN: usize = 64;

impl Plan {
    /// The plan for `problem` on instruction set `isa`, which the CPU must have.
    pub fn new(problem: &Problem, isa: Isa) -> Result<Plan> {
        ensure!(
            isa.is_available(),
            Unsupported,
            "isa is {}; this CPU has {} at best",
            isa.name(),
            Isa::detected().name()
        );
        let s = problem.head_size();
        // Without anything to write, the counts may stand for no memory at all and be far too many to walk through.
        let heads = if problem.writes_nothing() { 0 } else { problem.sequences() * problem.value_heads() };
        let tasks = heads * pieces::per_head(problem);
        let chunked = s <= chunked::MAX_HEAD_SIZE;
        // Up to the crossover a window of tokens or two is faster; states with value channels contiguous need no
        // transposing for the chunked kernel.
        let (chunk, crossover) = match isa {
            Isa::Scalar => (16, 16),
            Isa::Avx2 => (24, if problem.state_in.nb_v == size_of::<f32>() { 5 } else { 8 }),
            Isa::Avx512 => (24, 9),
        };
        let chunk = if chunked { chunk } else { 0 };
        let floats = recurrent::scratch_floats(s).max(if chunked { chunked::scratch_floats(s) } else { 0 });
        Ok(Plan { isa, chunk, crossover, tasks, scratch: floats * size_of::<f32>() + SCRATCH_ALIGN })
    }

    /// How many of a sequence's tokens, from the first on, go through the chunked kernel.
    pub(crate) fn chunked_tokens(&self, problem: &Problem, tokens: usize) -> usize {
        let prefix = problem.snapshots.map_or(tokens, |snapshots| snapshots.first_token(tokens));
        if self.chunk > 0 && prefix >= self.crossover { prefix } else { 0 }
    }

    /// Tokens of a chunk for a run of `tokens`: chunks of nearly the same length, in whole tiles as far as it goes.
    pub(crate) fn chunk_for(&self, tokens: usize) -> usize {
        let count = tokens.div_ceil(self.chunk.max(1)).max(1);
        tokens.div_ceil(count).next_multiple_of(self.isa.tile_rows()).min(self.chunk)
    }

    /// Chunks that a thread with several key heads runs of each before it goes on to the next one.
    pub(crate) fn block_chunks(&self) -> usize {
        match self.isa {
            Isa::Avx512 => 32,
            _ => 8,
        }
    }

    /// Whether the longest sequence there can be has tokens that go through the chunked kernel.
    pub fn is_chunked(&self, problem: &Problem) -> bool {
        self.chunked_tokens(problem, problem.tokens()) > 0
    }

    /// Tokens of a chunk; 0 where every token goes through the recurrent kernel.
    pub fn chunk(&self) -> usize {
        self.chunk
    }

    /// The instruction set.
    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// Value columns of one task.
    pub fn columns(&self) -> usize {
        pieces::PIECE
    }

    /// Independent pieces of work: (sequence, head, block of value columns). More threads than this do not help.
    pub fn tasks(&self) -> usize {
        self.tasks
    }

    /// Bytes of scratch that each part needs, whatever its alignment.
    pub fn scratch_size(&self) -> usize {
        self.scratch
    }
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Plan { isa, chunk, crossover, tasks, scratch } = self;
        match chunk {
            0 => write!(f, "recurrent kernel")?,
            _ => write!(f, "recurrent kernel below {crossover} tokens, chunked kernel by {chunk} tokens from there")?,
        }
        let columns = self.columns();
        write!(
            f,
            ", {}, blocks of {columns} value columns, {tasks} tasks, {scratch} bytes of scratch a thread",
            isa.name()
        )
    }
}
