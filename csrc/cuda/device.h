#pragma once

namespace pyllm::cuda {

int device_count();  // 0 where there is no driver or no device

}  // namespace pyllm::cuda
