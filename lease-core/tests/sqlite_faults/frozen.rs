//! A process is frozen in the midst of a transaction, with the gate shut: nobody else gets anything from the file until it is
//! thawed or killed. All lose their leases in time, nobody holds what another does, and afterwards all goes on.

use std::fs;
use std::future::IntoFuture;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use futures_lite::future::block_on;
use lease_core::clock::Moment;
use lease_core::{EndReason, Lease, Manager, Result};
use rustix::process::{Pid, Signal, kill_process};

use crate::subject::{LIMIT, answer, ask, claims_in, names_in, obey, start, until};
use crate::support::process::{Worker, within};
use crate::support::scratch::Scratch;

const TTL: Duration = Duration::from_secs(3);
/// How late `check` may say that a lease is lost.
const LATE: Duration = Duration::from_millis(50);

/// In what it is frozen, at which step of it, and what becomes of it.
pub(crate) const FREEZES: &[&str] = &[
    "renew_1_thawed",
    "renew_9_thawed_after_the_ttl",
    "renew_9_killed",
    "claim_3_thawed",
    "claim_12_thawed_after_the_ttl",
    "claim_12_killed",
    "look_9_thawed_after_the_ttl",
    "look_9_killed",
    "leave_9_thawed",
    "leave_9_killed",
];

pub(crate) fn run(freeze: &str) {
    let mut words = freeze.splitn(3, '_');
    let mut word = || words.next().expect("three words");
    let (operation, step, fate) = (word(), word(), word());
    let scratch = Scratch::in_memory("lease-frozen").unwrap();
    let file = scratch.path().join("leases.db");
    let open = |url: String| block_on(Manager::builder().url(url).ttl(TTL).open()).unwrap();
    let (one, two, probe) = (open(scratch.sqlite()), open(scratch.sqlite()), open(scratch.sqlite()));
    let memory = open("memory:".into());
    let mut subject = start("frozen", &file, &[]);

    let held = acquire(&one, "held").get();
    // Of this one the clock is never asked: who asks would end it.
    let awaited = acquire(&one, "awaited").get();
    let kept = acquire(&memory, "kept").get();
    let next = acquire(&two, "held");
    until("it waits", || is_awaited(&one, "held"));
    // What the frozen one holds, waits for, or will.
    let (mut theirs, mut given) = (None, None);
    match operation {
        "renew" | "leave" => {
            ask(&mut subject, "acquire");
            subject.hear("@granted", within(LIMIT)).unwrap();
            let after = acquire(&one, "theirs");
            until("it waits", || is_awaited(&one, "theirs"));
            theirs = Some(after);
        }
        "look" => {
            given = Some(acquire(&one, "theirs").get());
            ask(&mut subject, "acquire");
            until("it waits", || is_awaited(&one, "theirs"));
        }
        _ => {}
    }
    ask(&mut subject, format!("order STOP {step}"));
    match operation {
        "claim" => subject.tell("acquire").unwrap(),
        "leave" => subject.tell("release").unwrap(),
        "look" => block_on(given.take().unwrap().release()).unwrap(),
        _ => {}
    }
    until("it is frozen", || is_frozen(&subject));
    let frozen = Moment::now();

    // It has the gate: this is not done before, and answered in vain if that takes long.
    let (ping, pinged) = mpsc::channel();
    let asks = probe.clone();
    thread::spawn(move || ping.send(block_on(asks.ping())));
    let (told, deadline) = (ended(&awaited), Moment::now() + awaited.remaining());
    lost(&held, frozen);
    // After that another could hold it, if the file were not shut.
    let (reason, at) = told.recv_timeout(TTL).expect("told before the ttl has passed");
    println!("{freeze}: {reason:?}, told {:?} after ttl/2", at.since(deadline));
    assert!(matches!(reason, EndReason::Unreachable | EndReason::Stalled), "{reason:?}");
    assert!(at < deadline + TTL / 2, "told {:?} after ttl/2", at.since(deadline));
    let thaw_at = if fate.ends_with("ttl") { frozen + TTL } else { frozen + TTL / 2 };
    until("time has passed", || Moment::now() > thaw_at);
    assert!(is_frozen(&subject));
    let answer_to_ping = pinged.try_recv();
    assert!(!matches!(answer_to_ping, Ok(Ok(()))), "the gate is open: it was not in a transaction");
    assert!(!next.is_answered() && theirs.as_ref().is_none_or(|after| !after.is_answered()), "nothing is granted");
    kept.check().expect("another store goes on");
    block_on(kept.confirm()).expect("another store goes on");

    let pid = Pid::from_raw(subject.pid().try_into().unwrap()).unwrap();
    let is_killed = fate == "killed";
    kill_process(pid, if is_killed { Signal::KILL } else { Signal::CONT }).unwrap();
    block_on(probe.ping()).unwrap();
    let next = next.get();
    held.check().expect_err("lost is lost");
    assert!(next.token() > held.token());
    if is_killed {
        while answer(&subject).is_some() {}
    } else {
        // Its first word about what it held, if its own clock had not said so before.
        match operation {
            "renew" => assert!(ask(&mut subject, "check").starts_with("lost")),
            "leave" => drop(subject.hear("@released", within(LIMIT)).unwrap()),
            _ => drop(subject.hear("@granted", within(LIMIT)).unwrap()),
        }
    }
    let after = match theirs {
        Some(after) => Some(after.get()),
        None if is_killed => Some(acquire(&one, "theirs").get()),
        None => {
            assert!(block_on(one.try_acquire("theirs").into_future()).unwrap().is_none());
            assert_eq!(ask(&mut subject, "check"), "held");
            assert!(ask(&mut subject, "release").starts_with("released"));
            block_on(one.try_acquire("theirs").into_future()).unwrap()
        }
    };
    let after = after.expect("it is free");
    after.check().unwrap();
    next.check().unwrap();
    block_on(after.release()).unwrap();
    block_on(next.release()).unwrap();
    if !is_killed {
        assert_eq!(ask(&mut subject, "close"), "closed");
        subject.finish(within(LIMIT)).unwrap();
    }
    all_goes_on(vec![one, two, probe, memory, open(scratch.sqlite())], &scratch);
}

/// Who opens the file now gets everything, and in the end nothing is left.
fn all_goes_on(managers: Vec<Manager>, scratch: &Scratch) {
    for name in ["held", "awaited", "theirs"] {
        let again = acquire(managers.last().unwrap(), name).get();
        block_on(again.release()).unwrap();
    }
    for manager in managers {
        block_on(manager.close()).unwrap();
    }
    assert_eq!(claims_in(&scratch.path().join("leases.db")), 0);
    assert_eq!(names_in(scratch.path()), ["leases.db", "leases.db-gate", "leases.db-live"]);
}

fn is_frozen(subject: &Worker) -> bool {
    let status = fs::read_to_string(format!("/proc/{}/status", subject.pid())).unwrap();
    status.contains("State:\tT")
}

fn is_awaited(manager: &Manager, name: &str) -> bool {
    block_on(manager.inspect(name)).unwrap().is_some_and(|record| record.waiting == 1)
}

/// Fails if the lease says for longer that it is held than it told before, and than it can.
fn lost(lease: &Lease, frozen: Moment) {
    let mut deadline = Moment::now() + lease.remaining();
    loop {
        let before = Moment::now();
        if lease.check().is_err() {
            return;
        }
        let remaining = lease.remaining();
        assert!(before < deadline + LATE, "held {:?} after ttl/2", before.since(deadline));
        assert!(before < frozen + TTL / 2 + LATE, "renewed through a file that was shut");
        if !remaining.is_zero() {
            // An answer from before the freeze may have moved it.
            deadline = Moment::now() + remaining;
        }
        thread::sleep(Duration::from_millis(1));
    }
}

/// Tells when somebody who awaits the end hears of it.
fn ended(lease: &Lease) -> Receiver<(EndReason, Moment)> {
    let (tell, told) = mpsc::channel();
    let end = lease.ended();
    thread::spawn(move || tell.send((block_on(end).reason, Moment::now())));
    told
}

struct Acquiring {
    granted: Receiver<Result<Lease>>,
    answered: Arc<AtomicBool>,
}

fn acquire(manager: &Manager, name: &str) -> Acquiring {
    let (grant, granted) = mpsc::channel();
    let acquire = manager.acquire(name).timeout(LIMIT);
    let answered = Arc::new(AtomicBool::new(false));
    let answer = answered.clone();
    thread::spawn(move || {
        let lease = block_on(acquire.into_future());
        answer.store(true, Ordering::Release);
        grant.send(lease)
    });
    Acquiring { granted, answered }
}

impl Acquiring {
    fn is_answered(&self) -> bool {
        self.answered.load(Ordering::Acquire)
    }

    fn get(self) -> Lease {
        self.granted.recv_timeout(LIMIT).expect("an answer").expect("a lease")
    }
}

/// The one that is frozen: a manager.
pub(crate) fn subject(file: &Path) {
    let url = format!("sqlite:{}", file.display());
    let manager = block_on(Manager::builder().url(url).ttl(TTL).open()).unwrap();
    let held = Arc::new(Mutex::new(None::<Lease>));
    obey(|words| match words {
        ["acquire"] => {
            let (acquire, held) = (manager.acquire("theirs"), held.clone());
            thread::spawn(move || {
                let lease = block_on(acquire.into_future()).unwrap();
                let token = lease.token();
                *held.lock().unwrap() = Some(lease);
                println!("@granted {token}");
            });
            "acquiring".into()
        }
        ["check"] => match held.lock().unwrap().as_ref().expect("acquired").check() {
            Ok(()) => "held".into(),
            Err(error) => format!("lost {error}"),
        },
        ["release"] => match block_on(held.lock().unwrap().take().expect("acquired").release()) {
            Ok(()) => "released".into(),
            Err(error) => format!("released, but {error}"),
        },
        ["close"] => {
            block_on(manager.close()).unwrap();
            "closed".into()
        }
        other => panic!("no command: {other:?}"),
    });
}
