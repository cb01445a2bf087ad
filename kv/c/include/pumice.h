/* Pumice in a C program: the file system by itself, and as the environment of RocksDB's C API.
 *
 * Link `pkg-config --libs pumice_fs` for the file system alone, `pumice_rocksdb` for it and RocksDB from your system, or
 * `pumice_db` for it and RocksDB in one static library. kv/c/README.md has examples.
 *
 * What holds for every function:
 *
 * - It may be called from any thread, and with one handle from several threads at once. Only a function that closes a
 *   handle must be the last one with it. Nothing is bound to the thread that opened it.
 * - It may wait for the device. It returns when the operation is over; there are no callbacks from other threads.
 *   It must not be called from a signal handler.
 * - It returns 0 or a count when it has succeeded, and a negative errno of Linux (`-ENOENT`) when it has not. A text and
 *   what the code does not say are then in `*error`. `error` may be NULL; a success leaves it unchanged.
 * - Texts are in UTF-8 and end with a NUL byte. They are only read during the call. NULL where a text, a handle or a place
 *   for a result is needed, and a text that is not UTF-8, are answered with `-EINVAL`.
 * - Sizes, lengths and offsets are in bytes.
 * - A result that a function makes is freed by the function that its documentation names, and by nothing else.
 *   On a failure the place for a handle is set to NULL.
 * - A child process after fork must not use what its parent has opened: calls fail with `-EBADF` there, and a function
 *   that closes a handle only frees it. The child can open stores of its own.
 *
 * This file is made by cbindgen from kv/c/src. */

#ifndef PUMICE_H
#define PUMICE_H

#include <stddef.h>
#include <stdint.h>

/**
 * The value of a `pumice_header` for `pumice_header_check`.
 */
#define PUMICE_HEADER                                                                          \
  {                                                                                            \
    (uint32_t)sizeof(pumice_header), PUMICE_HEADER_VERSION, (uint32_t)sizeof(pumice_error),    \
        (uint32_t)sizeof(pumice_options), (uint32_t)sizeof(pumice_info),                       \
        (uint32_t)sizeof(pumice_entry), (uint32_t)sizeof(pumice_space), 0                      \
  }

/**
 * The value of a `pumice_options` without options.
 */
#define PUMICE_OPTIONS                                                                         \
  { (uint32_t)sizeof(pumice_options), PUMICE_HEADER_VERSION, 0, 0, 0 }

/**
 * Bit of `pumice_error.flags`: the same call may succeed later, after space was freed or a fault of
 * the device has passed.
 */
#define PUMICE_ERROR_RETRYABLE 1

/**
 * Bit of `pumice_error.flags`: bytes that a call had accepted may be lost or damaged.
 */
#define PUMICE_ERROR_DATA_LOSS 2

/**
 * The version of this header. A library with another one has other functions, structs or constants.
 * Functions may be added within a version.
 */
#define PUMICE_HEADER_VERSION 1

/**
 * Bit of `pumice_options.flags`: write nothing to the device and create nothing. Several processes may
 * read one image at a time.
 */
#define PUMICE_STORE_READ_ONLY 1

/**
 * Bit of `pumice_options.flags`: do not make a file system on a device that holds nothing but zeroes.
 * Without it that is done. A device with other content is never formatted.
 */
#define PUMICE_STORE_NO_FORMAT 2

/**
 * Bit of `pumice_options.flags`: what is not synced may be lost when the process is killed, as it is
 * by a power cut. Without it a copy in shared memory outlives the process.
 */
#define PUMICE_STORE_VOLATILE 4

/**
 * Bit of `pumice_options.flags`: mount for writing although files are damaged, without those files.
 */
#define PUMICE_STORE_ACCEPT_DAMAGE 8

/**
 * Bit for `pumice_file_open`: create the file if it does not exist.
 */
#define PUMICE_FILE_CREATE 1

/**
 * Bit for `pumice_file_open`, with PUMICE_FILE_CREATE: fail with `-EEXIST` if the file exists.
 */
#define PUMICE_FILE_EXCLUSIVE 2

/**
 * Bit for `pumice_file_open`: set the length to 0.
 */
#define PUMICE_FILE_TRUNCATE 4

/**
 * Bit for `pumice_file_open`: bypass the page cache.
 */
#define PUMICE_FILE_DIRECT 8

/**
 * An open file. It keeps its store mounted, and its content if the last name is removed.
 */
typedef struct pumice_file pumice_file;

/**
 * An open store: a file system on a device, an image file or in memory.
 */
typedef struct pumice_store pumice_store;

/**
 * The environment of RocksDB's C API (`rocksdb/c.h`).
 */
typedef struct rocksdb_env_t rocksdb_env_t;

/**
 * Describes what a program was compiled for. Begin with `pumice_header header = PUMICE_HEADER;`.
 */
typedef struct pumice_header {
  /**
   * The size of this struct. A longer one of a later header has more fields at its end.
   */
  uint32_t size;
  /**
   * PUMICE_HEADER_VERSION.
   */
  uint32_t version;
  /**
   * The sizes of the structs that cross.
   */
  uint32_t error_size;
  /**
   * The size of `pumice_options`.
   */
  uint32_t options_size;
  /**
   * The size of `pumice_info`.
   */
  uint32_t info_size;
  /**
   * The size of `pumice_entry`.
   */
  uint32_t entry_size;
  /**
   * The size of `pumice_space`.
   */
  uint32_t space_size;
  /**
   * Zero.
   */
  uint32_t reserved;
} pumice_header;

/**
 * The details of a failure. It is the caller's memory, it needs no initialisation, and there is
 * nothing to free.
 */
typedef struct pumice_error {
  /**
   * The errno, positive.
   */
  int32_t code;
  /**
   * PUMICE_ERROR_RETRYABLE and PUMICE_ERROR_DATA_LOSS.
   */
  uint32_t flags;
  /**
   * A text that says what failed, why, and what to do, in UTF-8, with a NUL at its end. A long one is cut off.
   */
  char text[504];
} pumice_error;

/**
 * Options of `pumice_store_open` and `pumice_env_open`. Begin with
 * `pumice_options options = PUMICE_OPTIONS;`.
 */
typedef struct pumice_options {
  /**
   * The size of this struct. A longer one of a later header has more fields at its end.
   */
  uint32_t size;
  /**
   * PUMICE_HEADER_VERSION.
   */
  uint32_t version;
  /**
   * PUMICE_STORE_*.
   */
  uint32_t flags;
  /**
   * Zero.
   */
  uint32_t reserved;
  /**
   * The size of the page cache in bytes. With 0 it follows the memory that is free. A `cache` in
   * the URI has precedence.
   */
  uint64_t cache_bytes;
} pumice_options;

/**
 * The space of a store, as `df` shows it. All but the last are in bytes.
 */
typedef struct pumice_space {
  /**
   * Space for files.
   */
  uint64_t total;
  /**
   * Space that can still be written.
   */
  uint64_t free;
  /**
   * Space of the files, with what is allocated ahead.
   */
  uint64_t used;
  /**
   * The unit of allocation.
   */
  uint64_t cluster;
  /**
   * Number of files.
   */
  uint64_t files;
} pumice_space;

/**
 * The properties of a file or directory.
 */
typedef struct pumice_info {
  /**
   * Length in bytes; 0 for a directory.
   */
  uint64_t len;
  /**
   * Space in use in bytes, with what is allocated ahead.
   */
  uint64_t allocated;
  /**
   * Time of the last change in nanoseconds since 1970; 0 if it is not known.
   */
  uint64_t mtime_ns;
  /**
   * The same for all names of one file, as long as the store is open. 0 for a directory that has none.
   */
  uint64_t file_id;
  /**
   * Number of names of the file.
   */
  uint32_t links;
  /**
   * 1 for a directory, 0 for a file.
   */
  uint32_t is_dir;
} pumice_info;

/**
 * An entry of a directory.
 */
typedef struct pumice_entry {
  /**
   * The last component of its path. It is valid until the function that was called with it returns.
   */
  const char *name;
  /**
   * Length in bytes; 0 for a directory.
   */
  uint64_t len;
  /**
   * 1 for a directory, 0 for a file.
   */
  uint32_t is_dir;
  /**
   * Zero.
   */
  uint32_t reserved;
} pumice_entry;

/**
 * The function that `pumice_store_list` calls for each entry, on the thread that has called it, with
 * no lock held: it may call functions of this API. It returns 0 to go on, and another value to stop. It
 * must not throw, and must not leave by longjmp.
 */
typedef int32_t (*pumice_entry_fn)(void *arg, const struct pumice_entry *entry);

#ifdef __cplusplus
extern "C" {
#endif // __cplusplus

/**
 * Returns the version of the library as text, such as "0.1.0". It is valid for ever, and not freed.
 */
const char *pumice_release(void);

/**
 * Tells whether the library is the one that the program's header describes. Call it before anything
 * else. Returns 0, or `-EINVAL` with a text in `error` that names the difference.
 */
int32_t pumice_header_check(const struct pumice_header *header, struct pumice_error *error);

/**
 * Opens the store that a URI names: `blobfs:///var/lib/app/data.img`, `blobfs:///dev/nvme0n1`,
 * `blobfs://malloc://64M`. `?size:4G&create` makes a missing image file, `root:/dir` calls that
 * directory `/`, and `cache:64M` limits the page cache. `options` may be NULL. A path with `..` leads
 * out of `root`: it is a name for a directory and no protection.
 *
 * A device that holds nothing but zeroes is formatted. A store that this process has open already is
 * shared, with the options of the first one; `-EBUSY` if one is for reading only and the other is not,
 * or if another process has it. A device in memory is new each time. The time that it takes depends on
 * the size of the store if it was not closed in order.
 *
 * On success `*store` is the handle, which the caller closes with `pumice_store_close`.
 */
int32_t pumice_store_open(const char *uri,
                          const struct pumice_options *options,
                          struct pumice_store **store,
                          struct pumice_error *error);

/**
 * Closes a store, and frees the handle whatever is returned. The store is unmounted when the last
 * handle and the last file of it in this process are closed, and everything is durable then. An
 * error says that this last close has failed: the next open repairs what it can. NULL is ignored.
 */
int32_t pumice_store_close(struct pumice_store *store, struct pumice_error *error);

/**
 * Makes all files durable that were written through any handle of the store. Returns the first error;
 * the other files are synced nevertheless.
 */
int32_t pumice_store_sync(const struct pumice_store *store,
                          struct pumice_error *error);

/**
 * Puts the space of the store into `*space`.
 */
int32_t pumice_store_space(const struct pumice_store *store,
                           struct pumice_space *space,
                           struct pumice_error *error);

/**
 * Puts the properties of a file or directory into `*info`.
 */
int32_t pumice_store_info(const struct pumice_store *store,
                          const char *path,
                          struct pumice_info *info,
                          struct pumice_error *error);

/**
 * Calls `each` with `arg` for every entry of a directory, in the order of their names. Returns how many
 * times it was called. Entries that are made or removed meanwhile may be missing or there.
 */
int64_t pumice_store_list(const struct pumice_store *store,
                          const char *path,
                          pumice_entry_fn each,
                          void *arg,
                          struct pumice_error *error);

/**
 * Makes a directory, durably. Its parent must exist; `-EEXIST` if the path does.
 */
int32_t pumice_store_mkdir(const struct pumice_store *store,
                           const char *path,
                           struct pumice_error *error);

/**
 * Removes an empty directory, durably. `-ENOTEMPTY` if it has entries.
 */
int32_t pumice_store_rmdir(const struct pumice_store *store,
                           const char *path,
                           struct pumice_error *error);

/**
 * Removes a name of a file, durably. The file goes with its last name, when it is closed everywhere.
 */
int32_t pumice_store_unlink(const struct pumice_store *store,
                            const char *path,
                            struct pumice_error *error);

/**
 * Renames a file or directory, durably and in one step. A file that has the name `to` is replaced, and
 * stays usable for those who have it open. The content of the file is not synced by it.
 */
int32_t pumice_store_rename(const struct pumice_store *store,
                            const char *from,
                            const char *to,
                            struct pumice_error *error);

/**
 * Gives a file another name, durably. `-EMLINK` when it has as many as it can have.
 */
int32_t pumice_store_link(const struct pumice_store *store,
                          const char *from,
                          const char *to,
                          struct pumice_error *error);

/**
 * Opens a file for reading and writing; `flags` are PUMICE_FILE_* or 0. A file that was created has its
 * name durably.
 *
 * On success `*file` is the handle, which the caller closes with `pumice_file_close`.
 */
int32_t pumice_file_open(const struct pumice_store *store,
                         const char *path,
                         uint32_t flags,
                         struct pumice_file **file,
                         struct pumice_error *error);

/**
 * Closes a file, and frees the handle whatever is returned. It does not sync: what was not synced
 * outlives the process, but not a power cut, until the store is closed. An error is that of the store's
 * last close, see `pumice_store_close`. NULL is ignored.
 */
int32_t pumice_file_close(struct pumice_file *file,
                          struct pumice_error *error);

/**
 * Reads at most `len` bytes at `offset` into `buf`. Returns the number of bytes, which is less than
 * `len` only at the end of the file, and 0 behind it.
 */
int64_t pumice_file_read(const struct pumice_file *file,
                         uint64_t offset,
                         uint8_t *buf,
                         size_t len,
                         struct pumice_error *error);

/**
 * Writes all `len` bytes at `offset`; a gap behind the end becomes zeroes. After a failure the bytes
 * there may be the old or the new ones. `pumice_file_sync` makes them durable.
 */
int32_t pumice_file_write(const struct pumice_file *file,
                          uint64_t offset,
                          const uint8_t *buf,
                          size_t len,
                          struct pumice_error *error);

/**
 * Appends all `len` bytes at the end, usually by a copy into memory. Appends of several threads come one
 * after the other. After a failure the file is unchanged.
 */
int32_t pumice_file_append(const struct pumice_file *file,
                           const uint8_t *buf,
                           size_t len,
                           struct pumice_error *error);

/**
 * Sets the length. New bytes are zeroes. A shorter length is durable on return.
 */
int32_t pumice_file_truncate(const struct pumice_file *file,
                             uint64_t len,
                             struct pumice_error *error);

/**
 * Makes the content and the length durable. After a failure the data stays in memory, and the next
 * sync writes it again.
 */
int32_t pumice_file_sync(const struct pumice_file *file, struct pumice_error *error);

/**
 * Puts the properties of an open file into `*info`. It may have lost its name.
 */
int32_t pumice_file_info(const struct pumice_file *file,
                         struct pumice_info *info,
                         struct pumice_error *error);

/**
 * Opens a store as `pumice_store_open` does, and returns it as an environment for
 * `rocksdb_options_set_env`. All paths of RocksDB are then paths in the store, and everything in
 * `rocksdb/c.h` works on it: databases, column families, backups, checkpoints. Returns NULL on a
 * failure, with `error->code` and `error->text`.
 *
 * The libraries `pumice_rocksdb` and `pumice_db` have it, not `pumice_fs`. A program that opens
 * the URI of a store that it has open shares that store.
 *
 * The caller closes the environment with `pumice_env_close` or `rocksdb_env_destroy`, after every
 * database, backup engine and SST writer that was opened with it, and after the `rocksdb_options_t`
 * that it was set in.
 *
 * A forked child of a process with an open database ends by `_exit` or exec: RocksDB's handler for
 * `exit` waits for threads that only the parent has, on any file system.
 */
extern struct rocksdb_env_t *pumice_env_open(const char *uri,
                                             const struct pumice_options *options,
                                             struct pumice_error *error);

/**
 * Closes an environment. Its store is unmounted when its last environment, handle and file are
 * closed: what RocksDB has written is durable then, also without a sync. NULL is ignored.
 */
extern void pumice_env_close(struct rocksdb_env_t *env);

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

#endif  /* PUMICE_H */
