//! The namespaces of a controller, as they were identified.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::{Mutex, RwLock};
use pumice_io::Limits;
use zerocopy::FromBytes;

use super::admin::Admin;
use super::info::Info;
use super::link::Link;
use crate::error::NvmeError;
use crate::namespace::{CommandLimits, FormatValidity, Namespace, Supports};
use crate::spec::{
    Cns, IdentifyNamespace, NsDescriptor, Oncs, SOURCE_RANGES_MAX, ns_descriptors, ns_list,
};

/// The namespace identifier that stands for all namespaces.
pub(super) const ALL: u32 = u32::MAX;
/// Most bytes of a namespace: 1 EiB, the largest block device. A larger one would keep the others
/// of its controller from being used.
const SIZE_MAX: u64 = 1 << 60;
/// Most namespaces to use. The log names the number of those that are ignored.
const NAMESPACES_MAX: usize = 1024;

/// The namespaces of a controller.
#[derive(Debug)]
pub(super) struct Namespaces {
    link: Arc<Link>,
    admin: Arc<Admin>,
    listed: RwLock<BTreeMap<u32, Arc<Namespace>>>,
    /// The last known state of every namespace, whether it is listed now or not. Handles of a
    /// namespace that comes back unchanged continue to work. Lock order: before `listed`.
    remembered: Mutex<BTreeMap<u32, Arc<Namespace>>>,
    /// Whether a namespace could not be identified, or the list not be read, so that the keeper
    /// lists them again.
    list_again: AtomicBool,
}

impl Namespaces {
    pub fn new(admin: &Arc<Admin>) -> Namespaces {
        Namespaces {
            link: Arc::clone(&admin.link),
            admin: Arc::clone(admin),
            listed: RwLock::default(),
            remembered: Mutex::default(),
            list_again: AtomicBool::new(false),
        }
    }

    /// Returns those that are active.
    pub fn all(&self) -> Vec<Arc<Namespace>> {
        self.listed.read().values().cloned().collect()
    }

    /// Returns the active namespace with this identifier.
    pub fn get(&self, nsid: u32) -> Result<Arc<Namespace>, NvmeError> {
        let all = self.listed.read();
        all.get(&nsid).cloned().ok_or_else(|| {
            let known: Vec<String> = all.keys().map(u32::to_string).collect();
            NvmeError::NoNamespace {
                device: self.link.name().to_owned(),
                nsid,
                known: if known.is_empty() {
                    "none".into()
                } else {
                    known.join(", ")
                },
            }
        })
    }

    /// Whether some may be missing that can be listed later.
    pub fn are_incomplete(&self) -> bool {
        self.list_again.load(Ordering::Relaxed)
    }

    /// Makes the handles of all namespaces invalid until they are listed again.
    pub fn withdraw(&self) {
        for ns in self.listed.read().values() {
            ns.validity.withdraw();
        }
    }

    /// Lists the active namespaces again.
    pub fn list(&self) -> Result<(), NvmeError> {
        let listed = self.list_once();
        let again = !matches!(listed, Ok(false));
        self.list_again.store(again, Ordering::Relaxed);
        listed.map(|_| ())
    }

    /// Lists as [`list`](Self::list) does. Returns whether some could not be
    /// identified now and may be later.
    fn list_once(&self) -> Result<bool, NvmeError> {
        let mut remembered = self.remembered.lock();
        let info = self.link.info()?;
        let ids = self.ids(&info)?;
        let mut found = BTreeMap::new();
        let mut unknown = false;
        for nsid in ids {
            match self.identify(&info, nsid) {
                Ok(Some(ns)) => {
                    found.insert(nsid, ns);
                }
                Ok(None) => {}
                // A namespace that cannot be identified does not affect the others.
                Err(NvmeError::Status { status, .. }) => {
                    unknown |= !status.do_not_retry();
                    tracing::warn!(device = self.link.name(), nsid, %status, "namespace not identified");
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
        *self.listed.write() = listed;
        Ok(unknown)
    }

    fn ids(&self, info: &Info) -> Result<Vec<u32>, NvmeError> {
        let mut ids = Vec::new();
        let nn = info.identify.nn.get();
        // Active namespace lists came with NVMe 1.1.
        if (info.version.mjr(), info.version.mnr()) >= (1, 1) {
            let mut after = 0;
            loop {
                let page = match self.admin.identify_page(Cns::ACTIVE_NAMESPACES, after) {
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
                device = self.link.name(),
                nn,
                "only the first {count} namespaces are used"
            );
        }
        Ok((1..=u32::try_from(count).unwrap_or(0)).collect())
    }

    /// Identifies a namespace. Returns `None` when it is inactive.
    fn identify(&self, info: &Info, nsid: u32) -> Result<Option<Namespace>, NvmeError> {
        let page = self.admin.identify_page(Cns::NAMESPACE, nsid)?;
        let identify = IdentifyNamespace::read_from_bytes(&page)
            .map_err(|_| self.link.protocol("identify namespace has a wrong length"))?;
        if identify.nsze.get() == 0 {
            return Ok(None);
        }
        let mut descriptors = Vec::new();
        if (info.version.mjr(), info.version.mnr()) >= (1, 3) {
            match self.admin.identify_page(Cns::NS_DESCRIPTORS, nsid) {
                Ok(page) => descriptors = ns_descriptors(&page),
                // Without the descriptors another namespace could be taken for the earlier one.
                Err(NvmeError::Status { status, .. }) if status.may_pass() => {
                    return Err(NvmeError::Status {
                        device: self.link.name().to_owned(),
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
            tracing::warn!(
                device = self.link.name(),
                nsid,
                "namespace not usable: {why}"
            );
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

    /// Returns the percentage that is left of a format, added up over the namespaces that report it
    /// (FPI). `None` when none of them does.
    pub fn format_left(&self, nsid: u32) -> Option<u32> {
        let formatted: Vec<u32> = {
            let listed = self.listed.read();
            let reports = |ns: &Namespace| ns.identify.fpi & 0x80 != 0;
            let ids = listed.iter().filter(|(_, ns)| reports(ns));
            ids.map(|(id, _)| *id)
                .filter(|id| nsid == ALL || nsid == *id)
                .collect()
        };
        let left = |id| {
            let page = self.admin.identify_page(Cns::NAMESPACE, id).ok()?;
            let ns = IdentifyNamespace::read_from_bytes(&page).ok()?;
            Some(u32::from(ns.fpi & 0x7f))
        };
        formatted
            .into_iter()
            .filter_map(left)
            .reduce(|all, one| all + one)
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
