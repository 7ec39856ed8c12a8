//! C programs against the shared library: every bad input, and the example driver, plain and under valgrind.

#[path = "support/library.rs"]
mod library;

use library::{compile, has, output, root};
use std::path::{Path, PathBuf};
use std::process::Command;

fn bad_input(name: &str) -> PathBuf {
    compile(name, &["tests/c/bad_input.c"])
}

fn driver(name: &str) -> PathBuf {
    compile(name, &["examples/driver.c", "examples/safetensors.c"])
}

/// Memcheck fails for any bad access, for any decision made on uninitialised memory, and for memory lost for ever.
fn valgrind(program: &Path) -> Option<Command> {
    if !has("valgrind") {
        println!("SKIPPED: there is no valgrind");
        return None;
    }
    let mut command = Command::new("valgrind");
    command.args(["--quiet", "--error-exitcode=99", "--leak-check=full", "--show-leak-kinds=definite"]);
    command.arg("--errors-for-leak-kinds=definite").arg(program);
    Some(command)
}

fn data(name: &str) -> PathBuf {
    root().join("tests/data").join(name)
}

fn all_data() -> Vec<PathBuf> {
    let files = std::fs::read_dir(data("")).expect("tests/data is there").map(|entry| entry.expect("readable").path());
    let files: Vec<PathBuf> = files.filter(|path| path.extension().is_some_and(|e| e == "safetensors")).collect();
    assert!(!files.is_empty(), "tests/data has no cases");
    files
}

#[test]
fn bad_input_is_refused() {
    print!("{}", output(&mut Command::new(bad_input("bad_input"))));
}

#[test]
fn bad_input_is_refused_under_valgrind() {
    if let Some(mut command) = valgrind(&bad_input("bad_input_valgrind")) {
        print!("{}", output(&mut command));
    }
}

#[test]
fn driver_agrees_with_every_case() {
    let program = driver("driver");
    for threads in ["1", "2", "7"] {
        let lines = output(Command::new(&program).args(["-r", "3", "-t", threads]).args(all_data()));
        assert_eq!(lines.matches("result=ok").count(), 2 * all_data().len(), "{lines}");
        assert!(lines.contains("status=SHAPE message=\"deltanet: SHAPE: k.ne[0] is "), "{lines}");
    }
}

#[test]
fn driver_is_clean_under_valgrind() {
    if let Some(mut command) = valgrind(&driver("driver_valgrind")) {
        let cases = ["hf_s128_t1.safetensors", "hf_s64_t130.safetensors", "kda_s128_t40.safetensors"].map(data);
        let lines = output(command.args(["-r", "1", "-t", "3"]).args(cases));
        assert_eq!(lines.matches("result=ok").count(), 6, "{lines}");
    }
}

/// The driver's status and everything it said.
fn failing(command: &mut Command) -> (Option<i32>, String) {
    let output = command.output().expect("the driver starts");
    let words = [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).concat();
    (output.status.code(), words)
}

#[test]
fn driver_notices_wrong_answers_and_files() {
    let program = driver("driver_wrong");
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let good = std::fs::read(data("hf_s128_t1.safetensors")).expect("the case is there");
    let header = u64::from_le_bytes(good[..8].try_into().expect("eight bytes")) as usize;
    let text = String::from_utf8_lossy(&good[8..8 + header]);
    // The first byte of the data of a tensor.
    let data_of = |tensor: &str| {
        let field = &text[text.find(&format!("\"{tensor}\":")).expect("the tensor is there")..];
        let offset = field.split("\"data_offsets\":[").nth(1).and_then(|rest| rest.split(',').next());
        8 + header + offset.and_then(|digits| digits.parse::<usize>().ok()).expect("an offset")
    };
    let run = |name: &str, bytes: &[u8]| {
        let path = folder.join(name);
        std::fs::write(&path, bytes).expect("the scratch folder is writable");
        failing(Command::new(&program).arg(&path))
    };

    for (name, tensor, value) in
        [("wrong_out", "out", 7.5f32), ("wrong_state", "state_out", 9.0), ("nan", "out", f32::NAN), ("input", "v", 3.0)]
    {
        let mut bytes = good.clone();
        bytes[data_of(tensor)..][..4].copy_from_slice(&value.to_le_bytes());
        let (code, words) = run(name, &bytes);
        assert!(code == Some(1) && words.contains("result=FAIL"), "{name}: {code:?} {words}");
    }

    let with_header = |text: &str| [&(text.len() as u64).to_le_bytes(), text.as_bytes(), &good[8 + header..]].concat();
    let damaged = [
        ("short", good[..good.len() - 4].to_vec()),
        ("empty", Vec::new()),
        ("header_only", good[..8 + header].to_vec()),
        ("header_length", [&u64::MAX.to_le_bytes(), &good[8..]].concat()),
        ("cut_json", with_header(&text[..text.len() / 2])),
        ("offsets", with_header(&text.replace("[0,32]", "[32,0]"))),
        ("huge_shape", with_header(&text.replace("[2,1,4]", "[4294967296,4294967296,4294967296]"))),
        ("negative_shape", with_header(&text.replace("[2,1,4]", "[2,-1,4]"))),
        ("dtype", with_header(&text.replacen("F32", "F99", 1))),
        ("head_map", with_header(&text.replace("grouped", "striped"))),
        ("missing", with_header(&text.replace("\"beta\"", "\"gamma\""))),
        ("nesting", with_header(&"[".repeat(100_000))),
    ];
    for (name, bytes) in damaged {
        let (code, words) = run(name, &bytes);
        assert!(code == Some(1) && words.contains("not a golden case"), "{name}: {code:?} {words}");
    }
    let (code, words) = failing(Command::new(&program).arg(folder.join("absent")));
    assert!(code == Some(1) && words.contains("cannot be read"), "{code:?} {words}");
}

#[test]
fn isa_cap_lowers_and_never_raises() {
    let program = driver("driver_isa");
    for cap in ["scalar", "avx2", "avx512"] {
        let lines = output(
            Command::new(&program).env("DELTANET_ISA", cap).args(["-r", "1"]).arg(data("hf_s128_t1.safetensors")),
        );
        let wanted = deltanet::cpu::Isa::from_name(cap).expect("a name").min(deltanet::cpu::Isa::detected());
        assert!(lines.contains(&format!("isa={} ", wanted.name())), "{cap}: {lines}");
    }
    let (code, words) = failing(Command::new(&program).env("DELTANET_ISA", "sse9").arg(data("hf_s128_t1.safetensors")));
    assert!(code == Some(1), "{words}");
    assert!(words.contains("UNKNOWN_VALUE: DELTANET_ISA is \"sse9\"; it must be"), "{words}");
}

#[test]
fn the_cuda_driver_agrees_or_says_that_there_is_no_gpu() {
    let program = compile("driver_cuda", &["examples/driver_cuda.c"]);
    for shape in [["128", "1", "3"], ["64", "9", "2"], ["48", "3", "1"]] {
        let run = Command::new(&program).args(shape).output().expect("the program starts");
        let words = String::from_utf8_lossy(&run.stdout);
        if run.status.code() == Some(77) {
            println!("{words}");
        } else {
            assert!(run.status.success() && words.matches(" ok").count() == 2, "{words}");
            assert!(words.contains("beta is at") && words.contains("host memory"), "{words}");
        }
    }
}
