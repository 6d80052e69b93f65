"""Service: an engine at work. Requests go in, outputs come out, in every way that callers wait for them."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from llmapi._runtime.blocks import BlockPool
from llmapi._runtime.gather import gather
from llmapi._runtime.grammar import Grammars
from llmapi._runtime.inputs import Prompt, RequestMaker
from llmapi._runtime.job import Job, Listener
from llmapi._runtime.loop import EngineLoop
from llmapi._runtime.request import Request
from llmapi._runtime.results import OutputStream, RequestFuture
from llmapi._runtime.scheduler import Scheduler
from llmapi.errors import ConfigError, LLMAPIError
from llmapi.outputs import RequestOutput
from llmapi.sampling import SamplingParams

if TYPE_CHECKING:
    from llmapi._runtime.engine import Engine
    from llmapi._runtime.start import Prepared


class Service:
    """Serves one engine on a loop of its own.

    Args:
        prepared: what the engine was loaded from; its builder is closed with the service.
        engine: the engine.
        seed: of requests that give none of their own; None draws one from the system.

    Attributes:
        loop: runs the engine. It knows nothing of the service: dropping the last reference to that, or leaving Python,
            closes the loop.
        maker: makes the requests.
    """

    def __init__(self, prepared: Prepared, engine: Engine, seed: int | None) -> None:
        config = prepared.config
        pool = BlockPool(
            engine.num_blocks,
            config.block_size,
            enable_prefix_caching=config.enable_prefix_caching,
            compact=config.backend == "tensorrt" and config.block_size == config.max_seq_len,
        )
        scheduler = Scheduler(
            pool,
            max_num_tokens=config.max_num_tokens,
            max_batch_size=config.max_batch_size,
            max_seq_len=config.max_seq_len,
        )
        ends = frozenset(prepared.stop_token_ids)
        grammars = Grammars(prepared.tokenizer, prepared.spec.vocab_size, ends)
        self._tokenizer = prepared.tokenizer
        self.loop = EngineLoop(engine, scheduler, engine.sampler(prepared.tokenizer))
        self.maker = RequestMaker(
            tokenizer=prepared.tokenizer,
            vocab_size=prepared.spec.vocab_size,
            max_seq_len=config.max_seq_len,
            capacity_tokens=engine.num_blocks * config.block_size,
            end_token_ids=ends,
            seed=seed,
            grammars=grammars,
            block_size=config.block_size,
            max_batch_size=config.max_batch_size,
        )
        self._closer = weakref.finalize(self, _close, grammars, self.loop, prepared.builder)

    def run(self, makers: Sequence[Callable[[], Request]], prompts: list[Any], bar: bool) -> list[RequestOutput]:
        """Make and run requests, all in flight together; outputs in their order.

        Args:
            makers: make one request each.
            prompts: as the user gave them, for the outputs of those that could not be made.
            bar: whether to draw a bar where there are several.

        Raises:
            ConfigError: ``bar`` is neither True nor False.
            EngineClosedError: after :meth:`close`.
            LLMAPIError: every request failed; the first one's reason.
        """
        if not isinstance(bar, bool):
            raise ConfigError(f"use_tqdm={bar!r}: give True or False")
        self.check_open()

        def submit(requests: list[Request], listener: Listener) -> None:
            self._submit(requests, listener, streaming=False)

        def abort(ids: Iterable[str]) -> None:
            for one in ids:
                self.loop.abort(one)

        return gather(makers, prompts, submit, abort, progress=bar and len(makers) > 1)

    def probe(self, requests: list[Request], bar: bool) -> None:
        """Run requests that have probes.

        Args:
            requests: any number.
            bar: as of :meth:`run`.

        Raises:
            LLMAPIError: what the first that failed failed of.
        """
        if requests:
            for output in self.run([partial(_same, request) for request in requests], requests, bar):
                if output.error is not None:
                    raise output.error

    def stream(self, prompt: Prompt, params: SamplingParams) -> OutputStream:
        """The states of one request as they come. The service lives as long as the stream.

        Args:
            prompt: in any of its forms.
            params: how to decode.

        Raises:
            RequestError: the prompt cannot be served.
        """
        self.check_open()
        request = self.maker.make(prompt, params)
        stream = OutputStream(lambda: self.loop.abort(request.id))
        self._submit([request], stream.listen, streaming=True)
        return stream

    def start(self, prompt: Prompt, params: SamplingParams) -> RequestFuture:
        """Start a request; a future that holds its states, or the reason why it was refused.

        Args:
            prompt: in any of its forms.
            params: how to decode.
        """
        self.check_open()
        try:
            request = self.maker.make(prompt, params)
        except LLMAPIError as error:
            future = RequestFuture(None, lambda: None)
            future.refuse(error)
            return future
        loop = self.loop
        future = RequestFuture(request.id, lambda: loop.abort(request.id), lambda wanted: job.follow(wanted))
        job = Job(request, self._tokenizer, future.listen, streaming=True)
        loop.submit([job])
        return future

    @property
    def closed(self) -> bool:
        """Whether it was closed."""
        return not self._closer.alive

    def check_open(self) -> None:
        """Refuse whatever is asked of a closed service, before anything is said of the request itself.

        Raises:
            EngineClosedError: after :meth:`close`, or in a forked process.
        """
        self.loop.submit([])

    def close(self) -> None:
        """Abort what runs and give back all memory. Closing twice is closing once."""
        self._closer()

    def _submit(self, requests: list[Request], listener: Listener, *, streaming: bool) -> None:
        self.loop.submit([Job(request, self._tokenizer, listener, streaming) for request in requests])


def _same(request: Request) -> Request:
    return request


def _close(*owned: Any) -> None:
    for one in owned:
        one.close()
