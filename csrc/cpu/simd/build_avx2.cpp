#define SPARSEKERN_TABLE kernels_avx2
#include "vec_avx2.h"

// After the Vec types.
#include "build.h"
