/*
 * An event loop that may not block: the acquire, the work, the loss of the lease and Ctrl-C are all descriptors.
 *
 *     cc epoll.c $(pkg-config --cflags --libs lease) -o epoll && ./epoll sqlite:jobs.db
 */
#define _GNU_SOURCE
#include <lease.h>

#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/signalfd.h>
#include <sys/timerfd.h>
#include <unistd.h>

static void die(lease_error_t *error) {
    fprintf(stderr, "%s\n", error != NULL ? lease_error_message(error) : "a system call failed");
    lease_error_free(error);
    exit(1);
}

static int poller;

static void watch(int fd) {
    struct epoll_event event = {.events = EPOLLIN, .data = {.fd = fd}};
    if (epoll_ctl(poller, EPOLL_CTL_ADD, fd, &event) != 0) die(NULL);
}

int main(int count, char **arguments) {
    lease_error_t *error = NULL;
    lease_manager_t *manager = NULL;
    lease_pending_t *pending = NULL;
    lease_t *lease = NULL;
    int granted = -1, lost = -1, row = 0;
    bool over = false;

    sigset_t signals;
    sigemptyset(&signals);
    sigaddset(&signals, SIGINT);
    sigaddset(&signals, SIGTERM);
    sigprocmask(SIG_BLOCK, &signals, NULL);
    int interrupted = signalfd(-1, &signals, SFD_CLOEXEC | SFD_NONBLOCK);
    int step = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK);
    poller = epoll_create1(EPOLL_CLOEXEC);
    if (interrupted < 0 || step < 0 || poller < 0) die(NULL);

    if (lease_manager_open(count > 1 ? arguments[1] : "sqlite:jobs.db", NULL, &manager, &error) != LEASE_OK ||
        lease_manager_acquire_start(manager, "nightly", 60000, NULL, &pending, &error) != LEASE_OK ||
        lease_pending_fd(pending, &granted, &error) != LEASE_OK) {
        die(error);
    }
    watch(interrupted);
    watch(granted);
    watch(step);

    while (!over) {
        struct epoll_event event;
        if (epoll_wait(poller, &event, 1, -1) != 1) continue;
        if (event.data.fd == granted) {
            if (lease_pending_take(pending, &lease, &error) != LEASE_OK) die(error);
            /* Before its _free: where a child of this process has inherited it, closing it leaves it in the poller. */
            epoll_ctl(poller, EPOLL_CTL_DEL, granted, NULL);
            lease_pending_free(pending);
            pending = NULL;
            granted = -1; /* the number may be given out again */
            if (lease_cancelled_fd(lease, &lost, &error) != LEASE_OK) die(error);
            watch(lost);
            struct itimerspec every = {{0, 20000000}, {0, 20000000}};
            timerfd_settime(step, 0, &every, NULL);
        } else if (event.data.fd == lost) {
            lease_check(lease, &error);
            die(error);
        } else if (event.data.fd == step) {
            uint64_t times;
            if (read(step, &times, sizeof times) != sizeof times) continue;
            /* The clock decides, not the order of events. */
            if (lease_check(lease, &error) != LEASE_OK) die(error);
            printf("row %d, fence %lld\n", row, (long long)lease_token(lease));
            over = ++row == 5;
        } else {
            over = true;
        }
    }

    lease_pending_free(pending); /* gives up waiting */
    if (lease != NULL) {
        epoll_ctl(poller, EPOLL_CTL_DEL, lost, NULL);
        if (lease_release(lease, &error) != LEASE_OK) die(error);
        puts("done");
    }
    lease_free(lease);
    if (lease_manager_close(manager, &error) != LEASE_OK) die(error);
    lease_manager_free(manager);
    close(poller), close(step), close(interrupted);
    return 0;
}
