//! `pumice blob dump`: prints every metadata page, decoded, as text and as JSON.

use std::io::{self, Write};
use std::ops::Range;

use pumice_bdev_control::terminal::{Lines, print_json};
use pumice_blobfs::blobstore::BlobId;
use pumice_blobfs::blobstore::dump::{Dump, FoundBatch, JournalDump, MaskDump};
use pumice_blobfs::blobstore::format::{
    Content, Descriptor, Descriptors, INVALID_PAGE, Page, PageHeader, RawSuperBlock, TYPE_XATTR,
    Words, page_crc, stored_crc,
};
use serde_json::{Map, Value, json};

use super::Result;
use crate::access::open_to_read;

/// Prints the store on the device `uri`, or the pages that belong to `id`.
pub fn run(uri: &str, id: Option<BlobId>, as_json: bool) -> Result<()> {
    let dev = open_to_read(uri).map_err(|e| e.to_string())?;
    let mut dump = Dump::open(&dev)?;
    let mut out = Lines;
    let super_block = super_fields(dump.super_block());
    let problem = dump.problem().map(str::to_owned);
    let masks = if id.is_none() {
        dump.masks()?
    } else {
        Vec::new()
    };
    let journal = if id.is_none() { dump.journal() } else { None };
    if !as_json && id.is_none() {
        writeln!(out, "super block")?;
        for (name, value) in &super_block {
            writeln!(out, "  {name:<24}{}", plain(value))?;
        }
        if let Some(problem) = &problem {
            writeln!(out, "  cannot be used: {problem}")?;
        }
        for mask in &masks {
            writeln!(
                out,
                "mask of used {}, pages {}..{}",
                mask.name,
                mask.start,
                mask.start + mask.len
            )?;
            match &mask.used {
                Ok(used) => writeln!(out, "  {}", ranges(used))?,
                Err(error) => writeln!(out, "  no mask: {error}")?,
            }
        }
        if let Some(journal) = &journal {
            print_journal(&mut out, journal)?;
        }
    }
    let mut pages = Vec::new();
    let mut failed = Ok(());
    dump.pages(|index, page| {
        let header = PageHeader::read(page);
        if id.is_some_and(|id| id != header.id) || failed.is_err() {
            return;
        }
        let value = decode(index, page);
        if as_json {
            pages.push(value);
        } else {
            failed = print_page(&mut out, &value);
        }
    })?;
    failed?;
    if as_json {
        let masks: Vec<Value> = masks.iter().map(mask_value).collect();
        let journal = journal.as_ref().map(journal_value);
        let value = json!({
            "super_block": super_block, "problem": problem, "masks": masks, "journal": journal, "pages": pages,
        });
        print_json(&value);
    }
    match (problem, id) {
        (Some(problem), _) => Err(problem.into()),
        _ => Ok(()),
    }
}

fn super_fields(sb: &RawSuperBlock) -> Map<String, Value> {
    let text = |bytes: &[u8]| bytes.escape_ascii().to_string();
    let bstype = &sb.bstype[..sb
        .bstype
        .iter()
        .rposition(|byte| *byte != 0)
        .map_or(0, |last| last + 1)];
    let super_blob = match sb.super_blob.get() {
        u64::MAX => "none".to_owned(),
        id => format!("{id:#x}"),
    };
    let mut page: Page = [0; 4096];
    page.copy_from_slice(zerocopy::IntoBytes::as_bytes(sb));
    let fields = [
        ("signature", text(&sb.signature).into()),
        ("version", sb.version.get().into()),
        ("length", sb.length.get().into()),
        ("clean", sb.clean.get().into()),
        ("super_blob", super_blob.into()),
        ("cluster_size", sb.cluster_size.get().into()),
        ("used_page_mask_start", sb.used_page_mask_start.get().into()),
        ("used_page_mask_len", sb.used_page_mask_len.get().into()),
        (
            "used_cluster_mask_start",
            sb.used_cluster_mask_start.get().into(),
        ),
        (
            "used_cluster_mask_len",
            sb.used_cluster_mask_len.get().into(),
        ),
        (
            "used_blobid_mask_start",
            sb.used_blobid_mask_start.get().into(),
        ),
        ("used_blobid_mask_len", sb.used_blobid_mask_len.get().into()),
        ("md_start", sb.md_start.get().into()),
        ("md_len", sb.md_len.get().into()),
        ("bstype", text(bstype).into()),
        ("size", sb.size.get().into()),
        ("io_unit_size", sb.io_unit_size.get().into()),
        ("md_page_size", sb.md_page_size.get().into()),
        (
            "reserved_bytes_set",
            sb.reserved.iter().filter(|byte| **byte != 0).count().into(),
        ),
        ("crc", crc_text(&page).into()),
    ];
    fields
        .into_iter()
        .map(|(name, value): (&str, Value)| (name.to_owned(), value))
        .collect()
}

fn crc_text(page: &Page) -> String {
    let (stored, computed) = (stored_crc(page), page_crc(page));
    if stored == computed {
        format!("{stored:#010x}, right")
    } else {
        format!("{stored:#010x}, wrong: {computed:#010x} is computed")
    }
}

fn mask_value(mask: &MaskDump) -> Value {
    match &mask.used {
        Ok(used) => {
            let used: Vec<Value> = used
                .iter()
                .map(|range| json!([range.start, range.end]))
                .collect();
            json!({ "name": mask.name, "start": mask.start, "len": mask.len, "used": used })
        }
        Err(error) => {
            json!({ "name": mask.name, "start": mask.start, "len": mask.len, "problem": error })
        }
    }
}

fn print_journal(out: &mut impl Write, journal: &JournalDump) -> io::Result<()> {
    let counts = if journal.counts {
        "a load puts its batches in place"
    } else {
        "everything is in place"
    };
    let JournalDump { blob, len, .. } = journal;
    writeln!(out, "journal in blob {blob}, {len} bytes: {counts}")?;
    match journal.epoch {
        Some(epoch) => writeln!(out, "  epoch {epoch}")?,
        None => writeln!(out, "  no header can be used")?,
    }
    for batch in &journal.batches {
        let pages: Vec<String> = batch.pages.iter().map(ToString::to_string).collect();
        let FoundBatch {
            at,
            units,
            sequence,
            ..
        } = batch;
        writeln!(
            out,
            "  batch {sequence} at unit {at}, {units} units: pages {}",
            pages.join(" ")
        )?;
    }
    if let Some(damage) = &journal.damage {
        writeln!(out, "  damaged: {damage}")?;
    }
    Ok(())
}

fn journal_value(journal: &JournalDump) -> Value {
    let batches: Vec<Value> = journal
        .batches
        .iter()
        .map(|batch| {
            json!({
                "sequence": batch.sequence, "at": batch.at, "units": batch.units, "pages": batch.pages,
            })
        })
        .collect();
    json!({
        "blob": journal.blob.to_string(),
        "len": journal.len,
        "counts": journal.counts,
        "epoch": journal.epoch,
        "batches": batches,
        "damage": journal.damage,
    })
}

fn ranges(ranges: &[Range<u32>]) -> String {
    let count: u64 = ranges
        .iter()
        .map(|range| u64::from(range.end - range.start))
        .sum();
    let texts: Vec<String> = ranges
        .iter()
        .map(|range| {
            if range.len() == 1 {
                range.start.to_string()
            } else {
                format!("{}..{}", range.start, range.end)
            }
        })
        .collect();
    format!("{count} used: {}", texts.join(" "))
}

/// Decodes a metadata page.
fn decode(index: u32, page: &Page) -> Value {
    let header = PageHeader::read(page);
    let next = if header.next == INVALID_PAGE {
        Value::Null
    } else {
        header.next.into()
    };
    let mut descriptors = Vec::new();
    let mut problem = Value::Null;
    if stored_crc(page) == page_crc(page) {
        for descriptor in Descriptors::new(page) {
            match descriptor {
                Ok(descriptor) => descriptors.push(descriptor_value(&descriptor)),
                Err(error) => problem = error.to_string().into(),
            }
        }
    }
    json!({
        "page": index,
        "id": header.id.to_string(),
        "sequence": header.sequence,
        "next": next,
        "crc": crc_text(page),
        "descriptors": descriptors,
        "problem": problem,
    })
}

fn pairs(words: Words<'_>) -> Vec<Value> {
    words.pairs().map(|(a, b)| json!([a, b])).collect()
}

fn descriptor_value(descriptor: &Descriptor<'_>) -> Value {
    let len = descriptor.body.len();
    let too_short = || json!({ "type": descriptor.kind, "len": len, "problem": "too short" });
    let Some(content) = descriptor.content() else {
        return too_short();
    };
    match content {
        Content::Flags {
            invalid,
            data_ro,
            md_ro,
        } => json!({
            "type": "flags",
            "invalid_flags": format!("{invalid:#x}"),
            "data_ro_flags": format!("{data_ro:#x}"),
            "md_ro_flags": format!("{md_ro:#x}"),
        }),
        Content::Xattr(xattr) => {
            let Some((name, value)) = xattr.name_and_value() else {
                return too_short();
            };
            json!({
                "type": if descriptor.kind == TYPE_XATTR { "xattr" } else { "internal xattr" },
                "name": name.escape_ascii().to_string(),
                "len": value.len(),
                "value": value.escape_ascii().to_string(),
            })
        }
        Content::Runs(runs) => json!({ "type": "run-length extents", "runs": pairs(runs) }),
        Content::Table {
            num_clusters,
            entries,
        } => json!({
            "type": "extent table",
            "num_clusters": num_clusters,
            "extent_pages": pairs(entries),
        }),
        Content::ExtentPage { start, clusters } => json!({
            "type": "extent page",
            "start_cluster": start,
            "clusters": clusters.iter().collect::<Vec<_>>(),
        }),
        Content::Padding => json!({ "type": "padding", "len": len }),
        _ => json!({ "type": descriptor.kind, "len": len }),
    }
}

fn plain(value: &Value) -> String {
    value
        .as_str()
        .map_or_else(|| value.to_string(), str::to_owned)
}

fn print_page(out: &mut dyn Write, value: &Value) -> io::Result<()> {
    let next = if value["next"].is_null() {
        "none".to_owned()
    } else {
        value["next"].to_string()
    };
    writeln!(
        out,
        "page {}: blob {}, sequence {}, next {next}, crc {}",
        value["page"],
        plain(&value["id"]),
        value["sequence"],
        plain(&value["crc"])
    )?;
    for descriptor in value["descriptors"].as_array().into_iter().flatten() {
        let Value::Object(fields) = descriptor else {
            continue;
        };
        let rest: Vec<String> = fields
            .iter()
            .filter(|(name, _)| *name != "type")
            .map(|(name, value)| format!("{name} {}", plain(value)))
            .collect();
        writeln!(out, "  {}: {}", plain(&fields["type"]), rest.join(", "))?;
    }
    if let Some(problem) = value["problem"].as_str() {
        writeln!(out, "  {problem}")?;
    }
    Ok(())
}
