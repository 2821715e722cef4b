// A model's step, recorded once and replayed without Python. While a thread records, a call of an operation is not run but
// kept, with its views and options, and so are the tensors that it names; what a replay reads (ids, positions, page
// tables, lengths) it reads from memory then, and each operation checks its arguments again. Outputs were allocated while
// recording and are written anew by each replay.
#pragma once
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "tensor.h"

namespace pyllm {

// Calls for as many rows as there are when they run: of all tensors that are marked, those from offsets[at] to
// offsets[at + 1]. Where there are none, the call is left out.
struct RowScope {
  const int64_t* offsets;
  int64_t at, capacity;                         // of rows, which the marked tensors have while they are recorded
  std::vector<std::pair<char*, char*>> marked;  // where they lie
  bool has(const TensorView& t) const;
  TensorView cut(const TensorView& t) const;
  bool empty() const { return offsets[at] == offsets[at + 1]; }
};

class Program {
 public:
  void append(std::string op, std::function<void()> call);
  void keep(std::shared_ptr<void> tensor) { kept_.push_back(std::move(tensor)); }
  // A tensor that is kept, and within which others lie that need not be.
  void keep_memory(const TensorView& t);
  bool keeps(const TensorView& t) const;
  int64_t size() const { return static_cast<int64_t>(calls_.size()); }
  const std::vector<std::string>& ops() const { return ops_; }

  // All calls, in order, with the team of threads awake between them. From time to time, between two of them, `poll` may
  // throw what ends it there: a call that reads a long prompt takes seconds.
  void run(const std::function<void()>& poll) const;

  // Step by step, runs this and then `draw`, if there is one, and keeps each of `results` (B,), of which the first are
  // ids, in that of `kept` (steps, B). Ends when those are full, or when each row, or with `first` any, has had one of
  // `stop_ids`; `ended` (B,) says which rows have, and is kept up to date. Where a step fails, those before it stand:
  // `steps_done` says how many in either case, and `steps_run` in how many this has run.
  void generate(const Program* draw, const std::vector<TensorView>& results, const std::vector<TensorView>& kept,
                const TensorView& ended, const std::vector<int64_t>& stop_ids, bool first);
  int64_t steps_done() const { return steps_done_; }
  int64_t steps_run() const { return steps_run_; }

  // What is recorded between the two is for share `at` of the rows of x and out, and of what is marked meanwhile. What
  // cannot be so cut is said by `unfit`: the program must not run then.
  void begin_rows(const TensorView& offsets, int64_t at, const TensorView& x, const TensorView& out);
  void mark_rows(const TensorView& t);
  void end_rows();
  int64_t row_scopes() const { return rows_ ? row_scopes_ : 0; }  // how many there were, within one
  std::shared_ptr<const RowScope> rows() const { return rows_; }
  void note_unfit(std::string why) { unfit_ = unfit_.empty() ? std::move(why) : unfit_; }
  const std::string& unfit() const { return unfit_; }

 private:
  void run_calls() const;
  std::vector<std::function<void()>> calls_;
  std::vector<std::string> ops_;
  std::vector<std::shared_ptr<void>> kept_;
  std::vector<std::pair<const char*, const char*>> memory_;
  std::shared_ptr<RowScope> rows_;
  std::string unfit_;
  int64_t steps_done_ = 0, steps_run_ = 0, row_scopes_ = 0;
};

// What this thread records to, or null.
extern thread_local Program* recording;

}  // namespace pyllm
