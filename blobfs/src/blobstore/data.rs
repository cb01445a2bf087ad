//! The one place that maps a range of a blob to ranges of the device.

use std::ops::Range;

use pumice_bdev::{DmaBuf, DmaSlice, Op};

use super::blob::Blob;
use super::error::Error;
use super::gate::Inside;
use super::shared::Owed;
use super::view::{Source, View};

/// The place of a part of a range.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Place {
    /// This block of the device.
    Device(u64),
    /// No place: it reads as zeroes.
    Zeroes,
    /// This byte of the external snapshot.
    External(u64),
}

/// A part of a range of a blob that is in one place and short enough for one operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Part {
    /// The place of the part.
    pub at: Place,
    /// Offset of the part in the range, in bytes.
    pub offset: u64,
    /// Length in bytes.
    pub len: u64,
}

impl Part {
    /// Returns the part's bytes in a buffer for the whole range.
    pub fn bytes(&self) -> Range<usize> {
        let cast = |n: u64| usize::try_from(n).expect("the length of a buffer");
        cast(self.offset)..cast(self.offset + self.len)
    }
}

/// The rules for dividing ranges.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Cut {
    /// Bytes of a cluster.
    pub cluster: u64,
    /// Bytes of a block of the device.
    pub block: u64,
    /// Longest part, in bytes.
    pub longest: u64,
}

impl Cut {
    /// Divides `[offset, offset + len)` by the sources of its clusters. Clusters that are adjacent
    /// on the device stay together.
    pub fn parts(&self, offset: u64, len: u64, source: impl Fn(u64) -> Source) -> Vec<Part> {
        let mut parts: Vec<Part> = Vec::with_capacity(1);
        let mut done = 0;
        while done < len {
            let index = (offset + done) / self.cluster;
            let within = (offset + done) % self.cluster;
            let now = (self.cluster - within).min(len - done);
            let at = match source(index) {
                Source::Cluster(cluster) => {
                    let byte = u64::from(cluster) * self.cluster + within;
                    Place::Device(byte / self.block)
                }
                Source::Zeroes => Place::Zeroes,
                Source::External => Place::External(offset + done),
            };
            self.add(&mut parts, at, done, now);
            done += now;
        }
        parts
    }

    /// Adds a part, to the last one if it continues that.
    fn add(&self, parts: &mut Vec<Part>, at: Place, offset: u64, len: u64) {
        if let Some(last) = parts.last_mut()
            && self.behind(last.at, last.len) == at
            && last.len + len <= self.longest
        {
            last.len += len;
            return;
        }
        let mut done = 0;
        while done < len {
            let now = self.longest.min(len - done);
            parts.push(Part {
                at: self.behind(at, done),
                offset: offset + done,
                len: now,
            });
            done += now;
        }
    }

    /// Returns the place that is `bytes` behind another.
    fn behind(&self, at: Place, bytes: u64) -> Place {
        match at {
            Place::Device(lba) => Place::Device(lba + bytes / self.block),
            Place::Zeroes => Place::Zeroes,
            Place::External(byte) => Place::External(byte + bytes),
        }
    }
}

/// Makes the operations that write `data`, consecutive slices, to `parts`, which all are on the
/// device.
pub(crate) fn write_ops(parts: &[Part], data: &[DmaSlice], fua: bool) -> Vec<Op> {
    let mut ops = Vec::with_capacity(parts.len());
    let mut slices = data.iter().cloned();
    let mut current = slices.next();
    for part in parts {
        let Place::Device(lba) = part.at else {
            continue;
        };
        let mut pieces: Vec<DmaSlice> = Vec::with_capacity(1);
        let mut need = part.bytes().len();
        while need > 0 {
            let Some(slice) = current.take() else { break };
            let n = slice.len().min(need);
            if n < slice.len() {
                current = Some(slice.slice(n..slice.len()));
                pieces.push(slice.slice(0..n));
            } else {
                pieces.push(slice);
                current = slices.next();
            }
            need -= n;
        }
        ops.push(match pieces.len() {
            1 => Op::Write {
                lba,
                data: pieces.remove(0),
                fua,
            },
            _ => Op::WriteV {
                lba,
                data: pieces,
                fua,
            },
        });
    }
    ops
}

/// Returns the bytes `range` of `data`, consecutive slices, if they are in one slice.
pub(crate) fn slice_of(data: &[DmaSlice], range: Range<usize>) -> Option<DmaSlice> {
    let mut start = 0;
    for slice in data {
        let end = start + slice.len();
        if start <= range.start && range.end <= end {
            return Some(slice.slice(range.start - start..range.end - start));
        }
        start = end;
    }
    None
}

/// Bytes of a range of a blob that are being read into memory.
#[derive(Debug)]
pub(crate) enum Piece {
    /// The bytes are in memory.
    Filled(DmaBuf),
    /// This operation reads them, into one buffer or into several.
    FromDevice(Op),
}

/// The right to do I/O on a blob. While it lives, no cluster of the blob moves, but the blob may
/// grow.
pub(crate) struct Access<'a> {
    pub blob: &'a Blob,
    pub inside: Inside<'a>,
}

impl Access<'_> {
    /// Returns the places of a range that is written. Clusters that the blob itself does not have
    /// are [`Place::Zeroes`].
    ///
    /// # Errors
    /// Fails when the blob or the store is read-only, or the range lies outside of the blob.
    pub fn own_parts(&self, offset: u64, len: u64) -> Result<Vec<Part>, Error> {
        let view = self.blob.shared.view.load();
        self.blob.check_writable(&view)?;
        self.blob.check_range(&view, offset, len)?;
        let cut = &self.blob.store.inner.cut;
        Ok(cut.parts(offset, len, |index| view.own_source(index)))
    }

    /// Returns the places of a range that is read.
    ///
    /// # Errors
    /// Fails when the range lies outside of the blob.
    pub fn parts(&self, offset: u64, len: u64) -> Result<Vec<Part>, Error> {
        let view = self.blob.shared.view.load();
        self.blob.check_range(&view, offset, len)?;
        Ok(self.parts_in(&view, offset, len))
    }

    /// The parts of a range that lies in the blob.
    fn parts_in(&self, view: &View, offset: u64, len: u64) -> Vec<Part> {
        let cut = &self.blob.store.inner.cut;
        cut.parts(offset, len, |index| view.source(index))
    }

    /// Returns what reads `len` bytes from `offset`, in order, in buffers of at most `longest`
    /// bytes. Blocks if some of them are in an external snapshot.
    ///
    /// # Errors
    /// Fails when the range lies outside of the blob, without memory, and with errors of the
    /// external snapshot.
    pub fn pieces(&self, offset: u64, len: u64, longest: usize) -> Result<Vec<Piece>, Error> {
        let view = self.blob.shared.view.load();
        self.blob.check_range(&view, offset, len)?;
        if len <= longest as u64
            && let Some(lba) = self.blob.one_place(&view, offset, len)
        {
            let buf = DmaBuf::new(usize::try_from(len).expect("at most `longest`"))?;
            return Ok(vec![Piece::FromDevice(Op::Read { lba, buf })]);
        }
        let parts = self.parts_in(&view, offset, len);
        let mut pieces = Vec::with_capacity(parts.len());
        for part in parts {
            let total = part.bytes().len();
            let sizes = (0..total)
                .step_by(longest)
                .map(|done| (done, longest.min(total - done)));
            match part.at {
                Place::Device(lba) if total <= longest => {
                    let buf = DmaBuf::new(total)?;
                    pieces.push(Piece::FromDevice(Op::Read { lba, buf }));
                }
                Place::Device(lba) => {
                    let bufs = sizes.map(|(_, size)| DmaBuf::new(size));
                    let bufs = bufs.collect::<Result<Vec<_>, _>>()?;
                    pieces.push(Piece::FromDevice(Op::ReadV { lba, bufs }));
                }
                Place::Zeroes => {
                    for (_, size) in sizes {
                        pieces.push(Piece::Filled(DmaBuf::zeroed(size)?));
                    }
                }
                Place::External(at) => {
                    let external = view.external.as_ref();
                    let external = external.expect("a source in the external snapshot");
                    for (done, size) in sizes {
                        let mut buf = DmaBuf::new(size)?;
                        external.read(at + done as u64, &mut buf)?;
                        pieces.push(Piece::Filled(buf));
                    }
                }
            }
        }
        Ok(pieces)
    }

    /// Keeps the right for as long as the result lives, for I/O that outlives the call that starts
    /// it.
    pub fn hold(self) -> Owed {
        self.blob.shared.owe(self.inside)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CUT: Cut = Cut {
        cluster: 16384,
        block: 512,
        longest: 40960,
    };

    fn parts(offset: u64, len: u64, sources: &[Source]) -> Vec<(Place, u64, u64)> {
        let parts = CUT.parts(offset, len, |index| {
            sources[usize::try_from(index).unwrap()]
        });
        parts.iter().map(|p| (p.at, p.offset, p.len)).collect()
    }

    #[test]
    fn neighbours_stay_together_up_to_the_limit() {
        use Place::{Device, External, Zeroes};
        use Source::Cluster;
        let run = [Cluster(3), Cluster(4), Cluster(5), Cluster(9)];
        assert_eq!(
            parts(512, 4 * 16384 - 512, &run),
            [
                (Device(97), 0, 32768 - 512),
                (Device(160), 32768 - 512, 16384),
                (Device(288), 49152 - 512, 16384)
            ]
        );
        let mixed = [Source::Zeroes, Source::Zeroes, Source::External, Cluster(1)];
        assert_eq!(
            parts(0, 65536, &mixed),
            [
                (Zeroes, 0, 32768),
                (External(32768), 32768, 16384),
                (Device(32), 49152, 16384)
            ]
        );
        assert_eq!(parts(100 * 512, 0, &[]), []);
    }

    #[test]
    fn a_cluster_longer_than_the_limit_is_cut() {
        let cut = Cut {
            longest: 6144,
            ..CUT
        };
        let parts = cut.parts(1024, 15360, |_| Source::Cluster(2));
        let parts: Vec<_> = parts.iter().map(|p| (p.at, p.offset, p.len)).collect();
        assert_eq!(
            parts,
            [
                (Place::Device(66), 0, 6144),
                (Place::Device(78), 6144, 6144),
                (Place::Device(90), 12288, 3072)
            ]
        );
    }

    #[test]
    fn slices_follow_one_another_over_parts() {
        let slice = |byte: u8, len: usize| {
            let mut buf = DmaBuf::zeroed(len).unwrap();
            buf.fill(byte);
            buf.freeze()
        };
        let data = [slice(1, 16384), slice(2, 1024), slice(3, 512)];
        let sources = [Source::Cluster(7), Source::Cluster(2)];
        let parts = CUT.parts(16384 - 512, 17920, |index| {
            sources
                .get(usize::try_from(index).unwrap())
                .copied()
                .unwrap_or(Source::Cluster(3))
        });
        let ops = write_ops(&parts, &data, true);
        let [
            Op::Write {
                lba: 255,
                data: first,
                fua: true,
            },
            Op::WriteV {
                lba: 64,
                data: rest,
                ..
            },
        ] = &ops[..]
        else {
            panic!("{ops:?}")
        };
        assert_eq!((first.len(), first[0]), (512, 1));
        let rest: Vec<_> = rest.iter().map(|slice| (slice.len(), slice[0])).collect();
        assert_eq!(rest, [(16384 - 512, 1), (1024, 2), (512, 3)]);
        assert_eq!(slice_of(&data, 16384..17408).unwrap()[0], 2);
        assert!(slice_of(&data, 16000..17000).is_none());
    }
}
