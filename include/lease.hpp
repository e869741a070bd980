/*
 * lease for C++17: what lease.h has, as classes that clean up and errors that are thrown. Header only; link with -llease.
 *
 *     lease::Manager manager("sqlite:jobs.db");
 *     lease::Lease held = manager.acquire("nightly", std::chrono::seconds(5));
 *     while (more_work()) {
 *         held.check();             // throws lease::Lost: stop
 *         work(held.token());
 *     }
 *     held.release();               // else the destructor does, in the background
 *
 * An object is used as one of C is: from many threads at once, except that moving and destroying it are the owner's alone.
 * What the functions promise is in lease.h. The functions of an object that was moved from throw Invalid; those that are noexcept
 * give what lease.h says of a handle that is none.
 */
#ifndef LEASE_HPP
#define LEASE_HPP

#include <lease.h>

#include <chrono>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#if __has_include(<version>)
#include <version>
#endif
#if defined(__cpp_lib_jthread)
#define LEASE_HAS_STOP_TOKEN 1
#include <mutex>
#include <stop_token>
#endif

namespace lease {

/** Why a lease ended. */
enum class EndReason : std::int32_t {
    released = LEASE_END_RELEASED,
    superseded = LEASE_END_SUPERSEDED,
    gone = LEASE_END_GONE,
    unreachable = LEASE_END_UNREACHABLE,
    stalled = LEASE_END_STALLED,
    denied = LEASE_END_DENIED,
    closed = LEASE_END_CLOSED,
    forked = LEASE_END_FORKED,
};

/** What went wrong; what() says it, with the name and what to do. The classes below are for the statuses. */
class Error : public std::runtime_error {
public:
    Error(lease_status status, const lease_error_t *error)
        : std::runtime_error(error != nullptr ? lease_error_message(error) : lease_status_name(status)),
          status_(status), retryable_(lease_error_is_retryable(error)), in_doubt_(lease_error_is_in_doubt(error)),
          reason_(lease_error_reason(error)), name_(text(lease_error_name(error))),
          holder_(text(lease_error_holder(error))) {}
    /** One of this header's own, about an argument. */
    Error(lease_status status, const std::string &message) : std::runtime_error(message), status_(status) {}

    lease_status status() const noexcept { return status_; }
    /** Whether the same call may succeed later with nothing changed by you. */
    bool is_retryable() const noexcept { return retryable_; }
    /** Whether the request may have been applied though its answer was not seen. */
    bool is_in_doubt() const noexcept { return in_doubt_; }
    /** The name it was about, or empty. */
    const std::string &name() const noexcept { return name_; }
    /** After a timeout: who held the name, if that is known. Else empty. */
    const std::string &holder() const noexcept { return holder_; }
    /** Why the lease ended, when that is the error. */
    std::optional<EndReason> reason() const noexcept {
        return reason_ < 0 ? std::nullopt : std::optional<EndReason>(static_cast<EndReason>(reason_));
    }

private:
    static std::string text(const char *text) { return text != nullptr ? text : ""; }

    lease_status status_;
    bool retryable_ = false, in_doubt_ = false;
    std::int32_t reason_ = -1;
    std::string name_, holder_;
};

class Timeout : public Error { using Error::Error; };
class Lost : public Error { using Error::Error; };
class Unavailable : public Error { using Error::Error; };
class Invalid : public Error { using Error::Error; };
class Unsupported : public Error { using Error::Error; };
class Denied : public Error { using Error::Error; };
class Incompatible : public Error { using Error::Error; };
class Cancelled : public Error { using Error::Error; };
class Closed : public Error { using Error::Error; };
class Forked : public Error { using Error::Error; };
class NotFound : public Error { using Error::Error; };
class Internal : public Error { using Error::Error; };
class Limit : public Error { using Error::Error; };

namespace detail {

/** An error handle that is freed however the scope is left. */
class Failure {
public:
    Failure() = default;
    Failure(const Failure &) = delete;
    Failure &operator=(const Failure &) = delete;
    ~Failure() { lease_error_free(error_); }

    lease_error_t **out() noexcept { return &error_; }

    void check(lease_status status) const {
        switch (status) {
        case LEASE_OK: return;
        case LEASE_ERR_TIMEOUT: throw Timeout(status, error_);
        case LEASE_ERR_LOST: throw Lost(status, error_);
        case LEASE_ERR_UNAVAILABLE: throw Unavailable(status, error_);
        case LEASE_ERR_INVALID: throw Invalid(status, error_);
        case LEASE_ERR_UNSUPPORTED: throw Unsupported(status, error_);
        case LEASE_ERR_DENIED: throw Denied(status, error_);
        case LEASE_ERR_INCOMPATIBLE: throw Incompatible(status, error_);
        case LEASE_ERR_CANCELLED: throw Cancelled(status, error_);
        case LEASE_ERR_CLOSED: throw Closed(status, error_);
        case LEASE_ERR_FORKED: throw Forked(status, error_);
        case LEASE_ERR_NOT_FOUND: throw NotFound(status, error_);
        case LEASE_ERR_LIMIT: throw Limit(status, error_);
        case LEASE_ERR_INTERNAL: throw Internal(status, error_);
        default: throw Error(status, error_);
        }
    }

private:
    lease_error_t *error_ = nullptr;
};

/** Calls a function of lease.h with these arguments and a place for the error, which is thrown. */
template <class Function, class... Arguments> void call(Function function, Arguments... arguments) {
    Failure failure;
    failure.check(function(arguments..., failure.out()));
}

/** A text for C, which ends at its first NUL: one with a NUL inside would silently be another. */
inline const char *text(const std::string &text, const char *argument) {
    if (text.find('\0') != std::string::npos) {
        throw Invalid(LEASE_ERR_INVALID, std::string("argument ") + argument + " has a NUL in it");
    }
    return text.c_str();
}

inline std::int64_t millis(std::optional<std::chrono::milliseconds> timeout) {
    if (!timeout) return LEASE_WAIT_FOREVER;
    if (timeout->count() < 0) {
        throw Invalid(LEASE_ERR_INVALID, "argument timeout is below zero: give none to wait for ever");
    }
    return timeout->count();
}

/** What a lease_..._new gave. */
template <class Handle> Handle *given(Handle *handle) {
    if (handle == nullptr) throw Limit(LEASE_ERR_LIMIT, "too many handles are in use: free some");
    return handle;
}

template <auto Free> struct Freeing {
    template <class Handle> void operator()(Handle *handle) const noexcept { Free(handle); }
};
template <class Handle, auto Free> using Owned = std::unique_ptr<Handle, Freeing<Free>>;

} // namespace detail

/** Options of an open or an acquire: Options().set("ttl", "15s"). */
class Options {
public:
    Options() : handle_(detail::given(lease_options_new())) {}
    Options &set(const std::string &key, const std::string &value) {
        detail::call(lease_options_set, handle_.get(), detail::text(key, "key"), detail::text(value, "value"));
        return *this;
    }
    /** An acquire gives up, with Cancelled, when this descriptor is readable. */
    Options &cancel_fd(int fd) {
        detail::call(lease_options_set_cancel_fd, handle_.get(), fd);
        return *this;
    }
    const lease_options_t *get() const {
        // NULL is no options to C.
        if (!handle_) throw Invalid(LEASE_ERR_INVALID, "these options were moved from");
        return handle_.get();
    }

private:
    detail::Owned<lease_options_t, lease_options_free> handle_;
};

/** Who holds a name. */
struct Record {
    std::string name;
    std::int64_t token;
    std::string owner;
    std::chrono::milliseconds held_for, ttl;
    std::int64_t waiting;

    explicit Record(const lease_record_t *record)
        : name(lease_record_name(record)), token(lease_record_token(record)), owner(lease_record_owner(record)),
          held_for(lease_record_held_ms(record)), ttl(lease_record_ttl_ms(record)),
          waiting(lease_record_waiting(record)) {}
};

/** Who holds a name, again whenever it changes. */
class Watch {
public:
    explicit Watch(lease_watch_t *handle) : handle_(handle) {}

    /** Waits for the next change; nothing when the name is free. The first tells who holds it now. Throws Timeout. */
    std::optional<Record> next(std::optional<std::chrono::milliseconds> timeout = std::nullopt) {
        lease_record_t *record = nullptr;
        detail::call(lease_watch_next, handle_.get(), detail::millis(timeout), &record);
        if (record == nullptr) return std::nullopt;
        detail::Owned<lease_record_t, lease_record_free> owned(record);
        return Record(record);
    }

private:
    detail::Owned<lease_watch_t, lease_watch_free> handle_;
};

/** Guards a resource of this process: `auto admitted = fence.admit(name, token);` over the write. Throws Lost. */
class Fence {
public:
    /** A write under way, until it is destroyed. */
    class Admitted {
    public:
        Admitted(lease_fence_t *fence, std::string name, std::int64_t token)
            : fence_(fence), name_(std::move(name)), token_(token) {}
        Admitted(Admitted &&other) noexcept
            : fence_(std::exchange(other.fence_, nullptr)), name_(std::move(other.name_)), token_(other.token_) {}
        Admitted &operator=(Admitted &&) = delete;
        ~Admitted() {
            // A handle, which may be stale: the fence may be gone.
            if (fence_ != nullptr) lease_fence_leave(fence_, name_.c_str(), token_, nullptr);
        }

    private:
        lease_fence_t *fence_;
        std::string name_;
        std::int64_t token_;
    };

    Fence() : handle_(detail::given(lease_fence_new())) {}
    [[nodiscard]] Admitted admit(const std::string &name, std::int64_t token) {
        detail::call(lease_fence_enter, handle_.get(), detail::text(name, "name"), token);
        return Admitted(handle_.get(), name, token);
    }

private:
    detail::Owned<lease_fence_t, lease_fence_free> handle_;
};

// A lease of the part of a program that is C++20 is another class than one of its C++17 part, and the linker says so.
#ifdef LEASE_HAS_STOP_TOKEN
inline namespace with_stop_token {
#else
inline namespace without_stop_token {
#endif

/** A name that is yours, as long as is_held() says so. The destructor releases it in the background. */
class Lease {
public:
    explicit Lease(lease_t *handle) : handle_(handle) {}
    Lease(Lease &&) = default;
    Lease &operator=(Lease &&other) noexcept {
        if (this != &other) {
            request_stop();
            handle_ = std::move(other.handle_);
#ifdef LEASE_HAS_STOP_TOKEN
            stop_ = std::move(other.stop_);
#endif
        }
        return *this;
    }
    ~Lease() { request_stop(); }

    std::int64_t token() const noexcept { return lease_token(get()); }
    bool is_held() const noexcept { return lease_is_held(get()); }
    /** Throws Lost once it has ended: call it before each step of the work. */
    void check() const { detail::call(lease_check, get()); }
    /** Until it is lost unless a renewal succeeds: at most half the ttl, 0 once it ended. */
    std::chrono::milliseconds remaining() const noexcept {
        return std::chrono::milliseconds(lease_remaining_ms(get()));
    }
    /** Why it ended; nothing while it is held. */
    std::optional<EndReason> end_reason() const noexcept {
        const std::int32_t reason = lease_end_reason(get());
        return reason < 0 ? std::nullopt : std::optional<EndReason>(static_cast<EndReason>(reason));
    }
    std::string name() const {
        const char *name = lease_name(get());
        return name != nullptr ? name : "";
    }
    /** Readable, and stays so, once it is not held. Only poll it; it is closed with this object. */
    int cancelled_fd() const {
        int fd = -1;
        detail::call(lease_cancelled_fd, get(), &fd);
        return fd;
    }
    /** Asks the store. Throws Lost; Unavailable when it does not answer: then it is held still, until its time is up. */
    void confirm() { detail::call(lease_confirm, get()); }
    /** Calls back once, on a thread of the library, if it is lost. The callback must not throw. */
    void on_lost(std::function<void(EndReason)> callback) {
        if (!callback) throw Invalid(LEASE_ERR_INVALID, "argument callback is empty: give a function");
        auto *data = new std::function<void(EndReason)>(std::move(callback));
        // The library frees it in every case, a failure included.
        detail::call(lease_on_lost, get(), &Lease::lost, static_cast<void *>(data), &Lease::free_callback);
    }
    /**
     * Gives it back. Throws Lost if it had been lost before; Unavailable, in doubt, if the store could not be told: then it
     * expires. Harmless when repeated.
     */
    void release() {
        request_stop();
        detail::call(lease_release, get());
    }

#ifdef LEASE_HAS_STOP_TOKEN
    /**
     * Stop is requested when it is lost, and when this object releases it or is destroyed. Closing the manager, which is the
     * holder's own act, ends the lease without: join the work first.
     */
    std::stop_token stop_token() {
        if (!stop_) throw Invalid(LEASE_ERR_INVALID, "this lease was moved from");
        std::call_once(stop_->linked, [this] {
            on_lost([stop = stop_->source](EndReason) mutable { stop.request_stop(); });
        });
        if (!is_held()) request_stop();
        return stop_->source.get_token();
    }
#endif

    lease_t *get() const noexcept { return handle_.get(); }

private:
    static void lost(std::int32_t reason, void *data) noexcept {
        (*static_cast<std::function<void(EndReason)> *>(data))(static_cast<EndReason>(reason));
    }
    static void free_callback(void *data) noexcept { delete static_cast<std::function<void(EndReason)> *>(data); }

    void request_stop() noexcept {
#ifdef LEASE_HAS_STOP_TOKEN
        if (stop_) stop_->source.request_stop();
#endif
    }

    detail::Owned<lease_t, lease_free> handle_;
#ifdef LEASE_HAS_STOP_TOKEN
    struct Stop {
        std::stop_source source;
        std::once_flag linked;
    };
    std::unique_ptr<Stop> stop_ = std::make_unique<Stop>();
#endif
};

/** An acquire that goes on in the background, for event loops. Destroying it gives up waiting. */
class Pending {
public:
    explicit Pending(lease_pending_t *handle) : handle_(handle) {}

    /** Readable when it is done, with a lease or an error. Only poll it; it is closed with this object. */
    int fd() const {
        int fd = -1;
        detail::call(lease_pending_fd, handle_.get(), &fd);
        return fd;
    }
    /** The outcome: once, when the descriptor is readable. Throws as Manager::acquire; Timeout also while it still waits. */
    Lease take() {
        lease_t *lease = nullptr;
        detail::call(lease_pending_take, handle_.get(), &lease);
        return Lease(lease);
    }

private:
    detail::Owned<lease_pending_t, lease_pending_free> handle_;
};

/** A manager of leases on one store. The destructor closes it: that releases every lease, and may take 5 s. */
class Manager {
public:
    /** Of the URL in the variable LEASE_URL. */
    Manager() : Manager(nullptr, nullptr) {}
    explicit Manager(const std::string &url) : Manager(detail::text(url, "url"), nullptr) {}
    Manager(const std::string &url, const Options &options) : Manager(detail::text(url, "url"), options.get()) {}

    /** Waits until the name is yours; no timeout waits for ever. Throws Timeout. */
    [[nodiscard]] Lease acquire(const std::string &name, std::optional<std::chrono::milliseconds> timeout = std::nullopt) {
        return acquire(name, timeout, nullptr);
    }
    [[nodiscard]] Lease acquire(const std::string &name, std::optional<std::chrono::milliseconds> timeout, const Options &options) {
        return acquire(name, timeout, options.get());
    }
    /** One attempt: nothing when somebody else holds the name. */
    [[nodiscard]] std::optional<Lease> try_acquire(const std::string &name) { return try_acquire(name, nullptr); }
    [[nodiscard]] std::optional<Lease> try_acquire(const std::string &name, const Options &options) {
        return try_acquire(name, options.get());
    }
    /** Who holds the name; nothing when it is free. */
    std::optional<Record> inspect(const std::string &name) {
        lease_record_t *record = nullptr;
        detail::call(lease_manager_inspect, get(), detail::text(name, "name"), &record);
        if (record == nullptr) return std::nullopt;
        detail::Owned<lease_record_t, lease_record_free> owned(record);
        return Record(record);
    }
    std::vector<Record> list(const std::string &prefix = "") {
        lease_records_t *records = nullptr;
        detail::call(lease_manager_list, get(), detail::text(prefix, "prefix"), &records);
        detail::Owned<lease_records_t, lease_records_free> owned(records);
        std::vector<Record> all;
        for (std::size_t at = 0; at < lease_records_count(records); at++) all.emplace_back(lease_records_at(records, at));
        return all;
    }
    void break_lease(const std::string &name, std::int64_t token) {
        detail::call(lease_manager_break, get(), detail::text(name, "name"), token);
    }
    Watch watch(const std::string &name) {
        lease_watch_t *watch = nullptr;
        detail::call(lease_manager_watch, get(), detail::text(name, "name"), &watch);
        return Watch(watch);
    }
    /** As acquire, without waiting: take the lease when the descriptor is readable. */
    [[nodiscard]] Pending acquire_start(const std::string &name, std::optional<std::chrono::milliseconds> timeout = std::nullopt) {
        return acquire_start(name, timeout, nullptr);
    }
    [[nodiscard]] Pending acquire_start(const std::string &name, std::optional<std::chrono::milliseconds> timeout,
                          const Options &options) {
        return acquire_start(name, timeout, options.get());
    }
    void ping() { detail::call(lease_manager_ping, get()); }
    /** Releases everything. The destructor does it too, and says nothing of errors. */
    void close() { detail::call(lease_manager_close, get()); }

    lease_manager_t *get() const noexcept { return handle_.get(); }

private:
    static void close_and_free(lease_manager_t *manager) noexcept {
        lease_manager_close(manager, nullptr);
        lease_manager_free(manager);
    }
    Manager(const char *url, const lease_options_t *options) {
        detail::call(lease_version_check, static_cast<std::uint32_t>(LEASE_VERSION_NUMBER));
        lease_manager_t *manager = nullptr;
        detail::call(lease_manager_open, url, options, &manager);
        handle_.reset(manager);
    }
    Lease acquire(const std::string &name, std::optional<std::chrono::milliseconds> timeout, const lease_options_t *options) {
        lease_t *lease = nullptr;
        detail::call(lease_manager_acquire, get(), detail::text(name, "name"), detail::millis(timeout), options, &lease);
        return Lease(lease);
    }
    Pending acquire_start(const std::string &name, std::optional<std::chrono::milliseconds> timeout,
                          const lease_options_t *options) {
        lease_pending_t *pending = nullptr;
        detail::call(lease_manager_acquire_start, get(), detail::text(name, "name"), detail::millis(timeout), options,
                     &pending);
        return Pending(pending);
    }
    std::optional<Lease> try_acquire(const std::string &name, const lease_options_t *options) {
        try {
            return acquire(name, std::chrono::milliseconds(0), options);
        } catch (const Timeout &) {
            return std::nullopt;
        }
    }

    detail::Owned<lease_manager_t, close_and_free> handle_;
};

} // inline namespace
} // namespace lease

#endif
