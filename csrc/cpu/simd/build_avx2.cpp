#define SPARSEKERN_TABLE kernels_avx2
#include "build.h"
#include "vec_avx2.h"
