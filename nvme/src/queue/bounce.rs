//! Copies of the data, for a device that must not see the callers' buffers.
//!
//! A controller in another process is given memory of its own ([`DmaDomain`]), and the driver
//! copies data to be written there and data that was read back. So that process sees nothing but
//! what it is asked to store, and nothing that it does can change a caller's buffer.

use pumice_io::{Completion as IoCompletion, Op};

use crate::dma::{DmaBuf, DmaDomain, DmaError, DmaSlice};

/// Most buffers of one capacity to keep for later I/Os, and most bytes of one capacity.
const SPARE_BUFFERS: usize = 64;
const SPARE_BYTES: usize = 4 << 20;

/// The callers' I/Os whose copies the device has.
#[derive(Debug, Default)]
pub(crate) struct Bounce {
    /// The I/Os by number, which is the copy's tag.
    lent: Vec<Option<Lent>>,
    free: Vec<usize>,
    /// Spare buffers, by log2 of the capacity.
    spare: Vec<Vec<DmaBuf>>,
}

#[derive(Debug)]
struct Lent {
    tag: u64,
    io: Op,
}

impl Bounce {
    /// Whether the data begins at multiples of 4 bytes, as every device requires.
    pub fn is_aligned(io: &Op) -> bool {
        let good = |data: &DmaSlice| data.region_offset() & 3 == 0;
        match io {
            Op::Write { data, .. } | Op::Compare { data, .. } => good(data),
            Op::WriteV { data, .. } => data.iter().all(good),
            _ => true,
        }
    }

    /// Keeps the caller's I/O and returns its copy with the copy's tag.
    ///
    /// # Errors
    /// Returns the I/O when there is no memory for the copy.
    pub fn lend(&mut self, domain: &DmaDomain, tag: u64, io: Op) -> Result<(u64, Op), Op> {
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

    /// Returns the caller's I/O in exchange for its copy.
    ///
    /// # Panics
    /// Panics when no copy with this number is with the device.
    pub fn take_back(&mut self, number: u64, copy: Op, read: bool) -> (u64, Op) {
        let at = usize::try_from(number).expect("a number that was given out");
        let Lent { tag, mut io } = self.lent[at].take().expect("each copy comes back once");
        self.free.push(at);
        match (&mut io, copy) {
            (Op::Read { buf, .. }, Op::Read { buf: from, .. }) => {
                if read {
                    buf.copy_from_slice(&from);
                }
                self.keep(from);
            }
            (Op::ReadV { bufs, .. }, Op::ReadV { bufs: from, .. }) => {
                for (buf, from) in bufs.iter_mut().zip(from) {
                    if read {
                        buf.copy_from_slice(&from);
                    }
                    self.keep(from);
                }
            }
            (_, Op::Write { data, .. } | Op::Compare { data, .. }) => self.keep_slice(data),
            (_, Op::WriteV { data, .. }) => data.into_iter().for_each(|d| self.keep_slice(d)),
            _ => {}
        }
        (tag, io)
    }

    /// Turns a copy that has ended into the caller's own I/O.
    pub fn finish(&mut self, done: &mut IoCompletion) {
        let copy = std::mem::replace(&mut done.op, Op::Flush);
        (done.tag, done.op) = self.take_back(done.tag, copy, done.result.is_ok());
    }

    /// Returns the numbers of the copies of the I/Os with this tag.
    pub fn numbers_of(&self, tag: u64) -> Vec<u64> {
        let with_tag = |lent: &Option<Lent>| lent.as_ref().is_some_and(|l| l.tag == tag);
        (0..)
            .zip(&self.lent)
            .filter(|(_, lent)| with_tag(lent))
            .map(|(number, _)| number)
            .collect()
    }

    fn copy(&mut self, domain: &DmaDomain, io: &Op) -> Result<Op, DmaError> {
        let mut data = |data: &DmaSlice| -> Result<DmaSlice, DmaError> {
            if data.is_empty() {
                // An invalid I/O is refused where it is submitted.
                return Ok(data.clone());
            }
            let mut buf = self.buffer(domain, data.len())?;
            buf.copy_from_slice(data);
            Ok(buf.freeze())
        };
        Ok(match io {
            Op::Write { lba, data: d, fua } => Op::Write {
                lba: *lba,
                data: data(d)?,
                fua: *fua,
            },
            Op::WriteV { lba, data: d, fua } => Op::WriteV {
                lba: *lba,
                data: d.iter().map(data).collect::<Result<_, _>>()?,
                fua: *fua,
            },
            Op::Compare { lba, data: d } => Op::Compare {
                lba: *lba,
                data: data(d)?,
            },
            Op::Read { lba, buf } => Op::Read {
                lba: *lba,
                buf: self.buffer(domain, buf.len())?,
            },
            Op::ReadV { lba, bufs } => Op::ReadV {
                lba: *lba,
                bufs: bufs
                    .iter()
                    .map(|buf| self.buffer(domain, buf.len()))
                    .collect::<Result<_, _>>()?,
            },
            Op::Flush => Op::Flush,
            Op::WriteZeroes {
                lba,
                len_blocks,
                fua,
            } => Op::WriteZeroes {
                lba: *lba,
                len_blocks: *len_blocks,
                fua: *fua,
            },
            Op::Unmap { lba, len_blocks } => Op::Unmap {
                lba: *lba,
                len_blocks: *len_blocks,
            },
            Op::Verify { lba, len_blocks } => Op::Verify {
                lba: *lba,
                len_blocks: *len_blocks,
            },
            Op::Copy {
                src_lba,
                dst_lba,
                len_blocks,
            } => Op::Copy {
                src_lba: *src_lba,
                dst_lba: *dst_lba,
                len_blocks: *len_blocks,
            },
            // The device knows the I/Os by their copies' numbers, and no copy has this one: whoever
            // submits the abort has asked for those with the caller's tag.
            Op::Abort { .. } => Op::Abort { tag: u64::MAX },
            // Refused when it is submitted.
            Op::CompareAndWrite(_) | Op::Reset | Op::Zone { .. } => Op::Reset,
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

#[cfg(test)]
mod tests {
    use pumice_io::{IoError, IoErrorKind};

    use super::*;

    fn filled(len: usize, byte: u8) -> DmaBuf {
        let mut buf = DmaBuf::new(len).expect("memory");
        buf.fill(byte);
        buf
    }

    /// A write that is durable for the caller is durable on the device.
    #[test]
    fn the_device_is_asked_for_the_same() {
        let (mut bounce, domain) = (Bounce::default(), DmaDomain::new());
        let data = || filled(1024, 7).freeze();
        let (lba, len_blocks) = (9, 3);
        for fua in [false, true] {
            for op in [
                Op::Write {
                    lba,
                    data: data(),
                    fua,
                },
                Op::WriteV {
                    lba,
                    data: vec![data(), data()],
                    fua,
                },
                Op::WriteZeroes {
                    lba,
                    len_blocks,
                    fua,
                },
                Op::Compare { lba, data: data() },
                Op::Unmap { lba, len_blocks },
                Op::Verify { lba, len_blocks },
                Op::Flush,
            ] {
                let asked = |op: &Op| (op.kind(), op.lba(), op.len_bytes(512), op.fua());
                let want = asked(&op);
                let (number, copy) = bounce.lend(&domain, 5, op).expect("memory");
                assert_eq!(asked(&copy), want);
                let (tag, op) = bounce.take_back(number, copy, false);
                assert_eq!((tag, asked(&op)), (5, want));
            }
        }
    }

    /// The copy's buffer may hold what another I/O has read.
    #[test]
    fn a_read_that_failed_leaves_the_callers_buffers() {
        let (mut bounce, domain) = (Bounce::default(), DmaDomain::new());
        let first = |op: &Op| match op {
            Op::Read { buf, .. } => buf[511],
            Op::ReadV { bufs, .. } => bufs[1][511],
            other => panic!("{other:?}"),
        };
        for (result, want) in [(Err(IoErrorKind::Media), 1), (Ok(()), 2)] {
            let parts = vec![filled(512, 1), filled(512, 1)];
            let read = Op::Read {
                lba: 0,
                buf: filled(512, 1),
            };
            for op in [
                read,
                Op::ReadV {
                    lba: 0,
                    bufs: parts,
                },
            ] {
                let (tag, mut op) = bounce.lend(&domain, 5, op).expect("memory");
                match &mut op {
                    Op::Read { buf, .. } => buf.fill(2),
                    Op::ReadV { bufs, .. } => bufs.iter_mut().for_each(|b| b.fill(2)),
                    other => panic!("{other:?}"),
                }
                let result = result.map_err(|kind| IoError::new("d", 512, &op, kind, ""));
                let mut done = IoCompletion { tag, op, result };
                bounce.finish(&mut done);
                assert_eq!((done.tag, first(&done.op)), (5, want));
            }
        }
    }

    /// Each part of the data counts.
    #[test]
    fn data_at_an_odd_address_is_seen() {
        let good = filled(1024, 0).freeze();
        let odd = good.slice(2..514);
        let write = |data| Op::Write {
            lba: 0,
            data,
            fua: false,
        };
        assert!(Bounce::is_aligned(&write(good.clone())));
        assert!(!Bounce::is_aligned(&write(odd.clone())));
        let parts = |data| Op::WriteV {
            lba: 0,
            data,
            fua: false,
        };
        assert!(Bounce::is_aligned(&parts(vec![good.clone(), good.clone()])));
        assert!(!Bounce::is_aligned(&parts(vec![good, odd])));
    }

    #[test]
    fn a_bounded_number_of_buffers_is_kept() {
        let (mut bounce, domain) = (Bounce::default(), DmaDomain::new());
        for (len, count, most) in [(512, SPARE_BUFFERS + 3, SPARE_BUFFERS), (1 << 20, 6, 4)] {
            let lent: Vec<(u64, Op)> = (0..count)
                .map(|_| {
                    let buf = DmaBuf::new(len).expect("memory");
                    bounce
                        .lend(&domain, 5, Op::Read { lba: 0, buf })
                        .expect("memory")
                })
                .collect();
            for (number, copy) in lent {
                bounce.take_back(number, copy, false);
            }
            assert_eq!(bounce.spare[len.ilog2() as usize].len(), most);
        }
    }
}
