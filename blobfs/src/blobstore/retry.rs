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

/// Returns the error of several operations: the first one, unless a later one may still change the medium.
pub(crate) fn first_or_late(first: Option<Error>, later: Option<Error>) -> Option<Error> {
    match (first, later) {
        (Some(first), Some(later)) if !may_land(&first) && may_land(&later) => Some(later),
        (first, later) => first.or(later),
    }
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

    #[test]
    fn what_may_land_is_told_of_before_what_has_failed() {
        let dev = pumice_bdev::open("malloc://1M").unwrap();
        let write = Op::Write {
            lba: 0,
            data: DmaBuf::zeroed(4096).unwrap().freeze(),
            fua: false,
        };
        let error = |kind| Some(Error::Io(dev.info().error(&write, kind, "test")));
        let kinds = [IoErrorKind::Media, IoErrorKind::TimedOut];
        for (first, later, expected) in [(0, 1, 1), (1, 0, 1), (0, 0, 0)] {
            let found = first_or_late(error(kinds[first]), error(kinds[later]));
            assert!(matches!(found, Some(Error::Io(e)) if e.kind == kinds[expected]));
        }
        assert!(first_or_late(None, error(IoErrorKind::Media)).is_some());
        assert!(first_or_late(None, None).is_none());
    }
}
