//! The server: a thread that accepts, and one for each client.

use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::FileTypeExt as _;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use pumice_bdev::BdevError;
use pumice_io::sys::bind_private;
use pumice_io::sys::socket::connect;
use pumice_io::sys::socket::is_hung_up;

use super::frame::{Frame, Scanner};
use super::message;
use crate::config::App;
use crate::send::send;

/// Longest wait for an existing socket to accept a connection.
const STALE_PATIENCE: Duration = Duration::from_secs(1);

/// The code and the text of the answer to bytes that are not JSON-RPC.
const NOT_JSON: (i64, &str) = (-32700, "not a JSON-RPC message");

/// Limits of a server.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct ServerOptions {
    /// Longest request, in bytes.
    pub request_max: usize,
    /// Most clients at a time.
    pub clients_max: usize,
    /// Longest time for the rest of a request, for the client to read an answer, and for which bytes
    /// of the client are discarded after an error that ends the connection.
    pub patience: Duration,
    /// Longest time between a client's requests. It is disconnected afterwards.
    pub idle_max: Duration,
}

pumice_io::setters!(ServerOptions: request_max: usize, clients_max: usize, patience: Duration, idle_max: Duration);

impl Default for ServerOptions {
    fn default() -> Self {
        ServerOptions {
            request_max: 1 << 20,
            clients_max: 32,
            patience: Duration::from_secs(10),
            idle_max: Duration::from_secs(600),
        }
    }
}

/// A JSON-RPC server on a Unix socket. Dropping this stops it and removes the socket.
#[derive(Debug)]
pub struct RpcServer {
    path: PathBuf,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl RpcServer {
    /// Serves `app` on the socket `path`, which only the owner of this process may use.
    ///
    /// # Errors
    /// Fails with [`BdevError::InUse`] when a server answers there already, and with the system's
    /// errors.
    pub fn start(app: Arc<App>, path: &Path, options: ServerOptions) -> Result<Self, BdevError> {
        let os = |what: &str, e| BdevError::os(path.display().to_string(), what, e);
        clear_stale(path)?;
        let listener = bind_private(path).map_err(|e| os("bind the socket", e))?;
        listener
            .set_nonblocking(true)
            .map_err(|e| os("set up the socket", e))?;
        let stop = Arc::new(AtomicBool::new(false));
        let stopping = Arc::clone(&stop);
        let builder = thread::Builder::new().name("rpc".to_owned());
        let thread = builder
            .spawn(move || accept(&app, &listener, &options, &stopping))
            .map_err(|e| os("start the server", e))?;
        tracing::info!(socket = %path.display(), "JSON-RPC");
        Ok(RpcServer {
            path: path.to_owned(),
            stop,
            thread: Some(thread),
        })
    }
}

impl Drop for RpcServer {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        let _ = std::fs::remove_file(&self.path);
    }
}

/// Removes the socket of a server that has ended. Refuses when a server is alive.
pub(crate) fn clear_stale(path: &Path) -> Result<(), BdevError> {
    let device = path.display().to_string();
    match std::fs::symlink_metadata(path) {
        Err(_) => Ok(()),
        Ok(meta) if !meta.file_type().is_socket() => {
            let reason = "exists and is not a socket; choose another path".to_owned();
            Err(BdevError::Unsafe { device, reason })
        }
        Ok(_) => match connect(path, STALE_PATIENCE) {
            Err(e) if e.kind() == io::ErrorKind::ConnectionRefused => std::fs::remove_file(path)
                .map_err(|e| BdevError::os(device, "remove a stale socket", e)),
            // A server listens there, even if it does not accept the connection.
            _ => Err(BdevError::InUse { device, pid: None }),
        },
    }
}

/// Reduces the number of clients when a client's thread ends in any way.
struct Counted(Arc<AtomicUsize>);

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

fn accept(
    app: &Arc<App>,
    listener: &UnixListener,
    options: &ServerOptions,
    stop: &Arc<AtomicBool>,
) {
    let clients = Arc::new(AtomicUsize::new(0));
    while !stop.load(Ordering::Acquire) {
        let stream = match listener.accept() {
            Ok((stream, _)) => stream,
            Err(e) => {
                if e.kind() != io::ErrorKind::WouldBlock {
                    tracing::warn!(error = %e, "accept");
                }
                thread::sleep(Duration::from_millis(10));
                continue;
            }
        };
        if clients.load(Ordering::Acquire) >= options.clients_max {
            let clients_max = options.clients_max;
            tracing::warn!(clients_max, "too many clients: one was refused");
            turn_away(stream, clients_max);
            continue;
        }
        clients.fetch_add(1, Ordering::AcqRel);
        let (app, options) = (Arc::clone(app), options.clone());
        let (count, stop) = (Counted(Arc::clone(&clients)), Arc::clone(stop));
        let spawned = thread::Builder::new()
            .name("rpc-client".to_owned())
            .spawn(move || {
                let _count = count;
                if let Err(error) = serve(&app, stream, &options, &stop) {
                    tracing::debug!(%error, "client disconnected");
                }
            });
        if let Err(error) = spawned {
            tracing::warn!(%error, "no thread for a client: it was refused");
        }
    }
    // Clients' threads look at `stop` a few times a second.
    let start = Instant::now();
    while clients.load(Ordering::Acquire) > 0 && start.elapsed() < options.patience {
        thread::sleep(Duration::from_millis(5));
    }
}

/// Serves one client on a connected stream, until it disconnects, exceeds a limit or `stop` is set.
/// Blocks.
///
/// # Errors
/// Returns the system's errors of the stream.
pub fn serve(
    app: &App,
    mut stream: UnixStream,
    options: &ServerOptions,
    stop: &AtomicBool,
) -> io::Result<()> {
    const TICK: Duration = Duration::from_millis(100);
    stream.set_nonblocking(false)?;
    stream.set_read_timeout(Some(TICK))?;
    stream.set_write_timeout(Some(options.patience))?;
    let mut buf: Vec<u8> = Vec::new();
    let mut piece = [0; 4096];
    let mut scanner = Scanner::default();
    let mut since = Instant::now();
    loop {
        match scanner.scan(&buf) {
            Frame::Complete(end) => {
                let gone = || stop.load(Ordering::Acquire) || is_hung_up(&stream);
                let answer = message::handle_until(app, &buf[..end], &gone);
                buf.drain(..end);
                scanner.restart();
                since = Instant::now();
                if let Some(mut answer) = answer {
                    answer.push('\n');
                    send(&mut stream, answer.as_bytes(), options.patience)?;
                }
                continue;
            }
            Frame::Garbage => {
                // The start of the next message is unknown.
                return farewell(&mut stream, NOT_JSON, options, stop);
            }
            Frame::Partial if buf.len() > options.request_max => {
                let message = format!("a request has at most {} bytes", options.request_max);
                return farewell(&mut stream, (-32600, &message), options, stop);
            }
            Frame::Partial => {}
        }
        if stop.load(Ordering::Acquire) {
            return Ok(());
        }
        let begun = buf.iter().any(|b| !b.is_ascii_whitespace());
        let limit = if begun {
            options.patience
        } else {
            options.idle_max
        };
        if since.elapsed() > limit {
            return say(&mut stream, -32600, "the request did not come in time");
        }
        match stream.read(&mut piece) {
            Ok(0) => return Ok(()),
            Ok(n) => {
                if !begun {
                    since = Instant::now();
                    buf.clear();
                    scanner.restart();
                }
                buf.extend_from_slice(&piece[..n]);
            }
            Err(e)
                if matches!(
                    e.kind(),
                    io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut
                ) => {}
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
}

/// Tells a client why its connection ends, without delaying other clients.
fn turn_away(mut stream: UnixStream, clients_max: usize) {
    let message = format!("there are {clients_max} clients already; try again later");
    let _ = stream.set_nonblocking(true);
    let _ = say(&mut stream, -32000, &message);
    let _ = stream.shutdown(std::net::Shutdown::Write);
    // A socket that is closed with unread bytes causes an error on the other side.
    let mut piece = [0; 4096];
    for _ in 0..16 {
        if !matches!(stream.read(&mut piece), Ok(n) if n > 0) {
            break;
        }
    }
}

/// Tells the client why the connection ends, and reads what the client is still sending, so that
/// the client reads the reason.
fn farewell(
    stream: &mut UnixStream,
    (code, message): (i64, &str),
    options: &ServerOptions,
    stop: &AtomicBool,
) -> io::Result<()> {
    say(stream, code, message)?;
    stream.shutdown(std::net::Shutdown::Write)?;
    let start = Instant::now();
    let mut piece = [0; 64 << 10];
    while start.elapsed() < options.patience && !stop.load(Ordering::Acquire) {
        match stream.read(&mut piece) {
            Ok(0) => break,
            Ok(_) => {}
            Err(e)
                if matches!(
                    e.kind(),
                    io::ErrorKind::WouldBlock
                        | io::ErrorKind::TimedOut
                        | io::ErrorKind::Interrupted
                ) => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

fn say(stream: &mut UnixStream, code: i64, message: &str) -> io::Result<()> {
    let answer = serde_json::json!({
        "jsonrpc": "2.0", "id": null, "error": { "code": code, "message": message }
    });
    stream.write_all(format!("{answer}\n").as_bytes())
}
