//! The way to a controller: its registers, memory that it can access, and what it is.

use std::any::Any;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::{Mutex, RwLock};
use pumice_io::process::Birth;
use pumice_io::sys::Doorbell;

use super::info::Info;
use super::options::ControllerOptions;
use super::quirks::Quirks;
use super::ready::ReadyWait;
use crate::dma::{AddressTable, DmaBuf, DmaShared};
use crate::error::{NvmeError, millis};
use crate::spec::{Cap, Cc, Crto, Csts, Reg, Status, doorbell_offset};
use crate::transport::Transport;

static NUMBER: AtomicU64 = AtomicU64::new(1);

/// The way to a controller, which every part of the driver uses.
#[derive(Debug)]
pub(crate) struct Link {
    /// Distinguishes the controllers of this process; never 0.
    pub number: u64,
    /// The process that owns the controller. A forked child does not.
    pub birth: Birth,
    pub transport: Arc<dyn Transport>,
    pub table: Arc<AddressTable>,
    pub options: ControllerOptions,
    pub cap: Cap,
    pub(super) quirks: Quirks,
    /// log2 of the page size in use.
    pub page_shift: u32,
    info: RwLock<Option<Arc<Info>>>,
    /// Memory that the device may still access until it is disabled.
    kept_until_quiet: Mutex<Vec<Box<dyn Any + Send>>>,
}

impl Link {
    /// Reads what the controller can, and refuses it if that is not enough.
    pub fn new(
        transport: Arc<dyn Transport>,
        options: ControllerOptions,
    ) -> Result<Link, NvmeError> {
        let raw = transport.read64(Reg::CAP)?;
        let cap = Cap::from(raw);
        let link = Link {
            number: NUMBER.fetch_add(1, Ordering::Relaxed),
            birth: Birth::now(),
            table: Arc::clone(transport.addresses()),
            options,
            cap,
            quirks: Quirks::of(transport.pci_id()),
            page_shift: 12 + u32::from(cap.mpsmin()),
            info: RwLock::new(None),
            kept_until_quiet: Mutex::new(Vec::new()),
            transport,
        };
        if raw == u64::MAX {
            return Err(link.removed());
        }
        // Bit 0: NVM command set. Bit 6: several command sets, of which NVM is always one.
        if cap.css() & 0x41 == 0 {
            return Err(link.unsupported(format!(
                "the controller has no NVM command set (CAP.CSS {:#x})",
                cap.css()
            )));
        }
        if link.page_shift > 21 {
            return Err(link.unsupported(format!(
                "the controller wants pages of 2^{} bytes; 2 MiB is the largest here",
                link.page_shift
            )));
        }
        if cap.mqes_z() == 0 {
            return Err(link.protocol("CAP.MQES allows a single queue entry"));
        }
        Ok(link)
    }

    pub fn name(&self) -> &str {
        self.transport.name()
    }

    pub fn protocol(&self, detail: impl Into<String>) -> NvmeError {
        NvmeError::Protocol {
            device: self.name().to_owned(),
            detail: detail.into(),
        }
    }

    pub fn unsupported(&self, what: impl Into<String>) -> NvmeError {
        NvmeError::Unsupported {
            device: self.name().to_owned(),
            what: what.into(),
        }
    }

    pub fn removed(&self) -> NvmeError {
        NvmeError::Removed {
            device: self.name().to_owned(),
        }
    }

    pub fn info(&self) -> Result<Arc<Info>, NvmeError> {
        let info = self.info.read().clone();
        info.ok_or_else(|| self.protocol("the controller was not identified yet"))
    }

    pub fn set_info(&self, info: Info) {
        *self.info.write() = Some(Arc::new(info));
    }

    /// Returns how long to wait before a command is sent again: Base section 3.3.3.2.1 (CRD),
    /// otherwise not at all at first and then longer each time.
    pub fn retry_delay(&self, status: Status, retries: u8) -> Duration {
        if let n @ 1..=3 = status.crd()
            && let Ok(info) = self.info()
        {
            let delay = info.identify.crdt[usize::from(n) - 1].get();
            // CRDT counts tenths of a second. The wait for a retry is at most ten seconds.
            return Duration::from_millis(u64::from(delay).min(100) * 100);
        }
        match retries {
            0 => Duration::ZERO,
            n => Duration::from_millis(1 << n.min(7)),
        }
    }

    /// Takes a zeroed buffer for an admin command's data.
    pub fn admin_buffer(&self, len: usize) -> Result<DmaBuf, NvmeError> {
        let mut buf = DmaBuf::new_in(self.transport.domain(), len)?;
        buf.fill(0);
        Ok(buf)
    }

    /// Takes zeroed memory that the controller can access and that begins at one of its pages.
    pub fn queue_memory(&self, len: usize) -> Result<DmaShared, NvmeError> {
        let len = len.next_multiple_of(1 << self.page_shift);
        Ok(DmaShared::zeroed_in(self.transport.domain(), len)?)
    }

    pub fn address_of(&self, m: &DmaShared) -> Result<u64, NvmeError> {
        self.table
            .translate(m.region(), m.region_offset())
            .map(|(address, _)| address)
            .ok_or_else(|| self.protocol("queue memory is not mapped for the device"))
    }

    /// Keeps an object until the device is certainly done with it.
    pub fn keep_until_quiet(&self, what: Box<dyn Any + Send>) {
        self.kept_until_quiet.lock().push(what);
    }

    /// Frees what was kept: the device is quiet.
    pub fn free_kept(&self) {
        self.kept_until_quiet.lock().clear();
    }

    /// Returns a doorbell of a queue: that of its submission queue or of its completion queue.
    pub fn doorbell(&self, qid: u16, completion: bool) -> Result<Doorbell, NvmeError> {
        let offset = doorbell_offset(qid, completion, self.cap.dstrd());
        Ok(self.transport.doorbell(offset)?)
    }

    /// Returns how long to wait until the controller is ready or no longer is.
    fn ready_wait(&self) -> ReadyWait {
        let crwmt = match self.cap.crwms() {
            true => self.transport.read32(Reg::CRTO).ok(),
            false => None,
        };
        let crwmt = crwmt.map(|raw| Crto::from(raw).crwmt());
        ReadyWait::new(self.cap.to(), crwmt, self.options.admin_timeout)
    }

    /// Reads CSTS until `done`, at most for `timeout`.
    fn wait_csts(
        &self,
        what: &'static str,
        wait: ReadyWait,
        fatal: bool,
        done: impl Fn(Csts) -> bool,
    ) -> Result<(), NvmeError> {
        let start = Instant::now();
        let mut pause = Duration::from_micros(20);
        loop {
            let raw = self.transport.read32(Reg::CSTS)?;
            if raw == u32::MAX || self.transport.is_gone() {
                return Err(self.removed());
            }
            let csts = Csts::from(raw);
            if done(csts) {
                return Ok(());
            }
            if fatal && csts.cfs() {
                return Err(NvmeError::Fatal {
                    device: self.name().to_owned(),
                    what,
                    csts: raw,
                });
            }
            if start.elapsed() > wait.time {
                return Err(NvmeError::NotReady {
                    device: self.name().to_owned(),
                    what,
                    timeout_ms: millis(wait.time),
                    limit: wait.limit.to_string(),
                    csts: raw,
                });
            }
            std::thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_millis(2));
        }
    }

    /// Clears CC.EN and waits for CSTS.RDY = 0. Every queue is deleted afterwards.
    pub fn disable(&self) -> Result<(), NvmeError> {
        let wait = self.ready_wait();
        let cc = Cc::from(self.transport.read32(Reg::CC)?);
        let raw = self.transport.read32(Reg::CSTS)?;
        if raw == u32::MAX {
            return Err(self.removed());
        }
        let csts = Csts::from(raw);
        if cc.en() {
            // Base section 3.1.3.5, EN: must not be cleared before the controller is ready.
            if !csts.rdy() && !csts.cfs() && csts.shst() == 0 {
                let ready = self.wait_csts("ready before disable", wait, true, |c| c.rdy());
                if let Err(error @ NvmeError::Removed { .. }) = ready {
                    return Err(error);
                }
            }
            self.transport
                .write32(Reg::CC, cc.with_en(false).with_shn(0).into())?;
            std::thread::sleep(self.quirks.quiet_after_disable());
        }
        self.wait_csts("not ready after disable", wait, false, |c| !c.rdy())
    }

    /// Sets CC.EN and waits for CSTS.RDY = 1.
    pub fn enable(&self) -> Result<(), NvmeError> {
        let weighted = self.cap.ams_wrr() && self.options.arbitration.is_some();
        let cc = Cc::new()
            .with_en(true)
            .with_css(if self.cap.css() & 1 != 0 { 0 } else { 6 })
            .with_mps(self.cap.mpsmin())
            .with_ams(u8::from(weighted))
            .with_iosqes(6)
            .with_iocqes(4);
        self.transport.write32(Reg::CC, cc.into())?;
        self.wait_csts("ready after enable", self.ready_wait(), true, |c| c.rdy())
    }

    /// Does a normal shutdown (Base section 3.6.1) and disables the controller.
    pub fn shut_down(&self) -> Result<(), NvmeError> {
        let cc = Cc::from(self.transport.read32(Reg::CC)?);
        self.transport.write32(Reg::CC, cc.with_shn(1).into())?;
        // RTD3E, where given, is the longest time that a shutdown takes (Base figure 275).
        let rtd3e = self.info().map_or(0, |i| u64::from(i.identify.rtd3e.get()));
        let wait = self.ready_wait().or_for_shutdown(rtd3e);
        self.wait_csts("shutdown complete", wait, false, |c| c.shst() == 2)?;
        self.disable()
    }
}
