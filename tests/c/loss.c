/* A store that is cut: the loss is told by check, descriptor and callback, before the ttl; and the name comes back. */
#define _GNU_SOURCE
#include "cut.h"

#include <sys/epoll.h>

enum { TTL_MS = 3000 };

typedef struct {
    int reason, calls, freed;
    int64_t at;
} told_t;

static void lost(int32_t reason, void *data) {
    told_t *told = data;
    told->at = now_ms();
    told->reason = reason;
    __atomic_add_fetch(&told->calls, 1, __ATOMIC_SEQ_CST);
}

static void freed(void *data) {
    __atomic_add_fetch(&((told_t *)data)->freed, 1, __ATOMIC_SEQ_CST);
}

int main(int count, char **arguments) {
    CHECK(count == 2);
    char url[512], gate[512];
    snprintf(url, sizeof url, "sqlite:%s/jobs.db?ttl=%dms&request_timeout=200ms", arguments[1], TTL_MS);
    snprintf(gate, sizeof gate, "%s/jobs.db-gate", arguments[1]);
    cut_t cut = cut_prepare(gate);

    lease_manager_t *m = NULL;
    lease_t *l = NULL, *longer = NULL, *next = NULL;
    lease_options_t *o = lease_options_new();
    told_t told = {-1, 0, 0, 0}, never = {-1, 0, 0, 0};
    int fd = -1;
    CHECK_OK(lease_manager_open(url, NULL, &m, &error));
    CHECK_OK(lease_manager_acquire(m, "nightly", 5000, NULL, &l, &error));
    CHECK_OK(lease_options_set(o, "ttl", "1h", &error));
    CHECK_OK(lease_manager_acquire(m, "longer", 5000, o, &longer, &error));
    CHECK_OK(lease_on_lost(l, lost, &told, freed, &error));
    CHECK_OK(lease_on_lost(longer, lost, &never, freed, &error));
    CHECK_OK(lease_cancelled_fd(l, &fd, &error));
    int64_t token = lease_token(l);

    int poller = epoll_create1(EPOLL_CLOEXEC);
    struct epoll_event event = {.events = EPOLLIN, .data = {.fd = fd}};
    CHECK(poller >= 0 && epoll_ctl(poller, EPOLL_CTL_ADD, fd, &event) == 0);
    CHECK(epoll_wait(poller, &event, 1, 0) == 0);

    /* Kept over renewals while the store answers. */
    CHECK(readable(fd, TTL_MS) == 0 && lease_is_held(l));

    cut_now(cut);
    int64_t since = now_ms();
    CHECK(epoll_wait(poller, &event, 1, 10000) == 1);
    int64_t by_fd = now_ms() - since;
    /* It is told at half the ttl after it was confirmed, which was before the cut; nobody else can have the name before the
     * whole. A busy machine may be late: by ttl/6 here. */
    CHECK(by_fd < TTL_MS * 2 / 3);
    CHECK(!lease_is_held(l) && lease_remaining_ms(l) == 0);
    CHECK(lease_end_reason(l) == LEASE_END_UNREACHABLE);
    CHECK_STATUS(LEASE_ERR_LOST, "nightly", lease_check(l, &error));
    EVENTUALLY(__atomic_load_n(&told.freed, __ATOMIC_SEQ_CST) == 1);
    CHECK(told.calls == 1 && told.reason == LEASE_END_UNREACHABLE && told.at - since < TTL_MS * 2 / 3);
    /* Level-triggered: readable as often as one asks. */
    CHECK(epoll_wait(poller, &event, 1, 0) == 1 && readable(fd, 0) == 1);

    /* What is unknown is no loss, and says so. */
    lease_error_t *unknown = NULL;
    CHECK(lease_confirm(longer, &unknown) == LEASE_ERR_UNAVAILABLE);
    CHECK(lease_error_is_retryable(unknown) && lease_is_held(longer));
    lease_error_free(unknown);
    CHECK_STATUS(LEASE_ERR_UNAVAILABLE, "nightly", lease_manager_acquire(m, "nightly", 400, NULL, &next, &error));
    CHECK_STATUS(LEASE_ERR_LOST, "nightly", lease_release(l, &error));

    cut_heal(cut);
    CHECK_OK(lease_manager_acquire(m, "nightly", 10000, NULL, &next, &error));
    CHECK(lease_token(next) > token && !lease_is_held(l));
    CHECK_OK(lease_confirm(longer, &error));
    CHECK_OK(lease_release(next, &error));
    CHECK_OK(lease_release(longer, &error));
    lease_free(l), lease_free(longer), lease_free(next), lease_options_free(o);
    CHECK_OK(lease_manager_close(m, &error));
    lease_manager_free(m);
    EVENTUALLY(__atomic_load_n(&never.freed, __ATOMIC_SEQ_CST) == 1);
    CHECK(told.calls == 1 && never.calls == 0);
    close(poller);
    printf("told %d ms after the cut, of a ttl of %d ms\nok\n", (int)by_fd, TTL_MS);
    return 0;
}
