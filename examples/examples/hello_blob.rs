//! A first use of the blobstore: make a store, create a blob, give it a size, write, read back,
//! delete.
//!
//! ```sh
//! cargo run -p pumice-examples --no-default-features --example hello_blob                    # on 64 MiB of memory
//! cargo run … --example hello_blob -- 'file:///tmp/hello.img?size=64M&create=1'
//! cargo run … --example hello_blob -- --json bdevs.json -b Malloc0
//! ```
//! It OVERWRITES whatever the device holds.

use pumice_bdev::{BlockDevice, DmaBuf};
use pumice_bdev_control::config::{self, App};
use pumice_blobfs::blobstore::{Blobstore, CreateOptions, InitOptions};

fn main() {
    if let Err(error) = hello() {
        eprintln!("hello_blob: {error}");
        std::process::exit(1);
    }
}

fn hello() -> Result<(), Box<dyn std::error::Error>> {
    let app = App::new();
    let mut name = None;
    let mut configured = false;
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        // SPDK's example takes a configuration without a flag.
        let file = match arg.as_str() {
            "--json" | "-c" => args.next().ok_or("--json needs a file")?,
            "-b" => {
                name = Some(args.next().ok_or("-b needs a name")?);
                continue;
            }
            file if file.ends_with(".json") => arg,
            flag if flag.starts_with('-') => {
                return Err(format!("{flag}: there are --json FILE, -b NAME, and a URI").into());
            }
            _ => {
                name = Some(arg);
                continue;
            }
        };
        config::load_file(&app, file.as_ref())?;
        configured = true;
    }
    println!("entry");
    // Without a name: the configuration's first device that no other is built on.
    let name = match name {
        Some(name) => name,
        None if configured => {
            let bdevs = app.registry.list();
            let free = bdevs.iter().find(|b| b.claimed_by().is_none());
            free.ok_or("no bdevs configured")?.info().name.clone()
        }
        None => "malloc://64M?block_size=4096".to_owned(),
    };
    let dev = app.registry.open(&name)?;
    println!(
        "device: {} ({}, blocks of {} bytes)",
        dev.info().name,
        dev.info().product,
        dev.info().block_size
    );

    // The store uses the whole device.
    let store = Blobstore::init(dev, &InitOptions::default())?;
    println!("init complete: clusters of {} bytes", store.cluster_size());

    let id = store.create(&CreateOptions::default())?;
    println!("blob created: id {id}");

    let blob = store.open(id)?;
    println!(
        "blob open: the store has {} free clusters",
        store.free_clusters()
    );

    // A new blob has no clusters. This one gets all free clusters.
    blob.resize(store.free_clusters())?;
    println!(
        "resized: the blob has {} used clusters",
        blob.num_clusters()
    );

    blob.sync_md()?;
    println!("sync complete");

    // I/O uses memory that the device can access, in io units.
    let unit = usize::try_from(store.io_unit_size())?;
    let mut data = DmaBuf::new(unit)?;
    data.fill(0x5a);
    blob.write_at(0, data.freeze(), true)?;
    println!("write complete: {unit} bytes");

    let read = blob.read_at(0, DmaBuf::new(unit)?)?;
    println!("read complete");
    if read.iter().any(|byte| *byte != 0x5a) {
        return Err("the data read is not the data written".into());
    }
    println!("read SUCCESS and data matches!");

    // A blob is deleted when nobody has it open.
    drop(blob);
    store.delete(id)?;
    println!("delete complete");

    store.unload()?;
    println!("unload complete");
    println!("SUCCESS!");
    Ok(())
}
