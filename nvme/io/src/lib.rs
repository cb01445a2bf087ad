#![doc = include_str!("../README.md")]

mod completion;
pub mod cpu;
pub mod dma;
mod error;
mod limits;
mod op;
mod options;
pub mod process;
pub mod sys;
pub mod uri;

pub use completion::{Completion, SubmitError};
pub use error::{IoError, IoErrorKind, NvmeStatus};
pub use limits::Limits;
pub use op::{CompareAndWrite, Op, OpKind, OpSet, ZoneAction};
