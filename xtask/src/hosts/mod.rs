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
mod speed;

pub use driver::Drive;
pub use fetch::{CRATE_ABOUT, crate_sources, model};
pub use model::Model;
pub use speed::run_speed;

use crate::command;
use anyhow::{Context, Result, bail, ensure};
use fetch::{HOSTS, Host};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

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

/// Runs `xtask host VERB LIBRARIES ...` with or without the plugin.
fn drive(
    libraries: &Path,
    verb: &str,
    arguments: &[&str],
    plugin: Option<&Path>,
    settings: &[(&str, &str)],
) -> Result<Report> {
    let values = std::env::temp_dir().join(format!("deltanet-hosts-{}.f32", std::process::id()));
    let mut command = Command::new(std::env::current_exe()?);
    command.arg("host").arg(verb).arg(libraries).args(arguments).arg("--values").arg(&values);
    for variable in ["GGML_BACKEND_PATH", "DELTANET_GGML", "DELTANET_VERIFY", "DELTANET_LOG"] {
        command.env_remove(variable);
    }
    if let Some(plugin) = plugin {
        command.env("GGML_BACKEND_PATH", plugin);
    }
    let output = command.envs(settings.iter().copied()).output()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    ensure!(
        output.status.success(),
        "{command:?}: {}\n{text}\n{}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    let mut report = Report { said: BTreeMap::new(), log: Vec::new(), values: Vec::new() };
    for line in text.lines() {
        match line.split_once(": ") {
            Some(("log", said)) => report.log.push(said.to_owned()),
            Some((name, value)) => drop(report.said.insert(name.to_owned(), value.to_owned())),
            None => bail!("the driver printed {line:?}"),
        }
    }
    let bytes = std::fs::read(&values).context("the driver wrote no values")?;
    std::fs::remove_file(&values)?;
    report.values = bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
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

fn processors() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// Runs every host with and without the plugin; `tokens` is how many are generated with two and with four threads.
/// `only` picks hosts by parts of their names; none picks all.
pub fn run_hosts(tokens: usize, only: &[String]) -> Result<()> {
    let picked = |name: &str| only.is_empty() || only.iter().any(|part| name.contains(part.as_str()));
    let plugin = plugin()?;
    let models = Model::TINY.map(|model| Ok((model, fetch::model(model)?)));
    let models = models.into_iter().collect::<Result<Vec<_>>>()?;
    for host in HOSTS.iter().filter(|host| picked(host.name)) {
        println!("== {} ({})", host.name, host.about);
        let libraries = host.libraries()?;
        for (model, file) in &models {
            check_model(&libraries, *model, file, &plugin, tokens)
                .with_context(|| format!("{}, {}", host.name, model.name()))?;
        }
        check_graphs(&libraries, &plugin).with_context(|| format!("{}: graphs", host.name))?;
        check_declining(host, &libraries, &models[0].1, &plugin)
            .with_context(|| format!("{}: declining", host.name))?;
    }
    if picked(fetch::BEFORE.name) {
        check_without_operator(&plugin, &models[0].1)?;
    }
    if picked("node-llama-cpp") {
        check_application(&plugin, &models[0].1)?;
    }
    if picked("example") { examples::check(&models[0].1) } else { Ok(()) }
}

/// Greedy tokens and logits with 1 and 5 sequences: with 1, 2 and 4 threads (in full for one model: the threads are
/// the host's, whatever the model), then with one thread and every node verified.
fn check_model(libraries: &Path, model: Model, file: &Path, plugin: &Path, tokens: usize) -> Result<()> {
    let file = file.to_string_lossy();
    // ggml's threads spin while they wait: more of them than processors are hundreds of times slower than one.
    let generated = |threads: usize| if threads <= processors() { tokens } else { tokens.min(6) }.to_string();
    let (two, four) = if model == Model::Qwen35 { (generated(2), generated(4)) } else { (generated(2), "0".into()) };
    let threads = [&*file, "--two-threads", &two, "--four-threads", &four];
    let one_thread = [&*file, "--two-threads", "0", "--four-threads", "0"];
    for (arguments, verify) in [(threads, "first"), (one_thread, "always")] {
        let without = drive(libraries, "tokens", &arguments, None, &[])?;
        let with = drive(libraries, "tokens", &arguments, Some(plugin), &[("DELTANET_VERIFY", verify)])?;
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
fn check_graphs(libraries: &Path, plugin: &Path) -> Result<()> {
    let without = drive(libraries, "graphs", &[], None, &[])?;
    for verify in ["off", "first", "always"] {
        let with = drive(libraries, "graphs", &[], Some(plugin), &[("DELTANET_VERIFY", verify)])?;
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
            let wanted = format!("taken 1, reads {}, writes {}", u8::from(case.read), u8::from(case.write));
            ensure!(*said == wanted, "{}: {said}, not {wanted}\n{}", case.name, with.log.join("\n"));
        }
        println!(
            "   {} graphs, verify {verify}: results NMSE {error:.1e}, fused and left as they must be",
            cases.len()
        );
    }
    Ok(())
}

/// Switched off, the host does what it did; as a device, it can still be asked.
fn check_declining(host: &Host, libraries: &Path, model: &Path, plugin: &Path) -> Result<()> {
    let model = model.to_string_lossy();
    let with = drive(libraries, "tokens", &[&model, "--short"], Some(plugin), &[("DELTANET_GGML", "off")])?;
    let without = drive(libraries, "tokens", &[&model, "--short"], None, &[])?;
    ensure!(without.values == with.values && with.count("taken") == 0, "{} is not off", host.name);
    println!("   off: bit for bit the host's own; it says {:?}", with.log.first().map_or("nothing", |line| line));
    let other = std::env::temp_dir().join(format!("deltanet-copy-{}.so", std::process::id()));
    std::fs::copy(plugin, &other)?;
    let second = other.to_string_lossy().into_owned();
    let twice = drive(libraries, "tokens", &[&model, "--short", "--second", &second], Some(plugin), &[]);
    std::fs::remove_file(&other)?;
    let twice = twice?;
    ensure!(
        nmse(&without.values, &twice.values) <= LOGITS_BOUND && twice.count("taken") > 0,
        "a second copy breaks it"
    );
    let said = twice.log.iter().find(|line| line.contains("another copy"));
    println!("   second copy: {}", said.context("the second copy did not decline")?);
    Ok(())
}

/// A llama.cpp from before the operator: declined, and as before.
fn check_without_operator(plugin: &Path, model: &Path) -> Result<()> {
    println!("== {} ({})", fetch::BEFORE.name, fetch::BEFORE.about);
    let libraries = fetch::BEFORE.libraries()?;
    let model = model.to_string_lossy();
    let without = drive(&libraries, "tokens", &[&model, "--short"], None, &[])?;
    let with = drive(&libraries, "tokens", &[&model, "--short"], Some(plugin), &[])?;
    ensure!(without.values == with.values && with.count("taken") == 0, "it is not as before");
    let why = with.log.iter().find(|line| line.contains("not active")).context("it did not say why")?;
    println!("   declined: {why}");
    Ok(())
}

/// node-llama-cpp, the application, with its own loading of ggml.
fn check_application(plugin: &Path, model: &Path) -> Result<()> {
    println!("== node-llama-cpp");
    let folder = fetch::node_llama_cpp()?;
    let script = folder.join("app.mjs");
    std::fs::copy(command::workspace().join("tests/hosts/app.mjs"), &script)?;
    let tokens = |plugin: Option<&Path>| {
        let mut node = Command::new("node");
        node.arg(&script).arg(model).current_dir(&folder).env("DELTANET_LOG", "1");
        match plugin {
            Some(plugin) => node.env("GGML_BACKEND_PATH", plugin),
            None => node.env_remove("GGML_BACKEND_PATH"),
        };
        command::output(&mut node)
    };
    let (without, with) = (tokens(None)?, tokens(Some(plugin))?);
    let pick = |text: &str, prefix: &str| -> Vec<String> {
        text.lines().filter(|line| line.starts_with(prefix)).map(str::to_owned).collect()
    };
    ensure!(
        pick(&without, "tokens") == pick(&with, "tokens") && !pick(&with, "tokens").is_empty(),
        "tokens differ\n{without}\n{with}"
    );
    let took: Vec<String> = pick(&with, "log").into_iter().filter(|line| line.contains("took ")).collect();
    ensure!(!took.is_empty(), "the plugin did not take over\n{with}");
    println!("   took over, tokens equal: {}", took[0]);
    Ok(())
}
