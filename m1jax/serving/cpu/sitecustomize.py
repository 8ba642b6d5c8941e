"""Stand-ins for the compiled packages that SGLang imports and that a machine without a GPU lacks.

`torchvision` and `torchaudio` (pictures and sound) and `sgl_kernel` (CUDA, or AVX-512 in a build of its own) are named
at the top of SGLang's modules and never called for a text model on the plain torch paths. Their attributes are
harmless objects; nothing computes with them, and `make sglang-test` would see it if something did.

Python imports a module of this name by itself at start, in every process that has this folder on PYTHONPATH:
launch/sglang.sh puts it there for PLATFORM=cpu and for nothing else.
"""

import importlib.abc
import importlib.machinery
import sys
import types

STAND_INS = ("torchvision", "torchaudio", "sgl_kernel")

OPERATORS = (
    "decode_attention_cpu", "extend_attention_cpu", "fused_gdn_gating_cpu", "fused_rmsnorm_gated_cpu",
    "fused_sigmoid_gating_delta_rule_update_cpu", "l2norm_cpu",
)  # fmt: skip
"""Names that SGLang's hybrid backends take from torch.ops.sgl_kernel when they are imported."""


class _Nothing(type):
    """The type of a name in a stand-in: it can be called, subclassed, iterated and asked for further names."""

    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return _nothing(name)

    def __call__(cls, *args, **options):
        # A subclass that somebody made is a class like any other; the name itself gives back a name.
        return super().__call__() if cls.__module__ != __name__ else _nothing(cls.__name__)

    def __iter__(cls):
        return iter(())


def _nothing(name):
    return _Nothing(name, (), {"__module__": __name__})


class _StandIn(types.ModuleType):
    __version__ = "0.0.0"

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return _nothing(name)


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Makes a stand-in for a listed package and everything below it."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname.split(".")[0] in STAND_INS and not _transformers_asks():
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec):
        return _StandIn(spec.name)

    def exec_module(self, module):
        if module.__name__ == "sgl_kernel":
            import torch

            for name in OPERATORS:
                setattr(torch.ops.sgl_kernel, name, None)


def _transformers_asks():
    """Whether Transformers is finding out what is installed: it must not think that torchvision is."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        if name == "transformers.utils.import_utils" and frame.f_code.co_name == "_is_package_available":
            return True
        frame = frame.f_back
    return False


sys.meta_path.append(_Finder())  # last: an installed package wins
