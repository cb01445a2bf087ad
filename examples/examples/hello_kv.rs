//! RocksDB on an image file: no root, no set-up.
//!
//! `cargo run --release -p pumice-examples --example hello_kv`

use pumice::rocksdb::{IteratorMode, WriteOptions};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let dir = tempfile::tempdir()?;
    let device = format!(
        "file://{}/hello.img?size=256M&create=1",
        dir.path().display()
    );

    // The image is created, formatted and mounted, and the database is created in it.
    let db = pumice::Db::open(&device)?;
    db.put("apple", "red")?;
    db.put("pear", "green")?;

    // The write is durable when this returns.
    let mut durable = WriteOptions::default();
    durable.set_sync(true);
    db.put_opt("plum", "blue", &durable)?;
    db.close()?;

    // Open it again, as after a restart.
    let db = pumice::Db::open(&device)?;
    for item in db.iterator(IteratorMode::Start) {
        let (fruit, colour) = item?;
        println!(
            "{} is {}",
            String::from_utf8_lossy(&fruit),
            String::from_utf8_lossy(&colour)
        );
    }

    // RocksDB's files are in BlobFS; the kernel sees one file, the device.
    for entry in db.file_system().list("/")? {
        println!("in BlobFS: /{}", entry.name);
    }
    db.close()?;
    for entry in std::fs::read_dir(dir.path())? {
        println!(
            "in the kernel's file system: {}",
            entry?.file_name().display()
        );
    }
    Ok(())
}
