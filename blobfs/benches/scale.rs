//! Measures what does not stay the same as a file system grows: its files, its size, its threads.
//!
//! `cargo bench -p pumice-blobfs --bench scale -- FILES SIZE [THREADS]`, for example
//! `100000 1T 8`. The image is sparse, in `$PUMICE_BENCH_DIR` or the temporary directory, and is
//! removed. One line for each step, in the order in which a store lives them.

use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use pumice_bdev::BlockDevice;
use pumice_blobfs::fs::{FileSystem, FormatOptions, IoStats, MountOptions, OpenOptions};

/// Files of a directory.
const DIR_FILES: usize = 10_000;
/// Bytes of a file.
const FILE_BYTES: usize = 4096;
/// Batches that a killed process leaves in the journal.
const KILLED_BATCHES: usize = 1000;
/// Time for which each number of threads is measured.
const SYNCS_FOR: Duration = Duration::from_secs(2);

fn main() {
    let args: Vec<String> = std::env::args()
        .skip(1)
        .filter(|a| a != "--bench")
        .collect();
    if let Ok(role) = std::env::var("PUMICE_SCALE_ROLE") {
        return child(&role, Path::new(&args[0]));
    }
    let files: usize = args
        .first()
        .map_or(10_000, |a| a.parse().expect("FILES is a number"));
    let size = args.get(1).map_or("16G", String::as_str);
    let threads: usize = args
        .get(2)
        .map_or(8, |a| a.parse().expect("THREADS is a number"));
    let dir = std::env::var_os("PUMICE_BENCH_DIR").map_or_else(std::env::temp_dir, Into::into);
    let dir = tempfile::tempdir_in(dir).expect("a directory for the image");
    let image = dir.path().join("image");
    println!("{files} files of {FILE_BYTES} bytes, {size}, up to {threads} threads");
    life(&image, files, size, threads);
}

fn life(image: &Path, files: usize, size: &str, threads: usize) {
    let uri = format!("file://{}?size={size}&create=1", image.display());
    let dev = pumice_bdev::open(&uri).unwrap();
    step("format", 1, || {
        FileSystem::format(Arc::clone(&dev), &FormatOptions::default()).unwrap();
    });
    drop(dev);
    in_child("empty", image, None);
    let fs = mounted(pumice_bdev::open(&format!("file://{}", image.display())).unwrap());
    let dirs = files.div_ceil(DIR_FILES);
    let before = resident_bytes();
    let io = fs.io_stats();
    step("make, write and close a file", files, || fill(&fs, files));
    step("sync of everything", 1, || fs.sync().unwrap());
    println!(
        "{:44} {:>12}",
        "  device writes per file",
        per(fs.io_stats().since(&io).writes, files)
    );
    println!(
        "{:44} {:>12}",
        "  bytes of memory per file",
        (resident_bytes().saturating_sub(before)) / files as u64
    );
    looks(&fs, files);
    syncs(&fs, threads);
    step("rename of a directory of these files", 1, || {
        fs.rename("/d0", "/moved").unwrap();
    });
    step("rename of that directory back", 1, || {
        fs.rename("/moved", "/d0").unwrap();
    });
    beside_a_rename(&fs);
    step("unmount", 1, || fs.unmount().unwrap());
    drop(fs);

    in_child("mounted", image, None);
    in_child("killed", image, Some(libc::SIGABRT));
    in_child("mounted again", image, None);
    let fs = mounted(pumice_bdev::open(&format!("file://{}", image.display())).unwrap());
    assert_eq!(fs.stat("/killed").unwrap().len, 512 * KILLED_BATCHES as u64);
    step("deletion of a file", files, || {
        for d in 0..dirs {
            for f in d * DIR_FILES..files.min((d + 1) * DIR_FILES) {
                fs.unlink(&format!("/d{d}/f{f}")).unwrap();
            }
        }
        fs.sync().unwrap();
    });
    step("unmount", 1, || fs.unmount().unwrap());
}

fn fill(fs: &FileSystem, files: usize) {
    let data = vec![7u8; FILE_BYTES];
    for f in 0..files {
        let d = f / DIR_FILES;
        if f % DIR_FILES == 0 {
            fs.mkdir(&format!("/d{d}")).unwrap();
        }
        let file = fs.open(&format!("/d{d}/f{f}"), OpenOptions::FRESH).unwrap();
        file.append(&data).unwrap();
    }
}

fn looks(fs: &FileSystem, files: usize) {
    step(
        "listing of a directory, per file",
        files.min(DIR_FILES),
        || {
            assert_eq!(fs.list("/d0").unwrap().len(), files.min(DIR_FILES));
        },
    );
    step("statfs", 1000, || {
        (0..1000).for_each(|_| assert!(fs.statfs().files > 0));
    });
    step("opening a file by its name", 1000, || {
        for f in 0..1000.min(files) {
            drop(fs.open(&format!("/d0/f{f}"), OpenOptions::READ).unwrap());
        }
    });
}

/// Appends and syncs, each thread its own file.
fn syncs(fs: &FileSystem, most: usize) {
    let mut threads = 1;
    while threads <= most {
        let io = fs.io_stats();
        let (done, took) = appending(fs, threads, || std::thread::sleep(SYNCS_FOR));
        let io = fs.io_stats().since(&io);
        println!(
            "{:44} {:>12} µs, {:.0}/s, {} writes and {} flushes per sync",
            format!("append and sync, threads: {threads}"),
            per(
                u64::try_from(took.as_micros()).unwrap() * threads as u64,
                done
            ),
            done as f64 / took.as_secs_f64(),
            per(io.writes, done),
            per(io.flushes, done),
        );
        threads *= 2;
    }
}

/// Runs `meanwhile` while so many threads append and sync. Returns how often they did, and in what time.
fn appending(fs: &FileSystem, threads: usize, meanwhile: impl FnOnce()) -> (usize, Duration) {
    let (over, done) = (AtomicBool::new(false), AtomicU64::new(0));
    let start = Instant::now();
    std::thread::scope(|scope| {
        for t in 0..threads {
            let (over, done) = (&over, &done);
            scope.spawn(move || {
                let file = fs.open(&format!("/log{t}"), OpenOptions::FRESH).unwrap();
                while !over.load(Ordering::Relaxed) {
                    file.append(&[3u8; 138]).unwrap();
                    file.sync().unwrap();
                    done.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        meanwhile();
        over.store(true, Ordering::Relaxed);
    });
    (usize::try_from(done.into_inner()).unwrap(), start.elapsed())
}

fn beside_a_rename(fs: &FileSystem) {
    let longest = AtomicU64::new(0);
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let file = fs.open("/beside", OpenOptions::FRESH).unwrap();
            while !over.load(Ordering::Relaxed) {
                let start = Instant::now();
                file.append(&[3u8; 138]).unwrap();
                file.sync().unwrap();
                let took = u64::try_from(start.elapsed().as_micros()).unwrap();
                longest.fetch_max(took, Ordering::Relaxed);
            }
        });
        for _ in 0..5 {
            fs.rename("/d0", "/moved").unwrap();
            fs.rename("/moved", "/d0").unwrap();
        }
        over.store(true, Ordering::Relaxed);
    });
    println!(
        "{:44} {:>12} µs",
        "longest sync beside ten such renames",
        longest.into_inner()
    );
}

/// Runs a part of the life in a process of its own, whose memory is not an earlier part's.
fn in_child(role: &str, image: &Path, signal: Option<i32>) {
    let status = std::process::Command::new(std::env::current_exe().unwrap())
        .env("PUMICE_SCALE_ROLE", role)
        .arg(image)
        .status()
        .unwrap();
    assert!(status.success() || status.signal() == signal, "{status}");
}

fn child(role: &str, image: &Path) {
    let before = resident_bytes();
    let what = match role {
        "mounted" => "mount after an unmount, and the first read",
        "killed" => killed(image),
        "empty" => {
            let fs = mounted(pumice_bdev::open(&format!("file://{}", image.display())).unwrap());
            let memory = resident_bytes().saturating_sub(before);
            println!("{:44} {:>12}", "bytes of memory without files", memory);
            return fs.unmount().unwrap();
        }
        _ => "mount after a kill, and the first read",
    };
    let fs = first_read(what, image);
    let memory = resident_bytes().saturating_sub(before);
    println!("{:44} {memory:>12}", "  bytes of memory");
    step("unmount", 1, || fs.unmount().unwrap());
}

/// Leaves a store with batches in its journal.
fn killed(image: &Path) -> ! {
    let fs = mounted(pumice_bdev::open(&format!("file://{}", image.display())).unwrap());
    let file = fs.open("/killed", OpenOptions::FRESH).unwrap();
    for _ in 0..KILLED_BATCHES {
        file.append(&[9u8; 512]).unwrap();
        file.sync().unwrap();
    }
    std::process::abort()
}

fn mounted(dev: Arc<dyn BlockDevice>) -> FileSystem {
    let mut options = MountOptions::default();
    options.cache_bytes = 64 << 20;
    FileSystem::mount(dev, &options).unwrap()
}

fn first_read(what: &str, image: &Path) -> FileSystem {
    let mut fs = None;
    let mut io = IoStats::default();
    step(what, 1, || {
        let mounted = mounted(pumice_bdev::open(&format!("file://{}", image.display())).unwrap());
        let file = mounted.open("/d0/f1", OpenOptions::READ).unwrap();
        let mut buf = vec![0; FILE_BYTES];
        assert_eq!(file.read_at(0, &mut buf).unwrap(), FILE_BYTES);
        io = mounted.io_stats();
        fs = Some(mounted);
    });
    println!(
        "{:44} {:>12} in {} reads",
        "  bytes read", io.read_bytes, io.reads
    );
    fs.unwrap()
}

/// Prints how long a step takes, per operation.
fn step(what: &str, count: usize, run: impl FnOnce()) {
    let start = Instant::now();
    run();
    let micros = start.elapsed().as_secs_f64() * 1e6;
    println!("{what:44} {:>12.1} µs", micros / count as f64);
}

fn per(amount: u64, count: usize) -> String {
    format!("{:.2}", amount as f64 / count.max(1) as f64)
}

/// Bytes of memory that this process has.
fn resident_bytes() -> u64 {
    let text = std::fs::read_to_string("/proc/self/statm").unwrap();
    text.split(' ').nth(1).unwrap().parse::<u64>().unwrap() * 4096
}
