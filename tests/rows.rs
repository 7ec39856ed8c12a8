//! Which row indices are accepted: the validator against a plain look at every pair, over pools of any size.

mod support;

use deltanet::Status;
use deltanet::safe::{DeltaNet, Ref, RefMut};
use support::{Rng, seed};

const S: usize = 16;
const LARGEST_POOL: usize = 9000;

/// What the rules say, pair by pair.
fn allowed(rows_in: &[i32], rows_out: &[i64], pool: usize, one_pool: bool) -> bool {
    let inside = |row: i64| (0..pool as i64).contains(&row);
    let pairs = || (0..rows_in.len()).flat_map(|a| (0..rows_in.len()).map(move |b| (a, b))).filter(|(a, b)| a != b);
    rows_in.iter().all(|row| inside((*row).into()))
        && rows_out.iter().all(|row| inside(*row))
        && pairs().all(|(a, b)| rows_out[a] != rows_out[b])
        && (!one_pool || pairs().all(|(a, b)| rows_out[a] != i64::from(rows_in[b])))
}

#[test]
fn rows_are_judged_as_pairs_are() {
    let mut rng = Rng(seed());
    let none: [f32; 0] = [];
    let mut no_out: [f32; 0] = [];
    let (mut states, others) = (vec![0.0f32; S * S * LARGEST_POOL], vec![0.0f32; S * S * LARGEST_POOL]);
    let mut verdicts = [0; 2];
    for _ in 0..2000 {
        let pool = rng.pick(&[4, 30, 300, 4096, 4097, LARGEST_POOL]);
        let b = 1 + rng.below(pool.min(60));
        // Distinct rows in any order, from all over the pool; then perhaps a few that break a rule.
        let mut rows: Vec<usize> = (0..pool).collect();
        (0..b).for_each(|at| rows.swap(at, at + rng.below(pool - at)));
        let mut rows_in: Vec<i32> = rows[..b].iter().map(|row| *row as i32).collect();
        let mut rows_out: Vec<i64> = rows[..b].iter().map(|row| *row as i64).collect();
        if rng.chance(30) {
            rows_in.rotate_left(1);
        }
        for _ in 0..rng.below(3) {
            let (from, to) = (rng.below(b), rng.below(b));
            match rng.below(4) {
                0 => rows_out[to] = rows_out[from],
                1 => rows_in[to] = rows_out[from] as i32,
                2 => rows_in[to] = rng.below(pool + 1) as i32,
                _ => rows_out[to] = rng.below(pool + 1) as i64 - 1,
            }
        }
        let one_pool = rng.chance(60);
        let tokens = |channels| [channels, 1, 0, b];
        let call = DeltaNet::new(
            Ref::dense(&none, tokens(S)).expect("empty"),
            Ref::dense(&none, tokens(S)).expect("empty"),
            Ref::dense(&none, tokens(S)).expect("empty"),
            Ref::dense(&none, tokens(1)).expect("empty"),
            Ref::dense(&none, tokens(1)).expect("empty"),
            RefMut::dense(&mut no_out, tokens(S)).expect("empty"),
        );
        let shape = [S, S, 1, pool];
        let state = RefMut::dense(&mut states[..S * S * pool], shape).expect("the pool's size");
        let call = if one_pool {
            call.state(state)
        } else {
            call.state_in(Ref::dense(&others[..S * S * pool], shape).expect("the pool's size")).state_out(state)
        };
        let call = call.rows_in(Ref::vector(&rows_in).expect("a vector"));
        let verdict = call.rows_out(Ref::vector(&rows_out).expect("a vector")).problem().map(drop);
        let wanted = allowed(&rows_in, &rows_out, pool, one_pool);
        verdicts[usize::from(wanted)] += 1;
        assert_eq!(verdict.is_ok(), wanted, "{verdict:?}: in {rows_in:?} out {rows_out:?} pool {pool} one {one_pool}");
        assert!(verdict.is_ok() || verdict.is_err_and(|error| error.status() == Status::Row));
    }
    println!("{verdicts:?} refused and accepted");
    assert!(verdicts.iter().all(|n| *n > 200), "{verdicts:?}");
}
