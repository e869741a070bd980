//! A client of etcd that does nothing of its own: the stack that the store uses, for floors to be measured with.
//!
//! It runs on a thread of its own, as the library does, and whoever calls it blocks.

use std::future::Future;
use std::pin::Pin;
use std::sync::mpsc::{self, Receiver};
use std::task::{Context, Poll};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use http::uri::PathAndQuery;
use hyper::body::Incoming;
use hyper::client::conn::http2::{Builder, SendRequest};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::net::TcpStream;
use tokio::runtime::Handle;
use tokio::sync::oneshot;
use tonic::body::Body;
use tonic::client::Grpc;
use tonic::{Request, Streaming};
use tonic_prost::ProstCodec;

use super::support::measure::Outcome;

#[allow(clippy::all, clippy::pedantic, missing_docs, unreachable_pub, dead_code)]
#[path = "../../src/stores/etcd/proto.rs"]
#[rustfmt::skip]
pub(crate) mod proto;

use proto::watch_create_request::FilterType;
use proto::watch_request::RequestUnion;
use proto::{
    DeleteRangeRequest, DeleteRangeResponse, LeaseGrantRequest, LeaseGrantResponse, PutRequest, PutResponse,
    RangeRequest, RangeResponse, TxnRequest, TxnResponse, WatchCreateRequest, WatchRequest, WatchResponse,
};

/// What takes longer hangs.
const PATIENCE: Duration = Duration::from_secs(30);

/// One connection, and the thread that serves it.
pub(crate) struct Raw {
    handle: Handle,
    origin: Origin,
    end: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Raw {
    pub(crate) fn connect(port: u16) -> Outcome<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let handle = runtime.handle().clone();
        let (end, ended) = oneshot::channel();
        let origin = runtime.block_on(Origin::connect(port))?;
        let thread = thread::Builder::new().name("raw".into()).spawn(move || {
            drop(runtime.block_on(ended));
        })?;
        Ok(Self { handle, origin, end: Some(end), thread: Some(thread) })
    }

    /// Asks, and blocks until it is answered.
    fn call<Q, A>(&self, path: &'static str, question: Q) -> Outcome<A>
    where
        Q: prost::Message + 'static,
        A: prost::Message + Default + 'static,
    {
        let (answer, answered) = mpsc::sync_channel(1);
        let mut grpc = self.origin.grpc();
        self.handle.spawn(async move {
            let path = PathAndQuery::from_static(path);
            let _ = answer.send(grpc.unary(Request::new(question), path, ProstCodec::<Q, A>::default()).await);
        });
        Ok(answered.recv_timeout(PATIENCE)??.into_inner())
    }

    pub(crate) fn put(&self, key: &str, value: &[u8], lease: i64) -> Outcome<PutResponse> {
        let put = PutRequest { key: key.into(), value: value.into(), lease, ignore_value: false };
        self.call("/etcdserverpb.KV/Put", put)
    }

    pub(crate) fn delete(&self, key: &str) -> Outcome<DeleteRangeResponse> {
        self.call("/etcdserverpb.KV/DeleteRange", DeleteRangeRequest { key: key.into(), range_end: Vec::new() })
    }

    pub(crate) fn range(&self, range: RangeRequest) -> Outcome<RangeResponse> {
        self.call("/etcdserverpb.KV/Range", range)
    }

    pub(crate) fn txn(&self, txn: TxnRequest) -> Outcome<TxnResponse> {
        self.call("/etcdserverpb.KV/Txn", txn)
    }

    /// A lease of so many seconds.
    pub(crate) fn grant(&self, seconds: i64) -> Outcome<i64> {
        let grant = LeaseGrantRequest { ttl: seconds, id: 0 };
        Ok(self.call::<_, LeaseGrantResponse>("/etcdserverpb.Lease/LeaseGrant", grant)?.id)
    }

    /// etcd's own lock: waits until the name is ours. The key that says so.
    pub(crate) fn lock(&self, name: &str, lease: i64) -> Outcome<Vec<u8>> {
        let lock = LockRequest { name: name.into(), lease };
        Ok(self.call::<_, LockResponse>("/v3lockpb.Lock/Lock", lock)?.key)
    }

    pub(crate) fn unlock(&self, key: Vec<u8>) -> Outcome {
        self.call::<_, UnlockResponse>("/v3lockpb.Lock/Unlock", UnlockRequest { key }).map(drop)
    }

    /// Watches for deletions of keys that begin so, from now on: one unit is received for each.
    pub(crate) fn deletions(&self, beginning: &str) -> Outcome<Receiver<()>> {
        let mut range_end = beginning.as_bytes().to_vec();
        *range_end.last_mut().ok_or("a beginning of nothing")? += 1;
        let create = WatchCreateRequest {
            key: beginning.into(),
            range_end,
            start_revision: 0,
            filters: vec![FilterType::Noput.into()],
            watch_id: 1,
        };
        let create = WatchRequest { request_union: Some(RequestUnion::CreateRequest(create)) };
        // The stream of requests stays open.
        let requests = futures_lite::StreamExt::chain(
            futures_lite::stream::once(create),
            futures_lite::stream::pending::<WatchRequest>(),
        );
        let (mut grpc, (tell, told), (begin, begun)) = (self.origin.grpc(), mpsc::channel(), mpsc::channel());
        self.handle.spawn(async move {
            let path = PathAndQuery::from_static("/etcdserverpb.Watch/Watch");
            let answers = grpc.streaming(Request::new(requests), path, ProstCodec::default()).await;
            let Ok(answers) = answers else { return };
            let mut answers: Streaming<WatchResponse> = answers.into_inner();
            while let Ok(Some(answer)) = answers.message().await {
                if answer.created && begin.send(()).is_err() {
                    return;
                }
                if answer.events.iter().any(|_| tell.send(()).is_err()) {
                    return;
                }
            }
        });
        begun.recv_timeout(PATIENCE)?;
        Ok(told)
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        drop(self.end.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Sends requests to one server.
#[derive(Clone)]
struct Origin {
    send: SendRequest<Body>,
    uri: http::Uri,
}

impl Origin {
    async fn connect(port: u16) -> Outcome<Self> {
        let stream = TcpStream::connect(("127.0.0.1", port)).await?;
        stream.set_nodelay(true)?;
        let mut builder = Builder::new(TokioExecutor::new());
        builder.initial_stream_window_size(1 << 20).initial_connection_window_size(1 << 24);
        let (send, driver) = builder.handshake(TokioIo::new(stream)).await?;
        tokio::spawn(driver);
        let authority = format!("127.0.0.1:{port}");
        let uri = http::Uri::builder().scheme("http").authority(authority).path_and_query("/").build()?;
        Ok(Self { send, uri })
    }

    fn grpc(&self) -> Grpc<Self> {
        Grpc::with_origin(self.clone(), self.uri.clone())
    }
}

impl tower_service::Service<http::Request<Body>> for Origin {
    type Response = http::Response<Incoming>;
    type Error = hyper::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Self::Error>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.send.poll_ready(cx)
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        Box::pin(self.send.send_request(request))
    }
}

// The messages of etcd's own lock, which the library has no use for.

#[derive(Clone, PartialEq, prost::Message)]
struct LockRequest {
    #[prost(bytes = "vec", tag = "1")]
    name: Vec<u8>,
    #[prost(int64, tag = "2")]
    lease: i64,
}

#[derive(Clone, PartialEq, prost::Message)]
struct LockResponse {
    #[prost(bytes = "vec", tag = "2")]
    key: Vec<u8>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct UnlockRequest {
    #[prost(bytes = "vec", tag = "1")]
    key: Vec<u8>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct UnlockResponse {}
