//! The committed header is what cbindgen makes of the sources, and C and C++ compilers take it alone.

use std::path::{Path, PathBuf};
use std::process::Command;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// `DELTANET_BLESS=1 cargo test --test header` writes the header instead of comparing it.
#[test]
fn header_has_not_drifted() {
    let config = cbindgen::Config::from_file(root().join("cbindgen.toml")).expect("cbindgen.toml is valid");
    let bindings = cbindgen::generate_with_config(root(), config).expect("the sources parse");
    let mut fresh = Vec::new();
    bindings.write(&mut fresh);
    let path = root().join("include/deltanet.h");
    if std::env::var_os("DELTANET_BLESS").is_some() {
        std::fs::write(&path, &fresh).expect("the header is writable");
    }
    let committed = std::fs::read(&path).expect("the header is committed");
    assert!(committed == fresh, "include/deltanet.h is not what the sources say: regenerate it with DELTANET_BLESS=1");
}

#[test]
fn header_compiles_alone() {
    let scratch = PathBuf::from(env!("CARGO_TARGET_TMPDIR"));
    let common = ["-Wall", "-Wextra", "-Wpedantic", "-Werror", "-Wconversion", "-Wshadow", "-fsyntax-only"];
    for (compiler, standard, file) in [("cc", "-std=c11", "alone.c"), ("c++", "-std=c++17", "alone.cpp")] {
        let source = scratch.join(file);
        std::fs::write(
            &source,
            "#include \"deltanet.h\"\nint main(void) { return (int) sizeof(deltanet_params) == 0; }\n",
        )
        .expect("the scratch folder is writable");
        let mut command = Command::new(compiler);
        command.arg(standard).args(common).arg("-I").arg(root().join("include")).arg(&source);
        assert!(
            command.status().expect("a compiler is installed").success(),
            "{compiler} {standard} refuses the header"
        );
    }
}

/// The first thing that a reader copies.
#[test]
fn readme_example_compiles() {
    let readme = std::fs::read_to_string(root().join("README.md")).expect("the README is there");
    let (_, rest) = readme.split_once("```c\n").expect("the README has C code");
    let (code, _) = rest.split_once("```").expect("the code ends");
    let source = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("readme.c");
    std::fs::write(&source, format!("#include <stdio.h>\n{code}")).expect("the scratch folder is writable");
    let mut command = Command::new("cc");
    command.args(["-std=c11", "-Wall", "-Wextra", "-Werror", "-fsyntax-only", "-I"]).arg(root().join("include"));
    assert!(command.arg(&source).status().expect("a compiler is installed").success(), "the README's C code is wrong");
}
