//! SGL descriptors: Base section 4.1.2.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// One descriptor of a scatter gather list (Base figure 108).
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct SglDescriptor {
    /// Device address.
    pub address: u64,
    /// Length in bytes.
    pub len: u32,
    /// Reserved.
    pub reserved: [u8; 3],
    /// Type (bits 7:4) and subtype (bits 3:0).
    pub kind: u8,
}

const _: () = assert!(size_of::<SglDescriptor>() == 16);

impl SglDescriptor {
    /// The descriptor is a data block; address subtype.
    pub const DATA_BLOCK: u8 = 0x00;
    /// The descriptor is a bit bucket.
    pub const BIT_BUCKET: u8 = 0x10;
    /// The descriptor is a segment: more descriptors, the last of which points to the next segment.
    pub const SEGMENT: u8 = 0x20;
    /// The descriptor is the last segment.
    pub const LAST_SEGMENT: u8 = 0x30;

    /// Makes the descriptor of a data block.
    pub fn data(address: u64, len: u32) -> SglDescriptor {
        SglDescriptor {
            address,
            len,
            reserved: [0; 3],
            kind: SglDescriptor::DATA_BLOCK,
        }
    }

    /// Makes the descriptor of the last segment: `len` bytes of descriptors at `address`.
    pub fn last_segment(address: u64, len: u32) -> SglDescriptor {
        SglDescriptor {
            kind: SglDescriptor::LAST_SEGMENT,
            ..SglDescriptor::data(address, len)
        }
    }

    /// Returns the descriptor as two words, for queue memory.
    #[inline]
    pub fn words(&self) -> [u64; 2] {
        [
            self.address,
            u64::from(self.len) | u64::from(self.kind) << 56,
        ]
    }
}
