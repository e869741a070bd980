/* The measured half of figures.rs: does what a line of its input says, and answers with nanoseconds. */
#define _GNU_SOURCE
#include <lease.h>

#include <poll.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>

static lease_manager_t *manager;

static void must(lease_status status) {
    if (status != LEASE_OK) {
        fprintf(stderr, "%s\n", lease_status_name(status));
        exit(1);
    }
}

static int64_t now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_BOOTTIME, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

static int order(const void *one, const void *other) {
    int64_t a = *(const int64_t *)one, b = *(const int64_t *)other;
    return (a > b) - (a < b);
}

/* Frees them. */
static int64_t median(int64_t *values, int count) {
    qsort(values, (size_t)count, sizeof *values, order);
    int64_t median = values[count / 2];
    free(values);
    return median;
}

static lease_t *acquire(const char *name, const lease_options_t *options) {
    lease_t *lease = NULL;
    must(lease_manager_acquire(manager, name, LEASE_WAIT_FOREVER, options, &lease, NULL));
    return lease;
}

/* A thread that waits for a descriptor, and notes when it had woken up. */
typedef struct {
    int start, fd;
    int64_t woken;
    pthread_barrier_t done;
} waiter_t;

static void *wait_for_fds(void *data) {
    waiter_t *waiter = data;
    uint64_t many;
    while (read(waiter->start, &many, sizeof many) == sizeof many && waiter->fd >= 0) {
        struct pollfd polled = {.fd = waiter->fd, .events = POLLIN, .revents = 0};
        while (poll(&polled, 1, -1) != 1) {
        }
        waiter->woken = now_ns();
        pthread_barrier_wait(&waiter->done);
    }
    return NULL;
}

static void signal_fd(int fd) {
    uint64_t one = 1;
    if (write(fd, &one, sizeof one) != sizeof one) exit(1);
}

/* The median time from an event to the waiter's being awake. */
static int64_t wakes(int times, const char *kind) {
    waiter_t waiter;
    pthread_t thread;
    lease_options_t *options = lease_options_new();
    int64_t *took = calloc((size_t)times, sizeof *took);
    waiter.start = eventfd(0, EFD_CLOEXEC);
    pthread_barrier_init(&waiter.done, NULL, 2);
    pthread_create(&thread, NULL, wait_for_fds, &waiter);
    must(lease_options_set(options, "ttl", "60ms", NULL));
    for (int at = 0; at < times; at++) {
        int raw = eventfd(0, EFD_CLOEXEC);
        lease_t *lease = NULL;
        int64_t began = now_ns();
        if (strcmp(kind, "raw") == 0) {
            waiter.fd = raw;
        } else {
            lease = acquire("lost", strcmp(kind, "beat") == 0 ? options : NULL);
            must(lease_cancelled_fd(lease, &waiter.fd, NULL));
            must(lease_manager_break(manager, "lost", lease_token(lease), NULL));
        }
        signal_fd(waiter.start);
        /* Until it waits in the kernel, as a thread does that waits for a loss. */
        for (int64_t until = now_ns() + 100000; now_ns() < until;) {
        }
        if (strcmp(kind, "beat") == 0) {
            /* The heartbeat asks at ttl/3, and hears of it then. */
            began += 20000000;
        } else {
            began = now_ns();
            if (lease == NULL) {
                signal_fd(raw);
            } else if (lease_confirm(lease, NULL) != LEASE_ERR_LOST) {
                exit(1);
            }
        }
        pthread_barrier_wait(&waiter.done);
        took[at] = waiter.woken - began;
        lease_free(lease);
        close(raw);
    }
    waiter.fd = -1;
    signal_fd(waiter.start);
    pthread_join(thread, NULL);
    close(waiter.start);
    lease_options_free(options);
    return median(took, times);
}

/* The median time from when a timer was due, after 20 ms, to its having been read. */
static int64_t timers(int times) {
    int64_t *took = calloc((size_t)times, sizeof *took);
    int timer = timerfd_create(CLOCK_BOOTTIME, TFD_CLOEXEC);
    for (int at = 0; at < times; at++) {
        int64_t due = now_ns() + 20000000;
        uint64_t fired;
        struct itimerspec when = {{0, 0}, {due / 1000000000, due % 1000000000}};
        timerfd_settime(timer, TFD_TIMER_ABSTIME, &when, NULL);
        if (read(timer, &fired, sizeof fired) != sizeof fired) exit(1);
        took[at] = now_ns() - due;
    }
    close(timer);
    return median(took, times);
}

int main(void) {
    char kind[16];
    int times;
    must(lease_manager_open("memory:", NULL, &manager, NULL));
    while (scanf("%15s %d", kind, &times) == 2) {
        double nanos;
        if (strcmp(kind, "check") == 0 || strcmp(kind, "clock") == 0) {
            lease_t *lease = acquire("checked", NULL);
            int64_t began = now_ns();
            for (int at = 0; at < times; at++) {
                if (kind[1] == 'h') {
                    must(lease_check(lease, NULL));
                } else if (now_ns() == 0) {
                    exit(1);
                }
            }
            nanos = (double)(now_ns() - began) / times;
            lease_free(lease);
        } else if (strcmp(kind, "pair") == 0) {
            int64_t began = now_ns();
            for (int at = 0; at < times; at++) {
                lease_t *lease = acquire("pair", NULL);
                must(lease_release(lease, NULL));
                lease_free(lease);
            }
            nanos = (double)(now_ns() - began) / times;
        } else {
            nanos = (double)(strcmp(kind, "timer") == 0 ? timers(times) : wakes(times, kind));
        }
        printf("%.1f\n", nanos);
        fflush(stdout);
    }
    must(lease_manager_close(manager, NULL));
    lease_manager_free(manager);
    return 0;
}
