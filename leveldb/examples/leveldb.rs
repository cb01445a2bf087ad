//! A LevelDB on a device: `cargo run --example leveldb -- file:///tmp/level.img?size=256M&create=1`.

use std::error::Error;

use pumice_leveldb::BlobFsEnv;
use pumice_leveldb::rusty_leveldb::{DB, LdbIterator, WriteBatch};

fn main() -> Result<(), Box<dyn Error>> {
    let uri = std::env::args()
        .nth(1)
        .unwrap_or_else(|| "malloc://256M".to_owned());
    let env = BlobFsEnv::open(&uri)?;
    let mut db = DB::open("/db", env.options())?;
    for chunk in 0..100_u32 {
        let mut batch = WriteBatch::default();
        for n in 0..100 {
            let key = format!("key {:05}", chunk * 100 + n);
            batch.put(key.as_bytes(), &n.to_le_bytes());
        }
        // The last word makes the batch durable: one sync for a hundred keys.
        db.write(batch, true)?;
    }
    let mut iter = db.new_iter()?;
    let mut count = 0;
    while iter.next().is_some() {
        count += 1;
    }
    drop(iter);
    println!("{count} keys in {uri}");
    db.close()?;
    drop(db);
    env.unmount()?;
    Ok(())
}
