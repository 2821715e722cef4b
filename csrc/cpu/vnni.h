#pragma once

namespace pyllm::cpu {

// The chosen instruction set's registers have a dot product of bytes (which neither AVX2 nor AVX-512 implies).
bool has_vnni();
void set_vnni(bool wanted);  // false: do without it, so that tests run both ways

}  // namespace pyllm::cpu
