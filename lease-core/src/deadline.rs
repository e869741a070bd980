//! The one atomic cell from which everything a lease says is derived.
//!
//! It holds the instant up to which the store has confirmed the claim, and whether a renewal has been tried since; or
//! the reason of the end. Invariants: the instant only moves forward; an end is final; whoever reads that the time is
//! up latches the end before he says so. A process that was stopped for an hour therefore says *lost* at its first
//! call, and once false `is_held` is never true again.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::clock::Moment;
use crate::error::EndReason;

/// What happened to the renewals since the last confirmed one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Tried {
    Nothing = 0,
    Unanswered = 1,
    Refused = 2,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum State {
    Confirmed(Moment, Tried),
    Ended(EndReason),
}

/// Whether a call found the end or made it: the one that made it tells everybody else.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct End {
    pub(crate) reason: EndReason,
    pub(crate) first: bool,
}

/// 62 bits of nanoseconds (146 years) and two bits of [`Tried`]; with both of these set, the reason of the end.
pub(crate) struct Deadline(AtomicU64);

const ENDED: u64 = 3;

impl State {
    fn pack(self) -> u64 {
        match self {
            Self::Confirmed(at, tried) => at.as_nanos() << 2 | tried as u64,
            Self::Ended(reason) => u64::from(reason.code().unsigned_abs()) << 2 | ENDED,
        }
    }

    fn unpack(word: u64) -> Self {
        let at = Moment::from_nanos(word >> 2);
        match word & 3 {
            0 => Self::Confirmed(at, Tried::Nothing),
            1 => Self::Confirmed(at, Tried::Unanswered),
            2 => Self::Confirmed(at, Tried::Refused),
            _ => Self::Ended(EndReason::from_code(word >> 2).expect("only packed reasons are unpacked")),
        }
    }
}

impl Deadline {
    pub(crate) fn new(confirmed: Moment) -> Self {
        Self(AtomicU64::new(State::Confirmed(confirmed, Tried::Nothing).pack()))
    }

    pub(crate) fn read(&self) -> State {
        State::unpack(self.0.load(Ordering::Acquire))
    }

    fn swap(&self, seen: State, new: State) -> bool {
        self.0.compare_exchange(seen.pack(), new.pack(), Ordering::AcqRel, Ordering::Acquire).is_ok()
    }

    /// The confirmed instant while it is younger than `limit`; else the end, latched.
    pub(crate) fn judge(&self, now: Moment, limit: Duration) -> Result<Moment, End> {
        loop {
            let seen = self.read();
            let reason = match seen {
                State::Ended(reason) => return Err(End { reason, first: false }),
                State::Confirmed(at, _) if now < at + limit => return Ok(at),
                State::Confirmed(_, Tried::Nothing) => EndReason::Stalled,
                State::Confirmed(_, Tried::Unanswered) => EndReason::Unreachable,
                State::Confirmed(_, Tried::Refused) => EndReason::Denied,
            };
            if self.swap(seen, State::Ended(reason)) {
                return Err(End { reason, first: true });
            }
        }
    }

    /// Ends it for the given reason, unless it has ended or its time is up: then that is the reason.
    pub(crate) fn end(&self, now: Moment, limit: Duration, reason: EndReason) -> End {
        loop {
            let seen = self.read();
            if let Err(end) = self.judge(now, limit) {
                return end;
            }
            if matches!(seen, State::Confirmed(..)) && self.swap(seen, State::Ended(reason)) {
                return End { reason, first: true };
            }
        }
    }

    /// Moves the confirmed instant forward, never back, and never after the time was up.
    pub(crate) fn confirm(&self, now: Moment, limit: Duration, confirmed: Moment) -> Result<(), End> {
        loop {
            let seen = self.read();
            let at = self.judge(now, limit)?;
            if confirmed <= at {
                return Ok(());
            }
            if matches!(seen, State::Confirmed(..)) && self.swap(seen, State::Confirmed(confirmed, Tried::Nothing)) {
                return Ok(());
            }
        }
    }

    /// Notes what became of a renewal sent at `sent`, unless a later one was confirmed.
    pub(crate) fn note(&self, sent: Moment, tried: Tried) {
        loop {
            let seen = self.read();
            match seen {
                State::Confirmed(at, _) if at < sent => {
                    if self.swap(seen, State::Confirmed(at, tried)) {
                        return;
                    }
                }
                _ => return,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_nanos(50);

    fn at(nanos: u64) -> Moment {
        Moment::from_nanos(nanos)
    }

    #[test]
    fn it_holds_until_the_limit_and_not_a_nanosecond_longer() {
        let cell = Deadline::new(at(100));
        assert_eq!(cell.judge(at(149), LIMIT), Ok(at(100)));
        assert_eq!(cell.judge(at(150), LIMIT), Err(End { reason: EndReason::Stalled, first: true }));
    }

    #[test]
    fn an_end_is_final_and_is_made_once() {
        let cell = Deadline::new(at(100));
        assert!(cell.judge(at(150), LIMIT).unwrap_err().first);
        assert!(!cell.judge(at(100), LIMIT).unwrap_err().first, "an earlier clock does not bring it back");
        assert!(cell.confirm(at(120), LIMIT, at(120)).is_err());
        assert_eq!(cell.end(at(120), LIMIT, EndReason::Released), End { reason: EndReason::Stalled, first: false });
    }

    #[test]
    fn a_confirmation_that_comes_after_the_time_was_up_extends_nothing() {
        let cell = Deadline::new(at(100));
        cell.note(at(120), Tried::Unanswered);
        let end = cell.confirm(at(150), LIMIT, at(120)).unwrap_err();
        assert_eq!(end, End { reason: EndReason::Unreachable, first: true });
    }

    #[test]
    fn the_confirmed_instant_never_moves_back() {
        let cell = Deadline::new(at(100));
        cell.confirm(at(130), LIMIT, at(120)).unwrap();
        cell.confirm(at(130), LIMIT, at(110)).unwrap();
        assert_eq!(cell.judge(at(130), LIMIT), Ok(at(120)));
    }

    #[test]
    fn the_reason_tells_what_was_tried_since_the_last_confirmation() {
        for (tried, reason) in [
            (Tried::Nothing, EndReason::Stalled),
            (Tried::Unanswered, EndReason::Unreachable),
            (Tried::Refused, EndReason::Denied),
        ] {
            let cell = Deadline::new(at(100));
            cell.note(at(110), tried);
            assert_eq!(cell.judge(at(150), LIMIT).unwrap_err().reason, reason);
        }
        let cell = Deadline::new(at(100));
        cell.note(at(110), Tried::Refused);
        cell.confirm(at(130), LIMIT, at(120)).unwrap();
        cell.note(at(115), Tried::Refused);
        assert_eq!(cell.judge(at(170), LIMIT).unwrap_err().reason, EndReason::Stalled);
    }

    #[test]
    fn every_state_survives_packing() {
        for reason in EndReason::ALL {
            assert_eq!(State::unpack(State::Ended(*reason).pack()), State::Ended(*reason));
        }
        for tried in [Tried::Nothing, Tried::Unanswered, Tried::Refused] {
            let state = State::Confirmed(Moment::FAR, tried);
            assert_eq!(State::unpack(state.pack()), state);
        }
    }
}
