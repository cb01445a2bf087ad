//! `pumice bdev`: shows, copies, zeroes, verifies and serves block devices.

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use clap::{Args, Subcommand};
use pumice_bdev::contents::{self, Overwrite};
use pumice_bdev::{AsyncChannel, BlockDevice, DmaBuf, Op, OpKind, OpenOptions, uuid};
use pumice_bdev_control::config::{self, App};
use pumice_bdev_control::terminal::print_json;
use pumice_bdev_control::{complain, say};
use serde_json::{Value, json};

use crate::serve;

/// Number of bytes of one read or write.
const CHUNK: u64 = 1 << 20;
/// Number of reads and writes in flight.
const DEPTH: u64 = 16;

/// List, show, copy, zero, verify or serve block devices
#[derive(Args)]
pub struct Bdev {
    /// Configuration file (SPDK's JSON) with the devices
    #[arg(long = "json", short = 'c', value_name = "FILE", global = true)]
    config: Option<PathBuf>,
    #[command(subcommand)]
    action: Action,
}

#[derive(Subcommand)]
enum Action {
    /// List the devices of a configuration, or those of the URIs
    List {
        /// Devices by URI, in addition to those of the configuration
        uris: Vec<String>,
    },
    /// Show all properties of a device as JSON
    Info {
        /// Name, UUID or URI
        device: String,
    },
    /// Copy a device onto another, block by block
    Copy {
        /// Name or URI
        from: String,
        /// Name or URI; its content is lost
        to: String,
        /// Overwrite a destination that does not hold only zeroes
        #[arg(long)]
        force: bool,
    },
    /// Fill a device with zeroes
    Zero {
        /// Name or URI; its content is lost
        device: String,
        /// Overwrite a device that does not hold only zeroes
        #[arg(long)]
        force: bool,
    },
    /// Read every block of a device, or compare two devices
    Verify {
        /// Name or URI
        device: String,
        /// Another device, which must have the same content
        other: Option<String>,
    },
    /// Open devices and answer SPDK's JSON-RPC for them until SIGINT or SIGTERM
    Serve {
        /// Devices by URI, in addition to those of the configuration; methods can make and remove
        /// more
        uris: Vec<String>,
        /// The Unix socket; only the owner of this process may connect
        #[arg(
            short = 'r',
            long = "rpc-socket",
            value_name = "PATH",
            default_value = "/var/tmp/spdk.sock"
        )]
        rpc_socket: PathBuf,
        /// Also serve statistics for Prometheus, on a socket's path or a loopback address
        #[arg(long, value_name = "ADDRESS")]
        metrics: Option<String>,
        /// Log everything of a component (bdev, bdev_io, nvme, rpc, …, all); may be repeated
        #[arg(short = 'L', value_name = "COMPONENT")]
        log_flags: Vec<String>,
    },
}

impl Bdev {
    /// Takes this configuration if none stands behind the command.
    pub fn or_config(mut self, config: Option<PathBuf>) -> Bdev {
        self.config = self.config.or(config);
        self
    }
}

/// Runs the command.
pub fn run(args: &Bdev) -> ExitCode {
    match execute(args) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(e) => {
            complain!("pumice bdev: {e}");
            ExitCode::FAILURE
        }
    }
}

fn execute(args: &Bdev) -> Result<bool, String> {
    if let Action::Serve { log_flags, .. } = &args.action {
        pumice_bdev_control::logging::init("NOTICE", log_flags)?;
    }
    let app = App::new();
    if let Some(file) = &args.config {
        config::load_file(&app, file).map_err(|e| e.to_string())?;
    }
    match &args.action {
        Action::List { uris } => {
            for uri in uris {
                open_to_read(&app, uri)?;
            }
            list(&app)
        }
        Action::Info { device } => {
            let name = open_to_read(&app, device)?.info().name.clone();
            let answer = app.call("bdev_get_bdevs", &json!({ "name": name }));
            let answer = answer.map_err(|e| e.to_string())?;
            print_json(answer.get(0).unwrap_or(&Value::Null));
            Ok(true)
        }
        Action::Copy { from, to, force } => {
            let (from, to) = (open_to_read(&app, from)?, open(&app, to)?);
            may_overwrite(&to, *force)?;
            copy(&*from, &*to)
        }
        Action::Zero { device, force } => {
            let dev = open(&app, device)?;
            may_overwrite(&dev, *force)?;
            zero(&*dev)
        }
        Action::Verify { device, other } => {
            let dev = open_to_read(&app, device)?;
            let other = other.as_ref().map(|o| open_to_read(&app, o)).transpose()?;
            verify(&*dev, other.as_deref())
        }
        Action::Serve {
            uris,
            rpc_socket,
            metrics,
            ..
        } => {
            for uri in uris {
                open(&app, uri)?;
            }
            serve::run(app, rpc_socket, metrics.as_deref())
        }
    }
}

fn open(app: &App, device: &str) -> Result<Arc<dyn BlockDevice>, String> {
    app.open(device).map_err(|e| e.to_string())
}

/// Opens a device for reading, which others may do at the same time. Creates and changes nothing.
fn open_to_read(app: &App, device: &str) -> Result<Arc<dyn BlockDevice>, String> {
    let options = OpenOptions::new().read_only(true);
    app.open_with(device, options).map_err(|e| e.to_string())
}

fn channel(dev: &dyn BlockDevice) -> Result<AsyncChannel, String> {
    Ok(AsyncChannel::new(
        dev.open_channel().map_err(|e| e.to_string())?,
    ))
}

/// Refuses to overwrite anything but zeroes.
fn may_overwrite(dev: &Arc<dyn BlockDevice>, force: bool) -> Result<(), String> {
    contents::may_overwrite(&**dev, Overwrite::forced(force)).map_err(|e| e.to_string())
}

fn list(app: &App) -> Result<bool, String> {
    let bdevs = app.registry.list();
    if bdevs.is_empty() {
        return Err("no bdevs configured: pass --json or a URI".to_owned());
    }
    say!(
        "{:<24} {:<20} {:>6} {:>14} {:<36} Used by",
        "Name",
        "Product",
        "Block",
        "Bytes",
        "UUID"
    );
    for bdev in bdevs {
        let info = bdev.info();
        say!(
            "{:<24} {:<20} {:>6} {:>14} {} {}",
            info.name,
            info.product,
            info.block_size,
            info.len_bytes(),
            uuid::format(&info.uuid),
            bdev.claimed_by().unwrap_or_default()
        );
    }
    Ok(true)
}

/// Returns the length of the chunks for these devices, which is a multiple of their block sizes.
fn chunk(devices: &[&dyn BlockDevice]) -> Result<u64, String> {
    let mut chunk = CHUNK;
    for info in devices.iter().map(|d| d.info()) {
        let block_size = u64::from(info.block_size);
        chunk = info.limits.at_most(chunk / block_size) * block_size;
    }
    let unit = devices
        .iter()
        .map(|d| u64::from(d.info().block_size))
        .max()
        .unwrap_or(512);
    if chunk < unit {
        return Err("the devices have no length of I/O in common".to_owned());
    }
    Ok(chunk - chunk % unit)
}

/// Returns the offsets and lengths of the next chunks in flight, in bytes.
fn chunks(at: u64, end: u64, chunk: u64) -> Vec<(u64, u64)> {
    let mut chunks = Vec::new();
    let mut at = at;
    while at < end && (chunks.len() as u64) < DEPTH {
        let len = chunk.min(end - at);
        chunks.push((at, len));
        at += len;
    }
    chunks
}

fn reads(dev: &dyn BlockDevice, parts: &[(u64, u64)]) -> Result<Vec<Op>, String> {
    let bs = u64::from(dev.info().block_size);
    let read = |(at, len): &(u64, u64)| {
        let buf = usize::try_from(*len).map_err(|e| e.to_string())?;
        let buf = DmaBuf::new(buf).map_err(|e| e.to_string())?;
        Ok(Op::Read { lba: at / bs, buf })
    };
    parts.iter().map(read).collect()
}

fn copy(from: &dyn BlockDevice, to: &dyn BlockDevice) -> Result<bool, String> {
    let (len, room) = (from.info().len_bytes(), to.info().len_bytes());
    let to_bs = u64::from(to.info().block_size);
    if len > room {
        return Err(format!(
            "{} has {len} bytes and {} only {room}",
            from.info().name,
            to.info().name
        ));
    }
    if !len.is_multiple_of(to_bs) {
        return Err(format!("{len} bytes are not whole blocks of {to_bs}"));
    }
    let chunk = chunk(&[from, to])?;
    let (source, target) = (channel(from)?, channel(to)?);
    let mut at = 0;
    while at < len {
        let parts = chunks(at, len, chunk);
        let mut writes = Vec::new();
        for ((offset, n), (op, result)) in parts
            .iter()
            .zip(source.block_on(source.io_all(reads(from, &parts)?)))
        {
            result.map_err(|e| e.to_string())?;
            if let Op::Read { buf, .. } = op {
                writes.push(Op::Write {
                    lba: offset / to_bs,
                    data: buf.freeze(),
                    fua: false,
                });
            }
            at = offset + n;
        }
        for (_, result) in target.block_on(target.io_all(writes)) {
            result.map_err(|e| e.to_string())?;
        }
    }
    flush(to, &target)?;
    say!(
        "{len} bytes copied from {} to {}",
        from.info().name,
        to.info().name
    );
    Ok(true)
}

fn flush(dev: &dyn BlockDevice, ch: &AsyncChannel) -> Result<(), String> {
    if dev.info().ops.has(OpKind::Flush) {
        ch.block_on(ch.flush()).map_err(|e| e.to_string())?;
    }
    Ok(())
}

fn zero(dev: &dyn BlockDevice) -> Result<bool, String> {
    /// Number of bytes after which the device is asked, so that an error has a place.
    const STEP: u64 = 1 << 30;
    let info = dev.info();
    let ch = channel(dev)?;
    let by_command = info.ops.has(OpKind::WriteZeroes);
    let step = if by_command { STEP } else { chunk(&[dev])? } / u64::from(info.block_size);
    let mut lba = 0;
    while lba < info.num_blocks {
        let n = step.min(info.num_blocks - lba);
        let written = if by_command {
            ch.block_on(ch.write_zeroes(lba, n, false))
        } else {
            let len = usize::try_from(n * u64::from(info.block_size)).map_err(|e| e.to_string())?;
            let zeroes = DmaBuf::zeroed(len).map_err(|e| e.to_string())?.freeze();
            ch.block_on(ch.write(lba, zeroes, false))
        };
        written.map_err(|e| e.to_string())?;
        lba += n;
    }
    flush(dev, &ch)?;
    say!("{}: {} bytes of zeroes", info.name, info.len_bytes());
    Ok(true)
}

fn verify(dev: &dyn BlockDevice, other: Option<&dyn BlockDevice>) -> Result<bool, String> {
    /// Most differences to print. Further ones are only counted.
    const SHOWN: u64 = 20;
    let len = dev.info().len_bytes();
    let mut devices = vec![dev];
    devices.extend(other);
    if let Some(other) = other.filter(|o| o.info().len_bytes() != len) {
        let lens = (
            &dev.info().name,
            len,
            &other.info().name,
            other.info().len_bytes(),
        );
        say!("{} has {} bytes, {} has {}", lens.0, lens.1, lens.2, lens.3);
        return Ok(false);
    }
    let chunk = chunk(&devices)?;
    let channels: Result<Vec<_>, String> = devices.iter().map(|d| channel(*d)).collect();
    let channels = channels?;
    let (mut bad, mut at) = (0_u64, 0);
    let mut report = |text: String| {
        bad += 1;
        if bad <= SHOWN {
            say!("{text}");
        }
    };
    while at < len {
        let parts = chunks(at, len, chunk);
        let mut contents: Vec<Vec<Option<DmaBuf>>> = Vec::new();
        for (dev, ch) in devices.iter().zip(&channels) {
            let mut bufs = Vec::new();
            for (op, result) in ch.block_on(ch.io_all(reads(*dev, &parts)?)) {
                bufs.push(match (op, result) {
                    (Op::Read { buf, .. }, Ok(())) => Some(buf),
                    (_, Err(e)) => {
                        report(e.to_string());
                        None
                    }
                    _ => None,
                });
            }
            contents.push(bufs);
        }
        if let [first, second] = &contents[..] {
            for ((offset, _), (a, b)) in parts.iter().zip(first.iter().zip(second)) {
                if let (Some(a), Some(b)) = (a, b)
                    && let Some(diff) = a.iter().zip(b.iter()).position(|(a, b)| a != b)
                {
                    report(format!("they differ at byte {}", offset + diff as u64));
                }
            }
        }
        at = parts.last().map_or(len, |(offset, n)| offset + n);
    }
    let what = if other.is_some() { "compared" } else { "read" };
    say!(
        "{len} bytes {what}, {bad} of {} chunks bad",
        len.div_ceil(chunk)
    );
    Ok(bad == 0)
}

#[cfg(test)]
mod tests {
    use pumice_bdev::error_inject::{ErrorDevice, Failure, Injection};

    use super::*;

    fn bdev(action: Action) -> Result<bool, String> {
        execute(&Bdev {
            config: None,
            action,
        })
    }

    #[test]
    fn copy_verify_zero() {
        let dir = tempfile::tempdir().unwrap();
        let uri = |name: &str, size: &str| {
            format!(
                "file://{}/{name}?size={size}&create=1&buffered=1",
                dir.path().display()
            )
        };
        let (a, b) = (uri("a", "3M"), uri("b", "3M"));
        // A command that only reads creates no file.
        for name in ["a", "b"] {
            let file = std::fs::File::create(dir.path().join(name)).unwrap();
            file.set_len(3 << 20).unwrap();
        }
        let verify = || {
            bdev(Action::Verify {
                device: uri("a", "3M"),
                other: Some(uri("b", "3M")),
            })
        };
        assert_eq!(verify(), Ok(true));
        let mut bytes = vec![0; 3 << 20];
        bytes[2_500_000] = 7;
        std::fs::write(dir.path().join("a"), &bytes).unwrap();
        assert_eq!(verify(), Ok(false));
        bdev(Action::Copy {
            from: a.clone(),
            to: b.clone(),
            force: false,
        })
        .unwrap();
        assert_eq!(verify(), Ok(true));
        let zero = |force| {
            bdev(Action::Zero {
                device: uri("b", "3M"),
                force,
            })
        };
        assert!(zero(false).unwrap_err().contains("--force"));
        zero(true).unwrap();
        assert!(
            std::fs::read(dir.path().join("b"))
                .unwrap()
                .iter()
                .all(|b| *b == 0)
        );
        let e = bdev(Action::Copy {
            from: a,
            to: uri("c", "1M"),
            force: false,
        })
        .unwrap_err();
        assert!(e.contains("only 1048576"), "{e}");
        let e = bdev(Action::Info {
            device: "Nvme0".into(),
        })
        .unwrap_err();
        assert_eq!(
            e,
            "there is no bdev `Nvme0`: no bdevs configured: pass --json or a URI"
        );
    }

    /// A copy is complete only when it is durable.
    #[test]
    fn a_copy_whose_flush_fails_has_failed() {
        let from = pumice_bdev::open("malloc://1M").unwrap();
        let to = ErrorDevice::new(None, pumice_bdev::open("malloc://1M").unwrap());
        to.inject(Injection::new(Failure::Fail).op(Some(OpKind::Flush)));
        let failed = copy(&*from, &to);
        assert!(failed.is_err(), "{failed:?}");
        assert_eq!(to.injections(), []);
        assert_eq!(copy(&*from, &to), Ok(true));
    }
}
