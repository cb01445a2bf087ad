//! Completion queue entries: Base section 3.3.3.2.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::status::Status;

/// A completion queue entry (Base figure 90).
#[derive(Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Completion {
    /// Command specific result.
    pub dw0: u32,
    /// Command specific result.
    pub dw1: u32,
    /// Submission queue head.
    pub sq_head: u16,
    /// Submission queue identifier.
    pub sq_id: u16,
    /// Command identifier.
    pub cid: u16,
    /// Phase tag (bit 0) and status (bits 15:1).
    pub status_phase: u16,
}

const _: () = assert!(size_of::<Completion>() == 16);

impl Completion {
    /// The phase tag.
    #[inline]
    pub fn phase(&self) -> bool {
        self.status_phase & 1 != 0
    }

    /// The status field.
    #[inline]
    pub fn status(&self) -> Status {
        Status(self.status_phase >> 1)
    }

    /// Makes an entry from the words of queue memory.
    #[inline]
    pub fn from_words(words: [u64; 2]) -> Completion {
        zerocopy::transmute!(words)
    }

    /// The entry as words, as queue memory holds it.
    #[inline]
    pub fn words(self) -> [u64; 2] {
        zerocopy::transmute!(self)
    }
}
