//! Log pages, features, format.

use zerocopy::FromBytes;

use super::{Controller, Core};
use crate::dma::DmaBuf;
use crate::error::NvmeError;
use crate::namespace::Namespace;
use crate::spec::{
    Cns, Command, ErrorLogEntry, FeatureId, FirmwareSlotLog, FormatNvm, IdentifyNamespace, LogPage,
    Oacs, SmartLog,
};

/// The namespace identifier that stands for all namespaces.
const ALL: u32 = u32::MAX;

/// Bits of FNA (Base figure 275): a format formats all namespaces; a secure erase erases all; the
/// command for all namespaces is not supported.
const FNA_FORMATS_ALL: u8 = 1 << 0;
const FNA_ERASES_ALL: u8 = 1 << 1;
const FNA_NO_BROADCAST: u8 = 1 << 3;

impl Core {
    pub(super) fn log_page(
        &self,
        page: LogPage,
        nsid: u32,
        len: usize,
        retain: bool,
    ) -> Result<DmaBuf, NvmeError> {
        let bytes = u32::try_from(len).unwrap_or(0);
        let command = Command::get_log(page, nsid, 0, bytes, retain);
        let (_, data) = self.admin(command, Some(self.link.admin_buffer(len)?))?;
        data.ok_or_else(|| self.link.protocol("a log page lost its buffer"))
    }

    /// Runs an operation that may change namespaces' block sizes. No command that was made for the
    /// old sizes may reach the device afterwards, since it would transfer more than its buffer
    /// holds.
    pub(super) fn reformat<T>(
        &self,
        run: impl FnOnce() -> Result<T, NvmeError>,
    ) -> Result<T, NvmeError> {
        {
            // The lock is held, so that a pair that is made from here on finds the handles
            // withdrawn.
            let registry = self.queues.lock();
            let open = registry.queues.len();
            if open > 0 {
                return Err(self.link.unsupported(format!(
                    "there are {open} I/O queue pairs, whose commands are made for the present \
                         format; drop them, then format"
                )));
            }
            // This concerns all namespaces, since a controller may format all at once (FNA bit 0).
            for ns in self.namespaces.read().values() {
                ns.validity.withdraw();
            }
        }
        let result = run();
        let listed = self.list_namespaces();
        let done = result?;
        listed.map(|()| done)
    }
}

impl Core {
    /// Returns the percentage that is left of a format, added up over the namespaces that report it
    /// (FPI). `None` when none of them does.
    pub(super) fn format_left(&self, nsid: u32) -> Option<u32> {
        let formatted: Vec<u32> = {
            let namespaces = self.namespaces.read();
            let reports = |ns: &Namespace| ns.identify.fpi & 0x80 != 0;
            let ids = namespaces.iter().filter(|(_, ns)| reports(ns));
            ids.map(|(id, _)| *id)
                .filter(|id| nsid == ALL || nsid == *id)
                .collect()
        };
        let left = |id| {
            let page = self.identify_page(Cns::NAMESPACE, id).ok()?;
            let ns = IdentifyNamespace::read_from_bytes(&page).ok()?;
            Some(u32::from(ns.fpi & 0x7f))
        };
        formatted
            .into_iter()
            .filter_map(left)
            .reduce(|all, one| all + one)
    }
}

impl Controller {
    /// Reads the SMART / health log of the controller.
    pub fn smart_log(&self) -> Result<SmartLog, NvmeError> {
        self.core.life.wait_live()?;
        let page = self.core.log_page(LogPage::SMART, ALL, 512, true)?;
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
        let page = self.core.log_page(LogPage::ERROR, ALL, len, true)?;
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
        let now = match self.core.admin(set, None) {
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
    /// [`format_timeout`](super::ControllerOptions::format_timeout) without progress. Lists the
    /// namespaces again. Handles that [`namespace`](Self::namespace) returned earlier are no longer
    /// valid if the block size has changed.
    ///
    /// # Errors
    /// Refuses while there are queue pairs, because their commands are made for the old block size;
    /// and when the controller would format its other namespaces too, see
    /// [`format_all`](Self::format_all).
    pub fn format(&self, nsid: u32, format: FormatNvm) -> Result<(), NvmeError> {
        self.can_format(nsid, format)?;
        let count = self.core.namespaces.read().len();
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
        let ids: Vec<u32> = self.core.namespaces.read().keys().copied().collect();
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
}
