#include "threads.h"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <cmath>
#include <condition_variable>
#include <fstream>
#include <mutex>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

namespace fanin {
namespace {

// CPU quota of one cgroup folder in cores, or 0 where there is none.
double quota_of(const std::string& folder) {
  if (std::ifstream file(folder + "/cpu.max"); file) {
    std::string limit;
    double period = 0;
    if (file >> limit >> period && limit != "max" && period > 0) return std::stod(limit) / period;
    return 0;
  }
  std::ifstream quota_file(folder + "/cpu.cfs_quota_us"), period_file(folder + "/cpu.cfs_period_us");
  double quota = 0, period = 0;
  if (quota_file >> quota && period_file >> period && quota > 0 && period > 0) return quota / period;
  return 0;
}

// The tightest quota among this process's cgroups and their parents, or 0.
double cpu_quota() {
  double best = 0;
  std::ifstream file("/proc/self/cgroup");
  for (std::string line; std::getline(file, line);) {
    std::istringstream parts(line);
    std::string id, controllers, path;
    std::getline(parts, id, ':');
    std::getline(parts, controllers, ':');
    std::getline(parts, path);
    std::string root;
    if (controllers.empty())
      root = "/sys/fs/cgroup";
    else if (("," + controllers + ",").find(",cpu,") != std::string::npos)
      root = "/sys/fs/cgroup/cpu";
    else
      continue;
    while (true) {
      const double quota = quota_of(root + path);
      if (quota > 0 && (best == 0 || quota < best)) best = quota;
      const auto slash = path.rfind('/');
      if (path.empty() || slash == std::string::npos) break;
      path.resize(slash);
    }
  }
  return best;
}

class Pool {
 public:
  void run(int count, const std::function<void(int)>& work) {
    std::unique_lock next(next_), turn(turn_);  // the one that waits is next, not who calls again at once
    next.unlock();
    resize(count - 1);
    {
      std::lock_guard lock(mutex_);
      work_ = &work;
      pending_ = count - 1;
      ++job_;
    }
    start_.notify_all();
    work(0);
    std::unique_lock lock(mutex_);
    done_.wait(lock, [&] { return pending_ == 0; });
  }

 private:
  void resize(int count) {
    if ((int)workers_.size() == count) return;
    {
      std::lock_guard lock(mutex_);
      stop_ = true;
    }
    start_.notify_all();
    for (auto& worker : workers_) worker.join();
    workers_.clear();
    stop_ = false;
    for (int i = 0; i < count; ++i) workers_.emplace_back([this, i, seen = job_]() mutable { loop(i + 1, seen); });
  }

  void loop(int index, uint64_t seen) {
    std::unique_lock lock(mutex_);
    while (true) {
      start_.wait(lock, [&] { return stop_ || job_ != seen; });
      if (stop_) return;
      seen = job_;
      const auto* work = work_;
      lock.unlock();
      (*work)(index);
      lock.lock();
      if (--pending_ == 0) done_.notify_one();
    }
  }

  std::mutex next_, turn_, mutex_;
  std::condition_variable start_, done_;
  std::vector<std::thread> workers_;
  const std::function<void(int)>* work_ = nullptr;
  uint64_t job_ = 0;
  int pending_ = 0;
  bool stop_ = false;
};

int thread_count = 0;

Pool* pool_of_process = nullptr;
std::once_flag created;

Pool& pool() {
  std::call_once(created, [] {
    pool_of_process = new Pool;
    // A forked child starts afresh: the parent's workers are not there, and its locks may be held for ever.
    pthread_atfork(nullptr, nullptr, [] { pool_of_process = new Pool; });
  });
  return *pool_of_process;
}

}  // namespace

int default_threads() {
  cpu_set_t set;
  CPU_ZERO(&set);
  int cores = (int)std::thread::hardware_concurrency();
  if (sched_getaffinity(0, sizeof set, &set) == 0) cores = CPU_COUNT(&set);
  const double quota = cpu_quota();
  if (quota > 0) cores = std::min(cores, (int)std::ceil(quota));
  return std::max(1, cores);
}

int threads() { return thread_count ? thread_count : thread_count = default_threads(); }

void set_threads(int count) { thread_count = count; }

void parallel(int count, const std::function<void(int)>& work) {
  if (count <= 1) return work(0);
  pool().run(count, work);
}

}  // namespace fanin
