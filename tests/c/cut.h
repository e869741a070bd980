/* Cuts a process off its SQLite store, and connects it again: another process stands in the gate of the file. */
#ifndef CUT_H
#define CUT_H

#include "check.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

typedef struct {
    pid_t child;
    int tell, hear;
} cut_t;

/* Starts the other process. Before the library is used: it is a fork. */
static inline cut_t cut_prepare(const char *gate) {
    int tell[2], hear[2];
    char byte;
    CHECK(pipe(tell) == 0 && pipe(hear) == 0);
    pid_t child = fork();
    CHECK(child >= 0);
    if (child == 0) {
        struct flock lock;
        memset(&lock, 0, sizeof lock);
        lock.l_type = F_WRLCK;
        close(tell[1]);
        if (read(tell[0], &byte, 1) != 1) _exit(0);
        int fd = open(gate, O_RDWR);
        CHECK(fd >= 0 && fcntl(fd, F_SETLKW, &lock) == 0);
        CHECK(write(hear[1], "c", 1) == 1);
        /* Until it is told, or the test is gone. */
        CHECK(read(tell[0], &byte, 1) >= 0);
        _exit(0);
    }
    close(tell[0]);
    close(hear[1]);
    cut_t cut;
    cut.child = child;
    cut.tell = tell[1];
    cut.hear = hear[0];
    return cut;
}

/* Returns when nobody else gets at the file any more. */
static inline void cut_now(cut_t cut) {
    char byte;
    CHECK(write(cut.tell, "c", 1) == 1 && read(cut.hear, &byte, 1) == 1);
}

static inline void cut_heal(cut_t cut) {
    int status;
    close(cut.tell);
    CHECK(waitpid(cut.child, &status, 0) == cut.child && status == 0);
    close(cut.hear);
}

#endif
