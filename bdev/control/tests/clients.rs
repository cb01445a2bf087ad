//! What the server does for its clients over sockets, and what a client may not do to it.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use pumice_bdev::{AsyncChannel, DmaBuf};
use pumice_bdev_control::config::App;
use pumice_bdev_control::metrics::MetricsServer;
use pumice_bdev_control::rpc::{RpcClient, RpcServer, ServerOptions, serve};
use serde_json::{Value, json};

/// A client that sends a byte now and then has the time of one request.
#[test]
fn a_request_has_one_time_limit_however_it_comes() {
    let (ours, mut client) = UnixStream::pair().unwrap();
    let options = ServerOptions::default().patience(Duration::from_secs(2));
    let server = std::thread::spawn(move || {
        let _ = serve(&App::new(), ours, &options, &AtomicBool::new(false));
    });
    let start = Instant::now();
    while start.elapsed() < Duration::from_secs(6) {
        if client.write_all(b"[").is_err() {
            break;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    let _ = client.shutdown(std::net::Shutdown::Write);
    let mut answer = String::new();
    let _ = client.read_to_string(&mut answer);
    server.join().unwrap();
    assert!(answer.contains("in time"), "{answer}");
}

struct Served {
    dir: tempfile::TempDir,
    app: Arc<App>,
    _server: RpcServer,
}

fn served(options: ServerOptions) -> Served {
    let dir = tempfile::tempdir().unwrap();
    let app = Arc::new(App::new());
    let server = RpcServer::start(Arc::clone(&app), &dir.path().join("sock"), options).unwrap();
    Served {
        dir,
        app,
        _server: server,
    }
}

impl Served {
    fn path(&self) -> std::path::PathBuf {
        self.dir.path().join("sock")
    }

    fn client(&self) -> RpcClient {
        RpcClient::connect(&self.path(), Duration::from_secs(10)).unwrap()
    }

    /// Sends bytes as they are. Returns what the server sends until it closes or is silent.
    fn raw(&self, bytes: &[u8]) -> String {
        let mut stream = UnixStream::connect(self.path()).unwrap();
        let _ = stream.write_all(bytes);
        let _ = stream.shutdown(std::net::Shutdown::Write);
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer);
        String::from_utf8_lossy(&answer).into_owned()
    }
}

#[test]
fn calls_over_the_socket() {
    let served = served(ServerOptions::default());
    let mode = std::fs::metadata(served.path())
        .unwrap()
        .permissions()
        .mode();
    assert_eq!(mode & 0o777, 0o600);
    let mut client = served.client();
    let call = |c: &mut RpcClient, method: &str, params: Value| c.call(method, &params);
    let params = json!({ "name": "M", "num_blocks": 2048, "block_size": 512 });
    assert_eq!(
        call(&mut client, "bdev_malloc_create", params.clone()).unwrap(),
        "M"
    );
    let e = call(&mut client, "bdev_malloc_create", params)
        .unwrap_err()
        .to_string();
    assert_eq!(e, "bdev `M` exists already (code -17)");
    call(
        &mut client,
        "bdev_error_create",
        json!({ "base_name": "M" }),
    )
    .unwrap();
    let bdevs = call(&mut client, "bdev_get_bdevs", Value::Null).unwrap();
    assert_eq!(bdevs.as_array().unwrap().len(), 2);
    let m = call(&mut client, "bdev_get_bdevs", json!({ "name": "M" })).unwrap();
    assert_eq!(m[0]["product_name"], "Malloc disk");
    assert_eq!(m[0]["claimed"], true);
    assert_eq!(m[0]["supported_io_types"]["unmap"], true);

    let inject = json!({ "name": "EE_M", "io_type": "write", "error_type": "failure", "num": 1 });
    call(&mut client, "bdev_error_inject_error", inject).unwrap();
    let dev = served.app.registry.open("EE_M").unwrap();
    let ch = AsyncChannel::new(dev.open_channel().unwrap());
    let data = DmaBuf::zeroed(512).unwrap().freeze();
    ch.block_on(async {
        assert!(ch.write(0, data.clone(), false).await.is_err());
        assert!(ch.write(0, data, false).await.is_ok());
    });
    let stat = call(&mut client, "bdev_get_iostat", json!({ "name": "EE_M" })).unwrap();
    assert_eq!(stat["bdevs"][0]["num_write_ops"], 2);
    assert_eq!(stat["bdevs"][0]["bytes_written"], 512);
    assert_eq!(stat["bdevs"][0]["io_error"]["write"], 1);
    assert!(stat["tick_rate"].as_u64().unwrap() > 0);

    let params = json!({ "name": "EE_M", "enable": true });
    call(&mut client, "bdev_enable_histogram", params).unwrap();
    ch.block_on(ch.flush()).unwrap();
    let histogram = call(&mut client, "bdev_get_histogram", json!({ "name": "EE_M" })).unwrap();
    assert_eq!(histogram["bucket_shift"], 7);
    assert_eq!(histogram["max_range"], 57);

    let methods = call(&mut client, "rpc_get_methods", json!({})).unwrap();
    assert!(
        methods
            .as_array()
            .unwrap()
            .contains(&json!("framework_get_config"))
    );
    let config = call(
        &mut client,
        "framework_get_config",
        json!({ "name": "bdev" }),
    )
    .unwrap();
    assert_eq!(config[0]["method"], "bdev_malloc_create");
    let saved = call(&mut client, "save_config", Value::Null).unwrap();
    assert_eq!(saved["subsystems"][0]["subsystem"], "bdev");
    call(&mut client, "bdev_malloc_delete", json!({ "name": "M" })).unwrap();
    let bdevs = call(&mut client, "bdev_get_bdevs", Value::Null).unwrap();
    assert_eq!(bdevs, json!([]));
}

#[test]
fn bad_clients_hurt_nobody() {
    let options = ServerOptions::default()
        .request_max(4096)
        .clients_max(8)
        .patience(Duration::from_millis(300));
    let served = served(options);
    assert!(served.raw(b"GET / HTTP/1.0\r\n\r\n").contains("-32700"));
    assert!(served.raw(b"{]").contains("-32700"));
    assert!(served.raw(&[b'{'; 100_000]).contains("-32600"));
    assert!(served.raw(&[b'['; 3000]).is_empty());
    assert!(served.raw("{\"a\":\"\u{fffd}".as_bytes()).is_empty());
    let deep = format!("{}1{}", "[".repeat(2000), "]".repeat(2000));
    assert!(served.raw(deep.as_bytes()).contains("-32"));
    // Slow clients are disconnected, excess clients are refused, and others are served.
    let mut slow: Vec<UnixStream> = Vec::new();
    for _ in 0..7 {
        let mut stream = UnixStream::connect(served.path()).unwrap();
        stream.write_all(b"{\"jsonrpc\"").unwrap();
        slow.push(stream);
    }
    served
        .client()
        .call("bdev_get_bdevs", &Value::Null)
        .unwrap();
    let mut answer = String::new();
    slow.pop().unwrap().read_to_string(&mut answer).unwrap();
    assert!(answer.contains("in time"), "{answer}");
    served
        .client()
        .call("bdev_get_bdevs", &Value::Null)
        .unwrap();
}

#[test]
fn one_server_per_socket() {
    let served = served(ServerOptions::default());
    let second = RpcServer::start(
        Arc::new(App::new()),
        &served.path(),
        ServerOptions::default(),
    );
    assert!(second.unwrap_err().to_string().contains("in use"));
    served
        .client()
        .call("bdev_get_bdevs", &Value::Null)
        .unwrap();
    let path = served.path();
    let file = served.dir.path().join("file");
    std::fs::write(&file, "x").unwrap();
    assert!(RpcServer::start(Arc::new(App::new()), &file, ServerOptions::default()).is_err());
    drop(served);
    let e = RpcClient::connect(&path, Duration::from_secs(1))
        .unwrap_err()
        .to_string();
    assert!(e.contains("--rpc-socket"), "{e}");
}

#[test]
fn metrics_on_a_loopback_port_and_a_socket() {
    let app = App::new();
    app.call(
        "bdev_malloc_create",
        &json!({ "name": "M\"", "num_blocks": 64, "block_size": 512 }),
    )
    .unwrap();
    let dev = app.registry.open("M\"").unwrap();
    let ch = AsyncChannel::new(dev.open_channel().unwrap());
    ch.block_on(ch.read(0, DmaBuf::new(512).unwrap())).unwrap();
    assert!(MetricsServer::start(app.registry.clone(), "0.0.0.0:0").is_err());
    let server = MetricsServer::start(app.registry.clone(), "127.0.0.1:0").unwrap();
    let mut stream = std::net::TcpStream::connect(("127.0.0.1", server.port().unwrap())).unwrap();
    stream
        .write_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
        .unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    assert!(text.starts_with("HTTP/1.0 200"));
    assert!(
        text.contains("pumice_bdev_ops_total{bdev=\"M\\\"\",op=\"read\"} 1\n"),
        "{text}"
    );
    drop(server);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m");
    let _server = MetricsServer::start(app.registry.clone(), path.to_str().unwrap()).unwrap();
    let mut stream = UnixStream::connect(&path).unwrap();
    stream.write_all(b"GET /x HTTP/1.0\r\n\r\n").unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    assert!(text.starts_with("HTTP/1.0 404"));
}

/// Ends the process if a test hangs.
struct Watchdog {
    _alive: std::sync::mpsc::Sender<()>,
}

impl Watchdog {
    fn new(seconds: u64) -> Watchdog {
        let (alive, gone) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            let over = gone.recv_timeout(Duration::from_secs(seconds));
            if matches!(over, Err(std::sync::mpsc::RecvTimeoutError::Timeout)) {
                eprintln!("a test hangs for {seconds} s");
                std::process::abort();
            }
        });
        Watchdog { _alive: alive }
    }
}

fn serve_at(options: ServerOptions) -> (tempfile::TempDir, std::path::PathBuf, RpcServer) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("sock");
    let server = RpcServer::start(Arc::new(App::new()), &path, options).unwrap();
    (dir, path, server)
}

#[test]
fn clients_that_wait_and_go_away_leave_the_server_free() {
    let _watchdog = Watchdog::new(60);
    let (_dir, path, server) = serve_at(ServerOptions::default());
    for _ in 0..3 {
        for _ in 0..32 {
            let mut stream = UnixStream::connect(&path).unwrap();
            let text = r#"{"jsonrpc":"2.0","id":1,"method":"bdev_get_bdevs",
                "params":{"name":"never","timeout":600000}}"#;
            stream.write_all(text.as_bytes()).unwrap();
        }
        // They have disconnected: another client is served within a moment.
        let answer = (0..200).find_map(|_| {
            std::thread::sleep(Duration::from_millis(20));
            let mut client = RpcClient::connect(&path, Duration::from_secs(2)).ok()?;
            client.call("spdk_get_version", &Value::Null).ok()
        });
        assert!(answer.is_some());
    }
    // A client that waits does not delay the end of the server.
    let mut waiting = UnixStream::connect(&path).unwrap();
    let text = r#"{"jsonrpc":"2.0","id":1,"method":"bdev_get_bdevs",
        "params":{"name":"never","timeout":600000}}"#;
    waiting.write_all(text.as_bytes()).unwrap();
    std::thread::sleep(Duration::from_millis(100));
    let start = Instant::now();
    drop(server);
    assert!(
        start.elapsed() < Duration::from_secs(5),
        "{:?}",
        start.elapsed()
    );
}

#[test]
fn a_client_that_has_ended_its_requests_still_gets_its_answer() {
    let _watchdog = Watchdog::new(60);
    let (_dir, path, _server) = serve_at(ServerOptions::default());
    let mut stream = UnixStream::connect(&path).unwrap();
    let text = r#"{"jsonrpc":"2.0","id":1,"method":"bdev_get_bdevs",
        "params":{"name":"never","timeout":200}}"#;
    stream.write_all(text.as_bytes()).unwrap();
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert!(answer.contains("no bdev `never`"), "{answer}");
}

#[test]
fn who_is_turned_away_is_told_why() {
    let _watchdog = Watchdog::new(120);
    let (_dir, path, _server) = serve_at(
        // The patience is longer than the test may take.
        ServerOptions::default()
            .clients_max(2)
            .patience(Duration::from_secs(600)),
    );
    let request = |id: &str| {
        format!("{{\"jsonrpc\":\"2.0\",\"id\":\"{id}\",\"method\":\"spdk_get_version\"}}\n")
    };
    // A client that has an answer has its place.
    let mut clients = [(); 2].map(|()| {
        let mut client = BufReader::new(UnixStream::connect(&path).unwrap());
        client.get_mut().write_all(request("1").as_bytes()).unwrap();
        let mut answer = String::new();
        client.read_line(&mut answer).unwrap();
        assert!(answer.contains("version"), "{answer}");
        client
    });
    let mut third = UnixStream::connect(&path).unwrap();
    let mut answer = String::new();
    third.read_to_string(&mut answer).unwrap();
    assert!(answer.contains("2 clients already"), "{answer}");
    // The request is too long: the client is still sending when it is refused.
    let long = request(&"x".repeat(3 << 20));
    clients[0].get_mut().write_all(long.as_bytes()).unwrap();
    let mut answer = String::new();
    clients[0].read_to_string(&mut answer).unwrap();
    assert!(answer.contains("at most 1048576 bytes"), "{answer}");
}

#[test]
fn a_socket_that_nobody_serves_ends_in_an_error() {
    let _watchdog = Watchdog::new(60);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("sock");
    let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
    // The queue of the socket is full, and nobody accepts.
    let mut queue = Vec::new();
    while let Ok(stream) = pumice_io::sys::socket::connect(&path, Duration::from_millis(50)) {
        queue.push(stream);
    }
    let start = Instant::now();
    let e = RpcClient::connect(&path, Duration::from_millis(200)).unwrap_err();
    assert!(e.to_string().contains("accepted no connection"), "{e}");
    let e = RpcServer::start(Arc::new(App::new()), &path, ServerOptions::default()).unwrap_err();
    assert!(matches!(e, pumice_bdev::BdevError::InUse { .. }), "{e}");
    assert!(MetricsServer::start(App::new().registry.clone(), path.to_str().unwrap()).is_err());
    let uri = format!("vfio-user://{}?timeout_ms=100", path.display());
    let e = pumice_bdev::open(&uri).unwrap_err();
    assert!(matches!(e, pumice_bdev::BdevError::InUse { .. }), "{e}");
    assert!(start.elapsed() < Duration::from_secs(30));
    assert!(path.exists(), "the socket of somebody who lives stays");
    drop((queue, listener));
    // The server has ended, so the path is free.
    RpcServer::start(Arc::new(App::new()), &path, ServerOptions::default()).unwrap();
}
