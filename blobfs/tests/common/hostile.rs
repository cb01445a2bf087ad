//! Makes a store out of untrusted bytes and uses it. The fuzz targets and the seeded tests call
//! this.

#[path = "forge.rs"]
pub mod forge;

use std::sync::Arc;

use pumice_bdev::{AsyncChannel, BlockDevice, DmaBuf, IoErrorKind};
use pumice_blobfs::blobstore::check::{check, repair};
use pumice_blobfs::blobstore::dump::Dump;
use pumice_blobfs::blobstore::format::{
    BlobReader, BlobRecord, Flags, INVALID_PAGE, MapRecord, Page, PageHeader, Run, SuperBlock,
    TableEntry, Xattr, decode_extent_page, encode_blob, encode_extent_page, seal, seal_chain,
};
use pumice_blobfs::blobstore::{BlobId, Blobstore, CreateOptions, Error, InitOptions, LoadOptions};

const DEVICE: u64 = 512 << 10;
const CLUSTER: u32 = 8192;
const MD_PAGES: u32 = 24;

fn put(dev: &Arc<dyn BlockDevice>, page: u64, bytes: &[u8]) {
    let ch = AsyncChannel::new(dev.open_channel().unwrap());
    let mut buf = DmaBuf::zeroed(bytes.len().div_ceil(4096).max(1) * 4096).unwrap();
    buf[..bytes.len()].copy_from_slice(bytes);
    ch.block_on(ch.write(page, buf.freeze(), false)).unwrap();
}

/// Makes an empty, unloaded store. Returns it with its super block.
fn empty() -> (Arc<dyn BlockDevice>, SuperBlock) {
    let dev = pumice_bdev::open(&format!("malloc://{DEVICE}?block_size=4096")).unwrap();
    let opts = InitOptions::default()
        .cluster_size(CLUSTER)
        .md_pages(Some(MD_PAGES));
    let store = Blobstore::init(dev.clone(), &opts).unwrap();
    store.unload().unwrap();
    let sb = store.super_block();
    (dev, sb)
}

/// Accepts any error except one that says that the device was used outside of its bounds.
fn fine<T>(result: Result<T, Error>) -> Option<T> {
    match result {
        Ok(value) => Some(value),
        Err(Error::Io(error))
            if matches!(
                error.kind,
                IoErrorKind::OutOfRange | IoErrorKind::Misaligned
            ) =>
        {
            panic!("I/O outside of the device: {error}")
        }
        Err(error) => {
            assert!(!error.to_string().is_empty());
            None
        }
    }
}

/// Reads everything, then makes many changes.
fn use_it(dev: &Arc<dyn BlockDevice>) {
    fine(check(dev));
    if let Some(mut dump) = fine(Dump::open(dev)) {
        fine(dump.masks());
        fine(dump.pages(|_, _| ()));
    }
    let Some(store) = fine(Blobstore::load(dev.clone(), &LoadOptions::default())) else {
        return;
    };
    for id in store.blobs() {
        let Some(blob) = fine(store.open(id)) else {
            continue;
        };
        for cluster in [
            0,
            1,
            blob.num_clusters() / 2,
            blob.num_clusters().saturating_sub(1),
        ] {
            let buf = DmaBuf::new(4096).unwrap();
            fine(blob.read_at(cluster * store.cluster_size(), buf));
            fine(blob.write_at(
                cluster * store.cluster_size(),
                DmaBuf::zeroed(4096).unwrap().freeze(),
                false,
            ));
        }
        fine(blob.set_xattr("fuzz", b"1").and_then(|()| blob.sync_md()));
        let size = blob.num_clusters();
        drop(blob);
        fine(store.snapshot(id, &[]));
        fine(store.inflate(id));
        fine(store.open(id).and_then(|blob| blob.resize(size / 2)));
    }
    fine(store.create(&CreateOptions::default().num_clusters(2)));
    for id in store.blobs().into_iter().step_by(2) {
        fine(store.delete(id));
    }
    fine(store.grow());
    fine(store.unload());
    drop(store);
    fine(repair(dev));
}

/// Uses `data` as the super block: as it is, and written over a valid one with a correct CRC.
pub fn super_block(data: &[u8]) {
    let (dev, sb) = empty();
    let mut page: Page = [0; 4096];
    let len = data.len().min(4096);
    page[..len].copy_from_slice(&data[..len]);
    let _ = SuperBlock::decode(&page);
    put(&dev, 0, &page);
    use_it(&dev);
    // Bytes 12 to 96 hold the values.
    let mut page = sb.encode();
    for (at, byte) in data.iter().take(84).enumerate() {
        page[12 + at] ^= byte;
    }
    seal(&mut page);
    put(&dev, 0, &page);
    use_it(&dev);
}

/// Uses `data` as the three masks of a clean store with a few blobs.
pub fn masks(data: &[u8]) {
    let (dev, sb) = empty();
    let store = Blobstore::load(dev.clone(), &LoadOptions::default()).unwrap();
    for num_clusters in [1, 3] {
        store
            .create(&CreateOptions::default().num_clusters(num_clusters))
            .unwrap();
    }
    store.unload().unwrap();
    drop(store);
    let starts = [
        sb.used_page_mask_start,
        sb.used_cluster_mask_start,
        sb.used_blobid_mask_start,
    ];
    for (start, bytes) in starts
        .iter()
        .zip(data.chunks(data.len().div_ceil(3).max(1)))
    {
        let (flip, bytes) = bytes.split_first().unwrap_or((&0, &[]));
        let mut page = vec![0; 4096];
        let ch = AsyncChannel::new(dev.open_channel().unwrap());
        let old = ch
            .block_on(ch.read(start.get().into(), DmaBuf::new(4096).unwrap()))
            .unwrap();
        page.copy_from_slice(&old);
        // The header stays valid for most inputs.
        let from = if flip % 8 == 0 { 0 } else { 5 };
        for (place, byte) in page[from..].iter_mut().zip(bytes) {
            *place ^= byte;
        }
        put(&dev, start.get().into(), &page);
    }
    use_it(&dev);
}

/// Uses `data` as metadata pages, including their CRCs.
pub fn pages(data: &[u8]) {
    for chunk in data.chunks(4096) {
        let mut page: Page = [0; 4096];
        page[..chunk.len()].copy_from_slice(chunk);
        let _ = decode_extent_page(&page);
        let _ = BlobReader::new(PageHeader::read(&page).id).page(&page);
    }
    let (dev, mut sb) = empty();
    sb.clean = 0.into();
    put(&dev, 0, &sb.encode());
    put(
        &dev,
        sb.md_start.get().into(),
        &data[..data.len().min(MD_PAGES as usize * 4096)],
    );
    use_it(&dev);
    // The same descriptors in root pages with correct CRCs.
    put(&dev, 0, &sb.encode());
    for (index, chunk) in (0..MD_PAGES).zip(data.chunks(4072)) {
        let mut page: Page = [0; 4096];
        let header = PageHeader {
            id: BlobId::from_page(index),
            sequence: 0,
            next: INVALID_PAGE,
        };
        header.write(&mut page);
        page[16..16 + chunk.len()].copy_from_slice(chunk);
        seal(&mut page);
        let _ = BlobReader::new(header.id).page(&page);
        put(&dev, u64::from(sb.md_start.get() + index), &page);
    }
    use_it(&dev);
}

/// Takes numbers from bytes, and zeroes when there are no more.
struct Bytes<'a>(&'a [u8]);

impl Bytes<'_> {
    fn byte(&mut self) -> u8 {
        let Some((first, rest)) = self.0.split_first() else {
            return 0;
        };
        self.0 = rest;
        *first
    }

    fn below(&mut self, end: u8) -> u8 {
        self.byte() % end.max(1)
    }

    /// Returns a number that is usually small and sometimes arbitrary.
    fn number(&mut self) -> u32 {
        match self.below(12) {
            0 => u32::from_le_bytes([self.byte(), self.byte(), self.byte(), self.byte()]),
            1 => u32::MAX - u32::from(self.byte()),
            2 => 512 * u32::from(self.byte()),
            _ => u32::from(self.below(70)),
        }
    }
}

/// Makes pages with correct CRCs whose fields come from `data`: roots, chains and extent pages that
/// nearly fit together.
pub fn structured(data: &[u8]) {
    let (dev, mut sb) = empty();
    let mut input = Bytes(data);
    sb.clean = u32::from(input.below(2)).into();
    put(&dev, 0, &sb.encode());
    let md_start = u64::from(sb.md_start.get());
    for _ in 0..=input.below(10) {
        let place = u32::from(input.below(24));
        let id = if input.below(6) == 0 {
            BlobId::from_page(input.number())
        } else {
            BlobId::from_page(place)
        };
        let mut page = match input.below(4) {
            0 => {
                let start = if input.below(3) == 0 {
                    input.number()
                } else {
                    0
                };
                let clusters: Vec<u32> = (0..=input.below(8)).map(|_| input.number()).collect();
                *encode_extent_page(id, start, &clusters)
            }
            _ => root(&mut input, id),
        };
        let mut header = PageHeader::read(&page);
        if input.below(6) == 0 {
            header.sequence = u32::from(input.below(3));
        }
        if input.below(5) == 0 {
            header.next = input.number();
        }
        header.write(&mut page);
        if input.below(6) == 0 {
            let at = usize::from(input.byte()) + 16;
            page[at] ^= input.byte();
        }
        seal(&mut page);
        put(&dev, md_start + u64::from(place), &page);
    }
    use_it(&dev);
}

fn root(input: &mut Bytes<'_>, id: BlobId) -> Page {
    let known = if input.below(8) == 0 { 255 } else { 16 };
    let flags = Flags {
        invalid: u64::from(input.below(known)),
        data_ro: u64::from(input.below(8) == 0),
        md_ro: u64::from(input.below(5)),
    };
    let xattr = |name: &str, value: &[u8]| Xattr {
        name: name.as_bytes().into(),
        value: value.into(),
    };
    let mut internal = Vec::new();
    for name in ["SNAP", "SNAPTMP", "SNAPRM", "EXTSNAP"] {
        if input.below(4) == 0 {
            let named = BlobId::from_page(u32::from(input.below(24)))
                .0
                .to_le_bytes();
            let len = if input.below(8) == 0 { 5 } else { 8 };
            internal.push(xattr(name, &named[..len]));
        }
    }
    let map = if input.below(3) == 0 {
        MapRecord::Rle(
            (0..input.below(5))
                .map(|_| Run {
                    cluster: input.number(),
                    len: input.number(),
                })
                .collect(),
        )
    } else {
        let entry = |input: &mut Bytes<'_>| {
            let page = input.number();
            TableEntry {
                page,
                count: if page == 0 || input.below(8) == 0 {
                    input.number()
                } else {
                    1
                },
            }
        };
        let entries = (0..input.below(5)).map(|_| entry(input)).collect();
        MapRecord::Table {
            num_clusters: u64::from(input.number()),
            entries,
        }
    };
    let record = BlobRecord {
        id,
        flags,
        xattrs: vec![xattr("name", b"fuzz")],
        internal,
        map,
    };
    let mut pages = encode_blob(&record);
    pages.truncate(1);
    seal_chain(&mut pages, &[]);
    *pages[0]
}

/// Makes a store with a journal that was not unloaded, and returns it with the id of a blob.
fn with_journal() -> (Arc<dyn BlockDevice>, BlobId) {
    let dev = pumice_bdev::open(&format!("malloc://{DEVICE}?block_size=4096")).unwrap();
    let opts = InitOptions::default()
        .cluster_size(CLUSTER)
        .md_pages(Some(MD_PAGES))
        .journal(Some(128 << 10));
    let store = Blobstore::init(dev.clone(), &opts).unwrap();
    let create = CreateOptions::default().num_clusters(3);
    let id = store.create(&create).unwrap();
    store.unload().unwrap();
    drop(store);
    // A change begins the journal.
    let store = Blobstore::load(dev.clone(), &LoadOptions::default()).unwrap();
    store.create(&create).unwrap();
    drop(store);
    (dev, id)
}

/// Uses `data` for the records of a batch in the journal, whose checksums are right.
pub fn journal(data: &[u8]) {
    let (dev, id) = with_journal();
    let mut input = Bytes(data);
    let mut records = Vec::new();
    for _ in 0..=input.below(5) {
        let place = u32::from(input.below(24));
        let blob = if input.below(6) == 0 {
            BlobId::from_page(input.number())
        } else {
            id
        };
        records.push(match input.below(8) {
            0 => forge::erase(input.number()),
            1 => {
                let mut page = root(&mut input, BlobId::from_page(place));
                seal(&mut page);
                forge::page(place, &page)
            }
            2 => {
                let kind = u16::from(input.below(10));
                (kind, (0..input.below(70)).map(|_| input.byte()).collect())
            }
            n => {
                let bytes: Vec<u8> = (0..input.below(200)).map(|_| input.byte()).collect();
                let offset = u64::from(input.number()) << (n * 2);
                let (kind, mut body) = forge::carry(blob.0, offset, &bytes);
                if input.below(5) == 0 {
                    // The number of bytes, or a flag.
                    body[16 + usize::from(input.below(8))] ^= input.byte();
                }
                (kind, body)
            }
        });
    }
    forge::forge(&dev, &records);
    use_it(&dev);
}
