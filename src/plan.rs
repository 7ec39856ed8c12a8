//! What a problem gets: kernel, tile, tasks and scratch. The one place where hardware and shape choose a kernel.
//!
//! A plan depends on the problem and the instruction set alone, never on the number of threads, so that results have
//! the same bits for any number.

use crate::cpu::Isa;
use crate::error::{Result, ensure};
use crate::problem::Problem;
use std::fmt;

/// How a problem is run on the CPU.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    isa: Isa,
    columns: usize,
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
        let columns = crate::cpu::recurrent::BLOCK.min(s);
        // Without anything to write, the counts may stand for no memory at all and be far too many to walk through.
        let heads = if problem.writes_nothing() { 0 } else { problem.sequences() * problem.value_heads() };
        let tasks = heads * s.div_ceil(columns);
        let scratch = crate::cpu::recurrent::scratch_floats(s) * size_of::<f32>() + SCRATCH_ALIGN;
        Ok(Plan { isa, columns, tasks, scratch })
    }

    /// The instruction set.
    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// Value columns of one task.
    pub fn columns(&self) -> usize {
        self.columns
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
        let Plan { isa, columns, tasks, scratch } = self;
        write!(
            f,
            "recurrent kernel, {}, blocks of {columns} value columns, {tasks} tasks, {scratch} bytes of scratch a thread",
            isa.name()
        )
    }
}
