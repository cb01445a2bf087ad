//! `split`: parts of another device.

use std::sync::Arc;

use pumice_bdev::BlockDevice;
use pumice_bdev::split::Split;
use serde_json::json;

use super::super::app::App;
use super::super::json::{MethodError, Params};
use super::super::methods::{Answer, Given, Makes, Method};

pub(super) static METHODS: &[Method] = &[
    Method {
        makes: Some(Makes {
            on: Some("base_bdev"),
            ..Makes::new(|params| {
                let base = params.opt_string("base_bdev")?.unwrap_or_default();
                let count = params.opt_u64("split_count")?.unwrap_or(0).min(4096);
                Ok(Given::Names(
                    (0..count).map(|i| format!("{base}p{i}")).collect(),
                ))
            })
        }),
        ..Method::new("bdev_split_create", create)
    },
    Method::new("bdev_split_delete", delete),
];

fn create(app: &App, params: &mut Params<'_>) -> Answer {
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

fn delete(app: &App, params: &mut Params<'_>) -> Answer {
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
