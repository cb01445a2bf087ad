//! Tests of inspection: JSON-RPC, figures for Prometheus, properties.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::time::Duration;

use pumice::{Db, DbOptions, Inspection, MountOptions};
use pumice_bdev_control::rpc::{RpcClient, RpcError};
use serde_json::{Value, json};

mod common;

use common::{key, value};

fn client(socket: &Path) -> RpcClient {
    RpcClient::connect(socket, Duration::from_secs(10)).unwrap()
}

fn ask(client: &mut RpcClient, method: &str, params: &Value) -> Value {
    client
        .call(method, params)
        .unwrap_or_else(|e| panic!("{method}: {e}"))
}

#[test]
fn a_database_answers_as_long_as_it_is_open() {
    let dir = tempfile::tempdir().unwrap();
    let (image, socket) = (dir.path().join("kv.img"), dir.path().join("rpc.sock"));
    let uri = format!("file://{}?size=64M&create=1", image.display());
    let db = DbOptions::new().rpc_socket(&socket).open(&uri).unwrap();
    for n in 0..1000 {
        db.put(key(n), value(n)).unwrap();
    }
    db.flush().unwrap();
    let mode = socket.metadata().unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let mut client = client(&socket);
    let statfs = ask(&mut client, "pumice_get_statfs", &Value::Null);
    assert_eq!(statfs["device"], image.to_str().unwrap());
    assert_eq!(
        statfs["free_bytes"],
        db.property_int_value("pumice.free-bytes").unwrap().unwrap()
    );
    let files = ask(&mut client, "pumice_get_files", &json!({ "path": "/" }));
    let current = files
        .as_array()
        .unwrap()
        .iter()
        .find(|f| f["path"] == "/CURRENT");
    assert_eq!(current.unwrap()["type"], "file");
    let same = ask(
        &mut client,
        "pumice_get_file",
        &json!({ "path": "/CURRENT" }),
    );
    assert_eq!(Some(&same), current);
    let stats = ask(&mut client, "pumice_get_stats", &Value::Null);
    assert_eq!(stats["rocksdb"]["estimate_num_keys"], 1000);
    assert!(stats["fs"]["device_writes"].as_u64() > Some(0));
    let counts = stats["latency"].as_array().unwrap().iter();
    let ops: u64 = counts.map(|pair| pair[1].as_u64().unwrap()).sum();
    assert!(ops > 0, "the device's operations have latencies");
    assert!(!stats["channels"].as_array().unwrap().is_empty());
    // These are SPDK's methods that only read.
    let bdevs = ask(&mut client, "bdev_get_bdevs", &Value::Null);
    assert_eq!(bdevs[0]["name"], image.to_str().unwrap());
    // The device is released with the database, whoever is connected.
    db.close().unwrap();
    assert!(!socket.exists());
    Db::open(&uri).unwrap().close().unwrap();
}

/// The operations of a shared device are counted for each of its databases.
#[test]
fn databases_that_share_a_device_share_its_figures() {
    let dir = tempfile::tempdir().unwrap();
    let uri = format!("file://{}/kv.img?size=64M&create=1", dir.path().display());
    let sockets = ["a", "b"].map(|name| dir.path().join(name));
    let open = |n: usize| {
        let options = DbOptions::new().path(["/a", "/b"][n]);
        options.rpc_socket(&sockets[n]).open(&uri).unwrap()
    };
    let (first, second) = (open(0), open(1));
    second.put(b"key", b"value").unwrap();
    second.flush().unwrap();
    let operations = |socket: &Path| -> u64 {
        let stats = ask(&mut client(socket), "pumice_get_stats", &Value::Null);
        assert!(!stats["channels"].as_array().unwrap().is_empty());
        let counts = stats["latency"].as_array().unwrap().iter();
        counts.map(|pair| pair[1].as_u64().unwrap()).sum()
    };
    let of_first = operations(&sockets[0]);
    let of_second = operations(&sockets[1]);
    assert!(of_first > 0 && of_second >= of_first);
    // The one that mounted the device is gone.
    first.close().unwrap();
    second.put(b"key", b"other").unwrap();
    second.flush().unwrap();
    assert!(operations(&sockets[1]) > of_second);
    second.close().unwrap();
    Db::open(&uri).unwrap().close().unwrap();
}

#[test]
fn nothing_can_be_changed_through_the_socket() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("rpc.sock");
    let fs = pumice::mount("malloc://64M", &MountOptions::new()).unwrap();
    let inspection = Inspection::new(&fs).rpc_socket(&socket).unwrap();
    let mut client = client(&socket);
    let names = ask(&mut client, "rpc_get_methods", &Value::Null);
    let names: Vec<&str> = names
        .as_array()
        .unwrap()
        .iter()
        .filter_map(Value::as_str)
        .collect();
    assert!(names.contains(&"pumice_get_stats") && names.contains(&"bdev_get_iostat"));
    assert!(names.iter().all(|name| name.contains("_get_")), "{names:?}");
    for method in [
        "bdev_malloc_create",
        "spdk_kill_instance",
        "bdev_reset_iostat",
        "log_set_level",
    ] {
        let error = client.call(method, &Value::Null).unwrap_err();
        let RpcError::Failed { code, message } = error else {
            panic!("{error}")
        };
        assert_eq!(code, -i64::from(libc::EPERM));
        assert!(message.contains("questions only"), "{message}");
    }
    let error = client
        .call("bdev_get_iostat", &json!({ "reset_mode": "all" }))
        .unwrap_err();
    assert!(error.to_string().contains("questions only"), "{error}");
    // Invalid questions are errors.
    for (params, code) in [
        (json!({ "path": 7 }), -32602),
        (json!({ "path": "/nowhere" }), -i64::from(libc::ENOENT)),
        (json!([1]), -i64::from(libc::ENOENT)),
    ] {
        match client.call("pumice_get_file", &params) {
            Err(RpcError::Failed { code: found, .. }) => assert_eq!(found, code, "{params}"),
            // An array has no path, so it asks for `/`.
            other => assert!(params.is_array() && other.is_ok(), "{params}: {other:?}"),
        }
    }
    drop(client);
    drop(inspection);
    assert!(!socket.exists());
    fs.unmount().unwrap();
}

#[test]
fn a_socket_that_cannot_be_made_fails_the_opening() {
    let dir = tempfile::tempdir().unwrap();
    let uri = format!("file://{}/kv.img?size=64M&create=1", dir.path().display());
    let socket = dir.path().join("no/such/directory/rpc.sock");
    let error = DbOptions::new().rpc_socket(&socket).open(&uri).unwrap_err();
    assert!(matches!(error, pumice::Error::Listen { .. }), "{error:?}");
    assert!(error.to_string().contains("rpc.sock"), "{error}");
    let error = DbOptions::new()
        .metrics("0.0.0.0:0")
        .open(&uri)
        .unwrap_err();
    assert!(pumice::chain(&error).contains("loopback"), "{error:?}");
    // The failed attempt holds nothing.
    Db::open(&uri).unwrap().close().unwrap();
}

#[test]
fn figures_for_prometheus() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("metrics.sock");
    let fs = pumice::mount("malloc://64M", &MountOptions::new()).unwrap();
    let db = DbOptions::new()
        .metrics(path.to_str().unwrap())
        .open_in(&fs)
        .unwrap();
    db.put(b"key", b"value").unwrap();
    let mut stream = std::os::unix::net::UnixStream::connect(&path).unwrap();
    stream.write_all(b"GET /metrics HTTP/1.0\r\n\r\n").unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    for line in [
        "# TYPE pumice_fs_free_bytes gauge",
        "# TYPE pumice_fs_cache_hits_total counter",
        "pumice_rocksdb_estimate_num_keys{device=\"",
    ] {
        assert!(text.contains(line), "{line}: {text}");
    }
    db.close().unwrap();
    assert!(!path.exists());
    // This one is on a port.
    let inspection = Inspection::new(&fs).metrics("127.0.0.1:0").unwrap();
    let port = inspection.metrics_port().unwrap();
    let mut stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
    stream.write_all(b"GET /metrics HTTP/1.0\r\n\r\n").unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    assert!(text.contains("pumice_fs_total_bytes"), "{text}");
}

/// Bytes that were written and are not in their place count as dirty, in memory and in the journal.
#[test]
fn dirty_bytes_are_counted() {
    let fs = pumice::mount("malloc://64M", &MountOptions::new()).unwrap();
    let file = fs
        .open("/file", pumice_blobfs::fs::OpenOptions::CREATE)
        .unwrap();
    assert_eq!(fs.dirty_bytes(), 0);
    file.append(&[1; 1000]).unwrap();
    assert_eq!(fs.dirty_bytes(), 1000);
    file.sync().unwrap();
    assert_eq!(fs.dirty_bytes(), 0);
    file.append(&[2; 100]).unwrap();
    file.sync().unwrap();
    assert_eq!(fs.dirty_bytes(), 100, "the journal has them");
    drop(file);
    fs.unmount().unwrap();
}

/// Each figure has the value that the file system has for it, and no two of these are the same by chance.
#[test]
fn figures_are_those_of_the_file_system() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("rpc.sock");
    let fs = pumice::mount("malloc://64M", &MountOptions::new()).unwrap();
    let file = fs
        .open("/file", pumice_blobfs::fs::OpenOptions::CREATE)
        .unwrap();
    file.append(&[1; 300_000]).unwrap();
    file.sync().unwrap();
    file.append(&[2; 100]).unwrap();
    file.sync().unwrap();
    for _ in 0..7 {
        file.read_at(0, &mut [0; 100]).unwrap();
    }
    let inspection = Inspection::new(&fs).rpc_socket(&socket).unwrap();
    let mut client = client(&socket);
    let stats = ask(&mut client, "pumice_get_stats", &Value::Null);
    let (space, cache, io) = (fs.statfs(), fs.cache_stats(), fs.io_stats());
    let figures = [
        ("total_bytes", space.total),
        ("free_bytes", space.free),
        ("used_bytes", space.used),
        ("journal_bytes", space.journal),
        ("cluster_size", space.cluster),
        ("files", space.files),
        ("md_pages", space.md_pages),
        ("md_pages_used", space.md_pages_used),
        ("dirty_bytes", fs.dirty_bytes()),
        ("writeback_bytes", fs.writeback_bytes()),
        ("cache_used_bytes", cache.used_bytes),
        ("cache_capacity_bytes", cache.capacity_bytes),
        ("cache_hits", cache.hits),
        ("cache_misses", cache.misses),
        ("device_reads", io.reads),
        ("device_read_bytes", io.read_bytes),
        ("device_writes", io.writes),
        ("device_written_bytes", io.written_bytes),
        ("device_flushes", io.flushes),
    ];
    for (name, value) in figures {
        assert_eq!(stats["fs"][name], value, "{name}");
    }
    assert!(cache.hits != cache.misses && io.writes != io.flushes);
    assert!(space.journal != space.used && fs.dirty_bytes() != fs.writeback_bytes());
    let stat = fs.stat("/file").unwrap();
    let shown = ask(&mut client, "pumice_get_file", &json!({ "path": "/file" }));
    assert_eq!(shown["length"], 300_100);
    assert_eq!(shown["allocated"], stat.allocated);
    assert!(stat.allocated > stat.len);
    // Nothing has counted the operations of the device, which was mounted before.
    assert!(stats["latency"].is_null(), "{stats}");
    drop((client, inspection));
}

/// The device is counted for Prometheus alone, too, and its name may have any character.
#[test]
fn figures_of_a_device_with_a_quote_in_its_name() {
    let dir = tempfile::tempdir().unwrap();
    let (image, metrics) = (dir.path().join("k\"v.img"), dir.path().join("m.sock"));
    let db = DbOptions::new()
        .metrics(metrics.to_str().unwrap())
        .open(&format!("file://{}?size=64M&create=1", image.display()))
        .unwrap();
    let mut stream = std::os::unix::net::UnixStream::connect(&metrics).unwrap();
    stream.write_all(b"GET /metrics HTTP/1.0\r\n\r\n").unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    let quoted = "k\\\"v.img\"";
    for start in ["pumice_fs_files{", "pumice_bdev_"] {
        let row = |line: &str| line.starts_with(start) && line.contains(quoted);
        assert!(text.lines().any(row), "{start}: {text}");
    }
    db.close().unwrap();
}

/// The queues of a device that is counted are shown with their threads.
#[test]
fn queues_are_shown() {
    let dir = tempfile::tempdir().unwrap();
    let (metrics, socket) = (dir.path().join("metrics.sock"), dir.path().join("rpc.sock"));
    let db = DbOptions::new()
        .metrics(metrics.to_str().unwrap())
        .rpc_socket(&socket)
        .open("malloc://64M")
        .unwrap();
    db.put(b"key", b"value").unwrap();
    db.flush().unwrap();
    let mut client = client(&socket);
    let stats = ask(&mut client, "pumice_get_stats", &Value::Null);
    let channels = stats["channels"].as_array().unwrap();
    assert!(!channels.is_empty(), "{stats}");
    for channel in channels {
        assert!(
            channel["in_flight"].is_u64() && channel["opened_by"].is_string(),
            "{channel}"
        );
    }
    assert!(
        stats["latency"]
            .as_array()
            .is_some_and(|all| !all.is_empty() && all.iter().all(|pair| pair[1] != 0)),
        "{stats}"
    );
    let mut stream = std::os::unix::net::UnixStream::connect(&metrics).unwrap();
    stream.write_all(b"GET /metrics HTTP/1.0\r\n\r\n").unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    assert!(text.contains("pumice_bdev_"), "{text}");
    drop(client);
    db.close().unwrap();
}

#[test]
fn figures_are_properties() {
    let db = Db::open("malloc://64M").unwrap();
    db.put(b"key", b"value").unwrap();
    let total = db.property_int_value("pumice.total-bytes").unwrap();
    assert_eq!(total, Some(db.file_system().statfs().total));
    assert_eq!(
        db.property_value("pumice.total-bytes").unwrap(),
        total.map(|n| n.to_string())
    );
    // The properties that the page lists are there.
    let page = include_str!("../README.md");
    let list = page.split("There are `total-bytes`").nth(1).unwrap();
    let list = list.split("`device-unmaps`").next().unwrap();
    let listed = list.split('`').skip(1).step_by(2);
    let listed: Vec<&str> = ["total-bytes", "device-unmaps"]
        .into_iter()
        .chain(listed)
        .collect();
    for name in &listed {
        let value = db.property_int_value(&format!("pumice.{name}")).unwrap();
        assert!(value.is_some() || *name == "host-free-bytes", "{name}");
    }
    assert_eq!(
        db.property_int_value("pumice.no-such-figure").unwrap(),
        None
    );
    assert_eq!(
        db.property_int_value("rocksdb.estimate-num-keys").unwrap(),
        Some(1)
    );
    assert!(db.property_value("rocksdb.stats").unwrap().is_some());
    db.close().unwrap();
}
