//! Time: one monotonic clock that keeps counting while the machine sleeps. The wall clock decides nothing.

use std::fmt;
use std::ops::Add;
use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

/// A reading of the clock: nanoseconds since an arbitrary start, counted through suspend (`CLOCK_BOOTTIME`).
///
/// `std::time::Instant` stops while the machine sleeps, and a lease does not.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Moment(u64);

impl Moment {
    /// The largest reading: never reached.
    pub const FAR: Self = Self(u64::MAX >> 2);

    /// The reading of the machine's clock now.
    pub fn now() -> Self {
        let now = clock_gettime(ClockId::Boottime);
        Self(now.tv_sec.unsigned_abs() * 1_000_000_000 + now.tv_nsec.unsigned_abs())
    }

    /// From nanoseconds since the clock's start; at most [`FAR`](Self::FAR).
    pub const fn from_nanos(nanos: u64) -> Self {
        if nanos < Self::FAR.0 { Self(nanos) } else { Self::FAR }
    }

    /// Nanoseconds since the clock's start.
    pub const fn as_nanos(self) -> u64 {
        self.0
    }

    /// How long after `earlier` this is; zero when it is not after.
    pub const fn since(self, earlier: Self) -> Duration {
        Duration::from_nanos(self.0.saturating_sub(earlier.0))
    }
}

impl Add<Duration> for Moment {
    type Output = Self;

    fn add(self, duration: Duration) -> Self {
        Self::from_nanos(self.0.saturating_add(u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)))
    }
}

impl fmt::Debug for Moment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", Duration::from_nanos(self.0))
    }
}
