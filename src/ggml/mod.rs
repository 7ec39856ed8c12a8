//! Inside ggml: a plugin for stock llama.cpp, and a custom operation for engines that build graphs themselves.
//!
//! ```text
//! GGML_BACKEND_PATH ──> plugin ──> symbols ──> substitute ──> fuse ──> tensor ──> Problem, Plan ──> host's threads
//!                         │       (find the    (wrap the    (GET_ROWS           │
//!                         │         host)      CPU backend)  and CPY)           └─> verify (next to the host's own)
//!                         └──> device (DELTANET_GGML=device)
//! ```
//!
//! [`abi`] alone knows the host's structures and the versions that they were compared with. A host, a node or a graph
//! that is not as expected stays as it is, with a line in the host's [`crate::log`].

mod abi;
pub(crate) mod custom_op;
mod device;
mod fuse;
pub(crate) mod plugin;
mod scratch;
pub(crate) mod substitute;
pub(crate) mod symbols;
mod tensor;
#[cfg(test)]
mod tests;
mod verify;

pub(crate) use abi::{Device, Tensor};
