/* Fifty contenders for one name on one SQLite file, as threads or as processes, with fenced writes.
 *
 *     contention threads|processes|unlocked DIRECTORY
 *
 * Every grant is noted in DIRECTORY/PID.journal: who, which token, and from when to when its holder believed in it.
 * `unlocked` takes no lease: it shows that the checks see what they are for.
 */
#define _GNU_SOURCE
#include "check.h"

#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <stdarg.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

enum { CONTENDERS = 50, GRANTS = 40 };

/* What all contenders share. Nothing but the lease keeps `count` from losing updates. */
typedef struct {
    int inside, overlaps, disorder, refused, done;
    int64_t count, fence;
} resource_t;

static resource_t *resource;
static const char *directory;
static bool unlocked;
static int journal = -1;
static lease_manager_t *manager;

/* Refuses a token that is older than one it has seen. */
static bool fenced_write(int64_t token) {
    if (token < resource->fence) {
        __atomic_add_fetch(&resource->refused, 1, __ATOMIC_SEQ_CST);
        return false;
    }
    resource->fence = token;
    volatile int64_t *count = &resource->count;
    int64_t before = *count;
    sched_yield();
    *count = before + 1;
    return true;
}

static void note(const char *format, ...) {
    char line[200];
    va_list values;
    va_start(values, format);
    int length = vsnprintf(line, sizeof line, format, values);
    va_end(values);
    /* One write a line: appended whole. */
    CHECK(write(journal, line, (size_t)length) == length);
}

static void open_all(void) {
    char text[512];
    snprintf(text, sizeof text, "%s/%d.journal", directory, (int)getpid());
    journal = open(text, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0666);
    CHECK(journal >= 0);
    snprintf(text, sizeof text, "sqlite:%s/jobs.db?ttl=10s", directory);
    if (!unlocked) CHECK_OK(lease_manager_open(text, NULL, &manager, &error));
}

static void close_all(void) {
    if (!unlocked) CHECK_OK(lease_manager_close(manager, &error));
    lease_manager_free(manager);
    close(journal);
}

static void contend(int contender) {
    for (int at = 0; at < GRANTS; at++) {
        lease_t *l = NULL;
        int64_t asked = now_ns(), token = 1;
        if (!unlocked) {
            CHECK_OK(lease_manager_acquire(manager, "nightly", 60000, NULL, &l, &error));
            token = lease_token(l);
        }
        int64_t granted = now_ns();
        if (__atomic_fetch_add(&resource->inside, 1, __ATOMIC_SEQ_CST) != 0) {
            __atomic_add_fetch(&resource->overlaps, 1, __ATOMIC_SEQ_CST);
        }
        if (!unlocked && token <= resource->fence) __atomic_add_fetch(&resource->disorder, 1, __ATOMIC_SEQ_CST);
        if (!unlocked) CHECK_OK(lease_check(l, &error));
        fenced_write(token);
        __atomic_sub_fetch(&resource->inside, 1, __ATOMIC_SEQ_CST);
        note("grant %d %d %lld %lld %lld\n", (int)getpid(), contender, (long long)token, (long long)asked,
             (long long)granted);
        note("end %d %lld %lld Released\n", (int)getpid(), (long long)token, (long long)now_ns());
        if (!unlocked) CHECK_OK(lease_release(l, &error));
        lease_free(l);
    }
    __atomic_add_fetch(&resource->done, 1, __ATOMIC_SEQ_CST);
}

static void *thread(void *contender) {
    contend((int)(intptr_t)contender);
    return NULL;
}

static void by_threads(void) {
    pthread_t threads[CONTENDERS];
    open_all();
    for (int at = 0; at < CONTENDERS; at++) {
        CHECK(pthread_create(&threads[at], NULL, thread, (void *)(intptr_t)at) == 0);
    }
    for (int at = 0; at < CONTENDERS; at++) CHECK(pthread_join(threads[at], NULL) == 0);
    close_all();
}

static void by_processes(void) {
    for (int at = 0; at < CONTENDERS; at++) {
        pid_t child = fork();
        CHECK(child >= 0);
        if (child == 0) {
            open_all();
            contend(at);
            close_all();
            exit(0);
        }
    }
    for (int at = 0; at < CONTENDERS; at++) {
        int status;
        CHECK(wait(&status) > 0 && status == 0);
    }
}

int main(int count, char **arguments) {
    CHECK(count == 3);
    directory = arguments[2];
    unlocked = strcmp(arguments[1], "unlocked") == 0;
    resource = mmap(NULL, sizeof *resource, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    CHECK(resource != MAP_FAILED);
    if (strcmp(arguments[1], "threads") == 0) {
        by_threads();
    } else {
        CHECK(unlocked || strcmp(arguments[1], "processes") == 0);
        by_processes();
    }
    CHECK(resource->done == CONTENDERS);
    printf("%lld writes, %d overlaps, %d tokens out of order\n", (long long)resource->count, resource->overlaps,
           resource->disorder);
    if (unlocked) {
        CHECK(resource->overlaps > 0);
    } else {
        CHECK(resource->overlaps == 0 && resource->disorder == 0 && resource->refused == 0);
        CHECK(resource->count == CONTENDERS * GRANTS);
        /* A holder that wakes up now is too late. */
        CHECK(!fenced_write(resource->fence - 1) && resource->refused == 1);
    }
    puts("ok");
    return 0;
}
