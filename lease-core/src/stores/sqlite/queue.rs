//! Who runs a transaction, and when: the caller itself if nobody has to wait, else the store's thread, many at a time.
//!
//! Invariant (S9): the requests of one store are applied in the order of their calls, but for renewals. One that runs on
//! its caller's thread found the queue empty with the database locked, so everything before it is committed or was
//! given up; a request that was given up in the queue is never applied. So no attempt to enter outlives its `leave`.

use std::collections::{HashMap, VecDeque};
use std::future::Future;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, TryLockError, Weak};
use std::time::Duration;

use futures_lite::future::{block_on, or};
use rustix::event::{PollFd, PollFlags, poll};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::oneshot;
use tokio_util::sync::{CancellationToken, DropGuard};
use tokio_util::task::TaskTracker;

use super::bell::Bell;
use super::database::{self, BATCH, Database, Session};
use super::failure::Failure;
use super::line::{Effects, Peer, Transaction};
use super::process::Watch;
use crate::clock::Moment;
use crate::error::{Error, Result};
use crate::runtime::{Environment, Task, Thread, lock, near};
use crate::store::Name;

/// Before claims of the dead, which could not be removed, are tried again.
const PAUSE: Duration = Duration::from_millis(100);

/// What the callers of one store, its thread and its tasks share.
pub(super) struct Shared {
    pub(super) env: Arc<dyn Environment>,
    pub(super) bell: Bell,
    /// `None` once it is closed.
    database: Mutex<Option<Database>>,
    queue: Mutex<Queue>,
    /// The offers that this store made and has not seen the end of.
    offers: Mutex<HashMap<Name, Moment>>,
    /// The managers that are waited for, and those who wait.
    attended: Mutex<HashMap<Peer, Weak<DropGuard>>>,
    tasks: TaskTracker,
    closed: CancellationToken,
    pub(super) path: PathBuf,
    checkpoint: Mutex<Option<Thread>>,
    thread: Mutex<Option<Thread>>,
}

#[derive(Default)]
struct Queue {
    renewals: VecDeque<Box<dyn Request>>,
    others: VecDeque<Box<dyn Request>>,
    stopped: bool,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Urgency {
    /// Goes before all that are not.
    Renewal,
    Other,
}

/// A queued call.
trait Request: Send {
    fn is_given_up(&self) -> bool;
    fn run(&mut self, transaction: &mut Transaction<'_>) -> Result<(), Failure>;
    fn reply(self: Box<Self>, outcome: Result<(), Error>);
}

struct Queued<T, W> {
    work: Option<W>,
    answer: Option<T>,
    caller: oneshot::Sender<Result<T>>,
}

impl<T: Send, W: FnOnce(&mut Transaction<'_>) -> Result<T, Failure> + Send> Request for Queued<T, W> {
    fn is_given_up(&self) -> bool {
        self.caller.is_closed()
    }

    fn run(&mut self, transaction: &mut Transaction<'_>) -> Result<(), Failure> {
        let work = self.work.take().expect("run once");
        self.answer = Some(work(transaction)?);
        Ok(())
    }

    fn reply(self: Box<Self>, outcome: Result<(), Error>) {
        let Self { answer, caller, .. } = *self;
        drop(caller.send(outcome.map(|()| answer.expect("run before"))));
    }
}

impl Shared {
    pub(super) fn start(env: Arc<dyn Environment>, bell: Bell, database: Database) -> Result<Arc<Self>> {
        let shared = Arc::new(Self {
            env,
            bell,
            queue: Mutex::default(),
            offers: Mutex::default(),
            attended: Mutex::default(),
            tasks: TaskTracker::new(),
            closed: CancellationToken::new(),
            path: database.gate.path.clone(),
            checkpoint: Mutex::new(None),
            database: Mutex::new(Some(database)),
            thread: Mutex::new(None),
        });
        let this = shared.clone();
        *lock(&shared.thread) = Some(Thread::spawn("lease-sqlite", move || this.work())?);
        Ok(shared)
    }

    /// Runs the work in a transaction and answers once it is committed.
    pub(super) async fn call<T, W>(self: &Arc<Self>, urgency: Urgency, work: W) -> Result<T>
    where
        T: Send + 'static,
        W: FnOnce(&mut Transaction<'_>) -> Result<T, Failure> + Send + 'static,
    {
        let work = match self.run_here(work) {
            Ok(answer) => return answer,
            Err(work) => work,
        };
        let (caller, answered) = oneshot::channel();
        self.enqueue(urgency, Box::new(Queued { work: Some(work), answer: None, caller }));
        answered.await.unwrap_or_else(|_| Err(Error::closed()))
    }

    /// Runs it on this thread if that takes no waiting; gives it back if it does.
    pub(super) fn run_here<T, W>(self: &Arc<Self>, work: W) -> Result<Result<T>, W>
    where
        W: FnOnce(&mut Transaction<'_>) -> Result<T, Failure>,
    {
        if self.env.is_library_thread() {
            return Err(work);
        }
        let mut database = match self.database.try_lock() {
            Ok(database) => database,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return Err(work),
        };
        if !lock(&self.queue).is_empty() {
            return Err(work);
        }
        let Some(Database { gate, session }) = &mut *database else { return Ok(Err(Error::closed())) };
        if !session.is_connected() {
            // Making tables waits for the disk.
            return Err(work);
        }
        let Some(entered) = gate.try_enter() else { return Err(work) };
        let outcome = session.transact(gate, &entered, &*self.env, &self.bell.name, work);
        drop(entered);
        self.checkpoint_if_due(session);
        drop(database);
        Ok(outcome.map_err(|failure| self.error(failure)).map(|(answer, effects)| {
            self.announce(effects);
            answer
        }))
    }

    fn error(&self, failure: Failure) -> Error {
        Error::from(failure).at(self.path.display())
    }

    fn enqueue(&self, urgency: Urgency, request: Box<dyn Request>) {
        let mut queue = lock(&self.queue);
        // Dropping the request answers it: closed.
        if !queue.stopped {
            match urgency {
                Urgency::Renewal => queue.renewals.push_back(request),
                Urgency::Other => queue.others.push_back(request),
            }
            self.wake();
        }
    }

    /// Wakes the store's thread.
    fn wake(&self) {
        if let Some(bell) = self.bell.socket() {
            // Full is as good as written.
            let _ = rustix::io::write(&bell.wake, &1_u64.to_ne_bytes());
        }
    }

    /// The store's thread.
    fn work(self: &Arc<Self>) {
        let _ended = Ended(self);
        self.bell.remove_stale(&self.path);
        while self.wait_for_work() {
            self.serve();
        }
    }

    /// `false` when there will be none any more.
    fn wait_for_work(&self) -> bool {
        loop {
            {
                let queue = lock(&self.queue);
                if queue.stopped || !queue.is_empty() {
                    return !queue.stopped;
                }
            }
            // It is closed by this thread, at its end.
            let Some(bell) = self.bell.socket() else { return false };
            let both =
                [bell.wake.as_fd(), bell.datagrams.as_fd()].map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN));
            // No error is left but to be interrupted.
            let _ = poll(&mut { both }, None);
            let _ = rustix::io::read(&bell.wake, &mut [0; 8]);
            near(|| self.bell.hear_all(&bell));
        }
    }

    /// Runs what is queued as one transaction: one commit for all of it.
    fn serve(self: &Arc<Self>) {
        let mut database = lock(&self.database);
        let Some(Database { gate, session }) = &mut *database else { return };
        if lock(&self.queue).is_empty() {
            return;
        }
        let entered = gate.enter();
        // Taken when nothing has to be waited for any more: who gave up while the gate was closed leaves no trace.
        let mut batch = lock(&self.queue).take();
        let outcome = entered.and_then(|entered| {
            let all = |transaction: &mut Transaction<'_>| batch.iter_mut().try_for_each(|one| one.run(transaction));
            session.transact(gate, &entered, &*self.env, &self.bell.name, all)
        });
        self.checkpoint_if_due(session);
        drop(database);
        match outcome.map_err(|failure| self.error(failure)) {
            Ok(((), effects)) => {
                // First those of other processes: they can run beside this thread.
                self.announce(effects);
                near(|| batch.into_iter().for_each(|one| one.reply(Ok(()))));
            }
            Err(error) => near(|| batch.into_iter().for_each(|one| one.reply(Err(error.clone())))),
        }
    }

    /// Moves the log into the file, on a thread of its own: it waits for the disk, and nobody waits for it.
    fn checkpoint_if_due(self: &Arc<Self>, session: &mut Session) {
        let mut running = lock(&self.checkpoint);
        if !session.is_checkpoint_due() || running.as_ref().is_some_and(|thread| !thread.is_finished()) {
            return;
        }
        let this = self.clone();
        let started = Thread::spawn("lease-wal", move || {
            if let Err(error) = this.checkpoint().map_err(Error::from) {
                this.env.log(Box::new(move || tracing::warn!(%error, "the log was not moved into the database file")));
            }
        });
        *running = started.ok();
    }

    fn checkpoint(&self) -> Result<(), Failure> {
        if database::checkpoint(&self.path)? {
            return Ok(());
        }
        match &*lock(&self.database) {
            Some(Database { gate, .. }) => {
                let _entered = gate.enter()?;
                database::checkpoint(&self.path).map(drop)
            }
            None => Ok(()),
        }
    }

    fn announce(self: &Arc<Self>, effects: Effects) {
        for (bell, ring) in effects.rings {
            self.bell.ring(&bell, &ring);
        }
        for (name, end) in effects.offers {
            // One task a name, however often it changes hands.
            if lock(&self.offers).insert(name.clone(), end).is_none() {
                let this = self.clone();
                self.spawn(async move { this.pass_on(name).await });
            }
        }
    }

    /// Looks once when the offer of a name has ended. An untaken one passes to the next, which is another offer.
    async fn pass_on(self: &Arc<Self>, name: Name) {
        loop {
            let end = lock(&self.offers).get(&name).copied().unwrap_or_else(|| self.env.now());
            if self.wait(std::future::pending(), end).await.is_err() {
                return;
            }
            let mut offers = lock(&self.offers);
            if offers.get(&name).is_none_or(|end| *end <= self.env.now()) {
                offers.remove(&name);
                break;
            }
        }
        // If it fails, the waiters look when their own time comes.
        drop(self.call(Urgency::Other, move |line| line.settle(&name, None).map(drop)).await);
    }

    /// Watches the process of a manager as long as anybody keeps what this returns, and removes its claims when it dies.
    pub(super) fn attend(self: &Arc<Self>, peer: Peer) -> Arc<DropGuard> {
        let mut attended = lock(&self.attended);
        attended.retain(|_, kept| kept.strong_count() > 0);
        if let Some(kept) = attended.get(&peer).and_then(Weak::upgrade) {
            return kept;
        }
        let needed = CancellationToken::new();
        let kept = Arc::new(needed.clone().drop_guard());
        attended.insert(peer.clone(), Arc::downgrade(&kept));
        let this = self.clone();
        self.spawn(async move {
            or(or(this.closed.cancelled(), needed.cancelled()), this.bury(peer)).await;
        });
        kept
    }

    async fn bury(self: &Arc<Self>, peer: Peer) {
        match peer.process.watch() {
            Watch::Gone => {}
            Watch::Alive(pidfd) => {
                #[expect(
                    deprecated,
                    reason = "sound for a descriptor that nobody replaces; its successor is an unsafe fn"
                )]
                let Ok(pidfd) = AsyncFd::with_interest(pidfd, Interest::READABLE) else { return };
                if pidfd.readable().await.is_err() {
                    return;
                }
            }
            // Nobody sees it die: its claims last until their deadlines.
            Watch::Unknown => return,
        }
        loop {
            let gone = peer.clone();
            match self.call(Urgency::Other, move |line| line.remove_all_of(&gone)).await {
                Ok(true) => {}
                // It may have left, and died before it rang.
                Ok(false) => return self.bell.wake_all(),
                Err(_) => self.env.sleep_until(self.env.now() + PAUSE).await,
            }
        }
    }

    /// Resolves when it is rung, at `at`, or, as an error, when the store is closed.
    pub(super) async fn wait(&self, rung: impl Future<Output = ()>, at: Moment) -> Result<()> {
        let closed = async {
            self.closed.cancelled().await;
            Err(Error::closed())
        };
        let rung_or_late = async {
            or(rung, self.env.sleep_until(at)).await;
            Ok(())
        };
        or(closed, rung_or_late).await
    }

    fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        let task: Task = Box::pin(self.tasks.track_future(task));
        self.env.spawn(task);
    }

    pub(super) async fn close(self: &Arc<Self>) {
        self.closed.cancel();
        let offers: Vec<Name> = lock(&self.offers).drain().map(|(name, _)| name).collect();
        if !offers.is_empty() {
            let hand_over =
                move |line: &mut Transaction<'_>| offers.iter().try_for_each(|name| line.hand_over_offer(name));
            // If it fails, they look when their own time comes.
            drop(self.call(Urgency::Other, hand_over).await);
        }
        self.stop();
        let thread = lock(&self.thread).take();
        if let Some(thread) = thread {
            thread.join().await;
        }
        self.tasks.wait().await;
    }

    /// Asks everything to end, without waiting for it.
    pub(super) fn stop(&self) {
        self.closed.cancel();
        self.tasks.close();
        lock(&self.queue).stopped = true;
        self.wake();
    }
}

impl Queue {
    fn is_empty(&self) -> bool {
        self.renewals.is_empty() && self.others.is_empty()
    }

    /// What goes into the next transaction: renewals first.
    fn take(&mut self) -> Vec<Box<dyn Request>> {
        let mut batch = Vec::new();
        while batch.len() < BATCH
            && let Some(request) = self.renewals.pop_front().or_else(|| self.others.pop_front())
        {
            if !request.is_given_up() {
                batch.push(request);
            }
        }
        batch
    }
}

/// However the thread ends: what is queued is answered, and the file is closed.
struct Ended<'a>(&'a Shared);

impl Drop for Ended<'_> {
    fn drop(&mut self) {
        let queued = {
            let mut queue = lock(&self.0.queue);
            queue.stopped = true;
            (std::mem::take(&mut queue.renewals), std::mem::take(&mut queue.others))
        };
        drop(queued);
        let database = lock(&self.0.database).take();
        if let Some(checkpoint) = lock(&self.0.checkpoint).take() {
            block_on(checkpoint.join());
        }
        if let Some(Database { gate, .. }) = database {
            gate.disconnect();
        }
        // Last: what was committed has been rung.
        self.0.bell.close();
    }
}
