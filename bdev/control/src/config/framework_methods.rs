//! Methods about the process: configuration, methods, version, logging.

use serde_json::{Value, json};

use super::app::App;
use super::json::{MethodError, Params};
use crate::logging;

type Answer = Result<Value, MethodError>;

pub(super) fn get_methods(app: &App, params: &mut Params<'_>) -> Answer {
    // The list has only methods of a started process.
    let current = params.flag("current")?;
    params.ignore(&["include_aliases"]);
    params.finish()?;
    let names = app.methods().into_iter();
    let listed = names.filter(|name| !current || *name != "framework_start_init");
    Ok(listed.map(|name| json!(name)).collect())
}

pub(super) fn get_version(_: &App, params: &mut Params<'_>) -> Answer {
    params.finish()?;
    let number = |text: &str| text.parse::<u64>().unwrap_or(0);
    Ok(json!({
        "version": concat!("Pumice ", env!("CARGO_PKG_VERSION")),
        "fields": {
            "major": number(env!("CARGO_PKG_VERSION_MAJOR")),
            "minor": number(env!("CARGO_PKG_VERSION_MINOR")),
            "patch": number(env!("CARGO_PKG_VERSION_PATCH")),
            "suffix": "",
        },
    }))
}

pub(super) fn get_subsystems(_: &App, params: &mut Params<'_>) -> Answer {
    params.finish()?;
    Ok(json!([{ "subsystem": "bdev", "depends_on": [] }]))
}

pub(super) fn get_config(app: &App, params: &mut Params<'_>) -> Answer {
    let name = params.string("name")?;
    params.finish()?;
    if name != "bdev" {
        return Err(params.error("name", format!("no subsystem `{name}`; there is `bdev`")));
    }
    Ok(app.bdev_config().into())
}

pub(super) fn save_config(app: &App, params: &mut Params<'_>) -> Answer {
    params.finish()?;
    Ok(app.config())
}

/// Answers at once: a process that answers has started.
pub(super) fn ready(_: &App, params: &mut Params<'_>) -> Answer {
    params.finish()?;
    Ok(json!(true))
}

fn flag(params: &mut Params<'_>) -> Result<String, MethodError> {
    let flag = params.string("flag")?;
    params.finish()?;
    if flag != "all" && !logging::COMPONENTS.iter().any(|(name, _)| *name == flag) {
        let known: Vec<&str> = logging::COMPONENTS.iter().map(|(name, _)| *name).collect();
        let reason = format!("`{flag}`: use one of all, {}", known.join(", "));
        return Err(params.error("flag", reason));
    }
    Ok(flag)
}

fn switch(params: &mut Params<'_>, on: bool) -> Answer {
    let flag = flag(params)?;
    logging::set_flag(&flag, on).map_err(|e| MethodError::new(-i64::from(libc::ENOTSUP), e))?;
    Ok(json!(true))
}

pub(super) fn log_set_flag(_: &App, params: &mut Params<'_>) -> Answer {
    switch(params, true)
}

pub(super) fn log_clear_flag(_: &App, params: &mut Params<'_>) -> Answer {
    switch(params, false)
}

pub(super) fn log_get_flags(_: &App, params: &mut Params<'_>) -> Answer {
    params.finish()?;
    Ok(logging::flags()
        .into_iter()
        .map(|(name, on)| (name.to_owned(), json!(on)))
        .collect())
}

pub(super) fn log_get_level(_: &App, params: &mut Params<'_>) -> Answer {
    params.finish()?;
    Ok(json!(logging::level()))
}

pub(super) fn log_set_level(_: &App, params: &mut Params<'_>) -> Answer {
    let level = params.string("level")?;
    params.finish()?;
    logging::set_level(&level).map_err(|e| params.error("level", e))?;
    Ok(json!(true))
}
