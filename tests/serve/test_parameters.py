"""Parameters that change what is generated, or of what."""

import pytest
from helpers_http import App

from wave64.serve.http.tokenizer import Tokenizer

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder):
    return Tokenizer(tokenizer_folder)


def test_a_bias_is_added_to_logits(server):
    """A large one chooses, a small one excludes; with the grammar's bound and the model's own logprobs."""
    asked = {"prompt": "Four score", "max_tokens": 6, "logprobs": 0, "ignore_eos": True}
    plain = server.complete(**asked)["choices"][0]["logprobs"]
    chosen = server.complete(**asked, logit_bias={"70": 100})["choices"][0]["logprobs"]
    assert len(set(chosen["tokens"])) == 1
    assert max(chosen["token_logprobs"]) < 0, "of the logits before it"
    first = plain["tokens"][0]
    ids = server.post("/generate", text="Four score", sampling_params={
        "max_new_tokens": 1, "temperature": 0, "ignore_eos": True}).json()["output_ids"]  # fmt: skip
    other = server.complete(**asked, logit_bias={str(ids[0]): -100})["choices"][0]["logprobs"]
    assert other["tokens"][0] != first
    native = server.post("/generate", text="Four score", sampling_params={
        "max_new_tokens": 3, "temperature": 0, "ignore_eos": True, "logit_bias": {"70": 100}}).json()  # fmt: skip
    assert native["output_ids"] == [70, 70, 70]


def test_a_prompt_is_truncated_at_its_beginning(tokenizer):
    app = App(tokenizer)
    ids = tokenizer.encode("one two three four")
    for count, left in ((3, ids[-3:]), (10**6, ids), (-1, ids)):
        assert app.post(COMPLETIONS, prompt="one two three four", truncate_prompt_tokens=count).status_code == 200
        assert app.engine.requests[-1].input_ids == left
    assert app.post(COMPLETIONS, prompt="x " * 5000, truncate_prompt_tokens=-1, max_tokens=1).status_code == 200
    assert len(app.engine.requests[-1].input_ids) == 2047
    messages = [{"role": "user", "content": "x " * 5000}]
    assert app.post(CHAT, messages=messages, truncate_prompt_tokens=7, max_tokens=1).status_code == 200
    assert len(app.engine.requests[-1].input_ids) == 7


def test_the_last_message_goes_on(tokenizer):
    app = App(tokenizer)
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": [{"type": "text", "text": " a b "}]}]
    assert app.prompt(messages, continue_final_message=True).endswith("[user] x\n[assistant]  a b ")
    assert app.prompt(messages).endswith("a b \n[assistant] ")
    messages[-1]["content"] = ""
    answer = app.post(CHAT, messages=messages, continue_final_message=True)
    assert answer.json()["error"]["param"] == "continue_final_message"
    both = app.post(CHAT, messages=messages, continue_final_message=True, add_generation_prompt=True)
    assert both.status_code == 400


def test_a_stop_string_stays_by_either_name(tokenizer):
    app = App(tokenizer, "abc")
    for name in ("no_stop_trim", "include_stop_str_in_output"):
        assert app.post(COMPLETIONS, prompt="x", stop="c", **{name: True}).json()["choices"][0]["text"] == "abc"
    assert app.post(COMPLETIONS, prompt="x", stop="c").json()["choices"][0]["text"] == "ab"


def test_a_prompt_is_scored_from_where_it_is_asked(tokenizer):
    app = App(tokenizer)
    ids = tokenizer.encode("one two three four")
    for start in (0, 2, len(ids) - 1):
        answer = app.post("/generate", text="one two three four", return_logprob=True, logprob_start_len=start).json()
        assert [token for _, token, _ in answer["meta_info"]["input_token_logprobs"]] == ids[start:]
        assert (answer["meta_info"]["input_token_logprobs"][0][0] is None) == (start == 0)
    answer = app.post("/generate", text="one two three four", return_logprob=True, logprob_start_len=99).json()
    assert "input_token_logprobs" not in answer["meta_info"]
