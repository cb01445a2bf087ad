//! Three nodes, each a process with an image file: leaders are killed under load, and a node falls behind.

mod common;

use std::collections::BTreeMap;
use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use common::watchdog;
use pumice_bdev_testkit::images::ImageDir;
use pumice_cluster::wire::{self, Call, LENGTHS_BYTES, MAX_VALUE_BYTES, Read, Reply, Status};
use pumice_cluster::{Client, ClientError};

const KILLS: usize = 10;
const WRITERS: usize = 4;
/// Writes that each round must acknowledge after a leader was found, before it is killed.
const WRITES_A_ROUND: usize = 40;
/// The pause between two looks at a condition.
const LOOK: Duration = Duration::from_millis(20);
/// The time for one answer. A condition is looked at until the watchdog ends the test.
const ANSWER: Duration = Duration::from_secs(20);
/// The time after which a node that is looked at counts as not there.
const GLANCE: Duration = Duration::from_millis(500);

/// A process that is killed when it is dropped.
struct Process(Child);

impl Process {
    fn kill(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

struct Cluster {
    addresses: BTreeMap<u64, String>,
    processes: BTreeMap<u64, Process>,
    /// Behind the processes, which are ended before it goes.
    dir: ImageDir,
}

impl Cluster {
    /// Starts nodes 1 to `nodes`. The first three are the peers of `init`.
    fn start(nodes: u64) -> Cluster {
        // The ports stay taken until all are chosen.
        let listeners: Vec<TcpListener> = (0..nodes)
            .map(|_| TcpListener::bind("127.0.0.1:0").unwrap())
            .collect();
        let addresses = listeners
            .iter()
            .map(|l| l.local_addr().unwrap().to_string());
        let addresses = (1..=nodes).zip(addresses).collect();
        drop(listeners);
        let mut cluster = Cluster {
            dir: ImageDir::new().unwrap(),
            addresses,
            processes: BTreeMap::new(),
        };
        for id in 1..=nodes {
            cluster.run(id);
        }
        cluster
    }

    fn run(&mut self, id: u64) {
        let peers = self.addresses.iter().filter(|(id, _)| **id <= 3);
        let peers: Vec<String> = peers
            .map(|(id, address)| format!("{id}={address}"))
            .collect();
        let image = self.dir.path().join(format!("node{id}.img"));
        let child = Command::new(env!("CARGO_BIN_EXE_cluster"))
            .args(["node", "--id", &id.to_string()])
            .args([
                "--device",
                &format!("file://{}?size=512M&create=1", image.display()),
            ])
            .args([
                "--listen",
                &self.addresses[&id],
                "--peers",
                &peers.join(","),
            ])
            .args([
                "--snapshot-every",
                "200",
                "--keep",
                "20",
                "--heartbeat-ms",
                "100",
            ])
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        let process = Process(child);
        self.processes.insert(id, process);
    }

    fn kill(&mut self, id: u64) {
        self.processes.remove(&id).unwrap().kill();
    }

    /// Tells a node to end, which it does in order.
    fn stop(&mut self, id: u64) {
        let mut process = self.processes.remove(&id).unwrap();
        let kill = format!("kill -TERM {}", process.0.id());
        assert!(
            Command::new("sh")
                .args(["-c", &kill])
                .status()
                .unwrap()
                .success()
        );
        assert!(process.0.wait().unwrap().success());
    }

    fn all(&self) -> Vec<String> {
        self.addresses.values().cloned().collect()
    }

    fn client(&self) -> Client {
        Client::new(&self.all(), ANSWER)
    }

    /// Makes a cluster of the first three. The fourth knows only them, and refuses to begin one without itself.
    fn init(&self) {
        let voters: Vec<String> = (1..=3).map(|id| self.addresses[&id].clone()).collect();
        Client::new(&voters, ANSWER).init().unwrap();
    }

    fn status(&self, id: u64) -> Option<Status> {
        let address = std::slice::from_ref(&self.addresses[&id]);
        Client::new(address, GLANCE).status().ok()
    }

    /// Waits for a node that says it is the leader and that another one takes for it.
    fn leader(&self) -> u64 {
        loop {
            let states: Vec<Status> = self
                .processes
                .keys()
                .filter_map(|id| self.status(*id))
                .collect();
            let newest = states.iter().max_by_key(|status| status.term);
            let leads = newest.filter(|status| status.leader.is_some());
            if let Some(leader) = leads.and_then(|status| status.leader) {
                let believers = states.iter().filter(|status| status.leader == Some(leader));
                if believers.count() >= 2
                    && states
                        .iter()
                        .any(|status| status.id == leader && status.role == "leader")
                {
                    return leader;
                }
            }
            std::thread::sleep(LOOK);
        }
    }

    /// Waits until a node has applied at least what the leader has in its log now.
    fn wait_until_applied(&self, ids: &[u64]) {
        let index = self.client().put("barrier", "reached").unwrap();
        for id in ids {
            wait(|| {
                self.status(*id)
                    .is_some_and(|status| status.applied >= Some(index))
            });
        }
    }
}

/// Waits for a condition. The watchdog ends the test if it does not come.
fn wait(condition: impl Fn() -> bool) {
    while !condition() {
        std::thread::sleep(LOOK);
    }
}

/// Waits for a number to grow by so many.
fn wait_for_more(written: &Written, more: usize) {
    let wanted = written.len() + more;
    wait(|| written.len() >= wanted);
}

/// The keys and values that were acknowledged.
#[derive(Default)]
struct Written(Mutex<BTreeMap<String, String>>);

impl Written {
    fn len(&self) -> usize {
        self.0.lock().unwrap().len()
    }
}

/// Puts unique keys until it is told to stop, and reads each one after it was acknowledged.
fn write(mut client: Client, writer: usize, written: &Written, stop: &AtomicBool) {
    for sequence in 0_u64.. {
        if stop.load(Ordering::Relaxed) {
            return;
        }
        let (key, value) = (
            format!("writer{writer}-{sequence:08}"),
            format!("value {sequence} of {writer}"),
        );
        match client.put(&key, &value) {
            Ok(_) => {}
            // Nobody knows whether it was written: no promise was made.
            Err(ClientError::TimedOut { .. }) => continue,
            Err(error) => panic!("{key}: {error}"),
        }
        match client.get(&key, Read::Linearizable) {
            Ok(read) => assert_eq!(
                read.as_deref(),
                Some(&value[..]),
                "{key} was acknowledged before it was read"
            ),
            Err(ClientError::TimedOut { .. } | ClientError::Refused { .. }) => {}
            Err(error) => panic!("{key}: {error}"),
        }
        written.0.lock().unwrap().insert(key, value);
    }
}

/// Every acknowledged write is on every node.
fn check(cluster: &Cluster, ids: &[u64], written: &Written) {
    cluster.wait_until_applied(ids);
    let written = written.0.lock().unwrap();
    for id in ids {
        let mut client = Client::new(std::slice::from_ref(&cluster.addresses[id]), ANSWER);
        for (key, value) in written.iter() {
            let read = client.get(key, Read::Local).unwrap();
            assert_eq!(
                read.as_ref(),
                Some(value),
                "{key} was acknowledged and is not on node {id}"
            );
        }
    }
}

/// Sends what no node or client sends. The node closes the connection, and its process goes on.
fn hostile(address: &str) {
    let connect = || {
        let stream = TcpStream::connect(address).unwrap();
        stream.set_read_timeout(Some(ANSWER)).unwrap();
        stream
    };
    let junk = b"no such call";
    let wrong_head = [&[0, 0, 0, 12, 0, 0, 0, 0][..], junk].concat();
    for bytes in [&[0xff; 64][..], &[0, 0, 0, 1, 0x7f, 0, 0, 0], &wrong_head] {
        let mut stream = connect();
        stream.write_all(bytes).unwrap();
        let mut answer = Vec::new();
        // Bytes that the node has not read make the end a reset.
        let _ = stream.read_to_end(&mut answer);
        assert!(answer.is_empty(), "{answer:?}");
    }
    // Pieces of a snapshot that nobody has announced, and a value that is too long.
    let piece = Call::Piece {
        snapshot_id: "none".to_owned(),
        file: "../current".to_owned(),
        at: 0,
    };
    let long = Call::Put {
        key: "long".to_owned(),
        value: "x".repeat(MAX_VALUE_BYTES + 1),
    };
    for call in [piece, long] {
        let mut stream = connect();
        stream
            .write_all(&wire::encode(&call, b"bytes").unwrap())
            .unwrap();
        let mut bytes = [0; LENGTHS_BYTES];
        stream.read_exact(&mut bytes).unwrap();
        let (head, _) = wire::lengths(bytes).unwrap();
        let mut bytes = vec![0; head];
        stream.read_exact(&mut bytes).unwrap();
        let reply: Reply = serde_json::from_slice(&bytes).unwrap();
        assert!(matches!(reply, Reply::Refused { .. }), "{reply:?}");
    }
}

#[test]
fn killed_leaders_lose_no_acknowledged_write() {
    let _limit = watchdog();
    let mut cluster = Cluster::start(3);
    cluster.init();
    cluster.leader();
    let written = Arc::new(Written::default());
    let stop = Arc::new(AtomicBool::new(false));
    let writers: Vec<_> = (0..WRITERS)
        .map(|writer| {
            let (client, written, stop) =
                (cluster.client(), Arc::clone(&written), Arc::clone(&stop));
            std::thread::spawn(move || write(client, writer, &written, &stop))
        })
        .collect();
    for _ in 0..KILLS {
        wait_for_more(&written, WRITES_A_ROUND);
        let leader = cluster.leader();
        cluster.kill(leader);
        cluster.leader();
        // The others go on without it.
        wait_for_more(&written, WRITES_A_ROUND);
        cluster.run(leader);
    }
    stop.store(true, Ordering::Relaxed);
    for writer in writers {
        writer.join().unwrap();
    }
    check(&cluster, &[1, 2, 3], &written);
    println!(
        "{} writes were acknowledged, {KILLS} leaders killed",
        written.len()
    );
}

#[test]
fn a_node_that_is_behind_gets_a_snapshot_and_members_change() {
    let _limit = watchdog();
    let mut cluster = Cluster::start(4);
    cluster.init();
    let leader = cluster.leader();
    let behind = if leader == 1 { 2 } else { 1 };
    cluster.kill(behind);
    let written = Written::default();
    let mut client = cluster.client();
    for n in 0..500 {
        let (key, value) = (format!("key{n:04}"), format!("value {n}"));
        client.put(&key, &value).unwrap();
        written.0.lock().unwrap().insert(key, value);
    }
    // Its entries are gone from the log.
    wait(|| {
        cluster
            .status(leader)
            .is_some_and(|status| status.purged >= Some(200))
    });
    cluster.run(behind);
    check(&cluster, &[behind], &written);
    assert!(
        cluster.status(behind).unwrap().installed >= 1,
        "it has got the log and not a snapshot"
    );

    // A new node learns by a snapshot, too, and takes the place of the one that leads.
    client.add_learner(4, &cluster.addresses[&4]).unwrap();
    check(&cluster, &[4], &written);
    let leader = cluster.leader();
    let voters: Vec<u64> = (1..=4).filter(|id| *id != leader).collect();
    client.change_membership(&voters).unwrap();
    cluster.kill(leader);
    wait(|| {
        cluster.status(4).is_some_and(|status| {
            status.voters == voters && status.leader.is_some_and(|id| id != leader)
        })
    });
    client.put("after", "the change").unwrap();
    assert_eq!(
        client.get("after", Read::Linearizable).unwrap().as_deref(),
        Some("the change")
    );
    check(&cluster, &voters, &written);

    hostile(&cluster.addresses[&4]);
    assert!(cluster.status(4).is_some());

    // It ends in order when it is told to, and is not started as another node.
    cluster.stop(4);
    let device = format!("file://{}/node4.img", cluster.dir.path().display());
    let refused = Command::new(env!("CARGO_BIN_EXE_cluster"))
        .args([
            "node",
            "--id",
            "5",
            "--device",
            &device,
            "--listen",
            "127.0.0.1:0",
        ])
        .output()
        .unwrap();
    assert!(!refused.status.success());
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(said.contains("the log of node 4"), "{said}");
    cluster.run(4);
    check(&cluster, &[4], &written);
}
