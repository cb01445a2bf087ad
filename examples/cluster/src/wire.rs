//! What nodes and clients say to each other over TCP.
//!
//! A message is a frame: the length of its head and of its body as 32-bit numbers, most significant byte first, then the head
//! as JSON, then the body as bytes. A connection carries one call at a time, each with one reply. Only a piece of a snapshot
//! has a body.

use std::collections::BTreeMap;
use std::io;
use std::time::Duration;

use openraft::error::{Fatal, RaftError};
use openraft::raft::{
    AppendEntriesRequest, AppendEntriesResponse, SnapshotResponse, VoteRequest, VoteResponse,
};
use openraft::{BasicNode, Vote};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::store::FileLen;
use crate::{NodeId, SnapshotMeta, TypeConfig};

/// The longest head. A message with log entries has at most a MiB of them, or one entry.
pub const MAX_HEAD_BYTES: usize = 4 << 20;
/// The longest body, a piece of a snapshot.
pub const MAX_BODY_BYTES: usize = 1 << 20;
/// The longest key.
pub const MAX_KEY_BYTES: usize = 1 << 10;
/// The longest value. JSON may need six times as much.
pub const MAX_VALUE_BYTES: usize = 256 << 10;
/// The most files of a snapshot.
pub const MAX_FILES: usize = 10_000;

/// The time that a frame may take once it has begun.
const FRAME_TIMEOUT: Duration = Duration::from_secs(10);
/// Bytes of the two lengths.
pub const LENGTHS_BYTES: usize = 8;

/// A question to a node.
#[derive(Debug, Serialize, Deserialize)]
pub enum Call {
    /// Raft's request to append entries.
    Append(AppendEntriesRequest<TypeConfig>),
    /// Raft's request for a vote.
    Vote(VoteRequest<NodeId>),
    /// A snapshot follows.
    Begin {
        /// The snapshot.
        snapshot_id: String,
        /// The names and lengths of the files.
        files: Vec<FileLen>,
    },
    /// The next bytes of a file of the snapshot, which are the body.
    Piece {
        /// The snapshot.
        snapshot_id: String,
        /// The name of the file.
        file: String,
        /// The place of the bytes in the file.
        at: u64,
    },
    /// The snapshot is complete.
    Install {
        /// The vote of the leader that sends it.
        vote: Vote<NodeId>,
        /// The description of the snapshot.
        meta: SnapshotMeta,
    },
    /// Sets a key.
    Put {
        /// The key.
        key: String,
        /// The value.
        value: String,
    },
    /// Removes a key.
    Delete {
        /// The key.
        key: String,
    },
    /// Reads a key.
    Get {
        /// The key.
        key: String,
        /// The age that the value may have.
        read: Read,
    },
    /// Asks how the node is.
    Status,
    /// Makes a cluster of the node and its peers, once.
    Init,
    /// Adds a node that gets the log and does not vote.
    AddLearner {
        /// The id of the node.
        id: NodeId,
        /// The address of the node.
        address: String,
    },
    /// Makes these nodes the voters.
    ChangeMembership {
        /// The ids of the voters.
        voters: Vec<NodeId>,
    },
}

/// The age that a value may have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Read {
    /// It has every write that was acknowledged before the read began. Only the leader answers, after it has heard from a
    /// majority.
    Linearizable,
    /// It is what this node has applied.
    Local,
}

/// The answer of a node.
#[derive(Debug, Serialize, Deserialize)]
pub enum Reply {
    /// The answer to [`Call::Append`].
    Append(Result<AppendEntriesResponse<NodeId>, RaftError<NodeId>>),
    /// The answer to [`Call::Vote`].
    Vote(Result<VoteResponse<NodeId>, RaftError<NodeId>>),
    /// The part of a snapshot was taken.
    Taken,
    /// The answer to [`Call::Install`].
    Installed(Result<SnapshotResponse<NodeId>, Fatal<NodeId>>),
    /// The change was committed and applied.
    Done {
        /// The index of its log entry.
        index: u64,
    },
    /// The value of a key.
    Value(Option<String>),
    /// The state of the node.
    Status(Box<Status>),
    /// Another node has to be asked.
    NotLeader {
        /// The address of the leader, if the node knows it.
        leader: Option<String>,
    },
    /// Nothing was done.
    Refused {
        /// The reason.
        reason: String,
    },
    /// It may have been done or not.
    Unknown {
        /// The reason.
        reason: String,
    },
}

/// The state of a node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// The id of the node.
    pub id: NodeId,
    /// The role that Raft has it in.
    pub role: String,
    /// The current term.
    pub term: u64,
    /// The leader, if the node knows it.
    pub leader: Option<NodeId>,
    /// The index of the last entry of the log.
    pub last_log: Option<u64>,
    /// The index of the last entry that was applied.
    pub applied: Option<u64>,
    /// The index of the last entry in the snapshot.
    pub snapshot: Option<u64>,
    /// The index of the last entry that was removed from the log.
    pub purged: Option<u64>,
    /// The nodes that vote.
    pub voters: Vec<NodeId>,
    /// All nodes with their addresses.
    pub nodes: BTreeMap<NodeId, BasicNode>,
    /// The number of snapshots of a leader that it has installed since it was started.
    pub installed: u64,
}

/// Returns the bytes of a frame.
///
/// # Errors
/// Fails if it is too long.
pub fn encode<T: Serialize>(head: &T, body: &[u8]) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; LENGTHS_BYTES];
    serde_json::to_writer(&mut bytes, head)?;
    let head_len = bytes.len() - LENGTHS_BYTES;
    let lengths = check(head_len, body.len())?;
    bytes[..4].copy_from_slice(&lengths[0].to_be_bytes());
    bytes[4..LENGTHS_BYTES].copy_from_slice(&lengths[1].to_be_bytes());
    bytes.extend_from_slice(body);
    Ok(bytes)
}

/// Returns the lengths of the head and of the body of a frame that begins with these bytes.
///
/// # Errors
/// Fails if one of them is too long.
pub fn lengths(bytes: [u8; LENGTHS_BYTES]) -> io::Result<(usize, usize)> {
    let [a, b, c, d, e, f, g, h] = bytes;
    let length = |bytes| usize::try_from(u32::from_be_bytes(bytes)).unwrap_or(usize::MAX);
    let (head, body) = (length([a, b, c, d]), length([e, f, g, h]));
    check(head, body)?;
    Ok((head, body))
}

fn check(head: usize, body: usize) -> io::Result<[u32; 2]> {
    if head > MAX_HEAD_BYTES || body > MAX_BODY_BYTES {
        let reason = format!(
            "a message with a head of {head} bytes and a body of {body}: at most {MAX_HEAD_BYTES} and {MAX_BODY_BYTES} are allowed"
        );
        return Err(io::Error::new(io::ErrorKind::InvalidData, reason));
    }
    let length = |len: usize| u32::try_from(len).map_err(io::Error::other);
    Ok([length(head)?, length(body)?])
}

/// Sends a frame.
///
/// # Errors
/// The connection's; `TimedOut` if the other side does not take it.
pub async fn send<T: Serialize>(stream: &mut TcpStream, head: &T, body: &[u8]) -> io::Result<()> {
    let bytes = encode(head, body)?;
    timeout(FRAME_TIMEOUT, stream.write_all(&bytes)).await?
}

/// Receives a frame that begins within `idle`. `None`: the other side has closed the connection.
///
/// # Errors
/// The connection's; `TimedOut` if nothing comes or the frame takes too long; `InvalidData` if it is too long or its head is
/// not what was expected.
pub async fn receive<T: DeserializeOwned>(
    stream: &mut TcpStream,
    idle: Duration,
) -> io::Result<Option<(T, Vec<u8>)>> {
    let mut bytes = [0; LENGTHS_BYTES];
    if timeout(idle, stream.read(&mut bytes[..1])).await?? == 0 {
        return Ok(None);
    }
    let rest = async {
        stream.read_exact(&mut bytes[1..]).await?;
        let (head, body) = lengths(bytes)?;
        let head = exactly(stream, head).await?;
        let body = exactly(stream, body).await?;
        Ok::<_, io::Error>((serde_json::from_slice(&head)?, body))
    };
    timeout(FRAME_TIMEOUT, rest).await?.map(Some)
}

/// Reads so many bytes into memory that grows as they come.
async fn exactly(stream: &mut TcpStream, len: usize) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let read = stream.take(len as u64).read_to_end(&mut bytes).await?;
    if read < len {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_are_bounded_on_both_sides() {
        let bytes = encode(&Call::Status, &[7; 3]).unwrap();
        let (head, body) = lengths(bytes[..LENGTHS_BYTES].try_into().unwrap()).unwrap();
        assert_eq!((LENGTHS_BYTES + head + body, body), (bytes.len(), 3));
        assert!(encode(&Call::Status, &vec![0; MAX_BODY_BYTES + 1]).is_err());
        assert!(encode(&"x".repeat(MAX_HEAD_BYTES), &[]).is_err());
        assert!(lengths([0xff; LENGTHS_BYTES]).is_err());
        assert!(lengths([0, 0, 0, 1, 0x7f, 0, 0, 0]).is_err());
    }
}
