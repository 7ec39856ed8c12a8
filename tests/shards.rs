//! An engine that shards heads or sequences gets the bits of the whole run, from strided views of the same tensors.

#[path = "support/library.rs"]
mod library;
mod support;

use deltanet::cpu::{self, Isa};
use deltanet::params::{HeadMap, StateLayout};
use deltanet::{Dtype, Params, Plan, Problem, Tensor};
use library::{compile, output};
use std::process::Command;
use support::sharded::{B, Whole, shard, slice};
use support::{Rng, seed};

const S: usize = 32;

/// One call after the other.
fn run(isa: Isa, calls: &[Params]) {
    for call in calls {
        // SAFETY: there are no index tensors.
        let problem = unsafe { Problem::new(call) }.expect("a shard is a valid problem");
        let plan = Plan::new(&problem, isa).expect("the instruction set is there");
        // SAFETY: the params describe memory that the whole owns and nobody else uses.
        unsafe { cpu::run(&problem, &plan, 2) }.expect("a valid problem runs");
    }
}

#[test]
fn head_shards_have_the_bits_of_the_whole() {
    let mut rng = Rng(seed());
    for isa in Isa::ALL.into_iter().filter(|isa| isa.is_available()) {
        for layout in [StateLayout::KeyContiguous, StateLayout::ValueContiguous] {
            for head_map in [HeadMap::Tiled, HeadMap::Grouped] {
                for tokens in [1, 5, 16, 97] {
                    let mut whole = Whole::new(&mut rng, S, tokens, head_map, layout);
                    let (params, state) = (whole.params, whole.state.clone());
                    let expected = whole.bits(&state, || run(isa, &[params]));
                    for shards in [2, 4, 16] {
                        let calls: Vec<Params> =
                            (0..shards).flat_map(|at| shard(&params, head_map, at, shards)).collect();
                        let bits = whole.bits(&state, || run(isa, &calls));
                        assert!(
                            bits == expected,
                            "{shards} shards, {tokens} tokens, {head_map:?}, {layout:?}, {isa:?}"
                        );
                    }
                }
            }
        }
    }
}

#[test]
fn sequence_shards_through_rows_have_the_bits_of_the_whole() {
    let mut rng = Rng(seed());
    for isa in Isa::ALL.into_iter().filter(|isa| isa.is_available()) {
        for tokens in [1, 16, 70] {
            let mut whole = Whole::new(&mut rng, S, tokens, HeadMap::Tiled, StateLayout::KeyContiguous);
            let (params, state) = (whole.params, whole.state.clone());
            let expected = whole.bits(&state, || run(isa, &[params]));
            let rows: Vec<[i32; 1]> = (0..B as i32).map(|row| [row]).collect();
            let calls: Vec<Params> = (0..B)
                .map(|b| {
                    let token = |tensor| slice(tensor, 3, b, 1);
                    let row = Tensor::dense(rows[b].as_ptr().cast_mut().cast(), Dtype::I32, [1, 1, 1, 1]);
                    // The states stay one pool: each shard names its row of it.
                    Params {
                        q: token(params.q),
                        k: token(params.k),
                        v: token(params.v),
                        g: token(params.g),
                        beta: token(params.beta),
                        out: token(params.out),
                        rows_in: row,
                        rows_out: row,
                        ..params
                    }
                })
                .collect();
            assert!(whole.bits(&state, || run(isa, &calls)) == expected, "{tokens} tokens, {isa:?}");
        }
    }
}

#[test]
fn the_example_in_c_says_the_same() {
    let said = output(&mut Command::new(compile("shards", &["examples/shards.c"])));
    // Both maps: by sequences, and 2, 4, 8 and 16 shards by heads.
    assert_eq!(said.lines().filter(|line| line.ends_with("same bits")).count(), 2 * 5, "{said}");
}
