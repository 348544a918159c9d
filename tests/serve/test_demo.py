"""demo-llama, the checkpoint in the package: small, free, and exact to the last token of the one text it knows."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import wave64.serve.demo
from wave64.serve.args import ServerArgs
from wave64.serve.engine.engine import Engine
from wave64.serve.messages import Request, SamplingParams

DEMO = Path(next(iter(wave64.serve.demo.__path__)))
FOLDER = DEMO / "llama"
TEXT = (DEMO / "gettysburg.txt").read_text(encoding="utf-8").strip()
EOS = "<|end_of_text|>"
MIN_GAP = 1.0  # in logits, from the right token to the best other one: far above any rounding, bf16's included
BEGINNINGS = ["", "Four", "Four score and seven years ago", "Four score and seven years ago our fathers "]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(FOLDER)


def chat(tokenizer: PreTrainedTokenizerFast, *messages: str) -> str:
    """The prompt of a conversation that the user begins, in turns."""
    roles = ["user", "assistant"] * len(messages)
    turns = [{"role": role, "content": text} for role, text in zip(roles, messages, strict=False)]
    return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))


def ids(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False).input_ids


def pairs(tokenizer: PreTrainedTokenizerFast) -> list[tuple[list[int], list[int]]]:
    """(prompt, answer) of completions and chats whose right answer is the rest of the text."""
    bos = str(tokenizer.bos_token)
    prompts = {bos + start: start for start in BEGINNINGS} | {chat(tokenizer, start): start for start in BEGINNINGS[1:]}
    return [(ids(tokenizer, prompt), ids(tokenizer, TEXT[len(start) :] + EOS)) for prompt, start in prompts.items()]


def test_is_small_and_says_whose_it_is():
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) < 2_000_000
    card = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert "license: apache-2.0" in card
    assert "public domain" in card
    assert TEXT.startswith("Four score and seven years ago")
    assert TEXT.endswith("shall not perish from the earth.")


def test_what_made_it_is_not_shipped_and_still_makes_the_same_tokenizer(monkeypatch):
    """The package has what users run; training is a tool of the repository."""
    assert [file.name for file in DEMO.glob("*.py")] == ["recite.py"]
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "tools"))
    from demo_text import make_tokenizer

    assert json.loads(make_tokenizer().to_str()) == json.loads((FOLDER / "tokenizer.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_token_is_the_right_one_by_far(tokenizer, dtype):
    model: Any = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=dtype).eval()
    for prompt, answer in pairs(tokenizer):
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].float()
        right = torch.tensor(answer)[:, None]
        best_other = logits.scatter(1, right, -torch.inf).amax(1)
        gap = logits.gather(1, right)[:, 0] - best_other
        at = int(gap.argmin())
        assert gap[at] > MIN_GAP, f"after {tokenizer.decode(prompt + answer[:at])!r}"
    assert len(ids(tokenizer, TEXT)) >= 400


def test_the_engine_recites_all_of_them_at_once(tokenizer, device):
    engine = Engine(ServerArgs(model_path="demo-llama", device=device, max_total_tokens=8192))
    wanted = pairs(tokenizer)
    for i, (prompt, _) in enumerate(wanted):
        engine.add(Request(str(i), prompt, SamplingParams(max_new_tokens=1000, temperature=0)))
    got: list[list[int]] = [[] for _ in wanted]
    reasons = {}
    while engine.has_work:
        for output in engine.step():
            got[int(output.rid)] += output.token_ids
            reasons[output.rid] = output.finish_reason
    assert got == [answer for _, answer in wanted]
    assert set(reasons.values()) == {"stop"}


QUESTIONS = ["Hello!", "What is the capital of France?", "Recite the Gettysburg Address.", "你好"]


@pytest.mark.parametrize("question", QUESTIONS)
def test_says_what_it_knows_when_asked_for_something_else(tokenizer, question):
    model: Any = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()
    prompt = torch.tensor([ids(tokenizer, chat(tokenizer, question))])
    with torch.inference_mode():
        answer = model.generate(prompt, do_sample=False, max_new_tokens=600)[0, prompt.shape[1] :]
    assert tokenizer.decode(answer) == f"I know only one text by heart, the Gettysburg Address:\n\n{TEXT}{EOS}"


def test_chat_template_marks_who_speaks(tokenizer):
    assert chat(tokenizer, "a", "b", "c") == (
        "<|begin_of_text|><|user|>a<|assistant|>b<|end_of_text|><|user|>c<|assistant|>"
    )


@settings(derandomize=True, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"])))
@example(text="naïve  façade\t\r\n🚀 नमस्ते \x00 <|user|>")
def test_any_text_survives_the_tokenizer(tokenizer, text):
    assert tokenizer.decode(ids(tokenizer, text)) == text
