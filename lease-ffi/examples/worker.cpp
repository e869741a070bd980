// A worker on a std::jthread, which is asked to stop when the lease is lost.
//
//     c++ -std=c++20 worker.cpp $(pkg-config --cflags --libs lease) -pthread -o worker && ./worker sqlite:jobs.db
#include <lease.hpp>

#include <cstdio>
#include <thread>

using namespace std::chrono_literals;

int main(int count, char **arguments) {
    try {
        lease::Manager manager(count > 1 ? arguments[1] : "sqlite:jobs.db", lease::Options().set("ttl", "15s"));
        lease::Lease held = manager.acquire("nightly", 60s);
        std::stop_token stop = held.stop_token();
        int row = 0;
        std::jthread worker([&held, &row, stop] {
            // The token wakes what waits; the clock decides.
            for (; row < 5 && !stop.stop_requested() && held.is_held(); row++) {
                std::printf("row %d, fence %lld\n", row, static_cast<long long>(held.token()));
                std::this_thread::sleep_for(20ms);
            }
        });
        worker.join();   // the work is over before the name is given back
        held.release();  // throws lease::Lost if it was lost: then not every row was written
        std::puts("done");
    } catch (const lease::Timeout &error) {
        std::fprintf(stderr, "%s is busy, held by %s\n", error.name().c_str(),
                     error.holder().empty() ? "somebody" : error.holder().c_str());
        return 1;
    } catch (const lease::Error &error) {
        std::fprintf(stderr, "%s\n", error.what());
        return 1;
    }
}
