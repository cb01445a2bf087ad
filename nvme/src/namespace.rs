//! Namespaces: geometry and limits, ready for use.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use pumice_io::Limits;

use crate::spec::{IdentifyNamespace, NsDescriptor};

/// What a controller can do with a namespace's blocks, from ONCS and VWC.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Supports {
    /// Compare.
    pub compare: bool,
    /// Write zeroes.
    pub write_zeroes: bool,
    /// Dataset management (deallocate).
    pub deallocate: bool,
    /// Verify.
    pub verify: bool,
    /// Copy, descriptor format 0.
    pub copy: bool,
}

/// Limits of one command, in blocks; a request beyond them is split.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CommandLimits {
    /// Namespace.
    pub nsid: u32,
    /// log2 of the block size.
    pub block_shift: u32,
    /// Size of the namespace.
    pub num_blocks: u64,
    /// Blocks of a command with data (MDTS), and what it should not cross (NOIOB).
    pub data: Limits,
    /// Blocks of a write zeroes.
    pub zeroes_blocks: u32,
    /// Blocks of a verify.
    pub verify_blocks: u32,
    /// Blocks of a deallocated range.
    pub deallocate_blocks: u32,
    /// Blocks of all ranges of a deallocate command.
    pub deallocate_total_blocks: u64,
    /// Ranges of a deallocate command.
    pub deallocate_ranges: u32,
    /// Ranges of a copy.
    pub copy_ranges: u32,
    /// Blocks of a copy's range.
    pub copy_range_blocks: u32,
    /// Blocks of a copy.
    pub copy_blocks: u32,
    /// A write zeroes may deallocate, since deallocated blocks read as zeroes (DLFEAT bit 3).
    pub zeroes_may_deallocate: bool,
    /// What there is.
    pub supports: Supports,
    /// The format can be used.
    pub usable: bool,
}

/// A namespace as the driver uses it.
///
/// It is good for queue pairs of its own controller, and for as long as the namespace has the
/// block size that is noted here: with another one the device would transfer more than an I/O's
/// buffer holds. After a format it is to be had anew from the controller.
#[derive(Debug, Clone)]
pub struct Namespace {
    pub(crate) limits: CommandLimits,
    pub(crate) title: Title,
    pub(crate) identify: Box<IdentifyNamespace>,
    pub(crate) descriptors: Vec<NsDescriptor>,
    pub(crate) unusable: Option<String>,
    pub(crate) write_cache: bool,
    pub(crate) atomic_blocks: u32,
    pub(crate) atomic_power_blocks: u32,
}

/// For which controller a namespace's format is known to be the one noted; shared by all
/// handles of the namespace.
#[derive(Debug, Clone)]
pub(crate) struct Title(Arc<AtomicU64>);

impl Title {
    /// Good for the controller of this number, which is not 0.
    pub fn of(controller: u64) -> Title {
        Title(Arc::new(AtomicU64::new(controller)))
    }

    #[inline]
    pub fn is_of(&self, controller: u64) -> bool {
        self.0.load(Ordering::Relaxed) == controller
    }

    /// No I/O is accepted for the handles that share it.
    pub fn withdraw(&self) {
        self.0.store(0, Ordering::SeqCst);
    }

    pub fn is_shared_with(&self, other: &Title) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    pub fn restore(&self, controller: u64) {
        self.0.store(controller, Ordering::SeqCst);
    }
}

impl Namespace {
    /// Whether it is the same namespace, and commands made for the one mean the same bytes on the
    /// other. A number alone is no identity: another namespace may have it by now.
    pub(crate) fn is_same(&self, other: &Namespace) -> bool {
        let format = |n: &Namespace| (n.limits.nsid, n.limits.block_shift, n.limits.usable);
        let ids = |n: &Namespace| (n.identify.nguid, n.identify.eui64, n.uuid());
        let nameless = ids(self) == ([0; 16], [0; 8], [0; 16]);
        // Of one without any name, the size has to do.
        format(self) == format(other)
            && ids(self) == ids(other)
            && (!nameless || self.limits.num_blocks == other.limits.num_blocks)
    }

    /// Namespace identifier.
    pub fn nsid(&self) -> u32 {
        self.limits.nsid
    }

    /// Block size in bytes.
    pub fn block_size(&self) -> u32 {
        1 << self.limits.block_shift
    }

    /// Size in blocks.
    pub fn num_blocks(&self) -> u64 {
        self.limits.num_blocks
    }

    /// Size in bytes.
    pub fn len_bytes(&self) -> u64 {
        self.limits.num_blocks << self.limits.block_shift
    }

    /// Limits of single commands.
    pub fn limits(&self) -> &CommandLimits {
        &self.limits
    }

    /// What there is beside read, write and flush.
    pub fn supports(&self) -> Supports {
        self.limits.supports
    }

    /// Whether the controller has a volatile write cache: then a completed write is durable
    /// only after a flush, or when written with FUA.
    pub fn write_cache(&self) -> bool {
        self.write_cache
    }

    /// Blocks that are written as a whole, whatever happens beside (AWUN, NAWUN).
    pub fn atomic_blocks(&self) -> u32 {
        self.atomic_blocks
    }

    /// Blocks that are written as a whole even when power fails (AWUPF, NAWUPF).
    pub fn atomic_power_blocks(&self) -> u32 {
        self.atomic_power_blocks
    }

    /// Whether deallocated blocks read as zeroes (DLFEAT).
    pub fn deallocated_reads_zero(&self) -> bool {
        self.identify.dlfeat & 7 == 1
    }

    /// Whether Write Zeroes with deallocate is allowed (DLFEAT bit 3).
    pub fn zeroes_may_deallocate(&self) -> bool {
        self.limits.zeroes_may_deallocate
    }

    /// Why I/O on this namespace is refused, if it is: block metadata, a block size out of
    /// range, another command set.
    pub fn unusable(&self) -> Option<&str> {
        self.unusable.as_deref()
    }

    /// The identify structure.
    pub fn identify(&self) -> &IdentifyNamespace {
        &self.identify
    }

    /// The identification descriptors.
    pub fn descriptors(&self) -> &[NsDescriptor] {
        &self.descriptors
    }

    /// The best globally unique name: UUID, NGUID or EUI-64 (in the first eight bytes); zeroes
    /// when the device has none.
    pub fn uuid(&self) -> [u8; 16] {
        for d in &self.descriptors {
            if let NsDescriptor::Uuid(id) = d {
                return *id;
            }
        }
        if self.identify.nguid != [0; 16] {
            return self.identify.nguid;
        }
        let mut id = [0; 16];
        id[..8].copy_from_slice(&self.identify.eui64);
        id
    }
}
