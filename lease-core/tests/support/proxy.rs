//! A bad network: a port that forwards to another, and does to what passes what networks do.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::Runtime;
use tokio::sync::watch;

/// What happens to bytes that pass. Connections are made in any case, as by a firewall that drops packets silently.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    None,
    /// Each piece takes so long, in each direction.
    Delay(Duration),
    /// What the servers say is lost: requests are applied, and answers never come.
    LoseAnswers,
    /// What clients say is lost.
    LoseRequests,
    /// Both.
    BlackHole,
    /// What clients say is kept, though they may be gone by then, until there is no fault any more: late requests.
    HoldRequests,
}

pub(crate) struct Proxy {
    port: u16,
    state: Arc<State>,
    _runtime: Runtime,
}

struct State {
    fault: watch::Sender<Fault>,
    /// Counted up to cut every connection that there is.
    cuts: watch::Sender<u64>,
    /// Bytes that met a fault.
    fired: AtomicU64,
    opened: AtomicU64,
    /// Of clients, now.
    open: AtomicU64,
    to: u16,
}

impl Proxy {
    pub(crate) fn to(port: u16) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let listener = runtime.block_on(TcpListener::bind(("127.0.0.1", 0))).unwrap();
        let own = listener.local_addr().unwrap().port();
        let state = Arc::new(State {
            fault: watch::channel(Fault::None).0,
            cuts: watch::channel(0).0,
            fired: AtomicU64::new(0),
            opened: AtomicU64::new(0),
            open: AtomicU64::new(0),
            to: port,
        });
        let serving = state.clone();
        runtime.spawn(async move {
            loop {
                let (client, _) = listener.accept().await.unwrap();
                serving.opened.fetch_add(1, Ordering::SeqCst);
                tokio::spawn(serving.clone().serve(client));
            }
        });
        Self { port: own, state, _runtime: runtime }
    }

    pub(crate) fn port(&self) -> u16 {
        self.port
    }

    pub(crate) fn set(&self, fault: Fault) {
        self.state.fault.send_replace(fault);
    }

    /// Resets every connection that there is.
    pub(crate) fn cut(&self) {
        self.state.cuts.send_modify(|cuts| *cuts += 1);
    }

    /// Bytes that met a fault.
    pub(crate) fn fired(&self) -> u64 {
        self.state.fired.load(Ordering::SeqCst)
    }

    /// How many connections of clients there are now.
    pub(crate) fn open(&self) -> u64 {
        self.state.open.load(Ordering::SeqCst)
    }

    /// How many connections clients have made.
    pub(crate) fn opened(&self) -> u64 {
        self.state.opened.load(Ordering::SeqCst)
    }
}

impl State {
    async fn serve(self: Arc<Self>, client: TcpStream) {
        let to = SocketAddr::from(([127, 0, 0, 1], self.to));
        let Ok(server) = TcpStream::connect(to).await else { return };
        for stream in [&client, &server] {
            stream.set_nodelay(true).unwrap();
        }
        let ((from_client, to_client), (from_server, to_server)) = (client.into_split(), server.into_split());
        self.open.fetch_add(1, Ordering::SeqCst);
        let down = tokio::spawn(self.clone().pump(from_server, to_client, false));
        let held = self.clone().pump(from_client, to_server, true).await;
        self.open.fetch_sub(1, Ordering::SeqCst);
        drop(down);
        if let Some((held, mut to)) = held {
            // The client is gone, and its requests are on their way.
            let _ = self.fault.subscribe().wait_for(|fault| *fault == Fault::None).await;
            let _ = to.write_all(&held).await;
            // Long enough to be served.
            tokio::time::sleep(Duration::from_secs(2)).await;
        }
    }

    /// Until one side ends, or the connection is cut. Gives back what was held, and where it goes.
    async fn pump(
        self: Arc<Self>,
        mut from: OwnedReadHalf,
        mut to: OwnedWriteHalf,
        up: bool,
    ) -> Option<(Vec<u8>, OwnedWriteHalf)> {
        let (mut fault, mut cuts) = (self.fault.subscribe(), self.cuts.subscribe());
        let mut held = Vec::new();
        let mut piece = vec![0; 1 << 16];
        loop {
            let read = tokio::select! {
                read = from.read(&mut piece) => read.unwrap_or(0),
                _ = cuts.changed() => 0,
                // What was held up goes on.
                () = async { drop(fault.wait_for(|fault| *fault == Fault::None).await) }, if !held.is_empty() => {
                    if to.write_all(&held).await.is_err() {
                        break;
                    }
                    held.clear();
                    continue;
                }
            };
            let now = *fault.borrow_and_update();
            if read == 0 {
                break;
            }
            let is_lost = match now {
                Fault::BlackHole => true,
                Fault::LoseAnswers => !up,
                Fault::LoseRequests => up,
                _ => false,
            };
            if now != Fault::None {
                self.fired.fetch_add(read as u64, Ordering::SeqCst);
            }
            if let Fault::Delay(delay) = now {
                tokio::time::sleep(delay).await;
            }
            if now == Fault::HoldRequests && up {
                held.extend_from_slice(&piece[..read]);
            } else if !is_lost {
                held.extend_from_slice(&piece[..read]);
                if to.write_all(&std::mem::take(&mut held)).await.is_err() {
                    break;
                }
            }
        }
        (!held.is_empty()).then_some((held, to))
    }
}
