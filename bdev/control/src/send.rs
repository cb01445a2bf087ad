//! Sending an answer to a client that may read it slowly.

use std::io::{self, Write};
use std::time::{Duration, Instant};

/// Longest piece that is written at once: a longer one can wait for the client several times.
const PIECE: usize = 16 << 10;

/// Sends `bytes`. The client has `patience` for all of them together, and the stream's own time-out
/// for the last piece.
///
/// # Errors
/// Fails with [`io::ErrorKind::TimedOut`], and with the errors of the stream.
pub(crate) fn send(stream: &mut dyn Write, bytes: &[u8], patience: Duration) -> io::Result<()> {
    let start = Instant::now();
    let mut left = bytes;
    while !left.is_empty() {
        if start.elapsed() > patience {
            return Err(io::ErrorKind::TimedOut.into());
        }
        match stream.write(&left[..left.len().min(PIECE)]) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(n) => left = &left[n..],
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;
    use std::os::unix::net::UnixStream;

    use super::*;

    /// A client that reads a little now and then does not keep its thread for ever.
    #[test]
    fn a_slow_reader_has_one_time_limit() {
        let (mut ours, mut client) = UnixStream::pair().unwrap();
        ours.set_write_timeout(Some(Duration::from_secs(60)))
            .unwrap();
        let reader = std::thread::spawn(move || {
            let mut piece = [0; 16 << 10];
            while client.read(&mut piece).is_ok_and(|n| n > 0) {
                std::thread::sleep(Duration::from_millis(20));
            }
        });
        // At that pace it would take more than five seconds.
        let slow = send(&mut ours, &[b'x'; 4 << 20], Duration::from_millis(100));
        assert_eq!(slow.unwrap_err().kind(), io::ErrorKind::TimedOut);
        drop(ours);
        reader.join().unwrap();
    }

    #[test]
    fn everything_arrives() {
        let text: Vec<u8> = (0..=250).cycle().take(100_001).collect();
        let mut sent = Vec::new();
        send(&mut sent, &text, Duration::from_secs(60)).unwrap();
        assert!(sent == text);
    }
}
