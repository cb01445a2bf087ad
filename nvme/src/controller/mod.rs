//! Controllers: bring-up, admin commands, namespaces, reset, removal.

use std::sync::Arc;

use parking_lot::Mutex;
use zerocopy::FromBytes;

use crate::dma::DmaBuf;
use crate::error::{Cause, NvmeError};
use crate::namespace::Namespace;
use crate::spec::{
    AdminOpcode, Cap, Command, Completion, ErrorLogEntry, FeatureId, FirmwareSlotLog, FormatNvm,
    IdentifyController, LogPage, Oacs, SmartLog, Vs,
};
use crate::transport::OpenTransport;

mod admin;
mod core;
mod events;
mod identify;
mod info;
mod interrupts;
mod keeper;
mod link;
mod memory;
mod namespaces;
mod options;
mod passthrough;
mod queues;
mod quirks;
mod ready;
mod requests;
mod shadow;
pub(crate) mod state;

pub(crate) use self::core::Core;
pub use events::ControllerEvent;
use keeper::Keeper;
pub(crate) use link::Link;
use namespaces::ALL;
pub use options::{ControllerOptions, Weights};
use passthrough::Prepared;
pub(crate) use state::Lifecycle;
pub use state::Phase;

/// Bits of FNA (Base figure 275): a format formats all namespaces; a secure erase erases all; the
/// command for all namespaces is not supported.
const FNA_FORMATS_ALL: u8 = 1 << 0;
const FNA_ERASES_ALL: u8 = 1 << 1;
const FNA_NO_BROADCAST: u8 = 1 << 3;

/// An enabled NVMe controller, shared by everything that uses it. When the last handle is dropped
/// (queue pairs hold one), it is shut down and released.
#[derive(Debug)]
pub struct Controller {
    pub(crate) core: Arc<Core>,
    /// Held during the whole shutdown. Nothing else takes it.
    keeper: Mutex<Keeper>,
}

impl Controller {
    /// Takes a transport, resets and enables its controller and lists its namespaces. Blocks; every
    /// wait is bounded by the time that the controller promises (CAP.TO, CRTO.CRWMT), see
    /// [`ControllerOptions::admin_timeout`].
    ///
    /// # Errors
    /// Fails when the system has no thread that watches the controller, which is then left as it
    /// was; and when the controller does not come up or deviates from the specification.
    pub fn new(
        transport: OpenTransport,
        options: ControllerOptions,
    ) -> Result<Arc<Controller>, NvmeError> {
        let keeper = keeper::prepare(transport.name())?;
        let core = Arc::new(Core::bring_up(transport.0, options)?);
        let keeper = Mutex::new(keeper.watch(&core));
        Ok(Arc::new(Controller { core, keeper }))
    }

    /// The device's name for logs and errors.
    pub fn name(&self) -> &str {
        self.core.link.name()
    }

    /// The kind of transport: `vfio`, `uio`, `vfio-user` or `soft`.
    pub fn transport_kind(&self) -> &'static str {
        self.core.link.transport.kind()
    }

    /// Whether an interrupt is a message from a controller in another process. Such a controller
    /// sends one for each completion, so a polling thread is faster without.
    pub fn interrupts_are_messages(&self) -> bool {
        self.core.link.transport.interrupts_are_messages()
    }

    /// The controller's phase at this moment.
    pub fn phase(&self) -> Phase {
        self.core.life.phase()
    }

    /// Number of resets.
    pub fn generation(&self) -> u64 {
        state::generation(self.core.life.word())
    }

    /// The capabilities register.
    pub fn capabilities(&self) -> Cap {
        self.core.link.cap
    }

    /// The version register.
    pub fn version(&self) -> Result<Vs, NvmeError> {
        Ok(self.core.link.info()?.version)
    }

    /// Most bytes of a single command's data (MDTS, and this driver's bound of 1 MiB).
    pub fn transfer_bytes(&self) -> Result<usize, NvmeError> {
        Ok(self.core.link.info()?.transfer_bytes)
    }

    /// Whether shadow doorbells are in use.
    pub fn shadow_doorbells(&self) -> bool {
        self.core.queues.shadow.are_in_use()
    }

    /// Whether data pointers are SGLs where these are shorter.
    pub fn uses_sgl(&self) -> bool {
        self.core.link.info().is_ok_and(|i| i.sgl)
    }

    /// Most I/O queue pairs.
    pub fn queue_limit(&self) -> u16 {
        self.core.queues.limit()
    }

    /// Number of interrupt vectors in use, including the admin queue's.
    pub fn interrupt_count(&self) -> usize {
        self.core.interrupts.count()
    }

    /// Returns the events since the last call, oldest first. At most 64 are kept.
    pub fn take_events(&self) -> Vec<ControllerEvent> {
        self.core.events.take()
    }

    /// Runs an admin command of the caller, with data to or from the device. Blocks. This function
    /// sets the data pointer and the identifier.
    ///
    /// # Errors
    /// Fails with [`NvmeError::Status`] when the status is not success. Refuses commands whose data
    /// would not fit the buffer; commands that pass addresses to the device (creating queues,
    /// doorbell buffers, the host memory buffer) or delete the driver's own queues; features whose
    /// data has no known bound, and features that the driver sets itself; and Format NVM while
    /// there are queue pairs, see [`format`](Self::format). The device is only given a buffer of
    /// the driver, as long as the command can need, or, for a vendor specific command with data, as
    /// long as any command's data can be.
    pub fn admin_command(
        &self,
        command: Command,
        data: Option<DmaBuf>,
    ) -> Result<(Completion, Option<DmaBuf>), NvmeError> {
        let Prepared { command, sent, own } = passthrough::prepare(&self.core.link, command, data)?;
        let send = || {
            let word = self.core.life.wait_live()?;
            let left = || self.core.namespaces.format_left(command.nsid);
            self.core.admin.run_once(Some(word), command, sent, left)
        };
        let (completion, data) = match AdminOpcode(command.opcode) {
            AdminOpcode::FORMAT_NVM => self.reformat(send)?,
            AdminOpcode::NS_MANAGEMENT | AdminOpcode::NS_ATTACHMENT => {
                let done = send()?;
                self.core.namespaces.list()?;
                done
            }
            _ => send()?,
        };
        Ok((completion, passthrough::finish(data, own)))
    }

    /// Runs an operation that may change namespaces' block sizes. No command that was made for the
    /// old sizes may reach the device afterwards, since it would transfer more than its buffer
    /// holds.
    fn reformat<T>(&self, run: impl FnOnce() -> Result<T, NvmeError>) -> Result<T, NvmeError> {
        let Core {
            queues,
            namespaces,
            link,
            ..
        } = &*self.core;
        // This concerns all namespaces, since a controller may format all at once (FNA bit 0).
        queues
            .without_pairs(|| namespaces.withdraw())
            .map_err(|open| {
                link.unsupported(format!(
                "there are {open} I/O queue pairs, whose commands are made for the present format; \
                 drop them, then format"
            ))
            })?;
        let result = run();
        let listed = namespaces.list();
        let done = result?;
        listed.map(|()| done)
    }

    /// Reads the controller's identify structure.
    pub fn identify(&self) -> Result<IdentifyController, NvmeError> {
        Ok((*self.core.link.info()?.identify).clone())
    }

    /// Returns the active namespaces in ascending order. They are listed at bring-up, after a
    /// reset, and when the controller reports that they changed.
    pub fn namespaces(&self) -> Vec<Arc<Namespace>> {
        self.core.namespaces.all()
    }

    /// Returns the active namespace with this identifier.
    pub fn namespace(&self, nsid: u32) -> Result<Arc<Namespace>, NvmeError> {
        self.core.namespaces.get(nsid)
    }

    /// Lists the namespaces again. Blocks for a few admin commands per namespace.
    pub fn rescan(&self) -> Result<(), NvmeError> {
        self.core.life.wait_live()?;
        self.core.namespaces.list()
    }

    /// Reads the SMART / health log of the controller.
    pub fn smart_log(&self) -> Result<SmartLog, NvmeError> {
        self.core.life.wait_live()?;
        let page = self.core.admin.log_page(LogPage::SMART, ALL, 512, true)?;
        SmartLog::read_from_bytes(&page).map_err(|_| self.core.link.protocol("SMART log length"))
    }

    /// Reads the newest entries of the error log, at most `max` and at most as many as the
    /// controller keeps. Leaves out unused entries.
    pub fn error_log(&self, max: usize) -> Result<Vec<ErrorLogEntry>, NvmeError> {
        self.core.life.wait_live()?;
        let kept = usize::from(self.core.link.info()?.identify.elpe_z) + 1;
        // At most as many as fit one command's data, whatever was asked for.
        let most = self.core.link.info()?.transfer_bytes / size_of::<ErrorLogEntry>();
        let len = kept.min(max.max(1)).min(most) * size_of::<ErrorLogEntry>();
        let page = self.core.admin.log_page(LogPage::ERROR, ALL, len, true)?;
        Ok(page
            .chunks_exact(size_of::<ErrorLogEntry>())
            .filter_map(|c| ErrorLogEntry::read_from_bytes(c).ok())
            .filter(|e| e.error_count.get() != 0)
            .collect())
    }

    /// Reads the firmware slots.
    pub fn firmware_slots(&self) -> Result<FirmwareSlotLog, NvmeError> {
        self.core.life.wait_live()?;
        let page = self
            .core
            .admin
            .log_page(LogPage::FIRMWARE_SLOTS, ALL, 512, true)?;
        FirmwareSlotLog::read_from_bytes(&page)
            .map_err(|_| self.core.link.protocol("firmware log length"))
    }

    /// Reads a feature's current value (dword 0 of the completion).
    pub fn feature(&self, feature: FeatureId, nsid: u32) -> Result<u32, NvmeError> {
        let (done, _) = self.admin_command(Command::get_feature(feature, nsid), None)?;
        Ok(done.dw0)
    }

    /// Sets a feature. With `save` it is kept over power cycles.
    pub fn set_feature(
        &self,
        feature: FeatureId,
        nsid: u32,
        value: u32,
        save: bool,
    ) -> Result<u32, NvmeError> {
        let command = Command::set_feature(feature, nsid, value, save);
        let (done, _) = self.admin_command(command, None)?;
        Ok(done.dw0)
    }

    /// Whether the controller has a volatile write cache that is switched on, as found at bring-up
    /// or set by the last [`set_write_cache`](Self::set_write_cache).
    pub fn write_cache(&self) -> bool {
        self.core.link.info().is_ok_and(|i| i.write_cache)
    }

    /// Switches the volatile write cache and lists the namespaces again, whose
    /// [`write_cache`](crate::Namespace::write_cache) follows it. Whether the setting outlives a
    /// controller reset depends on the device; it is read again then.
    pub fn set_write_cache(&self, on: bool) -> Result<(), NvmeError> {
        let info = self.core.link.info()?;
        if info.identify.vwc & 1 == 0 {
            return Err(self
                .core
                .link
                .unsupported("the controller has no volatile write cache"));
        }
        self.core.life.wait_live()?;
        let set = Command::set_feature(FeatureId::VOLATILE_WRITE_CACHE, 0, u32::from(on), false);
        let now = match self.core.admin.run(set, None) {
            Ok(_) => self.feature(FeatureId::VOLATILE_WRITE_CACHE, 0),
            Err(refused @ NvmeError::Status { .. }) => return Err(refused),
            Err(open) => Err(open),
        };
        let mut info = (*info).clone();
        // A cache of which nothing is known counts as on, so that it is flushed.
        info.write_cache = now.as_ref().map_or(true, |value| value & 1 != 0);
        self.core.link.set_info(info);
        let listed = self.rescan();
        now?;
        listed
    }

    /// Formats a namespace: all its data is lost. Blocks for as long as the device takes, at most
    /// [`format_timeout`](ControllerOptions::format_timeout) without progress. Lists the
    /// namespaces again. Handles that [`namespace`](Self::namespace) returned earlier are no longer
    /// valid if the block size has changed.
    ///
    /// # Errors
    /// Refuses while there are queue pairs, because their commands are made for the old block size;
    /// and when the controller would format its other namespaces too, see
    /// [`format_all`](Self::format_all).
    pub fn format(&self, nsid: u32, format: FormatNvm) -> Result<(), NvmeError> {
        self.can_format(nsid, format)?;
        let count = self.core.namespaces.all().len();
        if count > 1 && self.formats_all(format)? {
            return Err(self.core.link.unsupported(format!(
                    "the controller cannot format namespace {nsid} alone: it formats all {count} \
                     at once (FNA); to lose them all, use Controller::format_all, or `pumice nvme format --all`"
                )));
        }
        self.admin_command(Command::format(nsid, format), None)?;
        Ok(())
    }

    /// Formats all namespaces, as [`format`](Self::format) does one.
    ///
    /// # Errors
    /// Fails as `format` does. A controller that takes no command for all of them gets one for each,
    /// so that some may be formatted then.
    pub fn format_all(&self, format: FormatNvm) -> Result<(), NvmeError> {
        let ids: Vec<u32> = self.namespaces().iter().map(|ns| ns.nsid()).collect();
        for nsid in &ids {
            self.can_format(*nsid, format)?;
        }
        let no_broadcast = self.core.link.info()?.identify.fna & FNA_NO_BROADCAST != 0;
        let targets = if no_broadcast { ids } else { vec![ALL] };
        for nsid in targets {
            self.admin_command(Command::format(nsid, format), None)?;
        }
        Ok(())
    }

    /// Whether a format of one namespace formats or erases others: Base figure 275, FNA.
    fn formats_all(&self, format: FormatNvm) -> Result<bool, NvmeError> {
        let fna = self.core.link.info()?.identify.fna;
        let erases = format.secure_erase != 0;
        Ok(fna & FNA_FORMATS_ALL != 0 || (erases && fna & FNA_ERASES_ALL != 0))
    }

    fn can_format(&self, nsid: u32, format: FormatNvm) -> Result<(), NvmeError> {
        let info = self.core.link.info()?;
        if info.identify.oacs.get() & Oacs::FORMAT == 0 {
            return Err(self
                .core
                .link
                .unsupported("the controller does not support Format NVM"));
        }
        let ns = self.namespace(nsid)?;
        if format.lbaf > ns.identify.nlbaf_z {
            return Err(self.core.link.unsupported(format!(
                "namespace {nsid} has LBA formats 0 to {}, not {}",
                ns.identify.nlbaf_z, format.lbaf
            )));
        }
        Ok(())
    }

    /// Resets the controller. I/O in flight ends once: with its own status, with that of another
    /// attempt, or as aborted when its retries are used up. Blocks until the reset has ended.
    pub fn reset(&self) -> Result<(), NvmeError> {
        self.core.requests.reset_and_wait()
    }

    /// Shuts the controller down (CC.SHN), so that its caches are safe, and releases the device.
    /// Every queue pair's I/O ends. Blocks for a bounded time. Dropping the last handle does the
    /// same without returning an error. Of several calls each returns when the controller is shut
    /// down.
    ///
    /// # Errors
    /// Fails when the controller does not report the end of its shutdown in time, so that its
    /// caches may not be on the medium. Every later call then fails too.
    pub fn shutdown(&self) -> Result<(), NvmeError> {
        if !self.core.link.birth.is_here() {
            return Err(self.core.life.gone(Cause::OtherProcess));
        }
        self.keeper.lock().stop(&self.core)
    }
}

impl Drop for Controller {
    fn drop(&mut self) {
        if !self.core.link.birth.is_here() {
            return;
        }
        if let Err(error) = self.keeper.get_mut().stop(&self.core) {
            tracing::warn!(device = self.name(), %error, "shutdown");
        }
    }
}
