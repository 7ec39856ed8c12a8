//! The parts of the `deltanet` command, for its binary and for tests that read the same files.

pub mod bench;
pub mod check;
pub mod cuda;
mod device;
pub mod golden;
pub mod info;
mod isa;
pub mod models;
