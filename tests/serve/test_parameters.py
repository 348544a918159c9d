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


def test_bad_words_are_not_generated(server):
    """The model wants one letter for ever. A word of it is not begun, one of two is not ended; also with a grammar."""
    letter = server.post("/detokenize", tokens=[70]).json()["text"]
    params = {"max_new_tokens": 5, "temperature": 0, "ignore_eos": True, "logit_bias": {"70": 100}}

    def ids(*words: str, **more) -> list[int]:
        how = {"sampling_params": params | {"bad_words": words} | more}
        return server.post("/generate", text="Four score", **how).json()["output_ids"]

    assert ids() == ids("zz") == [70] * 5
    assert 70 not in ids(letter)
    found = ids(2 * letter, "zz")
    assert [token == 70 for token in found] == [True, False] * 2 + [True]
    assert ids(" " + 2 * letter) == found, "behind a space or not"
    only = {"prompt": "Four score", "regex": "(yes|no)", "max_tokens": 9, "bad_words": ["no", "n"]}
    assert server.complete(**only)["choices"][0]["text"] == "yes"
    for words in ([""], [" "], ["x" * 20000]):
        error = server.post(COMPLETIONS, prompt="x", bad_words=words).json()["error"]
        assert error["param"] == "bad_words"


def test_logprobs_of_a_prompt_in_vllms_form(server):
    """The same numbers as those of echo; in each choice of a completion, once in a chat."""
    echo = server.complete(prompt="Four score", max_tokens=1, echo=True, logprobs=2)["choices"][0]["logprobs"]
    answer = server.complete(prompt="Four score", max_tokens=1, prompt_logprobs=2, n=2, temperature=1)
    one, other = (choice["prompt_logprobs"] for choice in answer["choices"])
    assert one == other
    ids = server.post("/tokenize", prompt="Four score").json()["tokens"]
    assert one[0] is None
    assert [entry[str(i)]["logprob"] for i, entry in zip(ids[1:], one[1:], strict=True)] \
        == pytest.approx(echo["token_logprobs"][1 : len(ids)])
    for entry, tops in zip(one[1:], echo["top_logprobs"][1 : len(ids)], strict=True):
        best = {each["decoded_token"]: each["logprob"] for each in sorted(entry.values(), key=lambda e: e["logprob"])}
        assert best == pytest.approx(tops), "several tokens may have one text"
        best = sorted((each for each in entry.values() if each["rank"]), key=lambda each: each["rank"])
        assert [each["rank"] for each in best] == [1, 2]
        assert best[0]["logprob"] >= best[1]["logprob"]
    both = server.complete(prompt="Four score", max_tokens=1, echo=True, logprobs=1, prompt_logprobs=3)["choices"][0]
    assert max(map(len, both["logprobs"]["top_logprobs"][1:])) == 2
    assert {*map(len, both["prompt_logprobs"][1:])} <= {3, 4}
    chat = server.post(CHAT, messages=[{"role": "user", "content": "x"}], max_tokens=1, prompt_logprobs=0).json()
    assert len(chat["prompt_logprobs"]) == chat["usage"]["prompt_tokens"]
    assert all(len(entry) == 1 for entry in chat["prompt_logprobs"][1:])
    assert "prompt_logprobs" not in server.complete(prompt="x")
    error = server.post(COMPLETIONS, prompt="x", prompt_logprobs=1, stream=True).json()["error"]
    assert error["param"] == "prompt_logprobs"


def test_logprobs_of_chosen_tokens(server):
    """Those of the most likely ones, asked for by their ids, are the same; each prompt of a list has its own."""
    def same(found: list, expected: list) -> None:
        assert [entry[1:] for entry in found] == [entry[1:] for entry in expected]
        assert [entry[0] for entry in found] == pytest.approx([entry[0] for entry in expected])

    params = {"max_new_tokens": 3, "temperature": 0, "ignore_eos": True}
    asked = {"sampling_params": params, "return_logprob": True, "logprob_start_len": 0}
    top = server.post("/generate", text="Four score", top_logprobs_num=2, **asked).json()["meta_info"]
    first = [i for _, i, _ in top["output_top_logprobs"][0]]
    meta = server.post("/generate", text="Four score", token_ids_logprob=first, **asked).json()["meta_info"]
    same(meta["output_token_ids_logprobs"][0], top["output_top_logprobs"][0])
    assert meta["input_token_ids_logprobs"][0] is None
    assert len(meta["input_token_ids_logprobs"]) == len(meta["input_token_logprobs"])
    second = [i for _, i, _ in top["input_top_logprobs"][1]]
    several = server.post("/generate", text=["Four score", "We"], token_ids_logprob=[second, [7]], **asked).json()
    same(several[0]["meta_info"]["input_token_ids_logprobs"][1], top["input_top_logprobs"][1])
    assert [[i for _, i, _ in entry] for entry in several[1]["meta_info"]["output_token_ids_logprobs"]] == [[7]] * 3
    error = server.post("/generate", text="x", token_ids_logprob=[384], **asked).json()["error"]
    assert error["message"] == "token_ids_logprob: expected token ids from 0 to 383, got 384"
    error = server.post("/generate", text=["x", "y"], token_ids_logprob=[[1]], **asked).json()["error"]
    assert error["message"].startswith("token_ids_logprob: expected an entry for each of 2 prompts")
