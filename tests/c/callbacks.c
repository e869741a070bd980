/* Callbacks: what they may do, when they run, and that none starts after lease_free has returned. */
#define _GNU_SOURCE
#include "check.h"

#include <pthread.h>
#include <unistd.h>

static lease_manager_t *manager;

typedef struct {
    lease_t *lease;
    int started, finished, freed;
    /* The callback goes on when this is closed; -1: at once. */
    int gate;
} told_t;

static void freed(void *data) {
    __atomic_add_fetch(&((told_t *)data)->freed, 1, __ATOMIC_SEQ_CST);
}

static void wait_at_gate(int32_t reason, void *data) {
    told_t *told = data;
    char byte;
    CHECK(reason == LEASE_END_GONE);
    __atomic_add_fetch(&told->started, 1, __ATOMIC_SEQ_CST);
    if (told->gate >= 0) CHECK(read(told->gate, &byte, 1) == 0);
    __atomic_add_fetch(&told->finished, 1, __ATOMIC_SEQ_CST);
}

static lease_t *acquire(const char *name) {
    lease_t *l = NULL;
    CHECK_OK(lease_manager_acquire(manager, name, 10000, NULL, &l, &error));
    return l;
}

static void lose(lease_t *l) {
    CHECK_OK(lease_manager_break(manager, lease_name(l), lease_token(l), &error));
    CHECK_STATUS(LEASE_ERR_LOST, "gone", lease_confirm(l, &error));
}

static int read_count(int *count) {
    return __atomic_load_n(count, __ATOMIC_SEQ_CST);
}

static int returned;

static void *free_lease(void *lease) {
    lease_free(lease);
    __atomic_store_n(&returned, 1, __ATOMIC_SEQ_CST);
    return NULL;
}

/* One runs, another waits for the thread: freeing the first lease waits for it, freeing the second takes it back. */
static void freeing(void) {
    int gate[2];
    pthread_t thread;
    CHECK(pipe(gate) == 0);
    told_t running = {NULL, 0, 0, 0, gate[0]}, queued = {NULL, 0, 0, 0, -1};
    lease_t *first = acquire("first"), *second = acquire("second");
    CHECK_OK(lease_on_lost(first, wait_at_gate, &running, freed, &error));
    CHECK_OK(lease_on_lost(second, wait_at_gate, &queued, freed, &error));
    lose(first);
    EVENTUALLY(read_count(&running.started) == 1);
    lose(second);
    lease_free(second);
    CHECK(pthread_create(&thread, NULL, free_lease, first) == 0);
    /* Once the handle is gone the call is under way. */
    EVENTUALLY(lease_token(first) == 0);
    /* However long one looks, as long as the callback runs. */
    for (int64_t until = now_ms() + 50; now_ms() < until;) CHECK(read_count(&returned) == 0);
    CHECK(read_count(&running.finished) == 0);
    close(gate[1]);
    CHECK(pthread_join(thread, NULL) == 0);
    CHECK(read_count(&running.finished) == 1);
    EVENTUALLY(read_count(&running.freed) == 1 && read_count(&queued.freed) == 1);
    CHECK(read_count(&queued.started) == 0);
    close(gate[0]);
}

static void use_everything(int32_t reason, void *data) {
    told_t *told = data;
    lease_t *again = NULL;
    lease_record_t *record = NULL;
    int fd = -1;
    CHECK(reason == LEASE_END_GONE && lease_end_reason(told->lease) == LEASE_END_GONE);
    CHECK_OK(lease_cancelled_fd(told->lease, &fd, &error));
    CHECK(readable(fd, 0) == 1);
    CHECK_OK(lease_manager_acquire(manager, "mine", 10000, NULL, &again, &error));
    CHECK_STATUS(LEASE_ERR_TIMEOUT, "held by", lease_manager_acquire(manager, "mine", 20, NULL, &again, &error));
    CHECK_OK(lease_manager_inspect(manager, "mine", &record, &error));
    lease_record_free(record);
    CHECK_OK(lease_release(again, &error));
    lease_free(again);
    CHECK_STATUS(LEASE_ERR_LOST, "gone", lease_release(told->lease, &error));
    /* Its own lease: waits for nobody, least of all for itself. */
    int64_t since = now_ms();
    lease_free(told->lease);
    CHECK(now_ms() - since < 4000);
    CHECK_STATUS(LEASE_ERR_INVALID, "freed", lease_check(told->lease, &error));
    __atomic_add_fetch(&told->finished, 1, __ATOMIC_SEQ_CST);
}

static void close_manager(int32_t reason, void *data) {
    told_t *told = data;
    CHECK(reason == LEASE_END_GONE);
    lease_free(told->lease);
    CHECK_OK(lease_manager_close(manager, &error));
    lease_manager_free(manager);
    __atomic_add_fetch(&told->finished, 1, __ATOMIC_SEQ_CST);
}

/* Many on one lease, each once. */
static void many(void) {
    told_t told[20];
    lease_t *l = acquire("many");
    for (int at = 0; at < 20; at++) {
        told[at] = (told_t){l, 0, 0, 0, -1};
        CHECK_OK(lease_on_lost(l, wait_at_gate, &told[at], freed, &error));
    }
    lose(l);
    for (int at = 0; at < 20; at++) EVENTUALLY(read_count(&told[at].freed) == 1);
    for (int at = 0; at < 20; at++) CHECK(told[at].started == 1 && told[at].finished == 1);
    lease_free(l);
}

static int log_gate, logging;

static void slow_log(int level, const char *message, void *data) {
    char byte;
    (void)message, (void)data;
    /* The loss alone: other calls write lines too. */
    if (level != LEASE_LOG_WARN) return;
    __atomic_store_n(&logging, 1, __ATOMIC_SEQ_CST);
    CHECK(read(log_gate, &byte, 1) == 0);
}

static void *lose_lease(void *lease) {
    lose(lease);
    return NULL;
}

static void *no_log(void *data) {
    lease_set_log(NULL, NULL);
    __atomic_store_n((int *)data, 1, __ATOMIC_SEQ_CST);
    return NULL;
}

/* A log function that is stuck holds up who replaces it, and nobody else. */
static void stuck_log(void) {
    int gate[2], replaced = 0;
    pthread_t loser, replacer;
    CHECK(pipe(gate) == 0);
    log_gate = gate[0];
    lease_t *l = acquire("logged"), *other = NULL;
    lease_set_log(slow_log, NULL);
    /* The loss is logged by the call that finds it. */
    CHECK(pthread_create(&loser, NULL, lose_lease, l) == 0);
    EVENTUALLY(read_count(&logging) == 1);
    CHECK(pthread_create(&replacer, NULL, no_log, &replaced) == 0);
    int64_t since = now_ms();
    for (int at = 0; at < 100; at++) {
        CHECK_OK(lease_manager_acquire(manager, "unlogged", 10000, NULL, &other, &error));
        lease_free(other);
        if (at == 0) EVENTUALLY(now_ms() - since >= 20);
    }
    CHECK(read_count(&replaced) == 0 && now_ms() - since < 4000);
    close(gate[1]);
    CHECK(pthread_join(loser, NULL) == 0 && pthread_join(replacer, NULL) == 0);
    CHECK(read_count(&replaced) == 1);
    lease_free(l);
    close(gate[0]);
}

static void *register_slow(void *data) {
    told_t *told = data;
    CHECK_OK(lease_on_lost(told->lease, wait_at_gate, told, freed, &error));
    return NULL;
}

/* After the close callbacks run in the calls that register them: freeing the lease waits for each. */
static void freeing_after_close(void) {
    int gate[2];
    pthread_t slow, freeing;
    lease_manager_t *m = NULL;
    lease_t *l = NULL;
    CHECK(pipe(gate) == 0);
    CHECK_OK(lease_manager_open("memory:", NULL, &m, &error));
    CHECK_OK(lease_manager_acquire(m, "closed", 0, NULL, &l, &error));
    CHECK_OK(lease_manager_break(m, "closed", lease_token(l), &error));
    CHECK_STATUS(LEASE_ERR_LOST, "gone", lease_confirm(l, &error));
    CHECK_OK(lease_manager_close(m, &error));
    told_t running = {l, 0, 0, 0, gate[0]}, quick = {l, 0, 0, 0, -1};
    CHECK(pthread_create(&slow, NULL, register_slow, &running) == 0);
    EVENTUALLY(read_count(&running.started) == 1);
    CHECK_OK(lease_on_lost(l, wait_at_gate, &quick, freed, &error));
    CHECK(quick.finished == 1 && quick.freed == 1);
    returned = 0;
    CHECK(pthread_create(&freeing, NULL, free_lease, l) == 0);
    EVENTUALLY(lease_token(l) == 0);
    for (int64_t until = now_ms() + 50; now_ms() < until;) CHECK(read_count(&returned) == 0);
    close(gate[1]);
    CHECK(pthread_join(slow, NULL) == 0 && pthread_join(freeing, NULL) == 0);
    CHECK(running.finished == 1 && running.freed == 1);
    lease_manager_free(m);
    close(gate[0]);
}

int main(void) {
    CHECK_OK(lease_manager_open("memory:", NULL, &manager, &error));
    freeing();
    freeing_after_close();
    many();
    stuck_log();

    told_t told = {acquire("used"), 0, 0, 0, -1};
    CHECK_OK(lease_on_lost(told.lease, use_everything, &told, freed, &error));
    lose(told.lease);
    EVENTUALLY(read_count(&told.freed) == 1);
    CHECK(told.finished == 1);

    /* Whatever the call that is refused: the data is freed. */
    told_t refused = {NULL, 0, 0, 0, -1};
    lease_t *l = acquire("refused");
    CHECK_STATUS(LEASE_ERR_INVALID, "callback is NULL", lease_on_lost(l, NULL, &refused, freed, &error));
    CHECK_STATUS(LEASE_ERR_INVALID, "l is NULL", lease_on_lost(NULL, wait_at_gate, &refused, freed, &error));
    CHECK_OK(lease_on_lost(l, wait_at_gate, NULL, NULL, &error));
    CHECK(refused.freed == 2 && refused.started == 0);
    lease_free(l);

    told_t last = {acquire("last"), 0, 0, 0, -1};
    CHECK_OK(lease_on_lost(last.lease, close_manager, &last, freed, &error));
    lose(last.lease);
    EVENTUALLY(read_count(&last.freed) == 1);
    CHECK(last.finished == 1);
    CHECK_STATUS(LEASE_ERR_INVALID, "freed", lease_manager_ping(manager, &error));
    puts("ok");
    return 0;
}
