/*
 * A libuv loop: the acquire and the end of the lease are uv_poll_t, the work is a timer.
 *
 *     cc libuv.c $(pkg-config --cflags --libs lease libuv) -o libuv && ./libuv sqlite:jobs.db
 */
#include <lease.h>

#include <stdio.h>
#include <stdlib.h>
#include <uv.h>

static lease_manager_t *manager;
static lease_pending_t *pending;
static lease_t *lease;
static uv_poll_t granted, ended;
static uv_timer_t step;
static uv_signal_t interrupted;
static int row;

static void die(lease_error_t *error) {
    fprintf(stderr, "%s\n", error != NULL ? lease_error_message(error) : "libuv failed");
    lease_error_free(error);
    exit(1);
}

static void close_handle(uv_handle_t *handle, void *data) {
    (void)data;
    if (!uv_is_closing(handle)) uv_close(handle, NULL);
}

/* With every watcher closed, uv_run returns. */
static void finish(void) {
    uv_walk(uv_default_loop(), close_handle, NULL);
}

static void on_ended(uv_poll_t *watcher, int status, int events) {
    lease_error_t *error = NULL;
    (void)watcher, (void)status, (void)events;
    if (lease_check(lease, &error) != LEASE_OK) die(error);
}

static void on_step(uv_timer_t *timer) {
    lease_error_t *error = NULL;
    (void)timer;
    /* The clock decides, not the order of events. */
    if (lease_check(lease, &error) != LEASE_OK) die(error);
    printf("row %d, fence %lld\n", row, (long long)lease_token(lease));
    if (++row == 5) finish();
}

static void on_granted(uv_poll_t *watcher, int status, int events) {
    lease_error_t *error = NULL;
    int fd = -1;
    (void)status, (void)events;
    if (lease_pending_take(pending, &lease, &error) != LEASE_OK) die(error);
    uv_close((uv_handle_t *)watcher, NULL);
    if (lease_cancelled_fd(lease, &fd, &error) != LEASE_OK) die(error);
    uv_poll_init(uv_default_loop(), &ended, fd);
    uv_poll_start(&ended, UV_READABLE, on_ended);
    uv_timer_init(uv_default_loop(), &step);
    uv_timer_start(&step, on_step, 20, 20);
}

static void on_signal(uv_signal_t *watcher, int number) {
    (void)watcher, (void)number;
    finish();
}

int main(int count, char **arguments) {
    lease_error_t *error = NULL;
    int fd = -1;
    if (lease_manager_open(count > 1 ? arguments[1] : "sqlite:jobs.db", NULL, &manager, &error) != LEASE_OK ||
        lease_manager_acquire_start(manager, "nightly", 60000, NULL, &pending, &error) != LEASE_OK ||
        lease_pending_fd(pending, &fd, &error) != LEASE_OK) {
        die(error);
    }
    uv_loop_t *loop = uv_default_loop();
    if (uv_signal_init(loop, &interrupted) != 0 || uv_signal_start(&interrupted, on_signal, SIGINT) != 0) die(NULL);
    if (uv_poll_init(loop, &granted, fd) != 0 || uv_poll_start(&granted, UV_READABLE, on_granted) != 0) die(NULL);
    uv_run(loop, UV_RUN_DEFAULT);

    /* After the loop: a uv_poll_t must be closed before its descriptor. */
    lease_pending_free(pending);
    if (lease != NULL) {
        if (lease_release(lease, &error) != LEASE_OK) die(error);
        puts("done");
    }
    lease_free(lease);
    if (lease_manager_close(manager, &error) != LEASE_OK) die(error);
    lease_manager_free(manager);
    uv_loop_close(loop);
    return 0;
}
