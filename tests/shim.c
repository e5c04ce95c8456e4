/* Loaded before the C library: a file layer that fails or is slow, and a clock that jumps.

   SHIM_FILE   part of the path of the files that are meant
   SHIM_ERRNO  what writing, reading and syncing them gives, SHIM_TIMES times (all, if it is not set)
   SHIM_DELAY  microseconds that each such call takes longer
   SHIM_DIRECTORIES  what renaming a directory gives
   SHIM_RENAMES      what renaming anything gives
   SHIM_FLOCK        what locking a file gives
   SHIM_JUMP   seconds by which the wall clock is off, forward and back in turn, a quarter of a second each */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static atomic_long failed;

static int is_meant(int descriptor) {
    const char *part = getenv("SHIM_FILE");
    if (!part) return 0;
    char link[64], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return strstr(path, part) != NULL;
}

/* Whether the call is to fail; errno is set then. */
static int meddle(int descriptor) {
    if (!is_meant(descriptor)) return 0;
    const char *delay = getenv("SHIM_DELAY"), *number = getenv("SHIM_ERRNO"), *times = getenv("SHIM_TIMES");
    if (delay) usleep(atoi(delay));
    if (!number || (times && atomic_fetch_add(&failed, 1) >= atol(times))) return 0;
    errno = atoi(number);
    return 1;
}

#define NEXT(name) __typeof__(&name) next = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

ssize_t write(int descriptor, const void *data, size_t size) {
    NEXT(write);
    return meddle(descriptor) ? -1 : next(descriptor, data, size);
}

ssize_t read(int descriptor, void *data, size_t size) {
    NEXT(read);
    return meddle(descriptor) ? -1 : next(descriptor, data, size);
}

int fsync(int descriptor) {
    NEXT(fsync);
    return meddle(descriptor) ? -1 : next(descriptor);
}

int flock(int descriptor, int operation) {
    NEXT(flock);
    const char *number = getenv("SHIM_FLOCK");
    if (!number) return next(descriptor, operation);
    errno = atoi(number);
    return -1;
}

int rename(const char *from, const char *to) {
    NEXT(rename);
    const char *number = getenv("SHIM_RENAMES"), *of_directories = getenv("SHIM_DIRECTORIES");
    struct stat found;
    if (!number && of_directories && lstat(from, &found) == 0 && S_ISDIR(found.st_mode)) number = of_directories;
    if (!number) return next(from, to);
    errno = atoi(number);
    return -1;
}

int clock_gettime(clockid_t clock, struct timespec *result) {
    NEXT(clock_gettime);
    int code = next(clock, result);
    const char *jump = getenv("SHIM_JUMP");
    if (code == 0 && clock == CLOCK_REALTIME && jump) {
        struct timespec now;
        next(CLOCK_MONOTONIC, &now);
        result->tv_sec += (now.tv_nsec / 250000000) % 2 ? atol(jump) : -atol(jump);
    }
    return code;
}
