//! What a failed flush leaves behind: the one rule for all devices.
//!
//! Once a flush has failed, nobody can say which of the writes before it are durable: the kernel,
//! for one, reports a failed write-back once and then takes the lost pages for clean. A later
//! flush that succeeds says nothing of them. So every later flush, and every write with FUA, fails
//! until the device is opened again, and whoever opens it then starts from what is really there.

use std::sync::OnceLock;

use pumice_io::{IoError, IoErrorKind, Op};

use crate::device::DeviceInfo;

/// The memory of a device, shared by its channels.
#[derive(Debug, Default)]
pub(crate) struct FlushFault {
    /// The error of the first flush that failed.
    first: OnceLock<String>,
}

impl FlushFault {
    /// The error of an operation that promises durability, after a flush has failed.
    pub(crate) fn check(&self, info: &DeviceInfo, op: &Op) -> Result<(), Box<IoError>> {
        if !matches!(op, Op::Flush) && !op.fua() {
            return Ok(());
        }
        match self.first.get() {
            None => Ok(()),
            Some(first) => {
                let detail = format!(
                    "an earlier flush failed, so what was written before it may be lost; open the \
                     device again (the first error: {first})"
                );
                Err(info.error(op, IoErrorKind::Media, detail))
            }
        }
    }

    /// The result of a flush as it is handed on. A flush that was not carried out (aborted, no
    /// memory, busy) has lost nothing and is not remembered.
    pub(crate) fn settle(
        &self,
        info: &DeviceInfo,
        op: &Op,
        result: Result<(), Box<IoError>>,
    ) -> Result<(), Box<IoError>> {
        if !matches!(op, Op::Flush) {
            return result;
        }
        match result {
            Ok(()) => self.check(info, op),
            Err(e) => {
                self.note(&e);
                Err(e)
            }
        }
    }

    /// A flush, or the flush that belongs to a write with FUA, has failed.
    pub(crate) fn note(&self, e: &IoError) {
        let not_begun = matches!(
            e.kind,
            IoErrorKind::Aborted | IoErrorKind::NoMemory | IoErrorKind::Busy
        );
        if !not_begun && self.first.set(e.to_string()).is_ok() {
            let device = &e.device;
            tracing::error!(device, error = %e, "a flush failed: the device must be opened again");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_lost_stays_lost_and_what_passes_passes() {
        let info = DeviceInfo::new("d", "test", 512, 8);
        let fault = FlushFault::default();
        let failed = |kind| Err(info.error(&Op::Flush, kind, ""));
        for kind in [
            IoErrorKind::Aborted,
            IoErrorKind::NoMemory,
            IoErrorKind::Busy,
        ] {
            assert!(fault.settle(&info, &Op::Flush, failed(kind)).is_err());
            fault.settle(&info, &Op::Flush, Ok(())).unwrap();
        }
        let e = fault.settle(&info, &Op::Flush, failed(IoErrorKind::NoSpace));
        assert_eq!(e.unwrap_err().kind, IoErrorKind::NoSpace);
        for _ in 0..3 {
            let e = fault.settle(&info, &Op::Flush, Ok(())).unwrap_err();
            assert_eq!(e.kind, IoErrorKind::Media);
        }
        let zeroes = |fua| Op::WriteZeroes {
            lba: 0,
            len_blocks: 1,
            fua,
        };
        assert!(fault.check(&info, &zeroes(true)).is_err());
        fault.check(&info, &zeroes(false)).unwrap();
    }
}
