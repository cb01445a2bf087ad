//! Nothing is made on a device that does not hold only zeroes, unless the caller permits it.

use std::sync::Arc;

use pumice_bdev::{AsyncChannel, BdevError, BlockDevice, DmaBuf, file_uri, open};
use pumice_blobfs::blobstore::{Blobstore, Error, InitOptions};
use pumice_blobfs::fs::{FileSystem, FormatOptions, FsError};

const LEN: u64 = 64 << 20;

/// Makes a device of zeroes with one other byte at `offset`.
fn device(offset: u64) -> Arc<dyn BlockDevice> {
    let dev = open(&format!("malloc://{LEN}?block_size=4096")).unwrap();
    let ch = AsyncChannel::new(dev.open_channel().unwrap());
    let mut block = DmaBuf::zeroed(4096).unwrap();
    block[usize::try_from(offset % 4096).unwrap()] = 1;
    ch.block_on(ch.write(offset / 4096, block.freeze(), true))
        .unwrap();
    dev
}

fn byte(dev: &dyn BlockDevice, offset: u64) -> u8 {
    let ch = AsyncChannel::new(dev.open_channel().unwrap());
    let read = ch.read(offset / 4096, DmaBuf::new(4096).unwrap());
    ch.block_on(read).unwrap()[usize::try_from(offset % 4096).unwrap()]
}

#[test]
fn one_byte_keeps_everybody_away() {
    for offset in [0, 5000, 200 << 10, 33 << 20, LEN - 1] {
        let dev = device(offset);
        let e = FileSystem::format(Arc::clone(&dev), &FormatOptions::default()).unwrap_err();
        assert!(matches!(e, FsError::Foreign { .. }), "{e}");
        assert!(e.to_string().contains("--force"), "{e}");
        let e = Blobstore::init(Arc::clone(&dev), &InitOptions::default()).unwrap_err();
        assert!(
            matches!(e, Error::Device(BdevError::NotBlank { .. })),
            "{e}"
        );
        assert_eq!(byte(&*dev, offset), 1);
        let mut how = FormatOptions::default();
        how.force = true;
        FileSystem::format(Arc::clone(&dev), &how).unwrap();
        // A file system of our own is not overwritten either.
        let e = FileSystem::format(dev, &FormatOptions::default()).unwrap_err();
        assert!(e.to_string().contains("BlobFS"), "{e}");
    }
}

#[test]
fn a_file_made_for_a_format_that_failed_is_gone() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let path = dir.path().join("new");
    let uri = format!("{}?size=16M&create=1", file_uri(&path));
    let mut how = FormatOptions::default();
    how.cluster_size = 4097;
    FileSystem::format(open(&uri).unwrap(), &how).unwrap_err();
    assert!(!path.exists());
    // A device that is too small for a store, and a block size that no store has.
    for options in ["size=4K", "size=16M&block_size=8192"] {
        let uri = format!("{}?{options}&create=1", file_uri(&path));
        FileSystem::format(open(&uri).unwrap(), &FormatOptions::default()).unwrap_err();
        assert!(!path.exists(), "{options}");
        Blobstore::init(open(&uri).unwrap(), &InitOptions::default()).unwrap_err();
        assert!(!path.exists(), "{options}");
    }
    FileSystem::format(open(&uri).unwrap(), &FormatOptions::default()).unwrap();
    assert!(path.exists());
}
