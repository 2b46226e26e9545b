/*
 * A disk and a clock that fail when a test says so. shim.py compiles this; LD_PRELOAD puts it between a process
 * and its C library. Both sides map the file that SHIM names: a running process can be disturbed at any moment.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <sys/types.h>
#include <time.h>
#include <unistd.h>

static struct control {   /* as FORMAT in shim.py */
    int64_t shift;        /* seconds that are added to the wall clock */
    int32_t calls;        /* kinds of calls that fail: the bits below */
    int32_t error;        /* errno of a call that fails; 0: a read or write does half of its work */
    int32_t pid;          /* only of this process; 0: of all */
    int32_t skip;         /* so many calls pass first */
    int32_t left;         /* so many fail after that */
    int32_t hits;         /* so many have failed */
    char path[216];       /* a part of the file's path */
} *control;

enum { OPEN = 1, READ = 2, WRITE = 4, FSYNC = 8, RENAME = 16 };

__attribute__((constructor)) static void start(void)
{
    const char *name = getenv("SHIM");
    int fd = name ? open(name, O_RDWR | O_CLOEXEC) : -1;
    void *found = fd < 0 ? MAP_FAILED : mmap(0, sizeof *control, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    control = found == MAP_FAILED ? 0 : found;
    if (fd >= 0)
        close(fd);
}

/* Whether this call is to fail. errno is set then. */
static int fails(int call, const char *path)
{
    struct control *c = control;
    if (!c || !(c->calls & call) || !path || !strstr(path, c->path) || (c->pid && c->pid != getpid()))
        return 0;
    if (__atomic_fetch_sub(&c->skip, 1, __ATOMIC_SEQ_CST) > 0)
        return 0;
    if (__atomic_fetch_sub(&c->left, 1, __ATOMIC_SEQ_CST) <= 0)
        return 0;
    __atomic_fetch_add(&c->hits, 1, __ATOMIC_SEQ_CST);
    errno = c->error;
    return 1;
}

static int fails_at(int call, int fd)
{
    char link[32], path[4096];
    int before = errno;
    if (!control || !(control->calls & call))
        return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, sizeof path - 1);
    errno = before;
    if (n < 0 || path[0] != '/')
        return 0;
    path[n] = 0;
    return fails(call, path);
}

#define REAL(name) static __typeof__(name) *real; if (!real) real = (__typeof__(name) *)dlsym(RTLD_NEXT, #name)

#define OPENS(name) int name(const char *path, int flags, ...) { \
    REAL(name); \
    va_list more; va_start(more, flags); mode_t mode = va_arg(more, mode_t); va_end(more); \
    return fails(OPEN, path) && control->error ? -1 : real(path, flags, mode); }
OPENS(open)
OPENS(open64)

#define OPENS_AT(name) int name(int folder, const char *path, int flags, ...) { \
    REAL(name); \
    va_list more; va_start(more, flags); mode_t mode = va_arg(more, mode_t); va_end(more); \
    return fails(OPEN, path) && control->error ? -1 : real(folder, path, flags, mode); }
OPENS_AT(openat)
OPENS_AT(openat64)

/* A transfer of n bytes: it fails, or moves half of them, or passes. */
#define MOVES(call, fd, n, real_call) do { \
    if (fails_at(call, fd)) { \
        if (control->error) return -1; \
        n = (n + 1) / 2; \
    } \
    return real_call; } while (0)

ssize_t read(int fd, void *to, size_t n) { REAL(read); MOVES(READ, fd, n, real(fd, to, n)); }
ssize_t pread(int fd, void *to, size_t n, off_t at) { REAL(pread); MOVES(READ, fd, n, real(fd, to, n, at)); }
ssize_t pread64(int fd, void *to, size_t n, off64_t at) { REAL(pread64); MOVES(READ, fd, n, real(fd, to, n, at)); }
ssize_t write(int fd, const void *from, size_t n) { REAL(write); MOVES(WRITE, fd, n, real(fd, from, n)); }
int fsync(int fd) { REAL(fsync); return fails_at(FSYNC, fd) ? -1 : real(fd); }
int fdatasync(int fd) { REAL(fdatasync); return fails_at(FSYNC, fd) ? -1 : real(fd); }
int rename(const char *from, const char *to) { REAL(rename); return fails(RENAME, to) ? -1 : real(from, to); }

/* The wall clock */

int clock_gettime(clockid_t clock, struct timespec *t)
{
    REAL(clock_gettime);
    int code = real(clock, t);
    if (!code && control && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE))
        t->tv_sec += control->shift;
    return code;
}

int gettimeofday(struct timeval *t, void *zone)
{
    static int (*real)(struct timeval *, void *);
    if (!real)
        real = (int (*)(struct timeval *, void *))dlsym(RTLD_NEXT, "gettimeofday");
    int code = real(t, zone);
    if (!code && t && control)
        t->tv_sec += control->shift;
    return code;
}

time_t time(time_t *to)
{
    struct timespec t;
    clock_gettime(CLOCK_REALTIME, &t);
    if (to)
        *to = t.tv_sec;
    return t.tv_sec;
}

/* The kernel's clock is not shifted: it waits until the same moment of its own. The monotonic clock is below 1e9 */
int pthread_cond_timedwait(pthread_cond_t *condition, pthread_mutex_t *mutex, const struct timespec *until)
{
    static int (*real)(pthread_cond_t *, pthread_mutex_t *, const struct timespec *);
    static const char *versions[] = {"GLIBC_2.3.2", "GLIBC_2.17", "GLIBC_2.27", 0};
    for (int i = 0; !real && versions[i]; i++)
        real = dlvsym(RTLD_NEXT, "pthread_cond_timedwait", versions[i]);
    struct timespec t = *until;
    if (control && t.tv_sec > 1000000000)
        t.tv_sec -= control->shift;
    return real(condition, mutex, &t);
}
