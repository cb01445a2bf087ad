//! Writes "hello" to a block device and reads it back.
//!
//! ```sh
//! cargo run -p pumice-examples --no-default-features --example hello_bdev -- malloc://1M
//! cargo run -p pumice-examples --no-default-features --example hello_bdev -- --json bdevs.json -b Malloc0
//! ```

use std::process::ExitCode;

use pumice_bdev::{AsyncChannel, BlockDevice, DmaBuf};
use pumice_bdev_control::config::{self, App};

fn main() -> ExitCode {
    match run() {
        Ok(text) => {
            println!("{text}");
            ExitCode::SUCCESS
        }
        Err(e) => {
            eprintln!("hello_bdev: {e}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<String, Box<dyn std::error::Error>> {
    let app = App::new();
    let mut name = None;
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        match arg.as_str() {
            "--json" | "-c" => {
                let file = args.next().ok_or("--json needs a file")?;
                config::load_file(&app, file.as_ref())?;
            }
            "-b" => name = Some(args.next().ok_or("-b needs a name")?),
            flag if flag.starts_with('-') => {
                return Err(format!("{flag}: there are --json FILE, -b NAME, and a URI").into());
            }
            uri => name = Some(uri.to_owned()),
        }
    }
    // Without a name: the first device that no other is built on.
    let name = match name {
        Some(name) => name,
        None => {
            let bdevs = app.registry.list();
            let free = bdevs.iter().find(|b| b.claimed_by().is_none());
            let free = free.ok_or("no bdevs configured: pass --json or a URI")?;
            free.info().name.clone()
        }
    };
    let dev = app.registry.open(&name)?;
    let info = dev.info();

    // A channel belongs to one thread. `block_on` polls it while the futures run.
    let ch = AsyncChannel::new(dev.open_channel()?);
    let mut buf = DmaBuf::zeroed(info.block_size as usize)?;
    buf[..5].copy_from_slice(b"hello");
    let back = ch.block_on(async {
        ch.write(0, buf.freeze(), true).await?;
        ch.read(0, DmaBuf::new(info.block_size as usize)?)
            .await
            .map_err(Box::<dyn std::error::Error>::from)
    })?;
    Ok(format!(
        "{} ({}, {} blocks of {} bytes) says: {}",
        info.name,
        info.product,
        info.num_blocks,
        info.block_size,
        String::from_utf8_lossy(&back[..5])
    ))
}
