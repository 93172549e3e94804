"""Every method by name, and one way to build any of them for a run of known length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from sparsekern.distributions import check_sparsity
from sparsekern.methods.acdc import ACDC
from sparsekern.methods.base import Sparsifier
from sparsekern.methods.dense import DenseTraining
from sparsekern.methods.fixed_mask import FixedMask
from sparsekern.methods.gmp import EXTENDED, GMP
from sparsekern.methods.granet import GraNet
from sparsekern.methods.itop import RigLITOP
from sparsekern.methods.lottery_ticket import LotteryTicket
from sparsekern.methods.movement import Movement, SoftMovement
from sparsekern.methods.obert import OBERT
from sparsekern.methods.one_shot import OneShot
from sparsekern.methods.powerpropagation import Powerpropagation
from sparsekern.methods.rigl import RigL
from sparsekern.methods.set import SET
from sparsekern.methods.srste import SRSTE
from sparsekern.methods.st3 import ST3
from sparsekern.methods.step import STEP
from sparsekern.methods.str import STR
from sparsekern.methods.topkast import TopKAST
from sparsekern.phases import Dense, PhaseSchedule, PhaseSpan, Sparse, check_whole
from sparsekern.schedules import acdc_schedule
from sparsekern.updates import update_schedule

BLOCKS = ("unstructured", "4x1", "1x4", "block4")
N_OF_M = "n:m"


@dataclass(frozen=True)
class Length:
    """How long a run is."""

    epochs: int | float
    steps_per_epoch: int

    @property
    def total_steps(self) -> int:
        return max(1, round(Fraction(repr(self.epochs)) * self.steps_per_epoch))


@dataclass(frozen=True)
class Method:
    """One entry of `METHODS`."""

    cls: type[Sparsifier]
    make: Callable[..., Sparsifier]
    """(sparsity, length, **arguments of the class) -> the method, with a schedule for that length."""
    patterns: tuple[str, ...] = BLOCKS
    """Those it takes; "n:m" stands for all of this form, an empty tuple for a method that chooses no masks."""
    start: str = "scratch"
    """What `attach` expects: a model from "scratch", a "trained" one, or one that is "sparse" already."""
    optimizer: str = "any"
    """ "any", or "adam" for torch.optim.Adam and AdamW alone."""
    exact: bool = True
    """Whether a run ends with the sparsity asked for; some methods find their own. Layers that a rule treats apart and
    short n:m groups at the end of a row may still shift it."""


def _updates(cls: type[Sparsifier], **fixed: Any) -> Callable[..., Sparsifier]:
    """A method of an `update_schedule`, with its own defaults for this length."""
    return lambda sparsity, length, **rest: cls(
        sparsity, **{"schedule": update_schedule(length.epochs), **fixed, **rest}
    )


def _from_initial(cls: type[Sparsifier], published: float) -> Callable[..., Sparsifier]:
    """As `_updates`, for methods whose published initial sparsity may lie above the one asked for."""
    return lambda sparsity, length, **rest: _updates(cls, initial=min(published, sparsity))(sparsity, length, **rest)


def _sparsity_only(cls: type[Sparsifier]) -> Callable[..., Sparsifier]:
    return lambda sparsity, length, **rest: cls(sparsity, **rest)


def _unchosen(cls: type[Sparsifier]) -> Callable[..., Sparsifier]:
    return lambda sparsity, length, **rest: cls(**rest)


def _topkast(sparsity: float, length: Length, **rest: Any) -> Sparsifier:
    """Twice the forward density trains, a choice of this package: 80% backward at 90% forward."""
    backward = rest.pop("backward_sparsity", float(max(2 * check_sparsity(sparsity) - 1, Fraction(0))))
    return TopKAST(sparsity, backward, **rest)


def _powerpropagation(sparsity: float, length: Length, **rest: Any) -> Sparsifier:
    """Dense for 25/32 of the run, where gradual pruning ends too, then pruned by |theta| and held: our choice."""
    total = length.total_steps
    if total < 2:
        raise ValueError(f"epochs * steps_per_epoch must be at least 2 steps, one dense and one sparse, got {total}")
    edge = min(max(1, round(Fraction(25, 32) * total)), total - 1)
    spans = (PhaseSpan(0, edge, Dense()), PhaseSpan(edge, total, Sparse(sparsity)))
    return Powerpropagation(**{"schedule": PhaseSchedule(spans), **rest})


METHODS = {
    "dense": Method(DenseTraining, _unchosen(DenseTraining), ()),
    "acdc": Method(
        ACDC,
        lambda sparsity, length, rule="reference", **rest: ACDC(
            sparsity, **{"schedule": acdc_schedule(length.epochs, rule=rule), **rest}
        ),
        (*BLOCKS, N_OF_M),
    ),
    "gmp": Method(GMP, _updates(GMP)),
    "extended-gmp": Method(GMP, _updates(GMP, layer_sparsity=EXTENDED)),
    "rigl": Method(RigL, _updates(RigL)),
    "set": Method(SET, _updates(SET)),
    "rigl-itop": Method(RigLITOP, _updates(RigLITOP)),
    "granet": Method(GraNet, _from_initial(GraNet, 0.5)),
    "topkast": Method(TopKAST, _topkast),
    "powerpropagation": Method(Powerpropagation, _powerpropagation, (*BLOCKS, N_OF_M)),
    "powerpropagation-topkast": Method(
        TopKAST, lambda sparsity, length, **rest: _topkast(sparsity, length, **{"alpha": 2.0, **rest})
    ),
    "str": Method(STR, _unchosen(STR), ("unstructured",), exact=False),
    "st3": Method(ST3, _updates(ST3), ("unstructured",)),
    "st3-sigma": Method(ST3, _updates(ST3, sigma=True), ("unstructured",)),
    "sr-ste": Method(SRSTE, _sparsity_only(SRSTE), (N_OF_M,)),
    "step": Method(
        STEP,
        lambda sparsity, length, **rest: STEP(length.total_steps, sparsity, **rest),
        (N_OF_M,),
        optimizer="adam",
    ),
    "movement": Method(Movement, _updates(Movement)),
    "soft-movement": Method(
        SoftMovement,
        lambda sparsity, length, **rest: SoftMovement(**{"schedule": update_schedule(length.epochs), **rest}),
        ("unstructured",),
        exact=False,
    ),
    "obert": Method(OBERT, _from_initial(OBERT, 0.7), ("unstructured", "1x4", "block4")),
    "one-shot": Method(OneShot, _sparsity_only(OneShot), (*BLOCKS, N_OF_M), start="trained"),
    "lottery-ticket": Method(LotteryTicket, _sparsity_only(LotteryTicket), (*BLOCKS, N_OF_M), start="trained"),
    "fixed-mask": Method(FixedMask, _unchosen(FixedMask), (), start="sparse"),
}
"""Every method of the package by name."""


def build_method(
    name: str,
    sparsity: float,
    *,
    epochs: int | float,
    steps_per_epoch: int,
    pattern: str | None = None,
    include: Sequence[str] = (".*",),
    exclude: Sequence[str] = (),
    **options: Any,
) -> Sparsifier:
    """The method called `name` in `METHODS`, with its own defaults for a run of that length; `attach` is to follow.

    `pattern` None is "unstructured", or for a method of n:m patterns alone the one of `sparsity`, such as "1:10" of
    0.9. `options` are further arguments of the class ("lottery-ticket" needs `initial`); "acdc" takes the `rule` of its
    schedule too; a `schedule` among them replaces the one for that length. `sparsity` means nothing to methods that
    find their own or none at all (`exact` False, no patterns). Raises ValueError for a name, pattern or value that is
    not allowed; nothing is attached.
    """
    if name not in METHODS:
        raise ValueError(f"name must be one of {sorted(METHODS)}, got {name!r}")
    check_sparsity(sparsity)
    steps = check_whole(steps_per_epoch, "steps_per_epoch", least=1)
    if isinstance(epochs, bool) or not isinstance(epochs, int | float) or not 0 < epochs < float("inf"):
        raise ValueError(f"epochs must be a finite number greater than 0, got {epochs!r}")
    method = METHODS[name]
    chosen = {} if (found := _pattern(name, sparsity, pattern)) is None else {"pattern": found}
    length = Length(epochs, steps)
    return method.make(sparsity, length, include=include, exclude=exclude, **chosen, **options)


def _pattern(name: str, sparsity: float, pattern: str | None) -> str | None:
    """The pattern to build with, None for a method that takes none; the error says which ones the method takes."""
    allowed = METHODS[name].patterns
    if pattern is None:
        if not allowed or "unstructured" in allowed:
            return allowed[0] if allowed else None
        kept = 1 - check_sparsity(sparsity)
        if not kept:
            raise ValueError(f"sparsity must be below 1 for {name}, whose n:m patterns keep at least one weight")
        return f"{kept.numerator}:{kept.denominator}"
    if pattern not in allowed and not (N_OF_M in allowed and ":" in str(pattern)):
        rule = f"must be one of {allowed} for {name}" if allowed else f"must be left out for {name}, which chooses none"
        raise ValueError(f"pattern {rule}, got {pattern!r}")
    return pattern
