/* Acquires and releases, with all that hangs on a lease, and ends with the memory, descriptors and threads it began with.
 *
 *     cycles URL CYCLES
 */
#define _GNU_SOURCE
#include "check.h"

#include <dirent.h>
#include <unistd.h>

static int freed;

static void lost(int32_t reason, void *data) {
    (void)reason, (void)data;
    CHECK(!"nothing was lost");
}

static void count_free(void *data) {
    __atomic_add_fetch((int *)data, 1, __ATOMIC_SEQ_CST);
}

static int entries(const char *path) {
    DIR *directory = opendir(path);
    CHECK(directory != NULL);
    int count = 0;
    while (readdir(directory) != NULL) count++;
    closedir(directory);
    return count;
}

static long resident_kib(void) {
    long pages = 0;
    FILE *statm = fopen("/proc/self/statm", "r");
    CHECK(statm != NULL && fscanf(statm, "%*d %ld", &pages) == 1);
    fclose(statm);
    return pages * (sysconf(_SC_PAGESIZE) / 1024);
}

static void cycle(lease_manager_t *m, int at) {
    lease_t *l = NULL;
    CHECK_OK(lease_manager_acquire(m, "n", 10000, NULL, &l, &error));
    if (at % 10 == 0) {
        /* Each thing now and then: some of them cost more than the lease. */
        lease_t *second = NULL;
        lease_pending_t *p = NULL;
        lease_record_t *r = NULL;
        int fd = -1;
        CHECK_OK(lease_cancelled_fd(l, &fd, &error));
        CHECK_OK(lease_on_lost(l, lost, &freed, count_free, &error));
        CHECK_OK(lease_check(l, &error));
        CHECK_STATUS(LEASE_ERR_TIMEOUT, "held by", lease_manager_acquire(m, "n", 0, NULL, &second, &error));
        CHECK_OK(lease_manager_acquire_start(m, "n", 10000, NULL, &p, &error));
        lease_pending_free(p);
        CHECK_OK(lease_manager_inspect(m, "n", &r, &error));
        lease_record_free(r);
    }
    if (at % 2 == 0) CHECK_OK(lease_release(l, &error));
    lease_free(l);
}

int main(int count, char **arguments) {
    CHECK(count == 3);
    int cycles = atoi(arguments[2]), warm = cycles / 10;
    CHECK(cycles >= 100);
    int fds = entries("/proc/self/fd"), threads = entries("/proc/self/task");
    for (int opened = 0; opened < 3; opened++) {
        lease_manager_t *m = NULL;
        CHECK_OK(lease_manager_open(arguments[1], NULL, &m, &error));
        for (int at = 0; at < warm / 3; at++) cycle(m, at);
        CHECK_OK(lease_manager_close(m, &error));
        lease_manager_free(m);
    }
    lease_manager_t *m = NULL;
    CHECK_OK(lease_manager_open(arguments[1], NULL, &m, &error));
    for (int at = 0; at < warm; at++) cycle(m, at);
    long before = resident_kib();
    for (int at = 0; at < cycles; at++) cycle(m, at);
    long grown = resident_kib() - before;
    CHECK_OK(lease_manager_close(m, &error));
    lease_manager_free(m);
    CHECK(freed > cycles / 10);
    CHECK(entries("/proc/self/fd") == fds);
    EVENTUALLY(entries("/proc/self/task") == threads);
    printf("%d cycles, grown by %ld KiB\n", cycles, grown);
    /* A leak takes at least 32 bytes of malloc's a cycle. What it keeps back for its threads does not grow with them. */
    CHECK(grown <= (long)cycles * 16 / 1024 || cycles < 100000);
    puts("ok");
    return 0;
}
