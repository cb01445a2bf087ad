//! Methods of NVMe controllers.

use std::time::Duration;

use serde_json::{Value, json};

use super::app::App;
use super::json::{MethodError, Params};
use crate::registry::TimeoutAction;

type Answer = Result<Value, MethodError>;

/// An attached controller.
#[derive(Debug)]
pub(crate) struct Controller {
    pub(crate) traddr: String,
}

pub(super) fn attach_controller(_: &App, params: &mut Params<'_>) -> Answer {
    let _ = params.string("name")?;
    Err(MethodError::new(
        -i64::from(libc::ENOTSUP),
        "no NVMe driver",
    ))
}

pub(super) fn detach_controller(app: &App, params: &mut Params<'_>) -> Answer {
    let name = params.string("name")?;
    let _ = (app, name);
    Err(MethodError::new(-i64::from(libc::ENODEV), "no NVMe driver"))
}

pub(super) fn get_controllers(app: &App, params: &mut Params<'_>) -> Answer {
    params.ignore(&["name"]);
    params.finish()?;
    Ok(app
        .state
        .lock()
        .controllers
        .iter()
        .map(|(n, c)| json!({ "name": n, "traddr": c.traddr }))
        .collect())
}

pub(super) fn set_hotplug(app: &App, params: &mut Params<'_>) -> Answer {
    params.ignore(&["enable", "period_us"]);
    params.finish()?;
    let kept = params.to_value();
    app.state
        .lock()
        .options
        .insert("bdev_nvme_set_hotplug".to_owned(), kept);
    Ok(json!(true))
}

/// Options of the driver. Time-outs and what follows them take effect; queue and reconnection
/// settings that have no counterpart here are kept for `save_config`.
pub(super) fn set_options(app: &App, params: &mut Params<'_>) -> Answer {
    let action = params.opt_string("action_on_timeout")?;
    let timeout_us = params.opt_u64("timeout_us")?;
    let action = match action.as_deref() {
        None | Some("none") => TimeoutAction::Log,
        Some("abort") => TimeoutAction::Abort,
        Some("reset") => TimeoutAction::Reset,
        Some(other) => {
            let reason = format!("`{other}`: one of none, abort, reset");
            return Err(params.error("action_on_timeout", reason));
        }
    };
    let unknown = params.unknown();
    if !unknown.is_empty() {
        tracing::debug!(?unknown, "options without effect here");
    }
    if let Some(us) = timeout_us {
        app.registry.set_timeout(Duration::from_micros(us), action);
    }
    let kept = params.to_value();
    app.state
        .lock()
        .options
        .insert("bdev_nvme_set_options".to_owned(), kept);
    Ok(json!(true))
}
