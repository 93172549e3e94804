// Included last by each build_<isa>.cpp: instantiates every kernel over that file's Vec types.
// Everything but the table is local to the object file, so no code compiled for one instruction set can win the link.
#include "batch_norm.h"
#include "kernels.h"
#include "mask_bits.h"
#include "masked_adamw.h"
#include "masked_combine.h"
#include "masked_sgd.h"
#include "movement_step.h"
#include "soft_threshold.h"
#include "sparse_dots.h"
#include "sparse_pack.h"
#include "sparse_rows.h"
#include "sparse_scatter.h"
#include "threshold_mask.h"
#include "topk_mask.h"
#include "topk_n_of_m.h"

namespace sparsekern {
extern const Kernels SPARSEKERN_TABLE = {
#define KERNEL(name, ...) &name,
#include "kernels.inc"
#undef KERNEL
};
}  // namespace sparsekern
