"""What every test shares: the CPU unless told otherwise, programs that compile quickly and are kept between runs."""

import os
import signal
from importlib.metadata import version
from pathlib import Path

# The variables, not jax.config: worker processes and entry points that a test starts inherit them.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# A shell that runs the suite in the background has it ignore Ctrl-C, and so would all that a test starts.
signal.signal(signal.SIGINT, signal.default_int_handler)
# One device here and in every process that a test starts, though an entry point that is imported may wish for more:
# sums over two devices round otherwise than over one.
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "1")
CACHE = os.environ.setdefault("M1JAX_CACHE", str(Path(__file__).parents[1] / ".cache" / "jax"))
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", CACHE)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
# Nearly all time of the suite is compilation, and making the CPU's code quick is four fifths of it: an update of two
# layers takes 1.6 s instead of 8.9 s. XLA ends the process at a flag that it does not know, and 0.12 knows but one.
FLAGS = ["--xla_backend_optimization_level=0"]
if version("jaxlib").startswith("0.10."):
    FLAGS.append("--xla_cpu_use_fusion_emitters=false")
os.environ["XLA_FLAGS"] = " ".join([*FLAGS, *os.environ.get("XLA_FLAGS", "").split()])


def _compile_interpreted_threads_once():
    """JAX 0.10 compiles an interpreted kernel of several warpgroups anew for each of them in each of its programs.

    It is the same function of its arguments, the number of the warpgroup among them; JAX 0.12 compiles it once.
    """
    import threading

    import jax
    import jax.core
    from jax._src.pallas.mosaic.interpret import thread_map

    compiled, lock = {}, threading.Lock()

    def run(jaxpr, consts, *args):
        with lock:
            if id(jaxpr) not in compiled:
                program = jax.jit(lambda consts, *args: jax.core.eval_jaxpr(jaxpr, consts, *args))
                compiled[id(jaxpr)] = jaxpr, program.lower(consts, *args).compile()  # with it, its id is its own
        compiled[id(jaxpr)][1](consts, *args)

    thread_map._run_jaxpr = run


if version("jaxlib").startswith("0.10."):
    _compile_interpreted_threads_once()
