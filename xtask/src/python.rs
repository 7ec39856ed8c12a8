//! Programs that PyPI has, at a pinned version, in the cache.

use crate::cache;
use crate::command::run;
use anyhow::Result;
use std::path::PathBuf;
use std::process::Command;

/// The path of `program` from `package` at `version`; fetched the first time.
pub fn tool(package: &str, version: &str, program: &str) -> Result<PathBuf> {
    let folder = cache::root()?.join("python").join(format!("{package}-{version}"));
    let path = folder.join("bin").join(program);
    if !path.exists() {
        run(Command::new("python3").args(["-m", "venv", "--clear"]).arg(&folder))?;
        run(Command::new(folder.join("bin/pip"))
            .args(["install", "--quiet", "--disable-pip-version-check"])
            .arg(format!("{package}=={version}")))?;
    }
    Ok(path)
}
