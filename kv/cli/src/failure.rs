//! The failure of a command.

use std::process::ExitCode;

use pumice_bdev::BdevError;
use pumice_bdev_control::complain;
use pumice_blobfs::fs::FsError;

/// The reason why a command failed, as a message.
#[derive(Debug)]
pub struct Failure(String);

impl From<String> for Failure {
    fn from(text: String) -> Failure {
        Failure(text)
    }
}

impl From<FsError> for Failure {
    fn from(e: FsError) -> Failure {
        Failure(e.to_string())
    }
}

impl From<BdevError> for Failure {
    fn from(e: BdevError) -> Failure {
        Failure(e.to_string())
    }
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

/// Prints the reason and returns the exit code.
pub fn fail(command: &str, e: &Failure) -> ExitCode {
    complain!("pumice {command}: {e}");
    ExitCode::FAILURE
}
