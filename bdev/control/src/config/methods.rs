//! The table of methods.

use serde_json::Value;

use super::app::App;
use super::json::{METHOD_NOT_FOUND, MethodError, Params};
use super::{bdev_methods as bdev, framework_methods as framework, nvme};
use super::{process_methods as process, query_methods as query};

type Run = fn(&App, &mut Params<'_>) -> Result<Value, MethodError>;

/// A method.
pub(crate) struct Method {
    pub(crate) name: &'static str,
    pub(crate) run: Run,
    /// Whether it makes a device on top of another, which may come later.
    stands_on_another: bool,
}

impl Method {
    /// Whether it changes nothing. `bdev_get_iostat` looks at its own `reset_mode`.
    pub(crate) fn only_looks(&self) -> bool {
        self.name.contains("_get_")
    }
}

const fn plain(name: &'static str, run: Run) -> Method {
    Method {
        name,
        run,
        stands_on_another: false,
    }
}

const fn on_top(name: &'static str, run: Run) -> Method {
    Method {
        name,
        run,
        stands_on_another: true,
    }
}

/// All methods, in order of their names.
pub(crate) static METHODS: &[Method] = &[
    plain("bdev_aio_create", bdev::aio_create),
    plain("bdev_aio_delete", bdev::file_delete),
    plain("bdev_aio_rescan", bdev::file_rescan),
    on_top("bdev_delay_create", bdev::delay_create),
    plain("bdev_delay_delete", bdev::delay_delete),
    plain("bdev_delay_update_latency", bdev::delay_update_latency),
    plain("bdev_enable_histogram", query::enable_histogram),
    on_top("bdev_error_create", bdev::error_create),
    plain("bdev_error_delete", bdev::error_delete),
    plain("bdev_error_inject_error", bdev::error_inject),
    plain("bdev_error_resume", bdev::error_resume),
    plain("bdev_error_resume_pending", bdev::error_resume),
    plain("bdev_examine", bdev::examine),
    plain("bdev_get_bdevs", query::get_bdevs),
    plain("bdev_get_histogram", query::get_histogram),
    plain("bdev_get_iostat", query::get_iostat),
    plain("bdev_iscsi_set_options", bdev::other_options),
    plain("bdev_malloc_create", bdev::malloc_create),
    plain("bdev_malloc_delete", bdev::malloc_delete),
    plain("bdev_null_create", bdev::null_create),
    plain("bdev_null_delete", bdev::null_delete),
    plain("bdev_null_resize", bdev::null_resize),
    plain("bdev_nvme_attach_controller", nvme::attach_controller),
    plain("bdev_nvme_detach_controller", nvme::detach_controller),
    plain("bdev_nvme_get_controller_health_info", nvme::health_info),
    plain("bdev_nvme_get_controllers", nvme::get_controllers),
    plain("bdev_nvme_reset_controller", nvme::reset_controller),
    plain("bdev_nvme_set_hotplug", nvme::set_hotplug),
    plain("bdev_nvme_set_options", nvme::set_options),
    on_top("bdev_passthru_create", bdev::passthru_create),
    plain("bdev_passthru_delete", bdev::passthru_delete),
    on_top("bdev_raid_create", bdev::raid_create),
    plain("bdev_raid_delete", bdev::raid_delete),
    plain("bdev_raid_get_bdevs", query::raid_get_bdevs),
    plain("bdev_raid_set_options", bdev::other_options),
    plain("bdev_reset_iostat", query::reset_iostat),
    plain("bdev_set_options", bdev::set_options),
    plain("bdev_set_qos_limit", bdev::set_qos_limit),
    on_top("bdev_split_create", bdev::split_create),
    plain("bdev_split_delete", bdev::split_delete),
    plain("bdev_uring_create", bdev::uring_create),
    plain("bdev_uring_delete", bdev::file_delete),
    plain("bdev_uring_rescan", bdev::file_rescan),
    plain("bdev_wait_for_examine", bdev::wait_for_examine),
    plain("framework_get_config", framework::get_config),
    plain("framework_get_reactors", process::get_reactors),
    plain("framework_get_subsystems", framework::get_subsystems),
    plain("framework_start_init", framework::ready),
    plain("framework_wait_init", framework::ready),
    plain("log_clear_flag", framework::log_clear_flag),
    plain("log_get_flags", framework::log_get_flags),
    plain("log_get_level", framework::log_get_level),
    plain("log_get_print_level", framework::log_get_level),
    plain("log_set_flag", framework::log_set_flag),
    plain("log_set_level", framework::log_set_level),
    plain("log_set_print_level", framework::log_set_level),
    plain("notify_get_notifications", process::get_notifications),
    plain("notify_get_types", process::get_notification_types),
    plain("rpc_get_methods", framework::get_methods),
    plain("save_config", framework::save_config),
    plain("spdk_get_version", framework::get_version),
    plain("spdk_kill_instance", process::kill_instance),
    plain("thread_get_io_channels", process::get_threads),
    plain("thread_get_stats", process::get_threads),
];

pub(crate) fn find(name: &str) -> Option<&'static Method> {
    METHODS.iter().find(|m| m.name == name)
}

pub(crate) fn stands_on_another(name: &str) -> bool {
    find(name).is_some_and(|m| m.stands_on_another)
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
