"""The errors that end a run with one clear line. Nothing here knows who raises them or who prints them."""


class UserError(ValueError):
    """A mistake of the user's.

    Its message is one line that names the file, field or value and says how to mend it. Entry points print the
    message without a traceback and exit with code 2.
    """


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
