"""Progress bars: one place that decides whether and how they are drawn (tqdm, as widgets in a notebook)."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from llmapi import _env


@contextmanager
def bar(phase: str, total: int, unit: str = "it", *, enabled: bool = True) -> Iterator[Callable[[int], None]]:
    """Draw the progress of one phase.

    Args:
        phase: shown before the bar, e.g. ``"convert"``.
        total: how much there is to do.
        unit: what is counted; ``"B"`` scales to MB and GB.
        enabled: False draws nothing; nor does anything under ``LLMAPI_PROGRESS=0``.

    Yields:
        a function to call with how much more is done.
    """
    if not (enabled and _env.progress()):
        yield lambda done: None
        return
    with quiet_tqdm(total=total, desc=f"{phase:>8}", unit=unit, unit_scale=unit == "B") as drawn:
        yield lambda done: drawn.update(done) and None


def quiet_tqdm(**options: Any) -> Any:
    """A tqdm bar, as widgets in a notebook that has them and as text elsewhere, without tqdm's warning about that.

    Args:
        options: of ``tqdm``.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from tqdm.auto import tqdm
    return tqdm(dynamic_ncols=True, **options)
