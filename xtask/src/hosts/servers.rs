//! llama.cpp's RPC backend: servers with the plugin, and a client without it.

use super::{LOGITS_BOUND, Report, Setup, nmse, with_plugin};
use anyhow::{Context, Result, bail, ensure};
use std::fs::File;
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// A server on this machine's loopback interface, which ends with this value.
struct Server {
    child: Child,
    endpoint: String,
    said: PathBuf,
}

impl Server {
    fn start(libraries: &Path, number: usize, setup: &Setup) -> Result<Server> {
        // A port that was free a moment ago may be somebody else's now; then the server ends, and another is asked for.
        for _ in 0..5 {
            let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
            let said = std::env::temp_dir().join(format!("deltanet-server-{}-{number}.txt", std::process::id()));
            let endpoint = format!("127.0.0.1:{port}");
            let mut command = Command::new(std::env::current_exe()?);
            command.args(["host", "serve"]).arg(libraries).arg(&endpoint);
            command.stdin(Stdio::null()).stdout(File::create(&said)?).stderr(Stdio::null());
            let child = with_plugin(&mut command, Some(&setup.plugin), &[("DELTANET_LOG", "1")]).spawn()?;
            let mut server = Server { child, endpoint, said };
            if server.is_ready()? {
                return Ok(server);
            }
        }
        bail!("no RPC server could be started")
    }

    /// Waits until it accepts connections; false where it ended instead.
    fn is_ready(&mut self) -> Result<bool> {
        let start = Instant::now();
        while start.elapsed() < Duration::from_secs(60) {
            if self.child.try_wait()?.is_some() {
                return Ok(false);
            }
            if TcpStream::connect(&self.endpoint).is_ok() {
                return Ok(true);
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        bail!("the RPC server at {} does not answer", self.endpoint)
    }

    /// Ends it; what it said.
    fn stop(mut self) -> Result<String> {
        self.child.kill()?;
        self.child.wait()?;
        std::fs::read_to_string(&self.said).context("the server wrote no log")
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Ended already, or about to be: nothing more can be done about it here.
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = std::fs::remove_file(&self.said);
    }
}

/// The tiny model split over two servers by a client without the plugin: a local run's tokens, computed by ours.
pub fn check_servers(libraries: &Path, model: &str, setup: &Setup) -> Result<String> {
    let local = setup.drive(libraries, "tokens", &[model, "--short"], false, "first")?;
    let servers = [Server::start(libraries, 0, setup)?, Server::start(libraries, 1, setup)?];
    let endpoints = servers.each_ref().map(|server| server.endpoint.as_str());
    let mut arguments = vec![model, "--short"];
    // The model has three layers with the operator, one without, and the output: two and three of the five.
    for (endpoint, share) in endpoints.iter().zip(["0.35", "0.65"]) {
        arguments.extend(["--server", endpoint, "--share", share]);
    }
    let split: Report = setup.drive(libraries, "tokens", &arguments, false, "first")?;
    ensure!(local.starting("tokens") == split.starting("tokens"), "tokens differ from a local run's");
    let error = nmse(&local.values, &split.values);
    ensure!(error <= LOGITS_BOUND, "logits differ from a local run's, NMSE {error:.1e}");
    for server in servers {
        let endpoint = server.endpoint.clone();
        let said = server.stop()?;
        let took = said.lines().find(|line| line.contains("took ") && line.contains("GATED_DELTA_NET"));
        let took = took.with_context(|| format!("the server at {endpoint} took nothing over\n{said}"))?;
        println!("   {}", took.trim_start_matches("log: "));
    }
    Ok(format!("both took over, a local run's tokens, logits NMSE {error:.1e}"))
}
