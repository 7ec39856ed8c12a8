//! The state's way through llama.cpp's graphs, shortened.
//!
//! llama.cpp gathers the sequences' state rows from the cache (GET_ROWS), runs the operator, and copies the new states
//! into the cache (CPY). Where nothing else sees the gathered rows or the states behind the outputs, the operator can
//! read and write the cache rows itself. The gather then happens later than the host had it and the copy earlier, so
//! nothing in between may touch those rows. Every doubt is decided for the host's own way.

use super::abi::{FLAG_COMPUTE, FLAG_OUTPUT, Graph, TYPE_F32, TYPE_I32, Tensor};
use super::symbols::Ops;
use super::tensor::{Operands, Places, States};
use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

/// What may be left out for one node, and where its states then lie.
#[derive(Default)]
pub struct Fusion {
    pub read: Option<Read>,
    pub write: Option<Write>,
    /// Why a part stays with the host, for the log.
    pub why_not: Vec<&'static str>,
}

/// A gather that the operator can do itself.
pub struct Read {
    pub gather: *mut Tensor,
    pool: States,
    rows: Box<[i32]>,
    /// The memory from the first row read to the end of the last.
    pub span: (usize, usize),
}

/// A copy that the operator can do itself.
pub struct Write {
    pub copy: *mut Tensor,
    target: States,
    slot_stride: usize,
    /// The memory from the first row written to the end of the last.
    pub span: (usize, usize),
}

impl Fusion {
    /// The places of a run with the parts that are asked for.
    pub fn places(&self, operands: &Operands, read: bool, write: bool) -> Option<Places> {
        let mut places = operands.own_places();
        if read {
            let read = self.read.as_ref()?;
            (places.source, places.rows_in) = (read.pool, Some(read.rows.clone()));
        }
        if write {
            let write = self.write.as_ref()?;
            (places.target, places.slot_stride) = (write.target, write.slot_stride);
        }
        if let (true, Some(rows_in)) = (write, &mut places.rows_in) {
            share_pool(rows_in, &mut places.source, &mut places.target, &mut places.rows_out);
        }
        Some(places)
    }
}

/// First byte, and past the last, of rows `low` to `high` of a cache.
fn rows_span(states: &States, low: usize, high: usize, row: usize) -> (usize, usize) {
    let start = states.data as usize;
    (start + low * states.row_stride, start + high * states.row_stride + row)
}

/// Where both are rows of one cache, describes both as the same pool, cut to the rows in use, so that the problem's
/// own rules about rows in place apply. Otherwise changes nothing, and the problem's overlap rule decides.
fn share_pool(rows_in: &mut [i32], source: &mut States, target: &mut States, rows_out: &mut Option<Box<[i32]>>) {
    let stride = source.row_stride;
    let distance = (target.data as usize).wrapping_sub(source.data as usize);
    let first = distance / stride;
    if target.row_stride != stride || !distance.is_multiple_of(stride) || first + target.rows > source.rows {
        return;
    }
    let read = rows_in.iter().map(|row| *row as usize);
    let low = read.clone().min().unwrap_or(first).min(first);
    let high = read.max().unwrap_or(first).max(first + target.rows - 1);
    let pool = States { data: source.data.wrapping_add(low * stride), rows: high - low + 1, row_stride: stride };
    rows_in.iter_mut().for_each(|row| *row -= low as i32);
    *rows_out = Some((0..target.rows).map(|b| (first - low + b) as i32).collect());
    (*source, *target) = (pool, pool);
}

/// Addresses are their own hash, but for the zeros of their alignment.
#[derive(Default)]
struct AddressHasher(u64);

impl Hasher for AddressHasher {
    fn finish(&self) -> u64 {
        self.0
    }
    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 = self.0.rotate_left(8) ^ u64::from(*byte);
        }
    }
    fn write_usize(&mut self, address: usize) {
        self.0 = (address as u64 >> 4).wrapping_mul(0x9E37_79B9_7F4A_7C15).rotate_left(32);
    }
}

/// A tensor with all views of it, and who looks at them.
struct Family {
    /// Where the tensor is among the nodes.
    node: Option<usize>,
    /// Nodes that read it or a view of it, and what they read.
    readers: Vec<(usize, *mut Tensor)>,
    /// Uses that this graph shows, and those that the whole graph counts: more there are readers we do not see.
    seen: i64,
    counted: Option<i64>,
    /// An operation writes through a view.
    written: bool,
    /// A member is an output of the graph: the caller may read it.
    output: bool,
}

impl Family {
    fn count(&mut self, uses: Option<i64>) {
        self.counted = self.counted.zip(uses).map(|(all, more)| all + more);
    }

    fn closed(&self) -> Result<(), &'static str> {
        match () {
            () if self.output => Err("an output flag is set"),
            () if self.written => Err("another operation writes to it"),
            () if self.counted != Some(self.seen) => Err("something outside this graph reads it"),
            () => Ok(()),
        }
    }
}

/// What the graph around the operator's nodes looks like: one pass over all nodes.
pub struct Surroundings<'a> {
    nodes: &'a [*mut Tensor],
    ops: &'a Ops,
    families: HashMap<usize, Family, BuildHasherDefault<AddressHasher>>,
}

impl<'a> Surroundings<'a> {
    /// Looks at `nodes` on behalf of the operator's nodes `taken` (index and operands).
    ///
    /// # Safety
    /// The nodes are `graph`'s, of a host whose structures have the known layout.
    pub unsafe fn new(graph: &Graph, nodes: &'a [*mut Tensor], ops: &'a Ops, taken: &[(usize, Operands)]) -> Self {
        let mut families: HashMap<usize, Family, _> = HashMap::default();
        for (index, operands) in taken {
            for root in [nodes[*index], Tensor::root(operands.state)] {
                // SAFETY: the caller vouches for the graph and its tables.
                let counted = unsafe { graph.uses(root) };
                // SAFETY: roots are tensors of the graph.
                let output = unsafe { (*root).flags } & FLAG_OUTPUT != 0;
                let family = Family { node: None, readers: Vec::new(), seen: 0, counted, written: false, output };
                families.entry(root as usize).or_insert(family);
            }
        }
        for (index, node) in nodes.iter().enumerate() {
            // SAFETY: the caller vouches for the nodes.
            let tensor = unsafe { &**node };
            let idle = ops.is_view(tensor.op) || tensor.elements() == 0;
            if let Some(family) = families.get_mut(&(*node as usize)) {
                family.node = Some(index);
            } else if let Some(family) = families.get_mut(&(Tensor::root(*node) as usize)) {
                // SAFETY: as above.
                family.count(unsafe { graph.uses(*node) });
                family.written |= !idle;
                family.output |= tensor.flags & FLAG_OUTPUT != 0;
            }
            for source in tensor.src.into_iter().filter(|source| !source.is_null()) {
                if let Some(family) = families.get_mut(&(Tensor::root(source) as usize)) {
                    family.seen += 1;
                    // SAFETY: sources of nodes are tensors.
                    if !idle && unsafe { (*source).elements() } > 0 {
                        family.readers.push((index, source));
                    }
                }
            }
        }
        Surroundings { nodes, ops, families }
    }

    /// What the operator's node at `index` may do itself.
    ///
    /// # Safety
    /// As for [`Surroundings::new`]; `is_host` answers whether a buffer is memory that this process can read.
    pub unsafe fn fusion(&self, index: usize, operands: &Operands, is_host: impl Fn(&Tensor) -> bool) -> Fusion {
        let mut fusion = Fusion::default();
        // SAFETY: passed on.
        match unsafe { self.read(index, operands, &is_host) } {
            Ok(read) => fusion.read = Some(read),
            Err(why) => fusion.why_not.push(why),
        }
        // SAFETY: passed on.
        match unsafe { self.write(index, operands, &is_host) } {
            Ok(write) => fusion.write = Some(write),
            Err(why) => fusion.why_not.push(why),
        }
        fusion
    }

    /// # Safety
    /// As for [`Surroundings::fusion`].
    unsafe fn read(
        &self,
        index: usize,
        operands: &Operands,
        is_host: &impl Fn(&Tensor) -> bool,
    ) -> Result<Read, &'static str> {
        let root = Tensor::root(operands.state);
        // SAFETY: a source of a node and its root are tensors.
        let (state, gather) = unsafe { (&*operands.state, &*root) };
        if gather.op != self.ops.get_rows {
            return Err("state read: the state does not come from GET_ROWS");
        }
        let family = self.families.get(&(root as usize)).ok_or("state read: the gather is not in this graph")?;
        let gathered_at = family.node.filter(|at| *at < index).ok_or("state read: the gather is not in this graph")?;
        family.closed()?;
        if family.readers != [(index, operands.state)] {
            return Err("state read: something else reads the gathered rows");
        }
        let [pool, ids] = [gather.src[0], gather.src[1]];
        if pool.is_null() || ids.is_null() || gather.flags & FLAG_COMPUTE == 0 {
            return Err("state read: an unknown form of GET_ROWS");
        }
        // SAFETY: sources of a node are tensors, and so are the roots of views.
        let (pool, ids, pool_root, ids_root) = unsafe { (&*pool, &*ids, &*Tensor::root(pool), &*Tensor::root(ids)) };
        let row = operands.state_bytes();
        let plain = pool.dtype == TYPE_F32
            && gather.dtype == TYPE_F32
            && gather.is_contiguous()
            && pool.ne[0] as usize == operands.state_elements()
            && gather.ne[0] == pool.ne[0]
            && pool.ne[2..] == [1, 1]
            && pool.nb[0] == 4
            && pool.nb[1] >= row
            && ids.dtype == TYPE_I32
            && ids.ne[1..] == [1, 1, 1]
            && ids.ne[0] == gather.ne[1];
        if !plain {
            return Err("state read: an unknown form of GET_ROWS");
        }
        // SAFETY: passed on.
        let computed = ids_root.op != self.ops.none || unsafe { self.touched(0..gathered_at, ids.span(), false) };
        if computed || ids.data.is_null() || !is_host(ids) {
            return Err("state read: the row ids are not readable before the graph runs");
        }
        if pool_root.op != self.ops.none || !is_host(pool) {
            return Err("state read: the rows are not a cache in host memory");
        }
        let offset = (state.data as usize).wrapping_sub(gather.data as usize);
        let first = offset / row;
        if !offset.is_multiple_of(row) || first + operands.sequences > ids.ne[0] as usize {
            return Err("state read: an unknown form of GET_ROWS");
        }
        let read_id = |b: usize| {
            // SAFETY: `first + b` is below the extent of a host tensor of 32-bit ids, which nothing in this graph
            // writes (its root is no operation), so that the host has filled it in.
            unsafe { ids.data.cast::<u8>().add((first + b) * ids.nb[0]).cast::<i32>().read_unaligned() }
        };
        let rows: Box<[i32]> = (0..operands.sequences).map(read_id).collect();
        let pool = States { data: pool.data.cast(), rows: pool.ne[1] as usize, row_stride: pool.nb[1] };
        if rows.iter().any(|row| *row < 0 || *row as usize >= pool.rows) {
            return Err("state read: a row id is outside the cache");
        }
        let low = rows.iter().copied().min().unwrap_or(0) as usize;
        let high = rows.iter().copied().max().unwrap_or(0) as usize;
        let span = rows_span(&pool, low, high, row);
        // SAFETY: passed on.
        if unsafe { self.touched(gathered_at + 1..index, span, false) } {
            return Err("state read: the rows are written between the gather and the operator");
        }
        Ok(Read { gather: root, pool, rows, span })
    }

    /// # Safety
    /// As for [`Surroundings::fusion`].
    unsafe fn write(
        &self,
        index: usize,
        operands: &Operands,
        is_host: &impl Fn(&Tensor) -> bool,
    ) -> Result<Write, &'static str> {
        let node = self.nodes[index];
        // SAFETY: a node of the graph.
        let dst = unsafe { &*node };
        let family = self.families.get(&(node as usize)).ok_or("state write: an unknown form of the graph")?;
        family.closed()?;
        let states_at = dst.data as usize + operands.out_bytes;
        let mut copy = None;
        for (reader, source) in &family.readers {
            // SAFETY: sources of nodes are tensors.
            let (start, end) = unsafe { (**source).span() };
            if end <= states_at && start >= dst.data as usize {
                continue;
            }
            // SAFETY: a node of the graph.
            let is_copy = unsafe { (*self.nodes[*reader]).op } == self.ops.copy;
            if !is_copy || copy.replace((*reader, *source)).is_some() {
                return Err("state write: something other than one CPY reads the new states");
            }
        }
        let (copied_at, source) = copy.ok_or("state write: no CPY of the new states in this graph")?;
        // SAFETY: nodes of the graph and their sources.
        let (copy, source) = unsafe { (&*self.nodes[copied_at], &*source) };
        let target = copy.src[1];
        if copied_at <= index || target.is_null() || copy.flags & FLAG_COMPUTE == 0 {
            return Err("state write: an unknown form of CPY");
        }
        // SAFETY: sources of a node are tensors, and so are the roots of views.
        let (target, target_root) = unsafe { (&*target, &*Tensor::root(target)) };
        let (state, b) = (operands.state_elements(), operands.sequences);
        let (row, slots) = (operands.state_bytes(), operands.written_slots());
        let whole = source.data as usize == states_at
            && source.dtype == TYPE_F32
            && target.dtype == TYPE_F32
            && source.is_contiguous()
            && source.elements() == state * b * slots
            && target.elements() == source.elements()
            && target.data == copy.data;
        if !whole {
            return Err("state write: the CPY takes other elements than the new states");
        }
        let rows = [state as i64, b as i64, slots as i64, 1];
        let (row_stride, slot_stride) = if target.is_contiguous() {
            (row, row * b)
        } else if target.ne == rows && target.nb[0] == 4 && target.nb[1] >= row {
            (target.nb[1], if slots > 1 { target.nb[2] } else { target.nb[1] * b })
        } else {
            return Err("state write: an unknown form of CPY");
        };
        if target_root.op != self.ops.none || !is_host(target) {
            return Err("state write: the target is not a cache in host memory");
        }
        // SAFETY: passed on.
        if unsafe { self.touched(index + 1..copied_at, target.span(), true) } {
            return Err("state write: the target is used between the operator and the CPY");
        }
        let span = target.span();
        let target = States { data: target.data.cast(), rows: b, row_stride };
        Ok(Write { copy: self.nodes[copied_at], target, slot_stride, span })
    }

    /// Whether one of these nodes writes, or with `reads` reads, memory in `span`.
    ///
    /// # Safety
    /// As for [`Surroundings::new`].
    unsafe fn touched(&self, between: std::ops::Range<usize>, span: (usize, usize), reads: bool) -> bool {
        let meets = |tensor: *mut Tensor| {
            // SAFETY: nodes and their sources are tensors.
            let (start, end) = unsafe { (*tensor).span() };
            start < span.1 && span.0 < end
        };
        self.nodes[between].iter().any(|node| {
            // SAFETY: a node of the graph.
            let tensor = unsafe { &**node };
            !self.ops.is_view(tensor.op)
                && tensor.elements() > 0
                && (meets(*node) || reads && tensor.src.iter().any(|source| !source.is_null() && meets(*source)))
        })
    }
}
