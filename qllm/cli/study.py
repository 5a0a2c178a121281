"""qllm study."""

from __future__ import annotations

import argparse
import dataclasses


def study(arguments: argparse.Namespace) -> None:
    """Runs a study, or what is left of it, and says where its report lies."""
    from .. import study as studies

    design = studies.resolve(arguments.profile, arguments.models or None)
    if arguments.threads is not None:
        design = dataclasses.replace(design, threads=arguments.threads)
    try:
        result = studies.run(design, out=arguments.out, progress=True, fresh=arguments.fresh)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"what is finished lies in {arguments.out}, and the same command"
                                " goes on from there") from None
    print(f"report: {result.report}")
