/* A forked child has none of its parent's handles, and harms none of its leases. */
#define _GNU_SOURCE
#include "check.h"

#include <pthread.h>
#include <sys/wait.h>
#include <unistd.h>

static lease_manager_t *memory, *file;
static lease_t *in_memory, *in_file;
static lease_pending_t *pending;
static lease_watch_t *watch;
static lease_options_t *options;
static lease_fence_t *fence;
static lease_error_t *failure;
static lease_record_t *record;
static const char *directory;
static int stop;

static void lost(int32_t reason, void *data) {
    (void)reason, (void)data;
    CHECK(!"nothing was lost");
}

static void count_free(void *data) {
    ++*(int *)data;
}

static void no_log(int level, const char *message, void *data) {
    (void)level, (void)message, (void)data;
}

static char *url(const char *name) {
    static char text[512];
    snprintf(text, sizeof text, "sqlite:%s/%s", directory, name);
    return text;
}

/* What is inherited says so, and its _free does nothing. */
static void inherited(void) {
    int fd = -1;
    lease_t *l = NULL;
    CHECK_STATUS(LEASE_ERR_FORKED, "parent", lease_check(in_memory, &error));
    CHECK_STATUS(LEASE_ERR_FORKED, "parent", lease_check(in_file, &error));
    CHECK_STATUS(LEASE_ERR_FORKED, "parent", lease_release(in_file, &error));
    CHECK_STATUS(LEASE_ERR_FORKED, "parent", lease_confirm(in_file, &error));
    CHECK_STATUS(LEASE_ERR_FORKED, "parent", lease_cancelled_fd(in_file, &fd, &error));
    CHECK_STATUS(LEASE_ERR_FORKED, "parent", lease_manager_ping(file, &error));
    CHECK_STATUS(LEASE_ERR_FORKED, "parent", lease_manager_acquire(file, "n", 0, NULL, &l, &error));
    CHECK_STATUS(LEASE_ERR_FORKED, "parent", lease_manager_close(memory, &error));
    CHECK(!lease_is_held(in_file) && lease_end_reason(in_file) == LEASE_END_FORKED && lease_token(in_file) == 0);
    int freed = 0;
    CHECK_STATUS(LEASE_ERR_FORKED, "parent", lease_on_lost(in_file, lost, &freed, count_free, &error));
    CHECK(freed == 1);
    CHECK_STATUS(LEASE_ERR_FORKED, "parent", lease_pending_take(pending, &l, &error));
    lease_record_t *r = NULL;
    CHECK_STATUS(LEASE_ERR_FORKED, "parent", lease_watch_next(watch, 0, &r, &error));
    CHECK_STATUS(LEASE_ERR_FORKED, "parent", lease_options_set(options, "ttl", "1s", &error));
    CHECK_STATUS(LEASE_ERR_FORKED, "parent", lease_fence_enter(fence, "row", 1, &error));
    CHECK(lease_error_status(failure) == LEASE_ERR_FORKED && lease_error_message(failure) != NULL);
    CHECK(lease_record_token(record) == 0 && lease_record_name(record) == NULL);
    lease_pending_free(pending), lease_watch_free(watch), lease_options_free(options);
    lease_fence_free(fence), lease_error_free(failure), lease_record_free(record);
    lease_free(in_memory), lease_free(in_file);
    lease_manager_free(memory), lease_manager_free(file);
}

/* The child has managers of its own. */
static void anew(void) {
    lease_manager_t *m = NULL;
    lease_t *l = NULL;
    /* The file that its parent has open, with the parent's lease in it. */
    CHECK_OK(lease_manager_open(url("jobs.db"), NULL, &m, &error));
    CHECK_STATUS(LEASE_ERR_TIMEOUT, "held by", lease_manager_acquire(m, "n", LEASE_TRY_ONCE, NULL, &l, &error));
    CHECK_OK(lease_manager_acquire(m, "child", 5000, NULL, &l, &error));
    CHECK(lease_is_held(l) && l != in_file && l != in_memory);
    CHECK_OK(lease_release(l, &error));
    lease_free(l);
    CHECK_OK(lease_manager_close(m, &error));
    lease_manager_free(m);
    /* A name of memory is a process's own. */
    CHECK_OK(lease_manager_open("memory:shared", NULL, &m, &error));
    CHECK_OK(lease_manager_acquire(m, "n", 0, NULL, &l, &error));
    lease_free(l);
    CHECK_OK(lease_manager_close(m, &error));
    lease_manager_free(m);
}

/* Opens, closes and acquires on the store of this URL all the time, so that a fork meets it anywhere. */
static void *busy(void *data) {
    while (!__atomic_load_n(&stop, __ATOMIC_SEQ_CST)) {
        lease_manager_t *m = NULL;
        lease_t *l = NULL;
        lease_check(in_memory, NULL);
        lease_set_log(no_log, NULL);
        CHECK_OK(lease_manager_open(data, NULL, &m, &error));
        for (int at = 0; at < 200; at++) {
            CHECK_OK(lease_manager_acquire(m, "busy", 10000, NULL, &l, &error));
            lease_free(l);
        }
        CHECK_OK(lease_manager_close(m, &error));
        lease_manager_free(m);
    }
    return NULL;
}

/* Makes and frees handles all the time, so that a fork meets their table locked. */
static void *churn(void *data) {
    (void)data;
    while (!__atomic_load_n(&stop, __ATOMIC_SEQ_CST)) lease_options_free(lease_options_new());
    return NULL;
}

static void inherited_and_anew(void) {
    inherited();
    lease_set_log(no_log, NULL);
    anew();
}

static void child_of(void (*body)(void)) {
    pid_t child = fork();
    CHECK(child >= 0);
    if (child == 0) {
        /* One that hangs is killed, and seen. */
        alarm(20);
        body();
        exit(0);
    }
    int status = 0;
    CHECK(waitpid(child, &status, 0) == child);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

/* SQLite's tables tell a child of locks that only its parent has. If its connection counted on them, the parent would close the
 * file as the last, and delete the log with the child's lease in it. */
static void child_outlives_its_parents_connection(void) {
    lease_manager_t *m = NULL;
    lease_t *l = NULL;
    int to_parent[2], to_child[2];
    char byte = 0;
    CHECK(pipe(to_parent) == 0 && pipe(to_child) == 0);
    CHECK_OK(lease_manager_open(url("outlived.db"), NULL, &m, &error));
    CHECK_OK(lease_manager_acquire(m, "parent", 0, NULL, &l, &error));
    lease_free(l);
    pid_t child = fork();
    CHECK(child >= 0);
    if (child == 0) {
        alarm(20);
        CHECK_OK(lease_manager_open(url("outlived.db"), NULL, &m, &error));
        CHECK_OK(lease_manager_acquire(m, "child", 0, NULL, &l, &error));
        CHECK(write(to_parent[1], &byte, 1) == 1 && read(to_child[0], &byte, 1) == 1);
        CHECK_OK(lease_confirm(l, &error));
        CHECK_OK(lease_release(l, &error));
        CHECK_OK(lease_manager_close(m, &error));
        exit(0);
    }
    CHECK(read(to_parent[0], &byte, 1) == 1);
    for (int at = 0; at < 2; at++) {
        CHECK_OK(lease_manager_close(m, &error));
        lease_manager_free(m);
        CHECK_OK(lease_manager_open(url("outlived.db"), NULL, &m, &error));
        CHECK_STATUS(LEASE_ERR_TIMEOUT, "held by", lease_manager_acquire(m, "child", 0, NULL, &l, &error));
    }
    CHECK(write(to_child[1], &byte, 1) == 1);
    int status = 0;
    CHECK(waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0);
    CHECK_OK(lease_manager_acquire(m, "child", 0, NULL, &l, &error));
    lease_free(l);
    CHECK_OK(lease_manager_close(m, &error));
    lease_manager_free(m);
}

static void child_and_grandchild(void) {
    inherited();
    anew();
    child_of(inherited);
}

static void child_of_closed(void) {
    lease_manager_t *m = NULL;
    lease_t *l = NULL;
    CHECK_OK(lease_manager_open(url("jobs.db"), NULL, &m, &error));
    CHECK_OK(lease_manager_acquire(m, "n", 5000, NULL, &l, &error));
    lease_free(l);
    CHECK_OK(lease_manager_close(m, &error));
}

/* Handlers of the program, registered before the library was used: they may call it, and hold locks of theirs. */
static bool handlers_call;
static pthread_mutex_t of_program = PTHREAD_MUTEX_INITIALIZER;

static void before_fork(void) {
    pthread_mutex_lock(&of_program);
    if (!handlers_call) return;
    lease_t *l = NULL;
    CHECK_OK(lease_manager_acquire(file, "handler", 10000, NULL, &l, &error));
    CHECK_OK(lease_release(l, &error));
    lease_free(l);
}

static void in_parent(void) {
    if (handlers_call) CHECK_OK(lease_manager_ping(file, &error));
    pthread_mutex_unlock(&of_program);
}

static void in_child(void) {
    pthread_mutex_unlock(&of_program);
    if (handlers_call) anew();
}

static void *lock_and_acquire(void *data) {
    (void)data;
    while (!__atomic_load_n(&stop, __ATOMIC_SEQ_CST)) {
        lease_t *l = NULL;
        pthread_mutex_lock(&of_program);
        CHECK_OK(lease_manager_acquire(file, "locked", 10000, NULL, &l, &error));
        lease_free(l);
        pthread_mutex_unlock(&of_program);
    }
    return NULL;
}

int main(int count, char **arguments) {
    CHECK(count == 2);
    directory = arguments[1];
    CHECK(pthread_atfork(before_fork, in_parent, in_child) == 0);
    alarm(100);
    CHECK_OK(lease_manager_open("memory:shared", NULL, &memory, &error));
    CHECK_OK(lease_manager_open(url("jobs.db"), NULL, &file, &error));
    CHECK_OK(lease_manager_acquire(memory, "n", 0, NULL, &in_memory, &error));
    CHECK_OK(lease_manager_acquire(file, "n", 0, NULL, &in_file, &error));
    CHECK_OK(lease_manager_acquire_start(memory, "n", LEASE_WAIT_FOREVER, NULL, &pending, &error));
    CHECK_OK(lease_manager_watch(memory, "n", &watch, &error));
    CHECK_OK(lease_manager_inspect(memory, "n", &record, &error));
    CHECK(lease_check(NULL, &failure) == LEASE_ERR_INVALID);
    options = lease_options_new();
    fence = lease_fence_new();
    child_of(child_and_grandchild);

    child_outlives_its_parents_connection();

    handlers_call = true;
    child_of(inherited);
    handlers_call = false;

    /* Forked from the middle of other threads' calls. */
    pthread_t threads[5];
    char urls[2][512];
    snprintf(urls[0], sizeof urls[0], "sqlite:%s/busy.db", directory);
    snprintf(urls[1], sizeof urls[1], "memory:busy");
    for (int at = 0; at < 4; at++) {
        CHECK(pthread_create(&threads[at], NULL, at < 2 ? busy : churn, at < 2 ? urls[at] : NULL) == 0);
    }
    CHECK(pthread_create(&threads[4], NULL, lock_and_acquire, NULL) == 0);
    for (int at = 0; at < 40; at++) child_of(inherited_and_anew);
    for (int at = 0; at < 200; at++) child_of(inherited);
    __atomic_store_n(&stop, 1, __ATOMIC_SEQ_CST);
    for (int at = 0; at < 5; at++) CHECK(pthread_join(threads[at], NULL) == 0);

    /* The parent noticed nothing. */
    CHECK_OK(lease_confirm(in_memory, &error));
    CHECK_OK(lease_confirm(in_file, &error));
    CHECK(lease_error_status(failure) == LEASE_ERR_INVALID && lease_record_token(record) == lease_token(in_memory));
    lease_pending_free(pending), lease_watch_free(watch), lease_options_free(options);
    lease_fence_free(fence), lease_error_free(failure), lease_record_free(record);
    lease_free(in_memory), lease_free(in_file);
    CHECK_OK(lease_manager_close(memory, &error));
    CHECK_OK(lease_manager_close(file, &error));
    lease_manager_free(memory), lease_manager_free(file);
    child_of(child_of_closed);
    puts("ok");
    return 0;
}
