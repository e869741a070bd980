//! A process dies at each step of an operation: between any two of its system calls, and in the middle of each write.

use std::future::IntoFuture;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, ScopedJoinHandle};
use std::time::{Duration, Instant};

use futures_lite::future::block_on;
use lease_core::runtime::system;
use lease_core::store::{Claim, ClaimId, Departure, Place, Standing, Store};
use lease_core::stores::sqlite::SqliteStore;
use lease_core::{Lease, Manager, Name, Token};
use rusqlite::Connection;

use crate::subject::{LIMIT, answer, ask, claims_in, names_in, obey, start, until};
use crate::support::scratch::Scratch;

const NAME: &str = "n";
/// Of the one that dies.
const TTL: Duration = Duration::from_secs(2);
/// Of those that wait and live: whoever waits for one of these to expire waits too long.
const LONG: Duration = Duration::from_secs(60);
/// The longest that anybody waits: the ttl of the dead, the turn that is offered to one who cannot hear of it, the slack.
const BOUND: Duration = Duration::from_millis(2_000 + 1_000 + 500);
/// What a busy machine may add.
const BUSY: Duration = Duration::from_secs(5);
/// How many die at the same time.
const AT_ONCE: usize = 4;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Operation {
    CreateTheFile,
    Claim,
    ClaimThatReservesTokens,
    ClaimBehind,
    LookThatTakesAnOffer,
    Renew,
    Leave,
    CloseAlone,
    CloseThatPassesAnOfferOn,
}

pub(crate) const OPERATIONS: &[Operation] = &[
    Operation::CreateTheFile,
    Operation::Claim,
    Operation::ClaimThatReservesTokens,
    Operation::ClaimBehind,
    Operation::LookThatTakesAnOffer,
    Operation::Renew,
    Operation::Leave,
    Operation::CloseAlone,
    Operation::CloseThatPassesAnOfferOn,
];

impl Operation {
    /// As the tests are named.
    pub(crate) fn name(self) -> String {
        let mut name = String::new();
        for letter in format!("{self:?}").chars() {
            if letter.is_uppercase() && !name.is_empty() {
                name.push('_');
            }
            name.extend(letter.to_lowercase());
        }
        name
    }

    fn command(self) -> &'static str {
        match self {
            Self::CreateTheFile => "open",
            Self::Claim | Self::ClaimThatReservesTokens | Self::ClaimBehind => "claim",
            Self::LookThatTakesAnOffer => "look",
            Self::Renew => "renew",
            Self::Leave => "leave",
            Self::CloseAlone | Self::CloseThatPassesAnOfferOn => "close",
        }
    }
}

/// Each step in turn, until the operation ends before it.
pub(crate) fn at_every_step(operation: Operation) {
    let (next, longest) = (AtomicU64::new(1), Mutex::new(Duration::ZERO));
    let last = AtomicU64::new(u64::MAX);
    thread::scope(|scope| {
        for _ in 0..AT_ONCE {
            scope.spawn(|| {
                loop {
                    let step = next.fetch_add(1, Ordering::Relaxed);
                    if step > last.load(Ordering::Relaxed) {
                        return;
                    }
                    let (died, waited) = crash(operation, step);
                    let mut longest = longest.lock().unwrap();
                    *longest = waited.max(*longest);
                    if !died {
                        last.fetch_min(step - 1, Ordering::Relaxed);
                    }
                }
            });
        }
    });
    let (steps, longest) = (last.into_inner(), longest.into_inner().unwrap());
    println!("{}: {steps} steps, the longest wait {longest:?}", operation.name());
    assert!((1..10_000).contains(&steps), "{steps} steps");
}

/// Whether it died of it, and how long the first of the others waited since.
fn crash(operation: Operation, step: u64) -> (bool, Duration) {
    let scratch = Scratch::in_memory("lease-crash").unwrap();
    let file = &scratch.path().join("leases.db");
    let open = || {
        let manager = block_on(Manager::builder().url(scratch.sqlite()).ttl(LONG).open()).unwrap();
        block_on(manager.ping()).unwrap();
        manager
    };
    let what = format!("{operation:?}, step {step}");
    let mut subject = start("crash", file, &[]);
    let mut token = 0;
    let claim = |subject: &mut _, place: &str| place_of(&ask(subject, "claim"), place);
    let busy = AtomicBool::new(false);
    let (env, mut sleeper) = (system().unwrap(), None);

    thread::scope(|scope| {
        let wait = |manager: &Manager, owner: &str| wait(scope, file, manager, &busy, owner);
        let (mut held, mut waiting): (Option<Lease>, _) = (None, Vec::new());
        if operation != Operation::CreateTheFile {
            ask(&mut subject, "open");
        }
        let alone = matches!(operation, Operation::CreateTheFile | Operation::CloseAlone);
        let mut others = if alone { Vec::new() } else { vec![open(), open(), open()] };
        let hold = |others: &[Manager]| Some(try_acquire(&others[0]).expect("it is free"));
        match operation {
            Operation::CreateTheFile | Operation::Claim => {}
            Operation::ClaimThatReservesTokens => {
                let sql = "UPDATE meta SET next_token = reserved_token - 256";
                assert_eq!(Connection::open(file).unwrap().execute(sql, []).unwrap(), 1);
            }
            Operation::ClaimBehind => held = hold(&others),
            Operation::LookThatTakesAnOffer => {
                held = hold(&others);
                token = claim(&mut subject, "behind");
                waiting.extend([wait(&others[1], "first"), wait(&others[2], "second")]);
            }
            Operation::Renew | Operation::Leave => {
                // It may die when it has left and has not rung: its death is noticed all the same, and not its deadline awaited.
                let command = if operation == Operation::Leave { "claim_for_long" } else { "claim" };
                token = place_of(&ask(&mut subject, command), "head");
                waiting.extend([wait(&others[1], "first"), wait(&others[2], "second")]);
            }
            Operation::CloseAlone => {
                token = claim(&mut subject, "head");
                ask(&mut subject, "leave");
            }
            Operation::CloseThatPassesAnOfferOn => {
                token = claim(&mut subject, "head");
                let store = sleeper.insert(SqliteStore::open(file, env.clone()).unwrap());
                let standing = block_on(store.claim(env.now(), &claim_of("sleeper", LONG))).unwrap();
                assert!(matches!(standing, Standing::Behind(..)), "{what}: {standing:?}");
                waiting.extend([wait(&others[1], "first"), wait(&others[2], "second")]);
                // To the sleeper, who does not hear of it.
                ask(&mut subject, "leave");
            }
        }
        ask(&mut subject, format!("order KILL {step}"));
        if operation == Operation::LookThatTakesAnOffer {
            block_on(held.take().unwrap().release()).unwrap();
        }
        subject.tell(operation.command()).unwrap();
        let told = answer(&subject);
        if let Some(told) = &told
            && operation.command() == "claim"
        {
            token = place_of(told, if held.is_some() { "behind" } else { "head" });
        }
        let mut since = Instant::now();
        drop(subject);

        if others.is_empty() {
            others = vec![open(), open(), open()];
        }
        if waiting.is_empty() {
            // The line may be free: they come one after the other only where somebody is known to hold.
            waiting.extend([(&others[1], "first"), (&others[2], "second")].map(|(manager, owner)| {
                if held.is_some() { wait(manager, owner) } else { come(scope, manager, &busy, owner) }
            }));
        }
        if let Some(held) = held {
            token = token.max(held.token().get());
            since = Instant::now();
            block_on(held.release()).unwrap();
        }
        let mut grants: Vec<Grant> = waiting.into_iter().map(|waiter| waiter.join().unwrap()).collect();
        grants.sort_by_key(|grant| grant.at);
        let waited = grants[0].at.saturating_duration_since(since);
        assert!(waited < BOUND + BUSY, "{what}: waited {waited:?}");
        let after = grants[1].at.saturating_duration_since(grants[0].released);
        assert!(after < BUSY, "{what}: the second waited {after:?} for the first");

        if let Some(sleeper) = sleeper {
            block_on(sleeper.close());
        }
        others.push(open());
        let last = try_acquire(others.last().unwrap()).unwrap_or_else(|| panic!("{what}: it is free"));
        let tokens = [token, grants[0].token.get(), grants[1].token.get(), last.token().get()];
        assert!(tokens.is_sorted_by(|one, next| one < next), "{what}: tokens {tokens:?}");
        block_on(last.release()).unwrap();
        end(&scratch, others, &what);
        block_on(env.stop(env.now() + LIMIT));
        (told.is_none(), waited)
    })
}

/// Closes all; the dead has left nothing.
fn end(scratch: &Scratch, managers: Vec<Manager>, what: &str) {
    let bells = || names_in(scratch.path()).iter().filter(|name| name.contains("-bell-")).count();
    until("the bell of the dead is removed", || bells() == managers.len());
    for manager in managers {
        block_on(manager.close()).unwrap();
    }
    let left = names_in(scratch.path());
    assert_eq!(left, ["leases.db", "leases.db-gate", "leases.db-live"], "{what}: what is left");
    assert_eq!(claims_in(&scratch.path().join("leases.db")), 0, "{what}: claims that are left");
}

struct Grant {
    token: Token,
    at: Instant,
    released: Instant,
}

fn try_acquire(manager: &Manager) -> Option<Lease> {
    block_on(manager.try_acquire(NAME).into_future()).unwrap()
}

/// One who is in the line by now, or was.
fn wait<'s>(
    scope: &'s thread::Scope<'s, '_>,
    file: &Path,
    manager: &Manager,
    busy: &'s AtomicBool,
    owner: &str,
) -> ScopedJoinHandle<'s, Grant> {
    let waiter = come(scope, manager, busy, owner);
    let raw = Connection::open(file).unwrap();
    let mut in_line = raw.prepare("SELECT 1 FROM line WHERE owner = ?1").unwrap();
    until("it is in the line", || in_line.exists([owner]).unwrap() || waiter.is_finished());
    waiter
}

fn come<'s>(
    scope: &'s thread::Scope<'s, '_>,
    manager: &Manager,
    busy: &'s AtomicBool,
    owner: &str,
) -> ScopedJoinHandle<'s, Grant> {
    let acquire = manager.acquire(NAME).owner(owner).timeout(LIMIT);
    scope.spawn(move || {
        let lease = block_on(acquire.into_future()).expect("granted");
        let at = Instant::now();
        assert!(!busy.swap(true, Ordering::AcqRel), "two holders");
        thread::yield_now();
        lease.check().expect("held");
        busy.store(false, Ordering::Release);
        let (token, released) = (lease.token(), Instant::now());
        block_on(lease.release()).expect("released");
        Grant { token, at, released }
    })
}

fn claim_of(owner: &str, ttl: Duration) -> Claim {
    let id = ClaimId(owner.len() as u128);
    Claim { name: Name::new(NAME).unwrap(), id, ttl, owner: owner.into(), queues: true, follows: None }
}

fn place_of(answer: &str, place: &str) -> i64 {
    match answer.split_once(' ') {
        Some((found, token)) if found == place => token.parse().unwrap(),
        _ => panic!("not {place}: {answer}"),
    }
}

/// The one that dies: a store without a manager, which does nothing but what it is told.
pub(crate) fn subject(file: &Path) {
    let env = system().unwrap();
    let mut claim = claim_of("dead", TTL);
    let (mut store, mut known) = (None, None);
    obey(|words| {
        if words == ["claim_for_long"] {
            claim.ttl = LONG;
        }
        if words == ["open"] {
            let opened = SqliteStore::open(file, env.clone()).unwrap();
            block_on(opened.ping()).unwrap();
            store = Some(opened);
            return "opened".into();
        }
        let store = store.as_ref().expect("it is open");
        let place = |token| Place { claim: claim.clone(), token };
        match words {
            ["claim" | "claim_for_long"] => match block_on(store.claim(env.now(), &claim)).unwrap() {
                Standing::Head(token) => {
                    known = Some(token);
                    format!("head {token}")
                }
                Standing::Behind(token, _) => {
                    known = Some(token);
                    format!("behind {token}")
                }
                other => panic!("{other:?}"),
            },
            ["look"] => format!("{:?}", block_on(store.look(&place(known.unwrap()))).unwrap()),
            ["renew"] => format!("{:?}", block_on(store.renew(env.now(), &[place(known.unwrap())]))),
            ["leave"] => {
                assert!(matches!(block_on(store.leave(&claim)).unwrap(), Departure::Left | Departure::Gone));
                "left".into()
            }
            ["close"] => {
                block_on(store.close());
                "closed".into()
            }
            other => panic!("no command: {other:?}"),
        }
    });
}
