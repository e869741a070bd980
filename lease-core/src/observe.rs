//! Logs and figures. Everything here runs where user code may run: a slow subscriber costs lines, never a heartbeat.

use std::time::Duration;

use tracing::level_filters::LevelFilter;

use crate::error::{EndReason, Error};
use crate::runtime::Environment;
use crate::store::{Name, Place, Token};

/// Whether somebody listens for details. One atomic load: no subscriber is asked.
fn details() -> bool {
    cfg!(feature = "metrics") || LevelFilter::current() >= LevelFilter::DEBUG
}

pub(crate) fn granted(env: &dyn Environment, place: &Place, waited: Duration) {
    if details() {
        let (name, token) = (place.claim.name.clone(), place.token);
        env.log(Box::new(move || {
            tracing::debug!(?name, %token, ?waited, "acquired");
            #[cfg(feature = "metrics")]
            {
                metrics::histogram!("lease.acquire.duration").record(waited);
                metrics::gauge!("lease.held").increment(1);
            }
        }));
    }
}

/// A lease ended that had been handed out.
pub(crate) fn ended(env: &dyn Environment, place: &Place, held: Duration, reason: EndReason) {
    if details() {
        let (name, token) = (place.claim.name.clone(), place.token);
        env.log(Box::new(move || {
            tracing::debug!(?name, %token, ?held, %reason, "ended");
            #[cfg(feature = "metrics")]
            {
                metrics::histogram!("lease.hold.duration").record(held);
                metrics::gauge!("lease.held").decrement(1);
            }
        }));
    }
}

pub(crate) fn lost(env: &dyn Environment, place: &Place, reason: EndReason) {
    let (name, token) = (place.claim.name.clone(), place.token);
    env.log(Box::new(move || {
        tracing::warn!(?name, %token, %reason, "lease lost: the work under it must stop");
        #[cfg(feature = "metrics")]
        metrics::counter!("lease.losses", "reason" => reason.name()).increment(1);
    }));
}

/// `headroom` is the ttl that was left when the answer came: the early warning.
pub(crate) fn renewed(env: &dyn Environment, place: &Place, took: Duration, headroom: Duration) {
    if details() {
        let (name, token) = (place.claim.name.clone(), place.token);
        env.log(Box::new(move || {
            tracing::debug!(?name, %token, ?took, ?headroom, "renewed");
            #[cfg(feature = "metrics")]
            {
                metrics::histogram!("lease.renew.duration").record(took);
                metrics::histogram!("lease.renew.headroom").record(headroom);
            }
        }));
    }
}

pub(crate) fn not_renewed(env: &dyn Environment, place: &Place, error: &Error) {
    if details() {
        let (name, token, error) = (place.claim.name.clone(), place.token, error.to_string());
        env.log(Box::new(move || tracing::debug!(?name, %token, %error, "renewal failed; trying again")));
    }
}

pub(crate) fn retrying(env: &dyn Environment, name: &Name, error: &Error) {
    let (name, error) = (name.clone(), error.to_string());
    env.log(Box::new(move || tracing::warn!(?name, %error, "the store does not answer; acquire keeps trying")));
}

pub(crate) fn own_holder(name: &Name, token: Token, held: Duration) {
    tracing::warn!(
        ?name, %token,
        "acquire waits for a lease held by this process since {held:.1?}: leases are not re-entrant"
    );
}

pub(crate) fn not_left(env: &dyn Environment, name: &Name, error: &Error) {
    let (name, error) = (name.clone(), error.to_string());
    env.log(Box::new(move || tracing::warn!(?name, %error, "could not leave the line; the claim is left to expire")));
}

#[cfg(feature = "metrics")]
pub(crate) fn waiters(env: &dyn Environment, change: f64) {
    env.log(Box::new(move || metrics::gauge!("lease.waiters").increment(change)));
}

#[cfg(not(feature = "metrics"))]
pub(crate) fn waiters(_env: &dyn Environment, _change: f64) {}
