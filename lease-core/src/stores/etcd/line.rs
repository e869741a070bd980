//! Where is what in etcd: the key of a claim, what is written there, and the requests on a line.
//!
//! `prefix/<name>/<claim id>`, with `%` and `/` escaped in the name: so names never meet, and a prefix of names is a prefix of
//! keys (S12). The value is text, for who looks with etcdctl: version, ttl in milliseconds, the time of entry by the wall
//! clock (shown, never judged by), and the owner.

use std::time::{Duration, SystemTime};

use super::proto::compare::{CompareResult, CompareTarget, TargetUnion};
use super::proto::range_request::{SortOrder, SortTarget};
use super::proto::{
    Compare, DeleteRangeRequest, KeyValue, PutRequest, RangeRequest, RequestOp, ResponseOp, TxnRequest, request_op,
    response_op,
};
use crate::error::{Error, ErrorKind, Result};
use crate::store::{Claim, ClaimId, Name, Token};

/// The version of the values.
const FORMAT: &str = "1";

/// The keys under one prefix.
#[derive(Clone, Debug)]
pub(super) struct Keys {
    prefix: String,
}

/// All keys from `first` up to, not including, `end`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Span {
    pub(super) first: Vec<u8>,
    pub(super) end: Vec<u8>,
}

/// A claim as it stands in etcd.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Row {
    pub(super) key: Vec<u8>,
    pub(super) id: ClaimId,
    pub(super) token: Token,
    /// The revision of its last renewal, or of its entry.
    pub(super) modified: i64,
    pub(super) ttl: Duration,
    /// When it entered, in milliseconds by some wall clock.
    entered: u64,
    pub(super) owner: String,
}

impl Keys {
    pub(super) fn new(prefix: &str) -> Self {
        Self { prefix: prefix.into() }
    }

    /// The line of one name.
    pub(super) fn line(&self, name: &str) -> Span {
        Span::of(format!("{}/{}/", self.prefix, escape(name)))
    }

    /// The lines of all names with that prefix.
    pub(super) fn lines(&self, prefix: &str) -> Span {
        Span::of(format!("{}/{}", self.prefix, escape(prefix)))
    }

    pub(super) fn claim(&self, name: &Name, id: ClaimId) -> Vec<u8> {
        format!("{}/{}/{id}", self.prefix, escape(name)).into_bytes()
    }

    /// The name in whose line a key is.
    pub(super) fn name_of(&self, row: &Row) -> Result<Name> {
        let name = || {
            let name = row.key.strip_prefix(self.prefix.as_bytes())?.strip_prefix(b"/")?;
            let end = name.iter().rposition(|byte| *byte == b'/')?;
            let name = percent_encoding::percent_decode(&name[..end]).decode_utf8().ok()?;
            Name::new(&name).ok().filter(|name| self.claim(name, row.id) == row.key)
        };
        name().ok_or_else(|| foreign(&row.key))
    }
}

impl Span {
    /// All keys that begin so. The last byte of a beginning is text, so there is a next one.
    fn of(beginning: String) -> Self {
        let first = beginning.into_bytes();
        let mut end = first.clone();
        if let Some(last) = end.last_mut() {
            *last += 1;
        }
        Self { first, end }
    }

    /// The claims of the line as they entered; the last `limit` of them, latest first, if `descending`.
    pub(super) fn range(&self, descending: bool, limit: i64) -> RangeRequest {
        let order = if descending { SortOrder::Descend } else { SortOrder::Ascend };
        RangeRequest {
            key: self.first.clone(),
            range_end: self.end.clone(),
            limit,
            sort_order: order.into(),
            sort_target: SortTarget::Create.into(),
            ..RangeRequest::default()
        }
    }

    /// A claim in this line. What is deeper down belongs to a prefix that begins as ours does, and is foreign here.
    pub(super) fn read(&self, kv: KeyValue) -> Result<Row> {
        let in_line = kv.key.strip_prefix(&*self.first).is_some_and(|id| !id.contains(&b'/'));
        if in_line { Row::read(kv) } else { Err(foreign(&kv.key)) }
    }

    /// The answer to a range within a transaction: its claims, and how many keys there are in all.
    pub(super) fn rows(&self, answer: Option<ResponseOp>) -> Result<(Vec<Row>, u64)> {
        match answer.and_then(|answer| answer.response) {
            Some(response_op::Response::ResponseRange(range)) => {
                let rows = range.kvs.into_iter().map(|kv| self.read(kv)).collect::<Result<_>>()?;
                Ok((rows, range.count.unsigned_abs()))
            }
            _ => Err(Error::unavailable("etcd answered something else than was asked").with_doubt()),
        }
    }

    /// Holds while nobody is in the line.
    pub(super) fn is_empty(&self) -> Compare {
        Compare { range_end: self.end.clone(), ..created(&self.first, 0) }
    }
}

impl Row {
    /// Reads what is at a key. Anything but a claim is another program's, and never touched.
    pub(super) fn read(kv: KeyValue) -> Result<Self> {
        let read = || {
            let id = kv.key.rsplit(|byte| *byte == b'/').next()?;
            let id = std::str::from_utf8(id).ok().filter(|id| id.len() == 32)?;
            let id = ClaimId(u128::from_str_radix(id, 16).ok()?);
            let mut parts = std::str::from_utf8(&kv.value).ok()?.splitn(4, ' ');
            let (format, ttl, entered, owner) = (parts.next()?, parts.next()?, parts.next()?, parts.next()?);
            let ttl = Duration::from_millis(ttl.parse().ok().filter(|_| format == FORMAT)?);
            Some((id, ttl, entered.parse().ok()?, owner.to_owned()))
        };
        let Some((id, ttl, entered, owner)) = read() else { return Err(foreign(&kv.key)) };
        let token = Token::try_from(kv.create_revision)?;
        Ok(Self { key: kv.key, id, token, modified: kv.mod_revision, ttl, entered, owner })
    }

    /// What the wall clocks say about its time in the line: to be shown, and nothing else.
    pub(super) fn age_by_wall_clock(&self) -> Duration {
        wall_clock().saturating_sub(Duration::from_millis(self.entered))
    }
}

fn foreign(key: &[u8]) -> Error {
    let key = String::from_utf8_lossy(key);
    let message =
        format!("the key {key:?} in etcd is no claim of this library's format: remove it, or use another prefix");
    Error::new(ErrorKind::Incompatible, message)
}

fn wall_clock() -> Duration {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default()
}

/// What a claim writes at its key.
pub(super) fn value(claim: &Claim) -> Vec<u8> {
    format!("{FORMAT} {} {} {}", claim.ttl.as_millis(), wall_clock().as_millis(), claim.owner).into_bytes()
}

fn escape(name: &str) -> String {
    name.replace('%', "%25").replace('/', "%2F")
}

// ------------------------------------------------------------------------------- parts of transactions

fn compare(key: &[u8], target: CompareTarget, union: TargetUnion) -> Compare {
    Compare {
        result: CompareResult::Equal.into(),
        target: target.into(),
        key: key.into(),
        target_union: Some(union),
        range_end: Vec::new(),
    }
}

/// Holds while the key was created at that revision; 0: while there is no such key.
pub(super) fn created(key: &[u8], revision: i64) -> Compare {
    compare(key, CompareTarget::Create, TargetUnion::CreateRevision(revision))
}

/// Holds while the key was last written at that revision.
pub(super) fn modified(key: &[u8], revision: i64) -> Compare {
    compare(key, CompareTarget::Mod, TargetUnion::ModRevision(revision))
}

pub(super) fn get(key: &[u8]) -> RangeRequest {
    RangeRequest { key: key.into(), ..RangeRequest::default() }
}

pub(super) fn delete(key: &[u8]) -> DeleteRangeRequest {
    DeleteRangeRequest { key: key.into(), range_end: Vec::new() }
}

impl From<RangeRequest> for RequestOp {
    fn from(request: RangeRequest) -> Self {
        Self { request: Some(request_op::Request::RequestRange(request)) }
    }
}

impl From<PutRequest> for RequestOp {
    fn from(request: PutRequest) -> Self {
        Self { request: Some(request_op::Request::RequestPut(request)) }
    }
}

impl From<DeleteRangeRequest> for RequestOp {
    fn from(request: DeleteRangeRequest) -> Self {
        Self { request: Some(request_op::Request::RequestDeleteRange(request)) }
    }
}

impl From<TxnRequest> for RequestOp {
    fn from(request: TxnRequest) -> Self {
        Self { request: Some(request_op::Request::RequestTxn(request)) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn claim(name: &str, owner: &str) -> Claim {
        let name = Name::new(name).unwrap();
        Claim {
            name,
            id: ClaimId(7),
            ttl: Duration::from_millis(2500),
            owner: owner.into(),
            queues: true,
            follows: None,
        }
    }

    fn kv(keys: &Keys, claim: &Claim) -> KeyValue {
        let key = keys.claim(&claim.name, claim.id);
        KeyValue { key, value: value(claim), create_revision: 5, mod_revision: 9, version: 1, lease: 1 }
    }

    #[test]
    fn a_claim_is_read_as_it_was_written() {
        let keys = Keys::new("a/b");
        for name in ["n", "a/b", "%2F", "ü", "a/", "/"] {
            let claim = claim(name, " owner with spaces ");
            let row = Row::read(kv(&keys, &claim)).unwrap();
            assert_eq!((row.id, row.token.get(), row.modified, row.ttl), (claim.id, 5, 9, claim.ttl));
            assert_eq!((&*row.owner, keys.name_of(&row).unwrap()), (" owner with spaces ", claim.name));
        }
    }

    /// Overwriting or passing over what another program keeps there would corrupt it, or ours.
    #[test]
    fn what_is_no_claim_is_foreign() {
        let keys = Keys::new("p");
        let good = kv(&keys, &claim("n", "o"));
        let foreign = [
            KeyValue { value: b"".into(), ..good.clone() },
            KeyValue { value: b"2 2500 0 o".into(), ..good.clone() },
            KeyValue { value: b"1 x 0 o".into(), ..good.clone() },
            KeyValue { key: b"p/n/7".into(), ..good.clone() },
            KeyValue { key: b"p/n/0000000000000000000000000000000g".into(), ..good.clone() },
        ];
        for kv in foreign {
            assert_eq!(Row::read(kv).unwrap_err().kind(), ErrorKind::Incompatible);
        }
        // Of the name b with the prefix p/a, whose line would else be a part of that of the name a with the prefix p.
        let elsewhere = KeyValue { key: b"p/a/b/00000000000000000000000000000007".into(), ..good };
        assert!(keys.line("a").read(elsewhere.clone()).is_err());
        assert!(keys.name_of(&Row::read(elsewhere).unwrap()).is_err());
    }

    #[test]
    fn lines_hold_their_own_keys_only() {
        let keys = Keys::new("p");
        let inside = |span: &Span, key: &[u8]| *span.first <= *key && *key < *span.end;
        let names = ["a", "a/b", "ab", "a%", "a/", "b"].map(|name| Name::new(name).unwrap());
        for name in &names {
            for other in &names {
                let key = keys.claim(other, ClaimId(u128::MAX));
                assert_eq!(inside(&keys.line(name), &key), name == other, "{name} {other}");
                assert_eq!(inside(&keys.lines(name), &key), other.starts_with(&**name), "{name} {other}");
            }
        }
        assert!(inside(&keys.lines(""), &keys.claim(&names[0], ClaimId(0))));
    }
}
