//! The C interface: for any bytes of the params struct, with memory behind it, a call returns a status, or exactly the
//! oracle's answer, and writes nothing else.
//!
//! A case is a valid problem drawn from the first bytes, each tensor in a slot between guard pages, and then any number
//! of changes to the struct, drawn from the rest. Only a caller can promise that tensors are as large as described: a
//! case whose tensors are not is checked, never run.

use crate::arena::{Arena, Buffer, SLOT};
use crate::bytes::{Bytes, Rng};
use deltanet::{
    Dtype, Params, Problem, Status, Tensor, deltanet_describe, deltanet_last_error, deltanet_run, deltanet_run_part,
    deltanet_scratch_size, deltanet_supports, reference,
};
use std::ffi::CStr;
use std::ops::Range;

/// Slots of the arena: the tensors of [`tensors`], in that order, then the scratch and the struct itself.
const TENSORS: usize = 12;
const SCRATCH: usize = TENSORS;
const STRUCT: usize = TENSORS + 1;

/// Work above which a case is not compared with the oracle.
const MOST_WORK: usize = 1 << 23;

fn tensors(p: &Params) -> [&Tensor; TENSORS] {
    [
        &p.q,
        &p.k,
        &p.v,
        &p.g,
        &p.beta,
        &p.state_in,
        &p.out,
        &p.state_out,
        &p.snapshots,
        &p.rows_in,
        &p.rows_out,
        &p.cu_seqlens,
    ]
}

fn tensors_mut(p: &mut Params) -> [&mut Tensor; TENSORS] {
    [
        &mut p.q,
        &mut p.k,
        &mut p.v,
        &mut p.g,
        &mut p.beta,
        &mut p.state_in,
        &mut p.out,
        &mut p.state_out,
        &mut p.snapshots,
        &mut p.rows_in,
        &mut p.rows_out,
        &mut p.cu_seqlens,
    ]
}

const OUT: usize = 6;
const STATE_OUT: usize = 7;
const SNAPSHOTS: usize = 8;
const INDICES: Range<usize> = 9..12;

fn size_of_dtype(code: u32) -> usize {
    match code {
        1 | 2 => 2,
        4 => 8,
        _ => 4,
    }
}

/// What a case's data look like.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Values {
    /// Such that f32 arithmetic stays near the oracle's.
    Tame,
    /// Any bits: infinities, NaN, denormals.
    Wild,
}

struct Case {
    params: Params,
    buffers: Vec<Buffer>,
    values: Values,
    /// Changed, so that it need not be valid.
    changed: bool,
    /// The struct as it was drawn.
    drawn: Params,
}

impl Case {
    fn draw(bytes: &mut Bytes) -> Case {
        let s = bytes.pick(&[16, 16, 16, 16, 16, 32, 16, 48]);
        let tokens = if bytes.rarely() { 64 + bytes.below(40) } else { bytes.below(20) };
        // Mostly one of each: small cases are many.
        let two = |bytes: &mut Bytes| 1 + usize::from(bytes.rarely());
        let key_heads = two(bytes);
        let value_heads = key_heads * (1 + bytes.below(2));
        let ragged = bytes.rarely();
        let qk_sequences = if ragged { 1 } else { two(bytes) };
        let token_sequences = if ragged { 1 } else { qk_sequences * two(bytes) };
        let sequences = if ragged { 1 + bytes.below(4) } else { token_sequences };
        let pool = bytes.rarely();
        let rows = if pool { sequences + bytes.below(3) } else { sequences };
        let in_place = bytes.rarely();
        let gate_channels = if bytes.rarely() { s } else { 1 };
        let n_snapshots = if bytes.rarely() { 1 + bytes.below(4) } else { 0 };
        let slots = n_snapshots.max(1);
        let float = |bytes: &mut Bytes| bytes.pick(&[Dtype::F32, Dtype::F32, Dtype::F16, Dtype::Bf16]);
        let index = |bytes: &mut Bytes| bytes.pick(&[Dtype::I32, Dtype::I64]);
        let state = [s, s, value_heads, rows];
        let shapes: [(Dtype, [usize; 4], usize); TENSORS] = [
            (float(bytes), [s, key_heads, tokens, qk_sequences], 1),
            (float(bytes), [s, key_heads, tokens, qk_sequences], 1),
            (float(bytes), [s, value_heads, tokens, token_sequences], 1),
            (Dtype::F32, [gate_channels, value_heads, tokens, token_sequences], 1),
            (Dtype::F32, [1, value_heads, tokens, token_sequences], 1),
            (Dtype::F32, state, 1),
            (float(bytes), [s, value_heads, tokens, token_sequences], 1),
            (Dtype::F32, state, 1),
            (Dtype::F32, [s, s, value_heads, sequences], slots),
            (index(bytes), [sequences, 1, 1, 1], 1),
            (index(bytes), [sequences, 1, 1, 1], 1),
            (index(bytes), [sequences + 1, 1, 1, 1], 1),
        ];
        let wants_state = in_place || !bytes.rarely();
        let absent = |at: usize| match at {
            STATE_OUT => in_place || !wants_state,
            SNAPSHOTS => n_snapshots == 0,
            9 => !pool,
            10 => !pool || in_place || !wants_state,
            11 => !ragged,
            _ => false,
        };
        let arena = Arena::get();
        let mut params = Params::default();
        let mut buffers = Vec::with_capacity(TENSORS);
        let mut stride_of_slots = 0;
        for (at, tensor) in tensors_mut(&mut params).into_iter().enumerate() {
            let (dtype, ne, slots) = shapes[at];
            let order = bytes.pick(&[[0, 1, 2, 3], [0, 2, 1, 3], [0, 3, 1, 2], [1, 0, 2, 3], [3, 2, 1, 0]]);
            let gap = if bytes.rarely() { bytes.below(4) } else { 0 };
            let (nb, size, stride) = layout(dtype.size(), ne, slots, order, gap);
            if at == SNAPSHOTS {
                stride_of_slots = stride;
            }
            let size = if absent(at) { 0 } else { size };
            assert!(size <= SLOT, "tensor {at} of {ne:?} takes {size} bytes");
            let buffer = arena.take(at, size, !bytes.rarely());
            *tensor = Tensor {
                data: buffer.place.start as *mut _,
                ne: ne.map(|n| n as i64),
                nb,
                dtype: dtype as u32,
                reserved: 0,
            };
            buffers.push(buffer);
        }
        params.head_map = bytes.below(2) as u32;
        params.state_layout = bytes.below(2) as u32;
        params.beta_kind = bytes.below(2) as u32;
        params.snapshot_order = bytes.below(2) as u32;
        params.qk_norm = bytes.below(2) as u32;
        params.qk_norm_eps = bytes.pick(&[1e-6, 1e-3]);
        params.scale = bytes.pick(&[0.0, 0.0, 0.5, -2.0]);
        params.gate_max = bytes.pick(&[0.0, 0.0, 50.0, -0.5]);
        params.state_clamp = bytes.pick(&[0.0, 0.0, 1e6, 0.25]);
        params.n_snapshots = n_snapshots as u32;
        params.snapshot_slots = n_snapshots as u32;
        params.snapshot_stride = stride_of_slots;
        params.snapshot_skip = u32::from(bytes.rarely());
        let drawn = params;
        for (_, tensor) in tensors_mut(&mut params).into_iter().enumerate().filter(|(at, _)| absent(*at)) {
            *tensor = Tensor::default();
        }
        if in_place {
            (params.state_out, params.rows_out) = (params.state_in, params.rows_in);
        }
        let values = if bytes.rarely() { Values::Wild } else { Values::Tame };
        let case = Case { params, buffers, values, changed: false, drawn };
        case.fill(bytes, &shapes, rows);
        case
    }

    /// Writes data into every tensor, and valid rows and offsets into the index tensors.
    fn fill(&self, bytes: &mut Bytes, shapes: &[(Dtype, [usize; 4], usize); TENSORS], rows: usize) {
        let mut rng = Rng(bytes.number());
        let [s, _, tokens, _] = shapes[OUT].1;
        let norm = 1.5 / (s as f32).sqrt();
        for (at, (buffer, (dtype, _, _))) in self.buffers.iter().zip(shapes).enumerate() {
            let size = dtype.size();
            let shift = bytes.below(rows);
            let stride = tensors(&self.drawn)[at].nb[0].max(1);
            let value = |rng: &mut Rng, element: usize| match at {
                0 | 1 => rng.uniform(-norm, norm),
                3 => -rng.uniform(0.0, 1.0) * [0.01, 1.0, 20.0][element % 3],
                4 if self.params.beta_kind == 0 => rng.uniform(0.0, 1.0),
                4 => rng.uniform(-4.0, 4.0),
                _ => rng.uniform(-1.0, 1.0),
            };
            let integer = |element: usize| match (at, element * size / stride) {
                (9 | 10, entry) => (entry + shift) % rows,
                (_, entry) => entry * tokens / shapes[11].1[0].saturating_sub(1).max(1),
            };
            // One short loop for each kind: a fuzzer's counters make every branch dear.
            let wild_ones = self.values == Values::Wild;
            match dtype {
                Dtype::I32 => buffer.fill(|at| (integer(at) as i32).to_le_bytes()),
                Dtype::I64 => buffer.fill(|at| (integer(at) as i64).to_le_bytes()),
                Dtype::F32 if wild_ones => buffer.fill(|_| (wild(&mut rng) as u32).to_le_bytes()),
                _ if wild_ones => buffer.fill(|_| (wild(&mut rng) as u16).to_le_bytes()),
                Dtype::F32 => buffer.fill(|at| value(&mut rng, at).to_le_bytes()),
                Dtype::F16 => buffer.fill(|at| half(value(&mut rng, at)).to_le_bytes()),
                Dtype::Bf16 => buffer.fill(|at| ((value(&mut rng, at).to_bits() >> 16) as u16).to_le_bytes()),
            }
        }
    }

    /// Changes the struct as the remaining bytes say, each time one field, or one tensor's memory to another's.
    fn change(&mut self, bytes: &mut Bytes) {
        while !bytes.is_empty() {
            self.changed = true;
            let value = |bytes: &mut Bytes| {
                let small = u64::from(bytes.byte());
                match bytes.below(8) {
                    0 => small,
                    1 => small * 4,
                    2 => small.wrapping_neg(),
                    3 => 1 << (small % 64),
                    4 => (1u64 << (small % 64)).wrapping_sub(1),
                    5 => u64::from(f32::to_bits(small as f32 - 100.0)),
                    6 => u64::from(f32::to_bits([f32::NAN, f32::INFINITY, 1e30, 1e-40][small as usize % 4])),
                    _ => bytes.number(),
                }
            };
            match bytes.below(8) {
                // Any word of the struct.
                0 | 1 => {
                    let at = bytes.below(size_of::<Params>() / 4);
                    let word = value(bytes) as u32;
                    // SAFETY: inside the struct, whose fields may have any bits.
                    unsafe { (&raw mut self.params).cast::<u32>().add(at).write(word) };
                }
                2 | 3 => {
                    let axis = bytes.below(4);
                    tensors_mut(&mut self.params)[bytes.below(TENSORS)].ne[axis] = value(bytes) as i64;
                }
                4 | 5 => {
                    let axis = bytes.below(4);
                    tensors_mut(&mut self.params)[bytes.below(TENSORS)].nb[axis] = value(bytes) as usize;
                }
                // One tensor where another one is, or beside it.
                6 => {
                    let (from, to) = (bytes.below(TENSORS), bytes.below(TENSORS));
                    let (data, ne, nb) = {
                        let from = tensors(&self.params)[from];
                        (from.data, from.ne, from.nb)
                    };
                    let whole = bytes.often();
                    let offset = if bytes.often() { value(bytes) as usize } else { 0 };
                    let tensor = &mut tensors_mut(&mut self.params)[to];
                    tensor.data = data.wrapping_byte_add(offset);
                    if whole {
                        (tensor.ne, tensor.nb) = (ne, nb);
                    }
                }
                // A number in an index tensor.
                _ => {
                    let buffer = &self.buffers[INDICES.start + bytes.below(INDICES.len())];
                    let at = bytes.byte() as usize;
                    let number = value(bytes) as i32;
                    if 4 * at + 4 > buffer.place.len() {
                        continue;
                    }
                    // SAFETY: inside the buffer.
                    unsafe { ((buffer.place.start + 4 * at) as *mut i32).write_unaligned(number) };
                }
            }
        }
    }

    /// Whether f32 arithmetic must come near the oracle: every tensor still reads the data that were drawn for it, and
    /// the settings neither blow them up nor drown them.
    fn is_tame(&self) -> bool {
        let (p, drawn) = (&self.params, &self.drawn);
        let same =
            |(now, drawn): (&Tensor, &Tensor)| now.data.is_null() || (now.data, now.dtype) == (drawn.data, drawn.dtype);
        self.values == Values::Tame
            && tensors(p).into_iter().zip(tensors(drawn)).all(same)
            && p.beta_kind == drawn.beta_kind
            && (p.scale == 0.0 || (0.05..100.0).contains(&p.scale.abs()))
            && (p.state_clamp == 0.0 || p.state_clamp >= 0.05)
            && (p.qk_norm == 0 || (1e-7..=1.0).contains(&p.qk_norm_eps))
            && (p.gate_max == 0.0 || p.gate_max > -5.0)
    }

    /// Whether the tensor lies in one of the buffers, so that the promise of its size is true.
    fn holds(&self, at: usize) -> bool {
        let tensor = tensors(&self.params)[at];
        if tensor.data.is_null() || tensor.ne.iter().any(|n| *n <= 0) {
            // Absent or empty (or negative, which is refused): no memory to promise.
            return true;
        }
        let mut last = size_of_dtype(tensor.dtype) as i128;
        for axis in 0..4 {
            last = last.saturating_add((i128::from(tensor.ne[axis]) - 1).saturating_mul(tensor.nb[axis] as i128));
        }
        if at == SNAPSHOTS {
            let slots = (i128::from(self.params.n_snapshots) - 1).max(0);
            last = last.saturating_add(slots * self.params.snapshot_stride as i128);
        }
        let start = tensor.data as usize as i128;
        self.buffers.iter().any(|buffer| buffer.holds(&(start..last.saturating_add(start))))
    }
}

/// Strides in the order of axes given, innermost first, with the slots outermost; the bytes taken; the slots' stride.
fn layout(size: usize, ne: [usize; 4], slots: usize, order: [usize; 4], gap: usize) -> ([usize; 4], usize, usize) {
    let mut nb = [0; 4];
    let mut stride = size;
    for axis in order {
        nb[axis] = stride;
        stride = stride * ne[axis].max(1) + gap * size;
    }
    let last: usize = (0..4).map(|axis| ne[axis].saturating_sub(1) * nb[axis]).sum();
    let bytes = if ne.contains(&0) { 0 } else { last + (slots - 1) * stride + size };
    (nb, bytes, stride)
}

/// Half precision by truncation; only for numbers of ordinary size.
fn half(value: f32) -> u16 {
    let bits = value.to_bits();
    let exponent = (bits >> 23 & 0xff) as i32 - 112;
    let sign = (bits >> 16 & 0x8000) as u16;
    if exponent <= 0 { sign } else { sign | (exponent as u16) << 10 | (bits >> 13 & 0x3ff) as u16 }
}

fn wild(rng: &mut Rng) -> u64 {
    match rng.bits() % 8 {
        0 => u64::from(f32::INFINITY.to_bits()),
        1 => u64::from(f32::NEG_INFINITY.to_bits()),
        2 => u64::from(f32::NAN.to_bits()),
        3 => rng.bits() % (1 << 22),
        4 => 0,
        _ => rng.bits(),
    }
}

/// The property. Panics, or dies on a guard page, where it does not hold.
pub fn check(data: &[u8]) {
    let mut bytes = Bytes::new(data);
    let mut case = Case::draw(&mut bytes);
    let threads = bytes.pick(&[1, 0, 2, 3, 7, 1025, u32::MAX]);
    let nth = bytes.pick(&[1, 2, 3, 5, 17, 1024]);
    let misplaced = bytes.rarely();
    case.change(&mut bytes);

    // The struct ends at a guard page, so that reading past the size that it states is seen.
    let stated = case.params.struct_size as usize;
    let given = if stated < SLOT { stated.clamp(4, 1 << 15) } else { 4 };
    let place = Arena::get().take(STRUCT, given.next_multiple_of(8) + 8 * usize::from(misplaced), true);
    place.fill(|_| [0]);
    let params = (place.place.start + usize::from(misplaced)) as *mut Params;
    // SAFETY: the slot has that many bytes, and the case's struct is a plain struct.
    unsafe {
        let from = (&raw const case.params).cast::<u8>();
        std::ptr::copy_nonoverlapping(from, params.cast(), given.min(size_of::<Params>()));
    }
    if !INDICES.into_iter().all(|at| case.holds(at)) {
        return;
    }
    let before: Vec<Vec<u8>> = case.buffers.iter().map(Buffer::memory).collect();
    let untouched = |what: &str| {
        for (buffer, before) in case.buffers.iter().zip(&before) {
            assert!(buffer.memory() == *before, "{what} wrote to {:x?}", buffer.place);
        }
    };

    // SAFETY: the struct is as large as it says, and the index tensors are in their buffers.
    let supported = unsafe { deltanet_supports(params) };
    untouched("deltanet_supports");
    let mut size = usize::MAX;
    // SAFETY: as above.
    assert_eq!(unsafe { deltanet_scratch_size(params, &mut size) }, supported);
    let mut words = [1; 64];
    // SAFETY: as above; the buffer has that many bytes.
    assert_eq!(unsafe { deltanet_describe(params, words.as_mut_ptr(), words.len()) }, supported);
    assert_ne!(supported, Status::Internal, "{}", message());
    if supported == Status::Ok {
        assert!(words.contains(&0), "deltanet_describe left its words without an end");
    } else {
        assert!(case.changed || misplaced, "a valid problem is refused: {}", message());
        assert!(message().starts_with("deltanet: "), "{supported:?} comes without words");
        // SAFETY: what is not supported is refused before any tensor is touched.
        unsafe {
            assert_eq!(deltanet_run(params, 1), supported);
            assert_eq!(deltanet_run_part(params, 0, 1, std::ptr::null_mut(), 0), supported);
        }
        untouched("a refused call");
        return;
    }

    // SAFETY: without scratch, or with too little, or as a part that is none, nothing is touched.
    unsafe {
        let scratch = words.as_mut_ptr().cast();
        assert_eq!(deltanet_run_part(params, 0, 1, std::ptr::null_mut(), size), Status::Scratch);
        assert_eq!(deltanet_run_part(params, 0, 1, scratch, size - 1), Status::Scratch);
        assert_eq!(deltanet_run_part(params, nth, nth, scratch, size), Status::Threads);
        assert_eq!(deltanet_run_part(params, 0, 0, scratch, size), Status::Threads);
        assert_eq!(deltanet_run(params, u32::MAX), Status::Threads);
    }
    untouched("a refused call");
    if !(0..TENSORS).all(|at| case.holds(at)) {
        return;
    }

    // SAFETY: as above.
    let problem = unsafe { Problem::new(&case.params) }.expect("what is supported is a problem");
    let states = problem.sequences() * problem.value_heads() * problem.head_size() * problem.head_size();
    let writes = problem.tokens() > 0 || !case.params.state_out.data.is_null();
    let work = problem.tokens().max(1).saturating_mul(states);
    let judge = writes && work <= MOST_WORK;
    // SAFETY: every tensor lies in a buffer.
    let expected = judge.then(|| unsafe { reference::evaluate(&problem) });

    // SAFETY: as above, and nobody else uses the memory.
    let status = unsafe { deltanet_run(params, threads) };
    if threads > 1024 {
        assert_eq!(status, Status::Threads);
        return untouched("a refused call");
    }
    assert_eq!(status, Status::Ok, "{}", message());
    let written = written(&case, &problem);
    for ((buffer, before), written) in case.buffers.iter().zip(&before).zip(&written) {
        buffer.assert_intact(before, written);
    }
    if let Some(expected) = &expected
        && case.is_tame()
    {
        // SAFETY: as above.
        let nmse = unsafe { reference::compare(&problem, expected) };
        // Few numbers may all be small by cancellation; 16 bits are rounded, and half precision underflows early.
        let many = problem.tokens() * problem.value_heads() * problem.sequences() >= 4;
        let out = if many { [1e-6, 1e-2, 1e-4][case.params.out.dtype as usize] } else { f64::INFINITY };
        assert!(nmse.out <= out && nmse.state <= 1e-9, "{nmse:?} {:?}", case.params);
    }

    // Parts, on one thread and in any order, give the same bits.
    let after: Vec<Vec<u8>> = case.buffers.iter().map(Buffer::memory).collect();
    case.buffers.iter().zip(&before).for_each(|(buffer, before)| buffer.restore(before));
    let scratch = Arena::get().take(SCRATCH, size, true);
    for ith in (0..nth).rev() {
        // SAFETY: as above; the scratch ends at a guard page.
        let status = unsafe { deltanet_run_part(params, ith, nth, scratch.place.start as *mut _, size) };
        assert_eq!(status, Status::Ok, "{}", message());
    }
    let parts: Vec<Vec<u8>> = case.buffers.iter().map(Buffer::memory).collect();
    assert!(after == parts, "{threads} threads and {nth} parts differ: {:?}", case.params);
}

fn message() -> String {
    // SAFETY: a C string of this thread, copied before the next call.
    unsafe { CStr::from_ptr(deltanet_last_error()) }.to_string_lossy().into_owned()
}

/// Which bytes of each buffer a run may write, by arithmetic of our own: all bits set.
fn written(case: &Case, problem: &Problem) -> Vec<Vec<u8>> {
    let p = &case.params;
    let mut written: Vec<Vec<u8>> = case.buffers.iter().map(|buffer| vec![0; buffer.place.len()]).collect();
    let s = problem.head_size();
    // The elements along axis 0.
    let mut mark = |tensor: &Tensor, at: [usize; 3], slot: usize| {
        let offset: usize = (0..3).map(|axis| at[axis] * tensor.nb[axis + 1]).sum();
        let first = tensor.data as usize + offset + slot * p.snapshot_stride;
        let (buffer, written) = case
            .buffers
            .iter()
            .zip(&mut written)
            .find(|(buffer, _)| buffer.place.contains(&first))
            .expect("every tensor lies in a buffer");
        let first = first - buffer.place.start;
        let size = size_of_dtype(tensor.dtype);
        if tensor.nb[0] == size {
            written[first..first + s * size].fill(0xff);
        } else {
            (0..s).for_each(|i| written[first + i * tensor.nb[0]..][..size].fill(0xff));
        }
    };
    let index = |tensor: &Tensor, at: usize| {
        if tensor.data.is_null() {
            return at;
        }
        let element = tensor.data.wrapping_byte_add(at * tensor.nb[0]);
        // SAFETY: the tensor lies in its buffer and is aligned, which the library has checked.
        unsafe {
            if tensor.dtype == Dtype::I64 as u32 {
                element.cast::<i64>().read() as usize
            } else {
                element.cast::<i32>().read() as usize
            }
        }
    };
    let heads = problem.value_heads();
    let ragged = !p.cu_seqlens.data.is_null();
    let range =
        |b: usize| if ragged { index(&p.cu_seqlens, b)..index(&p.cu_seqlens, b + 1) } else { 0..problem.tokens() };
    if problem.tokens() == 0 && p.state_out.data.is_null() {
        return written;
    }
    for b in 0..problem.sequences() {
        let tokens = range(b);
        for h in 0..heads {
            for t in tokens.clone() {
                mark(&p.out, [h, t, if ragged { 0 } else { b }], 0);
            }
            let mut state = |tensor: &Tensor, row: usize, slot: usize| {
                (0..s).for_each(|j| mark(tensor, [j, h, row], slot));
            };
            if !p.state_out.data.is_null() {
                state(&p.state_out, index(&p.rows_out, b), 0);
            }
            let kept = tokens.len().saturating_sub(p.snapshot_skip as usize).min(p.n_snapshots as usize);
            (0..kept).for_each(|slot| state(&p.snapshots, b, slot));
        }
    }
    written
}
