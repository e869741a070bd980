//! The etcd store: one key a claim, `prefix/<name>/<claim id>`; its token is the key's `create_revision`.
//!
//! 1. A claim **enters** by one transaction that creates its key, on an etcd lease of its own, and reads what was in the line
//!    before. Nobody there: it holds. Else it waits for its **predecessor**, and for nobody else (S7, S8).
//! 2. Its **turn** comes when the predecessor's key is gone, which a watch tells. Then it **looks**: reads its own key and the
//!    one before. Only this read, or the entering itself, makes a holder (S1): so one that was evicted meanwhile finds out.
//! 3. A **renewal** puts the key onto a fresh etcd lease, if the key was last written by us: compare-and-swap on its
//!    `mod_revision`. etcd's keep-alive is never used: it goes past the log, so an old leader says yes and then forgets (S4).
//! 4. A claim **leaves** by deleting its key, which is no other claim's (S5). An attempt to enter that was not answered may
//!    still be on its way: first the lease that it named is revoked, and then it cannot enter any more (S9).
//! 5. Who waits takes a dead predecessor away himself, when its key was not written for its ttl by his own clock: servers
//!    that never expire anything exist (S6).
//! 6. The key of a holder is watched too, so that an eviction is noticed at once.
//!
//! `line.rs` has keys and values, `grant.rs` etcd's leases, `watch.rs` the one stream, `client.rs` and `connection.rs` how
//! requests get there, `failure.rs` what errors mean, `address.rs` the URL, `holders.rs` number 6.

mod address;
mod client;
mod connection;
mod failure;
mod grant;
mod holders;
mod line;
#[allow(clippy::all, clippy::pedantic, missing_docs, unreachable_pub, dead_code)]
#[rustfmt::skip]
mod proto;
mod watch;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use foldhash::HashMap;
use futures_lite::future::or;
use tokio::sync::oneshot;

use self::address::Address;
use self::client::{Answered, Client, PATIENCE};
use self::failure::{Cause, Failure, no_space};
use self::grant::{Grant, Grants, no_lease};
use self::holders::Holders;
use self::line::{Keys, Row, created, delete, get, modified, value};
use self::proto::{PutRequest, RangeRequest, ResponseOp, StatusRequest, TxnRequest, response_op};
use self::watch::{Told, Wanted, Watches};
use crate::clock::Moment;
use crate::config::{Config, Url};
use crate::error::{Error, Result};
use crate::runtime::{Environment, lock, together, until};
use crate::store::{Ahead, Claim, ClaimId, Departure, Limits, Name, Place, Record, Renewal, Standing, Store, Token};

/// How much longer than its ttl a predecessor may be silent before it is taken away.
const TAKE_OVER: Duration = Duration::from_millis(250);
/// Renewals in one transaction: etcd takes 128 operations in a transaction, and in one that is nested in it as many less as it
/// has. A refused renewal takes two reads.
const BATCH: usize = 126;
/// How often a request is made anew with what its answer has taught.
const TRIES: usize = 4;
/// After how long who waits for a change looks though he was told nothing: a stream that dies silently costs time, not the word.
const LOOK_AGAIN: Duration = Duration::from_secs(60);
/// How long a claim that follows its manager's own holder waits for that to leave, before it enters behind it.
const FOLLOW: Duration = Duration::from_millis(50);
/// How often those who were lost are forgotten.
const SWEEP: Duration = Duration::from_secs(1);
/// Keys in one answer to a list.
const PAGE: i64 = 2_000;
/// How many of those ahead are counted one by one.
const COUNTED: i64 = 64;

/// One manager's store on an etcd.
pub struct EtcdStore {
    env: Arc<dyn Environment>,
    client: Arc<Client>,
    grants: Arc<Grants>,
    watches: Arc<Watches>,
    holders: Holders,
    keys: Keys,
    limit: Duration,
    /// The claims of this store that were sent and have not left.
    members: Arc<Members>,
    followers: Followers,
    /// When those who were lost were forgotten last.
    swept: AtomicU64,
}

/// In boxes, because a table is half empty.
type Members = Mutex<HashMap<ClaimId, Box<Member>>>;
/// By the claim that they follow.
type Followers = Mutex<HashMap<ClaimId, Follower>>;

/// A claim that enters when the manager's own holder leaves, if that is soon.
struct Follower {
    claim: Claim,
    sent: Moment,
    tell: oneshot::Sender<Result<Standing, Failure>>,
}

/// What is known of a claim of ours.
struct Member {
    key: Vec<u8>,
    ttl: Duration,
    /// Known once it has entered.
    token: Option<Token>,
    /// The last revision at which it is known to have been written.
    modified: i64,
    /// All leases that its key may hang on.
    ties: Vec<Tie>,
    /// The claim before it.
    before: Option<Box<Before>>,
    /// When it was last sent, to forget those whom nobody cares for any more.
    sent: Moment,
    /// Cancels the watch of its key.
    watched: Option<watch::Watch>,
    /// Whether it is leaving.
    leaves: bool,
}

/// A request that may have put a key onto a lease.
struct Tie {
    grant: Arc<Grant>,
    /// The `mod_revision` that it took the key to have; 0 if it was to enter.
    named: i64,
    /// How many attempts to enter named it, of which no answer is known to be about the only one.
    in_doubt: u32,
}

/// What became of a renewal.
enum Swap {
    Done,
    /// The key was last written by a renewal of ours that was not answered: to be sent again.
    OwnWrite,
    /// Certainly lost.
    Gone {
        superseded: bool,
    },
}

/// A predecessor, as it was last seen.
struct Before {
    row: Row,
    /// It has not been written since this instant, at which the store was at `seen`.
    silent_since: Moment,
    seen: i64,
}

impl EtcdStore {
    /// A store on the etcd that the URL names. Connects when it is used.
    ///
    /// # Errors
    /// `Invalid` when something is wrong with the URL, its options, or the files that they name.
    pub fn open(url: &str, env: Arc<dyn Environment>) -> Result<Arc<Self>> {
        let (config, url) = Config::of_url(url)?;
        Self::at(&url, &config, env)
    }

    pub(crate) fn at(url: &Url, config: &Config, env: Arc<dyn Environment>) -> Result<Arc<Self>> {
        let (secure, rest) = match &*url.scheme {
            "etcd" => (false, &url.raw),
            "etcds" => (true, &url.raw),
            other => return Err(Error::invalid(format!("{other}: is no etcd: write etcd:// or etcds://"))),
        };
        let address = Address::parse(secure, rest, &config.access)?;
        let keys = Keys::new(&address.prefix);
        let client = Client::new(address, config.request_timeout, env.clone());
        let (grants, watches) = (Grants::new(client.clone()), Arc::new(Watches::new(client.clone())));
        let members: Arc<Members> = Arc::default();
        let holders = Holders::new(client.clone(), watches.clone(), members.clone());
        let limit = config.request_timeout;
        Ok(Arc::new(Self {
            env,
            client,
            grants,
            watches,
            holders,
            keys,
            limit,
            members,
            followers: Mutex::default(),
            swept: AtomicU64::new(0),
        }))
    }

    /// Runs a call unless, and until, the store is closed.
    async fn while_open<T>(&self, work: impl Future<Output = Result<T, Failure>>) -> Result<T> {
        let work = self.client.closed.run_until_cancelled(work).await;
        match work {
            Some(Ok(answer)) => Ok(answer),
            // Whatever came of it: when the store is closed its watches break, and its requests fail.
            _ if self.client.closed.is_cancelled() => Err(Error::closed()),
            Some(Err(failure)) => Err(failure.into()),
            None => Err(Error::closed()),
        }
    }

    /// A request of one that waits for long: nobody else limits it.
    async fn limited<T>(&self, work: impl Future<Output = Result<T, Failure>>) -> Result<T, Failure> {
        let late = || Failure::unknown("etcd did not answer within the request timeout");
        until(&*self.env, self.env.now() + self.limit, work).await.unwrap_or_else(|| Err(late()))
    }

    // ------------------------------------------------------------------------------- entering

    async fn enter(&self, sent: Moment, claim: &Claim) -> Result<Standing, Failure> {
        let token = {
            let mut members = lock(&self.members);
            let member = members.entry(claim.id).or_insert_with(|| self.member(claim, sent));
            member.sent = member.sent.max(sent);
            member.token
        };
        if let Some(token) = token {
            // It has entered: sent again it could enter a second time.
            return self.stand(&Place { claim: claim.clone(), token }).await;
        }
        if let Some(answer) = self.enter_with_its_leave(sent, claim).await {
            return answer;
        }
        for _ in 0..TRIES {
            let grant = self.tie_entry(sent, claim).await?;
            match self.client.call(self.entering(claim, &grant)).await {
                Ok(Answered { answer, alone }) => {
                    let revision = answer.header.as_ref().map_or(0, |header| header.revision);
                    let received = self.env.now();
                    if answer.succeeded {
                        self.settle_entry(claim, &grant, alone, Some(revision));
                        return self.entered(claim, revision, received, answer.responses);
                    }
                    return self.refused_entry(claim, &grant, alone, answer.responses).await;
                }
                Err(failure) if failure.cause == Cause::NoLease => {
                    self.grants.forget(&grant);
                    self.settle_entry(claim, &grant, true, None);
                }
                Err(failure) => {
                    if failure.cause != Cause::Unknown {
                        self.settle_entry(claim, &grant, true, None);
                    }
                    return Err(failure);
                }
            }
        }
        Err(no_lease().into())
    }

    /// Waits a moment for the manager's own holder to leave, and enters by the same transaction. `None` if it does not leave.
    async fn enter_with_its_leave(&self, sent: Moment, claim: &Claim) -> Option<Result<Standing, Failure>> {
        /// Takes the offer back, however the wait for it ends.
        struct Offer<'a>(&'a Followers, ClaimId);
        impl Drop for Offer<'_> {
            fn drop(&mut self) {
                lock(self.0).remove(&self.1);
            }
        }
        let holder = claim.follows?;
        let (tell, mut told) = oneshot::channel();
        {
            let members = lock(&self.members);
            let is_first = members.get(&claim.id).is_some_and(|member| member.ties.is_empty());
            if !is_first || members.get(&holder).is_none_or(|holder| holder.leaves) {
                return None;
            }
            lock(&self.followers).insert(holder, Follower { claim: claim.clone(), sent, tell });
        }
        let offer = Offer(&self.followers, holder);
        let late = async {
            self.env.sleep_until(sent + FOLLOW).await;
            None
        };
        if let Some(answer) = or(async { Some((&mut told).await) }, late).await {
            return answer.ok();
        }
        let taken = lock(&self.followers).remove(&holder).is_none();
        drop(offer);
        // Taken in this very moment: then it is answered, or told to enter by itself.
        if taken { told.await.ok() } else { None }
    }

    /// Leaves, and enters the next claim of the manager, in one transaction. `None` if that came to nothing.
    async fn depart_and_enter(&self, leaving: &Claim, next: Follower) -> Option<Result<Departure, Failure>> {
        let Follower { claim, sent, tell } = next;
        // Without a lease at hand it would take longer to leave.
        let grant = self.grants.at_hand(claim.ttl, sent)?;
        let old = self.keys.claim(&leaving.name, leaving.id);
        let named = lock(&self.members).get(&leaving.id).map_or(0, |member| member.modified);
        self.tie(sent, &claim, &grant);
        let leave = TxnRequest {
            compare: vec![modified(&old, named)],
            success: vec![delete(&old).into()],
            failure: Vec::new(),
        };
        let mut request = self.entering(&claim, &grant);
        // First, so that what is read then shows the line without it.
        request.success.insert(0, leave.into());
        match self.client.call(request).await {
            Ok(Answered { answer, alone }) => {
                let (revision, received) = (answer.header.as_ref().map_or(0, |header| header.revision), self.env.now());
                let mut answers = answer.responses.into_iter();
                let left = matches!(
                    answers.next().and_then(|first| first.response),
                    Some(response_op::Response::ResponseTxn(first)) if first.succeeded
                );
                if !answer.succeeded {
                    // The key of the next one is there: it asks by itself.
                    return None;
                }
                self.settle_entry(&claim, &grant, alone, Some(revision));
                let entered = self.entered(&claim, revision, received, answers.collect());
                // Who does not wait for it any more makes it leave.
                let _ = tell.send(entered);
                if !left {
                    return None;
                }
                self.forget(leaving.id);
                Some(Ok(if named > 0 { Departure::Left } else { Departure::Gone }))
            }
            Err(failure) if failure.cause == Cause::Unknown => {
                let _ = tell.send(Err(failure.clone()));
                Some(Err(failure))
            }
            Err(failure) => {
                if failure.cause == Cause::NoLease {
                    self.grants.forget(&grant);
                }
                self.settle_entry(&claim, &grant, true, None);
                None
            }
        }
    }

    /// The lease that an attempt to enter names: that of the attempt before, if it is young enough. From here on it is known
    /// that the claim may hang on it.
    async fn tie_entry(&self, sent: Moment, claim: &Claim) -> Result<Arc<Grant>, Failure> {
        let again = |members: &mut HashMap<ClaimId, Box<Member>>| {
            let member = members.get_mut(&claim.id)?;
            let tie = member.ties.iter_mut().rfind(|tie| tie.grant.may_be_named(sent))?;
            tie.in_doubt += 1;
            let grant = tie.grant.clone();
            member.sent = member.sent.max(sent);
            Some(grant)
        };
        if let Some(grant) = again(&mut lock(&self.members)) {
            return Ok(grant);
        }
        let grant = self.grants.for_entry(claim.ttl, sent).await?;
        self.tie(sent, claim, &grant);
        Ok(grant)
    }

    fn tie(&self, sent: Moment, claim: &Claim, grant: &Arc<Grant>) {
        let mut members = lock(&self.members);
        let member = members.entry(claim.id).or_insert_with(|| self.member(claim, sent));
        member.sent = member.sent.max(sent);
        member.ties.push(Tie { grant: grant.clone(), named: 0, in_doubt: 1 });
    }

    fn member(&self, claim: &Claim, sent: Moment) -> Box<Member> {
        let key = self.keys.claim(&claim.name, claim.id);
        Box::new(Member {
            key,
            ttl: claim.ttl,
            token: None,
            modified: 0,
            // Seldom more than one.
            ties: Vec::with_capacity(1),
            before: None,
            sent,
            watched: None,
            leaves: false,
        })
    }

    /// An attempt to enter was answered: with the revision at which it entered, if it did.
    fn settle_entry(&self, claim: &Claim, grant: &Arc<Grant>, alone: bool, entered: Option<i64>) {
        let mut members = lock(&self.members);
        let Some(member) = members.get_mut(&claim.id) else { return };
        if let Some(revision) = entered {
            (member.token, member.modified) = (Token::try_from(revision).ok(), revision);
        }
        // The answer is about one request. If there was another that named the lease, it may still come to be applied.
        let only = |tie: &Tie| Arc::ptr_eq(&tie.grant, grant) && tie.in_doubt == 1 && alone;
        if let Some(at) = member.ties.iter().position(only) {
            if entered.is_some() {
                member.ties[at].in_doubt = 0;
            } else {
                let tie = member.ties.remove(at);
                tie.grant.free();
            }
        }
    }

    /// Create the key if it is not there, and in any case tell what was there.
    fn entering(&self, claim: &Claim, grant: &Grant) -> TxnRequest {
        let (key, line) = (self.keys.claim(&claim.name, claim.id), self.keys.line(&claim.name));
        let put = PutRequest { key: key.clone(), value: value(claim), lease: grant.id, ignore_value: false };
        let (last, first) = (line.range(true, 1), line.range(false, 1));
        if claim.queues {
            TxnRequest {
                compare: vec![created(&key, 0)],
                // A range sees what the operations before it have done: so those come before the put.
                success: vec![last.into(), first.into(), put.into()],
                failure: vec![get(&key).into()],
            }
        } else {
            TxnRequest {
                compare: vec![line.is_empty()],
                success: vec![put.into()],
                failure: vec![get(&key).into(), last.into(), first.into()],
            }
        }
    }

    fn entered(
        &self,
        claim: &Claim,
        revision: i64,
        received: Moment,
        answers: Vec<ResponseOp>,
    ) -> Result<Standing, Failure> {
        let token = Token::try_from(revision)?;
        if !claim.queues {
            self.holders.add(claim.id);
            return Ok(Standing::Head(token));
        }
        let (line, mut answers) = (self.keys.line(&claim.name), answers.into_iter());
        let (last, count) = line.rows(answers.next())?;
        let (first, _) = line.rows(answers.next())?;
        if let (Some(predecessor), Some(holder)) = (last.into_iter().next(), first.into_iter().next()) {
            let look_at = self.saw(claim.id, &predecessor, received, revision);
            return Ok(Standing::Behind(token, ahead(predecessor.token, holder, count, look_at)));
        }
        self.holders.add(claim.id);
        Ok(Standing::Head(token))
    }

    /// It did not enter: because it is in already, or because it does not queue.
    async fn refused_entry(
        &self,
        claim: &Claim,
        grant: &Arc<Grant>,
        alone: bool,
        answers: Vec<ResponseOp>,
    ) -> Result<Standing, Failure> {
        let (line, mut answers) = (self.keys.line(&claim.name), answers.into_iter());
        let (own, _) = line.rows(answers.next())?;
        if let Some(row) = own.into_iter().next() {
            if let Some(member) = lock(&self.members).get_mut(&claim.id) {
                (member.token, member.modified) = (Some(row.token), row.modified);
            }
            return self.stand(&Place { claim: claim.clone(), token: row.token }).await;
        }
        self.settle_entry(claim, grant, alone, None);
        let (last, count) = line.rows(answers.next())?;
        let (first, _) = line.rows(answers.next())?;
        match (last.into_iter().next(), first.into_iter().next()) {
            (Some(last), Some(holder)) => {
                let look_at = self.env.now() + last.ttl + TAKE_OVER;
                Ok(Standing::Busy(ahead(last.token, holder, count, look_at)))
            }
            _ => Err(Failure::unknown("etcd answered something else than was asked")),
        }
    }

    // ------------------------------------------------------------------------------- standing

    /// The claim and the one before it, in one read outside of transactions.
    async fn see(&self, place: &Place) -> Result<Option<(Option<Row>, i64)>, Failure> {
        let line = self.keys.line(&place.claim.name);
        let request = RangeRequest { max_create_revision: place.token.get(), ..line.range(true, 2) };
        let answer = self.client.call(request).await?.answer;
        let revision = answer.header.as_ref().map_or(0, |header| header.revision);
        let mut rows = answer.kvs.into_iter().map(|kv| line.read(kv));
        // Ours, and only with our token: else the next one would be a second head.
        let own = rows.next().transpose()?.filter(|row| row.id == place.claim.id && row.token == place.token);
        if own.is_none() {
            return Ok(None);
        }
        Ok(Some((rows.next().transpose()?, revision)))
    }

    async fn stand(&self, place: &Place) -> Result<Standing, Failure> {
        let (id, token) = (place.claim.id, place.token);
        loop {
            let Some((before, revision)) = self.see(place).await? else { return Ok(Standing::Lost) };
            let received = self.env.now();
            let Some(before) = before else {
                self.holders.add(id);
                return Ok(Standing::Head(token));
            };
            let look_at = self.saw(id, &before, received, revision);
            if received >= look_at {
                self.take_away(&before).await?;
                continue;
            }
            // Who holds, and how many there are. To be shown, so it may be a little older or newer.
            let line = self.keys.line(&place.claim.name);
            let request = RangeRequest { max_create_revision: token.get() - 1, ..line.range(false, COUNTED) };
            let answer = self.client.call(request).await?.answer;
            let counted = answer.kvs.len() as u64;
            let count = if answer.more { answer.count.unsigned_abs() - 1 } else { counted };
            if let Some(holder) = answer.kvs.into_iter().next() {
                return Ok(Standing::Behind(token, ahead(before.token, line.read(holder)?, count, look_at)));
            }
        }
    }

    /// Notes what stands before a claim; says when it may be taken away if it stays silent. `received` was read after the
    /// answer came, which showed the store at `revision`: so whatever is not newer was written before.
    fn saw(&self, id: ClaimId, row: &Row, received: Moment, revision: i64) -> Moment {
        let mut members = lock(&self.members);
        let mut before = Box::new(Before { row: row.clone(), silent_since: received, seen: revision });
        if let Some(member) = members.get_mut(&id) {
            if let Some(known) = member.before.take().filter(|known| row.modified <= known.seen) {
                (before.silent_since, before.seen) = (known.silent_since, known.seen);
            }
            let since = before.silent_since;
            member.before = Some(before);
            return since + row.ttl + TAKE_OVER;
        }
        received + row.ttl + TAKE_OVER
    }

    /// Deletes the key of a claim, if it was not written since it was seen.
    async fn take_away(&self, row: &Row) -> Result<(), Failure> {
        let request = TxnRequest {
            compare: vec![modified(&row.key, row.modified)],
            success: vec![delete(&row.key).into()],
            failure: Vec::new(),
        };
        self.client.call(request).await.map(drop)
    }

    async fn wait_for_turn(&self, place: &Place, ahead: &Ahead) -> Result<(), Failure> {
        let predecessor = lock(&self.members).get(&place.claim.id).and_then(|member| {
            let before = member.before.as_ref().filter(|before| before.row.token == ahead.predecessor)?;
            Some(before.row.key.clone())
        });
        // Another stands there by now, as far as is known: it has to look.
        let Some(predecessor) = predecessor else { return Ok(()) };
        let (members, env, id) = (self.members.clone(), self.env.clone(), place.claim.id);
        let written = move |revision| was_written(&members, id, revision, env.now());
        let mut watch = self.watches.awaited(Wanted::Gone { key: predecessor, written: Some(Box::new(written)) });
        if watch.told(Told::Created).await == Told::Created {
            // It may have left before the watch was there. That it exists is not the question: it is what is before us.
            match self.limited(self.see(place)).await? {
                Some((Some(before), revision)) if before.token == ahead.predecessor => {
                    self.saw(place.claim.id, &before, self.env.now(), revision);
                }
                _ => return Ok(()),
            }
        }
        match watch.told(Told::Fired).await {
            Told::Broken => Err(Failure::unknown("the stream of watches has ended")),
            _ => Ok(()),
        }
    }

    // ------------------------------------------------------------------------------- renewing

    /// Renews claims of one ttl. The order of the answers is that of the places.
    async fn renew_alike(&self, ttl: Duration, sent: Moment, places: &[&Place]) -> Vec<Result<Renewal>> {
        let grant = match self.grants.for_renewal(ttl, sent).await {
            Ok(grant) => grant,
            Err(failure) => return places.iter().map(|_| Err(failure.error.clone())).collect(),
        };
        let batches = places.chunks(BATCH).map(|batch| self.renew_batch(ttl, sent, batch, grant.clone()));
        together(batches).await.into_iter().flatten().collect()
    }

    async fn renew_batch(
        &self,
        ttl: Duration,
        sent: Moment,
        places: &[&Place],
        mut grant: Arc<Grant>,
    ) -> Vec<Result<Renewal>> {
        let mut answers: Vec<Option<Result<Renewal>>> = places.iter().map(|_| None).collect();
        for _ in 0..TRIES {
            let open: Vec<usize> = (0..places.len()).filter(|at| answers[*at].is_none()).collect();
            if open.is_empty() {
                break;
            }
            let tie = |at: &usize| {
                let (key, named) = self.tie_renewal(sent, places[*at], &grant);
                (key, named, &places[*at].claim.name)
            };
            let swaps: Vec<(Vec<u8>, i64, &Name)> = open.iter().map(tie).collect();
            let swap = |(key, named, name): &(Vec<u8>, i64, &Name)| TxnRequest {
                compare: vec![modified(key, *named)],
                success: vec![
                    PutRequest { key: key.clone(), value: Vec::new(), lease: grant.id, ignore_value: true }.into(),
                ],
                failure: vec![get(key).into(), self.keys.line(name).range(false, 1).into()],
            };
            let request =
                TxnRequest { success: swaps.iter().map(|each| swap(each).into()).collect(), ..TxnRequest::default() };
            let answer = match self.client.call_within(request, PATIENCE.min(ttl / 16)).await {
                Ok(answered) => answered.answer,
                Err(failure) if failure.cause == Cause::NoLease => {
                    self.grants.forget(&grant);
                    match self.grants.for_renewal(ttl, sent).await {
                        Ok(fresh) => grant = fresh,
                        Err(failure) => return fill(answers, &failure.error),
                    }
                    continue;
                }
                Err(failure) => return fill(answers, &failure.error),
            };
            let revision = answer.header.as_ref().map_or(0, |header| header.revision);
            for ((at, (_, named, _)), one) in open.iter().zip(&swaps).zip(answer.responses) {
                answers[*at] = match self.renewed(sent, places[*at], *named, revision, &grant, one) {
                    Ok(Swap::Done) => Some(Ok(Renewal::Renewed { confirmed: sent, offered: false })),
                    Ok(Swap::Gone { superseded }) => Some(Ok(Renewal::Lost { superseded })),
                    // Its revision is known now.
                    Ok(Swap::OwnWrite) => None,
                    Err(error) => Some(Err(error)),
                };
            }
        }
        fill(answers, &Error::unavailable("others write to the keys of this store as fast as it does").with_doubt())
    }

    /// Notes that the claim may come to hang on this lease. Its key, and the revision that it should have.
    fn tie_renewal(&self, sent: Moment, place: &Place, grant: &Arc<Grant>) -> (Vec<u8>, i64) {
        let mut members = lock(&self.members);
        let member = members.entry(place.claim.id).or_insert_with(|| {
            Box::new(Member {
                // Not entered by this store, so nothing is known of it: its token is the revision that it had at first.
                token: Some(place.token),
                modified: place.token.get(),
                ..*self.member(&place.claim, sent)
            })
        });
        if member.token != Some(place.token) {
            // No key has that one: it is asked what there is.
            return (member.key.clone(), -1);
        }
        member.sent = member.sent.max(sent);
        let known = |tie: &Tie| tie.named == member.modified && Arc::ptr_eq(&tie.grant, grant);
        if !member.ties.iter().any(known) {
            member.ties.push(Tie { grant: grant.clone(), named: member.modified, in_doubt: 0 });
        }
        (member.key.clone(), member.modified)
    }

    /// What the answer to one renewal says.
    fn renewed(
        &self,
        sent: Moment,
        place: &Place,
        named: i64,
        revision: i64,
        grant: &Arc<Grant>,
        answer: ResponseOp,
    ) -> Result<Swap> {
        let Some(response_op::Response::ResponseTxn(answer)) = answer.response else {
            return Err(Error::unavailable("etcd answered something else than was asked").with_doubt());
        };
        let line = self.keys.line(&place.claim.name);
        let swap = if answer.succeeded {
            Swap::Done
        } else {
            let mut answers = answer.responses.into_iter();
            let (found, _) = line.rows(answers.next())?;
            if let Some(row) = found.into_iter().next().filter(|row| row.token == place.token) {
                if let Some(member) = lock(&self.members).get_mut(&place.claim.id) {
                    member.modified = member.modified.max(row.modified);
                }
                Swap::OwnWrite
            } else {
                Swap::Gone { superseded: line.rows(answers.next()).is_ok_and(|(first, _)| !first.is_empty()) }
            }
        };
        let mut freed = Vec::new();
        {
            let mut members = lock(&self.members);
            let member = members.get_mut(&place.claim.id).filter(|member| member.token == Some(place.token));
            match (&swap, member) {
                // An older answer teaches nothing.
                (Swap::Done, Some(member)) if revision > member.modified => {
                    member.modified = revision;
                    member.sent = member.sent.max(sent);
                    for mut tie in std::mem::take(&mut member.ties) {
                        let holds = tie.named == named && Arc::ptr_eq(&tie.grant, grant);
                        if holds {
                            tie.named = revision;
                        }
                        // What took the key to be as it was before cannot come true any more. But an attempt to enter of which
                        // nothing is known can, once the key is gone.
                        if holds || tie.in_doubt > 0 || tie.named >= revision {
                            member.ties.push(tie);
                        } else {
                            freed.push(tie);
                        }
                    }
                }
                (Swap::Gone { .. }, Some(_)) => {
                    let gone = members.remove(&place.claim.id);
                    freed.extend(gone.into_iter().flat_map(|member| member.ties));
                }
                _ => {}
            }
        }
        free(freed);
        Ok(swap)
    }

    // ------------------------------------------------------------------------------- leaving

    async fn depart(&self, claim: &Claim) -> Result<Departure, Failure> {
        loop {
            let doubtful = lock(&self.members).get(&claim.id).and_then(|member| {
                let tie = member.ties.iter().find(|tie| tie.in_doubt > 0)?;
                Some(tie.grant.clone())
            });
            let Some(grant) = doubtful else { break };
            self.grants.revoke(grant.id).await?;
            grant.is_gone();
            if let Some(member) = lock(&self.members).get_mut(&claim.id) {
                member.ties.retain(|tie| !Arc::ptr_eq(&tie.grant, &grant));
            }
        }
        // Every attempt of its to enter was refused for certain, or not even sent: then it is not there.
        let never_entered = |member: &Member| member.token.is_none() && member.ties.is_empty();
        if lock(&self.members).get(&claim.id).is_some_and(|member| never_entered(member)) {
            self.forget(claim.id);
            return Ok(Departure::Gone);
        }
        let next = {
            let mut members = lock(&self.members);
            if let Some(member) = members.get_mut(&claim.id) {
                // Who comes later does not wait for it.
                member.leaves = true;
            }
            lock(&self.followers).remove(&claim.id)
        };
        if let Some(next) = next
            && let Some(departed) = self.depart_and_enter(claim, next).await
        {
            return departed;
        }
        let key = self.keys.claim(&claim.name, claim.id);
        let mut named = lock(&self.members).get(&claim.id).map_or(0, |member| member.modified);
        for _ in 0..TRIES {
            let request = TxnRequest {
                compare: vec![modified(&key, named)],
                success: vec![delete(&key).into()],
                failure: vec![get(&key).into()],
            };
            let answer = match self.client.call(request).await {
                Ok(answered) => answered.answer,
                Err(failure) if failure.cause == Cause::NoSpace => return self.depart_without_space(claim).await,
                Err(failure) => return Err(failure),
            };
            if !answer.succeeded {
                // Renewed meanwhile, or entered without our knowing. If it is no claim any more, it is not ours to delete.
                let (found, _) = self.keys.line(&claim.name).rows(answer.responses.into_iter().next())?;
                named = found.first().map_or(0, |row| row.modified);
                continue;
            }
            self.forget(claim.id);
            return Ok(if named > 0 { Departure::Left } else { Departure::Gone });
        }
        Err(Failure::unknown("its key is written as fast as it can be deleted"))
    }

    /// A server that is full refuses transactions, and may do a plain delete.
    async fn depart_without_space(&self, claim: &Claim) -> Result<Departure, Failure> {
        let key = self.keys.claim(&claim.name, claim.id);
        let found = self.client.call(get(&key)).await?.answer.kvs.into_iter().next();
        if found.map(|kv| self.keys.line(&claim.name).read(kv)).transpose()?.is_none() {
            self.forget(claim.id);
            return Ok(Departure::Gone);
        }
        self.client.call(delete(&key)).await?;
        self.forget(claim.id);
        Ok(Departure::Left)
    }

    /// The claim is not in the line, for certain.
    fn forget(&self, id: ClaimId) {
        let gone = lock(&self.members).remove(&id);
        free(gone.into_iter().flat_map(|member| member.ties));
    }

    /// Forgets claims that nobody renews and nobody makes leave: they were lost, and are gone by now.
    fn forget_the_lost(&self, now: Moment) {
        let before = self.swept.load(Ordering::Relaxed);
        if now.since(Moment::from_nanos(before)) < SWEEP {
            return;
        }
        self.swept.store(now.as_nanos(), Ordering::Relaxed);
        let mut lost = Vec::new();
        lock(&self.members).retain(|_, member| {
            let kept = now <= member.sent + member.ttl * 2;
            if !kept {
                lost.append(&mut member.ties);
            }
            kept
        });
    }

    // ------------------------------------------------------------------------------- others

    async fn head(&self, name: &Name) -> Result<Option<(Row, u64)>, Failure> {
        let line = self.keys.line(name);
        let answer = self.client.call(line.range(false, 1)).await?.answer;
        let head = answer.kvs.into_iter().next().map(|kv| line.read(kv)).transpose()?;
        Ok(head.map(|head| (head, answer.count.unsigned_abs())))
    }

    fn record(name: Name, head: Row, count: u64) -> Record {
        let held_for = head.age_by_wall_clock();
        Record::new(name, head.token, head.owner, held_for, head.ttl, count - 1)
    }

    async fn list_all(&self, prefix: &str) -> Result<Vec<Record>, Failure> {
        let span = self.keys.lines(prefix);
        let mut request = RangeRequest {
            key: span.first.clone(),
            range_end: span.end.clone(),
            limit: PAGE,
            ..RangeRequest::default()
        };
        let mut lines: Vec<(Name, Row, u64)> = Vec::new();
        loop {
            let answer = self.client.call(request.clone()).await?.answer;
            // All pages as of the first.
            if request.revision == 0 {
                request.revision = answer.header.as_ref().map_or(0, |header| header.revision);
            }
            for kv in answer.kvs {
                request.key = [&*kv.key, b"\0"].concat();
                let row = Row::read(kv)?;
                let name = self.keys.name_of(&row)?;
                match lines.last_mut().filter(|(last, ..)| *last == name) {
                    Some((_, head, count)) => {
                        *count += 1;
                        if row.token < head.token {
                            *head = row;
                        }
                    }
                    None => lines.push((name, row, 1)),
                }
            }
            if !answer.more {
                break;
            }
        }
        let mut records: Vec<_> = lines.into_iter().map(|(name, row, count)| Self::record(name, row, count)).collect();
        // The order of the keys is another: names are escaped there.
        records.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(records)
    }

    async fn wait_for_change(&self, name: &Name, seen: Option<Token>) -> Result<(), Failure> {
        // A stream that breaks is made anew. One that breaks again is a trouble to be told.
        for _ in 0..2 {
            let head = self.limited(self.head(name)).await?.map(|(head, _)| head);
            if head.as_ref().map(|head| head.token) != seen {
                return Ok(());
            }
            let wanted = head.map_or_else(|| Wanted::Entered(self.keys.line(name)), |head| Wanted::gone(head.key));
            let mut watch = self.watches.awaited(wanted);
            if watch.told(Told::Created).await == Told::Created
                && self.limited(self.head(name)).await?.map(|(head, _)| head.token) != seen
            {
                return Ok(());
            }
            if watch.told(Told::Fired).await != Told::Broken {
                return Ok(());
            }
        }
        Err(Failure::unknown("the stream of watches has ended"))
    }

    async fn remove(&self, name: &Name, token: Token) -> Result<bool, Failure> {
        let line = self.keys.line(name);
        let request =
            RangeRequest { min_create_revision: token.get(), max_create_revision: token.get(), ..line.range(false, 1) };
        let found = self.client.call(request).await?.answer.kvs.into_iter().next();
        let Some(row) = found.map(|kv| line.read(kv)).transpose()? else { return Ok(false) };
        let request = TxnRequest {
            compare: vec![created(&row.key, token.get())],
            success: vec![delete(&row.key).into()],
            failure: Vec::new(),
        };
        let Answered { answer, alone } = self.client.call(request).await?;
        if !answer.succeeded && !alone {
            // Another copy of the request may have done it.
            return Err(Failure::unknown("the claim is gone, perhaps by this call"));
        }
        Ok(answer.succeeded)
    }
}

impl std::fmt::Debug for EtcdStore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("EtcdStore").field("closed", &self.client.closed.is_cancelled()).finish_non_exhaustive()
    }
}

/// The predecessor of a claim was written at that revision, which was told now: so it is silent since now at the earliest.
fn was_written(members: &Members, id: ClaimId, revision: i64, now: Moment) {
    if let Some(before) = lock(members).get_mut(&id).and_then(|member| member.before.as_mut())
        && before.seen < revision
    {
        (before.row.modified, before.silent_since, before.seen) = (revision, now, revision);
    }
}

/// What hung on these leases does not any more. One that an attempt to enter named is another's next, if that attempt is over; if
/// not, it is revoked, which makes the attempt harmless.
fn free(ties: impl IntoIterator<Item = Tie>) {
    for tie in ties {
        if tie.named == 0 && tie.in_doubt == 0 {
            tie.grant.free();
        }
    }
}

fn ahead(predecessor: Token, holder: Row, count: u64, look_at: Moment) -> Ahead {
    Ahead { predecessor, count, holder: holder.token, owner: holder.owner, look_at }
}

/// The answers, with an error for those that there are none for.
fn fill(answers: Vec<Option<Result<Renewal>>>, error: &Error) -> Vec<Result<Renewal>> {
    answers.into_iter().map(|answer| answer.unwrap_or_else(|| Err(error.clone()))).collect()
}

#[async_trait]
impl Store for EtcdStore {
    fn limits(&self) -> Limits {
        Limits { min_ttl: Duration::from_secs(2), slack: Duration::from_millis(500) }
    }

    fn answers_at_once(&self) -> bool {
        false
    }

    /// The lease of an attempt to enter lasts for a third longer than the ttl, in whole seconds, and etcd looks for what has
    /// expired every half second.
    fn gone_after(&self, ttl: Duration) -> Duration {
        ttl + ttl / 3 + Duration::from_secs(2)
    }

    async fn claim(&self, sent: Moment, claim: &Claim) -> Result<Standing> {
        self.forget_the_lost(sent);
        self.while_open(self.enter(sent, claim)).await
    }

    async fn turn(&self, place: &Place, ahead: &Ahead) -> Result<()> {
        let late = async {
            self.env.sleep_until(ahead.look_at).await;
            Ok(())
        };
        self.while_open(or(self.wait_for_turn(place, ahead), late)).await
    }

    async fn look(&self, place: &Place) -> Result<Standing> {
        self.while_open(self.stand(place)).await
    }

    async fn renew(&self, sent: Moment, places: &[Place]) -> Vec<Result<Renewal>> {
        self.forget_the_lost(sent);
        let mut ttls: Vec<Duration> = places.iter().map(|place| place.claim.ttl).collect();
        ttls.sort_unstable();
        ttls.dedup();
        let mut answers: Vec<Option<Result<Renewal>>> = places.iter().map(|_| None).collect();
        for ttl in ttls {
            let alike: Vec<usize> = (0..places.len()).filter(|at| places[*at].claim.ttl == ttl).collect();
            let of_them: Vec<&Place> = alike.iter().map(|at| &places[*at]).collect();
            let renewed = self.while_open(async { Ok(self.renew_alike(ttl, sent, &of_them).await) }).await;
            let renewed = renewed.unwrap_or_else(|error| alike.iter().map(|_| Err(error.clone())).collect());
            for (at, answer) in alike.into_iter().zip(renewed) {
                answers[at] = Some(answer);
            }
        }
        fill(answers, &Error::closed())
    }

    async fn leave(&self, claim: &Claim) -> Result<Departure> {
        self.while_open(self.depart(claim)).await
    }

    async fn inspect(&self, name: &Name) -> Result<Option<Record>> {
        let head = self.while_open(self.head(name)).await?;
        Ok(head.map(|(head, count)| Self::record(name.clone(), head, count)))
    }

    async fn list(&self, prefix: &str) -> Result<Vec<Record>> {
        self.while_open(self.list_all(prefix)).await
    }

    async fn changed(&self, name: &Name, seen: Option<Token>) -> Result<()> {
        let late = async {
            self.env.sleep_until(self.env.now() + LOOK_AGAIN).await;
            Ok(())
        };
        self.while_open(or(self.wait_for_change(name, seen), late)).await
    }

    async fn evict(&self, name: &Name, token: Token) -> Result<bool> {
        self.while_open(self.remove(name, token)).await
    }

    async fn gone(&self) -> ClaimId {
        self.holders.gone().await
    }

    async fn ping(&self) -> Result<()> {
        self.while_open(async {
            let read = RangeRequest { count_only: true, ..self.keys.lines("").range(false, 1) };
            self.client.call(read).await?;
            match self.client.call(StatusRequest {}).await {
                // It answers, and takes no claim.
                Ok(status) if status.answer.errors.iter().any(|error| error.contains("NOSPACE")) => Err(no_space()),
                // Whom it does not tell its status may still use it.
                Ok(_) | Err(_) => Ok(()),
            }
        })
        .await
    }

    /// Claims stay until they expire: only `leave` says that the work has stopped.
    async fn close(&self) {
        // Whoever has no time to wait for it closes all the same.
        let _closed = self.client.closed.clone().drop_guard();
        if !self.client.closed.is_cancelled() {
            self.grants.close(self.env.now() + self.limit.min(Duration::from_secs(2))).await;
            self.client.closed.cancel();
            lock(&self.members).clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runtime::system;

    /// Forgotten is revoked. Who was lost at half its ttl may work until it has expired, and then it would be kept for ever.
    #[test]
    fn a_claim_that_nobody_cares_for_is_forgotten_once_it_is_gone() {
        let store = EtcdStore::open("etcd://127.0.0.1/p", system().unwrap()).unwrap();
        let (name, ttl) = (Name::new("n").unwrap(), Duration::from_secs(6));
        let claim = Claim { name, id: ClaimId(7), ttl, owner: "test".into(), queues: true, follows: None };
        let sent = store.env.now();
        lock(&store.members).insert(claim.id, store.member(&claim, sent));
        let kept = |now| {
            store.forget_the_lost(now);
            lock(&store.members).contains_key(&claim.id)
        };
        let gone = sent + store.gone_after(ttl);
        assert!(kept(gone), "its key may still be there");
        assert!(!kept(gone + ttl), "it is known for ever");
    }
}
