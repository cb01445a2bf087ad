//! A blobstore in SPDK's format: blobs of clusters on a block device, thin or thick, with xattrs,
//! snapshots and clones.
//!
//! [`Blobstore`] is the store, [`Blob`] an open blob. Metadata operations block and are durable on
//! return. Those that change different blobs overlap; those of one blob come one after the other.
//! Every change is a batch that is written in an order in which a crash leaves the old or the new
//! state. Data goes over per-thread channels ([`Blobstore::with_channel`]) and takes no lock that
//! threads share.
//!
//! Everything on disk is untrusted: damaged metadata is an error that names the blob and the page,
//! and the other blobs load.

mod alloc;
mod blob;
mod blobs;
mod carried;
mod carry;
mod change;
mod channels;
pub mod check;
mod claims;
mod commit;
#[cfg(test)]
mod cut_tests;
pub(crate) mod data;
pub mod dump;
mod edit;
mod error;
mod extents;
mod external;
pub mod format;
mod gate;
mod geometry;
mod grow;
mod inflate;
mod init;
mod io;
mod journal;
mod lanes;
mod late_writes;
mod lay_out;
mod lifecycle;
mod load;
mod make_journal;
mod masks;
mod mdio;
mod meta;
mod ops;
mod order;
#[cfg(test)]
mod order_tests;
mod pages;
mod remains;
mod repair;
mod replayed;
mod retry;
mod scan;
mod shared;
mod snapshot;
mod space;
mod state;
mod steady;
mod store;
mod super_page;
mod thin;
mod transaction;
mod unload;
mod view;

/// The primitives of [`lanes`] and [`order`]. Their models replace them.
mod sync {
    pub(crate) use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
    pub(crate) use std::thread::{Thread, current, park_timeout};

    pub(crate) use parking_lot::Mutex;
}

pub(crate) use carry::Carrying;
pub(crate) use change::Change;
pub(crate) use commit::BeginCarry;
pub(crate) use error::some as some_lines;
pub(crate) use journal::recovery::LEAST_BYTES as LEAST_JOURNAL_BYTES;
pub(crate) use mdio::{Abilities, Persist};
pub(crate) use space::default_md_pages;

pub use blob::Blob;
pub use error::Error;
pub use extents::ExtentMap;
pub use external::{ExternalOpener, OpenExternal};
pub use format::{BlobId, BsType};
pub use init::InitOptions;
pub use load::LoadOptions;
pub use meta::{ClearMethod, Parent};
pub use ops::{ClusterInit, CreateOptions};
pub use space::{SpacePolicy, Spend};
pub use store::{Blobstore, Usage};
pub use transaction::{BlobRef, Committed, Target, Transaction};
