"""One step of masked SGD over the whole parameter list of ResNet-50, against torch.optim.SGD.

    python -m benchmarks.bench_masked_sgd [--quick] [--threads N] [--json FILE] [--plot FILE] [--record]

`MaskedSGD.step()` with momentum and weight decay; the goal is to be no slower than `fused` without a mask, and faster
in sparse phases. Contenders, check and floor: `benchmarks.optimizer_step`. The check is bit for bit where torch itself
has fused multiply-adds. 20 bytes per weight: read w, g, m, write w, m. Needs about 4 GB of memory.
"""

import torch

import sparsekern as sk
from benchmarks import optimizer_step

SGD = optimizer_step.Step(
    bench="masked_sgd", title="SGD", masked=sk.MaskedSGD, torch=torch.optim.SGD,
    hyper=dict(lr=1e-3, momentum=0.9, weight_decay=1e-4), state=("momentum_buffer",), bytes=20, operations=7,
    exact=True, role="goal",
)  # fmt: skip


def main(argv: list[str] | None = None) -> list[dict]:
    return optimizer_step.main(SGD, __doc__, argv)


if __name__ == "__main__":
    main()
