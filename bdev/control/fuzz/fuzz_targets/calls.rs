//! Calls that are nearly always valid: methods and parameters by name, with random values.

use serde_json::{Value, json};

use arbitrary::{Arbitrary, Unstructured};

const METHODS: &[&str] = &[
    "bdev_malloc_create", "bdev_malloc_delete", "bdev_null_create", "bdev_null_delete",
    "bdev_passthru_create", "bdev_passthru_delete", "bdev_delay_create", "bdev_delay_delete",
    "bdev_delay_update_latency", "bdev_error_create", "bdev_error_delete",
    "bdev_error_inject_error", "bdev_error_resume", "bdev_split_create", "bdev_split_delete",
    "bdev_raid_create", "bdev_raid_delete", "bdev_raid_get_bdevs", "bdev_get_bdevs",
    "bdev_get_iostat", "bdev_reset_iostat", "bdev_enable_histogram", "bdev_get_histogram",
    "bdev_nvme_set_options", "bdev_set_options", "bdev_wait_for_examine", "framework_get_config",
    "rpc_get_methods", "save_config", "log_get_flags", "bdev_set_qos_limit", "nonsense",
    "bdev_error_resume_pending", "bdev_nvme_get_controllers", "bdev_nvme_detach_controller",
    "bdev_nvme_attach_controller", "bdev_nvme_set_hotplug", "bdev_examine", "bdev_uring_delete",
    "bdev_raid_set_options", "framework_get_subsystems", "framework_start_init",
    "spdk_get_version", "log_get_level",
];

const KEYS: &[&str] = &[
    "name", "num_blocks", "block_size", "uuid", "base_bdev_name", "base_name", "base_bdev",
    "base_bdevs", "split_count", "split_size_mb", "strip_size_kb", "raid_level", "superblock",
    "avg_read_latency", "p99_read_latency", "avg_write_latency", "p99_write_latency", "io_type",
    "error_type", "num", "corrupt_offset", "corrupt_value", "lba", "category", "enable",
    "per_channel", "md_size", "timeout_us", "action_on_timeout", "latency_type", "latency_us",
    "delay_bdev_name", "optimal_io_boundary", "queue_depth", "flag", "names", "reset_mode",
    "mode", "opc", "granularity", "min_nsec", "trtype", "current", "rw_ios_per_sec",
];

const WORDS: &[&str] = &[
    "M0", "M1", "N0", "P", "D", "R", "EE_M0", "M0p0", "raid0", "0", "all", "clear", "read",
    "write", "failure", "pending", "corrupt_data", "online", "abort", "none", "avg_read", "bdev",
    "maxmin", "unmap", "M0 M1", "TCP", "nomem",
    "", "é\u{0}\"", "0e6b3a1c-0a0b-4c0d-8e0f-101112131415",
];

fn value(u: &mut Unstructured<'_>) -> arbitrary::Result<Value> {
    Ok(match u.int_in_range(0..=9)? {
        0..=3 => json!(u.choose(WORDS)?),
        4 => json!(*u.choose(&[0_u64, 1, 2, 3, 64, 512, 4096, 8192, u64::MAX, 1 << 32])?),
        5 => json!(i64::arbitrary(u)?),
        6 => json!(bool::arbitrary(u)?),
        7 => json!([u.choose(WORDS)?, u.choose(WORDS)?]),
        8 => json!(f64::from(f32::arbitrary(u)?)),
        _ => Value::Null,
    })
}

/// Makes a method's name and its parameters.
pub fn call(u: &mut Unstructured<'_>) -> arbitrary::Result<(String, Value)> {
    let method = (*u.choose(METHODS)?).to_owned();
    let mut params = serde_json::Map::new();
    for _ in 0..u.int_in_range(0..=8)? {
        params.insert((*u.choose(KEYS)?).to_owned(), value(u)?);
    }
    Ok((method, Value::Object(params)))
}
