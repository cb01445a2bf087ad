//! The changes that one batch holds (rule 2).

use std::collections::VecDeque;

use super::super::carried::{Carried, Patch};
use super::super::format::Page;
use super::super::geometry::Geometry;
use super::format::{BATCH_LEN, Image};

/// A change that waits for its batch.
#[derive(Debug)]
pub(super) struct Waiting {
    pub ticket: u64,
    pub pages: Vec<Image>,
    pub carried: Vec<(Carried, Vec<Patch>)>,
    /// Bytes of its records.
    pub bytes: u64,
    pub guard: Option<Box<Page>>,
    pub geo: Geometry,
}

/// Takes the changes of the next batch, in the order of their arrival. It has at most `most` bytes, unless the first change
/// alone has more.
pub(super) fn take_group(waiting: &mut VecDeque<Waiting>, most: u64) -> Vec<Waiting> {
    let mut bytes = BATCH_LEN as u64;
    let mut group = Vec::new();
    while let Some(next) = waiting.front() {
        bytes += next.bytes;
        if bytes > most && !group.is_empty() {
            break;
        }
        group.extend(waiting.pop_front());
    }
    group
}
