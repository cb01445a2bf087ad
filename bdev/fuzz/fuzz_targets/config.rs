//! Configurations built of calls that nearly make sense.
#![no_main]

#[path = "calls.rs"]
mod calls;

use arbitrary::Unstructured;
use libfuzzer_sys::fuzz_target;
use pumice_bdev::config::{self, App};
use serde_json::json;

fuzz_target!(|data: &[u8]| {
    let mut u = Unstructured::new(data);
    let mut config = Vec::new();
    while config.len() < 24 && !u.is_empty() {
        let Ok((method, params)) = calls::call(&mut u) else { break };
        config.push(json!({ "method": method, "params": params }));
    }
    let text = json!({ "subsystems": [{ "subsystem": "bdev", "config": config }] }).to_string();
    let app = App::new();
    let _ = config::check_form("fuzz", &text);
    if config::load(&app, "fuzz", &text).is_ok() {
        // What is saved loads again.
        let saved = app.config().to_string();
        let again = App::new();
        config::load(&again, "saved", &saved).expect("a saved configuration loads");
    }
});
