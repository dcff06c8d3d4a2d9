// CUDA's built-ins for a host compiler, for tests only. Thread blocks run one after the other, and
// each CUDA thread of a block has its own context.
//
// By default each CUDA thread is a host thread. Barriers and shuffles are then real
// synchronization, so ThreadSanitizer reports a missing one as a data race. With SHIM_FIBERS the
// contexts take turns in one host thread. This is twenty times faster and serves to check numbers.
// A thread that returns early leaves its barriers, as on a GPU. Shared memory is `static`: blocks
// never overlap, so one copy is enough. It keeps what the previous block left there, as
// uninitialized memory may.
#pragma once

#include <atomic>
#include <climits>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#ifdef SHIM_FIBERS
#include <ucontext.h>
#else
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
inline thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace shim {

constexpr unsigned kWarp = 32;

#ifdef SHIM_FIBERS

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  bool ended = false;
};

inline ucontext_t scheduler;
inline std::vector<Fiber> fibers;
inline unsigned waiting_in_a_row = 0;

inline void yield() { swapcontext(&fibers[threadIdx.x].context, &scheduler); }

class Barrier {
 public:
  explicit Barrier(unsigned threads) : expected_(threads) {}

  void wait() {
    const unsigned round = round_;
    if (++arrived_ == expected_) next_round();
    while (round_ == round) ++waiting_in_a_row, yield();
    waiting_in_a_row = 0;
  }

  // The calling thread will not wait here again.
  void leave() {
    if (--expected_ == arrived_ && expected_ > 0) next_round();
  }

 private:
  void next_round() { arrived_ = 0, ++round_; }

  unsigned expected_, arrived_ = 0, round_ = 0;
};

#else

// A barrier that orders its threads only by its rounds, so that ThreadSanitizer misses no race by
// chance. A thread that leaves a round late must not synchronize with what faster threads did after
// that round. A mutex would cause that, and so would std::barrier, whose waiters share a few pools
// in libstdc++. So this class uses its own counters and a bare futex, which no sanitizer sees.
class Barrier {
 public:
  explicit Barrier(unsigned threads) : expected_(threads), missing_(threads) {}

  void wait() {
    const unsigned round = round_.load(std::memory_order_relaxed);
    arrive();
    while (round_.load(std::memory_order_acquire) == round)
      syscall(SYS_futex, &round_, FUTEX_WAIT_PRIVATE, round, nullptr);
  }

  // The calling thread will not wait here again.
  void leave() {
    expected_.fetch_sub(1, std::memory_order_relaxed);
    arrive();
  }

 private:
  void arrive() {
    if (missing_.fetch_sub(1, std::memory_order_acq_rel) != 1) return;
    missing_.store(expected_.load(std::memory_order_relaxed), std::memory_order_relaxed);
    round_.fetch_add(1, std::memory_order_release);
    syscall(SYS_futex, &round_, FUTEX_WAKE_PRIVATE, INT_MAX);
  }

  std::atomic<unsigned> expected_, missing_, round_ = 0;
};

#endif

struct Warp {
  explicit Warp(unsigned lanes) : barrier(lanes) {}
  Barrier barrier;
  uint64_t values[kWarp] = {};
};

struct Block {
  explicit Block(unsigned threads) : barrier(threads), votes(threads) {
    for (unsigned first = 0; first < threads; first += kWarp)
      warps.push_back(std::make_unique<Warp>(threads - first < kWarp ? threads - first : kWarp));
  }
  Barrier barrier;
  std::vector<char> votes;
  std::vector<std::unique_ptr<Warp>> warps;
};

inline Block* running = nullptr;  // written between blocks only
inline Warp& warp() { return *running->warps[threadIdx.x / kWarp]; }

// Each lane publishes its value and reads the value of lane `from`.
template <class T>
T exchange(T value, unsigned from) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  Warp& own = warp();
  std::memcpy(&own.values[threadIdx.x % kWarp], &value, sizeof(T));
  own.barrier.wait();
  T result;
  std::memcpy(&result, &own.values[from], sizeof(T));
  own.barrier.wait();  // else the next exchange could overwrite a value before a slow lane reads it
  return result;
}

// Runs the threads of one block, each of which calls `thread`.
template <class F>
void run_block(unsigned threads, const F& thread) {
#ifdef SHIM_FIBERS
  static const F* body;
  body = &thread;
  constexpr size_t kStack = 128 << 10;
  if (fibers.size() < threads) fibers.resize(threads);
  for (unsigned t = 0; t < threads; ++t) {
    Fiber& fiber = fibers[t];
    if (!fiber.stack) fiber.stack = std::make_unique<char[]>(kStack);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = &scheduler;
    fiber.ended = false;
    makecontext(&fiber.context, [] { (*body)(), fibers[threadIdx.x].ended = true, waiting_in_a_row = 0; }, 0);
  }
  for (unsigned ended = 0; ended < threads;) {
    ended = 0;
    for (unsigned t = 0; t < threads; ++t) {
      if (!fibers[t].ended) threadIdx.x = t, swapcontext(&scheduler, &fibers[t].context);
      ended += fibers[t].ended;
    }
    if (waiting_in_a_row > 2 * threads) std::fprintf(stderr, "shim: all threads of a block wait\n"), std::abort();
  }
#else
  std::vector<std::thread> pool;
  const dim3 block = blockIdx, block_size = blockDim, grid = gridDim;
  for (unsigned t = 0; t < threads; ++t) {
    pool.emplace_back([&, t] {
      threadIdx.x = t, blockIdx = block, blockDim = block_size, gridDim = grid;
      thread();
    });
  }
  for (std::thread& one : pool) one.join();
#endif
}

// kernel<<<grid, threads>>>. `body` calls the kernel, once in each thread.
template <class F>
void launch(dim3 grid, unsigned threads, const F& body) {
  if (grid.x == 0 || grid.y == 0 || grid.x > 2147483647u || grid.y > 65535u || threads == 0 || threads > 1024)
    std::fprintf(stderr, "shim: a device refuses a grid of %u x %u blocks of %u threads\n", grid.x, grid.y, threads),
        std::abort();
  for (unsigned y = 0; y < grid.y; ++y) {
    for (unsigned x = 0; x < grid.x; ++x) {
      Block block(threads);
      running = &block;
      blockIdx.x = x, blockIdx.y = y, blockDim.x = threads, gridDim = grid;
      run_block(threads, [&] {
        body();
        warp().barrier.leave();
        block.barrier.leave();
      });
    }
  }
}
template <class F>
void launch(unsigned blocks, unsigned threads, const F& body) {
  launch(dim3{blocks}, threads, body);
}

}  // namespace shim

#ifdef SHIM_DROP_LINE  // leaves out the barrier on this line, for a test that must find the race
#define __syncthreads() (__LINE__ == SHIM_DROP_LINE ? void() : shim::running->barrier.wait())
#define __syncwarp() (__LINE__ == SHIM_DROP_LINE ? void() : shim::warp().barrier.wait())
#else
inline void __syncthreads() { shim::running->barrier.wait(); }
inline void __syncwarp(unsigned = ~0u) { shim::warp().barrier.wait(); }
#endif

inline int __syncthreads_or(int predicate) {
  shim::Block& block = *shim::running;
  block.votes[threadIdx.x] = predicate != 0;
  block.barrier.wait();
  int any = 0;
  for (const char vote : block.votes) any |= vote;
  block.barrier.wait();
  return any;
}

template <class T>
T __shfl_sync(unsigned, T value, int lane) {
  return shim::exchange(value, unsigned(lane) % shim::kWarp);
}
template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return shim::exchange(value, (threadIdx.x ^ unsigned(mask)) % shim::kWarp);
}
template <class T>
T __shfl_up_sync(unsigned, T value, unsigned delta) {
  const unsigned lane = threadIdx.x % shim::kWarp;
  return shim::exchange(value, lane < delta ? lane : lane - delta);
}
template <class T>
T __shfl_down_sync(unsigned, T value, unsigned delta) {
  const unsigned lane = threadIdx.x % shim::kWarp;
  return shim::exchange(value, lane + delta < shim::kWarp ? lane + delta : lane);
}

inline void sincospif(float x, float* sine, float* cosine) {
  const double angle = 3.14159265358979323846 * double(x);
  *sine = float(std::sin(angle));
  *cosine = float(std::cos(angle));
}

// Integer atomics and bit functions for bitmap_to_indices.cuh. The atomics are relaxed, as on a
// GPU: they do not order other memory accesses.
template <class T>
T atomicAdd(T* address, T value) {
  return __atomic_fetch_add(address, value, __ATOMIC_RELAXED);
}
template <class T>
T atomicOr(T* address, T value) {
  return __atomic_fetch_or(address, value, __ATOMIC_RELAXED);
}
template <class T>
T atomicMin(T* address, T value) {
  T old = __atomic_load_n(address, __ATOMIC_RELAXED);
  while (value < old && !__atomic_compare_exchange_n(address, &old, value, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
  return old;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clzll(long long x) { return x == 0 ? 64 : __builtin_clzll(static_cast<unsigned long long>(x)); }
