//! Tests of configuration files, JSON-RPC over its socket, and metrics.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use pumice_bdev::{AsyncChannel, DmaBuf};
use pumice_bdev_control::config::{self, App};
use pumice_bdev_control::metrics::MetricsServer;
use pumice_bdev_control::rpc::{RpcClient, RpcServer, ServerOptions};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use serde_json::{Value, json};

fn error(text: &str) -> String {
    config::load(&App::new(), "test.json", text)
        .unwrap_err()
        .to_string()
}

fn bdev_config(calls: &str) -> String {
    format!("{{\"subsystems\":[{{\"subsystem\":\"bdev\",\n\"config\":[\n{calls}\n]}}]}}")
}

#[test]
fn every_module_by_its_spdk_method() {
    let dir = tempfile::tempdir_in(Path::new(env!("CARGO_TARGET_TMPDIR"))).unwrap();
    let image = dir.path().join("image");
    std::fs::write(&image, vec![0; 1 << 20]).unwrap();
    // The order is that of SPDK's save_config: by module, whatever the devices are built on.
    let text = json!({ "subsystems": [
        { "subsystem": "keyring", "config": [] },
        { "subsystem": "iobuf", "config": [
            { "method": "iobuf_set_options", "params": { "small_pool_count": 8192 } } ] },
        { "subsystem": "sock", "config": null },
        { "subsystem": "bdev", "config": [
            { "method": "bdev_set_options",
              "params": { "bdev_io_pool_size": 65535, "bdev_auto_examine": true } },
            { "method": "bdev_raid_set_options", "params": { "process_window_size_kb": 1024 } },
            { "method": "bdev_iscsi_set_options", "params": { "timeout_sec": 30 } },
            { "method": "bdev_nvme_set_options", "params": {
                "action_on_timeout": "none", "timeout_us": 0, "keep_alive_timeout_ms": 10000 } },
            { "method": "bdev_nvme_set_hotplug", "params": { "period_us": 100000, "enable": false } },
            { "method": "bdev_raid_create", "params": {
                "name": "Raid", "uuid": "5a2a7b7e-3b7c-4ad2-9d5c-7b1f6c8d9e0f",
                "strip_size_kb": 64, "raid_level": "raid0", "superblock": false,
                "base_bdevs": ["Malloc1", "Malloc2"] } },
            { "method": "bdev_delay_create", "params": {
                "name": "Slow", "base_bdev_name": "Raid", "avg_read_latency": 1,
                "p99_read_latency": 2, "avg_write_latency": 3, "p99_write_latency": 4 } },
            { "method": "bdev_malloc_create", "params": {
                "name": "Malloc0", "num_blocks": 65536, "block_size": 512,
                "physical_block_size": 512, "optimal_io_boundary": 0, "md_size": 0, "dif_type": 0,
                "dif_is_head_of_md": false, "dif_pi_format": 0,
                "uuid": "0e6b3a1c-0a0b-4c0d-8e0f-101112131415" } },
            { "method": "bdev_malloc_create",
              "params": { "name": "Malloc1", "num_blocks": 4096, "block_size": 512 } },
            { "method": "bdev_malloc_create",
              "params": { "name": "Malloc2", "num_blocks": 4096, "block_size": 512 } },
            { "method": "bdev_null_create",
              "params": { "name": "Null0", "num_blocks": 1 << 30, "block_size": 4096 } },
            { "method": "bdev_aio_create", "params": {
                "name": "Aio0", "filename": image, "block_size": 512, "readonly": false } },
            { "method": "bdev_error_create", "params": { "base_name": "Malloc0" } },
            { "method": "bdev_passthru_create",
              "params": { "name": "PT0", "base_bdev_name": "EE_Malloc0" } },
            { "method": "bdev_split_create", "params": { "base_bdev": "Null0", "split_count": 4 } },
            { "method": "bdev_wait_for_examine" },
        ] },
        { "subsystem": "nvmf", "config": [ { "method": "nvmf_set_config" } ] },
    ] });
    let app = App::new();
    config::load(&app, "x", &serde_json::to_string_pretty(&text).unwrap()).unwrap();
    let names = app.registry.names();
    for name in [
        "Malloc0",
        "EE_Malloc0",
        "PT0",
        "Raid",
        "Slow",
        "Null0p3",
        "Aio0",
    ] {
        assert!(names.iter().any(|n| n == name), "{name} in {names:?}");
    }
    assert_eq!(names.len(), 13);
    let dev = app.registry.open("Slow").unwrap();
    let ch = AsyncChannel::new(dev.open_channel().unwrap());
    ch.block_on(ch.read(0, DmaBuf::new(512).unwrap())).unwrap();

    // A saved configuration makes the same devices again.
    drop((ch, dev));
    let saved = app.config().to_string();
    for name in app.registry.names() {
        let _ = app.registry.remove(&name);
    }
    drop(app);
    let again = App::new();
    config::load(&again, "saved", &saved).unwrap();
    assert_eq!(again.registry.names(), names);
    let raid = again.registry.get("Raid").unwrap();
    let uuid = pumice_bdev::uuid::format(&pumice_bdev::BlockDevice::info(&raid).uuid);
    assert_eq!(uuid, "5a2a7b7e-3b7c-4ad2-9d5c-7b1f6c8d9e0f");
}

#[test]
fn a_single_subsystem_with_comments() {
    let text = "// written by a script\n{ \"subsystem\": \"bdev\", /* one */ \"config\": [ {\n\
        \"method\": \"bdev_malloc_create\",\n\"params\": {\"num_blocks\": 64, \"block_size\": 512}}]}";
    let app = App::new();
    config::load(&app, "x", text).unwrap();
    assert_eq!(app.registry.names().len(), 1);
    assert_eq!(config::check_form("x", text), Ok(1));
}

#[test]
fn errors_name_the_line_and_the_key() {
    let call = |params: &str| {
        bdev_config(&format!(
            "{{ \"method\": \"bdev_malloc_create\",\n  \"params\": {{\n{params} }} }}"
        ))
    };
    let e = error(&call("\"num_blocks\": 64,\n\"block_size\": \"big\""));
    assert!(
        e.starts_with("test.json:6: bdev_malloc_create: `block_size`"),
        "{e}"
    );
    let e = error(&call(
        "\"num_blocks\": 64, \"block_size\": 512,\n\"nmae\": \"x\"",
    ));
    assert!(
        e.starts_with("test.json:6:") && e.contains("did you mean `name`"),
        "{e}"
    );
    let e = error(&call("\"num_blocks\": 64"));
    assert!(e.contains("`block_size`: missing"), "{e}");
    let e = error(&call(
        "\"num_blocks\": 64, \"block_size\": 512, \"md_size\": 8",
    ));
    assert!(e.contains("`md_size`: 8 is not supported"), "{e}");
    let e = error(&bdev_config("{ \"method\": \"bdev_maloc_create\" }"));
    assert!(
        e.starts_with("test.json:3:") && e.contains("bdev_malloc_create"),
        "{e}"
    );
    let e = error(&bdev_config(
        "{ \"method\": \"bdev_passthru_create\", \"params\": {\"name\": \"P\", \"base_bdev_name\": \"M\"} }",
    ));
    assert!(e.contains("no bdev `M`"), "{e}");
    assert!(error("{").starts_with("test.json:1: not JSON"));
    assert!(error("{\n\n\"a\" 1}").starts_with("test.json:3: not JSON"));
    assert!(error("[]").contains("should be an object"));
    assert!(error("{}").contains("subsystems"));
    assert!(error("{\"subsystems\":[{\"subsystem\":\"bdevs\"}]}").contains("`bdevs`"));
    assert!(error(&bdev_config("{\"params\":{}}")).contains("`method`: missing"));
}

#[test]
fn answers_have_spdks_shapes() {
    let app = App::new();
    let call = |method: &str, params: Value| {
        let answer = app.call(method, &params);
        answer.unwrap_or_else(|e| panic!("{method}: {e}"))
    };
    let error = |method: &str, params: Value| {
        let answer = app.call(method, &params);
        answer.expect_err(method).message
    };
    let malloc = json!({ "name": "M", "num_blocks": 8192, "block_size": 512 });
    assert_eq!(call("bdev_malloc_create", malloc), "M");
    assert_eq!(call("bdev_error_create", json!({ "base_name": "M" })), true);
    let uuid = "0e6b3a1c-0a0b-4c0d-8e0f-101112131415";
    let params = json!({ "name": "PT", "base_bdev_name": "EE_M", "uuid": uuid });
    assert_eq!(call("bdev_passthru_create", params), "PT");
    let params = json!({ "base_bdev": "PT", "split_count": 9, "split_size_mb": 1 });
    // As many parts as there is room for.
    let parts = json!(["PTp0", "PTp1", "PTp2", "PTp3"]);
    assert_eq!(call("bdev_split_create", params), parts);
    let get = |name: &str| call("bdev_get_bdevs", json!({ "name": name }))[0].clone();
    let pt = get("PT");
    assert_eq!(
        (&pt["uuid"], &pt["aliases"]),
        (&json!(uuid), &json!([uuid]))
    );
    assert_eq!(
        (&pt["claimed"], &pt["claim_type"]),
        (&json!(true), &json!("exclusive_write"))
    );
    assert_eq!(get(uuid)["name"], "PT");
    assert_eq!(
        get("EE_M")["driver_specific"],
        json!({ "error_disk": { "base_bdev": "M" } })
    );
    let split = json!({ "split": { "base_bdev": "PT", "offset_blocks": 2048 } });
    assert_eq!(get("PTp1")["driver_specific"], split);
    assert!(get("PTp1").get("claim_type").is_none());

    // The device is added while a client waits for it.
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| get_late(&app));
        std::thread::sleep(Duration::from_millis(20));
        let late = json!({ "name": "Late", "num_blocks": 64, "block_size": 512 });
        call("bdev_null_create", late);
        assert_eq!(waiting.join().unwrap()[0]["name"], "Late");
    });
    fn get_late(app: &App) -> Value {
        let params = json!({ "name": "Late", "timeout": 60_000 });
        app.call("bdev_get_bdevs", &params).unwrap()
    }
    error("bdev_get_bdevs", json!({ "name": "Never", "timeout": 1 }));

    // Statistics, by device and by channel; a reset clears them.
    let ch = AsyncChannel::new(app.registry.open("PTp0").unwrap().open_channel().unwrap());
    ch.block_on(ch.read(0, DmaBuf::new(512).unwrap())).unwrap();
    let stat = call("bdev_get_iostat", json!({ "names": ["PTp0", "M"] }));
    assert_eq!(stat["bdevs"][0]["name"], "PTp0");
    assert_eq!(stat["bdevs"][1]["num_read_ops"], 1);
    let per_channel = json!({ "name": "PTp0", "per_channel": true });
    let stat = call("bdev_get_iostat", per_channel);
    assert_eq!(stat["name"], "PTp0");
    assert!(stat["channels"][0]["thread_id"].is_u64());
    assert_eq!(stat["channels"][0]["bytes_read"], 512);
    assert!(error("bdev_get_iostat", json!({ "per_channel": true })).contains("name"));
    let maxmin = json!({ "name": "PTp0", "reset_mode": "maxmin" });
    let before = call("bdev_get_iostat", maxmin)["bdevs"][0].clone();
    assert!(before["max_read_latency_ticks"].as_u64() > Some(0));
    let after = call("bdev_get_iostat", json!({ "name": "PTp0" }))["bdevs"][0].clone();
    assert_eq!(
        (&after["max_read_latency_ticks"], &after["num_read_ops"]),
        (&json!(0), &json!(1))
    );
    assert_eq!(
        call(
            "bdev_reset_iostat",
            json!({ "name": "PTp0", "mode": "all" })
        ),
        true
    );
    let after = call("bdev_get_iostat", json!({ "name": "PTp0" }))["bdevs"][0].clone();
    assert_eq!(
        (&after["num_read_ops"], &after["bytes_read"]),
        (&json!(0), &json!(0))
    );
    assert!(error("bdev_reset_iostat", json!({ "mode": "some" })).contains("maxmin"));
    let opc = json!({ "name": "PTp0", "enable": true, "opc": "reads" });
    assert!(error("bdev_enable_histogram", opc).contains("one of read"));

    // Fault injection in the form of rpc.py.
    let inject = |io_type: &str, error_type: &str, rest: Value| {
        let mut params = json!({ "name": "EE_M", "io_type": io_type, "error_type": error_type });
        if let (Value::Object(to), Value::Object(from)) = (&mut params, rest) {
            to.extend(from);
        }
        app.call("bdev_error_inject_error", &params)
    };
    let read = || ch.block_on(ch.read(0, DmaBuf::zeroed(512).unwrap()));
    inject("read", "failure", json!({ "num": 1000 })).unwrap();
    assert!(read().is_err());
    inject("read", "failure", json!({ "num": 0 })).unwrap();
    assert!(read().is_ok());
    inject(
        "read",
        "corrupt_data",
        json!({ "corrupt_offset": 3, "corrupt_value": 5 }),
    )
    .unwrap();
    assert_eq!(read().unwrap()[..5], [0, 0, 0, 5, 0]);
    assert!(inject("read", "corrupt_data", json!({})).is_err());
    inject("all", "failure", json!({ "num": 9 })).unwrap();
    inject("clear", "failure", json!({})).unwrap();
    assert!(read().is_ok());

    let all = call("rpc_get_methods", json!({}));
    let now = call("rpc_get_methods", json!({ "current": true }));
    let start = json!("framework_start_init");
    assert!(all.as_array().unwrap().contains(&start));
    assert!(!now.as_array().unwrap().contains(&start));
}

#[test]
fn what_was_chosen_at_random_is_saved() {
    let app = App::new();
    for (method, params) in [
        (
            "bdev_malloc_create",
            json!({ "num_blocks": 4096, "block_size": 512 }),
        ),
        (
            "bdev_malloc_create",
            json!({ "name": "B", "num_blocks": 4096, "block_size": 512 }),
        ),
        (
            "bdev_null_create",
            json!({ "name": "N", "num_blocks": 8, "block_size": 512 }),
        ),
    ] {
        app.call(method, &params).unwrap();
    }
    let first = app.registry.names()[1].clone();
    let raid = json!({ "name": "R", "raid_level": "raid0", "strip_size_kb": 4,
                       "base_bdevs": [first, "B"] });
    app.call("bdev_raid_create", &raid).unwrap();
    let delay = json!({ "name": "D", "base_bdev_name": "R", "avg_read_latency": 1,
                        "p99_read_latency": 1, "avg_write_latency": 1, "p99_write_latency": 1 });
    app.call("bdev_delay_create", &delay).unwrap();
    let update = json!({ "delay_bdev_name": "D", "latency_type": "p99_read", "latency_us": 77 });
    app.call("bdev_delay_update_latency", &update).unwrap();
    let shown = |app: &App| -> Vec<(Value, Value, Value)> {
        let bdevs = app.call("bdev_get_bdevs", &json!({})).unwrap();
        let of = |b: &Value| {
            let latency = b["driver_specific"]["delay"]["p99_read_latency"].clone();
            (b["name"].clone(), b["uuid"].clone(), latency)
        };
        bdevs.as_array().unwrap().iter().map(of).collect()
    };
    let before = shown(&app);
    assert!(before.iter().any(|b| b.2 == 77));
    let again = App::new();
    config::load(&again, "saved", &app.config().to_string()).unwrap();
    assert_eq!(shown(&again), before);
}

#[test]
fn a_check_finds_what_loading_would() {
    let check = |calls: &str| config::check_form("c", &bdev_config(calls)).unwrap_err();
    let e = check(
        r#"{"method":"bdev_malloc_create","params":{"nmae":"x","num_blocks":8,"block_size":512}}"#,
    );
    assert_eq!((e.line, e.key.as_deref()), (3, Some("nmae")));
    let e = check(r#"{"method":"bdev_null_create","params":{"name":"x","num_blocks":8}}"#);
    assert!(e.message.contains("`block_size`: missing"), "{e}");
    let e = check(
        r#"{"method":"bdev_nvme_attach_controller","params":{"name":"N","trtype":"TCP","traddr":"x"}}"#,
    );
    assert_eq!(e.key.as_deref(), Some("trtype"));
    let e = check(r#"{"method":"bdev_nvme_set_options","params":{"timeout_su":1}}"#);
    assert!(e.message.contains("did you mean `timeout_us`"), "{e}");
    let e = check(
        r#"{"method":"bdev_raid_create","params":{"name":"R","raid_level":"raid5","base_bdevs":[]}}"#,
    );
    assert_eq!(e.key.as_deref(), Some("raid_level"));
    // Devices and their bases in any order.
    let malloc = |name: &str| {
        let params = json!({ "name": name, "num_blocks": 8, "block_size": 512 });
        json!({ "method": "bdev_malloc_create", "params": params }).to_string()
    };
    let pt = |name: &str, base: &str| {
        let params = json!({ "name": name, "base_bdev_name": base });
        json!({ "method": "bdev_passthru_create", "params": params }).to_string()
    };
    let e = check(&[pt("P", "Maloc0"), malloc("Malloc0")].join(",\n"));
    assert_eq!((e.line, e.key.as_deref()), (3, Some("base_bdev_name")));
    assert!(e.message.contains("did you mean `Malloc0`"), "{e}");
    let e = check(&[pt("P", "M"), malloc("M"), pt("Q", "M")].join(",\n"));
    assert!(e.line == 5 && e.message.contains("taken by `P`"), "{e}");
    let e = check(&[malloc("M"), malloc("M")].join(",\n"));
    assert!(e.line == 4 && e.message.contains("already"), "{e}");
    // A RAID's bases may be one string.
    let raid = |bases: &str| {
        let params = json!({ "name": "R", "raid_level": "raid0", "base_bdevs": bases });
        json!({ "method": "bdev_raid_create", "params": params }).to_string()
    };
    let e = check(&[malloc("A"), malloc("B"), raid("A C")].join(",\n"));
    assert!(e.line == 5 && e.message.contains("no bdev `C`"), "{e}");
    let both = [malloc("A"), malloc("B"), raid("A  B")].join(",\n");
    config::check_form("c", &bdev_config(&both)).unwrap();
    let nvme = r#"{"method":"bdev_nvme_attach_controller","params":{"name":"Nvme0","trtype":"PCIe","traddr":"0000:5e:00.0"}}"#;
    let split = r#"{"method":"bdev_split_create","params":{"base_bdev":"P","split_count":2}}"#;
    let good = [
        split.to_owned(),
        pt("P", "Nvme0n1"),
        pt("Q", "Pp1"),
        nvme.to_owned(),
    ];
    assert_eq!(
        config::check_form("c", &bdev_config(&good.join(","))),
        Ok(4)
    );
    // Options of later versions are kept.
    let later = r#"{"method":"bdev_nvme_set_options","params":{"an_option_of_the_future":1}}"#;
    assert_eq!(config::check_form("c", &bdev_config(later)), Ok(1));
    config::load(&App::new(), "c", &bdev_config(later)).unwrap();
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
    let options = ServerOptions {
        request_max: 4096,
        clients_max: 8,
        patience: Duration::from_millis(300),
        ..ServerOptions::default()
    };
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

/// A small, seeded variant of the fuzzers: damaged configurations and requests end in errors.
#[test]
fn damaged_input_is_an_error() {
    let seed = 20_250_101;
    let mut rng = SmallRng::seed_from_u64(seed);
    let good = bdev_config(
        "{\"method\":\"bdev_malloc_create\",\"params\":{\"name\":\"M\",\"num_blocks\":64,\"block_size\":512}},\n\
         {\"method\":\"bdev_error_create\",\"params\":{\"base_name\":\"M\"}},\n\
         {\"method\":\"bdev_split_create\",\"params\":{\"base_bdev\":\"EE_M\",\"split_count\":2}}",
    );
    let request = r#"{"jsonrpc":"2.0","id":1,"method":"bdev_get_bdevs","params":{"name":"M"}}"#;
    let odd: [&[u8]; 10] = [
        b"{",
        b"}",
        b"\"",
        b"null",
        b"-1",
        b"1e999",
        b"18446744073709551616",
        b"//",
        b"\\u0000",
        b"[[",
    ];
    for _ in 0..2000 {
        for text in [&good, request] {
            let mut bytes = text.as_bytes().to_vec();
            for _ in 0..rng.random_range(1..4) {
                let at = rng.random_range(0..bytes.len());
                match rng.random_range(0..3) {
                    0 => bytes[at] = rng.random(),
                    1 => {
                        bytes.remove(at);
                    }
                    _ => {
                        let piece = odd[rng.random_range(0..odd.len())];
                        bytes.splice(at..at, piece.iter().copied());
                    }
                }
            }
            let app = App::new();
            let _ = pumice_bdev_control::rpc::handle(&app, &bytes);
            if let Ok(text) = std::str::from_utf8(&bytes) {
                // No large numbers, because a damaged number may ask for any amount of memory.
                let _ = config::check_form("fuzz", text);
                let _ = config::load(&app, "fuzz", text);
            }
        }
    }
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
    let start = std::time::Instant::now();
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
    let (_dir, path, _server) = serve_at(ServerOptions {
        clients_max: 2,
        // Longer than the test may take.
        patience: Duration::from_secs(600),
        ..ServerOptions::default()
    });
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
    let start = std::time::Instant::now();
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

#[test]
fn how_a_file_was_opened_is_saved() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let uri = |name: &str, options: &str| {
        let path = pumice_bdev::file_uri(dir.path().join(name));
        format!("{path}?size=4M&create=1&name={name}&{options}")
    };
    let app = App::new();
    for (name, options) in [
        ("a%b", "buffered=1&prealloc=falloc"),
        ("b", "no_io_uring=1&block_size=4096"),
        ("c", ""),
    ] {
        app.open(&uri(&name.replace('%', "%25"), options)).unwrap();
    }
    let describe = |app: &App| {
        let list = app.call("bdev_get_bdevs", &json!({})).unwrap();
        let of = |b: &Value| {
            let aio = &b["driver_specific"]["aio"];
            let parts = [
                &b["name"],
                &b["num_blocks"],
                &b["block_size"],
                &aio["direct"],
            ];
            (parts.map(Value::clone), aio["io_uring"].clone())
        };
        list.as_array().unwrap().iter().map(of).collect::<Vec<_>>()
    };
    let (saved, seen) = (app.config().to_string(), describe(&app));
    assert_eq!(seen[0].0[3], json!(false));
    assert_eq!(seen[1].1, json!(false));
    drop(app);
    let again = App::new();
    config::load(&again, "saved", &saved).unwrap();
    assert_eq!(describe(&again), seen);
    assert_eq!(again.config().to_string(), saved);
}

#[test]
fn methods_that_operators_use() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let image = dir.path().join("image");
    let file = std::fs::File::create(&image).unwrap();
    file.set_len(1 << 20).unwrap();
    let app = App::new();
    let call = |method: &str, params: Value| app.call(method, &params);
    let blocks = |name: &str| app.registry.get(name).unwrap();
    let blocks = |name: &str| pumice_bdev::BlockDevice::info(&blocks(name)).num_blocks;
    let aio = json!({ "name": "A", "filename": image, "block_size": 512 });
    call("bdev_aio_create", aio).unwrap();
    file.set_len(2 << 20).unwrap();
    call("bdev_aio_rescan", json!({ "name": "A" })).unwrap();
    assert_eq!(blocks("A"), 4096);
    // A device in use keeps its size.
    let channel = pumice_bdev::BlockDevice::open_channel(&*app.registry.open("A").unwrap());
    let e = call("bdev_uring_rescan", json!({ "name": "A" })).unwrap_err();
    assert_eq!(e.code, -i64::from(libc::EBUSY), "{e}");
    drop(channel);
    let split = json!({ "base_bdev": "A", "split_count": 2 });
    call("bdev_split_create", split).unwrap();
    let e = call("bdev_aio_rescan", json!({ "name": "A" })).unwrap_err();
    assert!(e.message.contains("claimed"), "{e}");
    assert!(call("bdev_aio_rescan", json!({ "name": "no" })).is_err());
    // A device that cannot be made again as requested exists as before.
    let null = json!({ "name": "N", "num_blocks": 2048, "block_size": 512 });
    call("bdev_null_create", null).unwrap();
    call("bdev_null_resize", json!({ "name": "N", "new_size": 4 })).unwrap();
    assert_eq!(blocks("N"), 8192);
    // As in SPDK it only becomes longer.
    let e = call("bdev_null_resize", json!({ "name": "N", "new_size": 3 })).unwrap_err();
    assert_eq!(e.code, -i64::from(libc::EINVAL), "{e}");
    let endless = json!({ "name": "N", "new_size": u64::MAX });
    call("bdev_null_resize", endless).unwrap_err();
    assert_eq!(blocks("N"), 8192);
    assert!(app.config().to_string().contains("8192"));

    let nvme = json!({ "name": "Nvme0", "trtype": "SOFT", "traddr": "memory?size=4M" });
    call("bdev_nvme_attach_controller", nvme).unwrap();
    call("bdev_nvme_reset_controller", json!({ "name": "Nvme0" })).unwrap();
    let health = call(
        "bdev_nvme_get_controller_health_info",
        json!({ "name": "Nvme0" }),
    )
    .unwrap();
    assert!(health["temperature_celsius"].is_i64(), "{health}");
    assert!(health["model_number"].is_string() && health["media_errors"].is_number());
    let missing = json!({ "name": "Nvme1" });
    assert!(call("bdev_nvme_reset_controller", missing).is_err());

    for method in [
        "framework_get_reactors",
        "thread_get_stats",
        "thread_get_io_channels",
    ] {
        let answer = call(method, json!({})).unwrap();
        assert!(answer["tick_rate"].as_u64().unwrap() > 0, "{method}");
    }
    let notes = call("notify_get_notifications", json!({ "id": 1, "max": 2 })).unwrap();
    assert_eq!(notes.as_array().unwrap().len(), 2);
    assert_eq!(notes[0]["id"], 1);
    let types = call("notify_get_types", json!({})).unwrap();
    assert!(types.as_array().unwrap().contains(&notes[0]["type"]));
    let e = call("spdk_kill_instance", json!({ "sig_name": "SIGWINCH" })).unwrap_err();
    assert!(e.message.contains("SIGTERM"), "{e}");
}

/// S16: a configuration that never ends, or that nobody writes.
#[test]
fn what_is_no_file_is_no_configuration() {
    let dir = tempfile::tempdir().unwrap();
    let fifo = dir.path().join("fifo");
    assert!(
        std::process::Command::new("mkfifo")
            .arg(&fifo)
            .status()
            .unwrap()
            .success()
    );
    let long = dir.path().join("long");
    std::fs::File::create(&long)
        .unwrap()
        .set_len(17 << 20)
        .unwrap();
    for (path, why) in [
        (fifo.as_path(), "not a regular file"),
        (Path::new("/dev/zero"), "not a regular file"),
        (dir.path(), "not a regular file"),
        (long.as_path(), "longer than"),
    ] {
        let error = config::load_file(&App::new(), path)
            .unwrap_err()
            .to_string();
        assert!(error.contains(why), "{}: {error}", path.display());
    }
}
