//! The state after a failed flush: one rule for all devices.
//!
//! After a failed flush it is unknown which of the writes before it are durable. The kernel, for
//! example, reports a failed writeback once and then treats the lost pages as clean, and a later
//! successful flush says nothing about them. So every later flush, and every write with FUA, fails
//! until the device is opened again. Its user then starts from the content that is really there.

use std::sync::OnceLock;

use pumice_io::{IoError, IoErrorKind, Op};

use crate::device::DeviceInfo;

/// The failed flush of a device, if there was one. The device's channels share it.
#[derive(Debug, Default)]
pub(crate) struct FlushFault {
    /// The error of the first failed flush.
    first: OnceLock<String>,
}

impl FlushFault {
    /// Returns an error for an operation that promises durability after a failed flush.
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

    /// Returns the result of a flush for the submitter. A flush that may be sent again (aborted, no memory, busy, an NVMe status
    /// without Do Not Retry) has lost nothing and is not recorded: the next one that succeeds makes everything durable.
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

    /// Records the failure of a flush, or of the flush that belongs to a write with FUA.
    pub(crate) fn note(&self, e: &IoError) {
        if !e.is_retryable() && self.first.set(e.to_string()).is_ok() {
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
        let status = |dnr| IoErrorKind::Nvme { sct: 0, sc: 6, dnr };
        for kind in [
            IoErrorKind::Aborted,
            IoErrorKind::NoMemory,
            IoErrorKind::Busy,
            status(false),
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
        let other = FlushFault::default();
        assert!(
            other
                .settle(&info, &Op::Flush, failed(status(true)))
                .is_err()
        );
        assert!(other.settle(&info, &Op::Flush, Ok(())).is_err());
    }
}
