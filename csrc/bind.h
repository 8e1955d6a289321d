// What every binding needs: operands from Python's (address, dtype code, strides), checks that a null pointer has no size,
// and errors about values with the row they stand in.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "logits.h"
#include "memory.h"

namespace kdfast {

using Ints = std::vector<int64_t>;

// The axes of `shape` but `dim`, neighbours merged where every operand allows it is left to the kernels' row walk.
inline Rows make_rows(const Ints& shape, int64_t dim) {
  Rows rows;
  for (std::size_t axis = 0; axis < shape.size(); ++axis) {
    if (int64_t(axis) == dim) continue;
    if (rows.axes == kMaxRowAxes) throw std::invalid_argument("student: expected at most 9 dimensions");
    rows.sizes[rows.axes++] = shape[axis];
    rows.count *= shape[axis];
  }
  if (rows.axes == 0) rows.sizes[rows.axes++] = 1;
  return rows;
}

inline Logits make_logits(std::uintptr_t address, int dtype, const Ints& strides, int64_t dim, const Rows& rows, const char* name,
                          bool output = false) {
  Logits logits;
  logits.data = reinterpret_cast<void*>(address);
  logits.dtype = Dtype(dtype);
  if (!logits.data) {
    if (!output && rows.count > 0) throw std::invalid_argument(std::string(name) + ": null address for a tensor with elements");
    return logits;
  }
  if (strides.size() == 1 && dim == 0) {
    logits.class_stride = strides[0];
    return logits;
  }
  int axes = 0;
  for (std::size_t axis = 0; axis < strides.size(); ++axis) {
    if (int64_t(axis) == dim) {
      logits.class_stride = strides[axis];
    } else {
      logits.row_strides[axes++] = strides[axis];
    }
  }
  return logits;
}

// Merges row axes that lie one behind the other in every operand: rows of a [B, T, V] tensor become one axis.
template <std::size_t n>
inline void merge_axes(Rows& rows, Logits* const (&operands)[n]) {
  int last = 0;
  for (int axis = 1; axis < rows.axes; ++axis) {
    bool mergeable = true;
    for (const Logits* o : operands) {
      if (o->data) mergeable &= o->row_strides[last] == o->row_strides[axis] * rows.sizes[axis];
    }
    if (mergeable) {
      rows.sizes[last] *= rows.sizes[axis];
      for (Logits* o : operands) o->row_strides[last] = o->row_strides[axis];
    } else {
      ++last;
      rows.sizes[last] = rows.sizes[axis];
      for (Logits* o : operands) o->row_strides[last] = o->row_strides[axis];
    }
  }
  rows.axes = rows.axes ? last + 1 : 0;
}

inline void raise_bad(const Status& status, const int64_t* labels, int64_t classes, const char* first = "student",
                      const char* second = "teacher") {
  const std::string at = " at row " + std::to_string(status.what() == Bad::none ? 0 : status.row());
  switch (status.what()) {
    case Bad::none: return;
    case Bad::label:
      throw std::invalid_argument("labels: expected integers in [0, " + std::to_string(classes) + "), got " +
                                  std::to_string(labels[status.row()]) + at);
    case Bad::student:
      throw std::invalid_argument(std::string(first) + ": expected finite logits (or -inf for a masked class), got NaN or +inf" + at);
    case Bad::teacher:
      throw std::invalid_argument(std::string(second) + ": expected finite logits (or -inf for a masked class), got NaN or +inf" + at);
  }
}

template <class T>
inline T* pointer(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

}  // namespace kdfast
