#include "program/program.h"

#include <algorithm>
#include <chrono>
#include <cstring>

#include "cpu/threads.h"

namespace pyllm {

thread_local Program* recording = nullptr;

void Program::append(std::string op, std::function<void()> call) {
  ops_.push_back(std::move(op));
  calls_.push_back(std::move(call));
}

void Program::keep_memory(const TensorView& t) { memory_.emplace_back(t.data, t.data + t.numel() * size_of(t.dtype)); }

bool Program::keeps(const TensorView& t) const {
  return std::any_of(memory_.begin(), memory_.end(),
                     [&](const auto& range) { return t.data >= range.first && t.data < range.second; });
}

bool RowScope::has(const TensorView& t) const {
  if (!t.present()) return false;
  return std::any_of(marked.begin(), marked.end(),
                     [&](const auto& range) { return t.data >= range.first && t.data < range.second; });
}

TensorView RowScope::cut(const TensorView& t) const {
  TensorView some = t;
  some.data += offsets[at] * t.stride[0] * size_of(t.dtype);
  some.shape[0] = offsets[at + 1] - offsets[at];
  return some;
}

void Program::begin_rows(const TensorView& offsets, int64_t at, const TensorView& x, const TensorView& out) {
  const char* op = "begin_rows";
  check_dtype(op, "offsets", offsets, DType::i64);
  check_ndim(op, "offsets", offsets, 1);
  check_contiguous(op, "offsets", offsets);
  check(at >= 0 && at + 1 < offsets.size(0), "[begin_rows] at must be in [0, ", offsets.size(0) - 1, "), but got ", at);
  check_ndim(op, "x", x, 2);
  check_shape(op, "out", out, x.size(0), x.size(1));
  check(!rows_, "[begin_rows] rows must not be shared out among those that were already");
  rows_ = std::make_shared<RowScope>(RowScope{offsets.as<int64_t>(), at, x.size(0), {}});
  row_scopes_++;
  mark_rows(x);
  mark_rows(out);
}

void Program::mark_rows(const TensorView& t) {
  if (rows_ && t.numel() > 0) rows_->marked.emplace_back(t.data, t.data + t.numel() * size_of(t.dtype));
}

void Program::end_rows() { rows_.reset(); }

void Program::run_calls() const {
  for (const auto& call : calls_) call();
}

namespace {

// body() while the team stays awake.
template <class F>
void awake(const F& body) {
  cpu::keep_awake([](void* p) { (*static_cast<const F*>(p))(); }, const_cast<F*>(&body));
}

}  // namespace

void Program::run(const std::function<void()>& poll) const {
  using Clock = std::chrono::steady_clock;
  constexpr std::chrono::milliseconds kBetweenPolls{50};
  awake([&] {
    auto polled = Clock::now();
    for (const auto& call : calls_) {
      call();
      if (Clock::now() - polled < kBetweenPolls) continue;
      poll();
      polled = Clock::now();
    }
  });
}

void Program::generate(const Program* draw, const std::vector<TensorView>& results, const std::vector<TensorView>& kept,
                       const TensorView& ended, const std::vector<int64_t>& stop_ids, bool first) {
  const char* op = "Program.generate";
  steps_done_ = steps_run_ = 0;
  check(!results.empty() && results.size() == kept.size(), "[", op,
        "] results and kept must be as many, at least one, ", "but got ", results.size(), " and ", kept.size());
  const TensorView& ids = results[0];
  check_dtype(op, "ids", ids, DType::i64);
  check_ndim(op, "ids", ids, 1);
  check_ndim(op, "kept", kept[0], 2);
  const int64_t steps = kept[0].size(0), rows = ids.size(0);
  for (size_t i = 0; i < results.size(); i++) {
    check_device(op, "results", results[i]);
    check_shape(op, "results", results[i], rows);
    check_contiguous(op, "results", results[i]);
    check_dtype(op, "kept", kept[i], results[i].dtype);
    check_shape(op, "kept", kept[i], steps, rows);
    check_contiguous(op, "kept", kept[i]);
    check_writable(op, "kept", kept[i]);
  }
  check_dtype(op, "ended", ended, DType::boolean);
  check_shape(op, "ended", ended, rows);
  check_contiguous(op, "ended", ended);
  check_writable(op, "ended", ended);
  awake([&] {
    for (int64_t step = 0; step < steps; step++) {
      run_calls();
      steps_run_ = step + 1;
      if (draw) draw->run_calls();
      for (size_t i = 0; i < results.size(); i++) {
        const int64_t bytes = rows * size_of(results[i].dtype);
        std::memcpy(kept[i].data + step * bytes, results[i].data, bytes);
      }
      bool all = true, any = false;
      for (int64_t row = 0; row < rows; row++) {
        bool& over = ended.as<bool>()[row];
        over = over || std::find(stop_ids.begin(), stop_ids.end(), ids.as<int64_t>()[row]) != stop_ids.end();
        all = all && over;
        any = any || over;
      }
      steps_done_ = step + 1;
      if (first ? any : all) return;
    }
  });
}

}  // namespace pyllm
