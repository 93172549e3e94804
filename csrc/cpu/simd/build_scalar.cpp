#define SPARSEKERN_TABLE kernels_scalar
#include "build.h"
#include "vec_scalar.h"
