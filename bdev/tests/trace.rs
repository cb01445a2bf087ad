//! Tests the log records of one operation. This runs in a process of its own, because logging is
//! set up once per process.

use std::sync::{Arc, Mutex};

use pumice_bdev::passthru::Passthru;
use pumice_bdev::registry::Registry;
use pumice_bdev::{AsyncChannel, DmaBuf};

#[test]
fn one_operation_can_be_followed_through_every_layer() {
    let registry = Registry::new();
    let base = registry.open("soft://memory?size=4M").unwrap();
    let base = base.info().name.clone();
    let claim = Arc::new(registry.claim(&base, "PT").unwrap());
    let pt = Passthru::new("PT", claim);
    registry.register(Arc::new(pt), vec![base.clone()]).unwrap();
    let log = Log::default();
    let subscriber = tracing_subscriber::fmt()
        .with_max_level(tracing::Level::TRACE)
        .with_ansi(false)
        .with_writer({
            let log = log.clone();
            move || log.clone()
        })
        .finish();
    tracing::subscriber::with_default(subscriber, || {
        let ch = AsyncChannel::new(registry.open("PT").unwrap().open_channel().unwrap());
        ch.block_on(ch.read(40, DmaBuf::new(1024).unwrap()))
            .unwrap();
    });
    let text = String::from_utf8(log.0.lock().unwrap().clone()).unwrap();
    let steps: Vec<&str> = text.lines().filter(|l| l.contains("::io")).collect();
    let at = |what: &str| {
        let found = steps.iter().position(|l| l.contains(what));
        found.unwrap_or_else(|| panic!("no {what} in {text}"))
    };
    // The records go down through both devices to the command and up again from its completion,
    // each inside the spans of all layers above it.
    let both = "io{bdev=PT op=read lba=40 len_bytes=1024";
    let below = format!("io{{bdev={base} op=read lba=40");
    let command = steps[at("nvme command")];
    let completion = steps[at("nvme completion")];
    for line in [command, completion] {
        assert!(line.contains(both) && line.contains(&below), "{line}");
    }
    assert!(at("submit") < at("nvme command"));
    assert!(at("nvme command") < at("nvme completion"));
    assert!(at("nvme completion") < at("complete ns="), "{text}");
    assert_eq!(text.matches("complete ns=").count(), 2, "{text}");
}

/// The log.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl std::io::Write for Log {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}
