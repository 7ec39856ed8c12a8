//! Where downloads and foreign builds are kept, outside the tree, so that a fresh clone finds them.

use anyhow::{Context, Result};
use std::path::PathBuf;

/// `DELTANET_CACHE`, or `deltanet` in the user's cache folder. Made if it is not there.
pub fn root() -> Result<PathBuf> {
    let named = |variable: &str| std::env::var_os(variable).filter(|value| !value.is_empty()).map(PathBuf::from);
    let root = named("DELTANET_CACHE")
        .or_else(|| named("XDG_CACHE_HOME").map(|cache| cache.join("deltanet")))
        .or_else(|| named("HOME").map(|home| home.join(".cache/deltanet")))
        .context("neither DELTANET_CACHE nor HOME is set")?;
    std::fs::create_dir_all(&root).with_context(|| format!("{} cannot be made", root.display()))?;
    Ok(root)
}
