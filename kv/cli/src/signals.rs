//! SIGINT, SIGTERM and SIGHUP during a command that changes a file system: the command stops at its
//! next step, removes incomplete files and unmounts in order. A second signal ends it at once.

use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::flag;

use crate::failure::Failure;

/// Returns those of the signals that this process did not inherit as ignored, as it does behind `nohup`.
pub fn not_ignored() -> Vec<i32> {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mut fields = status.lines().filter_map(|line| line.split_once(':'));
    let mask = fields.find(|(name, _)| *name == "SigIgn");
    let ignored = mask
        .and_then(|(_, mask)| u64::from_str_radix(mask.trim(), 16).ok())
        .unwrap_or(0);
    let mut signals = vec![SIGINT, SIGTERM, SIGHUP];
    signals.retain(|signal| ignored & (1 << (signal - 1)) == 0);
    signals
}

/// Catches the signals from now on, but those that are ignored.
pub fn catch() -> Result<(), Failure> {
    let again = Arc::new(AtomicBool::new(false));
    for signal in not_ignored() {
        let register = || {
            // The handler that ends the process on a second signal comes first, then the one that
            // records this signal.
            flag::register_conditional_shutdown(signal, 128 + signal, Arc::clone(&again))?;
            flag::register(signal, Arc::clone(&again))?;
            register_number(signal)
        };
        register().map_err(|e| Failure::from(format!("signal {signal}: {e}")))?;
    }
    Ok(())
}

/// Records which signal came.
fn register_number(signal: i32) -> std::io::Result<()> {
    let number = usize::try_from(signal).unwrap_or(0);
    flag::register_usize(signal, Arc::clone(numbers()), number).map(|_| ())
}

fn numbers() -> &'static Arc<AtomicUsize> {
    static NUMBER: std::sync::OnceLock<Arc<AtomicUsize>> = std::sync::OnceLock::new();
    NUMBER.get_or_init(Arc::default)
}

/// Returns the signal that was caught, if there was one.
pub fn caught() -> Option<usize> {
    match numbers().load(Ordering::Relaxed) {
        0 => None,
        signal => Some(signal),
    }
}

/// Fails when a signal was caught. Called at every step that may take long.
pub fn check() -> Result<(), Failure> {
    match caught() {
        None => Ok(()),
        Some(signal) => Err(Failure::from(format!(
            "ended by signal {signal}; what was not finished is removed"
        ))),
    }
}

/// Returns the exit code of a command: the shell's code for a signal if one was caught.
pub fn exit_code(code: ExitCode) -> ExitCode {
    caught().map_or(code, |signal| {
        ExitCode::from(u8::try_from(128 + signal).unwrap_or(1))
    })
}
