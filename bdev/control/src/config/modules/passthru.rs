//! `passthru`: another device, as it is.

use std::sync::Arc;

use pumice_bdev::passthru::Passthru;
use serde_json::json;

use super::super::app::App;
use super::super::json::Params;
use super::super::methods::{Answer, Makes, Method};
use super::devices::{delete, stack};

pub(super) static METHODS: &[Method] = &[
    Method {
        makes: Some(Makes {
            on: Some("base_bdev_name"),
            ..Makes::named()
        }),
        ..Method::new("bdev_passthru_create", create)
    },
    Method::new("bdev_passthru_delete", |app, params| {
        delete(app, params, "passthru")
    }),
];

fn create(app: &App, params: &mut Params<'_>) -> Answer {
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
