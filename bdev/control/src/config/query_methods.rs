//! Methods that return information: devices, statistics, histograms.

use std::num::NonZeroU32;
use std::thread;
use std::time::{Duration, Instant};

use base64::Engine as _;
use pumice_bdev::registry::Bdev;
use pumice_bdev::stats::BUCKET_SHIFT;
use pumice_bdev::{BlockDevice, OpKind};
use pumice_io::sys::Clock;
use serde_json::{Value, json};

use super::app::App;
use super::json::{MethodError, Params};

type Answer = Result<Value, MethodError>;

/// Returns the device named `name`, or all devices.
fn asked(app: &App, name: Option<String>) -> Result<Vec<Bdev>, MethodError> {
    match name {
        None => Ok(app.registry.list()),
        Some(name) => {
            let bdev = app
                .registry
                .get(&name)
                .ok_or_else(|| app.registry.not_found(&name))?;
            Ok(vec![bdev])
        }
    }
}

/// With `timeout` (in milliseconds) it waits for a device that does not exist yet.
pub(super) fn get_bdevs(app: &App, params: &mut Params<'_>) -> Answer {
    const LOOK_EVERY: Duration = Duration::from_millis(5);
    /// Longest wait for a device.
    const TIMEOUT_MAX_MS: u64 = 600_000;
    let name = params.opt_string("name")?;
    let timeout_ms = params.opt_u64("timeout")?.unwrap_or(0);
    params.finish()?;
    let (start, timeout) = (
        Instant::now(),
        Duration::from_millis(timeout_ms.min(TIMEOUT_MAX_MS)),
    );
    if let Some(name) = &name {
        while app.registry.get(name).is_none() && start.elapsed() < timeout && !params.is_gone() {
            thread::sleep(LOOK_EVERY);
        }
    }
    Ok(asked(app, name)?.iter().map(describe).collect())
}

/// Describes a device in the form of `bdev_get_bdevs`.
pub(crate) fn describe(bdev: &Bdev) -> Value {
    let info = bdev.info();
    let has = |kind| info.ops.has(kind);
    let uuid = pumice_bdev::uuid::format(&info.uuid);
    // A device can be found by its UUID.
    let aliases: Vec<&str> = info
        .aliases
        .iter()
        .map(String::as_str)
        .chain(std::iter::once(uuid.as_str()).filter(|u| *u != info.name))
        .collect();
    let mut value = json!({
        "name": info.name,
        "aliases": aliases,
        "product_name": info.product,
        "block_size": info.block_size,
        "num_blocks": info.num_blocks,
        "uuid": uuid,
        "assigned_rate_limits": {
            "rw_ios_per_sec": 0,
            "rw_mbytes_per_sec": 0,
            "r_mbytes_per_sec": 0,
            "w_mbytes_per_sec": 0,
        },
        "claimed": bdev.claimed_by().is_some(),
        "zoned": false,
        "write_cache": info.write_cache,
        "atomic_unit_blocks": info.atomic_unit_blocks,
        "max_io_blocks": info.limits.max_blocks.map_or(0, NonZeroU32::get),
        "optimal_io_boundary": info.limits.boundary_blocks.map_or(0, NonZeroU32::get),
        "supported_io_types": {
            "read": has(OpKind::Read),
            "write": has(OpKind::Write),
            "unmap": has(OpKind::Unmap),
            "flush": has(OpKind::Flush),
            "reset": has(OpKind::Reset),
            "nvme_admin": false,
            "nvme_io": false,
            "nvme_io_md": false,
            "write_zeroes": has(OpKind::WriteZeroes),
            "zcopy": false,
            "get_zone_info": false,
            "zone_management": false,
            "zone_append": false,
            "compare": has(OpKind::Compare),
            "compare_and_write": has(OpKind::CompareAndWrite),
            "abort": has(OpKind::Abort),
            "seek_hole": false,
            "seek_data": false,
            "copy": has(OpKind::Copy),
            "nvme_iov_md": false,
        },
        "memory_domains": [],
        "driver_specific": bdev.driver_specific(),
    });
    if let (Some(by), Value::Object(map)) = (bdev.claimed_by(), &mut value) {
        map.insert("claim_type".to_owned(), json!("exclusive_write"));
        map.insert("claimed_by".to_owned(), json!(by));
    }
    value
}

/// Returns statistics in the form of `bdev_get_iostat`, of a device by its name or of a channel by
/// its number.
fn iostat(key: &str, of: Value, stats: &pumice_bdev::stats::Stats) -> Value {
    let mut value = serde_json::Map::new();
    value.insert(key.to_owned(), of);
    let kinds = [
        (OpKind::Read, "read", "bytes_read", "num_read_ops"),
        (OpKind::Write, "write", "bytes_written", "num_write_ops"),
        (OpKind::Unmap, "unmap", "bytes_unmapped", "num_unmap_ops"),
        (OpKind::Copy, "copy", "bytes_copied", "num_copy_ops"),
    ];
    for (kind, _, bytes, ops) in kinds {
        value.insert(bytes.to_owned(), json!(stats.of(kind).bytes));
        value.insert(ops.to_owned(), json!(stats.of(kind).ops));
    }
    for (kind, word, ..) in kinds {
        let s = stats.of(kind);
        value.insert(format!("{word}_latency_ticks"), json!(s.latency_ticks));
        value.insert(
            format!("max_{word}_latency_ticks"),
            json!(s.max_latency_ticks),
        );
        value.insert(
            format!("min_{word}_latency_ticks"),
            json!(s.min_latency_ticks),
        );
    }
    let errors: serde_json::Map<String, Value> = OpKind::ALL
        .iter()
        .filter(|k| stats.of(**k).errors > 0)
        .map(|k| (k.name().to_owned(), json!(stats.of(*k).errors)))
        .collect();
    value.insert("io_error".to_owned(), Value::Object(errors));
    Value::Object(value)
}

/// The statistics that a reset clears.
#[derive(Clone, Copy, PartialEq, Eq)]
enum ResetMode {
    None,
    /// The shortest and longest latencies.
    Extremes,
    All,
}

fn reset_mode(
    params: &mut Params<'_>,
    key: &'static str,
    default: ResetMode,
) -> Result<ResetMode, MethodError> {
    match params.opt_string(key)?.as_deref() {
        None => Ok(default),
        Some("none") => Ok(ResetMode::None),
        Some("maxmin") => Ok(ResetMode::Extremes),
        Some("all") => Ok(ResetMode::All),
        Some(other) => Err(params.error(key, format!("`{other}`: use one of all, maxmin, none"))),
    }
}

fn reset(bdevs: &[Bdev], mode: ResetMode) {
    for bdev in bdevs {
        match mode {
            ResetMode::None => {}
            ResetMode::Extremes => bdev.reset_extremes(),
            ResetMode::All => bdev.reset_stats(),
        }
    }
}

pub(super) fn get_iostat(app: &App, params: &mut Params<'_>) -> Answer {
    let name = params.opt_string("name")?;
    let names = params.opt_strings("names")?;
    let per_channel = params.flag("per_channel")?;
    let mode = reset_mode(params, "reset_mode", ResetMode::None)?;
    if name.is_some() && names.is_some() {
        return Err(params.error("names", "not together with `name`"));
    }
    params.finish()?;
    if mode != ResetMode::None && app.only_answers() {
        return Err(MethodError::new(
            -i64::from(libc::EPERM),
            "this process answers questions only: reset_mode must be none".to_owned(),
        ));
    }
    let bdevs = match names {
        None => asked(app, name.clone())?,
        Some(names) => {
            let mut bdevs = Vec::new();
            for name in names {
                bdevs.extend(asked(app, Some(name))?);
            }
            bdevs
        }
    };
    let clock = Clock::get();
    let mut answer = serde_json::Map::new();
    answer.insert("tick_rate".to_owned(), json!(clock.ticks_per_second()));
    answer.insert("ticks".to_owned(), json!(clock.now()));
    if per_channel {
        let [bdev] = &bdevs[..] else {
            return Err(MethodError::param(
                "per_channel",
                "true: channels are those of one bdev; give its `name`",
            ));
        };
        let channels = bdev.channel_stats();
        let channels: Value = channels
            .iter()
            .map(|(id, stats)| iostat("thread_id", json!(id), stats))
            .collect();
        answer.insert("name".to_owned(), json!(bdev.info().name));
        answer.insert("channels".to_owned(), channels);
    } else {
        let stats = bdevs
            .iter()
            .map(|b| iostat("name", json!(b.info().name), &b.stats()));
        answer.insert("bdevs".to_owned(), stats.collect());
    }
    reset(&bdevs, mode);
    Ok(Value::Object(answer))
}

pub(super) fn reset_iostat(app: &App, params: &mut Params<'_>) -> Answer {
    let name = params.opt_string("name")?;
    let mode = reset_mode(params, "mode", ResetMode::All)?;
    params.finish()?;
    reset(&asked(app, name)?, mode);
    Ok(json!(true))
}

pub(super) fn enable_histogram(app: &App, params: &mut Params<'_>) -> Answer {
    let name = params.string("name")?;
    let on = params.flag("enable")?;
    let only =
        match params.opt_string("opc")? {
            None => None,
            Some(opc) => {
                let found = OpKind::ALL.into_iter().find(|k| k.name() == opc);
                let known = || OpKind::ALL.map(OpKind::name).join(", ");
                Some(found.ok_or_else(|| {
                    params.error("opc", format!("`{opc}`: use one of {}", known()))
                })?)
            }
        };
    let shift = BUCKET_SHIFT.to_string();
    params.neutral("granularity", &[&shift], "buckets have one granularity")?;
    for key in ["min_nsec", "max_nsec"] {
        params.neutral(key, &["0"], "the buckets hold every latency")?;
    }
    params.finish()?;
    for bdev in asked(app, Some(name))? {
        bdev.enable_histogram(on, only);
    }
    Ok(json!(true))
}

pub(super) fn get_histogram(app: &App, params: &mut Params<'_>) -> Answer {
    let name = params.string("name")?;
    params.finish()?;
    let bdev = asked(app, Some(name.clone()))?.pop();
    let Some(buckets) = bdev.and_then(|b| b.histogram()) else {
        let message = format!("the histogram of `{name}` is off: bdev_enable_histogram first");
        return Err(MethodError::new(-i64::from(libc::EFAULT), message));
    };
    let bytes: Vec<u8> = buckets.iter().flat_map(|n| n.to_le_bytes()).collect();
    Ok(json!({
        "histogram": base64::engine::general_purpose::STANDARD.encode(bytes),
        "tsc_rate": Clock::get().ticks_per_second(),
        "bucket_shift": BUCKET_SHIFT,
        // The keys are those of later versions; the ranges are the only ones here.
        "granularity": BUCKET_SHIFT,
        "min_range": 0,
        "max_range": u64::BITS - BUCKET_SHIFT,
    }))
}
