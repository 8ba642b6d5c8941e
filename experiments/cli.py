"""What every entry point shares: the command line, one line instead of a traceback, exit codes, the compile cache.

    python -m experiments.train_rl --config=configs/rl_tiny_cpu.py[:smoke] --workdir=DIR [--init_from=CHECKPOINT]
                                   [--config.loss=dapo] [--config.loss.weight_cap=5] [--config.name=VALUE ...]

    exit code  0   done                                 75   SIGTERM, or no rollout server is left: saved; or a host is
               1   a number was not finite                   lost: a scheduler may start it again
               2   a mistake of the user's, in one line 130  Ctrl-C: saved

A config file is Python with `get_config([argument])` that returns an `ml_collections.ConfigDict` of plain values.
Overrides are laid over it here, as literals; whether a key exists and what type it has is judged in one place for
the file and the command line alike, by the dataclasses (`m1jax.config.build`). A name in place of the section `loss`
stands for a block of configs/algorithms.py. `ml_collections.config_flags` would
type an override by the value in the file instead: a None there could not be overridden, nor 5 by 2.5.
Which entry point calls, and what it does with its config, is not known here.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import inspect
import os
import shlex
import socket
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from ml_collections import ConfigDict

from m1jax.config import build
from m1jax.errors import EngineLost, HostLost, NonFinite, UserError
from m1jax.model.config import ModelConfig
from m1jax.train.interrupt import Interrupted

MICRO_BATCH = "the micro_batch_rows of the stage that ran (config.update in RL, config.rows in SFT)"


@dataclass(frozen=True)
class Arguments:
    """A parsed command line.

    Attributes:
        config: nested plain values: the config file with the overrides laid over it. Not yet validated.
        workdir: the run folder.
        init_from: a run folder or checkpoint to take parameters from, or None.
        more: flags of one entry point only.
    """

    config: dict[str, Any]
    workdir: Path
    init_from: Path | None
    more: argparse.Namespace


def run(
    main: Callable[[Arguments], None],
    memory: str = MICRO_BATCH,
    add_flags: Callable[[argparse.ArgumentParser], None] = lambda parser: None,
) -> NoReturn:
    """Parse the command line, call `main`, leave the process with the right exit code.

    Args:
        main: the entry point's own work.
        memory: what to lower where memory runs out.
        add_flags: adds the entry point's own flags, which come as `Arguments.more`.
    """
    argv = sys.argv[1:]

    def body() -> None:
        from m1jax.train.hosts import lost_is_told, together  # it imports jax, without which some entry points live

        join_hosts()
        with lost_is_told():
            main(together(lambda: parse(argv, add_flags)))

    try:
        code = guard(body, _command(argv), memory)
    except Exception:
        if not os.environ.get(PROCESSES):
            raise
        traceback.print_exc()
        code = 1
    leave_hosts(code)
    sys.exit(code)


PROCESSES, PROCESS = "M1JAX_PROCESSES", "M1JAX_PROCESS"
"""Set by the scripts in launch/: how many processes there are ("auto" where the scheduler knows), and which this is."""


def join_hosts() -> None:
    """Become one process of a job, where a launch script says that this is one: before anything asks for devices."""
    count = os.environ.get(PROCESSES)
    if not count:
        return
    import jax

    jax.config.update("jax_enable_recoverability", True)  # a host that is lost ends the job by our line, not an abort
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM for itself until a run listens
    asked: dict[str, Any] = {}
    if count != "auto":
        address = os.environ.get("JAX_COORDINATOR_ADDRESS", "")
        process = os.environ.get(PROCESS, "")
        if not (count.isdecimal() and process.isdecimal() and address):
            raise UserError(
                f"{PROCESSES}={count!r}, {PROCESS}={process!r}, JAX_COORDINATOR_ADDRESS={address!r}: a job of several "
                f"processes needs all three; start it by a script of launch/"
            )
        asked = {"num_processes": int(count), "process_id": int(process)}
    try:
        # JAX's own watch aborts without a word of where; ours (m1jax.train.hosts) has spoken long before.
        jax.distributed.initialize(**asked, heartbeat_timeout_seconds=300)
    except (RuntimeError, ValueError) as error:
        told = f"the processes of this job did not find each other: {str(error).strip().split(chr(10))[0][:200]}"
        # One that is late (a new node for one that was lost) is worth another try, an address that is none is not.
        raise HostLost(told) if isinstance(error, RuntimeError) else UserError(told) from error
    counts = Counter(device.process_index for device in jax.devices())
    if len(set(counts.values())) > 1:
        told = ", ".join(f"process {number} has {count}" for number, count in sorted(counts.items()))
        raise UserError(f"{socket.gethostname()}: every process needs as many devices, and {told}; give all as many")


LAST_S = 10.0
"""Seconds that the first process of a job which failed stays, for the others to say what they have to say."""


def leave_hosts(code: int) -> None:
    """Leave the job with an exit code, where this is a process of one: the first process last.

    It keeps the service without which JAX aborts the others, whatever they are at (exit code 134).
    """
    if not os.environ.get(PROCESSES):
        return
    import jax
    from jax._src import distributed  # the public part has no word for "until the others have left"

    sys.stdout.flush()
    sys.stderr.flush()
    client = distributed.global_state.client
    if client is not None:
        try:
            client.wait_at_barrier("m1jax: the end", int(1000 * (LAST_S if code else 600.0)))
            if jax.process_index() == 0:
                client.get_live_nodes(list(range(jax.process_count())))  # returns when the others have left
            jax.distributed.shutdown()
        except RuntimeError:  # another is gone, or busy still: whoever failed does not wait for it any longer
            pass
    if code:  # the ordinary way out waits for threads, and one of them may wait for a host that is gone
        os._exit(code)


def exit_with(main: Callable[[list[str]], None], memory: str = MICRO_BATCH, uses_jax: bool = True) -> NoReturn:
    """As `run`, for an entry point that reads its own flags and has nothing to resume."""
    sys.exit(guard(lambda: main(sys.argv[1:]), "", memory, uses_jax))


def guard(body: Callable[[], None], resume: str = "", memory: str = MICRO_BATCH, uses_jax: bool = True) -> int:
    """The exit code of `body`; what a user can act on becomes one line on stderr, bugs keep their traceback.

    Args:
        body: what to run.
        resume: the command that continues it; "" where nothing does.
        memory: what to lower where memory runs out.
        uses_jax: False leaves JAX alone, whose import alone takes longer than some entry points do.
    """
    if uses_jax:
        use_compile_cache()
    try:
        body()
        return 0
    except Interrupted as stop:
        said = f"{stop.reason}; saved" if stop.reason else "stopped and saved"
        return _say(f"{said}; resume with: {resume}", stop.exit_code)
    except HostLost as lost:
        return _say(f"error: {lost}; start again with: {resume}", 75)
    except EngineLost as lost:  # at a start, where there is nothing to save yet
        return _say(f"{lost}; start again with: {resume}", 75)
    except KeyboardInterrupt:
        return _say("stopped" + f" at once; resume from the last checkpoint with: {resume}" * bool(resume), 130)
    except UserError as error:
        return _say(f"error: {error}", 2)
    except NonFinite as error:
        return _say(f"error: {error}", 1)
    except (RuntimeError, MemoryError) as error:  # JaxRuntimeError is a RuntimeError
        if isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        detail = str(error).strip().split("\n")[0][:160]
        return _say(f"error: out of memory: lower {memory} and run again ({detail})", 2)
    except BrokenPipeError:  # whoever reads our output, `head` for example, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141  # as a program that SIGPIPE ended
    except OSError as error:
        from m1jax.train.checkpoint import is_disk_full

        if not is_disk_full(error):
            raise
        where = f" ({error.filename})" if error.filename else ""
        return _say(f"error: no space left on the disk{where}; the last good checkpoint stays", 2)


def parse(argv: Sequence[str], add_flags: Callable[[argparse.ArgumentParser], None] = lambda parser: None) -> Arguments:
    """The arguments of a command line.

    Raises:
        UserError: an unknown flag, a missing or broken config file, an override that is no `--config.key=value`.
    """
    parser = Parser(allow_abbrev=False, description="See configs/README.md for the configs and what they need.")
    parser.add_argument("--workdir", required=True, metavar="DIR", help="run folder; an existing one is resumed")
    parser.add_argument("--init_from", metavar="PATH", help="run folder or checkpoint to take parameters from")
    add_flags(parser)
    known, config = parse_with_config(parser, argv)
    return Arguments(config, Path(known.workdir), Path(known.init_from) if known.init_from else None, known)


def parse_with_config(
    parser: argparse.ArgumentParser, argv: Sequence[str]
) -> tuple[argparse.Namespace, dict[str, Any]]:
    """The flags of `parser`, and the values of `--config`, which is added here, with the overrides laid over them.

    Raises:
        UserError: as `parse`.
    """
    about = "config file; :smoke shrinks it"
    parser.add_argument("--config", required=True, metavar="FILE.py[:ARGUMENT]", help=about)
    parser.epilog = "Any value of the config: --config.section.key=VALUE"
    flags, overrides = split_overrides(argv)
    known = parser.parse_args(flags)
    return known, load_config(known.config, overrides)


def split_overrides(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """(all other words, those of the form --config.section.key=VALUE)."""
    overrides = [word for word in argv if word.startswith(("--config.", "-config."))]
    return [word for word in argv if word not in overrides], overrides


def load_config(spec: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Plain values of a config file named "path.py" or "path.py:argument", with overrides laid over them.

    Raises:
        UserError: no such file, an exception in it, or no ConfigDict out of it; an override that is none.
    """
    name, _, argument = spec.partition(":")
    path = Path(name).absolute()
    if not path.is_file():
        raise UserError(f"{name}: no such config file")
    try:
        module_spec = importlib.util.spec_from_file_location("config_file", path)
        if module_spec is None or module_spec.loader is None:
            raise UserError(f"{name}: a config is a Python file, its name ends in .py")
        module = importlib.util.module_from_spec(module_spec)
        module_spec.loader.exec_module(module)
        config = module.get_config(argument) if argument else module.get_config()
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{spec}: {type(error).__name__}: {_first_line(error)}{_where(error, path)}") from error
    if not isinstance(config, Mapping | ConfigDict):
        raise UserError(f"{spec}: get_config() returned {type(config).__name__}, expected a ConfigDict")
    values = _plain(config)
    if isinstance(values.get("loss"), str):
        values["loss"] = named_algorithm(values["loss"])
    for key, texts in sorted(_gather(overrides).items(), key=lambda item: item[0].count(".")):  # sections, then values
        if key == "loss":
            values["loss"] = named_algorithm(texts[-1])
        else:
            _lay(values, key, texts)
    return values


def named_algorithm(name: str) -> dict[str, Any]:
    """The block of configs/algorithms.py that has this name.

    Raises:
        UserError: there is none; the line lists what there is.
    """
    from configs import algorithms

    makers = {key: value for key, value in vars(algorithms).items() if inspect.isfunction(value)}
    if name not in makers:
        raise UserError(f"config.loss: {name!r} is not in configs/algorithms.py; it has {', '.join(sorted(makers))}")
    return makers[name]()


def named_model(name: str, flag: str = "--model") -> ModelConfig:
    """The model of configs/models.py that has this name, which `flag` gave.

    Raises:
        UserError: there is none; the line lists what there is.
    """
    from configs import models

    makers = {key: value for key, value in vars(models).items() if inspect.isfunction(value)}
    if name not in makers:
        raise UserError(f"{flag}: {name!r} is not in configs/models.py; it has {', '.join(sorted(makers))}")
    return build(ModelConfig, _plain(makers[name]()), f"configs/models.py {name}")


def use_compile_cache() -> None:
    """Keep compiled programs between processes, in $M1JAX_CACHE or ~/.cache/m1jax: the second start is quick."""
    import jax

    folder = Path(os.environ.get("M1JAX_CACHE") or Path.home() / ".cache" / "m1jax")
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


class Parser(argparse.ArgumentParser):
    """argparse whose complaints are UserErrors: one line, without the usage text."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; --help lists the flags")


def _gather(words: Sequence[str]) -> dict[str, list[str]]:
    """`{dotted key: texts}` of the overrides, in the order given."""
    result: dict[str, list[str]] = {}
    for word in words:
        key, equals, text = word.lstrip("-").removeprefix("config.").partition("=")
        if not equals or not all(key.split(".")):
            raise UserError(f"{word}: write an override as --config.section.key=VALUE")
        result.setdefault(key, []).append(text)
    return result


def _lay(config: dict[str, Any], key: str, texts: list[str]) -> None:
    """Set one dotted key in nested values; a key that is new here is left for the dataclasses to judge."""
    *parents, last = key.split(".")
    section = config
    for parent in parents:
        if section.get(parent) is None:  # no such section yet, or one that is left out
            section[parent] = {}
        section = section[parent]
        if not isinstance(section, dict):
            raise UserError(f"config.{key}: {parent} is a value, not a section")
    present = section.get(last)
    if isinstance(present, str):
        section[last] = texts[-1]
    elif isinstance(present, list | tuple):
        values = [_literal(text) for text in texts]
        # One text may be the whole tuple; several, or one that is no tuple, are its entries.
        whole = len(values) == 1 and isinstance(values[0], list | tuple)
        section[last] = tuple(values[0]) if whole else tuple(values)
    else:
        section[last] = _literal(texts[-1])


def _literal(text: str) -> Any:
    """The Python value that a text spells, true and false included; else the text itself."""
    try:
        return ast.literal_eval(text.capitalize() if text in ("true", "false", "none") else text)
    except (ValueError, SyntaxError, TypeError):
        return text


def _plain(value: Any) -> Any:
    """ConfigDicts, at any depth, as dicts."""
    if isinstance(value, Mapping | ConfigDict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return tuple(_plain(item) for item in value)
    return value


def _where(error: BaseException, path: Path) -> str:
    """ ", line N" of the deepest frame of `error` inside the config file."""
    if isinstance(error, SyntaxError):
        return f", line {error.lineno}"
    lines, trace = [], error.__traceback__
    while trace is not None:
        if Path(trace.tb_frame.f_code.co_filename) == path:
            lines.append(trace.tb_lineno)
        trace = trace.tb_next
    return f", line {lines[-1]}" if lines else ""


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0]


def _command(argv: Sequence[str]) -> str:
    """The shell line that started this process."""
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    program = ["-m", spec.name.removesuffix(".__main__")] if spec else [sys.argv[0]]
    return shlex.join(["python", *program, *argv])


def _say(line: str, code: int) -> int:
    print(" ".join(line.split("\n")), file=sys.stderr, flush=True)
    return code
