/* Every function of pumice.h with what it must refuse, and the values that it must return. kv/embed/tests/c.rs compiles it as
 * C and as C++ and runs it, with the path of a directory of the kernel's. */

#include "check.h"
#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>

static const char bad[] = "/\xff\xfe";

static void headers(void) {
  pumice_header header = PUMICE_HEADER;
  CHECK(pumice_header_check(&header, &error) == 0);
  CHECK(strlen(pumice_release()) > 0);
  header.options_size += 8;
  CHECK(pumice_header_check(&header, &error) == 0);
  header.info_size += 8;
  REFUSED(EINVAL, "pumice_info has", pumice_header_check(&header, &error));
  header.version = 99;
  REFUSED(EINVAL, "version 99", pumice_header_check(&header, &error));
  header.size = 4;
  REFUSED(EINVAL, "of 4 bytes", pumice_header_check(&header, &error));
  REFUSED(EINVAL, "NULL", pumice_header_check(NULL, &error));
  CHECK(pumice_header_check(NULL, NULL) == -EINVAL);
}

static void opens(const char *dir) {
  pumice_store *store = (pumice_store *)&error;
  REFUSED(EINVAL, "NULL", pumice_store_open(NULL, NULL, &store, &error));
  CHECK(store == NULL);
  REFUSED(EINVAL, "NULL", pumice_store_open("blobfs://malloc://64M", NULL, NULL, &error));
  REFUSED(EINVAL, "UTF-8", pumice_store_open("blobfs://\xff", NULL, &store, &error));
  REFUSED(EINVAL, "blobfs://", pumice_store_open("", NULL, &store, &error));
  REFUSED(EINVAL, "blobfs://", pumice_store_open("file:///x", NULL, &store, &error));
  REFUSED(ENOENT, "nowhere", pumice_store_open("blobfs:///nowhere/at/all", NULL, &store, &error));
  CHECK(pumice_store_open("blobfs:///nowhere/at/all", NULL, &store, NULL) == -ENOENT);
  pumice_options options = PUMICE_OPTIONS;
  options.flags = 1u << 31;
  REFUSED(EINVAL, "0x80000000", pumice_store_open("blobfs://malloc://64M", &options, &store, &error));
  options.flags = 0;
  options.version = 7;
  REFUSED(EINVAL, "version 7", pumice_store_open("blobfs://malloc://64M", &options, &store, &error));
  options.size = 0;
  REFUSED(EINVAL, "size", pumice_store_open("blobfs://malloc://64M", &options, &store, &error));
  options = (pumice_options)PUMICE_OPTIONS;
  options.flags = PUMICE_STORE_NO_FORMAT;
  CHECK(pumice_store_open("blobfs://malloc://64M", &options, &store, &error) < 0);
  char path[512];
  snprintf(path, sizeof path, "blobfs://%s/foreign.img", dir);
  FILE *foreign = fopen(path + strlen("blobfs://"), "w");
  for (int i = 0; i < 1 << 20; i++) fputs("something", foreign);
  fclose(foreign);
  REFUSED(EINVAL, "nothing was changed", pumice_store_open(path, NULL, &store, &error));
  CHECK(store == NULL);
}

static void without_handles(void) {
  uint8_t byte = 0;
  pumice_info info;
  pumice_space space;
  pumice_file *file = (pumice_file *)&error;
  REFUSED(EINVAL, "store is NULL", pumice_file_open(NULL, "/f", 0, &file, &error));
  CHECK(file == NULL);
  REFUSED(EINVAL, "NULL", pumice_store_sync(NULL, &error));
  REFUSED(EINVAL, "NULL", pumice_store_space(NULL, &space, &error));
  REFUSED(EINVAL, "NULL", pumice_store_info(NULL, "/", &info, &error));
  REFUSED(EINVAL, "NULL", pumice_store_list(NULL, "/", NULL, NULL, &error));
  REFUSED(EINVAL, "NULL", pumice_store_mkdir(NULL, "/d", &error));
  REFUSED(EINVAL, "NULL", pumice_store_rmdir(NULL, "/d", &error));
  REFUSED(EINVAL, "NULL", pumice_store_unlink(NULL, "/f", &error));
  REFUSED(EINVAL, "NULL", pumice_store_rename(NULL, "/f", "/g", &error));
  REFUSED(EINVAL, "NULL", pumice_store_link(NULL, "/f", "/g", &error));
  REFUSED(EINVAL, "NULL", pumice_file_read(NULL, 0, &byte, 1, &error));
  REFUSED(EINVAL, "NULL", pumice_file_write(NULL, 0, &byte, 1, &error));
  REFUSED(EINVAL, "NULL", pumice_file_append(NULL, &byte, 1, &error));
  REFUSED(EINVAL, "NULL", pumice_file_truncate(NULL, 0, &error));
  REFUSED(EINVAL, "NULL", pumice_file_sync(NULL, &error));
  REFUSED(EINVAL, "NULL", pumice_file_info(NULL, &info, &error));
  CHECK(pumice_file_close(NULL, &error) == 0);
  CHECK(pumice_store_close(NULL, NULL) == 0);
}

static int count(void *arg, const pumice_entry *entry) {
  int *left = (int *)arg;
  CHECK(strlen(entry->name) > 0);
  return --*left == 0;
}

static void paths(pumice_store *store) {
  pumice_info info;
  int left = 100;
  CHECK(pumice_store_mkdir(store, "/d", &error) == 0);
  REFUSED(EEXIST, "/d", pumice_store_mkdir(store, "/d", &error));
  REFUSED(ENOENT, "/no", pumice_store_mkdir(store, "/no/d", &error));
  REFUSED(EINVAL, "UTF-8", pumice_store_mkdir(store, bad, &error));
  REFUSED(EINVAL, "NULL", pumice_store_mkdir(store, NULL, &error));
  REFUSED(ENOENT, "/no", pumice_store_rmdir(store, "/no", &error));
  REFUSED(ENOENT, "/no", pumice_store_unlink(store, "/no", &error));
  REFUSED(EISDIR, "/d", pumice_store_unlink(store, "/d", &error));
  REFUSED(ENOENT, "/no", pumice_store_rename(store, "/no", "/to", &error));
  REFUSED(EINVAL, "second path", pumice_store_rename(store, "/no", NULL, &error));
  REFUSED(EINVAL, "second path", pumice_store_link(store, "/no", bad, &error));
  REFUSED(ENOENT, "/no", pumice_store_link(store, "/no", "/to", &error));
  REFUSED(ENOENT, "/no", pumice_store_info(store, "/no", &info, &error));
  REFUSED(EINVAL, "place", pumice_store_info(store, "/d", NULL, &error));
  REFUSED(EINVAL, "function is NULL", pumice_store_list(store, "/", NULL, NULL, &error));
  REFUSED(ENOENT, "/no", pumice_store_list(store, "/no", count, &left, &error));
  REFUSED(EINVAL, "place", pumice_store_space(store, NULL, &error));
  char longer[5000];
  memset(longer, 'x', sizeof longer);
  longer[0] = '/';
  longer[sizeof longer - 1] = '\0';
  REFUSED(ENAMETOOLONG, "xxx", pumice_store_mkdir(store, longer, &error));
  CHECK(pumice_store_info(store, "/d", &info, &error) == 0 && info.is_dir == 1);
  CHECK(pumice_store_mkdir(store, "/e", &error) == 0);
  CHECK(pumice_store_list(store, "/", count, &left, &error) == 2);
  left = 1;
  CHECK(pumice_store_list(store, "/", count, &left, &error) == 1);
  CHECK(pumice_store_rmdir(store, "/e", &error) == 0);
}

static void files(pumice_store *store) {
  pumice_file *file = NULL, *other = NULL;
  pumice_info info;
  pumice_space space;
  uint8_t buf[64];
  const uint8_t *text = (const uint8_t *)"0123456789";
  REFUSED(ENOENT, "/f", pumice_file_open(store, "/f", 0, &file, &error));
  REFUSED(EISDIR, "/d", pumice_file_open(store, "/d", 0, &file, &error));
  REFUSED(EINVAL, "flags", pumice_file_open(store, "/f", 1u << 20, &file, &error));
  REFUSED(EINVAL, "PUMICE_FILE_CREATE", pumice_file_open(store, "/f", PUMICE_FILE_EXCLUSIVE, &file, &error));
  REFUSED(EINVAL, "place", pumice_file_open(store, "/f", PUMICE_FILE_CREATE, NULL, &error));
  REFUSED(ENOENT, "/f", pumice_store_info(store, "/f", &info, &error));
  CHECK(pumice_file_open(store, "/f", PUMICE_FILE_CREATE | PUMICE_FILE_EXCLUSIVE, &file, &error) == 0);
  REFUSED(EEXIST, "/f", pumice_file_open(store, "/f", PUMICE_FILE_CREATE | PUMICE_FILE_EXCLUSIVE, &other, &error));
  REFUSED(EINVAL, "NULL", pumice_file_append(file, NULL, 1, &error));
  REFUSED(EINVAL, "length", pumice_file_append(file, text, SIZE_MAX, &error));
  REFUSED(EINVAL, "length", pumice_file_read(file, 0, buf, SIZE_MAX, &error));
  REFUSED(EINVAL, "NULL", pumice_file_read(file, 0, NULL, 1, &error));
  CHECK(pumice_file_append(file, NULL, 0, &error) == 0);
  CHECK(pumice_file_append(file, text, 10, &error) == 0);
  CHECK(pumice_file_write(file, 12, text, 2, &error) == 0);
  CHECK(pumice_file_read(file, 8, buf, sizeof buf, &error) == 6 && memcmp(buf, "89\0\0" "01", 6) == 0);
  CHECK(pumice_file_read(file, 14, buf, 1, &error) == 0);
  CHECK(pumice_file_read(file, UINT64_MAX, buf, 1, &error) == 0);
  CHECK(pumice_file_write(file, UINT64_MAX, text, 2, &error) < 0);
  CHECK(pumice_file_truncate(file, UINT64_MAX, &error) < 0);
  CHECK(pumice_file_info(file, &info, &error) == 0 && info.len == 14 && info.links == 1);
  REFUSED(EINVAL, "place", pumice_file_info(file, NULL, &error));
  CHECK(pumice_store_space(store, &space, &error) == 0 && space.files == 1 && space.free <= space.total);
  memset(&error, 0, sizeof error);
  CHECK(pumice_file_truncate(file, 1u << 30, &error) == -ENOSPC && error.flags == PUMICE_ERROR_RETRYABLE);
  CHECK(pumice_file_truncate(file, 3, &error) == 0 && pumice_file_sync(file, &error) == 0);
  CHECK(pumice_store_link(store, "/f", "/g", &error) == 0);
  CHECK(pumice_store_info(store, "/g", &info, &error) == 0 && info.len == 3 && info.links == 2);
  CHECK(pumice_store_unlink(store, "/f", &error) == 0);
  CHECK(pumice_store_rename(store, "/g", "/d/h", &error) == 0);
  REFUSED(ENOTEMPTY, "/d", pumice_store_rmdir(store, "/d", &error));
  CHECK(pumice_store_unlink(store, "/d/h", &error) == 0);
  /* The file is open, and without a name. */
  CHECK(pumice_file_read(file, 0, buf, sizeof buf, &error) == 3 && memcmp(buf, "012", 3) == 0);
  CHECK(pumice_file_close(file, &error) == 0);
  CHECK(pumice_store_sync(store, &error) == 0);
}

/* A child process must not use its parent's store, and may open one of its own. */
static void forked(pumice_store *store) {
  pid_t child = fork();
  if (child == 0) {
    pumice_space space;
    pumice_store *own = NULL;
    problems = 0;
    REFUSED(EBADF, "fork", pumice_store_mkdir(store, "/child", &error));
    CHECK(pumice_store_space(store, &space, &error) == -EBADF);
    CHECK(pumice_store_open("blobfs://malloc://64M", NULL, &own, &error) == 0);
    CHECK(pumice_store_mkdir(own, "/child", &error) == 0 && pumice_store_close(own, &error) == 0);
    _exit(problems != 0);
  }
  int status = -1;
  CHECK(waitpid(child, &status, 0) == child && status == 0);
  CHECK(pumice_store_mkdir(store, "/parent", &error) == 0);
}

/* A file keeps its store mounted; what was not synced is there after the last close. */
static void again(const char *dir) {
  char uri[512];
  uint8_t buf[4];
  pumice_store *store = NULL, *second = NULL;
  pumice_file *file = NULL;
  pumice_options options = PUMICE_OPTIONS;
  snprintf(uri, sizeof uri, "blobfs://%s/kept.img?size:64M&create", dir);
  options.cache_bytes = 8 << 20;
  CHECK(pumice_store_open(uri, &options, &store, &error) == 0);
  CHECK(pumice_store_open(uri, NULL, &second, &error) == 0);
  CHECK(pumice_store_close(second, &error) == 0);
  CHECK(pumice_file_open(store, "/f", PUMICE_FILE_CREATE, &file, &error) == 0);
  CHECK(pumice_store_close(store, &error) == 0);
  CHECK(pumice_file_append(file, (const uint8_t *)"kept", 4, &error) == 0);
  CHECK(pumice_file_close(file, &error) == 0);
  options.flags = PUMICE_STORE_READ_ONLY;
  *strchr(uri, '?') = '\0';
  CHECK(pumice_store_open(uri, &options, &store, &error) == 0);
  CHECK(pumice_file_open(store, "/f", 0, &file, &error) == 0);
  CHECK(pumice_file_read(file, 0, buf, 4, &error) == 4 && memcmp(buf, "kept", 4) == 0);
  REFUSED(EROFS, "read", pumice_file_append(file, buf, 4, &error));
  REFUSED(EROFS, "read", pumice_store_mkdir(store, "/d", &error));
  CHECK(pumice_file_close(file, &error) == 0 && pumice_store_close(store, &error) == 0);
}

int main(int argc, char **argv) {
  const char *dir = argc > 1 ? argv[1] : ".";
  pumice_store *store = NULL;
  headers();
  opens(dir);
  without_handles();
  CHECK(pumice_store_open("blobfs://malloc://64M", NULL, &store, &error) == 0);
  if (store != NULL) {
    paths(store);
    files(store);
    forked(store);
    CHECK(pumice_store_close(store, &error) == 0);
  }
  again(dir);
  if (problems == 0) puts("every refusal is as it should be");
  return problems != 0;
}
