"""qllm study."""

from __future__ import annotations

import argparse
import dataclasses
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from .parser import UsageError

if TYPE_CHECKING:
    from ..study import Design


def study(arguments: argparse.Namespace) -> None:
    """Runs a study, or what is left of it, and says where its report lies; or only says what it
    would cost."""
    from .. import study as studies

    if arguments.dask is not None and arguments.workers is not None:
        raise UsageError("--dask names a cluster with workers of its own, so --workers has no"
                         " meaning beside it (see qllm study --help)")
    if arguments.out is None and not arguments.dry_run:
        raise UsageError("qllm study needs --out DIR, the folder for its results (see qllm study"
                         " --help)")
    named = [*arguments.models, *arguments.more_models]
    design = studies.resolve(arguments.profile, named or None)
    for name in ("device", "threads"):
        if getattr(arguments, name) is not None:
            design = dataclasses.replace(design, **{name: getattr(arguments, name)})
    if arguments.lockstep:
        design = dataclasses.replace(design, lockstep=True, speed=None)
    if arguments.dry_run:
        print(studies.plan(design, workers=arguments.workers or 1))
        return
    try:
        with _executor(arguments, design) as executor:
            result = studies.run(design, out=arguments.out, executor=executor, progress=True,
                                 fresh=arguments.fresh)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"what is finished lies in {arguments.out}, and the same command"
                                " goes on from there") from None
    print(f"report: {result.report}")


def _executor(arguments: argparse.Namespace, design: Design) -> Any:
    """A context with the executor that the options ask for, None for this process."""
    from ..study import cluster

    if arguments.dask is None and arguments.workers is None:
        return nullcontext()
    return cluster(arguments.dask, workers=arguments.workers, threads=design.threads)
