//! Requests and their answers.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use pumice_io::sys::socket;

use super::message::{self, Command, Header, REGION_ACCESS_LEN, Version};
use super::stream::{self, Message};
use crate::transport::TransportError;
use crate::transport::vfio::info::u32_at;

/// Time-out of the first answer, which does not come while the server has another client.
pub(crate) const VERSION_TIMEOUT: Duration = Duration::from_secs(5);

/// Most answers to timed-out requests, and requests of the server, that may arrive before the
/// awaited answer.
const MAX_STRAYS: usize = 64;

/// A connection to a controller's process. It has one request in flight at a time.
#[derive(Debug)]
pub(crate) struct Client {
    device: String,
    socket: UnixStream,
    next_id: Mutex<u16>,
    timeout: Duration,
    max_fds: usize,
    broken: AtomicBool,
}

impl Client {
    /// Connects and agrees on the protocol version.
    pub(crate) fn connect(
        device: &str,
        path: &Path,
        timeout: Duration,
        version_timeout: Duration,
    ) -> Result<Client, TransportError> {
        let socket = socket::connect(path, version_timeout)
            .map_err(|source| cannot_connect(device, path, source))?;
        let mut client = Client {
            device: device.to_owned(),
            socket,
            next_id: Mutex::new(0),
            timeout: version_timeout,
            max_fds: 1,
            broken: AtomicBool::new(false),
        };
        client
            .socket
            .set_write_timeout(Some(timeout))
            .map_err(|e| client.io("SO_SNDTIMEO", e))?;
        let ours = r#"{"capabilities":{"max_msg_fds":8,"max_data_xfer_size":1048576}}"#;
        let reply = match client.request(Command::Version, &message::version(ours), &[]) {
            Err(TransportError::Timeout { .. }) => return Err(client.somebody_else(path)),
            other => other?,
        };
        let version = Version::decode(&reply.body)
            .ok_or_else(|| client.protocol("the answer to VERSION is too short".to_owned()))?;
        if version.major != 0 {
            return Err(client.protocol(format!(
                "the other side speaks vfio-user {}.{}, we speak 0.1",
                version.major, version.minor
            )));
        }
        tracing::debug!(device, ?version, "vfio-user connection");
        client.max_fds = version.max_msg_fds;
        client.timeout = timeout;
        Ok(client)
    }

    fn somebody_else(&self, path: &Path) -> TransportError {
        let peer = socket::peer(&self.socket);
        let pid = peer.as_ref().and_then(|(pid, _)| u32::try_from(*pid).ok());
        let served = match peer {
            Some((pid, name)) => format!("process {pid} ({name}), which serves the socket,"),
            None => "the process that serves the socket".to_owned(),
        };
        TransportError::InUse {
            device: self.device.clone(),
            detail: format!(
                "{served} gave no answer within {:?}; it serves one client at a time, so another \
                 may hold it ({} connections are open; ss -xp src {} shows them), or it is stuck",
                self.timeout,
                connections(path),
                path.display()
            ),
            pid,
        }
    }

    pub(crate) fn device(&self) -> &str {
        &self.device
    }

    pub(crate) fn socket(&self) -> &UnixStream {
        &self.socket
    }

    /// Whether the server runs as root or as this user, and so could end this process anyway.
    pub(crate) fn is_trusted(&self) -> bool {
        socket::peer_is_own(&self.socket)
    }

    /// Whether the connection is known to be unusable.
    pub(crate) fn is_broken(&self) -> bool {
        self.broken.load(Ordering::Acquire)
    }

    /// Ends the connection: the server unmaps everything that was mapped.
    pub(crate) fn shut_down(&self) {
        self.broken.store(true, Ordering::Release);
        let _ = self.socket.shutdown(std::net::Shutdown::Both);
    }

    pub(crate) fn io(&self, what: &str, source: io::Error) -> TransportError {
        TransportError::Io {
            device: self.device.clone(),
            what: what.to_owned(),
            source,
        }
    }

    pub(crate) fn protocol(&self, detail: String) -> TransportError {
        TransportError::Protocol {
            device: self.device.clone(),
            detail,
        }
    }

    /// Sends a request and waits for its answer. A refusal is an error.
    pub(crate) fn request(
        &self,
        command: Command,
        body: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> Result<Message, TransportError> {
        let removed = || TransportError::Removed {
            device: self.device.clone(),
        };
        let mut next_id = self.next_id.lock();
        if self.is_broken() {
            return Err(removed());
        }
        *next_id = next_id.wrapping_add(1);
        let header = Header::request(*next_id, command, body.len())
            .ok_or_else(|| self.protocol(format!("{} is too long", command.name())))?;
        let sent = stream::send(&self.socket, &header, body, fds);
        // Whatever the cause, a message that was sent in part makes the stream unusable.
        let cut = sent.is_err();
        match sent.and_then(|()| self.answer(&header)) {
            Ok(Some(reply)) => self.accepted(command, &reply.header).map(|()| reply),
            Ok(None) => {
                self.broken.store(true, Ordering::Release);
                Err(removed())
            }
            Err(e) => {
                if cut || e.kind() != io::ErrorKind::WouldBlock {
                    self.broken.store(true, Ordering::Release);
                }
                Err(match e.kind() {
                    io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => {
                        TransportError::Timeout {
                            device: self.device.clone(),
                            what: command.name().to_owned(),
                            timeout_ms: u64::try_from(self.timeout.as_millis()).unwrap_or(u64::MAX),
                        }
                    }
                    io::ErrorKind::BrokenPipe
                    | io::ErrorKind::ConnectionReset
                    | io::ErrorKind::UnexpectedEof => removed(),
                    io::ErrorKind::InvalidData => self.protocol(e.to_string()),
                    _ => self.io(command.name(), e),
                })
            }
        }
    }

    /// Waits for the answer to a request. Skips late answers to earlier requests, and refuses
    /// requests of the server (which may ask for DMA by message), since all memory is mapped.
    fn answer(&self, request: &Header) -> io::Result<Option<Message>> {
        let deadline = Instant::now() + self.timeout;
        for _ in 0..MAX_STRAYS {
            let Some(message) = stream::receive(&self.socket, Some(deadline))? else {
                return Ok(None);
            };
            let header = message.header;
            if header.is_reply() {
                if header.id == request.id && header.command == request.command {
                    return Ok(Some(message));
                }
                tracing::debug!(
                    device = self.device,
                    id = header.id,
                    "late answer passed over"
                );
            } else if !header.wants_no_reply()
                && let Some(refusal) = header.reply(0, libc::ENOTSUP.cast_unsigned())
            {
                stream::send(&self.socket, &refusal, &[], &[])?;
            }
        }
        Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "the other side sends messages, but not the answer that is waited for",
        ))
    }

    fn accepted(&self, command: Command, reply: &Header) -> Result<(), TransportError> {
        if !reply.is_error() {
            return Ok(());
        }
        let errno = i32::try_from(reply.errno).unwrap_or(0);
        Err(self.io(
            &format!("{} was refused by the controller's process", command.name()),
            io::Error::from_raw_os_error(errno),
        ))
    }

    /// Sends a request whose answer has at least `len` bytes.
    fn fixed(
        &self,
        command: Command,
        body: &[u8],
        fds: &[BorrowedFd<'_>],
        len: usize,
    ) -> Result<Message, TransportError> {
        let reply = self.request(command, body, fds)?;
        if reply.body.len() < len {
            return Err(self.protocol(format!(
                "the answer to {} has {} bytes, at least {len} are due",
                command.name(),
                reply.body.len()
            )));
        }
        Ok(reply)
    }

    /// Returns the device's flags and its numbers of regions and interrupt kinds.
    pub(crate) fn device_info(&self) -> Result<(u32, u32, u32), TransportError> {
        let reply = self.fixed(Command::GetInfo, &message::info(0), &[], 16)?;
        let field = |at| u32_at(&reply.body, at).unwrap_or(0);
        Ok((field(4), field(8), field(12)))
    }

    /// Returns the region's structure with its capabilities, and its file if it has one.
    pub(crate) fn region_info(
        &self,
        index: u32,
    ) -> Result<(Vec<u8>, Option<OwnedFd>), TransportError> {
        let body = message::region_info(index, 4096);
        let reply = self.fixed(Command::GetRegionInfo, &body, &[], 32)?;
        Ok((reply.body, reply.fds.into_iter().next()))
    }

    /// Returns the number of interrupts of a kind.
    pub(crate) fn irq_count(&self, index: u32) -> Result<u32, TransportError> {
        let reply = self.fixed(Command::GetIrqInfo, &message::info(index), &[], 16)?;
        Ok(u32_at(&reply.body, 12).unwrap_or(0))
    }

    /// Connects interrupts of a kind, from `start` on, to these eventfds. Without eventfds the kind
    /// is switched off.
    pub(crate) fn set_irqs(
        &self,
        index: u32,
        fds: &[BorrowedFd<'_>],
    ) -> Result<(), TransportError> {
        use vfio_bindings::bindings::vfio as api;
        if fds.is_empty() {
            let flags = api::VFIO_IRQ_SET_DATA_NONE | api::VFIO_IRQ_SET_ACTION_TRIGGER;
            self.request(
                Command::SetIrqs,
                &message::set_irqs(flags, index, 0, 0),
                &[],
            )?;
            return Ok(());
        }
        let flags = api::VFIO_IRQ_SET_DATA_EVENTFD | api::VFIO_IRQ_SET_ACTION_TRIGGER;
        let mut start = 0u32;
        for part in fds.chunks(self.max_fds) {
            let count = u32::try_from(part.len()).unwrap_or(0);
            let body = message::set_irqs(flags, index, start, count);
            self.request(Command::SetIrqs, &body, part)?;
            start += count;
        }
        Ok(())
    }

    /// Reads from a region.
    pub(crate) fn read(
        &self,
        region: u32,
        offset: u64,
        data: &mut [u8],
    ) -> Result<(), TransportError> {
        let count = u32::try_from(data.len()).unwrap_or(0);
        let body = message::region_access(region, offset, count, &[]);
        let len = REGION_ACCESS_LEN + data.len();
        let reply = self.fixed(Command::RegionRead, &body, &[], len)?;
        if let Some(bytes) = reply.body.get(REGION_ACCESS_LEN..len) {
            data.copy_from_slice(bytes);
        }
        Ok(())
    }

    /// Writes to a region.
    pub(crate) fn write(
        &self,
        region: u32,
        offset: u64,
        data: &[u8],
    ) -> Result<(), TransportError> {
        let count = u32::try_from(data.len()).unwrap_or(0);
        let body = message::region_access(region, offset, count, data);
        self.request(Command::RegionWrite, &body, &[])?;
        Ok(())
    }

    /// Resets the device.
    pub(crate) fn reset(&self) -> Result<(), TransportError> {
        self.request(Command::Reset, &[], &[])?;
        Ok(())
    }

    /// Maps `len` bytes of a file, from its start, as the device's memory at `address`.
    pub(crate) fn dma_map(
        &self,
        address: u64,
        len: u64,
        file: BorrowedFd<'_>,
    ) -> Result<(), TransportError> {
        self.request(Command::DmaMap, &message::dma_map(address, len), &[file])?;
        Ok(())
    }

    /// Unmaps the device's memory at `address`.
    pub(crate) fn dma_unmap(&self, address: u64, len: u64) -> Result<(), TransportError> {
        self.request(Command::DmaUnmap, &message::dma_unmap(address, len), &[])?;
        Ok(())
    }
}

impl AsFd for Client {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

const NO_SOCKET: &str = "there is no such socket: start the controller's process (SPDK: \
     nvmf_subsystem_add_listener -t VFIOUSER -a <directory>), and name its directory or its socket";

fn cannot_connect(device: &str, path: &Path, source: io::Error) -> TransportError {
    let what = match source.kind() {
        io::ErrorKind::NotFound => {
            return TransportError::NotFound {
                device: path.display().to_string(),
                what: NO_SOCKET.to_owned(),
            };
        }
        io::ErrorKind::TimedOut => {
            return TransportError::InUse {
                device: device.to_owned(),
                detail: format!(
                    "the process that serves {} does not accept connections: it is stuck, or \
                     serves too many others",
                    path.display()
                ),
                pid: None,
            };
        }
        io::ErrorKind::ConnectionRefused => {
            "nobody serves the socket: the controller's process has ended; start it again"
        }
        io::ErrorKind::PermissionDenied => {
            "no permission to connect to the socket: run as the user of the controller's process, or change the socket's mode"
        }
        _ => {
            return TransportError::Io {
                device: device.to_owned(),
                what: format!("connecting to {}", path.display()),
                source,
            };
        }
    };
    TransportError::Unsupported {
        device: device.to_owned(),
        what: format!("{}: {what}", path.display()),
    }
}

/// Number of open connections to the socket, ours included: the server's ends have its path
/// (`/proc/net/unix`, state 03).
fn connections(path: &Path) -> usize {
    let table = std::fs::read_to_string("/proc/net/unix").unwrap_or_default();
    let path = path.to_string_lossy();
    table
        .lines()
        .filter(|line| {
            let mut fields = line.split_whitespace();
            let state = fields.nth(5);
            state == Some("03") && fields.nth(1) == Some(&*path)
        })
        .count()
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A client without a handshake, and the other end of its connection.
    pub(in super::super) fn pair(timeout: Duration) -> (Client, UnixStream) {
        let (socket, server) = UnixStream::pair().expect("sockets");
        socket
            .set_write_timeout(Some(timeout))
            .expect("SO_SNDTIMEO");
        let client = Client {
            device: "test".to_owned(),
            socket,
            next_id: Mutex::new(0),
            timeout,
            max_fds: 8,
            broken: AtomicBool::new(false),
        };
        (client, server)
    }

    const SOON: Duration = Duration::from_millis(10);

    /// The next request would be read as the rest of this one.
    #[test]
    fn a_request_that_was_sent_in_part_is_the_last() {
        let (client, _server) = pair(SOON);
        // More than a socket holds.
        let error = client.write(0, 0, &vec![0; 1 << 20]).expect_err("no room");
        assert!(matches!(error, TransportError::Timeout { .. }), "{error}");
        assert!(client.is_broken());
        let error = client.reset().expect_err("over");
        assert!(matches!(error, TransportError::Removed { .. }), "{error}");
    }

    #[test]
    fn a_closed_connection_is_over_and_a_late_answer_is_not() {
        let (client, server) = pair(SOON);
        let error = client.reset().expect_err("no answer");
        assert!(matches!(error, TransportError::Timeout { .. }), "{error}");
        assert!(!client.is_broken());
        server.shutdown(std::net::Shutdown::Write).expect("closed");
        let error = client.reset().expect_err("over");
        assert!(matches!(error, TransportError::Removed { .. }), "{error}");
        assert!(client.is_broken());
    }
}
