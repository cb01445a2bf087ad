//! Tests of a served soft controller against a client that does not keep to the protocol (vfio-user specification 0.1).

use std::io::Write;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use pumice_io::sys::{EventFd, shared_file};
use pumice_nvme::transport::vfio_user_wire::{
    Body, Command, DMA_READ_WRITE, Header, REGION_ACCESS_LEN, receive, send,
};
use pumice_nvme_soft::{MemoryBackend, SoftConfig, SoftController, SoftNamespace, SoftServer};

/// Longest wait for an event that must come, however slow the machine is.
const PATIENCE: Duration = Duration::from_secs(120);

const REGISTERS: u32 = 0;
const CONFIG: u32 = 7;
const EINVAL: u32 = libc::EINVAL.cast_unsigned();

struct Target {
    dir: tempfile::TempDir,
    _server: SoftServer,
}

fn target() -> Target {
    let dir = tempfile::tempdir().expect("a directory");
    let disk = SoftNamespace::new(Box::new(MemoryBackend::new(1 << 20)), 512);
    let soft = SoftController::new(SoftConfig::new(vec![disk]).served()).expect("a controller");
    let server = SoftServer::start(soft, &dir.path().join("cntrl")).expect("served");
    Target {
        dir,
        _server: server,
    }
}

struct Client {
    stream: UnixStream,
    id: u16,
}

impl Client {
    fn of(target: &Target) -> Client {
        let stream = UnixStream::connect(target.dir.path().join("cntrl")).expect("connected");
        Client { stream, id: 0 }
    }

    /// Sends a request. Returns the body of the answer, or its errno.
    fn ask(&mut self, command: u16, body: &[u8], fds: &[BorrowedFd<'_>]) -> Result<Vec<u8>, u32> {
        self.id += 1;
        let mut header = Header::request(self.id, Command::Version, body.len()).expect("short");
        header.command = command;
        send(&self.stream, &header, body, fds).expect("sent");
        let answer = receive(&self.stream, Some(Instant::now() + PATIENCE));
        let answer = answer.expect("in time").expect("still served");
        assert_eq!(
            (answer.header.id, answer.header.command),
            (self.id, command)
        );
        match answer.header.is_error() {
            true => Err(answer.header.errno),
            false => Ok(answer.body),
        }
    }

    /// Maps a part of a file: its offset, the device address and the length.
    fn map(&mut self, part: [u64; 3], file: BorrowedFd<'_>) -> Result<Vec<u8>, u32> {
        self.map_with(DMA_READ_WRITE, part, &[file])
    }

    fn map_with(
        &mut self,
        flags: u32,
        [offset, address, len]: [u64; 3],
        fds: &[BorrowedFd<'_>],
    ) -> Result<Vec<u8>, u32> {
        let body = Body::default().u32(32).u32(flags);
        let body = body.u64(offset).u64(address).u64(len).done();
        self.ask(Command::DmaMap as u16, &body, fds)
    }

    fn unmap(&mut self, address: u64, len: u64) -> Result<Vec<u8>, u32> {
        let body = Body::default().u32(24).u32(0).u64(address).u64(len).done();
        self.ask(Command::DmaUnmap as u16, &body, &[])
    }

    fn read(&mut self, region: u32, offset: u64, count: u32) -> Result<Vec<u8>, u32> {
        let body = Body::default().u64(offset).u32(region).u32(count).done();
        let answer = self.ask(Command::RegionRead as u16, &body, &[])?;
        Ok(answer[REGION_ACCESS_LEN..].to_vec())
    }

    fn write(&mut self, region: u32, offset: u64, data: &[u8]) -> Result<Vec<u8>, u32> {
        let count = u32::try_from(data.len()).expect("short");
        self.write_counted(region, offset, count, data)
    }

    fn write_counted(
        &mut self,
        region: u32,
        offset: u64,
        count: u32,
        data: &[u8],
    ) -> Result<Vec<u8>, u32> {
        let head = Body::default().u64(offset).u32(region).u32(count);
        self.ask(Command::RegionWrite as u16, &head.bytes(data).done(), &[])
    }

    fn set_irqs(
        &mut self,
        [flags, index, start, count]: [u32; 4],
        fds: &[BorrowedFd<'_>],
    ) -> Result<Vec<u8>, u32> {
        let head = Body::default().u32(20).u32(flags).u32(index);
        let body = head.u32(start).u32(count).done();
        self.ask(Command::SetIrqs as u16, &body, fds)
    }
}

/// An access behind the end of a file would end the controller's process, and two mappings of one address would mix two buffers.
#[test]
fn mappings_that_do_harm_are_refused() {
    let target = target();
    let mut client = Client::of(&target);
    let file = shared_file(1 << 20).expect("a file");
    let at = 0x10_0000;
    client.map([0, at, 0x1_0000], file.as_fd()).expect("mapped");
    let exists = libc::EEXIST.cast_unsigned();
    for (part, errno) in [
        ([0, 2 * at, 0], EINVAL),
        ([0, 2 * at + 0x200, 0x1000], EINVAL),
        ([0x200, 2 * at, 0x1000], EINVAL),
        ([0, 2 * at, 0x1200], EINVAL),
        ([0xf_f000, 2 * at, 0x2000], EINVAL),
        ([u64::MAX - 0xfff, 2 * at, 0x1000], EINVAL),
        ([0, u64::MAX - 0xfff, 0x2000], EINVAL),
        ([0, at, 0x1_0000], exists),
        ([0, at + 0xf000, 0x2000], exists),
        ([0, at - 0x1000, 0x2000], exists),
        ([0, at - 0x1000, 0x2_0000], exists),
    ] {
        assert_eq!(client.map(part, file.as_fd()), Err(errno), "{part:x?}");
    }
    let part = [0, 2 * at, 0x1000];
    let only_read = client.map_with(DMA_READ_WRITE & 1, part, &[file.as_fd()]);
    assert_eq!(only_read, Err(EINVAL));
    assert_eq!(client.map_with(DMA_READ_WRITE, part, &[]), Err(EINVAL));
    // Its owner could make it shorter.
    let loose = tempfile::tempfile().expect("a file");
    loose.set_len(1 << 20).expect("sized");
    assert_eq!(
        client.map(part, loose.as_fd()),
        Err(libc::EPERM.cast_unsigned())
    );

    client
        .map([0, at + 0x1_0000, 0x1000], file.as_fd())
        .expect("it follows the other one");
    let unknown = Err(libc::ENOENT.cast_unsigned());
    assert_eq!(client.unmap(at, 0x1000), unknown);
    assert_eq!(client.unmap(at + 0x1000, 0xf000), unknown);
    client.unmap(at, 0x1_0000).expect("unmapped");
    assert_eq!(client.unmap(at, 0x1_0000), unknown);
    client
        .map([0, at, 0x1_0000], file.as_fd())
        .expect("mapped again");
}

#[test]
fn accesses_outside_of_a_region_are_refused() {
    let target = target();
    let mut client = Client::of(&target);
    for (region, offset, count) in [
        (CONFIG, 255, 2),
        (CONFIG, 256, 1),
        (CONFIG, 0, 0),
        (CONFIG, u64::MAX, 2),
        (CONFIG, 0, u32::MAX),
        (REGISTERS, 0, 3),
        (REGISTERS, 2, 4),
        (REGISTERS, 1 << 32, 4),
        (REGISTERS, 0x10_0000, 4),
        (1, 0, 4),
        (99, 0, 4),
    ] {
        let read = client.read(region, offset, count);
        assert_eq!(read, Err(EINVAL), "{region} {offset:#x} {count}");
    }
    assert_eq!(client.write(CONFIG, 255, &[0; 2]), Err(EINVAL));
    assert_eq!(client.write(REGISTERS, 0x14, &[0; 3]), Err(EINVAL));
    assert_eq!(client.write_counted(CONFIG, 4, 1, &[6, 0]), Err(EINVAL));
    assert_eq!(client.write_counted(CONFIG, 4, 4, &[6, 0]), Err(EINVAL));
    assert_eq!(client.ask(99, &[], &[]), Err(libc::ENOTSUP.cast_unsigned()));
    assert_eq!(
        client.ask(Command::DmaUnmap as u16, &[0; 20], &[]),
        Err(EINVAL)
    );
    assert_eq!(
        client.read(CONFIG, 0, 256).map(|config| config.len()),
        Ok(256)
    );
}

/// Only some bits of configuration space can be written, and a reset switches MSI-X off.
#[test]
fn configuration_space_keeps_what_is_not_the_clients() {
    let target = target();
    let mut client = Client::of(&target);
    let before = client.read(CONFIG, 0, 256).expect("read");
    client.write(CONFIG, 0, &[0xff; 256]).expect("written");
    let mut want = before.clone();
    (want[4], want[5], want[0x53]) = (6, 4, 0xc0);
    assert_eq!(client.read(CONFIG, 0, 256), Ok(want.clone()));
    client.ask(Command::Reset as u16, &[], &[]).expect("reset");
    want[0x53] = 0;
    assert_eq!(client.read(CONFIG, 0, 256), Ok(want));
}

#[test]
fn interrupts_that_do_not_exist_are_refused() {
    const EVENT: u32 = 1 << 2 | 1 << 5;
    let target = target();
    let mut client = Client::of(&target);
    let event = EventFd::new().expect("an eventfd");
    let two = [event.as_fd(), event.as_fd()];
    for (set, fds) in [
        ([EVENT, 1, 0, 2], &two[..]),
        ([EVENT, 2, 15, 2], &two),
        ([EVENT, 2, u32::MAX, 2], &two),
        ([EVENT, 2, 0, 1], &two),
        ([EVENT, 2, 0, 3], &two),
        ([1 | 1 << 5, 2, 0, 2], &two),
        ([EVENT, 2, 0, 1], &[]),
    ] {
        assert_eq!(client.set_irqs(set, fds), Err(EINVAL), "{set:?}");
    }
    client
        .set_irqs([EVENT, 2, 14, 2], &two)
        .expect("the last two");
    client.set_irqs([1 | 1 << 5, 2, 0, 0], &[]).expect("off");
}

#[test]
fn a_request_without_an_answer_has_none() {
    let target = target();
    let mut client = Client::of(&target);
    let body = Body::default().u64(0).u32(CONFIG).u32(4).done();
    let header = Header::request(1000, Command::RegionRead, body.len()).expect("short");
    let mut bytes = header.encode();
    // The flag NO_REPLY.
    bytes[8] |= 0x10;
    client.stream.write_all(&bytes).expect("sent");
    client.stream.write_all(&body).expect("sent");
    // The next answer is the one to the next request.
    assert!(client.read(CONFIG, 0, 4).is_ok());
}

/// The memory of the one that has gone is no longer the controller's.
#[test]
fn the_next_client_finds_the_controller_off() {
    let target = target();
    let mut client = Client::of(&target);
    let file = shared_file(1 << 20).expect("a file");
    let at = 0x10_0000u64;
    client.map([0, at, 0x2000], file.as_fd()).expect("mapped");
    let queues = 0x0001_0001u32.to_le_bytes();
    client.write(REGISTERS, 0x24, &queues).expect("AQA");
    for (register, address) in [(0x28, at), (0x30, at + 0x1000)] {
        let written = client.write(REGISTERS, register, &address.to_le_bytes());
        written.expect("ASQ, ACQ");
    }
    let enable = 0x0046_0001u32.to_le_bytes();
    client.write(REGISTERS, 0x14, &enable).expect("CC");
    let start = Instant::now();
    while client.read(REGISTERS, 0x1c, 4).expect("CSTS")[0] & 1 == 0 {
        assert!(start.elapsed() < PATIENCE, "never ready");
    }
    drop(client);
    let mut next = Client::of(&target);
    assert_eq!(next.read(REGISTERS, 0x14, 4), Ok(vec![0; 4]));
    assert_eq!(next.read(REGISTERS, 0x1c, 4), Ok(vec![0; 4]));
    next.map([0, at, 0x2000], file.as_fd())
        .expect("the address is free");
}
