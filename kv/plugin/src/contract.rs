// The contract between C++ and Rust, in the only place that has it. `build.rs` makes the headers
// `pumice_fs.h` and `pumice_embed.h` from this list. `lib.rs` makes the Rust declarations from it and
// checks the types of the functions that Rust implements.
//
// The functions of `pumice_fs.h` are the C ABI of the library `libpumice_fs`. A change of one of
// them, or of a constant or a struct, raises PUMICE_ABI_VERSION; a test reminds of it. A function
// that is added without a change of another gets a bit of PUMICE_CAN_* instead, which the shim demands
// from then on.
//
// A function that can fail returns a count or zero when it succeeded, and a negative errno when it
// did not. `pumice_last_fault` then returns the rest, on the same thread, until the next call
// there. No function throws or unwinds. Paths and data are (pointer, length) pairs, not
// NUL-terminated, and are only borrowed for the call, except where a handle is said to keep them. A
// file system, a file, a lock and a read are opaque pointers, which their release functions end.

contract! {
    constants {
        /// Version of this ABI. Another one has other functions, structs or constants.
        PUMICE_ABI_VERSION = 1;
        /// Bit of `pumice_fault`: the same call may succeed later, and RocksDB resumes by itself.
        PUMICE_RETRYABLE = 1;
        /// Bit of `pumice_fault`: durable bytes are lost or damaged.
        PUMICE_DATA_LOSS = 2;
        /// Bit for `pumice_open`: create the file if it does not exist.
        PUMICE_OPEN_CREATE = 1;
        /// Bit for `pumice_open`: make a new, empty inode under this name.
        PUMICE_OPEN_FRESH = 2;
        /// Bit for `pumice_open`: bypass the page cache.
        PUMICE_OPEN_DIRECT = 4;
        /// Values for `pumice_advise`.
        PUMICE_ACCESS_NORMAL = 0;
        PUMICE_ACCESS_RANDOM = 1;
        PUMICE_ACCESS_SEQUENTIAL = 2;
        PUMICE_ACCESS_WILL_NEED = 3;
        PUMICE_ACCESS_WONT_NEED = 4;
        /// Bits of the abilities that the library has, and that an environment offers to RocksDB as its
        /// FSSupportedOps. This one: reads that return before the data has arrived.
        PUMICE_CAN_ASYNC = 1;
        /// The ability to lend cached memory.
        PUMICE_CAN_PIN = 2;
        /// The ability to prefetch.
        PUMICE_CAN_PREFETCH = 4;
        /// The ability to read from the device again after `pumice_invalidate`.
        PUMICE_CAN_REREAD = 8;
        /// Alignment in bytes of direct reads and writes: offset, length and memory.
        PUMICE_ALIGNMENT = 4096;
    }
    structs {
        /// What the code that calls this ABI was compiled for.
        struct pumice_abi {
            /// The size of this struct. A longer one of a later header has more fields at its end.
            size: u32,
            /// PUMICE_ABI_VERSION.
            version: u32,
            /// The abilities that it needs: PUMICE_CAN_*.
            features: u64,
            /// The sizes of the structs that cross.
            fault_size: u32,
            read_size: u32,
            stat_size: u32,
            /// Zero.
            reserved: u32,
        }
        /// The details of a failure beyond its errno.
        struct pumice_fault {
            /// The errno, positive.
            err: i32,
            /// PUMICE_RETRYABLE and PUMICE_DATA_LOSS.
            flags: u32,
            /// Text for people, in UTF-8.
            text: *const c_char,
            text_len: usize,
        }
        /// One read of a batch.
        struct pumice_read {
            offset: u64,
            len: usize,
            /// Null if the file system provides the memory.
            buf: *mut u8,
            /// That memory, kept alive by `pin` until `pumice_pin_release`.
            data: *const u8,
            /// Number of bytes read, or a negative errno with `fault` for `pumice_fault_take`.
            got: i64,
            pin: *mut c_void,
            fault: *mut c_void,
        }
        struct pumice_stat {
            len: u64,
            /// Time of the last change in seconds since 1970.
            mtime_s: u64,
            /// The same for all names of one file, on one mount.
            file_id: u64,
            links: u32,
            is_dir: u32,
        }
    }
    callbacks {
        /// Called for each entry of a directory; must not throw.
        fn pumice_name_fn(arg: *mut c_void, name: *const c_char, len: usize, file_len: u64, is_dir: u32);
    }
    rust {
        /// Is called before anything else. Returns 0 if this library is what `needed` asks for;
        /// otherwise 1, with a text in `error` that names both, cut off to its length.
        fn pumice_abi_check(needed: *const pumice_abi, error: *mut c_char, error_len: usize) -> u32;

        /// The file system. Every function may be called from any thread.
        fn pumice_fs_release(fs: *const c_void);
        fn pumice_last_fault(out: *mut pumice_fault);
        fn pumice_open(fs: *const c_void, path: *const c_char, len: usize, how: u32, file: *mut *const c_void) -> i64;
        fn pumice_remove(fs: *const c_void, path: *const c_char, len: usize) -> i64;
        fn pumice_rename(fs: *const c_void, from: *const c_char, from_len: usize, to: *const c_char, to_len: usize) -> i64;
        fn pumice_link(fs: *const c_void, from: *const c_char, from_len: usize, to: *const c_char, to_len: usize) -> i64;
        fn pumice_stat_path(fs: *const c_void, path: *const c_char, len: usize, out: *mut pumice_stat) -> i64;
        fn pumice_mkdir(fs: *const c_void, path: *const c_char, len: usize) -> i64;
        /// Creates a directory with its parents; it may exist.
        fn pumice_make_dirs(fs: *const c_void, path: *const c_char, len: usize) -> i64;
        fn pumice_rmdir(fs: *const c_void, path: *const c_char, len: usize) -> i64;
        fn pumice_list(fs: *const c_void, path: *const c_char, len: usize, each: pumice_name_fn, arg: *mut c_void) -> i64;
        fn pumice_sync_dir(fs: *const c_void, path: *const c_char, len: usize) -> i64;
        fn pumice_lock(fs: *const c_void, path: *const c_char, len: usize, lock: *mut *mut c_void) -> i64;
        fn pumice_unlock(lock: *mut c_void);
        fn pumice_free_bytes(fs: *const c_void, out: *mut u64) -> i64;

        /// The file. Any number of threads may use it at once. The handle keeps the inode alive.
        fn pumice_file_release(file: *const c_void);
        fn pumice_file_len(file: *const c_void) -> u64;
        fn pumice_file_id(file: *const c_void) -> u64;
        fn pumice_append(file: *const c_void, data: *const c_char, len: usize) -> i64;
        fn pumice_write_at(file: *const c_void, offset: u64, data: *const c_char, len: usize) -> i64;
        fn pumice_read_at(file: *const c_void, offset: u64, buf: *mut c_char, len: usize) -> i64;
        fn pumice_read_many(file: *const c_void, reads: *mut pumice_read, count: usize) -> i64;
        fn pumice_truncate(file: *const c_void, len: u64) -> i64;
        fn pumice_allocate(file: *const c_void, offset: u64, len: u64) -> i64;
        /// The writer closes: nobody will append.
        fn pumice_finish(file: *const c_void) -> i64;
        fn pumice_sync(file: *const c_void) -> i64;
        fn pumice_range_sync(file: *const c_void, offset: u64, len: u64) -> i64;
        fn pumice_prefetch(file: *const c_void, offset: u64, len: u64) -> i64;
        fn pumice_invalidate(file: *const c_void, offset: u64, len: u64) -> i64;
        fn pumice_advise(file: *const c_void, access: u32);

        /// Ends a loan of `pumice_read_many`.
        fn pumice_pin_release(pin: *mut c_void);
        /// Makes a fault of `pumice_read_many` this thread's last one.
        fn pumice_fault_take(fault: *mut c_void);

        /// Returns 1 when the data has arrived already.
        fn pumice_read_start(file: *const c_void, offset: u64, len: usize, pending: *mut *mut c_void) -> i64;
        /// Waits, and releases the read.
        fn pumice_read_finish(pending: *mut c_void, buf: *mut c_char, len: usize) -> i64;
        /// Waits if necessary, and releases the read.
        fn pumice_read_cancel(pending: *mut c_void);

        /// Mounts the file system that a URI names, or shares it if this process has it mounted by
        /// the URI of the same device. It is unmounted when the last of these, and of the files that
        /// were opened through them, is released.
        fn pumice_mount_uri(uri: *const c_char, len: usize, fs: *mut *const c_void) -> i64;
    }
    cpp {
        /// Returns 0 if the shim fits the library, and RocksDB the shim; otherwise 1, with the reason
        /// in `error`.
        fn pumice_shim_check(error: *mut c_char, error_len: usize) -> u32;
        /// Makes a `rocksdb::Env*` over the file system, which it owns; `offers`: PUMICE_CAN_*.
        /// Null if there is no memory.
        fn pumice_env_new(fs: *const c_void, offers: u32) -> *mut c_void;
        /// Wraps that environment as an rocksdb_env_t, which owns it from then on. Null if there is
        /// no memory.
        fn pumice_env_wrap(env: *mut c_void) -> *mut c_void;
        /// Registers `blobfs://…` with RocksDB's object registry, for `--fs_uri` of its tools.
        /// Called once.
        fn pumice_register_uri();
        /// Opens `uri` through RocksDB's registry. Returns null, or an rocksdb_env_t.
        fn pumice_env_from_uri(uri: *const c_char, len: usize, error: *mut c_char, error_len: usize) -> *mut c_void;
    }
}
