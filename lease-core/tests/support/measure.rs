//! How figures are measured and shown: floor and subject in turns, medians of the rounds, ratios.

use std::time::{Duration, Instant};

pub(crate) type Outcome<T = ()> = Result<T, Box<dyn std::error::Error + Send + Sync>>;

pub(crate) struct Effort {
    pub(crate) rounds: usize,
    /// Operations a round, of those that take nanoseconds; others do a part of it.
    pub(crate) operations: u32,
    /// A round of those that are measured by time.
    pub(crate) round: Duration,
    /// How long 10,000 leases are held.
    pub(crate) held_seconds: u32,
}

impl Effort {
    pub(crate) const FULL: Self =
        Self { rounds: 9, operations: 50_000, round: Duration::from_secs(1), held_seconds: 10 };
    pub(crate) const QUICK: Self =
        Self { rounds: 3, operations: 10_000, round: Duration::from_millis(300), held_seconds: 4 };
}

/// The median time of an operation of each, one round of each in turns.
pub(crate) fn in_turns<const N: usize>(
    effort: &Effort,
    mut subjects: [&mut dyn FnMut() -> Outcome<Duration>; N],
) -> Outcome<[Duration; N]> {
    let mut times = [const { Vec::new() }; N];
    for _ in 0..effort.rounds {
        for (subject, times) in subjects.iter_mut().zip(&mut times) {
            times.push(subject()?);
        }
    }
    Ok(times.map(|mut times| median(&mut times)))
}

pub(crate) fn per_operation(operations: u32, mut operation: impl FnMut(u32) -> Outcome) -> Outcome<Duration> {
    let began = Instant::now();
    for at in 0..operations {
        operation(at)?;
    }
    Ok(nanos(began.elapsed().as_secs_f64() * 1e9 / f64::from(operations)))
}

/// With fractions of a nanosecond rounded: the cheapest row is tens of them.
pub(crate) fn nanos(nanos: f64) -> Duration {
    Duration::from_secs_f64(nanos / 1e9)
}

pub(crate) fn median<T: PartialOrd + Copy>(values: &mut [T]) -> T {
    values.sort_by(|a, b| a.partial_cmp(b).expect("no NaN was measured"));
    values[values.len() / 2]
}

#[derive(Clone, Copy)]
pub(crate) enum Aim {
    None,
    AtMost(f64),
}

pub(crate) fn row(what: &str, floor_is: &str, floor: Duration, measured: Duration, aim: Aim) {
    let ratio = measured.as_secs_f64() / floor.as_secs_f64();
    let aim = match aim {
        Aim::None => "-".into(),
        Aim::AtMost(most) => format!("<= {most}{}", if ratio <= most { "" } else { "  missed" }),
    };
    let (floor, measured) = (format!("{floor:.1?}"), format!("{measured:.1?}"));
    print_row(what, floor_is, &floor, &measured, &format!("{ratio:.2}"), &aim);
}

pub(crate) fn rates(what: &str, floor_is: &str, floor: f64, measured: f64, least: f64) {
    let ratio = measured / floor;
    let aim = format!(">= {least}{}", if ratio >= least { "" } else { "  missed" });
    print_row(what, floor_is, &format!("{floor:.0}/s"), &format!("{measured:.0}/s"), &format!("{ratio:.3}"), &aim);
}

pub(crate) fn print_row(what: &str, floor_is: &str, floor: &str, measured: &str, ratio: &str, aim: &str) {
    println!("{what:<38} {floor_is:<30} {floor:>11} {measured:>16} {ratio:>8}   {aim}");
}

/// What stands over the rows.
pub(crate) fn head(effort: &Effort) {
    println!("{} rounds each, in turns; medians. Ratio: measured / floor.\n", effort.rounds);
    print_row("row", "floor", "", "measured", "ratio", "aim");
}
