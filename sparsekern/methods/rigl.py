"""RigL (arXiv 1911.11134; google-research/rigl): drop by magnitude, grow by the dense gradient, instead of a step."""

from sparsekern.methods.regrow import Regrowing


class RigL(Regrowing):
    """`schedule` is an `update_schedule(epochs)`: by default every 100 steps until 25/32 of the run.

    These and the drop fraction of 0.3 are the defaults of google-research/rigl; the settings of the comparison in
    arXiv 2308.02060 are not known. An update replaces the optimizer's step, whose gradients it reads. Published runs
    with distribution "uniform" keep the first layer dense, and so do those with "erk" at 99%, as arXiv 2308.02060 says
    of all its runs: `layer_sparsity={"first": 0.0}`. The other arguments are those of `Regrowing`.
    """

    DEFAULTS = (None, 25 / 32, 100)
    AFTER_STEP = False
