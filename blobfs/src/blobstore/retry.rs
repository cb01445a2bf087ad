//! Writes that can be repeated, because the bytes are the same.

use std::time::Duration;

use pumice_bdev::{IoErrorKind, OpKind};

use super::error::Error;

/// Number of times that a write is sent before it counts as failed.
const COMMIT_TRIES: u32 = 3;
/// The pause before the first repetition.
const COMMIT_PAUSE: Duration = Duration::from_millis(1);

/// Performs a write that can be repeated with the same bytes, several times if necessary.
pub(crate) fn repeat(mut write: impl FnMut() -> Result<(), Error>) -> Result<(), Error> {
    let mut tries = 1;
    loop {
        match write() {
            Err(error) if tries < COMMIT_TRIES && may_help(&error) => {
                tracing::warn!(%error, "a metadata page is written again");
                std::thread::sleep(COMMIT_PAUSE * 4u32.pow(tries - 1));
                tries += 1;
            }
            result => return result,
        }
    }
}

/// Whether the same write may succeed when it is repeated at once. Errors that pass have been
/// retried below.
fn may_help(error: &Error) -> bool {
    let Error::Io(error) = error else {
        return false;
    };
    matches!(
        error.kind,
        IoErrorKind::Media
            | IoErrorKind::Short { .. }
            | IoErrorKind::Nvme { .. }
            | IoErrorKind::Os(_)
    )
}

/// Whether an operation that ended with this error may still change the medium. A read never does.
pub(crate) fn may_land(error: &Error) -> bool {
    matches!(error, Error::Io(error)
        if error.kind == IoErrorKind::TimedOut && error.op != OpKind::Read)
}

#[cfg(test)]
mod tests {
    use pumice_bdev::{DmaBuf, Op};

    use super::*;

    #[test]
    fn what_has_timed_out_may_land_unless_it_is_a_read() {
        let dev = pumice_bdev::open("malloc://1M").unwrap();
        let buf = || DmaBuf::zeroed(4096).unwrap();
        let ops = [
            (Op::Read { lba: 0, buf: buf() }, false),
            (
                Op::Write {
                    lba: 0,
                    data: buf().freeze(),
                    fua: false,
                },
                true,
            ),
            (Op::Flush, true),
        ];
        for (op, may) in ops {
            let error = |kind| Error::Io(dev.info().error(&op, kind, "test"));
            assert_eq!(may_land(&error(IoErrorKind::TimedOut)), may, "{op:?}");
            assert!(!may_land(&error(IoErrorKind::Media)), "{op:?}");
        }
    }
}
