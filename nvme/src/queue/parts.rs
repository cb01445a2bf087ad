//! What a queue pair is made of.

use std::sync::Arc;

use super::data::PointerStyle;
use super::lists::Lists;
use super::ring::{CompletionRing, SubmissionRing};
use super::shared::QueueShared;

/// The parts that a queue pair is made of.
#[derive(Debug)]
pub(crate) struct Parts {
    pub shared: Arc<QueueShared>,
    /// The controller's state word for which the rings are valid.
    pub word: u64,
    pub sq: SubmissionRing,
    pub cq: CompletionRing,
    pub lists: Lists,
    pub style: PointerStyle,
}
