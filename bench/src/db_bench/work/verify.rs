//! Reads back every key.

use super::super::keys::KeyFormat;
use super::super::ledger::{Expected, Holdings};
use super::super::meter::{Meter, OpKind};
use super::{Context, read_options};

/// Gets every key below `--num`, the numbers shared out among the threads, and compares each with
/// what was written; the first thread also scans the whole database for keys that nobody wrote.
pub fn verify(c: &Context<'_>, m: &mut Meter<'_>, thread: usize) -> Result<(), String> {
    let num = c.timed.num;
    let holdings = c.holdings.ok_or("verify needs the record of writes")?;
    if !c.keys.distinct_below(num) {
        return Err("keys of this --key_size and --prefix_size are not distinct below --num; verify cannot tell them apart".to_owned());
    }
    let options = read_options(c.f);
    let share = |t: usize| {
        let part = u128::from(num) * t as u128 / c.threads as u128;
        u64::try_from(part).unwrap_or(num)
    };
    let mut key = c.keys.buffer();
    let (mut there, mut asked) = (0, 0);
    for k in share(thread)..share(thread + 1) {
        c.keys.fill(k, &mut key);
        let value =
            c.db.get_pinned_opt(&key, &options)
                .map_err(|e| format!("get of key {k}: {e}"))?;
        if !holdings.accepts(k, value.as_deref(), c.pool) {
            return Err(difference(k, holdings, value.as_deref()));
        }
        asked += 1;
        if let Some(v) = value {
            there += 1;
            m.add_bytes(key.len() + v.len());
        }
        m.finished(1, OpKind::Read);
    }
    m.found(there, asked);
    if thread == 0 {
        let scanned = scan(c, holdings, c.keys)?;
        m.say(&format!("every key as written; scan: {scanned} keys"));
    }
    Ok(())
}

fn scan(c: &Context<'_>, holdings: &Holdings, format: KeyFormat) -> Result<u64, String> {
    let mut options = read_options(c.f);
    options.set_total_order_seek(true);
    let mut it = c.db.raw_iterator_opt(options);
    it.seek_to_first();
    let mut last: Vec<u8> = Vec::new();
    let mut count = 0;
    while let Some((key, value)) = it.item() {
        if count > 0 && last.as_slice() >= key {
            return Err(format!("scan: key {key:02x?} comes after {last:02x?}"));
        }
        let k = format
            .parse(key)
            .ok_or_else(|| format!("scan: key {key:02x?} is none that db_bench writes"))?;
        if !holdings.accepts(k, Some(value), c.pool) {
            return Err(format!("scan: {}", difference(k, holdings, Some(value))));
        }
        last.clear();
        last.extend_from_slice(key);
        count += 1;
        it.next();
    }
    it.status().map_err(|e| format!("scan: {e}"))?;
    // A key that must be there was got above; the scan must see as many as there must be.
    let due = (0..c.timed.num)
        .filter(|k| matches!(holdings.of(*k), Expected::Value(_)))
        .count() as u64;
    if count < due {
        return Err(format!(
            "scan: {count} keys where at least {due} were written"
        ));
    }
    Ok(count)
}

fn difference(k: u64, holdings: &Holdings, found: Option<&[u8]>) -> String {
    let found = match found {
        None => "nothing".to_owned(),
        Some(v) => format!("{} bytes beginning {:02x?}", v.len(), &v[..v.len().min(16)]),
    };
    let due = match holdings.of(k) {
        Expected::Unknown => "anything".to_owned(),
        Expected::Absent => "nothing".to_owned(),
        Expected::Value(s) => format!("{} bytes from {} of the pool", s.len, s.at),
        Expected::OneOf(all) => format!("one of {} values", all.len()),
    };
    format!("key {k} holds {found}, expected {due}")
}
