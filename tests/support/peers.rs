//! Where `cargo xtask test` keeps the engines that we compare with.

use std::path::PathBuf;

/// The folder of an engine, named by `variable` or in the project's cache. Without it the test is skipped, and says
/// so; with DELTANET_REQUIRE_PEERS=1, as under `cargo xtask test`, that is a failure.
fn folder(variable: &str, name: &str) -> Option<PathBuf> {
    let path = |variable: &str| std::env::var_os(variable).filter(|value| !value.is_empty()).map(PathBuf::from);
    let cache = || {
        let root = path("DELTANET_CACHE");
        let root = root.or_else(|| path("XDG_CACHE_HOME").map(|root| root.join("deltanet")));
        root.or_else(|| path("HOME").map(|root| root.join(".cache/deltanet"))).map(|root| root.join(name))
    };
    let folder = path(variable).or_else(cache).filter(|folder| folder.is_dir());
    if folder.is_none() {
        let required = std::env::var_os("DELTANET_REQUIRE_PEERS").is_some_and(|value| value == "1");
        assert!(!required, "{name} is not there; `cargo xtask test` fetches it");
        println!("SKIPPED: {name} is not there; `cargo xtask test` fetches it");
    }
    folder
}

/// The unpacked wheel of ik_llama.cpp.
pub fn ik() -> Option<PathBuf> {
    folder("DELTANET_IK", "ik")
}
