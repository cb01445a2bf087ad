//! `pumice blob import` and `export`: copy contents of blobs from and to files.

use std::fs::File;
use std::io::{self, Read, Write};
use std::path::Path;

use pumice_bdev::DmaBuf;
use pumice_blobfs::blobstore::{BlobId, Blobstore, CreateOptions};

use super::{BlobArgs, Result, with_store};
use crate::copy::{Input, create_private};
use crate::signals;

/// Writes a file into a blob, or into a new one for `new`.
pub fn import(
    args: &BlobArgs,
    uri: &str,
    id: &str,
    file: &Path,
    thin: bool,
    print_id: impl Fn(BlobId),
) -> Result<()> {
    let mut input: Box<dyn Read> = if file == Path::new("-") {
        Box::new(Input::standard())
    } else {
        Box::new(File::open(file).map_err(|error| format!("{}: {error}", file.display()))?)
    };
    let existing: Option<BlobId> = if id == "new" { None } else { Some(id.parse()?) };
    let id = with_store(args, uri, |store| {
        let id = match existing {
            Some(id) => id,
            None => store.create(&CreateOptions::default().thin(thin))?,
        };
        let result = fill(store, id, &mut *input, existing.is_none());
        if result.is_err() && existing.is_none() {
            store.delete(id)?;
        }
        result.map(|()| id)
    })?;
    if existing.is_none() {
        print_id(id);
    }
    Ok(())
}

/// Writes the input into a blob, cluster by cluster. A new blob grows with it.
fn fill(store: &Blobstore, id: BlobId, input: &mut dyn Read, grow: bool) -> Result<()> {
    let blob = store.open(id)?;
    let size = usize::try_from(store.cluster_size())?;
    let mut offset = 0;
    loop {
        signals::check().map_err(|e| e.to_string())?;
        let mut buf = DmaBuf::zeroed(size)?;
        let mut len = 0;
        while len < size {
            match input.read(&mut buf[len..]) {
                Ok(0) => break,
                Ok(n) => len += n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {
                    signals::check().map_err(|e| e.to_string())?;
                }
                Err(e) => return Err(e.into()),
            }
        }
        if len == 0 {
            break;
        }
        if offset == blob.len_bytes() {
            if !grow {
                return Err(format!(
                    "the file is longer than blob {id} ({} bytes); resize it first",
                    blob.len_bytes()
                )
                .into());
            }
            // The blob grows by several clusters at a time, since each resize writes metadata.
            blob.resize((blob.num_clusters() * 2).max(1))
                .or_else(|_| blob.resize(blob.num_clusters() + 1))?;
        }
        let zero = buf[..len].iter().all(|byte| *byte == 0);
        // The blob's bytes behind the end of the file stay as they are.
        let all = grow || len == size;
        if zero && all && blob.is_thin() {
            blob.write_zeroes_at(offset, store.cluster_size())?;
        } else {
            let block = usize::try_from(store.device().info().block_size)?;
            let whole = len.div_ceil(block) * block;
            if whole != len && !grow {
                let tail = offset + (whole - block) as u64;
                let old = blob.read_at(tail, DmaBuf::new(block)?)?;
                let keep = len - (whole - block);
                buf[len..whole].copy_from_slice(&old[keep..]);
            }
            blob.write_at(offset, buf.freeze().slice(0..whole), false)?;
        }
        offset += size as u64;
        if len < size {
            break;
        }
    }
    if grow {
        blob.resize(offset / store.cluster_size())?;
    }
    store.flush()?;
    Ok(())
}

/// Writes the whole content of a blob into a file.
pub fn export(store: &Blobstore, id: BlobId, file: &Path) -> Result<()> {
    let blob = store.open(id)?;
    let mut out: Box<dyn Write> = if file == Path::new("-") {
        Box::new(io::stdout().lock())
    } else {
        Box::new(create_private(file).map_err(|error| format!("{}: {error}", file.display()))?)
    };
    let mut buf = DmaBuf::new(usize::try_from(store.cluster_size())?)?;
    for index in 0..blob.num_clusters() {
        buf = blob.read_at(index * store.cluster_size(), buf)?;
        out.write_all(&buf)?;
    }
    out.flush()?;
    Ok(())
}
