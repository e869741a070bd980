//! What one transaction does to a line.
//!
//! 1. A row is *waiting*, *offered* until some instant, or *held*. A row past its deadline or past its offer is dead: no
//!    step sees it, and each step first buries it when it is the head ([`settle`](Transaction::settle)).
//! 2. Invariant: after a commit the head of a line is never merely waiting. Whoever removes the head makes the next one
//!    held, if it is of the same manager or is the very claim that asks, or else offers it the name and rings its bell.
//! 3. Invariant: `Head` is answered for a row that a write made held, and only rows that wait are offered. A lapsed offer
//!    is deleted by the transaction that makes the next: a manager that wakes up late finds no row to take.
//! 4. A row in the middle that goes wakes the one behind it; nobody else.
//! 5. A row whose process is gone for certain is removed by whoever waits behind it, or asks for the head.

use std::collections::BTreeSet;
use std::time::Duration;

use rusqlite::{Connection, OptionalExtension, Row, params};

use super::bell::Ring;
use super::failure::Failure;
use super::process::Process;
use crate::clock::Moment;
use crate::store::{Ahead, Claim, ClaimId, Departure, Name, Place, Record, Renewal, Standing, Token};

type Result<T, E = Failure> = std::result::Result<T, E>;

/// `turn` of a row: not offered yet.
const WAITING: i64 = 0;
/// `turn` of a row: an offer that does not end.
const HELD: i64 = i64::MAX;
/// How long a turn is offered, if the ttl is not shorter.
const OFFER: i64 = 1_000_000_000;
/// How long a change of the head is awaited before asking to be told again.
const WATCH: i64 = 60_000_000_000;
/// After an instant has passed it is looked at, not at it.
const AFTER: i64 = 1_000_000;
const SWEEP_EVERY: i64 = 60_000_000_000;

/// Between the clock of this process and the one that all processes of the machine share.
#[derive(Clone, Copy)]
pub(super) struct SharedClock {
    /// What this process's time namespace adds.
    pub(super) offset: i64,
}

impl SharedClock {
    pub(super) fn shared(self, own: Moment) -> i64 {
        nanos(own.as_nanos()).saturating_sub(self.offset)
    }

    pub(super) fn own(self, shared: i64) -> Moment {
        Moment::from_nanos(u64::try_from(shared.saturating_add(self.offset)).unwrap_or(0))
    }
}

/// What is to be done once the transaction is committed.
#[derive(Default)]
pub(super) struct Effects {
    /// Bells to ring.
    pub(super) rings: Vec<(String, Ring)>,
    /// Offers to check when they have ended.
    pub(super) offers: Vec<(Name, Moment)>,
}

/// One transaction, alone in the file.
pub(super) struct Transaction<'a> {
    pub(super) sql: &'a Connection,
    pub(super) clock: SharedClock,
    /// The one clock reading of this transaction, made inside the gate.
    pub(super) now: i64,
    /// This manager's bell.
    pub(super) bell: &'a str,
    /// This process, and its pid namespace if that is known.
    pub(super) process: &'a (Process, Option<i64>),
    pub(super) next_token: i64,
    pub(super) swept_at: &'a mut i64,
    pub(super) changed: BTreeSet<Name>,
    pub(super) effects: Effects,
}

/// Another manager, in a process that this one can watch.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Peer {
    /// Random, so that proof which is old by now is about its rows and no others.
    bell: String,
    pub(super) process: Process,
}

/// The first row of a settled line.
pub(super) struct Head {
    token: i64,
    claim: [u8; 16],
    ttl: i64,
    deadline: i64,
    turn: i64,
    bell: String,
    owner: String,
}

impl Head {
    fn is_dead(&self, now: i64) -> bool {
        self.deadline <= now || (self.turn != WAITING && self.turn <= now)
    }

    fn end(&self) -> i64 {
        if self.turn == WAITING { self.deadline } else { self.deadline.min(self.turn) }
    }
}

impl Transaction<'_> {
    /// With the managers to be watched by who waits.
    pub(super) fn claim(&mut self, sent: Moment, claim: &Claim) -> Result<(Standing, Vec<Peer>)> {
        let standing = self.stand(sent, claim)?;
        self.with_peers(&claim.name, standing)
    }

    /// With the managers to be watched by who waits.
    pub(super) fn look(&mut self, place: &Place) -> Result<(Standing, Vec<Peer>)> {
        let standing = self.look_at(place)?;
        self.with_peers(&place.claim.name, standing)
    }

    fn stand(&mut self, sent: Moment, claim: &Claim) -> Result<Standing> {
        let id = claim.id.0.to_be_bytes();
        let Some(head) = self.settle(&claim.name, Some(id))? else {
            self.changed.insert(claim.name.clone());
            return Ok(Standing::Head(token(self.enter(sent, claim, HELD)?)?));
        };
        if head.claim == id {
            return Ok(Standing::Head(token(head.token)?));
        }
        let known = self
            .sql
            .prepare_cached("SELECT token, deadline FROM line WHERE name = ?1 AND claim = ?2")?
            .query_row(params![&*claim.name, id], |row| Ok((row.get(0)?, row.get::<_, i64>(1)?)))
            .optional()?;
        let at = match known {
            // Dead behind a living head: its id is used up. A second row of it would outlive its leaving.
            Some((_, deadline)) if deadline <= self.now => return Ok(Standing::Lost),
            Some((at, _)) => at,
            None if !claim.queues && self.remove_gone(&claim.name)? => return self.stand(sent, claim),
            None if !claim.queues => return Ok(Standing::Busy(self.ahead(&claim.name, &head, i64::MAX)?)),
            None => self.enter(sent, claim, WAITING)?,
        };
        Ok(Standing::Behind(token(at)?, self.ahead(&claim.name, &head, at)?))
    }

    fn look_at(&mut self, place: &Place) -> Result<Standing> {
        let Claim { name, id, .. } = &place.claim;
        let (id, at) = (id.0.to_be_bytes(), place.token.get());
        let Some(head) = self.settle(name, Some(id))? else { return Ok(Standing::Lost) };
        if head.claim == id && head.token == at {
            return Ok(Standing::Head(place.token));
        }
        match self.turn(name, at, id)? {
            Some(_) => Ok(Standing::Behind(place.token, self.ahead(name, &head, at)?)),
            None => Ok(Standing::Lost),
        }
    }

    pub(super) fn renew(&mut self, sent: Moment, places: &[Place]) -> Result<Vec<Renewal>> {
        // From `sent`, though it may have queued since: nobody has to wait longer than the ttl for a dead holder.
        let from = self.clock.shared(sent).min(self.now);
        let mut renewals = Vec::with_capacity(places.len());
        for Place { claim, token } in places {
            let turn = self.turn(&claim.name, token.get(), claim.id.0.to_be_bytes())?;
            if turn.is_some() {
                self.sql
                    .prepare_cached("UPDATE line SET deadline = max(deadline, ?3) WHERE name = ?1 AND token = ?2")?
                    .execute(params![&*claim.name, token.get(), after(from, claim.ttl)])?;
            }
            renewals.push(match turn {
                Some(turn) => Renewal::Renewed { confirmed: sent, offered: turn != WAITING && turn != HELD },
                None => Renewal::Lost { superseded: self.settle(&claim.name, None)?.is_some() },
            });
        }
        self.sweep()?;
        Ok(renewals)
    }

    pub(super) fn leave(&mut self, claim: &Claim) -> Result<Departure> {
        let found = self
            .sql
            .prepare_cached("SELECT token, deadline, turn FROM line WHERE name = ?1 AND claim = ?2")?
            .query_row(params![&*claim.name, claim.id.0.to_be_bytes()], |row| {
                Ok((row.get(0)?, row.get::<_, i64>(1)?, row.get::<_, i64>(2)?))
            })
            .optional()?;
        let Some((token, deadline, turn)) = found else { return Ok(Departure::Gone) };
        self.remove(&claim.name, token, turn)?;
        let was_in_line = deadline > self.now && (turn == WAITING || turn > self.now);
        Ok(if was_in_line { Departure::Left } else { Departure::Gone })
    }

    pub(super) fn evict(&mut self, name: &Name, token: Token) -> Result<bool> {
        self.settle(name, None)?;
        let found = self
            .sql
            .prepare_cached("SELECT turn, bell, claim FROM line WHERE name = ?1 AND token = ?2 AND deadline > ?3")?
            .query_row(params![&**name, token.get(), self.now], |row| Ok((row.get(0)?, ring(row, 1, 2)?)))
            .optional()?;
        let Some((turn, ring)) = found else { return Ok(false) };
        // It looks, and finds itself gone.
        self.effects.rings.push(ring);
        self.remove(name, token.get(), turn)?;
        Ok(true)
    }

    /// The head's token, and when to look again if it is as `seen` until then: by that time it may have died unnoticed.
    pub(super) fn watch(&mut self, name: &Name, seen: Option<Token>) -> Result<(Option<Token>, Moment, Option<Peer>)> {
        let head = self.settle(name, None)?;
        let holder = head.as_ref().map(|head| token(head.token)).transpose()?;
        if holder == seen {
            self.sql
                .prepare_cached("INSERT OR REPLACE INTO watch (name, bell, deadline) VALUES (?1, ?2, ?3)")?
                .execute(params![&**name, self.bell, self.now + WATCH])?;
        }
        let end = head.as_ref().map_or(i64::MAX, |head| head.end().saturating_add(AFTER));
        let peer = head.map(|head| self.peer(name, head.token)).transpose()?.flatten();
        Ok((holder, self.clock.own(end.min(self.now + WATCH / 2)), peer))
    }

    /// The manager just before is enough to be watched, if it is not frozen and can watch as well as we can: else the holder's,
    /// as last seen, is watched by who is behind.
    fn with_peers(&self, name: &Name, standing: Standing) -> Result<(Standing, Vec<Peer>)> {
        let mut peers = Vec::new();
        if let Standing::Behind(_, Ahead { predecessor, holder, .. }) = &standing {
            peers.extend(self.peer(name, predecessor.get())?);
            if holder != predecessor {
                peers.extend(self.peer(name, holder.get())?);
            }
        }
        Ok((standing, peers))
    }

    /// The manager of that row, if its process is another one whose death we could see.
    fn peer(&self, name: &Name, token: i64) -> Result<Option<Peer>> {
        let (own, namespace) = self.process;
        let mut select = self.sql.prepare_cached(
            "SELECT bell, pid, inode FROM line WHERE name = ?1 AND token = ?2 AND namespace = ?3 AND pid <> ?4",
        )?;
        let peer =
            |row: &Row<'_>| Ok(Peer { bell: row.get(0)?, process: Process { pid: row.get(1)?, inode: row.get(2)? } });
        Ok(select.query_row(params![&**name, token, namespace, own.pid], peer).optional()?)
    }

    /// Removes the head as long as its process is gone. Whether there was one to remove.
    pub(super) fn remove_gone(&mut self, name: &Name) -> Result<bool> {
        let mut removed = false;
        while let Some(Head { token, turn, .. }) = self.settle(name, None)?
            && self.peer(name, token)?.is_some_and(|peer| peer.process.is_gone())
        {
            self.remove(name, token, turn)?;
            removed = true;
        }
        Ok(removed)
    }

    /// Removes what a manager whose process is gone has left, but not too much at once. Whether there may be more.
    pub(super) fn remove_all_of(&mut self, gone: &Peer) -> Result<bool> {
        // The last of a line first: else it would be offered the turn by the going of the other.
        let rows: Vec<(String, i64, i64)> = self
            .sql
            .prepare_cached(
                "SELECT name, token, turn FROM line WHERE bell = ?1 AND pid = ?2 ORDER BY name, token DESC LIMIT 100",
            )?
            .query_map(params![gone.bell, gone.process.pid], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)))?
            .collect::<Result<_, _>>()?;
        for (name, token, turn) in &rows {
            self.remove(&Name::new(name)?, *token, *turn)?;
        }
        Ok(!rows.is_empty())
    }

    /// The holders of all names from `first` on until one is not accepted. A head that is offered the name counts as its
    /// holder: it is the only one that can take it.
    pub(super) fn records(&self, first: &str, accept: impl Fn(&str) -> bool) -> Result<Vec<Record>> {
        let mut select = self.sql.prepare_cached(
            "SELECT name, token, owner, held_at, ttl FROM line
             WHERE name >= ?1 AND deadline > ?2 AND (turn = 0 OR turn > ?2) ORDER BY name, token",
        )?;
        let mut rows = select.query(params![first, self.now])?;
        let mut records: Vec<Record> = Vec::new();
        while let Some(row) = rows.next()? {
            let name = row.get_ref(0)?.as_str().map_err(rusqlite::Error::from)?;
            if !accept(name) {
                break;
            }
            match records.last_mut() {
                Some(record) if record.name == *name => record.waiting += 1,
                _ => records.push(Record::new(
                    Name::new(name)?,
                    token(row.get(1)?)?,
                    row.get(2)?,
                    match row.get(3)? {
                        0 => Duration::ZERO,
                        held_at => duration(self.now - held_at),
                    },
                    duration(row.get(4)?),
                    0,
                )),
            }
        }
        Ok(records)
    }

    /// Buries what nobody has come across: at most once a minute, and not all of it at once.
    pub(super) fn sweep(&mut self) -> Result<()> {
        if self.now < *self.swept_at + SWEEP_EVERY {
            return Ok(());
        }
        *self.swept_at = self.now;
        self.sql.prepare_cached("DELETE FROM watch WHERE deadline <= ?1")?.execute([self.now])?;
        let names: Vec<String> = self
            .sql
            .prepare_cached(
                "SELECT DISTINCT name FROM line WHERE deadline <= ?1 OR (turn <> 0 AND turn <= ?1) LIMIT 100",
            )?
            .query_map([self.now], |row| row.get(0))?
            .collect::<Result<_, _>>()?;
        for name in names {
            let name = Name::new(&name)?;
            self.bury(&name)?;
            self.settle(&name, None)?;
        }
        Ok(())
    }

    /// Passes what this manager watched over to the next in line: it looks, and so learns when the offer ends.
    pub(super) fn hand_over_offer(&mut self, name: &Name) -> Result<()> {
        match self.settle(name, None)? {
            Some(head) if head.turn != HELD => self.ring_behind(name, head.token),
            _ => Ok(()),
        }
    }

    /// Removes dead rows at the head of the line and gives the turn to the row that is the head then.
    pub(super) fn settle(&mut self, name: &Name, asks: Option<[u8; 16]>) -> Result<Option<Head>> {
        let mut head = self.head(name)?;
        if head.as_ref().is_some_and(|head| head.is_dead(self.now)) {
            self.bury(name)?;
            self.changed.insert(name.clone());
            head = self.head(name)?;
        }
        let Some(mut head) = head else { return Ok(None) };
        assert!(!head.is_dead(self.now), "buried");
        if head.turn != HELD && asks == Some(head.claim) || head.turn == WAITING && head.bell == self.bell {
            self.give(name, &mut head, HELD)?;
            if asks != Some(head.claim) {
                self.effects.rings.push((head.bell.clone(), Ring::Turn(id(head.claim))));
            }
        } else if head.turn == WAITING {
            let end = self.now.saturating_add(head.ttl.min(OFFER));
            self.give(name, &mut head, end)?;
            self.effects.rings.push((head.bell.clone(), Ring::Turn(id(head.claim))));
            self.effects.offers.push((name.clone(), self.clock.own(head.end() + AFTER)));
        }
        Ok(Some(head))
    }

    fn head(&self, name: &Name) -> Result<Option<Head>> {
        let head = |row: &Row<'_>| {
            Ok(Head {
                token: row.get(0)?,
                claim: row.get(1)?,
                ttl: row.get(2)?,
                deadline: row.get(3)?,
                turn: row.get(4)?,
                bell: row.get(5)?,
                owner: row.get(6)?,
            })
        };
        let mut select = self.sql.prepare_cached(
            "SELECT token, claim, ttl, deadline, turn, bell, owner FROM line WHERE name = ?1 ORDER BY token LIMIT 1",
        )?;
        Ok(select.query_row([&**name], head).optional()?)
    }

    fn give(&self, name: &Name, head: &mut Head, turn: i64) -> Result<()> {
        let held_at = if turn == HELD { self.now } else { 0 };
        let given = self
            .sql
            .prepare_cached("UPDATE line SET turn = ?3, held_at = ?4 WHERE name = ?1 AND token = ?2")?
            .execute(params![&**name, head.token, turn, held_at])?;
        assert_eq!(given, 1, "the head is in the line");
        head.turn = turn;
        Ok(())
    }

    fn bury(&self, name: &Name) -> Result<()> {
        self.sql
            .prepare_cached("DELETE FROM line WHERE name = ?1 AND (deadline <= ?2 OR (turn <> 0 AND turn <= ?2))")?
            .execute(params![&**name, self.now])?;
        Ok(())
    }

    fn enter(&mut self, sent: Moment, claim: &Claim, turn: i64) -> Result<i64> {
        let token = self.next_token;
        self.next_token += 1;
        let deadline = after(self.clock.shared(sent).min(self.now), claim.ttl);
        let held_at = if turn == HELD { self.now } else { 0 };
        self.sql
            .prepare_cached("INSERT INTO line VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12)")?
            .execute(params![
                &*claim.name,
                token,
                claim.id.0.to_be_bytes(),
                after(0, claim.ttl),
                deadline,
                turn,
                held_at,
                self.bell,
                &*claim.owner,
                self.process.0.pid,
                self.process.0.inode,
                self.process.1,
            ])?;
        Ok(token)
    }

    /// The turn of that very claim, if it is in the line and not dead.
    fn turn(&self, name: &Name, token: i64, claim: [u8; 16]) -> Result<Option<i64>> {
        // No RETURNING, here and elsewhere: it makes a table of its own each time, ten times as slow.
        let mut select = self.sql.prepare_cached(
            "SELECT turn FROM line
             WHERE name = ?1 AND token = ?2 AND claim = ?3 AND deadline > ?4 AND (turn = 0 OR turn > ?4)",
        )?;
        Ok(select.query_row(params![&**name, token, claim, self.now], |row| row.get(0)).optional()?)
    }

    fn remove(&mut self, name: &Name, token: i64, turn: i64) -> Result<()> {
        self.sql.prepare_cached("DELETE FROM line WHERE name = ?1 AND token = ?2")?.execute(params![&**name, token])?;
        // Only heads have a turn.
        if turn == WAITING {
            return self.ring_behind(name, token);
        }
        self.changed.insert(name.clone());
        self.settle(name, None).map(drop)
    }

    fn ring_behind(&mut self, name: &Name, token: i64) -> Result<()> {
        let behind = self
            .sql
            .prepare_cached(
                "SELECT bell, claim FROM line WHERE name = ?1 AND token > ?2 AND deadline > ?3 ORDER BY token LIMIT 1",
            )?
            .query_row(params![&**name, token, self.now], |row| ring(row, 0, 1))
            .optional()?;
        self.effects.rings.extend(behind);
        Ok(())
    }

    /// What stands before the row with that token. There is something: it is not the head.
    fn ahead(&self, name: &Name, head: &Head, at: i64) -> Result<Ahead> {
        let (predecessor, deadline, count) = self
            .sql
            .prepare_cached(
                "SELECT max(token), deadline, count(*) FROM line WHERE name = ?1 AND token < ?2 AND deadline > ?3",
            )?
            .query_row(params![&**name, at, self.now], |row| {
                Ok((row.get(0)?, row.get::<_, i64>(1)?, row.get::<_, i64>(2)?))
            })?;
        // If the head and those behind it are all dead, nobody else looks: one more second for each.
        let head_gone = head.end().saturating_add(OFFER.saturating_mul(count - 1));
        Ok(Ahead {
            predecessor: token(predecessor)?,
            count: count.unsigned_abs(),
            holder: token(head.token)?,
            owner: head.owner.clone(),
            look_at: self.clock.own(deadline.min(head_gone).saturating_add(AFTER)),
        })
    }

    /// Writes what is due once a transaction: the next token, and who is to be told of new heads.
    pub(super) fn finish(mut self, first_token: i64) -> Result<(i64, Effects)> {
        if self.next_token != first_token {
            self.sql.prepare_cached("UPDATE meta SET next_token = ?1")?.execute([self.next_token])?;
        }
        for name in &self.changed {
            let told = self.effects.rings.len();
            let mut select = self.sql.prepare_cached("SELECT bell FROM watch WHERE name = ?1")?;
            for bell in select.query_map([&**name], |row| row.get(0))? {
                self.effects.rings.push((bell?, Ring::Changed(name.clone())));
            }
            if self.effects.rings.len() > told {
                self.sql.prepare_cached("DELETE FROM watch WHERE name = ?1")?.execute([&**name])?;
            }
        }
        Ok((self.next_token, self.effects))
    }
}

fn ring(row: &Row<'_>, bell: usize, claim: usize) -> rusqlite::Result<(String, Ring)> {
    Ok((row.get(bell)?, Ring::Turn(id(row.get(claim)?))))
}

fn id(bytes: [u8; 16]) -> ClaimId {
    ClaimId(u128::from_be_bytes(bytes))
}

fn token(number: i64) -> Result<Token> {
    Ok(Token::try_from(number)?)
}

fn after(from: i64, ttl: Duration) -> i64 {
    from.saturating_add(i64::try_from(ttl.as_nanos()).unwrap_or(i64::MAX))
}

fn duration(nanos: i64) -> Duration {
    Duration::from_nanos(nanos.max(0).unsigned_abs())
}

fn nanos(nanos: u64) -> i64 {
    i64::try_from(nanos).unwrap_or(i64::MAX)
}
