//! Signatures at the beginning and the end of a device that show what it contains.

use crate::error::BdevError;
use crate::executor::AsyncChannel;
use crate::{BlockDevice, DmaBuf};

use super::kinds::{Contents, Ours};

/// Number of bytes to read at the beginning.
const HEAD: u64 = 256 << 10;
/// Offset of the store's type in its super block (docs/format.md).
const TYPE_AT: usize = 56;
/// Number of bytes to read at the end (mdraid 0.90 and 1.0, a backup GPT).
const TAIL: u64 = 128 << 10;

/// Names the content of the device if it is a known one: a store, a file system, a partition table,
/// a volume manager's label. Only reads. Blocks.
pub(crate) fn recognise(dev: &dyn BlockDevice) -> Result<Option<Contents>, BdevError> {
    let info = dev.info();
    if !info.keeps_data {
        return Ok(None);
    }
    let block = u64::from(info.block_size);
    let size = info.len_bytes();
    let channel = AsyncChannel::new(dev.open_channel()?);
    let read = |from: u64, len: u64| -> Result<Vec<u8>, BdevError> {
        let mut bytes = Vec::new();
        let limit = info.transfer_blocks(len) * block;
        while (bytes.len() as u64) < len {
            let n = limit.min(len - bytes.len() as u64);
            let n = usize::try_from(n).unwrap_or(1 << 20);
            let buf = DmaBuf::new(n).map_err(|source| BdevError::Dma {
                device: info.name.clone(),
                source,
            })?;
            let lba = (from + bytes.len() as u64) / block;
            let buf = channel.block_on(channel.read(lba, buf))?;
            bytes.extend_from_slice(&buf);
        }
        Ok(bytes)
    };
    let head_len = HEAD.min(size) / block * block;
    let tail_len = TAIL.min(size) / block * block;
    if head_len == 0 {
        return Ok(None);
    }
    let head = read(0, head_len)?;
    if let Some(found) = in_head(&head, info.block_size as usize) {
        return Ok(Some(found));
    }
    let tail_from = (size / block * block) - tail_len;
    let tail = read(tail_from, tail_len)?;
    let found = in_tail(&tail, tail_from, size, info.block_size as usize);
    Ok(found.map(|name| Contents::Foreign(name.to_owned())))
}

fn in_head(head: &[u8], block: usize) -> Option<Contents> {
    if has(head, 0, b"SPDKBLOB") {
        return Some(Contents::Ours(store_type(head)));
    }
    foreign(head, block).map(|name| Contents::Foreign(name.to_owned()))
}

/// Returns the type of a blobstore from its super block: 16 bytes, padded with zeroes. A super
/// block that is damaged elsewhere still counts.
fn store_type(head: &[u8]) -> Ours {
    let bytes = head.get(TYPE_AT..TYPE_AT + 16).unwrap_or_default();
    let len = bytes.iter().position(|b| *b == 0).unwrap_or(bytes.len());
    match &bytes[..len] {
        b"" => Ours::Blobstore,
        b"BLOBFS" => Ours::BlobFs,
        other => Ours::Typed(other.escape_ascii().to_string()),
    }
}

fn has(bytes: &[u8], at: usize, magic: &[u8]) -> bool {
    bytes.get(at..at + magic.len()) == Some(magic)
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_le_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

fn foreign(head: &[u8], block: usize) -> Option<&'static str> {
    let fixed: [(usize, &[u8], &str); 27] = [
        (0, b"LUKS\xba\xbe", "LUKS"),
        (0, b"XFSB", "XFS"),
        (0x1_0040, b"_BHRfS_M", "btrfs"),
        (1024, b"\x10\x20\xf5\xf2", "F2FS"),
        (3, b"NTFS    ", "NTFS"),
        (3, b"EXFAT   ", "exFAT"),
        (82, b"FAT32   ", "FAT32"),
        (54, b"FAT16   ", "FAT16"),
        (54, b"FAT12   ", "FAT12"),
        (4096, b"\xfc\x4e\x2b\xa9", "Linux RAID member"),
        (0, b"\xfc\x4e\x2b\xa9", "Linux RAID member"),
        (0x8001, b"CD001", "ISO 9660"),
        (
            4096 + 24,
            b"\xc6\x85\x73\xf6\x4e\x1a\x45\xca\x82\x65\xf5\x7f\x48\xba\x6d\x81",
            "bcache",
        ),
        (0, b"hsqs", "squashfs"),
        (0x1_0034, b"ReIsErFs", "ReiserFS"),
        (0x1_0034, b"ReIsEr2Fs", "ReiserFS"),
        (0x8000, b"JFS1", "JFS"),
        (1024, b"H+\x00\x04", "HFS+"),
        (0, b"DRBD", "DRBD"),
        (0, b"QFI\xfb", "a QCOW2 image"),
        (0, b"KDMV", "a VMDK image"),
        (0, b"SQLite format 3\0", "an SQLite database"),
        (257, b"ustar", "a tar archive"),
        (0, b"PK\x03\x04", "a ZIP archive"),
        (0, b"\x1f\x8b\x08", "gzip data"),
        (0, b"%PDF-", "a PDF document"),
        (0, b"\x7fELF", "an ELF program"),
    ];
    for (at, magic, name) in fixed {
        if has(head, at, magic) {
            return Some(name);
        }
    }
    // ext2, 3 and 4 have a magic number in the super block at 1024; the feature words tell them
    // apart.
    if u16_at(head, 1024 + 56) == Some(0xef53) {
        let (compat, incompat) = (u32_at(head, 1024 + 92)?, u32_at(head, 1024 + 96)?);
        let ro_compat = u32_at(head, 1024 + 100)?;
        // Extents, 64 bit, flexible groups; huge files, group checksums, extra inode size.
        let four = incompat & 0x02c0 != 0 || ro_compat & 0x0078 != 0;
        let name = match (four, compat & 4 != 0) {
            (true, _) => "ext4",
            (false, true) => "ext3",
            (false, false) => "ext2",
        };
        return Some(name);
    }
    // LVM2 has a label in one of the first four sectors.
    for sector in 0..4 {
        if has(head, sector * 512, b"LABELONE") && has(head, sector * 512 + 24, b"LVM2 001") {
            return Some("LVM2 physical volume");
        }
    }
    // Swap space has its magic number at the end of the first page, whatever the page size.
    for page in [4096, 8192, 16384, 32768, 65536] {
        if has(head, page - 10, b"SWAPSPACE2") || has(head, page - 10, b"SWAP-SPACE") {
            return Some("swap space");
        }
    }
    // ZFS has uberblocks in the second half of the label.
    if (0..head.len() / 1024)
        .skip(128)
        .any(|i| has(head, i * 1024, &[0x0c, 0xb1, 0xba, 0, 0, 0, 0, 0]))
    {
        return Some("ZFS");
    }
    for sector in [512, block] {
        if has(head, sector, b"EFI PART") {
            return Some("GPT partition table");
        }
    }
    mbr(head)
}

/// Recognises an MBR. A boot signature alone is not a partition table: at least one entry must be
/// valid.
fn mbr(head: &[u8]) -> Option<&'static str> {
    if !has(head, 510, &[0x55, 0xaa]) {
        return None;
    }
    let mut any = false;
    for entry in 0..4 {
        let at = 446 + entry * 16;
        let (status, kind) = (*head.get(at)?, *head.get(at + 4)?);
        let (start, len) = (u32_at(head, at + 8)?, u32_at(head, at + 12)?);
        if status & 0x7f != 0 {
            return None;
        }
        any |= kind != 0 && start != 0 && len != 0;
    }
    any.then_some("MBR partition table")
}

fn in_tail(tail: &[u8], from: u64, size: u64, block: usize) -> Option<&'static str> {
    let at = |pos: u64| pos.checked_sub(from).and_then(|p| usize::try_from(p).ok());
    let md = b"\xfc\x4e\x2b\xa9";
    // Metadata 0.90 is 64 KiB before the end, rounded down to 64 KiB. Metadata 1.0 is 8 KiB before
    // it, rounded down to 4 KiB.
    let old = (size & !0xffff).checked_sub(0x1_0000);
    let new = size.checked_sub(0x2000).map(|p| p & !0xfff);
    for pos in [old, new].into_iter().flatten() {
        if at(pos).is_some_and(|p| has(tail, p, md)) {
            return Some("Linux RAID member");
        }
    }
    let last = tail.len().checked_sub(block)?;
    has(tail, last, b"EFI PART").then_some("GPT partition table (backup)")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn put(bytes: &mut [u8], at: usize, what: &[u8]) {
        bytes[at..at + what.len()].copy_from_slice(what);
    }

    /// Boot sectors of file systems and of boot loaders end with the same two bytes, and have code where the table would be.
    #[test]
    fn a_partition_table_has_an_entry_and_nothing_but_entries() {
        let mut head = vec![0; 4096];
        put(&mut head, 510, &[0x55, 0xaa]);
        assert_eq!(mbr(&head), None, "there is no entry");
        for entry in 0..4 {
            let at = 446 + 16 * entry;
            let mut one = head.clone();
            one[at + 4] = 0x83;
            put(&mut one, at + 8, &2048_u32.to_le_bytes());
            assert_eq!(mbr(&one), None, "it has no length");
            put(&mut one, at + 12, &100_u32.to_le_bytes());
            assert_eq!(mbr(&one), Some("MBR partition table"));
            one[at] = 0x80;
            assert_eq!(mbr(&one), Some("MBR partition table"), "it boots");
            one[446 + 16 * (3 - entry)] = 0x41;
            assert_eq!(mbr(&one), None, "this is code");
        }
    }

    #[test]
    fn a_gpt_is_where_the_blocks_say() {
        for (at, block) in [(512, 512), (512, 4096), (4096, 4096)] {
            let mut head = vec![0; 8192];
            put(&mut head, at, b"EFI PART");
            assert_eq!(foreign(&head, block), Some("GPT partition table"));
            // The backup stands in the last block.
            let from = 1 << 20;
            let mut tail = vec![0; 8192];
            put(&mut tail, 8192 - block, b"EFI PART");
            let found = in_tail(&tail, from, from + 8192, block);
            assert_eq!(found, Some("GPT partition table (backup)"));
        }
    }

    /// Neither place of the metadata at the end is at the end of a device whose size is odd.
    #[test]
    fn a_member_of_a_linux_raid_is_found_at_its_end() {
        let size: u64 = 0x10_3200;
        let from = size - TAIL;
        // Metadata 0.90, and 1.0.
        for at in [0xf_0000, 0x10_1000] {
            let mut tail = vec![0; usize::try_from(TAIL).unwrap()];
            assert_eq!(in_tail(&tail, from, size, 512), None);
            let place = usize::try_from(at - from).unwrap();
            put(&mut tail, place, b"\xfc\x4e\x2b\xa9");
            assert_eq!(in_tail(&tail, from, size, 512), Some("Linux RAID member"));
        }
    }
}
