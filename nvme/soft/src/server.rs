//! A soft controller behind a vfio-user socket, for other processes: a target without hardware.
//!
//! Registers and set-up arrive as messages. The doorbell page and the clients' DMA memory are
//! shared mappings, and interrupts go to the clients' eventfds. There is one client at a time: a
//! second one that connects is answered when the first has gone.
//!
//! Source: vfio-user specification 0.1 (QEMU `docs/interop/vfio-user.rst`).

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use pumice_io::process::Birth;
use pumice_io::sys::socket::connect;
use pumice_io::sys::{EventFd, bind_private, keeps_its_length, wait_readable};
use pumice_nvme::spec::Reg;
use pumice_nvme::transport::vfio_user_wire::{
    Body, Command, DMA_READ_WRITE, Message, REGION_ACCESS_LEN, receive, send, u32_at, u64_at,
    version,
};
use pumice_nvme::transport::{Transport, TransportError};

use super::SoftController;

/// Number of interrupt vectors of a served controller.
pub(super) const VECTORS: u16 = 16;
/// Most regions that a client may map.
const MAX_REGIONS: usize = 64;
/// Most bytes of one of them.
const FOREIGN_MAX: u64 = 1 << 40;
/// Most address ranges of unmapped regions to keep. They are kept until the client goes.
const RETIRED_MAX: usize = 1024;
/// Longest time that a client may take for the rest of a message, or to read its answer.
const PATIENCE: Duration = Duration::from_secs(5);

const CONFIG: u32 = 7;
const CONFIG_LEN: usize = 256;
const MSIX_CAP: usize = 0x50;

/// A served socket. It is closed and removed when this is dropped.
#[derive(Debug)]
pub struct SoftServer {
    path: PathBuf,
    stop: Arc<EventFd>,
    thread: Option<JoinHandle<()>>,
    birth: Birth,
}

impl SoftServer {
    /// Serves a controller that was made with [`SoftConfig::served`](super::SoftConfig::served) on
    /// a socket at `path` (by convention `<directory>/cntrl`), from a thread of its own. Replaces a
    /// socket that no process serves.
    ///
    /// # Errors
    /// Fails when the socket cannot be made, or when a process serves it already.
    pub fn start(soft: SoftController, path: &Path) -> Result<SoftServer, TransportError> {
        let io = |what: &str, source| TransportError::Io {
            device: path.display().to_string(),
            what: what.to_owned(),
            source,
        };
        if soft.register_file().is_none() {
            return Err(TransportError::Unsupported {
                device: path.display().to_string(),
                what: "the controller was not made to be served (SoftConfig::served)".to_owned(),
            });
        }
        clear_socket(path)?;
        let listener = bind_private(path).map_err(|e| io("making the socket", e))?;
        let stop = Arc::new(EventFd::new().map_err(|e| io("eventfd", e))?);
        let server = Server {
            transport: soft.as_transport(),
            soft,
            stop: Arc::clone(&stop),
            config: config_space(),
            vectors: Vec::new(),
            regions: Vec::new(),
        };
        let thread = std::thread::Builder::new()
            .name("vfio-user".to_owned())
            .spawn(move || server.run(&listener))
            .map_err(|e| io("thread", e))?;
        Ok(SoftServer {
            path: path.to_path_buf(),
            stop,
            thread: Some(thread),
            birth: Birth::now(),
        })
    }

    /// Blocks until the server ends, which it does only when the controller is unplugged.
    pub fn join(mut self) {
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Drop for SoftServer {
    fn drop(&mut self) {
        // The socket is the parent's. A forked child does not have the thread.
        if !self.birth.is_here() {
            return;
        }
        self.stop.signal();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        let _ = std::fs::remove_file(&self.path);
    }
}

/// Removes a socket that no process serves. Anything else at the path stays.
fn clear_socket(path: &Path) -> Result<(), TransportError> {
    let device = || path.display().to_string();
    let io = |source| TransportError::Io {
        device: path.display().to_string(),
        what: "the file at the socket's path".to_owned(),
        source,
    };
    match path.symlink_metadata() {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(e) => Err(io(e)),
        Ok(there) if !there.file_type().is_socket() => Err(TransportError::Unsupported {
            device: device(),
            what: "something that is not a socket is there already: the first argument is the \
                   socket to make, the device is the second (soft:///image-file); nothing was \
                   changed"
                .to_owned(),
        }),
        Ok(_) => match connect(path, PATIENCE) {
            // Only this error says that nobody listens.
            Err(e) if e.kind() == io::ErrorKind::ConnectionRefused => {
                std::fs::remove_file(path).map_err(io)
            }
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
            _ => Err(TransportError::InUse {
                device: device(),
                detail: "another process serves this socket".to_owned(),
                pid: None,
            }),
        },
    }
}

struct Server {
    soft: SoftController,
    transport: Arc<dyn Transport>,
    stop: Arc<EventFd>,
    config: [u8; CONFIG_LEN],
    /// The client's eventfds by vector.
    vectors: Vec<Option<File>>,
    /// Address and length of each region that the client has mapped.
    regions: Vec<(u64, u64)>,
}

/// The answer to a message: its body and a descriptor, or an errno.
type Answer = Result<(Vec<u8>, Option<OwnedFd>), i32>;

impl Server {
    fn run(mut self, listener: &UnixListener) {
        loop {
            let ready = wait_readable(&[self.stop.as_fd(), listener.as_fd()], None);
            let ready = ready.unwrap_or_else(|error| {
                tracing::error!(%error, "the vfio-user socket is served no longer");
                vec![true; 2]
            });
            if ready[0] || self.transport.is_gone() {
                return;
            }
            if !ready[1] {
                continue;
            }
            match listener.accept() {
                Ok((stream, _)) => {
                    if let Err(error) = self.serve(&stream) {
                        tracing::warn!(%error, "vfio-user client dropped");
                    }
                    self.forget_client();
                }
                Err(error) => tracing::warn!(%error, "vfio-user socket"),
            }
        }
    }

    /// Serves one client until it goes, the controller goes, or the server is stopped.
    fn serve(&mut self, stream: &UnixStream) -> io::Result<()> {
        stream.set_write_timeout(Some(PATIENCE))?;
        let interrupts: Vec<Arc<EventFd>> = self.soft.interrupts().to_vec();
        loop {
            let mut fds: Vec<BorrowedFd<'_>> = vec![self.stop.as_fd(), stream.as_fd()];
            fds.extend(interrupts.iter().map(|i| i.as_fd()));
            let ready = wait_readable(&fds, Some(Duration::from_secs(1)))?;
            if ready[0] || self.transport.is_gone() {
                return Ok(());
            }
            for (n, interrupt) in interrupts.iter().enumerate() {
                if ready[n + 2] {
                    interrupt.drain();
                    self.interrupt(n);
                }
            }
            if !ready[1] {
                continue;
            }
            let Some(message) = receive(stream, Some(Instant::now() + PATIENCE))? else {
                return Ok(());
            };
            let header = message.header;
            if header.is_reply() {
                continue;
            }
            let answer = match Command::from_number(header.command) {
                Some(command) => self.answer(command, message),
                None => Err(libc::ENOTSUP),
            };
            let (body, fd, errno) = match answer {
                Ok((body, fd)) => (body, fd, 0),
                Err(errno) => (Vec::new(), None, errno),
            };
            if let Some(reply) = header
                .reply(body.len(), errno.cast_unsigned())
                .filter(|_| !header.wants_no_reply())
            {
                let fds: Vec<BorrowedFd<'_>> = fd.iter().map(AsFd::as_fd).collect();
                send(stream, &reply, &body, &fds)?;
            }
        }
    }

    fn interrupt(&mut self, vector: usize) {
        let enabled = self.config[MSIX_CAP + 3] & 0x80 != 0;
        if let Some(Some(event)) = self.vectors.get_mut(vector).filter(|_| enabled) {
            // A full counter also wakes the client.
            let _ = event.write(&1u64.to_ne_bytes());
        }
    }

    /// Disables the controller before its client's memory goes. Configuration space stays as it is.
    fn forget_client(&mut self) {
        if let Err(error) = self.disable() {
            tracing::warn!(%error, "controller not disabled after its client went");
        }
        for (address, _) in self.regions.drain(..) {
            self.soft.memory().remove_foreign(address);
        }
        self.soft.memory().forget_retired();
        self.vectors.clear();
    }

    fn disable(&self) -> Result<(), TransportError> {
        self.transport.write32(Reg::CC, 0)?;
        let deadline = Instant::now() + PATIENCE;
        while self.transport.read32(Reg::CSTS)? & 1 != 0 && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }

    fn answer(&mut self, command: Command, message: Message) -> Answer {
        let body = &message.body[..];
        let field = |at| u32_at(body, at).ok_or(libc::EINVAL);
        match command {
            Command::Version => {
                let json = r#"{"capabilities":{"max_msg_fds":8,"max_data_xfer_size":1048576}}"#;
                Ok((version(json), None))
            }
            // The flags are RESET and PCI; the regions end with configuration space, the interrupts
            // with requests.
            Command::GetInfo => Ok((info(3, 9, 5), None)),
            Command::GetRegionInfo => self.region_info(field(0)?, field(8)?),
            Command::GetIrqInfo => match field(8)? {
                2 => Ok((info(1, 2, u32::from(VECTORS)), None)),
                n @ 0..5 => Ok((info(0, n, 0), None)),
                _ => Err(libc::EINVAL),
            },
            Command::SetIrqs => {
                let (flags, index, start, count) = (field(4)?, field(8)?, field(12)?, field(16)?);
                self.set_irqs(flags, index, start, count, message.fds)?;
                Ok((Vec::new(), None))
            }
            Command::RegionRead | Command::RegionWrite => {
                let offset = u64_at(body, 0).ok_or(libc::EINVAL)?;
                let data = body.get(REGION_ACCESS_LEN..).unwrap_or(&[]);
                let (region, count) = (field(8)?, field(12)?);
                let head = Body::default().u64(offset).u32(region).u32(count);
                if command == Command::RegionRead {
                    let data = self.read(region, offset, count)?;
                    return Ok((head.bytes(&data).done(), None));
                }
                if usize::try_from(count) != Ok(data.len()) {
                    return Err(libc::EINVAL);
                }
                self.write(region, offset, data)?;
                Ok((head.done(), None))
            }
            Command::DmaMap => {
                let wide = |at| u64_at(body, at).ok_or(libc::EINVAL);
                let (flags, offset, address, len) = (field(4)?, wide(8)?, wide(16)?, wide(24)?);
                let fd = message.fds.into_iter().next().ok_or(libc::EINVAL)?;
                self.map(flags, offset, address, len, &fd)?;
                Ok((Vec::new(), None))
            }
            Command::DmaUnmap => {
                let wide = |at| u64_at(body, at).ok_or(libc::EINVAL);
                let wanted = (wide(8)?, wide(16)?);
                let at = self.regions.iter().position(|r| *r == wanted);
                self.regions.remove(at.ok_or(libc::ENOENT)?);
                self.soft.memory().remove_foreign(wanted.0);
                Ok((message.body, None))
            }
            Command::Reset => {
                self.disable().map_err(|_| libc::EIO)?;
                self.vectors.clear();
                self.config[MSIX_CAP + 3] &= 0x3f;
                Ok((Vec::new(), None))
            }
        }
    }

    fn region_info(&self, room: u32, index: u32) -> Answer {
        let bar_len = self.soft.bar_len() as u64;
        let plain = |flags, size| {
            let info = Body::default().u32(32).u32(flags).u32(index).u32(0);
            Ok((info.u64(size).u64(0).done(), None))
        };
        match index {
            0 if room < 64 => {
                // The answer says how much room the areas take, as the kernel's does.
                let info = Body::default().u32(64).u32(0xf).u32(0).u32(0);
                Ok((info.u64(bar_len).u64(0).done(), None))
            }
            0 => {
                let file = self.soft.register_file().ok_or(libc::EIO)?;
                let fd = file.try_clone_to_owned().map_err(|_| libc::EMFILE)?;
                let start = u64::from(Reg::DOORBELLS);
                let info = Body::default().u32(64).u32(0xf).u32(0).u32(32);
                let info = info.u64(bar_len).u64(0);
                let info = info.u32(1 << 16 | 1).u32(0).u32(1).u32(0);
                Ok((info.u64(start).u64(bar_len - start).done(), Some(fd)))
            }
            CONFIG => plain(3, CONFIG_LEN as u64),
            1..9 => plain(0, 0),
            _ => Err(libc::EINVAL),
        }
    }

    fn set_irqs(
        &mut self,
        flags: u32,
        index: u32,
        start: u32,
        count: u32,
        fds: Vec<OwnedFd>,
    ) -> Result<(), i32> {
        const NONE_TRIGGER: u32 = 1 | 1 << 5;
        const EVENT_TRIGGER: u32 = 1 << 2 | 1 << 5;
        if index != 2 {
            return Err(libc::EINVAL);
        }
        if flags == NONE_TRIGGER && count == 0 {
            self.vectors.clear();
            return Ok(());
        }
        let start = usize::try_from(start).map_err(|_| libc::EINVAL)?;
        let end = start.checked_add(fds.len()).ok_or(libc::EINVAL)?;
        if flags != EVENT_TRIGGER
            || usize::try_from(count) != Ok(fds.len())
            || end > usize::from(VECTORS)
        {
            return Err(libc::EINVAL);
        }
        if self.vectors.len() < end {
            self.vectors.resize_with(end, || None);
        }
        for (slot, fd) in self.vectors.iter_mut().skip(start).zip(fds) {
            *slot = Some(File::from(fd));
        }
        Ok(())
    }

    fn read(&self, region: u32, offset: u64, count: u32) -> Result<Vec<u8>, i32> {
        let refused = |_| libc::EINVAL;
        let at = u32::try_from(offset).map_err(|_| libc::EINVAL)?;
        match (region, count) {
            (0, 4) => Ok(self
                .transport
                .read32(at)
                .map_err(refused)?
                .to_le_bytes()
                .to_vec()),
            (0, 8) => Ok(self
                .transport
                .read64(at)
                .map_err(refused)?
                .to_le_bytes()
                .to_vec()),
            (CONFIG, _) => {
                let range = config_range(offset, count as usize)?;
                Ok(self.config.get(range).ok_or(libc::EINVAL)?.to_vec())
            }
            _ => Err(libc::EINVAL),
        }
    }

    fn write(&mut self, region: u32, offset: u64, data: &[u8]) -> Result<(), i32> {
        let refused = |_| libc::EINVAL;
        let at = u32::try_from(offset).map_err(|_| libc::EINVAL)?;
        match (region, data) {
            (0, &[a, b, c, d]) => {
                let value = u32::from_le_bytes([a, b, c, d]);
                self.transport.write32(at, value).map_err(refused)
            }
            (0, &[a, b, c, d, e, f, g, h]) => {
                let value = u64::from_le_bytes([a, b, c, d, e, f, g, h]);
                self.transport.write64(at, value).map_err(refused)
            }
            (CONFIG, _) => {
                let range = config_range(offset, data.len())?;
                for (at, byte) in range.zip(data) {
                    let mask = config_mask(at);
                    self.config[at] = self.config[at] & !mask | byte & mask;
                }
                Ok(())
            }
            _ => Err(libc::EINVAL),
        }
    }

    fn map(
        &mut self,
        flags: u32,
        offset: u64,
        address: u64,
        len: u64,
        fd: &OwnedFd,
    ) -> Result<(), i32> {
        let aligned = (offset | address | len).is_multiple_of(4096);
        let end = address.checked_add(len).ok_or(libc::EINVAL)?;
        if flags != DMA_READ_WRITE || len == 0 || !aligned {
            return Err(libc::EINVAL);
        }
        if self.regions.len() >= MAX_REGIONS {
            return Err(libc::ENOSPC);
        }
        if self
            .regions
            .iter()
            .any(|(at, n)| *at < end && address < at + n)
        {
            return Err(libc::EEXIST);
        }
        // An access behind the end of the file is a bus error for this process: the file must be
        // long enough now, and nobody may make it shorter.
        if !keeps_its_length(fd.as_fd()) {
            tracing::warn!(
                "DMA_MAP refused: the client's memory file is not sealed (F_SEAL_SHRINK)"
            );
            return Err(libc::EPERM);
        }
        let memory = self.soft.memory();
        if len > FOREIGN_MAX || memory.retired_count() > RETIRED_MAX {
            return Err(libc::ENOSPC);
        }
        let file = fd.try_clone().map(File::from).map_err(|_| libc::EMFILE)?;
        let file_len = file.metadata().map_err(|_| libc::EBADF)?.len();
        if offset.checked_add(len).is_none_or(|end| end > file_len) {
            return Err(libc::EINVAL);
        }
        self.soft
            .memory()
            .add_foreign(address, len, fd.as_fd(), offset)
            .map_err(|e| e.raw_os_error().unwrap_or(libc::EIO))?;
        self.regions.push((address, len));
        Ok(())
    }
}

/// Makes a `struct vfio_device_info` or `struct vfio_irq_info`.
fn info(flags: u32, third: u32, fourth: u32) -> Vec<u8> {
    Body::default()
        .u32(16)
        .u32(flags)
        .u32(third)
        .u32(fourth)
        .done()
}

fn config_range(offset: u64, len: usize) -> Result<std::ops::Range<usize>, i32> {
    let start = usize::try_from(offset).map_err(|_| libc::EINVAL)?;
    let end = start.checked_add(len).ok_or(libc::EINVAL)?;
    if end > CONFIG_LEN || len == 0 {
        return Err(libc::EINVAL);
    }
    Ok(start..end)
}

/// Makes the configuration space of an NVMe controller with one capability, MSI-X.
fn config_space() -> [u8; CONFIG_LEN] {
    let mut space = [0; CONFIG_LEN];
    // Red Hat's vendor number, which QEMU's virtual NVMe controller has too. Drivers look only at
    // the class.
    space[0x00..0x04].copy_from_slice(&[0x36, 0x1b, 0x10, 0x00]);
    space[0x06] = 0x10;
    space[0x09..0x0c].copy_from_slice(&[0x02, 0x08, 0x01]);
    // BAR 0: memory, 64 bits.
    space[0x10] = 0x04;
    space[0x34] = 0x50;
    let last = u8::try_from(VECTORS - 1).unwrap_or(0);
    space[MSIX_CAP..MSIX_CAP + 4].copy_from_slice(&[0x11, 0, last, 0]);
    // Table in BAR 4 and pending bits in BAR 5. They exist for completeness; eventfds take their
    // place.
    space[MSIX_CAP + 4] = 4;
    space[MSIX_CAP + 8] = 5;
    space
}

/// The bits of a byte of configuration space that a client may write.
fn config_mask(at: usize) -> u8 {
    match at {
        // Memory decoding, bus mastering and INTx Disable.
        0x04 => 0x06,
        0x05 => 0x04,
        // MSI-X Enable and Function Mask.
        n if n == MSIX_CAP + 3 => 0xc0,
        _ => 0,
    }
}
