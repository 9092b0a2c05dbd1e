/* Storage that fails on demand, preloaded below a process.

   storage_arm(folder, nth, kind) counts, from then on, the calls of this process that change what lies below a folder.
   At the nth it does what kind says: STOP ends the process with SIGKILL before the call, TEAR after half of a write's
   bytes; an errno makes it fail. EIO fails once; ENOSPC and EDQUOT fail from then on every call that needs room.
   storage_count() is the number so far. A process that is not armed only pays for a comparison. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { STOP = -1, TEAR = -2 };

static char folder[PATH_MAX];
static size_t length;
static long nth;
static int kind;
static atomic_long count;

void storage_arm(const char *path, long number, int what) {
    snprintf(folder, sizeof folder, "%s", path);
    length = strlen(folder);
    nth = number;
    kind = what;
    atomic_store(&count, 0);
}

long storage_count(void) { return atomic_load(&count); }

static int below(const char *path) {
    return strncmp(path, folder, length) == 0 && (path[length] == '/' || path[length] == '\0');
}

static int of_descriptor(int descriptor) {
    char link[64], path[PATH_MAX];
    if (!length) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t size = readlink(link, path, sizeof path - 1);
    if (size < 0) return 0;
    path[size] = '\0';
    return below(path);
}

static int of_path(int at, const char *path) {
    char link[64], whole[2 * PATH_MAX];
    if (!length || !path) return 0;
    if (path[0] == '/') return below(path);
    if (at == AT_FDCWD)
        snprintf(link, sizeof link, "/proc/self/cwd");
    else
        snprintf(link, sizeof link, "/proc/self/fd/%d", at);
    ssize_t size = readlink(link, whole, PATH_MAX - 1);
    if (size < 0) return 0;
    snprintf(whole + size, sizeof whole - size, "/%s", path);
    return below(whole);
}

/* Count a call; return whether it is to fail, with errno set. */
static int fails(int needs_room) {
    long number = atomic_fetch_add(&count, 1) + 1;
    if (!nth) return 0;
    if (kind == STOP && number == nth) kill(getpid(), SIGKILL);
    int full = kind == ENOSPC || kind == EDQUOT;
    if ((full && needs_room && number >= nth) || (kind == EIO && number == nth)) {
        errno = kind;
        return 1;
    }
    return 0;
}

/* Bytes that a write still makes before the process ends, or 0 where it does not tear here. */
static size_t torn(size_t size) { return kind == TEAR && nth && atomic_load(&count) + 1 == nth ? size / 2 + 1 : 0; }

#define NEXT(name) \
    static __typeof__(&name) next; \
    if (!next) next = (__typeof__(next))dlsym(RTLD_NEXT, #name)

#define OF_DESCRIPTOR(result, name, descriptor, room, parameters, arguments) \
    result name parameters { \
        NEXT(name); \
        if (of_descriptor(descriptor) && fails(room)) return -1; \
        return next arguments; \
    }

#define OF_PATH(name, at, path, room, parameters, arguments) \
    int name parameters { \
        NEXT(name); \
        if (of_path(at, path) && fails(room)) return -1; \
        return next arguments; \
    }

ssize_t write(int descriptor, const void *bytes, size_t size) {
    NEXT(write);
    if (of_descriptor(descriptor)) {
        if (torn(size)) {
            next(descriptor, bytes, torn(size));
            kill(getpid(), SIGKILL);
        }
        if (fails(1)) return -1;
    }
    return next(descriptor, bytes, size);
}

size_t fwrite(const void *bytes, size_t size, size_t items, FILE *file) {
    NEXT(fwrite);
    if (of_descriptor(fileno(file)) && fails(1)) return 0;
    return next(bytes, size, items, file);
}

OF_DESCRIPTOR(ssize_t, writev, descriptor, 1, (int descriptor, const struct iovec *parts, int number),
              (descriptor, parts, number))
OF_DESCRIPTOR(ssize_t, pwrite, descriptor, 1, (int descriptor, const void *bytes, size_t size, off_t offset),
              (descriptor, bytes, size, offset))
OF_DESCRIPTOR(ssize_t, pwrite64, descriptor, 1, (int descriptor, const void *bytes, size_t size, off64_t offset),
              (descriptor, bytes, size, offset))
OF_DESCRIPTOR(int, fsync, descriptor, 0, (int descriptor), (descriptor))
OF_DESCRIPTOR(int, fdatasync, descriptor, 0, (int descriptor), (descriptor))
OF_DESCRIPTOR(int, ftruncate, descriptor, 1, (int descriptor, off_t size), (descriptor, size))
OF_DESCRIPTOR(int, ftruncate64, descriptor, 1, (int descriptor, off64_t size), (descriptor, size))
OF_PATH(rename, AT_FDCWD, to, 0, (const char *from, const char *to), (from, to))
OF_PATH(renameat, at, to, 0, (int from_at, const char *from, int at, const char *to), (from_at, from, at, to))
OF_PATH(unlink, AT_FDCWD, path, 0, (const char *path), (path))
OF_PATH(unlinkat, at, path, 0, (int at, const char *path, int flags), (at, path, flags))
OF_PATH(rmdir, AT_FDCWD, path, 0, (const char *path), (path))
OF_PATH(truncate, AT_FDCWD, path, 0, (const char *path, off_t size), (path, size))
OF_PATH(truncate64, AT_FDCWD, path, 0, (const char *path, off64_t size), (path, size))
OF_PATH(mkdir, AT_FDCWD, path, 1, (const char *path, mode_t mode), (path, mode))
OF_PATH(mkdirat, at, path, 1, (int at, const char *path, mode_t mode), (at, path, mode))

static int writes(int flags) { return (flags & O_ACCMODE) != O_RDONLY; }

#define OPEN(name, at, parameters, arguments) \
    int name parameters { \
        NEXT(name); \
        mode_t mode = 0; \
        if (flags & (O_CREAT | __O_TMPFILE)) { \
            va_list more; \
            va_start(more, flags); \
            mode = va_arg(more, mode_t); \
            va_end(more); \
        } \
        if (writes(flags) && of_path(at, path) && fails(flags & O_CREAT)) return -1; \
        return next arguments; \
    }

OPEN(open, AT_FDCWD, (const char *path, int flags, ...), (path, flags, mode))
OPEN(open64, AT_FDCWD, (const char *path, int flags, ...), (path, flags, mode))
OPEN(openat, at, (int at, const char *path, int flags, ...), (at, path, flags, mode))
OPEN(openat64, at, (int at, const char *path, int flags, ...), (at, path, flags, mode))

#define FOPEN(name) \
    FILE *name(const char *path, const char *mode) { \
        NEXT(name); \
        if (strpbrk(mode, "wa+") && of_path(AT_FDCWD, path) && fails(1)) return NULL; \
        return next(path, mode); \
    }

FOPEN(fopen)
FOPEN(fopen64)
