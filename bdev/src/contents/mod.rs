//! The content of a device, and the one rule for overwriting it.
//!
//! Everything that makes a file system, a blobstore or a test pattern on a device asks here first.
//! Only a device that holds nothing but zeroes is written without permission. Any other content,
//! and content that could not be read, needs the option that the error names.

use std::sync::Arc;
use std::time::{Duration, Instant};

use pumice_io::Op;

use crate::error::BdevError;
use crate::executor::AsyncChannel;
use crate::{BlockDevice, DmaBuf};

mod kinds;
mod signatures;

pub use kinds::{Contents, Ours};

/// Number of bytes of one read.
const CHUNK: u64 = 1 << 20;
/// Number of reads in flight.
const DEPTH: u64 = 8;
/// Interval at which a long examination is logged.
const LOG_EVERY: Duration = Duration::from_secs(10);

/// Progress of the examination of a whole device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Progress {
    /// Number of bytes examined.
    pub done_bytes: u64,
    /// Number of bytes to examine.
    pub total_bytes: u64,
}

/// The content that may be overwritten.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Overwrite {
    /// Only zeroes.
    #[default]
    Blank,
    /// Any content, because the user has said so.
    Anything,
}

impl Overwrite {
    /// Returns `Anything` if `force`, otherwise `Blank`.
    pub fn forced(force: bool) -> Overwrite {
        if force {
            Overwrite::Anything
        } else {
            Overwrite::Blank
        }
    }
}

/// Names the content that the beginning and the end of the device show, if it is a known kind.
/// Reads at most 384 KiB. `None` says nothing about the rest of the device, which [`examine`]
/// reads. Blocks.
///
/// # Errors
/// Fails when the device cannot be read.
pub fn recognise(dev: &dyn BlockDevice) -> Result<Option<Contents>, BdevError> {
    signatures::recognise(dev)
}

/// Determines the content of the device. Reads every block that may hold data (a block device as a
/// whole, up to the first byte that is not zero), which can take minutes, and logs its progress.
/// Changes nothing. Blocks.
pub fn examine(dev: &dyn BlockDevice) -> Contents {
    let mut logged = Instant::now();
    examine_with(dev, &mut |progress| {
        if logged.elapsed() >= LOG_EVERY {
            logged = Instant::now();
            let device = &dev.info().name;
            let Progress {
                done_bytes,
                total_bytes,
            } = progress;
            tracing::info!(
                device,
                done_bytes,
                total_bytes,
                "reading the device to see whether it is blank"
            );
        }
    })
}

/// Examines as [`examine`] does, and reports its progress to a function every few MiB.
pub fn examine_with(dev: &dyn BlockDevice, progress: &mut dyn FnMut(Progress)) -> Contents {
    if !dev.info().keeps_data {
        // A stripe may have legs that keep data beside one that keeps nothing.
        return match dev.next_data(0) {
            Ok(None) => Contents::Blank,
            Ok(Some(_)) => Contents::Unknown("only a part of it keeps data".to_owned()),
            Err(e) => Contents::Unknown(e.to_string()),
        };
    }
    let found = match recognise(dev) {
        Ok(Some(found)) => return found,
        Ok(None) => first_data(dev, progress),
        Err(e) => Err(e),
    };
    match found {
        Ok(None) => Contents::Blank,
        Ok(Some(offset)) => {
            Contents::Foreign(format!("data of an unknown kind at byte offset {offset}"))
        }
        Err(e) => Contents::Unknown(e.to_string()),
    }
}

/// Returns the offset of the first byte that is not zero.
fn first_data(
    dev: &dyn BlockDevice,
    progress: &mut dyn FnMut(Progress),
) -> Result<Option<u64>, BdevError> {
    let info = dev.info();
    let block = u64::from(info.block_size);
    let chunk_blocks = info.transfer_blocks(CHUNK);
    let channel = AsyncChannel::new(dev.open_channel()?);
    let mut at = 0;
    while let Some(range) = dev.next_data(at)? {
        at = range.start;
        let end = range.end.min(info.num_blocks);
        while at < end {
            let mut ops = Vec::new();
            let begin = at;
            while at < end && (ops.len() as u64) < DEPTH {
                let blocks = chunk_blocks.min(end - at);
                let len = usize::try_from(blocks * block).unwrap_or(usize::MAX);
                let buf = DmaBuf::new(len).map_err(|source| BdevError::Dma {
                    device: info.name.clone(),
                    source,
                })?;
                ops.push(Op::Read { lba: at, buf });
                at += blocks;
            }
            for (op, result) in channel.block_on(channel.io_all(ops)) {
                result?;
                if let Op::Read { lba, buf } = op
                    && let Some(offset) = first_nonzero(&buf)
                {
                    return Ok(Some(lba * block + offset as u64));
                }
            }
            debug_assert!(at > begin, "each round reads something");
            progress(Progress {
                done_bytes: at * block,
                total_bytes: info.len_bytes(),
            });
        }
        if at >= info.num_blocks {
            // A module may know of data that no block shows.
            if let Some(range) = dev.next_data(at)? {
                return Ok(Some(range.start * block));
            }
            break;
        }
    }
    Ok(None)
}

/// Returns the position of the first byte that is not zero.
pub(crate) fn first_nonzero(bytes: &[u8]) -> Option<usize> {
    const ZEROES: [u8; 4096] = [0; 4096];
    let different = |part: &[u8]| *part != ZEROES[..part.len()];
    let (i, part) = bytes
        .chunks(ZEROES.len())
        .enumerate()
        .find(|(_, part)| different(part))?;
    let within = part.iter().position(|b| *b != 0)?;
    Some(i * ZEROES.len() + within)
}

/// A device that may be overwritten. Everything that makes something on a device begins with one.
///
/// If opening the device has created its file, the file is removed when the device is closed,
/// unless [`Formatting::finish`] was called.
#[derive(Debug)]
#[must_use = "call `finish` when what was made is complete"]
pub struct Formatting {
    dev: Arc<dyn BlockDevice>,
    finished: bool,
}

impl Formatting {
    /// Checks whether the device may be overwritten. Reads as much of it as [`examine`] does,
    /// unless `overwrite` is [`Overwrite::Anything`]. Blocks.
    ///
    /// # Errors
    /// Fails with [`BdevError::NotBlank`], or with [`BdevError::Unsupported`] for a device that
    /// cannot be written. In both cases nothing was changed.
    pub fn begin(
        dev: &Arc<dyn BlockDevice>,
        overwrite: Overwrite,
    ) -> Result<Formatting, BdevError> {
        // From here on, an early end removes the file that was created for the device.
        let formatting = Formatting {
            dev: Arc::clone(dev),
            finished: false,
        };
        may_overwrite(&**dev, overwrite)?;
        Ok(formatting)
    }

    /// Declares the content complete: a file that was created for it stays.
    pub fn finish(mut self) {
        self.finished = true;
        self.dev.keep_file(true);
    }
}

impl Drop for Formatting {
    fn drop(&mut self) {
        if !self.finished {
            self.dev.keep_file(false);
        }
    }
}

/// Refuses a device that must not be overwritten, for tools that write to a device without making
/// anything there. Reads as much of it as [`examine`] does, unless `overwrite` is
/// [`Overwrite::Anything`]. Blocks.
///
/// # Errors
/// Fails with [`BdevError::NotBlank`] and the device's content, or with [`BdevError::Unsupported`]
/// for a device that cannot be written.
pub fn may_overwrite(dev: &dyn BlockDevice, overwrite: Overwrite) -> Result<(), BdevError> {
    let info = dev.info();
    if !info.ops.has(crate::OpKind::Write) {
        return Err(BdevError::Unsupported {
            device: info.name.clone(),
            reason: "is open read-only: nothing can be written".to_owned(),
        });
    }
    if overwrite == Overwrite::Anything {
        return Ok(());
    }
    match examine(dev) {
        Contents::Blank => Ok(()),
        contents => Err(BdevError::NotBlank {
            device: info.name.clone(),
            contents,
        }),
    }
}
