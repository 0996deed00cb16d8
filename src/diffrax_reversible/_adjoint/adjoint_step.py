"""One step of the backward pass: a step of the solve is undone, and the gradient is
pulled back through it and through what was saved during it."""

import functools as ft
from collections.abc import Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, PyTree

from .._compat import is_save_state
from .._method.tree import tree_add, tree_where
from . import save as save, times as times_
from .check import is_nonzero
from .functions import Functions
from .hoist import materialise
from .index import rem, take
from .pullback import AbstractPullback, Grads, Start, Step
from .residuals import Ends
from .vmap import tree_where_active, where_active


class Carry(NamedTuple):
    """What is carried from step to step, backwards. `1` is the end of the next step to
    be undone."""

    # How many steps are still to be undone. The number of the next is one less.
    num_steps: Array
    t1: Array
    # The start of the step after, which differs from `t1` if there is a jump between.
    t_after: Array
    y1: PyTree
    solver_state: PyTree
    # The last state at hand that was known, or from which something was saved.
    y_seen: PyTree
    pullback: PyTree
    # For each `SubSaveAt`; or `None`, if it is of output at `t0` and `t1` alone, or of
    # none that has a gradient.
    saved: list[Any]
    grad_y1: PyTree
    grad_solver_state: PyTree
    grad_consts: dict[int, Any]
    grad_times: times_.Times
    # That at `t_after`; or `None` if no gradient asks for it.
    node: times_.Node | None
    # Whether the gradient of a time is lost, see `times`. `None` if that cannot be.
    loses_time: Array | None


class _UndoneStep(NamedTuple):
    """A step that has been undone."""

    number: Array
    # The end of the step before.
    t_prev: Array
    step: Step
    dense_info: PyTree
    # Whether it is a step of this element of a batch at all.
    active: Array


class _Within(NamedTuple):
    """The gradients of what was saved in a step, with respect to the step."""

    t0: Array
    t1: Array
    # Of where the step after starts.
    t_after: Array
    dense_info: PyTree


class AdjointStep:
    """One step of the backward pass (`pull`), and what that begins with (`start`)."""

    def __init__(
        self,
        *,
        fns: Functions,
        pullback: AbstractPullback,
        ends: Ends,
        grad_final_state,
        times: times_.Times,
        perturbed: times_.Times,
        at_steps: times_.AtSteps,
        watches: bool,
    ):
        self.fns = fns
        self.pullback = pullback
        self._ends = ends
        self._grad_final_state = grad_final_state
        self._times = times
        self._perturbed = perturbed
        self._steps = at_steps.every
        # Whether times are differentiated, and an adaptive controller chose the steps.
        self._watches = watches

        self._grad_saves = jtu.tree_leaves(
            grad_final_state.save_state, is_leaf=is_save_state
        )
        self._grad_ys = [None if save.is_zero(s.ys) else s.ys for s in self._grad_saves]
        self._grad_dense_infos = _none_if_zero(grad_final_state.dense_infos)
        self._grad_event_info = _none_if_zero(grad_final_state.event_dense_info)
        ts_perturbed = zip(times.saved, self._grad_ys, perturbed.saved, strict=True)
        self._pulls_ts = [
            ts is not None and (grad is not None or is_perturbed)
            for ts, grad, is_perturbed in ts_perturbed
        ]
        self._want_dense_info = (
            self._grad_dense_infos is not None
            or self._grad_event_info is not None
            or any(
                g is not None and t is not None
                for g, t in zip(self._grad_ys, times.saved)
            )
        )

    def prime(self, carry: Carry) -> Carry:
        """To be called where an element goes on that was not active."""
        pullback = self.pullback.prime(self.fns, carry.t1, carry.y1, carry.solver_state)
        return carry._replace(pullback=pullback)

    #
    # At the end of the solve
    #

    def start(self, y: PyTree, solver_state: PyTree) -> Carry:
        """At the end of the solve, from that state."""
        ends, grad, fns = self._ends, self._grad_final_state, self.fns
        t1 = self._t_last()
        grad_times = self._times_of_end()
        loses_time = None
        if self._watches:
            of_end = (grad.y, grad.solver_state, grad.tprev)
            of_event = (grad.event_tprev, grad.event_tnext, grad.event_dense_info)
            ends_so = times_.ends_where_chosen(self._times, ends)
            loses_time = ends_so & is_nonzero((of_end, of_event))
        grad_y1 = materialise(grad.y, eqx.filter(y, eqx.is_inexact_array))
        new_consts, new_t1, new_y1, grad_solver_state = self.pullback.start(
            fns, t1, y, grad.solver_state, ends.num_steps
        )
        grad_consts = fns.zero_consts(save.function_names(fns.hoisted))
        save.accumulate(grad_consts, new_consts)
        for g in new_t1:
            grad_times = self._add_time(grad_times, t1, g, ends.num_steps)
        return Carry(
            num_steps=ends.num_steps,
            t1=t1,
            t_after=times_.locate(self._times, ends.tprev, ends.num_steps),
            y1=y,
            solver_state=solver_state,
            y_seen=y,
            pullback=self.pullback.prime(fns, t1, y, solver_state),
            saved=[
                saved if every != 0 or pulls_ts else None
                for saved, every, pulls_ts in zip(
                    ends.saved, self._steps, self._pulls_ts, strict=True
                )
            ],
            grad_y1=tree_add(grad_y1, new_y1),
            grad_solver_state=materialise(
                grad_solver_state, eqx.filter(solver_state, eqx.is_inexact_array)
            ),
            grad_consts=grad_consts,
            grad_times=grad_times,
            node=self._last_node(t1),
            loses_time=loses_time,
        )

    def _t_last(self) -> Array:
        """The end of the last step that was accepted. (There may be one after it that
        was rejected.)"""
        no_steps = self._ends.num_steps == 0
        return jnp.where(no_steps, self._ends.tprev, self._ends.t_last)

    def _times_of_end(self) -> times_.Times:
        ends, grad = self._ends, self._grad_final_state
        grad_times = times_.zeros(self._perturbed, self._times)
        if not self._perturbed.any_of_steps:
            return grad_times
        n = ends.num_steps
        nodes = [(ends.tprev, grad.tprev, n)]
        if ends.event_times[0] is not None:
            event_t0, event_t1 = ends.event_times
            nodes += [
                (event_t0, grad.event_tprev, jnp.maximum(n - 1, 0)),
                (event_t1, grad.event_tnext, n),
            ]
        for t, grad_t, n in nodes:
            grad_times = self._add_time(grad_times, t, grad_t, n)
        return grad_times

    def _last_node(self, t1: Array) -> times_.Node | None:
        if not any(self._perturbed.clipped):
            return None
        # (If it is not the end of the solve then a solve that an event has ended.)
        grad = self._grad_final_state
        grads = [g for g in (grad.tprev, grad.event_tnext) if g is not None]
        return times_.Node(t1, sum(grads, jnp.zeros_like(t1)))

    def event_is_lost(self) -> Array | None:
        """Whether the host interpolates over a last step that was not accepted, with a
        gradient. `None` if there is no such gradient."""
        if self._grad_event_info is None:
            return None
        was_used = [jnp.any(g != 0) for g in jtu.tree_leaves(self._grad_event_info)]
        _, event_t1 = self._ends.event_times
        return ft.reduce(jnp.logical_or, was_used) & (event_t1 != self._t_last())

    #
    # A step
    #

    def located(self, number: Array, t0: Array, t1: Array) -> tuple[Array, Array]:
        """The start and the end of a step, as functions of where they come from: if the
        backward pass is differentiated."""
        t0 = times_.locate(self._times, t0, number)
        return t0, times_.locate(self._times, t1, number + 1)

    def pull(
        self,
        carry: Carry,
        number: Array,
        t_prev: Array,
        step: Step,
        start: Start,
        active: Array,
    ) -> Carry:
        """Pulls the gradient back through a step, and through what was saved in it."""
        rebuilt = self.pullback.rebuild(
            self.fns, carry.pullback, step, start, self._want_dense_info
        )
        zero_unless_active = ft.partial(
            jtu.tree_map, lambda g: where_active(active, g, jnp.zeros_like(g))
        )
        old = carry
        carry = carry._replace(
            grad_y1=zero_unless_active(carry.grad_y1),
            grad_solver_state=zero_unless_active(carry.grad_solver_state),
            # (To which all is added in place.)
            grad_consts=dict(carry.grad_consts),
        )
        undone = _UndoneStep(number, t_prev, step, rebuilt.dense_info, active)
        carry, within = self._pull_saved(carry, undone)
        grads, new_pullback = rebuilt.pull(
            carry.grad_y1, carry.grad_solver_state, within.dense_info
        )
        save.accumulate(carry.grad_consts, grads.consts)
        grad_times, node = carry.grad_times, carry.node
        if self.fns.times_vary:
            grad_times, node = self._pull_times(carry, undone, within, grads)
        keep = ft.partial(tree_where_active, active)
        return Carry(
            num_steps=keep(number.astype(old.num_steps.dtype), old.num_steps),
            t1=keep(t_prev, old.t1),
            t_after=keep(step.t0, old.t_after),
            y1=keep(rebuilt.y0, old.y1),
            solver_state=keep(rebuilt.solver_state, old.solver_state),
            y_seen=self._seen(old, carry.saved, active),
            # Of a batch it is one whole, so that it cannot be kept for an element.
            pullback=new_pullback,
            saved=carry.saved,
            grad_y1=keep(grads.y0, old.grad_y1),
            grad_solver_state=keep(grads.solver_state, old.grad_solver_state),
            grad_consts=carry.grad_consts,
            grad_times=grad_times,
            node=node,
            loses_time=carry.loses_time,
        )

    def _seen(self, old: Carry, saved: list[Any], active: Array) -> PyTree:
        """The new `Carry.y_seen`, from what was saved before this step."""
        # (`False` if that is known in advance.)
        is_seen: Any = self._grad_dense_infos is not None
        for new, at_end in zip(saved, old.saved):
            if new is not at_end:
                is_seen = is_seen | (new.index != at_end.index)
        if is_seen is False:
            return old.y_seen
        return tree_where(active & is_seen, old.y1, old.y_seen)

    def _pull_times(
        self, carry: Carry, undone: _UndoneStep, within: _Within, grads: Grads
    ) -> tuple[times_.Times, times_.Node | None]:
        """Takes the gradients of the start and the end of a step to what these are made
        of; and returns the node at its start, if there is to be one."""
        number, active, t0 = undone.number, undone.active, undone.step.t0
        grad_times, node = carry.grad_times, carry.node
        assert grads.t0 is not None and grads.t1 is not None
        for t, grad, n in (
            (carry.t_after, within.t_after, number + 1),
            (carry.t1, within.t1 + grads.t1, number + 1),
            (t0, within.t0 + grads.t0, number),
        ):
            grad = jnp.where(active, grad, 0)
            grad_times = self._add_time(grad_times, t, grad, n)
        if node is None:
            return grad_times, None
        grad_node = node.grad + within.t_after + within.t1 + grads.t1
        grad_node = jnp.where(active, grad_node, 0)
        grad_times = times_.move(
            grad_times, self._times, carry.t1, t0, node.next, grad_node
        )
        grad_node = within.t0 + grads.t0
        if self._grad_final_state.event_tprev is not None:
            is_last = carry.num_steps == self._ends.num_steps
            event_grad = self._grad_final_state.event_tprev
            grad_node = grad_node + jnp.where(is_last, event_grad, 0)
        new_node = times_.Node(carry.t1, grad_node)
        return grad_times, tree_where_active(active, new_node, node)

    #
    # What was saved in a step
    #

    def _pull_saved(self, carry: Carry, undone: _UndoneStep) -> tuple[Carry, _Within]:
        """Pulls back what was saved during a step, in the order opposite to that in
        which it was saved.

        Returns `carry`, before the step is undone but with these gradients; and those
        of the step itself.
        """
        grad, zero = self._grad_final_state, jnp.zeros_like(carry.t1)
        within = _Within(zero, zero, zero, self._grad_dense_info(carry, undone))
        if self.fns.times_vary and grad.dense_ts is not None:
            of_end = take(grad.dense_ts, undone.number + 1)
            within = within._replace(t_after=within.t_after + of_end)
        for i in range(len(carry.saved)):
            carry, within = self._pull_steps(i, carry, undone, within)
            carry, within = self._pull_ts(i, carry, undone, within)
        return carry, within

    def _grad_dense_info(self, carry: Carry, undone: _UndoneStep) -> PyTree:
        """Of what the host has kept of this step, to interpolate."""
        active, out = undone.active, None
        if self._grad_event_info is not None:
            # The last step is the one in which an event may have been.
            is_last = active & (carry.num_steps == self._ends.num_steps)
            out = jtu.tree_map(
                lambda g: jnp.where(is_last, g, 0), self._grad_event_info
            )
        if self._grad_dense_infos is not None:
            of_step = jtu.tree_map(
                lambda g: where_active(active, g, jnp.zeros_like(g)),
                take(self._grad_dense_infos, undone.number),
            )
            out = tree_add(out, of_step)
        return out

    def _pull_steps(
        self, i: int, carry: Carry, undone: _UndoneStep, within: _Within
    ) -> tuple[Carry, _Within]:
        """Of `SubSaveAt(steps=...)`: at the end of the step."""
        if self._steps[i] == 0:
            return carry, within
        number, saved, loses_time = undone.number, carry.saved[i], carry.loses_time
        grad_ys, grad_ts = self._grad_ys[i], self._grad_saves[i].ts
        is_saved = undone.active & (rem(number + 1, self._steps[i]) == 0)
        grad_y1, grad_t = carry.grad_y1, within.t_after
        if grad_ys is not None:
            new_consts, new_t, new_y = save.pull_steps(
                self.fns, i, is_saved, carry.t_after, carry.y1, grad_ys, saved
            )
            save.accumulate(carry.grad_consts, new_consts)
            grad_y1 = tree_add(grad_y1, new_y)
            grad_t = grad_t + new_t
        if self.fns.times_vary and grad_ts is not None:
            grad_t = grad_t + jnp.where(is_saved, saved.last(grad_ts), 0)
        if loses_time is not None:
            here = is_saved & times_.is_chosen(self._times, carry.t_after, number + 1)
            grad_here = saved.last((grad_ys, grad_ts))
            loses_time = loses_time | (here & is_nonzero(grad_here))
        saved = saved._replace(index=saved.index - jnp.where(is_saved, 1, 0))
        carry = carry._replace(
            saved=_replaced(carry.saved, i, saved),
            grad_y1=grad_y1,
            loses_time=loses_time,
        )
        return carry, within._replace(t_after=grad_t)

    def _pull_ts(
        self, i: int, carry: Carry, undone: _UndoneStep, within: _Within
    ) -> tuple[Carry, _Within]:
        """Of `SubSaveAt(ts=...)`: in between."""
        if not self._pulls_ts[i]:
            return carry, within
        number, t_prev, step, dense_info, active = undone
        saved, grad_consts, grad_ts, grad_dense_info, grad_t0, grad_t1 = save.pull_ts(
            self.fns,
            i,
            step,
            dense_info,
            self._times.saved[i],
            # Saved here were those after the end of the step before.
            lambda t: active & ((number == 0) | (t > t_prev)),
            carry.saved[i],
            self._grad_saves[i],
            carry.grad_consts,
            carry.grad_times.saved[i],
            within.dense_info,
        )
        of_saved = tuple(_replaced(carry.grad_times.saved, i, grad_ts))
        carry = carry._replace(
            saved=_replaced(carry.saved, i, saved),
            grad_consts=grad_consts,
            grad_times=carry.grad_times._replace(saved=of_saved),
        )
        within = within._replace(
            t0=within.t0 + grad_t0, t1=within.t1 + grad_t1, dense_info=grad_dense_info
        )
        return carry, within

    def _add_time(self, grad_times: times_.Times, t, grad, n) -> times_.Times:
        if grad is None:
            return grad_times
        return times_.add(grad_times, self._times, t, grad, n)


def _none_if_zero(grads: PyTree) -> PyTree:
    return None if save.is_zero(grads) else grads


def _replaced(xs: Sequence[Any], i: int, x: Any) -> list[Any]:
    return [*xs[:i], x, *xs[i + 1 :]]
