// The classes of lease.hpp: what they give, what they throw, what they clean up.
#include <lease.hpp>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <poll.h>
#include <thread>
#include <unistd.h>

#define CHECK(condition)                                                                   \
    do {                                                                                   \
        if (!(condition)) {                                                                \
            std::fprintf(stderr, "%s:%d: does not hold: %s\n", __FILE__, __LINE__, #condition); \
            std::exit(1);                                                                  \
        }                                                                                  \
    } while (0)

template <class Expected, class Body> void check_throws(Body body) {
    try {
        body();
    } catch (const Expected &) {
        return;
    }
    CHECK(!"nothing was thrown");
}

int main() {
    using namespace std::chrono_literals;
    lease::Manager manager("memory:", lease::Options().set("ttl", "15s"));
    {
        lease::Lease held = manager.acquire("nightly", 5s);
        CHECK(held.is_held() && held.token() >= 1 && held.name() == "nightly" && !held.end_reason());
        CHECK(held.remaining() > 0ms && held.remaining() <= 7500ms);
        held.check();
        held.confirm();
        CHECK(!manager.try_acquire("nightly"));
        try {
            manager.acquire("nightly", 20ms);
            CHECK(!"it is held");
        } catch (const lease::Timeout &error) {
            CHECK(error.is_retryable() && error.name() == "nightly" && !error.holder().empty());
            CHECK(error.status() == LEASE_ERR_TIMEOUT && !error.reason());
        }
        CHECK(manager.inspect("nightly")->token == held.token() && manager.list("night").size() == 1);
        lease::Lease moved = std::move(held);
        CHECK(moved.is_held());
    }
    // The destructor has released it, in the background.
    lease::Lease again = manager.acquire("nightly", 5s);
    again.release();
    again.release();
    check_throws<lease::Lost>([&] { again.check(); });
    CHECK(again.end_reason() == lease::EndReason::released && !manager.inspect("nightly"));

    lease::Lease lost = manager.acquire("lost");
    std::atomic<int> told{-1};
    lost.on_lost([&](lease::EndReason reason) { told = static_cast<int>(reason); });
#if defined(__cpp_lib_jthread)
    std::stop_token stop = lost.stop_token();
    CHECK(stop.stop_possible() && !stop.stop_requested());
    std::jthread worker([stop] { while (!stop.stop_requested()) usleep(1000); });
#endif
    manager.break_lease("lost", lost.token());
    check_throws<lease::Lost>([&] { lost.confirm(); });
    pollfd polled{lost.cancelled_fd(), POLLIN, 0};
    CHECK(poll(&polled, 1, 5000) == 1);
#if defined(__cpp_lib_jthread)
    worker.join();
#endif
    for (int at = 0; at < 5000 && told < 0; at++) usleep(1000);
    CHECK(told == LEASE_END_GONE);

    check_throws<lease::Invalid>([] { lease::Manager("nowhere"); });
    check_throws<lease::Invalid>([&] { manager.acquire("", 1s); });
    check_throws<lease::Invalid>([] { lease::Options().set("tll", "1s"); });
    check_throws<lease::NotFound>([&] { manager.break_lease("nightly", 1); });
    lease::Fence fence;
    { auto admitted = fence.admit("row", 8); }
    check_throws<lease::Lost>([&] { auto admitted = fence.admit("row", 7); });
    manager.close();
    check_throws<lease::Closed>([&] { manager.ping(); });
    std::puts("ok");
}
