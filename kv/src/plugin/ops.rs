//! The table of C functions: `kv/shim/pumice_fs.h`, field for field.

use std::ffi::{c_char, c_void};

pub(super) const RETRYABLE: u32 = 1;
pub(super) const DATA_LOSS: u32 = 2;

pub(super) const OPEN_CREATE: u32 = 1;
pub(super) const OPEN_FRESH: u32 = 2;
pub(super) const OPEN_DIRECT: u32 = 4;

pub(super) const ACCESS_RANDOM: u32 = 1;
pub(super) const ACCESS_SEQUENTIAL: u32 = 2;
pub(super) const ACCESS_WILL_NEED: u32 = 3;
pub(super) const ACCESS_WONT_NEED: u32 = 4;

pub(super) const CAN_ASYNC: u32 = 1;
pub(super) const CAN_PIN: u32 = 2;
pub(super) const CAN_PREFETCH: u32 = 4;
pub(super) const CAN_REREAD: u32 = 8;

#[repr(C)]
pub(super) struct RawFault {
    pub err: i32,
    pub flags: u32,
    pub text: *const c_char,
    pub text_len: usize,
}

#[repr(C)]
pub(super) struct RawRead {
    pub offset: u64,
    pub len: usize,
    pub buf: *mut u8,
    pub data: *const u8,
    pub got: i64,
    pub pin: *mut c_void,
    pub fault: *mut c_void,
}

#[repr(C)]
pub(super) struct RawStat {
    pub len: u64,
    pub mtime_s: u64,
    pub file_id: u64,
    pub links: u32,
    pub is_dir: u32,
}

/// A file system, or a file of one; which is said by the function that takes it.
pub(super) type Handle = *const c_void;
pub(super) type Chars = *const c_char;
pub(super) type NameFn = unsafe extern "C" fn(*mut c_void, Chars, usize, u64, u32);

#[repr(C)]
pub(super) struct Ops {
    pub fs_release: unsafe extern "C" fn(Handle),
    pub last_fault: unsafe extern "C" fn(*mut RawFault),
    pub abilities: unsafe extern "C" fn(Handle) -> u32,
    pub alignment: unsafe extern "C" fn(Handle) -> usize,
    pub open: unsafe extern "C" fn(Handle, Chars, usize, u32, *mut Handle) -> i64,
    pub remove: unsafe extern "C" fn(Handle, Chars, usize) -> i64,
    pub rename: unsafe extern "C" fn(Handle, Chars, usize, Chars, usize) -> i64,
    pub link: unsafe extern "C" fn(Handle, Chars, usize, Chars, usize) -> i64,
    pub stat: unsafe extern "C" fn(Handle, Chars, usize, *mut RawStat) -> i64,
    pub mkdir: unsafe extern "C" fn(Handle, Chars, usize) -> i64,
    pub make_dirs: unsafe extern "C" fn(Handle, Chars, usize) -> i64,
    pub rmdir: unsafe extern "C" fn(Handle, Chars, usize) -> i64,
    pub list: unsafe extern "C" fn(Handle, Chars, usize, NameFn, *mut c_void) -> i64,
    pub sync_dir: unsafe extern "C" fn(Handle, Chars, usize) -> i64,
    pub lock: unsafe extern "C" fn(Handle, Chars, usize, *mut *mut c_void) -> i64,
    pub unlock: unsafe extern "C" fn(*mut c_void),
    pub free_bytes: unsafe extern "C" fn(Handle, *mut u64) -> i64,

    pub file_release: unsafe extern "C" fn(Handle),
    pub file_len: unsafe extern "C" fn(Handle) -> u64,
    pub file_id: unsafe extern "C" fn(Handle) -> u64,
    pub append: unsafe extern "C" fn(Handle, Chars, usize) -> i64,
    pub write_at: unsafe extern "C" fn(Handle, u64, Chars, usize) -> i64,
    pub read_at: unsafe extern "C" fn(Handle, u64, *mut c_char, usize) -> i64,
    pub read_many: unsafe extern "C" fn(Handle, *mut RawRead, usize) -> i64,
    pub truncate: unsafe extern "C" fn(Handle, u64) -> i64,
    pub allocate: unsafe extern "C" fn(Handle, u64, u64) -> i64,
    pub finish: unsafe extern "C" fn(Handle) -> i64,
    pub sync: unsafe extern "C" fn(Handle) -> i64,
    pub range_sync: unsafe extern "C" fn(Handle, u64, u64) -> i64,
    pub prefetch: unsafe extern "C" fn(Handle, u64, u64) -> i64,
    pub invalidate: unsafe extern "C" fn(Handle, u64, u64) -> i64,
    pub advise: unsafe extern "C" fn(Handle, u32),

    pub pin_release: unsafe extern "C" fn(*mut c_void),
    pub fault_take: unsafe extern "C" fn(*mut c_void),

    pub read_start: unsafe extern "C" fn(Handle, u64, usize, *mut *mut c_void) -> i64,
    pub read_finish: unsafe extern "C" fn(*mut c_void, *mut c_char, usize) -> i64,
    pub read_cancel: unsafe extern "C" fn(*mut c_void),
}
