#pragma once
#include "args/paging.h"
#include "cpu/dispatch.h"

namespace pyllm {

PYLLM_KERNEL(write_pages, WritePagesArgs)

}  // namespace pyllm
