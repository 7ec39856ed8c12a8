//! What is timed: shapes asked for by numbers or by a model's name.

use crate::models::{self, Gate, Model};
use deltanet::params::StateLayout;

/// One shape of the operator: f32 tensors, dense.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Hk.
    pub key_heads: usize,
    /// Hv.
    pub value_heads: usize,
    /// S.
    pub head_size: usize,
    /// What there is a gate of.
    pub gate: Gate,
    /// T.
    pub tokens: usize,
    /// B.
    pub sequences: usize,
}

/// How the state is kept.
#[derive(Clone, Copy, Debug)]
pub struct StateUse {
    /// Which channels of it are neighbours.
    pub layout: StateLayout,
    /// Whether it is updated where it is.
    pub in_place: bool,
}

impl StateUse {
    /// The layout's name in tables and JSON.
    pub fn layout_name(&self) -> &'static str {
        if self.layout == StateLayout::KeyContiguous { "key" } else { "value" }
    }
}

impl Shape {
    /// Floats of all states.
    pub fn state_floats(&self) -> usize {
        self.head_size * self.head_size * self.value_heads * self.sequences
    }

    /// FMAs of the operator in its token-serial form, 4 a state element and token.
    pub fn fma(&self) -> f64 {
        4.0 * self.state_floats() as f64 * self.tokens as f64
    }

    /// Gates of a head and token.
    pub fn gate_channels(&self) -> usize {
        if self.gate == Gate::Channel { self.head_size } else { 1 }
    }

    /// The columns that begin each line of a table, as [`COLUMNS`] names them.
    pub fn columns(&self) -> String {
        let Shape { key_heads, value_heads, head_size, gate, tokens, sequences } = self;
        format!("{key_heads:>4}/{value_heads:<4}{head_size:>4} {:<8}{tokens:>6}{sequences:>5}", gate.name())
    }

    /// The fields of a JSON object that say what was timed.
    pub fn json(&self) -> serde_json::Map<String, serde_json::Value> {
        let Shape { key_heads, value_heads, head_size, gate, tokens, sequences } = *self;
        let fields = [
            ("hk", key_heads.into()),
            ("hv", value_heads.into()),
            ("s", head_size.into()),
            ("gate", gate.name().into()),
            ("tokens", tokens.into()),
            ("seqs", sequences.into()),
        ];
        fields.into_iter().map(|(name, value): (&str, serde_json::Value)| (name.to_owned(), value)).collect()
    }
}

/// Headings of [`Shape::columns`].
pub const COLUMNS: &str = "  heads   S gate    tokens seqs";

/// The heads, the head size and the gate of every combination asked for.
#[derive(clap::Args)]
pub struct Heads {
    /// Models to take heads, head size and gate from, instead of the three options below.
    #[arg(long, value_delimiter = ',', value_parser = models::parse, conflicts_with_all = ["heads", "head_size", "gate"])]
    model: Vec<Model>,
    /// Key heads / value heads.
    #[arg(long, value_delimiter = ',', default_value = "16/32", value_parser = heads)]
    heads: Vec<(usize, usize)>,
    /// Channels of a head.
    #[arg(long, value_delimiter = ',', default_value = "128")]
    head_size: Vec<usize>,
    /// One gate a head (scalar) or one a key channel (channel).
    #[arg(long, value_delimiter = ',', default_value = "scalar")]
    gate: Vec<Gate>,
}

impl Heads {
    /// Every shape, tokens varying fastest.
    pub fn shapes(&self, sequences: &[usize], tokens: &[usize]) -> Vec<Shape> {
        let mut kinds: Vec<(usize, usize, usize, Gate)> =
            self.model.iter().map(|model| (model.key_heads, model.value_heads, model.head_size, model.gate)).collect();
        if kinds.is_empty() {
            for &(key_heads, value_heads) in &self.heads {
                for &head_size in &self.head_size {
                    kinds.extend(self.gate.iter().map(|&gate| (key_heads, value_heads, head_size, gate)));
                }
            }
        }
        let mut shapes = Vec::new();
        for (key_heads, value_heads, head_size, gate) in kinds {
            for &sequences in sequences {
                let shape = |&tokens| Shape { key_heads, value_heads, head_size, gate, tokens, sequences };
                shapes.extend(tokens.iter().map(shape));
            }
        }
        shapes
    }
}

fn heads(text: &str) -> std::result::Result<(usize, usize), String> {
    let parsed = text.split_once('/').and_then(|(keys, values)| Some((keys.parse().ok()?, values.parse().ok()?)));
    match parsed {
        Some((keys, values)) if keys > 0 && values > 0 && values % keys == 0 => Ok((keys, values)),
        _ => Err("it must be KEYS/VALUES, as 16/32, with VALUES a multiple of KEYS".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        heads: Heads,
    }

    fn shapes(words: &[&str]) -> Vec<Shape> {
        let line = Line::try_parse_from([&["bench"], words].concat()).expect("a good line");
        line.heads.shapes(&[1, 8], &[1, 64])
    }

    #[test]
    fn every_combination_is_timed_once() {
        let all = shapes(&["--heads", "16/32,16/64", "--gate", "scalar,channel"]);
        assert_eq!(all.len(), 2 * 2 * 2 * 2);
        assert!(all.iter().enumerate().all(|(at, shape)| !all[..at].contains(shape)));
    }

    #[test]
    fn a_model_stands_for_its_heads_and_gate() {
        let all = shapes(&["--model", "kimi-linear-48b,qwen3.5-27b"]);
        assert_eq!(all.len(), 2 * 2 * 2);
        assert_eq!((all[0].key_heads, all[0].value_heads, all[0].gate), (32, 32, Gate::Channel));
        assert_eq!((all[4].key_heads, all[4].value_heads, all[4].gate), (16, 48, Gate::Head));
        assert!(Line::try_parse_from(["bench", "--model", "qwen3.5-27b", "--heads", "1/1"]).is_err());
    }
}
