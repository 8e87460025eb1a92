//! Connections: how many, how slow they may be, and how they end.

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto::Builder;
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};

use super::App;

/// Of a request's head, bytes that are read at most.
const HEAD_BYTES: usize = 32 << 10;
const MAX_HEADERS: usize = 100;
const MAX_STREAMS: u32 = 64;
/// After an error of the listener, such as too many open files.
const PAUSE: Duration = Duration::from_millis(50);

/// Serves every listener until a signal, then ends: what comes in the time of grace is taken, what runs may take its time, and a second
/// signal cuts both off.
pub async fn serve(app: &Arc<App>, listeners: Vec<(TcpListener, Router)>) {
    let (stop, stopping) = watch::channel(false);
    let room = Arc::new(Semaphore::new(app.config.limits.max_connections.min(Semaphore::MAX_PERMITS)));
    let accepting = listeners
        .into_iter()
        .map(|(listener, router)| tokio::spawn(accept(app.clone(), (listener, router), room.clone(), stopping.clone())));
    let accepting: Vec<_> = accepting.collect();
    signal().await;
    app.leave();
    let grace = Duration::from_secs_f64(app.config.grace_s);
    if !grace.is_zero() {
        tracing::info!(in_hand = app.fleet.n_in_hand(), ?grace, "stopping: not ready any more, requests are still taken");
        tokio::select! {
            () = tokio::time::sleep(grace) => {}
            () = signal() => return tracing::warn!(in_hand = app.fleet.n_in_hand(), "stopped at once"),
        }
    }
    app.drain();
    tracing::info!(in_hand = app.fleet.n_in_hand(), "stopping: what runs is finished, nothing new is taken");
    // Nobody listens any more only if all have ended.
    let _ = stop.send(true);
    let drained = async {
        for one in accepting {
            // A panic there was told when it happened.
            let _ = one.await;
        }
    };
    tokio::select! {
        () = drained => tracing::info!("stopped"),
        () = signal() => tracing::warn!(in_hand = app.fleet.n_in_hand(), "stopped at once"),
        () = tokio::time::sleep(Duration::from_secs_f64(app.config.drain_s)) => {
            tracing::warn!(in_hand = app.fleet.n_in_hand(), "stopped: the time to finish is over");
        }
    }
}

/// Takes connections until it is told to stop; then waits for those that are open to end what they have begun.
async fn accept(
    app: Arc<App>,
    (listener, router): (TcpListener, Router),
    room: Arc<Semaphore>,
    mut stopping: watch::Receiver<bool>,
) {
    let (builder, graceful) = (builder(&app), GracefulShutdown::new());
    loop {
        let permit = room.clone().acquire_owned().await.expect("it is never closed");
        let stream = tokio::select! {
            accepted = listener.accept() => accepted,
            _ = stopping.changed() => break,
        };
        let Ok((stream, _)) = stream else {
            tokio::time::sleep(PAUSE).await;
            continue;
        };
        let served = answer(&builder, &graceful, stream, router.clone());
        tokio::spawn(async move {
            served.await;
            drop(permit);
        });
    }
    drop(listener);
    graceful.shutdown().await;
}

fn answer(
    builder: &Builder<TokioExecutor>,
    graceful: &GracefulShutdown,
    stream: TcpStream,
    router: Router,
) -> impl Future<Output = ()> + use<> {
    // Small answers go out at once.
    let _ = stream.set_nodelay(true);
    let connection = builder.serve_connection(TokioIo::new(stream), TowerToHyperService::new(router)).into_owned();
    let watched = graceful.watch(connection);
    async move {
        // A client that broke off, or said something that is not HTTP.
        let _ = watched.await;
    }
}

fn builder(app: &App) -> Builder<TokioExecutor> {
    let patience = Duration::from_secs_f64(app.config.limits.head_timeout_s);
    let mut builder = Builder::new(TokioExecutor::new());
    builder.http1().timer(TokioTimer::new()).header_read_timeout(patience).max_buf_size(HEAD_BYTES).max_headers(MAX_HEADERS);
    builder
        .http2()
        .timer(TokioTimer::new())
        .max_header_list_size(HEAD_BYTES as u32)
        .max_concurrent_streams(MAX_STREAMS)
        .keep_alive_interval(patience)
        .keep_alive_timeout(patience);
    builder
}

/// SIGTERM, or Ctrl-C.
async fn signal() {
    #[cfg(unix)]
    {
        use tokio::signal::unix::{SignalKind, signal};
        let listen = |kind| signal(kind).expect("signals can be listened to");
        let (mut term, mut interrupt) = (listen(SignalKind::terminate()), listen(SignalKind::interrupt()));
        tokio::select! {
            _ = term.recv() => {}
            _ = interrupt.recv() => {}
        }
    }
    #[cfg(not(unix))]
    tokio::signal::ctrl_c().await.expect("Ctrl-C can be listened to");
}
