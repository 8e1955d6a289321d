// Stands in for CUDA's header of this name: blocks, clusters with distributed shared memory, cooperative grids.
#pragma once

#include "cuda_runtime.h"

namespace cooperative_groups {

struct thread_block {
  void sync(int line = __builtin_LINE()) const { __syncthreads(line); }
  unsigned thread_rank() const { return unsigned(emulator::current->linear); }
  unsigned num_threads() const { return unsigned(emulator::current->block->threads.size()); }
  unsigned size() const { return num_threads(); }
};
inline thread_block this_thread_block() { return {}; }

struct cluster_group {
  using arrival_token = uint64_t;
  static emulator::Block& block() { return *emulator::current->block; }
  static int expected() { return int(block().peers.size() * block().threads.size()); }
  arrival_token barrier_arrive(int line = __builtin_LINE()) const { return emulator::arrive(*block().cluster, expected(), "cluster barrier", line); }
  void barrier_wait(arrival_token&& token) const { emulator::wait(*block().cluster, token); }
  void sync(int line = __builtin_LINE()) const { emulator::meet(*block().cluster, expected(), "cluster barrier", line); }
  unsigned block_rank() const { return unsigned(block().rank); }
  unsigned num_blocks() const { return unsigned(block().peers.size()); }
  unsigned thread_rank() const { return block_rank() * unsigned(block().threads.size()) + unsigned(emulator::current->linear); }
  template <class T>
  T* map_shared_rank(T* address, int rank) const { return static_cast<T*>(emulator::in_peer(const_cast<std::remove_const_t<T>*>(address), rank)); }
};
inline cluster_group this_cluster() { return {}; }

struct grid_group {
  void sync(int line = __builtin_LINE()) const {
    emulator::Block& b = *emulator::current->block;
    if (!b.grid->cooperative) emulator::fail("grid barrier in a launch that is not cooperative");
    emulator::meet(b.gang->everyone, int(b.gang->blocks.size() * b.threads.size()), "grid barrier", line);
  }
  bool is_valid() const { return emulator::current->block->grid->cooperative; }
  unsigned long long block_rank() const { return blockIdx.x + gridDim.x * (blockIdx.y + 1ull * gridDim.y * blockIdx.z); }
  unsigned long long num_blocks() const { return 1ull * gridDim.x * gridDim.y * gridDim.z; }
};
inline grid_group this_grid() { return {}; }

}  // namespace cooperative_groups
