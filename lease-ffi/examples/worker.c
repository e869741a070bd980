/*
 * A blocking worker: waits for its turn, works step by step, and stops at once when the lease is lost or Ctrl-C is pressed.
 *
 *     cc worker.c $(pkg-config --cflags --libs lease) -o worker && ./worker sqlite:jobs.db
 */
#include <lease.h>

#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

static int stop_pipe[2];
static volatile sig_atomic_t stopped;

static void on_signal(int number) {
    (void)number;
    stopped = 1;
    (void)!write(stop_pipe[1], "x", 1); /* ends the wait of lease_manager_acquire */
}

static void die(lease_error_t *error) {
    fprintf(stderr, "%s\n", lease_error_message(error));
    lease_error_free(error);
    exit(1);
}

/* The write says under which token it is made, so that whoever keeps the row can refuse an older one:
 * UPDATE report SET body = ?, fence = :token WHERE id = ? AND fence <= :token */
static void write_row(int row, int64_t token) {
    printf("row %d, fence %lld\n", row, (long long)token);
    usleep(20000);
}

int main(int count, char **arguments) {
    lease_error_t *error = NULL;
    lease_manager_t *manager = NULL;
    lease_options_t *options = lease_options_new();
    lease_t *lease = NULL;

    if (lease_version_check(LEASE_VERSION_NUMBER, &error) != LEASE_OK) die(error);
    if (pipe(stop_pipe) != 0) return 1;
    signal(SIGINT, on_signal);
    signal(SIGTERM, on_signal);
    if (lease_options_set(options, "ttl", "15s", &error) != LEASE_OK ||
        lease_options_set_cancel_fd(options, stop_pipe[0], &error) != LEASE_OK) {
        die(error);
    }
    if (lease_manager_open(count > 1 ? arguments[1] : "sqlite:jobs.db", NULL, &manager, &error) != LEASE_OK) {
        die(error);
    }
    switch (lease_manager_acquire(manager, "nightly", 60000, options, &lease, &error)) {
    case LEASE_OK:
        for (int row = 0; row < 5 && !stopped; row++) {
            if (lease_check(lease, &error) != LEASE_OK) die(error); /* somebody else may be next: no more writes */
            write_row(row, lease_token(lease));
        }
        if (lease_release(lease, &error) != LEASE_OK) die(error);
        puts("done");
        break;
    case LEASE_ERR_CANCELLED:
        lease_error_free(error);
        puts("gave up");
        break;
    default:
        die(error);
    }
    lease_free(lease);
    lease_options_free(options);
    if (lease_manager_close(manager, &error) != LEASE_OK) die(error);
    lease_manager_free(manager);
    return 0;
}
