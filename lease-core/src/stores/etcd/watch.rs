//! Who waits for news: all watches of a store on one stream.
//!
//! A watch begins at the present (revision 0): one from an old revision is served by a loop of 100 ms in etcd. So what
//! happened before `Created` was told is not seen, and who watches looks once after it. When the stream ends, for whatever
//! reason, every watch is told `Broken` and forgotten: whoever wants to know more looks, and watches anew.

use std::pin::pin;
use std::sync::{Arc, Mutex};

use foldhash::HashMap;
use futures_lite::future::or;
use tokio::sync::{mpsc, watch};

use super::client::Client;
use super::connection::{Path, with_metadata};
use super::failure::Failure;
use super::line::Span;
use super::proto::event::EventType;
use super::proto::watch_create_request::FilterType;
use super::proto::watch_request::RequestUnion;
use super::proto::{WatchCancelRequest, WatchCreateRequest, WatchRequest, WatchResponse};
use crate::runtime::lock;

const PATH: Path = "/etcdserverpb.Watch/Watch";

/// What a watch is told, in this order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Told {
    Nothing,
    /// From now on it sees everything.
    Created,
    /// It happened.
    Fired,
    /// It sees nothing any more.
    Broken,
}

/// What is watched.
pub(super) enum Wanted {
    /// That the key is deleted; with `written`, also at which revisions it is written until then.
    Gone { key: Vec<u8>, written: Option<Written> },
    /// That a key is written in the span.
    Entered(Span),
}

/// Called on the library's thread, under no lock.
pub(super) type Tell = Box<dyn Fn(Told) + Send + Sync>;
/// The same.
pub(super) type Written = Box<dyn Fn(i64) + Send + Sync>;

/// Who listens to a watch.
struct Listener {
    tell: Tell,
    written: Option<Written>,
    /// Whether it is the writing that counts.
    entered: bool,
}

impl Wanted {
    pub(super) fn gone(key: Vec<u8>) -> Self {
        Self::Gone { key, written: None }
    }
}

pub(super) struct Watches {
    client: Arc<Client>,
    state: Arc<Mutex<State>>,
}

#[derive(Default)]
struct State {
    last_id: i64,
    listeners: HashMap<i64, Arc<Listener>>,
    /// Where requests go; none while there is no stream.
    requests: Option<mpsc::UnboundedSender<WatchRequest>>,
}

/// A watch. Dropped, it is cancelled.
pub(super) struct Watch {
    ids: std::ops::RangeInclusive<i64>,
    state: Arc<Mutex<State>>,
}

impl Drop for Watch {
    fn drop(&mut self) {
        let mut state = lock(&self.state);
        for id in self.ids.clone() {
            let listener = state.listeners.remove(&id);
            if let (Some(_), Some(requests)) = (&listener, &state.requests) {
                let cancel = RequestUnion::CancelRequest(WatchCancelRequest { watch_id: id });
                // A stream that has ended has cancelled it.
                let _ = requests.send(WatchRequest { request_union: Some(cancel) });
            }
        }
    }
}

impl Watches {
    pub(super) fn new(client: Arc<Client>) -> Self {
        Self { client, state: Arc::default() }
    }

    /// Watches for what somebody waits for. A write in the moment of creation can still put a watch behind, into the loop of
    /// 100 ms: so there are two, and the first that tells counts.
    fn add_for_waiter(&self, wanted: Wanted, tell: Tell) -> Watch {
        self.create(wanted, tell, 2)
    }

    /// Watches for what may come a moment later.
    pub(super) fn add(&self, wanted: Wanted, tell: Tell) -> Watch {
        self.create(wanted, tell, 1)
    }

    fn create(&self, wanted: Wanted, tell: Tell, copies: i64) -> Watch {
        let (span, filter, written, entered) = match wanted {
            Wanted::Gone { key, written } => {
                // Without the filter if the writing is to be told too.
                let filter = written.is_none().then_some(FilterType::Noput);
                (Span { first: key, end: Vec::new() }, filter, written, false)
            }
            Wanted::Entered(span) => (span, Some(FilterType::Nodelete), None, true),
        };
        let listener = Arc::new(Listener { tell, written, entered });
        let mut state = lock(&self.state);
        let ids = state.last_id + 1..=state.last_id + copies;
        state.last_id += copies;
        let requests = match &state.requests {
            Some(requests) => requests.clone(),
            None => self.start(&mut state),
        };
        for id in ids.clone() {
            state.listeners.insert(id, listener.clone());
            let create = WatchCreateRequest {
                key: span.first.clone(),
                range_end: span.end.clone(),
                start_revision: 0,
                filters: filter.into_iter().map(Into::into).collect(),
                watch_id: id,
            };
            let _ = requests.send(WatchRequest { request_union: Some(RequestUnion::CreateRequest(create)) });
        }
        drop(state);
        Watch { ids, state: self.state.clone() }
    }

    /// A watch to be waited for.
    pub(super) fn awaited(&self, wanted: Wanted) -> Awaited {
        let (tell, told) = watch::channel(Told::Nothing);
        let told_to = move |news: Told| {
            tell.send_if_modified(|known| news > std::mem::replace(known, (*known).max(news)));
        };
        Awaited { told, _watch: self.add_for_waiter(wanted, Box::new(told_to)) }
    }

    fn start(&self, state: &mut State) -> mpsc::UnboundedSender<WatchRequest> {
        let (requests, queue) = mpsc::unbounded_channel();
        state.requests = Some(requests.clone());
        let (client, shared) = (self.client.clone(), self.state.clone());
        self.client.env.spawn(Box::pin(async move {
            let closed = client.closed.clone();
            closed.run_until_cancelled(stream(&client, &shared, queue)).await;
            let broken = {
                let mut state = lock(&shared);
                state.requests = None;
                std::mem::take(&mut state.listeners)
            };
            for listener in broken.into_values() {
                (listener.tell)(Told::Broken);
            }
        }));
        requests
    }
}

/// Tells what the stream tells, until it ends.
async fn stream(
    client: &Arc<Client>,
    state: &Mutex<State>,
    mut queue: mpsc::UnboundedReceiver<WatchRequest>,
) -> Result<(), Failure> {
    let connection = client.connection().await?;
    let token = client.token(&connection).await?;
    let requests = futures_lite::stream::poll_fn(move |cx| queue.poll_recv(cx));
    // It is answered when the first request is. No time limit: it lasts.
    let request = with_metadata(requests, token.clone(), None);
    let told = async {
        let mut answers = connection.streaming::<WatchRequest, WatchResponse>(PATH, request).await?;
        while let Some(answer) = answers.message().await.map_err(|status| connection.failure(status))? {
            if answer.canceled && (answer.created || answer.watch_id < 0) {
                // Newer servers refuse to create one without saying which.
                client.forget_token(token.as_ref());
                return Err(Failure::unknown(format!("a watch was refused: {}", answer.cancel_reason)));
            }
            // One that was dropped meanwhile is cancelled by us.
            let Some(listener) = lock(state).listeners.get(&answer.watch_id).cloned() else { continue };
            if answer.canceled {
                // Nothing old is watched, so this is about the token of the stream.
                client.forget_token(token.as_ref());
                return Err(Failure::unknown(format!("a watch was cancelled: {}", answer.cancel_reason)));
            }
            if answer.created {
                (listener.tell)(Told::Created);
            }
            for event in answer.events {
                if (event.r#type() == EventType::Put) == listener.entered {
                    (listener.tell)(Told::Fired);
                } else if let (Some(written), Some(kv)) = (&listener.written, event.kv) {
                    written(kv.mod_revision);
                }
            }
        }
        Ok(())
    };
    let retired = async {
        connection.retired.cancelled().await;
        Err(Failure::unknown("the connection was given up"))
    };
    let mut told = pin!(told);
    let ended = or(&mut told, retired).await;
    if ended.is_err() {
        client.retire(&connection);
    }
    ended
}

/// A watch, and what it was told last.
pub(super) struct Awaited {
    told: watch::Receiver<Told>,
    _watch: Watch,
}

impl Awaited {
    /// Waits until it is told at least this, and says what it was told.
    pub(super) async fn told(&mut self, least: Told) -> Told {
        self.told.wait_for(|told| *told >= least).await.map_or(Told::Broken, |told| *told)
    }
}
