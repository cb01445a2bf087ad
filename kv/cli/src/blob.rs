//! `pumice blob`: commands for the blobs of a blobstore.

mod dump;
mod transfer;

use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use clap::{Args, Subcommand, ValueEnum};
use pumice_bdev::parse_size;
use pumice_bdev_control::terminal::{Lines, print_json, visible};
use pumice_bdev_control::{complain, say};
use pumice_blobfs::blobstore::{
    Blob, BlobId, Blobstore, BsType, CreateOptions, ExternalOpener, InitOptions, LoadOptions,
    Parent,
};
use serde_json::{Value, json};

use crate::access::open_to_read;
use crate::signals;

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

/// Show and change a blobstore: blobs, xattrs, snapshots, contents
#[derive(Args)]
pub struct BlobArgs {
    #[command(subcommand)]
    action: Action,
    /// Print JSON
    #[arg(long, global = true)]
    json: bool,
    /// Device of the external snapshots of clones
    #[arg(long, global = true, value_name = "URI")]
    external: Option<String>,
}

#[derive(Args)]
struct Target {
    /// Device: file:///path, malloc://64M, …
    uri: String,
    /// Blob, such as 0x100000000
    id: BlobId,
}

#[derive(Subcommand)]
enum Action {
    /// Make an empty blobstore
    Init {
        /// Device
        uri: String,
        /// Bytes of a cluster
        #[arg(long, default_value = "1M", value_parser = parse_size)]
        cluster_size: u64,
        /// Metadata pages [default: one per cluster]
        #[arg(long)]
        md_pages: Option<u32>,
        /// Type of at most 16 bytes, such as BLOBFS or LVOLSTORE; none by default
        #[arg(long, default_value = "", hide_default_value = true)]
        bstype: BsType,
        /// Overwrite any content of the device
        #[arg(long)]
        force: bool,
    },
    /// List the blobs
    List {
        /// Device
        uri: String,
    },
    /// Show a blob: size, flags, xattrs, and the places of its clusters
    Show(Target),
    /// Create a blob; prints its id
    Create {
        /// Device
        uri: String,
        /// Size in bytes, rounded up to clusters
        #[arg(long, default_value = "0", value_parser = parse_size)]
        size: u64,
        /// Allocate clusters when they are first written
        #[arg(long)]
        thin: bool,
        /// An xattr, repeatable
        #[arg(long, value_name = "NAME=VALUE")]
        xattr: Vec<String>,
    },
    /// Change the size of a blob
    Resize {
        #[command(flatten)]
        target: Target,
        /// Size in bytes, rounded up to clusters
        #[arg(value_parser = parse_size)]
        size: u64,
    },
    /// Set an xattr
    SetXattr {
        #[command(flatten)]
        target: Target,
        /// Name of the xattr
        name: String,
        /// Value; without one the xattr is removed
        value: Option<String>,
        /// Form of the value
        #[arg(long, value_enum, default_value_t = Form::Text)]
        form: Form,
    },
    /// Make a snapshot of a blob; prints its id
    Snapshot(Target),
    /// Make a clone of a snapshot; prints its id
    Clone(Target),
    /// Give a clone all its clusters and make it thick
    Inflate(Target),
    /// Copy the parent's clusters to a clone and make the parent's parent its parent
    Decouple(Target),
    /// Make a snapshot of the same size the parent of a blob
    SetParent {
        #[command(flatten)]
        target: Target,
        /// The snapshot
        parent: BlobId,
    },
    /// Make a blob permanently read-only
    SetReadOnly(Target),
    /// Write a file into a blob
    Import {
        /// Device
        uri: String,
        /// Blob, or `new` for a new one, whose id is printed
        id: String,
        /// File, or - for standard input
        file: PathBuf,
        /// Make a new blob thin: zeroes take no clusters
        #[arg(long)]
        thin: bool,
    },
    /// Write the whole content of a blob into a file
    Export {
        #[command(flatten)]
        target: Target,
        /// File, or - for standard output
        file: PathBuf,
    },
    /// Print the super block, the masks and every metadata page, decoded
    Dump {
        /// Device
        uri: String,
        /// Print only pages of this blob
        id: Option<BlobId>,
    },
    /// Delete a blob
    Delete(Target),
    /// Use the whole device after it has become larger
    Grow {
        /// Device
        uri: String,
    },
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Form {
    /// The value as text
    Text,
    /// The value followed by a NUL, as in BlobFS's names
    Cstring,
    /// A number, stored in eight bytes, little-endian, as in BlobFS's lengths
    U64,
    /// Hexadecimal digits
    Hex,
}

/// Runs the command.
pub fn run(args: &BlobArgs) -> ExitCode {
    match act(args) {
        Ok(()) => ExitCode::SUCCESS,
        // The reader of the output may stop reading.
        Err(error) if is_broken_pipe(&*error) => ExitCode::SUCCESS,
        Err(error) => {
            complain!("pumice blob: {error}");
            ExitCode::FAILURE
        }
    }
}

fn is_broken_pipe(error: &(dyn std::error::Error + 'static)) -> bool {
    error
        .downcast_ref::<io::Error>()
        .is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
}

fn load_options(args: &BlobArgs, read_only: bool) -> LoadOptions {
    let mut opts = LoadOptions::default().read_only(read_only);
    if let Some(uri) = args.external.clone() {
        let read = pumice_bdev::OpenOptions::new().read_only(true);
        let open = move |_: BlobId, _: &[u8]| pumice_bdev::open_with(&uri, read);
        opts.open_external = Some(Arc::new(open) as Arc<dyn ExternalOpener>);
    }
    opts
}

fn look(args: &BlobArgs, uri: &str) -> Result<Blobstore> {
    Ok(Blobstore::load(
        open_to_read(uri).map_err(|e| e.to_string())?,
        &load_options(args, true),
    )?)
}

/// Loads the store, calls `change`, and unloads the store in order.
fn with_store<T>(
    args: &BlobArgs,
    uri: &str,
    change: impl FnOnce(&Blobstore) -> Result<T>,
) -> Result<T> {
    signals::catch().map_err(|e| e.to_string())?;
    let store = Blobstore::load(pumice_bdev::open(uri)?, &load_options(args, false))?;
    let result = change(&store);
    let unloaded = store.unload();
    let result = result?;
    unloaded?;
    Ok(result)
}

fn act(args: &BlobArgs) -> Result<()> {
    let print_id = |id: BlobId| {
        let line = if args.json {
            json!({ "id": id.to_string() }).to_string()
        } else {
            id.to_string()
        };
        say!("{line}");
    };
    match &args.action {
        Action::Init {
            uri,
            cluster_size,
            md_pages,
            bstype,
            force,
        } => {
            init(uri, *cluster_size, *md_pages, *bstype, *force)?;
        }
        Action::List { uri } => list(&look(args, uri)?, args.json)?,
        Action::Show(target) => show(&look(args, &target.uri)?, target.id, args.json)?,
        Action::Create {
            uri,
            size,
            thin,
            xattr,
        } => {
            let mut xattrs = Vec::new();
            for pair in xattr {
                let (name, value) = pair
                    .split_once('=')
                    .ok_or(format!("--xattr {pair}: write NAME=VALUE"))?;
                xattrs.push((name.to_owned(), value.as_bytes().to_vec()));
            }
            let id = with_store(args, uri, |store| {
                let num_clusters = size.div_ceil(store.cluster_size());
                Ok(store.create(
                    &CreateOptions::default()
                        .num_clusters(num_clusters)
                        .thin(*thin)
                        .xattrs(xattrs),
                )?)
            })?;
            print_id(id);
        }
        Action::Resize { target, size } => with_store(args, &target.uri, |store| {
            let blob = store.open(target.id)?;
            Ok(blob.resize(size.div_ceil(store.cluster_size()))?)
        })?,
        Action::SetXattr {
            target,
            name,
            value,
            form,
        } => {
            let value = value
                .as_deref()
                .map(|value| to_bytes(value, *form))
                .transpose()?;
            with_store(args, &target.uri, |store| {
                let blob = store.open(target.id)?;
                match &value {
                    Some(value) => blob.set_xattr(name, value)?,
                    None => blob.remove_xattr(name)?,
                }
                Ok(blob.sync_md()?)
            })?;
        }
        Action::Snapshot(target) => {
            print_id(with_store(args, &target.uri, |store| {
                Ok(store.snapshot(target.id, &[])?)
            })?);
        }
        Action::Clone(target) => {
            print_id(with_store(args, &target.uri, |store| {
                Ok(store.clone_blob(target.id, &[])?)
            })?);
        }
        Action::Inflate(target) => {
            with_store(args, &target.uri, |store| Ok(store.inflate(target.id)?))?;
        }
        Action::Decouple(target) => {
            with_store(args, &target.uri, |store| Ok(store.decouple(target.id)?))?;
        }
        Action::SetParent { target, parent } => {
            with_store(args, &target.uri, |store| {
                Ok(store.set_parent(target.id, *parent)?)
            })?;
        }
        Action::SetReadOnly(target) => with_store(args, &target.uri, |store| {
            Ok(store.set_read_only(target.id)?)
        })?,
        Action::Import {
            uri,
            id,
            file,
            thin,
        } => transfer::import(args, uri, id, file, *thin, print_id)?,
        Action::Export { target, file } => {
            transfer::export(&look(args, &target.uri)?, target.id, file)?;
        }
        Action::Dump { uri, id } => dump::run(uri, *id, args.json)?,
        Action::Delete(target) => {
            with_store(args, &target.uri, |store| Ok(store.delete(target.id)?))?;
        }
        Action::Grow { uri } => {
            let gained = with_store(args, uri, |store| Ok(store.grow()?))?;
            say!("{gained} clusters more");
        }
    }
    Ok(())
}

fn init(
    uri: &str,
    cluster_size: u64,
    md_pages: Option<u32>,
    bstype: BsType,
    force: bool,
) -> Result<()> {
    let dev = pumice_bdev::open(uri)?;
    let cluster_size =
        u32::try_from(cluster_size).map_err(|_| "clusters of 4 GiB and more are too large")?;
    let opts = InitOptions::default()
        .cluster_size(cluster_size)
        .md_pages(md_pages)
        .bstype(bstype)
        .force(force);
    let store = Blobstore::init(dev, &opts)?;
    store.unload()?;
    writeln!(
        Lines,
        "{} clusters of {cluster_size} bytes, {} metadata pages",
        store.total_clusters(),
        store.md_pages().total
    )?;
    Ok(())
}

fn list(store: &Blobstore, as_json: bool) -> Result<()> {
    let mut out = Lines;
    let damaged = store.damaged();
    let blobs: Vec<Value> = store
        .blobs()
        .into_iter()
        .map(|id| describe(store, id, false))
        .collect();
    if as_json {
        let damaged: Vec<Value> = damaged
            .iter()
            .map(|(id, error)| json!({ "id": id.to_string(), "problem": error.to_string() }))
            .collect();
        let value = json!({
            "bstype": store.bstype().to_string(),
            "cluster_size": store.cluster_size(),
            "io_unit_size": store.io_unit_size(),
            "total_clusters": store.total_clusters(),
            "free_clusters": store.free_clusters(),
            "md_pages": store.md_pages().total,
            "used_md_pages": store.md_pages().used,
            "super_blob": store.super_blob().map(|id| id.to_string()),
            "blobs": blobs,
            "damaged": damaged,
        });
        print_json(&value);
        return Ok(());
    }
    writeln!(
        out,
        "type \"{}\", clusters of {} bytes, {} of {} free, {} of {} metadata pages used, super blob {}",
        store.bstype(),
        store.cluster_size(),
        store.free_clusters(),
        store.total_clusters(),
        store.md_pages().used,
        store.md_pages().total,
        store
            .super_blob()
            .map_or("none".to_owned(), |id| id.to_string()),
    )?;
    for blob in blobs {
        let text = |key: &str| blob[key].as_str().unwrap_or("").to_owned();
        if blob["problem"].is_string() {
            writeln!(out, "{}  cannot be opened: {}", text("id"), text("problem"))?;
            continue;
        }
        let flag = |key: &str, name: &str| {
            if blob[key] == true {
                format!(" {name}")
            } else {
                String::new()
            }
        };
        let parent = if blob["parent"].is_string() {
            format!(" of {}", text("parent"))
        } else {
            String::new()
        };
        writeln!(
            out,
            "{}  {:>8} clusters, {:>8} allocated{}{}{parent}{}",
            text("id"),
            blob["clusters"].to_string(),
            blob["allocated"].to_string(),
            flag("thin", "thin"),
            flag("read_only", "read-only"),
            if blob["name"].is_string() {
                format!("  {}", visible(&text("name")))
            } else {
                String::new()
            },
        )?;
    }
    for (id, error) in damaged {
        writeln!(out, "{id}  damaged: {error}")?;
    }
    Ok(())
}

/// Returns the description of a blob.
fn describe(store: &Blobstore, id: BlobId, all: bool) -> Value {
    let blob = match store.open(id) {
        Ok(blob) => blob,
        Err(error) => return json!({ "id": id.to_string(), "problem": error.to_string() }),
    };
    let parent = match blob.parent() {
        Parent::None => Value::Null,
        Parent::Snapshot(parent) => parent.to_string().into(),
        Parent::External(ext_id) => {
            format!("external snapshot \"{}\"", ext_id.escape_ascii()).into()
        }
    };
    let mut value = json!({
        "id": id.to_string(),
        "clusters": blob.num_clusters(),
        "allocated": blob.num_allocated(),
        "thin": blob.is_thin(),
        "read_only": blob.is_read_only(),
        "parent": parent,
        "clear_method": format!("{:?}", blob.clear_method()),
    });
    if let Some(name) = blob.xattr("name") {
        value["name"] = String::from_utf8_lossy(name.strip_suffix(b"\0").unwrap_or(&name)).into();
    }
    if all {
        let xattrs = blob.xattrs().into_iter();
        let xattrs = xattrs.map(|(name, bytes)| {
            json!({ "name": String::from_utf8_lossy(&name), "len": bytes.len(), "hex": hex(&bytes) })
        });
        value["xattrs"] = xattrs.collect();
        value["extents"] = runs(&blob)
            .into_iter()
            .map(|(at, to, len)| json!([at, to, len]))
            .collect();
    }
    value
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Returns the blob's own clusters: (first in the blob, first in the store, how many).
fn runs(blob: &Blob) -> Vec<(u64, u32, u64)> {
    let mut runs: Vec<(u64, u32, u64)> = Vec::new();
    for (index, cluster) in blob.extents().allocated() {
        match runs.last_mut() {
            Some((at, to, len))
                if *at + *len == index && u64::from(*to) + *len == u64::from(cluster) =>
            {
                *len += 1;
            }
            _ => runs.push((index, cluster, 1)),
        }
    }
    runs
}

fn show(store: &Blobstore, id: BlobId, as_json: bool) -> Result<()> {
    let blob = store.open(id)?;
    let value = describe(store, id, true);
    let mut out = Lines;
    if as_json {
        print_json(&value);
        return Ok(());
    }
    writeln!(out, "blob          {id}")?;
    writeln!(
        out,
        "size          {} clusters, {} bytes",
        blob.num_clusters(),
        blob.len_bytes()
    )?;
    writeln!(out, "allocated     {} clusters", blob.num_allocated())?;
    writeln!(
        out,
        "thin          {}",
        if blob.is_thin() { "yes" } else { "no" }
    )?;
    writeln!(
        out,
        "read-only     {}",
        if blob.is_read_only() { "yes" } else { "no" }
    )?;
    writeln!(
        out,
        "parent        {}",
        value["parent"].as_str().unwrap_or("none")
    )?;
    writeln!(
        out,
        "clear method  {}",
        value["clear_method"].as_str().unwrap_or("")
    )?;
    for (name, bytes) in blob.xattrs() {
        let name = visible(&String::from_utf8_lossy(&name));
        writeln!(
            out,
            "xattr         {name} ({} bytes): \"{}\"",
            bytes.len(),
            bytes.escape_ascii()
        )?;
    }
    for (at, to, len) in runs(&blob) {
        writeln!(
            out,
            "extent        clusters {at}..{} at {to}..{}",
            at + len,
            u64::from(to) + len
        )?;
    }
    Ok(())
}

fn to_bytes(value: &str, form: Form) -> Result<Vec<u8>> {
    Ok(match form {
        Form::Text => value.as_bytes().to_vec(),
        Form::Cstring => [value.as_bytes(), b"\0"].concat(),
        Form::U64 => value.parse::<u64>()?.to_le_bytes().to_vec(),
        Form::Hex => {
            let digits = value.as_bytes();
            let pairs = digits.chunks(2).map(|pair| {
                let text = std::str::from_utf8(pair)
                    .ok()
                    .filter(|text| text.len() == 2)?;
                u8::from_str_radix(text, 16).ok()
            });
            pairs
                .collect::<Option<Vec<u8>>>()
                .ok_or("the value must be pairs of hexadecimal digits")?
        }
    })
}
