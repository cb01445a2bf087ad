//! The reasons why a command fails.

use std::io::{self, Write as _};

/// The reason why a command failed, as a message.
#[derive(Debug)]
pub struct DbFailure {
    pub text: String,
    /// Whether the reader of the output went away.
    pub is_closed_pipe: bool,
}

impl DbFailure {
    /// Returns it with more about it.
    pub fn with(mut self, more: &str) -> DbFailure {
        self.text.push_str("; ");
        self.text.push_str(more);
        self
    }
}

impl From<String> for DbFailure {
    fn from(text: String) -> DbFailure {
        DbFailure {
            text,
            is_closed_pipe: false,
        }
    }
}

impl From<pumice::Error> for DbFailure {
    fn from(e: pumice::Error) -> DbFailure {
        DbFailure::from(pumice::chain(&e))
    }
}

impl From<pumice::rocksdb::Error> for DbFailure {
    fn from(e: pumice::rocksdb::Error) -> DbFailure {
        DbFailure::from(e.to_string())
    }
}

impl From<io::Error> for DbFailure {
    fn from(e: io::Error) -> DbFailure {
        DbFailure {
            is_closed_pipe: e.kind() == io::ErrorKind::BrokenPipe,
            text: format!("standard input or output: {e}"),
        }
    }
}

pub type Outcome = Result<(), DbFailure>;

/// Writes a line to standard error, which may be closed.
pub fn complain(line: &str) {
    let _ = writeln!(io::stderr(), "{line}");
}
