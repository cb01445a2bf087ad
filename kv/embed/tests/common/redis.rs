//! The server of `examples/cpp-server`, and a client of Redis' protocol.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use super::{CPP, compile, repository};

/// Longest that anything is waited for.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Returns the server's program, which is compiled once. `None` without a compiler.
pub fn program(test: &str) -> Option<&'static Path> {
    static PROGRAM: OnceLock<Option<PathBuf>> = OnceLock::new();
    let made = PROGRAM.get_or_init(|| {
        let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join("cpp-server");
        let sources = ["commands", "main", "net", "replication", "resp", "store"];
        let file = |name| repository(&format!("examples/cpp-server/{name}.cc"));
        compile(&CPP, &sources.map(file), &path).map(|()| path)
    });
    if made.is_none() {
        println!("skipped: {test}: there is no C++ compiler");
    }
    made.as_deref()
}

/// A running server, which is killed when it is dropped.
pub struct Server {
    pub child: Child,
    pub port: u16,
}

impl Server {
    /// Starts a server on an image, and waits until it listens.
    pub fn start(program: &Path, image: &Path, more: &[&str]) -> Server {
        let uri = format!("--fs_uri=blobfs://{}?size:1G&create", image.display());
        let mut child = Command::new(program)
            .args([&uri, "--port=0"])
            .args(more)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        let mut output = BufReader::new(child.stdout.take().unwrap());
        output.read_line(&mut line).unwrap();
        let port = line.trim().rsplit(':').next().and_then(|p| p.parse().ok());
        let Some(port) = port else {
            panic!("the server says {line:?}: {:?}", child.wait());
        };
        Server { child, port }
    }

    pub fn client(&self) -> Client {
        Client::connect(self.port).unwrap()
    }

    /// Ends it by SIGKILL.
    pub fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Ends it in order.
    pub fn stop(mut self) -> ExitStatus {
        let pid = self.child.id().to_string();
        assert!(Command::new("kill").arg(&pid).status().unwrap().success());
        wait_for("the server ends", || {
            self.child.try_wait().unwrap().is_some()
        });
        self.child.wait().unwrap()
    }

    /// Returns its memory in KiB.
    pub fn memory_kib(&self, field: &str) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let line = status.lines().find(|line| line.starts_with(field)).unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Waits until a condition holds.
pub fn wait_for(what: &str, mut holds: impl FnMut() -> bool) {
    let until = Instant::now() + PATIENCE;
    while !holds() {
        assert!(Instant::now() < until, "not within {PATIENCE:?}: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A reply.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Value {
    Simple(String),
    Error(String),
    Integer(i64),
    Bulk(Vec<u8>),
    Null,
    Array(Vec<Value>),
}

impl Value {
    pub fn ok() -> Value {
        Value::Simple("OK".to_owned())
    }

    pub fn bulk(text: &str) -> Value {
        Value::Bulk(text.as_bytes().to_vec())
    }

    pub fn array(values: &[&str]) -> Value {
        Value::Array(values.iter().map(|text| Value::bulk(text)).collect())
    }

    /// Returns the text of a bulk or an error.
    pub fn text(&self) -> String {
        match self {
            Value::Bulk(bytes) => String::from_utf8_lossy(bytes).into_owned(),
            Value::Simple(text) | Value::Error(text) => text.clone(),
            other => panic!("{other:?} is not a text"),
        }
    }
}

/// A connection.
pub struct Client {
    stream: BufReader<TcpStream>,
}

impl Client {
    pub fn connect(port: u16) -> std::io::Result<Client> {
        let stream = TcpStream::connect(("127.0.0.1", port))?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        Ok(Client {
            stream: BufReader::new(stream),
        })
    }

    pub fn send(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        self.stream.get_mut().write_all(bytes)
    }

    fn line(&mut self) -> std::io::Result<String> {
        let mut line = String::new();
        if self.stream.read_line(&mut line)? == 0 {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
        Ok(line.trim_end_matches("\r\n").to_owned())
    }

    /// Receives one reply.
    pub fn receive(&mut self) -> std::io::Result<Value> {
        let line = self.line()?;
        let (kind, rest) = line.split_at(1);
        let number = || rest.parse::<i64>().unwrap();
        Ok(match kind {
            "+" => Value::Simple(rest.to_owned()),
            "-" => Value::Error(rest.to_owned()),
            ":" => Value::Integer(number()),
            "$" if number() < 0 => Value::Null,
            "$" => {
                let mut bytes = vec![0; usize::try_from(number()).unwrap() + 2];
                self.stream.read_exact(&mut bytes)?;
                assert_eq!(bytes.split_off(bytes.len() - 2), b"\r\n");
                Value::Bulk(bytes)
            }
            "*" => {
                let count = number();
                let items: std::io::Result<Vec<_>> = (0..count).map(|_| self.receive()).collect();
                Value::Array(items?)
            }
            _ => panic!("{line:?} is not a reply"),
        })
    }

    /// Sends a request without waiting for its reply.
    pub fn ask(&mut self, request: &[&[u8]]) -> std::io::Result<()> {
        let mut bytes = format!("*{}\r\n", request.len()).into_bytes();
        for part in request {
            bytes.extend(format!("${}\r\n", part.len()).bytes());
            bytes.extend(*part);
            bytes.extend(b"\r\n");
        }
        self.send(&bytes)
    }

    /// Sends a request of words and returns the reply.
    pub fn call(&mut self, request: &str) -> Value {
        let words: Vec<&[u8]> = request.split(' ').map(str::as_bytes).collect();
        self.ask(&words).unwrap();
        self.receive().unwrap()
    }

    /// Whether the server has closed the connection.
    pub fn is_over(&mut self) -> bool {
        match self.stream.read_to_end(&mut Vec::new()) {
            Ok(_) => true,
            // It was closed before it had read everything.
            Err(e) => e.kind() == std::io::ErrorKind::ConnectionReset,
        }
    }

    /// Returns a line of INFO.
    pub fn info(&mut self, name: &str) -> String {
        let text = self.call("INFO").text();
        let line = text
            .lines()
            .find_map(|line| line.strip_prefix(&format!("{name}:")[..]));
        line.unwrap_or_else(|| panic!("no {name} in {text}"))
            .to_owned()
    }
}
