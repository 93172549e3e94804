"""One step of masked AdamW over the whole parameter list of ResNet-50, against torch.optim.AdamW.

    python -m benchmarks.bench_masked_adamw [--quick] [--threads N] [--json FILE] [--plot FILE] [--record]

`MaskedAdamW.step()` with weight decay. Contenders, check and floor: `benchmarks.optimizer_step`. The check allows for
the rounding of torch's square roots. 28 bytes per weight: read w, g and both moments, write w and both moments. Needs
about 5 GB of memory.
"""

import torch

import sparsekern as sk
from benchmarks import optimizer_step

ADAMW = optimizer_step.Step(
    bench="masked_adamw", title="AdamW", masked=sk.MaskedAdamW, torch=torch.optim.AdamW,
    hyper=dict(lr=1e-3, weight_decay=1e-2), state=("exp_avg", "exp_avg_sq"), bytes=28, operations=14,
    exact=False, role="info",
)  # fmt: skip


def main(argv: list[str] | None = None) -> list[dict]:
    return optimizer_step.main(ADAMW, __doc__, argv)


if __name__ == "__main__":
    main()
