//! The CUDA kernels on a CPU: compiled as C++ for the machine of tests/emulated, launched as on a GPU, compared with the oracle.
//!
//! This sees what kernels compute, on any machine: indices, layouts, options, bytes outside tensors, barriers that nobody reaches.
//! It does not see what only happens on a GPU: races, what is visible when, speed.

#[path = "../../tests/support/mod.rs"]
mod support;

use super::chunked::{self, Abilities, NAMES};
use super::modules::FIRST_CHUNKED;
use super::plan::{Arguments, Launch, Plan, SHAPES};
use super::run::each_launch;
use crate::problem::Problem;
use crate::reference;
use libloading::Library;
use std::ffi::{CStr, c_void};
use std::path::Path;
use std::process::Command;
use support::{Case, Rng, Wish, cases, seed};

/// The kernels for one architecture.
struct Gpu {
    library: Library,
    abilities: Abilities,
}

type Emulate = unsafe extern "C" fn(*const c_void, *const c_void, *const u32, u32, u32, u32);

impl Gpu {
    /// `arch` as in sm_90a, `shared` as a device has it.
    fn new(arch: &str, shared: usize) -> Gpu {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let path = std::env::current_exe().expect("a test knows its own path").with_extension(format!("sm_{arch}.so"));
        let number: i32 = arch.trim_end_matches('a').parse().expect("a number");
        let mut compiler = Command::new(std::env::var_os("CXX").unwrap_or_else(|| "c++".into()));
        compiler.args(["-std=c++17", "-O1", "-g", "-shared", "-fPIC", "-w", "-x", "c++", "-include"]);
        compiler.arg(root.join("tests/emulated/ptx.cuh")).arg("-I").arg(root.join("kernels"));
        compiler.arg(format!("-D__CUDA_ARCH__={number}0"));
        if arch.ends_with('a') {
            compiler.arg("-D__CUDA_ARCH_FEAT_SM90_ALL");
        }
        compiler.args(
            ["kernels/chunked.cu", "kernels/recurrent.cu", "tests/emulated/machine.cpp"].map(|file| root.join(file)),
        );
        let status = compiler.arg("-o").arg(&path).status().expect("a C++ compiler");
        assert!(status.success(), "{compiler:?}: {status}");
        // SAFETY: it was compiled here and has no initialisers.
        let library = unsafe { Library::new(&path) }.expect("a library");
        Gpu { library, abilities: Abilities::new(number, shared, 132, true) }
    }

    /// # Safety
    /// The memory that the launch's arguments describe is there.
    unsafe fn launch(&self, mut launch: Launch) {
        let name = name(&launch);
        let cluster = launch.function.checked_sub(FIRST_CHUNKED).map_or(1, chunked::cluster_size);
        let kind = match launch.arguments {
            Arguments::Fast(_) => "emulate_fast",
            Arguments::Any(_) => "emulate_any",
            Arguments::Chunk(_) => "emulate_chunk",
        };
        // SAFETY: tests/emulated/machine.cpp has the functions, the kernels' sources the kernels; the plan chose arguments of
        // the kernel's type, and the caller vouches for what they point to.
        unsafe {
            let emulate = self.library.get::<Emulate>(kind.as_bytes()).expect(kind);
            let kernel = self.library.get::<*const c_void>(name.to_bytes()).expect("every kernel is compiled");
            let kernel = kernel.try_as_raw_ptr().expect("an address").cast_const();
            emulate(kernel, launch.argument(), launch.grid.as_ptr(), launch.threads, cluster, launch.shared);
        }
    }

    /// What the problem is launched as.
    fn launches(&self, problem: &Problem, workspace: *mut c_void) -> Vec<Launch> {
        let mut all = Vec::new();
        let plan = Plan::new(problem).expect("a plan");
        each_launch(problem, plan, Some(self.abilities), workspace, |launch| {
            all.push(launch);
            Ok(())
        })
        .expect("nothing is launched here");
        all
    }

    /// # Safety
    /// The problem's memory is there, and nobody else's.
    unsafe fn run(&self, problem: &Problem) {
        let mut workspace = vec![0xffu8; Plan::new(problem).expect("a plan").workspace];
        for launch in self.launches(problem, workspace.as_mut_ptr().cast()) {
            // SAFETY: passed on.
            unsafe { self.launch(launch) };
        }
    }

    fn check(&self, case: &mut Case, by: &str) {
        let before = case.memory();
        let problem = case.problem();
        // SAFETY: the case owns all memory that its params describe.
        let (expected, nmse) = unsafe {
            let expected = reference::evaluate(&problem);
            self.run(&problem);
            let nmse = reference::compare(&problem, &expected);
            (expected, nmse)
        };
        let chunked = Plan::new(&problem).expect("a plan").chunked.is_some();
        case.assert_near(&nmse, &expected, case.bound_on_cuda(chunked), by);
        case.assert_intact(&before);
    }
}

fn name(launch: &Launch) -> &'static CStr {
    launch.function.checked_sub(FIRST_CHUNKED).map_or_else(|| SHAPES[launch.function].name, |function| NAMES[function])
}

/// Kernels that differ in precision and shape alone: `dn_chunk_scan_f32` for `dn_chunk_scan_exact_s128_c64_f32`.
fn family(launch: &Launch) -> String {
    let words: Vec<_> = name(launch).to_str().expect("ascii").split('_').collect();
    [words[0], words[1], words[2], words[words.len() - 1]].join("_")
}

/// Random problems for one family of kernels after the other. `long` is a prompt that is cut into pieces.
fn random_problems_match_the_oracle(mut gpu: Gpu, long: usize, families: &[&str]) {
    let mut rng = Rng(seed());
    for at in 0..cases(2000).div_ceil(20).max(families.len()) {
        let wanted = families[at % families.len()];
        let (prompt, kind) = (wanted.starts_with("dn_chunk"), wanted.split('_').nth(2).expect("three words"));
        if kind == "transition" && at >= families.len() {
            continue; // seconds each
        }
        let tokens: &[usize] = match kind {
            "transition" => &[long],
            "one" => &[1],
            "window" => &[6, 20],
            "single" => &[41, 48, 60, 64],
            _ if prompt => &[48, 64, 100, 130, 260],
            _ => &[1, 3, 6, 20],
        };
        let sizes: &[usize] = if prompt { &[64, 128] } else { &[16, 32, 64, 128, 256] };
        let mut case = (0..10_000)
            .find_map(|_| {
                gpu.abilities.processors = rng.pick(&[1, 132]);
                let wish = Wish {
                    tokens: Some(rng.pick(tokens)),
                    head_size: Some(rng.pick(sizes)),
                    f32_only: wanted.ends_with("f32") || ["one", "window", "fast"].contains(&kind),
                    scalar_gate: prompt,
                    small: true,
                    ..Wish::default()
                };
                let case = Case::draw(&mut rng, wish);
                let launches = gpu.launches(&case.problem(), std::ptr::null_mut());
                launches.iter().any(|launch| family(launch) == wanted).then_some(case)
            })
            .unwrap_or_else(|| panic!("no problem gets {wanted}"));
        gpu.check(&mut case, wanted);
    }
}

const SERIAL: [&str; 6] = [
    "dn_recurrent_one_scalar",
    "dn_recurrent_window_scalar",
    "dn_recurrent_window_channel",
    "dn_recurrent_fast_scalar",
    "dn_recurrent_fast_channel",
    "dn_recurrent_any_scalar",
];
const SCANS: [&str; 5] = [
    "dn_chunk_scan_f32",
    "dn_chunk_scan_h16",
    "dn_chunk_scan_any",
    "dn_chunk_transition_f32",
    "dn_chunk_transition_any",
];

#[test]
fn hopper_kernels_match_the_oracle() {
    let hopper = ["dn_chunk_cluster_f32", "dn_chunk_cluster_any", "dn_chunk_single_s64", "dn_chunk_single_s128"];
    random_problems_match_the_oracle(Gpu::new("90a", 232448), 1300, &[&hopper[..], &SCANS, &SERIAL].concat());
}

#[test]
fn ampere_kernels_match_the_oracle() {
    random_problems_match_the_oracle(Gpu::new("80", 166912), 300, &[&SCANS[..], &SERIAL].concat());
}
