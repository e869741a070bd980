//! The etcd store on real servers: the conformance suite on every version, one node and three, and then faults.

// Shared with programs that use other parts of it.
#[allow(dead_code)]
#[path = "../support/mod.rs"]
mod support;

mod access;
mod alone;
mod faults;
mod namespace;
mod rules;
mod wall_clock;

use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use async_trait::async_trait;
use futures_lite::future::block_on;
use lease_core::conformance::{Clause, Harness};
use lease_core::runtime::{Environment, system};
use lease_core::store::Store;
use lease_core::stores::etcd::EtcdStore;
use libtest_mimic::{Arguments, Trial};
use support::etcd::{Cluster, VERSIONS, is_there};

/// A store on a cluster.
struct Etcd {
    env: Arc<dyn Environment>,
    cluster: Arc<Mutex<Cluster>>,
    url: String,
}

impl Etcd {
    fn on(cluster: Arc<Mutex<Cluster>>) -> Self {
        let env = system().unwrap();
        let url = cluster.lock().unwrap().url(&format!("{:016x}", env.random()));
        Self { env, cluster, url }
    }
}

#[async_trait]
impl Harness for Etcd {
    async fn open(&self) -> Arc<dyn Store> {
        EtcdStore::open(&self.url, self.env.clone()).unwrap()
    }

    fn environment(&self) -> Arc<dyn Environment> {
        self.env.clone()
    }

    fn ttl(&self) -> Duration {
        Duration::from_secs(2)
    }

    /// All nodes at once, as a power failure would.
    async fn restart(&self) -> bool {
        let mut cluster = self.cluster.lock().unwrap();
        for node in 0..cluster.nodes.len() {
            cluster.kill(node);
        }
        for node in 0..cluster.nodes.len() {
            cluster.revive(node);
        }
        cluster.wait_until_healthy();
        true
    }
}

/// One cluster of a kind for all clauses but those that restart it.
fn conformance(version: &'static str, nodes: usize) -> Vec<Trial> {
    let start = move || Arc::new(Mutex::new(Cluster::start(version, nodes, &[])));
    let shared: Arc<OnceLock<Arc<Mutex<Cluster>>>> = Arc::default();
    let trial = move |(name, clause): (&'static str, Clause)| {
        let shared = shared.clone();
        trial(version, &format!("conformance_{nodes}_{name}"), move || {
            let restarts = name.contains("restart") && !name.contains("restarts");
            let cluster = if restarts { start() } else { shared.get_or_init(start).clone() };
            block_on(clause(&Etcd::on(cluster)));
        })
    };
    lease_core::conformance_tests!(clauses).into_iter().map(trial).collect()
}

/// A test on servers of a version; shown as ignored where there are none, and a failure where there have to be.
fn trial(version: &str, name: &str, test: impl FnOnce() + Send + 'static) -> Trial {
    let missing = !is_there(version);
    let required = std::env::var_os("CI").is_some();
    let name = format!("etcd_{}_{name}", version.replace('.', "_"));
    let run = move || {
        if missing {
            return Err("there is no such etcd: run `make etcd`".into());
        }
        test();
        Ok(())
    };
    Trial::test(name, run).with_ignored_flag(missing && !required)
}

/// The same, ignored in this case too.
fn ignored(too: bool, trial: Trial) -> Trial {
    let ignored = trial.has_ignored_flag();
    trial.with_ignored_flag(too || ignored)
}

fn main() {
    if alone::is_wanted() {
        return;
    }
    let mut arguments = Arguments::from_args();
    // They wait much more than they work.
    arguments.test_threads.get_or_insert(16);
    let mut trials = Vec::new();
    let (network, library) = (namespace::missing(), wall_clock::library());
    if let Some((why, _)) = network {
        eprintln!("THERE IS NO NETWORK TO TAKE APART: {why}.");
    }
    if library.is_none() {
        eprintln!("THERE IS NO LIBFAKETIME: what a wall clock does is not tested. `make etcd` gets it.");
    }
    // What there cannot be here is no failure in CI either; a program that is not installed is.
    let no_network = network.is_some_and(|(_, curable)| !curable || std::env::var_os("CI").is_none());
    let soaks = std::env::var_os("ETCD_ROUNDS").is_some();
    let newest = VERSIONS.into_iter().rfind(|version| is_there(version)).unwrap_or(VERSIONS[0]);
    for version in VERSIONS {
        if !is_there(version) {
            eprintln!("THERE IS NO ETCD {version}: what runs on it is not tested. `make etcd` gets it.");
        }
        trials.extend(conformance(version, 1));
        trials.extend(
            access::ACCESS.iter().map(|(name, rule)| trial(version, &format!("access_{name}"), move || rule(version))),
        );
        trials.extend(
            rules::RULES.iter().map(|(name, rule)| trial(version, &format!("rule_{name}"), move || rule(version))),
        );
        // What takes long, on one version. `make soak` has all of it, and for longer.
        if version != newest && !soaks {
            continue;
        }
        if soaks {
            trials.extend(conformance(version, 3));
        }
        trials.extend(
            faults::FAULTS.iter().map(|(name, fault)| {
                trial(version, &format!("fault_{name}"), move || faults::in_turn(|| fault(version)))
            }),
        );
        trials.extend(namespace::NAMESPACE.iter().map(|(name, rule)| {
            ignored(no_network, trial(version, &format!("network_{name}"), move || rule(version)))
        }));
        trials.extend(wall_clock::WALL_CLOCK.iter().map(|(name, rule)| {
            ignored(library.is_none(), trial(version, &format!("wall_clock_{name}"), move || rule(version)))
        }));
    }
    libtest_mimic::run(&arguments, trials).exit();
}
