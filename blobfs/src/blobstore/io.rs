//! The data path: reads and writes of open blobs on the caller's channel, without a lock that threads share.

use pumice_bdev::{AsyncChannel, DmaBuf, DmaSlice, IoError, Op, OpKind, join_all};

use super::blob::Blob;
use super::error::Error;
use super::thin::Fill;
use super::view::{Source, View};

/// Longest single write of zeroes to a device that has no operation for it.
const ZEROES_BYTES: usize = 1 << 20;

/// A part of an I/O that lies in one place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Piece {
    /// Where, with the cluster's own offset already added: a device block, or nothing.
    at: Place,
    /// Offset in the I/O, in bytes.
    offset: u64,
    /// Bytes.
    len: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    Lba(u64),
    Zeroes,
    /// Byte offset in the external snapshot.
    External(u64),
}

impl Blob {
    /// Checks that a range lies in the blob and in whole blocks.
    #[inline]
    fn check_range(&self, view: &View, offset: u64, len: u64) -> Result<(), Error> {
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

    /// The device block of an I/O within one cluster that the blob has itself; the common case.
    #[inline]
    fn one_place(&self, view: &View, offset: u64, len: u64) -> Option<u64> {
        let inner = &self.store.inner;
        let index = offset / inner.cluster_size;
        let within = offset % inner.cluster_size;
        if len == 0
            || within + len > inner.cluster_size
            || len / inner.block_size > inner.max_io_blocks
        {
            return None;
        }
        Some(view.own.lba(index)? + within / inner.block_size)
    }

    /// Cuts a range by where its clusters are; neighbours on the device stay together.
    fn pieces(&self, view: &View, offset: u64, len: u64, own_only: bool) -> Vec<Piece> {
        let inner = &self.store.inner;
        let max = inner.max_io_blocks.saturating_mul(inner.block_size);
        let mut pieces: Vec<Piece> = Vec::new();
        let mut done = 0;
        while done < len {
            let index = (offset + done) / inner.cluster_size;
            let within = (offset + done) % inner.cluster_size;
            let now = (inner.cluster_size - within).min(len - done);
            let source = match view.own.cluster(index) {
                Some(cluster) => Source::Cluster(cluster),
                None if own_only => Source::Zeroes,
                None => view.source(index),
            };
            let at = match source {
                Source::Cluster(cluster) => {
                    let bytes = u64::from(cluster) * inner.cluster_size + within;
                    Place::Lba(bytes / inner.block_size)
                }
                Source::Zeroes => Place::Zeroes,
                Source::External => Place::External(offset + done),
            };
            match pieces.last_mut() {
                Some(last) if last.follows(at, inner.block_size) && last.len + now <= max => {
                    last.len += now;
                }
                _ => {
                    let mut rest = Piece {
                        at,
                        offset: done,
                        len: now,
                    };
                    while rest.len > max && matches!(at, Place::Lba(_)) {
                        let (first, second) = rest.split(max, inner.block_size);
                        pieces.push(first);
                        rest = second;
                    }
                    pieces.push(rest);
                }
            }
            done += now;
        }
        pieces
    }

    /// Reads into `buf` from byte `offset`; both in whole device blocks. Gives the buffer back.
    ///
    /// # Errors
    /// A range outside of the blob, device errors.
    pub async fn read(&self, ch: &AsyncChannel, offset: u64, buf: DmaBuf) -> Result<DmaBuf, Error> {
        let inside = self.shared.gate.enter().await;
        let place = {
            let view = self.shared.view.load();
            self.check_range(&view, offset, buf.len() as u64)?;
            self.one_place(&view, offset, buf.len() as u64)
        };
        let result = match place {
            Some(lba) => ch.read(lba, buf).await.map_err(Error::from),
            None => self.read_pieces(ch, offset, buf).await,
        };
        drop(inside);
        result
    }

    async fn read_pieces(
        &self,
        ch: &AsyncChannel,
        offset: u64,
        mut buf: DmaBuf,
    ) -> Result<DmaBuf, Error> {
        let view = self.shared.view.load_full();
        let pieces = self.pieces(&view, offset, buf.len() as u64, false);
        if let [
            Piece {
                at: Place::Lba(lba),
                ..
            },
        ] = pieces[..]
        {
            return Ok(ch.read(lba, buf).await?);
        }
        let mut reads = Vec::new();
        let mut places = Vec::new();
        for piece in &pieces {
            let range = piece.range();
            match piece.at {
                Place::Lba(lba) => {
                    reads.push(ch.read(lba, DmaBuf::new(range.len())?));
                    places.push(range);
                }
                Place::Zeroes => buf[range].fill(0),
                Place::External(at) => {
                    let external = view
                        .external
                        .as_ref()
                        .expect("a source in the external snapshot");
                    external.read(at, &mut buf[range])?;
                }
            }
        }
        for (read, range) in join_all(reads).await.into_iter().zip(places) {
            buf[range].copy_from_slice(&read?);
        }
        Ok(buf)
    }

    /// Writes `data` at byte `offset`, both in whole device blocks. A thin blob first gets the clusters
    /// that it does not have (which blocks). With `fua` it is durable on return, else after
    /// [`Blobstore::flush`](super::Blobstore::flush).
    ///
    /// A write whose future is dropped while it is on its way may still land. Until the device has answered
    /// (the channel is polled, or dropped), the blob counts as open, and no cluster of it can be moved.
    ///
    /// # Errors
    /// A range outside of the blob, a read-only blob or store, no space, device errors. After a device error a
    /// part may have been written; without space nothing was, unless others took clusters at the same time.
    pub async fn write(
        &self,
        ch: &AsyncChannel,
        offset: u64,
        data: DmaSlice,
        fua: bool,
    ) -> Result<(), Error> {
        let len = data.len() as u64;
        loop {
            let inside = self.shared.gate.enter().await;
            let (place, pieces) = {
                let view = self.shared.view.load();
                self.check_writable(&view)?;
                self.check_range(&view, offset, len)?;
                match self.one_place(&view, offset, len) {
                    Some(lba) => (Some(lba), Vec::new()),
                    None => (None, self.pieces(&view, offset, len, true)),
                }
            };
            if let Some(lba) = place {
                let landing = Landing::new(self, ch, inside);
                let result = ch.write(lba, data, fua && self.needs_fua()).await;
                landing.landed();
                result?;
                return self.flush_if(ch, fua).await;
            }
            let missing = pieces.iter().find(|piece| piece.at == Place::Zeroes);
            let Some(missing) = missing else {
                let landing = Landing::new(self, ch, inside);
                let with_fua = fua && self.needs_fua();
                let writes = pieces.iter().filter_map(|piece| match piece.at {
                    Place::Lba(lba) => Some(ch.write(lba, data.slice(piece.range()), with_fua)),
                    _ => None,
                });
                let results = join_all(writes).await;
                landing.landed();
                results
                    .into_iter()
                    .collect::<Result<Vec<()>, Box<IoError>>>()?;
                return self.flush_if(ch, fua).await;
            };
            drop(inside);
            let size = self.store.cluster_size();
            self.check_room(&pieces, offset)?;
            let first = (offset + missing.offset) / size;
            let last = (offset + missing.offset + missing.len - 1) / size;
            for index in first..=last {
                // A cluster that is overwritten as a whole needs no other content first.
                let start = (index * size)
                    .checked_sub(offset)
                    .filter(|start| start + size <= len);
                let fill = match start.and_then(|start| usize::try_from(start).ok()) {
                    Some(start) => {
                        let end = start + usize::try_from(size).expect("inside of a slice");
                        Fill::Data(data.slice(start..end))
                    }
                    None => Fill::Backing,
                };
                self.store.allocate(self, index, fill).await?;
            }
        }
    }

    fn check_writable(&self, view: &View) -> Result<(), Error> {
        if self.store.inner.read_only {
            Err(Error::ReadOnlyStore)
        } else if view.read_only {
            Err(Error::ReadOnly(self.id()))
        } else {
            Ok(())
        }
    }

    fn needs_fua(&self) -> bool {
        let info = self.store.device().info();
        info.write_cache && info.ops.has(OpKind::Fua)
    }

    /// Is there a free cluster for each that an I/O at `offset` needs? A write that does not fit begins with
    /// nothing; beside others that take clusters meanwhile it may end with a part.
    fn check_room(&self, pieces: &[Piece], offset: u64) -> Result<(), Error> {
        let size = self.store.cluster_size();
        let holes = pieces.iter().filter(|piece| piece.at == Place::Zeroes);
        let needed = holes
            .map(|hole| {
                let start = offset + hole.offset;
                (start + hole.len).div_ceil(size) - start / size
            })
            .sum();
        self.store.check_room(needed)
    }

    /// A durable write on a device that has a cache and no FUA is followed by a flush.
    async fn flush_if(&self, ch: &AsyncChannel, durable: bool) -> Result<(), Error> {
        let info = self.store.device().info();
        if !durable || !info.write_cache || info.ops.has(OpKind::Fua) {
            return Ok(());
        }
        ch.flush().await?;
        self.store.check_flushes()
    }

    /// Makes `len` bytes from `offset` read as zeroes. On a thin blob without a parent, clusters that are
    /// covered as a whole are given back.
    ///
    /// # Errors
    /// As [`Blob::write`].
    pub async fn write_zeroes(
        &self,
        ch: &AsyncChannel,
        offset: u64,
        len: u64,
    ) -> Result<(), Error> {
        self.clear(ch, offset, len, true).await
    }

    /// Says that the contents of `len` bytes from `offset` are not needed: they read as zeroes, or as they
    /// were. On a thin blob without a parent, clusters that are covered as a whole are given back; I/O in
    /// flight on the blob ends first, so while this future is pending its thread must not make a blocking
    /// call on the same blob.
    ///
    /// # Errors
    /// As [`Blob::write`].
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
        // Whole clusters of a thin blob go back.
        let whole = offset.div_ceil(size)..(offset + len) / size;
        if self.is_thin() && !whole.is_empty() {
            self.store.release(self, whole).await?;
        }
        let info = self.store.device().info();
        let unmap = !zero && info.ops.has(OpKind::Unmap);
        loop {
            let inside = self.shared.gate.enter().await;
            let (pieces, backed) = {
                let view = self.shared.view.load();
                self.check_range(&view, offset, len)?;
                (self.pieces(&view, offset, len, true), view.has_backing())
            };
            let hole = pieces
                .iter()
                .find(|piece| piece.at == Place::Zeroes && zero && backed);
            if let Some(hole) = hole {
                drop(inside);
                self.check_room(&pieces, offset)?;
                let first = (offset + hole.offset) / size;
                let last = (offset + hole.offset + hole.len - 1) / size;
                for index in first..=last {
                    let whole = index * size >= offset && (index + 1) * size <= offset + len;
                    let fill = if whole { Fill::Zeroes } else { Fill::Backing };
                    self.store.allocate(self, index, fill).await?;
                }
                continue;
            }
            let landing = Landing::new(self, ch, inside);
            let mut ops = Vec::new();
            let mut zeroes: Option<DmaSlice> = None;
            for piece in &pieces {
                let Place::Lba(lba) = piece.at else { continue };
                let len_blocks = piece.len / inner.block_size;
                if unmap {
                    ops.push(Op::Unmap { lba, len_blocks });
                } else if info.ops.has(OpKind::WriteZeroes) {
                    ops.push(Op::WriteZeroes {
                        lba,
                        len_blocks,
                        fua: false,
                    });
                } else {
                    let whole = match &zeroes {
                        Some(whole) => whole.clone(),
                        None => zeroes
                            .insert(DmaBuf::zeroed(ZEROES_BYTES.min(piece.range().len()))?.freeze())
                            .clone(),
                    };
                    let bytes = piece.range().len();
                    for start in (0..bytes).step_by(whole.len()) {
                        ops.push(Op::Write {
                            lba: lba + start as u64 / inner.block_size,
                            data: whole.slice(0..whole.len().min(bytes - start)),
                            fua: false,
                        });
                    }
                }
            }
            let results = join_all(ops.into_iter().map(|op| ch.io(op))).await;
            landing.landed();
            for (_, result) in results {
                result?;
            }
            return Ok(());
        }
    }

    /// [`Blob::read`] on this thread's channel; blocks.
    ///
    /// # Errors
    /// As [`Blob::read`].
    pub fn read_at(&self, offset: u64, buf: DmaBuf) -> Result<DmaBuf, Error> {
        let ch = self.store.channel()?;
        ch.block_on(self.read(&ch, offset, buf))
    }

    /// [`Blob::write`] on this thread's channel; blocks.
    ///
    /// # Errors
    /// As [`Blob::write`].
    pub fn write_at(&self, offset: u64, data: DmaSlice, fua: bool) -> Result<(), Error> {
        let ch = self.store.channel()?;
        ch.block_on(self.write(&ch, offset, data, fua))
    }

    /// Reads into several buffers one after another, all in flight together.
    ///
    /// # Errors
    /// As [`Blob::read`].
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
    /// As [`Blob::write`].
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

    /// [`Blob::write_zeroes`] on this thread's channel; blocks.
    ///
    /// # Errors
    /// As [`Blob::write`].
    pub fn write_zeroes_at(&self, offset: u64, len: u64) -> Result<(), Error> {
        let ch = self.store.channel()?;
        ch.block_on(self.write_zeroes(&ch, offset, len))
    }

    /// [`Blob::unmap`] on this thread's channel; blocks.
    ///
    /// # Errors
    /// As [`Blob::write`].
    pub fn unmap_at(&self, offset: u64, len: u64) -> Result<(), Error> {
        let ch = self.store.channel()?;
        ch.block_on(self.unmap(&ch, offset, len))
    }
}

impl Piece {
    fn range(&self) -> std::ops::Range<usize> {
        let cast = |n: u64| usize::try_from(n).expect("the length of a buffer");
        cast(self.offset)..cast(self.offset + self.len)
    }

    /// Does `at` continue this piece?
    fn follows(&self, at: Place, block_size: u64) -> bool {
        match (self.at, at) {
            (Place::Lba(mine), Place::Lba(next)) => mine + self.len / block_size == next,
            (Place::Zeroes, Place::Zeroes) => true,
            (Place::External(mine), Place::External(next)) => mine + self.len == next,
            _ => false,
        }
    }

    fn split(self, len: u64, block_size: u64) -> (Piece, Piece) {
        let at = match self.at {
            Place::Lba(lba) => Place::Lba(lba + len / block_size),
            Place::Zeroes => Place::Zeroes,
            Place::External(at) => Place::External(at + len),
        };
        (
            Piece { len, ..self },
            Piece {
                at,
                offset: self.offset + len,
                len: self.len - len,
            },
        )
    }
}

/// A write on its way. If its future is dropped before it has landed, the writer leaves the gate when the
/// device has answered: until then the cluster must not be given to another blob.
struct Landing<'a> {
    blob: &'a Blob,
    ch: &'a AsyncChannel,
    inside: Option<super::gate::Inside<'a>>,
}

impl<'a> Landing<'a> {
    fn new(blob: &'a Blob, ch: &'a AsyncChannel, inside: super::gate::Inside<'a>) -> Landing<'a> {
        Landing {
            blob,
            ch,
            inside: Some(inside),
        }
    }

    fn landed(mut self) {
        self.inside = None;
    }
}

impl Drop for Landing<'_> {
    fn drop(&mut self) {
        if let Some(inside) = self.inside.take() {
            let owed = inside.owe(&self.blob.shared);
            self.ch.keep_for_orphans(Box::new(owed));
        }
    }
}
