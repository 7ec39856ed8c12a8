//! Proof before trust: our result next to the host's own, for every variant of the operator that appears.

use super::tensor::{Operands, Places};
use std::collections::HashSet;
use std::sync::{LazyLock, Mutex, PoisonError};

/// `DELTANET_VERIFY`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// The first time each variant appears.
    First,
    /// Every node of every graph.
    Always,
    /// Never.
    Off,
}

impl Mode {
    /// The mode that the environment asks for.
    pub fn in_force() -> Mode {
        static MODE: LazyLock<Mode> = LazyLock::new(|| match std::env::var("DELTANET_VERIFY").as_deref() {
            Ok("always") => Mode::Always,
            Ok("off") => Mode::Off,
            _ => Mode::First,
        });
        *MODE
    }
}

/// What our kernels and the host's may treat in a way of its own. Tokens and sequences count by size class.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Variant {
    head_size: usize,
    key_heads: usize,
    value_heads: usize,
    channel_gate: bool,
    snapshots: usize,
    broadcast: bool,
    tokens: u32,
    sequences: u32,
}

impl Variant {
    pub fn of(operands: &Operands) -> Variant {
        Variant {
            head_size: operands.head_size,
            key_heads: operands.key_heads,
            value_heads: operands.value_heads,
            channel_gate: operands.channel_gate,
            snapshots: operands.snapshots,
            broadcast: operands.qk_sequences != operands.sequences,
            tokens: operands.tokens.ilog2(),
            sequences: operands.sequences.min(2) as u32,
        }
    }
}

/// Which variants agreed with the host, and which did not. A proof counts for one way of placing the states.
#[derive(Default)]
struct Verdicts {
    proven: HashSet<(Variant, bool, bool)>,
    refuted: HashSet<Variant>,
}

static VERDICTS: LazyLock<Mutex<Verdicts>> = LazyLock::new(Mutex::default);

fn verdicts() -> std::sync::MutexGuard<'static, Verdicts> {
    VERDICTS.lock().unwrap_or_else(PoisonError::into_inner)
}

pub fn refuted(variant: &Variant) -> bool {
    verdicts().refuted.contains(variant)
}

/// Whether this variant, with its reads and writes fused or not, still needs its proof.
pub fn unproven(variant: &Variant, read: bool, write: bool) -> bool {
    match Mode::in_force() {
        Mode::First => !verdicts().proven.contains(&(*variant, read, write)),
        Mode::Always => true,
        Mode::Off => false,
    }
}

/// Remembers the outcome of a proof.
pub fn decide(variant: &Variant, read: bool, write: bool, agrees: bool) {
    if agrees {
        verdicts().proven.insert((*variant, read, write));
    } else {
        verdicts().refuted.insert(*variant);
    }
}

/// Largest normalised mean squared error between the two: ggml's own tolerance for this operator.
const TOLERANCE: f64 = 1e-7;

/// Compares the host's result in `host` (a node's elements, in the node's order) with ours; says what differs.
///
/// # Safety
/// The run that `places` describe is complete, and `out` points to its outputs.
pub unsafe fn compare(host: &[f32], operands: &Operands, out: *const f32, places: &Places) -> Result<(), String> {
    let outputs = operands.out_bytes / size_of::<f32>();
    // SAFETY: the node's outputs, as large as `operands` found them.
    let ours = unsafe { std::slice::from_raw_parts(out, outputs) };
    let error = nmse(&host[..outputs], ours);
    if error > TOLERANCE {
        return Err(format!("outputs differ, NMSE {error:.1e}"));
    }
    let state = operands.state_elements();
    for slot in 0..operands.written_slots() {
        for b in 0..operands.sequences {
            let at = outputs + (slot * operands.sequences + b) * state;
            // SAFETY: a state that the run has written.
            let ours = unsafe { std::slice::from_raw_parts(places.written(slot, b).cast::<f32>(), state) };
            let error = nmse(&host[at..at + state], ours);
            if error > TOLERANCE {
                return Err(format!("the state of sequence {b}, slot {slot}, differs, NMSE {error:.1e}"));
            }
        }
    }
    Ok(())
}

/// Squared error over squared reference. Infinite where one has a number and the other has none; NaN never passes.
fn nmse(reference: &[f32], ours: &[f32]) -> f64 {
    let (mut error, mut square) = (0f64, 0f64);
    for (reference, ours) in reference.iter().zip(ours) {
        match (reference.is_finite(), ours.is_finite()) {
            (true, true) => {
                let difference = f64::from(*reference) - f64::from(*ours);
                error += difference * difference;
                square += f64::from(*reference) * f64::from(*reference);
            }
            // Both overflowed: the inputs are at fault, in the host as here.
            (false, false) => {}
            _ => return f64::INFINITY,
        }
    }
    if error == 0.0 { 0.0 } else { error / square.max(f64::from(f32::MIN_POSITIVE)) }
}

#[cfg(test)]
mod tests {
    use super::nmse;

    #[test]
    fn numbers_against_none_never_agree() {
        assert_eq!(nmse(&[1.0, 2.0], &[1.0, f32::NAN]), f64::INFINITY);
        assert_eq!(nmse(&[f32::INFINITY, 2.0], &[1.0, 2.0]), f64::INFINITY);
        assert_eq!(nmse(&[f32::NAN, 2.0], &[f32::NAN, 2.0]), 0.0);
        assert!(nmse(&[0.0, 0.0], &[1e-3, 0.0]) > 1.0);
        assert!((nmse(&[2.0, 0.0], &[1.0, 0.0]) - 0.25).abs() < 1e-12);
    }
}
