//! What keeps a purge of the log behind the snapshot that replaces what is purged.

use std::sync::Arc;

use tokio::sync::watch;

use super::StoreError;

/// The last snapshot from a leader.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Install {
    /// No snapshot is on its way into the state.
    None,
    /// Raft was given one, and may purge the log before it is in place.
    Announced,
    /// The last one could not be put in place.
    Failed,
}

#[derive(Debug, Clone, Copy)]
struct Progress {
    /// The index of the last entry that the durable snapshot contains.
    covered: Option<u64>,
    install: Install,
}

/// Knows what the durable snapshot covers, and whether another one is about to replace it.
///
/// Openraft 0.9 purges the log up to the end of a snapshot as soon as it has *asked* the state machine to install it. A power
/// cut in between would leave a log that begins after what the state has, and entries that this node has acknowledged would
/// be gone. The log store therefore waits here.
#[derive(Debug)]
pub struct Installs {
    progress: watch::Sender<Progress>,
}

impl Installs {
    pub fn new(covered: Option<u64>) -> Installs {
        let install = Install::None;
        let (progress, _) = watch::channel(Progress { covered, install });
        Installs { progress }
    }

    /// A snapshot with entries up to `covered` is durable.
    pub fn cover(&self, covered: Option<u64>) {
        self.progress.send_modify(|progress| {
            progress.covered = progress.covered.max(covered);
            progress.install = Install::None;
        });
    }

    /// A snapshot could not be put in place.
    pub fn fail(&self) {
        self.progress
            .send_modify(|progress| progress.install = Install::Failed);
    }

    /// Waits until the log may be purged up to `index`.
    pub async fn may_purge(&self, index: u64) -> Result<(), StoreError> {
        let mut progress = self.progress.subscribe();
        let decided = progress
            .wait_for(|now| now.covered >= Some(index) || now.install != Install::Announced)
            .await;
        // The sender is in `self`, so that the wait ends only with a value.
        match decided.map(|now| (now.covered >= Some(index), now.install)) {
            Ok((false, Install::Failed)) => Err(StoreError::inconsistent(
                "/log",
                "it is not purged, since the snapshot that contains its entries could not be installed: restart the node",
            )),
            _ => Ok(()),
        }
    }
}

/// While it lives, the log is not purged beyond the durable snapshot. Hold it from before Raft is given a snapshot until it has
/// answered.
#[derive(Debug)]
pub struct Announced {
    installs: Arc<Installs>,
}

impl Announced {
    pub(super) fn new(installs: &Arc<Installs>) -> Announced {
        installs
            .progress
            .send_modify(|progress| progress.install = Install::Announced);
        Announced {
            installs: Arc::clone(installs),
        }
    }
}

impl Drop for Announced {
    fn drop(&mut self) {
        // Raft has refused it, unless it is in place or has failed.
        self.installs.progress.send_modify(|progress| {
            if progress.install == Install::Announced {
                progress.install = Install::None;
            }
        });
    }
}
