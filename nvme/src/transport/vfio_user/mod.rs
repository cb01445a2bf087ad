//! A controller in another process, through a vfio-user socket: SPDK's `nvmf_tgt` or another server
//! of the protocol.
//!
//! Registers and set-up are messages, which the server handles about once a millisecond. Doorbells
//! are a mapped page where the server offers one, and otherwise messages. DMA memory is passed as
//! file descriptors. A server has one client at a time.
//!
//! Source: vfio-user specification 0.1 (QEMU `docs/interop/vfio-user.rst`).

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use pumice_io::process::Birth;
use pumice_io::sys::{
    Absent, DeviceMapping, Doorbell, EventFd, MmioMap, any_readable, keeps_its_length, socket,
};
use pumice_io::uri::{Uri, UriError};

use super::vfio::info::RegionInfo;
use super::{NvmeUri, Transport, TransportError, TransportEvent};
use crate::dma::{AddressTable, DmaDomain, MapperGuard};
use crate::pci::{ConfigSpace, MsixCapability};

mod client;
#[cfg(test)]
mod fake;
mod message;
mod space;
mod stream;
#[cfg(test)]
mod tests;

use client::Client;
use space::SharedSpace;

/// The protocol's messages, for a server of a controller.
pub mod wire {
    pub use super::super::vfio::info::{u32_at, u64_at};
    pub use super::message::{
        Body, Command, DMA_READ_WRITE, HEADER_LEN, Header, REGION_ACCESS_LEN, version,
    };
    pub use super::stream::{Message, receive, send};
}

const BAR0: u32 = 0;
const CONFIG: u32 = 7;
const MSIX: u32 = 2;
const ERR: u32 = 3;
const REQ: u32 = 4;

const FLAG_RESET: u32 = 1;
const FLAG_PCI: u32 = 2;

/// NVMe registers (NVM Express Base Specification 2.0, section 3.1.3).
const CAP: u32 = 0x00;
const CC: u32 = 0x14;
const CSTS: u32 = 0x1c;
const DOORBELLS: u64 = 0x1000;
/// Two doorbells of 4 bytes for each of 65536 queues.
const DOORBELLS_MAX: u64 = 8 << 16;

/// Time-out of a request unless the URI sets another one.
const TIMEOUT_MS: u64 = 10_000;

/// A controller behind a vfio-user socket.
#[derive(Debug)]
pub struct VfioUser {
    this: Weak<VfioUser>,
    name: String,
    client: Arc<Client>,
    bar_len: u64,
    /// The mapped part of BAR 0, and its offset there.
    doorbells: Option<MappedDoorbells>,
    can_reset: bool,
    table: Arc<AddressTable>,
    mapper: Mutex<Option<MapperGuard>>,
    /// All memory that the other process can access.
    domain: DmaDomain,
    birth: Birth,
    vectors: Mutex<Vec<Arc<EventFd>>>,
    request: EventFd,
    error: EventFd,
    any: OwnedFd,
    detached: AtomicBool,
}

#[derive(Debug)]
struct MappedDoorbells {
    start: u64,
    mapping: Arc<DeviceMapping>,
    mmio: MmioMap,
}

impl VfioUser {
    /// Connects to the controller that a `vfio-user://` URI names: a socket, or the directory that
    /// contains it as `cntrl`. `timeout_ms=` in the URI bounds each request. Clears what an earlier
    /// client left in configuration space and enables bus mastering. The other process can access
    /// memory that was made for it, and no other memory of this process. Blocks.
    pub fn open(uri: &NvmeUri) -> Result<Arc<VfioUser>, TransportError> {
        let timeout = timeout(&mut uri.options())?;
        Self::connect(Path::new(&uri.address), timeout)
    }

    /// Connects as [`open`](Self::open) does, to a path.
    pub fn connect(path: &Path, timeout: Duration) -> Result<Arc<VfioUser>, TransportError> {
        Self::connect_within(path, timeout, client::VERSION_TIMEOUT)
    }

    fn connect_within(
        path: &Path,
        timeout: Duration,
        version_timeout: Duration,
    ) -> Result<Arc<VfioUser>, TransportError> {
        let name = path.display().to_string();
        let socket = socket_path(path);
        let client = Arc::new(Client::connect(&name, &socket, timeout, version_timeout)?);
        let (flags, regions, _) = client.device_info()?;
        if flags & FLAG_PCI == 0 || regions <= CONFIG {
            return Err(client.protocol(format!(
                "the server of the socket is not a PCI device (flags {flags:#x}, {regions} regions)"
            )));
        }
        let (bar_len, doorbells) = map_doorbells(&client)?;
        quiet_config(&client)?;
        let domain = DmaDomain::new();
        let table = Arc::new(domain.address_table());
        let space = SharedSpace::new(Arc::clone(&client), Arc::clone(&table));
        let mapper = domain.register_mapper(Arc::new(space))?;

        let request = EventFd::new().map_err(|e| client.io("eventfd", e))?;
        let error = EventFd::new().map_err(|e| client.io("eventfd", e))?;
        for (index, event) in [(REQ, &request), (ERR, &error)] {
            if matches!(client.irq_count(index), Ok(n) if n > 0)
                && let Err(error) = client.set_irqs(index, &[event.as_fd()])
            {
                tracing::debug!(device = name, %error, index, "no notices of this kind");
            }
        }
        let any = any_readable(&[request.as_fd(), error.as_fd()], Some(client.as_fd()))
            .map_err(|e| client.io("epoll", e))?;
        Ok(Arc::new_cyclic(|this| VfioUser {
            this: this.clone(),
            name,
            client,
            bar_len,
            doorbells,
            can_reset: flags & FLAG_RESET != 0,
            table,
            mapper: Mutex::new(Some(mapper)),
            domain,
            birth: Birth::now(),
            vectors: Mutex::new(Vec::new()),
            request,
            error,
            any,
            detached: AtomicBool::new(false),
        }))
    }

    fn check(&self, offset: u32, len: u64) -> Result<(), TransportError> {
        let start = u64::from(offset);
        if start.is_multiple_of(len) && start + len <= self.bar_len {
            return Ok(());
        }
        Err(TransportError::OutOfRange {
            device: self.name.clone(),
            what: "register",
            offset: start,
            limit: self.bar_len,
        })
    }

    /// Returns the word of the mapped doorbell page at `offset`, if it lies there: messages do not
    /// reach it.
    fn mapped(&self, offset: u32) -> Option<(&MmioMap, usize)> {
        let page = self.doorbells.as_ref()?;
        let within = u64::from(offset).checked_sub(page.start)?;
        let within = usize::try_from(within).ok()?;
        (within < page.mmio.len()).then_some((&page.mmio, within))
    }

    /// Clears CC.EN, which every controller takes as a reset, and waits for it up to CAP.TO.
    fn disable(&self, at_most: Duration) -> Result<(), TransportError> {
        let cc = self.read32(CC)?;
        if cc == u32::MAX {
            return Err(self.removed());
        }
        if cc & 1 != 0 {
            self.write32(CC, cc & !1)?;
        }
        let cap_to = (self.read64(CAP)? >> 24) & 0xff;
        let limit = Duration::from_millis(500 * cap_to.max(1)).min(at_most);
        let deadline = Instant::now() + limit;
        while self.read32(CSTS)? & 1 != 0 {
            if Instant::now() > deadline {
                return Err(TransportError::Timeout {
                    device: self.name.clone(),
                    what: "CC.EN = 0 (CSTS.RDY stays 1)".to_owned(),
                    timeout_ms: u64::try_from(limit.as_millis()).unwrap_or(u64::MAX),
                });
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }

    fn removed(&self) -> TransportError {
        TransportError::Removed {
            device: self.name.clone(),
        }
    }

    fn wake_all(&self) {
        for vector in &*self.vectors.lock() {
            vector.signal();
        }
    }
}

/// Returns the time-out of a request from a URI's options.
pub(super) fn timeout(options: &mut Uri) -> Result<Duration, UriError> {
    let ms = options.number("timeout_ms", 1..=600_000)?;
    Ok(Duration::from_millis(ms.unwrap_or(TIMEOUT_MS)))
}

/// Returns the path of the socket: a directory stands for the socket in it.
pub(crate) fn socket_path(path: &Path) -> PathBuf {
    let is_socket = path.metadata().is_ok_and(|m| m.file_type().is_socket());
    if !is_socket && path.is_dir() {
        path.join("cntrl")
    } else {
        path.to_path_buf()
    }
}

/// Returns the length of BAR 0, and its doorbells if they can be mapped.
fn map_doorbells(client: &Client) -> Result<(u64, Option<MappedDoorbells>), TransportError> {
    let (bytes, file) = client.region_info(BAR0)?;
    let bar = RegionInfo::parse(&bytes)
        .ok_or_else(|| client.protocol("the description of BAR 0 is too short".to_owned()))?;
    if bar.size < DOORBELLS + 8 {
        return Err(client.protocol(format!(
            "BAR 0 has {:#x} bytes, too few for doorbells",
            bar.size
        )));
    }
    let area = bar
        .mappable
        .iter()
        .copied()
        .find(|(at, len)| (*at..at + len).contains(&DOORBELLS));
    let (Some((start, len)), Some(file)) = (area, file) else {
        tracing::debug!(device = client.device(), "doorbells are messages");
        return Ok((bar.size, None));
    };
    let file = std::fs::File::from(file);
    let at = bar.offset.checked_add(start);
    let file_len = file
        .metadata()
        .map_err(|e| client.io("fstat of BAR 0", e))?
        .len();
    // An access to a page behind the end of its file is a bus error.
    let inside = at
        .and_then(|at| at.checked_add(len))
        .is_some_and(|end| end <= file_len);
    // The mapping is no longer than the doorbells of all possible queues: the rest is never used.
    let (true, Some(at), Ok(map_len)) = (inside, at, usize::try_from(len.min(DOORBELLS_MAX)))
    else {
        return Err(client.protocol(format!(
            "the doorbell page {start:#x}+{len:#x} lies outside its file of {file_len:#x} bytes"
        )));
    };
    if !keeps_its_length(file.as_fd()) && !client.is_trusted() {
        tracing::info!(
            device = client.device(),
            "another user's process could shorten the doorbells' file; doorbells are messages"
        );
        return Ok((bar.size, None));
    }
    let mapping = DeviceMapping::new(file.as_fd(), at, map_len, Absent::Ones)
        .map_err(|e| client.io("mapping the doorbells", e))?;
    let mmio = mapping.mmio();
    Ok((
        bar.size,
        Some(MappedDoorbells {
            start,
            mapping,
            mmio,
        }),
    ))
}

/// Prepares configuration space, which outlives a client: clears a stale MSI-X Enable, and sets
/// memory decoding, bus mastering and INTx Disable (without the latter SPDK's first completion sets
/// CSTS.CFS).
fn quiet_config(client: &Client) -> Result<(), TransportError> {
    let config = Config(client);
    let io = |e| client.io("configuration space", e);
    if let Some(msix) = config.msix().map_err(io)?
        && msix.enabled
    {
        config.set_msix(msix, false).map_err(io)?;
    }
    config.enable().map_err(io)
}

/// Configuration space, accessed by messages.
struct Config<'a>(&'a Client);

impl Config<'_> {
    fn find_msix(&self) -> Result<Option<MsixCapability>, TransportError> {
        self.msix().map_err(|e| self.0.io("configuration space", e))
    }
}

impl ConfigSpace for Config<'_> {
    fn read(&self, offset: u16, data: &mut [u8]) -> io::Result<()> {
        self.0
            .read(CONFIG, u64::from(offset), data)
            .map_err(io::Error::other)
    }

    fn write(&self, offset: u16, data: &[u8]) -> io::Result<()> {
        self.0
            .write(CONFIG, u64::from(offset), data)
            .map_err(io::Error::other)
    }
}

// SAFETY: the table has the addresses at which `space` has given the other process the memory of the domain, which is all
// that it reaches.
#[allow(unsafe_code, reason = "the contract of Transport")]
unsafe impl Transport for VfioUser {
    fn name(&self) -> &str {
        &self.name
    }

    fn kind(&self) -> &'static str {
        "vfio-user"
    }

    fn read32(&self, offset: u32) -> Result<u32, TransportError> {
        self.check(offset, 4)?;
        if self.is_gone() {
            return Ok(u32::MAX);
        }
        if let Some(word) = self.mapped(offset).and_then(|(m, at)| m.word32(at)) {
            return Ok(u32::from_le(word.load(Ordering::Acquire)));
        }
        let mut bytes = [0; 4];
        match self.client.read(BAR0, u64::from(offset), &mut bytes) {
            Err(TransportError::Removed { .. }) => Ok(u32::MAX),
            other => other.map(|()| u32::from_le_bytes(bytes)),
        }
    }

    fn read64(&self, offset: u32) -> Result<u64, TransportError> {
        self.check(offset, 8)?;
        if self.is_gone() {
            return Ok(u64::MAX);
        }
        if let Some(word) = self.mapped(offset).and_then(|(m, at)| m.word64(at)) {
            return Ok(u64::from_le(word.load(Ordering::Acquire)));
        }
        let mut bytes = [0; 8];
        match self.client.read(BAR0, u64::from(offset), &mut bytes) {
            Err(TransportError::Removed { .. }) => Ok(u64::MAX),
            other => other.map(|()| u64::from_le_bytes(bytes)),
        }
    }

    fn write32(&self, offset: u32, value: u32) -> Result<(), TransportError> {
        self.check(offset, 4)?;
        if let Some(word) = self.mapped(offset).and_then(|(m, at)| m.word32(at)) {
            word.store(value.to_le(), Ordering::Release);
            return Ok(());
        }
        self.client
            .write(BAR0, u64::from(offset), &value.to_le_bytes())
    }

    fn write64(&self, offset: u32, value: u64) -> Result<(), TransportError> {
        self.check(offset, 8)?;
        if let Some(word) = self.mapped(offset).and_then(|(m, at)| m.word64(at)) {
            word.store(value.to_le(), Ordering::Release);
            return Ok(());
        }
        self.client
            .write(BAR0, u64::from(offset), &value.to_le_bytes())
    }

    fn doorbell(&self, offset: u32) -> Result<Doorbell, TransportError> {
        self.check(offset, 4)?;
        if let Some((mmio, at)) = self.mapped(offset)
            && let Some(bell) = Doorbell::mapped(mmio, at)
        {
            return Ok(bell);
        }
        let this = self.this.upgrade().ok_or_else(|| self.removed())?;
        Ok(Doorbell::message(Arc::new(move |value| {
            // The failure shows as a removed controller, or as a command's time-out.
            if let Err(error) = this.write32(offset, value) {
                tracing::warn!(device = this.name(), %error, "doorbell not delivered");
            }
        })))
    }

    fn interrupts_are_messages(&self) -> bool {
        true
    }

    fn domain(&self) -> Option<&DmaDomain> {
        Some(&self.domain)
    }

    fn addresses(&self) -> &Arc<AddressTable> {
        &self.table
    }

    fn enable_interrupts(&self, want: u16) -> Result<Vec<Arc<EventFd>>, TransportError> {
        let config = Config(&self.client);
        let have = self.client.irq_count(MSIX)?;
        let count = want.min(u16::try_from(have).unwrap_or(u16::MAX));
        let Some(msix) = config.find_msix()?.filter(|_| count > 0) else {
            return Ok(Vec::new());
        };
        // A reset keeps the eventfds, because queue pairs sleep on them.
        let mut vectors = self.vectors.lock();
        let events = EventFd::extend(&vectors, usize::from(count))
            .map_err(|e| self.client.io("eventfd", e))?;
        let fds: Vec<BorrowedFd<'_>> = events.iter().map(|e| e.as_fd()).collect();
        self.client.set_irqs(MSIX, &fds)?;
        config
            .set_msix(msix, true)
            .map_err(|e| self.client.io("enabling MSI-X", e))?;
        vectors.clone_from(&events);
        Ok(events)
    }

    fn reset(&self) -> Result<(), TransportError> {
        if self.is_gone() {
            return Err(self.removed());
        }
        self.disable(Duration::from_secs(130))?;
        if !self.vectors.lock().is_empty() {
            if let Err(error) = self.client.set_irqs(MSIX, &[]) {
                tracing::debug!(device = self.name, %error, "eventfds stay with the controller");
            }
            self.wake_all();
        }
        // A device reset does at least as much as CC.EN, where it does anything; SPDK's does
        // nothing.
        if self.can_reset {
            self.client.reset()?;
        }
        quiet_config(&self.client)
    }

    fn is_gone(&self) -> bool {
        self.detached.load(Ordering::Relaxed) || self.client.is_broken()
    }

    fn events(&self) -> Option<BorrowedFd<'_>> {
        Some(self.any.as_fd())
    }

    fn take_event(&self) -> Option<TransportEvent> {
        if self.detached.load(Ordering::Relaxed) {
            return None;
        }
        if self.request.drain() > 0 {
            return Some(TransportEvent::RemovalRequested);
        }
        if self.error.drain() > 0 {
            return Some(TransportEvent::Error(
                "the controller's process reports an error of the device".to_owned(),
            ));
        }
        if self.is_gone() || socket::is_closed(self.client.socket()) {
            self.client.shut_down();
            self.wake_all();
            return Some(TransportEvent::Removed);
        }
        None
    }

    fn detach(&self) {
        // The connection does not belong to a forked child.
        if !self.birth.is_here() || self.detached.swap(true, Ordering::AcqRel) {
            return;
        }
        if !self.client.is_broken() {
            // The write ignores `is_gone`: the controller must not touch memory from now on.
            let quiet = self
                .client
                .write(BAR0, u64::from(CC), &[0; 4])
                .and_then(|()| self.wait_not_ready(Duration::from_secs(5)));
            match quiet {
                Ok(()) => {
                    if let Err(error) = Config(&self.client).disable_dma() {
                        tracing::debug!(device = self.name, %error, "bus mastering stays on");
                    }
                }
                // There is no wait for a second answer. The controller can still write to its own
                // domain only.
                Err(error) => {
                    tracing::warn!(device = self.name, %error, "the controller was not disabled; the end of the connection does it");
                    self.client.shut_down();
                }
            }
        }
        if let Some(page) = &self.doorbells
            && let Err(error) = page.mapping.retire()
        {
            tracing::error!(device = self.name, %error, "the doorbell page stays mapped");
        }
        drop(self.mapper.lock().take());
        self.client.shut_down();
        self.wake_all();
    }
}

impl VfioUser {
    fn wait_not_ready(&self, at_most: Duration) -> Result<(), TransportError> {
        let deadline = Instant::now() + at_most;
        loop {
            let mut csts = [0; 4];
            self.client.read(BAR0, u64::from(CSTS), &mut csts)?;
            if u32::from_le_bytes(csts) & 1 == 0 || Instant::now() > deadline {
                return Ok(());
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

impl Drop for VfioUser {
    fn drop(&mut self) {
        self.detach();
    }
}
