//! A block device of your own, in the manner of `passthru`: this one counts the bytes that pass.
//!
//! ```sh
//! cargo run -p pumice-examples --no-default-features --example custom_bdev
//! ```

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use pumice_bdev::registry::Registry;
use pumice_bdev::{
    AsyncChannel, BdevError, BlockDevice, Completion, DeviceInfo, DmaBuf, IoChannel, Op,
    SubmitError, uuid,
};

// 1. The device: shared by all threads, so it holds what they share.
#[derive(Debug)]
struct Meter {
    info: DeviceInfo,
    base: Arc<dyn BlockDevice>,
    bytes: Arc<AtomicU64>,
}

impl Meter {
    fn new(name: &str, base: Arc<dyn BlockDevice>) -> Meter {
        // Most of what it says of itself is what the device below says.
        let mut info = base.info().clone();
        name.clone_into(&mut info.name);
        info.module = "meter";
        "Meter".clone_into(&mut info.product);
        // Its UUID is its own: the registry knows devices by it, too. The same name gives the same one.
        info.uuid = uuid::derived(format!("{name} on {:?}", info.uuid).as_bytes());
        Meter {
            info,
            base,
            bytes: Arc::default(),
        }
    }
}

impl BlockDevice for Meter {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    // 2. A channel for each thread that asks, on top of a channel of the device below.
    fn open_channel(&self) -> Result<Box<dyn IoChannel>, BdevError> {
        Ok(Box::new(MeterChannel {
            base: self.base.open_channel()?,
            bytes: Arc::clone(&self.bytes),
            block_size: self.info.block_size,
        }))
    }
}

struct MeterChannel {
    base: Box<dyn IoChannel>,
    bytes: Arc<AtomicU64>,
    block_size: u32,
}

impl IoChannel for MeterChannel {
    // 3. Operations go down with their tag; what the device below refuses comes back whole.
    fn submit(&mut self, tag: u64, op: Op) -> Result<(), SubmitError> {
        self.base.submit(tag, op)
    }

    // 4. Completions come up. What was appended to `out` is ours to look at and to change.
    fn poll(&mut self, out: &mut Vec<Completion>) -> usize {
        let before = out.len();
        let n = self.base.poll(out);
        for c in out[before..].iter().filter(|c| c.result.is_ok()) {
            self.bytes
                .fetch_add(c.op.len_bytes(self.block_size), Ordering::Relaxed);
        }
        n
    }

    // 5. Waiting and counting are the base's own.
    fn wait(&mut self, timeout: Duration) -> Result<(), BdevError> {
        self.base.wait(timeout)
    }

    fn in_flight(&self) -> usize {
        self.base.in_flight()
    }
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    // 6. In the registry it stands on `Malloc0`, which nobody else may open meanwhile.
    let registry = Registry::new();
    registry.open("malloc://4M?name=Malloc0")?;
    let base = registry.claim("Malloc0", "Meter0")?;
    let meter = Arc::new(Meter::new("Meter0", Arc::new(base)));
    registry.register(
        Arc::clone(&meter) as Arc<dyn BlockDevice>,
        vec!["Malloc0".to_owned()],
    )?;

    let ch = AsyncChannel::new(registry.open("Meter0")?.open_channel()?);
    ch.block_on(ch.read(0, DmaBuf::new(4096)?))?;
    println!(
        "{} bytes passed {}",
        meter.bytes.load(Ordering::Relaxed),
        meter.info().name
    );
    println!("{}", registry.open("Malloc0").expect_err("it is claimed"));

    // 7. The contract, in one line.
    pumice_bdev_testkit::conformance::run(&*meter);
    println!("it conforms");

    // 8. Removing the device below takes this one away first.
    println!("removed, in order: {:?}", registry.remove("Malloc0")?);
    Ok(())
}
