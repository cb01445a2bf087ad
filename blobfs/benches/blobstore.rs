//! Measures the blobstore: the cost of a blob over the bare device, creation and deletion, loading,
//! snapshots.
//!
//! `cargo bench -p pumice-blobfs --bench blobstore [-- io|files|load|snapshot]` prints medians of several
//! rounds with their spread. Both sides of a comparison take turns in one run.

use std::sync::Arc;
use std::time::{Duration, Instant};

use pumice_bdev::{AsyncChannel, BlockDevice, DmaBuf, DmaSlice, join_all};
use pumice_blobfs::blobstore::{Blob, Blobstore, CreateOptions, InitOptions, LoadOptions};

const DEPTH: usize = 32;
const IO: usize = 4096;

fn main() {
    let what: Vec<String> = std::env::args()
        .skip(1)
        .filter(|arg| !arg.starts_with('-'))
        .collect();
    let wanted = |name: &str| what.is_empty() || what.iter().any(|one| one == name);
    if wanted("io") {
        io();
    }
    if wanted("files") {
        create_and_delete();
    }
    if wanted("load") {
        load();
    }
    if wanted("snapshot") {
        snapshots();
    }
}

/// Returns the median and the extremes.
fn spread(mut values: Vec<f64>) -> (f64, f64, f64) {
    values.sort_by(f64::total_cmp);
    (
        values[values.len() / 2],
        values[0],
        values[values.len() - 1],
    )
}

fn xorshift(state: &mut u64) -> u64 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    *state
}

#[derive(Clone, Copy)]
enum Side<'a> {
    Bare(u64),
    Blob(&'a Blob),
}

/// Runs one lane of a queue: one I/O after another at random places.
async fn lane(
    ch: &AsyncChannel,
    side: Side<'_>,
    write: Option<DmaSlice>,
    seed: u64,
    count: u32,
    places: u64,
) {
    let mut random = seed;
    let mut buf = Some(DmaBuf::new(IO).expect("memory"));
    for _ in 0..count {
        let place = xorshift(&mut random) % places;
        match (side, &write) {
            (Side::Bare(base), None) => {
                buf = Some(
                    ch.read(base + place, buf.take().expect("a buffer"))
                        .await
                        .expect("reads"),
                );
            }
            (Side::Bare(base), Some(data)) => ch
                .write(base + place, data.clone(), false)
                .await
                .expect("writes"),
            (Side::Blob(blob), None) => {
                let read = blob.read(ch, place * IO as u64, buf.take().expect("a buffer"));
                buf = Some(read.await.expect("reads"));
            }
            (Side::Blob(blob), Some(data)) => {
                blob.write(ch, place * IO as u64, data.clone(), false)
                    .await
                    .expect("writes");
            }
        }
    }
}

/// Returns the processor time of this thread in nanoseconds. Unlike the clock, it does not depend
/// on a busy machine.
fn processor_ns() -> f64 {
    let stat =
        std::fs::read_to_string("/proc/thread-self/schedstat").expect("the scheduler's figures");
    let ns = stat
        .split_ascii_whitespace()
        .next()
        .and_then(|ns| ns.parse().ok());
    ns.expect("the first figure is a time")
}

/// Returns the nanoseconds per I/O, and the nanoseconds on the processor.
fn round(ch: &AsyncChannel, side: Side<'_>, write: bool, count: u32, places: u64) -> [f64; 2] {
    let data = write.then(|| DmaBuf::zeroed(IO).expect("memory").freeze());
    let (start, processor) = (Instant::now(), processor_ns());
    let lanes =
        (1..=DEPTH as u64).map(|seed| lane(ch, side, data.clone(), seed * 7919, count, places));
    ch.block_on(join_all(lanes.collect::<Vec<_>>()));
    let total = f64::from(count) * DEPTH as f64;
    [
        start.elapsed().as_secs_f64() * 1e9,
        processor_ns() - processor,
    ]
    .map(|ns| ns / total)
}

/// Makes a device whose metadata can be read and whose data is discarded.
fn null_like() -> (Blobstore, Arc<dyn BlockDevice>) {
    let dev = pumice_bdev::open("malloc://64M?block_size=4096").expect("opens");
    let store = Blobstore::init(dev.clone(), &InitOptions::default()).expect("a store");
    (store, dev)
}

fn io() {
    let (store, _) = null_like();
    let opts = CreateOptions::default().num_clusters(32);
    let blob = store
        .open(store.create(&opts).expect("creates"))
        .expect("opens");
    let places = blob.len_bytes() / IO as u64;
    let base = blob.extents().lba(0).expect("a thick blob");
    let null = pumice_bdev::open("null://64M?block_size=4096").expect("opens");
    let file = tempfile::NamedTempFile::new().expect("a file");
    let uri = format!("file://{}?size=64M&block_size=4096", file.path().display());
    for (name, dev) in [
        ("null", Some(null)),
        ("malloc", Some(store.device().clone())),
        ("file", pumice_bdev::open(&uri).ok()),
    ] {
        let Some(dev) = dev else {
            println!("{name}: cannot be opened, left out");
            continue;
        };
        // The blob's map is from the store in memory and its I/O goes to this device: only the path
        // is measured.
        let ch = AsyncChannel::new(dev.open_channel().expect("a channel"));
        let count = if name == "file" { 300 } else { 60_000 };
        // Reads of a hole in a file, or of memory that was never written, would not reach the
        // medium.
        ch.block_on(async {
            let data = DmaBuf::zeroed(IO).expect("memory").freeze();
            for lba in base..base + places {
                if let Err(e) = ch.write(lba, data.clone(), false).await {
                    panic!("block {lba} of {name} cannot be written: {e}");
                }
            }
        });
        for write in [false, true] {
            let mut rounds = Vec::new();
            for _ in 0..11 {
                let bare = round(&ch, Side::Bare(base), write, count, places);
                rounds.push((bare, round(&ch, Side::Blob(&blob), write, count, places)));
            }
            let op = if write { "write" } else { "read" };
            for (which, of) in [(0, "time"), (1, "processor time")] {
                let (bare, ..) = spread(rounds.iter().map(|(bare, _)| bare[which]).collect());
                let (through, ..) = spread(rounds.iter().map(|(_, blob)| blob[which]).collect());
                let more = rounds.iter().map(|(bare, blob)| blob[which] - bare[which]);
                let (more, least, most) = spread(more.collect());
                println!(
                    "{name} random {op} 4 KiB, depth {DEPTH}, {of}: bare {bare:.0} ns, blob {through:.0} ns, \
                     more by {more:.0} ns ({least:.0} to {most:.0}), ratio {:.3}",
                    through / bare
                );
            }
        }
    }
}

fn create_and_delete() {
    let mut rates = (Vec::new(), Vec::new());
    for _ in 0..5 {
        let (store, _) = null_like();
        let n = 60;
        let start = Instant::now();
        let ids: Vec<_> = (0..n)
            .map(|_| store.create(&CreateOptions::default()).expect("creates"))
            .collect();
        let created = start.elapsed();
        let start = Instant::now();
        for id in ids {
            store.delete(id).expect("deletes");
        }
        let per = |time: Duration| time.as_secs_f64() * 1e6 / f64::from(n);
        rates.0.push(per(created));
        rates.1.push(per(start.elapsed()));
    }
    let (create, least, most) = spread(rates.0);
    println!("create an empty blob: {create:.1} µs ({least:.1} to {most:.1}) on memory");
    let (delete, least, most) = spread(rates.1);
    println!("delete it: {delete:.1} µs ({least:.1} to {most:.1}) on memory");
}

fn load() {
    let dev = pumice_bdev::open("malloc://2G?block_size=4096").expect("opens");
    let opts = InitOptions::default()
        .cluster_size(8192)
        .md_pages(Some(210_000));
    let store = Blobstore::init(dev.clone(), &opts).expect("a store");
    let n = 100_000;
    let start = Instant::now();
    for i in 0..n {
        let xattrs = vec![
            ("name".to_owned(), format!("/file{i:06}\0").into_bytes()),
            ("length".to_owned(), vec![0; 8]),
        ];
        let num_clusters = u64::from(i % 2 == 0);
        store
            .create(
                &CreateOptions::default()
                    .num_clusters(num_clusters)
                    .xattrs(xattrs),
            )
            .expect("creates");
    }
    println!(
        "{n} blobs created in {:.2} s, {:.1} µs each",
        start.elapsed().as_secs_f64(),
        start.elapsed().as_secs_f64() * 1e6 / f64::from(n)
    );
    drop(store);
    for how in ["unclean", "clean"] {
        let mut times = Vec::new();
        for _ in 0..3 {
            let start = Instant::now();
            let store = Blobstore::load(dev.clone(), &LoadOptions::default()).expect("loads");
            times.push(start.elapsed().as_secs_f64());
            assert_eq!(store.blobs().len(), n as usize);
            if how == "clean" {
                store.unload().expect("unloads");
            }
        }
        let (time, least, most) = spread(times);
        println!(
            "load {n} blobs, 210 000 metadata pages, {how}: {time:.2} s ({least:.2} to {most:.2})"
        );
        if how == "unclean" {
            let store = Blobstore::load(dev.clone(), &LoadOptions::default()).expect("loads");
            store.unload().expect("unloads");
        }
    }
}

fn snapshots() {
    let dev = pumice_bdev::open("malloc://4G?block_size=4096").expect("opens");
    let opts = InitOptions::default()
        .cluster_size(8192)
        .md_pages(Some(8000));
    let store = Blobstore::init(dev, &opts).expect("a store");
    for clusters in [1u64, 100, 1000, 10_000, 100_000, 300_000] {
        let mut times = Vec::new();
        for _ in 0..5 {
            let opts = CreateOptions::default().num_clusters(clusters);
            let id = store.create(&opts).expect("creates");
            let start = Instant::now();
            let snapshot = store.snapshot(id, &[]).expect("snapshots");
            times.push(start.elapsed().as_secs_f64() * 1e6);
            store.delete(id).expect("deletes");
            store.delete(snapshot).expect("deletes");
        }
        let (time, least, most) = spread(times);
        println!(
            "snapshot of {clusters} clusters: {time:.0} µs ({least:.0} to {most:.0}) on memory"
        );
    }
}
