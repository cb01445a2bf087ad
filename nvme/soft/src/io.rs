//! The soft controller's I/O commands: NVM section 3.2.

use pumice_nvme::spec::{Command, DsmRange, IoOpcode, SourceRange, Status};
use zerocopy::{FromBytes, IntoBytes};

use super::backend::Transfer;
use super::engine::{Engine, Outcome};
use super::queues::data_pieces;

fn done(status: Result<(), Status>) -> Outcome {
    Outcome::Done(status.err().unwrap_or(Status::SUCCESS), 0)
}

/// Number of bytes that Compare, Copy and Verify handle at a time.
const STEP: usize = 64 << 10;

impl Engine {
    pub(super) fn io_command(&mut self, c: &Command) -> Outcome {
        if c.flags & 3 != 0 {
            // Fused operations are not supported.
            return done(Err(Status::INVALID_FIELD.dnr()));
        }
        match IoOpcode(c.opcode) {
            IoOpcode::FLUSH if c.nsid == u32::MAX => {
                let all = self
                    .media
                    .iter_mut()
                    .try_for_each(super::media::SoftNamespace::flush);
                done(all.map_err(|_| Status::WRITE_FAULT))
            }
            IoOpcode::FLUSH => done(self.flush(c)),
            IoOpcode::READ => done(self.read(c)),
            IoOpcode::WRITE => done(self.write(c)),
            IoOpcode::COMPARE => done(self.compare(c)),
            IoOpcode::WRITE_ZEROES => done(self.write_zeroes(c)),
            IoOpcode::VERIFY => done(self.verify(c)),
            IoOpcode::DATASET_MANAGEMENT => done(self.dataset_management(c)),
            IoOpcode::COPY => done(self.copy(c)),
            _ => done(Err(Status::INVALID_OPCODE.dnr())),
        }
    }

    fn index(&self, nsid: u32) -> Result<usize, Status> {
        (nsid as usize)
            .checked_sub(1)
            .filter(|n| *n < self.media.len())
            .ok_or(Status::INVALID_NAMESPACE.dnr())
    }

    fn range(&self, index: usize, lba: u64, blocks: u64) -> Result<(), Status> {
        match lba.checked_add(blocks) {
            Some(end) if end <= self.media[index].num_blocks() => Ok(()),
            _ => Err(Status::LBA_OUT_OF_RANGE.dnr()),
        }
    }

    fn cached(&self, c: &Command) -> bool {
        self.admin.write_cache && c.cdw12 >> 30 & 1 == 0
    }

    fn flush(&mut self, c: &Command) -> Result<(), Status> {
        let n = self.index(c.nsid)?;
        self.media[n].flush().map_err(|_| Status::WRITE_FAULT)
    }

    /// Checks a command with data and finds the data. Returns the namespace and the number of
    /// bytes.
    fn data(&mut self, c: &Command) -> Result<(usize, usize), Status> {
        let n = self.index(c.nsid)?;
        let blocks = c.blocks();
        self.range(n, c.lba(), u64::from(blocks))?;
        let len = (blocks as usize) << self.media[n].block_shift;
        if self.config.mdts != 0 && len > 4096usize << self.config.mdts.min(20) {
            return Err(Status::INVALID_FIELD.dnr());
        }
        data_pieces(&self.shared.memory, c, len, &mut self.pieces)?;
        Ok((n, len))
    }

    fn read(&mut self, c: &Command) -> Result<(), Status> {
        let (n, len) = self.data(c)?;
        let mut transfer = Transfer::new(&self.shared.memory, &self.pieces, len);
        self.admin.count_read(len);
        self.media[n]
            .read(c.lba(), &mut transfer)
            .map_err(|e| failure(&e, Status::UNRECOVERED_READ))
    }

    fn write(&mut self, c: &Command) -> Result<(), Status> {
        let cache = self.cached(c);
        let (n, len) = self.data(c)?;
        let mut transfer = Transfer::new(&self.shared.memory, &self.pieces, len);
        self.admin.count_write(len);
        self.media[n]
            .write(c.lba(), &mut transfer, cache)
            .map_err(|e| failure(&e, Status::WRITE_FAULT))
    }

    fn compare(&mut self, c: &Command) -> Result<(), Status> {
        let (n, len) = self.data(c)?;
        let mut transfer = Transfer::new(&self.shared.memory, &self.pieces, len);
        let ns = &mut self.media[n];
        let mut theirs = vec![0; STEP.min(len)];
        let mut ours = theirs.clone();
        let mut at = 0;
        while at < len {
            let step = STEP.min(len - at);
            transfer
                .get_at(at, &mut theirs[..step])
                .map_err(|e| failure(&e, Status::DATA_TRANSFER))?;
            ns.read_bytes(c.lba() + (at >> ns.block_shift) as u64, &mut ours[..step])
                .map_err(|_| Status::UNRECOVERED_READ)?;
            if theirs[..step] != ours[..step] {
                return Err(Status::COMPARE_FAILURE);
            }
            at += step;
        }
        Ok(())
    }

    fn write_zeroes(&mut self, c: &Command) -> Result<(), Status> {
        let n = self.index(c.nsid)?;
        let blocks = u64::from(c.blocks());
        self.range(n, c.lba(), blocks)?;
        let cache = self.cached(c);
        self.media[n]
            .write_zeroes(c.lba(), blocks, cache)
            .map_err(|_| Status::WRITE_FAULT)
    }

    fn verify(&mut self, c: &Command) -> Result<(), Status> {
        let n = self.index(c.nsid)?;
        self.range(n, c.lba(), u64::from(c.blocks()))?;
        let ns = &mut self.media[n];
        let step = STEP >> ns.block_shift;
        self.scratch.resize(STEP, 0);
        let mut left = c.blocks() as usize;
        let mut lba = c.lba();
        while left > 0 {
            let now = step.min(left);
            ns.read_bytes(lba, &mut self.scratch[..now << ns.block_shift])
                .map_err(|_| Status::UNRECOVERED_READ)?;
            left -= now;
            lba += now as u64;
        }
        Ok(())
    }

    /// Reads a command's short list of `count` descriptors.
    fn list<T>(&mut self, c: &Command, count: usize) -> Result<Vec<T>, Status>
    where
        T: FromBytes + IntoBytes + Clone,
    {
        let len = count * size_of::<T>();
        data_pieces(&self.shared.memory, c, len, &mut self.pieces)?;
        let mut list = vec![T::new_zeroed(); count];
        let mut transfer = Transfer::new(&self.shared.memory, &self.pieces, len);
        transfer
            .get_at(0, list.as_mut_slice().as_mut_bytes())
            .map_err(|_| Status::DATA_TRANSFER)?;
        Ok(list)
    }

    fn dataset_management(&mut self, c: &Command) -> Result<(), Status> {
        let n = self.index(c.nsid)?;
        let ranges = (c.cdw10 as usize & 0xff) + 1;
        let ranges: Vec<DsmRange> = self.list(c, ranges)?;
        for range in &ranges {
            self.range(n, range.lba, range.len_blocks.into())?;
        }
        if c.cdw11 & 4 == 0 {
            return Ok(());
        }
        let cache = self.admin.write_cache;
        for range in ranges {
            self.media[n]
                .write_zeroes(range.lba, range.len_blocks.into(), cache)
                .map_err(|_| Status::WRITE_FAULT)?;
        }
        Ok(())
    }

    fn copy(&mut self, c: &Command) -> Result<(), Status> {
        let n = self.index(c.nsid)?;
        if c.cdw12 >> 8 & 15 != 0 {
            return Err(Status::INVALID_FIELD.dnr());
        }
        let count = (c.cdw12 as usize & 0xff) + 1;
        if count > 128 {
            return Err(Status::SIZE_LIMIT.dnr());
        }
        let ranges: Vec<SourceRange> = self.list(c, count)?;
        let mut total = 0;
        for range in &ranges {
            let blocks = range.blocks();
            self.range(n, range.lba, blocks)?;
            if blocks > 1024 {
                return Err(Status::SIZE_LIMIT.dnr());
            }
            total += blocks;
        }
        if total > 4096 {
            return Err(Status::SIZE_LIMIT.dnr());
        }
        self.range(n, c.lba(), total)?;
        let cache = self.cached(c);
        let ns = &mut self.media[n];
        let mut to = c.lba();
        for range in ranges {
            let blocks = range.blocks();
            let len = usize::try_from(blocks).unwrap_or(0) << ns.block_shift;
            self.scratch.resize(len, 0);
            ns.read_bytes(range.lba, &mut self.scratch)
                .map_err(|_| Status::UNRECOVERED_READ)?;
            ns.write_bytes(to, &self.scratch, cache)
                .map_err(|_| Status::WRITE_FAULT)?;
            to += blocks;
        }
        Ok(())
    }

    /// Fills the command's data (one page at most) with bytes, as an injected fault.
    pub(super) fn overwrite(&mut self, c: &Command, bytes: &[u8]) {
        if bytes.is_empty() {
            return;
        }
        let page: Vec<u8> = bytes.iter().copied().cycle().take(4096).collect();
        let len = 4096;
        if data_pieces(&self.shared.memory, c, len, &mut self.pieces).is_ok() {
            let mut transfer = Transfer::new(&self.shared.memory, &self.pieces, len);
            if transfer.put_at(0, &page).is_err() {
                tracing::debug!("nothing to overwrite");
            }
        }
    }
}

/// Maps a backend's error to a status: the host's memory is at fault, or the medium.
fn failure(error: &std::io::Error, medium: Status) -> Status {
    if error.kind() == std::io::ErrorKind::InvalidInput {
        Status::DATA_TRANSFER
    } else {
        medium
    }
}
