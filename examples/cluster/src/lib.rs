//! A replicated key-value store: `openraft` with its log, its state and its snapshots on Pumice.
//!
//! Each node is a process with a device of its own (an image file, a block device), on which one file system holds two
//! databases: `/log` with the Raft log and the vote, and `/state-N` with what was applied. A snapshot is a checkpoint of the
//! state: hard links to its tables, made in milliseconds, and sent to other nodes file by file.
//!
//! `README.md` says how to run three nodes and what they guarantee.

#![forbid(unsafe_code)]

use serde::{Deserialize, Serialize};

mod client;
mod network;
mod node;
mod server;
mod store;
pub mod wire;

pub use client::{Client, ClientError};
pub use node::{NodeError, NodeOptions, Replica};
pub use server::serve;
pub use store::{
    Announced, AppliedState, Files, LogReader, LogStore, SnapshotBuilder, StateMachine, Store,
    StoreError, StoreOptions,
};

/// The number of a node.
pub type NodeId = u64;

/// A change that a client asks for, as the log has it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum KeyChange {
    /// Sets the value of a key.
    Put {
        /// The key.
        key: String,
        /// The value.
        value: String,
    },
    /// Removes a key, if it is there.
    Delete {
        /// The key.
        key: String,
    },
}

/// The answer of the state machine to a log entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Applied {
    /// The index of the entry.
    pub index: u64,
}

openraft::declare_raft_types!(
    /// The types that openraft works with.
    pub TypeConfig: D = KeyChange, R = Applied, SnapshotData = Files,
);

/// An entry of the log.
pub type Entry = openraft::Entry<TypeConfig>;
/// The id of a log entry.
pub type LogId = openraft::LogId<NodeId>;
/// The description of a snapshot.
pub type SnapshotMeta = openraft::SnapshotMeta<NodeId, openraft::BasicNode>;
/// The members of the cluster and the entry that made them so.
pub type Membership = openraft::StoredMembership<NodeId, openraft::BasicNode>;
