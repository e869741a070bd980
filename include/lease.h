/*
 * lease: be *the one* that runs the nightly job, owns a shard, writes a file.
 *
 * Generated from lease-ffi by its header test: do not edit.
 *
 * lease_manager_acquire waits until a name is yours and gives a lease with a fencing token. A heartbeat keeps it. If it
 * can no longer be proven yours, it ends for good, before anybody else can hold the name: ask lease_check before each step
 * of the work, or watch lease_cancelled_fd, or register lease_on_lost, and stop. Show the token to whatever you write to,
 * so that it can refuse a holder that woke up too late: no lock service alone can do that.
 *
 *     lease_manager_t *manager = NULL;  lease_t *lease = NULL;  lease_error_t *error = NULL;
 *     if (lease_manager_open("sqlite:jobs.db", NULL, &manager, &error) == LEASE_OK &&
 *         lease_manager_acquire(manager, "nightly", 5000, NULL, &lease, &error) == LEASE_OK) {
 *         while (more_work() && lease_check(lease, &error) == LEASE_OK) work(lease_token(lease));
 *         if (error == NULL) lease_release(lease, &error);
 *     }
 *     if (error != NULL) fputs(lease_error_message(error), stderr);
 *     lease_error_free(error);  lease_free(lease);  lease_manager_close(manager, NULL);  lease_manager_free(manager);
 *
 * CONVENTIONS
 *
 * Naming     lease_NOUN_VERB acts on a lease_NOUN_t; lease_VERB on a lease_t. Arguments: self, inputs, outputs, error.
 * Errors     Calls that can fail return a lease_status: LEASE_OK is 0. *out is written only on success. err may be NULL;
 *            *err is written only on failure, and freed with lease_error_free (it is NULL if too many handles are in use).
 *            Besides what a function lists, each gives INVALID for a wrong argument or handle, FORKED for an inherited
 *            handle, and INTERNAL for a defect of the library, which also prints to stderr.
 * Ownership  What a call gives through out is yours: free it with the _free of its type. Handles are not addresses: never
 *            dereference one. A handle that was freed, or is of another type, gives LEASE_ERR_INVALID, and frees nothing.
 *            Texts that you give are read during the call only; texts that you get live as long as the handle says.
 * NULL       Every _free accepts it, and err, opts and what the function says may be NULL. Else it is LEASE_ERR_INVALID,
 *            naming the argument. Functions without a status say what they give for what is no handle.
 * Threads    Every function may be called from many threads at once, on the same handle too; none from a signal handler.
 *            The library has threads of its own, which block all signals and outlive dlclose: it is never unloaded.
 * Callbacks  run on threads of the library, those of one manager one after another, and may call the library. They must
 *            not throw or longjmp. A program that one starts (fork, exec) begins with all signals blocked: unblock them.
 * Blocking   No call blocks without a bound: a timeout you gave, the request timeout (3 s), or 5 s. Signals end no wait.
 * fork       A child has none of its parent's handles: they give LEASE_ERR_FORKED, and their _free does nothing. The leases
 *            stay the parent's. It may open managers of its own, on the same file too. It must not read or write inherited
 *            descriptors. (Not for vfork, _Fork and a raw clone.)
 * Elsewhere  lease_manager_open reads the environment: no setenv meanwhile. pthread_cancel in a call ends the process. Nobody
 *            else in the process may open the database file, with an SQLite of its own or a second copy of this library:
 *            closing it drops the locks of this one.
 * exit       releases nothing: what was not released, or a wait that has just timed out, stays in the line until its ttl
 *            has passed, or on a database file until somebody wants the name. lease_manager_close sees to both.
 * Units      Times are milliseconds, int64_t, their names end in _ms; options are texts with a unit: "15s". Tokens are
 *            int64_t and at least 1. Texts are UTF-8 without NUL. A name has 1 to 512 bytes.
 *
 * TERMS AND TIMES
 *
 * Each wish for a name is a claim, in the order of their coming; the first, which heads the line, holds. ttl is how long
 * the store keeps a claim that is not renewed. A lease is renewed at ttl/3, and lost at ttl/2 after the last renewal that
 * was confirmed was sent; nobody else gets the name before the whole ttl has passed. So an outage that begins right before
 * a renewal is survived for ttl/6, and one that begins right after it for ttl/2.
 *
 * Options    "ttl": default "30s"; from 50 ms to 24 h. "owner": what others see, at most 1,024 bytes, default host:pid.
 *            "request_timeout": the bound of one request to the store, default "3s"; for lease_manager_open. By
 *            lease_options_set, in the URL ("sqlite:jobs.db?ttl=15s"), or as LEASE_TTL and so on, in this order; unknown
 *            keys and LEASE_ variables are refused. How long to wait is timeout_ms, which beats any "timeout".
 * Stores     "sqlite:jobs.db": the processes of one machine; "sqlite:///var/lib/jobs.db": an absolute path. "memory:": this
 *            manager alone; "memory:NAME": the managers of this process. Paths are percent-decoded, and relative ones
 *            are of the working directory at the open.
 */


#ifndef LEASE_H
#define LEASE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/** The version of this header; lease_version() says that of the library. */
#define LEASE_VERSION_MAJOR 0
#define LEASE_VERSION_MINOR 1
#define LEASE_VERSION_PATCH 0
#define LEASE_VERSION "0.1.0"
#define LEASE_VERSION_NUMBER (LEASE_VERSION_MAJOR * 1000000 + LEASE_VERSION_MINOR * 1000 + LEASE_VERSION_PATCH)

/** Waits as long as it takes. */
#define LEASE_WAIT_FOREVER ((int64_t)-1)
/** One attempt. */
#define LEASE_TRY_ONCE ((int64_t)0)


/**
 * Why a lease ended: the holder released it. This and `LEASE_END_CLOSED` are his own acts, all others are losses.
 */
#define LEASE_END_RELEASED 0

/**
 * The store says that the claim is gone and that another heads the line.
 */
#define LEASE_END_SUPERSEDED 1

/**
 * The store says that the claim is gone (expired, deleted, broken by an operator), and names no other holder.
 */
#define LEASE_END_GONE 2

/**
 * Half the ttl passed since the last confirmed renewal; one had been tried and was not answered.
 */
#define LEASE_END_UNREACHABLE 3

/**
 * Half the ttl passed without a renewal even tried: this process was stopped, suspended or starved.
 */
#define LEASE_END_STALLED 4

/**
 * As LEASE_END_UNREACHABLE, the last answer being a refusal (credentials, permission).
 */
#define LEASE_END_DENIED 5

/**
 * The manager was closed.
 */
#define LEASE_END_CLOSED 6

/**
 * Seen in the child of a fork: the lease is the parent's.
 */
#define LEASE_END_FORKED 7

/**
 * A line about something that failed.
 */
#define LEASE_LOG_ERROR 1

/**
 * A line about something to look at: a lost lease, a store that does not answer.
 */
#define LEASE_LOG_WARN 2

/**
 * A line about something that happens seldom.
 */
#define LEASE_LOG_INFO 3

/**
 * A line about each lease and each renewal.
 */
#define LEASE_LOG_DEBUG 4

/**
 * What went wrong. Free it with `lease_error_free`.
 */
typedef struct lease_error_t lease_error_t;

/**
 * Guards a resource of this process against stale holders. Free it with `lease_fence_free`.
 */
typedef struct lease_fence_t lease_fence_t;

/**
 * A manager of leases on one store. Close it with `lease_manager_close`, free it with `lease_manager_free`.
 */
typedef struct lease_manager_t lease_manager_t;

/**
 * Options of an open or an acquire. Free them with `lease_options_free`; they may be used for many calls.
 */
typedef struct lease_options_t lease_options_t;

/**
 * An acquire that goes on in the background. Free it with `lease_pending_free`.
 */
typedef struct lease_pending_t lease_pending_t;

/**
 * Who holds a name. Free it with `lease_record_free`.
 */
typedef struct lease_record_t lease_record_t;

/**
 * A list of records. Free it with `lease_records_free`.
 */
typedef struct lease_records_t lease_records_t;

/**
 * A lease: a name that is yours, as long as `lease_is_held` says so. Free it with `lease_free`.
 */
typedef struct lease_t lease_t;

/**
 * A watch of a name. Free it with `lease_watch_free`.
 */
typedef struct lease_watch_t lease_watch_t;

/**
 * What a call came to: `LEASE_OK`, or one of those below.
 */
typedef int32_t lease_status;

/**
 * It was done.
 */
#define LEASE_OK 0

/**
 * The deadline passed while somebody else held the name. Try again.
 */
#define LEASE_ERR_TIMEOUT 1

/**
 * The lease has ended: stop the work, and acquire anew.
 */
#define LEASE_ERR_LOST 2

/**
 * The store did not answer, or not in time. Try again.
 */
#define LEASE_ERR_UNAVAILABLE 3

/**
 * An argument is wrong. The message says which and why.
 */
#define LEASE_ERR_INVALID 4

/**
 * This build or this store cannot do it.
 */
#define LEASE_ERR_UNSUPPORTED 5

/**
 * The store refuses these credentials or permissions.
 */
#define LEASE_ERR_DENIED 6

/**
 * The store is not what it was, or was written by something else.
 */
#define LEASE_ERR_INCOMPATIBLE 7

/**
 * The caller gave up waiting.
 */
#define LEASE_ERR_CANCELLED 8

/**
 * The manager is closed.
 */
#define LEASE_ERR_CLOSED 9

/**
 * The handle belongs to the parent of this forked process.
 */
#define LEASE_ERR_FORKED 10

/**
 * There is no such lease.
 */
#define LEASE_ERR_NOT_FOUND 11

/**
 * A panic was caught: a defect of the library.
 */
#define LEASE_ERR_INTERNAL 12

/**
 * A limit of the system or of the store was reached. Try later.
 */
#define LEASE_ERR_LIMIT 13

#ifdef __cplusplus
extern "C" {
#endif // __cplusplus

/**
 * The version of the library that runs, such as "0.1.0". Compare `LEASE_VERSION`, that of this header. Never freed.
 */
const char *lease_version(void);

/**
 * The same as a number: major * 1000000 + minor * 1000 + patch.
 */
uint32_t lease_version_number(void);

/**
 * Whether a program that was compiled with the header of that version can run with this library. Call it first, as
 * `lease_version_check(LEASE_VERSION_NUMBER, &error)`: the header and the library may come from two installations.
 *
 * Errors: UNSUPPORTED when the header is newer than the library, or of a version that breaks compiled programs: below 1.0
 * another minor version, from then on another major one.
 */
lease_status lease_version_check(uint32_t header,
                                 lease_error_t **err);

/**
 * The status that the failed call gave too. `LEASE_ERR_INVALID` for NULL and what is no error handle, `LEASE_ERR_FORKED` for an
 * inherited one.
 */
lease_status lease_error_status(const lease_error_t *e);

/**
 * What happened, to which name, and what to do: one line of UTF-8. Never NULL, whatever `e` is. Valid until `lease_error_free`.
 */
const char *lease_error_message(const lease_error_t *e);

/**
 * Whether the same call may succeed later with nothing changed by you. False for what is no error handle.
 */
bool lease_error_is_retryable(const lease_error_t *e);

/**
 * Whether the outcome is unknown: the request may have been applied though its answer was not seen. False for what is no error
 * handle.
 */
bool lease_error_is_in_doubt(const lease_error_t *e);

/**
 * The name it was about, or NULL. Valid until `lease_error_free`.
 */
const char *lease_error_name(const lease_error_t *e);

/**
 * After a timeout of an acquire: the owner text of who held the name, if that is known. Else NULL. Valid until `lease_error_free`.
 */
const char *lease_error_holder(const lease_error_t *e);

/**
 * Why the lease ended, one of LEASE_END_..., if the status is `LEASE_ERR_LOST` and a lease is what was lost. Else -1.
 */
int32_t lease_error_reason(const lease_error_t *e);

/**
 * Frees an error and its texts. NULL is fine.
 */
void lease_error_free(lease_error_t *e);

/**
 * The name of a status, such as "LEASE_ERR_LOST"; "LEASE_ERR_?" for a number this version does not know. Never freed.
 */
const char *lease_status_name(lease_status s);

/**
 * New options with nothing set. NULL when too many handles are in use.
 */
lease_options_t *lease_options_new(void);

/**
 * Sets an option by its key: "ttl", "owner", "request_timeout" (see Options above). Times are numbers and units: "15s", "500ms",
 * "1m 30s". Setting a key again replaces its value. The texts are copied.
 *
 * Errors: INVALID for an unknown key, naming the nearest known one, and for a wrong value. An acquire refuses
 * "request_timeout", which is the manager's, and "timeout", which the argument timeout_ms says.
 */
lease_status lease_options_set(lease_options_t *o,
                               const char *key,
                               const char *value,
                               lease_error_t **err);

/**
 * A descriptor that ends the wait of an acquire: when it is readable, hung up or in error, the acquire gives up with
 * `LEASE_ERR_CANCELLED`. Use a pipe, a socket or an eventfd: a signal handler may write to it. It is only polled, and duplicated,
 * so you may close yours afterwards. -1 sets none.
 *
 * Errors: INVALID when it is not open, or of a file or directory; LIMIT when no descriptor is left.
 */
lease_status lease_options_set_cancel_fd(lease_options_t *o,
                                         int fd,
                                         lease_error_t **err);

/**
 * Frees options. What was opened or acquired with them stays as it is. NULL is fine.
 */
void lease_options_free(lease_options_t *o);

/**
 * Opens a manager on the store of a URL (see Stores above). A NULL `url` means the variable LEASE_URL. `opts` may be NULL; options
 * beat those of the URL, which beat the variables LEASE_TTL, LEASE_OWNER and LEASE_REQUEST_TIMEOUT. A store that does not answer
 * is no error before the first call that needs it. `*out` is freed with `lease_manager_free`.
 *
 * Errors: INVALID for a wrong URL, option or LEASE_... variable, DENIED for a path that cannot be written, INCOMPATIBLE for another
 * program's file, UNSUPPORTED for a store this build lacks, UNAVAILABLE when the system cannot make the file, LIMIT.
 */
lease_status lease_manager_open(const char *url,
                                const lease_options_t *opts,
                                lease_manager_t **out,
                                lease_error_t **err);

/**
 * Waits until the name is yours, and gives a lease in `*out`, to be freed with `lease_free`. `timeout_ms` is how long to wait:
 * `LEASE_WAIT_FOREVER`, or `LEASE_TRY_ONCE` for one attempt (which takes at most the request timeout). `opts` may be NULL, and may
 * set "ttl" and "owner" for this lease, and a cancel fd. Signals do not end the wait: use a cancel fd. When it fails, nothing is
 * held, and what waited leaves the line in the background. A lease is not re-entrant: a name that you hold is waited for like anybody's.
 *
 * Errors: TIMEOUT when the time was up, with the holder if it is known; UNAVAILABLE if the store did not answer until then;
 * CANCELLED by the cancel fd; CLOSED; DENIED, INCOMPATIBLE or UNSUPPORTED by the store; INVALID; LIMIT.
 */
lease_status lease_manager_acquire(lease_manager_t *m,
                                   const char *name,
                                   int64_t timeout_ms,
                                   const lease_options_t *opts,
                                   lease_t **out,
                                   lease_error_t **err);

/**
 * Who holds the name: `*out` becomes a record, to be freed with `lease_record_free`, or NULL when it is free.
 *
 * Errors: UNAVAILABLE, DENIED, INCOMPATIBLE, UNSUPPORTED, CLOSED, INVALID.
 */
lease_status lease_manager_inspect(lease_manager_t *m, const char *name, lease_record_t **out, lease_error_t **err);

/**
 * Everything held whose name begins with the prefix, sorted by name; "" lists all. Free `*out` with `lease_records_free`.
 *
 * Errors: as `lease_manager_inspect`.
 */
lease_status lease_manager_list(lease_manager_t *m,
                                const char *prefix,
                                lease_records_t **out,
                                lease_error_t **err);

/**
 * Takes the lease, or the waiting claim, with that token away, for operators. Its holder is told when it renews, at the latest after
 * half its ttl: until then it may overlap its successor, and only the token protects.
 *
 * Errors: NOT_FOUND when no claim of that token is there, and as `lease_manager_inspect`. UNAVAILABLE is in doubt.
 */
lease_status lease_manager_break(lease_manager_t *m,
                                 const char *name,
                                 int64_t token,
                                 lease_error_t **err);

/**
 * Whether the store answers, within the request timeout.
 *
 * Errors: as `lease_manager_inspect`.
 */
lease_status lease_manager_ping(lease_manager_t *m, lease_error_t **err);

/**
 * Ends every wait with CLOSED, releases every lease, waits for callbacks that run, and leaves no thread and no claim behind. Finish
 * the work first. Takes at most 5 s; harmless when repeated. Handles stay until they are freed: the manager's, and those of its
 * leases, which say LEASE_END_CLOSED.
 *
 * Errors: UNAVAILABLE, in doubt, if the store could not be told of every release: what it is not told of expires. Repeating the call
 * then says OK and tells nothing more.
 */
lease_status lease_manager_close(lease_manager_t *m,
                                 lease_error_t **err);

/**
 * Frees the handle. A manager that was not closed is closed in the background once its last lease, pending acquire and watch is
 * freed; leases stay held until then. NULL is fine.
 */
void lease_manager_free(lease_manager_t *m);

/**
 * The fencing token: greater than every token given before for this name. Show it to whatever you write to. It stays readable
 * after the end. 0: not a lease handle, or an inherited one.
 */
int64_t lease_token(const lease_t *l);

/**
 * Whether it is yours at this instant, by the clock: never true again once it was false. Asks nobody. False for what is no lease
 * handle.
 */
bool lease_is_held(const lease_t *l);

/**
 * Call it before each step of the work: `LEASE_OK` while held. It reads a clock and asks nobody.
 *
 * Errors: LOST with the reason (`lease_error_reason`) once the lease has ended, by whatever cause, your own release too.
 */
lease_status lease_check(const lease_t *l,
                         lease_error_t **err);

/**
 * Milliseconds until it is lost unless a renewal succeeds: at most half the ttl, 0 once it ended and for what is no lease handle.
 */
int64_t lease_remaining_ms(const lease_t *l);

/**
 * Why it ended, one of LEASE_END_...; -1 while held, -2 for what is no lease handle.
 */
int32_t lease_end_reason(const lease_t *l);

/**
 * What is leased. Valid until `lease_free`. NULL: not a lease handle.
 */
const char *lease_name(const lease_t *l);

/**
 * A descriptor that becomes readable, and stays so, once the lease is not held any more, whatever the reason. For poll, epoll and
 * event loops: never read, write or close it. The same at each call. Closed by `lease_free`: take it out of your loop before.
 *
 * Errors: LIMIT when no descriptor is left.
 */
lease_status lease_cancelled_fd(const lease_t *l,
                                int *out,
                                lease_error_t **err);

/**
 * Asks the store: a renewal now, within the request timeout.
 *
 * Errors: LOST when the store says that it is gone, or when its time was up; UNAVAILABLE and DENIED when the store does not answer,
 * or refuses: then it is held still, until its time is up.
 */
lease_status lease_confirm(lease_t *l,
                           lease_error_t **err);

/**
 * Calls back once, on the thread that the manager has for callbacks, if the lease is lost; never for your own release or close. Any
 * number of callbacks; one that is registered after the loss is called too (if the manager is closed by then, by this very call).
 * It may run before this call returns. It may block, which delays the manager's other callbacks, and may call the library,
 * `lease_free` of this lease included; it must not throw or longjmp.
 *
 * `free_user_data` (or NULL) is called with `user_data` exactly once in every case, on any thread: after the callback, when there
 * will be none, or when this call fails.
 *
 * Errors: LIMIT when the thread for callbacks cannot be started.
 */
lease_status lease_on_lost(lease_t *l,
                           void (*callback)(int32_t reason, void *user_data),
                           void *user_data,
                           void (*free_user_data)(void *user_data),
                           lease_error_t **err);

/**
 * Gives the name back, at once. Finish the work first. Takes at most 5 s. Harmless when repeated: only the first call tells
 * whether the store was told. The handle stays until `lease_free`.
 *
 * Errors: LOST if it had been lost before; UNAVAILABLE, in doubt, if the store could not be told: the library keeps trying, and
 * what it cannot delete expires. DENIED, INCOMPATIBLE, in doubt: it expires.
 */
lease_status lease_release(lease_t *l,
                           lease_error_t **err);

/**
 * Frees the handle, its name and its descriptor. A lease that is still held is released in the background: release it yourself
 * before the process exits. No callback of it starts any more, and one that runs is waited for, 5 s at most, except in that
 * callback: so hold no lock that it takes. NULL is fine.
 */
void lease_free(lease_t *l);

/**
 * As `lease_manager_acquire`, without waiting for the name: `*out` becomes an acquire that goes on in the background, to be freed
 * with `lease_pending_free`. When its descriptor is readable, take the outcome. (On an SQLite file that nobody else uses, the write
 * is done by this very call, as it is by those that release.)
 *
 * Errors: INVALID, LIMIT; all others come from `lease_pending_take`.
 */
lease_status lease_manager_acquire_start(lease_manager_t *m,
                                         const char *name,
                                         int64_t timeout_ms,
                                         const lease_options_t *opts,
                                         lease_pending_t **out,
                                         lease_error_t **err);

/**
 * A descriptor that is readable, and stays so, when the acquire is done, with a lease or an error, or its cancel fd is readable. Only
 * poll it. Closed by `lease_pending_free`: take it out of your loop before.
 */
lease_status lease_pending_fd(const lease_pending_t *p,
                              int *out,
                              lease_error_t **err);

/**
 * The outcome: once, when the descriptor is readable. Never waits. `*out` is freed with `lease_free`.
 *
 * Errors: those of `lease_manager_acquire`, and then it is over. Before the descriptor is readable: TIMEOUT, "it still waits", and
 * nothing is over. INVALID when it was taken.
 */
lease_status lease_pending_take(lease_pending_t *p,
                                lease_t **out,
                                lease_error_t **err);

/**
 * Frees it and its descriptor: gives up waiting, and releases a lease that was not taken, in the background. NULL is fine.
 */
void lease_pending_free(lease_pending_t *p);

/**
 * What is held. Valid as long as the record; NULL: not a record.
 */
const char *lease_record_name(const lease_record_t *r);

/**
 * The holder's fencing token; 0: not a record.
 */
int64_t lease_record_token(const lease_record_t *r);

/**
 * The text the holder shows to others. Valid as long as the record; NULL: not a record.
 */
const char *lease_record_owner(const lease_record_t *r);

/**
 * For how many milliseconds it has held, as far as the store knows; -1: not a record.
 */
int64_t lease_record_held_ms(const lease_record_t *r);

/**
 * The holder's ttl in milliseconds; -1: not a record.
 */
int64_t lease_record_ttl_ms(const lease_record_t *r);

/**
 * How many claims wait behind it in the store; waiters of one manager count as one. -1: not a record.
 */
int64_t lease_record_waiting(const lease_record_t *r);

/**
 * Frees a record and its texts. Those of a list are freed with the list. NULL is fine.
 */
void lease_record_free(lease_record_t *r);

/**
 * How many records the list has; 0 for what is no list.
 */
size_t lease_records_count(const lease_records_t *rs);

/**
 * A record of the list, counted from 0; it lives as long as the list. NULL beyond its end.
 */
const lease_record_t *lease_records_at(const lease_records_t *rs, size_t index);

/**
 * Frees a list and its records. NULL is fine.
 */
void lease_records_free(lease_records_t *rs);

/**
 * Watches who holds a name. The first `lease_watch_next` tells who holds it now, each later one of a change; changes that follow
 * each other faster than you read are merged into the last. Free `*out` with `lease_watch_free`.
 *
 * Errors: INVALID, LIMIT.
 */
lease_status lease_manager_watch(lease_manager_t *m,
                                 const char *name,
                                 lease_watch_t **out,
                                 lease_error_t **err);

/**
 * Waits for the next change: `*out` becomes the new holder's record, to be freed with `lease_record_free`, or NULL when the name is
 * free. `timeout_ms` is as for `lease_manager_acquire`; with 0 a store that has to be asked may not have answered yet. Each change
 * is told to one thread: use one. Freeing the watch ends the wait.
 *
 * Errors: TIMEOUT when nothing changed in time, and no change is missed; UNAVAILABLE, DENIED, INCOMPATIBLE, UNSUPPORTED: the next call
 * tries again, a second later; CLOSED for good; INVALID, also when the watch was freed meanwhile; LIMIT.
 */
lease_status lease_watch_next(lease_watch_t *w,
                              int64_t timeout_ms,
                              lease_record_t **out,
                              lease_error_t **err);

/**
 * Frees a watch. NULL is fine.
 */
void lease_watch_free(lease_watch_t *w);

/**
 * A fence that has seen nothing; NULL when too many handles are in use. It is for one process: the durable form is a condition in
 * the write's own transaction, "... WHERE fence <= token". It remembers every name it has seen.
 */
lease_fence_t *lease_fence_new(void);

/**
 * Admits a write under this token, until `lease_fence_leave` with the same name and token, once for each. Waits while a write under
 * an older token is under way, 5 s at most.
 *
 * Errors: LOST when a newer token was seen: the write must not happen. TIMEOUT when the older write did not end; tokens older than
 * this one are refused all the same. INVALID.
 */
lease_status lease_fence_enter(lease_fence_t *f,
                               const char *name,
                               int64_t token,
                               lease_error_t **err);

/**
 * The write is done.
 *
 * Errors: NOT_FOUND when no write of that name and token is under way. INVALID.
 */
lease_status lease_fence_leave(lease_fence_t *f, const char *name, int64_t token, lease_error_t **err);

/**
 * Frees a fence. Writes that are under way are no longer guarded. NULL is fine.
 */
void lease_fence_free(lease_fence_t *f);

/**
 * Where log lines go: one function for the process, or NULL: nowhere, as at the start and in a forked child. It is called with one
 * of LEASE_LOG_... and a line of UTF-8 that is valid during the call; on threads of the library and within your own calls, on
 * several threads at once: it must hold no lock that you hold while you call the library. A slow function delays your own calls
 * and loses lines; it delays no heartbeat. What it causes in the library is not logged.
 *
 * Waits for lines that the function before is writing, 5 s at most, and not within that function; it is not called after that.
 */
void lease_set_log(void (*log)(int level, const char *message, void *user_data),
                   void *user_data);

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

#endif  /* LEASE_H */
