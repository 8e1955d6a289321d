// How Python describes a tensor of logits to the core: address, dtype, sizes and strides. Rows are all axes but the class
// axis; any strides are read in place, so a slice or an NCHW map is never copied.
#pragma once

#include <cstddef>
#include <cstdint>

namespace kdfast {

enum class Dtype : int { f32 = 0, bf16 = 1, f16 = 2, f64 = 3 };
static constexpr int kItemSize[4] = {4, 2, 2, 8};
inline constexpr int kMaxRowAxes = 8;

struct Logits {
  void* data = nullptr;                // null: absent (an output nobody asked for)
  Dtype dtype = Dtype::f32;
  int64_t class_stride = 1;            // in elements
  int64_t row_strides[kMaxRowAxes] = {};
};

// The rows' sizes, shared by every operand of a call. 64-bit throughout: rows x classes passes 2^31 in real use.
struct Rows {
  int axes = 0;
  int64_t sizes[kMaxRowAxes] = {};
  int64_t count = 1;
};

// Element offset of a row.
static inline int64_t row_offset(const Rows& rows, const Logits& logits, int64_t row) {
  if (rows.axes == 1) return row * logits.row_strides[0];
  int64_t offset = 0;
  for (int axis = rows.axes - 1; axis >= 0; --axis) {
    offset += (row % rows.sizes[axis]) * logits.row_strides[axis];
    row /= rows.sizes[axis];
  }
  return offset;
}

// What a kernel found wrong with the values: the first bad row, whatever the number of threads. Zero: nothing.
enum class Bad : int { none = 0, label = 1, student = 2, teacher = 3 };
struct Status {
  int64_t packed = INT64_MAX;  // row * 8 + Bad
  __attribute__((always_inline)) void report(int64_t row, Bad what) {
    const int64_t mine = row * 8 + int64_t(what);
    int64_t seen = __atomic_load_n(&packed, __ATOMIC_RELAXED);
    while (mine < seen && !__atomic_compare_exchange_n(&packed, &seen, mine, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
    }
  }
  __attribute__((always_inline)) Bad what() const { return packed == INT64_MAX ? Bad::none : Bad(packed % 8); }
  __attribute__((always_inline)) int64_t row() const { return packed / 8; }
};

}  // namespace kdfast
