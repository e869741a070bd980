/* The descriptors in an epoll loop: the end of a lease that the heartbeat finds out, and an acquire that does not block. */
#define _GNU_SOURCE
#include "check.h"

#include <sys/epoll.h>
#include <unistd.h>

static int poller;

static void watch(int fd) {
    struct epoll_event event = {.events = EPOLLIN, .data = {.fd = fd}};
    CHECK(epoll_ctl(poller, EPOLL_CTL_ADD, fd, &event) == 0);
}

static bool is_ready(int fd, int timeout_ms) {
    struct epoll_event event;
    if (epoll_wait(poller, &event, 1, timeout_ms) == 0) return false;
    return event.data.fd == fd && (event.events & EPOLLIN) != 0;
}

int main(void) {
    lease_manager_t *m = NULL;
    lease_t *l = NULL, *next = NULL;
    lease_pending_t *p = NULL;
    int ended = -1, same = -1, done = -1;
    poller = epoll_create1(EPOLL_CLOEXEC);
    CHECK_OK(lease_manager_open("memory:?ttl=3s", NULL, &m, &error));
    CHECK_OK(lease_manager_acquire(m, "n", 0, NULL, &l, &error));
    CHECK_OK(lease_cancelled_fd(l, &ended, &error));
    CHECK_OK(lease_cancelled_fd(l, &same, &error));
    CHECK(same == ended);
    watch(ended);
    CHECK(!is_ready(ended, 0));
    CHECK_OK(lease_manager_acquire_start(m, "n", LEASE_WAIT_FOREVER, NULL, &p, &error));
    CHECK_OK(lease_pending_fd(p, &done, &error));
    CHECK(readable(done, 0) == 0);

    /* Nobody asks the store: the next renewal finds out. */
    CHECK_OK(lease_manager_break(m, "n", lease_token(l), &error));
    CHECK(is_ready(ended, 10000) && is_ready(ended, 0) && readable(ended, 0) == 1);
    CHECK(lease_end_reason(l) == LEASE_END_GONE || lease_end_reason(l) == LEASE_END_SUPERSEDED);
    lease_free(l);

    watch(done);
    CHECK(is_ready(done, 10000) && is_ready(done, 0));
    CHECK_OK(lease_pending_take(p, &next, &error));
    CHECK(lease_is_held(next));
    lease_pending_free(p);

    /* A deadline is an outcome too. */
    CHECK_OK(lease_manager_acquire_start(m, "n", 50, NULL, &p, &error));
    CHECK_OK(lease_pending_fd(p, &done, &error));
    watch(done);
    CHECK(is_ready(done, 10000));
    CHECK_STATUS(LEASE_ERR_TIMEOUT, "held by", lease_pending_take(p, &l, &error));
    CHECK_STATUS(LEASE_ERR_INVALID, "taken before", lease_pending_take(p, &l, &error));
    lease_pending_free(p);

    /* So is a manager that is closed. */
    CHECK_OK(lease_manager_acquire_start(m, "n", LEASE_WAIT_FOREVER, NULL, &p, &error));
    CHECK_OK(lease_pending_fd(p, &done, &error));
    CHECK_OK(lease_manager_close(m, &error));
    CHECK(readable(done, 10000) == 1);
    CHECK_STATUS(LEASE_ERR_CLOSED, "closed", lease_pending_take(p, &l, &error));
    lease_pending_free(p);
    CHECK(lease_end_reason(next) == LEASE_END_CLOSED);
    lease_free(next);
    lease_manager_free(m);
    close(poller);
    puts("ok");
    return 0;
}
