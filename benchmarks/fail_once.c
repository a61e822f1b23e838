/* Preloaded: the nth system call that concerns files under one folder fails, once (benchmarks/reliability.py). */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

static atomic_int n_seen;
static int fails_at, number;
static char root[PATH_MAX], failed[64];

/* Begin to count; call `at` fails with `error`, none if it is 0. */
void fail_once(int at, int error, const char *folder) {
    fails_at = at, number = error, n_seen = 0;
    strncpy(root, folder, sizeof root - 1);
}
int calls_seen(void) { return n_seen; }
const char *failed_call(void) { return failed; }

static int path_fails(const char *name, const char *path) {
    if (!root[0] || strncmp(path, root, strlen(root)) || ++n_seen != fails_at) return 0;
    strncpy(failed, name, sizeof failed - 1);
    errno = number;
    return 1;
}
static int fd_fails(const char *name, int fd) {
    char link[64], path[PATH_MAX] = "";
    if (!root[0]) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    if (readlink(link, path, sizeof path - 1) < 0) return 0;
    return path_fails(name, path);
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define MODE(last) va_list more; va_start(more, last); int mode = va_arg(more, int); va_end(more)
#define ON_FD(type, name, parameters, ...) \
    type name parameters { return fd_fails(#name, fd) ? -1 : REAL(name)(__VA_ARGS__); }
#define ON_PATH(name, parameters, ...) \
    int name parameters { return path_fails(#name, path) ? -1 : REAL(name)(__VA_ARGS__); }
#define OPEN(name) int name(const char *path, int flags, ...) { MODE(flags); \
    return path_fails(#name, path) ? -1 : REAL(name)(path, flags, mode); }
#define OPENAT(name) int name(int fd, const char *path, int flags, ...) { MODE(flags); \
    return (path[0] == '/' ? path_fails(#name, path) : fd_fails(#name, fd)) ? -1 \
        : REAL(name)(fd, path, flags, mode); }

OPEN(open)
OPEN(open64)
OPENAT(openat)
OPENAT(openat64)
ON_FD(ssize_t, read, (int fd, void *to, size_t n), fd, to, n)
ON_FD(ssize_t, write, (int fd, const void *from, size_t n), fd, from, n)
ON_FD(ssize_t, pread64, (int fd, void *to, size_t n, off64_t at), fd, to, n, at)
ON_FD(ssize_t, preadv64, (int fd, const struct iovec *to, int n, off64_t at), fd, to, n, at)
ON_FD(ssize_t, pwrite64, (int fd, const void *from, size_t n, off64_t at), fd, from, n, at)
ON_FD(int, fsync, (int fd), fd)
ON_FD(int, ftruncate64, (int fd, off64_t n), fd, n)
ON_FD(int, fallocate, (int fd, int mode, off_t at, off_t n), fd, mode, at, n)
ON_PATH(mkdir, (const char *path, mode_t mode), path, mode)
ON_PATH(rename, (const char *path, const char *to), path, to)
ON_PATH(rmdir, (const char *path), path)
ON_PATH(unlink, (const char *path), path)
int renameat2(int from, const char *path, int to, const char *name, unsigned flags) {
    return path_fails("renameat2", path) ? -1 : REAL(renameat2)(from, path, to, name, flags);
}
