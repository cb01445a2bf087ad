//! Tests of the driver that need a particular device or a feature of the machine: injected errors,
//! a slow disk under reset, removal. A step of a scenario runs each.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write as _;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::Subcommand;
use pumice_nvme::dma::DmaBuf;
use pumice_nvme::spec::Status;
use pumice_nvme::{
    Completion, Controller, ControllerEvent, ControllerOptions, IoErrorKind, Namespace, Op,
    QueueOptions, QueuePair, SubmitError, open_with,
};

/// A test.
#[derive(Subcommand)]
pub enum Test {
    /// Check that the namespaces are as expected
    Namespaces {
        /// Device
        uri: String,
        /// The namespaces in order, such as `1:512,2:4096,3:refused`
        expect: String,
    },
    /// Write, read back and compare at all sizes around the controller's limit
    Verify {
        /// Device
        uri: String,
        /// Use SGLs
        #[arg(long)]
        sgl: bool,
        /// Put the submission queue into the controller's memory
        #[arg(long)]
        cmb: bool,
        /// Use no interrupts
        #[arg(long)]
        poll: bool,
        /// Use no shadow doorbells
        #[arg(long)]
        no_shadow: bool,
    },
    /// Check that sleeping on a queue's interrupt uses no CPU and ends with the completion
    Sleep {
        /// A slow device
        uri: String,
    },
    /// Check that media errors carry their status and leave their neighbours unharmed
    MediaErrors {
        /// Device with a bad sector for reads and one for writes
        uri: String,
        /// Sector that cannot be read
        read: u64,
        /// Sector that cannot be written
        write: u64,
    },
    /// Reset the controller with I/O in flight and check that every I/O ends exactly once
    Reset {
        /// A slow device
        uri: String,
    },
    /// Remove the device with I/O in flight and check that every I/O ends with an error
    Removal {
        /// Device
        uri: String,
        /// Name of the device in QEMU
        id: String,
    },
}

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

impl Test {
    /// Runs the test.
    pub fn run(&self) -> ExitCode {
        match self.test() {
            Ok(()) => ExitCode::SUCCESS,
            Err(e) => {
                println!("failed: {e}");
                ExitCode::FAILURE
            }
        }
    }

    fn test(&self) -> Result<()> {
        match self {
            Test::Namespaces { uri, expect } => namespaces(uri, expect),
            Test::Verify {
                uri,
                sgl,
                cmb,
                poll,
                no_shadow,
            } => {
                let mut options = ControllerOptions::default();
                options.sgl = *sgl;
                options.shadow_doorbells = !no_shadow;
                if *poll {
                    options.vectors = 0;
                }
                verify(uri, options, *cmb)
            }
            Test::Sleep { uri } => sleep(uri),
            Test::MediaErrors { uri, read, write } => media_errors(uri, *read, *write),
            Test::Reset { uri } => reset(uri),
            Test::Removal { uri, id } => removal(uri, id),
        }
    }
}

fn check(good: bool, what: impl FnOnce() -> String) -> Result<()> {
    if good { Ok(()) } else { Err(what().into()) }
}

struct Device {
    controller: Arc<Controller>,
    ns: Arc<Namespace>,
    queue: QueuePair,
}

fn device(uri: &str, controller: ControllerOptions, queue: &QueueOptions) -> Result<Device> {
    let opened = open_with(uri, controller)?;
    let ns = opened.namespace()?;
    let queue = opened.controller.queue_pair(queue)?;
    Ok(Device {
        controller: opened.controller,
        ns,
        queue,
    })
}

impl Device {
    /// Runs I/Os to their ends, as many at a time as the queue accepts.
    fn run(&mut self, ios: impl IntoIterator<Item = Op>) -> Result<Vec<Completion>> {
        let mut waiting: Vec<(u64, Op)> = (0..).zip(ios).collect();
        waiting.reverse();
        let total = waiting.len();
        let mut done = Vec::new();
        let deadline = Instant::now() + Duration::from_secs(100);
        while done.len() < total {
            while let Some((tag, io)) = waiting.pop() {
                match self.queue.submit(&self.ns, tag, io) {
                    Ok(()) => {}
                    Err(SubmitError::Busy(io)) => {
                        waiting.push((tag, io));
                        break;
                    }
                    Err(SubmitError::Refused(_, e)) => return Err(e),
                }
            }
            if self.queue.poll(&mut done) == 0 {
                self.queue.wait(Duration::from_millis(500))?;
            }
            check(Instant::now() < deadline, || {
                format!(
                    "{} of {total} I/Os are left after 100 s",
                    total - done.len()
                )
            })?;
        }
        Ok(done)
    }

    fn all_good(&mut self, ios: impl IntoIterator<Item = Op>) -> Result<Vec<Completion>> {
        let mut done = self.run(ios)?;
        for d in &done {
            if let Err(e) = &d.result {
                return Err(format!("I/O {}: {e}", d.tag).into());
            }
        }
        done.sort_by_key(|d| d.tag);
        Ok(done)
    }
}

/// Fills a buffer with bytes that depend on their position, from a small seeded generator.
fn pattern(buf: &mut [u8], seed: u64) {
    let mut x = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    for word in buf.chunks_mut(8) {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        let bytes = x.to_le_bytes();
        word.copy_from_slice(&bytes[..word.len()]);
    }
}

fn namespaces(uri: &str, expect: &str) -> Result<()> {
    let opened = open_with(uri, ControllerOptions::default())?;
    let mut found = Vec::new();
    for ns in opened.controller.namespaces() {
        found.push(match ns.unusable() {
            Some(why) => {
                println!("{}: {why}", ns.nsid());
                format!("{}:refused", ns.nsid())
            }
            None => format!("{}:{}", ns.nsid(), ns.block_size()),
        });
    }
    let found = found.join(",");
    check(found == expect, || {
        format!("found {found}, expected {expect}")
    })
}

fn verify(uri: &str, options: ControllerOptions, cmb: bool) -> Result<()> {
    let (sgl, shadow, vectors) = (options.sgl, options.shadow_doorbells, options.vectors);
    let mut queue = QueueOptions::default().depth(16);
    queue.controller_memory = cmb;
    queue.interrupt = vectors > 0;
    let mut d = device(uri, options, &queue)?;
    let limit = d.controller.transfer_bytes()?;
    println!(
        "transfer limit {limit}, sgl {}, shadow doorbells {}, {} interrupts",
        d.controller.uses_sgl(),
        d.controller.shadow_doorbells(),
        d.controller.interrupt_count()
    );
    check(d.controller.uses_sgl() == sgl, || {
        "SGLs are not as asked for".into()
    })?;
    check(d.controller.shadow_doorbells() == shadow, || {
        "shadow doorbells are not as asked for".into()
    })?;
    let block = usize::try_from(d.ns.block_size())?;
    let limit = limit.min(1 << 20);
    let sizes = [
        block,
        2 * block,
        4096,
        8192,
        12288,
        limit - block,
        limit,
        limit + block,
        2 * limit + 3 * block,
        1 << 20,
    ];
    let (mut writes, mut places, mut lba) = (Vec::new(), Vec::new(), 3u64);
    for (n, len) in (0u64..).zip(sizes) {
        let mut buf = DmaBuf::new(len)?;
        pattern(&mut buf, n);
        writes.push(Op::Write {
            lba,
            data: buf.freeze(),
            fua: n % 2 == 1,
        });
        places.push((n, lba, len));
        lba += u64::try_from(len / block)? + 1;
    }
    // Scattered buffers: blocks of different lengths, each at its own place in memory.
    let parts = [1usize, 3, 8, 2, 17];
    let mut whole = vec![0; parts.iter().sum::<usize>() * block];
    pattern(&mut whole, 99);
    let (mut data, mut at) = (Vec::new(), 0);
    for part in parts {
        let mut buf = DmaBuf::new(part * block)?;
        buf.copy_from_slice(&whole[at..at + part * block]);
        at += part * block;
        data.push(buf.freeze());
    }
    writes.push(Op::WriteV {
        lba,
        data,
        fua: false,
    });
    d.all_good(writes)?;
    d.all_good([Op::Flush])?;

    let mut reads = Vec::new();
    for (_, lba, len) in &places {
        reads.push(Op::Read {
            lba: *lba,
            buf: DmaBuf::zeroed(*len)?,
        });
    }
    let bufs = vec![DmaBuf::zeroed(20 * block)?, DmaBuf::zeroed(11 * block)?];
    reads.push(Op::ReadV { lba, bufs });
    let done = d.all_good(reads)?;
    for (io, (n, lba, len)) in done.iter().zip(&places) {
        let Op::Read { buf, .. } = &io.op else {
            return Err("another I/O came back".into());
        };
        let mut expected = vec![0; *len];
        pattern(&mut expected, *n);
        check(buf[..] == expected[..], || {
            format!("{len} bytes at block {lba} differ")
        })?;
    }
    let Some(Op::ReadV { bufs, .. }) = done.last().map(|d| &d.op) else {
        return Err("another I/O came back".into());
    };
    check([&bufs[0][..], &bufs[1][..]].concat() == whole, || {
        "scattered bytes differ".into()
    })?;

    // Zeroes over a part of the blocks, and over that part only.
    let (_, first, len) = places[9];
    let blocks = u64::try_from(len / block)?;
    d.all_good([Op::WriteZeroes {
        lba: first + 1,
        len_blocks: blocks - 2,
        fua: true,
    }])?;
    let done = d.all_good([Op::Read {
        lba: first,
        buf: DmaBuf::new(len)?,
    }])?;
    let Op::Read { buf, .. } = &done[0].op else {
        return Err("another I/O came back".into());
    };
    check(buf[block..len - block].iter().all(|b| *b == 0), || {
        "not all zeroes".into()
    })?;
    check(buf[..block].iter().any(|b| *b != 0), || {
        "zeroes in front of the range".into()
    })?;

    // Many I/Os at once, more than the queue's depth.
    let mut ios = Vec::new();
    for n in 0..300u64 {
        let mut buf = DmaBuf::new(block)?;
        pattern(&mut buf, 1000 + n);
        ios.push(Op::Write {
            lba: 8192 + n,
            data: buf.freeze(),
            fua: false,
        });
    }
    d.all_good(ios)?;
    let mut ios = Vec::new();
    for n in 0..300u64 {
        ios.push(Op::Read {
            lba: 8192 + n,
            buf: DmaBuf::zeroed(block)?,
        });
    }
    for done in d.all_good(ios)? {
        let mut expected = vec![0; block];
        pattern(&mut expected, 1000 + done.tag);
        let good = matches!(&done.op, Op::Read { buf, .. } if buf[..] == expected[..]);
        check(good, || format!("block {} differs", 8192 + done.tag))?;
    }
    println!("{} commands", d.queue.stats().commands);
    drop(d.queue);
    d.controller.shutdown()?;
    Ok(())
}

fn cpu_time() -> Result<Duration> {
    let text = std::fs::read_to_string("/proc/self/stat")?;
    let fields: Vec<&str> = text
        .rsplit(')')
        .next()
        .unwrap_or("")
        .split_whitespace()
        .collect();
    let ticks = |n: usize| {
        fields
            .get(n)
            .and_then(|f| f.parse::<u64>().ok())
            .unwrap_or(0)
    };
    Ok(Duration::from_millis((ticks(11) + ticks(12)) * 10))
}

fn sleep(uri: &str) -> Result<()> {
    let mut options = QueueOptions::default().depth(8);
    options.spin_max = Duration::ZERO;
    let mut d = device(uri, ControllerOptions::default(), &options)?;
    check(d.controller.interrupt_count() >= 2, || {
        "the queue has no interrupt".into()
    })?;
    let (cpu, started) = (cpu_time()?, Instant::now());
    for n in 0..20 {
        d.all_good([Op::Read {
            lba: n,
            buf: DmaBuf::new(4096)?,
        }])?;
    }
    let (wall, cpu) = (started.elapsed(), cpu_time()?.saturating_sub(cpu));
    println!("20 reads: {wall:?}, of which {cpu:?} on the CPU");
    // Each read takes 50 ms in the device. Without interrupts it would take the 500 ms of a slice.
    check(wall < Duration::from_secs(9), || {
        "the interrupt does not wake".into()
    })?;
    check(cpu < wall / 2, || "it spins".into())
}

fn status_of(done: &Completion) -> String {
    match &done.result {
        Ok(()) => "success".to_owned(),
        Err(e) => match e.nvme_status.map(Status::from) {
            Some(s) => format!("{}/{:#x}", s.sct().0, s.sc()),
            None => format!("{:?}", e.kind),
        },
    }
}

fn media_errors(uri: &str, read: u64, write: u64) -> Result<()> {
    let mut d = device(uri, ControllerOptions::default(), &QueueOptions::default())?;
    let block = usize::try_from(d.ns.block_size())?;
    let mut outcome = BTreeMap::new();
    for lba in [read - 8, read, read + 8] {
        let done = d.run([Op::Read {
            lba,
            buf: DmaBuf::new(block)?,
        }])?;
        outcome.insert(format!("read {lba}"), status_of(&done[0]));
    }
    for lba in [write - 8, write, write + 8] {
        let data = DmaBuf::zeroed(block)?.freeze();
        let done = d.run([Op::Write {
            lba,
            data,
            fua: false,
        }])?;
        outcome.insert(format!("write {lba}"), status_of(&done[0]));
    }
    println!("{outcome:#?}");
    for (name, status) in &outcome {
        let expected = match name.split_once(' ') {
            Some(("read", lba)) if lba == read.to_string() => "2/0x81",
            Some(("write", lba)) if lba == write.to_string() => "2/0x80",
            _ => "success",
        };
        check(status == expected, || {
            format!("{name}: {status}, expected {expected}")
        })?;
    }
    Ok(())
}

fn reset(uri: &str) -> Result<()> {
    let mut d = device(
        uri,
        ControllerOptions::default(),
        &QueueOptions::default().depth(32),
    )?;
    let mut endings = BTreeMap::<String, u32>::new();
    for round in 0..4u64 {
        let mut tags = BTreeSet::new();
        for tag in 0..24 {
            let io = Op::Read {
                lba: tag,
                buf: DmaBuf::new(4096)?,
            };
            if d.queue.submit(&d.ns, round * 100 + tag, io).is_ok() {
                tags.insert(round * 100 + tag);
            }
        }
        let mut done = Vec::new();
        d.queue.poll(&mut done);
        let controller = Arc::clone(&d.controller);
        let resetter = std::thread::spawn(move || controller.reset().map_err(|e| e.to_string()));
        let deadline = Instant::now() + Duration::from_secs(90);
        while !tags.is_empty() {
            d.queue.poll(&mut done);
            for end in done.drain(..) {
                check(tags.remove(&end.tag), || {
                    format!("I/O {} ended twice", end.tag)
                })?;
                *endings.entry(status_of(&end)).or_default() += 1;
            }
            if !tags.is_empty() {
                d.queue.wait(Duration::from_millis(200))?;
            }
            check(Instant::now() < deadline, || {
                format!("{} I/Os never ended", tags.len())
            })?;
        }
        resetter
            .join()
            .map_err(|_| "the resetting thread panicked")??;
        d.all_good([Op::Read {
            lba: 1,
            buf: DmaBuf::new(4096)?,
        }])?;
    }
    println!("endings: {endings:?}");
    check(d.controller.generation() >= 4, || {
        "there were fewer resets".into()
    })
}

fn removal(uri: &str, id: &str) -> Result<()> {
    let mut d = device(
        uri,
        ControllerOptions::default(),
        &QueueOptions::default().depth(32),
    )?;
    let mut waiting = 0usize;
    for tag in 0..16 {
        let io = Op::Read {
            lba: tag,
            buf: DmaBuf::new(4096)?,
        };
        d.queue.submit(&d.ns, tag, io).map_err(|_| "not accepted")?;
        waiting += 1;
    }
    let mut console = std::fs::OpenOptions::new()
        .write(true)
        .open("/dev/console")?;
    writeln!(console, "RIG-HOST device_del {id}")?;
    let started = Instant::now();
    let deadline = started + Duration::from_secs(90);
    let (mut done, mut endings, mut tag) = (Vec::new(), BTreeMap::<String, u32>::new(), 100);
    loop {
        d.queue.poll(&mut done);
        for end in done.drain(..) {
            waiting -= 1;
            *endings.entry(status_of(&end)).or_default() += 1;
        }
        // I/O continues until the device is gone.
        let io = Op::Read {
            lba: tag % 64,
            buf: DmaBuf::new(4096)?,
        };
        match d.queue.submit(&d.ns, tag, io) {
            Ok(()) => waiting += 1,
            Err(SubmitError::Refused(_, e)) if e.kind == IoErrorKind::Removed && waiting == 0 => {
                break;
            }
            Err(_) => {}
        }
        tag += 1;
        check(Instant::now() < deadline, || {
            format!("{waiting} I/Os never ended; {endings:?}")
        })?;
        std::thread::sleep(Duration::from_millis(1));
    }
    println!("gone after {:?}; endings {endings:?}", started.elapsed());
    let events = d.controller.take_events();
    println!("events {events:?}");
    let told = events.iter().any(|e| matches!(e, ControllerEvent::Removed));
    check(told, || "no event tells of the removal".into())?;
    // The kernel has the function back when the driver has released it, with this process still
    // running.
    let address = uri
        .trim_start_matches("nvme://")
        .split('/')
        .next()
        .unwrap_or("");
    let function = format!("/sys/bus/pci/devices/{address}");
    while std::path::Path::new(&function).exists() {
        check(Instant::now() < deadline, || {
            format!("{function} stays: the kernel still waits for the driver")
        })?;
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}
