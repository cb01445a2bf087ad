/* RocksDB through its own C API, with all of its files on Pumice: a database with two column families, a checkpoint of it, and
 * both read again.
 *
 *   cc -o database database.c $(pkg-config --cflags --libs pumice_rocksdb)
 *   ./database 'blobfs:///tmp/database.img?size:256M&create'
 */

#include <pumice.h>
#include <rocksdb/c.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Ends the program if RocksDB has failed. */
static void must(const char *doing, char *failure) {
  if (failure == NULL) return;
  fprintf(stderr, "database: %s: %s\n", doing, failure);
  rocksdb_free(failure);
  exit(1);
}

static void put(rocksdb_t *db, rocksdb_column_family_handle_t *family, const char *key,
                const char *value) {
  char *failure = NULL;
  rocksdb_writeoptions_t *durably = rocksdb_writeoptions_create();
  rocksdb_writeoptions_set_sync(durably, 1);
  rocksdb_put_cf(db, durably, family, key, strlen(key), value, strlen(value), &failure);
  rocksdb_writeoptions_destroy(durably);
  must("put", failure);
}

static void show(rocksdb_t *db, rocksdb_column_family_handle_t *family, const char *key) {
  char *failure = NULL;
  size_t len = 0;
  rocksdb_readoptions_t *options = rocksdb_readoptions_create();
  char *value = rocksdb_get_cf(db, options, family, key, strlen(key), &len, &failure);
  rocksdb_readoptions_destroy(options);
  must("get", failure);
  if (value == NULL) must(key, strdup("it is not there"));
  printf("%s is %.*s\n", key, (int)len, value);
  rocksdb_free(value);
}

/* Opens a database with its column families, lets `use` have it, and closes it. */
static void with(rocksdb_options_t *options, const char *path,
                 void (*use)(rocksdb_t *, rocksdb_column_family_handle_t **)) {
  const char *const names[] = {"default", "metadata"};
  const rocksdb_options_t *const each[] = {options, options};
  rocksdb_column_family_handle_t *families[2] = {NULL, NULL};
  char *failure = NULL;
  rocksdb_t *db =
      rocksdb_open_column_families(options, path, 2, names, each, families, &failure);
  must(path, failure);
  use(db, families);
  for (int i = 0; i < 2; i++) rocksdb_column_family_handle_destroy(families[i]);
  rocksdb_close(db);
}

static void fill(rocksdb_t *db, rocksdb_column_family_handle_t **families) {
  put(db, families[0], "apple", "red");
  put(db, families[1], "fruits", "1");
  char *failure = NULL;
  rocksdb_checkpoint_t *checkpoint = rocksdb_checkpoint_object_create(db, &failure);
  must("checkpoint", failure);
  rocksdb_checkpoint_create(checkpoint, "/copy", 0, &failure);
  must("checkpoint", failure);
  rocksdb_checkpoint_object_destroy(checkpoint);
  put(db, families[0], "apple", "eaten");
}

static void look(rocksdb_t *db, rocksdb_column_family_handle_t **families) {
  show(db, families[0], "apple");
  show(db, families[1], "fruits");
}

int main(int argc, char **argv) {
  const char *uri = argc > 1 ? argv[1] : "blobfs://malloc://256M";
  pumice_error error;
  rocksdb_env_t *env = pumice_env_open(uri, NULL, &error);
  if (env == NULL) {
    fprintf(stderr, "database: %s: %s\n", strerror(error.code), error.text);
    return 1;
  }
  rocksdb_options_t *options = rocksdb_options_create();
  rocksdb_options_set_env(options, env);
  rocksdb_options_set_create_if_missing(options, 1);
  rocksdb_options_set_create_missing_column_families(options, 1);
  with(options, "/db", fill);
  with(options, "/db", look);
  printf("in the checkpoint:\n");
  with(options, "/copy", look);
  rocksdb_options_destroy(options);
  /* Last: RocksDB's objects above use it. */
  pumice_env_close(env);
  return 0;
}
