//! A second reader of the on-disk format, written from its description alone and sharing nothing
//! with the crate. Everything that Pumice writes has to pass it, also after every power cut, or
//! SPDK's loader would refuse it.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;

const PAGE: usize = 4096;
const NONE: u32 = u32::MAX;
const PER_EXTENT_PAGE: u64 = 512;

const THIN: u64 = 1;
const INTERNAL_XATTRS: u64 = 2;
const EXTENT_TABLE: u64 = 4;
const EXTERNAL_CLONE: u64 = 8;

/// A store, as read from its bytes.
pub struct Store {
    /// Whether the super block marks an orderly unload.
    pub clean: bool,
    /// The blobs by id.
    pub blobs: BTreeMap<u64, Blob>,
}

/// A blob, as read from its pages.
pub struct Blob {
    flags: [u64; 3],
    xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    internal: Vec<(Vec<u8>, Vec<u8>)>,
    /// The clusters; 0 for unallocated.
    clusters: Vec<u32>,
    extent_pages: Vec<u32>,
    chain: Vec<u32>,
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(bytes[at..at + 2].try_into().unwrap())
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

/// Computes the CRC-32C bit by bit.
fn crc32c(bytes: &[u8]) -> u32 {
    static TABLE: std::sync::OnceLock<[u32; 256]> = std::sync::OnceLock::new();
    let table = TABLE.get_or_init(|| {
        std::array::from_fn(|byte| {
            (0..8).fold(u32::try_from(byte).unwrap(), |crc, _| {
                (crc >> 1) ^ (0x82f6_3b78 * (crc & 1))
            })
        })
    });
    !bytes.iter().fold(u32::MAX, |crc, byte| {
        (crc >> 8) ^ table[(crc.to_le_bytes()[0] ^ byte) as usize]
    })
}

fn crc_is_right(page: &[u8]) -> bool {
    crc32c(&page[..PAGE - 4]) == u32_at(page, PAGE - 4)
}

fn mask_pages(bits: u64) -> u64 {
    (5 + bits.div_ceil(8)).div_ceil(PAGE as u64)
}

/// Returns the descriptors of a page. Everything after the last one must be zero.
fn descriptors<'a>(page: &'a [u8], what: &str) -> Vec<(u8, &'a [u8])> {
    let area = &page[16..4088];
    let mut all = Vec::new();
    let mut at = 0;
    while at + 5 <= area.len() {
        let (kind, len) = (area[at], u32_at(area, at + 1) as usize);
        if kind == 0 && len == 0 {
            break;
        }
        assert!((1..=6).contains(&kind), "{what}: descriptor of type {kind}");
        assert!(
            at + 5 + len <= area.len(),
            "{what}: descriptor past the end of its page"
        );
        all.push((kind, &area[at + 5..at + 5 + len]));
        at += 5 + len;
    }
    assert!(
        area[at..].iter().all(|byte| *byte == 0),
        "{what}: bytes behind the last descriptor"
    );
    all
}

impl Blob {
    fn thin(&self) -> bool {
        self.flags[0] & THIN != 0
    }

    fn id_in(&self, name: &str) -> Option<u64> {
        let (_, value) = self.internal.iter().find(|(n, _)| n == name.as_bytes())?;
        assert_eq!(value.len(), 8, "{name}");
        Some(u64_at(value, 0))
    }

    /// Returns the blob that an incomplete or half-deleted snapshot names.
    fn marked(&self) -> Option<u64> {
        let (made, removed) = (self.id_in("SNAPTMP"), self.id_in("SNAPRM"));
        assert!(made.is_none() || removed.is_none(), "both marks");
        made.or(removed)
    }
}

/// Reads as [`parse`] does. A panic is followed by a line that says what was read.
pub fn parse_of(bytes: &[u8], what: &str) -> Store {
    struct Say<'a>(&'a str);
    impl Drop for Say<'_> {
        fn drop(&mut self) {
            if std::thread::panicking() {
                eprintln!("not as the format has it: {}", self.0);
            }
        }
    }
    let _say = Say(what);
    parse(bytes)
}

/// Reads a whole device. Panics, with the place, at everything that differs from the description.
pub fn parse(bytes: &[u8]) -> Store {
    let sb = &bytes[..PAGE];
    assert_eq!(&sb[..8], b"SPDKBLOB");
    assert!(crc_is_right(sb), "crc of the super block");
    assert_eq!(u32_at(sb, 8), 3, "version");
    assert_eq!(u32_at(sb, 12), 4096, "length");
    assert!(u32_at(sb, 16) <= 1, "clean");
    let clean = u32_at(sb, 16) == 1;
    let cluster_size = u64::from(u32_at(sb, 28));
    assert!(
        cluster_size >= 4096 && cluster_size % 4096 == 0,
        "cluster size"
    );
    let [page_at, page_len, cluster_at, cluster_len, md_start, md_len] =
        [32, 36, 40, 44, 48, 52].map(|at| u64::from(u32_at(sb, at)));
    let [id_at, id_len] = [72, 76].map(|at| u64::from(u32_at(sb, at)));
    let size = u64_at(sb, 80);
    assert!(size <= bytes.len() as u64, "size");
    assert!([512, 1024, 2048, 4096].contains(&u32_at(sb, 88)), "io unit");
    assert_eq!(u32_at(sb, 92), 4096, "md page size");
    let free_from = if sb[96..104] == *b"PUMJRNL1" {
        // The place of the journal, in one piece.
        assert_eq!(u32_at(sb, 120), 1, "pieces of the journal");
        assert_eq!(u32_at(sb, 112) % 4096, 0, "length of the journal");
        136
    } else {
        96
    };
    let reserved = &sb[free_from..4092];
    assert!(reserved.iter().all(|byte| *byte == 0), "reserved bytes");
    let total = size / cluster_size;
    // They are behind the super block in a new store, and at the beginning of any cluster after
    // they have moved.
    assert!(
        page_at == 1 || (page_at * PAGE as u64).is_multiple_of(cluster_size),
        "place of the page mask"
    );
    assert_eq!(page_len, mask_pages(md_len));
    assert_eq!(
        (cluster_at, cluster_len),
        (page_at + page_len, mask_pages(total))
    );
    let reserved = id_at - cluster_at;
    assert!(
        reserved >= cluster_len.max(mask_pages(md_len)),
        "room of the cluster mask"
    );
    assert_eq!((id_len, md_start), (mask_pages(md_len), id_at + id_len));
    let md_end = ((md_start + md_len) * PAGE as u64).div_ceil(cluster_size);
    assert!(md_end <= total, "the metadata ends behind the last cluster");
    let mut own: BTreeSet<u64> = (page_at * PAGE as u64 / cluster_size..md_end).collect();
    own.insert(0);
    assert!((own.len() as u64) < total, "no room for data");

    let md_page = |index: u32, what: &str| -> &[u8] {
        assert!(
            u64::from(index) < md_len,
            "{what}: page {index} of {md_len}"
        );
        &bytes[(usize::try_from(md_start).unwrap() + index as usize) * PAGE..][..PAGE]
    };
    let mut blobs = BTreeMap::new();
    for index in 0..u32::try_from(md_len).unwrap() {
        let page = md_page(index, "");
        let id = 1 << 32 | u64::from(index);
        if u64_at(page, 0) == id && u32_at(page, 8) == 0 && crc_is_right(page) {
            blobs.insert(id, read_blob(id, index, &md_page));
        }
    }
    let store = Store { clean, blobs };
    let used = store.check(&own, total, md_len);
    if clean {
        let mask = |at: u64, kind: u8, bits: u64, expected: &BTreeSet<u64>| {
            let pages = usize::try_from(mask_pages(bits)).unwrap();
            let mask = &bytes[usize::try_from(at).unwrap() * PAGE..][..pages * PAGE];
            assert_eq!(mask[0], kind, "type of mask {kind}");
            assert_eq!(u64::from(u32_at(mask, 1)), bits, "bits of mask {kind}");
            let found: BTreeSet<u64> = (0..(mask.len() - 5) as u64 * 8)
                .filter(|bit| mask[5 + usize::try_from(bit / 8).unwrap()] >> (bit % 8) & 1 == 1)
                .collect();
            assert_eq!(&found, expected, "mask {kind}");
        };
        let [pages, clusters, roots] = &used;
        mask(page_at, 0, md_len, pages);
        mask(cluster_at, 1, total, clusters);
        mask(id_at, 2, md_len, roots);
        for (id, blob) in &store.blobs {
            assert_eq!(blob.marked(), None, "blob {id:#x} in a clean store");
        }
    }
    store
}

fn read_blob<'a>(id: u64, root: u32, md_page: &dyn Fn(u32, &str) -> &'a [u8]) -> Blob {
    let mut blob = Blob {
        flags: [0; 3],
        xattrs: Vec::new(),
        internal: Vec::new(),
        clusters: Vec::new(),
        extent_pages: Vec::new(),
        chain: Vec::new(),
    };
    let mut order = 0;
    let mut table: Option<(u64, Vec<(u32, u32)>)> = None;
    let mut rle: Option<Vec<(u32, u32)>> = None;
    let (mut index, mut sequence) = (root, 0);
    loop {
        let what = format!("blob {id:#x}, page {index}");
        let page = md_page(index, &what);
        assert!(crc_is_right(page), "{what}: crc");
        assert_eq!(
            (u64_at(page, 0), u32_at(page, 8)),
            (id, sequence),
            "{what}: id, sequence"
        );
        assert_eq!(u32_at(page, 12), 0, "{what}: reserved");
        let mut extents = 0;
        for (number, (kind, body)) in descriptors(page, &what).into_iter().enumerate() {
            let pairs = |from: usize| -> Vec<(u32, u32)> {
                assert_eq!((body.len() - from) % 8, 0, "{what}: length");
                let pairs = body[from..].chunks(8);
                pairs
                    .map(|pair| (u32_at(pair, 0), u32_at(pair, 4)))
                    .collect()
            };
            let rank = [0, 4, 2, 1, 3, 4, 9][usize::from(kind)];
            assert!(rank >= order, "{what}: order of descriptors");
            order = rank;
            match kind {
                3 => {
                    assert!(
                        sequence == 0 && number == 0,
                        "{what}: flags must come first, once"
                    );
                    assert_eq!(body.len(), 24, "{what}: flags");
                    blob.flags = [0, 8, 16].map(|at| u64_at(body, at));
                }
                2 | 4 => {
                    let (name, value) =
                        (usize::from(u16_at(body, 0)), usize::from(u16_at(body, 2)));
                    assert_eq!(body.len(), 4 + name + value, "{what}: xattr");
                    let xattr = (body[4..4 + name].to_vec(), body[4 + name..].to_vec());
                    assert!(
                        name != 0 && !xattr.0.contains(&0),
                        "{what}: name of an xattr"
                    );
                    let all = if kind == 2 {
                        &mut blob.xattrs
                    } else {
                        &mut blob.internal
                    };
                    assert!(
                        all.iter().all(|(name, _)| *name != xattr.0),
                        "{what}: xattr twice"
                    );
                    all.push(xattr);
                }
                1 => {
                    assert!(!body.is_empty(), "{what}: empty run-length extents");
                    rle.get_or_insert_default().extend(pairs(0));
                    extents += 1;
                }
                5 => {
                    let num_clusters = u64_at(body, 0);
                    let table = table.get_or_insert((num_clusters, Vec::new()));
                    assert_eq!(table.0, num_clusters, "{what}: tables differ");
                    table.1.extend(pairs(8));
                    extents += 1;
                }
                _ => panic!("{what}: a descriptor of type {kind} in a chain"),
            }
            assert!(
                number != 0 || sequence != 0 || kind == 3,
                "{what}: no flags"
            );
        }
        assert!(extents <= 1, "{what}: two descriptors of extents");
        assert!(order != 0 || sequence == 0, "{what}: empty");
        index = u32_at(page, 4088);
        sequence += 1;
        if index == NONE {
            break;
        }
        assert!(index != 0 && sequence < 1000, "{what}: next");
        blob.chain.push(index);
    }
    assert!(
        !descriptors(md_page(root, ""), "").is_empty(),
        "blob {id:#x}: no flags"
    );
    assert_eq!(blob.flags[0] & !15, 0, "blob {id:#x}: invalid_flags");
    assert_eq!(blob.flags[1] & !1, 0, "blob {id:#x}: data_ro_flags");
    assert_eq!(blob.flags[2] & !3, 0, "blob {id:#x}: md_ro_flags");
    assert_eq!(
        blob.flags[0] & EXTENT_TABLE != 0,
        table.is_some(),
        "blob {id:#x}: an extent-table blob has its table, and no other blob has one"
    );
    assert_eq!(
        blob.flags[0] & INTERNAL_XATTRS != 0,
        !blob.internal.is_empty(),
        "blob {id:#x}: the flag of internal xattrs"
    );
    match (table, rle) {
        (Some((num_clusters, entries)), None) => {
            read_table(&mut blob, id, num_clusters, &entries, md_page);
        }
        (None, rle) => {
            for (cluster, len) in rle.unwrap_or_default() {
                assert_ne!(len, 0, "blob {id:#x}: empty run");
                blob.clusters
                    .extend((0..len).map(|i| if cluster == 0 { 0 } else { cluster + i }));
            }
        }
        _ => panic!("blob {id:#x}: both a table and runs"),
    }
    blob
}

fn read_table<'a>(
    blob: &mut Blob,
    id: u64,
    num_clusters: u64,
    entries: &[(u32, u32)],
    md_page: &dyn Fn(u32, &str) -> &'a [u8],
) {
    let mut number = 0;
    for (index, count) in entries {
        let left = num_clusters
            .checked_sub(number * PER_EXTENT_PAGE)
            .expect("too many entries");
        assert!(
            left != 0 && *count != 0,
            "blob {id:#x}: entries behind the end"
        );
        if *index == 0 {
            number += u64::from(*count);
            let span = left.min(u64::from(*count) * PER_EXTENT_PAGE);
            blob.clusters.extend((0..span).map(|_| 0));
            continue;
        }
        assert_eq!(
            *count, 1,
            "blob {id:#x}: the count of an allocated extent page"
        );
        let what = format!("blob {id:#x}, extent page {index}");
        let page = md_page(*index, &what);
        assert!(crc_is_right(page), "{what}: crc");
        assert_eq!(
            (u32_at(page, 8), u32_at(page, 12), u32_at(page, 4088)),
            (0, 0, NONE),
            "{what}"
        );
        assert_eq!(u64_at(page, 0) >> 32, 1, "{what}: id");
        assert_ne!(
            u64_at(page, 0),
            1 << 32 | u64::from(*index),
            "{what}: looks like a root"
        );
        let [(6, body)] = descriptors(page, &what)[..] else {
            panic!("{what}: not one descriptor of type 6");
        };
        assert_eq!(
            u64::from(u32_at(body, 0)),
            number * PER_EXTENT_PAGE,
            "{what}: start"
        );
        let len = usize::try_from(left.min(PER_EXTENT_PAGE)).unwrap();
        assert_eq!(
            body.len(),
            4 + 4 * len,
            "{what}: exactly the clusters that are left"
        );
        blob.clusters
            .extend(body[4..].chunks(4).map(|entry| u32_at(entry, 0)));
        blob.extent_pages.push(*index);
        number += 1;
    }
    assert_eq!(
        number,
        num_clusters.div_ceil(PER_EXTENT_PAGE),
        "blob {id:#x}: the table's pages"
    );
}

impl Store {
    /// Checks owners and parents. Returns what is used: metadata pages, clusters, roots.
    fn check(&self, own: &BTreeSet<u64>, total: u64, md_len: u64) -> [BTreeSet<u64>; 3] {
        let mut pages: BTreeMap<u64, Vec<u64>> = BTreeMap::new();
        let mut clusters: BTreeMap<u64, Vec<u64>> = BTreeMap::new();
        for (id, blob) in &self.blobs {
            for page in blob.extent_pages.iter().chain(&blob.chain) {
                pages.entry(u64::from(*page)).or_default().push(*id);
            }
            pages.entry(id & 0xffff_ffff).or_default().push(*id);
            for cluster in &blob.clusters {
                if *cluster == 0 {
                    assert!(blob.thin(), "blob {id:#x}: a hole in a thick blob");
                    continue;
                }
                let cluster = u64::from(*cluster);
                assert!(
                    cluster < total && !own.contains(&cluster),
                    "blob {id:#x}: cluster {cluster}"
                );
                clusters.entry(cluster).or_default().push(*id);
            }
            self.check_parent(*id, blob);
        }
        let half_done: BTreeSet<(u64, u64)> = self
            .blobs
            .iter()
            .filter_map(|(id, blob)| Some((*id, blob.marked()?)))
            .flat_map(|(a, b)| [(a, b), (b, a)])
            .collect();
        for (what, owners) in [("page", &pages), ("cluster", &clusters)] {
            for (number, ids) in owners {
                let legal = match ids[..] {
                    [_] => true,
                    [a, b] => half_done.contains(&(a, b)),
                    _ => false,
                };
                assert!(legal, "{what} {number} belongs to {ids:#x?}");
            }
        }
        assert!(pages.keys().all(|page| *page < md_len));
        let mut clusters: BTreeSet<u64> = clusters.into_keys().collect();
        clusters.extend(own);
        let roots = self.blobs.keys().map(|id| id & 0xffff_ffff).collect();
        [pages.into_keys().collect(), clusters, roots]
    }

    fn check_parent(&self, id: u64, blob: &Blob) {
        let external = blob.flags[0] & EXTERNAL_CLONE != 0;
        let has_external = blob.internal.iter().any(|(name, _)| name == b"EXTSNAP");
        assert_eq!(external, has_external, "blob {id:#x}: external clone");
        if let Some(parent) = blob.id_in("SNAP") {
            assert!(blob.thin() && !external, "blob {id:#x}: a clone is thin");
            let parent_blob = &self.blobs.get(&parent);
            let parent_blob =
                parent_blob.unwrap_or_else(|| panic!("blob {id:#x}: no parent {parent:#x}"));
            assert!(
                parent_blob.flags[1] & 1 == 1 || parent_blob.marked() == Some(id),
                "blob {id:#x}: its parent {parent:#x} can be written"
            );
        }
        if let Some(named) = blob.marked() {
            assert!(
                self.blobs.contains_key(&named),
                "blob {id:#x}: names {named:#x}"
            );
        }
    }

    /// Describes the blobs in the form in which SPDK reports them.
    pub fn listing(&self) -> Vec<String> {
        let parents: BTreeSet<u64> = self
            .blobs
            .values()
            .filter_map(|blob| blob.id_in("SNAP"))
            .collect();
        let mut lines = Vec::new();
        for (id, blob) in &self.blobs {
            let parent = blob.id_in("SNAP");
            lines.push(format!(
                "blob {id:#x} clusters={} allocated={} thin={} ro={} snapshot={} clone={} parent={}",
                blob.clusters.len(),
                blob.clusters.iter().filter(|cluster| **cluster != 0).count(),
                u8::from(blob.thin()),
                blob.flags[1] & 1,
                u8::from(parents.contains(id)),
                u8::from(parent.is_some()),
                parent.map_or("none".to_owned(), |id| format!("{id:#x}")),
            ));
            for (name, value) in &blob.xattrs {
                let mut line = format!(
                    "  xattr '{}' len={} hex=",
                    String::from_utf8_lossy(name),
                    value.len()
                );
                for byte in value.iter().take(48) {
                    write!(line, "{byte:02x}").unwrap();
                }
                if value.len() > 48 {
                    line += "...";
                }
                lines.push(line);
            }
        }
        lines
    }
}
