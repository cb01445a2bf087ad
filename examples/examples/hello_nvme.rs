//! Writes a greeting to an NVMe namespace and reads it back.
//!
//! Without an argument it runs on a controller in this process: no device, no root, no set-up. With
//! a URI it uses that controller and OVERWRITES its first block:
//!
//! ```text
//! cargo run -p pumice-examples --no-default-features --example hello_nvme
//! cargo run … --example hello_nvme -- nvme://0000:01:00.0/1      # after: pumice setup bind
//! cargo run … --example hello_nvme -- vfio-user:///run/cntrl/1
//! ```

use std::time::Duration;

use pumice_nvme::dma::DmaBuf;
use pumice_nvme::spec::ascii;
use pumice_nvme::{Op, QueueOptions};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let uri = std::env::args()
        .nth(1)
        .unwrap_or_else(|| "soft://memory?size=16M".into());

    // The controller is reset, enabled and identified; its namespaces are listed.
    let opened = pumice_nvme_soft::open(&uri)?;
    let id = opened.controller.identify()?;
    let ns = opened.namespace()?;
    println!(
        "{}: {}, namespace {}: {} blocks of {} bytes",
        opened.controller.name(),
        ascii(&id.mn),
        ns.nsid(),
        ns.num_blocks(),
        ns.block_size()
    );

    // A queue pair belongs to this thread.
    let mut queue = opened
        .controller
        .queue_pair(&QueueOptions::default().depth(8))?;

    // Buffers are ordinary memory that the device can access. They move into the I/O …
    let mut block = DmaBuf::zeroed(ns.block_size() as usize)?;
    block[..12].copy_from_slice(b"Hello, NVMe!");
    let write = Op::Write {
        lba: 0,
        data: block.freeze(),
        fua: true,
    };
    queue.submit(&ns, 1, write)?;

    // … and come back with its completion: poll, and wait (spin, then sleep) when there is none.
    let mut done = Vec::new();
    while queue.poll(&mut done) == 0 {
        queue.wait(Duration::from_secs(1))?;
    }
    done.remove(0).result?;

    let buf = DmaBuf::zeroed(ns.block_size() as usize)?;
    queue.submit(&ns, 2, Op::Read { lba: 0, buf })?;
    while queue.poll(&mut done) == 0 {
        queue.wait(Duration::from_secs(1))?;
    }
    let read = done.remove(0);
    read.result?;
    if let Op::Read { buf, .. } = read.op {
        println!("block 0 says: {}", String::from_utf8_lossy(&buf[..12]));
    }
    Ok(())
}
