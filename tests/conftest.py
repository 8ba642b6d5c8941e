"""What every test shares: the CPU unless told otherwise, and compiled programs kept between runs."""

import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
CACHE = os.environ.setdefault("M1JAX_CACHE", str(Path(__file__).parents[1] / ".cache" / "jax"))
# The variables, not jax.config: worker processes and entry points that a test starts inherit them.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", CACHE)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
