"""Beam search by others: transformers' own, and group beam search by its published definition in float64."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers

from llmapi import RequestOutput
from tests.api.truth import Truth

Scored = list[tuple[list[int], float]]
"""New tokens and score of each sequence, best first."""


class Counted(transformers.LogitsProcessor):  # type: ignore[misc]
    """presence_penalty and frequency_penalty, as their definition says, on whatever scores they are given."""

    def __init__(self, prompt: int, presence: float, frequency: float) -> None:
        self.prompt, self.presence, self.frequency = prompt, presence, frequency

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.clone()
        for row, own in enumerate(ids[:, self.prompt :].tolist()):
            for token, count in Counter(own).items():
                scores[row, token] -= self.presence + self.frequency * count
        return scores


def by_transformers(
    truth: Truth, prompt: Sequence[int], width: int, count: int, eos: list[int], n: int, **options: Any
) -> Scored:
    """``generate(num_beams=width)``; what it pads with is cut off.

    Args:
        eos: ids that end a sequence; may be empty.
        options: of ``GenerationConfig``; ``processors`` is a list of logits processors.
    """
    given = torch.tensor([list(prompt)])
    processors = transformers.LogitsProcessorList(options.pop("processors", []))
    truth.model.generation_config = transformers.GenerationConfig(
        do_sample=False, num_beams=width, num_return_sequences=n, max_new_tokens=count, eos_token_id=eos or None,
        pad_token_id=0, bos_token_id=0, return_dict_in_generate=True, output_scores=width > 1, **options,
    )  # fmt: skip
    with torch.no_grad():
        out = truth.model.generate(given, attention_mask=torch.ones_like(given), logits_processor=processors)
    rows = [_cut(row, eos) for row in out.sequences[:, len(prompt) :].tolist()]
    if width == 1:
        return [(row, float("nan")) for row in rows]
    return [(row, score) for row, score in zip(rows, out.sequences_scores.tolist(), strict=True) if score > -1e8]


def _cut(ids: list[int], eos: list[int]) -> list[int]:
    ends = [i for i, token in enumerate(ids) if token in eos]
    return ids[: ends[0] + 1] if ends else ids


def ours(output: RequestOutput) -> Scored:
    """The sequences of an output."""
    assert all(o.score is not None for o in output.outputs)
    return [(o.token_ids, o.score or 0.0) for o in output.outputs]


def group_oracle(
    logprobs: Callable[[list[int]], torch.Tensor], prompt: list[int], *, width: int, groups: int, penalty: float,
    count: int, eos: list[int], n: int, length_penalty: float, early_stopping: bool | str,
) -> Scored:  # fmt: skip
    """Diverse beam search: the groups search one after the other in each step (Vijayakumar et al. 2016, section 4).

    Args:
        logprobs: the model's, float64, of what follows a sequence.
    """
    size = width // groups
    live: list[list[tuple[float, list[int]]]] = [[(0.0, [])] for _ in range(groups)]
    done: list[list[tuple[float, list[int]]]] = [[] for _ in range(groups)]
    closed = [False] * groups
    for step in range(1, count + 1):
        used: Counter[int] = Counter()
        for g in range(groups):
            if closed[g]:
                continue
            options = []
            for total, ids in live[g]:
                row = logprobs([*prompt, *ids]).clone()
                for token, times in used.items():
                    row[token] -= penalty * times
                top = row.topk(min(len(row), 2 * width + len(eos) * width))
                options += [
                    (total + v, [*ids, t]) for v, t in zip(top.values.tolist(), top.indices.tolist(), strict=True)
                ]
            options.sort(key=lambda o: -o[0])
            going: list[tuple[float, list[int]]] = []
            for rank, (total, ids) in enumerate(options):
                if len(going) == size:
                    break
                if ids[-1] not in eos:
                    going.append((total, ids))
                elif rank < size:
                    done[g].append((total / step**length_penalty, ids))
            done[g] = sorted(done[g], key=lambda d: -d[0])[:size]
            used.update(ids[-1] for _, ids in going)
            live[g] = going
            if len(done[g]) == size:
                length = count if early_stopping == "never" and length_penalty > 0 else step
                best = (options if groups > 1 else going)[0][0] / length**length_penalty
                closed[g] = early_stopping is True or done[g][-1][0] >= best
        if all(closed):
            break
    found = []
    for g in range(groups):
        rest = [] if closed[g] else [(total / count**length_penalty, ids) for total, ids in live[g]]
        found += sorted([*done[g], *rest], key=lambda d: -d[0])[:size]
    found.sort(key=lambda d: -d[0])
    return [(ids, score) for score, ids in found[:n]]
