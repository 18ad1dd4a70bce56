// A CUDA kernel on the CPU, thread by thread: each thread of a block is a fiber that runs until it
// has to wait for others, at a barrier or in a shuffle.
//
// All fibers of a block must come to the same kind of waiting point; a block that does not (on a GPU
// it would hang or read rubbish) ends the program. Shared memory is filled with rubbish first.
// For tests: one kernel at a time, in one thread of the machine.
#pragma once

#include <csetjmp>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <vector>

#include <ucontext.h>

#define __global__
#define __grid_constant__
#define __launch_bounds__(...)
#define MEGATRON_EXT_SHARED(name) unsigned char* name = ::megatron_ext::emulate::block().shared.data()

namespace megatron_ext::emulate {

struct Index {
  unsigned x = 0, y = 0, z = 0;
};

struct alignas(16) Vector4 {
  uint32_t x, y, z, w;
};

struct alignas(8) Vector2 {
  uint32_t x, y;
};

enum class Wait : int { kBarrier, kShuffle, kEnd };

struct Fiber {
  std::vector<char> stack = std::vector<char>(96 * 1024);
  ucontext_t start{};
  jmp_buf place{};
  bool is_started = false;
  Wait wait = Wait::kBarrier;
  unsigned num_shuffles = 0;
  float sent[2] = {};
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<unsigned char> shared;
  std::function<void()> kernel;
  Index thread, block, num_threads;
  jmp_buf scheduler{};
};

inline Block& block() {
  static Block one;
  return one;
}

inline void wait(Wait kind) {
  Block& here = block();
  Fiber& self = here.fibers[here.thread.x];
  self.wait = kind;
  if (_setjmp(self.place) == 0) _longjmp(here.scheduler, 1);
}

inline void fiber_main() {
  block().kernel();
  wait(Wait::kEnd);
}

inline void resume(unsigned thread) {
  Block& here = block();
  here.thread.x = thread;
  Fiber& fiber = here.fibers[thread];
  if (_setjmp(here.scheduler) != 0) return;
  if (fiber.is_started) _longjmp(fiber.place, 1);
  fiber.is_started = true;
  getcontext(&fiber.start);
  fiber.start.uc_stack.ss_sp = fiber.stack.data();
  fiber.start.uc_stack.ss_size = fiber.stack.size();
  fiber.start.uc_link = nullptr;
  makecontext(&fiber.start, fiber_main, 0);
  setcontext(&fiber.start);
}

inline void run_block(unsigned num_threads) {
  Block& here = block();
  for (Fiber& fiber : here.fibers) {
    fiber.is_started = false;
    fiber.num_shuffles = 0;
  }
  do {
    for (unsigned thread = 0; thread < num_threads; ++thread) {
      resume(thread);
      if (here.fibers[thread].wait != here.fibers[0].wait) {
        std::fprintf(stderr, "thread %u does not wait where thread 0 does\n", thread);
        std::abort();
      }
    }
  } while (here.fibers[0].wait != Wait::kEnd);
}

inline void run(unsigned blocks, unsigned threads, unsigned shared_bytes,
                std::function<void()> kernel) {
  Block& here = block();
  here.fibers.resize(threads);
  here.kernel = std::move(kernel);
  here.num_threads.x = threads;
  for (unsigned index = 0; index < blocks; ++index) {
    here.block.x = index;
    here.shared.assign(shared_bytes, 0xA5);
    run_block(threads);
  }
}

inline float shuffle_xor(float value, unsigned lane_mask) {
  Block& here = block();
  unsigned thread = here.thread.x;
  // Two slots: a fiber that is a shuffle ahead does not overwrite what others still read.
  unsigned slot = here.fibers[thread].num_shuffles++ & 1u;
  here.fibers[thread].sent[slot] = value;
  wait(Wait::kShuffle);
  return here.fibers[thread ^ lane_mask].sent[slot];
}

}  // namespace megatron_ext::emulate

#define threadIdx (::megatron_ext::emulate::block().thread)
#define blockIdx (::megatron_ext::emulate::block().block)
#define blockDim (::megatron_ext::emulate::block().num_threads)
using uint4 = ::megatron_ext::emulate::Vector4;
using uint2 = ::megatron_ext::emulate::Vector2;

inline void __syncthreads() {
  ::megatron_ext::emulate::wait(::megatron_ext::emulate::Wait::kBarrier);
}

inline float __shfl_xor_sync(unsigned, float value, int lane_mask) {
  return ::megatron_ext::emulate::shuffle_xor(value, unsigned(lane_mask));
}

inline unsigned atomicMax(unsigned* address, unsigned value) {
  unsigned old = *address;
  if (value > old) *address = value;
  return old;
}
