"""Gather: many requests in flight together, their outputs in the order of the prompts."""

from __future__ import annotations

import contextlib
import itertools
import logging
import queue
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from llmapi import _env
from llmapi._progress import quiet_tqdm
from llmapi._runtime.request import Request
from llmapi.errors import LLMAPIError
from llmapi.outputs import CompletionOutput, RequestOutput

log = logging.getLogger("llmapi")

_refusals = itertools.count()  # requests that were refused have no id of the maker's
_TOGETHER = 0.01  # seconds that requests are gathered before they are submitted, so that steps are full from the first


def gather(
    makers: Sequence[Callable[[], Request]],
    prompts: list[Any],
    submit: Callable[[list[Request], Callable[[RequestOutput], None]], None],
    abort: Callable[[Iterable[str]], None],
    *,
    progress: bool,
) -> list[RequestOutput]:
    """Make and submit every request, and wait for all; Ctrl-C aborts them and returns at once.

    Args:
        makers: make the requests; what one raises is its own, unless it is alone.
        prompts: as the user gave them, for the outputs of those that could not be made.
        submit: takes requests and who listens for their final outputs.
        abort: ends requests by their ids.
        progress: whether to draw a bar.

    Raises:
        LLMAPIError: every request failed; the first one's reason.
    """
    finished: queue.SimpleQueue[RequestOutput] = queue.SimpleQueue()
    outputs: dict[str, RequestOutput] = {}
    ids: list[str] = []
    made: list[Request] = []
    since = time.perf_counter()
    try:
        for index, make in enumerate(makers):
            try:
                request = make()
            except LLMAPIError as error:
                if len(makers) == 1:
                    raise
                ids.append(f"refused-{next(_refusals)}")
                outputs[ids[-1]] = _refused(ids[-1], prompts[index], error)
                continue
            ids.append(request.id)
            made.append(request)
            if time.perf_counter() - since > _TOGETHER:
                submit(made, finished.put)
                made, since = [], time.perf_counter()
        submit(made, finished.put)
        with _bar(len(makers), progress) as done:
            done(len(outputs), 0)
            while len(outputs) < len(ids):
                output = finished.get()
                outputs[output.request_id] = output
                done(1, sum(len(o.token_ids) for o in output.outputs))
    except BaseException:
        abort(i for i in ids if i not in outputs)
        raise
    return _settle([outputs[i] for i in ids])


def _refused(request_id: str, prompt: object, error: LLMAPIError) -> RequestOutput:
    text = prompt if isinstance(prompt, str) else None
    return RequestOutput(request_id, text, [], [CompletionOutput(0, "", [], finish_reason="error")], True, error=error)


def _settle(outputs: list[RequestOutput]) -> list[RequestOutput]:
    """Warn of the requests that failed; raise where all did."""
    failed = [(i, o.error) for i, o in enumerate(outputs) if o.error is not None]
    if failed:
        index, error = failed[0]
        if len(failed) == len(outputs):
            raise error
        log.warning("%d of %d requests failed; the first is prompt %d: %s", len(failed), len(outputs), index, error)
    return outputs


@contextlib.contextmanager
def _bar(total: int, enabled: bool) -> Iterator[Callable[[int, int], None]]:
    """A bar over finished requests that also shows output tokens a second."""
    if not (enabled and _env.progress()):
        yield lambda requests, tokens: None
        return
    start, tokens_so_far = time.perf_counter(), 0
    with quiet_tqdm(total=total, desc="generate", unit="prompt") as drawn:

        def done(requests: int, tokens: int) -> None:
            nonlocal tokens_so_far
            tokens_so_far += tokens
            drawn.set_postfix_str(
                f"{tokens_so_far / max(time.perf_counter() - start, 1e-9):.0f} tokens/s", refresh=False
            )
            drawn.update(requests)

        yield done
