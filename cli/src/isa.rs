//! The instruction set that a user names.

use anyhow::{Result, bail};
use deltanet::cpu::Isa;

/// Parses the value of `--isa`.
pub fn parse(name: &str) -> std::result::Result<Isa, String> {
    Isa::from_name(name).ok_or_else(|| "it must be scalar, avx2 or avx512".into())
}

/// The one asked for, which this CPU must have, or the one in force.
pub fn choose(asked: Option<Isa>) -> Result<Isa> {
    match asked {
        Some(isa) if !isa.is_available() => {
            bail!("--isa {}: this CPU does not have it; its best is {}", isa.name(), Isa::detected().name())
        }
        Some(isa) => Ok(isa),
        None => Ok(Isa::in_force()?),
    }
}
