//! How a request reaches etcd and is answered, whatever becomes of single servers.
//!
//! 1. One connection at a time serves everything. It is made when it is needed: servers are tried one after the other, the
//!    next as soon as one fails or takes long, and the first that lets us in and has a leader serves.
//! 2. A request that is not answered in a while is sent again to another server, and the first answer counts. So requests
//!    have to be such that this is harmless, and who cannot bear it is told (`alone`). A frozen server costs no lease.
//! 3. Every answer is held against those before it: another cluster id, or a revision that is older than one seen before the
//!    request was sent, is no store that could be trusted.
//! 4. When every server failed, the next round begins after a capped backoff with jitter. Those who wait for it share it.

use std::future::Future;
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures_lite::future::or;
use tokio::sync::Notify;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tonic::metadata::AsciiMetadataValue;

use super::address::{Address, Credentials, Endpoint, Tls};
use super::connection::{Connection, Path, with_metadata};
use super::failure::{Cause, Failure};
use super::proto::{
    AuthenticateRequest, AuthenticateResponse, DeleteRangeRequest, DeleteRangeResponse, LeaseGrantRequest,
    LeaseGrantResponse, LeaseRevokeRequest, LeaseRevokeResponse, RangeRequest, RangeResponse, ResponseHeader,
    StatusRequest, StatusResponse, TxnRequest, TxnResponse,
};
use crate::error::{Error, ErrorKind};
use crate::heartbeat::jitter;
use crate::observe;
use crate::runtime::{Environment, lock, until};

/// After how long a request is sent again, to another server.
pub(super) const PATIENCE: Duration = Duration::from_millis(300);
/// How often it is doubled while nothing is answered in time.
const PATIENCE_DOUBLINGS: u32 = 1;
/// How long a server may take to let us in before the next one is tried too.
const STAGGER: Duration = Duration::from_millis(200);
/// The longest pause after every server failed. Short, because a lease has a sixth of its ttl to be renewed in.
const LONGEST_PAUSE: Duration = Duration::from_millis(500);

/// A request of etcd.
pub(super) trait Call: prost::Message + Clone + 'static {
    /// Its answer.
    type Answer: prost::Message + Default + 'static;
    const PATH: Path;
    /// Whether its answer shows a revision that no later answer may be behind.
    const LINEARIZABLE: bool;

    fn header(answer: &Self::Answer) -> Option<&ResponseHeader>;
}

macro_rules! calls {
    ($($request:ident -> $answer:ident, $path:literal, $linearizable:literal;)+) => {
        $(impl Call for $request {
            type Answer = $answer;
            const PATH: Path = $path;
            const LINEARIZABLE: bool = $linearizable;

            fn header(answer: &$answer) -> Option<&ResponseHeader> {
                answer.header.as_ref()
            }
        })+
    };
}

calls! {
    RangeRequest -> RangeResponse, "/etcdserverpb.KV/Range", true;
    DeleteRangeRequest -> DeleteRangeResponse, "/etcdserverpb.KV/DeleteRange", true;
    TxnRequest -> TxnResponse, "/etcdserverpb.KV/Txn", true;
    LeaseGrantRequest -> LeaseGrantResponse, "/etcdserverpb.Lease/LeaseGrant", false;
    LeaseRevokeRequest -> LeaseRevokeResponse, "/etcdserverpb.Lease/LeaseRevoke", false;
    AuthenticateRequest -> AuthenticateResponse, "/etcdserverpb.Auth/Authenticate", false;
    StatusRequest -> StatusResponse, "/etcdserverpb.Maintenance/Status", false;
}

/// An answer, and whether it answers the only request that was sent.
pub(super) struct Answered<A> {
    pub(super) answer: A,
    /// If not, another copy of the request may still be applied.
    pub(super) alone: bool,
}

type Called<'a, A> = Pin<Box<dyn Future<Output = Result<Answered<A>, Failure>> + Send + 'a>>;

pub(super) struct Client {
    pub(super) env: Arc<dyn Environment>,
    pub(super) closed: CancellationToken,
    endpoints: Vec<Endpoint>,
    tls: Option<Tls>,
    credentials: Option<Credentials>,
    limit: Duration,
    state: Mutex<State>,
    /// Told when a round of connecting is over.
    round_over: Notify,
    token: Mutex<Option<AsciiMetadataValue>>,
    /// Whether the server asks nobody who he is. Until it refuses one without a token.
    open_to_all: AtomicBool,
    /// The latest revision, and the cluster: 0 until they are known.
    revision: AtomicI64,
    cluster: AtomicU64,
    /// How many requests in a row were not answered in time.
    slow: AtomicU32,
    warned: AtomicU32,
}

#[derive(Default)]
struct State {
    current: Option<Arc<Connection>>,
    connecting: bool,
    /// How many rounds are over, and what the last one came to if it failed.
    rounds: u64,
    failed: Option<Failure>,
    failures: u32,
    /// The server to begin with.
    next: usize,
}

impl Client {
    pub(super) fn new(address: Address, limit: Duration, env: Arc<dyn Environment>) -> Arc<Self> {
        // Each manager begins with another server, so that they share the load.
        let next = usize::try_from(env.random() % address.endpoints.len() as u64).unwrap_or(0);
        Arc::new(Self {
            env,
            closed: CancellationToken::new(),
            endpoints: address.endpoints,
            tls: address.tls,
            credentials: address.credentials,
            limit,
            state: Mutex::new(State { next, ..State::default() }),
            round_over: Notify::new(),
            token: Mutex::default(),
            open_to_all: AtomicBool::new(false),
            revision: AtomicI64::new(0),
            cluster: AtomicU64::new(0),
            slow: AtomicU32::new(0),
            warned: AtomicU32::new(0),
        })
    }

    /// Sends a request until it is answered, or for certain refused. Dropped by who cannot wait any longer.
    pub(super) async fn call<Q: Call>(self: &Arc<Self>, request: Q) -> Result<Answered<Q::Answer>, Failure> {
        self.call_within(request, PATIENCE).await
    }

    /// The same for who has no time to lose: `patience` as long as others are answered in time.
    pub(super) async fn call_within<Q: Call>(
        self: &Arc<Self>,
        request: Q,
        patience: Duration,
    ) -> Result<Answered<Q::Answer>, Failure> {
        let connection = self.connection().await.map_err(Failure::not_sent)?;
        // In a box of its own: it is large, and would make everything large that calls.
        let mut first = Box::pin(self.attempt(&connection, request.clone()));
        // With one server there is no other to ask, and asking it twice would not make it faster.
        if self.endpoints.len() == 1 {
            return first.await.map(|answer| Answered { answer, alone: true });
        }
        loop {
            let slow = self.slow.load(Ordering::Relaxed);
            let sent = self.env.now();
            let patience = patience * (1 << slow.min(PATIENCE_DOUBLINGS));
            if let Some(answer) = until(&*self.env, sent + patience, &mut first).await {
                // Not at once: a server that is slow now and then would be asked twice now and then.
                self.slow.store(slow.saturating_sub(1), Ordering::Relaxed);
                return answer.map(|answer| Answered { answer, alone: true });
            }
            // A server that answers others is busy, and one that answers nobody is gone.
            if !connection.has_answered_since(sent) {
                break;
            }
        }
        if self.retire(&connection) {
            self.slow.fetch_add(1, Ordering::Relaxed);
        }
        both(first, self.again(request, patience)).await
    }

    /// The same in a box, because it calls itself.
    fn again<Q: Call>(self: &Arc<Self>, request: Q, patience: Duration) -> Called<'_, Q::Answer> {
        Box::pin(self.call_within(request, patience))
    }

    async fn attempt<Q: Call>(
        self: &Arc<Self>,
        connection: &Arc<Connection>,
        request: Q,
    ) -> Result<Q::Answer, Failure> {
        let mut renewed = false;
        loop {
            let token = self.token(connection).await?;
            let seen = self.revision.load(Ordering::Acquire);
            let sent = with_metadata(request.clone(), token.clone(), Some(self.limit));
            let answer = connection.unary::<Q, Q::Answer>(Q::PATH, sent).await;
            if !matches!(&answer, Err(failure) if failure.cause == Cause::Unknown) {
                connection.answered(self.env.now());
            }
            match answer {
                Ok(answer) => {
                    self.check::<Q>(&answer, seen).map_err(|failure| failure.at(&connection.endpoint))?;
                    return Ok(answer);
                }
                Err(failure) if failure.cause == Cause::Token && self.credentials.is_some() && !renewed => {
                    self.open_to_all.store(false, Ordering::Relaxed);
                    self.forget_token(token.as_ref());
                    renewed = true;
                }
                Err(failure) => {
                    if failure.cause == Cause::Unknown {
                        self.retire(connection);
                    }
                    return Err(failure);
                }
            }
        }
    }

    /// Holds an answer against what was seen before its request was sent.
    fn check<Q: Call>(&self, answer: &Q::Answer, seen: i64) -> Result<(), Failure> {
        let Some(header) = Q::header(answer) else { return Ok(()) };
        let wrong = |message: String| {
            // It may have been applied, to whatever this is.
            Failure { error: Error::new(ErrorKind::Incompatible, message).with_doubt(), cause: Cause::Unknown }
        };
        // Of several that begin at once the first decides.
        let known = self.cluster.compare_exchange(0, header.cluster_id, Ordering::AcqRel, Ordering::Acquire);
        if let Err(known) = known
            && known != header.cluster_id
        {
            return Err(wrong(format!(
                "this is another cluster: its id is {:x}, and it was {known:x}. Name servers of one cluster",
                header.cluster_id
            )));
        }
        if Q::LINEARIZABLE {
            if header.revision < seen {
                return Err(wrong(format!(
                    "an answer from the past: revision {} after {seen}. Was the cluster restored from a backup?",
                    header.revision
                )));
            }
            self.revision.fetch_max(header.revision, Ordering::AcqRel);
        }
        Ok(())
    }

    // ------------------------------------------------------------------------------- connections

    /// The connection that serves now, made if there is none.
    pub(super) async fn connection(self: &Arc<Self>) -> Result<Arc<Connection>, Failure> {
        let mut waited_for = None;
        loop {
            let mut over = pin!(self.round_over.notified());
            over.as_mut().enable();
            {
                let mut state = lock(&self.state);
                if let Some(current) = state.current.as_ref().filter(|current| current.is_open()) {
                    return Ok(current.clone());
                }
                if let Some(failed) =
                    state.failed.as_ref().filter(|_| waited_for.is_some_and(|round| round < state.rounds))
                {
                    return Err(failed.clone());
                }
                waited_for.get_or_insert(state.rounds);
                if !std::mem::replace(&mut state.connecting, true) {
                    self.env.spawn(Box::pin(self.clone().connect()));
                }
            }
            over.await;
        }
    }

    /// No new requests go over it, and what it carries for long has to move. Says whether it was the one that served.
    pub(super) fn retire(&self, connection: &Arc<Connection>) -> bool {
        let mut state = lock(&self.state);
        let served = state.current.as_ref().is_some_and(|current| Arc::ptr_eq(current, connection));
        if served {
            state.current = None;
            let at = self.endpoints.iter().position(|endpoint| *endpoint == connection.endpoint);
            state.next = at.map_or(0, |at| at + 1);
        }
        drop(state);
        connection.retired.cancel();
        served
    }

    /// One round: every server is tried, the preferred one first.
    async fn connect(self: Arc<Self>) {
        let closed = self.closed.clone();
        closed
            .run_until_cancelled(async {
                let (first, failures) = {
                    let state = lock(&self.state);
                    (state.next, state.failures)
                };
                if failures > 0 {
                    let longest = (Duration::from_millis(20) * 2_u32.pow(failures.min(8))).min(LONGEST_PAUSE);
                    let pause = longest / 2 + jitter(longest / 2, self.env.random());
                    self.env.sleep_until(self.env.now() + pause).await;
                }
                let count = self.endpoints.len();
                let order = (0..count).map(|at| self.endpoints[(first + at) % count].clone()).collect();
                let outcome = self.race(order).await;
                let mut state = lock(&self.state);
                (state.connecting, state.rounds) = (false, state.rounds + 1);
                match outcome {
                    Ok(connection) => (state.current, state.failed, state.failures) = (Some(connection), None, 0),
                    Err(failure) => {
                        (state.failed, state.failures) = (Some(failure), state.failures + 1);
                        state.next = first + 1;
                    }
                }
            })
            .await;
        self.round_over.notify_waiters();
    }

    async fn race(self: &Arc<Self>, order: Vec<Endpoint>) -> Result<Arc<Connection>, Failure> {
        let (mut racing, mut waiting) = (JoinSet::new(), order.into_iter());
        let mut failures: Vec<Failure> = Vec::new();
        loop {
            if let Some(endpoint) = waiting.next() {
                let client = self.clone();
                racing.spawn(async move {
                    let late = || Failure::unknown(format!("{endpoint}: no answer within {:?}", client.limit));
                    let admitted = Box::pin(client.admit(endpoint.clone()));
                    let admitted = until(&*client.env, client.env.now() + client.limit, admitted).await;
                    admitted.unwrap_or_else(|| Err(late()))
                });
            }
            let joined = async { Some(racing.join_next().await) };
            let next_one = async {
                if waiting.len() == 0 {
                    std::future::pending::<()>().await;
                }
                self.env.sleep_until(self.env.now() + STAGGER).await;
                None
            };
            match or(joined, next_one).await {
                Some(Some(Ok(Ok(connection)))) => return Ok(connection),
                Some(Some(Ok(Err(failure)))) => failures.push(failure),
                Some(Some(Err(panic))) => failures.push(Failure::unknown(panic.to_string())),
                Some(None) if waiting.len() == 0 => return Err(together(failures)),
                Some(None) | None => {}
            }
        }
    }

    /// Connects to one server and makes sure that it serves: that it lets us in, and has a leader.
    async fn admit(self: &Arc<Self>, endpoint: Endpoint) -> Result<Arc<Connection>, Failure> {
        let (env, closed) = (self.env.clone(), self.closed.clone());
        let connection = Connection::open(endpoint, self.tls.clone(), env, closed).await?;
        let status = Box::pin(self.attempt(&connection, StatusRequest {})).await;
        match status {
            Ok(status) if status.leader == 0 => Err(Failure::unknown("it has no leader").at(&connection.endpoint)),
            Ok(status) => {
                self.warn_about(&status);
                Ok(connection)
            }
            // Newer servers tell their status to administrators only. That it answers is enough: whom it lets in to do what, the
            // next request shows.
            Err(failure) if failure.error.kind() == ErrorKind::Denied && failure.cause == Cause::Refused => {
                Ok(connection)
            }
            Err(failure) => Err(failure),
        }
    }

    /// Says once what an operator should know.
    fn warn_about(&self, status: &StatusResponse) {
        let warn = |bit: u32, message: String| {
            if self.warned.fetch_or(bit, Ordering::Relaxed) & bit == 0 {
                observe::operator(&*self.env, message);
            }
        };
        if self.credentials.is_some() && !status.version.is_empty() && has_auth_holes(&status.version) {
            warn(
                1,
                format!(
                    "etcd {} has known holes in its access control: use at least 3.4.44, 3.5.30 or 3.6.11",
                    status.version
                ),
            );
        }
        if status.errors.iter().any(|error| error.contains("NOSPACE")) {
            warn(
                2,
                "etcd is out of space and refuses writes: turn on auto-compaction, compact, defragment, disarm".into(),
            );
        }
    }

    // ------------------------------------------------------------------------------- access

    /// The token to send along: had from the server when there is none, by one for all.
    pub(super) async fn token(&self, connection: &Arc<Connection>) -> Result<Option<AsciiMetadataValue>, Failure> {
        let credentials = self.credentials.as_ref().filter(|_| !self.open_to_all.load(Ordering::Relaxed));
        let Some(credentials) = credentials else { return Ok(None) };
        if let Some(token) = &*lock(&self.token) {
            return Ok(Some(token.clone()));
        }
        // One for all on this connection. Not one for all: a server that is frozen would keep the others from letting us in.
        let _one = connection.authenticating.lock().await;
        if let Some(token) = &*lock(&self.token) {
            return Ok(Some(token.clone()));
        }
        let (name, password) = (credentials.user.clone(), credentials.password.reveal().to_owned());
        let request = with_metadata(AuthenticateRequest { name, password }, None, Some(self.limit));
        let answer = connection.unary::<_, AuthenticateResponse>(AuthenticateRequest::PATH, request).await;
        match answer {
            Ok(answer) => {
                let token = AsciiMetadataValue::try_from(answer.token);
                let token = token.map_err(|_| Failure::unknown("etcd gave a token that cannot be sent"))?;
                *lock(&self.token) = Some(token.clone());
                Ok(Some(token))
            }
            Err(failure) if failure.error.message().contains("authentication is not enabled") => {
                self.open_to_all.store(true, Ordering::Relaxed);
                if self.warned.fetch_or(4, Ordering::Relaxed) & 4 == 0 {
                    observe::operator(
                        &*self.env,
                        "there is a user, and etcd lets everybody in: its auth is not enabled".into(),
                    );
                }
                Ok(None)
            }
            Err(failure) => Err(failure),
        }
    }

    /// The next request gets a new one, unless somebody else has got one meanwhile.
    pub(super) fn forget_token(&self, refused: Option<&AsciiMetadataValue>) {
        let mut token = lock(&self.token);
        if token.as_ref() == refused {
            *token = None;
        }
    }
}

/// Two copies of a request: the first that is answered counts, and an error of one is no reason not to wait for the other. If
/// both fail, it is certain that neither was applied only if both say so.
async fn both<A>(
    first: impl Future<Output = Result<A, Failure>>,
    again: impl Future<Output = Result<Answered<A>, Failure>>,
) -> Result<Answered<A>, Failure> {
    let (mut first, mut again) = (pin!(first), pin!(again));
    let answered = |answer| Answered { answer, alone: false };
    let one = or(async { Ok(first.as_mut().await) }, async { Err(again.as_mut().await) }).await;
    let (earlier, later) = match one {
        Ok(Ok(answer)) => return Ok(answered(answer)),
        Err(Ok(other)) => return Ok(answered(other.answer)),
        Ok(Err(earlier)) => (earlier, again.await.map(|other| answered(other.answer))),
        Err(Err(earlier)) => (earlier, first.await.map(answered)),
    };
    let later = match later {
        Ok(answered) => return Ok(answered),
        Err(later) => later,
    };
    // A lease that is gone is gone for every copy.
    if later.cause == Cause::NoLease || earlier.cause == Cause::NoLease {
        let (gone, _) = if later.cause == Cause::NoLease { (later, earlier) } else { (earlier, later) };
        return Err(gone);
    }
    if earlier.cause == Cause::Unknown {
        return Err(Failure { cause: Cause::Unknown, error: later.error.with_doubt() });
    }
    Err(later)
}

/// What several servers came to: what cannot be retried counts first.
fn together(mut failures: Vec<Failure>) -> Failure {
    if let Some(at) = failures.iter().position(|failure| !failure.error.is_retryable()) {
        return failures.swap_remove(at);
    }
    let told: Vec<String> = failures.iter().map(|failure| failure.error.message().to_owned()).collect();
    Failure::unknown(format!("no server of etcd can be reached: {}", told.join("; ")))
}

/// CVE-2026-44283 and those before it: who may log in may do more than he should.
fn has_auth_holes(version: &str) -> bool {
    let mut parts = version.split(['.', '-', '+']).map(|part| part.parse::<u32>().unwrap_or(0));
    let version = [parts.next(), parts.next(), parts.next()].map(|part| part.unwrap_or(0));
    version < [3, 4, 44] || ([3, 5, 0]..[3, 5, 30]).contains(&version) || ([3, 6, 0]..[3, 6, 11]).contains(&version)
}

#[cfg(test)]
mod tests {
    use futures_lite::future::block_on;

    use super::*;

    /// What one of two copies says of itself, taken for the truth about both, lets the other come in later.
    #[test]
    fn two_copies_are_refused_only_if_both_are() {
        let failed = |cause| Err::<(), _>(Failure { error: Error::unavailable("so it says"), cause });
        for (first, again, known) in [
            (Cause::Refused, Cause::NoSpace, Cause::NoSpace),
            (Cause::Refused, Cause::Unknown, Cause::Unknown),
            (Cause::Unknown, Cause::Refused, Cause::Unknown),
            (Cause::Unknown, Cause::NoSpace, Cause::Unknown),
            (Cause::NoLease, Cause::Unknown, Cause::NoLease),
            (Cause::Unknown, Cause::NoLease, Cause::NoLease),
        ] {
            let one =
                both(async { failed(first) }, async { failed(again).map(|answer| Answered { answer, alone: true }) });
            let failure = block_on(one).err().unwrap();
            assert_eq!((failure.cause, first, again), (known, first, again));
        }
        let answered = || async { Ok(Answered { answer: 2, alone: true }) };
        let late = async { Err(Failure::unknown("cut")) };
        for one in [block_on(both(late, answered())), block_on(both(std::future::pending(), answered()))] {
            assert!(one.is_ok_and(|answered| !answered.alone), "the other copy may still be applied");
        }
    }

    #[test]
    fn versions_with_holes_are_known() {
        for (version, holes) in [
            ("3.4.23", true),
            ("3.4.44", false),
            ("3.5.1", true),
            ("3.5.30", false),
            ("3.6.0-rc.1", true),
            ("3.6.11", false),
            ("3.7.0", false),
        ] {
            assert_eq!(has_auth_holes(version), holes, "{version}");
        }
    }
}
