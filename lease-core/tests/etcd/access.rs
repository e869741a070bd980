//! Who is let in, and what he is told who is not; tokens that expire, and secrets that are shown nowhere.

use std::error::Error as _;
use std::fmt::{self, Write as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use lease_core::blocking::Manager;
use lease_core::runtime::system;
use lease_core::stores::etcd::EtcdStore;
use lease_core::{Builder, Change, EndReason, Error, ErrorKind};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, ExtendedKeyUsagePurpose, IsCa, KeyPair};

use crate::alone;
use crate::faults::{in_turn, lost_in_time};
use crate::rules::{LIMIT, Rule, until};
use crate::support::etcd::Cluster;
use crate::support::proxy::{Fault, Proxy};
use crate::support::scratch::Scratch;

/// Not a word of it, cut where a URL could be cut, is shown to anybody.
const SECRETS: [&str; 2] = ["Kanarie17xZ", "Sijs42qWv"];
/// With all the letters between them that mean something in a URL.
const PASSWORD: &str = "Kanarie17xZ/@:Sijs42qWv";
const ESCAPED: &str = "Kanarie17xZ%2F%40%3ASijs42qWv";
/// Every token of etcd that is a JWT begins so.
const TOKEN: &str = "eyJ";

const LONG: Duration = Duration::from_secs(60);
/// Longer takes nothing that does not wait for a timeout, on a busy machine either.
const AT_ONCE: Duration = Duration::from_secs(6);

pub(crate) const ACCESS: &[Rule] = &[
    ("a_role_for_the_prefix_is_enough", a_role_for_the_prefix_is_enough),
    ("who_is_not_let_in_is_told_so_at_once", who_is_not_let_in_is_told_so_at_once),
    ("simple_tokens_that_expire", |version| in_turn(|| simple_tokens_that_expire(version))),
    ("jwt_that_expire_and_a_role_that_changes", |version| in_turn(|| jwt_that_expire(version))),
    ("a_user_that_is_taken_away", a_user_that_is_taken_away),
    ("a_permission_that_is_taken_away", a_permission_that_is_taken_away),
    ("one_frozen_server_keeps_nobody_from_the_other", one_frozen_server_keeps_nobody_from_the_other),
    ("tls", tls),
    ("mutual_tls", mutual_tls),
    ("wrong_files_are_told_by_option_at_open", wrong_files_are_told_by_option_at_open),
    ("no_secret_is_shown", |version| alone::run::<&str>(None, "secrets", version)),
    ("known_holes_are_warned_of_once", |version| alone::run::<&str>(None, "warnings", version)),
];

pub(crate) const ALONE: &[Rule] = &[("secrets", secrets), ("warnings", warnings)];

/// Etcdctl as the administrator.
fn root(cluster: &Cluster, arguments: &[&str]) -> String {
    cluster.ctl(&[&["--user=root:root"], arguments].concat())
}

/// A server that asks who one is. `worker` may read and write below `p/`.
fn guarded(version: &str, options: &[&str]) -> Cluster {
    // The cheapest passwords there are: what they cost is not what is tested.
    let cluster = Cluster::start(version, 1, &[&["--bcrypt-cost=4"], options].concat());
    for arguments in [
        &["user", "add", "root:root"][..],
        &["user", "grant-role", "root", "root"],
        &["user", "add", &format!("worker:{PASSWORD}")],
        &["role", "add", "leases"],
        &["role", "grant-permission", "leases", "readwrite", "--prefix=true", "p/"],
        &["user", "grant-role", "worker", "leases"],
        &["auth", "enable"],
    ] {
        // There is a role of that name already in newer ones.
        cluster.ctl(arguments);
    }
    cluster
}

/// For that user, at the ports given.
fn as_worker(cluster: &Cluster, ports: &[u16]) -> Builder {
    let url = cluster.url_by(ports, "p").replace("://", &format!("://worker:{ESCAPED}@"));
    Manager::builder().url(url)
}

fn worker(cluster: &Cluster) -> Builder {
    as_worker(cluster, &[cluster.nodes[0].port])
}

fn authenticated(cluster: &Cluster) -> u64 {
    cluster.calls(0, "Authenticate")
}

/// Does all that a manager can, and shows that it did.
fn all_verbs(manager: &Manager, rival: &Manager) {
    manager.ping().unwrap();
    let lease = manager.acquire("n").timeout(LIMIT).wait().unwrap();
    lease.confirm().unwrap();
    assert!(rival.try_acquire("n").unwrap().is_none());
    assert_eq!(rival.inspect("n").unwrap().unwrap().token, lease.token());
    assert_eq!(rival.list("").unwrap().len(), 1);
    thread::scope(|scope| {
        let waiting = scope.spawn(|| rival.acquire("n").timeout(LIMIT).wait().unwrap());
        until("the rival waits", || manager.inspect("n").unwrap().is_some_and(|record| record.waiting == 1));
        lease.release().unwrap();
        let next = waiting.join().unwrap();
        assert!(matches!(manager.watch("n").next().unwrap().unwrap(), Change::Held(_)));
        manager.break_lease("n", next.token()).unwrap();
        until("the rival knows", || !next.is_held());
    });
    manager.close().unwrap();
    rival.close().unwrap();
}

fn a_role_for_the_prefix_is_enough(version: &str) {
    let cluster = guarded(version, &[]);
    let in_url = || worker(&cluster).open_blocking().unwrap();
    let by_option = || {
        let builder = Manager::builder().url(cluster.url("p"));
        builder.option("user", "worker").option("password", PASSWORD).open_blocking().unwrap()
    };
    all_verbs(&in_url(), &by_option());
    assert!(authenticated(&cluster) >= 2);
    let left = root(&cluster, &["get", "--prefix", "--keys-only", ""]);
    assert_eq!(left.trim(), "", "keys that are left");
}

/// What each verb says.
fn refusals(manager: &Manager) -> Vec<(&'static str, Error)> {
    vec![
        ("ping", manager.ping().unwrap_err()),
        ("acquire", manager.acquire("n").wait().unwrap_err()),
        ("try_acquire", manager.try_acquire("n").unwrap_err()),
        ("inspect", manager.inspect("n").unwrap_err()),
        ("list", manager.list("").unwrap_err()),
        ("watch", manager.watch("n").next().unwrap().unwrap_err()),
        ("break_lease", manager.break_lease("n", 1.try_into().unwrap()).unwrap_err()),
    ]
}

fn who_is_not_let_in_is_told_so_at_once(version: &str) {
    let cluster = guarded(version, &[]);
    let with = |prefix: &str, user: &str, password: &str| {
        Manager::builder().url(cluster.url(prefix)).option("user", user).option("password", password)
    };
    for (what, builder, hint) in [
        ("a wrong password", with("p", "worker", "wrong"), "check user and password"),
        ("an unknown user", with("p", "nobody", PASSWORD), "check user and password"),
        ("no user", Manager::builder().url(cluster.url("p")), "give user and password"),
        ("another's prefix", with("other", "worker", PASSWORD), "all keys below the prefix"),
    ] {
        // Without a limit: what is certain is not tried again.
        let manager = builder.request_timeout(LONG).open_blocking().unwrap();
        let began = Instant::now();
        for (verb, error) in refusals(&manager) {
            assert_eq!(error.kind(), ErrorKind::Denied, "{what}, {verb}: {error}");
            assert!(error.to_string().contains(hint), "{what}, {verb}: {error}");
        }
        assert!(began.elapsed() < AT_ONCE, "{what}: told after {:?}", began.elapsed());
        manager.close().unwrap();
    }
}

fn simple_tokens_that_expire(version: &str) {
    let cluster = guarded(version, &["--auth-token-ttl=1"]);
    expiry(&cluster, |_| {});
}

fn jwt_that_expire(version: &str) {
    let scratch = Scratch::in_memory("lease-jwt").unwrap();
    let cluster = guarded(version, &[&jwt(scratch.path(), 3)]);
    // Not all versions have found the right code for it.
    let refused = || {
        let with = |code| cluster.metric(0, "grpc_server_handled_total", &format!("grpc_code=\"{code}\""));
        with("InvalidArgument") + with("Unknown")
    };
    expiry(&cluster, |holder| {
        // A young token, made for the rights as they were.
        let before = refused();
        holder.ping().unwrap();
        root(&cluster, &["role", "grant-permission", "leases", "read", "elsewhere"]);
        holder.ping().unwrap();
        assert!(refused() > before, "no token was refused for its age");
    });
}

/// The option for JWT that expire, and its keys.
fn jwt(folder: &Path, seconds: u32) -> String {
    let key = KeyPair::generate().unwrap();
    let (public, private) = (folder.join("jwt.pub"), folder.join("jwt.key"));
    std::fs::write(&public, key.public_key_pem()).unwrap();
    std::fs::write(&private, key.serialize_pem()).unwrap();
    let (public, private) = (public.display(), private.display());
    format!("--auth-token=jwt,pub-key={public},priv-key={private},sign-method=ES256,ttl={seconds}s")
}

/// A holder, a waiter and a watcher, over several expiries of their tokens, and what is `done` in between.
fn expiry(cluster: &Cluster, done: impl FnOnce(&Manager)) {
    /// Renewed less often than tokens expire, so that they do.
    const TTL: Duration = Duration::from_secs(21);
    let open = || worker(cluster).ttl(TTL).open_blocking().unwrap();
    let (holder, waiter, watcher) = (open(), open(), open());
    let lease = holder.acquire("n").wait().unwrap();
    let (tx, changes) = mpsc::channel();
    thread::scope(|scope| {
        let waiting = scope.spawn(|| {
            let lease = waiter.acquire("n").timeout(LIMIT).wait().unwrap();
            (lease, Instant::now())
        });
        scope.spawn(|| {
            for change in watcher.watch("n") {
                // It goes on after such an error.
                let change = match change {
                    Ok(change) => change,
                    Err(error) if error.kind() == ErrorKind::Unavailable => continue,
                    Err(error) => panic!("{error}"),
                };
                let over = matches!(&change, Change::Held(record) if record.owner == "last");
                tx.send((change, Instant::now())).unwrap();
                if over {
                    break;
                }
            }
        });
        let told = changes.recv_timeout(LIMIT).unwrap().0;
        assert!(matches!(&told, Change::Held(record) if record.token == lease.token()), "{told:?}");
        until("the waiter waits", || holder.inspect("n").unwrap().is_some_and(|record| record.waiting == 1));
        let before = authenticated(cluster);
        until("tokens have expired", || authenticated(cluster) >= before + 4);
        done(&holder);
        let before = authenticated(cluster);
        until("and expired again", || authenticated(cluster) >= before + 2);
        assert!(lease.is_held() && !waiting.is_finished());
        lease.confirm().unwrap();

        // A watch that is made now, on a stream that is as old as its token.
        let fresh = holder.acquire("m").ttl(LONG).wait().unwrap();
        until("its own key is watched", || cluster.metric(0, "etcd_debugging_mvcc_watcher_total", "") >= 4);
        let evicted = Instant::now();
        root(cluster, &["del", "--prefix", "p/m/"]);
        until("the holder knows", || !fresh.is_held());
        // It would be renewed 20 s after it was acquired.
        assert!(evicted.elapsed() < AT_ONCE, "noticed after {:?}", evicted.elapsed());
        assert_eq!(fresh.end_reason(), Some(EndReason::Gone));

        // Just renewed: without a watch the waiter would look when this ttl is over.
        lease.confirm().unwrap();
        let released = Instant::now();
        lease.release().unwrap();
        let (next, granted) = waiting.join().unwrap();
        assert!(granted - released < AT_ONCE, "handed over after {:?}", granted - released);
        let (told, at) = changes.recv_timeout(LIMIT).unwrap();
        // Between the two there may have been nobody.
        let (told, at) = if told == Change::Free { changes.recv_timeout(LIMIT).unwrap() } else { (told, at) };
        assert!(matches!(&told, Change::Held(record) if record.token == next.token()), "{told:?}");
        assert!(at - released < AT_ONCE, "told after {:?}", at - released);
        next.release().unwrap();
        let last = waiter.acquire("n").owner("last").timeout(LIMIT).wait().unwrap();
        until("the watcher has seen the last", || {
            changes.try_iter().any(|(change, _)| matches!(&change, Change::Held(record) if record.owner == "last"))
        });
        last.release().unwrap();
    });
    for manager in [holder, waiter, watcher] {
        manager.close().unwrap();
    }
    assert_eq!(root(cluster, &["get", "--prefix", "--keys-only", ""]).trim(), "", "keys that are left");
}

/// Servers with known holes do not check what is nested in a transaction, as renewals are, against what a role may do. So the
/// user himself is taken away.
fn a_user_that_is_taken_away(version: &str) {
    let ttl = Duration::from_secs(4);
    let cluster = guarded(version, &[]);
    let manager = worker(&cluster).ttl(ttl).open_blocking().unwrap();
    let lease = manager.acquire("n").wait().unwrap();
    root(&cluster, &["user", "delete", "worker"]);
    assert_eq!(lease.confirm().unwrap_err().kind(), ErrorKind::Denied);
    assert!(lease.is_held(), "its key is still there: nobody else has it");
    lost_in_time(&lease, ttl, EndReason::Denied);
    assert_eq!(lease.release().unwrap_err().kind(), ErrorKind::Lost);
    assert_eq!(manager.acquire("n").wait().unwrap_err().kind(), ErrorKind::Denied);
    root(&cluster, &["user", "add", &format!("worker:{PASSWORD}")]);
    root(&cluster, &["user", "grant-role", "worker", "leases"]);
    manager.acquire("n").timeout(LIMIT).wait().unwrap().release().unwrap();
    manager.close().unwrap();
}

/// What is certain is told at once.
fn a_permission_that_is_taken_away(version: &str) {
    let cluster = guarded(version, &[]);
    let manager = worker(&cluster).open_blocking().unwrap();
    manager.acquire("n").wait().unwrap().release().unwrap();
    root(&cluster, &["role", "revoke-permission", "leases", "--prefix=true", "p/"]);
    let began = Instant::now();
    for error in [manager.acquire("m").wait().unwrap_err(), manager.ping().unwrap_err()] {
        assert_eq!(error.kind(), ErrorKind::Denied, "{error}");
    }
    assert!(began.elapsed() < AT_ONCE, "told after {:?}", began.elapsed());
    root(&cluster, &["role", "grant-permission", "leases", "readwrite", "--prefix=true", "p/"]);
    manager.acquire("m").timeout(LIMIT).wait().unwrap().release().unwrap();
    manager.close().unwrap();
}

/// Who asked the frozen one for a token first kept all others from asking the other.
fn one_frozen_server_keeps_nobody_from_the_other(version: &str) {
    let cluster = guarded(version, &[]);
    let proxies = [Proxy::to(cluster.nodes[0].port), Proxy::to(cluster.nodes[0].port)];
    let ports = proxies.each_ref().map(Proxy::port);
    proxies[0].set(Fault::BlackHole);
    // Each begins with one of the two, by chance.
    for round in 0.. {
        if round >= 8 && proxies[0].fired() > 0 && proxies[1].opened() > 0 {
            break;
        }
        assert!(round < 100, "nobody came to the frozen one first");
        let manager = as_worker(&cluster, &ports).request_timeout(LONG).open_blocking().unwrap();
        let began = Instant::now();
        manager.ping().unwrap();
        // The next one is tried after 200 ms; the frozen one would be waited for as long as a request may take.
        assert!(began.elapsed() < AT_ONCE, "answered after {:?}", began.elapsed());
        manager.close().unwrap();
    }
}

// ----------------------------------------------------------------------------------- TLS

/// A folder of certificates: `ca.pem`, of it `server` and `client`, and `other-ca.pem` with `other`.
struct Certificates(Scratch);

impl Certificates {
    fn new() -> Self {
        let scratch = Scratch::in_memory("lease-tls").unwrap();
        let these = Self(scratch);
        for (ca, issued) in [("ca", &["server", "client"][..]), ("other-ca", &["other"])] {
            let mut params = CertificateParams::new([]).unwrap();
            params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
            params.distinguished_name.push(rcgen::DnType::CommonName, ca);
            let issuer = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
            std::fs::write(these.0.path().join(format!("{ca}.pem")), issuer.pem()).unwrap();
            for name in issued {
                // Not `localhost`.
                let mut params = CertificateParams::new(["127.0.0.1".into(), "etcd.test".into()]).unwrap();
                params.extended_key_usages = vec![
                    ExtendedKeyUsagePurpose::ServerAuth,
                    // Etcd is its own client.
                    ExtendedKeyUsagePurpose::ClientAuth,
                ];
                let key = KeyPair::generate().unwrap();
                let certificate = params.signed_by(&key, &issuer).unwrap();
                std::fs::write(these.0.path().join(format!("{name}.pem")), certificate.pem()).unwrap();
                std::fs::write(these.0.path().join(format!("{name}.key")), key.serialize_pem()).unwrap();
            }
        }
        these
    }

    fn folder(&self) -> PathBuf {
        self.0.path().to_owned()
    }

    fn path(&self, file: &str) -> String {
        self.0.path().join(file).to_str().unwrap().to_owned()
    }
}

fn with_options(url: &str, options: &[(&str, String)]) -> Builder {
    options.iter().fold(Manager::builder().url(url), |builder, (key, value)| builder.option(*key, value))
}

/// Nobody has to show a certificate but the server.
fn tls(version: &str) {
    let files = Certificates::new();
    let options = ["--client-cert-auth=false", "--trusted-ca-file="];
    let cluster = Cluster::with_tls(version, 1, &options, Some(files.folder()));
    let by_name = cluster.url("p").replace("127.0.0.1", "localhost");
    let ca = || ("ca", files.path("ca.pem"));
    let open = |url: &str, options: &[(&str, String)]| with_options(url, options).open_blocking().unwrap();
    let url = cluster.url("p");
    all_verbs(&open(&url, &[ca()]), &open(&format!("{url}?ca={}", files.path("ca.pem")), &[]));
    let named = [ca(), ("server_name", "etcd.test".into())];
    all_verbs(&open(&by_name, &named), &open(&url, &named));
    for (what, url, options, hints) in [
        ("another CA", &url, vec![("ca", files.path("other-ca.pem"))], ["TLS", "UnknownIssuer"]),
        ("the machine's CAs", &url, vec![], ["TLS", "UnknownIssuer"]),
        ("a host that is not in the certificate", &by_name, vec![ca()], ["TLS", "localhost"]),
        ("a wrong server_name", &url, vec![ca(), ("server_name", "other.test".into())], ["TLS", "other.test"]),
    ] {
        let manager = match with_options(url, &options).request_timeout(LONG).open_blocking() {
            Ok(manager) => manager,
            Err(error) => {
                assert!(options.is_empty() && error.to_string().contains("give the option \"ca\""), "{what}: {error}");
                continue;
            }
        };
        let began = Instant::now();
        let error = manager.ping().unwrap_err();
        for hint in hints {
            assert!(error.to_string().contains(hint), "{what}: {error}");
        }
        assert!(began.elapsed() < AT_ONCE, "{what}: told after {:?}", began.elapsed());
        println!("{what}: {error}");
        manager.close().unwrap();
    }
    // Not TLS to a server that has it, and TLS to one that has none.
    let plain = Cluster::start(version, 1, &[]);
    for (url, options) in
        [(cluster.url("p").replace("etcds:", "etcd:"), vec![]), (plain.url("p").replace("etcd:", "etcds:"), vec![ca()])]
    {
        let manager = with_options(&url, &options).open_blocking().unwrap();
        let error = manager.ping().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}");
        println!("{url}: {error}");
        manager.close().unwrap();
    }
}

fn mutual_tls(version: &str) {
    let files = Certificates::new();
    let cluster = Cluster::with_tls(version, 1, &[], Some(files.folder()));
    let options = |who: &str| {
        let (cert, key) = (files.path(&format!("{who}.pem")), files.path(&format!("{who}.key")));
        vec![("ca", files.path("ca.pem")), ("cert", cert), ("key", key)]
    };
    let open = |options: &[(&str, String)]| with_options(&cluster.url("p"), options).open_blocking().unwrap();
    all_verbs(&open(&options("client")), &open(&options("client")));
    for (what, options) in
        [("no certificate", vec![("ca", files.path("ca.pem"))]), ("one of another CA", options("other"))]
    {
        let manager = open(&options);
        // The server tells after it has let us in, and hangs up at once: now and then the reason is lost.
        until("it is told why", || {
            let error = manager.ping().unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Unavailable, "{what}: {error}");
            let text = error.to_string().to_lowercase();
            text.contains("certificate") || text.contains("unknownca")
        });
        manager.close().unwrap();
    }
    assert_eq!(cluster.keys("p/"), 0, "keys that are left");
}

fn wrong_files_are_told_by_option_at_open(_: &str) {
    let files = Certificates::new();
    let [ca, cert, key] = ["ca.pem", "client.pem", "client.key"].map(|file| files.path(file));
    let empty = files.path("empty");
    std::fs::write(&empty, "").unwrap();
    let none = files.path("none");
    for (options, says) in [
        (vec![("ca", &none)], vec!["\"ca\"", &none]),
        (vec![("ca", &empty)], vec!["\"ca\"", &empty]),
        (vec![("ca", &key)], vec!["\"ca\"", &key]),
        (vec![("cert", &none), ("key", &key)], vec!["\"cert\"", &none]),
        (vec![("cert", &key), ("key", &key)], vec!["\"cert\"", &key]),
        (vec![("cert", &cert), ("key", &none)], vec!["\"key\"", &none]),
        (vec![("cert", &cert), ("key", &cert)], vec!["\"key\"", &cert]),
        (vec![("cert", &cert), ("key", &empty)], vec!["\"key\"", &empty]),
        (vec![("cert", &cert)], vec!["\"cert\"", "\"key\""]),
        (vec![("key", &key)], vec!["\"cert\"", "\"key\""]),
    ] {
        let options: Vec<_> = options.into_iter().map(|(key, path)| (key, path.clone())).collect();
        let with_ca = options.iter().any(|(option, _)| *option == "ca");
        let builder = with_options("etcds://127.0.0.1:1/p", &options);
        let builder = if with_ca { builder } else { builder.option("ca", &ca) };
        refused_at_open(builder, &says);
    }
    let other = files.path("other.key");
    let builder = with_options("etcds://127.0.0.1:1/p", &[("ca", ca), ("cert", cert), ("key", other.clone())]);
    refused_at_open(builder, &["\"key\"", &other, "not the key of the certificate"]);
    let builder = with_options("etcds://127.0.0.1:1/p", &[("server_name", "no name".into())]);
    refused_at_open(builder, &["no name"]);
    for option in ["ca", "cert", "key", "server_name"] {
        refused_at_open(Manager::builder().url("etcd://127.0.0.1:1/p").option(option, "x"), &[option, "etcds://"]);
    }
}

fn refused_at_open(builder: Builder, says: &[&str]) {
    let error = builder.open_blocking().map(drop).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid, "{error}");
    for text in says {
        assert!(error.to_string().contains(text), "no {text:?} in {error}");
    }
}

// ----------------------------------------------------------------------------------- what is shown

/// All lines of all libraries of this process, with all that they carry: `TARGET LEVEL NAME=VALUE …`.
#[derive(Clone, Default)]
struct Lines(Arc<Mutex<Vec<String>>>);

impl Lines {
    /// From here on, for the whole process.
    fn collect() -> Self {
        let lines = Self::default();
        tracing::subscriber::set_global_default(lines.clone()).unwrap();
        lines
    }

    fn add(&self, metadata: &tracing::Metadata<'_>, fields: impl FnOnce(&mut Fields)) {
        let mut line = Fields(format!("{} {}", metadata.target(), metadata.level()));
        fields(&mut line);
        self.0.lock().unwrap().push(line.0);
    }

    fn with(&self, text: &str) -> usize {
        self.0.lock().unwrap().iter().filter(|line| line.contains(text)).count()
    }
}

struct Fields(String);

impl tracing::field::Visit for Fields {
    fn record_debug(&mut self, field: &tracing::field::Field, value: &dyn fmt::Debug) {
        let _ = write!(self.0, " {}={value:?}", field.name());
    }
}

impl tracing::Subscriber for Lines {
    fn enabled(&self, _: &tracing::Metadata<'_>) -> bool {
        true
    }
    fn new_span(&self, span: &tracing::span::Attributes<'_>) -> tracing::span::Id {
        self.add(span.metadata(), |line| span.record(line));
        tracing::span::Id::from_u64(1)
    }
    fn record(&self, _: &tracing::span::Id, values: &tracing::span::Record<'_>) {
        let mut line = Fields("record".into());
        values.record(&mut line);
        self.0.lock().unwrap().push(line.0);
    }
    fn record_follows_from(&self, _: &tracing::span::Id, _: &tracing::span::Id) {}
    fn event(&self, event: &tracing::Event<'_>) {
        self.add(event.metadata(), |line| event.record(line));
    }
    fn enter(&self, _: &tracing::span::Id) {}
    fn exit(&self, _: &tracing::span::Id) {}
}

/// An error in all the ways in which it can be shown, with its causes.
fn shown(error: &Error) -> String {
    let mut text = format!("{error} {error:?} {error:#?}");
    let mut source = error.source();
    while let Some(cause) = source {
        let _ = write!(text, " {cause} {cause:?}");
        source = cause.source();
    }
    text
}

fn check(what: &str, text: &str, secrets: &[&str]) {
    for secret in secrets {
        assert!(!text.contains(secret), "{what} shows a secret: {text}");
    }
}

/// In a process of its own: it listens to all of it.
fn secrets(version: &str) {
    let lines = Lines::collect();
    let scratch = Scratch::in_memory("lease-jwt").unwrap();
    let cluster = guarded(version, &[&jwt(scratch.path(), 3)]);
    let port = cluster.nodes[0].port;
    let at = format!("127.0.0.1:{port}");
    let wrong = SECRETS.concat();
    let all = [&SECRETS[..], &[TOKEN]].concat();

    // What can be looked at.
    let builder = worker(&cluster).option("password", PASSWORD);
    check("a builder", &format!("{builder:?} {builder:#?}"), &all);
    let manager = worker(&cluster).open_blocking().unwrap();
    let lease = manager.acquire("n").wait().unwrap();
    check("a manager", &format!("{manager:?} {manager:#?} {lease:?} {lease:#?}"), &all);
    let env = system().unwrap();
    let url = cluster.url("p").replace("://", &format!("://worker:{ESCAPED}@"));
    let store = EtcdStore::open(&url, env).unwrap();
    futures_lite::future::block_on(lease_core::store::Store::ping(&*store)).unwrap();
    check("a store", &format!("{store:?} {store:#?}"), &all);
    // Until another token has taken the place of an expired one.
    let before = authenticated(&cluster);
    until("a token has expired", || {
        lease.confirm().unwrap();
        authenticated(&cluster) > before
    });
    lease.release().unwrap();
    manager.close().unwrap();

    // What is said when it goes wrong, by every verb.
    for (host, password) in [(&*at, &*wrong), ("127.0.0.1:1", ESCAPED), ("no.such.host.invalid:1", ESCAPED)] {
        let url = format!("etcd://worker:{password}@{host}/p");
        let options = Manager::builder().url(&url).request_timeout(Duration::from_secs(1));
        let manager = options.timeout(Duration::from_secs(1)).open_blocking().unwrap();
        for (verb, error) in refusals(&manager) {
            assert!(matches!(error.kind(), ErrorKind::Denied | ErrorKind::Unavailable | ErrorKind::Timeout), "{error}");
            check(verb, &shown(&error), &all);
        }
        check("a manager", &format!("{manager:?}"), &all);
        manager.close().unwrap();
    }

    // URLs that are written wrongly, because of what is in the password.
    let [one, two] = SECRETS;
    let mut refused = 0;
    for between in
        ["/", "@", ":", "?", "#", "&", ";", "%", "%zz", ",", "[", "]", " ", "\0", "\n", "/@", "?x=", "?=", "&x=", "//"]
    {
        let secret = format!("{one}{between}{two}");
        for url in [
            format!("etcd://worker:{secret}@{at}/p"),
            format!("etcds://worker:{secret}@{at}/p"),
            format!("etcd:worker:{secret}@{at}/p"),
            format!("etcd:/worker:{secret}@{at}/p"),
            format!("etcd://worker:1{between}{two}@{at}/p"),
            format!("etcd://worker:{secret}@{at}:x/p"),
            format!("etcd://worker:{secret}@/p"),
            format!("etcd://worker:{secret}@{at}/p?ttl=x"),
            format!("etcd://{at}/p?user=worker&password={secret}"),
            format!("etcd://{at}/p?password={secret}"),
            format!("etcd://worker:{secret}@{at}/p?password={secret}"),
            format!("sqlite:x?password={secret}"),
            format!("memory:?user=worker&password={secret}"),
            format!("nats://worker:{secret}@{at}/p"),
        ] {
            let opened = Manager::builder().url(&url).timeout(Duration::from_millis(100)).open_blocking();
            let error = match opened {
                Err(error) => error,
                // It may be right, but then it is the password.
                Ok(manager) => match manager.ping() {
                    Err(error) => error,
                    Ok(()) => continue,
                },
            };
            refused += 1;
            check(&format!("the error about {url:?}"), &shown(&error), &all);
        }
    }
    assert!(refused > 100, "only {refused} were wrong");

    // A private key that is taken for something else.
    let files = Certificates::new();
    let [ca, cert, key] = ["ca.pem", "client.pem", "client.key"].map(|file| files.path(file));
    let text = std::fs::read_to_string(&key).unwrap();
    let broken = files.path("broken");
    std::fs::write(&broken, text.replacen("-----END", "-----", 1)).unwrap();
    let body: Vec<&str> = text.lines().filter(|line| !line.starts_with("---")).collect();
    for options in [
        vec![("ca", &key)],
        vec![("ca", &ca), ("cert", &key), ("key", &key)],
        vec![("ca", &ca), ("cert", &cert), ("key", &broken)],
        vec![("ca", &ca), ("cert", &cert), ("key", &text)],
        vec![("ca", &text)],
        vec![("ca", &ca), ("cert", &text), ("key", &text)],
    ] {
        let options: Vec<_> = options.into_iter().map(|(option, value)| (option, value.clone())).collect();
        let builder = with_options("etcds://127.0.0.1:1/p", &options);
        check("a builder", &format!("{builder:?}"), &body);
        let error = builder.open_blocking().map(drop).unwrap_err();
        check("the error about a key", &shown(&error), &body);
    }

    futures_lite::future::block_on(lease_core::store::Store::close(&*store));
    until("the log is written", || lines.with("lease_core::observe DEBUG") > 0 && lines.with("h2::") > 100);
    for line in lines.0.lock().unwrap().iter() {
        check("the log", line, &[&all[..], &body].concat());
    }
}

/// In a process of its own: the log is one for all.
fn warnings(version: &str) {
    const HOLES: &str = "known holes in its access control";
    let lines = Lines::collect();
    let cluster = guarded(version, &[]);
    let proxy = Proxy::to(cluster.nodes[0].port);
    let anonymous = Manager::builder().url(cluster.url("p")).open_blocking().unwrap();
    assert_eq!(anonymous.ping().unwrap_err().kind(), ErrorKind::Denied);
    anonymous.close().unwrap();
    let manager = as_worker(&cluster, &[proxy.port()]).open_blocking().unwrap();
    for connections in 1..=3 {
        manager.acquire("n").timeout(LIMIT).wait().unwrap().release().unwrap();
        assert!(proxy.opened() >= connections);
        proxy.cut();
        until("it is cut", || proxy.open() == 0);
    }
    manager.close().unwrap();
    until("it was logged", || lines.with(HOLES) > 0);
    assert_eq!((lines.with(HOLES), lines.with(&format!("lease_core::observe WARN message=etcd {version}"))), (1, 1));
}
