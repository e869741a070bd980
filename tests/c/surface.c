/* Every function once, and what each says to wrong arguments. */
#define _GNU_SOURCE
#include "check.h"

#include <fcntl.h>
#include <pthread.h>
#include <unistd.h>

static void versions(void) {
    CHECK(strcmp(lease_version(), LEASE_VERSION) == 0);
    CHECK(lease_version_number() == LEASE_VERSION_NUMBER);
    CHECK_OK(lease_version_check(LEASE_VERSION_NUMBER, &error));
    CHECK_STATUS(LEASE_ERR_UNSUPPORTED, "argument header is 1.2.3", lease_version_check(1002003, &error));
    CHECK(LEASE_WAIT_FOREVER == -1 && LEASE_TRY_ONCE == 0);
    CHECK(strcmp(lease_status_name(LEASE_ERR_LOST), "LEASE_ERR_LOST") == 0);
    CHECK(strcmp(lease_status_name(99), "LEASE_ERR_?") == 0);
}

static int64_t waiting(lease_manager_t *m, const char *name) {
    lease_record_t *record = NULL;
    CHECK_OK(lease_manager_inspect(m, name, &record, &error));
    int64_t waiting = lease_record_waiting(record);
    lease_record_free(record);
    return waiting;
}

static void verbs(lease_manager_t *m) {
    lease_t *l = NULL, *second = NULL;
    int fd = -1;
    CHECK_OK(lease_manager_ping(m, &error));
    CHECK_OK(lease_manager_acquire(m, "nightly", LEASE_WAIT_FOREVER, NULL, &l, &error));
    CHECK(lease_token(l) >= 1 && lease_is_held(l) && lease_end_reason(l) == -1);
    CHECK(strcmp(lease_name(l), "nightly") == 0);
    CHECK(lease_remaining_ms(l) > 0 && lease_remaining_ms(l) <= 15000);
    CHECK_OK(lease_check(l, &error));
    CHECK_OK(lease_confirm(l, &error));
    CHECK_OK(lease_cancelled_fd(l, &fd, &error));
    CHECK(readable(fd, 0) == 0);

    lease_error_t *error = NULL;
    CHECK(lease_manager_acquire(m, "nightly", LEASE_TRY_ONCE, NULL, &second, &error) == LEASE_ERR_TIMEOUT);
    CHECK(second == NULL && lease_error_is_retryable(error) && !lease_error_is_in_doubt(error));
    CHECK(strcmp(lease_error_name(error), "nightly") == 0 && lease_error_holder(error) != NULL);
    CHECK(lease_error_reason(error) == -1);
    lease_error_free(error);
    CHECK_STATUS(LEASE_ERR_TIMEOUT, "held by", lease_manager_acquire(m, "nightly", 50, NULL, &second, &error));

    /* The wait that timed out leaves the line in the background. */
    EVENTUALLY(waiting(m, "nightly") == 0);
    lease_record_t *record = NULL;
    CHECK_OK(lease_manager_inspect(m, "nightly", &record, &error));
    CHECK(lease_record_token(record) == lease_token(l) && lease_record_ttl_ms(record) == 30000);
    CHECK(strcmp(lease_record_name(record), "nightly") == 0 && lease_record_owner(record) != NULL);
    CHECK(lease_record_held_ms(record) >= 0);
    lease_record_free(record);
    CHECK_OK(lease_manager_inspect(m, "free", &record, &error));
    CHECK(record == NULL);

    lease_records_t *records = NULL;
    CHECK_OK(lease_manager_list(m, "night", &records, &error));
    CHECK(lease_records_count(records) == 1 && lease_record_token(lease_records_at(records, 0)) == lease_token(l));
    CHECK(lease_records_at(records, 1) == NULL);
    lease_records_free(records);

    lease_watch_t *watch = NULL;
    CHECK_OK(lease_manager_watch(m, "nightly", &watch, &error));
    CHECK_OK(lease_watch_next(watch, 5000, &record, &error));
    CHECK(lease_record_token(record) == lease_token(l));
    lease_record_free(record);
    CHECK_STATUS(LEASE_ERR_TIMEOUT, "nothing changed", lease_watch_next(watch, 20, &record, &error));

    CHECK_OK(lease_release(l, &error));
    CHECK_OK(lease_release(l, &error));
    CHECK(readable(fd, 5000) == 1 && lease_end_reason(l) == LEASE_END_RELEASED && lease_token(l) >= 1);
    CHECK_STATUS(LEASE_ERR_LOST, "released", lease_check(l, &error));
    CHECK_OK(lease_watch_next(watch, 5000, &record, &error));
    CHECK(record == NULL);
    lease_watch_free(watch);
    lease_free(l);
    CHECK_STATUS(LEASE_ERR_NOT_FOUND, "token 1", lease_manager_break(m, "nightly", 1, &error));
}

static void count(int32_t reason, void *data) {
    __atomic_store_n((int *)data, 100 + reason, __ATOMIC_SEQ_CST);
}

static void freed(void *data) {
    __atomic_add_fetch(&((int *)data)[1], 1, __ATOMIC_SEQ_CST);
}

/* A loss reaches the descriptor and the callback; a release reaches no callback. */
static void losses(lease_manager_t *m) {
    lease_t *l = NULL;
    int fd = -1, told[2] = {0, 0}, late[2] = {0, 0}, never[2] = {0, 0};
    CHECK_OK(lease_manager_acquire(m, "lost", 0, NULL, &l, &error));
    CHECK_OK(lease_on_lost(l, count, told, freed, &error));
    CHECK_OK(lease_cancelled_fd(l, &fd, &error));
    CHECK_OK(lease_manager_break(m, "lost", lease_token(l), &error));
    CHECK_STATUS(LEASE_ERR_LOST, "gone", lease_confirm(l, &error));
    CHECK(readable(fd, 5000) == 1 && !lease_is_held(l) && lease_end_reason(l) == LEASE_END_GONE);
    CHECK_OK(lease_on_lost(l, count, late, freed, &error));
    CHECK_STATUS(LEASE_ERR_LOST, "gone", lease_release(l, &error));
    EVENTUALLY(__atomic_load_n(&late[1], __ATOMIC_SEQ_CST) == 1 && __atomic_load_n(&told[1], __ATOMIC_SEQ_CST) == 1);
    CHECK(told[0] == 100 + LEASE_END_GONE && told[1] == 1);
    CHECK(late[0] == 100 + LEASE_END_GONE && late[1] == 1);
    lease_free(l);

    CHECK_OK(lease_manager_acquire(m, "kept", 0, NULL, &l, &error));
    CHECK_OK(lease_on_lost(l, count, never, freed, &error));
    lease_free(l);
    EVENTUALLY(__atomic_load_n(&never[1], __ATOMIC_SEQ_CST) == 1);
    CHECK(never[0] == 0 && never[1] == 1);
    CHECK_STATUS(LEASE_ERR_INVALID, "l is no lease_t", lease_on_lost(l, count, never, freed, &error));
    CHECK(never[1] == 2);
}

/* An acquire that does not block; one that a descriptor ends; one that is given up. */
static void waits(lease_manager_t *m) {
    lease_t *l = NULL, *taken = NULL;
    lease_pending_t *p = NULL;
    lease_options_t *o = lease_options_new();
    int fd = -1, ends[2];
    CHECK(pipe(ends) == 0);
    CHECK_OK(lease_manager_acquire(m, "loop", 0, NULL, &l, &error));
    CHECK_OK(lease_manager_acquire_start(m, "loop", LEASE_WAIT_FOREVER, NULL, &p, &error));
    CHECK_OK(lease_pending_fd(p, &fd, &error));
    CHECK(readable(fd, 0) == 0);
    CHECK_STATUS(LEASE_ERR_TIMEOUT, "still waits", lease_pending_take(p, &taken, &error));
    CHECK_OK(lease_release(l, &error));
    CHECK(readable(fd, 5000) == 1);
    CHECK_OK(lease_pending_take(p, &taken, &error));
    CHECK(lease_token(taken) > lease_token(l) && readable(fd, 0) == 1);
    CHECK_STATUS(LEASE_ERR_INVALID, "taken before", lease_pending_take(p, &l, &error));
    lease_pending_free(p);
    lease_free(l);

    CHECK_OK(lease_options_set_cancel_fd(o, ends[0], &error));
    CHECK_OK(lease_manager_acquire_start(m, "loop", LEASE_WAIT_FOREVER, o, &p, &error));
    CHECK_OK(lease_pending_fd(p, &fd, &error));
    CHECK(readable(fd, 0) == 0);
    CHECK(write(ends[1], "x", 1) == 1);
    CHECK(readable(fd, 5000) == 1);
    CHECK_STATUS(LEASE_ERR_CANCELLED, "cancel fd", lease_pending_take(p, &l, &error));
    lease_pending_free(p);
    CHECK_STATUS(LEASE_ERR_CANCELLED, "cancel fd", lease_manager_acquire(m, "loop", LEASE_WAIT_FOREVER, o, &l, &error));
    lease_options_free(o);

    /* A lease that was granted and not taken is released. */
    CHECK_OK(lease_manager_acquire_start(m, "other", LEASE_WAIT_FOREVER, NULL, &p, &error));
    lease_pending_free(p);
    CHECK_OK(lease_manager_acquire(m, "other", 5000, NULL, &l, &error));
    lease_free(l);
    lease_free(taken);
    close(ends[0]);
    close(ends[1]);
}

static int calls;

static void *next_for_ever(void *data) {
    lease_record_t *record = NULL;
    /* Each call but the last is begun before the watch is freed. */
    while (lease_watch_next(data, LEASE_WAIT_FOREVER, &record, NULL) == LEASE_OK) {
        lease_record_free(record);
        __atomic_add_fetch(&calls, 1, __ATOMIC_SEQ_CST);
    }
    CHECK(lease_watch_next(data, LEASE_WAIT_FOREVER, &record, NULL) == LEASE_ERR_INVALID);
    return NULL;
}

/* A watch that another thread waits with keeps nobody longer than he asked for, and freeing it ends the wait. */
static void watches(lease_manager_t *m) {
    lease_watch_t *watch = NULL;
    lease_record_t *record = NULL;
    pthread_t thread;
    CHECK_OK(lease_manager_watch(m, "watched", &watch, &error));
    CHECK(pthread_create(&thread, NULL, next_for_ever, watch) == 0);
    /* It has had the first record, and waits for a change that does not come. */
    EVENTUALLY(__atomic_load_n(&calls, __ATOMIC_SEQ_CST) == 1);
    int64_t since = now_ms();
    CHECK_STATUS(LEASE_ERR_TIMEOUT, "nothing changed", lease_watch_next(watch, 50, &record, &error));
    CHECK(now_ms() - since < 5000);
    lease_watch_free(watch);
    CHECK(pthread_join(thread, NULL) == 0);
    CHECK_STATUS(LEASE_ERR_INVALID, "name", lease_manager_watch(m, "", &watch, &error));
}

static void fences(void) {
    lease_fence_t *f = lease_fence_new();
    CHECK_OK(lease_fence_enter(f, "row", 8, &error));
    CHECK_OK(lease_fence_leave(f, "row", 8, &error));
    CHECK_STATUS(LEASE_ERR_NOT_FOUND, "token 8", lease_fence_leave(f, "row", 8, &error));
    CHECK_STATUS(LEASE_ERR_LOST, "", lease_fence_enter(f, "row", 7, &error));
    CHECK_STATUS(LEASE_ERR_INVALID, "token", lease_fence_enter(f, "row", 0, &error));
    lease_fence_free(f);
}

static void wrong_arguments(lease_manager_t *m) {
    lease_manager_t *out = NULL;
    lease_t *l = NULL;
    lease_options_t *o = lease_options_new();
    char name[515] = "";
    memset(name, 'n', 513);
    CHECK_STATUS(LEASE_ERR_INVALID, "out is NULL", lease_manager_open("memory:", NULL, NULL, &error));
    CHECK_STATUS(LEASE_ERR_INVALID, "no scheme", lease_manager_open("jobs.db", NULL, &out, &error));
    CHECK_STATUS(LEASE_ERR_INVALID, "url is not UTF-8, at byte 7", lease_manager_open("memory:\xff", NULL, &out, &error));
    CHECK_STATUS(LEASE_ERR_INVALID, "name is NULL", lease_manager_acquire(m, NULL, 0, NULL, &l, &error));
    CHECK_STATUS(LEASE_ERR_INVALID, "name is not UTF-8", lease_manager_acquire(m, "\xc3(", 0, NULL, &l, &error));
    CHECK_STATUS(LEASE_ERR_INVALID, "512", lease_manager_acquire(m, name, 0, NULL, &l, &error));
    CHECK_STATUS(LEASE_ERR_INVALID, "name", lease_manager_acquire(m, "", 0, NULL, &l, &error));
    CHECK_STATUS(LEASE_ERR_INVALID, "timeout_ms is -2", lease_manager_acquire(m, "n", -2, NULL, &l, &error));
    CHECK_STATUS(LEASE_ERR_INVALID, "did you mean \"ttl\"", lease_options_set(o, "tll", "1s", &error));
    CHECK_STATUS(LEASE_ERR_INVALID, "number and a unit", lease_options_set(o, "ttl", "15", &error));
    CHECK_STATUS(LEASE_ERR_INVALID, "value is NULL", lease_options_set(o, "ttl", NULL, &error));
    CHECK_STATUS(LEASE_ERR_INVALID, "fd is 999, which is not open", lease_options_set_cancel_fd(o, 999, &error));
    int file = open("/proc/self/status", O_RDONLY | O_CLOEXEC);
    CHECK(file >= 0);
    CHECK_STATUS(LEASE_ERR_INVALID, "of a file or directory", lease_options_set_cancel_fd(o, file, &error));
    close(file);
    lease_pending_t *p = NULL;
    CHECK_STATUS(LEASE_ERR_INVALID, "name", lease_manager_acquire_start(m, "", 0, NULL, &p, &error));
    CHECK_STATUS(LEASE_ERR_INVALID, "no\\nsuch", lease_manager_open("sqlite:no\nsuch/jobs.db", NULL, &out, &error));
    CHECK_OK(lease_options_set(o, "ttl", "1ms", &error));
    CHECK_STATUS(LEASE_ERR_INVALID, "too short", lease_manager_acquire(m, "n", 0, o, &l, &error));
    lease_options_free(o);
    o = lease_options_new();
    CHECK_OK(lease_options_set(o, "timeout", "1s", &error));
    CHECK_STATUS(LEASE_ERR_INVALID, "argument timeout_ms", lease_manager_acquire(m, "n", 0, o, &l, &error));
    CHECK_OK(lease_manager_open("memory:", o, &out, &error));
    lease_manager_free(out);
    out = NULL;
    lease_options_free(o);
    o = lease_options_new();
    CHECK_OK(lease_options_set(o, "request_timeout", "1s", &error));
    CHECK_STATUS(LEASE_ERR_INVALID, "the manager's", lease_manager_acquire(m, "n", 0, o, &l, &error));
    CHECK(out == NULL && l == NULL);

    /* Of another kind, freed, made up, NULL. */
    CHECK_STATUS(LEASE_ERR_INVALID, "m is a handle, but of no lease_manager_t",
                 lease_manager_ping((lease_manager_t *)(void *)o, &error));
    lease_options_free(o);
    lease_options_free(o);
    CHECK_STATUS(LEASE_ERR_INVALID, "o is no lease_options_t", lease_options_set(o, "ttl", "1s", &error));
    CHECK_STATUS(LEASE_ERR_INVALID, "m is no lease_manager_t", lease_manager_ping((lease_manager_t *)(void *)name, &error));
    CHECK_STATUS(LEASE_ERR_INVALID, "l is NULL", lease_check(NULL, &error));
    CHECK(lease_end_reason(NULL) == -2 && lease_remaining_ms(NULL) == 0);
    CHECK(lease_token((lease_t *)(void *)m) == 0 && lease_name(NULL) == NULL && !lease_is_held(NULL));
    CHECK(lease_manager_ping(NULL, NULL) == LEASE_ERR_INVALID);
    lease_free((lease_t *)(void *)m);
    CHECK_OK(lease_manager_ping(m, &error));
    lease_manager_free(NULL), lease_free(NULL), lease_error_free(NULL), lease_options_free(NULL);
    lease_record_free(NULL), lease_records_free(NULL), lease_watch_free(NULL), lease_pending_free(NULL);
    lease_fence_free(NULL);
}

static int lines;

static void log_line(int level, const char *message, void *data) {
    CHECK(level >= LEASE_LOG_ERROR && level <= LEASE_LOG_DEBUG && message[0] != '\0');
    __atomic_add_fetch((int *)data, 1, __ATOMIC_SEQ_CST);
}

static void late_callback(int32_t reason, void *data) {
    CHECK(reason == LEASE_END_GONE);
    __atomic_add_fetch((int *)data, 1, __ATOMIC_SEQ_CST);
}

/* A loss is told to a callback though the manager was closed since. */
static void told_after_close(void) {
    lease_manager_t *m = NULL;
    lease_t *lost = NULL, *held = NULL;
    int told = 0;
    CHECK_OK(lease_manager_open("memory:", NULL, &m, &error));
    CHECK_OK(lease_manager_acquire(m, "lost", 0, NULL, &lost, &error));
    CHECK_OK(lease_manager_acquire(m, "held", 0, NULL, &held, &error));
    CHECK_OK(lease_manager_break(m, "lost", lease_token(lost), &error));
    CHECK_STATUS(LEASE_ERR_LOST, "gone", lease_confirm(lost, &error));
    CHECK_OK(lease_manager_close(m, &error));
    CHECK_OK(lease_on_lost(lost, late_callback, &told, NULL, &error));
    CHECK_OK(lease_on_lost(held, late_callback, &told, NULL, &error));
    EVENTUALLY(__atomic_load_n(&told, __ATOMIC_SEQ_CST) == 1);
    CHECK(lease_end_reason(held) == LEASE_END_CLOSED);
    lease_free(lost), lease_free(held), lease_manager_free(m);
    CHECK(told == 1);
}

int main(void) {
    lease_manager_t *m = NULL;
    versions();
    told_after_close();
    lease_set_log(log_line, &lines);
    CHECK_OK(lease_manager_open("memory:", NULL, &m, &error));
    verbs(m);
    losses(m);
    waits(m);
    watches(m);
    fences();
    wrong_arguments(m);
    lease_watch_t *watch = NULL;
    lease_record_t *record = NULL;
    CHECK_OK(lease_manager_watch(m, "closed", &watch, &error));
    CHECK_OK(lease_manager_close(m, &error));
    CHECK_OK(lease_manager_close(m, &error));
    for (int at = 0; at < 4; at++) {
        CHECK_STATUS(LEASE_ERR_CLOSED, "", lease_watch_next(watch, 1000, &record, &error));
    }
    lease_watch_free(watch);
    CHECK_STATUS(LEASE_ERR_CLOSED, "closed", lease_manager_ping(m, &error));
    lease_manager_free(m);
    lease_manager_free(m);
    lease_set_log(NULL, NULL);
    CHECK(lines > 0);
    puts("ok");
    return 0;
}
