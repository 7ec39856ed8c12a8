//! Random-weight models in GGUF, of the three architectures that run the operator: Qwen3.5 and Qwen3-Next (one decay a
//! head) and Kimi-Linear (one a key channel). Small ones with f32 weights serve to compare tokens and logits; engines
//! round activations for Q8_0 products, so models of that type serve for speed alone.

use anyhow::{Context, Result};
use half::f16;
use std::io::{BufWriter, Seek, Write};
use std::path::Path;

/// A model that can be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Model {
    /// Qwen3.5, tiny, f32.
    Qwen35,
    /// Qwen3-Next, tiny, f32.
    Qwen3Next,
    /// Kimi-Linear, tiny, f32.
    KimiLinear,
    /// Qwen3.5 of the 0.8b shape, Q8_0.
    Speed,
    /// Eight layers of Qwen3.5's 4b shape, Q8_0.
    Wide,
}

impl Model {
    /// The small ones.
    pub const TINY: [Model; 3] = [Model::Qwen35, Model::Qwen3Next, Model::KimiLinear];
    /// Those for speed.
    const FAST: [Model; 2] = [Model::Speed, Model::Wide];

    /// The model of this name.
    pub fn named(name: &str) -> Result<Model> {
        let mut all = Model::TINY.into_iter().chain(Model::FAST);
        all.find(|model| model.name() == name).with_context(|| format!("there is no model {name}"))
    }

    /// Name of the file without its ending. The number changes with what this file writes.
    pub fn name(self) -> &'static str {
        match self {
            Model::Qwen35 => "qwen35-tiny-1",
            Model::Qwen3Next => "qwen3next-tiny-1",
            Model::KimiLinear => "kimi-linear-tiny-1",
            Model::Speed => "qwen35-0.8b-1",
            Model::Wide => "qwen35-4b8l-1",
        }
    }

    /// Writes the model.
    pub fn write(self, path: &Path) -> Result<()> {
        let mut file = match self {
            Model::Qwen35 => qwen(false, &TINY),
            Model::Qwen3Next => qwen(true, &TINY),
            Model::KimiLinear => kimi(),
            Model::Speed => qwen(false, &SPEED),
            Model::Wide => qwen(false, &WIDE),
        };
        file.quantized = Model::FAST.contains(&self);
        file.write(path)
    }
}

struct Size {
    embedding: usize,
    layers: usize,
    feed_forward: usize,
    vocabulary: usize,
    key_heads: usize,
    value_heads: usize,
    head_size: usize,
    attention_heads: usize,
    attention_kv_heads: usize,
    attention_head_size: usize,
    rope_sections: [i32; 4],
}

const TINY: Size = Size {
    embedding: 256,
    layers: 4,
    feed_forward: 512,
    vocabulary: 512,
    key_heads: 2,
    value_heads: 4,
    head_size: 64,
    attention_heads: 2,
    attention_kv_heads: 1,
    attention_head_size: 64,
    rope_sections: [4, 2, 2, 0],
};

const SPEED: Size = Size {
    embedding: 1024,
    layers: 24,
    feed_forward: 3584,
    vocabulary: 8192,
    key_heads: 16,
    value_heads: 16,
    head_size: 128,
    attention_heads: 8,
    attention_kv_heads: 2,
    attention_head_size: 256,
    rope_sections: [11, 11, 10, 0],
};

const WIDE: Size = Size {
    embedding: 2560,
    layers: 8,
    feed_forward: 9216,
    value_heads: 32,
    attention_heads: 16,
    attention_kv_heads: 4,
    ..SPEED
};

const CONVOLUTION: usize = 4;
const EXPERTS: usize = 4;

/// Every fourth layer attends, the others run the operator.
fn attends(layer: usize) -> bool {
    (layer + 1).is_multiple_of(4)
}

/// Qwen3.5, or Qwen3-Next: the same layers with a mixture of experts, and beta and decay in one projection.
fn qwen(next: bool, size: &Size) -> File {
    let mut file = File::new(if next { "qwen3next" } else { "qwen35" }, size.vocabulary);
    let (keys, values) = (size.key_heads * size.head_size, size.value_heads * size.head_size);
    file.count("context_length", 32768);
    file.count("embedding_length", size.embedding);
    file.count("block_count", size.layers);
    file.count("feed_forward_length", size.feed_forward);
    file.count("attention.head_count", size.attention_heads);
    file.count("attention.head_count_kv", size.attention_kv_heads);
    file.count("attention.key_length", size.attention_head_size);
    file.count("attention.value_length", size.attention_head_size);
    file.number("attention.layer_norm_rms_epsilon", 1e-6);
    file.number("rope.freq_base", 1e7);
    file.count("rope.dimension_count", size.attention_head_size / 4);
    file.integers("rope.dimension_sections", &size.rope_sections);
    file.count("ssm.conv_kernel", CONVOLUTION);
    file.count("ssm.inner_size", values);
    file.count("ssm.state_size", size.head_size);
    file.count("ssm.time_step_rank", size.value_heads);
    file.count("ssm.group_count", size.key_heads);
    file.count("full_attention_interval", 4);
    if next {
        file.count("expert_count", EXPERTS);
        file.count("expert_used_count", 2);
        file.count("expert_feed_forward_length", size.feed_forward / 4);
        file.count("expert_shared_feed_forward_length", size.feed_forward / 4);
    }
    file.embedding(size.embedding, size.vocabulary);
    for layer in 0..size.layers {
        let name = |tensor: &str| format!("blk.{layer}.{tensor}");
        let e = size.embedding;
        file.ones(name("attn_norm.weight"), e);
        file.ones(name("post_attention_norm.weight"), e);
        if attends(layer) {
            let (q, kv) =
                (size.attention_heads * size.attention_head_size, size.attention_kv_heads * size.attention_head_size);
            file.random(name("attn_q.weight"), &[e, 2 * q]);
            file.random(name("attn_k.weight"), &[e, kv]);
            file.random(name("attn_v.weight"), &[e, kv]);
            file.random(name("attn_output.weight"), &[q, e]);
            file.ones(name("attn_q_norm.weight"), size.attention_head_size);
            file.ones(name("attn_k_norm.weight"), size.attention_head_size);
        } else {
            file.random(name("attn_qkv.weight"), &[e, 2 * keys + values]);
            file.random(name("attn_gate.weight"), &[e, values]);
            file.scaled(name("ssm_conv1d.weight"), &[CONVOLUTION, 2 * keys + values], 0.5);
            file.scaled(name("ssm_dt.bias"), &[size.value_heads], 0.5);
            file.decay_rates(name("ssm_a"), &[size.value_heads]);
            if next {
                file.random(name("ssm_ba.weight"), &[e, 2 * size.value_heads]);
            } else {
                file.random(name("ssm_beta.weight"), &[e, size.value_heads]);
                file.random(name("ssm_alpha.weight"), &[e, size.value_heads]);
            }
            file.ones(name("ssm_norm.weight"), size.head_size);
            file.random(name("ssm_out.weight"), &[values, e]);
        }
        if next {
            let f = size.feed_forward / 4;
            file.random(name("ffn_gate_inp.weight"), &[e, EXPERTS]);
            file.random(name("ffn_gate_exps.weight"), &[e, f, EXPERTS]);
            file.random(name("ffn_up_exps.weight"), &[e, f, EXPERTS]);
            file.random(name("ffn_down_exps.weight"), &[f, e, EXPERTS]);
            file.random(name("ffn_gate_inp_shexp.weight"), &[e]);
            file.random(name("ffn_gate_shexp.weight"), &[e, f]);
            file.random(name("ffn_up_shexp.weight"), &[e, f]);
            file.random(name("ffn_down_shexp.weight"), &[f, e]);
        } else {
            file.feed_forward(layer, e, size.feed_forward);
        }
    }
    file
}

/// Kimi-Linear: Kimi delta attention, and latent attention in every fourth layer. All feed-forward parts are dense.
fn kimi() -> File {
    let (e, layers, feed_forward, vocabulary, heads, head_size) = (256, 4, 512, 512, 4, 64);
    let (latent, rope) = (64, 16);
    let mut file = File::new("kimi-linear", vocabulary);
    file.count("context_length", 32768);
    file.count("embedding_length", e);
    file.count("block_count", layers);
    file.count("feed_forward_length", feed_forward);
    file.count("attention.head_count", heads);
    let kv_heads: Vec<i32> = (0..layers).map(|layer| i32::from(attends(layer))).collect();
    file.integers("attention.head_count_kv", &kv_heads);
    file.count("attention.key_length", latent + rope);
    file.count("attention.value_length", latent);
    file.count("attention.key_length_mla", head_size);
    file.count("attention.value_length_mla", head_size);
    file.count("attention.kv_lora_rank", latent);
    file.number("attention.layer_norm_rms_epsilon", 1e-5);
    file.number("rope.freq_base", 1e4);
    file.count("rope.dimension_count", rope);
    file.count("ssm.conv_kernel", CONVOLUTION);
    file.count("kda.head_dim", head_size);
    file.count("expert_count", EXPERTS);
    file.count("expert_used_count", 2);
    file.count("expert_shared_count", 1);
    file.count("expert_feed_forward_length", feed_forward / 4);
    file.count("leading_dense_block_count", layers);
    file.count("expert_gating_func", 2);
    file.number("expert_weights_scale", 1.0);
    file.embedding(e, vocabulary);
    let inner = heads * head_size;
    for layer in 0..layers {
        let name = |tensor: &str| format!("blk.{layer}.{tensor}");
        file.ones(name("attn_norm.weight"), e);
        file.ones(name("ffn_norm.weight"), e);
        if attends(layer) {
            file.random(name("attn_q.weight"), &[e, heads * head_size]);
            file.random(name("attn_kv_a_mqa.weight"), &[e, latent + rope]);
            file.ones(name("attn_kv_a_norm.weight"), latent);
            file.random(name("attn_k_b.weight"), &[head_size - rope, latent, heads]);
            file.random(name("attn_v_b.weight"), &[latent, head_size, heads]);
            file.random(name("attn_output.weight"), &[inner, e]);
        } else {
            for part in ["q", "k", "v"] {
                file.random(name(&format!("attn_{part}.weight")), &[e, inner]);
                file.scaled(name(&format!("ssm_conv1d_{part}.weight")), &[CONVOLUTION, 1, inner, 1], 0.5);
            }
            file.random(name("ssm_f_a.weight"), &[e, head_size]);
            file.random(name("ssm_f_b.weight"), &[head_size, inner]);
            file.random(name("ssm_beta.weight"), &[e, heads]);
            file.decay_rates(name("ssm_a"), &[1, heads, 1, 1]);
            file.scaled(name("ssm_dt.bias"), &[inner], 0.5);
            file.random(name("ssm_g_a.weight"), &[e, head_size]);
            file.random(name("ssm_g_b.weight"), &[head_size, inner]);
            file.ones(name("ssm_norm.weight"), head_size);
            file.random(name("attn_output.weight"), &[inner, e]);
        }
        file.feed_forward(layer, e, feed_forward);
    }
    file
}

/// How a tensor's elements are made.
enum Fill {
    One,
    /// Normal, of this standard deviation.
    Normal(f32),
    /// Minus the exponential of a uniform number in [-3, 1].
    DecayRate,
}

struct Tensor {
    name: String,
    shape: Vec<usize>,
    fill: Fill,
}

/// A GGUF file in the making.
struct File {
    architecture: &'static str,
    metadata: Vec<u8>,
    entries: u64,
    tensors: Vec<Tensor>,
    quantized: bool,
}

const U32: u32 = 4;
const I32: u32 = 5;
const F32: u32 = 6;
const BOOL: u32 = 7;
const STRING: u32 = 8;
const ARRAY: u32 = 9;
const ALIGNMENT: usize = 32;

fn put_string(bytes: &mut Vec<u8>, text: &str) {
    bytes.extend((text.len() as u64).to_le_bytes());
    bytes.extend(text.as_bytes());
}

impl File {
    fn new(architecture: &'static str, vocabulary: usize) -> File {
        let mut file = File { architecture, metadata: Vec::new(), entries: 0, tensors: Vec::new(), quantized: false };
        file.string("general.architecture", architecture);
        file.string("general.name", "synthetic");
        file.tokenizer(vocabulary);
        file
    }

    /// A byte-level vocabulary filled up with unused tokens.
    fn tokenizer(&mut self, vocabulary: usize) {
        let printable = |byte: u32| (33..127).contains(&byte) || (161..173).contains(&byte) || byte >= 174;
        let mut replaced = 256;
        let mut tokens: Vec<String> = (0..256u32)
            .map(|byte| {
                let symbol = if printable(byte) {
                    byte
                } else {
                    replaced += 1;
                    replaced - 1
                };
                char::from_u32(symbol).unwrap_or(' ').to_string()
            })
            .collect();
        let mut kinds = vec![1i32; tokens.len()];
        tokens.extend(["<|endoftext|>", "<|im_start|>", "<|im_end|>"].map(str::to_owned));
        kinds.extend([3; 3]);
        tokens.extend((tokens.len()..vocabulary).map(|at| format!("[PAD{at}]")));
        kinds.resize(vocabulary, 5);
        self.string("tokenizer.ggml.model", "gpt2");
        self.string("tokenizer.ggml.pre", "qwen2");
        self.strings("tokenizer.ggml.tokens", &tokens);
        self.array("tokenizer.ggml.token_type", I32, kinds.len(), |bytes| {
            kinds.iter().for_each(|kind| bytes.extend(kind.to_le_bytes()));
        });
        self.strings("tokenizer.ggml.merges", &["h e".to_owned(), "l l".to_owned()]);
        for (key, token) in [("eos", 258u32), ("padding", 256)] {
            self.entry(&format!("tokenizer.ggml.{key}_token_id"), U32, &token.to_le_bytes());
        }
        self.entry("tokenizer.ggml.add_bos_token", BOOL, &[0]);
    }

    fn entry(&mut self, key: &str, kind: u32, value: &[u8]) {
        put_string(&mut self.metadata, key);
        self.metadata.extend(kind.to_le_bytes());
        self.metadata.extend(value);
        self.entries += 1;
    }

    fn own(&self, key: &str) -> String {
        format!("{}.{key}", self.architecture)
    }

    fn count(&mut self, key: &str, value: usize) {
        self.entry(&self.own(key), U32, &(value as u32).to_le_bytes());
    }

    fn number(&mut self, key: &str, value: f32) {
        self.entry(&self.own(key), F32, &value.to_le_bytes());
    }

    fn string(&mut self, key: &str, value: &str) {
        let mut bytes = Vec::new();
        put_string(&mut bytes, value);
        self.entry(key, STRING, &bytes);
    }

    fn array(&mut self, key: &str, kind: u32, length: usize, put: impl FnOnce(&mut Vec<u8>)) {
        let mut bytes = kind.to_le_bytes().to_vec();
        bytes.extend((length as u64).to_le_bytes());
        put(&mut bytes);
        self.entry(key, ARRAY, &bytes);
    }

    fn integers(&mut self, key: &str, values: &[i32]) {
        self.array(&self.own(key), I32, values.len(), |bytes| {
            values.iter().for_each(|value| bytes.extend(value.to_le_bytes()));
        });
    }

    fn strings(&mut self, key: &str, values: &[String]) {
        self.array(key, STRING, values.len(), |bytes| values.iter().for_each(|value| put_string(bytes, value)));
    }

    fn tensor(&mut self, name: String, shape: &[usize], fill: Fill) {
        self.tensors.push(Tensor { name, shape: shape.to_vec(), fill });
    }

    fn ones(&mut self, name: String, length: usize) {
        self.tensor(name, &[length], Fill::One);
    }

    /// A matrix whose products keep the size of what they multiply.
    fn random(&mut self, name: String, shape: &[usize]) {
        self.tensor(name, shape, Fill::Normal((shape[0] as f32).powf(-0.5)));
    }

    fn scaled(&mut self, name: String, shape: &[usize], deviation: f32) {
        self.tensor(name, shape, Fill::Normal(deviation));
    }

    fn decay_rates(&mut self, name: String, shape: &[usize]) {
        self.tensor(name, shape, Fill::DecayRate);
    }

    fn embedding(&mut self, embedding: usize, vocabulary: usize) {
        self.scaled("token_embd.weight".into(), &[embedding, vocabulary], 1.0);
        self.ones("output_norm.weight".into(), embedding);
        self.random("output.weight".into(), &[embedding, vocabulary]);
    }

    fn feed_forward(&mut self, layer: usize, embedding: usize, size: usize) {
        self.random(format!("blk.{layer}.ffn_gate.weight"), &[embedding, size]);
        self.random(format!("blk.{layer}.ffn_up.weight"), &[embedding, size]);
        self.random(format!("blk.{layer}.ffn_down.weight"), &[size, embedding]);
    }

    fn is_quantized(&self, tensor: &Tensor) -> bool {
        self.quantized && tensor.shape.len() == 2 && tensor.shape[0].is_multiple_of(32)
    }

    fn write(&self, path: &Path) -> Result<()> {
        let mut header = b"GGUF".to_vec();
        header.extend(3u32.to_le_bytes());
        header.extend((self.tensors.len() as u64).to_le_bytes());
        header.extend(self.entries.to_le_bytes());
        header.extend(&self.metadata);
        let mut offset = 0usize;
        for tensor in &self.tensors {
            put_string(&mut header, &tensor.name);
            header.extend((tensor.shape.len() as u32).to_le_bytes());
            tensor.shape.iter().for_each(|extent| header.extend((*extent as u64).to_le_bytes()));
            header.extend(if self.is_quantized(tensor) { 8u32 } else { 0 }.to_le_bytes());
            header.extend((offset as u64).to_le_bytes());
            let elements: usize = tensor.shape.iter().product();
            let bytes = if self.is_quantized(tensor) { elements / 32 * 34 } else { elements * 4 };
            offset += bytes.next_multiple_of(ALIGNMENT);
        }
        header.resize(header.len().next_multiple_of(ALIGNMENT), 0);
        // Under another name until it is whole: a run that was cut short leaves no half model in the cache.
        let partial = path.with_extension("partial");
        let mut file = BufWriter::with_capacity(1 << 20, std::fs::File::create(&partial)?);
        file.write_all(&header)?;
        let mut random = Random(1);
        for tensor in &self.tensors {
            self.write_elements(&mut file, tensor, &mut random)?;
            let position = file.stream_position()? as usize - header.len();
            file.write_all(&vec![0; position.next_multiple_of(ALIGNMENT) - position])?;
        }
        file.into_inner()?.sync_all()?;
        Ok(std::fs::rename(partial, path)?)
    }

    fn write_elements(&self, file: &mut impl Write, tensor: &Tensor, random: &mut Random) -> Result<()> {
        let elements: usize = tensor.shape.iter().product();
        let mut next = || match tensor.fill {
            Fill::One => 1.0,
            Fill::Normal(deviation) => random.normal() * deviation,
            Fill::DecayRate => -(random.uniform() * 4.0 - 3.0).exp(),
        };
        if !self.is_quantized(tensor) {
            for _ in 0..elements {
                file.write_all(&next().to_le_bytes())?;
            }
            return Ok(());
        }
        for _ in 0..elements / 32 {
            let block: [f32; 32] = std::array::from_fn(|_| next());
            let step = block.iter().fold(0f32, |most, x| most.max(x.abs())) / 127.0;
            file.write_all(&f16::from_f32(step).to_le_bytes())?;
            let factor = if step > 0.0 { 1.0 / step } else { 0.0 };
            file.write_all(&block.map(|x| (x * factor).round() as i8 as u8))?;
        }
        Ok(())
    }
}

/// SplitMix64: the same numbers on every machine, so that the cached model is the model.
pub struct Random(pub u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        mixed ^ (mixed >> 31)
    }

    /// In [0, 1).
    pub fn uniform(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1u64 << 24) as f32
    }

    /// About normal: the sum of twelve uniform numbers.
    pub fn normal(&mut self) -> f32 {
        let bits = [self.next(), self.next(), self.next()];
        let sum: u64 = bits.iter().flat_map(|bits| (0..4).map(move |part| bits >> (16 * part) & 0xFFFF)).sum();
        sum as f32 / 65536.0 - 6.0
    }
}
