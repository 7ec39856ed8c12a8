//! Every rule of the validator at its edge: the last value that it takes and the first that it does not.
//!
//! Tensors have addresses and no memory: validation reads index tensors alone.

use deltanet::cpu::{Isa, MAX_THREADS};
use deltanet::params::{BetaKind, HeadMap, Precision};
use deltanet::problem::MAX_HEAD_SIZE;
use deltanet::{Dtype, Params, Plan, Problem, Status, Tensor};

/// Extents of a problem.
#[derive(Clone, Copy)]
struct Shape {
    s: i64,
    hk: i64,
    hv: i64,
    t: i64,
    b: i64,
    bq: i64,
}

const SHAPE: Shape = Shape { s: 32, hk: 2, hv: 4, t: 5, b: 4, bq: 2 };
const MOST: i64 = i32::MAX as i64;

type Get = fn(&mut Params) -> &mut Tensor;
/// The tensors of a problem, but for index tensors.
const INPUTS: [(&str, Get); 6] = [
    ("q", |p| &mut p.q),
    ("k", |p| &mut p.k),
    ("v", |p| &mut p.v),
    ("g", |p| &mut p.g),
    ("beta", |p| &mut p.beta),
    ("state_in", |p| &mut p.state_in),
];
const OUTPUTS: [(&str, Get); 3] =
    [("out", |p| &mut p.out), ("state_out", |p| &mut p.state_out), ("snapshots", |p| &mut p.snapshots)];

/// Where the tensors of a problem would be: far apart.
fn address(place: usize) -> *mut std::ffi::c_void {
    std::ptr::without_provenance_mut((place + 1) << 52)
}

fn params(n: Shape) -> Params {
    let tensor = |place, ne| Tensor::dense(address(place), Dtype::F32, ne);
    Params {
        q: tensor(0, [n.s, n.hk, n.t, n.bq]),
        k: tensor(1, [n.s, n.hk, n.t, n.bq]),
        v: tensor(2, [n.s, n.hv, n.t, n.b]),
        g: tensor(3, [1, n.hv, n.t, n.b]),
        beta: tensor(4, [1, n.hv, n.t, n.b]),
        state_in: tensor(5, [n.s, n.s, n.hv, n.b]),
        out: tensor(6, [n.s, n.hv, n.t, n.b]),
        state_out: tensor(7, [n.s, n.s, n.hv, n.b]),
        ..Params::default()
    }
}

/// The problem, or the class of its error and the words.
fn judge(params: &Params) -> Result<Problem, (Status, String)> {
    // SAFETY: index tensors, where there are any, are the test's own.
    unsafe { Problem::new(params) }.map_err(|error| (error.status(), error.message().to_owned()))
}

#[track_caller]
fn taken(params: &Params) -> Problem {
    judge(params).unwrap_or_else(|(status, words)| panic!("refused: {status:?} {words}"))
}

#[track_caller]
fn refused(params: &Params, status: Status, word: &str) {
    match judge(params) {
        Ok(_) => panic!("taken, although {word} breaks a rule"),
        Err((got, words)) => assert!(got == status && words.contains(word), "{got:?} {words}: want {status:?} {word}"),
    }
}

/// A problem with one change is refused.
#[track_caller]
fn changed(status: Status, word: &str, change: impl FnOnce(&mut Params)) {
    let mut params = params(SHAPE);
    change(&mut params);
    refused(&params, status, word);
}

/// A problem with one change is taken.
#[track_caller]
fn kept(change: impl FnOnce(&mut Params)) -> Problem {
    let mut params = params(SHAPE);
    change(&mut params);
    taken(&params)
}

fn index(values: &[i64]) -> Tensor {
    Tensor::dense(values.as_ptr().cast_mut().cast(), Dtype::I64, [values.len() as i64, 1, 1, 1])
}

#[test]
fn sizes() {
    for s in [16, 32, 48, MAX_HEAD_SIZE as i64] {
        taken(&params(Shape { s, ..SHAPE }));
    }
    for s in [0, 1, 8, 17, 24, MAX_HEAD_SIZE as i64 + 16] {
        refused(&params(Shape { s, ..SHAPE }), Status::Shape, "v.ne[0]");
    }
    refused(&params(Shape { hk: 0, ..SHAPE }), Status::Shape, "q.ne[1] (the number of key heads) is 0");
    refused(&params(Shape { hv: 0, ..SHAPE }), Status::Shape, "v.ne[1]");
    refused(&params(Shape { hk: 3, ..SHAPE }), Status::Shape, "v.ne[1]");
    refused(&params(Shape { hk: 8, ..SHAPE }), Status::Shape, "v.ne[1]");
    taken(&params(Shape { hk: 4, ..SHAPE }));
    taken(&params(Shape { t: 0, ..SHAPE }));
    taken(&params(Shape { b: 0, bq: 0, ..SHAPE }));
    taken(&params(Shape { b: 4, bq: 4, ..SHAPE }));
    refused(&params(Shape { bq: 3, ..SHAPE }), Status::Shape, "q.ne[3]");
    refused(&params(Shape { bq: 0, ..SHAPE }), Status::Shape, "q.ne[3]");
    taken(&params(Shape { b: 0, bq: 1, ..SHAPE }));
}

#[test]
fn counts() {
    let one = Shape { s: 16, hk: 1, hv: 1, t: 1, b: 1, bq: 1 };
    taken(&params(Shape { t: MOST, ..one }));
    refused(&params(Shape { t: MOST + 1, ..one }), Status::Shape, "v.ne[2]");
    taken(&params(Shape { hv: MOST, ..one }));
    refused(&params(Shape { hv: MOST + 1, ..one }), Status::Shape, "v.ne[1]");
    refused(&params(Shape { hv: 1 << 30, b: 2, ..one }), Status::Shape, "v.ne[3]");
    refused(&params(Shape { t: 0, hv: 1 << 40, b: 1 << 40, ..one }), Status::Shape, "v.ne[3]");
    for huge in [1 << 62, i64::MAX] {
        assert!(judge(&params(Shape { t: huge, ..one })).is_err());
        assert!(judge(&params(Shape { b: huge, ..one })).is_err());
        assert!(judge(&params(Shape { hv: huge, ..one })).is_err());
        assert!(judge(&params(Shape { s: huge, ..one })).is_err());
    }
}

#[test]
fn every_extent_agrees() {
    let with_snapshots = || {
        let mut p = params(SHAPE);
        p.snapshots = Tensor { data: address(8), ..p.state_out };
        (p.n_snapshots, p.snapshot_slots, p.snapshot_stride) = (2, 2, 1 << 20);
        p
    };
    taken(&with_snapshots());
    for (name, get) in INPUTS.into_iter().chain(OUTPUTS) {
        for axis in 0..4 {
            for by in [1, -1, 7] {
                let mut p = with_snapshots();
                get(&mut p).ne[axis] += by;
                let Err((status, words)) = judge(&p) else { panic!("{name}.ne[{axis}] may be off by {by}") };
                assert!(status == Status::Shape || status == Status::Overlap, "{name}.ne[{axis}]: {status:?} {words}");
            }
            let mut p = with_snapshots();
            get(&mut p).ne[axis] = -1;
            refused(&p, Status::Shape, &format!("{name}.ne[{axis}] is -1"));
            let mut p = with_snapshots();
            get(&mut p).nb[axis] += 1;
            if get(&mut p).ne[axis] > 1 {
                refused(&p, Status::Misaligned, &format!("{name}.nb[{axis}]"));
            } else {
                taken(&p);
            }
            let mut p = with_snapshots();
            get(&mut p).nb[axis] = 1 << 63;
            if get(&mut p).ne[axis] > 1 {
                refused(&p, Status::Stride, name);
            } else {
                taken(&p);
            }
        }
        let mut p = with_snapshots();
        get(&mut p).reserved = 1;
        refused(&p, Status::UnknownValue, &format!("{name}.reserved"));
        let mut p = with_snapshots();
        get(&mut p).data = get(&mut p).data.wrapping_byte_add(2);
        refused(&p, Status::Misaligned, &format!("{name}.data"));
        for dtype in 0..7 {
            let mut p = with_snapshots();
            get(&mut p).dtype = dtype;
            let sixteen_bits = dtype == 1 || dtype == 2;
            let floats = ["q", "k", "v", "out"].contains(&name);
            if dtype == 0 || sixteen_bits && floats {
                taken(&p);
            } else {
                refused(&p, Status::Dtype, &format!("{name}.dtype"));
            }
        }
    }
    for (name, get) in INPUTS.into_iter().chain([OUTPUTS[0]]) {
        let mut p = with_snapshots();
        get(&mut p).data = std::ptr::null_mut();
        refused(&p, Status::NullPointer, &format!("{name}.data is null"));
    }
}

#[test]
fn settings() {
    type Code = (&'static str, fn(&mut Params, u32), u32);
    let codes: [Code; 6] = [
        ("head_map", |p, c| p.head_map = c, 1),
        ("state_layout", |p, c| p.state_layout = c, 1),
        ("beta_kind", |p, c| p.beta_kind = c, 1),
        ("snapshot_order", |p, c| p.snapshot_order = c, 1),
        ("precision", |p, c| p.precision = c, 2),
        ("qk_norm", |p, c| p.qk_norm = c, 1),
    ];
    for (name, set, last) in codes {
        for code in 0..=last {
            kept(|p| set(p, code));
        }
        for code in [last + 1, u32::MAX] {
            changed(Status::UnknownValue, &format!("{name} is {code}; it must be from 0 to {last}"), |p| set(p, code));
        }
    }
    type Value = (&'static str, fn(&mut Params, f32), bool);
    let values: [Value; 4] = [
        ("scale", |p, x| p.scale = x, true),
        ("gate_max", |p, x| p.gate_max = x, true),
        ("state_clamp", |p, x| p.state_clamp = x, false),
        ("qk_norm_eps", |p, x| p.qk_norm_eps = x, false),
    ];
    for (name, set, negative) in values {
        for x in [0.0, 1e-30, 50.0, f32::MAX] {
            kept(|p| set(p, x));
        }
        for x in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            changed(Status::Value, name, |p| set(p, x));
        }
        if negative {
            kept(|p| set(p, -1.0));
        } else {
            changed(Status::Value, name, |p| set(p, -1e-30));
        }
    }
}

#[test]
fn what_was_asked_for_is_what_there_is() {
    let p = taken(&params(SHAPE));
    assert_eq!((p.head_size(), p.key_heads(), p.value_heads(), p.tokens(), p.sequences()), (32, 2, 4, 5, 4));
    assert_eq!((p.scale(), p.gate_max(), p.state_clamp()), (1.0 / 32f32.sqrt(), f32::INFINITY, f32::INFINITY));
    assert_eq!((p.qk_norm(), p.channel_gate(), p.qk_sequences()), (None, false, 2));
    assert_eq!((p.head_map(), p.beta_kind(), p.precision()), (HeadMap::Tiled, BetaKind::Value, Precision::Exact));
    let p = kept(|p| {
        (p.scale, p.gate_max, p.state_clamp, p.qk_norm, p.qk_norm_eps) = (0.5, -2.0, 3.0, 1, 0.25);
        (p.head_map, p.beta_kind, p.precision) = (1, 1, 2);
        p.g = Tensor::dense(address(3), Dtype::F32, [32, 4, 5, 4]);
    });
    assert_eq!((p.scale(), p.gate_max(), p.state_clamp(), p.qk_norm()), (0.5, -2.0, 3.0, Some(0.25)));
    assert_eq!((p.head_map(), p.beta_kind(), p.precision()), (HeadMap::Grouped, BetaKind::Logit, Precision::Bf16));
    assert!(p.channel_gate());
    changed(Status::Shape, "g.ne[0]", |p| p.g = Tensor::dense(address(3), Dtype::F32, [16, 4, 5, 4]));
}

#[test]
fn snapshots() {
    let with = |count: u32, slots: u32, stride: usize| {
        let mut p = params(SHAPE);
        p.snapshots = Tensor { data: address(8), ..p.state_out };
        (p.n_snapshots, p.snapshot_slots, p.snapshot_stride) = (count, slots, stride);
        p
    };
    let slot = 32 * 32 * 4 * 4 * 4;
    taken(&with(3, 3, slot));
    taken(&with(3, 4, slot + 4));
    taken(&with(1, 1, 0));
    refused(&with(4, 3, slot), Status::Snapshots, "n_snapshots is 4");
    refused(&with(3, 3, slot - 4), Status::Overlap, "snapshots");
    refused(&with(2, 2, 0), Status::Overlap, "snapshots");
    refused(&with(3, 3, slot + 2), Status::Misaligned, "snapshot_stride");
    refused(&with(3, 3, 1 << 62), Status::Stride, "snapshot_stride");
    refused(&with(u32::MAX, u32::MAX, 1 << 40), Status::Stride, "snapshot_stride");
    // Without a count the buffer is not looked at.
    let mut p = with(0, 0, 3);
    p.snapshots.dtype = 99;
    taken(&p);
    let mut p = with(1, 1, slot);
    p.snapshots = Tensor::default();
    refused(&p, Status::Snapshots, "snapshots.data is null");
    // Without sequences there are no slots to reach anywhere.
    let mut p = params(Shape { b: 0, bq: 0, ..SHAPE });
    p.snapshots = Tensor { data: address(8), ..p.state_out };
    (p.n_snapshots, p.snapshot_slots, p.snapshot_stride) = (3, 3, 1 << 62);
    taken(&p);
    // A slot more reaches into out, which begins where the slots end.
    let mut p = with(3, 3, slot);
    p.out.data = address(8).wrapping_byte_add(3 * slot);
    taken(&p);
    (p.n_snapshots, p.snapshot_slots) = (4, 4);
    refused(&p, Status::Overlap, "out overlaps snapshots");
}

#[test]
fn overlaps() {
    let values = [0i64, 1, 2, 3];
    let indices: [(&str, Get); 2] = [("rows_in", |p| &mut p.rows_in), ("rows_out", |p| &mut p.rows_out)];
    let base = || {
        let mut p = params(SHAPE);
        (p.rows_in, p.rows_out) = (index(&values), index(&values));
        p.snapshots = Tensor { data: address(8), ..p.state_out };
        (p.n_snapshots, p.snapshot_slots, p.snapshot_stride) = (1, 1, 0);
        p
    };
    taken(&base());
    let last = |t: &Tensor| (0..4).map(|axis| (t.ne[axis] as usize - 1) * t.nb[axis]).sum::<usize>();
    for (output, out) in OUTPUTS {
        for (name, input) in INPUTS {
            // The input's last element is the output's first; then they only touch.
            let mut p = base();
            let at = last(input(&mut p));
            let address = input(&mut p).data.wrapping_byte_add(at);
            out(&mut p).data = address;
            refused(&p, Status::Overlap, &format!("{output} overlaps {name}"));
            out(&mut p).data = address.wrapping_byte_add(4);
            taken(&p);
        }
        for (name, index) in indices {
            let mut p = base();
            let address = index(&mut p).data;
            out(&mut p).data = address;
            let Err((Status::Overlap, words)) = judge(&p) else { panic!("{output} may be over {name}") };
            assert!(words.contains(output) && words.contains("rows_"), "{words}");
        }
        for (other, over) in OUTPUTS.iter().filter(|(other, _)| *other != output) {
            let mut p = base();
            let address = over(&mut p).data;
            out(&mut p).data = address;
            let Err((Status::Overlap, words)) = judge(&p) else { panic!("{output} may be over {other}") };
            assert!(words.contains(output) && words.contains(other), "{words}");
        }
        let mut p = base();
        out(&mut p).nb[1] = 0;
        refused(&p, Status::Overlap, &format!("{output} has strides"));
    }
    // A ragged batch's offsets, too.
    let offsets = [0i64, 2, 5];
    let mut p = params(Shape { b: 1, bq: 1, ..SHAPE });
    let state = |place| Tensor::dense(address(place), Dtype::F32, [32, 32, 4, 2]);
    (p.state_in, p.state_out, p.cu_seqlens) = (state(5), state(7), index(&offsets));
    taken(&p);
    p.out.data = p.cu_seqlens.data;
    refused(&p, Status::Overlap, "out overlaps cu_seqlens");
    // Inputs may share memory with each other.
    kept(|p| p.k.data = p.q.data);
}

#[test]
fn in_place() {
    kept(|p| p.state_out = p.state_in);
    changed(Status::Overlap, "state_out overlaps state_in", |p| {
        p.state_out = Tensor { data: p.state_in.data.wrapping_byte_add(4), ..p.state_in };
    });
    changed(Status::Overlap, "state_out overlaps state_in", |p| {
        p.state_out = p.state_in;
        p.state_out.nb.swap(0, 1);
    });
    for axis in [2, 3] {
        changed(Status::Overlap, "state_out overlaps state_in", |p| {
            p.state_out = p.state_in;
            p.state_in.nb[axis] += 32 * 32 * 4 * 4 * 4;
        });
    }
    // The strides of axes of one element mean nothing.
    let mut p = params(Shape { hv: 1, hk: 1, b: 1, bq: 1, ..SHAPE });
    p.state_out = p.state_in;
    (p.state_out.nb[2], p.state_out.nb[3]) = (4, 8);
    taken(&p);
    let mut p = params(Shape { hv: 2, b: 2, ..SHAPE });
    p.state_out = p.state_in;
    p.state_out.nb[3] *= 2;
    refused(&p, Status::Overlap, "state_out overlaps state_in");
    changed(Status::Overlap, "out overlaps state_in", |p| p.out.data = p.state_in.data);
    kept(|p| p.state_out = Tensor::default());
}

#[test]
fn rows() {
    let judge_rows = |rows_in: &[i64], rows_out: &[i64], pool: i64, one_pool: bool| {
        let mut p = params(SHAPE);
        let state = |place| Tensor::dense(address(place), Dtype::F32, [32, 32, 4, pool]);
        (p.state_in, p.state_out) = (state(5), state(if one_pool { 5 } else { 7 }));
        (p.rows_in, p.rows_out) = (index(rows_in), index(rows_out));
        judge(&p).map(drop).map_err(|(status, words)| {
            assert_eq!(status, Status::Row, "{words}");
            words
        })
    };
    assert_eq!(judge_rows(&[3, 1, 9, 0], &[9, 0, 1, 5], 10, false), Ok(()));
    assert_eq!(judge_rows(&[3, 1, 9, 0], &[3, 1, 9, 0], 10, true), Ok(()));
    assert_eq!(judge_rows(&[3, 3, 3, 3], &[1, 2, 3, 4], 10, false), Ok(()));
    let words = |answer: Result<(), String>| answer.expect_err("a rule is broken");
    assert!(words(judge_rows(&[0, 1, 2, 10], &[0, 1, 2, 3], 10, false)).starts_with("rows_in[3] is 10;"));
    assert!(words(judge_rows(&[0, -1, 2, 3], &[0, 1, 2, 3], 10, false)).starts_with("rows_in[1] is -1;"));
    assert!(words(judge_rows(&[0, 1, 2, 3], &[0, 1, 10, 3], 10, false)).starts_with("rows_out[2] is 10;"));
    assert!(words(judge_rows(&[0, 1, 2, 3], &[-1, 1, 2, 3], 10, false)).starts_with("rows_out[0] is -1;"));
    assert!(
        words(judge_rows(&[0, 1, 2, 3], &[4, 7, 2, 4], 10, false)).starts_with("rows_out[3] is 4, as is rows_out[0]")
    );
    assert!(
        words(judge_rows(&[0, 1, 2, 3], &[4, 7, 2, 7], 10, false)).starts_with("rows_out[3] is 7, as is rows_out[1]")
    );
    assert!(
        words(judge_rows(&[0, 1, 2, 3], &[0, 1, 1, 3], 10, false)).starts_with("rows_out[2] is 1, as is rows_out[1]")
    );
    assert!(words(judge_rows(&[0, 1, 2, 3], &[0, 2, 1, 3], 10, true)).contains("which sequence 1 reads"));
    assert_eq!(judge_rows(&[0, 1, 2, 3], &[9, 8, 7, 6], 10, false), Ok(()));
    assert!(
        words(judge_rows(&[0, 1, 2, 3], &[1, 2, 3, 4], 10, true)).contains("rows_out[0] is 1, which sequence 1 reads")
    );
    // All 64 bits count.
    let far = (1 << 32) + 3;
    let whole = words(judge_rows(&[0, 1, 2, far], &[0, 1, 2, 3], 10, false));
    assert!(whole.starts_with(&format!("rows_in[3] is {far};")), "{whole}");
    // Written rows are gone through 4096 at a time: the last of a window, the first of the next one, and far ones.
    for far in [4095, 4096, 4097, 9999] {
        assert_eq!(judge_rows(&[0, 1, 2, 3], &[far, 0, 2, 3], 10_000, false), Ok(()));
        let twice = words(judge_rows(&[0, 1, 2, 3], &[far, 0, 2, far], 10_000, false));
        assert!(twice.starts_with(&format!("rows_out[3] is {far}, as is rows_out[0]")), "{twice}");
        let crossed = words(judge_rows(&[far, 1, 2, 3], &[0, far, 2, 3], 10_000, true));
        assert!(crossed.contains(&format!("rows_out[1] is {far}, which sequence 0 reads")), "{crossed}");
    }
    changed(Status::Shape, "rows_in.ne[0] is 3", |p| p.rows_in = index(&[0, 1, 2]));
    changed(Status::Shape, "rows_out.ne[0] is 5", |p| p.rows_out = index(&[0, 1, 2, 3, 4]));
    changed(Status::NullPointer, "state_out.data", |p| {
        (p.rows_out, p.state_out) = (index(&[0, 1, 2, 3]), Tensor::default());
    });
    let nobody = [0i64];
    let mut p = params(Shape { b: 0, bq: 0, ..SHAPE });
    (p.rows_out, p.state_out) = (index(&nobody[..0]), Tensor::default());
    taken(&p);
    changed(Status::Shape, "rows_in.ne", |p| {
        p.rows_in = Tensor { ne: [2, 2, 1, 1], ..index(&[0, 1, 2, 3]) };
    });
    changed(Status::Stride, "rows_in.nb[0] is 0", |p| {
        p.rows_in = Tensor { nb: [0, 8, 8, 8], ..index(&[0, 1, 2, 3]) };
    });
    changed(Status::Dtype, "rows_in.dtype", |p| {
        p.rows_in = Tensor { dtype: Dtype::F32 as u32, ..index(&[0, 1, 2, 3]) };
    });
    // One sequence's index has no stride to speak of.
    let mut p = params(Shape { b: 1, bq: 1, ..SHAPE });
    p.rows_in = Tensor { nb: [0; 4], ..index(&nobody) };
    taken(&p);
    // In place without rows to write, sequence b writes row b.
    let own = |rows: &[i64]| {
        let mut p = params(SHAPE);
        p.state_out = p.state_in;
        p.rows_in = index(rows);
        judge(&p).map(drop).map_err(|(status, _)| status)
    };
    assert_eq!(own(&[0, 1, 2, 3]), Ok(()));
    assert_eq!(own(&[0, 2, 1, 3]), Err(Status::Row));
    let apart = [3, 2, 1, 0];
    kept(|p| p.rows_in = index(&apart));
}

#[test]
fn offsets() {
    let with = |offsets: &[i64]| {
        let mut p = params(Shape { b: 1, bq: 1, ..SHAPE });
        let sequences = offsets.len() as i64 - 1;
        let state = |place| Tensor::dense(address(place), Dtype::F32, [32, 32, 4, sequences.max(0)]);
        (p.state_in, p.state_out, p.cu_seqlens) = (state(5), state(7), index(offsets));
        p
    };
    for good in [&[0, 5][..], &[0, 0, 5], &[0, 2, 2, 3], &[0, 0, 0], &[0]] {
        assert_eq!(taken(&with(good)).sequences(), good.len() - 1);
    }
    refused(&with(&[1, 5]), Status::Sequences, "cu_seqlens[0] is 1");
    refused(&with(&[-1, 5]), Status::Sequences, "cu_seqlens[0] is -1");
    refused(&with(&[0, 6]), Status::Sequences, "cu_seqlens[1] is 6");
    refused(&with(&[0, 3, 2]), Status::Sequences, "cu_seqlens[2] is 2");
    refused(&with(&[0, i64::MAX, 5]), Status::Sequences, "cu_seqlens[1]");
    refused(&with(&[0, (1 << 32) + 2, 5]), Status::Sequences, "cu_seqlens[1] is 4294967298");
    let offsets = [0i64, 5];
    let mut p = with(&offsets);
    p.cu_seqlens.ne[0] = 0;
    refused(&p, Status::Shape, "cu_seqlens.ne[0] is 0");
    let mut p = params(SHAPE);
    p.cu_seqlens = index(&offsets);
    refused(&p, Status::Shape, "v.ne[3] is 4");
}

#[test]
fn plans() {
    let problem = taken(&params(SHAPE));
    let plan = Plan::new(&problem, Isa::Scalar).expect("scalar code runs anywhere");
    assert_eq!(plan.tasks(), 4 * 4 * 32usize.div_ceil(plan.columns()));
    assert_eq!(plan.isa(), Isa::Scalar);
    assert!(plan.scratch_size() >= 32 * plan.columns() * 4 && plan.scratch_size() < 1 << 22);
    let words = plan.to_string();
    for part in ["recurrent", "scalar", &plan.columns().to_string(), &plan.tasks().to_string()] {
        assert!(words.contains(part), "{words} lacks {part}");
    }
    // Prompts go through the chunked kernel from some length on, whether or not each channel has its gate.
    let plan_of = |change: &dyn Fn(&mut Params), tokens| {
        let mut p = params(Shape { t: tokens, ..SHAPE });
        change(&mut p);
        let problem = taken(&p);
        let plan = Plan::new(&problem, Isa::Scalar).expect("scalar code runs anywhere");
        (plan.is_chunked(&problem), plan)
    };
    let first = (1..=200).find(|tokens| plan_of(&|_| (), *tokens).0).expect("some prompt is long enough");
    assert!(first > 1 && (1..=200).all(|tokens| plan_of(&|_| (), tokens).0 == (tokens >= first)));
    let (_, plan) = plan_of(&|_| (), first);
    assert!(plan.chunk() > 1 && plan.to_string().contains(&format!("below {first} tokens")), "{plan}");
    assert!(plan.to_string().contains(&format!("by {} tokens", plan.chunk())), "{plan}");
    let channels = |p: &mut Params| p.g = Tensor::dense(p.g.data, Dtype::F32, [32, 4, p.g.ne[2], 4]);
    for tokens in [1, first - 1, first, 200] {
        let (chunked, plan) = plan_of(&channels, tokens);
        assert!(chunked == (tokens >= first) && plan.to_string().contains("chunked"), "{plan}");
    }
    // Tokens whose states are kept go one by one: the ones before them count, or all where no state is kept.
    let snapshots = |count, skip| {
        move |p: &mut Params| {
            p.snapshots = Tensor { data: address(8), ..p.state_out };
            (p.n_snapshots, p.snapshot_slots, p.snapshot_skip, p.snapshot_stride) = (count, count, skip, 1 << 20);
        }
    };
    assert!(plan_of(&snapshots(3, 0), first + 3).0 && !plan_of(&snapshots(3, 0), first + 2).0);
    assert!(plan_of(&snapshots(3, 2), first + 5).0 && !plan_of(&snapshots(3, 2), first + 4).0);
    assert!(plan_of(&snapshots(3, 200), first).0 && !plan_of(&snapshots(3, 200), first - 1).0);
    let (chunked, plan) = plan_of(&|p| *p = params(Shape { s: MAX_HEAD_SIZE as i64, t: 200, ..SHAPE }), 200);
    assert!(!chunked && plan.chunk() == 0 && !plan.to_string().contains("chunked"), "{plan}");
    // Nothing to write: nothing to walk through, whatever the counts.
    let one = Shape { s: 16, hk: 1, hv: 1, t: 0, b: MOST, bq: 1 };
    let tasks = |change: fn(&mut Params)| {
        let mut p = params(one);
        p.state_in.nb = [4, 64, 0, 0];
        change(&mut p);
        Plan::new(&taken(&p), Isa::Scalar).expect("scalar code runs anywhere").tasks()
    };
    assert_eq!(tasks(|p| p.state_out = Tensor::default()), 0);
    assert!(tasks(|_| ()) >= MOST as usize);
    assert!(Plan::new(&kept(|p| p.state_out = Tensor::default()), Isa::Scalar).expect("as above").tasks() > 0);
    for isa in Isa::ALL.into_iter().filter(|isa| !isa.is_available()) {
        assert_eq!(Plan::new(&problem, isa).expect_err("the CPU lacks it").status(), Status::Unsupported);
    }
    const { assert!(MAX_THREADS == 1024) };
}
