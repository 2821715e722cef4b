#include "cpu/sample.h"

#include <cmath>
#include <vector>

#include "cuda/sample.h"
#include "ops/ops.h"
#include "ops/place.h"

namespace pyllm::ops {

namespace {

constexpr const char* kOp = "sample";

[[noreturn]] void refuse(const char* name, const char* expected, const Setting& s, int64_t row, double got) {
  if (s.tensor.present())
    fail(Error::value, "[", kOp, "] ", name, " must be ", expected, ", but row ", row, " has ", got);
  fail(Error::value, "[", kOp, "] ", name, " must be ", expected, ", but got ", got);
}

void check_setting(const char* name, const Setting& s, int64_t rows, DType dtype) {
  if (s.tensor.present()) {
    check_dtype(kOp, name, s.tensor, dtype);
    check_shape(kOp, name, s.tensor, rows);
  } else if (dtype == DType::i64) {
    if (!s.is_integer)
      fail(Error::type, "[", kOp, "] ", name, " must be an int or an int64 tensor, but got ", s.number);
    check(!s.too_large, "[", kOp, "] ", name, " must fit in 64 bits, but got a larger int");
  }
}

// Row after row: the number, or the tensor's element, in the range that `ok` accepts.
template <class Ok>
void resolve(const char* name, const Setting& s, std::vector<SampleSettings>& rows, float SampleSettings::* field,
             const char* expected, const Ok& ok) {
  check_setting(name, s, static_cast<int64_t>(rows.size()), DType::f32);
  for (size_t i = 0; i < rows.size(); i++) {
    const float x = s.tensor.present() ? s.tensor.as<float>()[i * s.tensor.step(0)] : static_cast<float>(s.number);
    if (!ok(x)) refuse(name, expected, s, i, s.tensor.present() ? x : s.number);
    rows[i].*field = x;
  }
}

void resolve(const char* name, const Setting& s, std::vector<SampleSettings>& rows, int64_t SampleSettings::* field,
             int64_t least = INT64_MIN) {
  check_setting(name, s, static_cast<int64_t>(rows.size()), DType::i64);
  for (size_t i = 0; i < rows.size(); i++) {
    const int64_t x = s.tensor.present() ? s.tensor.as<int64_t>()[i * s.tensor.step(0)] : s.integer;
    if (x < least) refuse(name, "0 or more", s, i, static_cast<double>(x));
    rows[i].*field = x;
  }
}

void check_history(const TensorView& history, int64_t rows, int64_t vocab, bool reads) {
  check_dtype(kOp, "history", history, DType::i64);
  check_ndim(kOp, "history", history, 2);
  check_shape(kOp, "history", history, rows, history.size(1));
  for (int64_t i = 0; reads && i < rows; i++)
    for (int64_t j = 0; j < history.size(1); j++) {
      const int64_t id = history.as<int64_t>()[i * history.step(0) + j * history.step(1)];
      if (id < -1 || id >= vocab)
        fail(Error::index, "[", kOp, "] history must hold ids from 0 to ", vocab - 1, ", or -1 for none, but row ", i,
             " has ", id);
    }
}

void check_given(const TensorView& given, int64_t rows, int64_t vocab, bool reads) {
  check_dtype(kOp, "given", given, DType::i64);
  check_shape(kOp, "given", given, rows);
  check_contiguous(kOp, "given", given);
  for (int64_t i = 0; reads && i < rows; i++)
    if (const int64_t id = given.as<int64_t>()[i]; id < -1 || id >= vocab)
      fail(Error::index, "[", kOp, "] given must hold ids from 0 to ", vocab - 1, ", or -1 for a draw, but row ", i,
           " has ", id);
}

void check_output(const char* name, const TensorView& t, DType dtype, int64_t rows) {
  check_dtype(kOp, name, t, dtype);
  check_shape(kOp, name, t, rows);
  check_contiguous(kOp, name, t);
  check_writable(kOp, name, t);
}

void check_status(const std::vector<SampleStatus>& status) {
  for (size_t i = 0; i < status.size(); i++) switch (status[i]) {
      case SampleStatus::ok:
        break;
      case SampleStatus::bad_logits:
        fail(Error::value, "[", kOp, "] logits must be finite or -infinity, but row ", i, " has NaN or infinity");
      case SampleStatus::all_masked:
        fail(Error::value, "[", kOp, "] logits must have a finite element in each row, but row ", i,
             " is all -infinity");
      case SampleStatus::bad_processed:
        fail(Error::value, "[", kOp, "] logits with penalties and logit_bias must be finite or -infinity, but row ", i,
             " has NaN or infinity");
      case SampleStatus::all_masked_by_bias:
        fail(Error::value, "[", kOp, "] penalties and logit_bias must leave a finite logit in each row, but row ", i,
             " is all -infinity");
    }
}

}  // namespace

void sample(const TensorView& logits, const Setting& seeds, const Setting& positions, const Setting& temperature,
            const Setting& top_k, const Setting& top_p, const Setting& min_p, const Setting& typical_p,
            const Setting& repetition_penalty, const Setting& frequency_penalty, const Setting& presence_penalty,
            const TensorView& history, const TensorView& logit_bias, const TensorView& given, const TensorView& ids,
            const TensorView& logprobs, const TensorView& processed_logprobs) {
  const Place place(kOp, "logits", logits);
  check_float(kOp, "logits", logits);
  check_ndim(kOp, "logits", logits, 2);
  check_inner_stride(kOp, "logits", logits);
  const int64_t rows = logits.size(0), vocab = logits.size(1);
  check(vocab >= 1 && vocab < INT32_MAX, "[", kOp, "] logits must have 1 to ", INT32_MAX - 1,
        " columns, but got shape ", logits.shape_text());
  check_output("ids", ids, DType::i64, rows);
  check_output("logprobs", logprobs, DType::f32, rows);
  check_output("processed_logprobs", processed_logprobs, DType::f32, rows);

  std::optional<OnHost> read_here(std::in_place);
  std::vector<SampleSettings> settings(rows);
  using S = SampleSettings;
  const auto share = [](float x) { return x > 0 && x <= 1; };
  const auto finite = [](float x) { return std::isfinite(x); };
  resolve("seeds", seeds, settings, &S::seed);
  resolve("positions", positions, settings, &S::position);
  resolve("temperature", temperature, settings, &S::temperature, "finite and 0 or more",
          [](float x) { return x >= 0 && std::isfinite(x); });
  resolve("top_k", top_k, settings, &S::top_k, 0);
  resolve("top_p", top_p, settings, &S::top_p, "above 0 and at most 1", share);
  resolve("min_p", min_p, settings, &S::min_p, "from 0 to 1", [](float x) { return x >= 0 && x <= 1; });
  resolve("typical_p", typical_p, settings, &S::typical_p, "above 0 and at most 1", share);
  resolve("repetition_penalty", repetition_penalty, settings, &S::repetition, "finite and above 0",
          [](float x) { return x > 0 && std::isfinite(x); });
  resolve("frequency_penalty", frequency_penalty, settings, &S::frequency, "finite", finite);
  resolve("presence_penalty", presence_penalty, settings, &S::presence, "finite", finite);
  read_here.reset();
  if (history.present())
    check_history(history, rows, vocab, !place.cuda());
  else
    for (const S& s : settings)
      check(s.repetition == 1 && s.frequency == 0 && s.presence == 0, "[", kOp,
            "] repetition_penalty, frequency_penalty and presence_penalty need a history, but got None");
  if (logit_bias.present()) {
    check_dtype(kOp, "logit_bias", logit_bias, DType::f32);
    if (logit_bias.ndim == 1)
      check_shape(kOp, "logit_bias", logit_bias, vocab);
    else
      check_shape(kOp, "logit_bias", logit_bias, rows, vocab);
    check_inner_stride(kOp, "logit_bias", logit_bias);
  }
  if (given.present()) check_given(given, rows, vocab, !place.cuda());
  std::vector<SampleStatus> status(rows);
  const SampleArgs args{rows,
                        vocab,
                        logits.dtype,
                        logits.data,
                        logits.step(0),
                        settings.data(),
                        history.as<int64_t>(),
                        history.present() ? history.size(1) : 0,
                        history.present() ? history.step(0) : 0,
                        history.present() ? history.step(1) : 0,
                        logit_bias.as<float>(),
                        logit_bias.ndim == 2 ? logit_bias.step(0) : 0,
                        given.as<int64_t>(),
                        ids.as<int64_t>(),
                        logprobs.as<float>(),
                        processed_logprobs.as<float>(),
                        status.data()};
  if (place.cuda()) return cuda::sample(args, place.work());
  pyllm::sample(args);
  check_status(status);
}

}  // namespace pyllm::ops
