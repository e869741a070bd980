//! Logs and figures: the names are a promise, the values are right.

use std::collections::BTreeMap;
use std::future::Future;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use lease_core::stores::memory::MemoryStore;
use lease_core::testing::{CutStore, TestEnvironment};
use lease_core::{EndReason, Manager};
use metrics::{Counter, Gauge, Histogram, Key, KeyName, Metadata, Recorder, SharedString, Unit};

const TTL: Duration = Duration::from_secs(30);

/// Every value that a figure was given, by its name and labels.
#[derive(Default)]
struct Figures(Arc<Mutex<BTreeMap<String, Vec<f64>>>>);

struct Figure(String, Arc<Mutex<BTreeMap<String, Vec<f64>>>>);

impl Figure {
    fn note(&self, value: f64) {
        self.1.lock().unwrap().entry(self.0.clone()).or_default().push(value);
    }
}

impl metrics::CounterFn for Figure {
    fn increment(&self, value: u64) {
        self.note(f64::from(u32::try_from(value).unwrap()));
    }
    fn absolute(&self, value: u64) {
        self.increment(value);
    }
}

impl metrics::GaugeFn for Figure {
    fn increment(&self, _: f64) {
        panic!("a figure that may be dropped on its way must not be a difference");
    }
    fn decrement(&self, _: f64) {
        panic!("a figure that may be dropped on its way must not be a difference");
    }
    fn set(&self, value: f64) {
        self.note(value);
    }
}

impl metrics::HistogramFn for Figure {
    fn record(&self, value: f64) {
        self.note(value);
    }
}

impl Figures {
    fn figure(&self, key: &Key) -> Arc<Figure> {
        let labels: Vec<String> = key.labels().map(|label| format!("{}={}", label.key(), label.value())).collect();
        Arc::new(Figure(format!("{}{{{}}}", key.name(), labels.join(",")), self.0.clone()))
    }
}

impl Recorder for Figures {
    fn describe_counter(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}
    fn describe_gauge(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}
    fn describe_histogram(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}
    fn register_counter(&self, key: &Key, _: &Metadata<'_>) -> Counter {
        Counter::from_arc(self.figure(key))
    }
    fn register_gauge(&self, key: &Key, _: &Metadata<'_>) -> Gauge {
        Gauge::from_arc(self.figure(key))
    }
    fn register_histogram(&self, key: &Key, _: &Metadata<'_>) -> Histogram {
        Histogram::from_arc(self.figure(key))
    }
}

/// The names of spans and the levels and messages of events, in order.
struct Told(Arc<Mutex<Vec<String>>>);

impl tracing::Subscriber for Told {
    fn enabled(&self, metadata: &tracing::Metadata<'_>) -> bool {
        metadata.target().starts_with("lease_core")
    }
    fn new_span(&self, span: &tracing::span::Attributes<'_>) -> tracing::span::Id {
        self.0.lock().unwrap().push(format!("span {}", span.metadata().name()));
        tracing::span::Id::from_u64(1)
    }
    fn record(&self, _: &tracing::span::Id, _: &tracing::span::Record<'_>) {}
    fn record_follows_from(&self, _: &tracing::span::Id, _: &tracing::span::Id) {}
    fn event(&self, event: &tracing::Event<'_>) {
        struct Text(String);
        impl tracing::field::Visit for Text {
            fn record_debug(&mut self, field: &tracing::field::Field, value: &dyn std::fmt::Debug) {
                if field.name() == "message" {
                    self.0 = format!("{value:?}");
                }
            }
        }
        let mut text = Text(String::new());
        event.record(&mut text);
        self.0.lock().unwrap().push(format!("{} {}", event.metadata().level(), text.0));
    }
    fn enter(&self, _: &tracing::span::Id) {}
    fn exit(&self, _: &tracing::span::Id) {}
}

fn simulated(test: impl Future<Output = ()>) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
    runtime.block_on(test);
}

/// One test: figures and the level that is listened to are of the whole process.
#[test]
fn logs_and_figures_tell_of_grants_renewals_waits_and_losses() {
    let (figures, told) = (Figures::default(), Arc::new(Mutex::new(Vec::new())));
    let values = figures.0.clone();
    tracing::subscriber::set_global_default(Told(told.clone())).unwrap();
    metrics::with_local_recorder(&figures, || {
        simulated(async {
            let env = TestEnvironment::new(1);
            let store = CutStore::new(MemoryStore::new(env.clone()));
            let builder = Manager::builder().environment(env.clone()).store(store.clone()).ttl(TTL);
            let manager = builder.open().await.unwrap();
            let lease = manager.acquire("n").await.unwrap();
            assert!(manager.acquire("n").timeout(Duration::from_secs(3)).await.is_err());
            assert!(manager.acquire("n").timeout(Duration::from_secs(2)).await.is_err());
            tokio::time::sleep(Duration::from_secs(10)).await;
            lease.release().await.unwrap();
            let lost = manager.try_acquire("n").await.unwrap().unwrap();
            store.cut();
            assert_eq!(lost.cancelled().await.reason, EndReason::Unreachable);
            manager.close().await.unwrap();
        });
    });
    let values = values.lock().unwrap();
    let of = |name: &str| values.get(name).unwrap_or_else(|| panic!("no {name} in {:?}", values.keys())).clone();
    assert_eq!(of("lease.acquire.duration{}"), [0.0, 0.0]);
    let held = of("lease.hold.duration{}");
    assert!(held.len() == 2 && held.iter().all(|held| (14.9..15.1).contains(held)), "{held:?}");
    assert_eq!(of("lease.renew.duration{}"), [0.0]);
    assert!((19.9..20.1).contains(&of("lease.renew.headroom{}")[0]), "two thirds of the ttl were left");
    assert_eq!(of("lease.losses{reason=UNREACHABLE}"), [1.0]);
    let (held, waiters) = (of("lease.held{}"), of("lease.waiters{}"));
    assert!(held.contains(&1.0) && held.last() == Some(&0.0), "{held:?}");
    assert!(waiters.contains(&1.0) && waiters.last() == Some(&0.0), "{waiters:?}");

    let told = told.lock().unwrap();
    for expected in [
        "span lease.acquire",
        "span lease.release",
        "DEBUG acquired",
        "DEBUG renewed",
        "DEBUG renewal failed; trying again",
        "INFO acquire waits for the holder",
        "WARN lease lost: the work under it must stop",
    ] {
        assert!(told.iter().any(|told| told == expected), "no {expected:?} in {told:#?}");
    }
    let reentrant = |told: &String| told.starts_with("WARN acquire waits for a lease held by this process since");
    assert_eq!(told.iter().filter(|told| reentrant(told)).count(), 1, "not for every wait");
}
