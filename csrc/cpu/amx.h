#pragma once

namespace pyllm::cpu {

// The processor has tile registers that multiply bf16 and bytes (AMX), the system lets this process use them, and the
// chosen instruction set is the one whose kernels do.
bool has_amx();
void set_amx(bool wanted);  // false: do without it, so that tests run both ways

}  // namespace pyllm::cpu
