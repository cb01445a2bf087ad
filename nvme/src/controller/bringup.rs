//! Enable, disable, shutdown: Base sections 3.5 and 3.6.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex, RwLock};
use pumice_io::process::Birth;
use pumice_io::sys::EventFd;

use super::admin::{ADMIN_ENTRIES, AdminQueue};
use super::keeper::Requests;
use super::quirks::Quirks;
use super::ready::ReadyWait;
use super::state::{self, Phase};
use super::{ControllerOptions, Core, Registry};
use crate::error::{NvmeError, millis};
use crate::queue::{Bell, CompletionRing, QueueMem, SubmissionRing};
use crate::spec::{Cap, Cc, Crto, Csts, Reg, doorbell_offset};
use crate::transport::{Transport, TransportError};

static NUMBER: AtomicU64 = AtomicU64::new(1);

impl Core {
    /// Resets, enables and identifies a controller, whatever state it is in.
    pub(super) fn bring_up(
        transport: Arc<dyn Transport>,
        options: ControllerOptions,
    ) -> Result<Core, NvmeError> {
        let name = transport.name().to_owned();
        let cap = transport.read64(Reg::CAP)?;
        if cap == u64::MAX {
            return Err(NvmeError::Removed { device: name });
        }
        let cap = Cap::from(cap);
        let unsupported = |what: String| NvmeError::Unsupported {
            device: name.clone(),
            what,
        };
        // Bit 0: NVM command set. Bit 6: several command sets, of which NVM is always one.
        if cap.css() & 0x41 == 0 {
            return Err(unsupported(format!(
                "the controller has no NVM command set (CAP.CSS {:#x})",
                cap.css()
            )));
        }
        let page_shift = 12 + u32::from(cap.mpsmin());
        if page_shift > 21 {
            return Err(unsupported(format!(
                "the controller wants pages of 2^{page_shift} bytes; 2 MiB is the largest here"
            )));
        }
        if cap.mqes_z() == 0 {
            return Err(NvmeError::Protocol {
                device: name,
                detail: "CAP.MQES allows a single queue entry".into(),
            });
        }
        let io = |source| TransportError::Io {
            device: name.clone(),
            what: "eventfd".into(),
            source,
        };
        let core = Core {
            number: NUMBER.fetch_add(1, Ordering::Relaxed),
            birth: Birth::now(),
            table: Arc::clone(transport.addresses()),
            state: AtomicU64::new(state::word(0, Phase::Resetting)),
            options,
            cap,
            quirks: Quirks::of(transport.pci_id()),
            page_shift,
            admin: Mutex::new(AdminQueue::new(transport.domain(), page_shift)?),
            admin_done: Condvar::new(),
            info: RwLock::new(None),
            namespaces: RwLock::new(BTreeMap::new()),
            remembered: Mutex::new(BTreeMap::new()),
            list_again: AtomicBool::new(false),
            interrupts: RwLock::new(Vec::new()),
            queues: Mutex::new(Registry::default()),
            queue_freed: Condvar::new(),
            shadow: RwLock::new(None),
            memory: Mutex::new(None),
            requests: Mutex::new(Requests::default()),
            wake: EventFd::new().map_err(io)?,
            changed: Condvar::new(),
            changed_lock: Mutex::new(()),
            kept_until_quiet: Mutex::new(Vec::new()),
            events: Mutex::new(VecDeque::new()),
            failure: Mutex::new(None),
            transport,
        };
        match core.start() {
            Ok(()) => {
                core.set_state(state::word(1, Phase::Live));
                core.arm_events();
                Ok(core)
            }
            Err(error) => {
                // The device may still know our memory: disable it before the memory is freed.
                core.transport.detach();
                Err(error)
            }
        }
    }

    /// Disables and enables the controller and sets up everything but the I/O queues.
    pub(super) fn start(&self) -> Result<(), NvmeError> {
        self.disable()?;
        self.quiet();
        if self.interrupts.read().is_empty() && self.options.vectors > 0 {
            *self.interrupts.write() = self.some_interrupts(self.options.vectors)?;
        }
        self.enable()?;
        self.identify_controller()?;
        self.configure_arbitration();
        self.negotiate_queues()?;
        self.configure_shadow()?;
        self.configure_memory();
        self.configure_events();
        self.list_namespaces()?;
        Ok(())
    }

    /// Enables as many interrupt vectors as the transport gives, at most `want`. Without any,
    /// completions are polled.
    pub(super) fn some_interrupts(&self, want: u16) -> Result<Vec<Arc<EventFd>>, NvmeError> {
        let mut count = want;
        while count > 0 {
            match self.transport.enable_interrupts(count) {
                Ok(vectors) => return Ok(vectors),
                Err(error) if self.transport.is_gone() => return Err(error.into()),
                Err(error) => {
                    tracing::warn!(device = self.name(), count, %error, "interrupt vectors refused; trying fewer");
                    count /= 2;
                }
            }
        }
        Ok(Vec::new())
    }

    /// Frees the memory that the device could access: it is disabled.
    pub(super) fn quiet(&self) {
        self.admin_lose_all();
        self.forget_aborts();
        self.free_stuck_queues();
        self.kept_until_quiet.lock().clear();
        *self.shadow.write() = None;
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
                return Err(NvmeError::Removed {
                    device: self.name().to_owned(),
                });
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
    pub(super) fn disable(&self) -> Result<(), NvmeError> {
        let wait = self.ready_wait();
        let cc = Cc::from(self.transport.read32(Reg::CC)?);
        let raw = self.transport.read32(Reg::CSTS)?;
        if raw == u32::MAX {
            return Err(NvmeError::Removed {
                device: self.name().to_owned(),
            });
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

    fn enable(&self) -> Result<(), NvmeError> {
        {
            let mut admin = self.admin.lock();
            admin.sq_mem.clear();
            admin.cq_mem.clear();
            let address = |m: &crate::dma::DmaShared| {
                self.table
                    .translate(m.region(), m.region_offset())
                    .map(|(address, _)| address)
                    .ok_or_else(|| NvmeError::Protocol {
                        device: self.name().to_owned(),
                        detail: "the admin queues are not mapped for the device".into(),
                    })
            };
            let (asq, acq) = (address(&admin.sq_mem)?, address(&admin.cq_mem)?);
            let entries_z = u32::from(ADMIN_ENTRIES) - 1;
            self.transport
                .write32(Reg::AQA, entries_z | entries_z << 16)?;
            self.transport.write64(Reg::ASQ, asq)?;
            self.transport.write64(Reg::ACQ, acq)?;
            let bell = |completion| {
                self.transport
                    .doorbell(doorbell_offset(0, completion, self.cap.dstrd()))
            };
            let sq = SubmissionRing::new(
                QueueMem::Host(Arc::clone(&admin.sq_mem)),
                ADMIN_ENTRIES,
                Bell::new(bell(false)?, None),
            );
            let cq = CompletionRing::new(
                Arc::clone(&admin.cq_mem),
                ADMIN_ENTRIES,
                1,
                Bell::new(bell(true)?, None),
            );
            admin.restart((sq, cq));
        }
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

    /// Does a normal shutdown (Base section 3.6.1), disables the controller and releases it.
    pub(super) fn shut_down(&self) -> Result<(), NvmeError> {
        let word = self.state.load(Ordering::Acquire);
        if state::phase(word) != Phase::Live {
            self.transport.detach();
            return Ok(());
        }
        self.freeze_queues(word);
        let result = self.shut_down_device();
        self.transport.detach();
        self.quiet();
        *self.failure.lock() = Some("it was shut down".into());
        self.set_state(state::word(state::generation(word) + 1, Phase::Failed));
        self.wake_sleepers();
        result
    }

    fn shut_down_device(&self) -> Result<(), NvmeError> {
        let cc = Cc::from(self.transport.read32(Reg::CC)?);
        self.transport.write32(Reg::CC, cc.with_shn(1).into())?;
        // RTD3E, where given, is the longest time that a shutdown takes (Base figure 275).
        let rtd3e = self.info().map_or(0, |i| u64::from(i.identify.rtd3e.get()));
        let wait = self.ready_wait().or_for_shutdown(rtd3e);
        self.wait_csts("shutdown complete", wait, false, |c| c.shst() == 2)?;
        self.disable()
    }
}
