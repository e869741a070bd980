//! What the user holds.

use std::fmt;
use std::future::{Future, poll_fn};
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use tokio_util::sync::CancellationToken;
use tracing::Instrument;

use crate::engine::{Core, Handle, Unsettled};
use crate::error::{EndReason, Error, Result};
use crate::heartbeat::Pulse;
use crate::runtime::{self, at_once, block_on, near};
use crate::signal::EndSignal;
use crate::store::{Name, Token};

/// A name that is yours, as long as [`is_held`](Self::is_held) says so.
///
/// A heartbeat keeps it. When it can no longer be proven yours, the lease ends for good, before anyone else can get the
/// name; stop the work then. Dropping it releases it in the background; [`release`](Self::release) also tells you.
///
/// ```
/// # futures_lite::future::block_on(async {
/// let manager = lease_core::Manager::open("memory:").await?;
/// let lease = manager.acquire("nightly").await?;
/// assert!(lease.is_held());
/// lease.release().await?;
/// # manager.close().await }).map_err(|e: lease_core::Error| e).unwrap();
/// ```
#[must_use = "a lease that is dropped is released"]
pub struct Lease {
    handle: Arc<Handle>,
    pulse: Arc<Pulse>,
}

/// How a lease ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Ended {
    /// Why.
    pub reason: EndReason,
}

impl fmt::Display for Ended {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.reason.fmt(f)
    }
}

impl Lease {
    pub(crate) fn new(handle: Arc<Handle>, pulse: Arc<Pulse>) -> Self {
        Self { handle, pulse }
    }

    /// The fencing token: greater than every token given before for this name. Readable after the end too.
    pub fn token(&self) -> Token {
        self.pulse.place.token
    }

    /// What is leased.
    pub fn name(&self) -> &Name {
        &self.pulse.place.claim.name
    }

    /// The text shown to others.
    pub fn owner(&self) -> &str {
        &self.pulse.place.claim.owner
    }

    /// The lifetime without renewal.
    pub fn ttl(&self) -> Duration {
        self.pulse.place.claim.ttl
    }

    /// Whether it is yours at this instant, by the clock: never true again once it was false.
    pub fn is_held(&self) -> bool {
        self.handle.core.heartbeat.check(&self.pulse).is_ok()
    }

    /// The time until it is lost unless a renewal succeeds: at most half the ttl, zero once it ended.
    pub fn remaining(&self) -> Duration {
        self.handle.core.heartbeat.check(&self.pulse).unwrap_or(Duration::ZERO)
    }

    /// Call it before each step of the work. Local: it reads a clock and asks nobody.
    ///
    /// # Errors
    /// `Lost` with the reason once the lease has ended, by whatever cause.
    pub fn check(&self) -> Result<()> {
        self.check_for("check")
    }

    fn check_for(&self, operation: &'static str) -> Result<()> {
        let checked = self.handle.core.heartbeat.check(&self.pulse);
        checked.map(drop).map_err(|reason| self.error(operation, reason))
    }

    /// Why it ended; `None` while it is held.
    pub fn end_reason(&self) -> Option<EndReason> {
        self.handle.core.heartbeat.check(&self.pulse).err()
    }

    /// Waits for the end, and says why.
    ///
    /// # Cancel safety
    /// Safe: call it as often as you like.
    pub async fn cancelled(&self) -> Ended {
        loop {
            if let Some(reason) = self.end_reason() {
                return Ended { reason };
            }
            self.pulse.ended().cancelled().await;
        }
    }

    /// [`cancelled`](Self::cancelled) that does not keep the lease: when that is dropped, it was released.
    pub fn ended(&self) -> impl Future<Output = Ended> + Send + 'static {
        // Made here: the future may be polled where nobody may be woken.
        let (pulse, ended) = (self.pulse.clone(), self.pulse.ended().clone());
        async move {
            loop {
                if let Some(reason) = pulse.end_reason() {
                    return Ended { reason };
                }
                ended.cancelled().await;
            }
        }
    }

    /// A token that is cancelled when the lease ends. Cancelling it yourself cancels only what hangs on it.
    pub fn cancellation(&self) -> CancellationToken {
        self.pulse.ended().child_token()
    }

    /// A descriptor for event loops that is readable once the lease ended, and stays so.
    ///
    /// # Errors
    /// `Limit` when no descriptor is left.
    pub fn end_signal(&self) -> Result<Arc<EndSignal>> {
        EndSignal::new(self.cancellation()).map_err(|error| error.during("end_signal", Some(self.name())))
    }

    /// Runs the work for as long as the lease is held: if it is lost first, the work is dropped.
    ///
    /// # Errors
    /// `Lost` when it was lost before the work was done, checked once more at its end.
    ///
    /// # Cancel safety
    /// Dropping it drops the work. The lease stays.
    ///
    /// ```
    /// # futures_lite::future::block_on(async {
    /// # let manager = lease_core::Manager::open("memory:").await?;
    /// let lease = manager.acquire("nightly").await?;
    /// let rows = lease.guard(async { 42 }).await?;
    /// assert_eq!(rows, 42);
    /// # Ok::<_, lease_core::Error>(()) }).unwrap();
    /// ```
    pub async fn guard<F: Future>(&self, work: F) -> Result<F::Output> {
        let (mut work, mut ended) = (pin!(work), pin!(self.pulse.ended().cancelled()));
        poll_fn(|cx| {
            // Only wakes: the clock decides, so that after a stop of the process the work makes no step.
            let _ = ended.as_mut().poll(cx);
            self.check_for("guard")?;
            work.as_mut().poll(cx).map(|output| self.check_for("guard").map(|()| output))
        })
        .await
    }

    /// Asks the store: a renewal now, whatever the schedule says.
    ///
    /// # Errors
    /// `Lost` when the store says that it is gone, or when its time was up; `Unavailable` when the store does not
    /// answer: then it is held still, until its time is up.
    ///
    /// # Cancel safety
    /// Safe: the renewal counts if it was applied and answered.
    pub async fn confirm(&self) -> Result<()> {
        self.check_for("confirm")?;
        let (core, pulse) = (self.handle.core.clone(), self.pulse.clone());
        let renewal = self.handle.core.run(async move { core.heartbeat.renew_now(&pulse).await });
        renewal.await.map_err(|error| error.during("confirm", Some(self.name())))
    }

    /// Gives the name back, at once. Finish the work first. Bounded by 5 s.
    ///
    /// # Errors
    /// `Lost` if it had been lost before; `Unavailable`, with the outcome unknown, if the store could not be told: the
    /// library keeps trying, and what it cannot delete expires.
    ///
    /// # Cancel safety
    /// Once polled, the release goes on in the background though this is dropped.
    pub async fn release(self) -> Result<()> {
        self.give_back().await
    }

    /// [`release`](Self::release) for those who share a lease. Harmless when repeated.
    ///
    /// # Errors
    /// As [`release`](Self::release).
    ///
    /// # Cancel safety
    /// Once polled, the release goes on in the background though this is dropped.
    pub async fn give_back(&self) -> Result<()> {
        let span = tracing::debug_span!("lease.release", name = ?self.name(), token = %self.token());
        match span.in_scope(|| self.end_here("release"))? {
            Some(unsettled) => self.leave(&unsettled).instrument(span).await,
            None => Ok(()),
        }
    }

    /// [`give_back`](Self::give_back) for threads.
    pub(crate) fn give_back_blocking(&self) -> Result<()> {
        let span = tracing::debug_span!("lease.release", name = ?self.name(), token = %self.token());
        let _in_span = span.enter();
        match self.end_here("release")? {
            Some(unsettled) => block_on(self.leave(&unsettled)),
            None => Ok(()),
        }
    }

    /// Ends it, and leaves if that takes no waiting; if it does, the claim is still to leave.
    fn end_here(&self, operation: &'static str) -> Result<Option<Unsettled<&Core>>> {
        let core = &*self.handle.core;
        // Before the end is known: whoever closes the manager meanwhile waits for the leaving.
        let unsettled = Unsettled::new(core);
        let end = core.heartbeat.end(&self.pulse, EndReason::Released);
        if end.reason.is_loss() {
            return Err(self.error(operation, end.reason));
        }
        // The next waiter of this process gets the name in this thread.
        let leave = || near(|| at_once(|| core.store.leave_at_once(&self.pulse.place.claim)));
        let is_left = !end.first || matches!(leave(), Some(Ok(_left_or_gone)));
        Ok((!is_left).then_some(unsettled))
    }

    async fn leave(&self, _unsettled: &Unsettled<&Core>) -> Result<()> {
        let left = self.handle.core.leave(&self.pulse.place.claim).await;
        left.map_err(|error| error.during("release", Some(self.name())))
    }

    /// What dropping it does, for those who share a lease: if it is held, it is released in the background.
    pub fn abandon(&self) {
        if self.pulse.end_reason().is_none()
            && let Ok(Some(_unsettled)) = self.end_here("drop")
        {
            self.handle.core.withdraw(&self.pulse.place.claim);
        }
    }

    /// Calls back once it has ended, for whatever reason; also when it had ended before. The calls of a manager are made on
    /// a thread for them, where they may block and call the library: a slow one delays others, and no heartbeat. Closing
    /// the manager waits for them, 5 s at most; after that they are made by this very call.
    ///
    /// # Errors
    /// `Limit` when that thread cannot be started.
    pub fn on_end(&self, callback: impl FnOnce(EndReason) + Send + 'static) -> Result<()> {
        let (core, ended) = (self.handle.core.clone(), self.ended());
        core.env.start_calls()?;
        // Closing ends every lease before it stops what could watch them.
        if let Some(reason) = self.end_reason() {
            let here = core.env.call(Box::new(move || callback(reason)));
            here.into_iter().for_each(runtime::call);
            return Ok(());
        }
        self.handle.core.env.spawn(Box::pin(async move {
            let reason = ended.await.reason;
            drop(core.env.call(Box::new(move || callback(reason))));
        }));
        Ok(())
    }

    fn error(&self, operation: &'static str, reason: EndReason) -> Error {
        Error::ended(reason, self.name()).during(operation, None)
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.abandon();
        self.handle.core.forget(&self.pulse);
    }
}

impl fmt::Debug for Lease {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut lease = f.debug_struct("Lease");
        lease.field("name", self.name()).field("token", &self.token().get());
        match self.handle.core.heartbeat.check(&self.pulse) {
            Ok(remaining) => lease.field("remaining", &remaining),
            Err(reason) => lease.field("ended", &reason),
        };
        lease.finish_non_exhaustive()
    }
}
