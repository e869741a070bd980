//! Real etcd servers on this machine, to be stopped, frozen and killed. They end with this process, however it ends.

use std::fmt::Write as _;
use std::io::{BufRead, BufReader};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::atomic::{AtomicU16, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use super::scratch::Scratch;

/// A server that takes longer to start does not.
const PATIENCE: Duration = Duration::from_secs(30);

/// The versions that are tested, by the names of their programs.
pub(crate) const VERSIONS: [&str; 2] = ["3.4", "3.5"];

/// Where `ci/etcd.sh` puts servers.
pub(crate) fn servers() -> PathBuf {
    std::env::var_os("ETCD_SERVERS").map_or_else(
        || Path::new(option_env!("CARGO_TARGET_TMPDIR").unwrap_or("target/tmp")).with_file_name("etcd"),
        PathBuf::from,
    )
}

/// Whether there is a server of that version.
pub(crate) fn is_there(version: &str) -> bool {
    servers().join(format!("etcd-{version}")).exists()
}

/// Servers that form one cluster.
pub(crate) struct Cluster {
    version: String,
    options: Vec<String>,
    pub(crate) nodes: Vec<Node>,
    scratch: Scratch,
    /// `https` and where the keys are, if it has TLS.
    tls: Option<PathBuf>,
}

pub(crate) struct Node {
    pub(crate) port: u16,
    peer: u16,
    running: Option<Running>,
}

/// A server. The shell around it kills it as soon as its standard input ends.
struct Running {
    shell: Child,
    _stdin: ChildStdin,
    pid: Pid,
}

impl Cluster {
    /// In options `{port}` is the node's own.
    pub(crate) fn start(version: &str, nodes: usize, options: &[&str]) -> Self {
        Self::with_tls(version, nodes, options, None)
    }

    /// With TLS if there is a folder with `ca.pem`, `server.pem` and `server.key`.
    pub(crate) fn with_tls(version: &str, nodes: usize, options: &[&str], tls: Option<PathBuf>) -> Self {
        let scratch = Scratch::in_memory("lease-etcd").unwrap();
        let ports = free_ports(nodes * 2);
        let nodes = ports.chunks(2).map(|two| Node { port: two[0], peer: two[1], running: None }).collect();
        let options = options.iter().map(|option| (*option).to_owned()).collect();
        let mut cluster = Self { version: version.into(), options, nodes, scratch, tls };
        for node in 0..cluster.nodes.len() {
            cluster.launch(node);
        }
        cluster.wait_until_healthy();
        cluster
    }

    /// The URL for a prefix.
    pub(crate) fn url(&self, prefix: &str) -> String {
        self.url_by(&self.nodes.iter().map(|node| node.port).collect::<Vec<_>>(), prefix)
    }

    /// The same by other ports.
    pub(crate) fn url_by(&self, ports: &[u16], prefix: &str) -> String {
        let hosts: Vec<String> = ports.iter().map(|port| format!("127.0.0.1:{port}")).collect();
        let scheme = if self.tls.is_some() { "etcds" } else { "etcd" };
        format!("{scheme}://{}/{prefix}", hosts.join(","))
    }

    fn launch(&mut self, at: usize) {
        let http = if self.tls.is_some() { "https" } else { "http" };
        let peers = self.nodes.iter().enumerate().fold(String::new(), |mut peers, (at, node)| {
            let _ = write!(peers, "{}n{at}=http://127.0.0.1:{}", if at > 0 { "," } else { "" }, node.peer);
            peers
        });
        let node = &self.nodes[at];
        // One that was killed keeps its ports until the last of its threads is gone.
        let limit = Instant::now() + PATIENCE;
        while [node.port, node.peer].iter().any(|port| TcpListener::bind(("127.0.0.1", *port)).is_err()) {
            assert!(Instant::now() < limit, "the ports of a server that was killed are not free");
            thread::sleep(Duration::from_millis(5));
        }
        let (client, peer) = (format!("{http}://127.0.0.1:{}", node.port), format!("http://127.0.0.1:{}", node.peer));
        let folder = self.scratch.path().join(format!("n{at}"));
        let log = std::fs::OpenOptions::new().create(true).append(true).open(folder.with_extension("log")).unwrap();
        let mut shell = Command::new("sh");
        // The shell reads until its standard input ends: when it is closed, or this process does.
        shell.args(["-c", "\"$@\" </dev/null & echo $!; read -r _; kill -9 $!; wait", "sh"]);
        shell.arg(servers().join(format!("etcd-{}", self.version)));
        shell.args(["--name", &format!("n{at}"), "--data-dir"]).arg(&folder);
        shell.args(["--listen-client-urls", &client, "--advertise-client-urls", &client]);
        shell.args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer, "--initial-cluster", &peers]);
        if let Some(tls) = &self.tls {
            shell.arg("--client-cert-auth").arg("--trusted-ca-file").arg(tls.join("ca.pem"));
            shell.arg("--cert-file").arg(tls.join("server.pem")).arg("--key-file").arg(tls.join("server.key"));
        }
        shell.args(self.options.iter().map(|option| option.replace("{port}", &node.port.to_string())));
        let mut shell = shell.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(log).spawn().unwrap();
        let (stdin, stdout) = (shell.stdin.take().unwrap(), shell.stdout.take().unwrap());
        let pid = BufReader::new(stdout).lines().next().unwrap().unwrap();
        let pid = Pid::from_raw(pid.trim().parse().unwrap()).unwrap();
        self.nodes[at].running = Some(Running { shell, _stdin: stdin, pid });
    }

    fn signal(&self, at: usize, signal: Signal) {
        kill_process(self.nodes[at].running.as_ref().expect("it runs").pid, signal).unwrap();
    }

    pub(crate) fn freeze(&self, at: usize) {
        self.signal(at, Signal::STOP);
    }

    pub(crate) fn thaw(&self, at: usize) {
        self.signal(at, Signal::CONT);
    }

    /// As a power failure of that machine would end it.
    pub(crate) fn kill(&mut self, at: usize) {
        self.nodes[at].running = None;
    }

    /// As if its disk had been replaced.
    pub(crate) fn forget(&mut self, at: usize) {
        assert!(self.nodes[at].running.is_none());
        std::fs::remove_dir_all(self.scratch.path().join(format!("n{at}"))).unwrap();
    }

    /// Starts again what was killed.
    pub(crate) fn revive(&mut self, at: usize) {
        assert!(self.nodes[at].running.is_none());
        // The first thread of a process that was killed may be dead, and others still have its sockets.
        let limit = Instant::now() + PATIENCE;
        for port in [self.nodes[at].port, self.nodes[at].peer] {
            while TcpListener::bind(("127.0.0.1", port)).is_err() {
                assert!(Instant::now() < limit, "somebody else has port {port}");
                thread::sleep(Duration::from_millis(2));
            }
        }
        self.launch(at);
    }

    /// Waits until a majority answers.
    pub(crate) fn wait_until_healthy(&self) {
        let limit = Instant::now() + PATIENCE;
        while self.try_ctl(&["get", "health"]).is_err() {
            assert!(Instant::now() < limit, "etcd does not start: see {}", self.scratch.path().display());
            thread::sleep(Duration::from_millis(50));
        }
    }

    /// Waits until every node answers.
    pub(crate) fn wait_until_all_healthy(&self) {
        let limit = Instant::now() + PATIENCE;
        while self.try_ctl(&["endpoint", "health"]).is_err() {
            assert!(Instant::now() < limit, "a node does not come back: see {}", self.scratch.path().display());
            thread::sleep(Duration::from_millis(50));
        }
    }

    pub(crate) fn wait_for_leader(&self) -> usize {
        let limit = Instant::now() + PATIENCE;
        loop {
            if let Some(leader) = self.leader() {
                return leader;
            }
            assert!(Instant::now() < limit, "nobody leads: see {}", self.scratch.path().display());
            thread::sleep(Duration::from_millis(50));
        }
    }

    pub(crate) fn move_leader(&self, from: usize, to: usize) {
        let status = self.ctl_at(&[self.nodes[to].port], &["endpoint", "status", "--write-out=json"]).unwrap();
        let (_, rest) = status.split_once("\"member_id\":").unwrap();
        let member: u64 = rest.split([',', '}']).next().unwrap().parse().unwrap();
        self.ctl_at(&[self.nodes[from].port], &["move-leader", &format!("{member:x}")]).unwrap();
    }

    /// Whether the kernel says that it is stopped.
    pub(crate) fn is_frozen(&self, at: usize) -> bool {
        let pid = self.nodes[at].running.as_ref().expect("it runs").pid.as_raw_nonzero();
        let limit = Instant::now() + PATIENCE;
        while Instant::now() < limit {
            let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
            if stat.rsplit(')').next().is_some_and(|rest| rest.trim_start().starts_with('T')) {
                return true;
            }
        }
        false
    }

    /// The node that leads; `None` while there is no leader that answers.
    pub(crate) fn leader(&self) -> Option<usize> {
        self.nodes.iter().position(|node| {
            if node.running.is_none() {
                return false;
            }
            let status = self.ctl_at(&[node.port], &["endpoint", "status", "--write-out=json", "--command-timeout=1s"]);
            let status = status.unwrap_or_default();
            let number = |key: &str| {
                let (_, rest) = status.split_once(&format!("\"{key}\":"))?;
                rest.split([',', '}']).next()?.parse::<u64>().ok()
            };
            number("leader").is_some() && number("leader") == number("member_id")
        })
    }

    /// Runs etcdctl against all nodes; what it says.
    pub(crate) fn ctl(&self, arguments: &[&str]) -> String {
        self.try_ctl(arguments).unwrap_or_else(|error| panic!("etcdctl {arguments:?}: {error}"))
    }

    pub(crate) fn try_ctl(&self, arguments: &[&str]) -> Result<String, String> {
        let ports: Vec<u16> = self.nodes.iter().filter(|node| node.running.is_some()).map(|node| node.port).collect();
        self.ctl_at(&ports, arguments)
    }

    pub(crate) fn ctl_at(&self, ports: &[u16], arguments: &[&str]) -> Result<String, String> {
        self.ctl_with(ports, arguments, "")
    }

    /// Asks for more than the quota allows, and so makes the servers refuse to write until the alarm is disarmed.
    pub(crate) fn raise_no_space(&self) {
        let ports: Vec<u16> = self.nodes.iter().map(|node| node.port).collect();
        let error = self.ctl_with(&ports, &["put", "too-large"], &"x".repeat(1_300_000)).unwrap_err();
        assert!(error.contains("database space exceeded"), "{error}");
    }

    /// With something to read.
    pub(crate) fn ctl_with(&self, ports: &[u16], arguments: &[&str], input: &str) -> Result<String, String> {
        use std::io::Write;
        let scheme = if self.tls.is_some() { "https" } else { "http" };
        let endpoints: Vec<String> = ports.iter().map(|port| format!("{scheme}://127.0.0.1:{port}")).collect();
        let mut ctl = Command::new(servers().join("etcdctl"));
        ctl.env("ETCDCTL_API", "3").arg(format!("--endpoints={}", endpoints.join(",")));
        if let Some(tls) = &self.tls {
            ctl.arg("--cacert").arg(tls.join("ca.pem"));
            ctl.arg("--cert").arg(tls.join("client.pem")).arg("--key").arg(tls.join("client.key"));
        }
        ctl.args(["--dial-timeout=1s", "--command-timeout=3s"]).args(arguments);
        let mut ctl = ctl.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        // It ends without reading when it is not asked to.
        let _ = ctl.stdin.take().unwrap().write_all(input.as_bytes());
        let output = ctl.wait_with_output().unwrap();
        if output.status.success() {
            Ok(String::from_utf8(output.stdout).unwrap())
        } else {
            Err(String::from_utf8_lossy(&output.stderr).into_owned())
        }
    }

    /// How many keys there are below a prefix.
    pub(crate) fn keys(&self, prefix: &str) -> usize {
        self.ctl(&["get", "--prefix", "--keys-only", prefix]).lines().filter(|line| !line.is_empty()).count()
    }

    /// How many leases there are.
    pub(crate) fn leases(&self) -> usize {
        self.ctl(&["lease", "list"]).lines().skip(1).filter(|line| !line.is_empty()).count()
    }

    /// A figure of a node's own, from its `/metrics`: the sum of those with that label.
    pub(crate) fn metric(&self, at: usize, name: &str, label: &str) -> u64 {
        use std::io::{Read, Write};
        let mut stream = std::net::TcpStream::connect(("127.0.0.1", self.nodes[at].port)).unwrap();
        stream.write_all(b"GET /metrics HTTP/1.0\r\n\r\n").unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        let lines = text.lines().filter_map(|line| line.strip_prefix(name)).filter(|rest| rest.starts_with([' ', '{']));
        let figures =
            lines.filter(|rest| rest.contains(label)).filter_map(|rest| rest.rsplit(' ').next()?.parse::<f64>().ok());
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a count")]
        let sum = figures.sum::<f64>() as u64;
        sum
    }

    /// How many calls of that method the node has got.
    pub(crate) fn calls(&self, at: usize, method: &str) -> u64 {
        self.metric(at, "grpc_server_started_total", &format!("grpc_method=\"{method}\""))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // A frozen one cannot be waited for.
        let _ = kill_process(self.pid, Signal::KILL);
        let _ = self.shell.kill();
        let _ = self.shell.wait();
    }
}

/// Ports that nobody uses now, and that no connection is given: a server that is started again finds its own free.
fn free_ports(count: usize) -> Vec<u16> {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    let first = 16_000 + u16::try_from(std::process::id() % 160).unwrap() * 100;
    let tried = std::iter::repeat_with(|| first + NEXT.fetch_add(1, Ordering::Relaxed) % 16_000);
    let free = tried.map(|port| 16_000 + port % 16_000).filter(|port| TcpListener::bind(("127.0.0.1", *port)).is_ok());
    free.take(count).collect()
}
