//! A mount that only reads, after a killed process: shows what its log in shared memory has, from memory.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use pumice_bdev::DmaBuf;

use super::core::Core;
use super::error::{FsError, Result};
use super::fill::FillBuf;
use super::frame::{Frame, PAGE, REGION, split};
use super::inode::Inode;
use super::shm_ring::What;
use super::tail::Tail;

/// Most regions that a mount keeps in memory for it.
const MOST_REGIONS: usize = (256 << 20) / REGION;

/// The number of regions that are in memory for it, of all files.
#[derive(Default)]
pub(super) struct Budget(usize);

/// A file as it will be, of which the changed regions are in memory.
struct Shown<'a> {
    core: &'a Core,
    ino: &'a Arc<Inode>,
    len: u64,
    /// The device's bytes count below this.
    valid: u64,
    regions: BTreeMap<usize, Vec<u8>>,
    budget: &'a mut Budget,
}

/// Shows a file with these changes.
///
/// # Errors
/// A part is not shown then: there is no memory for it, or the device fails.
pub(super) fn show(
    core: &Core,
    ino: &Arc<Inode>,
    changes: &[What<Vec<u8>>],
    budget: &mut Budget,
) -> Result<()> {
    let mut shown = Shown {
        core,
        ino,
        len: ino.len(),
        valid: ino.len(),
        regions: BTreeMap::new(),
        budget,
    };
    for what in changes {
        match what {
            What::Bytes { off, data } if *off <= shown.len => shown.write(*off, data)?,
            What::Zeroes { old_len, new_len } if *old_len <= shown.len => {
                shown.lengthen(*new_len)?;
            }
            What::Cut { len } if *len < shown.len => shown.cut(*len),
            What::Placed { len, .. } => {
                lengthen(ino, *len);
                shown.len = ino.len();
                shown.valid = ino.len();
            }
            _ => {}
        }
    }
    shown.install()
}

/// Gives a file the length that its clusters have bytes for, if it has less.
pub(super) fn lengthen(ino: &Inode, len: u64) {
    let mut tail = ino.tail.lock();
    let old = ino.len();
    if len > old && len <= tail.allocated {
        *tail = Tail::new(len, tail.allocated);
        ino.frames.remove_from(split(old).0);
        ino.len.store(len, Ordering::Release);
        ino.started.store(len, Ordering::Relaxed);
    }
}

impl Shown<'_> {
    /// Returns the bytes of a region.
    fn region(&mut self, region: usize) -> Result<&mut [u8]> {
        if !self.regions.contains_key(&region) {
            self.budget.0 += 1;
            if self.budget.0 > MOST_REGIONS {
                let why = "there is more in shared memory than can be shown";
                return Err(FsError::invalid(&self.ino.path(), why));
            }
            let base = region as u64 * REGION as u64;
            let have = self.valid.saturating_sub(base).min(REGION as u64);
            let have = usize::try_from(have).unwrap_or(REGION);
            let mut bytes = vec![0; REGION];
            self.core
                .reader
                .read_exact(self.ino, base, &mut bytes[..have])?;
            self.regions.insert(region, bytes);
        }
        Ok(self.regions.get_mut(&region).expect("it was just added"))
    }

    fn write(&mut self, off: u64, data: &[u8]) -> Result<()> {
        let mut done = 0;
        while done < data.len() {
            let (region, at) = split(off + done as u64);
            let n = (REGION - at).min(data.len() - done);
            self.region(region)?[at..at + n].copy_from_slice(&data[done..done + n]);
            done += n;
        }
        self.len = self.len.max(off + data.len() as u64);
        Ok(())
    }

    fn lengthen(&mut self, len: u64) -> Result<()> {
        while self.len < len {
            let (region, at) = split(self.len);
            // What is beyond the end is zero already.
            self.region(region)?;
            self.len = len.min(self.len + (REGION - at) as u64);
        }
        Ok(())
    }

    fn cut(&mut self, len: u64) {
        let (region, at) = split(len);
        self.regions.retain(|n, _| *n <= region);
        if let Some(bytes) = self.regions.get_mut(&region) {
            bytes[at..].fill(0);
        }
        self.valid = self.valid.min(len);
        self.len = len;
    }

    /// Makes the regions frames that stay in memory until the end of the mount.
    fn install(self) -> Result<()> {
        let mut frames = Vec::new();
        for (region, bytes) in self.regions {
            let base = region as u64 * REGION as u64;
            let filled = self.len.saturating_sub(base).min(REGION as u64);
            let filled = usize::try_from(filled).unwrap_or(REGION);
            if filled > 0 {
                let buf = DmaBuf::copy_from(&bytes[..filled.next_multiple_of(PAGE)])?;
                let bytes = Arc::new(FillBuf::from_buf(buf, filled));
                frames.push(Frame::new(&self.ino.frames, region, 0, bytes, true));
            }
        }
        let mut tail = self.ino.tail.lock();
        *tail = Tail::new(self.len, tail.allocated);
        for frame in &frames {
            self.ino.frames.install_whole(frame);
        }
        self.ino.len.store(self.len, Ordering::Release);
        Ok(())
    }
}
