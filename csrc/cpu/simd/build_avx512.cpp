#define SPARSEKERN_TABLE kernels_avx512
#include "build.h"
#include "vec_avx512.h"
