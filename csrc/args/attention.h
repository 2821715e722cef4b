#pragma once
#include <cstdint>

#include "args/paging.h"
#include "dtype.h"

namespace pyllm {

// Steps are in elements. q (batch, queries, heads, dim), k (batch, keys, kv_heads, dim), v (..., value_dim): the last
// dimension has step 1, the others are those of q_step: batch, position, head. With a page_table (batch, pages of a
// sequence), k and v are (pages, page_size, kv_heads, ...), and key j of a sequence lies in the page that its row names
// at j / page_size; `keys` is how many a row has room for. Pages may be int8, see args/paging.h.
struct AttentionArgs {
  int64_t batch, queries, keys, heads, kv_heads, dim, value_dim;
  DType dtype, stored;  // of q and out; of k and v
  const char *q, *k, *v;
  int64_t q_step[3], k_step[3], v_step[3];
  bool causal;
  int64_t window;        // 0: none
  float scale, softcap;  // softcap 0: none
  const char* bias;      // or null; steps of batch, head, query, key are 0 where it is broadcast
  DType bias_dtype;
  int64_t bias_step[4], bias_keys;  // bias_keys: the keys that it covers
  const char* key_lengths;          // (batch,), or null
  DType length_dtype;
  const int32_t* page_table;  // or null
  int64_t table_step, page_size, pages;
  const char *query_segments, *key_segments;  // (batch, position), or both null
  DType segment_dtype;
  int64_t query_segment_step[2], key_segment_step[2];
};

struct AttentionForwardArgs {
  AttentionArgs in;
  char* out;      // (batch, queries, heads, value_dim), contiguous
  float* lse;     // (batch, heads, queries): log2 of the sum of exponentials, infinity where nothing is seen; or null
  char* weights;  // (batch, heads, queries, keys), contiguous; or null. Needs lse.
};

struct AttentionBackwardArgs {
  AttentionArgs in;
  const char *out, *dout;
  int64_t dout_step[3];
  const float* lse;
  const char *weights, *dweights;  // contiguous; or both null
  char *dq, *dk, *dv;              // contiguous; or null
  char* dbias;                     // contiguous, of the four sizes below; or null
  int64_t dbias_size[4];
};

}  // namespace pyllm
