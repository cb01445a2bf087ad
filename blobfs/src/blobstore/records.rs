//! The one place through which metadata changes reach the device: a list of records, applied in an order
//! in which a crash between any two writes leaves the old or the new state.

use pumice_bdev::{DmaBuf, Op};

use super::error::Error;
use super::format::{PAGE_SIZE, Page};
use super::geometry::Geometry;
use super::mdio::{MdIo, dma};

/// One step of a change.
#[derive(Debug)]
pub(crate) enum Record {
    /// The super block.
    SuperBlock(Box<Page>),
    /// Makes ready the content of clusters that nothing names yet.
    Prepare(Op),
    /// A metadata page that nothing names yet.
    Fresh { index: u32, page: Box<Page> },
    /// A page whose write is a commit point: a root, or the one extent page of a change of one cluster.
    Commit { index: u32, page: Box<Page> },
    /// Zeroes a root: the commit point of a deletion.
    EraseRoot { index: u32 },
    /// Zeroes a page that nothing names any more.
    Erase { index: u32 },
    /// Clears clusters that nothing names any more.
    Clear(Op),
}

/// When applying failed.
pub(crate) enum Failure {
    /// Before the first commit point: the device still has the old state.
    Before(Error),
    /// At a commit point: the device has the old or the new state, or something between of a list with
    /// several commit points.
    Torn(Error),
}

/// Applies records. First what nothing names yet, together with the super block (with a volatile cache:
/// durable before anything else), then the commit points one by one in the order of the list, each
/// durable before the next, erased roots last; at the end what nothing names any more.
///
/// Erasing and clearing may fail without harm: they are hygiene, and that is logged.
pub(crate) fn apply(io: &mut MdIo, geo: &Geometry, records: Vec<Record>) -> Result<(), Failure> {
    let mut before = Vec::new();
    let mut commits = Vec::new();
    let mut erased_roots = Vec::new();
    let mut after = Vec::new();
    let write = |lba: u64, page: &Page| {
        Ok::<Op, Error>(Op::Write {
            lba,
            data: dma(page)?,
            fua: false,
        })
    };
    let zeroes = || Ok::<_, Error>(DmaBuf::zeroed(PAGE_SIZE)?.freeze());
    let sort = |record| {
        match record {
            Record::SuperBlock(page) => before.push(write(0, &page)?),
            Record::Prepare(op) => before.push(op),
            Record::Fresh { index, page } => before.push(write(geo.md_lba(index), &page)?),
            Record::Commit { index, page } => commits.push(write(geo.md_lba(index), &page)?),
            Record::EraseRoot { index } => {
                erased_roots.push(Op::Write {
                    lba: geo.md_lba(index),
                    data: zeroes()?,
                    fua: false,
                });
            }
            Record::Erase { index } => after.push(Op::Write {
                lba: geo.md_lba(index),
                data: zeroes()?,
                fua: false,
            }),
            Record::Clear(op) => after.push(op),
        }
        Ok::<(), Error>(())
    };
    records
        .into_iter()
        .try_for_each(sort)
        .map_err(Failure::Before)?;
    io.run_durable(before).map_err(Failure::Before)?;
    for commit in commits.into_iter().chain(erased_roots) {
        io.run_durable(vec![commit]).map_err(Failure::Torn)?;
    }
    for op in after {
        if let Err(error) = io.run([op]) {
            tracing::warn!(%error, "what is no longer used could not be cleared");
        }
    }
    Ok(())
}
