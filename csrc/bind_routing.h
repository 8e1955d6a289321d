// Calls of the routing kernels from Python's addresses and sizes, for the CPU (bind_routing.cpp) and CUDA (bind_cuda_routing.cpp).
#pragma once

#include "bind.h"
#include "cpu/routing.h"

namespace kdfast {

using Address = std::uintptr_t;

inline void need(Address address, int64_t elements, const char* name) {
  if (!address && elements > 0) throw std::invalid_argument(std::string(name) + ": null address for a tensor with elements");
}

inline ScoreCall make_score(Address logits, int dtype, const Ints& strides, const Ints& shape, int64_t k, int score, double norm,
                            double eps, double scale, int64_t groups, int64_t topk_groups, Address ids, Address lse, Address alive) {
  ScoreCall call;
  call.rows = shape[0];
  call.experts = shape[1];
  const int64_t elements = call.rows * call.experts;
  need(logits, elements, "logits");
  need(ids, call.rows, "ids");
  need(lse, call.rows, "lse");
  need(alive, call.rows, "alive");
  call.logits = pointer<void>(logits);
  call.dtype = Dtype(dtype);
  call.f64 = call.dtype == Dtype::f64;
  call.row_stride = strides[0];
  call.expert_stride = strides[1];
  call.k = k;
  call.score = Score(score);
  call.norm = norm;
  call.eps = eps;
  call.scale = scale;
  call.groups = groups;
  call.topk_groups = topk_groups;
  call.ids = pointer<int32_t>(ids);
  call.lse = pointer<void>(lse);
  call.alive = pointer<int32_t>(alive);
  return call;
}

inline PlanCall make_plan(Address ids, Address keep, int64_t rows, int64_t k, int64_t experts, int64_t block, int64_t capacity, bool choice,
                          Address order, Address inverse, Address counts, Address offsets, Address position, Address row_slot,
                          int64_t row_slots, Address block_expert, int64_t blocks, Address padded_offsets) {
  const int64_t slots = rows * k;
  need(ids, slots, "ids");
  need(order, slots, "order");
  need(inverse, slots, "inverse");
  need(position, slots, "position");
  need(counts, experts, "counts");
  need(offsets, experts, "offsets");
  need(padded_offsets, experts, "padded_offsets");
  need(row_slot, row_slots, "row_slot");
  need(block_expert, blocks, "block_expert");
  PlanCall call;
  call.ids = pointer<int32_t>(ids);
  call.keep = pointer<uint8_t>(keep);
  call.rows = rows;
  call.k = k;
  call.experts = experts;
  call.block = block;
  call.capacity = capacity;
  call.choice = choice;
  call.order = pointer<int32_t>(order);
  call.inverse = pointer<int32_t>(inverse);
  call.counts = pointer<int32_t>(counts);
  call.offsets = pointer<int32_t>(offsets);
  call.position = pointer<int32_t>(position);
  call.row_slot = pointer<int32_t>(row_slot);
  call.row_slots = row_slots;
  call.block_expert = pointer<int32_t>(block_expert);
  call.blocks = blocks;
  call.padded_offsets = pointer<int32_t>(padded_offsets);
  return call;
}

}  // namespace kdfast
