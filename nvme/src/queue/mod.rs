//! Queue pairs.
//!
//! A [`QueuePair`] belongs to one thread at a time (`Send`, not `Sync`). It takes [`Op`]s with
//! a tag, never blocks, and hands them back from [`QueuePair::poll`]; [`QueuePair::wait`] spins
//! for as long as that has paid lately and then sleeps on the queue's interrupt.
//!
//! [`Op`]: pumice_io::Op

mod abort;
mod bounce;
mod build;
mod data;
mod pair;
mod recover;
mod ring;
mod shared;
mod slot;
mod split;
mod stats;
mod trace;
mod wait;

pub use pair::{QueueOptions, QueuePair};
pub use stats::QueueStats;

pub(crate) use data::{ListArea, PointerStyle, admin_prp};
pub(crate) use ring::{Bell, CompletionRing, QueueMem, Shadow, SubmissionRing};
pub(crate) use shared::{Bank, QueueShared, Ringing};
pub(crate) use slot::Slots;
pub(crate) use wait::{Interrupting, Spin};
