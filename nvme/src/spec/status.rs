//! The status of a completion, and the names of status codes: Base figures 93 to 102, NVM figures
//! 17 to 20.

use pumice_io::NvmeStatus;

open_enum! {
    /// Status code type: Base figure 94.
    StatusCodeType: u8 {
        /// Generic command status.
        GENERIC = 0 "generic",
        /// Command specific status.
        COMMAND = 1 "command specific",
        /// Media and data integrity errors.
        MEDIA = 2 "media",
        /// Path related status.
        PATH = 3 "path",
        /// Vendor specific.
        VENDOR = 7 "vendor specific",
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

/// Returns the name of a status, or `None` when the specifications used here do not name it.
pub fn status_name(status: Status) -> Option<&'static str> {
    let name = match (status.sct().0, status.sc()) {
        (0, 0x00) => "SUCCESS",
        (0, 0x01) => "INVALID OPCODE",
        (0, 0x02) => "INVALID FIELD",
        (0, 0x03) => "COMMAND ID CONFLICT",
        (0, 0x04) => "DATA TRANSFER ERROR",
        (0, 0x05) => "ABORTED - POWER LOSS",
        (0, 0x06) => "INTERNAL DEVICE ERROR",
        (0, 0x07) => "ABORTED - BY REQUEST",
        (0, 0x08) => "ABORTED - SQ DELETION",
        (0, 0x09) => "ABORTED - FAILED FUSED",
        (0, 0x0a) => "ABORTED - MISSING FUSED",
        (0, 0x0b) => "INVALID NAMESPACE OR FORMAT",
        (0, 0x0c) => "COMMAND SEQUENCE ERROR",
        (0, 0x0d) => "INVALID SGL SEGMENT DESCRIPTOR",
        (0, 0x0e) => "INVALID NUMBER OF SGL DESCRIPTORS",
        (0, 0x0f) => "DATA SGL LENGTH INVALID",
        (0, 0x10) => "METADATA SGL LENGTH INVALID",
        (0, 0x11) => "SGL DESCRIPTOR TYPE INVALID",
        (0, 0x12) => "INVALID CONTROLLER MEMORY BUFFER",
        (0, 0x13) => "INVALID PRP OFFSET",
        (0, 0x14) => "ATOMIC WRITE UNIT EXCEEDED",
        (0, 0x15) => "OPERATION DENIED",
        (0, 0x16) => "INVALID SGL OFFSET",
        (0, 0x18) => "INCONSISTENT HOST IDENTIFIER",
        (0, 0x19) => "KEEP ALIVE TIMER EXPIRED",
        (0, 0x1a) => "INVALID KEEP ALIVE TIMEOUT",
        (0, 0x1b) => "ABORTED - PREEMPT AND ABORT",
        (0, 0x1c) => "SANITIZE FAILED",
        (0, 0x1d) => "SANITIZE IN PROGRESS",
        (0, 0x1e) => "INVALID SGL DATA BLOCK GRANULARITY",
        (0, 0x1f) => "COMMAND NOT SUPPORTED FOR QUEUE IN CMB",
        (0, 0x20) => "NAMESPACE IS WRITE PROTECTED",
        (0, 0x21) => "COMMAND INTERRUPTED",
        (0, 0x22) => "TRANSIENT TRANSPORT ERROR",
        (0, 0x23) => "COMMAND PROHIBITED BY LOCKDOWN",
        (0, 0x24) => "ADMIN COMMAND MEDIA NOT READY",
        (0, 0x80) => "LBA OUT OF RANGE",
        (0, 0x81) => "CAPACITY EXCEEDED",
        (0, 0x82) => "NAMESPACE NOT READY",
        (0, 0x83) => "RESERVATION CONFLICT",
        (0, 0x84) => "FORMAT IN PROGRESS",
        (1, 0x00) => "INVALID COMPLETION QUEUE",
        (1, 0x01) => "INVALID QUEUE IDENTIFIER",
        (1, 0x02) => "INVALID QUEUE SIZE",
        (1, 0x03) => "ABORT COMMAND LIMIT EXCEEDED",
        (1, 0x05) => "ASYNC EVENT REQUEST LIMIT EXCEEDED",
        (1, 0x06) => "INVALID FIRMWARE SLOT",
        (1, 0x07) => "INVALID FIRMWARE IMAGE",
        (1, 0x08) => "INVALID INTERRUPT VECTOR",
        (1, 0x09) => "INVALID LOG PAGE",
        (1, 0x0a) => "INVALID FORMAT",
        (1, 0x0b) => "FIRMWARE REQUIRES CONVENTIONAL RESET",
        (1, 0x0c) => "INVALID QUEUE DELETION",
        (1, 0x0d) => "FEATURE ID NOT SAVEABLE",
        (1, 0x0e) => "FEATURE NOT CHANGEABLE",
        (1, 0x0f) => "FEATURE NOT NAMESPACE SPECIFIC",
        (1, 0x10) => "FIRMWARE REQUIRES SUBSYSTEM RESET",
        (1, 0x11) => "FIRMWARE REQUIRES CONTROLLER RESET",
        (1, 0x12) => "FIRMWARE REQUIRES MAXIMUM TIME VIOLATION",
        (1, 0x13) => "FIRMWARE ACTIVATION PROHIBITED",
        (1, 0x14) => "OVERLAPPING RANGE",
        (1, 0x15) => "NAMESPACE INSUFFICIENT CAPACITY",
        (1, 0x16) => "NAMESPACE ID UNAVAILABLE",
        (1, 0x18) => "NAMESPACE ALREADY ATTACHED",
        (1, 0x19) => "NAMESPACE IS PRIVATE",
        (1, 0x1a) => "NAMESPACE NOT ATTACHED",
        (1, 0x1b) => "THIN PROVISIONING NOT SUPPORTED",
        (1, 0x1c) => "CONTROLLER LIST INVALID",
        (1, 0x1d) => "DEVICE SELF-TEST IN PROGRESS",
        (1, 0x1e) => "BOOT PARTITION WRITE PROHIBITED",
        (1, 0x1f) => "INVALID CONTROLLER IDENTIFIER",
        (1, 0x20) => "INVALID SECONDARY CONTROLLER STATE",
        (1, 0x21) => "INVALID NUMBER OF CONTROLLER RESOURCES",
        (1, 0x22) => "INVALID RESOURCE IDENTIFIER",
        (1, 0x80) => "CONFLICTING ATTRIBUTES",
        (1, 0x81) => "INVALID PROTECTION INFORMATION",
        (1, 0x82) => "WRITE TO READ ONLY RANGE",
        (1, 0x83) => "COMMAND SIZE LIMIT EXCEEDED",
        (2, 0x80) => "WRITE FAULTS",
        (2, 0x81) => "UNRECOVERED READ ERROR",
        (2, 0x82) => "GUARD CHECK ERROR",
        (2, 0x83) => "APPLICATION TAG CHECK ERROR",
        (2, 0x84) => "REFERENCE TAG CHECK ERROR",
        (2, 0x85) => "COMPARE FAILURE",
        (2, 0x86) => "ACCESS DENIED",
        (2, 0x87) => "DEALLOCATED OR UNWRITTEN BLOCK",
        (2, 0x88) => "STORAGE TAG CHECK ERROR",
        (3, 0x00) => "INTERNAL PATH ERROR",
        (3, 0x01) => "ASYMMETRIC ACCESS PERSISTENT LOSS",
        (3, 0x02) => "ASYMMETRIC ACCESS INACCESSIBLE",
        (3, 0x03) => "ASYMMETRIC ACCESS TRANSITION",
        (3, 0x60) => "CONTROLLER PATHING ERROR",
        (3, 0x70) => "HOST PATHING ERROR",
        (3, 0x71) => "ABORTED BY HOST",
        _ => return None,
    };
    Some(name)
}
