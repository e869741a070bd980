//! The keys of holders are watched, so that one that is evicted or deleted is noticed in milliseconds and not at the next
//! renewal. Only those that hold for longer than a moment: an acquire and its release cost nothing of it.
//!
//! A watch does not see what was before it, so the key is read once when it has begun. All that is found is a hint: whether
//! the lease is lost is for the renewal to say, which is made at once.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures_lite::future::or;
use tokio::sync::{Notify, mpsc};

use super::Members;
use super::client::Client;
use super::line::get;
use super::watch::{Told, Wanted, Watches};
use crate::clock::Moment;
use crate::runtime::{lock, together, until};
use crate::store::{ClaimId, Token};

/// From when on a holder is worth a watch.
const MOMENT: Duration = Duration::from_millis(100);
/// How long after a stream broke its watches are made anew.
const AGAIN: Duration = Duration::from_millis(500);
/// Keys that are read at once.
const BATCH: usize = 128;
/// How long they are waited for.
const LIMIT: Duration = Duration::from_secs(3);

pub(super) struct Holders {
    shared: Arc<Shared>,
    gone: tokio::sync::Mutex<mpsc::UnboundedReceiver<ClaimId>>,
}

struct Shared {
    client: Arc<Client>,
    watches: Arc<Watches>,
    members: Arc<Members>,
    /// Who is to be watched, and from when on.
    waiting: Mutex<Waiting>,
    more: Notify,
    news: mpsc::UnboundedSender<ClaimId>,
}

#[derive(Default)]
struct Waiting {
    queue: VecDeque<(Moment, ClaimId)>,
    runs: bool,
}

impl Holders {
    pub(super) fn new(client: Arc<Client>, watches: Arc<Watches>, members: Arc<Members>) -> Self {
        let (news, gone) = mpsc::unbounded_channel();
        let (waiting, more) = (Mutex::default(), Notify::new());
        let shared = Arc::new(Shared { client, watches, members, waiting, more, news });
        Self { shared, gone: tokio::sync::Mutex::new(gone) }
    }

    /// A claim holds, from now on.
    pub(super) fn add(&self, id: ClaimId) {
        self.shared.add(id, MOMENT);
    }

    /// The next one whose key may be gone though it did not leave.
    pub(super) async fn gone(&self) -> ClaimId {
        match self.gone.lock().await.recv().await {
            Some(id) => id,
            None => std::future::pending().await,
        }
    }
}

impl Shared {
    fn add(self: &Arc<Self>, id: ClaimId, after: Duration) {
        let mut waiting = lock(&self.waiting);
        // It sleeps until the first is due, and those that come later are due later, or soon after: nobody is woken for them.
        let idle = waiting.queue.is_empty();
        waiting.queue.push_back((self.client.env.now() + after, id));
        if !std::mem::replace(&mut waiting.runs, true) {
            let (this, closed) = (self.clone(), self.client.closed.clone());
            self.client.env.spawn(Box::pin(async move {
                closed.run_until_cancelled(this.run()).await;
            }));
        } else if idle {
            self.more.notify_one();
        }
    }

    async fn run(self: Arc<Self>) {
        let (tell, mut told) = mpsc::unbounded_channel();
        // Those due soon after one another are seen to together: most have left by then.
        let mut earliest = self.client.env.now();
        loop {
            let next = lock(&self.waiting).queue.front().map_or(Moment::FAR, |(at, _)| (*at).max(earliest));
            let due = async {
                or(self.client.env.sleep_until(next), self.more.notified()).await;
                None
            };
            let mut news: Vec<(ClaimId, Told)> = or(async { told.recv().await }, due).await.into_iter().collect();
            while let Ok(more) = told.try_recv() {
                news.push(more);
            }
            earliest = self.client.env.now() + MOMENT;
            self.watch_those_due(&tell);
            let mut begun = Vec::new();
            for (id, what) in news {
                match what {
                    Told::Created => begun.push(id),
                    Told::Fired => self.tell(id),
                    Told::Broken => {
                        let watch = lock(&self.members).get_mut(&id).and_then(|member| member.watched.take());
                        if watch.is_some() {
                            self.add(id, AGAIN);
                        }
                    }
                    Told::Nothing => {}
                }
            }
            for batch in begun.chunks(BATCH) {
                // Beside this: an eviction that is told meanwhile is told at once.
                let (reading, closed) = (self.clone().read(batch.to_vec()), self.client.closed.clone());
                self.client.env.spawn(Box::pin(async move {
                    closed.run_until_cancelled(reading).await;
                }));
            }
        }
    }

    fn watch_those_due(&self, tell: &mpsc::UnboundedSender<(ClaimId, Told)>) {
        let now = self.client.env.now();
        loop {
            let id = {
                let queue = &mut lock(&self.waiting).queue;
                match queue.front() {
                    Some((at, _)) if *at <= now => queue.pop_front().map(|(_, id)| id),
                    _ => None,
                }
            };
            let Some(id) = id else { return };
            // Most have left by now.
            let mut members = lock(&self.members);
            let Some(member) = members.get_mut(&id).filter(|member| member.watched.is_none()) else { continue };
            let tell = tell.clone();
            let listener = move |told| {
                let _ = tell.send((id, told));
            };
            member.watched = Some(self.watches.add(Wanted::gone(member.key.clone()), Box::new(listener)));
        }
    }

    /// Reads keys whose watches have begun. Not in a transaction: one that only reads, given up by its client, ends some servers
    /// of etcd 3.5 (etcd #14110).
    async fn read(self: Arc<Self>, ids: Vec<ClaimId>) {
        let reads = ids.into_iter().map(|id| {
            let (this, known) = (&self, lock(&self.members).get(&id).map(|member| (member.key.clone(), member.token)));
            async move {
                let Some((key, token)) = known else { return };
                let env = &this.client.env;
                let answer = until(&**env, env.now() + LIMIT, this.client.call(get(&key))).await;
                // Without an answer the next renewal tells.
                let Some(Ok(answered)) = answer else { return };
                let found = answered.answer.kvs.first().map(|kv| kv.create_revision);
                if found != token.map(Token::get) {
                    this.tell(id);
                }
            }
        });
        together(reads).await;
    }

    fn tell(&self, id: ClaimId) {
        if lock(&self.members).contains_key(&id) {
            // Who asks for no news has none.
            let _ = self.news.send(id);
        }
    }
}
