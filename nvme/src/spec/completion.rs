//! Completion queue entries: Base section 3.3.3.2.

use pumice_io::NvmeStatus;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::status::StatusCodeType;

impl From<Status> for NvmeStatus {
    fn from(status: Status) -> NvmeStatus {
        NvmeStatus(status.0)
    }
}

impl From<NvmeStatus> for Status {
    fn from(status: NvmeStatus) -> Status {
        Status(status.0)
    }
}

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

/// The status field without the phase tag: Base section 3.3.3.2.1 (figure 93).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Status(pub u16);

impl Status {
    /// Success.
    pub const SUCCESS: Status = Status(0);
    /// Do not retry.
    pub const DNR: u16 = 1 << 14;
    /// More information in the error log.
    pub const MORE: u16 = 1 << 13;

    /// Generic: invalid opcode.
    pub const INVALID_OPCODE: Status = Status::of(0, 0x01);
    /// Generic: invalid field.
    pub const INVALID_FIELD: Status = Status::of(0, 0x02);
    /// Generic: command id conflict.
    pub const ID_CONFLICT: Status = Status::of(0, 0x03);
    /// Generic: data transfer error.
    pub const DATA_TRANSFER: Status = Status::of(0, 0x04);
    /// Generic: power loss.
    pub const POWER_LOSS: Status = Status::of(0, 0x05);
    /// Generic: internal error.
    pub const INTERNAL: Status = Status::of(0, 0x06);
    /// Generic: abort requested.
    pub const ABORTED_BY_REQUEST: Status = Status::of(0, 0x07);
    /// Generic: aborted because its queue was deleted.
    pub const ABORTED_SQ_DELETION: Status = Status::of(0, 0x08);
    /// Generic: invalid namespace or format.
    pub const INVALID_NAMESPACE: Status = Status::of(0, 0x0b);
    /// Generic: SGL descriptor type invalid.
    pub const SGL_TYPE: Status = Status::of(0, 0x11);
    /// Generic: data SGL length invalid.
    pub const SGL_LENGTH: Status = Status::of(0, 0x0f);
    /// Generic: PRP offset invalid.
    pub const PRP_OFFSET: Status = Status::of(0, 0x13);
    /// Generic: LBA out of range.
    pub const LBA_OUT_OF_RANGE: Status = Status::of(0, 0x80);
    /// Generic: capacity exceeded.
    pub const CAPACITY_EXCEEDED: Status = Status::of(0, 0x81);
    /// Generic: namespace not ready.
    pub const NAMESPACE_NOT_READY: Status = Status::of(0, 0x82);
    /// Command specific: completion queue invalid.
    pub const CQ_INVALID: Status = Status::of(1, 0x00);
    /// Command specific: invalid queue identifier.
    pub const QID_INVALID: Status = Status::of(1, 0x01);
    /// Command specific: invalid queue size.
    pub const QUEUE_SIZE: Status = Status::of(1, 0x02);
    /// Command specific: abort limit exceeded.
    pub const ABORT_LIMIT: Status = Status::of(1, 0x03);
    /// Command specific: async event request limit.
    pub const AER_LIMIT: Status = Status::of(1, 0x05);
    /// Command specific: invalid interrupt vector.
    pub const INVALID_VECTOR: Status = Status::of(1, 0x08);
    /// Command specific: invalid log page.
    pub const INVALID_LOG_PAGE: Status = Status::of(1, 0x09);
    /// Command specific: invalid format.
    pub const INVALID_FORMAT: Status = Status::of(1, 0x0a);
    /// Command specific: invalid queue deletion.
    pub const QUEUE_DELETION: Status = Status::of(1, 0x0c);
    /// Command specific: feature not saveable.
    pub const FEATURE_NOT_SAVEABLE: Status = Status::of(1, 0x0d);
    /// Command specific: feature not changeable.
    pub const FEATURE_NOT_CHANGEABLE: Status = Status::of(1, 0x0e);
    /// Command specific (NVM): command size limit exceeded.
    pub const SIZE_LIMIT: Status = Status::of(1, 0x83);
    /// Media: write fault.
    pub const WRITE_FAULT: Status = Status::of(2, 0x80);
    /// Media: unrecovered read error.
    pub const UNRECOVERED_READ: Status = Status::of(2, 0x81);
    /// Media: compare failure.
    pub const COMPARE_FAILURE: Status = Status::of(2, 0x85);

    /// Makes a status of a code type and a code, with all other bits zero.
    pub const fn of(sct: u8, sc: u8) -> Status {
        Status(sc as u16 | ((sct & 7) as u16) << 8)
    }

    /// Whether the same command may succeed later: an error without Do Not Retry that the command
    /// itself did not cause.
    pub fn may_pass(self) -> bool {
        let generic_or_path = matches!(self.sct().0, 0 | 3);
        !self.is_success() && !self.do_not_retry() && generic_or_path
    }

    /// Whether the device says that it is not ready yet: a namespace or its medium is not ready, a
    /// format is in progress, or the status names a retry delay (CRD).
    pub fn says_not_ready(self) -> bool {
        let waits = matches!((self.sct().0, self.sc()), (0, 0x82 | 0x84 | 0x24));
        self.may_pass() && (waits || self.crd() != 0)
    }

    /// Returns the status with the Do Not Retry bit set.
    #[must_use]
    pub const fn dnr(self) -> Status {
        Status(self.0 | Status::DNR)
    }

    /// Whether the command succeeded.
    #[inline]
    pub fn is_success(self) -> bool {
        self.0 & 0x7ff == 0
    }

    /// Status code type.
    pub fn sct(self) -> StatusCodeType {
        StatusCodeType((self.0 >> 8 & 7) as u8)
    }

    /// Status code.
    pub fn sc(self) -> u8 {
        (self.0 & 0xff) as u8
    }

    /// Command retry delay: 0 for none, 1 to 3 for an entry of Identify's CRDT.
    pub fn crd(self) -> u8 {
        (self.0 >> 11 & 3) as u8
    }

    /// Whether the error log has more information.
    pub fn more(self) -> bool {
        self.0 & Status::MORE != 0
    }

    /// Whether the command would fail again (Do Not Retry).
    pub fn do_not_retry(self) -> bool {
        self.0 & Status::DNR != 0
    }

    /// The status with its type and code only.
    #[must_use]
    pub fn code(self) -> Status {
        Status(self.0 & 0x7ff)
    }
}
