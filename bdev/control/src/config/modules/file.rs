//! `file`: image files and block devices, as SPDK's aio and uring devices.

use std::sync::Arc;

use pumice_bdev::file::{File, FileOptions, Prealloc};
use serde_json::json;

use super::super::app::App;
use super::super::json::Params;
use super::super::methods::{Answer, Makes, Method};
use super::devices::{add, delete};

pub(super) static METHODS: &[Method] = &[
    Method {
        makes: Some(Makes::named()),
        ..Method::new("bdev_aio_create", |app, params| {
            create(app, params, "bdev_aio_create")
        })
    },
    Method::new("bdev_aio_delete", |app, params| delete(app, params, "file")),
    Method::new("bdev_aio_rescan", rescan),
    Method {
        makes: Some(Makes::named()),
        ..Method::new("bdev_uring_create", |app, params| {
            create(app, params, "bdev_uring_create")
        })
    },
    Method::new("bdev_uring_delete", |app, params| {
        delete(app, params, "file")
    }),
    Method::new("bdev_uring_rescan", rescan),
];

fn create(app: &App, params: &mut Params<'_>, method: &'static str) -> Answer {
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
    let options = FileOptions::new(filename)
        .name(Some(name))
        .block_size(block_size)
        .read_only(read_only || app.to_read)
        .buffered(!direct)
        .no_io_uring(!io_uring)
        .prealloc(prealloc)
        .uuid(uuid);
    let name = add(app, Arc::new(File::open(&options)?))?;
    app.note(method, params, std::slice::from_ref(&name));
    Ok(json!(name))
}

/// Updates the size of a file or block device to its current one.
fn rescan(app: &App, params: &mut Params<'_>) -> Answer {
    let name = params.string("name")?;
    params.finish()?;
    let methods = ["bdev_aio_create", "bdev_uring_create"];
    app.remake(&name, &methods, |_| {})
}
