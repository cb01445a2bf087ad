//! A node of a replicated key-value store, and its client.

#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::io::Write as _;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};
use pumice::MountOptions;
use pumice_cluster::wire::Read;
use pumice_cluster::{
    Client, ClientError, NodeError, NodeOptions, Replica, StoreError, StoreOptions, serve,
};
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;

/// Threads that wait for the device.
const BLOCKING_THREADS: usize = 16;

/// A replicated key-value store on Pumice.
#[derive(Parser)]
#[command(name = "cluster", version)]
struct ClusterCli {
    #[command(subcommand)]
    command: ClusterCommand,
}

#[derive(Subcommand)]
enum ClusterCommand {
    /// Runs a node.
    Node(NodeArgs),
    /// Makes a cluster of a node and its peers, once.
    Init(ClientArgs),
    /// Shows how each node is, as JSON, a line each.
    Status(ClientArgs),
    /// Sets a key.
    Put {
        #[command(flatten)]
        client: ClientArgs,
        key: String,
        value: String,
    },
    /// Prints the value of a key. The exit code is 1 if it has none.
    Get {
        #[command(flatten)]
        client: ClientArgs,
        /// Reads what the first node has applied, and does not ask the leader.
        #[arg(long)]
        local: bool,
        key: String,
    },
    /// Removes a key.
    Delete {
        #[command(flatten)]
        client: ClientArgs,
        key: String,
    },
    /// Adds a node that gets the log and does not vote.
    AddLearner {
        #[command(flatten)]
        client: ClientArgs,
        id: u64,
        address: String,
    },
    /// Makes these nodes the voters. Others leave the cluster.
    ChangeMembership {
        #[command(flatten)]
        client: ClientArgs,
        #[arg(required = true)]
        voters: Vec<u64>,
    },
}

#[derive(Args)]
struct ClientArgs {
    /// Addresses of nodes, separated by commas.
    #[arg(long, value_delimiter = ',', required = true)]
    nodes: Vec<String>,
    /// Seconds to wait for an answer.
    #[arg(long, default_value_t = 10)]
    timeout_s: u64,
}

impl ClientArgs {
    fn client(&self) -> Client {
        Client::new(&self.nodes, Duration::from_secs(self.timeout_s))
    }
}

#[derive(Args)]
struct NodeArgs {
    /// The id of the node. The device keeps it.
    #[arg(long)]
    id: u64,
    /// The device: file:///path/node1.img?size=1G&create=1, file:///dev/nvme0n1, …
    #[arg(long)]
    device: String,
    /// The address on which clients and other nodes ask it.
    #[arg(long)]
    listen: String,
    /// The first members of the cluster with this one, as ID=ADDRESS, separated by commas. `init` makes a cluster of them.
    #[arg(long, value_delimiter = ',', value_parser = peer)]
    peers: Vec<(u64, String)>,
    /// Log entries after which the next snapshot is made.
    #[arg(long, default_value_t = 10_000, value_parser = clap::value_parser!(u64).range(1..))]
    snapshot_every: u64,
    /// Log entries that are kept although the snapshot has them, for nodes that are a little behind.
    #[arg(long, default_value_t = 1_000)]
    keep: u64,
    /// Milliseconds between heartbeats. An election begins after four to six of them.
    #[arg(long, default_value_t = 250, value_parser = clap::value_parser!(u64).range(10..=60_000))]
    heartbeat_ms: u64,
    /// Shows what Raft says about its work.
    #[arg(long)]
    verbose: bool,
}

fn peer(text: &str) -> Result<(u64, String), String> {
    let (id, address) = text
        .split_once('=')
        .ok_or("it is not of the form ID=ADDRESS")?;
    let id = id.parse().map_err(|e| format!("the id {id:?}: {e}"))?;
    Ok((id, address.to_owned()))
}

fn main() -> ExitCode {
    let result = match ClusterCli::parse().command {
        ClusterCommand::Node(args) => run_node(args),
        command => run_client(command),
    };
    result.unwrap_or_else(|error| {
        let _ = writeln!(std::io::stderr(), "cluster: {}", pumice::chain(&*error));
        ExitCode::FAILURE
    })
}

/// Writes warnings to standard error. Openraft repeats its own for each call to a node that is not there.
fn log(verbose: bool) {
    let openraft = if verbose {
        LevelFilter::INFO
    } else {
        LevelFilter::OFF
    };
    let targets = Targets::new()
        .with_default(LevelFilter::WARN)
        .with_target("openraft", openraft);
    let lines = tracing_subscriber::fmt::layer().with_writer(std::io::stderr);
    tracing_subscriber::registry()
        .with(lines)
        .with(targets)
        .init();
}

fn run_node(args: NodeArgs) -> Result<ExitCode, Box<dyn std::error::Error>> {
    log(args.verbose);
    let socket = |source| NodeError::Socket {
        address: args.listen.clone(),
        source,
    };
    let fs = pumice::mount(&args.device, &MountOptions::new()).map_err(StoreError::from)?;
    let options = NodeOptions {
        id: args.id,
        listen: args.listen.clone(),
        peers: args.peers.into_iter().collect::<BTreeMap<_, _>>(),
        snapshot_every: args.snapshot_every,
        keep: args.keep,
        heartbeat_ms: args.heartbeat_ms,
        store: StoreOptions::default(),
    };
    let mut runtime = tokio::runtime::Builder::new_multi_thread();
    let runtime = runtime
        .enable_all()
        .max_blocking_threads(BLOCKING_THREADS)
        .build()
        .map_err(socket)?;
    let ended = runtime.block_on(async {
        let mut terminated = signal(SignalKind::terminate()).map_err(socket)?;
        let mut interrupted = signal(SignalKind::interrupt()).map_err(socket)?;
        let listener = TcpListener::bind(&args.listen).await.map_err(socket)?;
        let node = Replica::start(fs.clone(), options).await?;
        let ended = tokio::select! {
            error = serve(&node, listener) => Err(error),
            _ = terminated.recv() => Ok(()),
            _ = interrupted.recv() => Ok(()),
        };
        node.stop().await;
        ended
    });
    // The databases are closed with the last task that has them.
    drop(runtime);
    let unmounted = fs.unmount().map_err(StoreError::from);
    ended?;
    unmounted?;
    Ok(ExitCode::SUCCESS)
}

fn run_client(command: ClusterCommand) -> Result<ExitCode, Box<dyn std::error::Error>> {
    let mut out = std::io::stdout().lock();
    match command {
        ClusterCommand::Node(_) => {}
        ClusterCommand::Init(args) => {
            writeln!(out, "{}", serde_json::to_string(&args.client().init()?)?)?;
        }
        ClusterCommand::Status(args) => {
            for node in &args.nodes {
                let limit = Duration::from_secs(args.timeout_s);
                let status = Client::new(std::slice::from_ref(node), limit).status();
                match status {
                    Ok(status) => writeln!(out, "{}", serde_json::to_string(&status)?)?,
                    Err(error) => writeln!(
                        out,
                        "{}",
                        serde_json::json!({ "address": node, "error": error.to_string() })
                    )?,
                }
            }
        }
        ClusterCommand::Put { client, key, value } => {
            done(&mut out, client.client().put(&key, &value))?;
        }
        ClusterCommand::Get { client, local, key } => {
            let read = if local {
                Read::Local
            } else {
                Read::Linearizable
            };
            match client.client().get(&key, read)? {
                Some(value) => writeln!(out, "{value}")?,
                None => return Ok(ExitCode::FAILURE),
            }
        }
        ClusterCommand::Delete { client, key } => done(&mut out, client.client().delete(&key))?,
        ClusterCommand::AddLearner {
            client,
            id,
            address,
        } => done(&mut out, client.client().add_learner(id, &address))?,
        ClusterCommand::ChangeMembership { client, voters } => {
            done(&mut out, client.client().change_membership(&voters))?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn done(
    out: &mut impl std::io::Write,
    index: Result<u64, ClientError>,
) -> Result<(), Box<dyn std::error::Error>> {
    Ok(writeln!(out, "done, entry {}", index?)?)
}
