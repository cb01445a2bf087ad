//! The C functions that the shim calls, made once for each implementation of [`PluginFs`].
//!
//! A handle on the C++ side is a pointer from `Box::into_raw`: [`Mounted`] for a file system,
//! [`Opened`] for a file, [`Locked`] for a lock. C++ releases each exactly once, after the last call with
//! it, and calls with one handle from many threads at once, which the `Send + Sync` bounds of the
//! traits allow. No panic leaves a function: [`guard`] makes it an error.
#![allow(unsafe_code)]

use std::cell::RefCell;
use std::ffi::{c_char, c_void};
use std::marker::PhantomData;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr::NonNull;
use std::slice;
use std::sync::Arc;
use std::time::UNIX_EPOCH;

use super::gate::Gate;
use super::ops::{self, Chars, Handle, NameFn, Ops, RawFault, RawRead, RawStat};
use super::path::resolve;
use super::{
    Abilities, Access, Fault, How, PendingRead, PluginFile, PluginFs, Read, Result, Started,
};

/// A file system and the directory of it that an environment calls `/`.
struct Mounted<F> {
    fs: F,
    root: String,
    gate: Arc<Gate>,
}

/// A file that was opened through an environment.
struct Opened<T> {
    file: T,
    gate: Arc<Gate>,
}

/// A lock that was taken through an environment, which holds it.
struct Locked {
    gate: Arc<Gate>,
    id: usize,
}

/// Memory lent to RocksDB by `read_many`.
enum Lent<P> {
    Cached(P),
    Owned(Vec<u8>),
}

impl<P: AsRef<[u8]>> Lent<P> {
    fn bytes(&self) -> &[u8] {
        match self {
            Lent::Cached(pin) => pin.as_ref(),
            Lent::Owned(bytes) => bytes,
        }
    }
}

thread_local! {
    static LAST: RefCell<Fault> = RefCell::new(Fault::new(libc::EIO, "no failure"));
}

/// Keeps `fault` for `last_fault` and answers its errno, negative.
#[cold]
fn remember(fault: Fault) -> i64 {
    let errno = i64::from(if fault.errno > 0 {
        fault.errno
    } else {
        libc::EIO
    });
    // A thread that is ending has no place for the text any more.
    let _ = LAST.try_with(|last| *last.borrow_mut() = fault);
    -errno
}

#[inline(always)]
fn guard(call: impl FnOnce() -> Result<i64>) -> i64 {
    match catch_unwind(AssertUnwindSafe(call)) {
        Ok(Ok(answer)) => answer,
        Ok(Err(fault)) => remember(fault),
        Err(payload) => remember(Fault::from_panic(&*payload)),
    }
}

/// For what cannot fail: a panic is swallowed, after its message went to the panic hook.
fn guard_value<T>(otherwise: T, call: impl FnOnce() -> T) -> T {
    catch_unwind(AssertUnwindSafe(call)).unwrap_or(otherwise)
}

fn count(n: usize) -> i64 {
    i64::try_from(n).unwrap_or(i64::MAX)
}

/// The number of bytes that a read into `room` bytes answered. RocksDB believes it, so a file system
/// that says more than it was given room for must not be believed.
#[inline(always)]
fn read_count(got: usize, room: usize) -> Result<i64> {
    if got > room {
        return Err(too_many(got, room));
    }
    Ok(count(got))
}

#[cold]
fn too_many(got: usize, room: usize) -> Fault {
    Fault::new(
        libc::EIO,
        format!("a bug: the file system says that it read {got} bytes into room for {room}"),
    )
}

/// Makes the directories above `path`, where they are missing.
fn make_parents<F: PluginFs>(fs: &F, path: &str) -> Result<()> {
    for (at, _) in path.match_indices('/').skip(1) {
        match fs.mkdir(&path[..at]) {
            Err(fault) if fault.errno != libc::EEXIST => return Err(fault),
            _ => {}
        }
    }
    Ok(())
}

/// # Safety
/// `data` and `len` describe memory that stays readable and unchanged for `'a`, or `len` is 0.
unsafe fn bytes<'a>(data: Chars, len: usize) -> &'a [u8] {
    if len == 0 {
        return &[];
    }
    // SAFETY: by the contract of this function.
    unsafe { slice::from_raw_parts(data.cast(), len) }
}

/// # Safety
/// `data` and `len` describe memory that nobody else touches for `'a`, or `len` is 0.
unsafe fn bytes_mut<'a>(data: *mut c_char, len: usize) -> &'a mut [u8] {
    if len == 0 {
        return &mut [];
    }
    // SAFETY: by the contract of this function.
    unsafe { slice::from_raw_parts_mut(data.cast(), len) }
}

unsafe extern "C" fn last_fault(out: *mut RawFault) {
    static GONE: &str = "the thread is ending";
    let raw = LAST
        .try_with(|last| {
            let fault = last.borrow();
            RawFault {
                err: fault.errno,
                flags: if fault.retryable { ops::RETRYABLE } else { 0 }
                    | if fault.data_loss { ops::DATA_LOSS } else { 0 },
                text: fault.text.as_ptr().cast(),
                text_len: fault.text.len(),
            }
        })
        .unwrap_or(RawFault {
            err: libc::EIO,
            flags: 0,
            text: GONE.as_ptr().cast(),
            text_len: GONE.len(),
        });
    // SAFETY: the shim passes its own RawFault. The text lives in the thread's LAST, which the
    // next call of this thread changes at the earliest.
    unsafe { out.write(raw) };
}

unsafe extern "C" fn fault_take(fault: *mut c_void) {
    // SAFETY: `fault` is from Box::into_raw in `read_many`, and given back once.
    let fault = unsafe { Box::from_raw(fault.cast::<Fault>()) };
    remember(*fault);
}

/// The functions for one implementation.
struct Table<F>(PhantomData<F>);

impl<F: PluginFs> Table<F> {
    const OPS: &'static Ops = &Ops {
        fs_release: Self::fs_release,
        last_fault,
        abilities: Self::abilities,
        alignment: Self::alignment,
        open: Self::open,
        remove: Self::remove,
        rename: Self::rename,
        link: Self::link,
        stat: Self::stat,
        mkdir: Self::mkdir,
        make_dirs: Self::make_dirs,
        rmdir: Self::rmdir,
        list: Self::list,
        sync_dir: Self::sync_dir,
        lock: Self::lock,
        unlock: Self::unlock,
        free_bytes: Self::free_bytes,
        file_release: Self::file_release,
        file_len: Self::file_len,
        file_id: Self::file_id,
        append: Self::append,
        write_at: Self::write_at,
        read_at: Self::read_at,
        read_many: Self::read_many,
        truncate: Self::truncate,
        allocate: Self::allocate,
        finish: Self::finish,
        sync: Self::sync,
        range_sync: Self::range_sync,
        prefetch: Self::prefetch,
        invalidate: Self::invalidate,
        advise: Self::advise,
        pin_release: Self::pin_release,
        fault_take,
        read_start: Self::read_start,
        read_finish: Self::read_finish,
        read_cancel: Self::read_cancel,
    };

    /// # Safety
    /// `fs` is a live handle of this table's file system.
    unsafe fn fs<'a>(fs: Handle) -> &'a Mounted<F> {
        // SAFETY: a live handle points to a Mounted<F>, shared.
        unsafe { &*fs.cast::<Mounted<F>>() }
    }

    /// # Safety
    /// `file` is a live handle of a file of this table's file system.
    unsafe fn file<'a>(file: Handle) -> &'a F::File {
        // SAFETY: by the contract of this function.
        &unsafe { Self::opened(file) }.file
    }

    /// As [`Table::file`], for calls that end with their environment.
    ///
    /// # Safety
    /// As [`Table::file`].
    #[inline(always)]
    unsafe fn open_file<'a>(file: Handle) -> Result<&'a F::File> {
        // SAFETY: by the contract of this function.
        let opened = unsafe { Self::opened(file) };
        opened.gate.check()?;
        Ok(&opened.file)
    }

    /// # Safety
    /// As [`Table::file`].
    unsafe fn opened<'a>(file: Handle) -> &'a Opened<F::File> {
        // SAFETY: a live handle points to an Opened<F::File>, shared.
        unsafe { &*file.cast::<Opened<F::File>>() }
    }

    /// # Safety
    /// As [`Table::fs`].
    unsafe fn open_fs<'a>(fs: Handle) -> Result<&'a Mounted<F>> {
        // SAFETY: by the contract of this function.
        let mounted = unsafe { Self::fs(fs) };
        mounted.gate.check()?;
        Ok(mounted)
    }

    /// Runs `call` on a file system and one path of it.
    ///
    /// # Safety
    /// `fs` is live; `path` and `len` are readable for the call.
    unsafe fn on_path(
        fs: Handle,
        path: Chars,
        len: usize,
        call: impl FnOnce(&F, &str) -> Result<i64>,
    ) -> i64 {
        guard(|| {
            // SAFETY: by the contract of this function.
            let (mounted, path) = unsafe { (Self::open_fs(fs)?, bytes(path, len)) };
            call(&mounted.fs, &resolve(&mounted.root, path)?)
        })
    }

    /// Runs `call` on a file system and two paths of it.
    ///
    /// # Safety
    /// `fs` is live; both paths are readable for the call.
    unsafe fn on_paths(
        fs: Handle,
        from: (Chars, usize),
        to: (Chars, usize),
        call: impl FnOnce(&F, &str, &str) -> Result<()>,
    ) -> i64 {
        guard(|| {
            // SAFETY: by the contract of this function.
            let (mounted, from, to) =
                unsafe { (Self::open_fs(fs)?, bytes(from.0, from.1), bytes(to.0, to.1)) };
            call(
                &mounted.fs,
                &resolve(&mounted.root, from)?,
                &resolve(&mounted.root, to)?,
            )?;
            Ok(0)
        })
    }

    /// Runs `call` on a file.
    ///
    /// # Safety
    /// `file` is live.
    #[inline(always)]
    unsafe fn on_file(file: Handle, call: impl FnOnce(&F::File) -> Result<()>) -> i64 {
        guard(|| {
            // SAFETY: by the contract of this function.
            call(unsafe { Self::open_file(file) }?)?;
            Ok(0)
        })
    }

    unsafe extern "C" fn fs_release(fs: Handle) {
        // SAFETY: `fs` is from Box::into_raw in `make_env`; the shim releases it once, last.
        let mounted = unsafe { Box::from_raw(fs.cast_mut().cast::<Mounted<F>>()) };
        guard_value((), || drop(mounted));
    }

    unsafe extern "C" fn abilities(fs: Handle) -> u32 {
        // SAFETY: the shim passes a live file system.
        let fs = unsafe { Self::fs(fs) };
        let can = guard_value(Abilities::default(), || fs.fs.abilities());
        [
            (can.async_reads, ops::CAN_ASYNC),
            (can.pins, ops::CAN_PIN),
            (can.prefetch, ops::CAN_PREFETCH),
            (can.rereads, ops::CAN_REREAD),
        ]
        .into_iter()
        .filter(|(can, _)| *can)
        .fold(0, |bits, (_, bit)| bits | bit)
    }

    unsafe extern "C" fn alignment(fs: Handle) -> usize {
        // SAFETY: the shim passes a live file system.
        let fs = unsafe { Self::fs(fs) };
        let alignment = guard_value(0, || fs.fs.alignment());
        if alignment.is_power_of_two() {
            alignment
        } else {
            4096
        }
    }

    unsafe extern "C" fn open(
        fs: Handle,
        path: Chars,
        len: usize,
        how: u32,
        out: *mut Handle,
    ) -> i64 {
        let how = How {
            create: how & ops::OPEN_CREATE != 0,
            fresh: how & ops::OPEN_FRESH != 0,
            direct: how & ops::OPEN_DIRECT != 0,
        };
        // SAFETY: the shim passes a live file system.
        let gate = unsafe { &Self::fs(fs).gate };
        let open = |fs: &F, path: &str| {
            let file = Box::into_raw(Box::new(Opened {
                file: fs.open(path, how)?,
                gate: Arc::clone(gate),
            }));
            // SAFETY: the shim passes a place for the handle.
            unsafe { out.write(file.cast_const().cast()) };
            Ok(0)
        };
        // SAFETY: the shim passes a live file system and a readable path.
        unsafe { Self::on_path(fs, path, len, open) }
    }

    unsafe extern "C" fn remove(fs: Handle, path: Chars, len: usize) -> i64 {
        // SAFETY: the shim passes a live file system and a readable path.
        unsafe { Self::on_path(fs, path, len, |fs, path| fs.remove(path).map(|()| 0)) }
    }

    unsafe extern "C" fn rename(
        fs: Handle,
        from: Chars,
        from_len: usize,
        to: Chars,
        to_len: usize,
    ) -> i64 {
        // SAFETY: the shim passes a live file system and readable paths.
        unsafe { Self::on_paths(fs, (from, from_len), (to, to_len), F::rename) }
    }

    unsafe extern "C" fn link(
        fs: Handle,
        from: Chars,
        from_len: usize,
        to: Chars,
        to_len: usize,
    ) -> i64 {
        // SAFETY: the shim passes a live file system and readable paths.
        unsafe { Self::on_paths(fs, (from, from_len), (to, to_len), F::link) }
    }

    unsafe extern "C" fn stat(fs: Handle, path: Chars, len: usize, out: *mut RawStat) -> i64 {
        let stat = |fs: &F, path: &str| {
            let stat = fs.stat(path)?;
            let raw = RawStat {
                len: stat.len,
                mtime_s: stat
                    .modified
                    .duration_since(UNIX_EPOCH)
                    .map_or(0, |t| t.as_secs()),
                file_id: stat.file_id,
                links: stat.links,
                is_dir: u32::from(stat.is_dir),
            };
            // SAFETY: the shim passes its own RawStat.
            unsafe { out.write(raw) };
            Ok(0)
        };
        // SAFETY: the shim passes a live file system and a readable path.
        unsafe { Self::on_path(fs, path, len, stat) }
    }

    unsafe extern "C" fn mkdir(fs: Handle, path: Chars, len: usize) -> i64 {
        guard(|| {
            // SAFETY: the shim passes a live file system and a readable path.
            let (mounted, path) = unsafe { (Self::open_fs(fs)?, bytes(path, len)) };
            let path = resolve(&mounted.root, path)?;
            if path == mounted.root {
                // RocksDB takes the parents of its `/` for granted.
                make_parents(&mounted.fs, &path)?;
            }
            mounted.fs.mkdir(&path).map(|()| 0)
        })
    }

    /// A database's directory with those above, which the `rocksdb` crate makes in the kernel's
    /// file system before it asks for the last one here.
    unsafe extern "C" fn make_dirs(fs: Handle, path: Chars, len: usize) -> i64 {
        let make = |fs: &F, path: &str| {
            make_parents(fs, path)?;
            match fs.mkdir(path) {
                Err(fault) if fault.errno == libc::EEXIST && fs.stat(path)?.is_dir => Ok(0),
                made => made.map(|()| 0),
            }
        };
        // SAFETY: the shim passes a live file system and a readable path.
        unsafe { Self::on_path(fs, path, len, make) }
    }

    unsafe extern "C" fn rmdir(fs: Handle, path: Chars, len: usize) -> i64 {
        // SAFETY: the shim passes a live file system and a readable path.
        unsafe { Self::on_path(fs, path, len, |fs, path| fs.rmdir(path).map(|()| 0)) }
    }

    unsafe extern "C" fn list(
        fs: Handle,
        path: Chars,
        len: usize,
        each: NameFn,
        arg: *mut c_void,
    ) -> i64 {
        let list = |fs: &F, path: &str| {
            let entries = fs.list(path)?;
            for entry in &entries {
                let name = entry.name.as_bytes();
                // SAFETY: `each` and `arg` belong together and are good for this call; the
                // function does not throw (noexcept) and copies the name.
                unsafe {
                    each(
                        arg,
                        name.as_ptr().cast(),
                        name.len(),
                        entry.len,
                        u32::from(entry.is_dir),
                    );
                }
            }
            Ok(count(entries.len()))
        };
        // SAFETY: the shim passes a live file system and a readable path.
        unsafe { Self::on_path(fs, path, len, list) }
    }

    unsafe extern "C" fn sync_dir(fs: Handle, path: Chars, len: usize) -> i64 {
        // SAFETY: the shim passes a live file system and a readable path.
        unsafe { Self::on_path(fs, path, len, |fs, path| fs.sync_dir(path).map(|()| 0)) }
    }

    unsafe extern "C" fn lock(fs: Handle, path: Chars, len: usize, out: *mut *mut c_void) -> i64 {
        // SAFETY: the shim passes a live file system.
        let gate = unsafe { &Self::fs(fs).gate };
        let lock = |fs: &F, path: &str| {
            let id = gate.hold(Box::new(fs.lock(path)?))?;
            let lock = Box::into_raw(Box::new(Locked {
                gate: Arc::clone(gate),
                id,
            }));
            // SAFETY: the shim passes a place for the handle.
            unsafe { out.write(lock.cast()) };
            Ok(0)
        };
        // SAFETY: the shim passes a live file system and a readable path.
        unsafe { Self::on_path(fs, path, len, lock) }
    }

    unsafe extern "C" fn unlock(lock: *mut c_void) {
        // SAFETY: `lock` is from Box::into_raw in `lock`; the shim gives it back once.
        let lock = unsafe { Box::from_raw(lock.cast::<Locked>()) };
        guard_value((), || lock.gate.unlock(lock.id));
    }

    unsafe extern "C" fn free_bytes(fs: Handle, out: *mut u64) -> i64 {
        guard(|| {
            // SAFETY: the shim passes a live file system.
            let free = unsafe { Self::open_fs(fs) }?.fs.free_bytes()?;
            // SAFETY: the shim passes a place for the answer.
            unsafe { out.write(free) };
            Ok(0)
        })
    }

    unsafe extern "C" fn file_release(file: Handle) {
        // SAFETY: `file` is from Box::into_raw in `open`; the shim releases it once, last.
        let file = unsafe { Box::from_raw(file.cast_mut().cast::<Opened<F::File>>()) };
        guard_value((), || drop(file));
    }

    unsafe extern "C" fn file_len(file: Handle) -> u64 {
        // SAFETY: the shim passes a live file.
        let file = unsafe { Self::file(file) };
        guard_value(0, || file.size())
    }

    unsafe extern "C" fn file_id(file: Handle) -> u64 {
        // SAFETY: the shim passes a live file.
        let file = unsafe { Self::file(file) };
        guard_value(0, || file.file_id())
    }

    unsafe extern "C" fn append(file: Handle, data: Chars, len: usize) -> i64 {
        // SAFETY: the shim passes a live file and readable data.
        unsafe { Self::on_file(file, |file| file.append(bytes(data, len))) }
    }

    unsafe extern "C" fn write_at(file: Handle, offset: u64, data: Chars, len: usize) -> i64 {
        // SAFETY: the shim passes a live file and readable data.
        unsafe { Self::on_file(file, |file| file.write_at(offset, bytes(data, len))) }
    }

    unsafe extern "C" fn read_at(file: Handle, offset: u64, buf: *mut c_char, len: usize) -> i64 {
        guard(|| {
            // SAFETY: the shim passes a live file, and memory that is RocksDB's for this read.
            let (file, buf) = unsafe { (Self::open_file(file)?, bytes_mut(buf, len)) };
            read_count(file.read_at(offset, buf)?, len)
        })
    }

    unsafe extern "C" fn read_many(file: Handle, reads: *mut RawRead, len: usize) -> i64 {
        guard(|| {
            // SAFETY: the shim passes a live file and an array of its own with `len` reads.
            let (file, raws) = unsafe {
                (
                    Self::open_file(file)?,
                    slice::from_raw_parts_mut(reads, len),
                )
            };
            // What is cached and may be lent needs no buffer and no copy.
            let mut left = 0;
            for raw in &mut *raws {
                match raw
                    .buf
                    .is_null()
                    .then(|| file.pin(raw.offset, raw.len))
                    .flatten()
                {
                    Some(pin) => Self::lend(raw, Lent::Cached(pin)),
                    None => left += 1,
                }
            }
            if left > 0 {
                Self::read_rest(file, raws, left);
            }
            Ok(0)
        })
    }

    /// Reads what `read_many` could not lend, `left` of them.
    fn read_rest(file: &F::File, raws: &mut [RawRead], left: usize) {
        let open = |raw: &RawRead| raw.pin.is_null();
        let mut own: Vec<Vec<u8>> = raws
            .iter()
            .filter(|raw| open(raw) && raw.buf.is_null())
            .map(|raw| vec![0; raw.len])
            .collect();
        let mut next_own = own.iter_mut();
        let mut reads = Vec::with_capacity(left);
        for raw in raws.iter().filter(|raw| open(raw)) {
            let buf = if raw.buf.is_null() {
                next_own
                    .next()
                    .map_or(&mut [] as &mut [u8], Vec::as_mut_slice)
            } else {
                // SAFETY: RocksDB's memory for this read alone: its reads do not overlap.
                unsafe { bytes_mut(raw.buf.cast(), raw.len) }
            };
            reads.push(Read {
                offset: raw.offset,
                buf,
                result: Ok(0),
            });
        }
        file.read_many(&mut reads);
        let results: Vec<Result<usize>> = reads.into_iter().map(|read| read.result).collect();
        let mut own = own.into_iter();
        for (raw, result) in raws.iter_mut().filter(|raw| open(raw)).zip(results) {
            let lent = if raw.buf.is_null() { own.next() } else { None };
            let result = result.and_then(|got| read_count(got, raw.len).map(|count| (got, count)));
            match (result, lent) {
                (Ok((got, _)), Some(mut bytes)) => {
                    bytes.truncate(got);
                    Self::lend(raw, Lent::Owned(bytes));
                }
                (Ok((_, count)), None) => raw.got = count,
                (Err(fault), _) => {
                    raw.got = -i64::from(fault.errno.max(1));
                    raw.fault = Box::into_raw(Box::new(fault)).cast();
                }
            }
        }
    }

    fn lend(raw: &mut RawRead, lent: Lent<<F::File as PluginFile>::Pin>) {
        let lent = Box::new(lent);
        raw.data = lent.bytes().as_ptr();
        // More than was asked for may be lent, but is not what was asked for.
        raw.got = count(lent.bytes().len().min(raw.len));
        raw.pin = Box::into_raw(lent).cast();
    }

    unsafe extern "C" fn pin_release(pin: *mut c_void) {
        // SAFETY: `pin` is from Box::into_raw in `lend`; RocksDB gives it back once.
        let lent = unsafe { Box::from_raw(pin.cast::<Lent<<F::File as PluginFile>::Pin>>()) };
        guard_value((), || drop(lent));
    }

    unsafe extern "C" fn truncate(file: Handle, len: u64) -> i64 {
        // SAFETY: the shim passes a live file.
        unsafe { Self::on_file(file, |file| file.truncate(len)) }
    }

    unsafe extern "C" fn allocate(file: Handle, offset: u64, len: u64) -> i64 {
        // SAFETY: the shim passes a live file.
        unsafe { Self::on_file(file, |file| file.allocate(offset, len)) }
    }

    unsafe extern "C" fn finish(file: Handle) -> i64 {
        // SAFETY: the shim passes a live file.
        unsafe { Self::on_file(file, PluginFile::finish) }
    }

    unsafe extern "C" fn sync(file: Handle) -> i64 {
        // SAFETY: the shim passes a live file.
        unsafe { Self::on_file(file, PluginFile::sync) }
    }

    unsafe extern "C" fn range_sync(file: Handle, offset: u64, len: u64) -> i64 {
        // SAFETY: the shim passes a live file.
        unsafe { Self::on_file(file, |file| file.range_sync(offset, len)) }
    }

    unsafe extern "C" fn prefetch(file: Handle, offset: u64, len: u64) -> i64 {
        // SAFETY: the shim passes a live file.
        unsafe { Self::on_file(file, |file| file.prefetch(offset, len)) }
    }

    unsafe extern "C" fn invalidate(file: Handle, offset: u64, len: u64) -> i64 {
        // SAFETY: the shim passes a live file.
        unsafe { Self::on_file(file, |file| file.invalidate(offset, len)) }
    }

    unsafe extern "C" fn advise(file: Handle, access: u32) {
        let access = match access {
            ops::ACCESS_RANDOM => Access::Random,
            ops::ACCESS_SEQUENTIAL => Access::Sequential,
            ops::ACCESS_WILL_NEED => Access::WillNeed,
            ops::ACCESS_WONT_NEED => Access::WontNeed,
            _ => Access::Normal,
        };
        // SAFETY: the shim passes a live file.
        let file = unsafe { Self::file(file) };
        guard_value((), || file.advise(access));
    }

    unsafe extern "C" fn read_start(
        file: Handle,
        offset: u64,
        len: usize,
        out: *mut *mut c_void,
    ) -> i64 {
        guard(|| {
            // SAFETY: the shim passes a live file.
            let (read, ready) = match unsafe { Self::open_file(file) }?.read_start(offset, len)? {
                Started::Ready(read) => (read, 1),
                Started::Pending(read) => (read, 0),
            };
            // SAFETY: the shim passes a place for the handle.
            unsafe { out.write(Box::into_raw(Box::new(read)).cast()) };
            Ok(ready)
        })
    }

    unsafe extern "C" fn read_finish(pending: *mut c_void, buf: *mut c_char, len: usize) -> i64 {
        // SAFETY: `pending` is from Box::into_raw in `read_start`, and finished or cancelled once.
        let read = unsafe { Box::from_raw(pending.cast::<<F::File as PluginFile>::Pending>()) };
        guard(move || {
            // SAFETY: the scratch memory of the request, RocksDB's for this read alone.
            read_count(read.finish(unsafe { bytes_mut(buf, len) })?, len)
        })
    }

    unsafe extern "C" fn read_cancel(pending: *mut c_void) {
        // SAFETY: `pending` is from Box::into_raw in `read_start`, and finished or cancelled once.
        let read = unsafe { Box::from_raw(pending.cast::<<F::File as PluginFile>::Pending>()) };
        guard_value((), || drop(read));
    }
}

/// Why no environment could be made.
#[derive(Debug)]
pub(crate) struct EnvError(pub String);

type MountFn = unsafe extern "C" fn(
    Chars,
    usize,
    *mut *const Ops,
    *mut Handle,
    *mut unsafe extern "C" fn(*mut RawFault),
) -> i64;

unsafe extern "C" {
    fn pumice_env_new(ops: *const Ops, fs: Handle, forbid: u32) -> *mut c_void;
    fn pumice_env_wrap(env: *mut c_void) -> *mut c_void;
    fn pumice_register_uri(mount: MountFn);
    fn pumice_env_from_uri(
        uri: Chars,
        len: usize,
        error: *mut c_char,
        error_len: usize,
    ) -> *mut c_void;
}

/// As [`make_cpp_env`], as the environment of the `rocksdb` crate.
pub(crate) fn make_env<F: PluginFs>(
    fs: F,
    root: &str,
    forbid: Abilities,
) -> std::result::Result<(rocksdb::Env, Arc<Gate>), EnvError> {
    let (env, gate) = make_cpp_env(fs, root, forbid)?;
    // SAFETY: a new environment, whose ownership passes on.
    let env = unsafe { pumice_env_wrap(env.as_ptr()) };
    if env.is_null() {
        return Err(out_of_memory());
    }
    // SAFETY: a new rocksdb_env_t, whose ownership passes on.
    Ok((unsafe { rocksdb::Env::from_raw(env.cast()) }, gate))
}

fn out_of_memory() -> EnvError {
    EnvError("RocksDB could not make an environment: out of memory".into())
}

/// A `rocksdb::Env*` over `fs`, whose `/` is the directory `root` of it, and what ends its use.
/// What `forbid` names is not claimed, whatever the implementation can do.
pub(crate) fn make_cpp_env<F: PluginFs>(
    fs: F,
    root: &str,
    forbid: Abilities,
) -> std::result::Result<(NonNull<c_void>, Arc<Gate>), EnvError> {
    let root = resolve("/", root.as_bytes()).map_err(|fault| EnvError(fault.text))?;
    let forbid = [
        (forbid.async_reads, ops::CAN_ASYNC),
        (forbid.pins, ops::CAN_PIN),
        (forbid.prefetch, ops::CAN_PREFETCH),
        (forbid.rereads, ops::CAN_REREAD),
    ]
    .into_iter()
    .filter(|(forbid, _)| *forbid)
    .fold(0, |bits, (_, bit)| bits | bit);
    let gate = Arc::<Gate>::default();
    let mounted = Mounted {
        fs,
        root,
        gate: Arc::clone(&gate),
    };
    let fs: Handle = Box::into_raw(Box::new(mounted)).cast_const().cast();
    // SAFETY: the table belongs to the type of the handle, lives for ever, and is laid out as
    // pumice_fs.h says; the handle is given away.
    let env = unsafe { pumice_env_new(Table::<F>::OPS, fs, forbid) };
    let env = NonNull::new(env).ok_or_else(out_of_memory)?;
    Ok((env, gate))
}

/// What a URI that C++ code opens is mounted by: the file system and the root inside it.
pub(crate) trait UriMount: 'static {
    /// The file system that such URIs name.
    type Fs: PluginFs;
    /// Mounts `uri`.
    fn mount(uri: &str) -> Result<(Self::Fs, String)>;
}

unsafe extern "C" fn mount_uri<M: UriMount>(
    uri: Chars,
    len: usize,
    ops: *mut *const Ops,
    fs: *mut Handle,
    fault: *mut unsafe extern "C" fn(*mut RawFault),
) -> i64 {
    // SAFETY: the shim passes places for all three answers.
    unsafe { fault.write(last_fault) };
    guard(|| {
        // SAFETY: the shim passes readable text.
        let uri = std::str::from_utf8(unsafe { bytes(uri, len) })
            .map_err(|_| Fault::new(libc::EINVAL, "the URI is not UTF-8"))?;
        let (mounted, root) = M::mount(uri)?;
        let handle = Box::into_raw(Box::new(Mounted {
            fs: mounted,
            root,
            gate: Arc::default(),
        }));
        // SAFETY: as above; the handle is given away.
        unsafe {
            ops.write(Table::<M::Fs>::OPS);
            fs.write(handle.cast_const().cast());
        }
        Ok(0)
    })
}

/// Makes `blobfs://…` known to RocksDB in this process; again is nothing.
pub(crate) fn register<M: UriMount>() {
    static ONCE: std::sync::Once = std::sync::Once::new();
    // SAFETY: the functions have the types that the shim declares.
    ONCE.call_once(|| unsafe { pumice_register_uri(mount_uri::<M>) });
}

/// The environment that RocksDB itself makes of a registered URI.
pub(crate) fn env_from_uri(uri: &str) -> std::result::Result<rocksdb::Env, EnvError> {
    let mut error = [0_u8; 1024];
    // SAFETY: both pointers go with their lengths.
    let env = unsafe {
        pumice_env_from_uri(
            uri.as_ptr().cast(),
            uri.len(),
            error.as_mut_ptr().cast(),
            error.len(),
        )
    };
    if env.is_null() {
        let end = error.iter().position(|b| *b == 0).unwrap_or(error.len());
        return Err(EnvError(
            String::from_utf8_lossy(&error[..end]).into_owned(),
        ));
    }
    // SAFETY: a new rocksdb_env_t, whose ownership passes on.
    Ok(unsafe { rocksdb::Env::from_raw(env.cast()) })
}

/// For C++ programs that link this crate: as [`crate::register_uri`], before `main`.
#[unsafe(no_mangle)]
extern "C" fn pumice_register_blobfs() {
    guard_value((), crate::register_uri);
}
