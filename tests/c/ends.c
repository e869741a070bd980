/* Calls from atexit and from destructors of thread-specific data, when what Rust keeps for a thread is gone. */
#define _GNU_SOURCE
#include "check.h"

#include <pthread.h>

static lease_manager_t *until_exit;
static lease_t *held_until_exit;
static pthread_key_t last_act;

static void at_the_very_end(void *data) {
    lease_t *l = data;
    CHECK_OK(lease_release(l, &error));
    lease_free(l);
    CHECK_OK(lease_manager_acquire(until_exit, "again", 10000, NULL, &l, &error));
    CHECK_STATUS(LEASE_ERR_TIMEOUT, "held by", lease_manager_acquire(until_exit, "again", 20, NULL, &l, &error));
    lease_free(l);
}

static void at_exit(void) {
    at_the_very_end(held_until_exit);
    CHECK_OK(lease_manager_close(until_exit, &error));
    lease_manager_free(until_exit);
    puts("ok");
}

static void *end_with_lease(void *lease) {
    CHECK_OK(lease_check(lease, &error));
    CHECK(pthread_setspecific(last_act, lease) == 0);
    return NULL;
}

int main(void) {
    pthread_t thread;
    lease_t *l = NULL;
    CHECK_OK(lease_manager_open("memory:", NULL, &until_exit, &error));
    CHECK_OK(lease_manager_acquire(until_exit, "thread", 0, NULL, &l, &error));
    CHECK_OK(lease_manager_acquire(until_exit, "exit", 0, NULL, &held_until_exit, &error));
    CHECK(pthread_key_create(&last_act, at_the_very_end) == 0);
    CHECK(pthread_create(&thread, NULL, end_with_lease, l) == 0 && pthread_join(thread, NULL) == 0);
    CHECK_STATUS(LEASE_ERR_INVALID, "freed", lease_check(l, &error));
    CHECK(atexit(at_exit) == 0);
    /* at_exit says that all is well. */
    return 0;
}
