"""Everything of diffrax that is used here and is not part of its public interface.

diffrax offers no public way for an adjoint to run the integration loop, so this much of
its inside is needed. It is all named in this one file, was checked on the versions in
`SUPPORTED_DIFFRAX`, and its shape is verified when the package is imported.

| name | why |
|---|---|
| `diffrax._integrate.loop` | the loop, run with our own `outer_while_loop` |
| `diffrax._integrate.State` | what that loop carries; fields are read by name |
| `diffrax._integrate.SaveState` | what it carries for every `SubSaveAt` |
| `diffrax._autocitation.citation_rules` | what `diffrax.citation` prints |
| `diffrax._heuristics.is_sde` | whether terms hold a Brownian motion |
| `diffrax._heuristics.is_unsafe_sde` | whether it is one that cannot be queried twice |
| `diffrax._term.WrapTerm` | what terms are wrapped in, so as to integrate forwards |
| `VirtualBrownianTree._evaluate` | its values, of which increments are made |
| `diffrax._custom_types` | annotations of public methods |
"""

import dataclasses
import inspect
from collections.abc import Callable, Iterable
from typing import Any, TYPE_CHECKING, TypeAlias

import diffrax
import equinox as eqx
from jaxtyping import ArrayLike


SUPPORTED_DIFFRAX = ("0.7.0", "0.7.1", "0.7.2")

# Keyword arguments with which `diffeqsolve` calls `AbstractAdjoint.loop`.
ADJOINT_LOOP_ARGUMENTS = frozenset(
    {
        "args",
        "terms",
        "solver",
        "stepsize_controller",
        "event",
        "saveat",
        "t0",
        "t1",
        "dt0",
        "max_steps",
        "throw",
        "init_state",
        "passed_solver_state",
        "passed_controller_state",
        "progress_meter",
    }
)

# Keyword arguments with which we call `loop`.
LOOP_ARGUMENTS = (
    ADJOINT_LOOP_ARGUMENTS - {"throw", "passed_solver_state", "passed_controller_state"}
) | {"inner_while_loop", "outer_while_loop"}

# Fields of the loop's state that are read by name.
STATE_FIELDS = frozenset(
    {
        "y",
        "tprev",
        "tnext",
        "made_jump",
        "solver_state",
        "controller_state",
        "progress_meter_state",
        "num_steps",
        "num_accepted_steps",
        "save_state",
        "dense_ts",
        "dense_infos",
        "dense_save_index",
        "event_tprev",
        "event_tnext",
        "event_dense_info",
        "event_values",
        "event_mask",
    }
)

SAVE_STATE_FIELDS = frozenset({"saveat_ts_index", "ts", "ys", "save_index"})


def host_mismatch(
    adjoint_loop: Callable,
    loop: Callable,
    state: type,
    save_state: type,
) -> str | None:
    """What differs between diffrax's internals and what is relied upon here, in words,
    or `None` if nothing does."""

    def parameters(fn: Callable) -> frozenset[str]:
        return frozenset(inspect.signature(fn).parameters) - {"self"}

    def missing(wanted: Iterable[str], found: Iterable[str]) -> str:
        return ", ".join(sorted(set(wanted) - set(found)))

    if parameters(adjoint_loop) != ADJOINT_LOOP_ARGUMENTS:
        return "the arguments of `AbstractAdjoint.loop` differ"
    if parameters(loop) != LOOP_ARGUMENTS:
        return "the arguments of the integration loop differ"
    for cls, wanted in ((state, STATE_FIELDS), (save_state, SAVE_STATE_FIELDS)):
        lacking = missing(wanted, (f.name for f in dataclasses.fields(cls)))
        if lacking:
            return f"`{cls.__name__}` has no field named {lacking}"
    return None


def _unsupported(reason: str) -> ImportError:
    versions = ", ".join(SUPPORTED_DIFFRAX)
    return ImportError(
        f"diffrax_reversible works with diffrax {versions}, but found diffrax "
        f"{diffrax.__version__}, in which {reason}. Install a supported version, for "
        f"example with `pip install 'diffrax=={SUPPORTED_DIFFRAX[-1]}'`."
    )


try:
    from diffrax._autocitation import citation_rules as citation_rules
    from diffrax._custom_types import (
        BoolScalarLike as BoolScalarLike,
        RealScalarLike as RealScalarLike,
    )
    from diffrax._heuristics import (
        is_sde as is_sde,
        is_unsafe_sde as is_unsafe_sde,
    )
    from diffrax._integrate import (
        loop as host_loop,
        SaveState as SaveState,
        State as State,
    )
    from diffrax._term import WrapTerm as WrapTerm

    if not TYPE_CHECKING:  # (See below.)
        from diffrax._custom_types import (
            Args as Args,
            DenseInfo as DenseInfo,
            VF as VF,
            Y as Y,
        )
except ImportError as e:
    raise _unsupported(f"an internal name is gone ({e})") from e

_reason = host_mismatch(diffrax.AbstractAdjoint.loop, host_loop, State, SaveState)
if _reason is not None:
    raise _unsupported(_reason)
del _reason


# To a type checker jaxtyping's `PyTree` is unknown, so that it may be anything. `Any`
# says the same, and counts as an annotation.
if TYPE_CHECKING:
    PyTree: TypeAlias = Any
    ArrayTree: TypeAlias = Any
    Args: TypeAlias = Any
    DenseInfo: TypeAlias = dict[str, Any]
    Term: TypeAlias = diffrax.AbstractTerm[Any, Any]
    Terms: TypeAlias = Any
    VF: TypeAlias = Any
    Y: TypeAlias = Any
else:
    from jaxtyping import PyTree as PyTree

    ArrayTree = PyTree[ArrayLike]
    Term = diffrax.AbstractTerm
    Terms = PyTree[diffrax.AbstractTerm]


def is_save_state(x: Any) -> bool:
    return isinstance(x, SaveState)


def is_sub_save_at(x: Any) -> bool:
    return isinstance(x, diffrax.SubSaveAt)


_STEPS_IS_BOOLEAN = diffrax.SubSaveAt.__dataclass_fields__["steps"].type in (
    bool,
    "bool",
)


def save_every(sub: Any) -> int:
    """Every how many steps a `SubSaveAt` saves, or zero. (In diffrax 0.7.0 whatever is
    true saves every step.)"""
    return int(bool(sub.steps) if _STEPS_IS_BOOLEAN else sub.steps)


def constant_steps(controller_state: Any) -> tuple[Any, Any, Any, Any]:
    """What the state of `ConstantStepSize` says of the steps: the number of the first,
    how many there are in all, and what they are spread over. If the second is negative
    then the last is the size of a step."""
    if isinstance(controller_state, tuple):
        number, total, start, end_or_size = controller_state
        return number, total, start, end_or_size
    # (diffrax 0.7.0)
    return 1, -1, controller_state, controller_state


def constant_steps_after(controller_state: Any, number: Any) -> Any:
    """The state of `ConstantStepSize` when so many more steps have been made."""
    if isinstance(controller_state, tuple):
        first, *rest = controller_state
        return (first + number.astype(first.dtype), *rest)
    # (diffrax 0.7.0)
    return controller_state


def without_saving(state: Any) -> Any:
    """A state of the integration loop, for one that saves nothing, has no events, and
    reports no progress."""
    return dataclasses.replace(
        state,
        save_state=None,
        dense_ts=None,
        dense_infos=None,
        dense_save_index=None,
        event_tprev=None,
        event_tnext=None,
        event_dense_info=None,
        event_values=None,
        event_mask=None,
        progress_meter_state=None,
    )


def loop_without_saving(*, init_state: Any, **kwargs: Any) -> tuple[Callable, ...]:
    """The condition, the body and the buffers of the integration loop, of such a
    state."""
    found = []

    def outer_while_loop(cond_fun, body_fun, init_state, *, buffers, **kwargs):
        del kwargs
        found.append((cond_fun, body_fun, buffers))
        return init_state

    host_loop(
        init_state=without_saving(init_state),
        saveat=diffrax.SaveAt(),
        event=None,
        progress_meter=diffrax.NoProgressMeter(),
        inner_while_loop=None,
        outer_while_loop=outer_while_loop,
        **kwargs,
    )
    return found[0]


class WatchedBrownianTree(diffrax.VirtualBrownianTree):
    """The same, for what `watch` makes of it: of an increment, with a function that
    finds it; and of the values at both ends, in their order, with where that is, on a
    scale of its own. What is made of its leaves is another path, and not watched."""

    watch: Any = eqx.field(static=True, default=None)

    # (Called by `dataclasses.replace` alone.)
    def __init__(self, *args: Any, watch: Any = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.watch = watch

    @classmethod
    def of(cls, path: diffrax.VirtualBrownianTree, watch: Any) -> Any:
        self = object.__new__(cls)
        for field in dataclasses.fields(path):
            object.__setattr__(self, field.name, getattr(path, field.name))
        object.__setattr__(self, "watch", watch)
        return self

    def evaluate(
        self,
        t0: RealScalarLike,
        t1: RealScalarLike | None = None,
        left: bool = True,
        use_levy: bool = False,
    ) -> Any:
        # (Not compiled by itself: no value could be taken out of that.)
        host: Any = diffrax.VirtualBrownianTree.evaluate
        find = lambda: host.__wrapped__(self, t0, t1, left, use_levy)
        return find() if t1 is None else self.watch.increment(self, find)

    def _evaluate(self, r: RealScalarLike) -> PyTree:
        return self.watch.value(r, super()._evaluate)
