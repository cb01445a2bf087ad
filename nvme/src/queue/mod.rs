//! Queue pairs.
//!
//! A [`QueuePair`] belongs to one thread at a time (`Send`, not `Sync`). It takes [`Op`]s with
//! a tag, never blocks, and hands them back from [`QueuePair::poll`]; [`QueuePair::wait`] spins
//! for as long as that has paid lately and then sleeps on the queue's interrupt.
//!
//! [`Op`]: pumice_io::Op

mod bounce;
mod build;
mod commands;
mod data;
mod handles;
mod interrupt;
mod lists;
mod observer;
mod options;
mod outgoing;
mod pair;
mod parts;
mod retries;
mod ring;
mod rings;
mod shared;
mod slot;
mod spin;
mod split;
mod stats;
mod watch;

pub use options::QueueOptions;
pub use pair::QueuePair;
pub use stats::QueueStats;

pub(crate) use data::{ListArea, PointerStyle, admin_prp};
pub(crate) use lists::Lists;
pub(crate) use parts::Parts;
pub(crate) use ring::{Bell, CompletionRing, QueueMem, Shadow, SubmissionRing};
pub(crate) use shared::{Bank, QueueShared, Ringing, bank_in, freeze};
