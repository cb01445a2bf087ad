//! The figures of a file system and of the database in it. Each is named once, for Prometheus, for
//! JSON-RPC, and as a RocksDB property (`pumice.free-bytes`).

#![cfg_attr(
    not(feature = "inspect"),
    allow(dead_code, reason = "without it there are only the properties")
)]

use std::ffi::CString;
use std::fmt::Write as _;

use pumice_blobfs::fs::{CacheStats, FileSystem, IoStats, StatFs};

use crate::handle::{Calls, DbHandle};

/// The values that the figures of a file system are computed from.
pub(crate) struct Snapshot {
    space: StatFs,
    cache: CacheStats,
    io: IoStats,
    writeback_bytes: u64,
    dirty_bytes: u64,
}

impl Snapshot {
    pub(crate) fn of(fs: &FileSystem) -> Snapshot {
        Snapshot {
            space: fs.statfs(),
            cache: fs.cache_stats(),
            io: fs.io_stats(),
            writeback_bytes: fs.writeback_bytes(),
            dirty_bytes: fs.dirty_bytes(),
        }
    }

    /// Returns every figure that exists, with its value.
    pub(crate) fn figures(&self) -> impl Iterator<Item = (&'static Figure, u64)> {
        FIGURES
            .iter()
            .filter_map(|figure| Some((figure, (figure.value)(self)?)))
    }
}

/// Whether a figure only grows.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Gauge,
    Counter,
}

/// A figure of a file system.
pub(crate) struct Figure {
    /// The name in JSON. Prometheus puts `pumice_fs_` before it and, for a counter, `_total` after
    /// it.
    pub(crate) name: &'static str,
    help: &'static str,
    kind: Kind,
    value: fn(&Snapshot) -> Option<u64>,
}

/// A row of the table: the kind, the name, the help, and the value in a [`Snapshot`].
macro_rules! figure {
    ($kind:ident $name:ident $help:literal, $($value:ident).+) => {
        figure!($kind $name $help, |s| Some(s.$($value).+))
    };
    ($kind:ident $name:ident $help:literal, $value:expr) => {
        Figure {
            name: stringify!($name),
            help: $help,
            kind: Kind::$kind,
            value: $value,
        }
    };
}

/// The figures of a file system.
static FIGURES: &[Figure] = &[
    figure!(Gauge total_bytes "Bytes for files.", space.total),
    figure!(Gauge free_bytes "Bytes that can be written.", space.free),
    figure!(Gauge used_bytes "Bytes that files have.", space.used),
    figure!(Gauge journal_bytes "Bytes of the journal.", space.journal),
    figure!(
        Gauge host_free_bytes
        "Bytes that the file system below a sparse image has room for.",
        |s| s.space.host_free
    ),
    figure!(Gauge cluster_size "Bytes of a cluster.", space.cluster),
    figure!(Gauge files "Files.", space.files),
    figure!(Gauge md_pages "Metadata pages.", space.md_pages),
    figure!(Gauge md_pages_used "Metadata pages that are used.", space.md_pages_used),
    figure!(
        Gauge writeback_bytes
        "Bytes that were appended and are on their way to the device.",
        writeback_bytes
    ),
    figure!(
        Gauge dirty_bytes
        "Bytes that were written and are not in their place on the device: in memory, on their way, or in the journal.",
        dirty_bytes
    ),
    figure!(Gauge cache_used_bytes "Bytes of clean pages in the page cache.", cache.used_bytes),
    figure!(Gauge cache_capacity_bytes "The bound of the page cache.", cache.capacity_bytes),
    figure!(Counter cache_hits "Reads that were answered from memory alone.", cache.hits),
    figure!(Counter cache_misses "Reads that needed the device.", cache.misses),
    figure!(
        Counter cache_evictions
        "Pages that made room for others in the page cache.",
        cache.evictions
    ),
    figure!(Counter device_reads "Reads sent to the device.", io.reads),
    figure!(Counter device_read_bytes "Bytes read from the device.", io.read_bytes),
    figure!(Counter device_writes "Writes sent to the device.", io.writes),
    figure!(
        Counter device_fua_writes
        "Writes with force unit access, which are among device_writes.",
        io.fua_writes
    ),
    figure!(Counter device_written_bytes "Bytes written to the device.", io.written_bytes),
    figure!(Counter device_flushes "Flushes sent to the device.", io.flushes),
    figure!(
        Counter device_write_zeroes
        "Write-zeroes operations sent to the device.",
        io.write_zeroes
    ),
    figure!(Counter device_unmaps "Unmaps sent to the device.", io.unmaps),
];

/// RocksDB's own integer properties that are worth watching, without their `rocksdb.`.
static ROCKSDB: &[(&str, Kind)] = &[
    ("estimate-num-keys", Kind::Gauge),
    ("estimate-live-data-size", Kind::Gauge),
    ("total-sst-files-size", Kind::Gauge),
    ("live-sst-files-size", Kind::Gauge),
    ("cur-size-all-mem-tables", Kind::Gauge),
    ("num-immutable-mem-table", Kind::Gauge),
    ("mem-table-flush-pending", Kind::Gauge),
    ("num-running-flushes", Kind::Gauge),
    ("compaction-pending", Kind::Gauge),
    ("num-running-compactions", Kind::Gauge),
    ("estimate-pending-compaction-bytes", Kind::Gauge),
    ("block-cache-usage", Kind::Gauge),
    ("block-cache-capacity", Kind::Gauge),
    ("num-snapshots", Kind::Gauge),
    ("actual-delayed-write-rate", Kind::Gauge),
    ("is-write-stopped", Kind::Gauge),
    ("background-errors", Kind::Counter),
];

/// A database that has integer properties.
pub(crate) trait Numbers: Send + Sync {
    /// Returns one of them.
    fn number(&self, property: &str) -> Option<u64>;
}

impl<D: DbHandle> Numbers for D {
    fn number(&self, property: &str) -> Option<u64> {
        let property = CString::new(property).ok()?;
        Calls::number(self, &property).ok()?
    }
}

/// Returns RocksDB's figures of a database, by their names without `rocksdb.`.
pub(crate) fn of_rocksdb(db: &dyn Numbers) -> impl Iterator<Item = (&'static str, Kind, u64)> {
    ROCKSDB.iter().filter_map(|(name, kind)| {
        let value = db.number(&format!("rocksdb.{name}"))?;
        Some((*name, *kind, value))
    })
}

/// Returns the value of the property `pumice.NAME`, where NAME is a figure's name with dashes.
pub(crate) fn property(fs: &FileSystem, property: &str) -> Option<u64> {
    let name = property.strip_prefix("pumice.")?.replace('-', "_");
    let figure = FIGURES.iter().find(|figure| figure.name == name)?;
    (figure.value)(&Snapshot::of(fs))
}

/// Returns all figures in the text format of Prometheus (0.0.4), labelled with the device's name.
pub(crate) fn prometheus(device: &str, fs: &FileSystem, db: Option<&dyn Numbers>) -> String {
    let device = device
        .replace('\\', "\\\\")
        .replace('"', "\\\"")
        .replace('\n', "\\n");
    let mut text = String::new();
    let mut row = |name: &str, help: &str, kind: Kind, value: u64| {
        let (kind, end) = match kind {
            Kind::Gauge => ("gauge", ""),
            Kind::Counter => ("counter", "_total"),
        };
        let _ = writeln!(
            text,
            "# HELP {name}{end} {help}\n# TYPE {name}{end} {kind}\n{name}{end}{{device=\"{device}\"}} {value}"
        );
    };
    for (figure, value) in Snapshot::of(fs).figures() {
        let name = format!("pumice_fs_{}", figure.name);
        row(&name, figure.help, figure.kind, value);
    }
    for (name, kind, value) in db.into_iter().flat_map(of_rocksdb) {
        let help = format!("RocksDB's property rocksdb.{name}.");
        let name = format!("pumice_rocksdb_{}", name.replace('-', "_"));
        row(&name, &help, kind, value);
    }
    text
}
