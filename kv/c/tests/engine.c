/* What programs that embed RocksDB do through rocksdb/c.h, on an environment of pumice.h: each part of RocksDB's C API that makes
 * files, failures, and ends of a process. kv/embed/tests/c.rs runs it, with the path of a directory of the kernel's;
 * scripts/plugin-test also with the RocksDB of the system, and under valgrind. */

#include "check.h"
#include <pthread.h>
#include <rocksdb/c.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>

static char *failure = NULL;
static rocksdb_env_t *env;
static rocksdb_options_t *options;
static rocksdb_writeoptions_t *writing;
static rocksdb_readoptions_t *reading;

/* The call before has succeeded. */
#define GOOD()                                                                   \
  do {                                                                           \
    if (failure != NULL) {                                                       \
      fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, failure);               \
      problems++;                                                                \
      rocksdb_free(failure);                                                     \
      failure = NULL;                                                            \
    }                                                                            \
  } while (0)

/* The call before has failed with a text that has this in it. The text is freed once. */
#define FAILED(word)                                                             \
  do {                                                                           \
    if (failure == NULL || strstr(failure, word) == NULL) {                      \
      fprintf(stderr, "%s:%d: not %s: %s\n", __FILE__, __LINE__, word, failure ? failure : "(success)"); \
      problems++;                                                                \
    }                                                                            \
    rocksdb_free(failure);                                                       \
    failure = NULL;                                                              \
  } while (0)

static void begin(const char *uri) {
  env = pumice_env_open(uri, NULL, &error);
  CHECK(env != NULL);
  if (env == NULL) exit(1);
  options = rocksdb_options_create();
  rocksdb_options_set_env(options, env);
  rocksdb_options_set_create_if_missing(options, 1);
  rocksdb_options_set_create_missing_column_families(options, 1);
  writing = rocksdb_writeoptions_create();
  reading = rocksdb_readoptions_create();
}

static void finish(void) {
  rocksdb_readoptions_destroy(reading);
  rocksdb_writeoptions_destroy(writing);
  rocksdb_options_destroy(options);
  pumice_env_close(env);
}

static rocksdb_t *database(const char *path) {
  rocksdb_t *db = rocksdb_open(options, path, &failure);
  GOOD();
  if (db == NULL) exit(1);
  return db;
}

static void put(rocksdb_t *db, const char *key, const char *value) {
  rocksdb_put(db, writing, key, strlen(key), value, strlen(value), &failure);
  GOOD();
}

/* Whether a key has this value; NULL is none. */
static int is(rocksdb_t *db, const char *key, const char *value) {
  size_t len = 0;
  char *found = rocksdb_get(db, reading, key, strlen(key), &len, &failure);
  GOOD();
  int same = value == NULL ? found == NULL
                           : found != NULL && len == strlen(value) && memcmp(found, value, len) == 0;
  rocksdb_free(found);
  return same;
}

/* Batches, iterators in both directions, snapshots, many keys at once. */
static void calls(void) {
  rocksdb_t *db = database("/calls");
  rocksdb_writebatch_t *batch = rocksdb_writebatch_create();
  for (char key = 'a'; key <= 'e'; key++) rocksdb_writebatch_put(batch, &key, 1, "1", 1);
  rocksdb_writebatch_delete(batch, "c", 1);
  rocksdb_writebatch_set_save_point(batch);
  rocksdb_writebatch_delete_range(batch, "a", 1, "z", 1);
  rocksdb_writebatch_rollback_to_save_point(batch, &failure);
  GOOD();
  rocksdb_write(db, writing, batch, &failure);
  GOOD();
  rocksdb_writebatch_clear(batch);
  const rocksdb_snapshot_t *before = rocksdb_create_snapshot(db);
  put(db, "a", "2");
  rocksdb_delete(db, writing, "b", 1, &failure);
  GOOD();
  CHECK(is(db, "a", "2") && is(db, "b", NULL) && is(db, "c", NULL));
  rocksdb_readoptions_set_snapshot(reading, before);
  CHECK(is(db, "a", "1") && is(db, "b", "1"));
  rocksdb_readoptions_set_snapshot(reading, NULL);
  rocksdb_release_snapshot(db, before);
  char seen[8] = "";
  rocksdb_iterator_t *at = rocksdb_create_iterator(db, reading);
  for (rocksdb_iter_seek_to_first(at); rocksdb_iter_valid(at); rocksdb_iter_next(at)) {
    size_t len = 0;
    strncat(seen, rocksdb_iter_key(at, &len), 1);
  }
  rocksdb_iter_seek_for_prev(at, "d5", 2);
  CHECK(strcmp(seen, "ade") == 0 && rocksdb_iter_valid(at));
  rocksdb_iter_prev(at);
  rocksdb_iter_get_error(at, &failure);
  GOOD();
  const char *keys[] = {"a", "b", "e"};
  const size_t sizes[] = {1, 1, 1};
  char *values[3], *failures[3];
  size_t lens[3];
  rocksdb_multi_get(db, reading, 3, keys, sizes, values, lens, failures);
  CHECK(values[0] != NULL && values[0][0] == '2' && values[1] == NULL && values[2] != NULL);
  for (int i = 0; i < 3; i++) {
    CHECK(failures[i] == NULL);
    rocksdb_free(values[i]);
  }
  /* RocksDB's rule: before the database. */
  rocksdb_iter_destroy(at);
  rocksdb_close(db);
  /* A batch belongs to no database. */
  rocksdb_writebatch_put(batch, "late", 4, "1", 1);
  db = database("/calls");
  rocksdb_write(db, writing, batch, &failure);
  GOOD();
  CHECK(is(db, "late", "1") && is(db, "a", "2"));
  rocksdb_writebatch_destroy(batch);
  rocksdb_close(db);
}

static void families(void) {
  const char *names[] = {"default", "one"};
  const rocksdb_options_t *each[] = {options, options};
  rocksdb_column_family_handle_t *handles[2];
  rocksdb_t *db = rocksdb_open_column_families(options, "/families", 2, names, each, handles, &failure);
  GOOD();
  rocksdb_column_family_handle_t *two = rocksdb_create_column_family(db, options, "two", &failure);
  GOOD();
  rocksdb_put_cf(db, writing, two, "k", 1, "v", 1, &failure);
  GOOD();
  rocksdb_drop_column_family(db, handles[1], &failure);
  GOOD();
  rocksdb_flushoptions_t *flush = rocksdb_flushoptions_create();
  rocksdb_flush_cf(db, flush, two, &failure);
  GOOD();
  rocksdb_flushoptions_destroy(flush);
  rocksdb_column_family_handle_destroy(two);
  for (int i = 0; i < 2; i++) rocksdb_column_family_handle_destroy(handles[i]);
  rocksdb_close(db);
  size_t count = 0;
  char **listed = rocksdb_list_column_families(options, "/families", &count, &failure);
  GOOD();
  CHECK(count == 2 && strcmp(listed[1], "two") == 0);
  rocksdb_list_column_families_destroy(listed, count);
  CHECK(rocksdb_open(options, "/families", &failure) == NULL);
  FAILED("Invalid argument: Column families not opened: two");
}

/* Flushes, compaction, properties, options as text, files from outside. */
static void tables(void) {
  rocksdb_options_t *given = rocksdb_options_create();
  rocksdb_get_options_from_string(options, "write_buffer_size=65536;compression=kNoCompression", given, &failure);
  GOOD();
  rocksdb_get_options_from_string(options, "no_such_option=1", given, &failure);
  FAILED("Invalid argument");
  rocksdb_t *db = rocksdb_open(given, "/tables", &failure);
  GOOD();
  char key[16], value[512];
  memset(value, 'v', sizeof value);
  for (int i = 0; i < 2000; i++) {
    int len = snprintf(key, sizeof key, "%08d", i);
    rocksdb_put(db, writing, key, (size_t)len, value, sizeof value, &failure);
    GOOD();
  }
  rocksdb_flushoptions_t *flush = rocksdb_flushoptions_create();
  rocksdb_flush(db, flush, &failure);
  GOOD();
  rocksdb_flushoptions_destroy(flush);
  rocksdb_compact_range(db, NULL, 0, NULL, 0);
  uint64_t keys = 0;
  CHECK(rocksdb_property_int(db, "rocksdb.estimate-num-keys", &keys) == 0 && keys == 2000);
  char *stats = rocksdb_property_value(db, "rocksdb.stats");
  CHECK(stats != NULL && strstr(stats, "Compaction Stats") != NULL);
  rocksdb_free(stats);
  CHECK(rocksdb_property_value(db, "rocksdb.no-such-property") == NULL);
  rocksdb_envoptions_t *how = rocksdb_envoptions_create();
  rocksdb_sstfilewriter_t *writer = rocksdb_sstfilewriter_create(how, options);
  rocksdb_sstfilewriter_open(writer, "/outside.sst", &failure);
  GOOD();
  rocksdb_sstfilewriter_put(writer, "z", 1, "ingested", 8, &failure);
  GOOD();
  rocksdb_sstfilewriter_finish(writer, &failure);
  GOOD();
  rocksdb_sstfilewriter_destroy(writer);
  rocksdb_envoptions_destroy(how);
  const char *files[] = {"/outside.sst"};
  rocksdb_ingestexternalfileoptions_t *ingestion = rocksdb_ingestexternalfileoptions_create();
  rocksdb_ingest_external_file(db, files, 1, ingestion, &failure);
  GOOD();
  rocksdb_ingestexternalfileoptions_destroy(ingestion);
  CHECK(is(db, "z", "ingested"));
  rocksdb_close(db);
  rocksdb_options_destroy(given);
}

/* What has the environment as an argument, logs in a directory of their own, and their records. */
static void logs(void) {
  rocksdb_env_set_background_threads(env, 2);
  rocksdb_create_dir_if_missing(env, "/wal", &failure);
  GOOD();
  rocksdb_options_t *given = rocksdb_options_create_copy(options);
  rocksdb_options_set_wal_dir(given, "/wal");
  rocksdb_options_set_db_log_dir(given, "/info");
  rocksdb_t *db = rocksdb_open(given, "/logs", &failure);
  GOOD();
  put(db, "first", "1");
  put(db, "second", "2");
  rocksdb_wal_iterator_t *records = rocksdb_get_updates_since(db, 1, NULL, &failure);
  GOOD();
  int count = 0;
  for (; rocksdb_wal_iter_valid(records); rocksdb_wal_iter_next(records)) {
    uint64_t sequence = 0;
    rocksdb_writebatch_destroy(rocksdb_wal_iter_get_batch(records, &sequence));
    CHECK(sequence == (uint64_t)++count);
  }
  CHECK(count == 2);
  rocksdb_wal_iter_destroy(records);
  rocksdb_close(db);
  rocksdb_options_destroy(given);
  rocksdb_cache_t *cache = rocksdb_cache_create_lru(1 << 20);
  rocksdb_options_t *saved = NULL, **each = NULL;
  char **names = NULL;
  size_t families = 0;
  rocksdb_load_latest_options("/logs", env, 0, cache, &saved, &families, &names, &each, &failure);
  GOOD();
  CHECK(families == 1 && strcmp(names[0], "default") == 0);
  rocksdb_load_latest_options_destroy(saved, names, each, families);
  rocksdb_cache_destroy(cache);
}

/* Checkpoints and backups; a database is destroyed and restored, and one that is read by others. */
static void copies(void) {
  rocksdb_t *db = database("/copied");
  put(db, "k", "old");
  rocksdb_checkpoint_t *checkpoint = rocksdb_checkpoint_object_create(db, &failure);
  GOOD();
  rocksdb_checkpoint_create(checkpoint, "/checkpoint", 0, &failure);
  GOOD();
  rocksdb_checkpoint_create(checkpoint, "/checkpoint", 0, &failure);
  FAILED("exists");
  rocksdb_checkpoint_object_destroy(checkpoint);
  rocksdb_backup_engine_t *backups = rocksdb_backup_engine_open(options, "/backups", &failure);
  GOOD();
  rocksdb_backup_engine_create_new_backup_flush(backups, db, 1, &failure);
  GOOD();
  put(db, "k", "new");
  rocksdb_t *reader = rocksdb_open_for_read_only(options, "/copied", 0, &failure);
  GOOD();
  rocksdb_t *second = rocksdb_open_as_secondary(options, "/copied", "/second", &failure);
  GOOD();
  put(db, "k", "newer");
  CHECK(is(reader, "k", "new"));
  rocksdb_try_catch_up_with_primary(second, &failure);
  GOOD();
  CHECK(is(second, "k", "newer"));
  rocksdb_close(second);
  rocksdb_close(reader);
  rocksdb_close(db);
  rocksdb_destroy_db(options, "/copied", &failure);
  GOOD();
  rocksdb_restore_options_t *restore = rocksdb_restore_options_create();
  rocksdb_backup_engine_restore_db_from_latest_backup(backups, "/copied", "/copied", restore, &failure);
  GOOD();
  rocksdb_restore_options_destroy(restore);
  const rocksdb_backup_engine_info_t *known = rocksdb_backup_engine_get_backup_info(backups);
  CHECK(rocksdb_backup_engine_info_count(known) == 1);
  rocksdb_backup_engine_info_destroy(known);
  rocksdb_backup_engine_close(backups);
  db = database("/copied");
  CHECK(is(db, "k", "old"));
  rocksdb_close(db);
  db = database("/checkpoint");
  CHECK(is(db, "k", "old"));
  rocksdb_close(db);
  rocksdb_repair_db(options, "/checkpoint", &failure);
  GOOD();
  db = rocksdb_open_with_ttl(options, "/ttl", 3600, &failure);
  GOOD();
  put(db, "k", "short");
  CHECK(is(db, "k", "short"));
  rocksdb_close(db);
}

static void transactions(void) {
  rocksdb_transactiondb_options_t *how = rocksdb_transactiondb_options_create();
  rocksdb_transaction_options_t *each = rocksdb_transaction_options_create();
  rocksdb_transaction_options_set_lock_timeout(each, 1);
  rocksdb_transactiondb_t *db = rocksdb_transactiondb_open(options, how, "/transactions", &failure);
  GOOD();
  rocksdb_transaction_t *first = rocksdb_transaction_begin(db, writing, each, NULL);
  rocksdb_transaction_t *second = rocksdb_transaction_begin(db, writing, each, NULL);
  rocksdb_transaction_put(first, "k", 1, "1", 1, &failure);
  GOOD();
  rocksdb_transaction_put(second, "k", 1, "2", 1, &failure);
  FAILED("Operation timed out");
  rocksdb_transaction_rollback(second, &failure);
  GOOD();
  rocksdb_transaction_commit(first, &failure);
  GOOD();
  rocksdb_transaction_destroy(first);
  rocksdb_transaction_destroy(second);
  rocksdb_transactiondb_close(db);
  rocksdb_transaction_options_destroy(each);
  rocksdb_transactiondb_options_destroy(how);
  rocksdb_t *plain = database("/transactions");
  CHECK(is(plain, "k", "1"));
  rocksdb_close(plain);
}

/* What is refused, and what a full device does. */
static void refusals(void) {
  CHECK(pumice_env_open(NULL, NULL, &error) == NULL && error.code == EINVAL);
  CHECK(pumice_env_open("blobfs://\xff", NULL, &error) == NULL && error.code == EINVAL);
  CHECK(pumice_env_open("file:///x", NULL, &error) == NULL && error.code == EINVAL);
  CHECK(pumice_env_open("blobfs:///nowhere/x", NULL, &error) == NULL && error.code == ENOENT);
  CHECK(pumice_env_open("blobfs:///nowhere/x", NULL, NULL) == NULL);
  pumice_options wrong = PUMICE_OPTIONS;
  wrong.reserved = 1;
  CHECK(pumice_env_open("blobfs://malloc://64M", &wrong, &error) == NULL && error.code == EINVAL);
  pumice_env_close(NULL);
  rocksdb_t *db = database("/held");
  CHECK(rocksdb_open(options, "/held", &failure) == NULL);
  FAILED("IO error");
  rocksdb_close(db);
  rocksdb_options_set_create_if_missing(options, 0);
  CHECK(rocksdb_open(options, "/missing", &failure) == NULL);
  FAILED("Invalid argument: /missing");
  rocksdb_options_set_create_if_missing(options, 1);
  rocksdb_options_set_error_if_exists(options, 1);
  CHECK(rocksdb_open(options, "/held", &failure) == NULL);
  FAILED("Invalid argument: /held");
  rocksdb_options_set_error_if_exists(options, 0);
  rocksdb_options_set_allow_mmap_reads(options, 1);
  CHECK(rocksdb_open(options, "/mapped", &failure) == NULL);
  FAILED("mmap");
  rocksdb_options_set_allow_mmap_reads(options, 0);
}

static void full(void) {
  begin("blobfs://malloc://48M");
  rocksdb_options_set_max_background_jobs(options, 2);
  rocksdb_t *db = database("/db");
  char *value = (char *)calloc(1, 1 << 20);
  int written = 0;
  while (written < 100 && failure == NULL) {
    char key[16];
    int len = snprintf(key, sizeof key, "%d", written++);
    for (int i = 0; i < 1 << 20; i++) value[i] = (char)(i * 2654435761u >> (written & 7));
    rocksdb_put(db, writing, key, (size_t)len, value, 1 << 20, &failure);
  }
  free(value);
  CHECK(written < 100);
  FAILED("No space left on device");
  CHECK(!is(db, "0", NULL));
  rocksdb_close(db);
  finish();
}

static void *writes(void *arg) {
  rocksdb_t *db = (rocksdb_t *)arg;
  char *mine = NULL;
  rocksdb_readoptions_t *how = rocksdb_readoptions_create();
  for (int i = 0; i < 300; i++) {
    char key[16];
    int len = snprintf(key, sizeof key, "%d", i);
    rocksdb_put(db, writing, key, (size_t)len, key, (size_t)len, &mine);
    CHECK(mine == NULL);
    if (i % 50 != 0) continue;
    rocksdb_iterator_t *at = rocksdb_create_iterator(db, how);
    rocksdb_iter_seek_to_last(at);
    CHECK(rocksdb_iter_valid(at));
    rocksdb_iter_destroy(at);
  }
  rocksdb_readoptions_destroy(how);
  return NULL;
}

/* Two databases on one device, by one environment and by two, and a store beside them, with several threads. */
static void together(const char *uri) {
  rocksdb_env_t *first = env;
  char part[4300];
  snprintf(part, sizeof part, "%s?root:/part", uri);
  env = pumice_env_open(part, NULL, &error);
  CHECK(env != NULL);
  rocksdb_options_t *below = rocksdb_options_create();
  rocksdb_options_set_env(below, env);
  rocksdb_options_set_create_if_missing(below, 1);
  pumice_store *store = NULL;
  pumice_info info;
  CHECK(pumice_store_open(uri, NULL, &store, &error) == 0);
  rocksdb_t *one = database("/one"), *two = database("/two");
  rocksdb_t *three = rocksdb_open(below, "/one", &failure);
  GOOD();
  rocksdb_t *const all[] = {one, two, three};
  pthread_t threads[6];
  for (int i = 0; i < 6; i++) CHECK(pthread_create(&threads[i], NULL, writes, all[i % 3]) == 0);
  for (int i = 0; i < 6; i++) pthread_join(threads[i], NULL);
  for (int i = 0; i < 3; i++) {
    CHECK(is(all[i], "299", "299"));
    rocksdb_close(all[i]);
  }
  rocksdb_options_destroy(below);
  rocksdb_env_destroy(env);
  env = first;
  CHECK(pumice_store_info(store, "/part/one/CURRENT", &info, &error) == 0 && info.len > 0);
  CHECK(pumice_store_info(store, "/two/CURRENT", &info, &error) == 0);
  CHECK(pumice_store_close(store, &error) == 0);
}

/* A child of a process with an open database ends, and leaves it alone. */
static void forked(void) {
  rocksdb_t *db = database("/forked");
  put(db, "k", "1");
  pid_t child = fork();
  if (child == 0) {
    alarm(300);
    /* Not a put: RocksDB 7.8 of Debian has assertions, and one of them is against writing on after a failure. */
    rocksdb_create_dir_if_missing(env, "/child", &failure);
    /* At exit, RocksDB would join threads that only the parent has. */
    _exit(failure == NULL);
  }
  int status = -1;
  CHECK(waitpid(child, &status, 0) == child && status == 0);
  CHECK(is(db, "k", "1"));
  put(db, "k", "3");
  CHECK(is(db, "k", "3"));
  rocksdb_close(db);
}

/* A process ends with an open database, an iterator and a snapshot. What had been put is there, also unsynced. */
static void ends(const char *dir) {
  for (int how = 0; how < 3; how++) {
    char uri[4200];
    snprintf(uri, sizeof uri, "blobfs://%s/end%d.img?size:256M&create", dir, how);
    pid_t child = fork();
    if (child == 0) {
      begin(uri);
      rocksdb_t *db = database("/db");
      put(db, "k", "kept");
      rocksdb_create_iterator(db, reading);
      rocksdb_create_snapshot(db);
      if (how == 0) exit(problems != 0);
      if (how == 1) _exit(problems != 0);
      kill(getpid(), SIGKILL);
    }
    int status = -1;
    CHECK(waitpid(child, &status, 0) == child);
    CHECK(how == 2 ? WIFSIGNALED(status) : status == 0);
    begin(uri);
    rocksdb_t *db = database("/db");
    CHECK(is(db, "k", "kept"));
    rocksdb_close(db);
    finish();
  }
}

/* The last close of an environment has unmounted the store: a mount for writing would exclude one for reading only. */
static void unmounted(const char *uri) {
  pumice_store *store = NULL;
  pumice_options reader = PUMICE_OPTIONS;
  reader.flags = PUMICE_STORE_READ_ONLY;
  CHECK(pumice_store_open(uri, &reader, &store, &error) == 0);
  CHECK(pumice_store_close(store, &error) == 0);
}

int main(int argc, char **argv) {
  const char *dir = argc > 1 ? argv[1] : ".";
  char uri[4200];
  ends(dir);
  snprintf(uri, sizeof uri, "blobfs://%s/engine.img?size:512M&create", dir);
  begin(uri);
  *strchr(uri, '?') = '\0';
  calls();
  families();
  tables();
  logs();
  copies();
  transactions();
  refusals();
  together(uri);
  forked();
  finish();
  unmounted(uri);
  full();
  if (problems == 0) puts("RocksDB's C API works");
  return problems != 0;
}
