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
 *     lease_manager_t *manager;  lease_t *lease;  lease_error_t *error = NULL;
 *     if (lease_manager_open("sqlite:jobs.db", NULL, &manager, &error)) ...
 *     if (lease_manager_acquire(manager, "nightly", 5000, NULL, &lease, &error)) ...
 *     while (more_work() && lease_check(lease, NULL) == LEASE_OK) work(lease_token(lease));
 *     lease_release(lease, NULL);  lease_free(lease);
 *     lease_manager_close(manager, NULL);  lease_manager_free(manager);
 *
 * CONVENTIONS
 *
 * Naming     lease_NOUN_VERB acts on a lease_NOUN_t; lease_VERB on a lease_t. The reasons of an end are LEASE_END_...
 * Order      self, inputs, outputs, error.
 * Errors     Calls that can fail return a lease_status: LEASE_OK is 0. *out is written only on success. err may be NULL;
 *            *err is written only on failure, and is freed with lease_error_free. (NULL when memory or handles ran out.)
 * Ownership  What a call gives through out is yours: free it with the _free of its type. Handles are not addresses: never
 *            dereference one. A handle that was freed, or is of another type, gives LEASE_ERR_INVALID, and frees nothing.
 *            Texts that you give are read during the call only; texts that you get live as long as the handle says.
 * NULL       Every _free accepts it. opts may be NULL. Elsewhere it is LEASE_ERR_INVALID, naming the argument.
 * Threads    Every function may be called from many threads at once, on the same handle too. The library has threads of its
 *            own, which block all signals. They outlive dlclose: the library is never unloaded.
 * Callbacks  run on a thread of the library, one after another, and may call the library. They must not throw or longjmp.
 * Blocking   No call blocks without a bound: a timeout you gave, the request timeout (3 s), or 5 s. Signals end no wait.
 * fork       A child has none of its parent's handles: they give LEASE_ERR_FORKED, and their _free does nothing. The leases
 *            stay the parent's. Do not open in a child a database file that its parent had open: exec first.
 * Units      Times are milliseconds, int64_t, their names end in _ms; options are texts with a unit: "15s". Tokens are
 *            int64_t and at least 1. Texts are UTF-8. A name has 1 to 512 bytes.
 * Options    "ttl": lifetime without renewal, default "30s". "owner": what others see, default host:pid.
 *            "request_timeout": the bound of one request to the store, default "3s". "timeout" is for URLs.
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
 * What a call came to: `LEASE_OK`, or one of `LEASE_ERR_…`.
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
 * The status that the failed call gave too; `LEASE_ERR_INVALID` for what is no error handle.
 */
lease_status lease_error_status(const lease_error_t *e);

/**
 * What happened, to which name, and what to do: one line of UTF-8. Never NULL. Valid until `lease_error_free`.
 */
const char *lease_error_message(const lease_error_t *e);

/**
 * Whether the same call may succeed later with nothing changed by you.
 */
bool lease_error_is_retryable(const lease_error_t *e);

/**
 * Whether the outcome is unknown: the request may have been applied though its answer was not seen.
 */
bool lease_error_is_in_doubt(const lease_error_t *e);

/**
 * The name it was about, or NULL. Valid until `lease_error_free`.
 */
const char *lease_error_name(const lease_error_t *e);

/**
 * After a timeout: the owner text of who held the name. Else NULL. Valid until `lease_error_free`.
 */
const char *lease_error_holder(const lease_error_t *e);

/**
 * Why the lease ended, when that is the error: one of `LEASE_END_…`. Else -1.
 */
int32_t lease_error_reason(const lease_error_t *e);

/**
 * Frees an error. NULL is fine.
 */
void lease_error_free(lease_error_t *e);

/**
 * The name of a status, such as "LEASE_ERR_LOST"; "LEASE_ERR_?" for a number this version does not know. Never freed.
 */
const char *lease_status_name(lease_status s);

/**
 * New options with nothing set; NULL when memory or handles ran out.
 */
lease_options_t *lease_options_new(void);

/**
 * Sets an option by its key: "ttl", "timeout", "owner", "request_timeout". Times are a number and a unit: "15s", "500ms".
 * Setting a key again replaces its value. `LEASE_ERR_INVALID` for an unknown key, naming the nearest known one, and for a
 * wrong value.
 */
lease_status lease_options_set(lease_options_t *o,
                               const char *key,
                               const char *value,
                               lease_error_t **err);

/**
 * A descriptor that ends the wait of an acquire: when it is readable, the acquire gives up with `LEASE_ERR_CANCELLED`. It is
 * only polled, and duplicated, so you may close yours afterwards. -1 sets none.
 */
lease_status lease_options_set_cancel_fd(lease_options_t *o,
                                         int fd,
                                         lease_error_t **err);

/**
 * Frees options. NULL is fine.
 */
void lease_options_free(lease_options_t *o);

/**
 * Opens a manager on the store of a URL, such as "sqlite:jobs.db" or "memory:". A NULL `url` means the variable `LEASE_URL`.
 * `opts` may be NULL; options beat those of the URL. A store that does not answer is no error before the first call that
 * needs it.
 *
 * Errors: INVALID for a wrong URL or option, DENIED for a path that cannot be written, INCOMPATIBLE for another program's
 * file, UNSUPPORTED for a store this build lacks, LIMIT when the system has no thread or descriptor left.
 */
lease_status lease_manager_open(const char *url,
                                const lease_options_t *opts,
                                lease_manager_t **out,
                                lease_error_t **err);

/**
 * Waits until the name is yours, and gives a lease. `timeout_ms` is how long to wait: `LEASE_WAIT_FOREVER`, or
 * `LEASE_TRY_ONCE` for one attempt (which takes at most the request timeout). `opts` may be NULL, and may set "ttl" and
 * "owner" for this lease, and a cancel fd. Signals do not end the wait: use a cancel fd.
 *
 * Errors: TIMEOUT with holder when the time was up, UNAVAILABLE if the store did not answer until then, CANCELLED by the
 * cancel fd, INVALID, DENIED, INCOMPATIBLE, CLOSED, LIMIT.
 */
lease_status lease_manager_acquire(lease_manager_t *m,
                                   const char *name,
                                   int64_t timeout_ms,
                                   const lease_options_t *opts,
                                   lease_t **out,
                                   lease_error_t **err);

/**
 * Who holds the name: `*out` becomes a record to be freed, or NULL when it is free.
 *
 * Errors: UNAVAILABLE, DENIED, INVALID, INCOMPATIBLE, CLOSED.
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
 * Takes the lease with that token away, for operators. Its holder is told when it renews, at the latest after half its ttl: until
 * then it may overlap its successor, and only the token protects.
 *
 * Errors: NOT_FOUND when no claim of that token is there, and as `lease_manager_inspect`. UNAVAILABLE is in doubt.
 */
lease_status lease_manager_break(lease_manager_t *m,
                                 const char *name,
                                 int64_t token,
                                 lease_error_t **err);

/**
 * Whether the store answers.
 *
 * Errors: as `lease_manager_inspect`.
 */
lease_status lease_manager_ping(lease_manager_t *m, lease_error_t **err);

/**
 * Ends every wait with CLOSED, releases every lease, and leaves no thread, descriptor or claim behind. Finish the work first.
 * Takes at most 5 s; harmless when repeated. The handle stays until `lease_manager_free`.
 *
 * Errors: UNAVAILABLE, in doubt, if the store could not be told of every release: what it is not told of expires.
 */
lease_status lease_manager_close(lease_manager_t *m,
                                 lease_error_t **err);

/**
 * Frees the handle. A manager that was not closed is closed in the background once its last lease is freed. NULL is fine.
 */
void lease_manager_free(lease_manager_t *m);

/**
 * The fencing token: greater than every token given before for this name. Show it to whatever you write to. It stays readable
 * after the end. 0: not a lease handle.
 */
int64_t lease_token(const lease_t *l);

/**
 * Whether it is yours at this instant, by the clock: never true again once it was false. Asks nobody.
 */
bool lease_is_held(const lease_t *l);

/**
 * Call it before each step of the work: `LEASE_OK` while held. It reads a clock and asks nobody.
 *
 * Errors: LOST with the reason (`lease_error_reason`) once the lease has ended, FORKED in the child of a fork, INVALID.
 */
lease_status lease_check(const lease_t *l, lease_error_t **err);

/**
 * Milliseconds until it is lost unless a renewal succeeds: at most half the ttl, 0 once it ended.
 */
int64_t lease_remaining_ms(const lease_t *l);

/**
 * Why it ended, one of `LEASE_END_…`; -1 while held, and for what is no lease handle.
 */
int32_t lease_end_reason(const lease_t *l);

/**
 * What is leased. Valid until `lease_free`; NULL: not a lease handle.
 */
const char *lease_name(const lease_t *l);

/**
 * A descriptor that becomes readable, and stays so, once the lease is not held any more, whatever the reason. For poll, epoll
 * and event loops: never read, write or close it. The same at each call. Valid until `lease_free`.
 *
 * Errors: LIMIT when no descriptor is left, INVALID, FORKED.
 */
lease_status lease_cancelled_fd(const lease_t *l,
                                int *out,
                                lease_error_t **err);

/**
 * Asks the store: a renewal now.
 *
 * Errors: LOST when the store says that it is gone, or when its time was up; UNAVAILABLE when the store does not answer: then it
 * is held still, until its time is up.
 */
lease_status lease_confirm(lease_t *l,
                           lease_error_t **err);

/**
 * Calls back once, on a thread of the library, if the lease is lost; never for your own release or close. Any number of
 * callbacks; one that is registered after the loss is called too. It may block and call the library, `lease_free` of this lease
 * included; it must not throw or longjmp. `free_user_data` (or NULL) is called with `user_data` exactly once in every case,
 * after the callback or when there will be none, also when this call fails. `lease_free` waits for a callback that is running
 * (5 s at most, and not in a callback), and none starts after it.
 *
 * Errors: INVALID, FORKED.
 */
lease_status lease_on_lost(lease_t *l,
                           void (*callback)(int32_t reason, void *user_data),
                           void *user_data,
                           void (*free_user_data)(void *user_data),
                           lease_error_t **err);

/**
 * Gives the name back, at once. Finish the work first. Takes at most 5 s. Harmless when repeated. The handle stays until
 * `lease_free`.
 *
 * Errors: LOST if it had been lost before; UNAVAILABLE, in doubt, if the store could not be told: the library keeps trying, and
 * what it cannot delete expires.
 */
lease_status lease_release(lease_t *l,
                           lease_error_t **err);

/**
 * Frees the handle; a lease that is still held is released in the background. NULL is fine.
 */
void lease_free(lease_t *l);

/**
 * As `lease_manager_acquire`, without waiting: `*out` becomes an acquire that goes on in the background. When its descriptor
 * is readable, take the outcome.
 *
 * Errors: of the arguments only; all others come from `lease_pending_take`.
 */
lease_status lease_manager_acquire_start(lease_manager_t *m,
                                         const char *name,
                                         int64_t timeout_ms,
                                         const lease_options_t *opts,
                                         lease_pending_t **out,
                                         lease_error_t **err);

/**
 * A descriptor that is readable when the acquire is done, with a lease or an error, or its cancel fd is readable. Only poll it.
 * Valid until `lease_pending_free`.
 */
lease_status lease_pending_fd(const lease_pending_t *p,
                              int *out,
                              lease_error_t **err);

/**
 * The outcome: once, when the descriptor is readable. Never waits.
 *
 * Errors: those of `lease_manager_acquire`; TIMEOUT also while it still waits: then take it later. INVALID when it was taken.
 */
lease_status lease_pending_take(lease_pending_t *p,
                                lease_t **out,
                                lease_error_t **err);

/**
 * Frees it: gives up waiting, and releases a lease that was not taken. NULL is fine.
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
 * How many claims wait behind it in the store; waiters inside one process count as one. -1: not a record.
 */
int64_t lease_record_waiting(const lease_record_t *r);

/**
 * Frees a record. NULL is fine.
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
 * each other faster than you read are merged into the last.
 *
 * Errors: INVALID, FORKED.
 */
lease_status lease_manager_watch(lease_manager_t *m,
                                 const char *name,
                                 lease_watch_t **out,
                                 lease_error_t **err);

/**
 * Waits for the next change: `*out` becomes the new holder's record, to be freed, or NULL when the name is free. `timeout_ms` is
 * as for `lease_manager_acquire`. Each change is told to one thread: use one. Freeing the watch ends the wait.
 *
 * Errors: TIMEOUT when nothing changed in time; UNAVAILABLE, DENIED, INCOMPATIBLE: the next call tries again, a second later;
 * CLOSED for good; INVALID, also when the watch was freed meanwhile; FORKED.
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
 * A fence that has seen nothing; NULL when memory or handles ran out. It is for one process: the durable form is a condition in
 * the write's own transaction, "… WHERE fence <= token".
 */
lease_fence_t *lease_fence_new(void);

/**
 * Admits a write under this token, until `lease_fence_leave` with the same name and token. Waits while a write under an older
 * token is under way, 5 s at most.
 *
 * Errors: LOST when a newer token was seen: the write must not happen. TIMEOUT when the older write did not end. INVALID.
 */
lease_status lease_fence_enter(lease_fence_t *f,
                               const char *name,
                               int64_t token,
                               lease_error_t **err);

/**
 * The write is done.
 *
 * Errors: INVALID when no write of that name and token was admitted.
 */
lease_status lease_fence_leave(lease_fence_t *f, const char *name, int64_t token, lease_error_t **err);

/**
 * Frees a fence. NULL is fine.
 */
void lease_fence_free(lease_fence_t *f);

/**
 * Where log lines go: one function for the process, called on any thread with one of `LEASE_LOG_…` and a line of UTF-8 that is
 * valid during the call. NULL: nowhere, as at the start. Once this has returned, the function before is not called any more; so
 * do not call this from the function itself, where it does nothing. A slow function loses lines, and delays no heartbeat.
 */
void lease_set_log(void (*log)(int level, const char *message, void *user_data),
                   void *user_data);

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

#endif  /* LEASE_H */
