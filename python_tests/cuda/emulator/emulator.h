// Runs CUDA kernels on the CPU, for tests on machines without a GPU: correctness of the logic, not speed, not the hardware.
//
// A CUDA thread is a fiber with a stack of its own. The fibers of a block take turns on one system thread and change over
// only where CUDA makes threads meet: barriers, warp operations, barriers of clusters and grids. Each meeting is a counter
// of arrivals and a generation; a fiber that arrived runs again once the generation has moved on. Blocks run one after the
// other; those that may wait for each other (a cluster, a cooperative grid) have a system thread each, of which one at a time
// runs. So nothing is ever concurrent and every run is the same.
//
// `__shared__` is `static thread_local`: one copy per block, since a block never leaves its system thread, and the copies
// of all blocks have the same layout, by which a cluster's distributed shared memory is addressed.
//
// What fails, with a message: threads of a block at different barriers, barriers or warp operations that some thread never
// reaches, a lane that its own mask leaves out, launches beyond the device's limits, a cooperative grid that would not be
// resident at once. A missing barrier shows as a different result when the order of the fibers is reversed (`order`).
// Under AddressSanitizer (compile with -fsanitize=address) accesses outside an array show as well.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <condition_variable>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// Of the fiber that runs. Variables, since launches have members of these names.
inline thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

// ---------------------------------------------------------------- the emulated device, smaller than any real one
inline int multiprocessors = 4;
inline int blocks_per_multiprocessor = 2;
constexpr int kWarp = 32, kMaxThreads = 1024, kMaxCluster = 16;
constexpr std::size_t kDefaultShared = 48 << 10;
inline std::size_t max_shared = 227 << 10;  // a block's, on request
#if defined(__SANITIZE_ADDRESS__)
constexpr std::size_t kStack = 256 << 10;
#else
constexpr std::size_t kStack = 64 << 10;
#endif
enum class Order { forward, backward, shuffled };
inline Order order = Order::forward;  // in which the ready fibers of a block take their turn
inline int64_t launches = 0;          // for tests that count them

inline thread_local std::string failure;  // of the last launch

// ---------------------------------------------------------------- threads, blocks, grids
struct Meeting {  // of a block, a cluster, a grid, or of the lanes in a warp's mask
  const char* what = "";
  int line = 0;
  unsigned mask = 0;
  int arrived = 0;
  uint64_t generation = 0;
  uint64_t values[2][kWarp] = {};  // by parity: a lane may be one meeting ahead of one that has not read yet, never two
  int votes[2] = {0, 0};
};

struct Block;
struct Gang;
struct Thread {
  dim3 index;
  int linear = 0;
  Block* block = nullptr;
  const Meeting* at = nullptr;  // waits until its generation is not `seen`
  uint64_t seen = 0;
  bool done = false, started = false;
  ucontext_t first;
  jmp_buf later;
  bool ready() const { return !done && (!at || at->generation != seen); }
};

struct Grid {
  dim3 blocks, threads;
  std::size_t shared = 0;
  int cluster = 1;
  bool cooperative = false;
  std::function<void()> body;  // the kernel with its arguments
  int count() const { return int(threads.x * threads.y * threads.z); }
};

struct Block {
  const Grid* grid;
  Gang* gang;
  dim3 index;
  int rank = 0;  // in its cluster
  Meeting* cluster = nullptr;
  std::vector<Block*> peers;  // the cluster's blocks, by rank
  std::vector<Thread> threads;
  Meeting barrier;
  std::vector<std::vector<std::unique_ptr<Meeting>>> warps;  // of each warp, by mask
  std::vector<unsigned char> dynamic;
  unsigned char* shared_base = nullptr;  // where this block's copies of `__shared__` variables lie
  bool finished() const {
    for (const Thread& t : threads) {
      if (!t.done) return false;
    }
    return !threads.empty();
  }
};

struct Gang {  // blocks that may wait for each other
  std::mutex mutex;
  std::condition_variable changed;
  std::size_t turn = 0;
  int unmoved = 0;  // turns since a fiber ran
  std::string failure;
  Meeting everyone;
  std::vector<std::unique_ptr<Block>> blocks;
  bool finished() const;
};

inline bool Gang::finished() const {
  for (const auto& b : blocks) {
    if (!b->finished()) return false;
  }
  return true;
}

inline thread_local Thread* current = nullptr;
inline thread_local jmp_buf scheduler;
inline thread_local ucontext_t scheduler_context;
inline thread_local unsigned char shared_marker;  // its address tells one block's `__shared__` variables from another's

inline void leave() {  // back to the scheduler, until it calls this fiber again
#if defined(__SANITIZE_ADDRESS__)
  swapcontext(&current->first, &scheduler_context);  // slower: two system calls, but known to AddressSanitizer
#else
  if (!_setjmp(current->later)) _longjmp(scheduler, 1);
#endif
}

[[noreturn]] inline void fail(const std::string& what) {
  const Thread& t = *current;
  t.block->gang->failure = what + " (block " + std::to_string(t.block->index.x) + ", thread " + std::to_string(t.linear) + ")";
  for (;;) leave();  // never called again
}

inline std::string name(const Meeting& m) { return std::string(m.what) + " at line " + std::to_string(m.line); }

inline void check_place(Meeting& m, const char* what, int line) {
  if (m.arrived == 0) {
    m.what = what;
    m.line = line;
  } else if (m.line != line || std::strcmp(m.what, what) != 0) {
    fail("diverged: some threads are at " + name(m) + ", others at " + what + " at line " + std::to_string(line));
  }
}

// Arrives; the generation before tells `wait` what to wait for.
inline uint64_t arrive(Meeting& m, int expected, const char* what, int line) {
  check_place(m, what, line);
  const uint64_t generation = m.generation;
  if (++m.arrived == expected) {
    m.arrived = 0;
    ++m.generation;
  }
  return generation;
}

inline void wait(const Meeting& m, uint64_t generation) {
  current->at = &m;
  current->seen = generation;
  while (m.generation == generation) leave();
  current->at = nullptr;
}

inline void meet(Meeting& m, int expected, const char* what, int line) { wait(m, arrive(m, expected, what, line)); }

// A block's barrier that counts how many threads brought true.
inline int vote(bool mine, const char* what, int line) {
  Block& b = *current->block;
  Meeting& m = b.barrier;
  check_place(m, what, line);
  const int side = m.generation & 1;
  if (m.arrived == 0) m.votes[side] = 0;
  m.votes[side] += mine;
  meet(m, int(b.threads.size()), what, line);
  return m.votes[side];
}

// The lanes of `mask` bring a value each and get all of them.
inline const uint64_t* exchange(unsigned mask, uint64_t mine, const char* what, int line) {
  Block& b = *current->block;
  const int warp = current->linear / kWarp, lane = current->linear % kWarp;
  if (!(mask >> lane & 1)) fail(std::string(what) + " at line " + std::to_string(line) + ": the lane is not in its own mask");
  if (warp * kWarp + (31 - __builtin_clz(mask)) >= int(b.threads.size())) fail(std::string(what) + ": the mask names lanes beyond the block");
  Meeting* m = nullptr;
  for (auto& known : b.warps[warp]) {
    if (known->mask == mask) m = known.get();
  }
  if (!m) {
    b.warps[warp].push_back(std::make_unique<Meeting>());
    m = b.warps[warp].back().get();
    m->mask = mask;
  }
  uint64_t* values = m->values[m->generation & 1];
  values[lane] = mine;
  meet(*m, __builtin_popcount(mask), what, line);
  return values;
}

// ---------------------------------------------------------------- running blocks
inline void begin_thread() {
  current->block->grid->body();
  current->done = true;
  for (;;) leave();
}

inline thread_local std::vector<std::unique_ptr<char[]>> stacks;  // of this system thread's fibers, used again by the next block

inline void enter(Thread& t) {
  current = &t;
  threadIdx = t.index;
  blockIdx = t.block->index;
  blockDim = t.block->grid->threads;
  gridDim = t.block->grid->blocks;
#if defined(__SANITIZE_ADDRESS__)
  swapcontext(&scheduler_context, &t.first);
#else
  if (_setjmp(scheduler)) return;
  if (!t.started) {
    t.started = true;
    setcontext(&t.first);
  }
  _longjmp(t.later, 1);
#endif
}

inline void prepare(Block& b) {
  const dim3 size = b.grid->threads;
  b.threads.resize(std::size_t(b.grid->count()));
  b.warps.resize((b.threads.size() + kWarp - 1) / kWarp);
  b.shared_base = &shared_marker;
  while (stacks.size() < b.threads.size()) stacks.emplace_back(new char[kStack]);
  for (std::size_t i = 0; i < b.threads.size(); ++i) {
    Thread& t = b.threads[i];
    t.linear = int(i);
    t.index = dim3(unsigned(i) % size.x, unsigned(i) / size.x % size.y, unsigned(i) / size.x / size.y);
    t.block = &b;
    getcontext(&t.first);
    t.first.uc_stack.ss_sp = stacks[i].get();
    t.first.uc_stack.ss_size = kStack;
    t.first.uc_link = nullptr;
    makecontext(&t.first, begin_thread, 0);
  }
}

// Runs what can run; whether anything did.
inline bool advance(Block& b) {
  static thread_local std::mt19937 random(7);
  std::vector<std::size_t> turn(b.threads.size());
  for (std::size_t i = 0; i < turn.size(); ++i) turn[i] = order == Order::backward ? turn.size() - 1 - i : i;
  bool ran = false;
  for (bool again = true; again;) {
    again = false;
    if (order == Order::shuffled) {
      for (std::size_t i = turn.size(); i > 1; --i) std::swap(turn[i - 1], turn[random() % i]);
    }
    for (std::size_t i : turn) {
      if (!b.threads[i].ready()) continue;
      enter(b.threads[i]);
      ran = again = true;
      if (!b.gang->failure.empty()) return true;
    }
  }
  return ran;
}

inline std::string who_waits(const Gang& gang) {
  std::map<std::string, int> waiting;
  int returned = 0;
  for (const auto& b : gang.blocks) {
    for (const Thread& t : b->threads) t.done ? ++returned : ++waiting[name(*t.at)];
  }
  std::string text = "deadlock:";
  for (const auto& [where, count] : waiting) text += " " + std::to_string(count) + " threads wait at " + where + ";";
  return text + " " + std::to_string(returned) + " have returned";
}

// One block's part of a gang, on its own system thread. Turns go round, also to blocks that have finished: their `__shared__`
// variables stay until all have.
inline void take_turns(Gang& gang, std::size_t me) {
  Block& b = *gang.blocks[me];
  for (bool over = false; !over;) {
    std::unique_lock<std::mutex> lock(gang.mutex);
    gang.changed.wait(lock, [&] { return gang.turn == me; });
    if (b.threads.empty()) prepare(b);
    if (gang.failure.empty() && advance(b)) {
      gang.unmoved = 0;
    } else if (++gang.unmoved > int(gang.blocks.size()) && gang.failure.empty() && !gang.finished()) {
      gang.failure = who_waits(gang);
    }
    over = !gang.failure.empty() || gang.finished();
    gang.turn = (me + 1) % gang.blocks.size();
    gang.changed.notify_all();
  }
}

inline void run(Gang& gang) {
  std::vector<std::thread> others;
  for (std::size_t i = 1; i < gang.blocks.size(); ++i) others.emplace_back([&gang, i] { take_turns(gang, i); });
  take_turns(gang, 0);
  for (std::thread& t : others) t.join();
}

// The whole grid; what went wrong, or nothing.
inline std::string run(const Grid& grid) {
  const int64_t blocks = int64_t(grid.blocks.x) * grid.blocks.y * grid.blocks.z;
  const int64_t together = grid.cooperative ? blocks : grid.cluster;
  for (int64_t first = 0; first < blocks; first += together) {
    Gang gang;
    std::vector<std::unique_ptr<Meeting>> clusters;
    for (int64_t i = first; i < first + together; ++i) {
      auto b = std::make_unique<Block>();
      b->grid = &grid;
      b->gang = &gang;
      b->index = dim3(unsigned(i % grid.blocks.x), unsigned(i / grid.blocks.x % grid.blocks.y), unsigned(i / grid.blocks.x / grid.blocks.y));
      b->rank = int(i % grid.cluster);
      if (b->rank == 0) clusters.push_back(std::make_unique<Meeting>());
      b->cluster = clusters.back().get();
      b->dynamic.assign(grid.shared + 128, 0xff);  // NaN, whoever reads it first
      gang.blocks.push_back(std::move(b));
    }
    for (auto& b : gang.blocks) {
      const std::size_t start = (&b - gang.blocks.data()) / grid.cluster * grid.cluster;
      for (int r = 0; r < grid.cluster; ++r) b->peers.push_back(gang.blocks[start + r].get());
    }
    run(gang);
    if (!gang.failure.empty()) return gang.failure;
  }
  return "";
}

inline unsigned char* dynamic_shared(Block& b) {
  return reinterpret_cast<unsigned char*>((reinterpret_cast<std::uintptr_t>(b.dynamic.data()) + 127) & ~std::uintptr_t{127});
}

// Where another block of the cluster keeps what this one has at `address`.
inline void* in_peer(void* address, int rank) {
  Block &mine = *current->block, &peer = *mine.peers.at(std::size_t(rank));
  if (peer.threads.empty()) fail("the shared memory of a block that has not begun: a cluster barrier must come first");
  if (peer.finished()) fail("the shared memory of a block that has returned: a cluster barrier must come before its end");
  unsigned char* at = static_cast<unsigned char*>(address);
  if (at >= mine.dynamic.data() && at <= mine.dynamic.data() + mine.dynamic.size()) return dynamic_shared(peer) + (at - dynamic_shared(mine));
  return peer.shared_base + (at - mine.shared_base);
}

}  // namespace emulator
