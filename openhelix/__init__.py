"""OpenHelix in Python: what `docs/python.md` shows. Importing this costs nothing but this file.

Names are imported from where they live when they are first used, so that a base install can do
what needs no torch and no simulator, and says which extra is missing for the rest.
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from openhelix.benchmarks.calvin.env import PlayTableEnv
    from openhelix.benchmarks.calvin.gym_env import CalvinGymEnv, make_env
    from openhelix.benchmarks.calvin.sequences import get_sequences, initial_state
    from openhelix.benchmarks.calvin.tasks import completed
    from openhelix.evaluation import EvalResult, evaluate
    from openhelix.pair import Agent, load_pair
    from openhelix.runtime.core.interfaces import (
        ActionChunk,
        ActionSpec,
        CameraSpec,
        Engine,
        LatentGoal,
        LatentSpec,
        Observation,
        Policy,
        PolicySpec,
    )
    from openhelix.runtime.observe.robot import Robot
    from openhelix.runtime.transport.client import System2Client
    from openhelix.system1.checkpoint import load_official

_HOMES = {
    "openhelix.benchmarks.calvin.env": ("PlayTableEnv",),
    "openhelix.benchmarks.calvin.gym_env": ("CalvinGymEnv", "make_env"),
    "openhelix.benchmarks.calvin.sequences": ("get_sequences", "initial_state"),
    "openhelix.benchmarks.calvin.tasks": ("completed",),
    "openhelix.evaluation": ("EvalResult", "evaluate"),
    "openhelix.pair": ("Agent", "load_pair"),
    "openhelix.runtime.core.interfaces": (
        *("ActionChunk", "ActionSpec", "CameraSpec", "Engine", "LatentGoal", "LatentSpec"),
        *("Observation", "Policy", "PolicySpec"),
    ),
    "openhelix.runtime.observe.robot": ("Robot",),
    "openhelix.runtime.transport.client": ("System2Client",),
    "openhelix.system1.checkpoint": ("load_official",),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [  # noqa: RUF022 - in the order of the page
    "load_pair",
    "Agent",
    "make_env",
    "CalvinGymEnv",
    "PlayTableEnv",
    "completed",
    "get_sequences",
    "initial_state",
    "Robot",
    "System2Client",
    "evaluate",
    "EvalResult",
    "load_official",
    "Policy",
    "PolicySpec",
    "CameraSpec",
    "ActionSpec",
    "LatentSpec",
    "Engine",
    "Observation",
    "LatentGoal",
    "ActionChunk",
]


def _sum_alike() -> None:
    """Have NumPy's OpenBLAS add in one order on all x86 CPUs with AVX2, so that worlds are the same.

    It picks its kernels by the CPU, and they round differently: of 27 units of demonstrations, made
    by one command with the kernels for AVX-512 and for AVX2, no two were equal. Nothing here multiplies
    matrices in NumPy that are large enough for the faster kernels to matter. A process that has
    imported NumPy before has its own kernels, and so have those that it starts.
    """
    if "OPENBLAS_CORETYPE" in os.environ or _AS_IT_IS in os.environ:
        return
    if "numpy" in sys.modules:
        os.environ[_AS_IT_IS] = "1"
        return
    try:
        with open("/proc/cpuinfo", "rb") as file:
            has_avx2 = b" avx2 " in file.read(8192)
    except OSError:
        return
    if has_avx2:
        os.environ["OPENBLAS_CORETYPE"] = "Haswell"


_AS_IT_IS = "OPENHELIX_OPENBLAS_AS_IT_IS"
_sum_alike()


def __getattr__(name: str) -> Any:
    module = _HOME_OF.get(name)
    if module is None:
        raise AttributeError(f"module 'openhelix' has no attribute {name!r}")
    try:
        value = getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        from openhelix.runtime.core.plugins import missing

        said = missing(error)
        if said is None:
            raise
        raise ImportError(f"openhelix.{name}: {said}", name=error.name) from error
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
