//! `pumice mkfs`: makes an empty BlobFS.

use std::process::ExitCode;
use std::sync::Arc;

use clap::Args;
use pumice_bdev::{BlockDevice, file_uri, parse_size};
use pumice_bdev_control::say;
use pumice_bdev_control::terminal::print_json;
use pumice_blobfs::fs::{FileSystem, FormatOptions, Journal, MountOptions, StatFs};
use serde_json::json;

use crate::failure::{Failure, fail};
use crate::files::human;

/// Make an empty file system on a device or an image file
#[derive(Args)]
pub struct Mkfs {
    /// Device: file:///path, /path, malloc://1G, nvme://0000:01:00.0
    uri: String,
    /// Size of a new image file: 4G, 512M. An existing file must have this size already. A new
    /// image has blocks of 4096 bytes unless the URI says block_size=512: such an image also works
    /// on a disk with 512-byte sectors
    #[arg(long, value_parser = size)]
    size: Option<u64>,
    /// Bytes of a cluster, the unit of allocation; a multiple of 4096
    #[arg(long, value_parser = size, default_value = "64K")]
    cluster_size: u64,
    /// Metadata pages to begin with, at least 16; a file uses one or more. The default is two per
    /// MiB, at most 16384. More are added when three quarters are used
    #[arg(long)]
    md_pages: Option<u32>,
    /// Bytes of the journal for changes of metadata and small syncs, 128K to 256M; `auto` is a 64th
    /// of the device, at most 32M. SPDK refuses a file system with a journal until it has been
    /// unmounted in order. With `none` a power cut must not tear metadata pages of 4 KiB
    #[arg(long, value_name = "SIZE|auto|none", default_value = "auto", value_parser = journal)]
    journal: Journal,
    /// Overwrite any content of the device; without it only zeroes are overwritten
    #[arg(long)]
    force: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

fn size(text: &str) -> Result<u64, String> {
    parse_size(text)
}

/// Parses the size of a journal.
pub fn journal(text: &str) -> Result<Journal, String> {
    match text {
        "auto" => Ok(Journal::Auto),
        "none" => Ok(Journal::None),
        text => parse_size(text).map(Journal::Bytes),
    }
}

/// Runs the command.
pub fn run(args: &Mkfs) -> ExitCode {
    match make(args) {
        Ok(made) => {
            if args.json {
                let made = json!({
                    "device": args.uri,
                    "total_bytes": made.total,
                    "free_bytes": made.free,
                    "cluster_size": made.cluster,
                    "journal_bytes": made.journal,
                    "md_pages": made.md_pages,
                });
                print_json(&made);
            } else {
                let journal = match made.journal {
                    0 => "no journal".to_owned(),
                    bytes => format!("a journal of {}", human(bytes)),
                };
                say!(
                    "{}: BlobFS of {}, clusters of {}, {} pages of metadata, {journal}",
                    args.uri,
                    human(made.total),
                    human(made.cluster),
                    made.md_pages
                );
            }
            ExitCode::SUCCESS
        }
        Err(e) => fail("mkfs", &e),
    }
}

fn make(args: &Mkfs) -> Result<StatFs, Failure> {
    let cluster_size = u32::try_from(args.cluster_size)
        .map_err(|_| Failure::from("--cluster-size: at most 4 GiB less one page".to_owned()))?;
    let dev: Arc<dyn BlockDevice> = pumice_bdev::open(&with_size(&args.uri, args.size)?)?;
    let format = FormatOptions::default()
        .cluster_size(cluster_size)
        .md_pages(args.md_pages)
        .journal(args.journal)
        .force(args.force);
    FileSystem::format(Arc::clone(&dev), &format)?;
    // The result is checked by mounting it.
    let fs = FileSystem::mount(dev, &MountOptions::default().read_only(true))?;
    let made = fs.statfs();
    fs.unmount()?;
    Ok(made)
}

/// Returns the URI of an image file that is created if it does not exist.
fn with_size(uri: &str, size: Option<u64>) -> Result<String, Failure> {
    let Some(size) = size else {
        return Ok(uri.to_owned());
    };
    let is_file = uri.starts_with("file://") || !uri.contains("://");
    if !is_file {
        let text = "--size is for image files; the size of a device is fixed";
        return Err(Failure::from(text.to_owned()));
    }
    let uri = if uri.contains("://") {
        uri.to_owned()
    } else {
        file_uri(uri)
    };
    let separator = if uri.contains('?') { '&' } else { '?' };
    // An image with blocks of 4096 bytes can be moved to a disk with such sectors, and works on
    // blocks of 512 bytes too. An image with blocks of 512 bytes works on these only.
    let block_size = if uri.contains("block_size=") {
        ""
    } else {
        "&block_size=4096"
    };
    Ok(format!("{uri}{separator}size={size}&create=1{block_size}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_journal_has_a_size_or_is_none() {
        assert_eq!(journal("auto"), Ok(Journal::Auto));
        assert_eq!(journal("none"), Ok(Journal::None));
        assert_eq!(journal("2M"), Ok(Journal::Bytes(2 << 20)));
        assert!(journal("some").is_err());
    }

    #[test]
    fn sizes_go_into_the_uri() {
        assert_eq!(with_size("/a", None).unwrap(), "/a");
        assert_eq!(
            with_size("/a%b?", Some(5)).unwrap(),
            "file:///a%25b%3F?size=5&create=1&block_size=4096"
        );
        assert_eq!(
            with_size("file:///a?block_size=512", Some(5)).unwrap(),
            "file:///a?block_size=512&size=5&create=1"
        );
        assert!(with_size("nvme://0000:01:00.0", Some(5)).is_err());
    }
}
