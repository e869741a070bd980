/* On an etcd that is frozen when we ask for it: several threads take turns, an eviction is told by descriptor long before a
 * renewal could tell it, and a server that does not answer is told by descriptor and callback before the ttl.
 *
 *     etcd URL
 *
 * Who runs it reads `freeze` and `thaw` from its standard output, does so, and answers with a line. */
#define _GNU_SOURCE
#include "check.h"

#include <pthread.h>

enum { THREADS = 8, TURNS = 10, TTL_MS = 4000, LONG_MS = 60000 };

static lease_manager_t *m;
static int count;          /* Guarded by the lease alone. */
static int64_t last_token; /* The same. */

typedef struct {
    int reason, calls;
    int64_t at;
} told_t;

static void lost(int32_t reason, void *data) {
    told_t *told = data;
    told->at = now_ms();
    told->reason = reason;
    __atomic_add_fetch(&told->calls, 1, __ATOMIC_SEQ_CST);
}

static void *take_turns(void *unused) {
    for (int turn = 0; turn < TURNS; turn++) {
        lease_t *l = NULL;
        CHECK_OK(lease_manager_acquire(m, "turns", LONG_MS, NULL, &l, &error));
        int64_t token = lease_token(l);
        CHECK(token > __atomic_load_n(&last_token, __ATOMIC_RELAXED));
        __atomic_store_n(&last_token, token, __ATOMIC_RELAXED);
        int seen = __atomic_load_n(&count, __ATOMIC_RELAXED);
        /* Here another comes in between, if another can. */
        struct timespec moment = {0, 200000};
        nanosleep(&moment, NULL);
        __atomic_store_n(&count, seen + 1, __ATOMIC_RELAXED);
        CHECK_OK(lease_check(l, &error));
        CHECK_OK(lease_release(l, &error));
        lease_free(l);
    }
    return unused;
}

static void ask(const char *what) {
    char line[20];
    CHECK(puts(what) >= 0 && fflush(stdout) == 0);
    CHECK(fgets(line, sizeof line, stdin) != NULL);
}

static lease_options_t *with_ttl(int ttl_ms) {
    lease_options_t *o = lease_options_new();
    char text[20];
    snprintf(text, sizeof text, "%dms", ttl_ms);
    CHECK_OK(lease_options_set(o, "ttl", text, &error));
    return o;
}

/* By an operator, who has a manager of his own. */
static int64_t evicted(const char *url) {
    lease_manager_t *operator_s = NULL;
    lease_options_t *o = with_ttl(LONG_MS);
    lease_t *l = NULL, *next = NULL;
    told_t told = {-1, 0, 0};
    int fd = -1;
    CHECK_OK(lease_manager_open(url, NULL, &operator_s, &error));
    CHECK_OK(lease_manager_acquire(m, "evicted", 5000, o, &l, &error));
    CHECK_OK(lease_cancelled_fd(l, &fd, &error));
    CHECK_OK(lease_on_lost(l, lost, &told, NULL, &error));
    CHECK(readable(fd, 0) == 0 && lease_is_held(l));

    CHECK_OK(lease_manager_break(operator_s, "evicted", lease_token(l), &error));
    int64_t since = now_ms();
    /* A renewal would be due at a third of the ttl, twenty seconds. */
    CHECK(readable(fd, 10000) == 1);
    int64_t took = now_ms() - since;
    CHECK(!lease_is_held(l) && lease_end_reason(l) == LEASE_END_GONE);
    CHECK_STATUS(LEASE_ERR_LOST, "evicted", lease_check(l, &error));
    EVENTUALLY(__atomic_load_n(&told.calls, __ATOMIC_SEQ_CST) == 1);
    CHECK(told.reason == LEASE_END_GONE);

    CHECK_OK(lease_manager_acquire(operator_s, "evicted", 5000, NULL, &next, &error));
    CHECK(lease_token(next) > lease_token(l));
    CHECK_OK(lease_release(next, &error));
    lease_free(l), lease_free(next), lease_options_free(o);
    CHECK_OK(lease_manager_close(operator_s, &error));
    lease_manager_free(operator_s);
    return took;
}

static int64_t unreachable(void) {
    lease_options_t *o = with_ttl(TTL_MS), *patient = with_ttl(LONG_MS);
    lease_t *l = NULL, *longer = NULL, *next = NULL;
    told_t told = {-1, 0, 0}, never = {-1, 0, 0};
    int fd = -1;
    CHECK_OK(lease_manager_acquire(m, "frozen", 5000, o, &l, &error));
    CHECK_OK(lease_manager_acquire(m, "longer", 5000, patient, &longer, &error));
    CHECK_OK(lease_cancelled_fd(l, &fd, &error));
    CHECK_OK(lease_on_lost(l, lost, &told, NULL, &error));
    CHECK_OK(lease_on_lost(longer, lost, &never, NULL, &error));
    int64_t token = lease_token(l);
    /* Kept over renewals while the server answers. */
    CHECK(readable(fd, TTL_MS) == 0 && lease_is_held(l));

    ask("freeze");
    int64_t since = now_ms();
    CHECK(readable(fd, 10000) == 1);
    int64_t by_fd = now_ms() - since;
    CHECK(!lease_is_held(l) && lease_remaining_ms(l) == 0);
    CHECK(lease_end_reason(l) == LEASE_END_UNREACHABLE);
    CHECK_STATUS(LEASE_ERR_LOST, "frozen", lease_check(l, &error));
    EVENTUALLY(__atomic_load_n(&told.calls, __ATOMIC_SEQ_CST) == 1);
    CHECK(told.reason == LEASE_END_UNREACHABLE);
    /* At half the ttl after the last renewal, which was sent before the server was frozen. A busy machine may be late: by
     * ttl/6 here. Nobody else can have the name before the whole. */
    CHECK(by_fd < TTL_MS * 2 / 3 && told.at - since < TTL_MS * 2 / 3);
    /* It is frozen; and what is unknown is no loss. */
    CHECK_STATUS(LEASE_ERR_UNAVAILABLE, "longer", lease_confirm(longer, &error));
    CHECK(lease_is_held(longer));

    ask("thaw");
    CHECK_OK(lease_manager_acquire(m, "frozen", 20000, NULL, &next, &error));
    CHECK(lease_token(next) > token && !lease_is_held(l));
    CHECK_OK(lease_confirm(longer, &error));
    CHECK_OK(lease_release(next, &error));
    CHECK_OK(lease_release(longer, &error));
    CHECK(told.calls == 1 && never.calls == 0);
    lease_free(l), lease_free(longer), lease_free(next), lease_options_free(o), lease_options_free(patient);
    return by_fd;
}

int main(int arguments, char **argument) {
    pthread_t threads[THREADS];
    CHECK(arguments == 2);
    CHECK_OK(lease_manager_open(argument[1], NULL, &m, &error));
    for (int at = 0; at < THREADS; at++) CHECK(pthread_create(&threads[at], NULL, take_turns, NULL) == 0);
    for (int at = 0; at < THREADS; at++) CHECK(pthread_join(threads[at], NULL) == 0);
    CHECK(count == THREADS * TURNS);
    int64_t eviction = evicted(argument[1]), loss = unreachable();
    CHECK_OK(lease_manager_close(m, &error));
    lease_manager_free(m);
    printf("told of the eviction in %d ms, of the frozen server in %d ms, of a ttl of %d ms\nok\n", (int)eviction, (int)loss,
           TTL_MS);
    return 0;
}
