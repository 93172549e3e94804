"""SET (arXiv 1707.04780): drop by magnitude, grow at random."""

from sparsekern.methods.regrow import Regrowing


class SET(Regrowing):
    """`schedule` is an `update_schedule(epochs)`: by default every 100 steps until 25/32 of the run.

    An update follows the optimizer's step; interval and drop fraction are those of google-research/rigl's version. The
    other arguments are those of `Regrowing`.
    """

    DEFAULTS = (None, 25 / 32, 100)
    BY_GRADIENT = False
