//! Shapes of the operator in known models, so that a benchmark can be asked for by name.
//!
//! From the `config.json` that each model is published with. Qwen: `linear_num_key_heads`, `linear_num_value_heads`,
//! `linear_key_head_dim` (equal to `linear_value_head_dim`), and `num_hidden_layers` less one in every
//! `full_attention_interval`; in `text_config` where there is one. Kimi: `linear_attn_config.num_heads`,
//! `linear_attn_config.head_dim`, the length of `linear_attn_config.kda_layers`.

/// What the log-decay has one of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Gate {
    /// One a head: gated delta net.
    #[value(name = "scalar")]
    Head,
    /// One a key channel: Kimi delta attention.
    Channel,
}

impl Gate {
    /// As options, tables and JSON call it.
    pub fn name(self) -> &'static str {
        if self == Gate::Head { "scalar" } else { "channel" }
    }
}

/// The operator as one model uses it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Model {
    /// The name to ask for it by.
    pub name: &'static str,
    /// The published model.
    pub title: &'static str,
    /// Key heads, Hk.
    pub key_heads: usize,
    /// Value heads, Hv.
    pub value_heads: usize,
    /// Channels of a head, S.
    pub head_size: usize,
    /// Kind of gate.
    pub gate: Gate,
    /// Layers that have the operator: a token runs it that many times.
    pub layers: usize,
}

const fn qwen(name: &'static str, title: &'static str, value_heads: usize, all_layers: usize) -> Model {
    // All of them: linear_num_key_heads 16, linear_key_head_dim 128, full_attention_interval 4.
    let layers = all_layers - all_layers / 4;
    Model { name, title, key_heads: 16, value_heads, head_size: 128, gate: Gate::Head, layers }
}

/// The models that there are names for.
pub const MODELS: [Model; 7] = [
    qwen("qwen3-next-80b", "Qwen3-Next-80B-A3B", 32, 48),
    qwen("qwen3.5-0.8b", "Qwen3.5-0.8B", 16, 24),
    qwen("qwen3.5-4b", "Qwen3.5-4B", 32, 32),
    qwen("qwen3.5-27b", "Qwen3.5-27B", 48, 64),
    qwen("qwen3.5-35b-a3b", "Qwen3.5-35B-A3B", 32, 40),
    qwen("qwen3.5-397b-a17b", "Qwen3.5-397B-A17B", 64, 60),
    Model {
        name: "kimi-linear-48b",
        title: "Kimi-Linear-48B-A3B",
        key_heads: 32,
        value_heads: 32,
        head_size: 128,
        gate: Gate::Channel,
        layers: 20,
    },
];

/// The model of that name.
pub fn parse(name: &str) -> Result<Model, String> {
    let known = || MODELS.map(|model| model.name).join(", ");
    MODELS.into_iter().find(|model| model.name == name).ok_or_else(|| format!("{name} is none of {}", known()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use deltanet::params::Params;
    use deltanet::{Dtype, Problem, Tensor};

    #[test]
    fn names_find_their_models_and_nothing_else() {
        for model in MODELS {
            assert_eq!(parse(model.name), Ok(model));
        }
        assert!(parse("qwen").is_err_and(|words| words.contains("qwen3.5-397b-a17b")));
    }

    #[test]
    fn states_have_the_published_sizes() {
        // Bytes of f32 state that a sequence has in all layers, counted by hand from the published configurations.
        let mib = |name| {
            let model = parse(name).expect("a known name");
            (model.layers * model.value_heads * model.head_size * model.head_size * 4) >> 20
        };
        assert_eq!(mib("qwen3.5-0.8b"), 18);
        assert_eq!(mib("qwen3-next-80b"), 72);
        assert_eq!(mib("qwen3.5-397b-a17b"), 180);
        assert_eq!(mib("kimi-linear-48b"), 40);
    }

    #[test]
    fn every_model_is_a_valid_problem() {
        for model in MODELS {
            let Model { key_heads, value_heads, head_size, .. } = model;
            let gates = if model.gate == Gate::Channel { head_size } else { 1 };
            let mut memory: Vec<Vec<f32>> = Vec::new();
            let mut tensor = |ne: [usize; 4]| {
                memory.push(vec![0.0; ne.iter().product()]);
                let data = memory.last_mut().expect("just pushed").as_mut_ptr();
                Tensor::dense(data.cast(), Dtype::F32, ne.map(|n| n as i64))
            };
            let params = Params {
                q: tensor([head_size, key_heads, 1, 1]),
                k: tensor([head_size, key_heads, 1, 1]),
                v: tensor([head_size, value_heads, 1, 1]),
                g: tensor([gates, value_heads, 1, 1]),
                beta: tensor([1, value_heads, 1, 1]),
                state_in: tensor([head_size, head_size, value_heads, 1]),
                out: tensor([head_size, value_heads, 1, 1]),
                ..Params::default()
            };
            // SAFETY: there are no index tensors to read.
            let problem = unsafe { Problem::new(&params) };
            assert!(problem.is_ok(), "{}: {:?}", model.name, problem.err());
        }
    }
}
