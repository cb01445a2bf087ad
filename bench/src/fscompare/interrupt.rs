//! A request to stop.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// A request to stop, by Ctrl-C or SIGTERM.
#[derive(Debug, Clone, Default)]
pub struct Interrupt(pub(super) Arc<AtomicBool>);

impl Interrupt {
    /// Makes one that SIGINT and SIGTERM set from now on.
    ///
    /// # Errors
    /// Fails when the handlers cannot be installed.
    pub fn on_signals() -> Result<Self, String> {
        let stop = Self::default();
        for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM] {
            signal_hook::flag::register(signal, Arc::clone(&stop.0))
                .map_err(|e| format!("signal {signal}: {e}"))?;
        }
        Ok(stop)
    }

    /// Fails when a stop was requested.
    ///
    /// # Errors
    /// Returns "interrupted".
    pub fn check(&self) -> Result<(), String> {
        if self.0.load(Ordering::Relaxed) {
            return Err("interrupted; mounts, loop devices and files made here are removed".into());
        }
        Ok(())
    }
}
