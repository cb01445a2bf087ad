//! Configurations of calls that are nearly valid, with comments and other subsystems among them.
#![no_main]

#[path = "calls.rs"]
mod calls;

use pumice_bdev_control::config::{self, App};
use serde_json::{Value, json};

use arbitrary::Unstructured;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let mut u = Unstructured::new(data);
    let mut subsystems = Vec::new();
    let mut config = Vec::new();
    while config.len() < 24 && !u.is_empty() {
        if u.ratio(1, 16).unwrap_or(false) {
            let name = *u.choose(&["iobuf", "sock", "nvmf", "keyring", "bdevs", ""]).unwrap_or(&"");
            let calls = *u.choose(&["null", "[]", "[{\"method\":\"x\"}]", "3"]).unwrap_or(&"[]");
            let calls: Value = serde_json::from_str(calls).expect("JSON");
            subsystems.push(json!({ "subsystem": name, "config": calls }));
            continue;
        }
        let Ok((method, params)) = calls::call(&mut u) else { break };
        config.push(json!({ "method": method, "params": params }));
    }
    subsystems.push(json!({ "subsystem": "bdev", "config": config }));
    let tree = json!({ "subsystems": subsystems });
    let mut text = format!("{tree:#}");
    for _ in 0..u.int_in_range(0..=3).unwrap_or(0) {
        // The end of a line is a place between two tokens, where a comment may be.
        let ends: Vec<usize> = text.match_indices('\n').map(|(i, _)| i).collect();
        let Ok(at) = u.choose(&ends).copied() else { break };
        text.insert_str(at, u.choose(&[" // one", "/* two\n */", "/**/", "/*", "\t"]).unwrap_or(&""));
    }
    let app = App::new();
    let checked = config::check_form("fuzz", &text);
    let loaded = config::load(&app, "fuzz", &text);
    if let Err(e) = &checked {
        // A configuration that the check refuses cannot be loaded either, and both errors have a
        // place.
        assert!(loaded.is_err(), "{e}");
        assert!(e.line >= 1 && e.line <= text.lines().count().max(1), "{e}");
    }
    if loaded.is_ok() {
        // A saved configuration can be loaded.
        let saved = app.config().to_string();
        let again = App::new();
        config::load(&again, "saved", &saved).expect("a saved configuration loads");
        assert_eq!(again.registry.names(), app.registry.names());
    }
});
