#include "cpu/adamw.h"

#include <cmath>
#include <vector>

#include "cuda/adamw.h"
#include "ops/ops.h"
#include "ops/place.h"

namespace pyllm::ops {

void adamw(const std::vector<TensorView>& parameters, const std::vector<TensorView>& gradients,
           const std::vector<TensorView>& first, const std::vector<TensorView>& second, int64_t step, double lr,
           double beta1, double beta2, double eps, double weight_decay, const Setting& scale) {
  const char* op = "adamw";
  for (const auto* others : {&gradients, &first, &second})
    check(others->size() == parameters.size(),
          "[adamw] parameters, gradients and both moments must be as many, but got ", parameters.size(), ", ",
          gradients.size(), ", ", first.size(), " and ", second.size());
  check(step >= 1, "[adamw] step must be 1 or more, but got ", step);
  check(std::isfinite(lr) && lr >= 0, "[adamw] lr must be finite and 0 or more, but got ", lr);
  for (const auto& [name, beta] : {std::pair{"beta1", beta1}, {"beta2", beta2}})
    check(beta >= 0 && beta < 1, "[adamw] ", name, " must be in [0, 1), but got ", beta);
  check(std::isfinite(eps) && eps >= 0, "[adamw] eps must be finite and 0 or more, but got ", eps);
  check(std::isfinite(weight_decay) && weight_decay >= 0, "[adamw] weight_decay must be finite and 0 or more, but got ",
        weight_decay);
  if (parameters.empty()) return;

  const Place place(op, "parameters[0]", parameters[0]);
  std::vector<AdamwTensor> tensors(parameters.size());
  const DType dtype = parameters[0].dtype, moment_dtype = first[0].dtype;
  for (size_t i = 0; i < tensors.size(); i++) {
    const auto name = [&](const char* list) { return std::string(list) + "[" + std::to_string(i) + "]"; };
    const TensorView& p = parameters[i];
    check_float(op, name("parameters").c_str(), p);
    const auto like = [&](const char* list, const TensorView& t, DType expected, bool written) {
      const std::string own = name(list);
      check_dtype(op, own.c_str(), t, expected);
      bool same = t.ndim == p.ndim;
      for (int d = 0; same && d < t.ndim; d++) same = t.size(d) == p.size(d);
      check(same, "[adamw] ", own, " must have shape ", p.shape_text(), ", but got ", t.shape_text());
      check_contiguous(op, own.c_str(), t);
      if (written) check_writable(op, own.c_str(), t);
    };
    like("parameters", p, dtype, true);
    like("gradients", gradients[i], dtype, false);
    if (first[i].present() && first[i].dtype != dtype) check_dtype(op, name("first").c_str(), first[i], DType::f32);
    like("first", first[i], moment_dtype, true);
    like("second", second[i], moment_dtype, true);
    tensors[i] = {p.data, gradients[i].data, first[i].data, second[i].data, p.numel()};
  }
  AdamwSettings settings{};
  settings.beta2 = static_cast<float>(beta2);
  settings.rate1 = static_cast<float>(1 - beta1);
  settings.rate2 = static_cast<float>(1 - beta2);
  settings.root = static_cast<float>(1 / std::sqrt(1 - std::pow(beta2, static_cast<double>(step))));
  settings.eps = static_cast<float>(eps);
  settings.kept = static_cast<float>(1 - lr * weight_decay);
  settings.rate = static_cast<float>(lr / (1 - std::pow(beta1, static_cast<double>(step))));
  settings.scale = static_cast<float>(scale.number);
  if (scale.tensor.present()) {
    check_dtype(op, "scale", scale.tensor, DType::f32);
    check(scale.tensor.numel() == 1, "[adamw] scale must have one element, but got shape ", scale.tensor.shape_text());
    settings.scale_at = scale.tensor.as<float>();
  }
  const AdamwArgs args{tensors.data(), static_cast<int64_t>(tensors.size()), dtype, moment_dtype, settings};
  place.cuda() ? cuda::adamw(args, place.work()) : pyllm::adamw(args);
}

}  // namespace pyllm::ops
