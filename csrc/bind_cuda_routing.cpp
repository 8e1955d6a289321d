#include "bind_routing.h"
#include "cuda/launch.h"
#include "cuda/routing.h"

namespace py = pybind11;

namespace kdfast {

static cuda::Scores make_cuda_scores(const ScoreCall& call) {
  cuda::Scores scores;
  static_cast<ScoreCall&>(scores) = call;
  if (call.f64) throw std::invalid_argument("logits: the CUDA routing takes float32, bfloat16 and float16");
  if (call.experts > cuda::kMostExperts) {
    throw std::invalid_argument("logits: the CUDA routing takes at most " + std::to_string(cuda::kMostExperts) + " experts");
  }
  return scores;
}

void bind_cuda_routing(py::module_& m) {
  m.attr("cuda_routing_most_experts") = cuda::kMostExperts;
  m.def("cuda_routing_score_blocks", &cuda::score_blocks);
  m.def("cuda_routing_plan_blocks", &cuda::plan_blocks);
  m.def("cuda_routing_scores",
        [](Address stream, Address logits, int dtype, const Ints& strides, const Ints& shape, int64_t k, int score, double norm, double eps,
           double scale, int64_t groups, int64_t topk_groups, Address ids, Address lse, Address alive, Address bias, Address mask,
           Address weights, Address counts, Address mean, Address partial_counts, Address partial_probs) {
          cuda::Scores call = make_cuda_scores(
              make_score(logits, dtype, strides, shape, k, score, norm, eps, scale, groups, topk_groups, ids, lse, alive));
          need(weights, call.rows, "weights");
          need(counts, call.experts, "counts");
          need(mean, call.experts, "mean_probs");
          need(partial_counts, call.experts, "partial_counts");
          need(partial_probs, call.experts, "partial_probs");
          call.bias = pointer<void>(bias);
          call.mask = pointer<uint8_t>(mask);
          call.weights = pointer<void>(weights);
          call.counts = pointer<int32_t>(counts);
          call.mean_probs = pointer<float>(mean);
          call.partial_counts = pointer<int32_t>(partial_counts);
          call.partial_probs = pointer<void>(partial_probs);
          cuda::scores_forward(call, cuda::stream_of(stream));
        });
  m.def("cuda_routing_scores_backward",
        [](Address stream, Address logits, int dtype, const Ints& strides, const Ints& shape, int64_t k, int score, double norm, double eps,
           double scale, int64_t groups, int64_t topk_groups, Address ids, Address lse, Address alive, Address grad_weights,
           Address grad_mean, Address grad_lse, Address kept, Address grad_logits) {
          cuda::Scores call = make_cuda_scores(
              make_score(logits, dtype, strides, shape, k, score, norm, eps, scale, groups, topk_groups, ids, lse, alive));
          need(grad_logits, call.rows, "grad_logits");
          if (grad_mean) need(kept, 1, "kept");
          call.grad_weights = pointer<void>(grad_weights);
          call.grad_mean = pointer<void>(grad_mean);
          call.grad_lse = pointer<void>(grad_lse);
          call.kept_rows = pointer<int64_t>(kept);
          call.grad_logits = pointer<void>(grad_logits);
          cuda::scores_backward(call, cuda::stream_of(stream));
        });
  m.def("cuda_routing_plan",
        [](Address stream, Address ids, Address keep, int64_t rows, int64_t k, int64_t experts, int64_t block, int64_t capacity, bool choice,
           Address order, Address inverse, Address counts, Address offsets, Address position, Address row_slot, int64_t row_slots,
           Address block_expert, int64_t blocks, Address padded_offsets, Address histogram) {
          PlanCall call = make_plan(ids, keep, rows, k, experts, block, capacity, choice, order, inverse, counts, offsets, position, row_slot,
                                    row_slots, block_expert, blocks, padded_offsets);
          if (experts > cuda::kMostExperts) throw std::invalid_argument("ids: too many experts for the CUDA plan");
          need(histogram, experts, "histogram");
          call.histogram = pointer<int32_t>(histogram);
          cuda::plan(call, cuda::stream_of(stream));
        });
}

}  // namespace kdfast
