//! A node: Raft on a store, and the socket where others ask it.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;

use openraft::error::{Fatal, InitializeError, RaftError};
use openraft::{BasicNode, Config, ConfigError, Raft, SnapshotPolicy};
use pumice::FileSystem;
use tokio::sync::Mutex;

use crate::network::Network;
use crate::store::{AppliedState, FileLen, Files, Store, StoreError, StoreOptions};
use crate::wire::Status;
use crate::{NodeId, TypeConfig};

/// The choices of a node.
#[derive(Debug, Clone)]
pub struct NodeOptions {
    /// The id, which the device keeps.
    pub id: NodeId,
    /// The address on which others ask it.
    pub listen: String,
    /// The ids and addresses of the first members of the cluster.
    pub peers: BTreeMap<NodeId, String>,
    /// Log entries after which the next snapshot is made.
    pub snapshot_every: u64,
    /// Log entries that are kept although the snapshot has them, for nodes that are a little behind.
    pub keep: u64,
    /// Time between heartbeats. An election begins after four to six of them.
    pub heartbeat_ms: u64,
    /// Sizes of the store.
    pub store: StoreOptions,
}

/// The reason why a node could not be started, or has ended.
#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    /// The store has failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The socket has failed.
    #[error("{address}: {source}")]
    Socket {
        /// The address.
        address: String,
        /// The reason.
        source: io::Error,
    },
    /// The options contradict each other.
    #[error("the options of Raft: {0}")]
    Config(#[from] ConfigError),
    /// Raft has stopped: the store has failed, or there is a bug.
    #[error("Raft has stopped: {0}; restart the node")]
    Raft(Box<Fatal<NodeId>>),
}

impl From<Fatal<NodeId>> for NodeError {
    fn from(fatal: Fatal<NodeId>) -> NodeError {
        NodeError::Raft(Box::new(fatal))
    }
}

/// A snapshot that a leader is sending.
pub(crate) struct Receiving {
    pub(crate) snapshot_id: String,
    pub(crate) files: Box<Files>,
    pub(crate) announced: Vec<FileLen>,
}

/// A running node.
pub struct Replica {
    options: NodeOptions,
    raft: Raft<TypeConfig>,
    state: Arc<AppliedState>,
    pub(crate) receiving: Mutex<Option<Receiving>>,
}

impl Replica {
    /// Starts Raft on the store of a file system.
    ///
    /// # Errors
    /// [`NodeError`].
    pub async fn start(fs: FileSystem, options: NodeOptions) -> Result<Arc<Replica>, NodeError> {
        let config = Config {
            cluster_name: "pumice".to_owned(),
            heartbeat_interval: options.heartbeat_ms,
            election_timeout_min: options.heartbeat_ms * 4,
            election_timeout_max: options.heartbeat_ms * 6,
            snapshot_policy: SnapshotPolicy::LogsSinceLast(options.snapshot_every),
            max_in_snapshot_log_to_keep: options.keep,
            replication_lag_threshold: options.snapshot_every.saturating_mul(2),
            ..Config::default()
        };
        let config = Arc::new(config.validate()?);
        let (id, sizes) = (options.id, options.store.clone());
        let store = tokio::task::spawn_blocking(move || {
            let store = Store::open(&fs, &sizes)?;
            store.log.claim(id)?;
            Ok::<_, StoreError>(store)
        });
        let store = match store.await {
            Ok(store) => store?,
            Err(error) => std::panic::resume_unwind(error.into_panic()),
        };
        let state = Arc::clone(store.state.state());
        let raft = Raft::new(id, config, Network, store.log, store.state).await?;
        Ok(Arc::new(Replica {
            options,
            raft,
            state,
            receiving: Mutex::new(None),
        }))
    }

    /// Stops Raft, so that the databases can be closed.
    pub async fn stop(&self) {
        if let Err(error) = self.raft.shutdown().await {
            tracing::error!("Raft did not end in order: {error}");
        }
    }

    pub(crate) fn address(&self) -> &str {
        &self.options.listen
    }

    pub(crate) fn raft(&self) -> &Raft<TypeConfig> {
        &self.raft
    }

    pub(crate) fn state(&self) -> &Arc<AppliedState> {
        &self.state
    }

    /// Makes a cluster of the peers. It does nothing if there is one.
    pub(crate) async fn init(
        &self,
    ) -> Result<(), RaftError<NodeId, InitializeError<NodeId, BasicNode>>> {
        let peers = self.options.peers.iter();
        let members: BTreeMap<NodeId, BasicNode> = peers
            .map(|(id, address)| (*id, BasicNode::new(address)))
            .collect();
        match self.raft.initialize(members).await {
            Err(RaftError::APIError(InitializeError::NotAllowed(_))) => Ok(()),
            other => other,
        }
    }

    pub(crate) fn status(&self) -> Status {
        let metrics = self.raft.metrics();
        let metrics = metrics.borrow();
        let membership = metrics.membership_config.membership();
        let index = |id: Option<crate::LogId>| id.map(|id| id.index);
        Status {
            id: metrics.id,
            role: format!("{:?}", metrics.state).to_lowercase(),
            term: metrics.current_term,
            leader: metrics.current_leader,
            last_log: metrics.last_log_index,
            applied: index(metrics.last_applied),
            snapshot: index(metrics.snapshot),
            purged: index(metrics.purged),
            voters: membership.voter_ids().collect(),
            nodes: membership
                .nodes()
                .map(|(id, node)| (*id, node.clone()))
                .collect(),
            installed: self.state.installed(),
        }
    }
}
