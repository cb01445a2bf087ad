//! What a client may not do to the server.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use pumice_bdev_control::config::App;
use pumice_bdev_control::rpc::{ServerOptions, serve};

/// A client that sends a byte now and then has the time of one request.
#[test]
fn a_request_has_one_time_limit_however_it_comes() {
    let (ours, mut client) = UnixStream::pair().unwrap();
    let options = ServerOptions {
        patience: Duration::from_secs(2),
        ..ServerOptions::default()
    };
    let server = std::thread::spawn(move || {
        let _ = serve(&App::new(), ours, &options, &AtomicBool::new(false));
    });
    let start = Instant::now();
    while start.elapsed() < Duration::from_secs(6) {
        if client.write_all(b"[").is_err() {
            break;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    let _ = client.shutdown(std::net::Shutdown::Write);
    let mut answer = String::new();
    let _ = client.read_to_string(&mut answer);
    server.join().unwrap();
    assert!(answer.contains("in time"), "{answer}");
}
