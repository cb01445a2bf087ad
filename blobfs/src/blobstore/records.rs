//! The one place through which metadata changes reach the device: a list of records, applied in an order
//! in which a crash between any two writes leaves the old or the new state.

use std::time::Duration;

use pumice_bdev::{DmaBuf, IoErrorKind, Op};

use super::error::Error;
use super::format::{PAGE_SIZE, Page};
use super::geometry::Geometry;
use super::mdio::{MdIo, dma};

/// One step of a change.
#[derive(Debug)]
pub(crate) enum Record {
    /// The super block, of which nothing changes but the mark of a clean store.
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

/// A list of commit points that was cut.
pub(crate) struct Torn {
    /// All of the list.
    pub commits: Commits,
    /// The number of the one that failed: those before it are done.
    pub failed: usize,
    /// Why.
    pub error: Error,
}

/// A page whose write commits.
#[derive(Debug)]
pub(crate) struct CommitPoint {
    /// Its index in the metadata region.
    pub index: u32,
    pub page: Box<Page>,
}

/// How often the write of a commit point is done in all.
const COMMIT_TRIES: u32 = 3;
/// The pause before the first repetition.
const COMMIT_PAUSE: Duration = Duration::from_millis(1);

/// The commit points of a list, and what follows them.
#[derive(Debug, Default)]
pub(crate) struct Commits {
    pub points: Vec<CommitPoint>,
    after: Vec<Op>,
}

impl Commits {
    /// Does the commit points from number `from` on, one by one, each durable before the next, then clears
    /// what nothing names any more. Clearing may fail without harm: it is hygiene, and that is logged.
    ///
    /// The write of one page can be repeated: the bytes are the same. So it is, also after errors that are
    /// not called passing, before it counts as failed.
    pub fn apply(mut self, io: &mut MdIo, geo: &Geometry, from: usize) -> Result<(), Box<Torn>> {
        for failed in from..self.points.len() {
            let point = &self.points[failed];
            if let Err(error) = write_page(io, geo, point.index, &point.page) {
                let commits = self;
                return Err(Box::new(Torn {
                    commits,
                    failed,
                    error,
                }));
            }
        }
        for op in std::mem::take(&mut self.after) {
            if let Err(error) = io.run([op]) {
                tracing::warn!(%error, "what is no longer used could not be cleared");
            }
        }
        Ok(())
    }
}

/// Writes a metadata page durably, some times if need be.
pub(crate) fn write_page(
    io: &mut MdIo,
    geo: &Geometry,
    index: u32,
    page: &Page,
) -> Result<(), Error> {
    repeat(|| {
        let write = Op::Write {
            lba: geo.md_lba(index),
            data: dma(page)?,
            fua: false,
        };
        io.run_durable(vec![write])
    })
}

/// Does a write that can be repeated with the same bytes, some times if need be.
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

/// May the same write succeed when it is repeated at once? Errors that are known to pass have been tried
/// again below.
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

/// May an operation that ended with this error still reach the medium?
pub(crate) fn may_land(error: &Error) -> bool {
    matches!(error, Error::Io(error) if error.kind == IoErrorKind::TimedOut)
}

/// Begins to apply records: writes what nothing names yet, together with the mark of a store that is not
/// clean, durably. Gives the commit points, which are done one by one in the order of the list, each durable
/// before the next, erased roots last; at the end what nothing names any more.
///
/// # Errors
/// The device still has the old state.
pub(crate) fn prepare(
    io: &mut MdIo,
    geo: &Geometry,
    records: Vec<Record>,
) -> Result<Commits, Error> {
    let mut before = Vec::new();
    let mut commits = Commits::default();
    let mut erased_roots = Vec::new();
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
            Record::Commit { index, page } => commits.points.push(CommitPoint { index, page }),
            Record::EraseRoot { index } => erased_roots.push(CommitPoint {
                index,
                page: Box::new([0; PAGE_SIZE]),
            }),
            Record::Erase { index } => commits.after.push(Op::Write {
                lba: geo.md_lba(index),
                data: zeroes()?,
                fua: false,
            }),
            Record::Clear(op) => commits.after.push(op),
        }
        Ok::<(), Error>(())
    };
    records.into_iter().try_for_each(sort)?;
    io.run_durable(before)?;
    commits.points.append(&mut erased_roots);
    Ok(commits)
}
