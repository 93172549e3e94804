#define SPARSEKERN_TABLE kernels_avx512
#include "vec_avx512.h"

// After the Vec types.
#include "build.h"
