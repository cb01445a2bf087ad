//! `raid`: several devices, striped.

use std::sync::Arc;

use pumice_bdev::BlockDevice;
use pumice_bdev::raid0::Raid0;
use pumice_bdev::registry::Bdev;
use serde_json::{Value, json};

use super::super::app::App;
use super::super::json::{MethodError, Params};
use super::super::methods::{Answer, Makes, Method, other_options};
use super::devices::delete;

pub(super) static METHODS: &[Method] = &[
    Method {
        makes: Some(Makes {
            on: Some("base_bdevs"),
            several: true,
            chosen: &["uuid"],
            ..Makes::named()
        }),
        ..Method::new("bdev_raid_create", create)
    },
    Method::new("bdev_raid_delete", |app, params| {
        params.ignore(&["clear_sb"]);
        delete(app, params, "raid")
    }),
    Method::new("bdev_raid_get_bdevs", get_bdevs),
    Method::new("bdev_raid_set_options", other_options),
];

fn create(app: &App, params: &mut Params<'_>) -> Answer {
    let name = params.string("name")?;
    let strip_kb = params.opt_u32("strip_size_kb")?.unwrap_or(64);
    let level = params.string("raid_level")?;
    let bases = params.opt_names("base_bdevs")?;
    let bases = bases.ok_or_else(|| MethodError::param("base_bdevs", "missing"))?;
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

fn get_bdevs(app: &App, params: &mut Params<'_>) -> Answer {
    let category = params.string("category")?;
    params.finish()?;
    let wanted = match category.as_str() {
        "all" | "online" => true,
        // An array is online here or does not exist.
        "configuring" | "offline" => false,
        other => {
            let reason = format!("`{other}`: use one of all, online, configuring, offline");
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
