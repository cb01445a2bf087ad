//! Controller registers: Base section 3.1.3; doorbells: PCIe section 3.1.2.

use bitfield_struct::bitfield;

/// Offsets of the registers in BAR 0 (Base figure 35).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reg;

impl Reg {
    /// Controller capabilities.
    pub const CAP: u32 = 0x00;
    /// Version.
    pub const VS: u32 = 0x08;
    /// Interrupt mask set.
    pub const INTMS: u32 = 0x0c;
    /// Interrupt mask clear.
    pub const INTMC: u32 = 0x10;
    /// Controller configuration.
    pub const CC: u32 = 0x14;
    /// Controller status.
    pub const CSTS: u32 = 0x1c;
    /// NVM subsystem reset.
    pub const NSSR: u32 = 0x20;
    /// Admin queue attributes.
    pub const AQA: u32 = 0x24;
    /// Admin submission queue base address.
    pub const ASQ: u32 = 0x28;
    /// Admin completion queue base address.
    pub const ACQ: u32 = 0x30;
    /// Controller memory buffer location.
    pub const CMBLOC: u32 = 0x38;
    /// Controller memory buffer size.
    pub const CMBSZ: u32 = 0x3c;
    /// Controller memory buffer memory space control.
    pub const CMBMSC: u32 = 0x50;
    /// Controller memory buffer status.
    pub const CMBSTS: u32 = 0x58;
    /// Controller ready time-outs.
    pub const CRTO: u32 = 0x68;
    /// First doorbell.
    pub const DOORBELLS: u32 = 0x1000;
}

/// Returns the offset of a queue's doorbell: PCIe sections 3.1.2.1 and 3.1.2.2.
pub fn doorbell_offset(qid: u16, completion: bool, dstrd: u8) -> u32 {
    Reg::DOORBELLS + ((2 * u32::from(qid) + u32::from(completion)) << (2 + u32::from(dstrd & 15)))
}

/// CAP: Base section 3.1.3.1.
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct Cap {
    /// Maximum queue entries supported, 0's based.
    pub mqes_z: u16,
    /// Contiguous queues required.
    pub cqr: bool,
    /// Weighted round robin with urgent priority class.
    pub ams_wrr: bool,
    /// Vendor specific arbitration.
    pub ams_vendor: bool,
    #[bits(5)]
    __: u8,
    /// Time-out, in units of 500 ms.
    pub to: u8,
    /// Doorbell stride: 4 << dstrd bytes.
    #[bits(4)]
    pub dstrd: u8,
    /// NVM subsystem reset supported.
    pub nssrs: bool,
    /// Command sets supported (bit 0: NVM; bit 6: several; bit 7: admin only).
    pub css: u8,
    /// Boot partitions.
    pub bps: bool,
    /// Controller power scope.
    #[bits(2)]
    pub cps: u8,
    /// Smallest host page: 4096 << mpsmin.
    #[bits(4)]
    pub mpsmin: u8,
    /// Largest host page: 4096 << mpsmax.
    #[bits(4)]
    pub mpsmax: u8,
    /// Persistent memory region supported.
    pub pmrs: bool,
    /// Controller memory buffer supported (CMBLOC and CMBSZ hidden until CMBMSC.CRE).
    pub cmbs: bool,
    /// NVM subsystem shutdown supported.
    pub nsss: bool,
    /// Controller ready with media support.
    pub crwms: bool,
    /// Controller ready independent of media support.
    pub crims: bool,
    #[bits(3)]
    __: u8,
}

/// CC: Base section 3.1.3.5.
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct Cc {
    /// Enable.
    pub en: bool,
    #[bits(3)]
    __: u8,
    /// Command set selected.
    #[bits(3)]
    pub css: u8,
    /// Host page size: 4096 << mps.
    #[bits(4)]
    pub mps: u8,
    /// Arbitration mechanism: 0 round robin, 1 weighted.
    #[bits(3)]
    pub ams: u8,
    /// Shutdown notification: 0 none, 1 normal, 2 abrupt.
    #[bits(2)]
    pub shn: u8,
    /// log2 of the submission entry size.
    #[bits(4)]
    pub iosqes: u8,
    /// log2 of the completion entry size.
    #[bits(4)]
    pub iocqes: u8,
    /// Controller ready independent of media enable.
    pub crime: bool,
    #[bits(7)]
    __: u8,
}

/// CSTS: Base section 3.1.3.6.
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct Csts {
    /// Ready.
    pub rdy: bool,
    /// Fatal status.
    pub cfs: bool,
    /// Shutdown status: 0 normal operation, 1 occurring, 2 complete.
    #[bits(2)]
    pub shst: u8,
    /// An NVM subsystem reset occurred.
    pub nssro: bool,
    /// Processing paused.
    pub pp: bool,
    /// Shutdown type.
    pub st: bool,
    #[bits(25)]
    __: u32,
}

/// VS: Base section 3.1.3.2.
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct Vs {
    /// Tertiary version.
    pub ter: u8,
    /// Minor version.
    pub mnr: u8,
    /// Major version.
    pub mjr: u16,
}

impl std::fmt::Display for Vs {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}", self.mjr(), self.mnr())?;
        if self.ter() != 0 {
            write!(f, ".{}", self.ter())?;
        }
        Ok(())
    }
}

/// CRTO: Base section 3.1.3.23; both times in units of 500 ms.
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct Crto {
    /// Controller ready with media time-out.
    pub crwmt: u16,
    /// Controller ready independent of media time-out.
    pub crimt: u16,
}

/// CMBLOC: Base section 3.1.3.11.
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct Cmbloc {
    /// Base address register that holds the buffer.
    #[bits(3)]
    pub bir: u8,
    /// Queues may lie partly in the buffer and partly in host memory.
    pub cqmms: bool,
    /// Queues may be physically discontiguous.
    pub cqpds: bool,
    /// A PRP or SGL list may lie partly in the buffer and partly in host memory.
    pub cdpmls: bool,
    /// Command and data pointer independent locations.
    pub cdpcils: bool,
    /// Data may lie in the buffer and its metadata in host memory, or the other way round.
    pub cdmmms: bool,
    /// Queue dword alignment.
    pub cqda: bool,
    #[bits(3)]
    __: u8,
    /// Offset, in CMBSZ's unit.
    #[bits(20)]
    pub ofst: u32,
}

/// CMBSZ: Base section 3.1.3.12.
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct Cmbsz {
    /// Submission queues may lie in it.
    pub sqs: bool,
    /// Completion queues may lie in it.
    pub cqs: bool,
    /// PRP and SGL lists may lie in it.
    pub lists: bool,
    /// Read data may lie in it.
    pub rds: bool,
    /// Write data may lie in it.
    pub wds: bool,
    #[bits(3)]
    __: u8,
    /// Unit: 4 KiB << (4 * szu).
    #[bits(4)]
    pub szu: u8,
    /// Size in units.
    #[bits(20)]
    pub sz: u32,
}

impl Cmbsz {
    /// Bytes per unit.
    pub fn unit(&self) -> u64 {
        4096u64 << (4 * u32::from(self.szu().min(6)))
    }

    /// Size in bytes.
    pub fn len(&self) -> u64 {
        u64::from(self.sz()) * self.unit()
    }

    /// Whether the controller has no memory buffer.
    pub fn is_empty(&self) -> bool {
        self.sz() == 0
    }
}

/// CMBMSC: Base section 3.1.3.16.
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct Cmbmsc {
    /// Capabilities registers enabled.
    pub cre: bool,
    /// Memory space enabled.
    pub cmse: bool,
    #[bits(10)]
    __: u16,
    /// Controller base address, bits 63:12.
    #[bits(52)]
    pub cba: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn capabilities_of_a_known_controller() {
        // SPDK's vfio-user controller.
        let cap = Cap::from(0x20_1e01_00ff);
        assert_eq!(cap.mqes_z(), 255);
        assert!(cap.cqr());
        assert_eq!(cap.to(), 30);
        assert_eq!(cap.dstrd(), 0);
        assert_eq!(cap.css(), 1);
        let cc = Cc::new().with_en(true).with_iosqes(6).with_iocqes(4);
        assert_eq!(u32::from(cc), 0x46_0001);
        assert_eq!(u32::from(Csts::new().with_rdy(true).with_shst(2)), 9);
    }

    #[test]
    fn doorbells() {
        assert_eq!(doorbell_offset(0, false, 0), 0x1000);
        assert_eq!(doorbell_offset(1, true, 0), 0x100c);
        assert_eq!(doorbell_offset(1, false, 1), 0x1010);
    }
}
