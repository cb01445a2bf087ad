//! A client of the cluster, which waits for each answer on the thread that asks.

use std::io::{self, Read as _, Write as _};
use std::net::{TcpStream, ToSocketAddrs as _};
use std::time::{Duration, Instant};

use crate::wire::{self, Call, LENGTHS_BYTES, Read, Reply, Status};

/// The pause before all nodes were asked in vain and are asked again.
const PAUSE: Duration = Duration::from_millis(50);

/// The reason why a client has no answer.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nothing was done.
    #[error("refused: {reason}")]
    Refused {
        /// The reason.
        reason: String,
    },
    /// No node has answered in time. A change may have been made or not, now or later.
    #[error("no answer within {limit:?}; the last attempt: {last}")]
    TimedOut {
        /// The time that was allowed.
        limit: Duration,
        /// The words of the last node.
        last: String,
    },
    /// The answer is to another question.
    #[error("unexpected answer: {reply}")]
    Unexpected {
        /// The answer.
        reply: String,
    },
}

/// A connection to one node of a cluster, the leader when it was found.
pub struct Client {
    nodes: Vec<String>,
    limit: Duration,
    /// The node that is asked next.
    target: String,
    stream: Option<TcpStream>,
}

impl Client {
    /// Makes a client of the nodes at these addresses, which asks for at most `limit`.
    ///
    /// # Panics
    /// Panics without an address.
    #[must_use]
    pub fn new(nodes: &[String], limit: Duration) -> Client {
        Client {
            nodes: nodes.to_vec(),
            limit,
            target: nodes
                .first()
                .expect("a client needs the address of a node")
                .clone(),
            stream: None,
        }
    }

    /// Sets a key and returns the index of the log entry. It is asked again until a leader acknowledges it, so the change may
    /// be made more than once, and a late repetition may come after another client's change of the same key.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn put(&mut self, key: &str, value: &str) -> Result<u64, ClientError> {
        let (key, value) = (key.to_owned(), value.to_owned());
        self.change(&Call::Put { key, value })
    }

    /// Removes a key, as [`Client::put`] sets one.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn delete(&mut self, key: &str) -> Result<u64, ClientError> {
        self.change(&Call::Delete {
            key: key.to_owned(),
        })
    }

    /// Adds a node that gets the log and does not vote, and returns the index of the log entry.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn add_learner(&mut self, id: u64, address: &str) -> Result<u64, ClientError> {
        let address = address.to_owned();
        self.change(&Call::AddLearner { id, address })
    }

    /// Makes these nodes the voters, and returns the index of the log entry.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn change_membership(&mut self, voters: &[u64]) -> Result<u64, ClientError> {
        let voters = voters.to_vec();
        self.change(&Call::ChangeMembership { voters })
    }

    fn change(&mut self, call: &Call) -> Result<u64, ClientError> {
        match self.ask(call)? {
            Reply::Done { index } => Ok(index),
            other => Err(unexpected(&other)),
        }
    }

    /// Reads a key.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn get(&mut self, key: &str, read: Read) -> Result<Option<String>, ClientError> {
        let key = key.to_owned();
        match self.ask(&Call::Get { key, read })? {
            Reply::Value(value) => Ok(value),
            other => Err(unexpected(&other)),
        }
    }

    /// Asks how the first node that answers is.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn status(&mut self) -> Result<Status, ClientError> {
        self.state_of(&Call::Status)
    }

    /// Makes a cluster of the first node that answers and its peers. It does nothing if there is one.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn init(&mut self) -> Result<Status, ClientError> {
        self.state_of(&Call::Init)
    }

    fn state_of(&mut self, call: &Call) -> Result<Status, ClientError> {
        match self.ask(call)? {
            Reply::Status(status) => Ok(*status),
            other => Err(unexpected(&other)),
        }
    }

    /// Asks the leader, whom the nodes name, until the time is over.
    fn ask(&mut self, call: &Call) -> Result<Reply, ClientError> {
        let until = Instant::now() + self.limit;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            let (next, last) = match self.exchange(call, left) {
                Ok(Reply::NotLeader { leader }) => {
                    let said = format!("{} is not the leader", self.target);
                    (leader.filter(|leader| *leader != self.target), said)
                }
                Ok(Reply::Refused { reason }) => return Err(ClientError::Refused { reason }),
                Ok(Reply::Unknown { reason }) => (None, reason),
                Ok(reply) => return Ok(reply),
                Err(error) => (None, format!("{}: {error}", self.target)),
            };
            if Instant::now() >= until {
                let limit = self.limit;
                return Err(ClientError::TimedOut { limit, last });
            }
            self.stream = None;
            match next {
                Some(leader) => self.target = leader,
                None => {
                    self.target = self.following();
                    std::thread::sleep(PAUSE.min(left));
                }
            }
        }
    }

    /// Returns the node after the one that was asked.
    fn following(&self) -> String {
        let asked = self.nodes.iter().position(|node| *node == self.target);
        let next = asked.map_or(0, |at| (at + 1) % self.nodes.len());
        self.nodes[next].clone()
    }

    fn exchange(&mut self, call: &Call, left: Duration) -> io::Result<Reply> {
        // The standard library takes a limit of zero for none.
        let left = left.max(Duration::from_millis(1));
        let mut stream = match self.stream.take() {
            Some(stream) => stream,
            None => connect(&self.target, left)?,
        };
        stream.set_read_timeout(Some(left))?;
        stream.set_write_timeout(Some(left))?;
        stream.write_all(&wire::encode(call, &[])?)?;
        let mut bytes = [0; LENGTHS_BYTES];
        stream.read_exact(&mut bytes)?;
        let (head, body) = wire::lengths(bytes)?;
        let mut bytes = vec![0; head + body];
        stream.read_exact(&mut bytes)?;
        let reply = serde_json::from_slice(&bytes[..head])?;
        self.stream = Some(stream);
        Ok(reply)
    }
}

fn connect(address: &str, limit: Duration) -> io::Result<TcpStream> {
    let unknown = || io::Error::new(io::ErrorKind::NotFound, "there is no such address");
    let address = address.to_socket_addrs()?.next().ok_or_else(unknown)?;
    let stream = TcpStream::connect_timeout(&address, limit)?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

fn unexpected(reply: &Reply) -> ClientError {
    ClientError::Unexpected {
        reply: format!("{reply:?}"),
    }
}
