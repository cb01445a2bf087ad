//! What the methods that make and delete devices refuse, and what their parameters do.

use std::path::Path;
use std::time::Duration;

use pumice_bdev::registry::TimeoutAction;
use pumice_bdev::{AsyncChannel, BlockDevice, DmaBuf, Op, OpKind};
use pumice_bdev_control::config::{self, App};
use serde_json::json;

/// A script that has the wrong name does not take away the device of somebody else.
#[test]
fn a_method_deletes_only_devices_of_its_module() {
    let app = App::new();
    for (method, name) in [("bdev_malloc_create", "M"), ("bdev_null_create", "N")] {
        let params = json!({ "name": name, "num_blocks": 4096, "block_size": 512 });
        app.call(method, &params).unwrap();
    }
    for (method, name) in [
        ("bdev_malloc_delete", "N"),
        ("bdev_null_delete", "M"),
        ("bdev_aio_delete", "M"),
        ("bdev_uring_delete", "N"),
        ("bdev_passthru_delete", "M"),
        ("bdev_delay_delete", "M"),
        ("bdev_error_delete", "M"),
        ("bdev_raid_delete", "M"),
    ] {
        let refused = app.call(method, &json!({ "name": name }));
        assert!(refused.is_err(), "{method} {name}");
    }
    assert_eq!(app.registry.names(), ["M", "N"]);
    app.call("bdev_malloc_delete", &json!({ "name": "M" }))
        .unwrap();
    assert_eq!(app.registry.names(), ["N"]);
}

/// A file that was opened for reading only is shared with other readers, and nobody writes to it.
#[test]
fn a_read_only_file_stays_as_it_is() {
    let dir = tempfile::tempdir_in(Path::new(env!("CARGO_TARGET_TMPDIR"))).unwrap();
    let image = dir.path().join("image");
    let bytes = vec![7; 1 << 20];
    std::fs::write(&image, &bytes).unwrap();
    let params = json!({
        "name": "A", "filename": image, "block_size": 512, "readonly": true, "fallocate": false
    });
    let apps = [App::new(), App::new()];
    for app in &apps {
        app.call("bdev_aio_create", &params).unwrap();
        let dev = app.registry.open("A").unwrap();
        assert!(!dev.info().ops.has(OpKind::Write));
        let ch = AsyncChannel::new(dev.open_channel().unwrap());
        let data = DmaBuf::zeroed(512).unwrap().freeze();
        ch.block_on(ch.write(0, data, false)).unwrap_err();
        let read = ch.block_on(ch.read(0, DmaBuf::new(512).unwrap()));
        assert_eq!(read.unwrap()[..], [7; 512]);
        // A configuration that is saved now has it, too.
        assert_eq!(app.bdev_config()[0]["params"]["readonly"], true);
    }
    assert!(std::fs::read(&image).unwrap() == bytes);
}

/// As in SPDK, each kind of `all` has a count of its own, and a later call for one kind takes the
/// place of what `all` has said of it.
#[test]
fn faults_of_all_kinds_are_counted_by_kind() {
    let app = App::new();
    let call = |method: &str, params| app.call(method, &params).unwrap();
    call(
        "bdev_malloc_create",
        json!({ "name": "M", "num_blocks": 4096, "block_size": 512 }),
    );
    call("bdev_error_create", json!({ "base_name": "M" }));
    let inject = |rest: serde_json::Value| {
        let mut params = json!({ "name": "EE_M", "error_type": "failure" });
        let (Some(to), serde_json::Value::Object(from)) = (params.as_object_mut(), rest) else {
            panic!("an object");
        };
        to.extend(from);
        call("bdev_error_inject_error", params);
    };
    let ch = AsyncChannel::new(app.registry.open("EE_M").unwrap().open_channel().unwrap());
    let read = |lba| {
        let read = ch.block_on(ch.read(lba, DmaBuf::new(512).unwrap()));
        read.is_ok()
    };
    let flush = || ch.block_on(ch.flush()).is_ok();
    inject(json!({ "io_type": "all", "num": 1 }));
    assert_eq!(
        [read(0), read(0), flush(), flush()],
        [false, true, false, true]
    );
    inject(json!({ "io_type": "all", "num": 9 }));
    inject(json!({ "io_type": "read", "num": 0 }));
    assert_eq!([read(0), flush()], [true, false]);
    // A fault of some blocks goes with those of all blocks.
    inject(json!({ "io_type": "read", "num": 9, "lba": 5 }));
    inject(json!({ "io_type": "read", "num": 1 }));
    inject(json!({ "io_type": "read", "num": 2, "lba": 7 }));
    assert_eq!([read(5), read(5), read(7)], [false, true, false]);
    inject(json!({ "io_type": "read", "num": 0 }));
    assert!(read(7));
    // A device can be reset whatever faults it has, if they do not name the reset.
    inject(json!({ "io_type": "all", "num": 9 }));
    let reset = || ch.block_on(ch.io(Op::Reset)).1.is_ok();
    assert!(reset());
    inject(json!({ "io_type": "reset", "num": 1 }));
    assert_eq!([reset(), reset()], [false, true]);
    let fua = json!({ "name": "EE_M", "error_type": "failure", "io_type": "fua" });
    let e = app.call("bdev_error_inject_error", &fua).unwrap_err();
    assert!(
        e.message.contains("abort") && !e.message.contains(", fua"),
        "{e:?}"
    );
}

/// Only a device whose base comes later waits for it: everything else of a configuration is done in its order.
#[test]
fn what_names_a_device_of_further_down_is_refused() {
    let app = App::new();
    let call =
        |method: &str, params: serde_json::Value| json!({ "method": method, "params": params });
    let error = call("bdev_error_create", json!({ "base_name": "M" }));
    let memory = json!({ "name": "M", "num_blocks": 4096, "block_size": 512 });
    let memory = call("bdev_malloc_create", memory);
    let params = json!({ "name": "EE_M", "error_type": "failure", "io_type": "all" });
    let inject = call("bdev_error_inject_error", params);
    let load = |calls: [&serde_json::Value; 3]| {
        let text = json!({ "subsystems": [{ "subsystem": "bdev", "config": calls }] });
        config::load(&app, "saved", &text.to_string())
    };
    let e = load([&inject, &error, &memory]).unwrap_err();
    assert!(e.to_string().contains("EE_M"), "{e}");
    assert!(app.registry.names().is_empty());
    let text = json!({ "subsystems": [{ "subsystem": "bdev", "config": [error, memory] }] });
    let app = App::new();
    config::load(&app, "saved", &text.to_string()).unwrap();
    assert_eq!(app.registry.names(), ["EE_M", "M"]);
}

/// A device that has gone and one that has its name now are one call in the saved configuration.
#[test]
fn a_name_that_is_used_again_is_saved_once() {
    let app = App::new();
    let create = |blocks: u64| {
        let params = json!({ "name": "M", "num_blocks": blocks, "block_size": 512 });
        app.call("bdev_malloc_create", &params).unwrap();
    };
    create(64);
    // As when the device goes away by itself: no method has removed it.
    app.registry.remove("M").unwrap();
    create(128);
    let saved = app.config().to_string();
    assert_eq!(saved.matches("bdev_malloc_create").count(), 1, "{saved}");
    app.registry.remove("M").unwrap();
    app.open("null://1M?name=M").unwrap();
    assert_eq!(app.bdev_config()[0]["method"], "bdev_null_create");
    assert_eq!(app.bdev_config()[1]["method"], "bdev_wait_for_examine");
    drop(app);
    let again = App::new();
    config::load(&again, "saved", &saved).unwrap();
    assert_eq!(again.registry.get("M").unwrap().info().num_blocks, 128);
}

/// A few words of a configuration do not make its check work for hours.
#[test]
fn a_check_counts_the_devices_of_a_configuration() {
    let split = |i: u32| {
        let params = json!({ "base_bdev": format!("B{i}"), "split_count": 4096 });
        json!({ "method": "bdev_split_create", "params": params })
    };
    let check = |n| {
        let calls: Vec<_> = (0..n).map(split).collect();
        let text = json!({ "subsystem": "bdev", "config": calls }).to_string();
        config::check_form("x", &text).unwrap_err().message
    };
    // So many can be checked, although none of them has a base.
    assert!(check(16).contains("no bdev `B0`"), "{}", check(16));
    assert!(check(17).contains("more than 65536"), "{}", check(17));
}

/// SPDK's error codes: those of JSON-RPC for parameters, an errno for what a device is or has.
#[test]
fn errors_have_spdks_codes() {
    let app = App::new();
    let malloc = json!({ "name": "M", "num_blocks": 4096, "block_size": 512 });
    app.call("bdev_malloc_create", &malloc).unwrap();
    for (method, params, code) in [
        ("framework_get_config", json!({ "name": "nvmf" }), -32602),
        ("bdev_get_bdevs", json!({ "name": "N" }), -libc::ENODEV),
        ("bdev_malloc_create", malloc, -libc::EEXIST),
        ("bdev_malloc_create", json!({ "num_blocks": 8 }), -32602),
        ("bdev_get_histogram", json!({ "name": "M" }), -libc::EFAULT),
        ("bdev_error_delete", json!({ "name": "M" }), -libc::ENODEV),
        ("bdev_nothing", json!({}), -32601),
    ] {
        let e = app.call(method, &params).unwrap_err();
        assert_eq!(e.code, i64::from(code), "{method}: {e}");
    }
}

/// An ability that is asked for and does not exist is an error, which names the parameter.
#[test]
fn what_does_not_exist_is_refused_by_name() {
    let app = App::new();
    let malloc = json!({ "name": "M", "num_blocks": 4096, "block_size": 512 });
    app.call("bdev_malloc_create", &malloc).unwrap();
    let raid = json!({ "name": "R", "raid_level": "raid0", "base_bdevs": ["M"] });
    let nvme = json!({ "name": "N", "trtype": "SOFT", "traddr": "memory?size=4M" });
    let null = json!({ "name": "O", "num_blocks": 8, "block_size": 512 });
    let limit = json!({ "name": "M", "rw_ios_per_sec": 0 });
    for (method, params, key, asked) in [
        ("bdev_raid_create", &raid, "superblock", json!(true)),
        (
            "bdev_nvme_attach_controller",
            &nvme,
            "prchk_reftag",
            json!(true),
        ),
        (
            "bdev_nvme_attach_controller",
            &nvme,
            "prchk_guard",
            json!(true),
        ),
        ("bdev_null_create", &null, "md_size", json!(8)),
        ("bdev_null_create", &null, "dif_type", json!(1)),
        ("bdev_set_qos_limit", &limit, "rw_ios_per_sec", json!(1000)),
        ("bdev_set_qos_limit", &limit, "w_mbytes_per_sec", json!(10)),
    ] {
        let mut params = params.clone();
        params[key] = asked;
        let e = app.call(method, &params).unwrap_err();
        assert_eq!(
            (e.code, e.key.as_deref()),
            (-32602, Some(key)),
            "{method}: {e}"
        );
    }
    assert_eq!(app.registry.names(), ["M"]);
    assert!(app.registry.get("M").unwrap().claimed_by().is_none());
    app.call("bdev_set_qos_limit", &limit).unwrap();
}

/// A device is divided completely or not at all, and put together again without others.
#[test]
fn a_split_is_made_and_deleted_as_a_whole() {
    let app = App::new();
    let call = |method: &str, params| app.call(method, &params);
    for name in ["A", "B", "Ap1"] {
        let params = json!({ "name": name, "num_blocks": 4096, "block_size": 512 });
        call("bdev_malloc_create", params).unwrap();
    }
    let split = |base: &str| json!({ "base_bdev": base, "split_count": 3 });
    call("bdev_split_create", split("A")).unwrap_err();
    assert_eq!(app.registry.names(), ["A", "Ap1", "B"]);
    call("bdev_malloc_delete", json!({ "name": "Ap1" })).unwrap();
    for base in ["A", "B"] {
        call("bdev_split_create", split(base)).unwrap();
    }
    call("bdev_split_delete", json!({ "base_bdev": "A" })).unwrap();
    assert_eq!(app.registry.names(), ["A", "B", "Bp0", "Bp1", "Bp2"]);
}

/// An option that a call does not give keeps its value.
#[test]
fn options_that_are_not_given_stay() {
    let app = App::new();
    let set = |params| app.call("bdev_nvme_set_options", &params).unwrap();
    let now = || app.registry.timeout();
    let ms = Duration::from_millis;
    set(json!({ "timeout_us": 5000, "action_on_timeout": "reset" }));
    assert_eq!(now(), (ms(5), TimeoutAction::Reset));
    set(json!({ "timeout_us": 7000 }));
    assert_eq!(now(), (ms(7), TimeoutAction::Reset));
    set(json!({ "action_on_timeout": "abort" }));
    assert_eq!(now(), (ms(7), TimeoutAction::Abort));
    set(json!({ "retry_count": 3 }));
    assert_eq!(now(), (ms(7), TimeoutAction::Abort));
}

/// A process that only answers questions is changed by no method.
#[test]
fn a_process_that_only_answers_is_not_changed() {
    let app = App::new();
    let dev = app.open("malloc://1M?name=M").unwrap();
    let ch = AsyncChannel::new(dev.open_channel().unwrap());
    ch.block_on(ch.read(0, DmaBuf::new(512).unwrap())).unwrap();
    app.answer_only(&["own_get_answer"], |_, _| Ok(json!(42)));
    let call = |method: &str, params| app.call(method, &params);
    assert_eq!(call("own_get_answer", json!({})).unwrap(), 42);
    for (method, params) in [
        ("bdev_malloc_delete", json!({ "name": "M" })),
        (
            "bdev_null_create",
            json!({ "name": "N", "num_blocks": 8, "block_size": 512 }),
        ),
        ("bdev_reset_iostat", json!({})),
        ("bdev_get_iostat", json!({ "reset_mode": "all" })),
        ("bdev_get_iostat", json!({ "reset_mode": "maxmin" })),
        ("spdk_kill_instance", json!({ "sig_name": "SIGKILL" })),
    ] {
        let e = call(method, params).unwrap_err();
        assert_eq!(e.code, -i64::from(libc::EPERM), "{method}: {e}");
    }
    let stat = call("bdev_get_iostat", json!({ "reset_mode": "none" })).unwrap();
    assert_eq!(stat["bdevs"][0]["num_read_ops"], 1);
    assert_eq!(app.registry.names(), ["M"]);
}

/// A method that changes a device changes none that has gone, whether it was deleted or went by
/// itself, and finds it by each of its names.
#[test]
fn a_device_that_has_gone_is_not_changed() {
    for deleted in [true, false] {
        changes_what_is_there(deleted);
    }
}

fn changes_what_is_there(deleted: bool) {
    let app = App::new();
    let call = |method: &str, params| app.call(method, &params);
    let malloc = |name: &str| json!({ "name": name, "num_blocks": 64, "block_size": 512 });
    call("bdev_malloc_create", malloc("M")).unwrap();
    let delay = json!({ "name": "D", "base_bdev_name": "M", "avg_read_latency": 1,
                        "p99_read_latency": 1, "avg_write_latency": 1, "p99_write_latency": 1 });
    call("bdev_delay_create", delay).unwrap();
    call("bdev_error_create", json!({ "base_name": "D" })).unwrap();
    let uuid = |name: &str| pumice_bdev::uuid::format(&app.registry.get(name).unwrap().info().uuid);
    let update = |name: &str| {
        let params =
            json!({ "delay_bdev_name": name, "latency_type": "p99_read", "latency_us": 7 });
        call("bdev_delay_update_latency", params)
    };
    let inject = |name: &str| {
        let params = json!({ "name": name, "io_type": "read", "error_type": "failure" });
        call("bdev_error_inject_error", params)
    };
    inject(&uuid("EE_D")).unwrap();
    update(&uuid("D")).unwrap();
    assert_eq!(app.bdev_config()[1]["params"]["p99_read_latency"], 7);
    if deleted {
        call("bdev_delay_delete", json!({ "name": "D" })).unwrap();
    } else {
        app.registry.remove("D").unwrap();
    }
    for name in ["D", "EE_D"] {
        call("bdev_malloc_create", malloc(name)).unwrap();
    }
    for answer in [update("D"), inject("EE_D")] {
        let e = answer.unwrap_err();
        assert_eq!(e.code, -i64::from(libc::ENODEV), "{e}");
    }
}

/// Several clients that change devices at the same time do not get at each other's.
#[test]
fn clients_that_resize_at_the_same_time_keep_their_devices() {
    let app = App::new();
    let create = |name: &str| {
        let params = json!({ "name": name, "num_blocks": 4096, "block_size": 512 });
        app.call("bdev_null_create", &params)
    };
    std::thread::scope(|scope| {
        for client in 0..3 {
            let (app, create) = (&app, &create);
            scope.spawn(move || {
                let name = format!("N{client}");
                for _ in 0..500 {
                    create(&name).unwrap();
                    for mib in 2..4 {
                        let params = json!({ "name": name, "new_size": mib });
                        app.call("bdev_null_resize", &params).unwrap();
                    }
                    let bdev = app.registry.get(&name).unwrap();
                    assert_eq!(bdev.info().len_bytes(), 3 << 20);
                    app.call("bdev_null_delete", &json!({ "name": name }))
                        .unwrap();
                }
                create(&name).unwrap();
            });
        }
    });
    let saved = app.bdev_config();
    let count = saved.iter().filter(|c| c["method"] == "bdev_null_create");
    assert_eq!(count.count(), 3);
}
