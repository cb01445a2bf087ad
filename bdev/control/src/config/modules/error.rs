//! `error`: another device, with injected faults.

use std::sync::Arc;

use pumice_bdev::OpKind;
use pumice_bdev::error_inject::{ErrorDevice, Failure, Injection};
use serde_json::json;

use super::super::app::App;
use super::super::json::{MethodError, Params};
use super::super::methods::{Answer, Given, Makes, Method};
use super::devices::{delete, stack};

pub(super) static METHODS: &[Method] = &[
    Method {
        makes: Some(Makes {
            on: Some("base_name"),
            ..Makes::new(|params| {
                let base = params.opt_string("base_name")?;
                Ok(Given::Names(
                    base.iter().map(|base| name_on(base)).collect(),
                ))
            })
        }),
        ..Method::new("bdev_error_create", create)
    },
    Method::new("bdev_error_delete", |app, params| {
        delete(app, params, "error")
    }),
    Method::new("bdev_error_inject_error", inject),
    Method::new("bdev_error_resume", resume),
    Method::new("bdev_error_resume_pending", resume),
];

/// Returns the name of the device on `base`.
fn name_on(base: &str) -> String {
    format!("EE_{base}")
}

fn create(app: &App, params: &mut Params<'_>) -> Answer {
    let base = params.string("base_name")?;
    let uuid = params.opt_uuid("uuid")?;
    params.finish()?;
    let wanted = name_on(&base);
    let mut made = None;
    let name = stack(app, &wanted, &base, |base| {
        let error = ErrorDevice::new(Some(&wanted), base);
        let error = Arc::new(match uuid {
            Some(uuid) => error.with_uuid(uuid),
            None => error,
        });
        made = Some(Arc::clone(&error));
        error
    })?;
    if let Some(error) = made {
        app.keep(&name, error);
    }
    app.note("bdev_error_create", params, std::slice::from_ref(&name));
    // The name is not changed: the device is known by it.
    Ok(json!(true))
}

fn error_device(app: &App, name: &str) -> Result<Arc<ErrorDevice>, MethodError> {
    if let Some(found) = app.kept(name) {
        return Ok(found);
    }
    match app.registry.get(name) {
        None => Err(app.registry.not_found(name).into()),
        Some(_) => Err(MethodError::new(
            -i64::from(libc::ENODEV),
            format!("`{name}` is not an error bdev; bdev_error_create puts one on it, `EE_{name}`"),
        )),
    }
}

fn inject(app: &App, params: &mut Params<'_>) -> Answer {
    let name = params.string("name")?;
    let io_type = params.string("io_type")?;
    let error_type = params.opt_string("error_type")?;
    let count = params.opt_u64("num")?.unwrap_or(1);
    let queue_depth = params.opt_u64("queue_depth")?.unwrap_or(0);
    let offset = params.opt_u64("corrupt_offset")?.unwrap_or(0);
    let value = params.opt_u32("corrupt_value")?.unwrap_or(0);
    // Not in SPDK: restricts the fault to operations that touch these blocks.
    let lba = params.opt_u64("lba")?;
    let len_blocks = params.opt_u64("num_blocks")?;
    let op = match io_type.as_str() {
        "all" | "clear" => None,
        other => {
            // FUA is a property of a write and no operation.
            let mut kinds = OpKind::ALL.into_iter().filter(|k| *k != OpKind::Fua);
            let names: Vec<&str> = kinds.clone().map(OpKind::name).collect();
            let kind = kinds.find(|k| k.name() == other);
            let unknown = || {
                let known = names.join(", ");
                params.error(
                    "io_type",
                    format!("`{other}`: use one of clear, all, {known}"),
                )
            };
            Some(kind.ok_or_else(unknown)?)
        }
    };
    let failure = match error_type.as_deref() {
        None if io_type == "clear" => Failure::Fail,
        Some("failure") => Failure::Fail,
        Some("nomem") => Failure::NoMemory,
        Some("pending") => Failure::Hang,
        Some("corrupt_data") => {
            let value = u8::try_from(value).unwrap_or(0);
            if value == 0 {
                let reason = "1 to 255: the bits of the byte that change";
                return Err(params.error("corrupt_value", reason));
            }
            Failure::Corrupt { offset, value }
        }
        other => {
            let shown = other.unwrap_or("missing");
            let known = "failure, pending, corrupt_data, nomem";
            return Err(params.error("error_type", format!("`{shown}`: use one of {known}")));
        }
    };
    params.finish()?;
    let dev = error_device(app, &name)?;
    if io_type == "clear" {
        dev.clear();
        return Ok(json!(true));
    }
    let range = lba.map(|lba| (lba, len_blocks.unwrap_or(1)));
    let queue_depth = usize::try_from(queue_depth).unwrap_or(usize::MAX);
    // As in SPDK, this replaces earlier faults of such operations, `num` 0 only removes them, and
    // each kind of `all` has a count of its own.
    let each = |kind: &OpKind| {
        op.map_or(
            !matches!(kind, OpKind::Reset | OpKind::Abort | OpKind::Fua),
            |op| op == *kind,
        )
    };
    for kind in OpKind::ALL.into_iter().filter(each) {
        dev.replace(
            Injection::new(failure)
                .op(Some(kind))
                .count(count)
                .range(range)
                .queue_depth(queue_depth),
        );
    }
    Ok(json!(true))
}

fn resume(app: &App, params: &mut Params<'_>) -> Answer {
    let name = params.string("name")?;
    params.finish()?;
    error_device(app, &name)?.resume();
    Ok(json!(true))
}
