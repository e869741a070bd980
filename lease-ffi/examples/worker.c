/*
 * A blocking worker: waits for its turn, works step by step, and stops at once when the lease is lost or Ctrl-C is pressed.
 *
 *     cc worker.c $(pkg-config --cflags --libs lease) -o worker && ./worker sqlite:jobs.db
 */
#define _GNU_SOURCE
#include <lease.h>

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

static int stop_pipe[2];
static volatile sig_atomic_t stopped;

static void on_signal(int number) {
    int before = errno;
    (void)number;
    stopped = 1;
    (void)!write(stop_pipe[1], "x", 1); /* ends the wait of lease_manager_acquire */
    errno = before;
}

/* Says what went wrong, and frees it. */
static int failed(lease_error_t *error) {
    fprintf(stderr, "%s\n", lease_error_message(error));
    lease_error_free(error);
    return 1;
}

/* The write says under which token it is made, so that whoever keeps the row can refuse an older one:
 * UPDATE report SET body = ?, fence = :token WHERE id = ? AND fence <= :token */
static void write_row(int row, int64_t token) {
    struct timespec a_while = {0, 20000000};
    printf("row %d, fence %lld\n", row, (long long)token);
    fflush(stdout);
    nanosleep(&a_while, NULL);
}

static int work(const lease_t *lease) {
    lease_error_t *error = NULL;
    for (int row = 0; row < 5; row++) {
        if (stopped) {
            puts("interrupted");
            return 130;
        }
        /* Lost: somebody else may be next, so no more writes. */
        if (lease_check(lease, &error) != LEASE_OK) return failed(error);
        write_row(row, lease_token(lease));
    }
    puts("done");
    return 0;
}

int main(int count, char **arguments) {
    const char *url = count > 1 ? arguments[1] : "sqlite:jobs.db";
    lease_error_t *error = NULL;
    lease_manager_t *manager = NULL;
    lease_options_t *options = lease_options_new();
    lease_t *lease = NULL;
    int status;

    if (pipe2(stop_pipe, O_CLOEXEC | O_NONBLOCK) != 0) return 1;
    signal(SIGINT, on_signal);
    signal(SIGTERM, on_signal);
    if (lease_version_check(LEASE_VERSION_NUMBER, &error) != LEASE_OK ||
        lease_options_set(options, "ttl", "15s", &error) != LEASE_OK ||
        lease_options_set_cancel_fd(options, stop_pipe[0], &error) != LEASE_OK ||
        lease_manager_open(url, NULL, &manager, &error) != LEASE_OK ||
        lease_manager_acquire(manager, "nightly", 60000, options, &lease, &error) != LEASE_OK) {
        status = failed(error);
    } else {
        status = work(lease);
        /* Only after the work. Of a lost one it says so again; one whose store cannot be told expires. */
        if (lease_release(lease, &error) != LEASE_OK) {
            if (lease_error_status(error) == LEASE_ERR_LOST) status = 1;
            failed(error);
        }
    }
    lease_free(lease);
    lease_options_free(options);
    if (manager != NULL && lease_manager_close(manager, &error) != LEASE_OK) failed(error);
    lease_manager_free(manager);
    return status;
}
