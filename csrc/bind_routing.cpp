#include "bind_routing.h"

#include <algorithm>

namespace py = pybind11;

namespace kdfast {

int64_t score_block(int64_t rows) { return std::max<int64_t>(32, (rows + 255) / 256); }
int64_t plan_block(int64_t slots) { return std::max<int64_t>(4096, (slots + 63) / 64); }

template <class T>
static void add_partials(const ScoreCall& call, int64_t blocks, int64_t kept, int32_t* counts, T* mean) {
  const T* probs = static_cast<const T*>(call.partial_probs);
  std::vector<double> sums(call.experts);
  std::fill(counts, counts + call.experts, 0);
  for (int64_t b = 0; b < blocks; ++b) {
    for (int64_t e = 0; e < call.experts; ++e) {
      counts[e] += call.partial_counts[b * call.experts + e];
      sums[e] += double(probs[b * call.experts + e]);
    }
  }
  for (int64_t e = 0; e < call.experts; ++e) mean[e] = T(sums[e] / double(std::max<int64_t>(kept, 1)));
}

static void raise_score(const Status& status) {
  if (status.what() == Bad::none) return;
  const std::string at = " at row " + std::to_string(status.row());
  if (status.what() == Bad::student) throw std::invalid_argument("logits: expected finite values or -inf, got NaN or +inf" + at);
  throw std::invalid_argument("logits: expected an expert that is not -inf in every row, got a row of only -inf" + at);
}

static MoveCall make_move(int dtype, int64_t tokens, int64_t k, int64_t width) {
  MoveCall call;
  call.dtype = Dtype(dtype);
  call.f64 = call.dtype == Dtype::f64;
  call.tokens = tokens;
  call.k = k;
  call.width = width;
  return call;
}

void bind_routing(py::module_& m) {
  // For buffers that torch's own products fill: see memory.h.
  m.def("routing_scores",
        [](Address logits, int dtype, const Ints& strides, const Ints& shape, int64_t k, int score, double norm, double eps, double scale,
           int64_t groups, int64_t topk_groups, Address ids, Address lse, Address alive, Address bias, Address mask, Address weights,
           Address counts, Address mean, bool validate) {
          ScoreCall call = make_score(logits, dtype, strides, shape, k, score, norm, eps, scale, groups, topk_groups, ids, lse, alive);
          need(weights, call.rows, "weights");
          need(counts, call.experts, "counts");
          need(mean, call.experts, "mean_probs");
          call.bias = pointer<void>(bias);
          call.mask = pointer<uint8_t>(mask);
          call.weights = pointer<void>(weights);
          const int64_t per_block = score_block(call.rows), blocks = (call.rows + per_block - 1) / per_block;
          std::vector<int32_t> partial_counts(blocks * call.experts);
          std::vector<double> partial_probs(blocks * call.experts);  // as float when the call is
          call.partial_counts = partial_counts.data();
          call.partial_probs = partial_probs.data();
          const int64_t kept = call.mask ? std::count(call.mask, call.mask + call.rows, 1) : call.rows;
          Status status;
          call.status = validate ? &status : nullptr;
          if (call.rows > 0) {
            py::gil_scoped_release release;
            KD_CALL(score_forward, call);
          }
          raise_score(status);
          if (call.f64) {
            add_partials(call, blocks, kept, pointer<int32_t>(counts), pointer<double>(mean));
          } else {
            add_partials(call, blocks, kept, pointer<int32_t>(counts), pointer<float>(mean));
          }
        });
  m.def("routing_scores_backward",
        [](Address logits, int dtype, const Ints& strides, const Ints& shape, int64_t k, int score, double norm, double eps, double scale,
           int64_t groups, int64_t topk_groups, Address ids, Address lse, Address alive, Address grad_weights, Address grad_mean,
           Address grad_lse, Address grad_logits) {
          ScoreCall call = make_score(logits, dtype, strides, shape, k, score, norm, eps, scale, groups, topk_groups, ids, lse, alive);
          need(grad_logits, call.rows, "grad_logits");
          call.grad_weights = pointer<void>(grad_weights);
          call.grad_mean = pointer<void>(grad_mean);
          call.grad_lse = pointer<void>(grad_lse);
          call.grad_logits = pointer<void>(grad_logits);
          advise_huge(call.grad_logits, std::size_t(call.rows * call.experts) * kItemSize[dtype]);
          for (int64_t n = 0; n < call.rows; ++n) call.kept += call.ids[n * k] >= 0;
          if (call.rows == 0) return;
          py::gil_scoped_release release;
          KD_CALL(score_backward, call);
        });
  m.def("routing_plan",
        [](Address ids, Address keep, int64_t rows, int64_t k, int64_t experts, int64_t block, int64_t capacity, bool choice,
           bool validate, Address order, Address inverse, Address counts, Address offsets, Address position, Address row_slot,
           int64_t row_slots, Address block_expert, int64_t blocks, Address padded_offsets) {
          PlanCall call = make_plan(ids, keep, rows, k, experts, block, capacity, choice, order, inverse, counts, offsets, position, row_slot,
                                    row_slots, block_expert, blocks, padded_offsets);
          const int64_t slots = rows * k;
          const int64_t per_block = plan_block(slots);
          std::vector<int32_t> histogram(std::max<int64_t>(1, (slots + per_block - 1) / per_block) * (experts + 1));
          call.histogram = histogram.data();
          Status status;
          call.status = validate ? &status : nullptr;
          {
            py::gil_scoped_release release;
            KD_CALL(plan_run, call);
          }
          if (status.what() != Bad::none) {
            throw std::invalid_argument("ids: expected -1 (dropped) or an expert in [0, " + std::to_string(experts) + "), got " +
                                        std::to_string(call.ids[status.row()]) + " at row " + std::to_string(status.row() / k));
          }
        });
  m.def("routing_gather", [](Address x, int dtype, int64_t tokens, int64_t k, int64_t width, Address order, int64_t begin, int64_t end,
                             Address weights, Address out) {
    MoveCall call = make_move(dtype, tokens, k, width);
    const int64_t elements = (end - begin) * width;
    if (elements <= 0) return;
    need(x, elements, "x");
    need(order, elements, "order");
    need(out, elements, "out");
    call.x = pointer<void>(x);
    call.order = pointer<int32_t>(order);
    call.begin = begin;
    call.end = end;
    call.weights = pointer<void>(weights);
    call.out = pointer<void>(out);
    advise_huge(call.out, std::size_t(elements) * kItemSize[dtype]);
    py::gil_scoped_release release;
    KD_CALL(move_gather, call);
  });
  m.def("routing_combine", [](Address rows, int dtype, int64_t tokens, int64_t k, int64_t width, Address inverse, Address weights,
                              Address out) {
    MoveCall call = make_move(dtype, tokens, k, width);
    if (tokens * width == 0) return;
    need(inverse, tokens * k, "inverse");
    need(out, tokens * width, "out");
    call.x = pointer<void>(rows);
    call.inverse = pointer<int32_t>(inverse);
    call.weights = pointer<void>(weights);
    call.out = pointer<void>(out);
    advise_huge(call.out, std::size_t(tokens * width) * kItemSize[dtype]);
    py::gil_scoped_release release;
    KD_CALL(move_combine, call);
  });
  m.def("routing_combine_backward", [](Address grad, Address rows, int dtype, int64_t tokens, int64_t k, int64_t width, Address inverse,
                                       Address order, Address weights, Address grad_rows, Address grad_weights) {
    MoveCall call = make_move(dtype, tokens, k, width);
    if (tokens * k == 0) return;
    need(inverse, tokens * k, "inverse");
    need(order, tokens * k, "order");
    need(grad, tokens * width, "grad");
    need(rows, grad_weights ? tokens * k * width : 0, "rows");
    call.grad = pointer<void>(grad);
    call.x = pointer<void>(rows);
    call.inverse = pointer<int32_t>(inverse);
    call.order = pointer<int32_t>(order);
    call.weights = pointer<void>(weights);
    call.out = pointer<void>(grad_rows);
    call.grad_weights = pointer<void>(grad_weights);
    call.total_rows = tokens * k;
    if (call.out) advise_huge(call.out, std::size_t(call.total_rows * width) * kItemSize[dtype]);
    py::gil_scoped_release release;
    KD_CALL(move_combine_backward, call);
  });
}

}  // namespace kdfast
