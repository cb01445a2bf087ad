/* The file system by itself: opens a store by its URI, writes a file and renames it, and reads it again.
 *
 *   cc -o files files.c $(pkg-config --cflags --libs pumice_fs)
 *   ./files 'blobfs:///tmp/files.img?size:64M&create'
 */

#include <pumice.h>
#include <stdio.h>
#include <string.h>

static int fail(const char *doing, const pumice_error *error) {
  fprintf(stderr, "files: %s: %s: %s\n", doing, strerror(error->code), error->text);
  return 1;
}

static int show(void *arg, const pumice_entry *entry) {
  (void)arg;
  printf("%s%s, %llu bytes\n", entry->name, entry->is_dir ? "/" : "",
         (unsigned long long)entry->len);
  return 0;
}

/* Replaces a file in one step: after a power cut it has the old content or the new one. */
static int replace(const pumice_store *store, const char *path, const char *text,
                   pumice_error *error) {
  pumice_file *file = NULL;
  int failed = pumice_file_open(store, "/new", PUMICE_FILE_CREATE | PUMICE_FILE_TRUNCATE, &file, error);
  if (failed < 0) return failed;
  failed = pumice_file_append(file, (const uint8_t *)text, strlen(text), error);
  if (failed == 0) failed = pumice_file_sync(file, error);
  /* The store is still open, so that closing cannot fail. */
  pumice_file_close(file, NULL);
  return failed < 0 ? failed : pumice_store_rename(store, "/new", path, error);
}

static int use(const pumice_store *store, pumice_error *error) {
  if (replace(store, "/greeting", "hello from C\n", error) < 0) return fail("write", error);
  pumice_file *file = NULL;
  if (pumice_file_open(store, "/greeting", 0, &file, error) < 0) return fail("open", error);
  char text[64];
  int64_t got = pumice_file_read(file, 0, (uint8_t *)text, sizeof text, error);
  pumice_file_close(file, NULL);
  if (got < 0) return fail("read", error);
  printf("/greeting says: %.*s", (int)got, text);
  if (pumice_store_list(store, "/", show, NULL, error) < 0) return fail("list", error);
  pumice_space space;
  if (pumice_store_space(store, &space, error) < 0) return fail("space", error);
  printf("%llu of %llu MiB are free\n", (unsigned long long)(space.free >> 20),
         (unsigned long long)(space.total >> 20));
  return 0;
}

int main(int argc, char **argv) {
  const char *uri = argc > 1 ? argv[1] : "blobfs://malloc://64M";
  pumice_error error;
  const pumice_header header = PUMICE_HEADER;
  if (pumice_header_check(&header, &error) < 0) return fail("the library", &error);
  pumice_store *store = NULL;
  if (pumice_store_open(uri, NULL, &store, &error) < 0) return fail(uri, &error);
  int failed = use(store, &error);
  if (pumice_store_close(store, &error) < 0) failed = fail("close", &error);
  return failed;
}
