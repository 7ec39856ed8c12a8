//! The device that a user names.

/// Where the operator runs.
#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Device {
    /// The CPU kernels.
    Cpu,
    /// The first CUDA device.
    Cuda,
}
