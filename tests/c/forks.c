/* A forked child has none of its parent's handles, and harms none of its leases. */
#define _GNU_SOURCE
#include "check.h"

#include <pthread.h>
#include <sys/wait.h>
#include <unistd.h>

static lease_manager_t *memory, *file;
static lease_t *in_memory, *in_file;
static const char *directory;
static int stop;

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
    lease_free(in_memory), lease_free(in_file);
    lease_manager_free(memory), lease_manager_free(file);
}

/* The child has managers of its own. */
static void anew(void) {
    lease_manager_t *m = NULL;
    lease_t *l = NULL;
    /* This one its parent has open: SQLite would count on locks that a child does not have. */
    CHECK_STATUS(LEASE_ERR_FORKED, "was open when this process was forked",
                 lease_manager_open(url("jobs.db"), NULL, &m, &error));
    CHECK_OK(lease_manager_open(url("other.db"), NULL, &m, &error));
    CHECK_OK(lease_manager_acquire(m, "n", 5000, NULL, &l, &error));
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

static void *busy(void *data) {
    (void)data;
    while (!__atomic_load_n(&stop, __ATOMIC_SEQ_CST)) {
        lease_t *l = NULL;
        lease_check(in_memory, NULL);
        if (lease_manager_acquire(memory, "busy", 1000, NULL, &l, NULL) == LEASE_OK) lease_free(l);
    }
    return NULL;
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

int main(int count, char **arguments) {
    CHECK(count == 2);
    directory = arguments[1];
    CHECK_OK(lease_manager_open("memory:shared", NULL, &memory, &error));
    CHECK_OK(lease_manager_open(url("jobs.db"), NULL, &file, &error));
    CHECK_OK(lease_manager_acquire(memory, "n", 0, NULL, &in_memory, &error));
    CHECK_OK(lease_manager_acquire(file, "n", 0, NULL, &in_file, &error));
    child_of(child_and_grandchild);

    /* Forked from the middle of other threads' calls. */
    pthread_t threads[2];
    for (int at = 0; at < 2; at++) CHECK(pthread_create(&threads[at], NULL, busy, NULL) == 0);
    for (int at = 0; at < 100; at++) child_of(inherited);
    __atomic_store_n(&stop, 1, __ATOMIC_SEQ_CST);
    for (int at = 0; at < 2; at++) CHECK(pthread_join(threads[at], NULL) == 0);

    /* The parent noticed nothing. */
    CHECK_OK(lease_confirm(in_memory, &error));
    CHECK_OK(lease_confirm(in_file, &error));
    lease_free(in_memory), lease_free(in_file);
    CHECK_OK(lease_manager_close(memory, &error));
    CHECK_OK(lease_manager_close(file, &error));
    lease_manager_free(memory), lease_manager_free(file);
    child_of(child_of_closed);
    puts("ok");
    return 0;
}
