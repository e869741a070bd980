// The classes of lease.hpp: what they give, what they throw, what they clean up.
#include <lease.hpp>

#include "check.h"

#include <atomic>
#include <thread>

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
            (void)manager.acquire("nightly", 20ms);
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
#ifdef LEASE_HAS_STOP_TOKEN
    std::stop_token stop = lost.stop_token();
    CHECK(stop.stop_possible() && !stop.stop_requested());
    CHECK(lost.stop_token() == stop);
    std::jthread worker([stop] { while (!stop.stop_requested()) std::this_thread::yield(); });
#endif
    manager.break_lease("lost", lost.token());
    check_throws<lease::Lost>([&] { lost.confirm(); });
    CHECK(readable(lost.cancelled_fd(), 5000) == 1);
#ifdef LEASE_HAS_STOP_TOKEN
    worker.join();
#endif
    EVENTUALLY(told >= 0);
    CHECK(told == LEASE_END_GONE);

    // What ends by this object ends the work that hangs on it.
#ifdef LEASE_HAS_STOP_TOKEN
    std::stop_token of_released, of_destroyed, of_replaced;
    {
        lease::Lease released = manager.acquire("released"), destroyed = manager.acquire("destroyed");
        lease::Lease replaced = manager.acquire("replaced");
        of_released = released.stop_token(), of_destroyed = destroyed.stop_token(), of_replaced = replaced.stop_token();
        released.release();
        CHECK(of_released.stop_requested() && !of_destroyed.stop_requested());
        replaced = std::move(destroyed);
        CHECK(of_replaced.stop_requested() && !of_destroyed.stop_requested() && replaced.is_held());
        check_throws<lease::Invalid>([&] { destroyed.stop_token(); });
    }
    CHECK(of_destroyed.stop_requested());
#endif

    // An acquire that does not block, and a watch.
    lease::Watch watch = manager.watch("loop");
    CHECK(!watch.next(5s));
    lease::Pending pending = manager.acquire_start("loop", 5s);
    CHECK(readable(pending.fd(), 5000) == 1);
    lease::Lease taken = pending.take();
    CHECK(watch.next(5s)->token == taken.token());
    check_throws<lease::Timeout>([&] { watch.next(20ms); });
    check_throws<lease::Invalid>([&] { pending.take(); });

    check_throws<lease::Invalid>([] { lease::Manager("nowhere"); });
    check_throws<lease::Invalid>([&] { (void)manager.acquire(std::string("cut\0off", 7), 1s); });
    check_throws<lease::Invalid>([&] { (void)manager.acquire("negative", -1ms); });
    check_throws<lease::Invalid>([&] { lease::Manager moved = std::move(manager); manager.ping(); });
    check_throws<lease::Invalid>([&] {
        lease::Options options, moved = std::move(options);
        (void)manager.acquire("moved", 0ms, options);
    });
    lease::Manager again_open("memory:");
    manager = std::move(again_open);
    check_throws<lease::Invalid>([&] { (void)manager.acquire("", 1s); });
    check_throws<lease::Invalid>([] { lease::Options().set("tll", "1s"); });
    check_throws<lease::NotFound>([&] { manager.break_lease("nightly", 1); });
    lease::Fence fence;
    { auto admitted = fence.admit("row", 8); }
    check_throws<lease::Lost>([&] { auto admitted = fence.admit("row", 7); });
    {
        auto admitted = fence.admit("row", 9);
        fence = lease::Fence();
    }
    {
        // Of one's own close the token tells when it is asked for.
        lease::Manager closed("memory:");
        lease::Lease held = closed.acquire("closed");
        closed.close();
        CHECK(held.end_reason() == lease::EndReason::closed);
#ifdef LEASE_HAS_STOP_TOKEN
        CHECK(held.stop_token().stop_requested());
#endif
    }
    manager.close();
    check_throws<lease::Closed>([&] { manager.ping(); });
    std::puts("ok");
}
