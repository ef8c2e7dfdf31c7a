// A small thread pool. Workers sleep between calls: spinning would steal cores from the encoder that runs in the same process.
#pragma once
#include <cstdint>
#include <functional>

namespace fanin {

// Cores this process may use: its affinity mask, cut by the cgroup's CPU quota (v2 and v1), at least 1.
int default_threads();

int threads();
void set_threads(int count);

// Runs work(0) … work(count − 1), each on its own thread (the caller is one). One job at a time: callers queue.
void parallel(int count, const std::function<void(int)>& work);

}  // namespace fanin
