//! The numbers of errors, as the kernel gets them.

use fuser::Errno;
use pumice_bdev_control::complain;
use pumice_blobfs::fs::FsError;

/// The result of a request: the kernel gets the number of an error.
pub type Result<T> = std::result::Result<T, Errno>;

/// Returns the number of an error. Those that a user cannot explain are printed, too.
pub fn failed(error: &FsError) -> Errno {
    let number = match error {
        FsError::Unmounted { .. } => libc::ENOTCONN,
        error => error.errno(),
    };
    if matches!(number, libc::EIO | libc::EUCLEAN) {
        complain!("pumice mount: {error}");
    }
    Errno::from_i32(number)
}

/// Turns an error into its number.
pub trait OrErrno<T> {
    fn or_errno(self) -> Result<T>;
}

impl<T> OrErrno<T> for std::result::Result<T, FsError> {
    fn or_errno(self) -> Result<T> {
        self.map_err(|e| failed(&e))
    }
}
