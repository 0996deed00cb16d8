"""Everything of JAX and Equinox that is used here and that they do not promise to keep.

It moves faster than anything else that is used. So it is all named in this one file,
from which other modules import it, and is tested with the oldest supported versions and
with the newest.

| name | why |
|---|---|
| `eqxi.while_loop` | the host's loop, in which buffers are written in place |
| `eqxi.unvmap_any`, `eqxi.unvmap_max` | decisions that a batch takes together |
| `eqxi.nextafter`, `eqxi.prevbefore` | steps end and start so, next to a jump |
| `eqxi.branched_error_if` | an error with a message chosen at run time |
| `ad`, `batching`, `mlir`, `Primitive`, `ShapedArray` | primitives of our own |
"""

import equinox.internal as eqxi  # noqa: F401
from jax.core import ShapedArray as ShapedArray
from jax.extend.core import Primitive as Primitive
from jax.interpreters import ad as ad, batching as batching, mlir as mlir
