//! `null`: a device that keeps nothing.

use std::sync::Arc;

use pumice_bdev::BlockDevice;
use pumice_bdev::null::Null;
use serde_json::json;

use super::super::app::App;
use super::super::json::{MethodError, Params};
use super::super::methods::{Answer, Makes, Method};
use super::devices::{add, delete, no_metadata};

pub(super) static METHODS: &[Method] = &[
    Method {
        makes: Some(Makes {
            chosen: &["uuid"],
            ..Makes::named()
        }),
        ..Method::new("bdev_null_create", create)
    },
    Method::new("bdev_null_delete", |app, params| {
        delete(app, params, "null")
    }),
    Method::new("bdev_null_resize", resize),
];

fn create(app: &App, params: &mut Params<'_>) -> Answer {
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

/// Resizes a null device. `new_size` is in MiB.
fn resize(app: &App, params: &mut Params<'_>) -> Answer {
    let name = params.string("name")?;
    let mib = params.u64("new_size")?;
    params.finish()?;
    let bdev = app.registry.get(&name);
    let bdev = bdev.ok_or_else(|| app.registry.not_found(&name))?;
    let block_size = u64::from(bdev.info().block_size);
    let now = bdev.info().len_bytes() >> 20;
    if mib < now {
        // Also in SPDK it can only grow.
        let message = format!("`{name}` has {now} MiB and does not become shorter");
        return Err(MethodError::new(-i64::from(libc::EINVAL), message));
    }
    drop(bdev);
    app.remake(&name, &["bdev_null_create"], |params| {
        params["num_blocks"] = json!(mib.saturating_mul(1 << 20) / block_size);
    })
}
