/* Signals are the program's: none is taken by a thread of the library, none ends a wait; a descriptor does. */
#define _GNU_SOURCE
#include "check.h"

#include <dirent.h>
#include <pthread.h>
#include <signal.h>
#include <sys/time.h>
#include <unistd.h>

static pthread_t program;
static volatile sig_atomic_t signals, strangers;
static int ends[2];

static void on_alarm(int number) {
    (void)number;
    signals = signals + 1;
    if (!pthread_equal(pthread_self(), program)) strangers = strangers + 1;
}

static void on_interrupt(int number) {
    (void)number;
    /* All that a handler may do, and all it takes. */
    (void)!write(ends[1], "x", 1);
}

static void handle(int number, void (*handler)(int)) {
    struct sigaction action;
    memset(&action, 0, sizeof action);
    action.sa_handler = handler;
    CHECK(sigaction(number, &action, NULL) == 0);
}

/* That the kernel gave none to the library's threads proves little: it prefers the program's. So look at what they block. */
static void library_threads_block_all(void) {
    DIR *tasks = opendir("/proc/self/task");
    struct dirent *entry;
    int seen = 0;
    CHECK(tasks != NULL);
    while ((entry = readdir(tasks)) != NULL) {
        char path[320], line[200], name[64] = "";
        unsigned long long blocked = 0;
        snprintf(path, sizeof path, "/proc/self/task/%s/status", entry->d_name);
        FILE *status = fopen(path, "r");
        if (status == NULL) continue;
        while (fgets(line, sizeof line, status) != NULL) {
            sscanf(line, "Name: %63s", name);
            sscanf(line, "SigBlk: %llx", &blocked);
        }
        fclose(status);
        if (strncmp(name, "lease", 5) != 0) continue;
        seen++;
        for (int number = 1; number < 32; number++) {
            CHECK(number == SIGKILL || number == SIGSTOP || (blocked >> (number - 1) & 1) == 1);
        }
    }
    closedir(tasks);
    CHECK(seen >= 3);
}

static void lost(int32_t reason, void *data) {
    (void)reason, (void)data;
}

static void freed(void *data) {
    __atomic_store_n((int *)data, 1, __ATOMIC_SEQ_CST);
}

int main(void) {
    lease_manager_t *m = NULL;
    lease_t *held = NULL, *l = NULL;
    lease_watch_t *w = NULL;
    lease_record_t *r = NULL;
    program = pthread_self();
    handle(SIGALRM, on_alarm);
    handle(SIGINT, on_interrupt);
    CHECK(pipe(ends) == 0);
    CHECK_OK(lease_manager_open("memory:", NULL, &m, &error));
    CHECK_OK(lease_manager_acquire(m, "held", 0, NULL, &held, &error));

    struct itimerval often = {{0, 1000}, {0, 1000}}, never = {{0, 0}, {0, 0}};
    CHECK(setitimer(ITIMER_REAL, &often, NULL) == 0);
    for (int at = 0; at < 3; at++) {
        int64_t since = now_ms();
        CHECK_STATUS(LEASE_ERR_TIMEOUT, "held by", lease_manager_acquire(m, "held", 100, NULL, &l, &error));
        CHECK(now_ms() - since >= 99);
    }
    CHECK_OK(lease_manager_watch(m, "held", &w, &error));
    CHECK_OK(lease_watch_next(w, 1000, &r, &error));
    lease_record_free(r);
    int64_t since = now_ms();
    CHECK_STATUS(LEASE_ERR_TIMEOUT, "nothing changed", lease_watch_next(w, 100, &r, &error));
    CHECK(now_ms() - since >= 99);
    lease_watch_free(w);
    for (int at = 0; at < 1000; at++) {
        CHECK_OK(lease_manager_acquire(m, "free", LEASE_WAIT_FOREVER, NULL, &l, &error));
        CHECK_OK(lease_release(l, &error));
        lease_free(l);
    }
    CHECK(setitimer(ITIMER_REAL, &never, NULL) == 0);
    CHECK(signals >= 50 && strangers == 0);

    /* With the thread of callbacks, which the first one starts. */
    int told = 0;
    CHECK_OK(lease_manager_acquire(m, "lost", 0, NULL, &l, &error));
    CHECK_OK(lease_on_lost(l, lost, &told, freed, &error));
    CHECK_OK(lease_manager_break(m, "lost", lease_token(l), &error));
    CHECK_STATUS(LEASE_ERR_LOST, "gone", lease_confirm(l, &error));
    EVENTUALLY(__atomic_load_n(&told, __ATOMIC_SEQ_CST) == 1);
    library_threads_block_all();
    lease_free(l);

    /* Ctrl-C: the handler writes to a pipe, and the wait is given up. */
    lease_options_t *o = lease_options_new();
    CHECK_OK(lease_options_set_cancel_fd(o, ends[0], &error));
    handle(SIGALRM, on_interrupt);
    struct itimerval once = {{0, 0}, {0, 50000}};
    CHECK(setitimer(ITIMER_REAL, &once, NULL) == 0);
    CHECK_STATUS(LEASE_ERR_CANCELLED, "cancel fd",
                 lease_manager_acquire(m, "held", LEASE_WAIT_FOREVER, o, &l, &error));
    lease_options_free(o);
    lease_free(held);
    CHECK_OK(lease_manager_close(m, &error));
    lease_manager_free(m);
    printf("%d signals\nok\n", (int)signals);
    return 0;
}
