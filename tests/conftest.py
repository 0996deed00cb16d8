import collections

import hypothesis
import jax
import pytest


jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")

# Compiling takes long, and happens within the first example.
hypothesis.settings.register_profile(
    "default",
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("default")


# Which compile nothing.
_CHEAP = {"test_citation.py", "test_compat.py", "test_errors.py"}
# Of all other tests each such case runs by default, beginning with the first.
_ONE_IN = 4


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    # (`@pytest.mark.one_in(n)` takes the place of `_ONE_IN`.)
    counts = collections.Counter()
    for item in items:
        test = (item.path, getattr(item, "originalname", item.name))
        marker = item.get_closest_marker("one_in")
        if marker is not None:
            n = marker.args[0]
        else:
            n = 1 if item.path.name in _CHEAP else _ONE_IN
        if counts[test] % n != 0:
            item.add_marker(pytest.mark.exhaustive)
        counts[test] += 1
