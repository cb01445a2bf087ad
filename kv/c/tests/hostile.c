/* What pumice.h says of threads, forks, ends of a process, shared stores and unusual arguments.
 * kv/embed/tests/c.rs runs it, with the path of a directory of the kernel's; scripts/plugin-test under valgrind, too. */

#include "check.h"
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>

enum { THREADS = 4, ROUNDS = 200 };

static char uri[4200];

/* Names an image in the directory; every test has one of its own. */
static const char *image(const char *dir, const char *name, const char *query) {
  snprintf(uri, sizeof uri, "blobfs://%s/%s.img%s", dir, name, query);
  return uri;
}

static pumice_store *opened(const char *where) {
  pumice_store *store = NULL;
  CHECK(pumice_store_open(where, NULL, &store, &error) == 0);
  if (store == NULL) exit(1);
  return store;
}

static pumice_file *file_of(const pumice_store *store, const char *path) {
  pumice_file *file = NULL;
  CHECK(pumice_file_open(store, path, PUMICE_FILE_CREATE, &file, &error) == 0);
  if (file == NULL) exit(1);
  return file;
}

static int append(const pumice_file *file, const char *text) {
  return pumice_file_append(file, (const uint8_t *)text, strlen(text), &error);
}

static int has(const pumice_store *store, const char *path, const char *text) {
  char found[64] = "";
  pumice_file *file = NULL;
  if (pumice_file_open(store, path, 0, &file, &error) < 0) return 0;
  int64_t got = pumice_file_read(file, 0, (uint8_t *)found, sizeof found, &error);
  CHECK(pumice_file_close(file, &error) == 0);
  return got == (int64_t)strlen(text) && memcmp(found, text, strlen(text)) == 0;
}

/* How a process can end that has a store and files open. */
static void end(int how, const char *where) {
  pumice_store *store = opened(where);
  pumice_file *file = file_of(store, "/f");
  CHECK(append(file, "kept") == 0);
  if (problems != 0) _exit(1);
  if (how == 0) exit(0);
  if (how == 1) _exit(0);
  if (how == 2) {
    CHECK(pumice_store_close(store, &error) == 0);
    exit(problems != 0);
  }
  kill(getpid(), SIGKILL);
}

static void ends(const char *dir) {
  for (int how = 0; how < 4; how++) {
    char name[16];
    snprintf(name, sizeof name, "end%d", how);
    const char *where = image(dir, name, "?size:64M&create");
    pid_t child = fork();
    if (child == 0) end(how, where);
    int status = -1;
    CHECK(waitpid(child, &status, 0) == child);
    CHECK(how == 3 ? WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL : status == 0);
    pumice_store *store = opened(where);
    CHECK(has(store, "/f", "kept"));
    CHECK(pumice_store_close(store, &error) == 0);
  }
}

static int end_inside(void *arg, const pumice_entry *entry) {
  (void)arg;
  (void)entry;
  exit(7);
}

/* The process ends while the library calls it. */
static void end_in_a_listing(const char *dir) {
  const char *where = image(dir, "inside", "?size:64M&create");
  pid_t child = fork();
  if (child == 0) {
    pumice_store *store = opened(where);
    CHECK(pumice_store_mkdir(store, "/d", &error) == 0);
    pumice_store_list(store, "/", end_inside, NULL, &error);
    _exit(1);
  }
  int status = -1;
  CHECK(waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 7);
  pumice_store *store = opened(where);
  CHECK(pumice_store_close(store, &error) == 0);
}

/* Sizes that no machine has, and the smallest. */
static void options(const char *dir) {
  const char *where = image(dir, "options", "?size:64M&create");
  for (int i = 0; i < 3; i++) {
    const uint64_t sizes[] = {1, UINT64_MAX, UINT64_MAX / 2};
    pumice_options given = PUMICE_OPTIONS;
    given.cache_bytes = sizes[i];
    pumice_store *store = NULL;
    CHECK(pumice_store_open(where, &given, &store, &error) == 0);
    if (store == NULL) continue;
    pumice_file *file = file_of(store, "/f");
    CHECK(pumice_file_truncate(file, 0, &error) == 0 && append(file, "kept") == 0 && has(store, "/f", "kept"));
    CHECK(pumice_file_close(file, &error) == 0 && pumice_store_close(store, &error) == 0);
  }
  /* A longer struct of a later header. */
  struct {
    pumice_options known;
    uint64_t later[4];
  } longer = {PUMICE_OPTIONS, {1, 2, 3, 4}};
  longer.known.size = (uint32_t)sizeof longer;
  pumice_store *store = NULL;
  CHECK(pumice_store_open(where, &longer.known, &store, &error) == 0);
  CHECK(pumice_store_close(store, &error) == 0);
  char *endless = (char *)malloc(1 << 20);
  memset(endless, 'x', 1 << 20);
  memcpy(endless, "blobfs://", 9);
  endless[(1 << 20) - 1] = '\0';
  CHECK(pumice_store_open(endless, NULL, &store, &error) < 0 && store == NULL);
  free(endless);
  CHECK(pumice_store_open(image(dir, "options", "?cache:99999999999999T"), NULL, &store, &error) == -EINVAL);
  CHECK(pumice_store_open(image(dir, "options", "?no-such-parameter:1"), NULL, &store, &error) == -EINVAL);
}

static int none(void *arg, const pumice_entry *entry) {
  (void)arg;
  (void)entry;
  return 0;
}

/* Every function with a text that is NULL or not UTF-8, and with paths that nothing can have. */
static void paths(const pumice_store *store) {
  static const char *const bad[] = {NULL, "/\xff", "\xc3", "/\xed\xa0\x80", "/a\nb"};
  pumice_info info;
  pumice_file *file = (pumice_file *)&error;
  for (int i = 0; i < 5; i++) {
    const char *path = bad[i];
    CHECK(pumice_store_info(store, path, &info, &error) == -EINVAL);
    CHECK(pumice_store_list(store, path, none, NULL, &error) == -EINVAL);
    CHECK(pumice_store_mkdir(store, path, &error) == -EINVAL);
    CHECK(pumice_store_rmdir(store, path, &error) == -EINVAL);
    CHECK(pumice_store_unlink(store, path, &error) == -EINVAL);
    CHECK(pumice_store_rename(store, path, "/x", &error) == -EINVAL);
    CHECK(pumice_store_rename(store, "/x", path, &error) == -EINVAL);
    CHECK(pumice_store_link(store, path, "/x", &error) == -EINVAL);
    CHECK(pumice_store_link(store, "/x", path, &error) == -EINVAL);
    file = (pumice_file *)&error;
    CHECK(pumice_file_open(store, path, PUMICE_FILE_CREATE, &file, &error) == -EINVAL && file == NULL);
  }
  static const char *const top[] = {"/", "", "//", "/.", "/..", "/d/..", "d/../.."};
  CHECK(pumice_store_mkdir(store, "/d", &error) == 0 && pumice_store_mkdir(store, "/d/e", &error) == 0);
  for (int i = 0; i < 7; i++) {
    CHECK(pumice_store_info(store, top[i], &info, &error) == 0 && info.is_dir == 1);
    CHECK(pumice_store_list(store, top[i], none, NULL, &error) == 1);
    CHECK(pumice_store_mkdir(store, top[i], &error) == -EEXIST);
    CHECK(pumice_store_rmdir(store, top[i], &error) < 0);
    CHECK(pumice_store_unlink(store, top[i], &error) < 0);
    CHECK(pumice_store_rename(store, top[i], "/x", &error) < 0);
    CHECK(pumice_store_rename(store, "/d", top[i], &error) < 0);
    CHECK(pumice_store_link(store, top[i], "/x", &error) < 0);
    CHECK(pumice_file_open(store, top[i], PUMICE_FILE_CREATE | PUMICE_FILE_TRUNCATE, &file, &error) == -EISDIR);
  }
  CHECK(pumice_store_rename(store, "/d", "/d/e/f", &error) == -EINVAL);
  CHECK(pumice_store_rename(store, "/d/e", "/d", &error) < 0);
  CHECK(pumice_store_rename(store, "/d", "/d", &error) == 0);
  CHECK(pumice_store_link(store, "/d", "/x", &error) < 0);
  CHECK(pumice_store_rmdir(store, "/d/e", &error) == 0 && pumice_store_rmdir(store, "/d", &error) == 0);
  CHECK(pumice_store_list(store, "/", none, NULL, &error) == 0);
}

/* Lengths and offsets at the limits of their types, and a file that bypasses the cache. */
static void lengths(const pumice_store *store) {
  const uint8_t *text = (const uint8_t *)"0123456789";
  uint8_t buf[16];
  pumice_info info;
  pumice_file *file = NULL;
  for (uint32_t direct = 0; direct <= PUMICE_FILE_DIRECT; direct += PUMICE_FILE_DIRECT) {
    CHECK(pumice_file_open(store, "/l", PUMICE_FILE_CREATE | PUMICE_FILE_TRUNCATE | direct, &file, &error) == 0);
    CHECK(pumice_file_write(file, 1, text, 9, &error) == 0 && pumice_file_append(file, text, 3, &error) == 0);
    CHECK(pumice_file_read(file, 1, buf + 1, 13, &error) == 12 && memcmp(buf + 1, "012345678012", 12) == 0);
    const uint64_t far[] = {UINT64_MAX, UINT64_MAX - 1, INT64_MAX, (uint64_t)INT64_MAX + 1, UINT64_C(1) << 50};
    for (int i = 0; i < 5; i++) {
      CHECK(pumice_file_read(file, far[i], buf, sizeof buf, &error) == 0);
      CHECK(pumice_file_read(file, far[i], NULL, 0, &error) == 0);
      CHECK(pumice_file_write(file, far[i], text, 10, &error) < 0);
      CHECK(pumice_file_truncate(file, far[i], &error) < 0);
      CHECK(pumice_file_info(file, &info, &error) == 0 && info.len == 13);
      pumice_file_write(file, far[i], NULL, 0, &error);
      CHECK(pumice_file_info(file, &info, &error) == 0 && info.len == 13);
    }
    CHECK(pumice_file_write(file, 0, text, SIZE_MAX, &error) == -EINVAL);
    CHECK(pumice_file_write(file, 0, NULL, 1, &error) == -EINVAL);
    CHECK(pumice_file_append(file, text, (size_t)INT64_MAX + 1, &error) == -EINVAL);
    CHECK(pumice_file_truncate(file, 5000, &error) == 0 && pumice_file_sync(file, &error) == 0);
    CHECK(pumice_file_read(file, 4999, buf, sizeof buf, &error) == 1 && buf[0] == 0);
    CHECK(pumice_file_close(file, &error) == 0);
  }
  /* A success leaves the error as it is. */
  memset(&error, 0x33, sizeof error);
  CHECK(pumice_store_info(store, "/l", &info, &error) == 0 && error.code == 0x33333333 && error.text[0] == 0x33);
  CHECK(pumice_store_unlink(store, "/l", &error) == 0);
}

typedef struct {
  const pumice_store *store;
  const pumice_file *log;
  int id;
} worker;

static int stop = 0;

static void *work(void *arg) {
  worker *me = (worker *)arg;
  char path[32], moved[32];
  snprintf(path, sizeof path, "/w/%d", me->id);
  snprintf(moved, sizeof moved, "/w/moved%d", me->id);
  pumice_error mine;
  pumice_space space;
  for (int i = 0; i < ROUNDS || __atomic_load_n(&stop, __ATOMIC_SEQ_CST) == 2; i++) {
    uint8_t line[8];
    memset(line, 'a' + me->id, sizeof line);
    pumice_file *file = NULL;
    CHECK(pumice_file_append(me->log, line, sizeof line, &mine) == 0);
    CHECK(pumice_file_open(me->store, path, PUMICE_FILE_CREATE | PUMICE_FILE_TRUNCATE, &file, &mine) == 0);
    CHECK(pumice_file_append(file, line, sizeof line, &mine) == 0);
    CHECK(pumice_store_rename(me->store, path, moved, &mine) == 0);
    CHECK(pumice_store_list(me->store, "/w", none, NULL, &mine) >= 1);
    CHECK(pumice_store_space(me->store, &space, &mine) == 0);
    if (i % 20 == 0) CHECK(pumice_file_sync(file, &mine) == 0 && pumice_store_sync(me->store, &mine) == 0);
    CHECK(pumice_file_close(file, &mine) == 0);
    if (__atomic_load_n(&stop, __ATOMIC_SEQ_CST) == 1) break;
  }
  return NULL;
}

static void start(pthread_t *threads, worker *workers, const pumice_store *store, const pumice_file *log) {
  for (int id = 0; id < THREADS; id++) {
    workers[id].store = store;
    workers[id].log = log;
    workers[id].id = id;
    CHECK(pthread_create(&threads[id], NULL, work, &workers[id]) == 0);
  }
}

/* One store and one file of several threads: no append is lost or torn. */
static void threads(const char *dir) {
  pumice_store *store = opened(image(dir, "threads", "?size:128M&create"));
  CHECK(pumice_store_mkdir(store, "/w", &error) == 0);
  pumice_file *log = file_of(store, "/log");
  pthread_t running[THREADS];
  worker workers[THREADS];
  start(running, workers, store, log);
  for (int id = 0; id < THREADS; id++) pthread_join(running[id], NULL);
  int counts[THREADS] = {0};
  uint8_t line[8];
  for (uint64_t at = 0; pumice_file_read(log, at, line, sizeof line, &error) == 8; at += 8) {
    for (int i = 1; i < 8; i++) CHECK(line[i] == line[0]);
    counts[(line[0] - 'a') % THREADS]++;
  }
  for (int id = 0; id < THREADS; id++) CHECK(counts[id] == ROUNDS);
  /* The store of another thread is closed by this one. */
  CHECK(pumice_file_close(log, &error) == 0 && pumice_store_close(store, &error) == 0);
}

/* Every call on an inherited handle fails, and closing one frees it and leaves the parent's store alone. */
static void inherited(pumice_store *store, pumice_file *file, const char *where) {
  pumice_info info;
  pumice_space space;
  pumice_file *other = NULL;
  pumice_store *own = NULL;
  uint8_t byte = 0;
  problems = 0;
  CHECK(pumice_store_sync(store, &error) == -EBADF);
  CHECK(pumice_store_space(store, &space, &error) == -EBADF);
  CHECK(pumice_store_info(store, "/w", &info, &error) == -EBADF);
  CHECK(pumice_store_list(store, "/w", none, NULL, &error) == -EBADF);
  CHECK(pumice_store_mkdir(store, "/x", &error) == -EBADF);
  CHECK(pumice_store_rmdir(store, "/w", &error) == -EBADF);
  CHECK(pumice_store_unlink(store, "/log", &error) == -EBADF);
  CHECK(pumice_store_rename(store, "/log", "/x", &error) == -EBADF);
  CHECK(pumice_store_link(store, "/log", "/x", &error) == -EBADF);
  CHECK(pumice_file_open(store, "/log", 0, &other, &error) == -EBADF);
  CHECK(pumice_file_read(file, 0, &byte, 1, &error) == -EBADF);
  CHECK(pumice_file_write(file, 0, &byte, 1, &error) == -EBADF);
  CHECK(pumice_file_append(file, &byte, 1, &error) == -EBADF);
  CHECK(pumice_file_truncate(file, 0, &error) == -EBADF);
  CHECK(pumice_file_sync(file, &error) == -EBADF);
  CHECK(pumice_file_info(file, &info, &error) == -EBADF);
  /* The parent has the image. */
  CHECK(pumice_store_open(where, NULL, &own, &error) == -EBUSY && own == NULL);
  CHECK(pumice_store_open("blobfs://malloc://64M", NULL, &own, &error) == 0);
  CHECK(pumice_store_mkdir(own, "/x", &error) == 0 && pumice_store_close(own, &error) == 0);
  CHECK(pumice_file_close(file, &error) == 0 && pumice_store_close(store, &error) == 0);
}

/* A process forks while its other threads use the store. */
static void forks(const char *dir) {
  const char *where = image(dir, "forks", "?size:256M&create");
  pumice_store *store = opened(where);
  CHECK(pumice_store_mkdir(store, "/w", &error) == 0);
  pumice_file *log = file_of(store, "/log");
  pthread_t running[THREADS];
  worker workers[THREADS];
  __atomic_store_n(&stop, 2, __ATOMIC_SEQ_CST);
  start(running, workers, store, log);
  for (int i = 0; i < 20; i++) {
    pid_t child = fork();
    if (child == 0) {
      alarm(300);
      inherited(store, log, where);
      exit(problems != 0);
    }
    int status = -1;
    CHECK(waitpid(child, &status, 0) == child && status == 0);
  }
  __atomic_store_n(&stop, 1, __ATOMIC_SEQ_CST);
  for (int id = 0; id < THREADS; id++) pthread_join(running[id], NULL);
  CHECK(pumice_file_close(log, &error) == 0 && pumice_store_close(store, &error) == 0);
}

/* One device that is opened several times. */
static void shared(const char *dir) {
  pumice_store *whole = opened(image(dir, "shared", "?size:64M&create"));
  CHECK(pumice_store_mkdir(whole, "/a", &error) == 0);
  pumice_store *part = opened(image(dir, "shared", "?root:/a"));
  pumice_file *file = file_of(part, "/f");
  CHECK(append(file, "kept") == 0 && has(whole, "/a/f", "kept") && has(part, "f", "kept"));
  /* The root is a name for a directory, not a limit. */
  CHECK(has(part, "/../a/f", "kept"));
  pumice_options options = PUMICE_OPTIONS;
  options.flags = PUMICE_STORE_READ_ONLY;
  pumice_store *reader = (pumice_store *)&error;
  REFUSED(EBUSY, "shared.img", pumice_store_open(image(dir, "shared", ""), &options, &reader, &error));
  CHECK(reader == NULL);
  CHECK(pumice_store_close(whole, &error) == 0 && pumice_store_close(part, &error) == 0);
  /* The file still has the store. */
  CHECK(append(file, "!") == 0 && pumice_file_sync(file, &error) == 0);
  part = opened(image(dir, "shared", "?root:/a"));
  CHECK(has(part, "/f", "kept!") && pumice_store_unlink(part, "/f", &error) == 0);
  CHECK(pumice_store_close(part, &error) == 0 && pumice_file_close(file, &error) == 0);
  /* Everybody has let go of it, and readers may be many. */
  for (int i = 0; i < 3; i++) {
    pid_t child = fork();
    if (child == 0) {
      pumice_store *one = NULL, *two = NULL;
      CHECK(pumice_store_open(image(dir, "shared", ""), &options, &one, &error) == 0);
      CHECK(pumice_store_open(image(dir, "shared", "?root:/a"), &options, &two, &error) == 0);
      CHECK(pumice_store_list(two, "/", none, NULL, &error) == 0);
      CHECK(pumice_store_close(one, &error) == 0 && pumice_store_close(two, &error) == 0);
      exit(problems != 0);
    }
  }
  for (int i = 0, status = -1; i < 3; i++) CHECK(wait(&status) > 0 && status == 0);
}

int main(int argc, char **argv) {
  const char *dir = argc > 1 ? argv[1] : ".";
  ends(dir);
  end_in_a_listing(dir);
  options(dir);
  pumice_store *store = opened("blobfs://malloc://64M");
  paths(store);
  lengths(store);
  CHECK(pumice_store_close(store, &error) == 0);
  shared(dir);
  threads(dir);
  forks(dir);
  if (problems == 0) puts("every claim holds");
  return problems != 0;
}
