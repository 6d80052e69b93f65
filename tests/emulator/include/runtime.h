// What an emulated kernel asks of the emulator (runtime.cpp): who it is, barriers, the other lanes of its warp, shared
// memory. cuda_shim.h and ptx.cuh turn CUDA's names into these.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#define EXPORTED __attribute__((visibility("default")))

namespace emulated {

struct Dim {
  unsigned x, y, z;
};

// The thread that runs.
struct Self {
  Dim thread, block, block_dim, grid_dim;
  int lane, cluster_rank;
};
EXPORTED extern Self* self;

// One `extern "C" __global__` function of a unit.
struct Entry {
  const char* name;
  const char* signature;  // as llmapi._kernels.gpu.Kernel
  void (*call)(void** args);
  int cluster;  // blocks of a cluster
};

// A unit that was loaded: its functions, and where its __shared__ variables lie. A block of a cluster has a copy.
struct Unit {
  const Entry* entries;
  int count;
  char *shared, *shared_end;
};

// Ends the launch with a message for a kernel that is wrong.
[[noreturn]] EXPORTED void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// A random bit, the same in every run.
EXPORTED bool coin();

EXPORTED void block_barrier(int id, int threads);  // 0: all that have not returned
EXPORTED void cluster_barrier();
EXPORTED void cluster_arrive();
EXPORTED void cluster_wait();

// Until changed() is called; the caller looks again whether that was what it waits for.
EXPORTED void wait_for_change(const char* what);
EXPORTED void changed();

// Lanes of a warp meet at an operation of one name. True to the one that comes last, at once: it works out `out` of
// `in` and calls release(). The others return when it has.
EXPORTED bool meet(const char* name, unsigned mask);
EXPORTED void release();
constexpr int MOST_BYTES = 64;  // that a lane gives or gets
struct Exchange {
  alignas(16) char in[32 * MOST_BYTES], out[32 * MOST_BYTES];
};
EXPORTED Exchange& exchange();

// Every lane gives `mine`; combine(const In* in, Out* out) fills what each lane gets.
template <typename Out, typename In, typename Combine>
Out together(const char* name, unsigned mask, const In& mine, Combine combine) {
  static_assert(sizeof(In) <= MOST_BYTES && sizeof(Out) <= MOST_BYTES, "larger than what lanes exchange");
  Exchange& with = exchange();
  memcpy(with.in + self->lane * sizeof(In), &mine, sizeof mine);
  if (meet(name, mask)) {
    combine(reinterpret_cast<const In*>(with.in), reinterpret_cast<Out*>(with.out));
    release();
  }
  Out out;
  memcpy(&out, with.out + self->lane * sizeof(Out), sizeof out);
  return out;
}

// ---- shared memory

EXPORTED char* dynamic_shared();
EXPORTED uint32_t shared_offset(const void* pointer);  // 32-bit shared addresses, 16-byte aligned like the pointers
EXPORTED char* shared_pointer(uint32_t offset, size_t bytes = 16);
EXPORTED const void* of_rank(const void* pointer, int rank);

// Asynchronous copies of the running thread: done somewhere between the call and the wait.
EXPORTED void start_copy(char* to, const void* from, int bytes);
EXPORTED void commit_copies();
EXPORTED void wait_copies(int pending);

// Something that the hardware does at some moment from now on; run() of a copy of `what`. It may not fail().
constexpr size_t MOST_LATER = 256;
struct Later {
  void (*run)(const void* what);
  alignas(64) char what[MOST_LATER];
};
EXPORTED void start_later(const Later& later);
template <typename T> void start_later(const T& what) {
  static_assert(sizeof(T) <= MOST_LATER && std::is_trivially_copyable<T>::value, "too large");
  Later later;
  later.run = [](const void* what) { static_cast<const T*>(what)->run(); };
  memcpy(later.what, &what, sizeof what);
  start_later(later);
}

// ---- entries

template <typename T> constexpr char letter() {
  if (std::is_pointer<T>::value) return 'p';
  if (std::is_same<T, float>::value) return 'f';
  if (std::is_same<T, int>::value) return 'i';
  if (std::is_same<T, unsigned>::value) return 'u';
  if (std::is_class<T>::value && sizeof(T) == 128) return 't';
  return std::is_integral<T>::value && sizeof(T) == 8 ? 'l' : '?';
}
template <typename... A> struct Signature {
  static constexpr char text[] = {letter<A>()..., 0};
};
template <auto F, typename... A, size_t... I> void call_with(void** args, std::index_sequence<I...>) {
  F(*static_cast<std::remove_const_t<A>*>(args[I])...);
}
template <auto F> struct Caller;
template <typename... A, void (*F)(A...)> struct Caller<F> {
  static void call(void** args) { call_with<F, A...>(args, std::index_sequence_for<A...>()); }
  static constexpr const char* signature() { return Signature<A...>::text; }
};

}  // namespace emulated
