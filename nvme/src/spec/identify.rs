//! Identify data: Base section 5.17.2, NVM section 4.1.5.

use zerocopy::little_endian::{U16, U32, U64, U128};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Bits of `oacs`, the optional admin commands: Base figure 275.
#[derive(Debug, Clone, Copy)]
pub struct Oacs;

impl Oacs {
    /// Security send and receive.
    pub const SECURITY: u16 = 1 << 0;
    /// Format NVM.
    pub const FORMAT: u16 = 1 << 1;
    /// Firmware commit and download.
    pub const FIRMWARE: u16 = 1 << 2;
    /// Namespace management.
    pub const NS_MANAGEMENT: u16 = 1 << 3;
    /// Doorbell buffer config.
    pub const DOORBELL_BUFFER: u16 = 1 << 8;
}

/// Bits of `oncs`, the optional I/O commands: Base figure 275.
#[derive(Debug, Clone, Copy)]
pub struct Oncs;

impl Oncs {
    /// Compare.
    pub const COMPARE: u16 = 1 << 0;
    /// Write uncorrectable.
    pub const WRITE_UNCORRECTABLE: u16 = 1 << 1;
    /// Dataset management.
    pub const DATASET_MANAGEMENT: u16 = 1 << 2;
    /// Write zeroes.
    pub const WRITE_ZEROES: u16 = 1 << 3;
    /// Save and select fields of Set and Get Features.
    pub const FEATURE_SAVE: u16 = 1 << 4;
    /// Reservations.
    pub const RESERVATIONS: u16 = 1 << 5;
    /// Timestamp.
    pub const TIMESTAMP: u16 = 1 << 6;
    /// Verify.
    pub const VERIFY: u16 = 1 << 7;
    /// Copy.
    pub const COPY: u16 = 1 << 8;
}

/// Identify controller: Base figure 275.
#[derive(Debug, Clone, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
#[expect(
    missing_docs,
    reason = "the fields are the specification's, by its own names"
)]
pub struct IdentifyController {
    pub vid: U16,
    pub ssvid: U16,
    pub sn: [u8; 20],
    pub mn: [u8; 40],
    pub fr: [u8; 8],
    pub rab: u8,
    pub ieee: [u8; 3],
    pub cmic: u8,
    pub mdts: u8,
    pub cntlid: U16,
    pub ver: U32,
    pub rtd3r: U32,
    pub rtd3e: U32,
    pub oaes: U32,
    pub ctratt: U32,
    pub rrls: U16,
    pub reserved102: [u8; 9],
    pub cntrltype: u8,
    pub fguid: [u8; 16],
    pub crdt: [U16; 3],
    pub reserved134: [u8; 119],
    pub nvmsr: u8,
    pub vwci: u8,
    pub mec: u8,
    pub oacs: U16,
    pub acl_z: u8,
    pub aerl_z: u8,
    pub frmw: u8,
    pub lpa: u8,
    pub elpe_z: u8,
    pub npss_z: u8,
    pub avscc: u8,
    pub apsta: u8,
    pub wctemp: U16,
    pub cctemp: U16,
    pub mtfa: U16,
    pub hmpre: U32,
    pub hmmin: U32,
    pub tnvmcap: U128,
    pub unvmcap: U128,
    pub rpmbs: U32,
    pub edstt: U16,
    pub dsto: u8,
    pub fwug: u8,
    pub kas: U16,
    pub hctma: U16,
    pub mntmt: U16,
    pub mxtmt: U16,
    pub sanicap: U32,
    pub hmminds: U32,
    pub hmmaxd: U16,
    pub nsetidmax: U16,
    pub endgidmax: U16,
    pub anatt: u8,
    pub anacap: u8,
    pub anagrpmax: U32,
    pub nanagrpid: U32,
    pub pels: U32,
    pub domain_id: U16,
    pub reserved358: [u8; 10],
    pub megcap: U128,
    pub reserved384: [u8; 128],
    pub sqes: u8,
    pub cqes: u8,
    pub maxcmd: U16,
    pub nn: U32,
    pub oncs: U16,
    pub fuses: U16,
    pub fna: u8,
    pub vwc: u8,
    pub awun_z: U16,
    pub awupf_z: U16,
    pub icsvscc: u8,
    pub nwpc: u8,
    pub acwu_z: U16,
    pub cdfs: U16,
    pub sgls: U32,
    pub mnan: U32,
    pub maxdna: U128,
    pub maxcna: U32,
    pub reserved564: [u8; 204],
    pub subnqn: [u8; 256],
    pub reserved1024: [u8; 768],
    pub fabrics: [u8; 256],
    pub psd: [[u8; 32]; 32],
    pub vendor: [u8; 1024],
}

const _: () = assert!(size_of::<IdentifyController>() == 4096);
const _: () = assert!(std::mem::offset_of!(IdentifyController, oacs) == 256);
const _: () = assert!(std::mem::offset_of!(IdentifyController, sqes) == 512);
const _: () = assert!(std::mem::offset_of!(IdentifyController, subnqn) == 768);
const _: () = assert!(std::mem::offset_of!(IdentifyController, psd) == 2048);

/// Identify controller of the NVM command set (CNS 06h, CSI 0): NVM figure 102. The size limits are
/// powers of two of the smallest host page; 0 means that no limit is given.
#[derive(Debug, Clone, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct IdentifyNvmController {
    /// Verify size limit.
    pub vsl: u8,
    /// Write zeroes size limit.
    pub wzsl: u8,
    /// Write uncorrectable size limit.
    pub wusl: u8,
    /// Dataset management: most ranges.
    pub dmrl: u8,
    /// Dataset management: most blocks per range.
    pub dmrsl: U32,
    /// Dataset management: most blocks in all.
    pub dmsl: U64,
    /// Reserved.
    pub reserved: [u8; 4080],
}

const _: () = assert!(size_of::<IdentifyNvmController>() == 4096);

/// An LBA format: NVM figure 98.
#[derive(Debug, Clone, Copy, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct LbaFormat {
    /// Metadata bytes per block.
    pub ms: U16,
    /// log2 of the block size; below 9 where the format is not available.
    pub lbads: u8,
    /// Relative performance, 0 best to 3.
    pub rp: u8,
}

/// Identify namespace: NVM figure 97.
#[derive(Debug, Clone, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
#[expect(
    missing_docs,
    reason = "the fields are the specification's, by its own names"
)]
pub struct IdentifyNamespace {
    pub nsze: U64,
    pub ncap: U64,
    pub nuse: U64,
    pub nsfeat: u8,
    pub nlbaf_z: u8,
    pub flbas: u8,
    pub mc: u8,
    pub dpc: u8,
    pub dps: u8,
    pub nmic: u8,
    pub rescap: u8,
    pub fpi: u8,
    pub dlfeat: u8,
    pub nawun_z: U16,
    pub nawupf_z: U16,
    pub nacwu_z: U16,
    pub nabsn_z: U16,
    pub nabo: U16,
    pub nabspf_z: U16,
    pub noiob: U16,
    pub nvmcap: U128,
    pub npwg_z: U16,
    pub npwa_z: U16,
    pub npdg_z: U16,
    pub npda_z: U16,
    pub nows_z: U16,
    pub mssrl: U16,
    pub mcl: U32,
    pub msrc_z: u8,
    pub reserved81: [u8; 11],
    pub anagrpid: U32,
    pub reserved96: [u8; 3],
    pub nsattr: u8,
    pub nvmsetid: U16,
    pub endgid: U16,
    pub nguid: [u8; 16],
    pub eui64: [u8; 8],
    pub lbaf: [LbaFormat; 64],
    pub vendor: [u8; 3712],
}

const _: () = assert!(size_of::<IdentifyNamespace>() == 4096);
const _: () = assert!(std::mem::offset_of!(IdentifyNamespace, nguid) == 104);
const _: () = assert!(std::mem::offset_of!(IdentifyNamespace, lbaf) == 128);

impl IdentifyNamespace {
    /// Returns the index of the format in use: FLBAS bits 3:0, with 6:5 as upper bits when the
    /// namespace has more than 16 formats.
    pub fn format_index(&self) -> usize {
        let low = usize::from(self.flbas & 15);
        if self.nlbaf_z > 15 {
            low | usize::from(self.flbas >> 5 & 3) << 4
        } else {
            low
        }
    }

    /// Returns the format in use.
    pub fn format(&self) -> LbaFormat {
        self.lbaf[self.format_index() & 63]
    }
}

/// A namespace identification descriptor: Base figure 277.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NsDescriptor {
    /// IEEE extended unique identifier.
    Eui64([u8; 8]),
    /// Namespace globally unique identifier.
    Nguid([u8; 16]),
    /// UUID.
    Uuid([u8; 16]),
    /// Command set identifier.
    Csi(u8),
    /// A descriptor of another type.
    Other {
        /// Type of the descriptor.
        kind: u8,
        /// Value of the descriptor.
        bytes: Vec<u8>,
    },
}

/// Reads a list of namespace identification descriptors, up to its end, a zero length or the first
/// descriptor that does not fit.
pub fn ns_descriptors(page: &[u8]) -> Vec<NsDescriptor> {
    let mut rest = page;
    let mut list = Vec::new();
    while let Some((&[kind, len, _, _], tail)) = rest.split_first_chunk::<4>() {
        if len == 0 {
            break;
        }
        let Some((bytes, tail)) = tail.split_at_checked(usize::from(len)) else {
            break;
        };
        list.push(match (kind, bytes) {
            (1, b) if b.len() == 8 => NsDescriptor::Eui64(b.try_into().unwrap_or_default()),
            (2, b) if b.len() == 16 => NsDescriptor::Nguid(b.try_into().unwrap_or_default()),
            (3, b) if b.len() == 16 => NsDescriptor::Uuid(b.try_into().unwrap_or_default()),
            (4, &[csi]) => NsDescriptor::Csi(csi),
            _ => NsDescriptor::Other {
                kind,
                bytes: bytes.to_vec(),
            },
        });
        rest = tail;
    }
    list
}

/// Reads a namespace list (Base section 4.2): ascending identifiers up to the first zero. Returns
/// `None` when they do not ascend, because a listing could then repeat without end.
pub fn ns_list(page: &[u8], after: u32) -> Option<Vec<u32>> {
    let mut last = after;
    let mut list = Vec::new();
    for entry in page.as_chunks::<4>().0 {
        let id = u32::from_le_bytes(*entry);
        if id == 0 {
            break;
        }
        if id <= last || id >= 0xffff_fffe {
            return None;
        }
        last = id;
        list.push(id);
    }
    Some(list)
}

/// Returns an ASCII field of a device as text, trimmed, with `?` for everything unprintable.
pub fn ascii(field: &[u8]) -> String {
    let end = field.iter().position(|&b| b == 0).unwrap_or(field.len());
    field[..end]
        .iter()
        .map(|&b| {
            if b.is_ascii_graphic() || b == b' ' {
                char::from(b)
            } else {
                '?'
            }
        })
        .collect::<String>()
        .trim()
        .to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_end_and_ascend() {
        let mut page = [0u8; 4096];
        page[0] = 1;
        page[4] = 5;
        assert_eq!(ns_list(&page, 0), Some(vec![1, 5]));
        assert_eq!(ns_list(&page, 1), None);
        page[8] = 5;
        assert_eq!(ns_list(&page, 0), None);
        assert_eq!(ns_list(&[], 0), Some(vec![]));
    }

    /// The upper bits of the index count only where there are more formats than the lower ones name.
    #[test]
    fn the_format_in_use_is_found() {
        use zerocopy::FromZeros;
        let mut ns = IdentifyNamespace::new_zeroed();
        for (n, format) in (0..).zip(&mut ns.lbaf) {
            format.lbads = n;
        }
        // Bit 4 says where metadata is.
        for (flbas, most_z, index) in [
            (0x03, 15, 3),
            (0x73, 15, 3),
            (0x33, 16, 19),
            (0x53, 63, 35),
            (0x6f, 63, 63),
        ] {
            (ns.flbas, ns.nlbaf_z) = (flbas, most_z);
            assert_eq!(ns.format().lbads, index, "{flbas:#x} of {most_z}");
        }
    }

    #[test]
    fn descriptors_that_lie_are_cut() {
        let mut page = vec![3, 16, 0, 0];
        page.extend([7; 16]);
        page.extend([4, 1, 0, 0, 2, 9, 200, 0, 0]);
        assert_eq!(
            ns_descriptors(&page),
            vec![NsDescriptor::Uuid([7; 16]), NsDescriptor::Csi(2)]
        );
    }

    #[test]
    fn text_from_a_device_is_harmless() {
        assert_eq!(ascii(b"  QEMU \x1b[2J  "), "QEMU ?[2J");
    }
}
