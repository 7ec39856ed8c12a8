//! What must hold for any input at all. Each module is a property over bytes: libFuzzer looks for bytes that break it
//! (`cargo xtask fuzz`), and tests/replay.rs repeats the bytes that once did.

pub mod arena;
pub mod bytes;
pub mod capi;
pub mod ggml;
// The command's own file, without the command's plots and progress bars.
#[path = "../../cli/src/golden.rs"]
pub mod golden;
pub mod safetensors;
