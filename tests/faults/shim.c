/* Counts the I/O operations of a process on one folder and lets the N-th one fail, kill or signal.
 *
 * Preloaded into a real run; nothing happens before fault_arm(). Operations are those that can
 * change a disk (and opening for reading), on paths below the armed folder and on files opened there.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum { NOTHING, FAIL, FAIL_ON, KILL, TEAR, TERMINATE, CLOCK };
#define FILES 65536

static char folder[4096];
static size_t folder_length;
static int action, error_number;
static long number, seen, clock_offset;
static unsigned char tracked[FILES];
static volatile long *shared_seen;

/* The count is shared with the process that forked this one, which reads it after a kill. */
long *fault_counter(void) {
    if (!shared_seen)
        shared_seen = mmap(0, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    return (long *)shared_seen;
}

void fault_arm(const char *below, int what, long at, int error) {
    strncpy(folder, below, sizeof folder - 1);
    folder_length = strlen(folder);
    action = what;
    number = at;
    error_number = error;
    seen = 0;
}

/* The folder itself or what lies in it, not a neighbour whose name begins alike. */
static int inside(const char *path) {
    char end = strncmp(path, folder, folder_length) ? 'x' : path[folder_length];
    return end == 0 || end == '/';
}

static int below(const char *path) {
    char whole[8192];
    if (!folder_length || !path) return 0;
    if (path[0] != '/') {
        if (!getcwd(whole, 4000)) return 0;
        strcat(whole, "/");
        strncat(whole, path, 4000);
        path = whole;
    }
    return inside(path);
}

static int below_at(int descriptor, const char *path) {
    char link[64], whole[8192];
    ssize_t length;
    if (!folder_length || !path) return 0;
    if (path[0] == '/' || descriptor == AT_FDCWD) return below(path);
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    length = readlink(link, whole, 4000);
    if (length < 0) return 0;
    whole[length] = 0;
    return inside(whole);
}

/* Whether the operation fails; `grows` is set for what a full disk refuses. */
static int hit(int grows) {
    seen++;
    if (shared_seen) *shared_seen = seen;
    if (seen < number || !action) return 0;
    if (action == FAIL_ON) {
        if (!grows) return 0;
        errno = error_number;
        return 1;
    }
    if (seen != number) return 0;
    if (action == FAIL) {
        errno = error_number;
        return 1;
    }
    if (action == KILL) raise(SIGKILL);
    if (action == TERMINATE) kill(getpid(), SIGTERM);
    if (action == CLOCK) clock_offset = -86400;
    return 0;
}

static void track(int descriptor, int yes) {
    if (descriptor >= 0 && descriptor < FILES) tracked[descriptor] = yes;
}

#define REAL(name) __typeof__(name) *real = (__typeof__(name) *)dlsym(RTLD_NEXT, #name)
#define OPENS(flags) ((flags) & (O_CREAT | O_TRUNC | O_WRONLY | O_RDWR))

#define OPEN(name)                                                        \
    int name(const char *path, int flags, ...) {                          \
        REAL(name);                                                       \
        va_list more;                                                     \
        va_start(more, flags);                                            \
        mode_t mode = va_arg(more, mode_t);                               \
        va_end(more);                                                     \
        int mine = below(path) && !(flags & O_DIRECTORY);                 \
        if (mine && hit(OPENS(flags) != 0)) return -1;                    \
        int made = real(path, flags, mode);                               \
        track(made, mine);                                                \
        return made;                                                      \
    }
OPEN(open)
OPEN(open64)

#define OPENAT(name)                                                      \
    int name(int at, const char *path, int flags, ...) {                  \
        REAL(name);                                                       \
        va_list more;                                                     \
        va_start(more, flags);                                            \
        mode_t mode = va_arg(more, mode_t);                               \
        va_end(more);                                                     \
        int mine = below_at(at, path) && !(flags & O_DIRECTORY);          \
        if (mine && hit(OPENS(flags) != 0)) return -1;                    \
        int made = real(at, path, flags, mode);                           \
        track(made, mine);                                                \
        return made;                                                      \
    }
OPENAT(openat)
OPENAT(openat64)

#define FOPEN(name)                                                       \
    FILE *name(const char *path, const char *mode) {                      \
        REAL(name);                                                       \
        int mine = below(path);                                           \
        if (mine && hit(mode[0] != 'r')) return 0;                        \
        FILE *made = real(path, mode);                                    \
        if (made) track(fileno(made), mine);                              \
        return made;                                                      \
    }
FOPEN(fopen)
FOPEN(fopen64)

int close(int descriptor) {
    REAL(close);
    track(descriptor, 0);
    return real(descriptor);
}

#define MINE(descriptor) ((descriptor) >= 0 && (descriptor) < FILES && tracked[descriptor])

ssize_t write(int descriptor, const void *data, size_t size) {
    REAL(write);
    if (MINE(descriptor)) {
        if (action == TEAR && seen + 1 == number) {
            real(descriptor, data, size / 2);
            raise(SIGKILL);
        }
        if (hit(1)) return -1;
    }
    return real(descriptor, data, size);
}

ssize_t writev(int descriptor, const struct iovec *parts, int count) {
    REAL(writev);
    if (MINE(descriptor) && hit(1)) return -1;
    return real(descriptor, parts, count);
}

ssize_t pwrite64(int descriptor, const void *data, size_t size, off_t offset) {
    REAL(pwrite64);
    if (MINE(descriptor) && hit(1)) return -1;
    return real(descriptor, data, size, offset);
}

int ftruncate(int descriptor, off_t size) {
    REAL(ftruncate);
    if (MINE(descriptor) && hit(1)) return -1;
    return real(descriptor, size);
}

int ftruncate64(int descriptor, off_t size) {
    REAL(ftruncate64);
    if (MINE(descriptor) && hit(1)) return -1;
    return real(descriptor, size);
}

int fsync(int descriptor) {
    REAL(fsync);
    if (MINE(descriptor) && hit(1)) return -1;
    return real(descriptor);
}

int fdatasync(int descriptor) {
    REAL(fdatasync);
    if (MINE(descriptor) && hit(1)) return -1;
    return real(descriptor);
}

int rename(const char *from, const char *to) {
    REAL(rename);
    if (below(to) && hit(1)) return -1;
    return real(from, to);
}

int renameat(int from_at, const char *from, int to_at, const char *to) {
    REAL(renameat);
    if (below_at(to_at, to) && hit(1)) return -1;
    return real(from_at, from, to_at, to);
}

int mkdir(const char *path, mode_t mode) {
    REAL(mkdir);
    if (below(path) && hit(1)) return -1;
    return real(path, mode);
}

int mkdirat(int at, const char *path, mode_t mode) {
    REAL(mkdirat);
    if (below_at(at, path) && hit(1)) return -1;
    return real(at, path, mode);
}

int unlink(const char *path) {
    REAL(unlink);
    if (below(path) && hit(0)) return -1;
    return real(path);
}

int unlinkat(int at, const char *path, int flags) {
    REAL(unlinkat);
    if (below_at(at, path) && hit(0)) return -1;
    return real(at, path, flags);
}

int rmdir(const char *path) {
    REAL(rmdir);
    if (below(path) && hit(0)) return -1;
    return real(path);
}

int clock_gettime(clockid_t which, struct timespec *now) {
    REAL(clock_gettime);
    int code = real(which, now);
    if (!code && which == CLOCK_REALTIME) now->tv_sec += clock_offset;
    return code;
}

time_t time(time_t *out) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (out) *out = now.tv_sec;
    return now.tv_sec;
}
