//! Operations as system calls that block.

use std::io;
use std::os::unix::fs::FileExt;
use std::time::Duration;

use pumice_io::dma::{DmaBuf, DmaSlice};
use pumice_io::sys::file as sys;
use pumice_io::{Completion, Op};

use super::slot::{Slot, Step};
use super::{SharedFile, Zeroing};

/// Least time-out of a wait that may make the call itself, which has none.
pub(super) const CALL_MIN: Duration = Duration::from_millis(10);

/// Carries out the whole operation. Blocks.
pub(super) fn run(shared: &SharedFile, mut slot: Slot) -> Completion {
    loop {
        let result = call(shared, &mut slot).map_err(|e| e.raw_os_error().unwrap_or(libc::EIO));
        let result = result.map(|n| u32::try_from(n).unwrap_or(u32::MAX));
        if let Some(result) = slot.advance(result, shared) {
            return Completion {
                tag: slot.tag,
                op: slot.op,
                result,
            };
        }
    }
}

fn call(shared: &SharedFile, slot: &mut Slot) -> io::Result<usize> {
    let file = &shared.file;
    let (at, left) = (slot.offset + slot.done, slot.len - slot.done);
    let punch = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    let zero = libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE;
    match slot.step {
        Step::Sync => file.sync_data().map(|()| 0),
        Step::Zero(Zeroing::ZeroRange) => sys::fallocate(file, zero, at, left).map(|()| 0),
        Step::Punch => sys::fallocate(file, punch, at, left).map(|()| 0),
        Step::Discard => sys::discard(file, at, left).map(|()| 0),
        Step::Zero(Zeroing::Write) => {
            let zeroes = shared.zeroes().map_err(io::Error::other)?;
            let n = usize::try_from(left)
                .unwrap_or(usize::MAX)
                .min(zeroes.len());
            file.write_at(&zeroes[..n], at)
        }
        Step::Transfer => transfer(file, slot, at),
    }
}

fn transfer(file: &std::fs::File, slot: &mut Slot, at: u64) -> io::Result<usize> {
    let skip = usize::try_from(slot.done).unwrap_or(usize::MAX);
    let is_dsync = slot.is_dsync();
    match &mut slot.op {
        Op::Read { buf, .. } => file.read_at(&mut buf[skip..], at),
        Op::Write { data, .. } if is_dsync => {
            match sys::write_durable_at(file, &data[skip..], at) {
                // A filter of system calls that is older than this one, or a file system that does not know
                // the flag. The C library makes the former's ENOSYS an EOPNOTSUPP.
                Err(e) if is_unknown(&e) => {
                    let written = file.write_at(&data[skip..], at);
                    slot.sync_behind();
                    written
                }
                result => result,
            }
        }
        Op::Write { data, .. } => file.write_at(&data[skip..], at),
        // Each call transfers one part; the state machine asks for the next one.
        Op::ReadV { bufs, .. } => match place_of(bufs.iter().map(DmaBuf::len), skip) {
            Some((part, skip)) => file.read_at(&mut bufs[part][skip..], at),
            None => Ok(0),
        },
        Op::WriteV { data, .. } => match place_of(data.iter().map(DmaSlice::len), skip) {
            Some((part, skip)) => file.write_at(&data[part][skip..], at),
            None => Ok(0),
        },
        _ => Ok(0),
    }
}

/// Whether a system call failed because it is not known here.
fn is_unknown(error: &io::Error) -> bool {
    let unknown = [libc::ENOSYS, libc::EPERM, libc::EOPNOTSUPP];
    error.raw_os_error().is_some_and(|e| unknown.contains(&e))
}

/// Returns the number of the part that has byte `skip` of all parts, and the byte's place in it.
fn place_of(lens: impl Iterator<Item = usize>, mut skip: usize) -> Option<(usize, usize)> {
    for (part, len) in lens.enumerate() {
        if skip < len {
            return Some((part, skip));
        }
        skip -= len;
    }
    None
}
