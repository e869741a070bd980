// A store that is cut: the stop token is stopped before the ttl, and the classes say why.
#include <lease.hpp>

#include "cut.h"

#include <atomic>
#include <thread>

int main(int count, char **arguments) {
    using namespace std::chrono_literals;
    CHECK(count == 2);
    const std::string directory = arguments[1];
    const std::chrono::milliseconds ttl = 3000ms;
    cut_t cut = cut_prepare((directory + "/jobs.db-gate").c_str());

    lease::Manager manager("sqlite:" + directory + "/jobs.db", lease::Options().set("request_timeout", "200ms"));
    lease::Lease held = manager.acquire("nightly", 5s, lease::Options().set("ttl", "3000ms"));
    std::atomic<int> reason{-1};
    held.on_lost([&](lease::EndReason why) { reason = static_cast<int>(why); });
#ifdef LEASE_HAS_STOP_TOKEN
    std::atomic<std::int64_t> stopped_at{0};
    std::jthread worker([&, stop = held.stop_token()] {
        std::atomic<bool> told{false};
        std::stop_callback callback(stop, [&] { told = true; });
        while (!told) std::this_thread::sleep_for(1ms);
        CHECK(stop.stop_requested());
        stopped_at = now_ms();
    });
#endif

    cut_now(cut);
    const std::int64_t since = now_ms();
    EVENTUALLY(reason != -1);
    CHECK(now_ms() - since < ttl.count() * 2 / 3);
    CHECK(reason == static_cast<int>(lease::EndReason::unreachable));
    CHECK(!held.is_held() && held.remaining() == 0ms && held.end_reason() == lease::EndReason::unreachable);
    try {
        held.check();
        CHECK(!"it is lost");
    } catch (const lease::Lost &error) {
        CHECK(error.reason() == lease::EndReason::unreachable && error.name() == "nightly");
    }
#ifdef LEASE_HAS_STOP_TOKEN
    worker.join();
    CHECK(stopped_at - since < ttl.count() * 2 / 3);
#endif

    cut_heal(cut);
    lease::Lease next = manager.acquire("nightly", 10s);
    CHECK(next.token() > held.token());
    std::puts("ok");
}
