"""What happens in a gradient, file by file, in the order of reading.

The adjoint replaces nothing of diffrax but the loop over steps (`rule`), and all that
it adds is around that loop: `solver.init`, output at `t0` and `t1`, and the like are
differentiated by JAX.

With `s` slots for the starts of segments of `n` steps, and room for the states of one
segment, up to `(s + 1) * n` steps are recomputed once each, and the last `n` of them
never. Beyond that slots are thinned out, and what lies between two of them is
recomputed more than once. (Who wants to know how many states are stored, or why, may
begin with `plan`, and read `slots`, `segments` and `backward`.)

**What JAX sees:**

- `adjoint`: `ReversibleAdjoint`, and all that it promises.
- `rule`: the loop, with a rule for its derivative.
- `problem`, `derivative`, `linear`: a solve as a function of a list of arrays; its
  derivatives, each as one primitive that is linear in some of its arguments, so that
  every mode of differentiation is a use of four functions.
- `gradient`: the gradient, from the arrays to the backward pass and back.

**How a solve is made, and made once more:**

- `segments`: the loops forwards: which stores the starts of segments, and which
  recomputes one of them.
- `backward`: the backward pass, from one segment to the one before.
- `slots`: the stored states; and `index`, how they are read and written.
- `residuals`: what is left of a solve for the backward pass.
- `step_record`: where steps start and end, so that they can be undone; and which
  segments are to be recomputed even so.
- `noise`: what these loops, and the steps that are differentiated, ask of a Brownian
  motion.
- `plan`: how much memory is given to what.

**How one step is pulled back:**

- `hoist`, `functions`: what the loop calls, traced once, with its constants explicit:
  so `args`, `terms` and values that are closed over are all alike.
- `pullback`: through one step, by the VJP of `step`, once `backward_step` has undone
  it.
- `coupling_pullback`: the same for solvers made of couplings, in half of the time.
- `recomputed`: the same for a step that cannot be undone.
- `adjoint_step`: a step, and what was saved in it, with all that the backward pass
  carries from step to step.
- `save`, `times`: the gradients of saved values; and of times.
- `verify`, `check`: what was rebuilt against what was stored; and what is an error.
- `batch`, `vmap`, `guard`: gradients that are summed over a batch, and other
  transformations.

**Glossary:** The *host* is diffrax, and its loop and its state are the *host's*. A
*segment* is so many consecutive steps. *Stored* is a state in a slot. A segment is
*marked* if it is to be recomputed, and a state is *wanted* if it should be stored, as
undoing does not give it well enough. What is *known* of a step has been stored or
recomputed, and what is *rebuilt* has been undone. *Hoisted* is a function whose
constants are arguments. *Perturbed* is an input with respect to which the solve is
differentiated.
"""
