// The team of threads. A process that runs torch already has one, spinning between its parallel regions: a second pool
// would fight it for the cores (measured: alternating the two costs several times the sum of each). So where libgomp is
// loaded we run on its team through its stable entry point GOMP_parallel; elsewhere, in a forked child (libgomp does not
// survive fork) and under PYLLM_POOL=own, on a small pool of ours.
#include "cpu/threads.h"

#include <dlfcn.h>
#include <link.h>
#include <pthread.h>
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

namespace pyllm::cpu {
namespace {

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

// This thread's, the same for all jobs.
int thread_number() {
  static std::atomic<int> threads{0};
  static thread_local const int number = threads.fetch_add(1, std::memory_order_relaxed);
  return number;
}

// Each thread begins with a share of its own, the same for all jobs of a size, since what an earlier job left in its core's
// caches lies there; then it takes what is left of the others'.
struct Job {
  static constexpr int kMostShares = 16;
  struct alignas(64) Share {
    std::atomic<int64_t> next;
    int64_t end;
  };

  Job(int64_t n, int64_t grain, int threads, Task task, const void* context)
      : n_(n), grain_(grain), shares_(std::min(threads, kMostShares)), task_(task), context_(context) {
    const int64_t pieces = (n + grain - 1) / grain;
    for (int64_t s = 0; s < shares_; s++) {
      share_[s].next.store(pieces * s / shares_ * grain, std::memory_order_relaxed);
      share_[s].end = pieces * (s + 1) / shares_ * grain;
    }
  }

  void work() {
    for (int s = 0; s < shares_; s++) {
      Share& share = share_[(thread_number() + s) % shares_];
      for (;;) {
        const int64_t begin = share.next.fetch_add(grain_, std::memory_order_relaxed);
        if (begin >= share.end) break;
        task_(context_, begin, std::min(begin + grain_, n_));
      }
    }
  }

 private:
  int64_t n_, grain_;
  int shares_;
  Task task_;
  const void* context_;
  Share share_[kMostShares];
};

thread_local bool inside = false;

template <class J>
void work_on(void* job) {
  inside = true;
  static_cast<J*>(job)->work();
  inside = false;
}

class Pool {
 public:
  explicit Pool(int threads) {
    for (int i = 1; i < threads; i++) members_.emplace_back([this] { serve(); });
  }
  ~Pool() {
    stop_ = true;
    generation_.fetch_add(1);
    generation_.notify_all();
    for (auto& t : members_) t.join();
  }
  int size() const { return static_cast<int>(members_.size()) + 1; }

  void run(void (*work)(void*), void* job) {
    work_ = work;
    job_ = job;
    busy_.store(static_cast<int>(members_.size()), std::memory_order_relaxed);
    generation_.fetch_add(1, std::memory_order_release);
    generation_.notify_all();
    work(job);
    for (int spins = 0; busy_.load(std::memory_order_acquire) != 0; spins++)
      spins < 4096 ? pause() : std::this_thread::yield();
  }

 private:
  void serve() {
    uint32_t seen = 0;
    for (;;) {
      for (int spins = 0; generation_.load(std::memory_order_acquire) == seen && spins < 2000; spins++) pause();
      generation_.wait(seen, std::memory_order_acquire);
      seen = generation_.load(std::memory_order_acquire);
      if (stop_) return;
      work_(job_);
      busy_.fetch_sub(1, std::memory_order_release);
    }
  }

  std::vector<std::thread> members_;
  std::atomic<uint32_t> generation_{0};
  std::atomic<int> busy_{0};
  std::atomic<bool> stop_{false};
  void (*work_)(void*) = nullptr;
  void* job_ = nullptr;
};

struct Gomp {
  void (*parallel)(void (*)(void*), void*, unsigned, unsigned) = nullptr;
  int (*num_threads)() = nullptr;  // of the region that the caller is in
  explicit operator bool() const { return parallel && num_threads; }
};

Gomp find_gomp() {
  const char* wanted = std::getenv("PYLLM_POOL");
  Gomp found;
  if (wanted && std::strcmp(wanted, "own") == 0) return found;
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* out) {
        if (!info->dlpi_name || !std::strstr(info->dlpi_name, "libgomp")) return 0;
        void* library = dlopen(info->dlpi_name, RTLD_LAZY | RTLD_NOLOAD);
        if (!library) return 0;
        auto& gomp = *static_cast<Gomp*>(out);
        gomp.parallel = reinterpret_cast<decltype(gomp.parallel)>(dlsym(library, "GOMP_parallel"));
        gomp.num_threads = reinterpret_cast<decltype(gomp.num_threads)>(dlsym(library, "omp_get_num_threads"));
        return gomp ? 1 : 0;
      },
      &found);
  return found;
}

std::atomic<int> wanted_threads{0};
std::mutex pool_mutex;
Pool* pool = nullptr;
bool forked = false;

void after_fork_in_child() {
  forked = true;
  pool = nullptr;  // its threads do not exist here; the memory is given up on purpose
  new (&pool_mutex) std::mutex();
  inside = false;
}

// When this library is loaded: a child must not enter libgomp even where only torch has used it before.
[[maybe_unused]] const int registered = pthread_atfork(nullptr, nullptr, after_fork_in_child);

Gomp gomp() {
  static const Gomp found = find_gomp();
  return forked ? Gomp{} : found;
}

// A team that has been called together for many jobs: its members spin until the leader has the next one. A job that
// needs not everyone does not wait for a member that has lost its core to someone else: the leader closes it once there is
// nothing left to take, and then waits for those alone who have come to work on it.
struct Vigil {
  void (*body)(void*);
  void* context;
  pthread_t leader = pthread_self();
  std::atomic<int> members{0};  // that serve
  // The job's number, whether it is open, and how many members are at it.
  static constexpr uint64_t kOpen = 1 << 16, kNumber = kOpen << 1, kAtWork = kOpen - 1;
  alignas(64) std::atomic<uint64_t> ticket{0};
  void (*work)(void*) = nullptr;
  void* job = nullptr;
  std::atomic<bool> over{false};
  std::exception_ptr error{};  // of the body, which must not pass through the team's own frames
  alignas(64) std::atomic<int> finished{0};

  void run(void (*w)(void*), void* j, bool everyone) {
    work = w, job = j;
    finished.store(0, std::memory_order_relaxed);
    const uint64_t number = ticket.load(std::memory_order_relaxed) / kNumber + 1;
    ticket.store(number * kNumber + kOpen, std::memory_order_release);
    work(job);
    const auto waiting = [&] {
      return (ticket.load(std::memory_order_acquire) & kAtWork) != 0 ||
             (everyone && finished.load(std::memory_order_acquire) < members.load(std::memory_order_relaxed));
    };
    if (!everyone) ticket.fetch_and(~kOpen, std::memory_order_acq_rel);
    for (int spins = 0; waiting(); spins++) spins < 4096 ? pause() : std::this_thread::yield();
  }

  void enter(int threads);

  void serve() {
    uint64_t seen = 0;
    members.fetch_add(1);
    for (int spins = 0; !over.load(std::memory_order_acquire);) {
      uint64_t t = ticket.load(std::memory_order_acquire);
      if (!(t & kOpen) || t / kNumber == seen || !ticket.compare_exchange_weak(t, t + 1, std::memory_order_acq_rel)) {
        spins++ < 20000 ? pause() : std::this_thread::yield();
        continue;
      }
      seen = t / kNumber;
      work(job);
      finished.fetch_add(1, std::memory_order_release);
      ticket.fetch_sub(1, std::memory_order_release);
      spins = 0;
    }
  }
};
thread_local Vigil* vigil = nullptr;

void Vigil::enter(int threads) {
  if (!pthread_equal(pthread_self(), leader)) return serve();
  while (members.load() + 1 < threads) pause();  // whoever joins later would miss a job
  inside = false;                                // the leader's calls are not nested ones
  vigil = this;
  try {
    body(context);
  } catch (...) {
    error = std::current_exception();
  }
  vigil = nullptr;
  over.store(true, std::memory_order_release);
}

// work(job) on every thread of the team, or, unless it takes everyone, on those at hand; false where there is no team.
bool run_on_all(void (*work)(void*), void* job, bool everyone) {
  if (vigil) {
    vigil->run(work, job, everyone);
    return true;
  }
  if (const Gomp team = gomp()) {
    team.parallel(work, job, static_cast<unsigned>(num_threads()), 0);
    return true;
  }
  std::unique_lock lock(pool_mutex, std::try_to_lock);
  if (!lock) return false;  // another Python thread has the pool
  if (!pool || pool->size() != num_threads()) {
    delete pool;
    pool = new Pool(num_threads());
  }
  pool->run(work, job);
  return true;
}

constexpr size_t kHugePage = 2 << 20;

struct Scratch {
  void* block[kScratchSlots] = {};
  size_t bytes[kScratchSlots] = {};
  ~Scratch() {
    for (void* b : block) std::free(b);
  }
};
thread_local Scratch scratch_blocks;

}  // namespace

int num_threads() {
  const int n = wanted_threads.load(std::memory_order_relaxed);
  return n > 0 ? n : 1;
}

void set_num_threads(int n) { wanted_threads = n; }

const char* thread_backend() { return gomp() ? "openmp" : "pool"; }

void run_parallel(int64_t n, int64_t grain, Task task, const void* context) {
  if (n <= 0) return;
  if (grain < 1) grain = 1;
  const int64_t pieces = (n + grain - 1) / grain;
  const int threads = static_cast<int>(pieces < num_threads() ? pieces : num_threads());
  if (threads <= 1 || inside) return task(context, 0, n);
  Job job(n, grain, threads, task, context);
  if (!run_on_all(work_on<Job>, &job, false)) task(context, 0, n);
}

constexpr int kMostThreads = 4096;  // that may be set

struct TeamJob {
  int most;
  Member member;
  const void* context;
  Team team{};
  std::atomic<int> arrived{0};
  std::atomic<uint64_t> taken[kMostThreads / 64] = {};

  void work() {
    if (arrived.fetch_add(1) >= most) return;
    const Gomp region = gomp();
    const int size = std::min(most, region ? region.num_threads() : pool->size());
    team.size_ = size;  // the same from each
    member(context, team, take_rank(size));
  }

  // The same one each time, whoever comes first, for the sake of what lies in this core's caches.
  int take_rank(int size) {
    for (int rank = thread_number() % size;; rank = (rank + 1) % size) {
      const uint64_t bit = uint64_t{1} << rank % 64;
      if (!(taken[rank / 64].fetch_or(bit) & bit)) return rank;
    }
  }
};

void run_team(int most, Member member, const void* context) {
  TeamJob job{most, member, context};
  if (most > 1 && num_threads() > 1 && !inside && run_on_all(work_on<TeamJob>, &job, true)) return;
  member(context, job.team, 0);
}

struct VigilJob {
  Vigil vigil;
  void work() {
    const Gomp region = gomp();
    vigil.enter(region ? region.num_threads() : pool->size());
  }
};

void keep_awake(void (*body)(void*), void* context) {
  VigilJob job{{body, context}};
  if (num_threads() <= 1 || inside || vigil || !run_on_all(work_on<VigilJob>, &job, true)) return body(context);
  if (job.vigil.error) std::rethrow_exception(job.vigil.error);
}

void Team::barrier() {
  if (size() == 1) return;
  const uint32_t phase = phase_.load(std::memory_order_relaxed);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size()) {
    arrived_.store(0, std::memory_order_relaxed);
    phase_.store(phase + 1, std::memory_order_release);
    return;
  }
  // Spinning is for the steps of a kernel, a few microseconds apart; a team that lacks a core gives way.
  for (int spins = 0; phase_.load(std::memory_order_acquire) == phase; spins++)
    spins < 2000 ? pause() : std::this_thread::yield();
}

void* scratch(size_t bytes, int slot) {
  Scratch& s = scratch_blocks;
  if (s.bytes[slot] < bytes) {
    std::free(s.block[slot]);
    s.bytes[slot] = 0;
    const size_t page = bytes < kHugePage / 2 ? 4096 : kHugePage;
    const size_t rounded = (bytes + page - 1) / page * page;
    s.block[slot] = std::aligned_alloc(page, rounded);
    if (!s.block[slot]) throw std::bad_alloc();
    if (page == kHugePage) madvise(s.block[slot], rounded, MADV_HUGEPAGE);
    s.bytes[slot] = rounded;
  }
  return s.block[slot];
}

}  // namespace pyllm::cpu
