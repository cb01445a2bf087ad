//! `nvme`: namespaces of NVMe controllers, over PCIe (VFIO, uio), vfio-user or the soft controller.
//! `Nvme0n1` is namespace 1 of the controller called `Nvme0`.
//!
//! Each channel has a queue pair. If a controller has fewer queue pairs than there are channels,
//! the channels that were opened last share one, behind a lock.

mod channel;
mod shared;
#[cfg(test)]
mod tests;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};

use parking_lot::Mutex;
use pumice_io::process::{Birth, PerProcess};
use pumice_io::uri::Uri;
use pumice_io::{IoError, Op, OpKind, OpSet};
use pumice_nvme::spec::IdentifyController;
use pumice_nvme::transport::{NvmeUri, TransportError};
use pumice_nvme::{Controller, Namespace, NvmeError, QueueOptions};
use serde_json::{Value, json};

use crate::device::{BlockDevice, DeviceInfo, IoChannel};
use crate::error::BdevError;
use crate::flush_fault::FlushFault;
use crate::module::{Call, Module};
use channel::NvmeChannel;
use shared::{SharedChannel, SharedQueue};

/// A namespace of a controller.
#[derive(Debug)]
pub struct Nvme {
    info: Arc<DeviceInfo>,
    flush_fault: Arc<FlushFault>,
    queues: Arc<Queues>,
    namespace: Arc<Namespace>,
    uri: String,
}

/// The queue pairs of a controller that its block devices use.
#[derive(Debug)]
struct Queues {
    controller: Arc<Controller>,
    state: Mutex<QueueState>,
    birth: Birth,
}

#[derive(Debug, Default)]
struct QueueState {
    /// Number of queue pairs that belong to one channel.
    exclusive: usize,
    /// The queue pair of the channels that share one, while there are any.
    shared: Option<Arc<SharedQueue>>,
    sharers: usize,
}

/// The namespace on which a channel does I/O.
struct Target {
    info: Arc<DeviceInfo>,
    ns: Arc<Namespace>,
    flush_fault: Arc<FlushFault>,
}

impl Target {
    /// Checks an operation before it is accepted.
    fn check(&self, op: &Op) -> Result<(), Box<IoError>> {
        self.info.check(op)?;
        self.flush_fault.check(&self.info, op)
    }
}

/// A counted queue pair. Dropping this reduces the count.
#[derive(Debug)]
struct Place(Arc<Queues>);

impl Drop for Place {
    fn drop(&mut self) {
        if self.0.birth.is_here() {
            self.0.state.lock().exclusive -= 1;
        }
    }
}

/// A channel's reference to the shared queue pair. The last one deletes it, under the lock under
/// which the next channel would ask the controller for one.
#[derive(Debug)]
struct Share(Arc<Queues>);

impl Drop for Share {
    fn drop(&mut self) {
        // In a forked child the count is the parent's, and its lock may be held by a thread that
        // the child does not have.
        if !self.0.birth.is_here() {
            return;
        }
        let mut state = self.0.state.lock();
        state.sharers -= 1;
        if state.sharers == 0 {
            state.shared = None;
        }
    }
}

impl Queues {
    /// Returns the queue pairs of this controller. All devices of a controller share
    /// one count.
    fn of(controller: &Arc<Controller>) -> Arc<Queues> {
        static ALL: PerProcess<Mutex<Vec<Weak<Queues>>>> = PerProcess::new(Mutex::default);
        let mut all = ALL.get().lock();
        all.retain(|queues| queues.strong_count() > 0);
        let mut known = all.iter().filter_map(Weak::upgrade);
        if let Some(queues) = known.find(|q| Arc::ptr_eq(&q.controller, controller)) {
            return queues;
        }
        let queues = Arc::new(Queues {
            controller: Arc::clone(controller),
            state: Mutex::default(),
            birth: Birth::now(),
        });
        all.push(Arc::downgrade(&queues));
        queues
    }
}

impl From<NvmeError> for BdevError {
    fn from(e: NvmeError) -> BdevError {
        match e {
            NvmeError::Removed { device }
            | NvmeError::Transport(TransportError::Removed { device }) => {
                BdevError::Removed { name: device }
            }
            NvmeError::Transport(TransportError::Uri { uri, detail }) => BdevError::InvalidUri {
                uri,
                reason: detail,
            },
            NvmeError::Unsupported { device, what }
            | NvmeError::Transport(TransportError::Unsupported { device, what }) => {
                BdevError::Unsupported {
                    device,
                    reason: what,
                }
            }
            NvmeError::Transport(TransportError::NotFound { device, what }) => {
                BdevError::NoSuchFile {
                    path: device.into(),
                    hint: what,
                }
            }
            NvmeError::Transport(TransportError::InUse {
                device,
                detail,
                pid,
            }) => {
                tracing::warn!(device, "in use: {detail}");
                BdevError::InUse { device, pid }
            }
            NvmeError::Transport(TransportError::Io {
                device,
                what,
                source,
            }) => BdevError::Os {
                device,
                what,
                source,
            },
            NvmeError::Dma(source) | NvmeError::Transport(TransportError::Dma(source)) => {
                BdevError::Dma {
                    device: "nvme".to_owned(),
                    source,
                }
            }
            source => BdevError::Nvme { source },
        }
    }
}

/// Opens the controller that a URI names and makes a device of each usable namespace (or of the one
/// that the URI names), called `base`, `n` and the namespace's number. Blocks for bring-up.
///
/// # Errors
/// Fails with the driver's errors, and for a controller without a usable namespace.
pub fn attach(base: &str, uri: &str) -> Result<(Arc<Controller>, Vec<Arc<Nvme>>), BdevError> {
    let opened = pumice_nvme_soft::open(uri)?;
    let namespaces = match opened.nsid {
        Some(_) => vec![opened.namespace()?],
        None => opened.controller.namespaces(),
    };
    let devices = devices(base, &opened.controller, namespaces, uri)?;
    Ok((opened.controller, devices))
}

/// Makes a device of each usable namespace among `namespaces` of an open controller. The devices
/// report `uri` as their address.
///
/// # Errors
/// Fails when no namespace is usable.
pub fn devices(
    base: &str,
    controller: &Arc<Controller>,
    namespaces: Vec<Arc<Namespace>>,
    uri: &str,
) -> Result<Vec<Arc<Nvme>>, BdevError> {
    let queues = Queues::of(controller);
    let mut devices = Vec::new();
    let mut reasons = Vec::new();
    for namespace in namespaces {
        match namespace.unusable() {
            Some(why) => {
                tracing::warn!(
                    bdev = base,
                    nsid = namespace.nsid(),
                    why,
                    "namespace left out"
                );
                reasons.push(format!("namespace {}: {why}", namespace.nsid()));
            }
            None => devices.push(Arc::new(Nvme::new(base, &queues, namespace, uri)?)),
        }
    }
    if devices.is_empty() {
        let reason = match reasons.is_empty() {
            true => "the controller has no active namespace".to_owned(),
            false => reasons.join("; "),
        };
        return Err(BdevError::Unsupported {
            device: uri.to_owned(),
            reason,
        });
    }
    Ok(devices)
}

/// Returns the options of a channel's queue pair.
fn queue_options(controller: &Controller) -> QueueOptions {
    let mut options = QueueOptions::default();
    // A controller in another process would make a system call for each completion, whether anybody
    // sleeps or not, and answers in microseconds.
    options.interrupt = !controller.interrupts_are_messages();
    options
}

/// Opens devices by URI.
pub(crate) static MODULE: Module = Module {
    examples: &[
        "nvme://0000:5e:00.0",
        "vfio-user:///path/to/socket",
        "soft://memory",
    ],
    open: |uri, options| {
        // The soft controller can create an image file.
        open_uri(&match options.is_read_only() {
            true => uri.without("create"),
            false => uri.to_string(),
        })
    },
    call,
};

/// The call of a configuration that attaches the controller again, with all its namespaces.
fn call(uri: &mut Uri, info: &DeviceInfo) -> Option<Call> {
    let (trtype, traddr) = address(&uri.to_string());
    // The names are made again from the first part of this one.
    let base = info.name.rsplit_once('n').map_or("", |(base, _)| base);
    let params = json!({ "name": base, "trtype": trtype, "traddr": traddr });
    Some(("bdev_nvme_attach_controller", params))
}

/// Opens one namespace by URI: the one that it names, or the only one.
fn open_uri(uri: &str) -> Result<Arc<dyn BlockDevice>, BdevError> {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let opened = pumice_nvme_soft::open(uri)?;
    let namespace = opened.namespace()?;
    if let Some(why) = namespace.unusable() {
        return Err(BdevError::Unsupported {
            device: uri.to_owned(),
            reason: why.to_owned(),
        });
    }
    let queues = Queues::of(&opened.controller);
    let base = format!("Nvme{}", NEXT.fetch_add(1, Ordering::Relaxed));
    Ok(Arc::new(Nvme::new(&base, &queues, namespace, uri)?))
}

impl Nvme {
    fn new(
        base: &str,
        queues: &Arc<Queues>,
        namespace: Arc<Namespace>,
        uri: &str,
    ) -> Result<Nvme, BdevError> {
        let name = format!("{base}n{}", namespace.nsid());
        let (bs, blocks) = (namespace.block_size(), namespace.num_blocks());
        crate::malloc::check_geometry(&name, bs, blocks)?;
        let mut info = DeviceInfo::new(&name, "nvme", bs, blocks);
        let identify = queues.controller.identify()?;
        let model = String::from_utf8_lossy(&identify.mn).trim().to_owned();
        info.product = if model.is_empty() {
            "NVMe disk".to_owned()
        } else {
            model
        };
        info.uuid = namespace.uuid();
        if info.uuid == [0; 16] {
            let serial = String::from_utf8_lossy(&identify.sn);
            info.uuid = crate::uuid::derived(format!("{serial}/{}", namespace.nsid()).as_bytes());
        }
        info.write_cache = namespace.write_cache();
        info.atomic_unit_blocks = namespace.untorn_blocks();
        // The driver cuts what is longer than a command.
        info.limits.boundary_blocks = namespace.limits().data.boundary_blocks;
        info.buf_align = 4;
        let supports = namespace.supports();
        info.unmap_zeroes = namespace.deallocated_reads_zero();
        info.ops = OpSet::NONE
            .with(OpKind::Read)
            .with(OpKind::Write)
            .with(OpKind::Fua)
            .with(OpKind::Flush)
            .with(OpKind::Abort)
            .with(OpKind::Reset);
        for (kind, there) in [
            (OpKind::WriteZeroes, supports.write_zeroes),
            (OpKind::Unmap, supports.deallocate),
            (OpKind::Compare, supports.compare),
            (OpKind::Copy, supports.copy),
        ] {
            if there {
                info.ops = info.ops.with(kind);
            }
        }
        let (queues, uri) = (Arc::clone(queues), uri.to_owned());
        Ok(Nvme {
            info: Arc::new(info),
            flush_fault: Arc::default(),
            queues,
            namespace,
            uri,
        })
    }

    /// The controller.
    pub fn controller(&self) -> &Arc<Controller> {
        &self.queues.controller
    }

    /// The namespace.
    pub fn namespace(&self) -> &Arc<Namespace> {
        &self.namespace
    }
}

impl BlockDevice for Nvme {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn own_channels(&self) -> Option<usize> {
        // The last queue pair is the one that is shared.
        Some(usize::from(self.queues.controller.queue_limit()).saturating_sub(1))
    }

    /// The serial number and the namespace of a device that is there without this process.
    fn host_name(&self) -> Option<String> {
        let lasts = ["nvme:", "vfio-user:"];
        let identify = self.queues.controller.identify().ok()?;
        let serial = String::from_utf8_lossy(&identify.sn).trim().to_owned();
        let is_named =
            !serial.is_empty() && lasts.iter().any(|scheme| self.uri.starts_with(scheme));
        let plain = |c: char| if c.is_ascii_alphanumeric() { c } else { '_' };
        let serial: String = serial.chars().map(plain).collect();
        is_named.then(|| format!("nvme-{serial}-{}", self.namespace.nsid()))
    }

    /// Openings of one namespace are one device.
    fn identity(&self) -> usize {
        self.namespace.identity()
    }

    fn open_channel(&self) -> Result<Box<dyn IoChannel>, BdevError> {
        let what = Target {
            info: Arc::clone(&self.info),
            ns: Arc::clone(&self.namespace),
            flush_fault: Arc::clone(&self.flush_fault),
        };
        let controller = &self.queues.controller;
        self.info.still_here()?;
        let limit = usize::from(controller.queue_limit());
        let mut state = self.queues.state.lock();
        // The last queue pair is kept for sharing. If there is only one, all channels share it.
        if state.exclusive + 1 < limit {
            match controller.queue_pair(&queue_options(controller)) {
                Ok(pair) => {
                    state.exclusive += 1;
                    drop(state);
                    let place = Place(Arc::clone(&self.queues));
                    return Ok(Box::new(NvmeChannel::new(what, pair, place)));
                }
                Err(NvmeError::NoQueues { .. }) => {}
                Err(e) => return Err(e.into()),
            }
        }
        let shared = match &state.shared {
            Some(shared) => Arc::clone(shared),
            None => {
                let pair = controller.queue_pair(&queue_options(controller))?;
                let shared = Arc::new(SharedQueue::new(pair));
                state.shared = Some(Arc::clone(&shared));
                let bdev = &self.info.name;
                tracing::info!(
                    bdev,
                    limit,
                    "channels share the controller's last queue pair"
                );
                shared
            }
        };
        state.sharers += 1;
        drop(state);
        let share = Share(Arc::clone(&self.queues));
        Ok(Box::new(SharedChannel::new(what, shared, share)))
    }

    fn driver_specific(&self) -> Value {
        let c = &self.queues.controller;
        let (trtype, traddr) = address(&self.uri);
        let mut path = json!({
            "trid": { "trtype": trtype, "traddr": traddr },
            "ns_data": {
                "id": self.namespace.nsid(),
                // NMIC bit 0 (NVM Command Set Specification, figure 97).
                "can_share": self.namespace.identify().nmic & 1 != 0,
            },
            "queue_pairs_max": c.queue_limit(),
        });
        if let (Ok(identify), Value::Object(map)) = (c.identify(), &mut path) {
            if trtype == "PCIe" {
                map.insert("pci_address".to_owned(), json!(traddr));
            }
            map.insert("ctrlr_data".to_owned(), controller_data(&identify));
            let version = identify.ver.get();
            let version = format!("{}.{}", version >> 16, version >> 8 & 0xff);
            map.insert("vs".to_owned(), json!({ "nvme_version": version }));
        }
        json!({ "nvme": [path], "mp_policy": "active_passive" })
    }
}

/// Returns the transport and the address of a URI in SPDK's terms.
fn address(uri: &str) -> (&'static str, String) {
    let Ok(parsed) = NvmeUri::parse(uri) else {
        return ("SOFT", uri.to_owned());
    };
    match parsed.scheme() {
        "nvme" => ("PCIe", parsed.address),
        "vfio-user" => ("VFIOUSER", parsed.address),
        _ => ("SOFT", parsed.options().tail().to_owned()),
    }
}

fn controller_data(identify: &IdentifyController) -> Value {
    let text = |bytes: &[u8]| {
        let text = String::from_utf8_lossy(bytes);
        text.trim_matches(['\0', ' ']).to_owned()
    };
    let oacs = |bit: u16| identify.oacs.get() >> bit & 1;
    json!({
        "cntlid": identify.cntlid.get(),
        "vendor_id": format!("{:#06x}", identify.vid.get()),
        "model_number": text(&identify.mn),
        "serial_number": text(&identify.sn),
        "firmware_revision": text(&identify.fr),
        "subnqn": text(&identify.subnqn),
        "oacs": {
            "security": oacs(0),
            "format": oacs(1),
            "firmware": oacs(2),
            "ns_manage": oacs(3),
        },
        "multi_ctrlr": identify.cmic & 2 != 0,
        "ana_reporting": identify.cmic & 8 != 0,
    })
}
