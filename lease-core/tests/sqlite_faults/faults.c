// Preloaded into a process, this stands between it and libc, and does to it what a test orders.
//
// - Steps are counted: each write, truncation, lock, sync and removal of a file whose path begins with FAULTS_FILE, and each
//   use of a socket. A write has two more, in its middle and after it. Opening "/@faults/KILL/n" or "/@faults/STOP/n" orders
//   that signal at the n-th step from then on.
// - What is synced is copied to the directory FAULTS_SYNCED: a power failure leaves that for certain. A file that was
//   created is there with its first sync; one that was removed is gone with the next sync of its directory.
// - Who asks for the boot id gets that in the file FAULTS_BOOT.
//
// No file of the process is opened here: closing it again would drop the record locks that the process has on it.

#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define FILES 4096
enum { OTHER, ONE_OF_THEM, THEIR_DIRECTORY };

static atomic_uchar kinds[FILES];
static atomic_int order;
static atomic_long left;

static const char *setting(const char *name) {
    const char *value = getenv(name);
    return value ? value : "";
}

static void step(void) {
    if (atomic_load(&left) > 0 && atomic_fetch_sub(&left, 1) == 1)
        raise(atomic_load(&order));
}

static int kind_of_path(const char *path) {
    const char *file = setting("FAULTS_FILE");
    size_t length = strlen(file);
    if (length == 0)
        return OTHER;
    if (strncmp(path, file, length) == 0)
        return ONE_OF_THEM;
    size_t directory = (size_t)(strrchr(file, '/') - file);
    return strlen(path) == directory && strncmp(path, file, directory) == 0 ? THEIR_DIRECTORY : OTHER;
}

static int kind_of(int fd) {
    return fd >= 0 && fd < FILES ? atomic_load(&kinds[fd]) : OTHER;
}

static void step_of(int fd) {
    if (kind_of(fd) == ONE_OF_THEM)
        step();
}

static void give_up(const char *what) {
    perror(what);
    abort();
}

static const char *within(const char *path, const char *name, char *buffer) {
    if (snprintf(buffer, PATH_MAX, "%s/%s", path, name) >= PATH_MAX)
        give_up("faults: a long path");
    return buffer;
}

// ---------------------------------------------------------------------------------- what is synced

static void copy(int fd) {
    char link[64], path[PATH_MAX], new[PATH_MAX], kept[PATH_MAX], bytes[1 << 16];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0)
        give_up("faults: readlink");
    path[length] = 0;
    int to = open(within(setting("FAULTS_SYNCED"), "new", new), O_CREAT | O_TRUNC | O_WRONLY | O_CLOEXEC, 0600);
    if (to < 0)
        give_up("faults: open");
    for (off_t at = 0; (length = pread(fd, bytes, sizeof bytes, at)) > 0; at += length)
        if (write(to, bytes, (size_t)length) != length)
            give_up("faults: write");
    close(to);
    // Whole or not at all: the process may be killed meanwhile.
    if (length < 0 || rename(new, within(setting("FAULTS_SYNCED"), strrchr(path, '/') + 1, kept)) != 0)
        give_up("faults: rename");
}

static void forget_removed(void) {
    char directory[PATH_MAX], path[PATH_MAX];
    snprintf(directory, sizeof directory, "%s", setting("FAULTS_FILE"));
    *strrchr(directory, '/') = 0;
    DIR *synced = opendir(setting("FAULTS_SYNCED"));
    for (struct dirent *entry; synced && (entry = readdir(synced));)
        if (access(within(directory, entry->d_name, path), F_OK) != 0)
            REAL(unlink)(within(setting("FAULTS_SYNCED"), entry->d_name, path));
    if (synced)
        closedir(synced);
}

static int synced(int fd, int outcome) {
    static pthread_mutex_t one_at_a_time = PTHREAD_MUTEX_INITIALIZER;
    if (outcome == 0 && *setting("FAULTS_SYNCED") && kind_of(fd) != OTHER) {
        pthread_mutex_lock(&one_at_a_time);
        if (kind_of(fd) == ONE_OF_THEM)
            copy(fd);
        else
            forget_removed();
        pthread_mutex_unlock(&one_at_a_time);
    }
    return outcome;
}

int fsync(int fd) {
    step_of(fd);
    return synced(fd, REAL(fsync)(fd));
}

int fdatasync(int fd) {
    step_of(fd);
    return synced(fd, REAL(fdatasync)(fd));
}

// --------------------------------------------------------------------------------------- all else

static int open_file(const char *path, int flags, mode_t mode) {
    long steps;
    char name[5] = "";
    if (sscanf(path, "/@faults/%4[A-Z]/%ld", name, &steps) == 2) {
        atomic_store(&order, strcmp(name, "KILL") == 0 ? SIGKILL : SIGSTOP);
        atomic_store(&left, steps);
        errno = ENOENT;
        return -1;
    }
    const char *boot = setting("FAULTS_BOOT");
    if (*boot && strcmp(path, "/proc/sys/kernel/random/boot_id") == 0)
        path = boot;
    int kind = kind_of_path(path);
    if (kind == ONE_OF_THEM)
        step();
    int fd = REAL(open64)(path, flags, mode);
    if (fd >= 0 && fd < FILES)
        atomic_store(&kinds[fd], kind);
    return fd;
}

int open(const char *path, int flags, ...) {
    va_list rest;
    va_start(rest, flags);
    mode_t mode = flags & O_CREAT ? va_arg(rest, mode_t) : 0;
    va_end(rest);
    return open_file(path, flags, mode);
}

int open64(const char *path, int flags, ...) {
    va_list rest;
    va_start(rest, flags);
    mode_t mode = flags & O_CREAT ? va_arg(rest, mode_t) : 0;
    va_end(rest);
    return open_file(path, flags, mode);
}

int close(int fd) {
    if (fd >= 0 && fd < FILES)
        atomic_store(&kinds[fd], OTHER);
    return REAL(close)(fd);
}

// The first half of what is written, if a step is to come in the middle.
static size_t half(int fd, size_t length) {
    step_of(fd);
    return kind_of(fd) == ONE_OF_THEM && atomic_load(&left) > 0 ? length / 2 : 0;
}

ssize_t write(int fd, const void *bytes, size_t length) {
    size_t first = half(fd, length);
    if (first > 0 && REAL(write)(fd, bytes, first) != (ssize_t)first)
        return -1;
    step_of(fd);
    ssize_t done = REAL(write)(fd, (const char *)bytes + first, length - first);
    step_of(fd);
    return done < 0 ? done : done + (ssize_t)first;
}

ssize_t pwrite64(int fd, const void *bytes, size_t length, off64_t at) {
    size_t first = half(fd, length);
    if (first > 0 && REAL(pwrite64)(fd, bytes, first, at) != (ssize_t)first)
        return -1;
    step_of(fd);
    ssize_t done = REAL(pwrite64)(fd, (const char *)bytes + first, length - first, at + (off64_t)first);
    step_of(fd);
    return done < 0 ? done : done + (ssize_t)first;
}

ssize_t pwrite(int fd, const void *bytes, size_t length, off_t at) {
    return pwrite64(fd, bytes, length, at);
}

int ftruncate64(int fd, off64_t length) {
    step_of(fd);
    return REAL(ftruncate64)(fd, length);
}

int ftruncate(int fd, off_t length) {
    return ftruncate64(fd, length);
}

int unlink(const char *path) {
    if (kind_of_path(path) == ONE_OF_THEM)
        step();
    return REAL(unlink)(path);
}

static int control(int fd, int command, void *argument) {
    if (command == F_SETLK || command == F_SETLKW)
        step_of(fd);
    return REAL(fcntl64)(fd, command, argument);
}

int fcntl(int fd, int command, ...) {
    va_list rest;
    va_start(rest, command);
    void *argument = va_arg(rest, void *);
    va_end(rest);
    return control(fd, command, argument);
}

int fcntl64(int fd, int command, ...) {
    va_list rest;
    va_start(rest, command);
    void *argument = va_arg(rest, void *);
    va_end(rest);
    return control(fd, command, argument);
}

int bind(int fd, const struct sockaddr *address, socklen_t length) {
    step();
    return REAL(bind)(fd, address, length);
}

int connect(int fd, const struct sockaddr *address, socklen_t length) {
    step();
    return REAL(connect)(fd, address, length);
}

ssize_t send(int fd, const void *bytes, size_t length, int flags) {
    step();
    return REAL(send)(fd, bytes, length, flags);
}
