//! Submission queue entries: Base section 3.3.3.1 (figure 86 and following).

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::feature::FeatureId;
use super::log::LogPage;
use super::sgl::SglDescriptor;

open_enum! {
    /// Opcodes of admin commands: Base section 5 (figure 138).
    AdminOpcode: u8 {
        /// Delete I/O submission queue.
        DELETE_SQ = 0x00 "DELETE IO SQ",
        /// Create I/O submission queue.
        CREATE_SQ = 0x01 "CREATE IO SQ",
        /// Get log page.
        GET_LOG_PAGE = 0x02 "GET LOG PAGE",
        /// Delete I/O completion queue.
        DELETE_CQ = 0x04 "DELETE IO CQ",
        /// Create I/O completion queue.
        CREATE_CQ = 0x05 "CREATE IO CQ",
        /// Identify.
        IDENTIFY = 0x06 "IDENTIFY",
        /// Abort.
        ABORT = 0x08 "ABORT",
        /// Set features.
        SET_FEATURES = 0x09 "SET FEATURES",
        /// Get features.
        GET_FEATURES = 0x0a "GET FEATURES",
        /// Asynchronous event request.
        ASYNC_EVENT_REQUEST = 0x0c "ASYNC EVENT REQUEST",
        /// Namespace management.
        NS_MANAGEMENT = 0x0d "NAMESPACE MANAGEMENT",
        /// Firmware commit.
        FIRMWARE_COMMIT = 0x10 "FIRMWARE COMMIT",
        /// Firmware image download.
        FIRMWARE_DOWNLOAD = 0x11 "FIRMWARE IMAGE DOWNLOAD",
        /// Device self-test.
        DEVICE_SELF_TEST = 0x14 "DEVICE SELF-TEST",
        /// Namespace attachment.
        NS_ATTACHMENT = 0x15 "NAMESPACE ATTACHMENT",
        /// Keep alive.
        KEEP_ALIVE = 0x18 "KEEP ALIVE",
        /// Directive send.
        DIRECTIVE_SEND = 0x19 "DIRECTIVE SEND",
        /// Directive receive.
        DIRECTIVE_RECEIVE = 0x1a "DIRECTIVE RECEIVE",
        /// Virtualization management.
        VIRTUALIZATION = 0x1c "VIRTUALIZATION MANAGEMENT",
        /// Doorbell buffer config (shadow doorbells).
        DOORBELL_BUFFER_CONFIG = 0x7c "DOORBELL BUFFER CONFIG",
        /// Format NVM.
        FORMAT_NVM = 0x80 "FORMAT NVM",
        /// Security send.
        SECURITY_SEND = 0x81 "SECURITY SEND",
        /// Security receive.
        SECURITY_RECEIVE = 0x82 "SECURITY RECEIVE",
        /// Sanitize.
        SANITIZE = 0x84 "SANITIZE",
    }
}

open_enum! {
    /// Opcodes of the NVM command set: NVM section 3 (figure 26).
    IoOpcode: u8 {
        /// Flush (Base section 7.1).
        FLUSH = 0x00 "FLUSH",
        /// Write.
        WRITE = 0x01 "WRITE",
        /// Read.
        READ = 0x02 "READ",
        /// Write uncorrectable.
        WRITE_UNCORRECTABLE = 0x04 "WRITE UNCORRECTABLE",
        /// Compare.
        COMPARE = 0x05 "COMPARE",
        /// Write zeroes.
        WRITE_ZEROES = 0x08 "WRITE ZEROES",
        /// Dataset management.
        DATASET_MANAGEMENT = 0x09 "DATASET MANAGEMENT",
        /// Verify.
        VERIFY = 0x0c "VERIFY",
        /// Reservation register.
        RESERVATION_REGISTER = 0x0d "RESERVATION REGISTER",
        /// Reservation report.
        RESERVATION_REPORT = 0x0e "RESERVATION REPORT",
        /// Reservation acquire.
        RESERVATION_ACQUIRE = 0x11 "RESERVATION ACQUIRE",
        /// Reservation release.
        RESERVATION_RELEASE = 0x15 "RESERVATION RELEASE",
        /// Copy.
        COPY = 0x19 "COPY",
    }
}

/// An opcode of an admin or an I/O queue, for errors and logs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Opcode {
    /// An opcode of the admin queue.
    Admin(AdminOpcode),
    /// An opcode of an I/O queue.
    Io(IoOpcode),
}

impl std::fmt::Display for Opcode {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Opcode::Admin(op) => op.fmt(f),
            Opcode::Io(op) => op.fmt(f),
        }
    }
}

open_enum! {
    /// The data structure that Identify returns: Base section 5.17.1 (figure 273).
    Cns: u8 {
        /// Identify namespace structure.
        NAMESPACE = 0x00 "namespace",
        /// Identify controller structure.
        CONTROLLER = 0x01 "controller",
        /// Active namespace list.
        ACTIVE_NAMESPACES = 0x02 "active namespace list",
        /// Namespace identification descriptors.
        NS_DESCRIPTORS = 0x03 "namespace identification descriptors",
        /// Namespace structure of a command set.
        CSI_NAMESPACE = 0x05 "command set namespace",
        /// Controller structure of a command set.
        CSI_CONTROLLER = 0x06 "command set controller",
        /// Allocated namespace list.
        ALLOCATED_NAMESPACES = 0x10 "allocated namespace list",
        /// Controller list.
        CONTROLLERS = 0x13 "controller list",
    }
}

open_enum! {
    /// A submission queue's class under weighted round robin: Base section 5.5 (figure 156).
    QueuePriority: u8 {
        /// Served before every other class but the admin queue.
        URGENT = 0 "urgent",
        /// High weight.
        HIGH = 1 "high",
        /// Medium weight.
        MEDIUM = 2 "medium",
        /// Low weight.
        LOW = 3 "low",
    }
}

/// Control bits of reads and writes, in command dword 12 (NVM figures 33 and 63).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct IoFlags(pub u32);

impl IoFlags {
    /// No control bits.
    pub const NONE: IoFlags = IoFlags(0);
    /// Force unit access: durable (write) or from the medium (read).
    pub const FUA: IoFlags = IoFlags(1 << 30);
    /// Limited retry: the device tries less hard.
    pub const LIMITED_RETRY: IoFlags = IoFlags(1 << 31);
    /// Deallocate (write zeroes only).
    pub const DEALLOCATE: IoFlags = IoFlags(1 << 25);

    /// Returns the bits of both.
    #[must_use]
    pub const fn with(self, other: IoFlags) -> IoFlags {
        IoFlags(self.0 | other.0)
    }

    /// Returns `FUA` if `on`, otherwise `NONE`.
    #[inline]
    pub const fn fua(on: bool) -> IoFlags {
        IoFlags((on as u32) << 30)
    }
}

/// A submission queue entry.
#[derive(Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Command {
    /// Opcode, see [`AdminOpcode`] and [`IoOpcode`].
    pub opcode: u8,
    /// Fused operation (bits 1:0), PRP or SGL (bits 7:6).
    pub flags: u8,
    /// Command identifier; the queue pair sets it.
    pub cid: u16,
    /// Namespace identifier.
    pub nsid: u32,
    /// Dword 2.
    pub cdw2: u32,
    /// Dword 3.
    pub cdw3: u32,
    /// Metadata pointer.
    pub mptr: u64,
    /// Data pointer: PRP 1, or the first half of an SGL descriptor.
    pub prp1: u64,
    /// Data pointer: PRP 2, or the second half of an SGL descriptor.
    pub prp2: u64,
    /// Dword 10.
    pub cdw10: u32,
    /// Dword 11.
    pub cdw11: u32,
    /// Dword 12.
    pub cdw12: u32,
    /// Dword 13.
    pub cdw13: u32,
    /// Dword 14.
    pub cdw14: u32,
    /// Dword 15.
    pub cdw15: u32,
}

const _: () = assert!(size_of::<Command>() == 64);

impl Command {
    /// `flags`: the data pointer is an SGL descriptor (PSDT = 01b).
    pub const SGL: u8 = 1 << 6;

    /// Makes a command with this opcode and namespace and zeroes in all other fields.
    #[inline]
    pub fn new(opcode: u8, nsid: u32) -> Command {
        Command {
            opcode,
            nsid,
            ..Command::default()
        }
    }

    /// The entry as words, as queue memory holds it.
    #[inline]
    pub fn words(self) -> [u64; 8] {
        zerocopy::transmute!(self)
    }

    /// Makes an entry from the words of queue memory.
    #[inline]
    pub fn from_words(words: [u64; 8]) -> Command {
        zerocopy::transmute!(words)
    }

    /// Starting LBA: dwords 10 and 11.
    #[inline]
    pub fn lba(&self) -> u64 {
        u64::from(self.cdw10) | u64::from(self.cdw11) << 32
    }

    /// Sets the starting LBA.
    #[inline]
    pub fn set_lba(&mut self, lba: u64) {
        #[expect(clippy::cast_possible_truncation, reason = "the two halves of 64 bits")]
        {
            self.cdw10 = lba as u32;
            self.cdw11 = (lba >> 32) as u32;
        }
    }

    /// Number of blocks of a read, write, compare, write zeroes or verify.
    #[inline]
    pub fn blocks(&self) -> u32 {
        (self.cdw12 & 0xffff) + 1
    }

    /// The data pointer as an SGL descriptor.
    pub fn sgl(&self) -> SglDescriptor {
        let words = [self.prp1, self.prp2];
        zerocopy::transmute!(words)
    }

    /// Sets the data pointer to an SGL descriptor.
    #[inline]
    pub fn set_sgl(&mut self, descriptor: &SglDescriptor) {
        [self.prp1, self.prp2] = descriptor.words();
        self.flags |= Command::SGL;
    }

    /// Makes a Read, Write, Compare, Write Zeroes or Verify of `blocks` (1 to 65536) from `lba`.
    #[inline]
    pub fn blocks_io(op: IoOpcode, nsid: u32, lba: u64, blocks: u32, flags: IoFlags) -> Command {
        debug_assert!((1..=65_536).contains(&blocks));
        let mut c = Command::new(op.0, nsid);
        c.set_lba(lba);
        c.cdw12 = (blocks.wrapping_sub(1) & 0xffff) | flags.0;
        c
    }

    /// Makes a Flush: Base section 7.1.
    pub fn flush(nsid: u32) -> Command {
        Command::new(IoOpcode::FLUSH.0, nsid)
    }

    /// Makes a Dataset Management command that deallocates the `ranges` (1 to 256) in its data: NVM
    /// section 3.2.3.
    pub fn deallocate(nsid: u32, ranges: u32) -> Command {
        debug_assert!((1..=256).contains(&ranges));
        let mut c = Command::new(IoOpcode::DATASET_MANAGEMENT.0, nsid);
        c.cdw10 = ranges.wrapping_sub(1) & 0xff;
        c.cdw11 = 1 << 2;
        c
    }

    /// Makes a Copy of the `ranges` (1 to 256, format 0) in its data to `lba`: NVM section 3.2.2.
    pub fn copy(nsid: u32, lba: u64, ranges: u32, flags: IoFlags) -> Command {
        debug_assert!((1..=256).contains(&ranges));
        let mut c = Command::new(IoOpcode::COPY.0, nsid);
        c.set_lba(lba);
        c.cdw12 = (ranges.wrapping_sub(1) & 0xff) | flags.0;
        c
    }

    /// Makes an Identify: Base section 5.17.
    pub fn identify(cns: Cns, nsid: u32) -> Command {
        let mut c = Command::new(AdminOpcode::IDENTIFY.0, nsid);
        c.cdw10 = u32::from(cns.0);
        c
    }

    /// Makes a Get Log Page of `len` bytes (a multiple of 4) from `offset`: Base section 5.16.
    pub fn get_log(page: LogPage, nsid: u32, offset: u64, len: u32, retain: bool) -> Command {
        let mut c = Command::new(AdminOpcode::GET_LOG_PAGE.0, nsid);
        let dwords_z = (len / 4).wrapping_sub(1);
        c.cdw10 = u32::from(page.0) | u32::from(retain) << 15 | (dwords_z & 0xffff) << 16;
        c.cdw11 = dwords_z >> 16;
        #[expect(clippy::cast_possible_truncation, reason = "the two halves of 64 bits")]
        {
            c.cdw12 = offset as u32;
            c.cdw13 = (offset >> 32) as u32;
        }
        c
    }

    /// Makes a Get Features of the current value: Base section 5.15.
    pub fn get_feature(feature: FeatureId, nsid: u32) -> Command {
        let mut c = Command::new(AdminOpcode::GET_FEATURES.0, nsid);
        c.cdw10 = u32::from(feature.0);
        c
    }

    /// Makes a Set Features: Base section 5.27.
    pub fn set_feature(feature: FeatureId, nsid: u32, value: u32, save: bool) -> Command {
        let mut c = Command::new(AdminOpcode::SET_FEATURES.0, nsid);
        c.cdw10 = u32::from(feature.0) | u32::from(save) << 31;
        c.cdw11 = value;
        c
    }

    /// Makes a Create I/O Completion Queue in contiguous memory: Base section 5.4, PCIe section
    /// 3.3.1.
    pub fn create_cq(qid: u16, entries_z: u16, address: u64, vector: Option<u16>) -> Command {
        let mut c = Command::new(AdminOpcode::CREATE_CQ.0, 0);
        c.prp1 = address;
        c.cdw10 = u32::from(qid) | u32::from(entries_z) << 16;
        c.cdw11 = 1 | vector.map_or(0, |v| 2 | u32::from(v) << 16);
        c
    }

    /// Makes a Create I/O Submission Queue in contiguous memory: Base section 5.5.
    pub fn create_sq(qid: u16, entries_z: u16, address: u64, cq: u16, p: QueuePriority) -> Command {
        let mut c = Command::new(AdminOpcode::CREATE_SQ.0, 0);
        c.prp1 = address;
        c.cdw10 = u32::from(qid) | u32::from(entries_z) << 16;
        c.cdw11 = 1 | u32::from(p.0 & 3) << 1 | u32::from(cq) << 16;
        c
    }

    /// Makes a command that deletes an I/O queue: Base sections 5.6 and 5.7.
    pub fn delete_queue(op: AdminOpcode, qid: u16) -> Command {
        let mut c = Command::new(op.0, 0);
        c.cdw10 = u32::from(qid);
        c
    }

    /// Makes an Abort: Base section 5.1.
    pub fn abort(sqid: u16, cid: u16) -> Command {
        let mut c = Command::new(AdminOpcode::ABORT.0, 0);
        c.cdw10 = u32::from(sqid) | u32::from(cid) << 16;
        c
    }

    /// Makes a Format NVM: NVM section 4.1.
    pub fn format(nsid: u32, format: FormatNvm) -> Command {
        let mut c = Command::new(AdminOpcode::FORMAT_NVM.0, nsid);
        c.cdw10 = u32::from(format.lbaf & 15)
            | u32::from(format.lbaf >> 4 & 3) << 12
            | u32::from(format.secure_erase & 7) << 9;
        c
    }
}

/// The parameters of Format NVM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct FormatNvm {
    /// Index of the LBA format.
    pub lbaf: u8,
    /// 0 none, 1 user data erase, 2 cryptographic erase.
    pub secure_erase: u8,
}

/// A range of Dataset Management: NVM figure 40.
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct DsmRange {
    /// Context attributes.
    pub attributes: u32,
    /// Number of blocks.
    pub len_blocks: u32,
    /// First block.
    pub lba: u64,
}

const _: () = assert!(size_of::<DsmRange>() == 16);

/// The largest number of source ranges in a Copy command.
pub const SOURCE_RANGES_MAX: usize = 256;

/// A source range of Copy, descriptor format 0: NVM figure 31.
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct SourceRange {
    /// Reserved.
    pub reserved0: u64,
    /// First block.
    pub lba: u64,
    /// Number of blocks, 0's based.
    pub blocks_z: u16,
    /// Reserved.
    pub reserved1: [u8; 6],
    /// Expected initial reference tag.
    pub eilbrt: u32,
    /// Expected application tag.
    pub elbat: u16,
    /// Expected application tag mask.
    pub elbatm: u16,
}

const _: () = assert!(size_of::<SourceRange>() == 32);

impl SourceRange {
    /// Number of blocks.
    pub fn blocks(self) -> u64 {
        u64::from(self.blocks_z) + 1
    }
}

/// The fields of a read or write of consecutive blocks, without its identifier and data pointer.
#[derive(Debug, Clone, Copy)]
pub(crate) struct BlocksIo {
    pub op: IoOpcode,
    pub nsid: u32,
    pub lba: u64,
    /// Number of blocks, 1 to 65536.
    pub blocks: u32,
    pub flags: IoFlags,
}

impl BlocksIo {
    /// Makes the entry's words with a data pointer and the flags byte that goes with it. They are
    /// put together in registers, because every I/O takes this path.
    #[inline]
    pub fn words(self, cid: u16, pointer: [u64; 2], pointer_flags: u8) -> [u64; 8] {
        let head = u64::from(self.op.0)
            | u64::from(pointer_flags) << 8
            | u64::from(cid) << 16
            | u64::from(self.nsid) << 32;
        let cdw12 = (self.blocks.wrapping_sub(1) & 0xffff) | self.flags.0;
        let cdw12 = u64::from(cdw12);
        [head, 0, 0, pointer[0], pointer[1], self.lba, cdw12, 0]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_the_entry() {
        for (op, lba, blocks, flags) in [
            (IoOpcode::READ, 0x1234_5678_9abc_def0, 65_536, IoFlags::NONE),
            (IoOpcode::WRITE, 7, 1, IoFlags::fua(true)),
        ] {
            let mut command = Command::blocks_io(op, 9, lba, blocks, flags);
            command.cid = 0xfedc;
            command.set_sgl(&SglDescriptor::data(0xabcd_e000, 8192));
            let entry = BlocksIo {
                op,
                nsid: 9,
                lba,
                blocks,
                flags,
            };
            let words = entry.words(0xfedc, [command.prp1, command.prp2], Command::SGL);
            assert_eq!(words, command.words());
        }
    }
}
