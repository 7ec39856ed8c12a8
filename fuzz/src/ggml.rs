//! The custom operation: for any node that a ggml graph may hold, the result is that of the C interface, or the node's
//! memory is as it was.

use crate::arena::{Arena, Buffer, SLOT};
use crate::bytes::{Bytes, Rng};
use deltanet::{
    Dtype, GgmlTensor, Params, Status, Tensor, deltanet_ggml_custom_op, deltanet_ggml_supports, deltanet_run,
};
use std::ffi::c_void;
use std::ptr::{null, null_mut};

/// `ggml_tensor`, of which a custom operation sees the address.
#[repr(C)]
#[derive(Clone, Copy)]
struct Node {
    dtype: i32,
    buffer: *mut c_void,
    ne: [i64; 4],
    nb: [usize; 4],
    op: i32,
    op_params: [i32; 16],
    flags: i32,
    src: [*mut Node; 10],
    view_src: *mut Node,
    view_offs: usize,
    data: *mut c_void,
    name: [u8; 64],
    extra: *mut c_void,
    padding: [u8; 8],
}

/// Sources, then the result.
const TENSORS: usize = 7;
const RESULT: usize = 6;
const STATE: usize = 5;

fn node(buffer: &Buffer, ne: [i64; 4], nb: [usize; 4]) -> Node {
    Node {
        dtype: 0,
        buffer: null_mut(),
        ne,
        nb,
        op: 0,
        op_params: [0; 16],
        flags: 0,
        src: [null_mut(); 10],
        view_src: null_mut(),
        view_offs: 0,
        data: buffer.place.start as *mut c_void,
        name: [0; 64],
        extra: null_mut(),
        padding: [0; 8],
    }
}

/// Whether the tensor lies in one of the buffers.
fn holds(buffers: &[Buffer], node: &Node) -> bool {
    if node.data.is_null() || node.ne.iter().any(|n| *n <= 0) {
        return true;
    }
    let start = node.data as usize as i128;
    buffers.iter().any(|buffer| buffer.holds(&(start..span(node).saturating_add(start + 4))))
}

/// Bytes from the first element to the last.
fn span(node: &Node) -> i128 {
    let along = |axis: usize| (i128::from(node.ne[axis]) - 1).saturating_mul(node.nb[axis] as i128);
    (0..4).map(along).fold(0, i128::saturating_add)
}

/// The property. Panics, or dies on a guard page, where it does not hold.
pub fn check(data: &[u8]) {
    let mut bytes = Bytes::new(data);
    let s = 16 * (1 + bytes.below(3)) as i64;
    let tokens = if bytes.rarely() { 30 + bytes.below(20) } else { 1 + bytes.below(9) } as i64;
    let key_heads = 1 + bytes.below(2) as i64;
    let value_heads = key_heads * (1 + bytes.below(2) as i64);
    let qk_sequences = 1 + bytes.below(2) as i64;
    let sequences = qk_sequences * (1 + bytes.below(2) as i64);
    let gate = if bytes.rarely() { s } else { 1 };
    let count = 1 + bytes.below(4) as i64;
    let (out, states) = (s * value_heads * tokens * sequences, s * s * value_heads * sequences);
    let shapes = [
        [s, key_heads, tokens, qk_sequences],
        [s, key_heads, tokens, qk_sequences],
        [s, value_heads, tokens, sequences],
        [gate, value_heads, tokens, sequences],
        [1, value_heads, tokens, sequences],
        if bytes.often() { [s, s, value_heads, sequences] } else { [s * s * value_heads, sequences, 1, 1] },
        [s * value_heads, (out + count * states) / (s * value_heads), 1, 1],
    ];
    let arena = Arena::get();
    let mut buffers = Vec::with_capacity(TENSORS);
    let mut nodes: [Node; TENSORS] = std::array::from_fn(|at| {
        let ne = shapes[at];
        // q, k and v may be permuted views.
        let order = if at < 3 { bytes.pick(&[[0, 1, 2, 3], [0, 2, 1, 3]]) } else { [0, 1, 2, 3] };
        let mut nb = [0; 4];
        let mut stride = 4;
        for axis in order {
            nb[axis] = stride;
            stride *= ne[axis] as usize;
        }
        assert!(stride <= SLOT, "{ne:?} does not fit");
        let buffer = arena.take(at, stride, !bytes.rarely());
        let node = node(&buffer, ne, nb);
        buffers.push(buffer);
        node
    });
    let mut rng = Rng(bytes.number());
    for (at, buffer) in buffers.iter().enumerate().take(RESULT) {
        let (low, high) = match at {
            0 | 1 => (-0.3, 0.3),
            3 => (-3.0, 0.0),
            4 => (0.0, 1.0),
            _ => (-1.0, 1.0),
        };
        buffer.fill(|_| rng.uniform(low, high).to_ne_bytes());
    }
    let options = Params {
        head_map: bytes.below(2) as u32,
        state_layout: bytes.below(2) as u32,
        beta_kind: bytes.below(2) as u32,
        qk_norm: bytes.below(2) as u32,
        qk_norm_eps: 1e-6,
        ..Params::default()
    };
    let plain = bytes.often();
    let options_of_node = if plain { null() } else { &raw const options };
    let nth = bytes.pick(&[1, 2, 3, 8]);

    let mut changed = false;
    let mut missing = [false; TENSORS];
    while !bytes.is_empty() {
        changed = true;
        let at = bytes.below(TENSORS);
        let axis = bytes.below(4);
        let number = match bytes.below(6) {
            0 => u64::from(bytes.byte()),
            1 => u64::from(bytes.byte()) * 4,
            2 => 1 << (bytes.byte() % 64),
            3 => (1u64 << (bytes.byte() % 64)).wrapping_sub(1),
            4 => u64::from(bytes.byte()).wrapping_neg(),
            _ => bytes.number(),
        };
        match bytes.below(7) {
            0 | 1 => nodes[at].ne[axis] = number as i64,
            2 | 3 => nodes[at].nb[axis] = number as usize,
            4 => nodes[at].dtype = number as i32,
            5 => nodes[at].data = nodes[bytes.below(TENSORS)].data.wrapping_byte_add(number as usize % 4096),
            _ => missing[at] = true,
        }
    }
    let addresses: [*mut Node; TENSORS] = std::array::from_fn(|at| &raw mut nodes[at]);
    let mut result = nodes[RESULT];
    for (at, missing) in missing.iter().enumerate().take(RESULT) {
        result.src[at] = if *missing { null_mut() } else { addresses[at] };
    }
    if missing[RESULT] {
        result.data = null_mut();
    }
    let dst = (&raw mut result).cast::<GgmlTensor>();
    let before: Vec<Vec<u8>> = buffers.iter().map(Buffer::memory).collect();

    // SAFETY: dst is a tensor with its sources; no tensor's memory is touched.
    let status = unsafe { deltanet_ggml_supports(dst, options_of_node) };
    assert_ne!(status, Status::Internal);
    assert!(changed || status == Status::Ok, "a valid node is refused: {status:?}");
    let present = |at: usize| (!missing[at]).then(|| if at == RESULT { &result } else { &nodes[at] });
    let real = (0..TENSORS).filter_map(present).all(|node| holds(&buffers, node));
    // Without memory, tensors that reach so far are taken to overlap; with memory they need not.
    let far = (0..TENSORS).filter_map(present).any(|node| span(node) >= 1 << 51);
    if (status == Status::Ok || far) && !real {
        return;
    }
    for ith in 0..nth {
        // SAFETY: every tensor lies in its buffer, or the node is refused before any is touched.
        unsafe { deltanet_ggml_custom_op(dst, ith, nth, options_of_node.cast_mut().cast()) };
    }
    let after: Vec<Vec<u8>> = buffers.iter().map(Buffer::memory).collect();
    if after == before {
        assert!(changed, "a valid node was not computed");
        return;
    }
    assert_eq!(status, Status::Ok, "an unsupported node was computed");

    // The same by the C interface, into the result's memory again.
    buffers.iter().zip(&before).for_each(|(buffer, before)| buffer.restore(before));
    let [s, hv, t, b] = nodes[2].ne;
    let tensor = |at: usize| {
        let node: &Node = &nodes[at];
        Tensor { data: node.data, ne: node.ne, nb: node.nb, dtype: Dtype::F32 as u32, reserved: 0 }
    };
    let out_bytes = (4 * s * hv * t * b) as usize;
    let states = Tensor::dense(nodes[STATE].data, Dtype::F32, [s, s, hv, b]);
    let elements: i64 = result.ne.iter().product();
    let kept = ((elements - s * hv * t * b) / (s * s * hv * b)) as u32;
    let params = Params {
        q: tensor(0),
        k: tensor(1),
        v: tensor(2),
        g: tensor(3),
        beta: tensor(4),
        state_in: states,
        out: Tensor::dense(result.data, Dtype::F32, [s, hv, t, b]),
        snapshots: Tensor { data: result.data.wrapping_byte_add(out_bytes), ..states },
        snapshot_stride: (4 * s * s * hv * b) as usize,
        snapshot_slots: kept,
        n_snapshots: kept,
        ..if plain { Params::default() } else { options }
    };
    // SAFETY: every tensor lies in its buffer.
    assert_eq!(unsafe { deltanet_run(&params, 1) }, Status::Ok);
    let (mut error, mut power) = (0.0, 0.0);
    for (buffer, after) in buffers.iter().zip(&after) {
        for (after, direct) in after.chunks_exact(4).zip(buffer.memory().chunks_exact(4)) {
            let [after, direct] =
                [after, direct].map(|bytes| f32::from_ne_bytes(bytes.try_into().expect("four bytes")));
            if after.to_bits() != direct.to_bits() {
                error += f64::from(after - direct).powi(2);
            }
            power += f64::from(direct).powi(2);
        }
    }
    // Where states are written decides which tokens go by chunks, so that the bits need not agree. Tensors that were
    // put over each other may grow without bound.
    assert!(!power.is_finite() || power > 1e30 || error <= 1e-8 * power, "error {error:e} of {power:e}: {params:?}");
}
