//! What a node does with the calls of other nodes and of clients.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use openraft::error::{CheckIsLeaderError, ClientWriteError, Fatal, ForwardToLeader, RaftError};
use openraft::raft::{ClientWriteResponse, SnapshotResponse};
use openraft::storage::Snapshot;
use openraft::{BasicNode, Vote};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::time::timeout;

use crate::node::{NodeError, Receiving, Replica};
use crate::store::{FileLen, Files};
use crate::wire::{self, Call, MAX_FILES, MAX_KEY_BYTES, MAX_VALUE_BYTES, Read, Reply};
use crate::{KeyChange, NodeId, SnapshotMeta, TypeConfig};

/// The most connections at a time. Further ones wait.
const MAX_CONNECTIONS: usize = 256;
/// A connection on which nothing is asked for so long is closed.
const IDLE_TIMEOUT: Duration = Duration::from_secs(60);
/// The time after which a client is told that the outcome is unknown.
const CLIENT_TIMEOUT: Duration = Duration::from_secs(10);
/// The time after which accepting is tried again, when the process has no descriptor for another connection.
const ACCEPT_RETRY: Duration = Duration::from_millis(100);

/// Answers calls until Raft or the socket fails.
pub async fn serve(node: &Arc<Replica>, listener: TcpListener) -> NodeError {
    let mut metrics = node.raft().metrics();
    let stopped = async move {
        match metrics.wait_for(|now| now.running_state.is_err()).await {
            Ok(now) => now.running_state.clone().err().unwrap_or(Fatal::Stopped),
            Err(_) => Fatal::Stopped,
        }
    };
    tokio::select! {
        fatal = stopped => NodeError::from(fatal),
        source = accept(node, listener) => NodeError::Socket { address: node.address().to_owned(), source },
    }
}

/// Accepts connections until the socket fails for good.
async fn accept(node: &Arc<Replica>, listener: TcpListener) -> io::Error {
    let room = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        let Ok(place) = Arc::clone(&room).acquire_owned().await else {
            return io::Error::other("the server was closed");
        };
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) if is_passing(&error) => {
                tracing::warn!("accepting a connection: {error}");
                tokio::time::sleep(ACCEPT_RETRY).await;
                continue;
            }
            Err(error) => return error,
        };
        let node = Arc::clone(node);
        tokio::spawn(async move {
            if let Err(error) = converse(&node, stream).await {
                tracing::debug!("a connection has ended: {error}");
            }
            drop(place);
        });
    }
}

/// Whether accepting may succeed later: the other side has gone, or there are too many open files.
fn is_passing(error: &io::Error) -> bool {
    const ENFILE: i32 = 23;
    const EMFILE: i32 = 24;
    let kinds = [
        io::ErrorKind::ConnectionAborted,
        io::ErrorKind::ConnectionReset,
        io::ErrorKind::Interrupted,
    ];
    kinds.contains(&error.kind()) || matches!(error.raw_os_error(), Some(ENFILE | EMFILE))
}

/// Answers the calls of a connection.
async fn converse(node: &Arc<Replica>, mut stream: TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    while let Some((call, body)) = wire::receive(&mut stream, IDLE_TIMEOUT).await? {
        let reply = node.answer(call, body).await;
        wire::send(&mut stream, &reply, &[]).await?;
    }
    Ok(())
}

fn refused(reason: &impl ToString) -> Reply {
    let reason = reason.to_string();
    Reply::Refused { reason }
}

fn not_leader(forward: &ForwardToLeader<NodeId, BasicNode>) -> Reply {
    let leader = forward.leader_node.as_ref();
    Reply::NotLeader {
        leader: leader.map(|node| node.addr.clone()),
    }
}

type Written =
    Result<ClientWriteResponse<TypeConfig>, RaftError<NodeId, ClientWriteError<NodeId, BasicNode>>>;

fn written(result: Written) -> Reply {
    match result {
        Ok(done) => Reply::Done {
            index: done.log_id.index,
        },
        Err(RaftError::APIError(ClientWriteError::ForwardToLeader(forward))) => {
            not_leader(&forward)
        }
        Err(RaftError::APIError(ClientWriteError::ChangeMembershipError(error))) => refused(&error),
        Err(RaftError::Fatal(fatal)) => Reply::Unknown {
            reason: fatal.to_string(),
        },
    }
}

/// Waits for what a client has asked for, but not for ever.
async fn limited(work: impl Future<Output = Reply>) -> Reply {
    match timeout(CLIENT_TIMEOUT, work).await {
        Ok(reply) => reply,
        Err(_) => Reply::Unknown {
            reason: format!(
                "it has taken more than {CLIENT_TIMEOUT:?}: is a majority of the nodes running?"
            ),
        },
    }
}

impl Replica {
    async fn answer(self: &Arc<Replica>, call: Call, body: Vec<u8>) -> Reply {
        match call {
            Call::Append(request) => Reply::Append(self.raft().append_entries(request).await),
            Call::Vote(request) => Reply::Vote(self.raft().vote(request).await),
            Call::Begin { snapshot_id, files } => self.begin(snapshot_id, files).await,
            Call::Piece {
                snapshot_id,
                file,
                at,
            } => self.piece(&snapshot_id, &file, at, body).await,
            Call::Install { vote, meta } => self.install(vote, meta).await,
            Call::Put { key, value } => self.write(KeyChange::Put { key, value }).await,
            Call::Delete { key } => self.write(KeyChange::Delete { key }).await,
            Call::Get { key, read } => limited(self.read(key, read)).await,
            Call::Status => Reply::Status(Box::new(self.status())),
            Call::Init => match self.init().await {
                Ok(()) => Reply::Status(Box::new(self.status())),
                Err(error) => refused(&error),
            },
            Call::AddLearner { id, address } => {
                let added = self.raft().add_learner(id, BasicNode::new(address), false);
                limited(async { written(added.await) }).await
            }
            Call::ChangeMembership { voters } => {
                let voters: std::collections::BTreeSet<NodeId> = voters.into_iter().collect();
                let changed = self.raft().change_membership(voters, false);
                limited(async { written(changed.await) }).await
            }
        }
    }

    async fn write(&self, change: KeyChange) -> Reply {
        let (key, value_bytes) = match &change {
            KeyChange::Put { key, value } => (key, value.len()),
            KeyChange::Delete { key } => (key, 0),
        };
        if key.len() > MAX_KEY_BYTES || value_bytes > MAX_VALUE_BYTES {
            let reason = format!(
                "a key of {} bytes with a value of {value_bytes}: at most {MAX_KEY_BYTES} and {MAX_VALUE_BYTES} are allowed",
                key.len()
            );
            return refused(&reason);
        }
        limited(async { written(self.raft().client_write(change).await) }).await
    }

    async fn read(&self, key: String, read: Read) -> Reply {
        if read == Read::Linearizable {
            match self.raft().ensure_linearizable().await {
                Ok(_) => {}
                Err(RaftError::APIError(CheckIsLeaderError::ForwardToLeader(forward))) => {
                    return not_leader(&forward);
                }
                Err(error) => return refused(&error),
            }
        }
        match self.state().get(key).await {
            Ok(value) => Reply::Value(value),
            Err(error) => refused(&error),
        }
    }

    /// Takes the announcement of a snapshot. One that was not completed is given up.
    async fn begin(&self, snapshot_id: String, announced: Vec<FileLen>) -> Reply {
        if announced.len() > MAX_FILES {
            return refused(&format!(
                "a snapshot of {} files: at most {MAX_FILES} are allowed",
                announced.len()
            ));
        }
        let mut receiving = self.receiving.lock().await;
        if let Some(old) = receiving.take() {
            // Its files are removed. It does not matter if that fails: the next start tries again.
            let _ = tokio::task::spawn_blocking(move || drop(old)).await;
        }
        match self.raft().begin_receiving_snapshot().await {
            Ok(files) => {
                *receiving = Some(Receiving {
                    snapshot_id,
                    files,
                    announced,
                });
                Reply::Taken
            }
            Err(error) => refused(&error),
        }
    }

    async fn piece(&self, snapshot_id: &str, file: &str, at: u64, bytes: Vec<u8>) -> Reply {
        let receiving = self.receiving.lock().await;
        let Some(current) = receiving.as_ref().filter(|r| r.snapshot_id == snapshot_id) else {
            return refused(&format!(
                "snapshot {snapshot_id} was not begun, or another one was begun since"
            ));
        };
        let end = at.saturating_add(bytes.len() as u64);
        let fits = |announced: &FileLen| announced.name == file && end <= announced.len_bytes;
        if !current.announced.iter().any(fits) {
            return refused(&format!("{file} up to byte {end} was not announced"));
        }
        match current.files.append(file, at, bytes).await {
            Ok(()) => Reply::Taken,
            Err(error) => refused(&error),
        }
    }

    /// Gives Raft the snapshot that was received. It goes on when the connection ends.
    async fn install(self: &Arc<Replica>, vote: Vote<NodeId>, meta: SnapshotMeta) -> Reply {
        let received = self.receiving.lock().await.take();
        let Some(received) = received.filter(|r| r.snapshot_id == meta.snapshot_id) else {
            return refused(&format!(
                "snapshot {} was not begun, or another one was begun since",
                meta.snapshot_id
            ));
        };
        // What does not fit is refused here: an error of the state machine would stop Raft.
        if let Err(error) = received.files.complete(received.announced).await {
            return refused(&error);
        }
        if let Err(error) = self.state().check(&received.files, &meta).await {
            return refused(&error);
        }
        let node = Arc::clone(self);
        let task = tokio::spawn(async move { node.hand_over(vote, meta, received.files).await });
        match task.await {
            Ok(result) => Reply::Installed(result),
            Err(error) => refused(&error),
        }
    }

    async fn hand_over(
        &self,
        vote: Vote<NodeId>,
        meta: SnapshotMeta,
        snapshot: Box<Files>,
    ) -> Result<SnapshotResponse<NodeId>, Fatal<NodeId>> {
        let announced = self.state().announce_install();
        let answer = self
            .raft()
            .install_full_snapshot(vote, Snapshot { meta, snapshot })
            .await;
        drop(announced);
        answer
    }
}
