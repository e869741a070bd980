/* The descriptors in a libev loop. Its header is not for -Wpedantic. */
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wpedantic"
#pragma GCC diagnostic ignored "-Wstrict-aliasing"
#include <ev.h>
#pragma GCC diagnostic pop
#include "check.h"

static lease_manager_t *manager;
static lease_t *held, *next;
static lease_pending_t *pending;
static int steps;

static void on_ended(struct ev_loop *loop, ev_io *watcher, int events) {
    CHECK((events & EV_READ) != 0 && !lease_is_held(held));
    steps++;
    ev_io_stop(loop, watcher);
}

static void on_done(struct ev_loop *loop, ev_io *watcher, int events) {
    CHECK((events & EV_READ) != 0);
    CHECK_OK(lease_pending_take(pending, &next, &error));
    steps++;
    ev_io_stop(loop, watcher);
}

static void on_time(struct ev_loop *loop, ev_timer *timer, int events) {
    (void)loop, (void)timer, (void)events;
    CHECK_OK(lease_manager_break(manager, "n", lease_token(held), &error));
}

int main(void) {
    struct ev_loop *loop = ev_loop_new(EVFLAG_AUTO);
    ev_io ended, done;
    ev_timer timer;
    int fd = -1;
    CHECK(loop != NULL);
    CHECK_OK(lease_manager_open("memory:?ttl=1500ms", NULL, &manager, &error));
    CHECK_OK(lease_manager_acquire(manager, "n", 0, NULL, &held, &error));
    CHECK_OK(lease_manager_acquire_start(manager, "n", 10000, NULL, &pending, &error));
    CHECK_OK(lease_cancelled_fd(held, &fd, &error));
    ev_io_init(&ended, on_ended, fd, EV_READ);
    ev_io_start(loop, &ended);
    CHECK_OK(lease_pending_fd(pending, &fd, &error));
    ev_io_init(&done, on_done, fd, EV_READ);
    ev_io_start(loop, &done);
    ev_timer_init(&timer, on_time, 0.02, 0);
    ev_timer_start(loop, &timer);
    ev_run(loop, 0);
    CHECK(steps == 2 && lease_is_held(next));
    ev_loop_destroy(loop);
    lease_pending_free(pending), lease_free(held), lease_free(next);
    CHECK_OK(lease_manager_close(manager, &error));
    lease_manager_free(manager);
    puts("ok");
    return 0;
}
