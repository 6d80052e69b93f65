"""HarnessModel: lm-evaluation-harness (https://github.com/EleutherAI/lm-evaluation-harness) runs on llmapi.

Importing this module registers the model ``llmapi``. On the command line, ``python -m llmapi.lm_eval_model`` takes the
arguments of ``lm_eval``::

    python -m llmapi.lm_eval_model run --model llmapi --model_args pretrained=org/name,max_seq_len=4096 --tasks arc_easy

In Python::

    import lm_eval, llmapi.lm_eval_model
    lm_eval.simple_evaluate(model="llmapi", model_args={"pretrained": "org/name"}, tasks=["arc_easy"])
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs

from llmapi._runtime.scoring import windows
from llmapi.errors import RequestError
from llmapi.llm import LLM
from llmapi.sampling import SamplingParams

_IGNORED = ("batch_size", "max_batch_size", "device")  # what the harness always passes; llmapi decides by itself


@register_model("llmapi")
class HarnessModel(TemplateLM):  # type: ignore[misc]
    """A model of llmapi for the harness, with the conventions of its own ``hf`` model.

    Args:
        pretrained: as the first argument of :class:`llmapi.LLM`; or an LLM that exists, which is then not closed.
        add_bos_token: whether prompts get special tokens; None leaves it to the tokenizer.
        prefix_token_id: stands before the first token of a text; None is the beginning-of-sequence token, or else the
            end-of-sequence token.
        max_gen_toks: tokens to generate where a task names no number.
        chat_template_args: for the chat template.
        options: other arguments of :class:`llmapi.LLM`; ``max_length`` is ``max_seq_len``.

    Raises:
        RequestError: the LLM has no tokenizer.
    """

    def __init__(
        self,
        pretrained: str | LLM,
        *,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        max_gen_toks: int = 256,
        chat_template_args: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        options = {name: value for name, value in options.items() if name not in _IGNORED}
        if "max_length" in options:
            options["max_seq_len"] = options.pop("max_length")
        self.llm = pretrained if isinstance(pretrained, LLM) else LLM(pretrained, **options)
        self.tokenizer = self.llm.tokenizer
        if self.tokenizer is None:
            raise RequestError("lm-evaluation-harness needs a tokenizer: name one with tokenizer=...")
        self._add_bos_token = add_bos_token
        self._prefix_token_id = prefix_token_id
        self._max_gen_toks = max_gen_toks
        self._chat_template_args = dict(chat_template_args or {})

    @property
    def eot_token_id(self) -> int:
        """The end-of-sequence token."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What stands before the first token of a text."""
        for found in (self._prefix_token_id, self.tokenizer.bos_token_id):
            if found is not None:
                return int(found)
        return self.eot_token_id

    @property
    def max_length(self) -> int:
        """Tokens that the model sees at once."""
        return self.llm._maker.max_seq_len

    @property
    def max_gen_toks(self) -> int:
        """Tokens to generate where a task names no number."""
        return self._max_gen_toks

    @property
    def tokenizer_name(self) -> str:
        """Name of the tokenizer, for the harness's caches."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Text to ids.

        Args:
            string: any text.
            add_special_tokens: None adds what the tokenizer adds, unless the text begins with the prefix token's.
        """
        if add_special_tokens is None:
            begun = string.startswith(self.tokenizer.decode([self.prefix_token_id]))
            add_special_tokens = False if begun else self._add_bos_token
        options = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return list(self.tokenizer.encode(string, **options))

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **unused: Any
    ) -> list[tuple[float, bool]]:
        contexts, continuations = [list(before) for _, before, _ in requests], [list(ids) for _, _, ids in requests]
        scores = self.llm.score(contexts, continuations, truncate=True, use_tqdm=not disable_tqdm)
        assert isinstance(scores, list)
        answers = [(score.logprob, score.is_greedy) for score in scores]
        for (texts, _, _), answer in zip(requests, answers, strict=True):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, answer)
        return answers

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log probabilities of whole texts, in windows of :attr:`max_length` tokens that score each token once.

        Args:
            requests: instances whose ``args`` are ``(text,)``.
            disable_tqdm: draw no bar.
        """
        parts: list[tuple[None, list[int], list[int]]] = []
        counts = []
        for (text,) in (request.args for request in requests):
            ids = self.tok_encode(text)
            length = self.max_length
            for run, targets in windows(ids, self.prefix_token_id, length, length):
                parts.append((None, run[: len(run) - len(targets) + 1], targets))
            counts.append(len(parts))
        answers = self._loglikelihood_tokens(parts, disable_tqdm) if parts else []
        out, start = [], 0
        for request, end in zip(requests, counts, strict=True):
            out.append(sum(logprob for logprob, _ in answers[start:end]))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, out[-1])
            start = end
        return out

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Continuations of texts up to a stop text.

        Args:
            requests: instances whose ``args`` are ``(text, options)``: ``until``, ``max_gen_toks``, ``do_sample`` and
                arguments of :class:`llmapi.SamplingParams`.
            disable_tqdm: draw no bar.

        Raises:
            ConfigError: an option has another name.
        """
        prompts: list[Any] = []
        params: list[SamplingParams] = []
        for text, options in (request.args for request in requests):
            own = dict(normalize_gen_kwargs(options, self.max_gen_toks))
            own["temperature"] = own.get("temperature", 1.0) if own.pop("do_sample", False) else 0.0
            most = int(own.pop("max_gen_toks"))
            stop = own.pop("until", None) or []
            stop = [stop] if isinstance(stop, str) else [s for s in stop if s]
            room = self.max_length - most
            if room < 1:
                raise RequestError(
                    f"max_gen_toks={most} leaves no room for a prompt in max_seq_len={self.max_length}: lower one or "
                    "raise the other"
                )
            prompts.append(self.tok_encode(text)[-room:])
            params.append(SamplingParams(max_tokens=most, stop=stop, **own))
        outputs = self.llm.generate(prompts, params, use_tqdm=not disable_tqdm) if prompts else []
        assert isinstance(outputs, list)
        for request, output in zip(requests, outputs, strict=True):
            if output.error is not None:
                raise output.error
            self.cache_hook.add_partial("generate_until", request.args, output.text)
        return [output.text for output in outputs]

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as text, by the model's chat template.

        Args:
            chat_history: messages.
            add_generation_prompt: end with the beginning of an answer; else the last message is left open.
        """
        return str(
            self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
                **self._chat_template_args,
            )
        )


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
