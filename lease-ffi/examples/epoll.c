/*
 * An event loop that may not block: the acquire, the work, the loss of the lease and Ctrl-C are all descriptors.
 *
 *     cc epoll.c $(pkg-config --cflags --libs lease) -o epoll && ./epoll sqlite:jobs.db
 */
#define _GNU_SOURCE
#include <lease.h>

#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/signalfd.h>
#include <sys/timerfd.h>
#include <unistd.h>

static lease_manager_t *manager;
static lease_pending_t *pending;
static lease_t *lease;
static int poller, granted = -1, lost = -1, step, row;

/* Says what went wrong, and frees it. */
static int failed(lease_error_t *error) {
    fprintf(stderr, "%s\n", error != NULL ? lease_error_message(error) : "a system call failed");
    lease_error_free(error);
    return 1;
}

static void watch(int fd) {
    struct epoll_event event = {.events = EPOLLIN, .data = {.fd = fd}};
    if (epoll_ctl(poller, EPOLL_CTL_ADD, fd, &event) != 0) exit(failed(NULL));
}

/* Before the _free that closes it: where a child of this process has inherited it, closing leaves it in the poller. */
static void forget(int *fd) {
    if (*fd >= 0) epoll_ctl(poller, EPOLL_CTL_DEL, *fd, NULL);
    *fd = -1; /* the number may be given out again */
}

/* What an event asks for. -1: go on; else the status to exit with. */
static int on_granted(void) {
    lease_error_t *error = NULL;
    struct itimerspec every = {{0, 20000000}, {0, 20000000}};
    if (lease_pending_take(pending, &lease, &error) != LEASE_OK) return failed(error);
    forget(&granted);
    lease_pending_free(pending);
    pending = NULL;
    if (lease_cancelled_fd(lease, &lost, &error) != LEASE_OK) return failed(error);
    watch(lost);
    return timerfd_settime(step, 0, &every, NULL) == 0 ? -1 : failed(NULL);
}

static int on_step(void) {
    lease_error_t *error = NULL;
    uint64_t times;
    if (read(step, &times, sizeof times) != sizeof times) return -1;
    /* The clock decides, not the order of events. */
    if (lease_check(lease, &error) != LEASE_OK) return failed(error);
    printf("row %d, fence %lld\n", row, (long long)lease_token(lease));
    fflush(stdout);
    if (++row < 5) return -1;
    puts("done");
    return 0;
}

static int on_lost(void) {
    lease_error_t *error = NULL;
    return lease_check(lease, &error) == LEASE_OK ? -1 : failed(error);
}

static int run(int interrupted) {
    for (;;) {
        struct epoll_event event;
        int status = -1, count = epoll_wait(poller, &event, 1, -1);
        if (count < 0 && errno != EINTR) return failed(NULL);
        if (count != 1) continue;
        if (event.data.fd == interrupted) {
            puts("interrupted");
            status = 130;
        } else if (event.data.fd == granted) {
            status = on_granted();
        } else if (event.data.fd == lost) {
            status = on_lost();
        } else if (event.data.fd == step) {
            status = on_step();
        }
        if (status != -1) return status;
    }
}

int main(int count, char **arguments) {
    const char *url = count > 1 ? arguments[1] : "sqlite:jobs.db";
    lease_error_t *error = NULL;
    sigset_t signals;
    int status;

    sigemptyset(&signals);
    sigaddset(&signals, SIGINT);
    sigaddset(&signals, SIGTERM);
    sigprocmask(SIG_BLOCK, &signals, NULL);
    int interrupted = signalfd(-1, &signals, SFD_CLOEXEC | SFD_NONBLOCK);
    step = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK);
    poller = epoll_create1(EPOLL_CLOEXEC);
    if (interrupted < 0 || step < 0 || poller < 0) return failed(NULL);
    watch(interrupted);
    watch(step);

    if (lease_manager_open(url, NULL, &manager, &error) != LEASE_OK ||
        lease_manager_acquire_start(manager, "nightly", 60000, NULL, &pending, &error) != LEASE_OK ||
        lease_pending_fd(pending, &granted, &error) != LEASE_OK) {
        status = failed(error);
    } else {
        watch(granted);
        status = run(interrupted);
    }

    forget(&granted);
    forget(&lost);
    lease_pending_free(pending); /* gives up waiting, if it still does */
    /* After the work. Of a lost lease it says so again; one whose store cannot be told expires. */
    if (lease != NULL && lease_release(lease, &error) != LEASE_OK) {
        if (lease_error_status(error) == LEASE_ERR_LOST) status = 1;
        failed(error);
        error = NULL;
    }
    lease_free(lease);
    if (manager != NULL && lease_manager_close(manager, &error) != LEASE_OK) failed(error);
    lease_manager_free(manager);
    close(poller), close(step), close(interrupted);
    return status;
}
