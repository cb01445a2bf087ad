//! A block device of your own, modelled on `passthru`: it counts the bytes that pass.
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

// 1. The device. All threads share it, so it holds their common state.
#[derive(Debug)]
struct Meter {
    info: DeviceInfo,
    base: Arc<dyn BlockDevice>,
    bytes: Arc<AtomicU64>,
}

impl Meter {
    fn new(name: &str, base: Arc<dyn BlockDevice>) -> Meter {
        // Most properties are those of the device below.
        let mut info = base.info().clone();
        name.clone_into(&mut info.name);
        info.module = "meter";
        "Meter".clone_into(&mut info.product);
        // Its UUID is its own, since the registry knows devices by UUID too. The same name gives
        // the same UUID.
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

    // What this device does not answer itself, the one below answers.
    fn below(&self) -> Option<&dyn BlockDevice> {
        Some(&*self.base)
    }

    // 2. A channel for each thread that asks for one, on top of a channel of the device below.
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
    // 3. Operations go down with their tag. An operation that the device below refuses comes back
    // unchanged.
    fn submit(&mut self, tag: u64, op: Op) -> Result<(), SubmitError> {
        self.base.submit(tag, op)
    }

    // 4. Completions come up. This channel may look at what was appended to `out` and change it.
    fn poll(&mut self, out: &mut Vec<Completion>) -> usize {
        let before = out.len();
        let n = self.base.poll(out);
        for c in out[before..].iter().filter(|c| c.result.is_ok()) {
            self.bytes
                .fetch_add(c.op.len_bytes(self.block_size), Ordering::Relaxed);
        }
        n
    }

    // 5. Waiting and counting are the base channel's.
    fn wait(&mut self, timeout: Duration) -> Result<(), BdevError> {
        self.base.wait(timeout)
    }

    fn in_flight(&self) -> usize {
        self.base.in_flight()
    }
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    // 6. In the registry it is built on `Malloc0`, which nobody else can open meanwhile.
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

    // 7. The conformance suite checks the contract.
    pumice_bdev_testkit::conformance::run(&*meter);
    println!("it conforms");

    // 8. Removing the device below removes this one first.
    println!("removed, in order: {:?}", registry.remove("Malloc0")?);
    Ok(())
}
