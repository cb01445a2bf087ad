//! Namespaces: geometry and limits, ready for use.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use pumice_io::Limits;

use crate::spec::{IdentifyNamespace, NsDescriptor};

/// The optional commands that a controller supports for a namespace, from ONCS and VWC.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct Supports {
    /// Whether it supports Compare.
    pub compare: bool,
    /// Whether it supports Write Zeroes.
    pub write_zeroes: bool,
    /// Whether it supports Dataset Management (deallocate).
    pub deallocate: bool,
    /// Whether it supports Verify.
    pub verify: bool,
    /// Whether it supports Copy with descriptor format 0.
    pub copy: bool,
}

/// The limits of one command, in blocks. The driver splits requests that exceed them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct CommandLimits {
    /// Namespace identifier.
    pub nsid: u32,
    /// Base-2 logarithm of the block size.
    pub block_shift: u32,
    /// Size of the namespace in blocks.
    pub num_blocks: u64,
    /// Limits of a command with data: most blocks (MDTS), and the boundary that it should not cross
    /// (NOIOB).
    pub data: Limits,
    /// Most blocks of a Write Zeroes.
    pub zeroes_blocks: u32,
    /// Most blocks of a Verify.
    pub verify_blocks: u32,
    /// Most blocks of one deallocated range.
    pub deallocate_blocks: u32,
    /// Most blocks of all ranges of a deallocate command.
    pub deallocate_total_blocks: u64,
    /// Most ranges of a deallocate command.
    pub deallocate_ranges: u32,
    /// Most ranges of a Copy.
    pub copy_ranges: u32,
    /// Most blocks of one range of a Copy.
    pub copy_range_blocks: u32,
    /// Most blocks of a Copy.
    pub copy_blocks: u32,
    /// Whether a Write Zeroes may deallocate because deallocated blocks read as zeroes (DLFEAT bit
    /// 3).
    pub zeroes_may_deallocate: bool,
    /// The optional commands that are supported.
    pub supports: Supports,
    /// Whether the driver can do I/O on blocks of this format.
    pub usable: bool,
}

/// A namespace of an open controller.
///
/// It works with the queue pairs of its own controller only, and for as long as the namespace has
/// the block size that is recorded here: with another one the device would transfer more than an
/// I/O's buffer holds. After a format, ask the controller for the namespace again.
#[derive(Debug, Clone)]
pub struct Namespace {
    pub(crate) limits: CommandLimits,
    pub(crate) validity: FormatValidity,
    pub(crate) identify: Box<IdentifyNamespace>,
    pub(crate) descriptors: Vec<NsDescriptor>,
    pub(crate) unusable: Option<String>,
    pub(crate) write_cache: bool,
    pub(crate) atomic_blocks: u32,
    pub(crate) atomic_power_blocks: u32,
    pub(crate) untorn_blocks: u32,
}

/// The number of the controller for which a namespace's recorded format is known to be current. All
/// handles of the namespace share it.
#[derive(Debug, Clone)]
pub(crate) struct FormatValidity(Arc<AtomicU64>);

impl FormatValidity {
    /// Declares the format current for the controller of this number, which is not 0.
    pub fn of(controller: u64) -> FormatValidity {
        FormatValidity(Arc::new(AtomicU64::new(controller)))
    }

    #[inline]
    pub fn is_of(&self, controller: u64) -> bool {
        self.0.load(Ordering::Relaxed) == controller
    }

    /// Makes every I/O of the handles that share this fail.
    pub fn withdraw(&self) {
        self.0.store(0, Ordering::SeqCst);
    }

    pub fn is_shared_with(&self, other: &FormatValidity) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    pub fn restore(&self, controller: u64) {
        self.0.store(controller, Ordering::SeqCst);
    }

    fn address(&self) -> usize {
        Arc::as_ptr(&self.0).addr()
    }
}

impl Namespace {
    /// Whether both are the same namespace with the same format, so that a command made for one
    /// means the same bytes on the other. The identifier alone does not tell: another namespace may
    /// have it by now.
    pub(crate) fn is_same(&self, other: &Namespace) -> bool {
        let format = |n: &Namespace| (n.limits.nsid, n.limits.block_shift, n.limits.usable);
        let ids = |n: &Namespace| (n.identify.nguid, n.identify.eui64, n.uuid());
        let nameless = ids(self) == ([0; 16], [0; 8], [0; 16]);
        // A namespace without any unique name is compared by its size.
        format(self) == format(other)
            && ids(self) == ids(other)
            && (!nameless || self.limits.num_blocks == other.limits.num_blocks)
    }

    /// Returns a number that all handles of the namespace share, also those of before and after a
    /// rescan, and no other live namespace has.
    pub fn identity(&self) -> usize {
        self.validity.address()
    }

    /// Returns the namespace identifier.
    pub fn nsid(&self) -> u32 {
        self.limits.nsid
    }

    /// Returns the block size in bytes.
    pub fn block_size(&self) -> u32 {
        1 << self.limits.block_shift
    }

    /// Returns the size in blocks.
    pub fn num_blocks(&self) -> u64 {
        self.limits.num_blocks
    }

    /// Returns the size in bytes.
    pub fn len_bytes(&self) -> u64 {
        self.limits.num_blocks << self.limits.block_shift
    }

    /// The limits of single commands.
    pub fn limits(&self) -> &CommandLimits {
        &self.limits
    }

    /// The optional commands that are supported.
    pub fn supports(&self) -> Supports {
        self.limits.supports
    }

    /// Whether the controller has a volatile write cache. If so, a completed write is durable only
    /// after a flush, or when it was written with FUA.
    pub fn write_cache(&self) -> bool {
        self.write_cache
    }

    /// Number of blocks that a write changes as a whole, whatever other commands do (AWUN, NAWUN).
    pub fn atomic_blocks(&self) -> u32 {
        self.atomic_blocks
    }

    /// Number of blocks that a command changes as a whole even when power fails (AWUPF, NAWUPF),
    /// unless it crosses a boundary of the namespace (NABSPF). See also
    /// [`untorn_blocks`](Self::untorn_blocks).
    pub fn atomic_power_blocks(&self) -> u32 {
        self.atomic_power_blocks
    }

    /// The largest power of two such that a power cut tears no write of one buffer that lies within
    /// an aligned group of so many blocks: the driver sends it as one command, and it crosses no
    /// boundary.
    pub fn untorn_blocks(&self) -> u32 {
        self.untorn_blocks
    }

    /// Whether deallocated blocks read as zeroes (DLFEAT).
    pub fn deallocated_reads_zero(&self) -> bool {
        self.identify.dlfeat & 7 == 1
    }

    /// Whether Write Zeroes with deallocate is allowed (DLFEAT bit 3).
    pub fn zeroes_may_deallocate(&self) -> bool {
        self.limits.zeroes_may_deallocate
    }

    /// The reason why I/O on this namespace is refused, if it is: block metadata, an unsupported
    /// block size, or another command set.
    pub fn unusable(&self) -> Option<&str> {
        self.unusable.as_deref()
    }

    /// Returns the identify structure.
    pub fn identify(&self) -> &IdentifyNamespace {
        &self.identify
    }

    /// Returns the identification descriptors.
    pub fn descriptors(&self) -> &[NsDescriptor] {
        &self.descriptors
    }

    /// The device's best globally unique name: UUID, NGUID or EUI-64 (in the first eight bytes).
    /// All zeroes when it has none.
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
