/* What the tests in C have in common. */

#ifndef CHECK_H
#define CHECK_H

#include <pumice.h>
#include <errno.h>
#include <stdio.h>
#include <string.h>

static int problems = 0;
static pumice_error error;

#define CHECK(condition)                                                                        \
  do {                                                                                          \
    if (!(condition)) {                                                                         \
      fprintf(stderr, "%s:%d: %s; last error: %d %s\n", __FILE__, __LINE__, #condition, error.code, \
              error.text);                                                                      \
      __atomic_fetch_add(&problems, 1, __ATOMIC_SEQ_CST);                                       \
    }                                                                                           \
  } while (0)

/* The call fails with this errno, and says so with this word. */
#define REFUSED(errno_, word, call)                                                             \
  do {                                                                                          \
    memset(&error, 0x55, sizeof error);                                                         \
    CHECK((call) == -(errno_));                                                                 \
    CHECK(error.code == (errno_) && memchr(error.text, 0, sizeof error.text) != NULL);          \
    CHECK(strstr(error.text, word) != NULL);                                                    \
  } while (0)

#endif
