//! Instruction sets: what the CPU has, and the cap that `DELTANET_ISA` puts on it.

use crate::error::{Error, Result, Status};
use std::sync::atomic::{AtomicU8, Ordering};

/// An instruction set that the kernels are instantiated for, weakest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Isa {
    /// Plain Rust, no intrinsics.
    Scalar,
    /// AVX2, FMA and F16C: 8 lanes.
    Avx2,
    /// AVX-512 F, BW, DQ and VL: 16 lanes.
    Avx512,
}

impl Isa {
    /// All of them, weakest first.
    pub const ALL: [Isa; 3] = [Isa::Scalar, Isa::Avx2, Isa::Avx512];

    /// The name that `DELTANET_ISA` and the command use.
    pub fn name(self) -> &'static str {
        match self {
            Isa::Scalar => "scalar",
            Isa::Avx2 => "avx2",
            Isa::Avx512 => "avx512",
        }
    }

    /// The instruction set of that name.
    pub fn from_name(name: &str) -> Option<Isa> {
        Isa::ALL.into_iter().find(|isa| isa.name() == name)
    }

    /// Whether this CPU (and its operating system) can run it.
    pub fn is_available(self) -> bool {
        match self {
            Isa::Scalar => true,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => {
                is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c")
            }
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => {
                Isa::Avx2.is_available()
                    && is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512vl")
            }
            #[cfg(not(target_arch = "x86_64"))]
            _ => false,
        }
    }

    /// The best one that this CPU has.
    pub fn detected() -> Isa {
        Isa::ALL.into_iter().rev().find(|isa| isa.is_available()).unwrap_or(Isa::Scalar)
    }

    /// The one in force: the best that the CPU has and `DELTANET_ISA` allows. The variable is read once.
    pub fn in_force() -> Result<Isa> {
        // Not a OnceLock: a process that forks while another thread fills one in has a child that waits for ever.
        static CAP: AtomicU8 = AtomicU8::new(UNREAD);
        const UNREAD: u8 = 0xff;
        const UNKNOWN: u8 = 0xfe;
        let asked = || std::env::var("DELTANET_ISA").ok().filter(|name| !name.is_empty());
        let mut cap = CAP.load(Ordering::Relaxed);
        if cap == UNREAD {
            cap = asked().map_or(Isa::Avx512 as u8, |name| Isa::from_name(&name).map_or(UNKNOWN, |isa| isa as u8));
            CAP.store(cap, Ordering::Relaxed);
        }
        let Some(cap) = Isa::ALL.into_iter().find(|isa| *isa as u8 == cap) else {
            let name = asked().unwrap_or_default();
            let words = format_args!("DELTANET_ISA is {name:?}; it must be scalar, avx2 or avx512");
            return Err(Error::compose(Status::UnknownValue, words));
        };
        Ok(Isa::detected().min(cap))
    }
}
