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


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    # Of the cases of a test with `@pytest.mark.one_in(n)` each `n`th runs by default.
    counts = collections.Counter()
    for item in items:
        marker = item.get_closest_marker("one_in")
        if marker is not None:
            test = (item.path, item.originalname)
            if counts[test] % marker.args[0] != 0:
                item.add_marker(pytest.mark.exhaustive)
            counts[test] += 1
