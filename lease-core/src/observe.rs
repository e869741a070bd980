//! Logs and figures. Everything here runs where user code may run: a slow subscriber costs lines, never a heartbeat.

use std::fmt::{self, Write};
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;

use tracing::Event;
use tracing::field::{Field, Visit};
use tracing::level_filters::LevelFilter;

use crate::clock::Moment;
use crate::error::{EndReason, Error};
use crate::line::Waiting;
use crate::runtime::Environment;
use crate::store::{Name, Place, Token};

/// What the gauges show, of all managers of this process: counted here, because a figure may be dropped on its way.
static HELD: AtomicI64 = AtomicI64::new(0);
static WAITERS: AtomicI64 = AtomicI64::new(0);

/// Whether somebody listens for details. One atomic load: no subscriber is asked.
fn details() -> bool {
    cfg!(feature = "metrics") || LevelFilter::current() >= LevelFilter::DEBUG
}

fn detail(env: &dyn Environment, place: &Place, tell: impl FnOnce(Name, Token) + Send + 'static) {
    if details() {
        let (name, token) = (place.claim.name.clone(), place.token);
        env.log(Box::new(move || tell(name, token)));
    }
}

/// A claim became a lease; [`ended`] follows, however it ends.
pub(crate) fn holds() {
    HELD.fetch_add(1, Ordering::Relaxed);
}

pub(crate) fn granted(env: &dyn Environment, place: &Place, waited: Duration) {
    detail(env, place, move |name, token| {
        tracing::debug!(?name, %token, ?waited, "acquired");
        #[cfg(feature = "metrics")]
        {
            metrics::histogram!("lease.acquire.duration").record(waited);
            gauges();
        }
    });
}

/// A lease ended.
pub(crate) fn ended(env: &dyn Environment, place: &Place, held_at: Moment, reason: EndReason) {
    HELD.fetch_sub(1, Ordering::Relaxed);
    let held_for = if details() { env.now().since(held_at) } else { Duration::ZERO };
    detail(env, place, move |name, token| {
        tracing::debug!(?name, %token, ?held_for, %reason, "ended");
        #[cfg(feature = "metrics")]
        {
            metrics::histogram!("lease.hold.duration").record(held_for);
            gauges();
        }
    });
    if reason.is_loss() {
        let (name, token) = (place.claim.name.clone(), place.token);
        env.log(Box::new(move || {
            tracing::warn!(?name, %token, %reason, "lease lost: the work under it must stop");
            #[cfg(feature = "metrics")]
            metrics::counter!("lease.losses", "reason" => reason.name()).increment(1);
        }));
    }
}

/// `headroom` is the ttl that was left when the answer came: the early warning.
pub(crate) fn renewed(env: &dyn Environment, place: &Place, took: Duration, headroom: Duration) {
    detail(env, place, move |name, token| {
        tracing::debug!(?name, %token, ?took, ?headroom, "renewed");
        #[cfg(feature = "metrics")]
        {
            metrics::histogram!("lease.renew.duration").record(took);
            metrics::histogram!("lease.renew.headroom").record(headroom);
        }
    });
}

pub(crate) fn not_renewed(env: &dyn Environment, place: &Place, error: &Error) {
    let error = error.to_string();
    detail(env, place, move |name, token| tracing::debug!(?name, %token, %error, "renewal failed; trying again"));
}

/// Why a lease is about to be lost that nobody took.
pub(crate) fn incompatible(env: &dyn Environment, place: &Place, error: &Error) {
    let (name, error) = (place.claim.name.clone(), error.to_string());
    env.log(Box::new(move || tracing::warn!(?name, %error, "the store is not the one that keeps the lease")));
}

pub(crate) fn retrying(env: &dyn Environment, name: &Name, error: &Error) {
    let (name, error) = (name.clone(), error.to_string());
    env.log(Box::new(move || tracing::warn!(?name, %error, "the store does not answer; acquire keeps trying")));
}

/// What who runs the store should know.
#[cfg(feature = "etcd")]
pub(crate) fn operator(env: &dyn Environment, message: String) {
    env.log(Box::new(move || tracing::warn!("{message}")));
}

/// Somebody has waited for long.
pub(crate) fn waiting(env: &dyn Environment, waiting: &Waiting) {
    let Waiting { name, holder, place } = waiting.clone();
    env.log(Box::new(move || {
        if let Some(holder) = holder {
            tracing::info!(?name, holder = holder.owner, token = %holder.token, place, "acquire waits for the holder");
        } else {
            tracing::info!(?name, place, "acquire waits, and it is not known for whom");
        }
    }));
}

pub(crate) fn own_holder(name: &Name, token: Token, held_for: Duration) {
    tracing::warn!(
        ?name, %token,
        "acquire waits for a lease held by this process since {held_for:.1?} ago: leases are not re-entrant"
    );
}

pub(crate) fn not_left(env: &dyn Environment, name: &Name, error: &Error) {
    let (name, error) = (name.clone(), error.to_string());
    env.log(Box::new(move || tracing::warn!(?name, %error, "could not leave the line; the claim is left to expire")));
}

/// Somebody began or ceased to wait.
pub(crate) fn waiters(env: &dyn Environment, change: i64) {
    WAITERS.fetch_add(change, Ordering::Relaxed);
    #[cfg(feature = "metrics")]
    env.log(Box::new(gauges));
    #[cfg(not(feature = "metrics"))]
    let _ = env;
}

#[cfg(feature = "metrics")]
#[expect(clippy::cast_precision_loss, reason = "a count of leases fits")]
fn gauges() {
    metrics::gauge!("lease.held").set(HELD.load(Ordering::Relaxed) as f64);
    metrics::gauge!("lease.waiters").set(WAITERS.load(Ordering::Relaxed) as f64);
}

/// An event in one line, `message key=value key=value`: for bindings, whose users have no subscriber of their own.
pub fn line_of(event: &Event<'_>) -> String {
    #[derive(Default)]
    struct Line {
        message: String,
        fields: String,
    }
    impl Visit for Line {
        fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
            // Writing to a text cannot fail.
            let _ = if field.name() == "message" {
                write!(self.message, "{value:?}")
            } else {
                write!(self.fields, " {}={value:?}", field.name())
            };
        }
    }
    let mut line = Line::default();
    event.record(&mut line);
    line.message + &line.fields
}
