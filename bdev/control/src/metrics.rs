//! Statistics as text for Prometheus, over HTTP on a Unix socket or a loopback port. There are none
//! unless a server is started.

use std::fmt::Write as _;
use std::io::{self, Read as _};
use std::net::{SocketAddr, TcpListener};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use pumice_bdev::registry::Registry;
use pumice_bdev::{BdevError, BlockDevice, OpKind};
use pumice_io::sys::Clock;

use crate::send::send;

/// Longest time for a request, and for the client to read the answer.
const PATIENCE: Duration = Duration::from_secs(2);

/// Returns the statistics of every device (Prometheus text format 0.0.4).
pub fn render(registry: &Registry) -> String {
    let clock = Clock::get();
    let bdevs = registry.list();
    let mut text = String::new();
    let mut metric = |name: &str, kind: &str, help: &str, rows: &mut dyn FnMut(&mut String)| {
        let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} {kind}");
        rows(&mut text);
    };
    metric(
        "pumice_bdev_size_bytes",
        "gauge",
        "Capacity of the device.",
        &mut |text| {
            for b in &bdevs {
                let (name, len) = (label(&b.info().name), b.info().len_bytes());
                let _ = writeln!(text, "pumice_bdev_size_bytes{{bdev=\"{name}\"}} {len}");
            }
        },
    );
    let stats: Vec<_> = bdevs
        .iter()
        .map(|b| (label(&b.info().name), b.stats()))
        .collect();
    type Get = fn(&pumice_bdev::stats::OpStats) -> u64;
    let counters: [(&str, &str, Get); 3] = [
        ("pumice_bdev_ops_total", "Operations that ended.", |s| s.ops),
        (
            "pumice_bdev_bytes_total",
            "Bytes of operations that succeeded.",
            |s| s.bytes,
        ),
        ("pumice_bdev_errors_total", "Operations that failed.", |s| {
            s.errors
        }),
    ];
    for (name, help, get) in counters {
        metric(name, "counter", help, &mut |text| {
            for (bdev, stats) in &stats {
                for kind in OpKind::ALL.iter().filter(|k| stats.of(**k).ops > 0) {
                    let value = get(stats.of(*kind));
                    let _ = writeln!(text, "{name}{{bdev=\"{bdev}\",op=\"{kind}\"}} {value}");
                }
            }
        });
    }
    let name = "pumice_bdev_latency_seconds_total";
    metric(
        name,
        "counter",
        "Sum of the operations' latencies.",
        &mut |text| {
            for (bdev, stats) in &stats {
                for kind in OpKind::ALL.iter().filter(|k| stats.of(**k).ops > 0) {
                    let ns = clock.to_ns(stats.of(*kind).latency_ticks);
                    let (s, ns) = (ns / 1_000_000_000, ns % 1_000_000_000);
                    let _ = writeln!(text, "{name}{{bdev=\"{bdev}\",op=\"{kind}\"}} {s}.{ns:09}");
                }
            }
        },
    );
    text
}

/// Returns a label's value, escaped.
fn label(text: &str) -> String {
    text.replace('\\', "\\\\")
        .replace('"', "\\\"")
        .replace('\n', "\\n")
}

/// A server of the statistics. It stops when this is dropped.
#[derive(Debug)]
pub struct MetricsServer {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
    socket: Option<PathBuf>,
    port: Option<u16>,
}

enum Listener {
    Unix(UnixListener),
    Tcp(TcpListener),
}

trait Stream: io::Read + io::Write {}
impl<T: io::Read + io::Write> Stream for T {}

impl Listener {
    fn accept(&self) -> io::Result<Box<dyn Stream>> {
        match self {
            Listener::Unix(l) => {
                let (stream, _) = l.accept()?;
                stream.set_nonblocking(false)?;
                stream.set_read_timeout(Some(PATIENCE))?;
                stream.set_write_timeout(Some(PATIENCE))?;
                Ok(Box::new(stream))
            }
            Listener::Tcp(l) => {
                let (stream, _) = l.accept()?;
                stream.set_nonblocking(false)?;
                stream.set_read_timeout(Some(PATIENCE))?;
                stream.set_write_timeout(Some(PATIENCE))?;
                Ok(Box::new(stream))
            }
        }
    }
}

impl MetricsServer {
    /// Serves on `address`: the path of a Unix socket, or a loopback address (`127.0.0.1:9100`;
    /// port 0: any free port).
    ///
    /// # Errors
    /// Fails for an address that is not loopback, for a path that exists, and with the system's
    /// errors.
    pub fn start(registry: Registry, address: &str) -> Result<MetricsServer, BdevError> {
        MetricsServer::serve(move || render(&registry), address)
    }

    /// As [`MetricsServer::start`], with the text that `render` gives at each request.
    ///
    /// # Errors
    /// As [`MetricsServer::start`].
    pub fn serve(
        render: impl Fn() -> String + Send + 'static,
        address: &str,
    ) -> Result<MetricsServer, BdevError> {
        let os = |what: &str, e| BdevError::os(address, what, e);
        let (mut socket, mut port) = (None, None);
        let listener = if let Ok(addr) = address.parse::<SocketAddr>() {
            if !addr.ip().is_loopback() {
                let reason = "not a loopback address; use 127.0.0.1:PORT or a socket's path";
                let name = format!("metrics address {address}");
                return Err(BdevError::InvalidOption {
                    name,
                    reason: reason.to_owned(),
                });
            }
            let tcp = TcpListener::bind(addr).map_err(|e| os("listen", e))?;
            port = tcp.local_addr().ok().map(|a| a.port());
            tcp.set_nonblocking(true).map_err(|e| os("listen", e))?;
            Listener::Tcp(tcp)
        } else {
            let path = Path::new(address);
            crate::rpc::clear_stale(path)?;
            let unix = pumice_io::sys::bind_private(path).map_err(|e| os("bind the socket", e))?;
            unix.set_nonblocking(true).map_err(|e| os("listen", e))?;
            socket = Some(path.to_owned());
            Listener::Unix(unix)
        };
        let stop = Arc::new(AtomicBool::new(false));
        let stopping = Arc::clone(&stop);
        let builder = thread::Builder::new().name("metrics".to_owned());
        let thread = builder.spawn(move || {
            while !stopping.load(Ordering::Acquire) {
                match listener.accept() {
                    Ok(stream) => {
                        let _ = answer(&render, stream);
                    }
                    Err(_) => thread::sleep(Duration::from_millis(50)),
                }
            }
        });
        let thread = Some(thread.map_err(|e| os("start the server", e))?);
        Ok(MetricsServer {
            stop,
            thread,
            socket,
            port,
        })
    }

    /// Returns the port of a loopback address.
    pub fn port(&self) -> Option<u16> {
        self.port
    }
}

impl Drop for MetricsServer {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        if let Some(path) = &self.socket {
            let _ = std::fs::remove_file(path);
        }
    }
}

fn answer(render: &dyn Fn() -> String, mut stream: Box<dyn Stream>) -> io::Result<()> {
    let start = Instant::now();
    let mut request = Vec::new();
    let mut piece = [0; 1024];
    while !request.windows(4).any(|w| w == b"\r\n\r\n") && !request.windows(2).any(|w| w == b"\n\n")
    {
        if start.elapsed() > PATIENCE {
            break;
        }
        let n = match stream.read(&mut piece) {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            other => other?,
        };
        request.extend_from_slice(&piece[..n]);
        if n == 0 || request.len() > 8192 {
            break;
        }
    }
    let found = request.starts_with(b"GET /metrics ") || request.starts_with(b"GET / ");
    let (status, body) = if found {
        ("200 OK", render())
    } else {
        ("404 Not Found", "only GET /metrics\n".to_owned())
    };
    let len = body.len();
    let answer = format!(
        "HTTP/1.0 {status}\r\nContent-Type: text/plain; version=0.0.4\r\nContent-Length: {len}\r\n\
         Connection: close\r\n\r\n{body}"
    );
    // Others wait until this client has been served.
    send(&mut stream, answer.as_bytes(), PATIENCE)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A connection whose every read is interrupted by a signal.
    struct Interrupted;

    impl io::Read for Interrupted {
        fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
            thread::sleep(Duration::from_millis(10));
            Err(io::ErrorKind::Interrupted.into())
        }
    }

    impl io::Write for Interrupted {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    /// A client that takes a little of the answer now and then.
    struct Slow;

    impl io::Read for Slow {
        fn read(&mut self, piece: &mut [u8]) -> io::Result<usize> {
            let request = b"GET /metrics HTTP/1.0\r\n\r\n";
            piece[..request.len()].copy_from_slice(request);
            Ok(request.len())
        }
    }

    impl io::Write for Slow {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            thread::sleep(Duration::from_millis(10));
            Ok(bytes.len().min(1000))
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_client_that_reads_slowly_does_not_keep_the_server() {
        // At that pace the answer would take ten seconds.
        let e = answer(&|| "x".repeat(1 << 20), Box::new(Slow)).unwrap_err();
        assert_eq!(e.kind(), io::ErrorKind::TimedOut);
    }

    #[test]
    fn signals_do_not_lengthen_a_request() {
        answer(&String::new, Box::new(Interrupted)).unwrap();
    }

    /// The name of a device may have any characters (a path is one).
    #[test]
    fn a_label_is_escaped() {
        assert_eq!(label("a\\b\"c\nd"), "a\\\\b\\\"c\\nd");
    }
}
