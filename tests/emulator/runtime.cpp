// The emulator: runs the blocks of a launch one after the other (those of a cluster together), a fiber for each thread.
//
// One fiber runs at a time and is left only where it waits, or at random where it need not. Which fiber goes on is
// random, so a thread that should have waited for another one often has not, and then sees shared memory as it was
// poisoned. A launch ends with a message when threads wait for each other forever, when they meet wrongly, when memory
// is touched that does not exist, or when it takes too long.
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <ucontext.h>
#include <unistd.h>

#include <string>
#include <vector>

#include "include/runtime.h"

extern "C" const emulated::Entry* emulated_entry(const emulated::Unit* unit, const char* name);

namespace emulated {
namespace {

constexpr size_t STACK = 256 << 10, PAGE = 4096, GUARD = 1 << 20;
constexpr int POISON = 0xff;  // every float, half and bfloat16 of it is NaN
constexpr int WARP = 32, BARRIERS = 16;
constexpr uint32_t STATIC_SHARED = 1u << 24;  // where static shared memory begins in 32-bit addresses

// ---- changing from one stack to another

#if defined(__x86_64__)
typedef void* Context;
extern "C" void emulated_switch(Context* from, Context to);
asm(R"(
.text
.hidden emulated_switch
.globl emulated_switch
.type emulated_switch, @function
emulated_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");
void change(Context& from, Context& to) { emulated_switch(&from, to); }
void prepare(Context& context, char* stack, void (*body)()) {
  void** top = reinterpret_cast<void**>(stack + STACK);
  top[-1] = nullptr;
  top[-2] = reinterpret_cast<void*>(body);
  context = top - 8;  // below it: six registers of no meaning
}
#else
typedef ucontext_t Context;
void change(Context& from, Context& to) { swapcontext(&from, &to); }
void prepare(Context& context, char* stack, void (*body)()) {
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = STACK;
  context.uc_link = nullptr;
  makecontext(&context, body, 0);
}
#endif

// ---- what runs

struct Copy {
  char* to;
  const void* from;
  int bytes;
};
struct Block;
struct Warp;
struct Fiber {
  Context context;
  char* stack = nullptr;
  Self self;
  Block* block;
  Warp* warp;
  const char* waits;  // for what; null: ready or done
  bool done;
  int cluster_phase;  // at which it arrived
  std::vector<std::vector<Copy>> groups;  // copies in flight, the last group still open
};
struct Barrier {
  int expected = 0;  // 0: all threads that have not returned
  std::vector<Fiber*> here;
};
struct Warp {
  Exchange exchange;
  const char* name = nullptr;
  unsigned mask = 0, arrived = 0;
  std::vector<Fiber*> here;
};
struct Block {
  Barrier barriers[BARRIERS];
  std::vector<Warp> warps;
  std::vector<char> memory;
  char* dynamic = nullptr;
  const Unit* unit = nullptr;
  void (*call)(void**) = nullptr;
  int live = 0;
};
struct Cluster {
  std::vector<Block> blocks;
  Barrier barrier;
  int live = 0;
  int arrived = 0, phase = 0;      // of the barrier that is arrived at and waited for apart
  std::vector<Fiber*> expectant;  // that look again when something changes
  std::vector<Later> laters;      // not done yet
};

std::vector<Fiber*> pool;
std::vector<Fiber*> ready;
Fiber* running;
Cluster* cluster;
Context outside;
void** arguments;
size_t dynamic_bytes;
uint64_t random_state;
std::string message;
const void* fault_address;
sigjmp_buf escape;

uint32_t random_number() {
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return (uint32_t)(random_state >> 16);
}

std::string name_of(const Fiber* fiber) {
  const Self& s = fiber->self;
  char text[96];
  snprintf(text, sizeof text, "thread %u of block (%u, %u, %u)", s.thread.x, s.block.x, s.block.y, s.block.z);
  return text;
}

void leave() { change(running->context, outside); }

void wait(const char* what) {
  running->waits = what;
  leave();
}
// Lets others go first, now and then.
void maybe_yield() {
  if (!coin()) return;
  ready.push_back(running);
  leave();
}
void wake(std::vector<Fiber*>& fibers) {
  for (Fiber* fiber : fibers) {
    fiber->waits = nullptr;
    ready.push_back(fiber);
  }
  fibers.clear();
}
void arrive(Barrier& barrier, int expected, const char* what) {
  if ((int)barrier.here.size() + 1 >= expected) {
    wake(barrier.here);
    maybe_yield();
  } else {
    barrier.here.push_back(running);
    wait(what);
  }
}
// A thread has returned: those at a barrier for all wait for one less.
void settle(Barrier& barrier, int live) {
  if (!barrier.here.empty() && (int)barrier.here.size() >= live) wake(barrier.here);
}

void run_body() {
  running->block->call(arguments);
  running->done = true;
  settle(running->block->barriers[0], --running->block->live);
  settle(cluster->barrier, --cluster->live);
  leave();
  abort();
}

void finish(const Copy& copy) {
  memset(copy.to, 0, 16);
  memcpy(copy.to, copy.from, copy.bytes);
}

// ---- one cluster

void report_waiting(const std::vector<Fiber*>& fibers) {
  message = "the threads wait for each other forever:";
  int told = 0;
  for (size_t i = 0; i < fibers.size() && told < 6; told++) {
    size_t j = i;
    auto same = [&](const Fiber* a, const Fiber* b) {
      return a->block == b->block && a->done == b->done && (a->waits == b->waits || (a->waits && b->waits && !strcmp(a->waits, b->waits)));
    };
    while (j < fibers.size() && same(fibers[i], fibers[j])) j++;
    message += " " + name_of(fibers[i]) + (j - i > 1 ? " and the " + std::to_string(j - i - 1) + " after it " : " ");
    message += fibers[i]->done ? "returned;" : std::string("at ") + (fibers[i]->waits ? fibers[i]->waits : "?") + ";";
    i = j;
  }
  message.pop_back();
}

Fiber* fiber_at(size_t i) {
  while (pool.size() <= i) {
    Fiber* fiber = new Fiber;
    char* base = static_cast<char*>(
        mmap(nullptr, STACK + PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    mprotect(base, PAGE, PROT_NONE);
    fiber->stack = base + PAGE;
    pool.push_back(fiber);
  }
  return pool[i];
}

bool run_cluster(const Unit* const* units, const char* name, int size, Dim first, Dim grid, int threads) {
  Cluster own;
  cluster = &own;
  own.blocks.resize(size);
  own.live = size * threads;
  std::vector<Fiber*> fibers;
  ready.clear();
  for (int rank = 0; rank < size; rank++) {
    Block& block = own.blocks[rank];
    block.unit = units[rank];
    block.call = emulated_entry(units[rank], name)->call;
    block.live = threads;
    block.warps.resize((threads + WARP - 1) / WARP);
    block.memory.assign(dynamic_bytes + 128, (char)POISON);
    block.dynamic = block.memory.data() + (-reinterpret_cast<uintptr_t>(block.memory.data()) & 127);
    if (block.unit->shared) memset(block.unit->shared, POISON, block.unit->shared_end - block.unit->shared);
    for (int t = 0; t < threads; t++) {
      Fiber* fiber = fiber_at(fibers.size());
      fiber->self = {{(unsigned)t, 0, 0}, {first.x + rank, first.y, first.z}, {(unsigned)threads, 1, 1}, grid, t % WARP, rank};
      fiber->block = &block;
      fiber->warp = &block.warps[t / WARP];
      fiber->waits = nullptr;
      fiber->done = false;
      fiber->cluster_phase = 0;
      fiber->groups.assign(1, {});
      prepare(fiber->context, fiber->stack, run_body);
      fibers.push_back(fiber);
      ready.push_back(fiber);
    }
  }
  while (!ready.empty() || !own.laters.empty()) {
    if (!own.laters.empty() && (ready.empty() || random_number() % 8 == 0)) {
      if (!own.live) {
        message = "the blocks have ended, and a bulk copy is still on its way";
        break;
      }
      size_t pick = random_number() % own.laters.size();
      Later later = own.laters[pick];
      own.laters.erase(own.laters.begin() + (long)pick);
      later.run(later.what);
      continue;
    }
    size_t pick = random_number() % ready.size();
    running = ready[pick];
    ready[pick] = ready.back();
    ready.pop_back();
    self = &running->self;
    change(outside, running->context);
    if (!message.empty()) return false;
  }
  if (own.live && message.empty()) report_waiting(fibers);
  if (message.empty()) {
    for (Block& block : own.blocks)
      for (char* at = block.dynamic + dynamic_bytes; at < block.memory.data() + block.memory.size(); at++)
        if (*at != (char)POISON) message = "dynamic shared memory was written behind its end";
  }
  return message.empty();
}

// ---- faults

void on_signal(int signal, siginfo_t* info, void*) {
  fault_address = signal == SIGSEGV || signal == SIGBUS ? info->si_addr : nullptr;
  siglongjmp(escape, signal);
}

class Handlers {
 public:
  Handlers() {
    stack_.ss_sp = memory_;
    stack_.ss_size = sizeof memory_;
    stack_.ss_flags = 0;
    sigaltstack(&stack_, &old_stack_);
    struct sigaction action = {};
    action.sa_sigaction = on_signal;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    for (int i = 0; i < COUNT; i++) sigaction(SIGNALS[i], &action, &old_[i]);
  }
  ~Handlers() {
    for (int i = 0; i < COUNT; i++) sigaction(SIGNALS[i], &old_[i], nullptr);
    sigaltstack(&old_stack_, nullptr);
  }
  static void limit(long seconds) {  // of this process's own time
    itimerval timer = {{0, 0}, {seconds, 0}};
    setitimer(ITIMER_VIRTUAL, &timer, nullptr);
  }

 private:
  static constexpr int SIGNALS[] = {SIGSEGV, SIGBUS, SIGILL, SIGFPE, SIGTRAP, SIGVTALRM}, COUNT = 6;
  struct sigaction old_[COUNT];
  stack_t stack_, old_stack_;
  static char memory_[64 << 10];
};
constexpr int Handlers::SIGNALS[];
char Handlers::memory_[64 << 10];

const char* meaning(int signal) {
  switch (signal) {
    case SIGILL:
    case SIGTRAP: return "an address not aligned to its type, an index outside an array, or a shift by too many bits";
    case SIGFPE: return "an integer division by zero";
    case SIGVTALRM: return "no end within the time limit, in the place of";
    default: return "memory that does not exist";
  }
}

}  // namespace

// ---- what kernels call

Self* self;

void fail(const char* format, ...) {
  char text[256];
  va_list list;
  va_start(list, format);
  vsnprintf(text, sizeof text, format, list);
  va_end(list);
  message = std::string(text) + ", " + name_of(running);
  leave();
  abort();
}

bool coin() { return random_number() & 1; }

void block_barrier(int id, int threads) {
  static const char* const names[BARRIERS] = {
      "__syncthreads", "barrier 1", "barrier 2",  "barrier 3",  "barrier 4",  "barrier 5",  "barrier 6",  "barrier 7",
      "barrier 8",     "barrier 9", "barrier 10", "barrier 11", "barrier 12", "barrier 13", "barrier 14", "barrier 15"};
  if (id < 0 || id >= BARRIERS) fail("there is no barrier %d", id);
  if (threads % WARP || threads > (int)self->block_dim.x) fail("barrier %d of %d threads", id, threads);
  Barrier& barrier = running->block->barriers[id];
  if (!barrier.here.empty() && barrier.expected != threads) {
    fail("barrier %d is of %d threads for some and of %d for others", id, barrier.expected, threads);
  }
  barrier.expected = threads;
  arrive(barrier, threads ? threads : running->block->live, names[id]);
}
void cluster_barrier() { arrive(cluster->barrier, cluster->live, "the cluster's barrier"); }

void cluster_arrive() {
  running->cluster_phase = cluster->phase;
  if (++cluster->arrived < cluster->live) return;
  cluster->arrived = 0, cluster->phase++;
  changed();
}
void cluster_wait() {
  while (cluster->phase == running->cluster_phase) wait_for_change("the cluster's barrier");
}
void wait_for_change(const char* what) {
  cluster->expectant.push_back(running);
  wait(what);
}
void changed() { wake(cluster->expectant); }
void start_later(const Later& later) { cluster->laters.push_back(later); }

Exchange& exchange() { return running->warp->exchange; }

bool meet(const char* name, unsigned mask) {
  Warp& warp = *running->warp;
  if (!(mask >> self->lane & 1)) fail("%s with a mask %08x that lacks lane %d", name, mask, self->lane);
  if (warp.arrived && (strcmp(warp.name, name) || warp.mask != mask)) {
    fail("lanes of a warp are at %s (mask %08x) and at %s (mask %08x)", warp.name, warp.mask, name, mask);
  }
  warp.name = name;
  warp.mask = mask;
  warp.arrived |= 1u << self->lane;
  if (warp.arrived == mask) return true;
  warp.here.push_back(running);
  wait(name);
  return false;
}
void release() {
  running->warp->arrived = 0;
  wake(running->warp->here);
}

char* dynamic_shared() { return running->block->dynamic; }
uint32_t shared_offset(const void* pointer) {
  const Block& block = *running->block;
  const char* at = static_cast<const char*>(pointer);
  if (at >= block.dynamic && at <= block.dynamic + dynamic_bytes) return (uint32_t)(at - block.dynamic);
  if (at >= block.unit->shared && at < block.unit->shared_end) return STATIC_SHARED + (uint32_t)(at - block.unit->shared);
  fail("an address that is not in the block's shared memory is taken for one");
}
char* shared_pointer(uint32_t offset, size_t bytes) {
  const Block& block = *running->block;
  if (offset + bytes <= dynamic_bytes) return block.dynamic + offset;
  if (offset >= STATIC_SHARED && offset - STATIC_SHARED + bytes <= size_t(block.unit->shared_end - block.unit->shared)) {
    return block.unit->shared + (offset - STATIC_SHARED);
  }
  fail("%zu bytes of shared memory at %u, where the block has %zu", bytes, offset, dynamic_bytes);
}
const void* of_rank(const void* pointer, int rank) {
  if (rank < 0 || rank >= (int)cluster->blocks.size()) fail("there is no block %d in the cluster", rank);
  const Block &own = *running->block, &other = cluster->blocks[rank];
  uint32_t offset = shared_offset(pointer);
  return offset < STATIC_SHARED ? other.dynamic + offset : other.unit->shared + (static_cast<const char*>(pointer) - own.unit->shared);
}

void start_copy(char* to, const void* from, int bytes) {
  Copy copy = {to, from, bytes};
  if (coin()) {
    finish(copy);
  } else {
    running->groups.back().push_back(copy);
  }
}
void commit_copies() { running->groups.emplace_back(); }
void wait_copies(int pending) {
  auto& groups = running->groups;
  while ((int)groups.size() - 1 > pending) {
    for (const Copy& copy : groups.front()) finish(copy);
    groups.erase(groups.begin());
  }
}

}  // namespace emulated

// ---- what gpu.py calls

using namespace emulated;

extern "C" EXPORTED const Entry* emulated_entry(const Unit* unit, const char* name) {
  for (int i = 0; i < unit->count; i++)
    if (!strcmp(unit->entries[i].name, name)) return unit->entries + i;
  return nullptr;
}
extern "C" EXPORTED const char* emulated_signature(const Entry* entry) { return entry->signature; }
extern "C" EXPORTED int emulated_cluster_size(const Entry* entry) { return entry->cluster; }
extern "C" EXPORTED long emulated_static_shared(const Unit* unit) { return unit->shared_end - unit->shared; }
extern "C" EXPORTED const void* emulated_fault_address() { return fault_address; }

// Null, or what was wrong. `units`: a copy of the unit for each block of a cluster.
extern "C" EXPORTED const char* emulated_launch(const Unit* const* units, const char* name, const unsigned* grid,
                                                int threads, long shared, void** args, uint64_t seed, long seconds) {
  int size = emulated_entry(units[0], name)->cluster;
  Dim dims = {grid[0], grid[1], grid[2]};
  arguments = args;
  dynamic_bytes = (size_t)shared;
  random_state = seed * 0x9e3779b97f4a7c15u | 1;
  message.clear();
  fault_address = nullptr;
  size_t clusters = (size_t)dims.x / size * dims.y * dims.z;
  std::vector<size_t> order(clusters);
  for (size_t i = 0; i < clusters; i++) {
    size_t j = random_number() % (i + 1);
    order[i] = order[j];
    order[j] = i;
  }
  static Handlers* handlers;
  handlers = new Handlers;
  int signal = sigsetjmp(escape, 1);
  if (signal == 0) {
    Handlers::limit(seconds);
    for (size_t i : order) {
      Dim block = {(unsigned)(i % (dims.x / size) * size), (unsigned)(i / (dims.x / size) % dims.y),
                   (unsigned)(i / (dims.x / size) / dims.y)};
      if (!run_cluster(units, name, size, block, dims, threads)) break;
    }
  } else {
    message = std::string(meaning(signal)) + ", " + name_of(running);
  }
  Handlers::limit(0);
  delete handlers;
  return message.empty() ? nullptr : message.c_str();
}

// Memory between two stretches that may not be touched; `bytes` end at the second one, but for alignment to `phase`
// modulo 16.
extern "C" EXPORTED char* emulated_guarded(size_t bytes, size_t phase, char** base, size_t* whole) {
  size_t pages = (bytes + 15 + PAGE) / PAGE;
  *whole = pages * PAGE + 2 * GUARD;
  *base = static_cast<char*>(mmap(nullptr, *whole, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  char* inside = *base + GUARD;
  mprotect(inside, pages * PAGE, PROT_READ | PROT_WRITE);
  memset(inside, POISON, pages * PAGE);
  char* end = inside + pages * PAGE;
  char* at = end - bytes;
  return at - ((reinterpret_cast<uintptr_t>(at) - phase) & 15);
}
// Whether all but those bytes is as it was.
extern "C" EXPORTED bool emulated_unharmed(const char* at, size_t bytes, const char* base, size_t whole) {
  const char *inside = base + GUARD, *end = base + whole - GUARD;
  for (const char* p = inside; p < end; p++)
    if ((p < at || p >= at + bytes) && *p != (char)POISON) return false;
  return true;
}
extern "C" EXPORTED void emulated_free(char* base, size_t whole) { munmap(base, whole); }
