//! The table of methods.

use serde_json::{Value, json};

use super::app::App;
use super::json::{METHOD_NOT_FOUND, MethodError, Params};
use super::modules::MODULES;
use super::{framework_methods as framework, process_methods as process, query_methods as query};

pub(super) type Answer = Result<Value, MethodError>;

/// A method.
pub(crate) struct Method {
    pub(crate) name: &'static str,
    pub(crate) run: fn(&App, &mut Params<'_>) -> Answer,
    /// The devices that it makes, if it makes any.
    pub(super) makes: Option<Makes>,
}

/// The devices that a method makes, as its parameters tell before it is called.
pub(super) struct Makes {
    /// Returns their names.
    pub names: fn(&mut Params<'_>) -> Result<Given, MethodError>,
    /// The parameter that names the devices below, which may be made later.
    pub on: Option<&'static str>,
    /// Whether that parameter names several.
    pub several: bool,
    /// The parameters that are saved with the value that was chosen here: `name`, `uuid`.
    pub chosen: &'static [&'static str],
}

/// The names of the devices that a method makes.
pub(super) enum Given {
    /// These names.
    Names(Vec<String>),
    /// This word and a number.
    Numbered(&'static str),
    /// The controller of this name, `n` and a number.
    Namespaces(String),
}

impl Method {
    /// A method that makes no device.
    pub(super) const fn new(
        name: &'static str,
        run: fn(&App, &mut Params<'_>) -> Answer,
    ) -> Method {
        Method {
            name,
            run,
            makes: None,
        }
    }

    /// Whether it changes nothing. `bdev_get_iostat` looks at its own `reset_mode`.
    pub(crate) fn only_looks(&self) -> bool {
        self.name.contains("_get_")
    }
}

impl Makes {
    /// Devices that stand on no other.
    pub(super) const fn new(names: fn(&mut Params<'_>) -> Result<Given, MethodError>) -> Makes {
        Makes {
            names,
            on: None,
            several: false,
            chosen: &[],
        }
    }

    /// A device with the name in the parameter `name`.
    pub(super) const fn named() -> Makes {
        Makes::new(|params| {
            Ok(Given::Names(
                params.opt_string("name")?.into_iter().collect(),
            ))
        })
    }
}

/// The methods that belong to no module.
static METHODS: &[Method] = &[
    Method::new("bdev_enable_histogram", query::enable_histogram),
    Method::new("bdev_examine", examine),
    Method::new("bdev_get_bdevs", query::get_bdevs),
    Method::new("bdev_get_histogram", query::get_histogram),
    Method::new("bdev_get_iostat", query::get_iostat),
    Method::new("bdev_iscsi_set_options", other_options),
    Method::new("bdev_reset_iostat", query::reset_iostat),
    Method::new("bdev_set_options", set_options),
    Method::new("bdev_set_qos_limit", set_qos_limit),
    Method::new("bdev_wait_for_examine", wait_for_examine),
    Method::new("framework_get_config", framework::get_config),
    Method::new("framework_get_reactors", process::get_reactors),
    Method::new("framework_get_subsystems", framework::get_subsystems),
    Method::new("framework_start_init", framework::ready),
    Method::new("framework_wait_init", framework::ready),
    Method::new("log_clear_flag", framework::log_clear_flag),
    Method::new("log_get_flags", framework::log_get_flags),
    Method::new("log_get_level", framework::log_get_level),
    Method::new("log_get_print_level", framework::log_get_level),
    Method::new("log_set_flag", framework::log_set_flag),
    Method::new("log_set_level", framework::log_set_level),
    Method::new("log_set_print_level", framework::log_set_level),
    Method::new("notify_get_notifications", process::get_notifications),
    Method::new("notify_get_types", process::get_notification_types),
    Method::new("rpc_get_methods", framework::get_methods),
    Method::new("save_config", framework::save_config),
    Method::new("spdk_get_version", framework::get_version),
    Method::new("spdk_kill_instance", process::kill_instance),
    Method::new("thread_get_io_channels", process::get_threads),
    Method::new("thread_get_stats", process::get_threads),
];

/// Returns all methods.
pub(crate) fn all() -> impl Iterator<Item = &'static Method> {
    let tables = std::iter::once(&METHODS).chain(MODULES);
    tables.copied().flatten()
}

pub(crate) fn find(name: &str) -> Option<&'static Method> {
    all().find(|method| method.name == name)
}

/// Returns what the method of this name makes, if it makes devices.
pub(super) fn makes(name: &str) -> Option<&'static Makes> {
    find(name)?.makes.as_ref()
}

pub(crate) fn stands_on_another(name: &str) -> bool {
    makes(name).is_some_and(|makes| makes.on.is_some())
}

/// The error for a name that is not among `known`.
pub(crate) fn unknown(name: &str, known: &[&str]) -> MethodError {
    let names: Vec<String> = known.iter().map(|&name| name.to_owned()).collect();
    let shown: String = name.chars().take(80).collect();
    let hint = pumice_bdev::registry::nearest(name, &names)
        .map_or_else(String::new, |near| format!("; did you mean `{near}`?"));
    MethodError::new(
        METHOD_NOT_FOUND,
        format!("Method not found: `{shown}`{hint}"),
    )
}

/// Accepts the sizes of SPDK's pools and caches. Buffers and slots are allocated as needed here.
fn set_options(app: &App, params: &mut Params<'_>) -> Answer {
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
fn set_qos_limit(app: &App, params: &mut Params<'_>) -> Answer {
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
fn examine(app: &App, params: &mut Params<'_>) -> Answer {
    let name = params.string("name")?;
    params.finish()?;
    app.registry
        .get(&name)
        .ok_or_else(|| app.registry.not_found(&name))?;
    Ok(json!(true))
}

/// Answers at once: every call has ended when it answers.
fn wait_for_examine(_: &App, params: &mut Params<'_>) -> Answer {
    params.finish()?;
    Ok(json!(true))
}
