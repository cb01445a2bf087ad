//! The commands of QEMU's monitor protocol (QMP) that a scenario needs while it runs.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::Error;

/// A connection to the monitor, after its greeting.
pub struct Monitor {
    reader: BufReader<UnixStream>,
    writer: UnixStream,
}

impl Monitor {
    /// Connects to the monitor's socket, which QEMU makes shortly after it starts.
    pub fn connect(socket: &Path) -> Result<Monitor, Error> {
        let until = Instant::now() + Duration::from_secs(20);
        let stream = loop {
            match UnixStream::connect(socket) {
                Ok(stream) => break stream,
                Err(e) if Instant::now() > until => return Err(Error::at(socket, e)),
                Err(_) => std::thread::sleep(Duration::from_millis(50)),
            }
        };
        stream
            .set_read_timeout(Some(Duration::from_secs(20)))
            .map_err(|e| Error::at(socket, e))?;
        let writer = stream.try_clone().map_err(|e| Error::at(socket, e))?;
        let mut monitor = Monitor {
            reader: BufReader::new(stream),
            writer,
        };
        monitor.read()?;
        monitor.run("qmp_capabilities", &json!({}))?;
        Ok(monitor)
    }

    fn read(&mut self) -> Result<Value, Error> {
        let mut line = String::new();
        self.reader
            .read_line(&mut line)
            .map_err(|e| Error::Other(format!("QEMU's monitor: {e}")))?;
        serde_json::from_str(&line)
            .map_err(|e| Error::Other(format!("QEMU's monitor: {e}: {line}")))
    }

    /// Runs one command and waits for its answer. Skips events in between.
    pub fn run(&mut self, command: &str, arguments: &Value) -> Result<Value, Error> {
        let request = json!({ "execute": command, "arguments": arguments });
        writeln!(self.writer, "{request}")
            .map_err(|e| Error::Other(format!("QEMU's monitor: {e}")))?;
        loop {
            let answer = self.read()?;
            if let Some(error) = answer.get("error") {
                return Err(Error::Other(format!("QEMU refuses {command}: {error}")));
            }
            if let Some(value) = answer.get("return") {
                return Ok(value.clone());
            }
        }
    }

    /// Runs a request of the guest: `device_del ID`, or a command with its arguments as JSON.
    pub fn request(&mut self, words: &str) -> Result<(), Error> {
        let (command, rest) = words.split_once(' ').unwrap_or((words, ""));
        let arguments = if rest.starts_with('{') {
            serde_json::from_str(rest)
                .map_err(|e| Error::Other(format!("host request {words}: {e}")))?
        } else if rest.is_empty() {
            json!({})
        } else {
            json!({ "id": rest })
        };
        self.run(command, &arguments).map(|_| ())
    }
}
