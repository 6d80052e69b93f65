"""LLM: the one class that users need. It wires the stages together and holds no algorithm."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from functools import partial
from os import PathLike
from typing import TYPE_CHECKING, Any, overload

from llmapi._targets import parse_targets
from llmapi.errors import ConfigError, EngineClosedError, RequestError, unknown_name
from llmapi.outputs import Perplexity, RequestOutput, Score
from llmapi.sampling import SamplingParams

if TYPE_CHECKING:
    import torch

    from llmapi._build.report import BuildReport
    from llmapi._runtime.inputs import Prompt
    from llmapi._runtime.request import Request
    from llmapi._runtime.results import RequestFuture
    from llmapi._tokenizer import Tokenizer
    from llmapi.beam_search import BeamSearchOutput, BeamSearchParams
    from llmapi.config import KvCacheConfig

Message = Mapping[str, Any]


class LLM:
    """A language model, ready to generate.

    The weights are found or downloaded, converted and built once; the results are kept in a cache, so that the next
    start takes seconds. Requests of any number and shape run together in one batch (in-flight batching).

    Args:
        model: Hugging Face id, local folder, ``.gguf`` file, or a folder made by :meth:`save`.
        tokenizer: another model's id or folder, or a tokenizer of transformers; None takes the model's own.
        tokenizer_mode: ``"auto"`` or ``"slow"`` (the Python implementation, where there is one).
        skip_tokenizer_init: go without a tokenizer; prompts are then token ids and outputs have no text.
        trust_remote_code: let the tokenizer run Python code that comes with the model.
        revision: branch, tag or commit on the hub.
        dtype: ``"float32"``, ``"bfloat16"``, ``"float16"``; ``"auto"`` is float32 on the cpu backend.
        backend: ``"cpu"``, ``"cuda"``, ``"tensorrt"``; ``"auto"`` is the best that this machine and release have.
        load_format: ``"auto"`` for the real weights, ``"dummy"`` for seeded random ones (config.json is enough then).
        seed: of requests that give none of their own, and of dummy weights; None draws one from the system.
        max_seq_len: longest sequence in tokens, prompt and output together; None is the model's own limit.
        max_batch_size: most sequences in one step; None is 64.
        max_num_tokens: most tokens in one step; longer prompts are computed in chunks. None is 512, at least
            ``max_batch_size``.
        gpu_memory_utilization: share of the GPU's memory to use, in (0, 1]; no meaning on the cpu backend.
        kv_cache_config: a :class:`KvCacheConfig`, or a dict of its arguments.
        target: GPU architectures to build a TensorRT plan for, such as ``"sm89"`` or ``"sm89,sm120"``; None makes one
            for any GPU that TensorRT-RTX runs on. Of the tensorrt backend alone.
        enable_prefix_caching: let prompts that begin alike share their KV blocks.
        tensor_parallel_size: devices to spread the model over; 1 on the cpu backend.
        cache_dir: root of the build cache; None is ``LLMAPI_CACHE_DIR``, else the user's cache folder.
        hf_token: token for the hub; None leaves it to ``HF_TOKEN`` and the stored login.
        refresh: ask the hub for a newer revision even when a complete one is on disk.
        progress: draw progress bars.

    Raises:
        ConfigError: an argument has a value it cannot have.
        SourceError: the model cannot be found or fetched.
        UnsupportedModelError: its architecture is not known.
        CheckpointError: its files are broken.

    Example:
        >>> with LLM("HuggingFaceTB/SmolLM2-135M-Instruct") as llm:  # doctest: +SKIP
        ...     print(llm.generate("The capital of France is", SamplingParams(temperature=0, max_tokens=2)).text)
         Paris.
    """

    def __init__(
        self,
        model: str | PathLike[str],
        *,
        tokenizer: Any = None,
        tokenizer_mode: str = "auto",
        skip_tokenizer_init: bool = False,
        trust_remote_code: bool = False,
        revision: str | None = None,
        dtype: str = "auto",
        backend: str = "auto",
        load_format: str = "auto",
        seed: int | None = 0,
        max_seq_len: int | None = None,
        max_batch_size: int | None = None,
        max_num_tokens: int | None = None,
        gpu_memory_utilization: float = 0.9,
        kv_cache_config: KvCacheConfig | dict[str, Any] | None = None,
        target: str | Sequence[str] | None = None,
        enable_prefix_caching: bool = True,
        tensor_parallel_size: int = 1,
        cache_dir: str | PathLike[str] | None = None,
        hf_token: str | bool | None = None,
        refresh: bool = False,
        progress: bool = True,
        **unknown: Any,
    ) -> None:
        _check_names(unknown)
        from llmapi._runtime.options import split_arguments
        from llmapi._runtime.start import load_engine, prepare

        arguments: dict[str, Any] = {
            "tokenizer": tokenizer,
            "tokenizer_mode": tokenizer_mode,
            "skip_tokenizer_init": skip_tokenizer_init,
            "trust_remote_code": trust_remote_code,
            "revision": revision,
            "dtype": dtype,
            "backend": backend,
            "load_format": load_format,
            "seed": seed,
            "max_seq_len": max_seq_len,
            "max_batch_size": max_batch_size,
            "max_num_tokens": max_num_tokens,
            "gpu_memory_utilization": gpu_memory_utilization,
            "kv_cache_config": kv_cache_config,
            "target": target,
            "enable_prefix_caching": enable_prefix_caching,
            "tensor_parallel_size": tensor_parallel_size,
            "cache_dir": cache_dir,
            "hf_token": hf_token,
            "refresh": refresh,
            "progress": progress,
        }
        options, engine_options = split_arguments(model, arguments)
        self.model = options.model
        if backend == "tensorrt":
            from llmapi._runtime.tensorrt_plan import refuse_ahead

            refuse_ahead(parse_targets(target))
        self._prepared = prepare(options, engine_options)
        try:
            engine = load_engine(self._prepared, progress=progress)
            from llmapi._runtime.service import Service

            self._service = Service(self._prepared, engine, seed)
        except BaseException:
            self._prepared.builder.close()
            raise
        self._loop, self._maker = self._service.loop, self._service.maker

    # ---- generating

    @overload
    def generate(
        self, prompts: str | Mapping[str, Any] | Sequence[int], sampling_params: SamplingParams | None = None,
        *, use_tqdm: bool = True,
    ) -> RequestOutput: ...  # fmt: skip

    @overload
    def generate(
        self, prompts: list[Prompt], sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *, use_tqdm: bool = True,
    ) -> list[RequestOutput]: ...  # fmt: skip

    def generate(
        self,
        prompts: Any,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> RequestOutput | list[RequestOutput]:
        """Generate from one prompt or many, all in flight together.

        Args:
            prompts: a text, a list of token ids, ``{"prompt": text}``, ``{"prompt_token_ids": ids}``, or a list of
                these in any mix.
            sampling_params: for all prompts, or one for each; None for the defaults.
            use_tqdm: draw a progress bar when there are several prompts.

        Returns:
            the output of one prompt, or a list in the order of the prompts. A request of a list that fails leaves the
            others alone: its output has ``error`` set.

        Raises:
            RequestError: the one prompt, or every prompt of the list, cannot be served.
            ConfigError: the arguments do not fit together.
            EngineClosedError: after :meth:`close`.
        """
        from llmapi._runtime.inputs import listed, pair_params

        items, single = listed(prompts)
        params = pair_params(len(items), sampling_params, SamplingParams())
        makers = [partial(self._maker.make, prompt, own) for prompt, own in zip(items, params, strict=True)]
        outputs = self._service.run(makers, items, use_tqdm)
        return outputs[0] if single else outputs

    def beam_search(
        self, prompts: Any, params: BeamSearchParams, *, use_tqdm: bool = False
    ) -> BeamSearchOutput | list[BeamSearchOutput]:
        """Search for the most probable continuations, under vLLM's names.

        It is ``generate`` with ``use_beam_search=True``, which has more options and runs beside any other requests.

        Args:
            prompts: as in :meth:`generate`.
            params: of all prompts.
            use_tqdm: as in :meth:`generate`.

        Returns:
            one output for one prompt, or a list in the order of the prompts.

        Raises:
            ConfigError: ``params`` is no :class:`BeamSearchParams`.
            RequestError: as in :meth:`generate`.
        """
        from llmapi.beam_search import BeamSearchOutput, BeamSearchParams

        if not isinstance(params, BeamSearchParams):
            raise ConfigError(f"params={params!r}: give a BeamSearchParams(beam_width=4, max_tokens=64), for example")
        found = self.generate(prompts, params.sampling_params(), use_tqdm=use_tqdm)
        tokenizer = self._prepared.tokenizer
        decode = None if tokenizer is None else lambda ids: tokenizer.decode(ids, True, True)
        outputs = [BeamSearchOutput.of(o, params, decode) for o in (found if isinstance(found, list) else [found])]
        return outputs if isinstance(found, list) else outputs[0]

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        **template: Any,
    ) -> RequestOutput | list[RequestOutput]:
        """Answer one conversation or many.

        Args:
            messages: a list of ``{"role": ..., "content": ...}``, or a list of such lists.
            sampling_params: as in :meth:`generate`.
            use_tqdm: as in :meth:`generate`.
            template: arguments of the chat template: ``chat_template``, ``add_generation_prompt``,
                ``continue_final_message``, ``tools``, ``documents``, or any of the model's own.

        Returns:
            as :meth:`generate`.

        Raises:
            ConfigError: an option of the template that chat sets itself, such as ``tokenize``.
            RequestError: the model has no chat template, or a message is malformed.
        """
        from llmapi._runtime.inputs import conversations, pair_params

        tokenizer = self._need_tokenizer("chat()")
        talks, single = conversations(messages)
        params = pair_params(len(talks), sampling_params, SamplingParams())

        def make(talk: Any, own: SamplingParams) -> Request:
            return self._maker.make(tokenizer.apply_chat_template(talk, **template), own)

        makers = [partial(make, talk, own) for talk, own in zip(talks, params, strict=True)]
        outputs = self._service.run(makers, talks, use_tqdm)
        return outputs[0] if single else outputs

    def stream(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> Iterator[RequestOutput]:
        """Generate from one prompt, yielding the output as it grows.

        Args:
            prompt: as one prompt of :meth:`generate`.
            sampling_params: None for the defaults.

        Yields:
            the output so far, after each token; the last one is ``finished``. Leaving the loop early aborts the
            request.

        Example:
            >>> for output in llm.stream("Once upon a time"):  # doctest: +SKIP
            ...     print(output.text[-20:])
        """
        from llmapi._runtime.inputs import pair_params

        [params] = pair_params(1, sampling_params, SamplingParams())
        return self._service.stream(prompt, params)

    def generate_async(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> RequestFuture:
        """Start a request and return at once.

        Args:
            prompt: as one prompt of :meth:`generate`.
            sampling_params: None for the defaults.

        Returns:
            a future to ``await``, to iterate with ``async for``, or to ask for its ``result()``.

        Example:
            >>> output = await llm.generate_async("Hello")  # doctest: +SKIP
        """
        from llmapi._runtime.inputs import pair_params

        [params] = pair_params(1, sampling_params, SamplingParams())
        return self._service.start(prompt, params)

    async def astream(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None
    ) -> AsyncIterator[RequestOutput]:
        """:meth:`stream` for asyncio; works inside a notebook's running event loop.

        Args:
            prompt: as one prompt of :meth:`generate`.
            sampling_params: None for the defaults.
        """
        async with contextlib.aclosing(self.generate_async(prompt, sampling_params).__aiter__()) as states:
            async for output in states:
                yield output

    def abort(self, request_id: str | Iterable[str]) -> None:
        """End requests; their outputs have ``finish_reason="abort"``. Unknown and ended ones are left alone.

        Args:
            request_id: ``RequestOutput.request_id``, or several.

        Raises:
            RequestError: not the type of an id.
        """
        ids = (
            [request_id]
            if isinstance(request_id, (str, bytes)) or not isinstance(request_id, Iterable)
            else list(request_id)
        )
        if wrong := [one for one in ids if not isinstance(one, str)]:
            raise RequestError(f"request_id={wrong[0]!r}: give the request_id of an output, or a list of them")
        for one in ids:
            self._loop.abort(one)

    # ---- asking about given texts

    def score(
        self, prompts: Any, continuations: Any, *, truncate: bool = False, use_tqdm: bool = True
    ) -> Score | list[Score]:
        """Log probabilities of given continuations, and whether greedy decoding would have produced them.

        Only the rows that predict a continuation are projected to the vocabulary, and only their results leave the
        device. A text pair is encoded as one text and divided where the encoded prompt ends; spaces at the prompt's end
        count as the continuation's. An empty text prompt stands for the beginning-of-sequence token (the
        end-of-sequence token where there is none).

        Args:
            prompts: one prompt or a list, in the forms of :meth:`generate`.
            continuations: a text or token ids, or a list of them: one for each prompt, several for one prompt, or one
                for all prompts.
            truncate: drop the oldest tokens of a prompt that is too long, instead of refusing it. ``max_seq_len``
                tokens and one more fit; fewer where the KV cache holds fewer.
            use_tqdm: draw a progress bar when there are several.

        Returns:
            a :class:`Score`, or a list of them where either argument is a list.

        Raises:
            RequestError: a pair cannot be scored; none is, then.
            EngineClosedError: after :meth:`close`.

        Example:
            >>> [yes, no] = llm.score("Is the sky blue? Answer:", [" yes", " no"])  # doctest: +SKIP
        """
        from llmapi._runtime.scoring import Scorer

        self._service.check_open()
        return Scorer(self._maker).score(prompts, continuations, truncate, self._service.probe, use_tqdm)

    def perplexity(
        self, texts: Any, *, max_length: int | None = None, stride: int | None = None, use_tqdm: bool = True
    ) -> Perplexity | list[Perplexity]:
        """Perplexity of texts of any length, each token of a text scored once.

        The first token is predicted from the beginning-of-sequence token (the end-of-sequence token where there is
        none). Texts are encoded without special tokens.

        Args:
            texts: one text (or token ids) or a list.
            max_length: tokens that the model sees at once; None is ``max_seq_len``, or what the KV cache holds if that
                is less.
            stride: tokens that each window after the first one scores, after as many tokens of context as fit. None is
                ``max_length``: windows do not overlap (but the last one, which is filled up with context), as in
                lm-evaluation-harness. Smaller ones are slower and give lower perplexities.
            use_tqdm: draw a progress bar.

        Returns:
            a :class:`Perplexity`, or a list of them.

        Raises:
            RequestError: a text cannot be scored.
            EngineClosedError: after :meth:`close`.
        """
        from llmapi._runtime.scoring import Scorer

        self._service.check_open()
        return Scorer(self._maker).perplexity(texts, max_length, stride, self._service.probe, use_tqdm)

    def embed(
        self, texts: Any, pooling: str = "last", *, normalize: bool = True, use_tqdm: bool = True
    ) -> torch.Tensor:
        """Embeddings of texts: final hidden states, after the last norm, pooled.

        Args:
            texts: one prompt or a list, in the forms of :meth:`generate`.
            pooling: ``"last"`` token, ``"mean"`` of all tokens, or ``"cls"``, the first token.
            normalize: divide each by its Euclidean length.
            use_tqdm: draw a progress bar when there are several.

        Returns:
            ``[hidden_size]`` float32 on the CPU, or ``[len(texts), hidden_size]`` for a list.

        Raises:
            RequestError: a text cannot be served.
            EngineClosedError: after :meth:`close`.
        """
        from llmapi._runtime.embedding import embed

        self._service.check_open()
        return embed(self._maker, texts, pooling, normalize, self._service.probe, use_tqdm)

    def encode(self, texts: Any, *, use_tqdm: bool = True) -> torch.Tensor | list[torch.Tensor]:
        """Final hidden states of every token, after the last norm.

        Args:
            texts: one prompt or a list, in the forms of :meth:`generate`.
            use_tqdm: draw a progress bar when there are several.

        Returns:
            ``[tokens, hidden_size]`` float32 on the CPU, or a list of them.

        Raises:
            RequestError: a text cannot be served.
            EngineClosedError: after :meth:`close`.
        """
        from llmapi._runtime.embedding import encode

        self._service.check_open()
        return encode(self._maker, texts, self._service.probe, use_tqdm)

    # ---- the rest

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of transformers that is in use; None where it was skipped."""
        return None if self._prepared.tokenizer is None else self._prepared.tokenizer.backend

    @property
    def build_report(self) -> BuildReport:
        """What the start did, phase by phase; a table in a notebook."""
        return self._prepared.report

    def save(self, folder: str | PathLike[str]) -> None:
        """Write a self-contained engine; ``LLM(folder)`` starts from it with no hub, no source and no cache.

        It copies what this LLM holds in the cache, and a closed one holds nothing there.

        Args:
            folder: a new or empty folder; it appears whole or not at all.

        Raises:
            ConfigError: the folder exists and is not empty, cannot be made, is no name of one, or its disk is full.
            EngineClosedError: after :meth:`close`.
        """
        from llmapi._build.saved import save_engine
        from llmapi._runtime.options import full_path

        if not isinstance(folder, (str, PathLike)):
            raise ConfigError(f"folder={folder!r}: give the name of a new folder")
        if self._service.closed:
            raise EngineClosedError(
                "this LLM was closed and holds its files no longer: save before close(), or make a new one"
            )
        p = self._prepared
        if p.weights is None:
            raise ConfigError("this LLM has random weights that were made on the GPU: there is nothing to save")
        save_engine(
            full_path("folder", folder),
            model=self.model,
            spec=p.spec,
            config=p.config,
            stop_token_ids=p.stop_token_ids,
            engine_digest=p.report.keys["engine"],
            weights=p.weights,
            engine=p.engine,
            tokenizer=p.tokenizer,
        )

    @classmethod
    def build(cls, model: str | PathLike[str], **arguments: Any) -> BuildReport:
        """Bring a model into the cache without loading it; the next start finds everything there.

        TensorRT plans are built for GPUs that are not at hand: ``LLM.build(model, backend="tensorrt", target="sm89")``.

        Args:
            model: as of the constructor.
            arguments: of the constructor, by name.

        Returns:
            what was done, phase by phase.

        Raises:
            LLMAPIError: as the constructor; BuildError where TensorRT cannot build the model.
        """
        _check_names(arguments)
        from llmapi._runtime.options import split_arguments
        from llmapi._runtime.start import prepare

        prepared = prepare(*split_arguments(model, arguments))
        prepared.builder.close()
        return prepared.report

    def close(self) -> None:
        """Abort what runs and give back all memory. Closing twice is closing once."""
        self._service.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __repr__(self) -> str:
        c = self._prepared.config
        state = ", closed" if self._service.closed else ""
        return f"LLM({self.model!r}, backend={c.backend!r}, dtype={c.dtype!r}, max_seq_len={c.max_seq_len}{state})"

    def _need_tokenizer(self, what: str) -> Tokenizer:
        if self._prepared.tokenizer is None:
            raise RequestError(f"{what} needs a tokenizer: make the LLM without skip_tokenizer_init, or name one")
        return self._prepared.tokenizer


def _check_names(arguments: Iterable[str]) -> None:
    """Refuse the first name that is no argument of LLM."""
    valid = [name for name in LLM.__init__.__annotations__ if name not in ("unknown", "return")]
    for name in arguments:
        if name not in valid:
            raise ConfigError(unknown_name("LLM argument", name, valid))
