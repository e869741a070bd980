/* The descriptors in a libuv loop. */
#include "check.h"

#include <uv.h>

static lease_manager_t *manager;
static lease_t *held, *next;
static lease_pending_t *pending;
static int steps;

static void on_ended(uv_poll_t *watcher, int status, int events) {
    CHECK(status == 0 && (events & UV_READABLE) != 0 && !lease_is_held(held));
    steps++;
    uv_close((uv_handle_t *)watcher, NULL);
}

static void on_done(uv_poll_t *watcher, int status, int events) {
    CHECK(status == 0 && (events & UV_READABLE) != 0);
    CHECK_OK(lease_pending_take(pending, &next, &error));
    steps++;
    uv_close((uv_handle_t *)watcher, NULL);
}

static void on_time(uv_timer_t *timer) {
    CHECK_OK(lease_manager_break(manager, "n", lease_token(held), &error));
    uv_close((uv_handle_t *)timer, NULL);
}

int main(void) {
    uv_loop_t loop;
    uv_poll_t ended, done;
    uv_timer_t timer;
    int fd = -1;
    CHECK(uv_loop_init(&loop) == 0);
    CHECK_OK(lease_manager_open("memory:?ttl=1500ms", NULL, &manager, &error));
    CHECK_OK(lease_manager_acquire(manager, "n", 0, NULL, &held, &error));
    CHECK_OK(lease_manager_acquire_start(manager, "n", 10000, NULL, &pending, &error));
    CHECK_OK(lease_cancelled_fd(held, &fd, &error));
    CHECK(uv_poll_init(&loop, &ended, fd) == 0 && uv_poll_start(&ended, UV_READABLE, on_ended) == 0);
    CHECK_OK(lease_pending_fd(pending, &fd, &error));
    CHECK(uv_poll_init(&loop, &done, fd) == 0 && uv_poll_start(&done, UV_READABLE, on_done) == 0);
    CHECK(uv_timer_init(&loop, &timer) == 0 && uv_timer_start(&timer, on_time, 20, 0) == 0);
    CHECK(uv_run(&loop, UV_RUN_DEFAULT) == 0);
    CHECK(steps == 2 && lease_is_held(next));
    CHECK(uv_loop_close(&loop) == 0);
    lease_pending_free(pending), lease_free(held), lease_free(next);
    CHECK_OK(lease_manager_close(manager, &error));
    lease_manager_free(manager);
    puts("ok");
    return 0;
}
