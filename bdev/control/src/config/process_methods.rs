//! Methods about the process that SPDK's tools call: signals, reactors, threads, notifications.
//!
//! There are no reactors and no threads of a framework here: the thread that wants I/O does it. The
//! methods say so in SPDK's form, with empty lists, so that scripts work.

use pumice_io::sys::Clock;
use serde_json::{Value, json};

use super::app::App;
use super::json::{MethodError, Params};

type Answer = Result<Value, MethodError>;

pub(super) fn kill_instance(_: &App, params: &mut Params<'_>) -> Answer {
    let name = params.string("sig_name")?;
    let short = name.strip_prefix("SIG").unwrap_or(&name);
    let signal = match short {
        "INT" | "2" => libc::SIGINT,
        "TERM" | "15" => libc::SIGTERM,
        "QUIT" | "3" => libc::SIGQUIT,
        "HUP" | "1" => libc::SIGHUP,
        "KILL" | "9" => libc::SIGKILL,
        "USR1" | "10" => libc::SIGUSR1,
        _ => {
            let known = "one of SIGINT, SIGTERM, SIGQUIT, SIGHUP, SIGKILL, SIGUSR1";
            return Err(params.error("sig_name", format!("`{name}`: {known}")));
        }
    };
    params.finish()?;
    pumice_io::sys::raise(signal).map_err(|e| {
        let errno = e.raw_os_error().unwrap_or(libc::EIO);
        MethodError::new(-i64::from(errno), e.to_string())
    })?;
    Ok(json!(true))
}

pub(super) fn get_reactors(_: &App, params: &mut Params<'_>) -> Answer {
    params.finish()?;
    Ok(json!({
        "tick_rate": Clock::get().ticks_per_second(),
        "pid": std::process::id(),
        "reactors": [],
    }))
}

/// Answers `thread_get_stats` and `thread_get_io_channels`.
pub(super) fn get_threads(_: &App, params: &mut Params<'_>) -> Answer {
    params.finish()?;
    Ok(json!({ "tick_rate": Clock::get().ticks_per_second(), "threads": [] }))
}

pub(super) fn get_notification_types(_: &App, params: &mut Params<'_>) -> Answer {
    params.finish()?;
    Ok(json!(["bdev_register", "bdev_unregister"]))
}

pub(super) fn get_notifications(app: &App, params: &mut Params<'_>) -> Answer {
    let id = params.opt_u64("id")?.unwrap_or(0);
    let max = params.opt_u64("max")?.unwrap_or(u64::MAX);
    params.finish()?;
    let notifications = app.notifications.lock();
    let numbered = notifications.numbered();
    Ok(numbered
        .filter(|(n, _)| *n >= id)
        .take(usize::try_from(max).unwrap_or(usize::MAX))
        .map(|(n, (what, name))| json!({ "type": what, "ctx": name, "id": n }))
        .collect())
}
