//! Copies of the data, for a device that may not see the callers' buffers.
//!
//! A controller in another process is given memory of its own ([`DmaDomain`]), and the data goes
//! through it: what is to be written is copied there, what was read is copied from there. So that
//! process sees nothing but what it is asked to store, and whatever it does, and whenever, it
//! cannot change a buffer of the caller's.

use crate::dma::{DmaBuf, DmaDomain, DmaError, DmaSlice};
use crate::io::{Io, IoDone};

/// Buffers kept for the next I/Os: so many of each capacity, and bytes of a capacity.
const SPARE_BUFFERS: usize = 64;
const SPARE_BYTES: usize = 4 << 20;

/// The callers' I/Os, while copies of them are with the device.
#[derive(Debug, Default)]
pub(crate) struct Bounce {
    /// By number, which is the copy's tag.
    lent: Vec<Option<Lent>>,
    free: Vec<usize>,
    /// By log2 of the capacity.
    spare: Vec<Vec<DmaBuf>>,
}

#[derive(Debug)]
struct Lent {
    tag: u64,
    io: Io,
}

impl Bounce {
    /// Whether the data begins at multiples of 4 bytes, as it must for any device.
    pub fn is_aligned(io: &Io) -> bool {
        let good = |data: &DmaSlice| data.region_offset() & 3 == 0;
        match io {
            Io::Write { data, .. } | Io::Compare { data, .. } => good(data),
            Io::WriteV { data, .. } => data.iter().all(good),
            _ => true,
        }
    }

    /// Keeps the caller's I/O and makes its copy, with the tag that the copy has.
    ///
    /// # Errors
    /// The I/O, when there is no memory.
    pub fn lend(&mut self, domain: &DmaDomain, tag: u64, io: Io) -> Result<(u64, Io), Io> {
        let copy = match self.copy(domain, &io) {
            Ok(copy) => copy,
            Err(error) => {
                tracing::warn!(%error, "no memory for a copy of the data");
                return Err(io);
            }
        };
        let lent = Some(Lent { tag, io });
        let number = match self.free.pop() {
            Some(number) => {
                self.lent[number] = lent;
                number
            }
            None => {
                self.lent.push(lent);
                self.lent.len() - 1
            }
        };
        Ok((number as u64, copy))
    }

    /// The caller's I/O back, in exchange for its copy.
    ///
    /// # Panics
    /// When the number is none of a copy that is out.
    pub fn take_back(&mut self, number: u64, copy: Io, read: bool) -> (u64, Io) {
        let at = usize::try_from(number).expect("a number that was given out");
        let Lent { tag, mut io } = self.lent[at].take().expect("each copy comes back once");
        self.free.push(at);
        match (&mut io, copy) {
            (Io::Read { buf, .. }, Io::Read { buf: from, .. }) => {
                if read {
                    buf.copy_from_slice(&from);
                }
                self.keep(from);
            }
            (Io::ReadV { bufs, .. }, Io::ReadV { bufs: from, .. }) => {
                for (buf, from) in bufs.iter_mut().zip(from) {
                    if read {
                        buf.copy_from_slice(&from);
                    }
                    self.keep(from);
                }
            }
            (_, Io::Write { data, .. } | Io::Compare { data, .. }) => self.keep_slice(data),
            (_, Io::WriteV { data, .. }) => data.into_iter().for_each(|d| self.keep_slice(d)),
            _ => {}
        }
        (tag, io)
    }

    /// Makes an I/O that has ended the caller's own.
    pub fn finish(&mut self, done: &mut IoDone) {
        let copy = std::mem::replace(&mut done.io, Io::Flush);
        (done.tag, done.io) = self.take_back(done.tag, copy, done.result.is_ok());
    }

    /// The numbers of the copies of the I/Os with this tag.
    pub fn numbers_of(&self, tag: u64) -> Vec<u64> {
        let with_tag = |lent: &Option<Lent>| lent.as_ref().is_some_and(|l| l.tag == tag);
        (0..)
            .zip(&self.lent)
            .filter(|(_, lent)| with_tag(lent))
            .map(|(number, _)| number)
            .collect()
    }

    fn copy(&mut self, domain: &DmaDomain, io: &Io) -> Result<Io, DmaError> {
        let mut data = |data: &DmaSlice| -> Result<DmaSlice, DmaError> {
            if data.is_empty() {
                // What is wrong with it is said where it is submitted.
                return Ok(data.clone());
            }
            let mut buf = self.buffer(domain, data.len())?;
            buf.copy_from_slice(data);
            Ok(buf.freeze())
        };
        Ok(match io {
            Io::Write { lba, data: d, fua } => Io::Write {
                lba: *lba,
                data: data(d)?,
                fua: *fua,
            },
            Io::WriteV { lba, data: d, fua } => Io::WriteV {
                lba: *lba,
                data: d.iter().map(data).collect::<Result<_, _>>()?,
                fua: *fua,
            },
            Io::Compare { lba, data: d } => Io::Compare {
                lba: *lba,
                data: data(d)?,
            },
            Io::Read { lba, buf } => Io::Read {
                lba: *lba,
                buf: self.buffer(domain, buf.len())?,
            },
            Io::ReadV { lba, bufs } => Io::ReadV {
                lba: *lba,
                bufs: bufs
                    .iter()
                    .map(|buf| self.buffer(domain, buf.len()))
                    .collect::<Result<_, _>>()?,
            },
            Io::Flush => Io::Flush,
            Io::WriteZeroes {
                lba,
                blocks,
                fua,
                deallocate,
            } => Io::WriteZeroes {
                lba: *lba,
                blocks: *blocks,
                fua: *fua,
                deallocate: *deallocate,
            },
            Io::Deallocate { ranges } => Io::Deallocate {
                ranges: ranges.clone(),
            },
            Io::Verify { lba, blocks } => Io::Verify {
                lba: *lba,
                blocks: *blocks,
            },
            Io::Copy { ranges, lba, fua } => Io::Copy {
                ranges: ranges.clone(),
                lba: *lba,
                fua: *fua,
            },
        })
    }

    fn buffer(&mut self, domain: &DmaDomain, len: usize) -> Result<DmaBuf, DmaError> {
        let class = len.next_power_of_two().max(512).ilog2() as usize;
        match self.spare.get_mut(class).and_then(Vec::pop) {
            Some(mut buf) => {
                buf.set_len(len);
                Ok(buf)
            }
            None => DmaBuf::new_in(Some(domain), len),
        }
    }

    fn keep(&mut self, buf: DmaBuf) {
        let capacity = buf.capacity();
        let class = capacity.ilog2() as usize;
        if self.spare.len() <= class {
            self.spare.resize_with(class + 1, Vec::new);
        }
        let spare = &mut self.spare[class];
        if spare.len() < SPARE_BUFFERS && (spare.len() + 1) * capacity <= SPARE_BYTES {
            spare.push(buf);
        }
    }

    fn keep_slice(&mut self, data: DmaSlice) {
        if let Ok(buf) = data.try_into_buf() {
            self.keep(buf);
        }
    }
}
