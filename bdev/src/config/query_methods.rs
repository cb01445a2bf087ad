//! Methods that tell: devices, statistics, histograms.

use base64::Engine as _;
use serde_json::{Value, json};

use super::app::App;
use super::json::{MethodError, Params};
use crate::BlockDevice;
use crate::clock::Clock;
use crate::op::OpKind;
use crate::registry::Bdev;
use crate::stats::BUCKET_SHIFT;

type Answer = Result<Value, MethodError>;

/// The devices asked for: the one named `name`, or all.
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

pub(super) fn get_bdevs(app: &App, params: &mut Params<'_>) -> Answer {
    let name = params.opt_string("name")?;
    // Every call has ended when it answers: nothing is waited for.
    params.ignore(&["timeout"]);
    params.finish()?;
    Ok(asked(app, name)?.iter().map(describe).collect())
}

/// A device as `bdev_get_bdevs` shows it.
pub(crate) fn describe(bdev: &Bdev) -> Value {
    let info = bdev.info();
    let has = |kind| info.ops.has(kind);
    let mut value = json!({
        "name": info.name,
        "aliases": info.aliases,
        "product_name": info.product,
        "block_size": info.block_size,
        "num_blocks": info.num_blocks,
        "uuid": crate::uuid::format(&info.uuid),
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
        "max_io_blocks": info.max_io_blocks,
        "optimal_io_boundary": info.optimal_io_boundary_blocks,
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

/// Statistics in the shape of `bdev_get_iostat`.
fn iostat(name: &str, stats: &crate::stats::Stats) -> Value {
    let mut value = serde_json::Map::new();
    value.insert("name".to_owned(), json!(name));
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

pub(super) fn get_iostat(app: &App, params: &mut Params<'_>) -> Answer {
    let name = params.opt_string("name")?;
    let per_channel = params.flag("per_channel")?;
    params.ignore(&["reset_mode"]);
    params.finish()?;
    let bdevs = asked(app, name.clone())?;
    let clock = Clock::get();
    let mut answer = json!({ "tick_rate": clock.ticks_per_second(), "ticks": clock.now() });
    let stats: Value = if per_channel {
        if name.is_none() {
            return Err(MethodError::param(
                "name",
                "missing; channels are those of one bdev",
            ));
        }
        let channels = bdevs.iter().flat_map(|b| {
            b.channel_stats()
                .into_iter()
                .map(|s| iostat(&b.info().name, &s))
                .collect::<Vec<_>>()
        });
        channels.collect()
    } else {
        bdevs
            .iter()
            .map(|b| iostat(&b.info().name, &b.stats()))
            .collect()
    };
    if let Value::Object(map) = &mut answer {
        map.insert(
            if per_channel { "channels" } else { "bdevs" }.to_owned(),
            stats,
        );
    }
    Ok(answer)
}

pub(super) fn reset_iostat(app: &App, params: &mut Params<'_>) -> Answer {
    let name = params.opt_string("name")?;
    params.ignore(&["mode"]);
    params.finish()?;
    for bdev in asked(app, name)? {
        bdev.reset_stats();
    }
    Ok(json!(true))
}

pub(super) fn enable_histogram(app: &App, params: &mut Params<'_>) -> Answer {
    let name = params.string("name")?;
    let on = params.flag("enable")?;
    params.ignore(&["opc", "granularity", "min_nsec", "max_nsec"]);
    params.finish()?;
    for bdev in asked(app, Some(name))? {
        bdev.enable_histogram(on);
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
    }))
}

pub(super) fn raid_get_bdevs(app: &App, params: &mut Params<'_>) -> Answer {
    let category = params.string("category")?;
    params.finish()?;
    let wanted = match category.as_str() {
        "all" | "online" => true,
        // An array here is online or does not exist.
        "configuring" | "offline" => false,
        other => {
            let reason = format!("`{other}`: one of all, online, configuring, offline");
            return Err(params.error("category", reason));
        }
    };
    let raids = app
        .registry
        .list()
        .into_iter()
        .filter(|b| wanted && b.info().module == "raid");
    let describe = |b: Bdev| b.driver_specific().get_mut("raid").map(Value::take);
    Ok(raids.filter_map(describe).collect())
}
