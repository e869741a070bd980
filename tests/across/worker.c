/* Contenders in C for a name that those of other languages want too: see test_across.py.
 *
 *     worker work|unlocked URL DIRECTORY GRANTS CONTENDERS
 *     worker hold URL DIRECTORY
 */
#define _GNU_SOURCE
#include "../c/check.h"

#include <endian.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <unistd.h>

enum { PATIENCE_MS = 60000, MOST = 64 };

static int journal, resource;
static lease_manager_t *manager; /* NULL: no lease is taken */
static int grants;
static atomic_int granted, refused;
static atomic_llong made_up = 1;
static atomic_bool over;

static void note(const char *format, ...) {
    char line[200];
    va_list values;
    va_start(values, format);
    int length = vsnprintf(line, sizeof line, format, values);
    va_end(values);
    /* One write a line: appended whole. */
    CHECK(write(journal, line, (size_t)length) == length);
}

static void note_grant(int contender, int64_t token, int64_t asked, int64_t at) {
    note("grant %d %d %lld %lld %lld\n", (int)getpid(), contender, (long long)token, (long long)asked, (long long)at);
}

static void note_end(int64_t token, int64_t at, const char *end) {
    note("end %d %lld %lld %s\n", (int)getpid(), (long long)token, (long long)at, end);
}

static void say(const char *format, ...) {
    va_list values;
    va_start(values, format);
    vprintf(format, values);
    va_end(values);
    putchar('\n');
    CHECK(fflush(stdout) == 0);
}

/* The next line from our standard input; false: it has ended. */
static bool told(char *line, int size) {
    if (fgets(line, size, stdin) == NULL) return false;
    line[strcspn(line, "\n")] = 0;
    return true;
}

/* Counts one more under a token; nothing but the lease keeps updates from being lost. False: refused, because a newer
 * token has written. */
static bool fenced_write(int64_t token) {
    uint64_t fields[2];
    CHECK(pread(resource, fields, sizeof fields, 0) == sizeof fields);
    if (token < (int64_t)le64toh(fields[1])) return false;
    /* Here another comes in between, if another can. */
    struct timespec moment = {0, 200000};
    nanosleep(&moment, NULL);
    fields[0] = htole64(le64toh(fields[0]) + 1);
    fields[1] = htole64((uint64_t)token);
    CHECK(pwrite(resource, fields, sizeof fields, 0) == sizeof fields);
    return true;
}

static void turn(int contender) {
    lease_t *l = NULL;
    int64_t asked = now_ns(), token;
    if (manager == NULL) {
        token = atomic_fetch_add(&made_up, 1);
    } else {
        CHECK_OK(lease_manager_acquire(manager, "across", PATIENCE_MS, NULL, &l, &error));
        token = lease_token(l);
    }
    note_grant(contender, token, asked, now_ns());
    atomic_fetch_add(&granted, 1);
    if (l != NULL) CHECK_OK(lease_check(l, &error));
    if (!fenced_write(token)) atomic_fetch_add(&refused, 1);
    note_end(token, now_ns(), "Released");
    if (l != NULL) CHECK_OK(lease_release(l, &error));
    lease_free(l);
}

static void *contend(void *contender) {
    for (int taken = 0; taken < grants || !atomic_load(&over); taken++) turn((int)(intptr_t)contender);
    return NULL;
}

/* Takes so many grants a contender, and more until our standard input ends. */
static void work(int contenders) {
    pthread_t threads[MOST];
    char line[100];
    CHECK(contenders <= MOST);
    say("ready");
    CHECK(told(line, sizeof line));
    for (int at = 0; at < contenders; at++) {
        CHECK(pthread_create(&threads[at], NULL, contend, (void *)(intptr_t)at) == 0);
    }
    while (told(line, sizeof line)) continue;
    atomic_store(&over, true);
    for (int at = 0; at < contenders; at++) CHECK(pthread_join(threads[at], NULL) == 0);
    say("done %d %d", atomic_load(&granted), atomic_load(&refused));
}

static void say_lost(lease_status status, lease_error_t *error) {
    CHECK(status == LEASE_ERR_LOST && lease_error_reason(error) >= 0);
    say("lost %d", (int)lease_error_reason(error));
    lease_error_free(error);
}

/* Holds, and does what it is told; it may be killed or stopped meanwhile. */
static void hold(void) {
    lease_t *l = NULL;
    char command[100];
    int64_t asked = now_ns();
    CHECK_OK(lease_manager_acquire(manager, "across", PATIENCE_MS, NULL, &l, &error));
    int64_t token = lease_token(l), at = now_ns();
    note_grant(0, token, asked, at);
    /* Until then at least it may believe without asking anybody. */
    int64_t until = at + lease_remaining_ms(l) * 1000000;
    CHECK(fenced_write(token));
    say("holding %lld %lld", (long long)token, (long long)until);
    while (told(command, sizeof command)) {
        lease_error_t *error = NULL;
        if (strcmp(command, "check") == 0) {
            lease_status status = lease_check(l, &error);
            if (status == LEASE_OK) {
                say("held");
            } else {
                note_end(token, until, "Lost");
                say_lost(status, error);
            }
        } else if (strcmp(command, "write") == 0) {
            /* What a program does that does not ask: it goes on writing. */
            say(fenced_write(token) ? "written" : "refused");
        } else {
            CHECK(strcmp(command, "release") == 0);
            if (lease_is_held(l)) note_end(token, now_ns(), "Released");
            lease_status status = lease_release(l, &error);
            if (status == LEASE_OK) {
                say("released");
            } else {
                say_lost(status, error);
            }
            break;
        }
    }
    lease_free(l);
}

int main(int count, char **arguments) {
    CHECK(count == 4 || count == 6);
    const char *mode = arguments[1], *url = arguments[2], *directory = arguments[3];
    char path[512];
    snprintf(path, sizeof path, "%s/%d.journal", directory, (int)getpid());
    journal = open(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0666);
    snprintf(path, sizeof path, "%s/resource", directory);
    resource = open(path, O_RDWR | O_CLOEXEC);
    CHECK(journal >= 0 && resource >= 0);
    if (strcmp(mode, "unlocked") != 0) CHECK_OK(lease_manager_open(url, NULL, &manager, &error));
    if (count == 4) {
        CHECK(strcmp(mode, "hold") == 0);
        hold();
    } else {
        CHECK(manager == NULL || strcmp(mode, "work") == 0);
        grants = atoi(arguments[4]);
        work(atoi(arguments[5]));
    }
    if (manager != NULL) CHECK_OK(lease_manager_close(manager, &error));
    lease_manager_free(manager);
    return 0;
}
