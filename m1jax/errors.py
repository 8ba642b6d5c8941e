"""The errors that end a run with one clear line. Nothing here knows who raises them or who prints them."""

import math
from collections.abc import Mapping


class UserError(ValueError):
    """A mistake of the user's.

    Its message is one line that names the file, field or value and says how to mend it. Entry points print the
    message without a traceback and exit with code 2.
    """


class ServerRefused(UserError):
    """A rollout server is set up in a way that no run can use. A run that meets one under way saves before it ends."""


class NonFinite(ArithmeticError):
    """A number that has to be finite was not. Entry points print the line and exit with code 1.

    Attributes:
        step: step of the run at which it was seen.
        stage: the stage that computed it.
        what: name of the number.
    """

    def __init__(self, step: int, stage: str, what: str):
        super().__init__(f"step {step}, stage {stage}: {what} is not finite; stopped, the last good checkpoint stays")
        self.step, self.stage, self.what = step, stage, what

    def __reduce__(self):  # from process to process
        return NonFinite, (self.step, self.stage, self.what)


def require_finite(step: int, stage: str, metrics: Mapping[str, float]) -> None:
    """Raise NonFinite where the loss, or a norm of gradient or parameters, is NaN or infinite.

    The norm of the new parameters is among them so that parameters which are not finite are never saved.
    """
    for name in ("train/loss", "train/grad_norm", "train/param_norm"):
        if not math.isfinite(metrics.get(name, 0.0)):
            raise NonFinite(step, stage, name)


class HostLost(RuntimeError):
    """One of the processes of a job is gone or stuck: the others cannot go on, and end with exit code 75.

    Its message is one line that names the host.
    """


class Stopped(Exception):  # no error: what was asked for
    """The run was asked to stop while an engine was at work; what it was at work on is given up."""


class EngineLost(RuntimeError):
    """Nothing generates any more, and not for a fault of ours: the run saves and exits with code 75.

    Its message is one line that names the cause of each server.
    """
