//! Methods that make, change and remove devices.

use std::path::PathBuf;
use std::sync::Arc;

use pumice_bdev::delay::{Delay, Latencies};
use pumice_bdev::error_inject::{ErrorDevice, Failure, Injection};
use pumice_bdev::file::{File, FileOptions, Prealloc};
use pumice_bdev::malloc::{Malloc, MallocOptions};
use pumice_bdev::null::Null;
use pumice_bdev::passthru::Passthru;
use pumice_bdev::raid0::Raid0;
use pumice_bdev::split::Split;
use pumice_bdev::{BlockDevice, OpKind};
use serde_json::{Value, json};

use super::app::App;
use super::json::{MethodError, Params};

type Answer = Result<Value, MethodError>;

const NO_METADATA: &str = "devices with metadata or protection information are refused";

/// Refuses parameters about metadata, unless they ask for none.
fn no_metadata(params: &mut Params<'_>) -> Result<(), MethodError> {
    for key in ["md_size", "dif_type", "dif_pi_format"] {
        params.neutral(key, &["0"], NO_METADATA)?;
    }
    params.ignore(&["md_interleave", "dif_is_head_of_md"]);
    Ok(())
}

/// Returns the first name of `base` and a number that no device has.
fn free_name(app: &App, base: &str) -> Option<String> {
    let mut names = (0_u64..).map(|i| format!("{base}{i}"));
    names.find(|name| app.registry.get(name).is_none())
}

fn add(app: &App, dev: Arc<dyn BlockDevice>) -> Result<String, MethodError> {
    Ok(app.registry.register(dev, Vec::new())?.info().name.clone())
}

pub(super) fn malloc_create(app: &App, params: &mut Params<'_>) -> Answer {
    let name = params.opt_string("name")?;
    if name.as_deref() == Some("") {
        return Err(params.error("name", "empty"));
    }
    let options = MallocOptions {
        name: name.or_else(|| free_name(app, "Malloc")),
        num_blocks: params.u64("num_blocks")?,
        block_size: params.u32("block_size")?,
        uuid: params.opt_uuid("uuid")?,
        optimal_io_boundary_blocks: params.opt_u32("optimal_io_boundary")?.unwrap_or(0),
    };
    params.ignore(&["physical_block_size"]);
    no_metadata(params)?;
    params.finish()?;
    let name = add(app, Arc::new(Malloc::new(&options)?))?;
    app.note("bdev_malloc_create", params, std::slice::from_ref(&name));
    Ok(json!(name))
}

pub(super) fn malloc_delete(app: &App, params: &mut Params<'_>) -> Answer {
    delete(app, params, "malloc")
}

pub(super) fn null_delete(app: &App, params: &mut Params<'_>) -> Answer {
    delete(app, params, "null")
}

pub(super) fn file_delete(app: &App, params: &mut Params<'_>) -> Answer {
    delete(app, params, "file")
}

pub(super) fn passthru_delete(app: &App, params: &mut Params<'_>) -> Answer {
    delete(app, params, "passthru")
}

pub(super) fn delay_delete(app: &App, params: &mut Params<'_>) -> Answer {
    delete(app, params, "delay")
}

pub(super) fn error_delete(app: &App, params: &mut Params<'_>) -> Answer {
    delete(app, params, "error")
}

pub(super) fn raid_delete(app: &App, params: &mut Params<'_>) -> Answer {
    params.ignore(&["clear_sb"]);
    delete(app, params, "raid")
}

fn delete(app: &App, params: &mut Params<'_>, module: &str) -> Answer {
    let name = params.string("name")?;
    params.finish()?;
    app.delete(&name, module)
}

pub(super) fn null_create(app: &App, params: &mut Params<'_>) -> Answer {
    let name = Some(params.string("name")?);
    let (num_blocks, block_size) = (params.u64("num_blocks")?, params.u32("block_size")?);
    let uuid = params.opt_uuid("uuid")?;
    params.ignore(&[
        "physical_block_size",
        "preferred_write_alignment",
        "preferred_write_granularity",
        "optimal_write_size",
        "preferred_unmap_alignment",
        "preferred_unmap_granularity",
    ]);
    no_metadata(params)?;
    params.finish()?;
    let name = add(
        app,
        Arc::new(Null::new(name, block_size, num_blocks, uuid)?),
    )?;
    app.note("bdev_null_create", params, std::slice::from_ref(&name));
    Ok(json!(name))
}

pub(super) fn aio_create(app: &App, params: &mut Params<'_>) -> Answer {
    file_create(app, params, "bdev_aio_create")
}

pub(super) fn uring_create(app: &App, params: &mut Params<'_>) -> Answer {
    file_create(app, params, "bdev_uring_create")
}

fn file_create(app: &App, params: &mut Params<'_>, method: &'static str) -> Answer {
    let name = params.string("name")?;
    let filename = params.string("filename")?;
    let block_size = params.opt_u32("block_size")?.filter(|bs| *bs > 0);
    let uuid = params.opt_uuid("uuid")?;
    let read_only = method == "bdev_aio_create" && params.flag("readonly")?;
    if method == "bdev_aio_create" {
        params.ignore(&["fallocate"]);
    }
    let direct = params.opt_flag("direct")?.unwrap_or(true);
    let io_uring = params.opt_flag("io_uring")?.unwrap_or(true);
    let prealloc = match params.opt_string("prealloc")?.as_deref() {
        None | Some("off") => Prealloc::Off,
        Some("falloc") => Prealloc::Falloc,
        Some("full") => Prealloc::Full,
        Some(other) => {
            let reason = format!("`{other}`: use one of off, falloc, full");
            return Err(params.error("prealloc", reason));
        }
    };
    params.finish()?;
    let options = FileOptions {
        path: PathBuf::from(filename),
        name: Some(name),
        block_size,
        read_only,
        buffered: !direct,
        no_io_uring: !io_uring,
        prealloc,
        uuid,
        ..FileOptions::default()
    };
    let name = add(app, Arc::new(File::open(&options)?))?;
    app.note(method, params, std::slice::from_ref(&name));
    Ok(json!(name))
}

/// Updates the size of a file or block device to its current one.
pub(super) fn file_rescan(app: &App, params: &mut Params<'_>) -> Answer {
    let name = params.string("name")?;
    params.finish()?;
    let methods = ["bdev_aio_create", "bdev_uring_create"];
    app.remake(&name, &methods, |_| {})
}

/// Resizes a null device. `new_size` is in MiB.
pub(super) fn null_resize(app: &App, params: &mut Params<'_>) -> Answer {
    let name = params.string("name")?;
    let mib = params.u64("new_size")?;
    params.finish()?;
    let bdev = app.registry.get(&name);
    let block_size = bdev.map_or(512, |b| u64::from(b.info().block_size));
    app.remake(&name, &["bdev_null_create"], |params| {
        params["num_blocks"] = json!(mib.saturating_mul(1 << 20) / block_size);
    })
}

/// Claims `base` for `name`, makes a device on it and registers that.
fn stack(
    app: &App,
    name: &str,
    base: &str,
    make: impl FnOnce(Arc<dyn BlockDevice>) -> Arc<dyn BlockDevice>,
) -> Result<String, MethodError> {
    if app.registry.get(name).is_some() {
        return Err(pumice_bdev::BdevError::Exists {
            name: name.to_owned(),
        }
        .into());
    }
    let claimed = app.registry.claim(base, name)?;
    let below = vec![claimed.info().name.clone()];
    let dev = make(Arc::new(claimed));
    Ok(app.registry.register(dev, below)?.info().name.clone())
}

pub(super) fn passthru_create(app: &App, params: &mut Params<'_>) -> Answer {
    let base = params.string("base_bdev_name")?;
    let name = params.string("name")?;
    let uuid = params.opt_uuid("uuid")?;
    params.finish()?;
    let name = stack(app, &name, &base, |base| {
        let passthru = Passthru::new(&name, base);
        Arc::new(match uuid {
            Some(uuid) => passthru.with_uuid(uuid),
            None => passthru,
        })
    })?;
    app.note("bdev_passthru_create", params, std::slice::from_ref(&name));
    Ok(json!(name))
}

pub(super) fn delay_create(app: &App, params: &mut Params<'_>) -> Answer {
    let base = params.string("base_bdev_name")?;
    let name = params.string("name")?;
    let latencies = Latencies {
        avg_read_us: params.u64("avg_read_latency")?,
        p99_read_us: params.u64("p99_read_latency")?,
        avg_write_us: params.u64("avg_write_latency")?,
        p99_write_us: params.u64("p99_write_latency")?,
    };
    let uuid = params.opt_uuid("uuid")?;
    params.finish()?;
    let mut made = None;
    let name = stack(app, &name, &base, |base| {
        let delay = Delay::new(&name, base, latencies);
        let delay = Arc::new(match uuid {
            Some(uuid) => delay.with_uuid(uuid),
            None => delay,
        });
        made = Some(Arc::clone(&delay));
        delay
    })?;
    if let Some(delay) = made {
        app.state.lock().delays.insert(name.clone(), delay);
    }
    app.note("bdev_delay_create", params, std::slice::from_ref(&name));
    Ok(json!(name))
}

pub(super) fn delay_update_latency(app: &App, params: &mut Params<'_>) -> Answer {
    let name = params.string("delay_bdev_name")?;
    let kind = params.string("latency_type")?;
    let us = params.u64("latency_us")?;
    let which: fn(&mut Latencies) -> &mut u64 = match kind.as_str() {
        "avg_read" => |l| &mut l.avg_read_us,
        "p99_read" => |l| &mut l.p99_read_us,
        "avg_write" => |l| &mut l.avg_write_us,
        "p99_write" => |l| &mut l.p99_write_us,
        _ => {
            let known = "avg_read, p99_read, avg_write, p99_write";
            return Err(params.error("latency_type", format!("`{kind}`: use one of {known}")));
        }
    };
    params.finish()?;
    let mut state = app.state.lock();
    let Some(delay) = state.delays.get(&name).cloned() else {
        drop(state);
        return Err(match app.registry.get(&name) {
            None => app.registry.not_found(&name).into(),
            Some(_) => MethodError::new(
                -i64::from(libc::ENODEV),
                format!("`{name}` is not a delay bdev; bdev_delay_create puts one on it"),
            ),
        });
    };
    let mut latencies = delay.latencies();
    *which(&mut latencies) = us;
    delay.set_latencies(latencies);
    // The saved call has the current latencies.
    let made =
        |c: &&mut super::app::Created| c.method == "bdev_delay_create" && c.bdevs.contains(&name);
    if let Some(created) = state.created.iter_mut().find(made)
        && let Value::Object(map) = &mut created.params
    {
        map.insert(format!("{kind}_latency"), json!(us));
    }
    Ok(json!(true))
}

pub(super) fn error_create(app: &App, params: &mut Params<'_>) -> Answer {
    let base = params.string("base_name")?;
    let uuid = params.opt_uuid("uuid")?;
    params.finish()?;
    let wanted = format!("EE_{base}");
    let mut made = None;
    let name = stack(app, &wanted, &base, |base| {
        let error = ErrorDevice::new(Some(&wanted), base);
        let error = Arc::new(match uuid {
            Some(uuid) => error.with_uuid(uuid),
            None => error,
        });
        made = Some(Arc::clone(&error));
        error
    })?;
    if let Some(error) = made {
        app.state.lock().errors.insert(name.clone(), error);
    }
    app.note("bdev_error_create", params, std::slice::from_ref(&name));
    // The name is not changed: the device is known by it.
    Ok(json!(true))
}

fn error_device(app: &App, name: &str) -> Result<Arc<ErrorDevice>, MethodError> {
    let found = app.state.lock().errors.get(name).cloned();
    if let Some(found) = found {
        return Ok(found);
    }
    match app.registry.get(name) {
        None => Err(app.registry.not_found(name).into()),
        Some(_) => Err(MethodError::new(
            -i64::from(libc::ENODEV),
            format!("`{name}` is not an error bdev; bdev_error_create puts one on it, `EE_{name}`"),
        )),
    }
}

pub(super) fn error_inject(app: &App, params: &mut Params<'_>) -> Answer {
    let name = params.string("name")?;
    let io_type = params.string("io_type")?;
    let error_type = params.opt_string("error_type")?;
    let count = params.opt_u64("num")?.unwrap_or(1);
    let queue_depth = params.opt_u64("queue_depth")?.unwrap_or(0);
    let offset = params.opt_u64("corrupt_offset")?.unwrap_or(0);
    let value = params.opt_u32("corrupt_value")?.unwrap_or(0);
    // Not in SPDK: restricts the fault to operations that touch these blocks.
    let lba = params.opt_u64("lba")?;
    let len_blocks = params.opt_u64("num_blocks")?;
    let op = match io_type.as_str() {
        "all" | "clear" => None,
        other => {
            let kind = OpKind::ALL
                .into_iter()
                .find(|k| k.name() == other && *k != OpKind::Fua);
            let names: Vec<&str> = OpKind::ALL.iter().map(|k| k.name()).collect();
            let unknown = || {
                let known = names.join(", ");
                params.error(
                    "io_type",
                    format!("`{other}`: use one of clear, all, {known}"),
                )
            };
            Some(kind.ok_or_else(unknown)?)
        }
    };
    let failure = match error_type.as_deref() {
        None if io_type == "clear" => Failure::Fail,
        Some("failure") => Failure::Fail,
        Some("nomem") => Failure::NoMemory,
        Some("pending") => Failure::Hang,
        Some("corrupt_data") => {
            let value = u8::try_from(value).unwrap_or(0);
            if value == 0 {
                let reason = "1 to 255: the bits of the byte that change";
                return Err(params.error("corrupt_value", reason));
            }
            Failure::Corrupt { offset, value }
        }
        other => {
            let shown = other.unwrap_or("missing");
            let known = "failure, pending, corrupt_data, nomem";
            return Err(params.error("error_type", format!("`{shown}`: use one of {known}")));
        }
    };
    params.finish()?;
    let dev = error_device(app, &name)?;
    if io_type == "clear" {
        dev.clear();
        return Ok(json!(true));
    }
    let range = lba.map(|lba| (lba, len_blocks.unwrap_or(1)));
    let queue_depth = usize::try_from(queue_depth).unwrap_or(usize::MAX);
    // As in SPDK, this replaces earlier faults of such operations; `num` 0 only removes them.
    dev.replace(Injection {
        op,
        failure,
        count,
        range,
        queue_depth,
    });
    Ok(json!(true))
}

pub(super) fn error_resume(app: &App, params: &mut Params<'_>) -> Answer {
    let name = params.string("name")?;
    params.finish()?;
    error_device(app, &name)?.resume();
    Ok(json!(true))
}

pub(super) fn split_create(app: &App, params: &mut Params<'_>) -> Answer {
    let base = params.string("base_bdev")?;
    let count = params.u64("split_count")?;
    let size_mb = params.opt_u64("split_size_mb")?;
    params.finish()?;
    let claimed: Arc<dyn BlockDevice> = Arc::new(app.registry.claim(&base, "split")?);
    let below = claimed.info().name.clone();
    // Parts of a given size: as many as there is room for, as in SPDK.
    let room = match size_mb {
        Some(mb) if mb > 0 => claimed.info().len_bytes() / mb.saturating_mul(1 << 20),
        _ => count,
    };
    if room < count && room > 0 {
        tracing::warn!(
            bdev = below,
            wanted = count,
            made = room,
            "fewer parts than asked for"
        );
    }
    let count = if room > 0 { count.min(room) } else { count };
    let mut names = Vec::new();
    for part in Split::new(&claimed, count, size_mb)? {
        match app.registry.register(Arc::new(part), vec![below.clone()]) {
            Ok(bdev) => names.push(bdev.info().name.clone()),
            Err(e) => {
                for name in names {
                    let _ = app.registry.remove(&name);
                }
                return Err(e.into());
            }
        }
    }
    app.note("bdev_split_create", params, &names);
    Ok(json!(names))
}

pub(super) fn split_delete(app: &App, params: &mut Params<'_>) -> Answer {
    let base = params.string("base_bdev")?;
    params.finish()?;
    let base = app
        .registry
        .get(&base)
        .ok_or_else(|| app.registry.not_found(&base))?;
    let on_base = |b: &pumice_bdev::registry::Bdev| {
        b.info().module == "split" && b.below().contains(&base.info().name)
    };
    let parts: Vec<_> = app.registry.list().into_iter().filter(on_base).collect();
    if parts.is_empty() {
        let message = format!("`{}` is not split", base.info().name);
        return Err(MethodError::new(-i64::from(libc::ENODEV), message));
    }
    for part in parts {
        app.registry.remove(&part.info().name)?;
    }
    app.forget_removed();
    Ok(json!(true))
}

pub(super) fn raid_create(app: &App, params: &mut Params<'_>) -> Answer {
    let name = params.string("name")?;
    let strip_kb = params.opt_u32("strip_size_kb")?.unwrap_or(64);
    let level = params.string("raid_level")?;
    // rpc.py's users may also write the names as one string, separated by spaces.
    let bases = match params.opt_strings("base_bdevs") {
        Ok(Some(bases)) => bases,
        Ok(None) => return Err(MethodError::param("base_bdevs", "missing")),
        Err(e) => match params.opt_string("base_bdevs") {
            Ok(Some(text)) => text.split_whitespace().map(ToOwned::to_owned).collect(),
            _ => return Err(e),
        },
    };
    let uuid = params.opt_uuid("uuid")?;
    params.neutral(
        "superblock",
        &["false"],
        "the configuration says which devices belong to it",
    )?;
    if level != "raid0" && level != "0" {
        let reason = format!("`{level}`: there is raid0");
        return Err(params.error("raid_level", reason));
    }
    params.finish()?;
    if app.registry.get(&name).is_some() {
        return Err(pumice_bdev::BdevError::Exists { name }.into());
    }
    let mut legs: Vec<Arc<dyn BlockDevice>> = Vec::new();
    for base in &bases {
        legs.push(Arc::new(app.registry.claim(base, &name)?));
    }
    let below = legs.iter().map(|l| l.info().name.clone()).collect();
    let raid = Raid0::new(&name, legs, strip_kb, uuid)?;
    app.registry.register(Arc::new(raid), below)?;
    app.note("bdev_raid_create", params, std::slice::from_ref(&name));
    Ok(json!(true))
}

/// Accepts the sizes of SPDK's pools and caches. Buffers and slots are allocated as needed here.
pub(super) fn set_options(app: &App, params: &mut Params<'_>) -> Answer {
    params.ignore(&[
        "bdev_io_pool_size",
        "bdev_io_cache_size",
        "bdev_auto_examine",
        "iobuf_small_cache_size",
        "iobuf_large_cache_size",
        "small_buf_pool_size",
        "large_buf_pool_size",
    ]);
    params.finish()?;
    let kept = params.to_value();
    app.state
        .lock()
        .options
        .insert("bdev_set_options".to_owned(), kept);
    Ok(json!(true))
}

/// Accepts options of modules that Pumice does not have, which `save_config` writes in any case.
pub(super) fn other_options(_: &App, params: &mut Params<'_>) -> Answer {
    tracing::debug!(params = %params.to_value(), "options of a module that is not here: ignored");
    Ok(json!(true))
}

/// Refuses rate limits, and accepts their absence, which `save_config` writes.
pub(super) fn set_qos_limit(app: &App, params: &mut Params<'_>) -> Answer {
    let name = params.string("name")?;
    for key in [
        "rw_ios_per_sec",
        "rw_mbytes_per_sec",
        "r_mbytes_per_sec",
        "w_mbytes_per_sec",
    ] {
        params.neutral(key, &["0"], "there are no rate limits")?;
    }
    params.finish()?;
    app.registry
        .get(&name)
        .ok_or_else(|| app.registry.not_found(&name))?;
    Ok(json!(true))
}

/// Does nothing: devices on top of others are configured by name and not found by examination.
pub(super) fn examine(app: &App, params: &mut Params<'_>) -> Answer {
    let name = params.string("name")?;
    params.finish()?;
    app.registry
        .get(&name)
        .ok_or_else(|| app.registry.not_found(&name))?;
    Ok(json!(true))
}

/// Answers at once: every call has ended when it answers.
pub(super) fn wait_for_examine(_: &App, params: &mut Params<'_>) -> Answer {
    params.finish()?;
    Ok(json!(true))
}
