//! Memory that a device can read and write.
//!
//! One arena serves the whole process. It grows by *regions*: shared memory files (memfd) that are
//! mapped once and never unmapped, so a buffer's address stays valid for as long as a device may
//! use it. [`release_free`] gives free pages back to the system while no device has them mapped, and
//! [`join_pages`] makes huge pages of those that are in use. A
//! forked child begins with an arena of its own. Its parent's arena is not mapped there,
//! and dropping a buffer that was the parent's does nothing. Memory that another process can access
//! (a vfio-user controller) is a [`DmaDomain`], never the arena. A buffer is taken from a size
//! class (powers of two from 512 bytes) through a small cache of the calling thread, in tens of
//! nanoseconds and without a shared lock.
//!
//! | type | purpose |
//! | --- | --- |
//! | [`DmaBuf`] | owned bytes: the target of a read, or data being prepared |
//! | [`DmaSlice`] | shared immutable bytes: the data of a write |
//! | [`DmaShared`] | memory that driver and device use at the same time (queues, shadow doorbells), accessed only as atomics |
//! | [`DmaDomain`] | memory for one device only, apart from the arena |
//! | [`DmaMapper`] | a transport, which is told of every region and makes it accessible to its device |
//! | [`AddressTable`] | a transport's table of the device's addresses |
//!
//! Ordinary pages suffice where an IOMMU (or another process) translates. Huge pages are used when
//! [`configure`] asks for them. Only physical addressing without an IOMMU needs them
//! ([`physical_chunks`]).

mod arena;
mod buddy;
mod buf;
mod entries;
mod error;
mod free;
mod limits;
mod mapper;
mod options;
mod phys;
mod region;
mod shared;
#[cfg(test)]
mod tests;

mod sync {
    pub(super) use parking_lot::Mutex;
}

pub use arena::{
    DmaDomain, can_release, configure, join_pages, register_mapper, release_free, stats,
};
pub use buf::{DmaBuf, DmaSlice};
pub use entries::Entries;
pub use error::DmaError;
pub use limits::{Memlock, memlock};
pub use mapper::{AddressTable, DmaMapper, MapperGuard};
pub use options::{ArenaOptions, ArenaStats, HugePages};
pub use phys::physical_chunks;
pub use region::{CHUNK_LEN, Region, RegionId};
pub use shared::DmaShared;
