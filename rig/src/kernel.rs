//! Extracts the ELF image `vmlinux` from a bzImage. QEMU enters it by PVH, without the slow
//! real-mode set-up and decompression (Linux `Documentation/arch/x86/boot.rst`, `payload_offset`).

use std::path::Path;

use crate::{Error, run_filter};

fn u32_at(image: &[u8], at: usize) -> Option<usize> {
    let bytes = image.get(at..at + 4)?;
    usize::try_from(u32::from_le_bytes(bytes.try_into().ok()?)).ok()
}

/// Returns the compressed payload and its unpacked size.
fn payload(image: &[u8]) -> Option<(&[u8], usize)> {
    if image.get(0x202..0x206)? == [0; 4] || image.get(0x1fe..0x200)? != [0x55, 0xaa] {
        return None;
    }
    let setup_sectors = match image.get(0x1f1)? {
        0 => 4usize,
        n => usize::from(*n),
    };
    let start = (setup_sectors + 1) * 512 + u32_at(image, 0x248)?;
    let len = u32_at(image, 0x24c)?;
    let payload = image.get(start..start.checked_add(len)?)?;
    let unpacked = u32_at(payload, payload.len().checked_sub(4)?)?;
    Some((payload, unpacked))
}

/// Returns the ELF image, or `None` when this machine has no tool for its compression. Then the
/// bzImage is booted, which is slower.
pub fn vmlinux(bzimage: &[u8], busybox: &Path) -> Result<Option<Vec<u8>>, Error> {
    let Some((packed, unpacked_len)) = payload(bzimage) else {
        return Ok(None);
    };
    let stream = &packed[..packed.len() - 4];
    let applet = match stream {
        [0xfd, b'7', b'z', b'X', b'Z', ..] => "xz",
        [0x1f, 0x8b, ..] => "gzip",
        [b'B', b'Z', b'h', ..] => "bzip2",
        _ => return Ok(None),
    };
    let elf = run_filter(busybox, &[applet, "-dc"], stream)?;
    let whole = elf.starts_with(b"\x7fELF") && elf.len() == unpacked_len;
    Ok(whole.then_some(elf))
}

#[cfg(test)]
mod tests {
    use super::payload;

    #[test]
    fn payload_is_found_and_bounded() {
        let mut image = vec![0u8; 4096];
        image[0x1f1] = 1;
        image[0x1fe..0x200].copy_from_slice(&[0x55, 0xaa]);
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x248..0x24c].copy_from_slice(&16u32.to_le_bytes());
        image[0x24c..0x250].copy_from_slice(&8u32.to_le_bytes());
        image[1024 + 16..1024 + 24].copy_from_slice(&[1, 2, 3, 4, 9, 0, 0, 0]);
        assert_eq!(payload(&image), Some((&[1u8, 2, 3, 4, 9, 0, 0, 0][..], 9)));
        image[0x24c..0x250].copy_from_slice(&u32::MAX.to_le_bytes());
        assert_eq!(payload(&image), None);
        assert_eq!(payload(&image[..100]), None);
    }
}
