//! How a node speaks to the others.

use std::future::Future;
use std::io;
use std::time::Duration;

use openraft::error::{
    Fatal, NetworkError, RPCError, RaftError, RemoteError, ReplicationClosed, StreamingError,
    Unreachable,
};
use openraft::network::{Backoff, RPCOption, RaftNetwork, RaftNetworkFactory};
use openraft::raft::{
    AppendEntriesRequest, AppendEntriesResponse, SnapshotResponse, VoteRequest, VoteResponse,
};
use openraft::storage::Snapshot;
use openraft::{BasicNode, ErrorSubject, ErrorVerb, OptionalSend, Vote};
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::wire::{self, Call, MAX_BODY_BYTES, Reply};
use crate::{NodeId, TypeConfig};

/// The time to connect.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// The time that a node may take for a piece of a snapshot.
const PIECE_TIMEOUT: Duration = Duration::from_secs(20);
/// The time that a node may take to install a snapshot.
const INSTALL_TIMEOUT: Duration = Duration::from_secs(60);
/// The time between attempts to reach a node that is not there.
const RETRY: Duration = Duration::from_millis(100);

/// Makes connections to nodes.
pub struct Network;

impl RaftNetworkFactory<TypeConfig> for Network {
    type Network = Peer;

    async fn new_client(&mut self, target: NodeId, node: &BasicNode) -> Peer {
        Peer {
            id: target,
            address: node.addr.clone(),
            stream: None,
        }
    }
}

/// A node, with a connection to it if there is one.
pub struct Peer {
    id: NodeId,
    address: String,
    stream: Option<TcpStream>,
}

/// The reason why there is no answer.
enum CallError {
    /// There is no connection.
    Unreachable(io::Error),
    /// The connection broke, or the answer did not come or was not one.
    Broken(io::Error),
}

impl From<CallError> for StreamingError<TypeConfig, Fatal<NodeId>> {
    fn from(error: CallError) -> Self {
        match error {
            CallError::Unreachable(error) => Unreachable::new(&error).into(),
            CallError::Broken(error) => NetworkError::new(&error).into(),
        }
    }
}

type RpcError = RPCError<NodeId, BasicNode, RaftError<NodeId>>;

impl From<CallError> for RpcError {
    fn from(error: CallError) -> Self {
        match error {
            CallError::Unreachable(error) => Unreachable::new(&error).into(),
            CallError::Broken(error) => NetworkError::new(&error).into(),
        }
    }
}

impl Peer {
    /// Makes a call. The future may be dropped at any time: the connection is closed then.
    async fn call(
        &mut self,
        call: &Call,
        body: &[u8],
        limit: Duration,
    ) -> Result<Reply, CallError> {
        let mut stream = match self.stream.take() {
            Some(stream) => stream,
            None => connect(&self.address)
                .await
                .map_err(CallError::Unreachable)?,
        };
        let exchange = async {
            wire::send(&mut stream, call, body).await?;
            let reply = wire::receive(&mut stream, limit).await?;
            reply.ok_or_else(|| io::Error::from(io::ErrorKind::UnexpectedEof))
        };
        let (reply, _) = exchange.await.map_err(CallError::Broken)?;
        self.stream = Some(stream);
        Ok(reply)
    }

    fn unexpected(&self, reply: &Reply) -> CallError {
        let reason = format!("node {} at {} answers {reply:?}", self.id, self.address);
        CallError::Broken(io::Error::other(reason))
    }

    async fn expect_taken(&mut self, call: &Call, body: &[u8]) -> Result<(), CallError> {
        match self.call(call, body, PIECE_TIMEOUT).await? {
            Reply::Taken => Ok(()),
            other => Err(self.unexpected(&other)),
        }
    }

    /// Sends a snapshot file by file, in pieces.
    async fn send_snapshot(
        &mut self,
        vote: Vote<NodeId>,
        snapshot: &Snapshot<TypeConfig>,
    ) -> Result<SnapshotResponse<NodeId>, StreamingError<TypeConfig, Fatal<NodeId>>> {
        let files = &snapshot.snapshot;
        let meta = &snapshot.meta;
        let failed = |error: crate::StoreError| {
            let subject = ErrorSubject::Snapshot(Some(meta.signature()));
            StreamingError::StorageError(error.raft(subject, ErrorVerb::Read))
        };
        let list = files.list().await.map_err(failed)?;
        let begin = Call::Begin {
            snapshot_id: meta.snapshot_id.clone(),
            files: list.clone(),
        };
        self.expect_taken(&begin, &[]).await?;
        for file in &list {
            let mut at = 0;
            loop {
                let piece = files
                    .read(&file.name, at, MAX_BODY_BYTES)
                    .await
                    .map_err(failed)?;
                let call = Call::Piece {
                    snapshot_id: meta.snapshot_id.clone(),
                    file: file.name.clone(),
                    at,
                };
                self.expect_taken(&call, &piece).await?;
                at += piece.len() as u64;
                // An empty file is sent as one empty piece.
                if piece.is_empty() || at >= file.len_bytes {
                    break;
                }
            }
        }
        let install = Call::Install {
            vote,
            meta: meta.clone(),
        };
        match self.call(&install, &[], INSTALL_TIMEOUT).await? {
            Reply::Installed(result) => {
                Ok(result.map_err(|fatal| RemoteError::new(self.id, fatal))?)
            }
            other => Err(self.unexpected(&other).into()),
        }
    }
}

async fn connect(address: &str) -> io::Result<TcpStream> {
    let stream = timeout(CONNECT_TIMEOUT, TcpStream::connect(address)).await??;
    stream.set_nodelay(true)?;
    Ok(stream)
}

impl RaftNetwork<TypeConfig> for Peer {
    async fn append_entries(
        &mut self,
        request: AppendEntriesRequest<TypeConfig>,
        option: RPCOption,
    ) -> Result<AppendEntriesResponse<NodeId>, RpcError> {
        let reply = self
            .call(&Call::Append(request), &[], option.hard_ttl())
            .await?;
        match reply {
            Reply::Append(result) => Ok(result.map_err(|error| RemoteError::new(self.id, error))?),
            other => Err(self.unexpected(&other).into()),
        }
    }

    async fn vote(
        &mut self,
        request: VoteRequest<NodeId>,
        option: RPCOption,
    ) -> Result<VoteResponse<NodeId>, RpcError> {
        let reply = self
            .call(&Call::Vote(request), &[], option.hard_ttl())
            .await?;
        match reply {
            Reply::Vote(result) => Ok(result.map_err(|error| RemoteError::new(self.id, error))?),
            other => Err(self.unexpected(&other).into()),
        }
    }

    async fn full_snapshot(
        &mut self,
        vote: Vote<NodeId>,
        snapshot: Snapshot<TypeConfig>,
        cancel: impl Future<Output = ReplicationClosed> + OptionalSend + 'static,
        _option: RPCOption,
    ) -> Result<SnapshotResponse<NodeId>, StreamingError<TypeConfig, Fatal<NodeId>>> {
        tokio::select! {
            closed = cancel => Err(closed.into()),
            sent = self.send_snapshot(vote, &snapshot) => sent,
        }
    }

    fn backoff(&self) -> Backoff {
        Backoff::new(std::iter::repeat(RETRY))
    }
}
