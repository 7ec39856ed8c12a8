//! What must hold for any input at all. Each module is a property over bytes: libFuzzer looks for bytes that break it
//! (`cargo xtask fuzz`), and tests/replay.rs repeats the bytes that once did.

pub mod arena;
pub mod bytes;
pub mod capi;
pub mod safetensors;
