//! A client, which makes one call after another on a connection.

use std::io::{self, Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use pumice_io::sys::socket::{connect, peer_is_own};
use serde_json::{Value, json};

use super::frame::{Frame, Scanner};

/// Longest answer in bytes.
const ANSWER_MAX: usize = 64 << 20;

/// The reason why a call failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RpcError {
    /// No server accepts the connection.
    #[error("{path}: {source}; {}", connect_hint(.path, .source))]
    Connect {
        /// Path of the socket.
        path: String,
        /// The system's error.
        #[source]
        source: io::Error,
    },
    /// The connection broke.
    #[error("JSON-RPC: {0}")]
    Io(#[from] io::Error),
    /// The answer is invalid.
    #[error("JSON-RPC: the answer is not what it should be: {0}")]
    Answer(String),
    /// The server returned an error.
    #[error("{message} (code {code})")]
    Failed {
        /// Code of the error: -32768 to -32000 as in JSON-RPC 2.0, otherwise a negative errno.
        code: i64,
        /// Message of the error.
        message: String,
    },
}

/// Returns what to do when no server can be reached.
fn connect_hint(path: &str, source: &io::Error) -> String {
    match source.kind() {
        io::ErrorKind::PermissionDenied => {
            "only the user whose process serves it may connect".to_owned()
        }
        _ => format!("a process with --rpc-socket {path} has to run"),
    }
}

/// A connection to a JSON-RPC server.
#[derive(Debug)]
pub struct RpcClient {
    stream: UnixStream,
    timeout: Duration,
    id: u64,
}

impl RpcClient {
    /// Connects to the socket `path`, which a process of this user or root must serve. The
    /// connection, and each call, takes at most `timeout`.
    ///
    /// # Errors
    /// Fails with [`RpcError::Connect`].
    pub fn connect(path: &Path, timeout: Duration) -> Result<RpcClient, RpcError> {
        let failed = |source| RpcError::Connect {
            path: path.display().to_string(),
            source,
        };
        let stream = connect(path, timeout).map_err(|e| match e.kind() {
            io::ErrorKind::TimedOut => failed(io::Error::new(
                io::ErrorKind::TimedOut,
                format!("its server accepted no connection within {timeout:?}"),
            )),
            _ => failed(e),
        })?;
        // A name in a directory where everybody may create names does not say who serves it.
        if !peer_is_own(&stream) {
            let text = "another user serves it, neither this one nor root";
            return Err(failed(io::Error::new(
                io::ErrorKind::PermissionDenied,
                text,
            )));
        }
        stream.set_read_timeout(Some(timeout)).map_err(failed)?;
        stream.set_write_timeout(Some(timeout)).map_err(failed)?;
        Ok(RpcClient {
            stream,
            timeout,
            id: 0,
        })
    }

    /// Calls a method. Blocks until the answer has arrived.
    ///
    /// # Errors
    /// Returns the server's error, or that of the connection.
    pub fn call(&mut self, method: &str, params: &Value) -> Result<Value, RpcError> {
        self.id += 1;
        let mut request = json!({ "jsonrpc": "2.0", "method": method, "id": self.id });
        if let (Value::Object(map), false) = (&mut request, params.is_null()) {
            map.insert("params".to_owned(), params.clone());
        }
        self.stream.write_all(request.to_string().as_bytes())?;
        let mut answer = self.receive()?;
        if let Some(e) = answer.get("error") {
            let message = e["message"].as_str().unwrap_or("no message").to_owned();
            return Err(RpcError::Failed {
                code: e["code"].as_i64().unwrap_or(0),
                message,
            });
        }
        if answer["id"] != json!(self.id) {
            return Err(RpcError::Answer(format!(
                "id {} for {}",
                answer["id"], self.id
            )));
        }
        let result = answer.get_mut("result").map(Value::take);
        result.ok_or_else(|| RpcError::Answer("neither `result` nor `error`".to_owned()))
    }

    fn receive(&mut self) -> Result<Value, RpcError> {
        let mut buf = Vec::new();
        let mut piece = [0; 16 << 10];
        let mut scanner = Scanner::default();
        let deadline = Instant::now() + self.timeout;
        loop {
            match scanner.scan(&buf) {
                Frame::Complete(end) => {
                    let parsed = serde_json::from_slice(&buf[..end]);
                    return parsed.map_err(|e| RpcError::Answer(e.to_string()));
                }
                Frame::Garbage => return Err(RpcError::Answer("not JSON".to_owned())),
                Frame::Partial if buf.len() > ANSWER_MAX => {
                    return Err(RpcError::Answer("too long".to_owned()));
                }
                Frame::Partial => {}
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(io::Error::from(io::ErrorKind::TimedOut).into());
            }
            // The whole answer has the time of the call, not each piece of it.
            self.stream.set_read_timeout(Some(left))?;
            match self.stream.read(&mut piece) {
                Ok(0) => {
                    return Err(RpcError::Answer(
                        "the server closed the connection".to_owned(),
                    ));
                }
                Ok(n) => buf.extend_from_slice(&piece[..n]),
                // A signal, for example of a terminal that has another size: signal(7) says that a
                // read with a timeout is not restarted.
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                // The time is over.
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                Err(e) => return Err(e.into()),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A server that sends a piece of an answer and no more does not get the time of the call again.
    #[test]
    fn a_call_has_one_time_limit_for_all_pieces_of_its_answer() {
        let (stream, mut server) = UnixStream::pair().unwrap();
        let timeout = Duration::from_secs(2);
        stream.set_read_timeout(Some(timeout)).unwrap();
        let mut client = RpcClient {
            stream,
            timeout,
            id: 0,
        };
        let late = std::thread::spawn(move || {
            let mut request = [0; 1024];
            assert!(server.read(&mut request).unwrap() > 0);
            std::thread::sleep(Duration::from_millis(100));
            server.write_all(b"{").unwrap();
            server
        });
        let error = client.call("get", &Value::Null).unwrap_err();
        let timed_out =
            matches!(&error, RpcError::Io(error) if error.kind() == io::ErrorKind::TimedOut);
        assert!(timed_out, "{error}");
        let last = client.stream.read_timeout().unwrap().unwrap();
        assert!(last < timeout, "{last:?} for the second piece");
        drop(late.join().unwrap());
    }

    #[test]
    fn the_answer_to_another_call_is_not_taken() {
        let (stream, mut server) = UnixStream::pair().unwrap();
        let timeout = Duration::from_secs(60);
        let mut client = RpcClient {
            stream,
            timeout,
            id: 6,
        };
        server
            .write_all(br#"{"jsonrpc":"2.0","id":6,"result":"of the last call"}"#)
            .unwrap();
        let error = client.call("get", &Value::Null).unwrap_err();
        assert!(matches!(error, RpcError::Answer(_)), "{error}");
    }

    #[test]
    fn the_hint_fits_the_error() {
        let text = |kind: io::ErrorKind| {
            let path = "/run/rpc".to_owned();
            let source = kind.into();
            RpcError::Connect { path, source }.to_string()
        };
        assert!(text(io::ErrorKind::NotFound).contains("has to run"));
        assert!(text(io::ErrorKind::ConnectionRefused).contains("has to run"));
        let denied = text(io::ErrorKind::PermissionDenied);
        assert!(!denied.contains("has to run"), "{denied}");
        assert!(denied.contains("only the user"), "{denied}");
    }
}
