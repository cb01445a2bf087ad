//! A server of the protocol for tests: registers, configuration space and a doorbell page without a
//! controller behind them, and a choice of faults.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::thread::JoinHandle;

use parking_lot::Mutex;

use super::message::{Body, Command, Header, REGION_ACCESS_LEN, version};
use super::stream::{self, Message};
use crate::transport::vfio::info::{u32_at, u64_at};

/// The fault of a fake server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fault {
    /// It answers a command with an error.
    Refuse(Command, u32),
    /// It answers a command with the header alone, without the error flag.
    Short(Command),
    /// It does not answer a command.
    Silent(Command),
    /// It closes the connection on a command.
    HangUp(Command),
    /// It sends half of the answer and stops.
    Half(Command),
    /// It sends requests of its own and a stale answer before each answer.
    Chatty,
    /// The file of BAR 0 is shorter than the part that may be mapped.
    ShortFile,
    /// It has no doorbell page.
    NoDoorbells,
    /// It does not say that it is a PCI device.
    NotPci,
    /// It has no configuration space.
    NoConfig,
    /// BAR 0 ends in the middle of the first doorbells.
    SmallBar,
    /// The version of its protocol is 1.0.
    NextVersion,
    /// CSTS.RDY stays set for so many looks after CC.EN was cleared.
    SlowOff(u32),
}

/// The requests that the client made.
#[derive(Debug, Default)]
pub(super) struct Seen {
    pub config: Vec<u8>,
    pub registers: Vec<u8>,
    pub maps: Vec<(u64, u64, u64)>,
    pub most_fds: usize,
    pub vectors: Vec<OwnedFd>,
    pub resets: usize,
    /// Number of reads of CSTS until RDY is clear.
    pub looks: u32,
    /// Whether memory was taken back while CSTS.RDY was set.
    pub taken_early: bool,
}

pub(super) struct Fake {
    pub dir: tempfile::TempDir,
    pub seen: Arc<Mutex<Seen>>,
    pub bar: File,
    thread: Option<JoinHandle<()>>,
}

const BAR_LEN: u64 = 0x2000;

impl Fake {
    /// Listens on `cntrl` in a directory of its own and serves one client.
    pub(super) fn start(fault: Option<Fault>) -> Fake {
        let dir = tempfile::tempdir().expect("a directory");
        let listener = UnixListener::bind(dir.path().join("cntrl")).expect("bound");
        let bar = tempfile::tempfile().expect("a file");
        let short = fault == Some(Fault::ShortFile);
        bar.set_len(if short { 0x1800 } else { BAR_LEN })
            .expect("sized");
        let mut config = vec![0u8; 256];
        // The capability list: power management, then MSI-X with 8 vectors, left enabled by an
        // earlier client.
        config[6] = 0x10;
        config[0x34] = 0x40;
        config[0x40..0x42].copy_from_slice(&[0x01, 0x84]);
        config[0x84..0x88].copy_from_slice(&[0x11, 0x00, 0x07, 0x80]);
        let mut registers = vec![0u8; 0x1000];
        registers[..8].copy_from_slice(&0x0020_1e01_00ffu64.to_le_bytes());
        registers[8..12].copy_from_slice(&0x0001_0300u32.to_le_bytes());
        let seen = Arc::new(Mutex::new(Seen {
            config,
            registers,
            ..Seen::default()
        }));
        let server = Server {
            fault,
            seen: Arc::clone(&seen),
            bar: bar.try_clone().expect("cloned"),
        };
        let thread = std::thread::spawn(move || {
            if let Ok((stream, _)) = listener.accept() {
                server.serve(&stream);
            }
        });
        Fake {
            dir,
            seen,
            bar,
            thread: Some(thread),
        }
    }

    pub(super) fn path(&self) -> PathBuf {
        self.dir.path().to_path_buf()
    }
}

impl Drop for Fake {
    fn drop(&mut self) {
        // The connection wakes an accept() that nobody came to.
        let _ = UnixStream::connect(self.dir.path().join("cntrl"));
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

struct Server {
    fault: Option<Fault>,
    seen: Arc<Mutex<Seen>>,
    bar: File,
}

impl Server {
    fn serve(&self, stream: &UnixStream) {
        while let Ok(Some(message)) = stream::receive(stream, None) {
            let Some(command) = Command::from_number(message.header.command) else {
                continue;
            };
            let header = message.header;
            match self.fault {
                Some(Fault::Silent(c)) if c == command => continue,
                Some(Fault::HangUp(c)) if c == command => return,
                Some(Fault::Refuse(c, errno)) if c == command => {
                    let refusal = header.reply(0, errno).expect("fits");
                    stream::send(stream, &refusal, &[], &[]).expect("sent");
                    continue;
                }
                Some(Fault::Short(c)) if c == command => {
                    let short = header.reply(0, 0).expect("fits");
                    stream::send(stream, &short, &[], &[]).expect("sent");
                    continue;
                }
                Some(Fault::Half(c)) if c == command => {
                    let whole = header.reply(32, 0).expect("fits");
                    stream::send(stream, &whole, &[0; 5], &[]).expect("sent");
                    continue;
                }
                Some(Fault::Chatty) if command != Command::Version => {
                    let own = Header::request(0x7777, Command::RegionRead, 3).expect("fits");
                    stream::send(stream, &own, &[1, 2, 3], &[]).expect("sent");
                    let refused = stream::receive(stream, None).expect("read").expect("open");
                    assert!(refused.header.is_error() && refused.header.id == 0x7777);
                    let mut stale = header;
                    stale.id = header.id.wrapping_sub(1);
                    let stale = stale.reply(4, 0).expect("fits");
                    stream::send(stream, &stale, &[0; 4], &[]).expect("sent");
                }
                _ => {}
            }
            let (body, file) = self.answer(command, message);
            let reply = header.reply(body.len(), 0).expect("fits");
            let fds = if file {
                vec![self.bar.as_fd()]
            } else {
                Vec::new()
            };
            if stream::send(stream, &reply, &body, &fds).is_err() {
                return;
            }
        }
    }

    fn answer(&self, command: Command, message: Message) -> (Vec<u8>, bool) {
        let mut seen = self.seen.lock();
        let body = message.body;
        let field = |at| u32_at(&body, at).expect("whole");
        let wide = |at| u64_at(&body, at).expect("whole");
        match command {
            Command::Version => {
                let json = r#"{"capabilities":{"max_msg_fds":3,"max_data_xfer_size":1048576}}"#;
                let mut version = version(json);
                if self.fault == Some(Fault::NextVersion) {
                    version[..4].copy_from_slice(&[1, 0, 0, 0]);
                }
                (version, false)
            }
            Command::GetInfo => {
                let flags = if self.fault == Some(Fault::NotPci) {
                    1
                } else {
                    3
                };
                let regions = if self.fault == Some(Fault::NoConfig) {
                    7
                } else {
                    10
                };
                let info = Body::default().u32(16).u32(flags).u32(regions).u32(5);
                (info.done(), false)
            }
            Command::GetRegionInfo
                if field(8) == 0
                    && !matches!(self.fault, Some(Fault::NoDoorbells | Fault::SmallBar)) =>
            {
                let info = Body::default().u32(80).u32(0xf).u32(0).u32(32);
                let info = info.u64(BAR_LEN).u64(0);
                // An unknown capability comes before the sparse areas.
                let info = info.u32(1 << 16 | 9).u32(48).u64(0);
                let info = info.u32(1 << 16 | 1).u32(0).u32(1).u32(0);
                (info.u64(0x1000).u64(0x1000).done(), true)
            }
            Command::GetRegionInfo => {
                let size = match (field(8), self.fault) {
                    (0, Some(Fault::SmallBar)) => 0x1004,
                    (0, _) => BAR_LEN,
                    _ => 256,
                };
                let info = Body::default().u32(32).u32(3).u32(field(8)).u32(0);
                (info.u64(size).u64(0).done(), false)
            }
            Command::GetIrqInfo => {
                let count = if field(8) == 2 { 8 } else { 1 };
                (
                    Body::default()
                        .u32(16)
                        .u32(1)
                        .u32(field(8))
                        .u32(count)
                        .done(),
                    false,
                )
            }
            Command::SetIrqs => {
                seen.most_fds = seen.most_fds.max(message.fds.len());
                if field(8) == 2 {
                    assert_eq!(
                        usize::try_from(field(16)).expect("small"),
                        message.fds.len()
                    );
                    if field(16) == 0 {
                        seen.vectors.clear();
                    }
                    seen.vectors.extend(message.fds);
                }
                (Vec::new(), false)
            }
            Command::RegionRead | Command::RegionWrite => {
                let (offset, region, count) = (wide(0), field(8), field(12));
                let at = usize::try_from(offset).expect("small");
                let end = at + usize::try_from(count).expect("small");
                let mut reply = Body::default().u64(offset).u32(region).u32(count);
                if command == Command::RegionRead && (region, at) == (0, 0x1c) && seen.looks > 0 {
                    seen.looks -= 1;
                    seen.registers[0x1c] = u8::from(seen.looks > 0);
                }
                let space = if region == 7 {
                    &mut seen.config
                } else {
                    &mut seen.registers
                };
                if command == Command::RegionRead {
                    reply = reply.bytes(&space[at..end]);
                } else {
                    space[at..end].copy_from_slice(&body[REGION_ACCESS_LEN..]);
                    if region == 0 && at == 0x14 {
                        match self.fault {
                            Some(Fault::SlowOff(looks)) if space[0x14] & 1 < space[0x1c] => {
                                seen.looks = looks;
                            }
                            _ => space[0x1c] = space[0x14] & 1,
                        }
                    }
                }
                (reply.done(), false)
            }
            Command::DmaMap => {
                let file = File::from(message.fds.into_iter().next().expect("a descriptor"));
                let len = file.metadata().expect("stat").len();
                assert!(wide(8) + wide(24) <= len, "mapped past the end of the file");
                let mut byte = [0];
                file.read_exact_at(&mut byte, len - 1).expect("readable");
                seen.maps.push((wide(16), wide(24), len));
                (Vec::new(), false)
            }
            Command::DmaUnmap => {
                seen.taken_early |= seen.registers[0x1c] & 1 != 0;
                seen.maps.retain(|(at, _, _)| *at != wide(8));
                (body, false)
            }
            Command::Reset => {
                seen.resets += 1;
                (Vec::new(), false)
            }
        }
    }
}
