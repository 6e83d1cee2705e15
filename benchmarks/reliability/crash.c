/* Injects file-system faults at a chosen call.
 *
 * Loaded with LD_PRELOAD, it wraps and counts all calls that change files below one folder. It can replace call N by
 * SIGKILL, make the calls from N on fail with an error, and log every call. It does nothing before fault_arm is called.
 * A forked child can arm it without effect on its parent.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { GROWS = 1, NAMES = 2, REMOVES = 4, SYNCS = 8 }; /* kinds of calls, for fault_arm's mask */

static char folder[PATH_MAX]; /* real path; "" while disarmed */
static long kill_at;          /* 1-based; 0: never */
static long fail_from;        /* 1-based; 0: never */
static int fail_errno, fail_kinds, log_to = -1;
static atomic_long count;

void fault_arm(const char *below, long kill_at_, long fail_from_, int errno_, int kinds, int log_descriptor) {
    snprintf(folder, sizeof folder, "%s", below);
    kill_at = kill_at_, fail_from = fail_from_, fail_errno = errno_, fail_kinds = kinds, log_to = log_descriptor;
    atomic_store(&count, 0);
}

void fault_disarm(void) { folder[0] = 0; }

long fault_count(void) { return atomic_load(&count); }

/* Look the function up at each call, which is cheap compared with a system call and independent of load order. */
#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

static void say(const char *text, size_t length) {
    if (log_to >= 0 && REAL(write)(log_to, text, length) < 0) kill(getpid(), SIGABRT);
}

void fault_note(const char *text) {
    char line[256];
    int length = snprintf(line, sizeof line, "note\t%s\t\n", text);
    say(line, length);
}

static int below(const char *path) {
    size_t length = strlen(folder);
    return strncmp(path, folder, length) == 0 && (path[length] == '/' || path[length] == 0);
}

/* Returns the current path of a descriptor, after any renames of its parent folders. */
static void of_descriptor(int descriptor, char *out) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t length = readlink(link, out, PATH_MAX - 1);
    out[length < 0 ? 0 : length] = 0;
}

static void of_path(int directory, const char *path, char *out) {
    char base[PATH_MAX] = "";
    if (path[0] != '/') {
        if (directory != AT_FDCWD)
            of_descriptor(directory, base);
        else if (!getcwd(base, sizeof base))
            base[0] = 0;
        strncat(base, "/", sizeof base - strlen(base) - 1);
    }
    if (snprintf(out, PATH_MAX, "%s%s", base, path) >= PATH_MAX) out[0] = 0;
    for (size_t end = strlen(out); end > 1 && out[end - 1] == '/'; end--) out[end - 1] = 0;
}

/* Called before each wrapped call. Returns 0 to proceed, or the error for the call to return. */
static int before(int kind, const char *name, const char *path, const char *target) {
    if (!folder[0] || !(below(path) || (target && below(target)))) return 0;
    long number = 1 + atomic_fetch_add(&count, 1);
    if (kill_at && number >= kill_at)
        for (;;) kill(getpid(), SIGKILL);
    if (fail_from && number >= fail_from && (kind & fail_kinds)) return fail_errno;
    char line[2 * PATH_MAX + 64];
    int length = snprintf(line, sizeof line, "%s\t%s\t%s\n", name, path, target ? target : "");
    say(line, length);
    return 0;
}

#define STOP_IF(error, failed)   \
    do {                         \
        int error_ = (error);    \
        if (error_) {            \
            errno = error_;      \
            return (failed);     \
        }                        \
    } while (0)

static int opened(int directory, const char *path, int flags) {
    if (!folder[0] || (flags & O_PATH) || !((flags & (O_CREAT | O_TRUNC)) || (flags & O_ACCMODE) != O_RDONLY)) return 0;
    char whole[PATH_MAX];
    of_path(directory, path, whole);
    return before(GROWS, flags & O_TRUNC ? "truncate" : flags & O_CREAT ? "create" : "open", whole, NULL);
}

#define MODE                           \
    mode_t mode = 0;                   \
    if (flags & (O_CREAT | __O_TMPFILE)) { \
        va_list rest;                  \
        va_start(rest, flags);         \
        mode = va_arg(rest, mode_t);   \
        va_end(rest);                  \
    }

#define OPEN(name)                                      \
    int name(const char *path, int flags, ...) {        \
        MODE STOP_IF(opened(AT_FDCWD, path, flags), -1); \
        return REAL(name)(path, flags, mode);           \
    }
OPEN(open)
OPEN(open64)

#define OPENAT(name)                                              \
    int name(int directory, const char *path, int flags, ...) {   \
        MODE STOP_IF(opened(directory, path, flags), -1);         \
        return REAL(name)(directory, path, flags, mode);          \
    }
OPENAT(openat)
OPENAT(openat64)

#define CREAT(name)                                                          \
    int name(const char *path, mode_t mode) {                                \
        STOP_IF(opened(AT_FDCWD, path, O_CREAT | O_WRONLY | O_TRUNC), -1);   \
        return REAL(name)(path, mode);                                       \
    }
CREAT(creat)
CREAT(creat64)

#define FOPEN(name)                                                                                     \
    FILE *name(const char *path, const char *mode) {                                                    \
        int flags = mode[0] == 'w' ? O_CREAT | O_WRONLY | O_TRUNC : mode[0] == 'a' ? O_CREAT | O_WRONLY \
                  : strchr(mode, '+')      ? O_RDWR                                                     \
                                           : O_RDONLY;                                                  \
        STOP_IF(opened(AT_FDCWD, path, flags), NULL);                                                   \
        return REAL(name)(path, mode);                                                                  \
    }
FOPEN(fopen)
FOPEN(fopen64)

static int on_descriptor(int kind, const char *name, int descriptor) {
    if (!folder[0]) return 0;
    char path[PATH_MAX];
    of_descriptor(descriptor, path);
    return before(kind, name, path, NULL);
}

#define ON_DESCRIPTOR(kind, said, type, name, parameters, arguments) \
    type name parameters {                                           \
        STOP_IF(on_descriptor(kind, said, descriptor), -1);          \
        return REAL(name) arguments;                                 \
    }
ON_DESCRIPTOR(GROWS, "write", ssize_t, write, (int descriptor, const void *b, size_t n), (descriptor, b, n))
ON_DESCRIPTOR(GROWS, "write", ssize_t, pwrite, (int descriptor, const void *b, size_t n, off_t o), (descriptor, b, n, o))
ON_DESCRIPTOR(GROWS, "write", ssize_t, pwrite64, (int descriptor, const void *b, size_t n, off64_t o), (descriptor, b, n, o))
ON_DESCRIPTOR(GROWS, "write", ssize_t, writev, (int descriptor, const struct iovec *v, int n), (descriptor, v, n))
ON_DESCRIPTOR(GROWS, "write", ssize_t, pwritev, (int descriptor, const struct iovec *v, int n, off_t o), (descriptor, v, n, o))
ON_DESCRIPTOR(GROWS, "write", ssize_t, pwritev64, (int descriptor, const struct iovec *v, int n, off64_t o), (descriptor, v, n, o))
ON_DESCRIPTOR(GROWS, "write", int, ftruncate, (int descriptor, off_t n), (descriptor, n))
ON_DESCRIPTOR(GROWS, "write", int, ftruncate64, (int descriptor, off64_t n), (descriptor, n))
ON_DESCRIPTOR(SYNCS, "sync", int, fsync, (int descriptor), (descriptor))
ON_DESCRIPTOR(SYNCS, "sync", int, fdatasync, (int descriptor), (descriptor))

ssize_t sendfile(int descriptor, int from, off_t *offset, size_t n);
ON_DESCRIPTOR(GROWS, "write", ssize_t, sendfile, (int descriptor, int from, off_t *offset, size_t n), (descriptor, from, offset, n))

static int on_path(int kind, const char *name, int directory, const char *path) {
    if (!folder[0]) return 0;
    char whole[PATH_MAX];
    of_path(directory, path, whole);
    return before(kind, name, whole, NULL);
}

#define ON_PATH(kind, said, name, directory, parameters, arguments) \
    int name parameters {                                           \
        STOP_IF(on_path(kind, said, directory, path), -1);          \
        return REAL(name) arguments;                                \
    }
int mkdir(const char *, mode_t);
int mkdirat(int, const char *, mode_t);
ON_PATH(GROWS, "mkdir", mkdir, AT_FDCWD, (const char *path, mode_t mode), (path, mode))
ON_PATH(GROWS, "mkdir", mkdirat, directory, (int directory, const char *path, mode_t mode), (directory, path, mode))
ON_PATH(REMOVES, "remove", unlink, AT_FDCWD, (const char *path), (path))
ON_PATH(REMOVES, "remove", remove, AT_FDCWD, (const char *path), (path))
ON_PATH(REMOVES, "remove", rmdir, AT_FDCWD, (const char *path), (path))
ON_PATH(REMOVES, "remove", unlinkat, directory, (int directory, const char *path, int flags), (directory, path, flags))

static int on_two(const char *name, int a, const char *from, int b, const char *to) {
    if (!folder[0]) return 0;
    char old[PATH_MAX], new[PATH_MAX];
    of_path(a, from, old), of_path(b, to, new);
    return before(NAMES, name, old, new);
}

#define ON_TWO(said, name, a, b, parameters, arguments)    \
    int name parameters {                                  \
        STOP_IF(on_two(said, a, from, b, to), -1);         \
        return REAL(name) arguments;                       \
    }
ON_TWO("rename", rename, AT_FDCWD, AT_FDCWD, (const char *from, const char *to), (from, to))
ON_TWO("rename", renameat, a, b, (int a, const char *from, int b, const char *to), (a, from, b, to))
ON_TWO("rename", renameat2, a, b, (int a, const char *from, int b, const char *to, unsigned flags), (a, from, b, to, flags))
ON_TWO("link", link, AT_FDCWD, AT_FDCWD, (const char *from, const char *to), (from, to))
ON_TWO("link", linkat, a, b, (int a, const char *from, int b, const char *to, int flags), (a, from, b, to, flags))
