//! The followers of `examples/cpp-server`.

mod common;

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use common::redis::{Client, Server, Value, program, wait_for};
use pumice_bdev_testkit::images::ImageDir;

/// A leader and the place of its followers.
struct Pair {
    _dir: ImageDir,
    program: &'static Path,
    leader_image: PathBuf,
    image: PathBuf,
}

impl Pair {
    /// Returns `None` without a compiler.
    fn new(test: &str) -> Option<Pair> {
        let program = program(test)?;
        let dir = ImageDir::new().unwrap();
        Some(Pair {
            program,
            leader_image: dir.path().join("leader.img"),
            image: dir.path().join("follower.img"),
            _dir: dir,
        })
    }

    fn lead(&self, more: &[&str]) -> Server {
        Server::start(self.program, &self.leader_image, more)
    }

    fn follow(&self, port: u16) -> Server {
        let leader = format!("--follow=127.0.0.1:{port}");
        Server::start(self.program, &self.image, &["--sync=os", &leader])
    }
}

/// Waits until a follower has applied what its leader has written.
fn catches_up(leader: &mut Client, follower: &mut Client) {
    let target = leader.info("sequence");
    wait_for("the follower catches up", || {
        follower.info("master_link_status") == "up" && follower.info("applied_sequence") == target
    });
}

/// Returns all keys with their values, of databases 0 and 3.
fn content(client: &mut Client) -> Vec<(String, Value)> {
    let mut content = Vec::new();
    for database in [0, 3] {
        client.call(&format!("SELECT {database}"));
        let Value::Array(reply) = client.call("SCAN 0 COUNT 100000") else {
            panic!("SCAN gives an array")
        };
        assert_eq!(reply[0], Value::bulk("0"));
        let Value::Array(keys) = &reply[1] else {
            panic!("SCAN gives keys")
        };
        for key in keys {
            let value = client.call(&format!("GET {}", key.text()));
            content.push((format!("{database}/{}", key.text()), value));
        }
    }
    client.call("SELECT 0");
    content
}

fn same(leader: &mut Client, follower: &mut Client, least: usize) {
    catches_up(leader, follower);
    let (there, here) = (content(leader), content(follower));
    assert!(there.len() >= least, "the leader has {}", there.len());
    assert!(
        there == here,
        "{} keys there, {} here",
        there.len(),
        here.len()
    );
}

fn fill(client: &mut Client, prefix: &str, count: usize) {
    for n in 0..count {
        client.call(&format!("SET {prefix}:{n} {n}"));
    }
}

#[test]
fn a_follower_gets_every_kind_of_write_and_refuses_its_own() {
    let Some(pair) = Pair::new("a_follower_gets_every_kind_of_write") else {
        return;
    };
    let leader = pair.lead(&[]);
    let mut l = leader.client();
    fill(&mut l, "before", 100);
    let follower = pair.follow(leader.port);
    let mut f = follower.client();
    same(&mut l, &mut f, 100);
    assert_eq!(f.info("role"), "slave");
    for write in [
        "SET a 1",
        "MSET a 1",
        "DEL a",
        "INCR a",
        "INCRBY a 1",
        "FLUSHDB",
        "FLUSHALL",
    ] {
        assert!(f.call(write).text().starts_with("READONLY"), "{write}");
    }
    l.call("SELECT 3");
    l.call("MSET a 1 b 2 c 3");
    l.call("DEL b");
    l.call("INCR a");
    l.call(&format!("SET large {}", "x".repeat(100_000)));
    l.call("SET timed 1 EX 1000");
    same(&mut l, &mut f, 104);
    f.call("SELECT 3");
    assert!(matches!(f.call("TTL timed"), Value::Integer(1..=1000)));
    l.call("FLUSHDB");
    same(&mut l, &mut f, 0);
    assert_ne!(l.info("master_replid"), f.info("master_replid"));
    // The leader ends in order although it is followed.
    assert!(leader.stop().success());
    wait_for("the follower sees it", || {
        f.info("master_link_status") == "down"
    });
    assert!(follower.stop().success());
}

/// A follower that was away goes on where it was, also if it and its leader were killed.
#[test]
fn a_follower_goes_on_after_kills() {
    let Some(pair) = Pair::new("a_follower_goes_on_after_kills") else {
        return;
    };
    let mut leader = pair.lead(&[]);
    for round in 0..5 {
        let follower = pair.follow(leader.port);
        let mut l = leader.client();
        let mut f = follower.client();
        fill(&mut l, &format!("round{round}"), 50);
        catches_up(&mut l, &mut f);
        if round == 2 {
            leader.kill();
            leader = pair.lead(&[]);
        }
        follower.kill();
        fill(&mut leader.client(), &format!("away{round}"), 20);
    }
    let follower = pair.follow(leader.port);
    same(&mut leader.client(), &mut follower.client(), 350);
}

/// A follower is killed again and again while it applies. Its position and what it has applied are one.
#[test]
fn a_follower_that_is_killed_while_it_applies_has_everything_once() {
    let Some(pair) = Pair::new("a_follower_that_is_killed_while_it_applies") else {
        return;
    };
    let leader = pair.lead(&["--sync=os"]);
    let (stop, sum) = (AtomicBool::new(false), AtomicU64::new(0));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut l = leader.client();
            while !stop.load(Ordering::Relaxed) {
                l.call("INCR sum");
                let n = sum.fetch_add(1, Ordering::Relaxed);
                l.call(&format!("SET key:{} {n}", n % 500));
            }
        });
        for _ in 0..8 {
            let follower = pair.follow(leader.port);
            let mut f = follower.client();
            let at: u64 = f.info("applied_sequence").parse().unwrap();
            wait_for("it applies", || {
                f.info("applied_sequence").parse::<u64>().unwrap() > at + 100
            });
            follower.kill();
        }
        stop.store(true, Ordering::Relaxed);
    });
    let follower = pair.follow(leader.port);
    let (mut l, mut f) = (leader.client(), follower.client());
    same(&mut l, &mut f, 501);
    assert_eq!(
        f.call("GET sum"),
        Value::bulk(&sum.load(Ordering::Relaxed).to_string())
    );
}

/// A follower copies everything from a leader that it does not know, and loses what that does not have.
#[test]
fn a_follower_of_another_leader_becomes_its_copy() {
    let Some(pair) = Pair::new("a_follower_of_another_leader") else {
        return;
    };
    let leader = pair.lead(&[]);
    fill(&mut leader.client(), "old", 30);
    let follower = pair.follow(leader.port);
    same(&mut leader.client(), &mut follower.client(), 30);
    follower.kill();
    leader.kill();
    std::fs::remove_file(&pair.leader_image).unwrap();
    let leader = pair.lead(&[]);
    let mut l = leader.client();
    fill(&mut l, "new", 40);
    let follower = pair.follow(leader.port);
    let mut f = follower.client();
    same(&mut l, &mut f, 40);
    assert_eq!(f.call("GET old:1"), Value::Null);
}

/// A follower asks what its leader's logs do not have any longer.
#[test]
fn a_follower_that_was_away_too_long_copies_everything() {
    let Some(pair) = Pair::new("a_follower_that_was_away_too_long") else {
        return;
    };
    // Logs go as soon as their writes are in tables.
    let logs = ["--log-seconds=0", "--log-mib=0", "--sync=os"];
    let mut leader = pair.lead(&logs);
    fill(&mut leader.client(), "old", 30);
    let follower = pair.follow(leader.port);
    same(&mut leader.client(), &mut follower.client(), 30);
    follower.kill();
    fill(&mut leader.client(), "away", 30);
    leader.client().call("DEL old:1");
    // A start writes what the logs have to tables, and removes them.
    for _ in 0..2 {
        assert!(leader.stop().success());
        leader = pair.lead(&logs);
        fill(&mut leader.client(), "later", 3);
    }
    let follower = pair.follow(leader.port);
    let (mut l, mut f) = (leader.client(), follower.client());
    same(&mut l, &mut f, 62);
    assert_eq!(f.call("GET old:1"), Value::Null);
}

/// A copy has no position until everything is there: a follower that is killed meanwhile begins again.
#[test]
fn a_copy_has_a_position_when_it_is_whole() {
    let Some(pair) = Pair::new("a_copy_has_a_position_when_it_is_whole") else {
        return;
    };
    let leader = pair.lead(&["--sync=os"]);
    let mut c = leader.client();
    for n in 0..100 {
        c.call(&format!("SET {n} {}", "x".repeat(50_000)));
    }
    let (identity, sequence) = (c.info("master_replid"), c.info("sequence"));
    assert_eq!(c.call("FOLLOW none 0"), Value::array(&["RESET"]));
    for batches in 1.. {
        let Value::Array(message) = c.receive().unwrap() else {
            panic!("messages are arrays")
        };
        if message[0].text() == "AT" {
            continue;
        }
        if message[1].text() == identity {
            assert_eq!(message[2].text(), sequence);
            assert!(batches > 4, "5 MB are more than {batches} batches");
            break;
        }
        assert_eq!(
            (message[1].text(), message[2].text()),
            (String::new(), "0".to_owned())
        );
    }
}

/// The leader's side of the protocol, and a leader that talks nonsense.
#[test]
fn neither_side_trusts_the_other() {
    let Some(pair) = Pair::new("neither_side_trusts_the_other") else {
        return;
    };
    let leader = pair.lead(&[]);
    let mut c = leader.client();
    fill(&mut c, "k", 3);
    assert!(matches!(c.call("FOLLOW x y"), Value::Error(_)));
    assert!(matches!(c.call("FOLLOW x -1"), Value::Error(_)));
    // A position that the leader has never had.
    let identity = c.info("master_replid");
    assert_eq!(
        c.call(&format!("FOLLOW {identity} 999999")),
        Value::array(&["RESET"])
    );
    let Value::Array(batch) = c.receive().unwrap() else {
        panic!("a batch follows")
    };
    assert_eq!(
        (batch[0].text(), batch[1].text()),
        ("BATCH".to_owned(), identity)
    );
    drop(c);

    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let follower = pair.follow(port);
    let nonsense: [&[u8]; 8] = [
        b"*1\r\n$4\r\nWHAT\r\n",
        b"*1\r\n$99999999999\r\n",
        b"-ERR max number of clients reached\r\n",
        b"*4\r\n$5\r\nBATCH\r\n$1\r\nx\r\n$1\r\n1\r\n$3\r\nxyz\r\n",
        b"*4\r\n$5\r\nBATCH\r\n$1\r\nx\r\n$1\r\ny\r\n$0\r\n\r\n",
        b"*4\r\n$5\r\nBATCH\r\n$1\r\nx\r\n$1\r\n1\r\n$14\r\n\0\0\0\0\0\0\0\0\xff\xff\0\0\x05\x01\r\n",
        b"*2\r\n$2\r\nAT\r\n$1\r\nx\r\n",
        b"",
    ];
    for bytes in nonsense {
        use std::io::{Read, Write};
        let (mut stream, _) = listener.accept().unwrap();
        let mut hello = [0; 14];
        stream.read_exact(&mut hello).unwrap();
        assert_eq!(&hello, b"*3\r\n$6\r\nFOLLOW");
        stream.write_all(bytes).unwrap();
    }
    let mut f = follower.client();
    assert_eq!(f.info("master_link_status"), "down");
    assert_eq!(f.call("DBSIZE"), Value::Integer(0));
    assert!(follower.stop().success());
}
