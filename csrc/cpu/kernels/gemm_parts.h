// Products of fp32 whose bits need not be those of `product`: on the tile registers where the processor has them.
#pragma once
#include "cpu/kernels/gemm.h"

namespace pyllm::ISA {

// C = A B, with the error of fp32 arithmetic. Where A, B and C are fp32 and the processor has tile registers, an
// element is a sum in an order of its own (gemm_parts.cpp), else that of `product`; either way a row has the same bits
// alone, in a batch, and for any number of threads. A bias and `accumulate` exclude each other.
void product_in_parts(const Product& p);

// Whether that is faster than `product`, as it is but for a few rows, columns or sums.
bool parts_pay(const Product& p);
// The faster of the two: for gradients, whose bits may depend on their size.
void gradient_product(const Product& p);

}  // namespace pyllm::ISA
