//! `malloc`: memory of this process.

use std::sync::Arc;

use pumice_bdev::malloc::{Malloc, MallocOptions};
use serde_json::json;

use super::super::app::App;
use super::super::json::Params;
use super::super::methods::{Answer, Given, Makes, Method};
use super::devices::{add, delete, no_metadata};

pub(super) static METHODS: &[Method] = &[
    Method {
        makes: Some(Makes {
            chosen: &["name", "uuid"],
            ..Makes::new(|params| match params.opt_string("name")? {
                Some(name) => Ok(Given::Names(vec![name])),
                None => Ok(Given::Numbered("Malloc")),
            })
        }),
        ..Method::new("bdev_malloc_create", create)
    },
    Method::new("bdev_malloc_delete", |app, params| {
        delete(app, params, "malloc")
    }),
];

/// Returns the first name of `base` and a number that no device has.
fn free_name(app: &App, base: &str) -> Option<String> {
    let mut names = (0_u64..).map(|i| format!("{base}{i}"));
    names.find(|name| app.registry.get(name).is_none())
}

fn create(app: &App, params: &mut Params<'_>) -> Answer {
    let name = params.opt_string("name")?;
    if name.as_deref() == Some("") {
        return Err(params.error("name", "empty"));
    }
    let options = MallocOptions::default()
        .name(name.or_else(|| free_name(app, "Malloc")))
        .num_blocks(params.u64("num_blocks")?)
        .block_size(params.u32("block_size")?)
        .uuid(params.opt_uuid("uuid")?)
        .optimal_io_boundary_blocks(params.opt_u32("optimal_io_boundary")?.unwrap_or(0));
    params.ignore(&["physical_block_size"]);
    no_metadata(params)?;
    params.finish()?;
    let name = add(app, Arc::new(Malloc::new(&options)?))?;
    app.note("bdev_malloc_create", params, std::slice::from_ref(&name));
    Ok(json!(name))
}
