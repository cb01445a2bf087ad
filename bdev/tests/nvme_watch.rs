//! A test of the watch over a controller, alone in its process because it counts its threads.

use std::time::{Duration, Instant};

use pumice_bdev_control::config::App;
use pumice_nvme_soft::{MemoryBackend, SoftConfig, SoftController, SoftNamespace, SoftServer};
use serde_json::json;

/// Number of threads of this process that watch a controller.
fn watches() -> usize {
    let tasks = std::fs::read_dir("/proc/self/task").unwrap();
    // A thread may end meanwhile.
    let name = |task: std::fs::DirEntry| std::fs::read_to_string(task.path().join("comm")).ok();
    tasks
        .filter_map(|task| name(task.ok()?))
        .filter(|name| name.trim() == "nvme-watch")
        .count()
}

/// A controller that goes away takes no device of another one that has been attached by its name.
#[test]
fn a_controller_that_goes_takes_no_device_of_its_successor() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("cntrl");
    let disk = SoftNamespace::new(Box::new(MemoryBackend::new(4 << 20)), 512);
    let soft = SoftController::new(SoftConfig::new(vec![disk]).served()).unwrap();
    let server = SoftServer::start(soft.clone(), &path).unwrap();
    let app = App::new();
    let attach = |trtype: &str, traddr: &str| {
        let params = json!({ "name": "Nvme0", "trtype": trtype, "traddr": traddr });
        app.call("bdev_nvme_attach_controller", &params).unwrap();
        app.registry.get("Nvme0n1").unwrap()
    };
    // Somebody still has the first one when it is detached.
    let first = attach("VFIOUSER", path.to_str().unwrap());
    let name = json!({ "name": "Nvme0" });
    app.call("bdev_nvme_detach_controller", &name).unwrap();
    assert!(first.is_removed());
    let second = attach("SOFT", "memory?size=4M");
    let start = Instant::now();
    while watches() != 2 {
        assert!(start.elapsed() < Duration::from_secs(60), "nobody watches");
        std::thread::sleep(Duration::from_millis(5));
    }
    soft.unplug();
    drop(server);
    // The watch over the first one ends when it has removed what it removes.
    while watches() != 1 {
        assert!(
            start.elapsed() < Duration::from_secs(60),
            "it is not noticed"
        );
        std::thread::sleep(Duration::from_millis(5));
    }
    assert!(!second.is_removed(), "the wrong device was removed");
}
