//! Requests to one process: some of arbitrary bytes, some nearly valid.
#![no_main]

#[path = "calls.rs"]
mod calls;

use pumice_bdev_control::config::App;
use pumice_bdev_control::rpc::handle;
use serde_json::{Value, json};

use arbitrary::Unstructured;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let app = App::new();
    let mut u = Unstructured::new(data);
    for id in 0..16 {
        if u.is_empty() {
            break;
        }
        if u.ratio(1, 4).unwrap_or(false) {
            let bytes = <&[u8]>::default();
            let n = u.int_in_range(0..=200).unwrap_or(0);
            let bytes = u.bytes(n.min(u.len())).unwrap_or(bytes);
            if !contains_path(bytes) {
                let _ = handle(&app, bytes);
            }
            continue;
        }
        let Ok((method, params)) = calls::call(&mut u) else { break };
        let request = json!({ "jsonrpc": "2.0", "id": id, "method": method, "params": params });
        let answer = handle(&app, request.to_string().as_bytes()).expect("an id gets an answer");
        let answer: Value = serde_json::from_str(&answer).expect("an answer is JSON");
        assert_eq!(answer["id"], id);
        assert!(answer.get("result").is_some() != answer.get("error").is_some());
    }
});

/// Whether a text may contain a path. A fuzzer must not touch this machine's files.
fn contains_path(bytes: &[u8]) -> bool {
    bytes.contains(&b'/')
}
