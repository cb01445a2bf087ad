//! vfio-user messages on a stream socket, with the descriptors that come with them.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use pumice_io::sys::{socket, wait_readable};

use super::message::{HEADER_LEN, Header};

/// One complete message.
#[derive(Debug)]
pub struct Message {
    /// The header.
    pub header: Header,
    /// The part behind the header.
    pub body: Vec<u8>,
    /// The descriptors that came with the message.
    pub fds: Vec<OwnedFd>,
}

/// Sends a header with a body, and descriptors with the first byte. Blocks while the other side
/// does not read, at most for the socket's write time-out.
pub fn send(
    socket: &UnixStream,
    header: &Header,
    body: &[u8],
    fds: &[BorrowedFd<'_>],
) -> io::Result<()> {
    let mut bytes = header.encode().to_vec();
    bytes.extend_from_slice(body);
    let mut sent = 0;
    while sent < bytes.len() {
        let with = if sent == 0 { fds } else { &[] };
        sent += socket::send(socket, &bytes[sent..], with)?;
    }
    Ok(())
}

/// Receives one message: the header first, then as much as it announces. Returns `Ok(None)` when
/// the other side has closed the socket between messages, `WouldBlock` when nothing came in time,
/// and `TimedOut` when the other side stopped in the middle, which makes the stream unusable.
pub fn receive(socket: &UnixStream, deadline: Option<Instant>) -> io::Result<Option<Message>> {
    let mut fds = Vec::new();
    let mut head = [0u8; HEADER_LEN];
    match fill(socket, &mut head, &mut fds, deadline)? {
        0 => return Ok(None),
        HEADER_LEN => {}
        _ => return Err(io::ErrorKind::UnexpectedEof.into()),
    }
    let header = Header::decode(&head).ok_or_else(|| {
        io::Error::new(
            io::ErrorKind::InvalidData,
            "a message announces an impossible length",
        )
    })?;
    let mut body = vec![0; header.body_len()];
    match fill(socket, &mut body, &mut fds, deadline) {
        Ok(n) if n == body.len() => {}
        Ok(_) => return Err(io::ErrorKind::UnexpectedEof.into()),
        Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
            return Err(io::ErrorKind::TimedOut.into());
        }
        Err(e) => return Err(e),
    }
    Ok(Some(Message { header, body, fds }))
}

/// Reads until `into` is full or the stream ends.
fn fill(
    socket: &UnixStream,
    into: &mut [u8],
    fds: &mut Vec<OwnedFd>,
    deadline: Option<Instant>,
) -> io::Result<usize> {
    let mut have = 0;
    while have < into.len() {
        if let Some(deadline) = deadline {
            let left = deadline.saturating_duration_since(Instant::now());
            let ready = wait_readable(&[socket.as_fd()], Some(left.max(Duration::from_micros(1))))?;
            if !ready[0] {
                if Instant::now() < deadline {
                    continue;
                }
                let kind = if have == 0 {
                    io::ErrorKind::WouldBlock
                } else {
                    io::ErrorKind::TimedOut
                };
                return Err(kind.into());
            }
        }
        match socket::receive(socket, &mut into[have..], fds) {
            Ok(0) => return Ok(have),
            Ok(n) => have += n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(have)
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::fs::FileExt;

    use pumice_io::sys::socket::is_closed;

    use super::super::message::Command;
    use super::*;

    #[test]
    fn bytes_and_descriptors_arrive_together() {
        let (a, b) = UnixStream::pair().expect("a pair");
        let file = tempfile::tempfile().expect("a file");
        file.write_all_at(b"hello", 0).expect("written");
        let header = Header::request(3, Command::DmaMap, 5).expect("fits");
        send(&a, &header, b"12345", &[file.as_fd(), file.as_fd()]).expect("sent");
        let message = receive(&b, None).expect("received").expect("not closed");
        assert_eq!((message.header, &message.body[..]), (header, &b"12345"[..]));
        assert_eq!(message.fds.len(), 2);
        let copy = std::fs::File::from(message.fds.into_iter().next_back().expect("two"));
        let mut text = [0; 5];
        copy.read_exact_at(&mut text, 0).expect("read");
        assert_eq!(&text, b"hello");
        assert!(!is_closed(&b));
        drop(a);
        assert!(is_closed(&b));
        assert!(receive(&b, None).expect("no error").is_none());
    }

    #[test]
    fn silence_and_half_messages_end() {
        let (mut a, b) = UnixStream::pair().expect("a pair");
        let soon = || Some(Instant::now() + Duration::from_millis(20));
        let error = receive(&b, soon()).expect_err("nothing was sent");
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
        let header = Header::request(3, Command::DmaMap, 5).expect("fits");
        let (mut c, d) = UnixStream::pair().expect("a pair");
        c.write_all(&header.encode()[..7]).expect("written");
        let error = receive(&d, soon()).expect_err("half a header was sent");
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        a.write_all(&header.encode()).expect("written");
        let error = receive(&b, soon()).expect_err("half was sent");
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        a.write_all(&[0xff; 64]).expect("written");
        let error = receive(&b, soon()).expect_err("an absurd length");
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
    }
}
