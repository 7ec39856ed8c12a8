//! `cargo xtask hosts`: stock llama.cpp builds with and without the plugin.
//!
//! Every run is a process of its own (`cargo xtask host`), because a plugin stays in the process that loaded it. The
//! parent compares: equal greedy tokens, logits within a bound, and what the plugin's counters say.

mod driver;
mod examples;
mod fetch;
mod graphs;
mod llama;
mod model;
mod servers;
mod speed;

pub use driver::Drive;
pub use fetch::{CRATE_ABOUT, crate_sources, model};
pub use model::Model;
pub use speed::run_speed;

use crate::command;
use anyhow::{Context, Result, bail, ensure};
use fetch::HOSTS;
use servers::check_servers;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

/// Largest NMSE of logits with and without the plugin, on models with f32 weights.
const LOGITS_BOUND: f64 = 1e-8;

/// Largest NMSE of a single operator's results.
const GRAPH_BOUND: f64 = 1e-11;

/// Writes the model of this name.
pub fn write_model(name: &str, path: &Path) -> Result<()> {
    Model::named(name)?.write(path)
}

/// The library under test, built as it is shipped.
fn plugin() -> Result<PathBuf> {
    command::run(command::cargo().args(["build", "--release", "--quiet", "-p", "deltanet"]))?;
    Ok(command::release().join("libdeltanet.so"))
}

/// What a driver process said.
struct Report {
    /// Lines `name: value`, in the order of their names.
    said: BTreeMap<String, String>,
    log: Vec<String>,
    values: Vec<f32>,
}

impl Report {
    fn count(&self, name: &str) -> u64 {
        self.said.get(name).and_then(|value| value.parse().ok()).unwrap_or(0)
    }

    fn starting(&self, prefix: &str) -> BTreeMap<&String, &String> {
        self.said.iter().filter(|(name, _)| name.starts_with(prefix)).collect()
    }
}

/// Longest time of one process: some of them run many threads on few processors, beside other work.
const LIMIT: Duration = Duration::from_secs(900);

/// The library that lets many spinning threads share few processors; see its source.
fn turns() -> Result<PathBuf> {
    let library = command::release().join("libturns.so");
    let mut compiler = Command::new("cc");
    compiler.args(["-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]);
    compiler.arg(command::workspace().join("tests/hosts/turns.c")).arg("-o").arg(&library).arg("-lpthread");
    command::run(&mut compiler)?;
    Ok(library)
}

/// Sets what decides about the plugin in a process, and nothing else that this process may have inherited.
fn with_plugin<'a>(command: &'a mut Command, plugin: Option<&Path>, settings: &[(&str, &str)]) -> &'a mut Command {
    for variable in ["GGML_BACKEND_PATH", "DELTANET_GGML", "DELTANET_VERIFY", "DELTANET_LOG", "DELTANET_ISA"] {
        command.env_remove(variable);
    }
    if let Some(plugin) = plugin {
        command.env("GGML_BACKEND_PATH", plugin);
    }
    command.envs(settings.iter().copied())
}

fn read_values(path: &Path) -> Result<Vec<f32>> {
    let bytes = std::fs::read(path).context("no values were written")?;
    std::fs::remove_file(path)?;
    Ok(bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect())
}

/// A file for values that only this process uses.
fn values_file() -> PathBuf {
    std::env::temp_dir().join(format!("deltanet-hosts-{}.f32", std::process::id()))
}

/// Runs `xtask host VERB LIBRARIES ...` with or without the plugin.
fn drive(
    libraries: &Path,
    verb: &str,
    arguments: &[&str],
    plugin: Option<&Path>,
    settings: &[(&str, &str)],
) -> Result<Report> {
    let values = values_file();
    let mut command = Command::new(std::env::current_exe()?);
    command.arg("host").arg(verb).arg(libraries).args(arguments).arg("--values").arg(&values);
    let text = command::output_within(with_plugin(&mut command, plugin, settings), LIMIT)?;
    let mut report = Report { said: BTreeMap::new(), log: Vec::new(), values: read_values(&values)? };
    for line in text.lines() {
        match line.split_once(": ") {
            Some(("log", said)) => report.log.push(said.to_owned()),
            Some((name, value)) => drop(report.said.insert(name.to_owned(), value.to_owned())),
            None => bail!("the driver printed {line:?}"),
        }
    }
    Ok(report)
}

/// Squared error over squared reference; infinite where a number is missing on either side.
fn nmse(reference: &[f32], ours: &[f32]) -> f64 {
    if reference.len() != ours.len() || reference.iter().chain(ours).any(|x| !x.is_finite()) {
        return f64::INFINITY;
    }
    let square = |x: f32, y: f32| (f64::from(x) - f64::from(y)).powi(2);
    let error: f64 = reference.iter().zip(ours).map(|(x, y)| square(*x, *y)).sum();
    let size: f64 = reference.iter().map(|x| square(*x, 0.0)).sum();
    error / size.max(f64::MIN_POSITIVE)
}

/// Fetches, builds and makes what the runs need, so that they need no network.
pub fn fetch_all() -> Result<()> {
    fetch::all()
}

/// Runs every host with and without the plugin; `tokens` is how many are generated with two and with four threads.
/// `only` picks hosts by parts of their names; none picks all. `library` is loaded instead of the one that is shipped.
pub fn run_hosts(tokens: usize, only: &[String], library: Option<PathBuf>) -> Result<()> {
    let picked = |name: &str| only.is_empty() || only.iter().any(|part| name.contains(part.as_str()));
    let plugin = library.map_or_else(plugin, |library| Ok(std::path::absolute(library)?))?;
    let setup = Setup { plugin, turns: turns()?.to_string_lossy().into_owned(), tokens };
    let models = Model::TINY.map(|model| Ok((model, fetch::model(model)?)));
    let models = models.into_iter().collect::<Result<Vec<_>>>()?;
    let tiny = models[0].1.to_string_lossy().into_owned();
    let mut summary = Vec::new();
    let mut timed = |name: &str, about: &str, check: &dyn Fn() -> Result<String>| -> Result<()> {
        if !picked(name) {
            return Ok(());
        }
        println!("== {name} ({about})");
        let start = Instant::now();
        let outcome = check().with_context(|| name.to_owned())?;
        summary.push(format!("   {name:<16} {outcome} ({} s)", start.elapsed().as_secs()));
        Ok(())
    };
    for host in &HOSTS {
        timed(host.name, host.about, &|| {
            let libraries = host.libraries()?;
            for (model, file) in &models {
                check_model(&libraries, *model, file, &setup).with_context(|| model.name())?;
            }
            check_graphs(&libraries, &setup).context("graphs")?;
            check_changes(&libraries, &tiny, &setup)?;
            Ok("took over".into())
        })?;
    }
    let newest = &HOSTS[HOSTS.len() - 1];
    timed("stripped", newest.about, &|| check_stripped(&newest.libraries()?, &tiny, &setup))?;
    timed("rpc", "two RPC servers of that llama.cpp", &|| check_servers(&newest.libraries()?, &tiny, &setup))?;
    timed("node-llama-cpp", "the application, 3.22.1", &|| check_application(&tiny, &setup))?;
    timed("example", "examples/ggml and examples/llama.cpp", &|| {
        examples::check(&models[0].1).map(|()| "agree with the host's own".into())
    })?;
    timed(fetch::BEFORE.name, fetch::BEFORE.about, &|| check_without_operator(&tiny, &setup))?;
    println!("== summary");
    summary.iter().for_each(|line| println!("{line}"));
    Ok(())
}

/// What all checks need.
struct Setup {
    plugin: PathBuf,
    /// For LD_PRELOAD.
    turns: String,
    tokens: usize,
}

impl Setup {
    fn drive(&self, libraries: &Path, verb: &str, arguments: &[&str], plugin: bool, verify: &str) -> Result<Report> {
        self.drive_with(libraries, verb, arguments, plugin.then_some(&self.plugin), &[("DELTANET_VERIFY", verify)])
    }

    fn drive_with(
        &self,
        libraries: &Path,
        verb: &str,
        arguments: &[&str],
        plugin: Option<&PathBuf>,
        settings: &[(&str, &str)],
    ) -> Result<Report> {
        let settings = [settings, &[("LD_PRELOAD", self.turns.as_str())]].concat();
        drive(libraries, verb, arguments, plugin.map(PathBuf::as_path), &settings)
    }
}

/// Greedy tokens and logits with 1 and 5 sequences: with 1, 2 and 4 threads (four for one model: the threads are the
/// host's, whatever the model), then with one thread and every node verified.
fn check_model(libraries: &Path, model: Model, file: &Path, setup: &Setup) -> Result<()> {
    let file = file.to_string_lossy();
    let two = setup.tokens.to_string();
    let four = if model == Model::Qwen35 { &*two } else { "0" };
    let threads = [&*file, "--two-threads", &two, "--four-threads", four];
    let one_thread = [&*file, "--two-threads", "0", "--four-threads", "0"];
    for (arguments, verify) in [(threads, "first"), (one_thread, "always")] {
        let without = setup.drive(libraries, "tokens", &arguments, false, verify)?;
        let with = setup.drive(libraries, "tokens", &arguments, true, verify)?;
        let runs = without.starting("tokens").len();
        ensure!(
            runs > 0 && without.starting("tokens") == with.starting("tokens"),
            "greedy tokens differ\n{:?}",
            with.log
        );
        let error = nmse(&without.values, &with.values);
        ensure!(error <= LOGITS_BOUND, "logits differ, NMSE {error:.1e}");
        let (taken, left) = (with.count("taken"), with.count("left"));
        ensure!(taken > 0 && left == 0, "took {taken} nodes and left {left}\n{}", with.log.join("\n"));
        ensure!(with.count("mismatches") == 0, "the host's own results differ\n{}", with.log.join("\n"));
        let verified = with.count("verified");
        ensure!(verify == "first" || verified == taken, "{verified} of {taken} nodes were verified");
        println!(
            "   {:<20} took over: {runs} runs, {taken} nodes, {} reads and {} writes fused, {verified} verified ({verify}), logits NMSE {error:.1e}",
            model.name(),
            with.count("reads fused"),
            with.count("writes fused"),
        );
    }
    Ok(())
}

/// The graphs around the operator: same results, and exactly what may be fused is.
fn check_graphs(libraries: &Path, setup: &Setup) -> Result<()> {
    let without = setup.drive(libraries, "graphs", &[], false, "off")?;
    for verify in ["off", "first", "always"] {
        let with = setup.drive(libraries, "graphs", &[], true, verify)?;
        let error = nmse(&without.values, &with.values);
        ensure!(error <= GRAPH_BOUND, "results differ, NMSE {error:.1e}\n{}", with.log.join("\n"));
        ensure!(with.count("mismatches") == 0, "the host's own results differ\n{}", with.log.join("\n"));
        let cases = with.starting("case ");
        for case in graphs::CASES {
            let Some(said) = with.said.get(&format!("case {}", case.name)) else {
                // Without K in the host there is nothing to compute.
                ensure!(case.needs_snapshots(), "the case {:?} did not run", case.name);
                continue;
            };
            let [taken, left, read, write] = [case.taken, !case.taken, case.read, case.write].map(u8::from);
            let wanted = format!("taken {taken}, left {left}, reads {read}, writes {write}");
            ensure!(*said == wanted, "{}: {said}, not {wanted}\n{}", case.name, with.log.join("\n"));
        }
        println!(
            "   {} graphs, verify {verify}: results NMSE {error:.1e}, fused and left as they must be",
            cases.len()
        );
    }
    Ok(())
}

/// Switched off, with a device of its own, loaded twice, unloaded: the host does what it did.
fn check_changes(libraries: &Path, model: &str, setup: &Setup) -> Result<()> {
    let short = |more: &[&str], plugin: bool, mode: &str| {
        let arguments = [&[model, "--short"], more].concat();
        let plugin = plugin.then_some(&setup.plugin);
        setup.drive_with(libraries, "tokens", &arguments, plugin, &[("DELTANET_GGML", mode)])
    };
    let without = short(&[], false, "")?;
    let off = short(&[], true, "off")?;
    ensure!(without.values == off.values && off.count("taken") == 0, "it is not off");
    let device = short(&[], true, "device")?;
    let error = nmse(&without.values, &device.values);
    ensure!(error <= LOGITS_BOUND, "logits differ with a device of its own, NMSE {error:.1e}");
    ensure!(device.values != without.values, "the device is not used\n{}", device.log.join("\n"));
    println!("   off: bit for bit the host's own; it says {:?}", off.log.first().map_or("nothing", |line| line));

    println!("   device: logits NMSE {error:.1e}");

    let other = std::env::temp_dir().join(format!("deltanet-copy-{}.so", std::process::id()));
    std::fs::copy(&setup.plugin, &other)?;
    let twice = short(&["--second", &other.to_string_lossy()], true, "inline");
    std::fs::remove_file(&other)?;
    let same = |with: &Report| nmse(&without.values, &with.values) <= LOGITS_BOUND && with.count("taken") > 0;
    let twice = twice?;
    ensure!(same(&twice), "a second copy breaks it");
    let said = twice.log.iter().find(|line| line.contains("another copy"));
    println!("   second copy: {}", said.context("the second copy did not decline")?);

    ensure!(same(&short(&["--unload"], true, "inline")?), "unloading breaks it");
    println!("   unloaded by the host: works on");
    Ok(())
}

/// A host whose libraries have only the symbols that the dynamic linker needs.
fn check_stripped(libraries: &Path, model: &str, setup: &Setup) -> Result<String> {
    let folder = std::env::temp_dir().join(format!("deltanet-stripped-{}", std::process::id()));
    command::run(Command::new("cp").arg("-a").arg(libraries).arg(&folder))?;
    let check = || -> Result<String> {
        for file in std::fs::read_dir(&folder)? {
            let path = file?.path();
            if path.to_string_lossy().contains(".so") && !path.is_symlink() {
                command::run(Command::new("strip").arg("--strip-all").arg(path))?;
            }
        }
        let without = setup.drive(&folder, "tokens", &[model, "--short"], false, "first")?;
        let with = setup.drive(&folder, "tokens", &[model, "--short"], true, "first")?;
        let error = nmse(&without.values, &with.values);
        ensure!(error <= LOGITS_BOUND, "logits differ, NMSE {error:.1e}");
        ensure!(with.count("taken") > 0 && with.count("left") == 0, "it did not take over\n{}", with.log.join("\n"));
        Ok(format!("took over, logits NMSE {error:.1e}"))
    };
    let outcome = check();
    std::fs::remove_dir_all(&folder)?;
    outcome
}

/// A llama.cpp from before the operator: declined, and as before.
fn check_without_operator(model: &str, setup: &Setup) -> Result<String> {
    let libraries = fetch::BEFORE.libraries()?;
    let without = setup.drive(&libraries, "tokens", &[model, "--short"], false, "first")?;
    let with = setup.drive(&libraries, "tokens", &[model, "--short"], true, "first")?;
    ensure!(without.values == with.values && with.count("taken") == 0, "it is not as before");
    let why = with.log.iter().find(|line| line.contains("not active")).context("it did not say why")?;
    Ok(format!("declined: {why}"))
}

/// node-llama-cpp, the application, with its own loading of ggml.
fn check_application(model: &str, setup: &Setup) -> Result<String> {
    let folder = fetch::node_llama_cpp()?;
    let script = folder.join("app.mjs");
    std::fs::copy(command::workspace().join("tests/hosts/app.mjs"), &script)?;
    let values = values_file();
    let run = |plugin: Option<&Path>| -> Result<(String, Vec<f32>)> {
        let mut node = Command::new("node");
        node.arg(&script).args([model, &*values.to_string_lossy()]).current_dir(&folder);
        let settings = [("DELTANET_LOG", "1"), ("LD_PRELOAD", setup.turns.as_str())];
        let text = command::output_within(with_plugin(&mut node, plugin, &settings), LIMIT)?;
        Ok((text, read_values(&values)?))
    };
    let ((without, own), (with, ours)) = (run(None)?, run(Some(&setup.plugin))?);
    let pick = |text: &str, prefix: &str| -> Vec<String> {
        text.lines().filter(|line| line.starts_with(prefix)).map(str::to_owned).collect()
    };
    let runs = pick(&with, "tokens");
    ensure!(runs.len() == 18 && pick(&without, "tokens") == runs, "tokens differ\n{without}\n{with}");
    let error = nmse(&own, &ours);
    ensure!(error <= LOGITS_BOUND, "logarithms of probabilities differ, NMSE {error:.1e}");
    ensure!(pick(&with, "log").iter().any(|line| line.contains("took ")), "the plugin did not take over\n{with}");
    Ok(format!("took over: tokens of {} sequences equal, log probabilities NMSE {error:.1e}", runs.len()))
}
