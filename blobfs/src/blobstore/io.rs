//! The data path: reads and writes of open blobs on the caller's channel, without a lock that
//! threads share.

use std::sync::Arc;

use pumice_bdev::{AsyncChannel, DmaBuf, DmaSlice, IoError, Op, Ticket, join_all};

use super::blob::Blob;
use super::data::{Access, Cut, Part, Piece, Place, slice_of, write_ops};
use super::edit::never_ends;
use super::error::Error;
use super::gate::{ENTRY_TIMEOUT, Inside};
use super::mdio::Persist;
use super::shared::Frozen;
use super::thin::Fill;
use super::view::View;

/// Longest part of a range that is cleared.
const CLEAR_BYTES: u64 = 1 << 30;

impl Blob {
    /// Checks that a range lies in the blob and in whole blocks.
    #[inline]
    pub(crate) fn check_range(&self, view: &View, offset: u64, len: u64) -> Result<(), Error> {
        let inner = &self.store.inner;
        let size = view.num_clusters() * inner.cluster_size;
        if (offset | len) & (inner.block_size - 1) != 0 {
            let text = format!(
                "blob {}: {len} bytes at offset {offset}: both must be multiples of {} bytes",
                self.id(),
                inner.block_size
            );
            return Err(Error::InvalidInput(text));
        }
        if offset > size || len > size - offset {
            return Err(Error::OutOfRange {
                blob: self.id(),
                offset,
                len,
                size,
            });
        }
        Ok(())
    }

    /// Returns the device block of an I/O inside one cluster that the blob itself has, which is the
    /// common case.
    #[inline]
    pub(crate) fn one_place(&self, view: &View, offset: u64, len: u64) -> Option<u64> {
        let inner = &self.store.inner;
        let index = offset / inner.cluster_size;
        let within = offset % inner.cluster_size;
        if len == 0 || within + len > inner.cluster_size || len > inner.cut.longest {
            return None;
        }
        Some(view.own.lba(index)? + within / inner.block_size)
    }

    /// Reads into `buf` from byte `offset`, both in whole device blocks. Returns the buffer.
    ///
    /// # Errors
    /// Fails for a range outside of the blob, with device errors, and with [`Error::Busy`] if the
    /// blob's clusters move for longer than two minutes.
    pub async fn read(&self, ch: &AsyncChannel, offset: u64, buf: DmaBuf) -> Result<DmaBuf, Error> {
        let inside = self.enter().await?;
        let place = {
            let view = self.shared.view.load();
            self.check_range(&view, offset, buf.len() as u64)?;
            self.one_place(&view, offset, buf.len() as u64)
        };
        if let Some(lba) = place {
            let result = ch.read(lba, buf).await;
            drop(inside);
            return Ok(result?);
        }
        let access = Access { blob: self, inside };
        let len = buf.len() as u64;
        let read = match access.parts(offset, len)?[..] {
            [
                Part {
                    at: Place::Device(lba),
                    ..
                },
            ] => Ok(ch.read(lba, buf).await?),
            _ => read_pieces(ch, access.pieces(offset, len, usize::MAX)?, buf).await,
        };
        drop(access);
        read
    }

    /// Passes the blob's gate. Waits while its clusters move.
    ///
    /// # Errors
    /// [`Error::Busy`] if they move for longer than [`ENTRY_TIMEOUT`].
    #[inline]
    async fn enter(&self) -> Result<Inside<'_>, Error> {
        let inside = self.shared.gate.enter(ENTRY_TIMEOUT).await;
        inside.ok_or_else(|| {
            Error::Busy(format!(
                "the clusters of blob {} have been moving for {} s; poll or drop the future that \
                 moves them",
                self.shared.id,
                ENTRY_TIMEOUT.as_secs()
            ))
        })
    }

    /// Begins I/O on the blob. Waits while its clusters move. A thread that has one `Access` must
    /// not ask for another of the same blob: a thread that moves clusters waits for the first and
    /// blocks the second.
    ///
    /// # Errors
    /// Fails when there is no channel to wait on, and when the clusters move for too long.
    pub(crate) fn access(&self) -> Result<Access<'_>, Error> {
        let inside = match self.shared.gate.try_enter() {
            Some(inside) => inside,
            None => {
                let ch = self.store.channel()?;
                ch.block_on(self.enter())?
            }
        };
        Ok(Access { blob: self, inside })
    }

    /// Waits until no I/O is in flight on the blob, before it is closed for good.
    ///
    /// # Errors
    /// Fails when the I/O does not end.
    pub(crate) fn quiesce(&self) -> Result<(), Error> {
        let blobs = vec![Arc::clone(&self.shared)];
        let drained = Frozen::default().close(blobs, &|| self.store.drive_shared());
        drained.map_err(never_ends)
    }

    /// Writes `data` at byte `offset`, both in whole device blocks. A thin blob first gets its
    /// missing clusters (which blocks). With `fua` the write is durable on return, otherwise after
    /// [`Blobstore::flush`](super::Blobstore::flush).
    ///
    /// A write whose future is dropped while it is in flight may still take effect. Until the
    /// device has answered (the channel is polled, or dropped), the blob counts as open, and none
    /// of its clusters can be moved.
    ///
    /// The first write to a cluster of a thin blob is a change of metadata. A future that has to
    /// make one must be polled or dropped: until then other changes of the blob wait, of this thread
    /// and of others, and those that block fail with [`Error::Busy`] after 20 seconds.
    ///
    /// # Errors
    /// Fails for a range outside of the blob, for a read-only blob or store, without space, and
    /// with device errors. After a device error a part may have been written. Without space nothing
    /// was, unless others allocated clusters at the same time.
    pub async fn write(
        &self,
        ch: &AsyncChannel,
        offset: u64,
        data: DmaSlice,
        fua: bool,
    ) -> Result<(), Error> {
        let len = data.len() as u64;
        self.settle()?;
        loop {
            let inside = self.enter().await?;
            let (place, parts) = {
                let view = self.shared.view.load();
                self.check_writable(&view)?;
                self.check_range(&view, offset, len)?;
                match self.one_place(&view, offset, len) {
                    Some(lba) => (Some(lba), Vec::new()),
                    None => (None, self.own_parts(&view, offset, len)),
                }
            };
            if let Some(lba) = place {
                let write = WriteInFlight::new(self, ch, inside);
                let result = ch.write(lba, data, fua && self.needs_fua()).await;
                write.ended();
                result?;
                return self.flush_if(ch, fua).await;
            }
            let missing = parts.iter().find(|part| part.at == Place::Zeroes).copied();
            let data = std::slice::from_ref(&data);
            if let Some(missing) = missing {
                drop(inside);
                self.allocate_missing(&parts, missing, offset, data).await?;
                continue;
            }
            let write = WriteInFlight::new(self, ch, inside);
            let writes = write_ops(&parts, data, fua && self.needs_fua());
            let outcomes = ch.io_all(writes).await;
            write.ended();
            for (_, result) in outcomes {
                result?;
            }
            return self.flush_if(ch, fua).await;
        }
    }

    /// Starts a write of `data`, consecutive slices, at byte `offset`, all in whole device blocks,
    /// on the channels that threads share. `done` gets the result, on whichever thread takes the
    /// completion. A thin blob first gets its missing clusters, which blocks. With `fua`, which the
    /// device must support, the write is durable when it is done.
    ///
    /// # Errors
    /// Fails as [`Blob::write`] does. `done` is not called then.
    pub(crate) fn start_write(
        &self,
        offset: u64,
        data: &[DmaSlice],
        fua: bool,
        done: impl FnOnce(Result<(), Box<IoError>>) + Send + 'static,
    ) -> Result<Ticket, Error> {
        let len = data.iter().map(|slice| slice.len() as u64).sum();
        self.settle()?;
        loop {
            let access = self.access()?;
            let parts = access.own_parts(offset, len)?;
            let missing = parts.iter().find(|part| part.at == Place::Zeroes).copied();
            if let Some(missing) = missing {
                drop(access);
                let ch = self.store.channel()?;
                ch.block_on(self.allocate_missing(&parts, missing, offset, data))?;
                continue;
            }
            let shared = self.store.shared()?;
            let ops = write_ops(&parts, data, fua);
            let held = access.hold();
            return Ok(shared.submit(ops, move |outcome| {
                drop(held);
                done(outcome.result);
            }));
        }
    }

    fn own_parts(&self, view: &View, offset: u64, len: u64) -> Vec<Part> {
        let cut = &self.store.inner.cut;
        cut.parts(offset, len, |index| view.own_source(index))
    }

    /// Gives a thin blob the clusters of `missing`, one of the `parts` of a write of `data` at
    /// `offset`. Others may free some of them again before the write reaches them.
    async fn allocate_missing(
        &self,
        parts: &[Part],
        missing: Part,
        offset: u64,
        data: &[DmaSlice],
    ) -> Result<(), Error> {
        self.check_room(parts, offset)?;
        let size = self.store.cluster_size();
        for index in clusters(missing, offset, size) {
            // A cluster that is overwritten as a whole needs no other content first.
            let start = (index * size).checked_sub(offset);
            let start = start.and_then(|start| usize::try_from(start).ok());
            let end = usize::try_from(size)
                .ok()
                .zip(start)
                .map(|(size, start)| start + size);
            let whole = start
                .zip(end)
                .and_then(|(start, end)| slice_of(data, start..end));
            let fill = whole.map_or(Fill::Backing, Fill::Data);
            self.store.allocate(self, index, fill).await?;
        }
        Ok(())
    }

    pub(crate) fn check_writable(&self, view: &View) -> Result<(), Error> {
        if self.store.inner.read_only {
            Err(Error::ReadOnlyStore)
        } else if view.read_only {
            Err(Error::ReadOnly(self.id()))
        } else {
            Ok(())
        }
    }

    fn needs_fua(&self) -> bool {
        self.store.inner.can.persist() == Persist::Fua
    }

    /// Checks that there are enough free clusters for an I/O at `offset`. A write that does not fit
    /// writes nothing. If others allocate clusters meanwhile it may end with a part.
    fn check_room(&self, parts: &[Part], offset: u64) -> Result<(), Error> {
        let size = self.store.cluster_size();
        let holes = parts.iter().filter(|part| part.at == Place::Zeroes);
        let needed = holes.map(|hole| clusters(*hole, offset, size).count() as u64);
        self.store.check_room(needed.sum())
    }

    /// Flushes after a durable write on a device that has a cache and no FUA.
    async fn flush_if(&self, ch: &AsyncChannel, durable: bool) -> Result<(), Error> {
        if !durable || self.store.inner.can.persist() != Persist::Flush {
            return Ok(());
        }
        ch.flush().await?;
        self.store.check_flushes()
    }

    /// Makes `len` bytes from `offset` read as zeroes. On a thin blob without a parent, completely
    /// covered clusters are freed, which is a change of metadata: the future must be polled or
    /// dropped, as that of [`Blob::write`].
    ///
    /// # Errors
    /// Fails as [`Blob::write`] does.
    pub async fn write_zeroes(
        &self,
        ch: &AsyncChannel,
        offset: u64,
        len: u64,
    ) -> Result<(), Error> {
        self.clear(ch, offset, len, true).await
    }

    /// Declares that the contents of `len` bytes from `offset` are not needed: they read as zeroes,
    /// or as before. On a thin blob without a parent, completely covered clusters are freed, which is
    /// a change of metadata: the future must be polled or dropped, as that of [`Blob::write`]. I/O in
    /// flight on the blob ends first, so while this future is pending its thread must not make a
    /// blocking call on the same blob.
    ///
    /// # Errors
    /// Fails as [`Blob::write`] does.
    pub async fn unmap(&self, ch: &AsyncChannel, offset: u64, len: u64) -> Result<(), Error> {
        self.clear(ch, offset, len, false).await
    }

    async fn clear(
        &self,
        ch: &AsyncChannel,
        offset: u64,
        len: u64,
        zero: bool,
    ) -> Result<(), Error> {
        let inner = &self.store.inner;
        let size = inner.cluster_size;
        {
            let view = self.shared.view.load();
            self.check_writable(&view)?;
            self.check_range(&view, offset, len)?;
        }
        self.settle()?;
        // Whole clusters of a thin blob are freed.
        let whole = offset.div_ceil(size)..(offset + len) / size;
        if self.is_thin() && !whole.is_empty() {
            self.store.release(self, whole).await?;
        }
        loop {
            let inside = self.enter().await?;
            let (parts, backed) = {
                let view = self.shared.view.load();
                self.check_range(&view, offset, len)?;
                let cut = Cut {
                    longest: CLEAR_BYTES,
                    ..inner.cut
                };
                let parts = cut.parts(offset, len, |index| view.own_source(index));
                (parts, view.has_backing())
            };
            let hole = parts
                .iter()
                .find(|part| part.at == Place::Zeroes && zero && backed);
            if let Some(hole) = hole {
                drop(inside);
                self.check_room(&parts, offset)?;
                for index in clusters(*hole, offset, size) {
                    let whole = index * size >= offset && (index + 1) * size <= offset + len;
                    let fill = if whole { Fill::Zeroes } else { Fill::Backing };
                    self.store.allocate(self, index, fill).await?;
                }
                continue;
            }
            let write = WriteInFlight::new(self, ch, inside);
            let mut ops = Vec::new();
            for part in &parts {
                let Place::Device(lba) = part.at else {
                    continue;
                };
                let blocks = part.len / inner.block_size;
                let unmaps = match zero {
                    true => Vec::new(),
                    false => inner.can.unmaps(lba, blocks),
                };
                match unmaps.is_empty() {
                    true => ops.extend(inner.can.zeroes(lba, blocks)?),
                    false => ops.extend(unmaps),
                }
            }
            let outcomes = ch.io_all(ops).await;
            write.ended();
            for (_, result) in outcomes {
                result?;
            }
            return Ok(());
        }
    }

    /// Reads as [`Blob::read`] does, on this thread's channel. Blocks.
    ///
    /// # Errors
    /// Fails as [`Blob::read`] does.
    pub fn read_at(&self, offset: u64, buf: DmaBuf) -> Result<DmaBuf, Error> {
        let ch = self.store.channel()?;
        ch.block_on(self.read(&ch, offset, buf))
    }

    /// Writes as [`Blob::write`] does, on this thread's channel. Blocks.
    ///
    /// # Errors
    /// Fails as [`Blob::write`] does.
    pub fn write_at(&self, offset: u64, data: DmaSlice, fua: bool) -> Result<(), Error> {
        let ch = self.store.channel()?;
        ch.block_on(self.write(&ch, offset, data, fua))
    }

    /// Reads into several buffers one after another, all in flight together.
    ///
    /// # Errors
    /// Fails as [`Blob::read`] does.
    pub async fn read_vectored(
        &self,
        ch: &AsyncChannel,
        offset: u64,
        bufs: Vec<DmaBuf>,
    ) -> Result<Vec<DmaBuf>, Error> {
        let mut at = offset;
        let reads = bufs.into_iter().map(|buf| {
            let offset = at;
            at += buf.len() as u64;
            self.read(ch, offset, buf)
        });
        join_all(reads.collect::<Vec<_>>())
            .await
            .into_iter()
            .collect()
    }

    /// Writes several buffers one after another, all in flight together.
    ///
    /// # Errors
    /// Fails as [`Blob::write`] does.
    pub async fn write_vectored(
        &self,
        ch: &AsyncChannel,
        offset: u64,
        data: Vec<DmaSlice>,
        fua: bool,
    ) -> Result<(), Error> {
        let mut at = offset;
        let writes = data.into_iter().map(|data| {
            let offset = at;
            at += data.len() as u64;
            self.write(ch, offset, data, fua)
        });
        join_all(writes.collect::<Vec<_>>())
            .await
            .into_iter()
            .collect()
    }

    /// Zeroes as [`Blob::write_zeroes`] does, on this thread's channel. Blocks.
    ///
    /// # Errors
    /// Fails as [`Blob::write`] does.
    pub fn write_zeroes_at(&self, offset: u64, len: u64) -> Result<(), Error> {
        let ch = self.store.channel()?;
        ch.block_on(self.write_zeroes(&ch, offset, len))
    }

    /// Unmaps as [`Blob::unmap`] does, on this thread's channel. Blocks.
    ///
    /// # Errors
    /// Fails as [`Blob::write`] does.
    pub fn unmap_at(&self, offset: u64, len: u64) -> Result<(), Error> {
        let ch = self.store.channel()?;
        ch.block_on(self.unmap(&ch, offset, len))
    }
}

/// Returns the clusters that a part of a range from byte `offset` on touches.
fn clusters(part: Part, offset: u64, size: u64) -> std::ops::Range<u64> {
    let start = offset + part.offset;
    start / size..(start + part.len).div_ceil(size)
}

/// Reads consecutive pieces into `buf`.
async fn read_pieces(
    ch: &AsyncChannel,
    pieces: Vec<Piece>,
    mut buf: DmaBuf,
) -> Result<DmaBuf, Error> {
    let reads = pieces.into_iter().map(|piece| async move {
        match piece {
            Piece::Filled(buf) => Ok(buf),
            Piece::FromDevice(op) => match ch.io(op).await {
                (Op::Read { buf, .. }, Ok(())) => Ok(buf),
                (_, Err(error)) => Err(error),
                (op, Ok(())) => unreachable!("a read came back as {op:?}"),
            },
        }
    });
    let mut at = 0;
    for read in join_all(reads).await {
        let read = read?;
        buf[at..at + read.len()].copy_from_slice(&read);
        at += read.len();
    }
    Ok(buf)
}

/// A write in flight. If its future is dropped before the write has ended, the write leaves the
/// gate when the device has answered: until then the cluster must not be given to another blob.
struct WriteInFlight<'a> {
    blob: &'a Blob,
    ch: &'a AsyncChannel,
    inside: Option<Inside<'a>>,
}

impl<'a> WriteInFlight<'a> {
    fn new(blob: &'a Blob, ch: &'a AsyncChannel, inside: Inside<'a>) -> WriteInFlight<'a> {
        WriteInFlight {
            blob,
            ch,
            inside: Some(inside),
        }
    }

    fn ended(mut self) {
        self.inside = None;
    }
}

impl Drop for WriteInFlight<'_> {
    fn drop(&mut self) {
        if let Some(inside) = self.inside.take() {
            let owed = self.blob.shared.owe(inside);
            self.ch.keep_for_orphans(Box::new(owed));
        }
    }
}
