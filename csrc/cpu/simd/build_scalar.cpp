#define SPARSEKERN_TABLE kernels_scalar
#include "vec_scalar.h"

// After the Vec types.
#include "build.h"
