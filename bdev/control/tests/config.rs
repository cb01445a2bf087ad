//! Tests of configuration files and of the methods that they share with JSON-RPC.

use std::path::Path;
use std::time::Duration;

use pumice_bdev::{AsyncChannel, DmaBuf};
use pumice_bdev_control::config::{self, App};
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
