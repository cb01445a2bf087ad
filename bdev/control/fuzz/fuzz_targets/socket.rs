//! A client on the socket, which sends whole requests, halves and arbitrary bytes, in parts of any
//! size. The server answers in JSON or disconnects the client, and ends when the client has
//! disconnected.
#![no_main]

#[path = "calls.rs"]
mod calls;

use std::io::{Read as _, Write as _};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use pumice_bdev_control::config::App;
use pumice_bdev_control::rpc::{ServerOptions, serve};
use serde_json::{Value, json};

use arbitrary::Unstructured;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let mut u = Unstructured::new(data);
    let mut bytes = Vec::new();
    for id in 0..12 {
        if u.is_empty() {
            break;
        }
        match u.int_in_range(0..=7).unwrap_or(0) {
            0 => {
                let n = u.int_in_range(0..=64).unwrap_or(0).min(u.len());
                bytes.extend_from_slice(u.bytes(n).unwrap_or(&[]));
            }
            1 => bytes.extend(b"[{\"jsonrpc\":\"2.0\",\"method\":\"rpc_get_methods\",\"id\":1},3]"),
            2 => bytes.extend(std::iter::repeat_n(b'[', 300)),
            _ => {
                let Ok((method, params)) = calls::call(&mut u) else { break };
                let request = json!({ "jsonrpc": "2.0", "id": id, "method": method, "params": params });
                let mut text = request.to_string().into_bytes();
                if u.ratio(1, 8).unwrap_or(false) {
                    text.truncate(u.int_in_range(0..=text.len()).unwrap_or(0));
                }
                bytes.append(&mut text);
            }
        }
    }
    // A fuzzer must not touch this machine's files.
    bytes.retain(|b| *b != b'/');
    let (server, mut client) = UnixStream::pair().expect("a pair of sockets");
    let options = ServerOptions::default().request_max(2048).patience(Duration::from_secs(20));
    let app = Arc::new(App::new());
    let serving = std::thread::spawn(move || serve(&app, server, &options, &AtomicBool::new(false)));
    let mut reader = client.try_clone().expect("a clone of the client");
    let reading = std::thread::spawn(move || {
        let mut answers = Vec::new();
        let _ = reader.read_to_end(&mut answers);
        answers
    });
    let mut rest = &bytes[..];
    while !rest.is_empty() {
        let n = u.int_in_range(1..=rest.len()).unwrap_or(rest.len());
        // A server that has disconnected the client does not read on.
        if client.write_all(&rest[..n]).is_err() {
            break;
        }
        rest = &rest[n..];
    }
    let _ = client.shutdown(Shutdown::Write);
    let _ = serving.join().expect("the server does not panic");
    for answer in reading.join().expect("the reader").split(|b| *b == b'\n') {
        if !answer.is_empty() {
            let _: Value = serde_json::from_slice(answer).expect("an answer is JSON");
        }
    }
});
