//! What a device holds already, so that nothing is formatted over by mistake.

use std::sync::Arc;

use pumice_bdev::{AsyncChannel, BlockDevice, DmaBuf};

use super::error::{FsError, Result};
use crate::blobstore::BsType;
use crate::blobstore::format::SuperBlock;

/// Bytes looked at from the beginning.
const HEAD: u64 = 128 << 10;
/// Bytes looked at from the end (mdraid 0.90 and 1.0, a backup GPT).
const TAIL: u64 = 128 << 10;

/// Names what is on the device, if it is something known: a file system, a partition table, a
/// volume manager's label. Reads only. Blocks.
///
/// # Errors
/// The device cannot be read.
pub(crate) fn probe(dev: &Arc<dyn BlockDevice>) -> Result<Option<String>> {
    let info = dev.info();
    let block = u64::from(info.block_size);
    let size = info.len_bytes();
    let channel = AsyncChannel::new(dev.open_channel()?);
    let read = |from: u64, len: u64| -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        let limit = match info.max_io_blocks {
            0 => len,
            n => (u64::from(n) * block).min(len),
        };
        while (bytes.len() as u64) < len {
            let n = limit.min(len - bytes.len() as u64);
            let buf = DmaBuf::new(usize::try_from(n).unwrap_or(1 << 20))?;
            let lba = (from + bytes.len() as u64) / block;
            let buf = channel
                .block_on(channel.read(lba, buf))
                .map_err(|e| FsError::io(format!("{}: looking for a file system", info.name), e))?;
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
    Ok(in_tail(&tail, tail_from, size, info.block_size as usize))
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

fn in_head(head: &[u8], block: usize) -> Option<String> {
    if has(head, 0, b"SPDKBLOB") {
        return Some(blobstore(head));
    }
    let fixed: [(usize, &[u8], &str); 19] = [
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
    ];
    for (at, magic, name) in fixed {
        if has(head, at, magic) {
            return Some(name.to_owned());
        }
    }
    // ext2, 3 and 4: magic in the super block at 1024; the feature words tell them apart.
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
        return Some(name.to_owned());
    }
    // LVM2: a label in one of the first four sectors.
    for sector in 0..4 {
        if has(head, sector * 512, b"LABELONE") && has(head, sector * 512 + 24, b"LVM2 001") {
            return Some("LVM2 physical volume".to_owned());
        }
    }
    // Swap: the magic ends the first page, whatever its size was.
    for page in [4096, 8192, 16384, 32768, 65536] {
        if has(head, page - 10, b"SWAPSPACE2") || has(head, page - 10, b"SWAP-SPACE") {
            return Some("swap space".to_owned());
        }
    }
    // ZFS: uberblocks in the label's second half.
    if (0x2_0000 - 1024 >= 1024)
        && (0..head.len() / 1024)
            .skip(128)
            .any(|i| has(head, i * 1024, &[0x0c, 0xb1, 0xba, 0, 0, 0, 0, 0]))
    {
        return Some("ZFS".to_owned());
    }
    for sector in [512, block] {
        if has(head, sector, b"EFI PART") {
            return Some("GPT partition table".to_owned());
        }
    }
    mbr(head)
}

fn blobstore(head: &[u8]) -> String {
    let parsed = head
        .get(..4096)
        .and_then(|p| p.try_into().ok())
        .map(SuperBlock::decode);
    match parsed {
        Some(Ok(sb)) if sb.bstype() == BsType::BLOBFS => "BlobFS (SPDK blobstore)".to_owned(),
        Some(Ok(sb)) if sb.bstype() == BsType::NONE => "SPDK blobstore".to_owned(),
        Some(Ok(sb)) => format!("SPDK blobstore ({})", sb.bstype()),
        _ => "SPDK blobstore with a damaged super block".to_owned(),
    }
}

/// A boot signature alone is no partition table: at least one entry has to make sense.
fn mbr(head: &[u8]) -> Option<String> {
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
    any.then(|| "MBR partition table".to_owned())
}

fn in_tail(tail: &[u8], from: u64, size: u64, block: usize) -> Option<String> {
    let at = |pos: u64| pos.checked_sub(from).and_then(|p| usize::try_from(p).ok());
    let md = b"\xfc\x4e\x2b\xa9";
    // Metadata 0.90: 64 KiB before the end, rounded down to 64 KiB. Metadata 1.0: 8 KiB before it,
    // rounded down to 4 KiB.
    let old = (size & !0xffff).checked_sub(0x1_0000);
    let new = size.checked_sub(0x2000).map(|p| p & !0xfff);
    for pos in [old, new].into_iter().flatten() {
        if at(pos).is_some_and(|p| has(tail, p, md)) {
            return Some("Linux RAID member".to_owned());
        }
    }
    let last = tail.len().checked_sub(block)?;
    has(tail, last, b"EFI PART").then(|| "GPT partition table (backup)".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(marks: &[(usize, &[u8])]) -> Option<String> {
        let dev = pumice_bdev::open("malloc://1M?block_size=512").unwrap();
        let ch = AsyncChannel::new(dev.open_channel().unwrap());
        let mut bytes = vec![0u8; 1 << 20];
        for (at, mark) in marks {
            bytes[*at..*at + mark.len()].copy_from_slice(mark);
        }
        ch.block_on(ch.write(0, DmaBuf::copy_from(&bytes).unwrap().freeze(), false))
            .unwrap();
        probe(&dev).unwrap()
    }

    #[test]
    fn what_is_recognised() {
        let ext = |at: usize, v: u32| (at, v.to_le_bytes());
        let magic: (usize, &[u8]) = (1080, &[0x53, 0xef]);
        assert_eq!(image(&[]), None);
        assert_eq!(image(&[magic]).as_deref(), Some("ext2"));
        let (at, v) = ext(1024 + 92, 4);
        assert_eq!(image(&[magic, (at, &v)]).as_deref(), Some("ext3"));
        let (at4, v4) = ext(1024 + 96, 0x40);
        assert_eq!(
            image(&[magic, (at, &v), (at4, &v4)]).as_deref(),
            Some("ext4")
        );
        assert_eq!(image(&[(0, b"XFSB")]).as_deref(), Some("XFS"));
        assert_eq!(image(&[(65600, b"_BHRfS_M")]).as_deref(), Some("btrfs"));
        assert_eq!(
            image(&[(512, b"EFI PART")]).as_deref(),
            Some("GPT partition table")
        );
        assert_eq!(
            image(&[(1048064, b"EFI PART")]).as_deref(),
            Some("GPT partition table (backup)")
        );
        assert_eq!(
            image(&[(512, b"LABELONE"), (536, b"LVM2 001")]).as_deref(),
            Some("LVM2 physical volume")
        );
        assert_eq!(
            image(&[(4086, b"SWAPSPACE2")]).as_deref(),
            Some("swap space")
        );
        assert_eq!(
            image(&[(65526, b"SWAPSPACE2")]).as_deref(),
            Some("swap space")
        );
        assert_eq!(image(&[(0, b"LUKS\xba\xbe")]).as_deref(), Some("LUKS"));
        let md: &[u8] = b"\xfc\x4e\x2b\xa9";
        for at in [0, 4096, (1 << 20) - 0x1_0000, (1 << 20) - 0x2000] {
            assert_eq!(
                image(&[(at, md)]).as_deref(),
                Some("Linux RAID member"),
                "{at}"
            );
        }
        assert_eq!(
            image(&[(0, b"SPDKBLOB")]).as_deref(),
            Some("SPDK blobstore with a damaged super block")
        );
    }

    #[test]
    fn a_boot_signature_alone_is_nothing() {
        assert_eq!(image(&[(510, &[0x55, 0xaa])]), None);
        let part: &[u8] = &[0x80, 1, 1, 0, 0x83, 1, 1, 1, 0, 8, 0, 0, 0, 16, 0, 0];
        assert_eq!(
            image(&[(446, part), (510, &[0x55, 0xaa])]).as_deref(),
            Some("MBR partition table")
        );
    }

    #[test]
    fn a_tiny_device_is_no_panic() {
        let dev = pumice_bdev::open("malloc://4096?block_size=512").unwrap();
        assert_eq!(probe(&dev).unwrap(), None);
    }
}
