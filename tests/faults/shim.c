/* Preloaded into the process under test: the n-th call that changes the disk fails, or kills the process.

   Only calls below one folder count. Armed by fault_arm(folder, n, error); error 0 is SIGKILL. fault_count() says how many
   such calls there were. Built by engine.py with the system's C compiler. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static char root[PATH_MAX];
static long left = -1, seen = 0;
static int fault_error = 0;

void fault_arm(const char *folder, long n, int error) {
    strncpy(root, folder, sizeof root - 1);
    left = n, seen = 0, fault_error = error;
}

long fault_count(void) { return seen; }

static int below(const char *path) { return root[0] && path && !strncmp(path, root, strlen(root)); }

static int hit(void) {
    seen++;
    if (left < 0 || left-- > 0) return 0;
    if (!fault_error) kill(getpid(), SIGKILL);
    left = -1;
    errno = fault_error;
    return 1;
}

static int of_file(int fd) {
    char link[64], path[PATH_MAX];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = root[0] ? readlink(link, path, sizeof path - 1) : -1;
    if (n < 0) return 0;
    path[n] = 0;
    return below(path);
}

#define REAL(name) static __typeof__(name) *real; if (!real) real = dlsym(RTLD_NEXT, #name)

ssize_t write(int fd, const void *b, size_t n) { REAL(write); return of_file(fd) && hit() ? -1 : real(fd, b, n); }
ssize_t pwrite64(int fd, const void *b, size_t n, off64_t o) { REAL(pwrite64); return of_file(fd) && hit() ? -1 : real(fd, b, n, o); }
ssize_t writev(int fd, const struct iovec *v, int n) { REAL(writev); return of_file(fd) && hit() ? -1 : real(fd, v, n); }
ssize_t sendfile64(int out, int in, off64_t *o, size_t n);
ssize_t sendfile64(int out, int in, off64_t *o, size_t n) { REAL(sendfile64); return of_file(out) && hit() ? -1 : real(out, in, o, n); }
ssize_t sendfile(int out, int in, off_t *o, size_t n);
ssize_t sendfile(int out, int in, off_t *o, size_t n) { REAL(sendfile); return of_file(out) && hit() ? -1 : real(out, in, o, n); }
ssize_t copy_file_range(int in, off64_t *i, int out, off64_t *o, size_t n, unsigned f) { REAL(copy_file_range); return of_file(out) && hit() ? -1 : real(in, i, out, o, n, f); }
int ftruncate64(int fd, off64_t n) { REAL(ftruncate64); return of_file(fd) && hit() ? -1 : real(fd, n); }
int fsync(int fd) { REAL(fsync); return of_file(fd) && hit() ? -1 : real(fd); }
int rename(const char *a, const char *b) { REAL(rename); return below(b) && hit() ? -1 : real(a, b); }
int mkdir(const char *p, mode_t m) { REAL(mkdir); return below(p) && hit() ? -1 : real(p, m); }
