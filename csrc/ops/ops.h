// What module.cpp exposes: a function takes views, checks them, and calls the kernel for their device and dtype.
// An argument marked "or none" may be an absent view (None in Python).
#pragma once
#include "tensor.h"

namespace pyllm::ops {

void cross_entropy_forward(const TensorView& logits, const TensorView& targets, const TensorView& losses_or_none,
                           const TensorView& statistics_or_none, const TensorView& total_or_none, int64_t ignore_index,
                           double label_smoothing, const std::string& reduction);
void cross_entropy_backward(const TensorView& logits, const TensorView& targets, const TensorView& statistics,
                            const TensorView& dloss, const TensorView& dlogits, int64_t ignore_index,
                            double label_smoothing, const std::string& reduction);
void linear_cross_entropy(const TensorView& x, const TensorView& weight, const TensorView& bias_or_none,
                          const TensorView& targets, const TensorView& block, const TensorView& losses_or_none,
                          const TensorView& total_or_none, const TensorView& dloss_or_none,
                          const TensorView& dx_or_none, const TensorView& dweight_or_none,
                          const TensorView& dbias_or_none, int64_t ignore_index, double label_smoothing,
                          const std::string& reduction);
void embedding_forward(const TensorView& ids, const TensorView& weight, const TensorView& out);
void embedding_backward(const TensorView& ids, const TensorView& dy, const TensorView& dweight, bool zeroed);
void norm_forward(const TensorView& x, const TensorView& residual_or_none, const TensorView& weight_or_none,
                  const TensorView& bias_or_none, const TensorView& y, const TensorView& sum_or_none,
                  const TensorView& mean_or_none, const TensorView& rstd_or_none, bool centred, double eps);
void norm_backward(const TensorView& dy, const TensorView& dsum_or_none, const TensorView& h,
                   const TensorView& weight_or_none, const TensorView& mean_or_none, const TensorView& rstd,
                   const TensorView& dh_or_none, const TensorView& dweight_or_none, const TensorView& dbias_or_none,
                   bool centred);
int64_t multiply_add(int64_t rounds);  // how many floating-point operations that was
void read(const TensorView& data);
void matmul(const TensorView& a, const TensorView& b, const TensorView& bias_or_none, const TensorView& c);
void column_sum(const TensorView& a, const TensorView& sums);

}  // namespace pyllm::ops
