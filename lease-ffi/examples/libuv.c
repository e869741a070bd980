/*
 * A libuv loop: the acquire and the end of the lease are uv_poll_t, the work is a timer.
 *
 *     cc libuv.c $(pkg-config --cflags --libs lease libuv) -o libuv && ./libuv sqlite:jobs.db
 */
#include <lease.h>

#include <stdio.h>
#include <uv.h>

static lease_manager_t *manager;
static lease_pending_t *pending;
static lease_t *lease;
static uv_poll_t granted, ended;
static uv_timer_t step;
static uv_signal_t interrupted, terminated;
static int row, status = 1;

static void close_handle(uv_handle_t *handle, void *data) {
    (void)data;
    if (!uv_is_closing(handle)) uv_close(handle, NULL);
}

/* With every watcher closed, uv_run returns. */
static void finish(const char *said, int with) {
    fprintf(with == 0 ? stdout : stderr, "%s\n", said);
    status = with;
    uv_walk(uv_default_loop(), close_handle, NULL);
}

static void failed(lease_error_t *error) {
    finish(lease_error_message(error), 1);
    lease_error_free(error);
}

static void must(int result) {
    if (result != 0) finish(uv_strerror(result), 1);
}

static void on_ended(uv_poll_t *watcher, int result, int events) {
    lease_error_t *error = NULL;
    (void)watcher, (void)result, (void)events;
    if (lease_check(lease, &error) != LEASE_OK) failed(error);
}

static void on_step(uv_timer_t *timer) {
    lease_error_t *error = NULL;
    (void)timer;
    /* The clock decides, not the order of events. */
    if (lease_check(lease, &error) != LEASE_OK) {
        failed(error);
        return;
    }
    printf("row %d, fence %lld\n", row, (long long)lease_token(lease));
    if (++row == 5) finish("done", 0);
}

static void on_granted(uv_poll_t *watcher, int result, int events) {
    uv_loop_t *loop = uv_default_loop();
    lease_error_t *error = NULL;
    int fd = -1;
    (void)result, (void)events;
    if (lease_pending_take(pending, &lease, &error) != LEASE_OK || lease_cancelled_fd(lease, &fd, &error) != LEASE_OK) {
        failed(error);
        return;
    }
    uv_close((uv_handle_t *)watcher, NULL);
    must(uv_poll_init(loop, &ended, fd));
    must(uv_poll_start(&ended, UV_READABLE, on_ended));
    must(uv_timer_init(loop, &step));
    must(uv_timer_start(&step, on_step, 20, 20));
}

static void on_signal(uv_signal_t *watcher, int number) {
    (void)watcher, (void)number;
    finish("interrupted", 130);
}

int main(int count, char **arguments) {
    const char *url = count > 1 ? arguments[1] : "sqlite:jobs.db";
    uv_loop_t *loop = uv_default_loop();
    lease_error_t *error = NULL;
    int fd = -1;
    if (lease_manager_open(url, NULL, &manager, &error) != LEASE_OK ||
        lease_manager_acquire_start(manager, "nightly", 60000, NULL, &pending, &error) != LEASE_OK ||
        lease_pending_fd(pending, &fd, &error) != LEASE_OK) {
        failed(error);
    } else {
        must(uv_signal_init(loop, &interrupted));
        must(uv_signal_start(&interrupted, on_signal, SIGINT));
        must(uv_signal_init(loop, &terminated));
        must(uv_signal_start(&terminated, on_signal, SIGTERM));
        must(uv_poll_init(loop, &granted, fd));
        must(uv_poll_start(&granted, UV_READABLE, on_granted));
        uv_run(loop, UV_RUN_DEFAULT);
    }

    /* After the loop: a uv_poll_t must be closed before its descriptor. */
    lease_pending_free(pending);
    /* Of a lost lease it says so again; one whose store cannot be told expires. */
    if (lease != NULL && lease_release(lease, &error) != LEASE_OK) {
        if (lease_error_status(error) == LEASE_ERR_LOST) status = 1;
        fprintf(stderr, "%s\n", lease_error_message(error));
        lease_error_free(error);
        error = NULL;
    }
    lease_free(lease);
    lease_manager_close(manager, NULL);
    lease_manager_free(manager);
    uv_loop_close(loop);
    return status;
}
