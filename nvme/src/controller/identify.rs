//! Identify, features and the list of namespaces.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use pumice_io::Limits;
use zerocopy::FromBytes;

use super::info::Info;
use super::{Controller, Core};
use crate::dma::DmaBuf;
use crate::error::NvmeError;
use crate::namespace::{CommandLimits, FormatValidity, Namespace, Supports};
use crate::spec::{
    Cns, Command, FeatureId, IdentifyController, IdentifyNamespace, IdentifyNvmController,
    NsDescriptor, Oncs, Reg, SOURCE_RANGES_MAX, Vs, ns_descriptors, ns_list,
};

/// Most bytes of one command's data, whatever the controller allows. It bounds the PRP list.
pub(super) const TRANSFER_MAX: usize = 1 << 20;
/// Most bytes of a namespace: 1 EiB, the largest block device. A larger one would keep the others
/// of its controller from being used.
const SIZE_MAX: u64 = 1 << 60;
/// Most namespaces to use. The log names the number of those that are ignored.
const NAMESPACES_MAX: usize = 1024;

impl Core {
    /// Runs an Identify that returns one page.
    pub(super) fn identify_page(&self, cns: Cns, nsid: u32) -> Result<DmaBuf, NvmeError> {
        let page = self.link.admin_buffer(4096)?;
        let (_, data) = self.admin(Command::identify(cns, nsid), Some(page))?;
        data.ok_or_else(|| self.link.protocol("identify lost its buffer"))
    }

    pub(super) fn identify_controller(&self) -> Result<(), NvmeError> {
        let page = self.identify_page(Cns::CONTROLLER, 0)?;
        let identify = IdentifyController::read_from_bytes(&page)
            .map_err(|_| self.link.protocol("identify controller has a wrong length"))?;
        let version = Vs::from(self.link.transport.read32(Reg::VS)?);
        // SQES and CQES: required entry sizes of 64 and 16 bytes (Base figure 275).
        let sizes = [
            (identify.sqes, 6, "submission"),
            (identify.cqes, 4, "completion"),
        ];
        for (field, want, what) in sizes {
            if field & 15 > want || (field >> 4 != 0 && field >> 4 < want) {
                return Err(self.link.protocol(format!(
                    "{what} queue entries of 2^{want} bytes are not among what the controller \
                     takes ({field:#04x})"
                )));
            }
        }
        let page_bytes = 1usize << self.link.page_shift;
        let transfer_bytes = match identify.mdts {
            0 => TRANSFER_MAX,
            n => page_bytes
                .checked_shl(u32::from(n))
                .filter(|b| *b >= page_bytes)
                .unwrap_or(TRANSFER_MAX)
                .min(TRANSFER_MAX),
        };
        // Identify of the command set (CNS 06h) came with NVMe 2.0; older devices refuse it.
        let nvm = if version.mjr() >= 2 {
            self.identify_page(Cns::CSI_CONTROLLER, 0)
                .ok()
                .and_then(|p| IdentifyNvmController::read_from_bytes(&p).ok())
                .map(Box::new)
        } else {
            None
        };
        let write_cache = identify.vwc & 1 != 0
            && self
                .feature_value(FeatureId::VOLATILE_WRITE_CACHE)
                .is_none_or(|v| v & 1 != 0);
        let info = Info {
            // SGLS bits 1:0: 1 byte aligned, 2 dword aligned; buffers here are dword aligned.
            sgl: self.link.options.sgl && matches!(identify.sgls.get() & 3, 1 | 2),
            identify: Box::new(identify),
            nvm,
            version,
            transfer_bytes,
            write_cache,
        };
        self.link.set_info(info);
        Ok(())
    }

    fn feature_value(&self, feature: FeatureId) -> Option<u32> {
        self.admin(Command::get_feature(feature, 0), None)
            .ok()
            .map(|(completion, _)| completion.dw0)
    }

    /// Sets up weighted round robin where it was asked for and is supported (Base section
    /// 5.27.1.1).
    pub(super) fn configure_arbitration(&self) {
        let Some(weights) = self
            .link
            .options
            .arbitration
            .filter(|_| self.link.cap.ams_wrr())
        else {
            return;
        };
        let z = |w: u16| u32::from(w.clamp(1, 256) - 1);
        // No limit of the burst (7).
        let value = 7 | z(weights.low) << 8 | z(weights.medium) << 16 | z(weights.high) << 24;
        let command = Command::set_feature(FeatureId::ARBITRATION, 0, value, false);
        if let Err(error) = self.admin(command, None) {
            tracing::warn!(device = self.name(), %error, "arbitration weights not set");
        }
    }

    /// Asks for the events that the driver understands (Base section 5.27.1.9): health and, if
    /// the controller has it, namespace changes.
    pub(super) fn configure_events(&self) {
        let Ok(info) = self.link.info() else { return };
        let value = 0x1f | (info.identify.oaes.get() & 1 << 8);
        let command = Command::set_feature(FeatureId::ASYNC_EVENT_CONFIG, 0, value, false);
        if let Err(error) = self.admin(command, None) {
            tracing::debug!(device = self.name(), %error, "event configuration refused");
        }
    }

    /// Lists the active namespaces again.
    pub(super) fn list_namespaces(&self) -> Result<(), NvmeError> {
        let listed = self.list_once();
        let again = !matches!(listed, Ok(false));
        self.list_again.store(again, Ordering::Relaxed);
        listed.map(|_| ())
    }

    /// Lists as [`list_namespaces`](Self::list_namespaces) does. Returns whether some could not be
    /// identified now and may be later.
    fn list_once(&self) -> Result<bool, NvmeError> {
        let mut remembered = self.remembered.lock();
        let info = self.link.info()?;
        let ids = self.namespace_ids(&info)?;
        let mut found = BTreeMap::new();
        let mut unknown = false;
        for nsid in ids {
            match self.identify_namespace(&info, nsid) {
                Ok(Some(ns)) => {
                    found.insert(nsid, ns);
                }
                Ok(None) => {}
                // A namespace that cannot be identified does not affect the others.
                Err(NvmeError::Status { status, .. }) => {
                    unknown |= !status.do_not_retry();
                    tracing::warn!(device = self.name(), nsid, %status, "namespace not identified");
                }
                Err(error) => return Err(error),
            }
        }
        let mut listed = BTreeMap::new();
        for (nsid, mut now) in found {
            // Handles stay valid over a reset or a rescan, and again when their namespace comes
            // back.
            if let Some(before) = remembered.get(&nsid)
                && now.is_same(before)
            {
                now.validity = before.validity.clone();
                now.validity.restore(self.link.number);
            }
            listed.insert(nsid, Arc::new(now));
        }
        for (nsid, before) in remembered.iter() {
            if listed
                .get(nsid)
                .is_none_or(|now| !now.validity.is_shared_with(&before.validity))
            {
                before.validity.withdraw();
            }
        }
        remembered.extend(listed.iter().map(|(nsid, ns)| (*nsid, Arc::clone(ns))));
        *self.namespaces.write() = listed;
        Ok(unknown)
    }

    fn namespace_ids(&self, info: &Info) -> Result<Vec<u32>, NvmeError> {
        let mut ids = Vec::new();
        let nn = info.identify.nn.get();
        // Active namespace lists came with NVMe 1.1.
        if (info.version.mjr(), info.version.mnr()) >= (1, 1) {
            let mut after = 0;
            loop {
                let page = match self.identify_page(Cns::ACTIVE_NAMESPACES, after) {
                    Ok(page) => page,
                    Err(NvmeError::Status { .. }) if ids.is_empty() => break,
                    Err(error) => return Err(error),
                };
                let list = ns_list(&page, after).ok_or_else(|| {
                    self.link
                        .protocol("the active namespace list is not in ascending order")
                })?;
                let full = list.len() == 1024;
                ids.extend(&list);
                match ids.last() {
                    Some(&last) if full && ids.len() < NAMESPACES_MAX => after = last,
                    _ => return Ok(ids),
                }
            }
        }
        let count = (nn as usize).min(NAMESPACES_MAX);
        if count < nn as usize {
            tracing::warn!(
                device = self.name(),
                nn,
                "only the first {count} namespaces are used"
            );
        }
        Ok((1..=u32::try_from(count).unwrap_or(0)).collect())
    }

    /// Identifies a namespace. Returns `None` when it is inactive.
    fn identify_namespace(&self, info: &Info, nsid: u32) -> Result<Option<Namespace>, NvmeError> {
        let page = self.identify_page(Cns::NAMESPACE, nsid)?;
        let identify = IdentifyNamespace::read_from_bytes(&page)
            .map_err(|_| self.link.protocol("identify namespace has a wrong length"))?;
        if identify.nsze.get() == 0 {
            return Ok(None);
        }
        let mut descriptors = Vec::new();
        if (info.version.mjr(), info.version.mnr()) >= (1, 3) {
            match self.identify_page(Cns::NS_DESCRIPTORS, nsid) {
                Ok(page) => descriptors = ns_descriptors(&page),
                // Without the descriptors another namespace could be taken for the earlier one.
                Err(NvmeError::Status { status, .. }) if status.may_pass() => {
                    return Err(NvmeError::Status {
                        device: self.name().to_owned(),
                        command: "IDENTIFY (namespace descriptors)".to_owned(),
                        status,
                    });
                }
                Err(NvmeError::Status { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        let unusable = unusable(
            &identify,
            &descriptors,
            self.link.page_shift,
            info.transfer_bytes,
        );
        if let Some(why) = &unusable {
            tracing::warn!(device = self.name(), nsid, "namespace not usable: {why}");
        }
        let id = &info.identify;
        let one_more = |z: u16| u32::from(z) + 1;
        // NSFEAT bit 1: the namespace has its own atomicity fields.
        let own = identify.nsfeat & 2 != 0;
        let atomic = |own_z: u16, all_z: u16| {
            if own {
                one_more(own_z)
            } else {
                one_more(all_z)
            }
        };
        let power_blocks = atomic(identify.nawupf_z.get(), id.awupf_z.get());
        let mut limits = limits(
            info,
            nsid,
            &identify,
            unusable.is_none(),
            self.link.page_shift,
        );
        self.link
            .quirks
            .adjust(&mut limits, id, self.link.page_shift);
        Ok(Some(Namespace {
            limits,
            validity: FormatValidity::of(self.link.number),
            atomic_blocks: atomic(identify.nawun_z.get(), id.awun_z.get()),
            atomic_power_blocks: power_blocks,
            untorn_blocks: untorn_blocks(&limits, &identify, power_blocks),
            write_cache: info.write_cache,
            identify: Box::new(identify),
            descriptors,
            unusable,
        }))
    }
}

/// Returns the reason why a namespace's format cannot be used, if there is one.
fn unusable(
    identify: &IdentifyNamespace,
    descriptors: &[NsDescriptor],
    page_shift: u32,
    transfer_bytes: usize,
) -> Option<String> {
    for d in descriptors {
        if let NsDescriptor::Csi(csi @ 1..) = d {
            return Some(format!("its command set is {csi}, not NVM"));
        }
    }
    let format = identify.format();
    if format.ms.get() != 0 {
        return Some(format!(
            "its format has {} bytes of metadata per block{}; format it to one without \
             (`pumice nvme format --lbaf N`)",
            format.ms.get(),
            if identify.dps & 7 != 0 {
                " (protection information)"
            } else {
                ""
            }
        ));
    }
    if !(9..=16).contains(&format.lbads) || (1usize << format.lbads) > transfer_bytes {
        return Some(format!(
            "its blocks have 2^{} bytes (pages: 2^{page_shift})",
            format.lbads
        ));
    }
    if identify.nsze.get() > SIZE_MAX >> format.lbads {
        return Some(format!("its size, {} blocks, is absurd", identify.nsze));
    }
    None
}

/// Returns the largest power of two such that a power cut tears no write of one buffer that lies
/// within a group of so many blocks, counted from block 0. Such a write has to be one command, and
/// must not cross one of the namespace's atomic boundaries.
fn untorn_blocks(limits: &CommandLimits, ns: &IdentifyNamespace, power_blocks: u32) -> u32 {
    let mut most = power_blocks;
    if let Some(max) = limits.data.max_blocks {
        most = most.min(max.get());
    }
    if let Some(boundary) = limits.data.boundary_blocks {
        most = most.min(lowest_bit(boundary.get()));
    }
    // NABSPF and NABO, where NSFEAT bit 1 says that the namespace has them.
    if ns.nsfeat & 2 != 0 && ns.nabspf_z.get() != 0 {
        let (size, first) = (u32::from(ns.nabspf_z.get()) + 1, u32::from(ns.nabo.get()));
        most = most.min(lowest_bit(size)).min(lowest_bit(first));
    }
    1 << most.max(1).ilog2()
}

/// Returns the largest power of two that divides `n`; every power of two divides 0.
fn lowest_bit(n: u32) -> u32 {
    1u32.checked_shl(n.trailing_zeros()).unwrap_or(u32::MAX)
}

fn limits(
    info: &Info,
    nsid: u32,
    ns: &IdentifyNamespace,
    usable: bool,
    page_shift: u32,
) -> CommandLimits {
    let shift = u32::from(ns.format().lbads.clamp(9, 16));
    let oncs = info.identify.oncs.get();
    let transfer = u32::try_from(info.transfer_bytes >> shift)
        .unwrap_or(1)
        .clamp(1, 65_536);
    // Size limits of commands without data are powers of two of the smallest page; 0 means that
    // none is given. Without the field, older hosts use MDTS.
    let sized = |exponent: Option<u8>| match exponent {
        None => transfer,
        Some(0) => 65_536,
        Some(n) => {
            let bytes = 1u64
                .checked_shl(page_shift + u32::from(n))
                .unwrap_or(u64::MAX);
            u32::try_from(bytes >> shift)
                .unwrap_or(u32::MAX)
                .clamp(1, 65_536)
        }
    };
    let nvm = info.nvm.as_deref();
    let or_max = |v: u32| if v == 0 { u32::MAX } else { v };
    CommandLimits {
        nsid,
        block_shift: shift,
        num_blocks: ns.nsze.get(),
        data: Limits::new(transfer, ns.noiob.get().into()),
        zeroes_blocks: sized(nvm.map(|n| n.wzsl)),
        verify_blocks: sized(nvm.map(|n| n.vsl)),
        deallocate_blocks: nvm.map_or(u32::MAX, |n| or_max(n.dmrsl.get())),
        deallocate_total_blocks: match nvm.map_or(0, |n| n.dmsl.get()) {
            0 => u64::MAX,
            n => n,
        },
        deallocate_ranges: match nvm.map_or(0, |n| n.dmrl) {
            0 => 256,
            n => u32::from(n),
        },
        copy_ranges: (u32::from(ns.msrc_z) + 1)
            .min(u32::try_from(SOURCE_RANGES_MAX).unwrap_or(256)),
        copy_range_blocks: or_max(u32::from(ns.mssrl.get())),
        copy_blocks: or_max(ns.mcl.get()),
        zeroes_may_deallocate: ns.dlfeat & 8 != 0,
        supports: Supports {
            compare: oncs & Oncs::COMPARE != 0,
            write_zeroes: oncs & Oncs::WRITE_ZEROES != 0,
            deallocate: oncs & Oncs::DATASET_MANAGEMENT != 0,
            verify: oncs & Oncs::VERIFY != 0,
            // The controller must support descriptor format 0 and give its limits.
            copy: oncs & Oncs::COPY != 0 && ns.mssrl.get() != 0 && ns.mcl.get() != 0,
        },
        usable,
    }
}

impl Controller {
    /// Reads the controller's identify structure.
    pub fn identify(&self) -> Result<IdentifyController, NvmeError> {
        Ok((*self.core.link.info()?.identify).clone())
    }

    /// Returns the active namespaces in ascending order. They are listed at bring-up, after a
    /// reset, and when the controller reports that they changed.
    pub fn namespaces(&self) -> Vec<Arc<Namespace>> {
        self.core.namespaces.read().values().cloned().collect()
    }

    /// Returns the active namespace with this identifier.
    pub fn namespace(&self, nsid: u32) -> Result<Arc<Namespace>, NvmeError> {
        let all = self.core.namespaces.read();
        all.get(&nsid).cloned().ok_or_else(|| {
            let known: Vec<String> = all.keys().map(u32::to_string).collect();
            NvmeError::NoNamespace {
                device: self.name().to_owned(),
                nsid,
                known: if known.is_empty() {
                    "none".into()
                } else {
                    known.join(", ")
                },
            }
        })
    }

    /// Lists the namespaces again. Blocks for a few admin commands per namespace.
    pub fn rescan(&self) -> Result<(), NvmeError> {
        self.core.life.wait_live()?;
        self.core.list_namespaces()
    }
}
