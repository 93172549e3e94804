// The kernels of the best instruction set that this CPU has, capped by SPARSEKERN_CPU_ISA or set_cpu_isa.
#pragma once
#include "simd/kernels.h"

namespace sparsekern {
const Kernels& kernels();
}
