//! One HTTP/2 connection to one server, and the calls that go over it. No retries, no deadlines: those are the client's.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use hyper::body::Incoming;
use hyper::client::conn::http2::{Builder, SendRequest};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::TcpStream;
use tokio_util::sync::CancellationToken;
use tonic::body::Body;
use tonic::client::Grpc;
use tonic::metadata::AsciiMetadataValue;
use tonic::{Request, Streaming};
use tonic_prost::ProstCodec;

use super::address::{Endpoint, Tls};
use super::failure::Failure;
use crate::clock::Moment;
use crate::runtime::Environment;

/// The server takes it for an attack when a client pings more often than every 5 s.
const KEEP_ALIVE: Duration = Duration::from_secs(6);
const KEEP_ALIVE_TIMEOUT: Duration = Duration::from_secs(3);

/// A service of etcd, and one of its calls.
pub(super) type Path = &'static str;

pub(super) struct Connection {
    pub(super) endpoint: Endpoint,
    grpc: Origin,
    /// Cancelled when others take its place: what it carries for long has to move.
    pub(super) retired: CancellationToken,
    /// Held by who asks for a token over it.
    pub(super) authenticating: tokio::sync::Mutex<()>,
    /// When a request on it was answered last.
    answered: AtomicU64,
}

impl Connection {
    /// Connects. The connection lives until the last call on it is over, or `closed`.
    pub(super) async fn open(
        endpoint: Endpoint,
        tls: Option<Tls>,
        env: Arc<dyn Environment>,
        closed: CancellationToken,
    ) -> Result<Arc<Self>, Failure> {
        let failed =
            |what: &str, error: &dyn std::fmt::Display| Failure::unknown(format!("{endpoint}: {what}: {error}"));
        let stream = TcpStream::connect((&*endpoint.host, endpoint.port));
        let stream = stream.await.map_err(|error| failed("cannot connect", &error))?;
        stream.set_nodelay(true).map_err(|error| failed("cannot connect", &error))?;
        let spawner = Spawner { env, closed };
        let mut builder = Builder::new(spawner.clone());
        builder.timer(TokioTimer::new()).keep_alive_interval(KEEP_ALIVE).keep_alive_timeout(KEEP_ALIVE_TIMEOUT);
        // Up to a line of thousands in one answer.
        builder.initial_stream_window_size(1 << 20).initial_connection_window_size(1 << 24);
        let (send, scheme) = if let Some(tls) = &tls {
            let name = tls.server_name(&endpoint)?;
            let stream = tls.connector.connect(name, stream).await.map_err(|error| failed("TLS", &error))?;
            (handshake(&builder, &spawner, stream).await, "https")
        } else {
            (handshake(&builder, &spawner, stream).await, "http")
        };
        let send = send.map_err(|error| failed("HTTP/2", &error))?;
        let uri = http::Uri::builder().scheme(scheme).authority(endpoint.to_string()).path_and_query("/").build();
        let uri = uri.map_err(|error| failed("its name", &error))?;
        Ok(Arc::new(Self {
            endpoint,
            grpc: Origin { send, uri },
            retired: CancellationToken::new(),
            authenticating: tokio::sync::Mutex::default(),
            answered: AtomicU64::new(0),
        }))
    }

    pub(super) fn answered(&self, now: Moment) {
        self.answered.fetch_max(now.as_nanos(), Ordering::Relaxed);
    }

    pub(super) fn has_answered_since(&self, since: Moment) -> bool {
        self.answered.load(Ordering::Relaxed) > since.as_nanos()
    }

    /// Whether calls can still be made.
    pub(super) fn is_open(&self) -> bool {
        !self.grpc.send.is_closed() && !self.retired.is_cancelled()
    }

    pub(super) async fn unary<Q, A>(&self, path: Path, request: Request<Q>) -> Result<A, Failure>
    where
        Q: prost::Message + 'static,
        A: prost::Message + Default + 'static,
    {
        let mut grpc = self.grpc();
        let answer = grpc.unary(request, http::uri::PathAndQuery::from_static(path), ProstCodec::default()).await;
        answer.map(tonic::Response::into_inner).map_err(|status| self.failure(status))
    }

    pub(super) async fn streaming<Q, A>(
        &self,
        path: Path,
        request: Request<impl futures_core::Stream<Item = Q> + Send + 'static>,
    ) -> Result<Streaming<A>, Failure>
    where
        Q: prost::Message + 'static,
        A: prost::Message + Default + 'static,
    {
        let mut grpc = self.grpc();
        let answer = grpc.streaming(request, http::uri::PathAndQuery::from_static(path), ProstCodec::default()).await;
        answer.map(tonic::Response::into_inner).map_err(|status| self.failure(status))
    }

    fn grpc(&self) -> Grpc<Origin> {
        Grpc::with_origin(self.grpc.clone(), self.grpc.uri.clone()).max_decoding_message_size(usize::MAX)
    }

    /// What went wrong, and where.
    pub(super) fn failure(&self, status: tonic::Status) -> Failure {
        Failure::from(status).at(&self.endpoint)
    }
}

/// What every request carries.
pub(super) fn with_metadata<Q>(request: Q, token: Option<AsciiMetadataValue>, limit: Option<Duration>) -> Request<Q> {
    let mut request = Request::new(request);
    // A server that has lost its leader says so instead of staying silent.
    request.metadata_mut().insert("hasleader", AsciiMetadataValue::from_static("true"));
    if let Some(token) = token {
        request.metadata_mut().insert("token", token);
    }
    if let Some(limit) = limit {
        // A hint to the server, in a form that has not room for more.
        request.set_timeout(limit.min(Duration::from_secs(86_400)));
    }
    request
}

async fn handshake<T>(builder: &Builder<Spawner>, spawner: &Spawner, stream: T) -> hyper::Result<SendRequest<Body>>
where
    T: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin + Send + 'static,
{
    let (send, driver) = builder.handshake(TokioIo::new(stream)).await?;
    hyper::rt::Executor::execute(spawner, driver);
    Ok(send)
}

/// Runs what belongs to connections on the library's thread, until the store is closed.
#[derive(Clone)]
struct Spawner {
    env: Arc<dyn Environment>,
    closed: CancellationToken,
}

impl<F: Future<Output: Send> + Send + 'static> hyper::rt::Executor<F> for Spawner {
    fn execute(&self, task: F) {
        let closed = self.closed.clone();
        self.env.spawn(Box::pin(async move {
            closed.run_until_cancelled(task).await;
        }));
    }
}

/// Sends requests to one server.
#[derive(Clone)]
struct Origin {
    send: SendRequest<Body>,
    uri: http::Uri,
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
