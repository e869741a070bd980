/* What every test in C begins with: a condition that does not hold ends the test, and says where. */
#ifndef CHECK_H
#define CHECK_H

#include <lease.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define CHECK(condition)                                                                        \
    do {                                                                                        \
        if (!(condition)) {                                                                     \
            fprintf(stderr, "%s:%d: does not hold: %s\n", __FILE__, __LINE__, #condition);      \
            exit(1);                                                                            \
        }                                                                                       \
    } while (0)

/* The call came to `wanted`; the message of its error has `words` in it. Frees the error. */
#define CHECK_STATUS(wanted, words, call)                                                       \
    do {                                                                                        \
        lease_error_t *error = NULL;                                                            \
        lease_status status = (call);                                                           \
        const char *message = error == NULL ? "" : lease_error_message(error);                  \
        if (status != (wanted) || strstr(message, (words)) == NULL ||                           \
            (error != NULL && lease_error_status(error) != status) ||                           \
            (error == NULL) != (status == LEASE_OK)) {                                          \
            fprintf(stderr, "%s:%d: %s: got %s (%s), wanted %s (%s)\n", __FILE__, __LINE__,     \
                    #call, lease_status_name(status), message, lease_status_name(wanted), words); \
            exit(1);                                                                            \
        }                                                                                       \
        lease_error_free(error);                                                                \
    } while (0)

/* Waits for what another thread does: fails after ten seconds. */
#define EVENTUALLY(condition)                                                                   \
    do {                                                                                        \
        int64_t until = now_ms() + 10000;                                                       \
        while (!(condition)) {                                                                  \
            CHECK(now_ms() < until);                                                            \
            struct timespec moment = {0, 1000000};                                              \
            nanosleep(&moment, NULL);                                                           \
        }                                                                                       \
    } while (0)

#define CHECK_OK(call) CHECK_STATUS(LEASE_OK, "", call)

/* The clock that counts through suspend, as the library's does. */
static inline int64_t now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_BOOTTIME, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

static inline int64_t now_ms(void) {
    return now_ns() / 1000000;
}

/* 1: it is, 0: not within the time. */
static inline int readable(int fd, int timeout_ms) {
    struct pollfd polled;
    polled.fd = fd;
    polled.events = POLLIN;
    polled.revents = 0;
    return poll(&polled, 1, timeout_ms);
}

#endif
