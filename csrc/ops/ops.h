// What module.cpp exposes: a function takes views, checks them, and calls the kernel for their device and dtype.
// An argument marked "or none" may be an absent view (None in Python).
#pragma once
#include <vector>

#include "tensor.h"

namespace pyllm::ops {

// In place; `scale`, of the gradients, is a number or a tensor of one element where the others are.
void adamw(const std::vector<TensorView>& parameters, const std::vector<TensorView>& gradients,
           const std::vector<TensorView>& first, const std::vector<TensorView>& second, int64_t step, double lr,
           double beta1, double beta2, double eps, double weight_decay, const Setting& scale);
void attention_forward(const TensorView& q, const TensorView& k, const TensorView& v, const TensorView& bias_or_none,
                       const TensorView& key_lengths_or_none, const TensorView& query_segments_or_none,
                       const TensorView& key_segments_or_none, const TensorView& page_table_or_none,
                       const TensorView& out, const TensorView& lse_or_none, const TensorView& weights_or_none,
                       bool causal, int64_t window, double scale, double softcap);
void attention_backward(const TensorView& q, const TensorView& k, const TensorView& v, const TensorView& bias_or_none,
                        const TensorView& key_lengths_or_none, const TensorView& query_segments_or_none,
                        const TensorView& key_segments_or_none, const TensorView& out, const TensorView& lse,
                        const TensorView& weights_or_none, const TensorView& dout, const TensorView& dweights_or_none,
                        const TensorView& dq_or_none, const TensorView& dk_or_none, const TensorView& dv_or_none,
                        const TensorView& dbias_or_none, bool causal, int64_t window, double scale, double softcap);
void activation_forward(const TensorView& gate, const TensorView& up_or_none, const TensorView& out,
                        const std::string& op, const std::string& kind);
void activation_backward(const TensorView& dy, const TensorView& gate, const TensorView& up_or_none,
                         const TensorView& dgate, const TensorView& dup_or_none, const std::string& op,
                         const std::string& kind);
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
// kind: "copy", "add", "subtract", "multiply", "divide" or "relu"; a and b broadcast to out, which may be either.
void elementwise(const std::string& kind, const TensorView& a, const TensorView& b_or_none, const TensorView& out);
void embedding_forward(const TensorView& ids, const TensorView& weight, const TensorView& out);
void embedding_backward(const TensorView& ids, const TensorView& dy, const TensorView& dweight, bool zeroed);
void norm_forward(const TensorView& x, const TensorView& residual_or_none, const TensorView& weight_or_none,
                  const TensorView& bias_or_none, const TensorView& y, const TensorView& sum_or_none,
                  const TensorView& statistics_or_none, bool centred, double eps);
void norm_backward(const TensorView& dy, const TensorView& dsum_or_none, const TensorView& h,
                   const TensorView& weight_or_none, const TensorView& statistics, const TensorView& dh_or_none,
                   const TensorView& dweight_or_none, const TensorView& dbias_or_none, bool centred);
int64_t multiply_add(int64_t rounds);  // how many floating-point operations that was
void read(const TensorView& data);
// sums (MiB begun, 64), int32, of bytes: see cpu/kernels/checksum.cpp.
void checksum(const TensorView& data, const TensorView& sums);
void linear(const TensorView& x, const TensorView& weight, const TensorView& bias_or_none, const TensorView& y,
            bool packed);
void pack_linear(const TensorView& weight, const TensorView& panels);
// See RouteArgs.
void route(const TensorView& logits, const TensorView& weights, const TensorView& order, const TensorView& places,
           const TensorView& offsets, int64_t active, bool normalised);
void route_backward(const TensorView& logits, const TensorView& weights, const TensorView& dweights,
                    const TensorView& places, const TensorView& offsets, const TensorView& dlogits, bool normalised);
void matmul(const TensorView& a, const TensorView& b, const TensorView& bias_or_none, const TensorView& c);
void column_sum(const TensorView& a, const TensorView& sums);
int64_t quantized_panel_width(bool on_cuda);  // rows that a packed weight has together
void pack_quantized(const TensorView& values, const TensorView& scales, const TensorView& minimums_or_none,
                    const TensorView& panels, int64_t bits, int64_t group);
// What packing checks beside shapes, for panels that come packed: of 4 bits in larger groups, scales and minimums.
void check_quantized(const TensorView& panels, int64_t n, int64_t k, int64_t bits, int64_t group, bool half_scales,
                     bool has_minimums);
void quantized_linear(const TensorView& x, const TensorView& panels, const TensorView& bias_or_none,
                      const TensorView& y, int64_t bits, int64_t group, bool half_scales, bool has_minimums);
void quantized_linear_backward(const TensorView& dy, const TensorView& panels, const TensorView& dx, int64_t bits,
                               int64_t group, bool half_scales, bool has_minimums);
void quantized_embedding(const TensorView& ids, const TensorView& panels, const TensorView& out, int64_t vocabulary,
                         int64_t bits, int64_t group, bool half_scales, bool has_minimums);
// One layer and direction; time comes first in x, y and dy. `kind`: a Recurrence.
// A weight with a format (bits, group, half scales, minimums, n, k) is packed.
void recurrent_forward(const char* op, int kind, bool reverse, const TensorView& x, const TensorView& w_ih,
                       const TensorView& w_hh, const std::vector<int64_t>& ih_format_or_empty,
                       const std::vector<int64_t>& hh_format_or_empty, const TensorView& b_ih_or_none,
                       const TensorView& b_hh_or_none, const TensorView& h0_or_none, const TensorView& c0_or_none,
                       const TensorView& lengths_or_none, const TensorView& y, const TensorView& h_n,
                       const TensorView& c_n_or_none, const TensorView& gates_or_none,
                       const TensorView& new_hidden_or_none, const TensorView& tanh_cell_or_none,
                       const TensorView& cell_or_none);
void recurrent_cell(const char* op, int kind, const TensorView& x, const TensorView& h, const TensorView& c_or_none,
                    const TensorView& w_ih, const TensorView& w_hh, const TensorView& b_ih_or_none,
                    const TensorView& b_hh_or_none, const TensorView& h_n, const TensorView& c_n_or_none);
void recurrent_backward(const char* op, int kind, bool reverse, const TensorView& x, const TensorView& w_ih,
                        const TensorView& w_hh, const TensorView& h0_or_none, const TensorView& c0_or_none,
                        const TensorView& lengths_or_none, const TensorView& y, const TensorView& gates,
                        const TensorView& new_hidden_or_none, const TensorView& tanh_cell_or_none,
                        const TensorView& cell_or_none, const TensorView& dy_or_none, const TensorView& dh_n_or_none,
                        const TensorView& dc_n_or_none, const TensorView& dx_or_none, bool add_dx,
                        const TensorView& dw_ih_or_none, const TensorView& dw_hh_or_none,
                        const TensorView& db_ih_or_none, const TensorView& db_hh_or_none, const TensorView& dh0_or_none,
                        const TensorView& dc0_or_none);
// The same on a CUDA device, where sums (T * B, gates * H) are the products of the inputs with w_ih, in whose place the
// gates are kept; and where the gradients of those, and of the products with w_hh (of a gru), are what comes back.
void recurrent_steps(const char* op, int kind, bool reverse, const TensorView& sums, const TensorView& w_hh,
                     const TensorView& b_ih_or_none, const TensorView& b_hh_or_none, const TensorView& h0_or_none,
                     const TensorView& c0_or_none, const TensorView& lengths_or_none, const TensorView& y,
                     const TensorView& h_n, const TensorView& c_n_or_none, bool keep,
                     const TensorView& new_hidden_or_none, const TensorView& tanh_cell_or_none,
                     const TensorView& cell_or_none);
void recurrent_steps_backward(const char* op, int kind, bool reverse, const TensorView& w_hh,
                              const TensorView& h0_or_none, const TensorView& c0_or_none,
                              const TensorView& lengths_or_none, const TensorView& y, const TensorView& gates,
                              const TensorView& new_hidden_or_none, const TensorView& tanh_cell_or_none,
                              const TensorView& cell_or_none, const TensorView& dy_or_none,
                              const TensorView& dh_n_or_none, const TensorView& dc_n_or_none, const TensorView& dsums,
                              const TensorView& dproducts_or_none, const TensorView& dh0_or_none,
                              const TensorView& dc0_or_none);
void next_positions(const TensorView& lengths, const TensorView& positions, const TensorView& totals, int64_t capacity);
int64_t page_tile();                             // a page holds a multiple of so many positions
void prefer_large_pages(const TensorView& t);    // of the system's memory, for what has just been allocated
bool give_back_file_pages(const TensorView& t);  // see cpu/pages.h; false of what does not lie in one piece
void write_pages(const TensorView& pages, const TensorView& rows, const TensorView& page_table,
                 const TensorView& positions);
// GGML's blocks (rows, blocks, bytes) as parts of a quantised weight; whether all scales and minimums are finite.
bool unpack_blocks(const std::string& kind, const TensorView& raw, const TensorView& values, const TensorView& scales,
                   const TensorView& minimums_or_none, int64_t bits, int64_t group);
void rope(const TensorView& x, const TensorView& positions, const TensorView& inv_freq, const TensorView& out,
          int64_t rotary_dim, bool interleaved, double scale, bool inverse);
void sample(const TensorView& logits, const Setting& seeds, const Setting& positions, const Setting& temperature,
            const Setting& top_k, const Setting& top_p, const Setting& min_p, const Setting& typical_p,
            const Setting& repetition_penalty, const Setting& frequency_penalty, const Setting& presence_penalty,
            const TensorView& history_or_none, const TensorView& logit_bias_or_none, const TensorView& given_or_none,
            const TensorView& ids, const TensorView& logprobs, const TensorView& processed_logprobs);
int64_t wkv_chunk();  // steps between the states that are kept
void wkv_forward(const TensorView& r, const TensorView& w, const TensorView& k, const TensorView& v,
                 const TensorView& a, const TensorView& b, const TensorView& state_or_none,
                 const TensorView& lengths_or_none, const TensorView& y, const TensorView& final_state,
                 const TensorView& kept_or_none);
void wkv_backward(const TensorView& r, const TensorView& w, const TensorView& k, const TensorView& v,
                  const TensorView& a, const TensorView& b, const TensorView& state_or_none,
                  const TensorView& lengths_or_none, const TensorView& kept, const TensorView& dy,
                  const TensorView& dfinal_or_none, const TensorView& dr, const TensorView& dw, const TensorView& dk,
                  const TensorView& dv, const TensorView& da, const TensorView& db, const TensorView& dstate_or_none);

}  // namespace pyllm::ops
