//! `delay`: another device, slower.

use std::sync::Arc;

use pumice_bdev::BlockDevice;
use pumice_bdev::delay::{Delay, Latencies};
use serde_json::{Value, json};

use super::super::app::App;
use super::super::json::{MethodError, Params};
use super::super::methods::{Answer, Makes, Method};
use super::devices::{delete, stack};

pub(super) static METHODS: &[Method] = &[
    Method {
        makes: Some(Makes {
            on: Some("base_bdev_name"),
            ..Makes::named()
        }),
        ..Method::new("bdev_delay_create", create)
    },
    Method::new("bdev_delay_delete", |app, params| {
        delete(app, params, "delay")
    }),
    Method::new("bdev_delay_update_latency", update_latency),
];

fn create(app: &App, params: &mut Params<'_>) -> Answer {
    let base = params.string("base_bdev_name")?;
    let name = params.string("name")?;
    let latencies = Latencies::default()
        .avg_read_us(params.u64("avg_read_latency")?)
        .p99_read_us(params.u64("p99_read_latency")?)
        .avg_write_us(params.u64("avg_write_latency")?)
        .p99_write_us(params.u64("p99_write_latency")?);
    let uuid = params.opt_uuid("uuid")?;
    params.finish()?;
    let mut made = None;
    let name = stack(app, &name, &base, |base| {
        let delay = Delay::new(&name, base, latencies);
        let delay = Arc::new(match uuid {
            Some(uuid) => delay.with_uuid(uuid),
            None => delay,
        });
        made = Some(Arc::clone(&delay));
        delay
    })?;
    if let Some(delay) = made {
        app.keep(&name, delay);
    }
    app.note("bdev_delay_create", params, std::slice::from_ref(&name));
    Ok(json!(name))
}

fn update_latency(app: &App, params: &mut Params<'_>) -> Answer {
    let name = params.string("delay_bdev_name")?;
    let kind = params.string("latency_type")?;
    let us = params.u64("latency_us")?;
    let which: fn(&mut Latencies) -> &mut u64 = match kind.as_str() {
        "avg_read" => |l| &mut l.avg_read_us,
        "p99_read" => |l| &mut l.p99_read_us,
        "avg_write" => |l| &mut l.avg_write_us,
        "p99_write" => |l| &mut l.p99_write_us,
        _ => {
            let known = "avg_read, p99_read, avg_write, p99_write";
            return Err(params.error("latency_type", format!("`{kind}`: use one of {known}")));
        }
    };
    params.finish()?;
    let Some(delay) = app.kept::<Delay>(&name) else {
        return Err(match app.registry.get(&name) {
            None => app.registry.not_found(&name).into(),
            Some(_) => MethodError::new(
                -i64::from(libc::ENODEV),
                format!("`{name}` is not a delay bdev; bdev_delay_create puts one on it"),
            ),
        });
    };
    // Held over both, so that calls at the same time do not undo each other.
    let mut state = app.state.lock();
    let mut latencies = delay.latencies();
    *which(&mut latencies) = us;
    delay.set_latencies(latencies);
    // The saved call has the current latencies.
    let made = |c: &&mut super::super::app::Created| {
        c.method == "bdev_delay_create" && c.bdevs.contains(&delay.info().name)
    };
    if let Some(created) = state.created.iter_mut().find(made)
        && let Value::Object(map) = &mut created.params
    {
        map.insert(format!("{kind}_latency"), json!(us));
    }
    Ok(json!(true))
}
