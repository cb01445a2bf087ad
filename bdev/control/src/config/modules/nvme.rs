//! Methods of NVMe controllers.

use std::sync::{Arc, Weak};
use std::thread;
use std::time::Duration;

use pumice_bdev::BlockDevice;
use pumice_bdev::registry::{Bdev, Registry, TimeoutAction};
use pumice_io::uri::uri_of;
use pumice_nvme::controller::Phase;
use serde_json::{Value, json};

use super::super::app::{App, Attached};
use super::super::json::{MethodError, Params};
use super::super::methods::{Answer, Given, Makes, Method};

pub(super) static METHODS: &[Method] = &[
    Method {
        makes: Some(Makes::new(|params| {
            let name = params.opt_string("name")?;
            Ok(name.map_or(Given::Names(Vec::new()), Given::Namespaces))
        })),
        ..Method::new("bdev_nvme_attach_controller", attach_controller)
    },
    Method::new("bdev_nvme_detach_controller", detach_controller),
    Method::new("bdev_nvme_get_controller_health_info", health_info),
    Method::new("bdev_nvme_get_controllers", get_controllers),
    Method::new("bdev_nvme_reset_controller", reset_controller),
    Method::new("bdev_nvme_set_hotplug", set_hotplug),
    Method::new("bdev_nvme_set_options", set_options),
];

/// Interval at which a controller without I/O is asked whether it is still there.
const WATCH_EVERY: Duration = Duration::from_millis(250);

/// Returns the name of a transport in SPDK's spelling, and the URI of an address.
fn transport(
    params: &Params<'_>,
    trtype: &str,
    traddr: &str,
) -> Result<(&'static str, String), MethodError> {
    match trtype.to_ascii_lowercase().as_str() {
        "pcie" => Ok(("PCIe", format!("nvme://{traddr}"))),
        "vfiouser" | "vfio-user" => Ok(("VFIOUSER", uri_of("vfio-user", traddr))),
        // A controller in this process, for experiments: `memory`, `null` or a path, with options.
        "soft" => Ok(("SOFT", format!("soft://{traddr}"))),
        "tcp" | "rdma" | "fc" => {
            let reason = format!("`{trtype}`: no NVMe over fabrics here; PCIe and VFIOUSER");
            Err(params.error("trtype", reason))
        }
        _ => Err(params.error(
            "trtype",
            format!("`{trtype}`: use one of PCIe, VFIOUSER, SOFT"),
        )),
    }
}

fn attach_controller(app: &App, params: &mut Params<'_>) -> Answer {
    let name = params.string("name")?;
    let trtype = params.string("trtype")?;
    let traddr = params.string("traddr")?;
    // Options of fabrics and of SPDK's pools have no effect here.
    params.ignore(&[
        "adrfam",
        "trsvcid",
        "priority",
        "subnqn",
        "hostnqn",
        "hostaddr",
        "hostsvcid",
        "hdgst",
        "ddgst",
        "fabrics_connect_timeout_us",
        "multipath",
        "num_io_queues",
        "ctrlr_loss_timeout_sec",
        "reconnect_delay_sec",
        "fast_io_fail_timeout_sec",
        "psk",
        "max_bdevs",
        "dhchap_key",
        "dhchap_ctrlr_key",
        "allow_unrecognized_csi",
    ]);
    for key in ["prchk_reftag", "prchk_guard"] {
        params.neutral(
            key,
            &["false"],
            "namespaces with protection information are refused",
        )?;
    }
    let (trtype, uri) = transport(params, &trtype, &traddr)?;
    params.finish()?;
    if app.state.lock().controllers.contains_key(&name) {
        return Err(pumice_bdev::BdevError::Exists { name }.into());
    }
    let (controller, devices) = pumice_bdev::nvme::attach(&name, &uri)?;
    let mut bdevs: Vec<Bdev> = Vec::new();
    for device in devices {
        match app.registry.register(device, Vec::new()) {
            Ok(bdev) => bdevs.push(bdev),
            Err(e) => {
                for bdev in bdevs {
                    bdev.remove();
                }
                return Err(e.into());
            }
        }
    }
    let of = |bdev: &Bdev| (bdev.info().name.clone(), bdev.identity());
    let named = bdevs.iter().map(of).collect();
    let names: Vec<String> = bdevs.iter().map(|b| b.info().name.clone()).collect();
    watch(app.registry.clone(), Arc::downgrade(&controller), named);
    let attached = Attached {
        trtype,
        traddr,
        bdevs: names.clone(),
        controller: Arc::downgrade(&controller),
    };
    app.state.lock().controllers.insert(name, attached);
    app.note("bdev_nvme_attach_controller", params, &names);
    Ok(json!(names))
}

/// Watches a controller, and removes its devices when it goes away without I/O. `bdevs` are their
/// names and identities: a device of another controller may have got a name.
fn watch(
    registry: Registry,
    controller: Weak<pumice_nvme::Controller>,
    bdevs: Vec<(String, usize)>,
) {
    let watcher = move || {
        // The identities are those of no other device as long as the controller is there.
        while let Some(controller) = controller.upgrade() {
            if matches!(controller.phase(), Phase::Removed | Phase::Failed) {
                for (name, identity) in &bdevs {
                    let there = registry.get(name);
                    if let Some(bdev) = there.filter(|b| b.identity() == *identity) {
                        bdev.remove();
                    }
                }
                return;
            }
            drop(controller);
            thread::sleep(WATCH_EVERY);
        }
    };
    if let Err(error) = thread::Builder::new()
        .name("nvme-watch".to_owned())
        .spawn(watcher)
    {
        tracing::warn!(%error, "no thread to notice removals; I/O will");
    }
}

fn detach_controller(app: &App, params: &mut Params<'_>) -> Answer {
    let name = params.string("name")?;
    params.ignore(&[
        "trtype",
        "traddr",
        "adrfam",
        "trsvcid",
        "subnqn",
        "hostaddr",
        "hostsvcid",
    ]);
    params.finish()?;
    let found = app.state.lock().controllers.remove(&name);
    let Some(controller) = found else {
        let known: Vec<String> = app.state.lock().controllers.keys().cloned().collect();
        let message = format!("no controller `{name}`; attached are: {}", known.join(", "));
        return Err(MethodError::new(-i64::from(libc::ENODEV), message));
    };
    for bdev in &controller.bdevs {
        if app.registry.get(bdev).is_some() {
            app.registry.remove(bdev)?;
        }
    }
    app.forget_removed();
    Ok(json!(true))
}

/// Returns the attached controller of that name.
fn attached(app: &App, name: &str) -> Result<Arc<pumice_nvme::Controller>, MethodError> {
    let state = app.state.lock();
    let found = state.controllers.get(name);
    found.and_then(|c| c.controller.upgrade()).ok_or_else(|| {
        let known: Vec<String> = state.controllers.keys().cloned().collect();
        let message = format!("no controller `{name}`; attached are: {}", known.join(", "));
        MethodError::new(-i64::from(libc::ENODEV), message)
    })
}

/// Resets a controller. I/O in flight is sent again or ends with an error. Blocks until the reset
/// has ended.
fn reset_controller(app: &App, params: &mut Params<'_>) -> Answer {
    let name = params.string("name")?;
    params.neutral(
        "cntlid",
        &["0"],
        "a controller here is one, not several paths",
    )?;
    params.finish()?;
    let controller = attached(app, &name)?;
    controller.reset().map_err(pumice_bdev::BdevError::from)?;
    Ok(json!(true))
}

/// Returns the SMART / health log in the specification's units, except for the temperatures, which
/// are in degrees Celsius.
fn health_info(app: &App, params: &mut Params<'_>) -> Answer {
    let name = params.string("name")?;
    params.finish()?;
    let controller = attached(app, &name)?;
    let text = |bytes: &[u8]| {
        let text = String::from_utf8_lossy(bytes);
        text.trim_matches(['\0', ' ']).to_owned()
    };
    let identify = controller
        .identify()
        .map_err(pumice_bdev::BdevError::from)?;
    let log = controller
        .smart_log()
        .map_err(pumice_bdev::BdevError::from)?;
    let celsius = |kelvin: u16| i32::from(kelvin) - 273;
    // Numbers of 128 bits are larger than JSON readers expect.
    let big = |n: u128| u64::try_from(n).map_or_else(|_| json!(n.to_string()), |n| json!(n));
    let mut info = json!({
        "model_number": text(&identify.mn),
        "serial_number": text(&identify.sn),
        "firmware_revision": text(&identify.fr),
        "traddr": controller.name(),
        "critical_warning": log.critical_warning,
        "temperature_celsius": celsius(log.composite_temperature.get()),
        "available_spare_percentage": log.available_spare,
        "available_spare_threshold_percentage": log.available_spare_threshold,
        "percentage_used": log.percentage_used,
        "data_units_read": big(log.data_units_read.get()),
        "data_units_written": big(log.data_units_written.get()),
        "host_read_commands": big(log.host_reads.get()),
        "host_write_commands": big(log.host_writes.get()),
        "controller_busy_time": big(log.controller_busy_time.get()),
        "power_cycles": big(log.power_cycles.get()),
        "power_on_hours": big(log.power_on_hours.get()),
        "unsafe_shutdowns": big(log.unsafe_shutdowns.get()),
        "media_errors": big(log.media_errors.get()),
        "num_err_log_entries": big(log.error_log_entries.get()),
        "warning_temperature_time_minutes": log.warning_temperature_time.get(),
        "critical_composite_temperature_time_minutes": log.critical_temperature_time.get(),
    });
    if let Value::Object(map) = &mut info {
        for (i, sensor) in log.temperature_sensors.iter().enumerate() {
            if sensor.get() != 0 {
                let key = format!("temperature_sensor_{}_celsius", i + 1);
                map.insert(key, json!(celsius(sensor.get())));
            }
        }
    }
    Ok(info)
}

fn get_controllers(app: &App, params: &mut Params<'_>) -> Answer {
    let wanted = params.opt_string("name")?;
    params.finish()?;
    let state = app.state.lock();
    let matching = state
        .controllers
        .iter()
        .filter(|(n, _)| wanted.as_ref().is_none_or(|w| w == *n));
    let found: Vec<Value> = matching
        .map(|(name, c)| {
            let controller = c.controller.upgrade();
            let identify = controller.as_ref().and_then(|c| c.identify().ok());
            let word = match controller.map(|c| c.phase()) {
                Some(Phase::Live) => "enabled",
                Some(Phase::Resetting) => "resetting",
                Some(Phase::Failed) => "failed",
                _ => "removed",
            };
            json!({ "name": name, "ctrlrs": [{
                "state": word,
                "trid": { "trtype": c.trtype, "traddr": c.traddr },
                "cntlid": identify.map_or(0, |i| i.cntlid.get()),
                // These are for fabrics only.
                "host": { "nqn": "", "addr": "", "svcid": "" },
            }] })
        })
        .collect();
    if let (Some(wanted), true) = (wanted, found.is_empty()) {
        let message = format!("no controller `{wanted}`");
        return Err(MethodError::new(-i64::from(libc::ENODEV), message));
    }
    Ok(found.into())
}

fn set_hotplug(app: &App, params: &mut Params<'_>) -> Answer {
    let enable = params.flag("enable")?;
    params.ignore(&["period_us"]);
    params.finish()?;
    if enable {
        return Err(params.error("enable", "true: controllers are attached by name only"));
    }
    let kept = params.to_value();
    app.state
        .lock()
        .options
        .insert("bdev_nvme_set_hotplug".to_owned(), kept);
    Ok(json!(true))
}

/// SPDK's options that have no counterpart here.
const OTHER_OPTIONS: &[&str] = &[
    "allow_accel_sequence",
    "arbitration_burst",
    "bdev_retry_count",
    "ctrlr_loss_timeout_sec",
    "delay_cmd_submit",
    "dhchap_dhgroups",
    "dhchap_digests",
    "disable_auto_failback",
    "enable_flush",
    "fast_io_fail_timeout_sec",
    "generate_uuids",
    "high_priority_weight",
    "io_path_stat",
    "io_queue_requests",
    "keep_alive_timeout_ms",
    "low_priority_weight",
    "medium_priority_weight",
    "nvme_adminq_poll_period_us",
    "nvme_error_stat",
    "nvme_ioq_poll_period_us",
    "rdma_cm_event_timeout_ms",
    "rdma_max_cq_size",
    "rdma_srq_size",
    "rdma_umr_per_io",
    "reconnect_delay_sec",
    "retry_count",
    "tcp_connect_timeout_ms",
    "timeout_admin_us",
    "transport_ack_timeout",
    "transport_retry_count",
    "transport_tos",
];

/// Sets options of the driver. Time-outs and their action take effect. Settings of queues and
/// reconnection have no counterpart here and are kept for `save_config`.
fn set_options(app: &App, params: &mut Params<'_>) -> Answer {
    let action = params.opt_string("action_on_timeout")?;
    let timeout_us = params.opt_u64("timeout_us")?;
    let action = match action.as_deref() {
        None => None,
        Some("none") => Some(TimeoutAction::Log),
        Some("abort") => Some(TimeoutAction::Abort),
        Some("reset") => Some(TimeoutAction::Reset),
        Some(other) => {
            let reason = format!("`{other}`: use one of none, abort, reset");
            return Err(params.error("action_on_timeout", reason));
        }
    };
    params.ignore(OTHER_OPTIONS);
    let unknown = params.finish_open()?;
    if !unknown.is_empty() {
        tracing::warn!(?unknown, "bdev_nvme_set_options: kept, without effect");
    }
    if timeout_us.is_some() || action.is_some() {
        let (timeout, before) = app.registry.timeout();
        app.registry.set_timeout(
            timeout_us.map_or(timeout, Duration::from_micros),
            action.unwrap_or(before),
        );
    }
    let kept = params.to_value();
    app.state
        .lock()
        .options
        .insert("bdev_nvme_set_options".to_owned(), kept);
    Ok(json!(true))
}
