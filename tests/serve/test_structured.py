"""Structured output: whatever a request prescribes, a model of random weights keeps to it."""

import json
import re
import time

import openai
import pytest
from helpers_http import App

from wave64.serve.args import ServerArgs
from wave64.serve.engine.engine import Engine
from wave64.serve.grammar import compiler
from wave64.serve.http.tokenizer import Tokenizer
from wave64.serve.messages import Request, SamplingParams, Vocabulary

COMPLETIONS, CHAT, GENERATE = "/v1/completions", "/v1/chat/completions", "/generate"
USER = [{"role": "user", "content": "Four score"}]
SCHEMA = {"type": "object", "additionalProperties": False, "required": ["city", "days", "wet"], "properties": {
    "city": {"enum": ["Oslo", "Bergen"]}, "days": {"type": "integer", "minimum": 10, "maximum": 99},
    "wet": {"type": "boolean"}}}  # fmt: skip
TAGS = {"type": "structural_tag", "triggers": ["<f="],
        "structures": [{"begin": "<f=go>", "schema": {"enum": [7]}, "end": "</f>"}]}  # fmt: skip
ANSWER = re.compile(r'\s*{\s*"city"\s*:\s*"(Oslo|Bergen)"\s*,\s*"days"\s*:\s*\d\d\s*,\s*"wet"\s*:\s*(true|false)\s*}')
DATE = r"[0-9]{4}-[0-9]{2}"
GBNF = 'root ::= "a" digit digit\ndigit ::= [0-9]'
LARK = 'start: "a" DIGIT DIGIT\nDIGIT: /[0-9]/'

# path, the fields that prescribe a form, a pattern of all answers that have it
FORMS = [
    (CHAT, {"response_format": {"type": "json_schema", "json_schema": {"name": "w", "strict": True, "schema": SCHEMA}}},
     ANSWER),
    (COMPLETIONS, {"response_format": {"type": "json_schema", "json_schema": {"name": "w", "schema": SCHEMA}}}, ANSWER),
    (CHAT, {"regex": DATE}, DATE),
    (CHAT, {"ebnf": GBNF}, "a[0-9]{2}"),
    (CHAT, {"guided_json": SCHEMA}, ANSWER),
    (CHAT, {"guided_json": json.dumps(SCHEMA)}, ANSWER),
    (COMPLETIONS, {"guided_regex": DATE}, DATE),
    (COMPLETIONS, {"guided_choice": ["Größe", 'say "no"']}, 'Größe|say "no"'),
    (COMPLETIONS, {"guided_grammar": LARK, "guided_decoding_backend": "auto"}, "a[0-9]{2}"),
    (CHAT, {"structured_outputs": {"json": SCHEMA, "disable_fallback": True}}, ANSWER),
    (CHAT, {"structured_outputs": {"regex": DATE}}, DATE),
    (CHAT, {"structured_outputs": {"choice": ["yes", "no"]}}, "yes|no"),
    (CHAT, {"structured_outputs": {"grammar": GBNF}}, "a[0-9]{2}"),
    (GENERATE, {"sampling_params": {"json_schema": json.dumps(SCHEMA)}}, ANSWER),
    (GENERATE, {"sampling_params": {"regex": DATE}}, DATE),
    (GENERATE, {"sampling_params": {"ebnf": GBNF}}, "a[0-9]{2}"),
]  # fmt: skip

# path, fields, the one at fault, words of the reason
REFUSED = [
    (CHAT, {"response_format": {"type": "json_schema", "json_schema": {"name": "w", "schema": {"type": "foo"}}}},
     "response_format", "response_format.json_schema.schema: cannot be compiled: Invalid type: foo"),
    (CHAT, {"response_format": {"type": "json_schema", "json_schema": {"name": "w", "schema": False}}},
     "response_format", r"expected \{name, schema\}"),
    (CHAT, {"response_format": {"type": "json_schema"}}, "response_format", r"expected \{name, schema\}"),
    (CHAT, {"response_format": {"type": "xml"}}, "response_format", "got xml"),
    (CHAT, {"regex": "a(b"}, "regex", "regex: cannot be compiled: .*unclosed group"),
    (COMPLETIONS, {"guided_json": '{"type":'}, "guided_json", "guided_json: cannot be compiled: Expecting value"),
    (CHAT, {"regex": "a", "ebnf": "b"}, "regex", "regex and ebnf: expected one of them"),
    (CHAT, {"structured_outputs": {"regexp": "a"}}, "structured_outputs", "structured_outputs.regexp: not supported"),
    (GENERATE, {"sampling_params": {"ebnf": "root ::= x"}}, "ebnf", "'x' not found"),
    (GENERATE, {"sampling_params": {"structural_tag": {"format": {}}}}, "structural_tag", "got xgrammar's format"),
    (GENERATE, {"sampling_params": {"structural_tag": {**TAGS, "triggers": ["<g"]}}}, "structural_tag", "of the trig"),
    (COMPLETIONS, {"guided_json": {"$ref": "#"}}, "guided_json", "no answer can have this form"),
    (CHAT, {"regex": "a" * 300_000}, "regex", "at most 262144 characters"),
]  # fmt: skip


def ask(server, path, fields, **more):
    """An answer's text and finish_reason."""
    if path == GENERATE:
        sampling = {"max_new_tokens": 600, "temperature": 1, "sampling_seed": 3, **fields["sampling_params"], **more}
        answer = server.post(path, text="Four score", sampling_params=sampling)
        assert answer.status_code == 200, answer.text
        return answer.json()["text"], answer.json()["meta_info"]["finish_reason"]["type"]
    prompt = {"messages": USER} if path == CHAT else {"prompt": "Four score"}
    answer = server.post(path, **{**prompt, "max_tokens": 600, "temperature": 1, "seed": 3, **fields, **more})
    assert answer.status_code == 200, answer.text
    choice = answer.json()["choices"][0]
    return choice["message"]["content"] if path == CHAT else choice["text"], choice["finish_reason"]


@pytest.mark.parametrize(("path", "fields", "form"), FORMS, ids=lambda value: str(value)[:40])
def test_every_name_of_a_form(server, path, fields, form):
    text, finish = ask(server, path, fields)
    assert re.fullmatch(form, text), text
    assert finish == "stop"


def test_any_object(server):
    """A prefix of one: a random model may go on and on in a string."""
    for fields in ({"response_format": {"type": "json_object"}}, {"structured_outputs": {"json_object": True}}):
        text, finish = ask(server, CHAT, fields, max_tokens=30)
        assert text.lstrip().startswith("{")
        assert finish == "length" or isinstance(json.loads(text), dict)
    text, _ = ask(server, CHAT, {"response_format": {"type": "text"}}, max_tokens=5)
    assert not text.lstrip().startswith("{")


class Forms:
    """What grammars that the application hands to its engine allow."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.app = App(tokenizer)
        self.tokenizer = tokenizer
        self.compiled = compiler(Vocabulary(tokenizer.definition, sorted(tokenizer.end_ids)), tokenizer.vocab_size)
        self.known: dict[str, str] = {}  # fields -> grammar

    def of(self, text: str, **fields) -> bool:
        """Whether an answer of the prescribed form can be `text`, all of it."""
        if (asked := json.dumps(fields)) not in self.known:
            answer = self.app.post(CHAT, messages=USER, **fields)
            assert answer.status_code == 200, answer.text
            self.known[asked] = self.app.engine.requests[-1].grammar
        matcher = self.compiled(self.known[asked]).deep_copy()
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        return matcher.validate_tokens(ids) == len(ids) and matcher.consume_tokens(ids) and matcher.is_accepting()


@pytest.fixture(scope="module")
def forms(tokenizer_folder):
    return Forms(Tokenizer(tokenizer_folder))


def test_a_format_that_is_not_known_asks_for_nothing(forms):
    """As JSON Schema has it: pydantic writes path, binary, password and others. One that is known is kept to."""
    for name, fine, wrong in (("path", "anything", None), ("ipv4", "1.2.3.4", "anything")):
        schema = {"type": "object", "additionalProperties": False, "properties": {"format": {
            "anyOf": [{"type": "string", "format": name}, {"const": {"format": "path"}}]}}}  # fmt: skip
        format_of = {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}}
        tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
        call = {"tools": [tool], "tool_choice": "required", "parallel_tool_calls": False}
        within = {"response_format": {"type": "structural_tag", "triggers": ["<f="], "structures": [
            {"begin": "<f=go>", "schema": schema, "end": "</f>"}]}}  # fmt: skip
        asked = ((format_of, "%s"), (call, '[{"name": "f", "parameters": %s}]'), (within, "<f=go>%s</f>"))
        for fields, around in asked:
            assert forms.of(around % f'{{"format":"{fine}"}}', **fields)
            assert wrong is None or not forms.of(around % f'{{"format":"{wrong}"}}', **fields)
            assert forms.of(around % '{"format":{"format":"path"}}', **fields), "a value, and no schema"
            assert not forms.of(around % '{"format":{}}', **fields)


@pytest.mark.parametrize(("trigger", "begin"), [("<f=", "<f=go>"), ("<|bos|>", "<|bos|>go")])
def test_structures_within_text(forms, trigger, begin):
    """Free text, until a trigger begins a structure. A trigger may be a special token."""
    tags = {"type": "structural_tag", "triggers": [trigger],
            "structures": [{"begin": begin, "schema": {"enum": [7]}, "end": "</f>"}]}  # fmt: skip
    for fields in ({"response_format": tags}, {"structured_outputs": {"structural_tag": json.dumps(tags)}}):
        assert forms.of("so", **fields)
        assert forms.of(f"so\n{begin}7</f> and {begin}7</f>", **fields)
        assert not forms.of(f"so {begin}8</f>", **fields)
        assert not forms.of(f"so {begin}7", **fields)
        assert not forms.of(f"so {trigger}x", **fields)


def test_spaces_of_json_have_a_limit(forms):
    """A model must not go on with spaces for ever."""
    schema = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "object"}}}
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    call = '[{"name": "f", "parameters": %s}]'
    for fields, form in (({"response_format": schema}, "%s"), ({"response_format": {"type": "json_object"}}, "%s"),
                         ({"tools": [tool], "tool_choice": "required"}, call)):  # fmt: skip
        assert forms.of(form % ("{" + 32 * " " + "}"), **fields)
        assert not forms.of(form % ("{" + 33 * " " + "}"), **fields)


def test_how_many_calls_there_have_to_be(forms):
    tools = [{"type": "function", "function": {"name": name, "parameters": {"type": "object"}}} for name in "fg"]
    call = '{"name": "%s", "parameters": {}}'
    one, other, two = f"[{call % 'f'}]", f"[{call % 'g'}]", f"[{call % 'f'}, {call % 'f'}]"
    named = {"type": "function", "function": {"name": "f"}}
    for how, allowed in ((dict(tool_choice="required"), (True, True, True)),
                         (dict(tool_choice=named), (True, False, False)),
                         (dict(tool_choice="required", parallel_tool_calls=False), (True, True, False))):  # fmt: skip
        assert tuple(forms.of(text, tools=tools, **how) for text in (one, other, two)) == allowed
        assert not forms.of("[]", tools=tools, **how)


@pytest.mark.parametrize(("path", "fields", "param", "words"), REFUSED, ids=lambda value: str(value)[:40])
def test_what_cannot_be_compiled_is_refused_with_the_reason(server, path, fields, param, words):
    prompt = {"text": "x"} if path == GENERATE else {"messages": USER} if path == CHAT else {"prompt": "x"}
    answer = server.post(path, **prompt, **fields)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param
    assert re.search(words, answer.json()["error"]["message"], re.DOTALL), answer.text


def test_openais_client_parses_into_a_model(server):
    import pydantic

    class Weather(pydantic.BaseModel):
        model_config = pydantic.ConfigDict(extra="forbid")
        wet: bool
        sky: bool

    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
        parsed = client.chat.completions.parse(model="tiny", messages=USER, max_tokens=600, response_format=Weather)
        assert isinstance(parsed.choices[0].message.parsed, Weather)
        with client.chat.completions.stream(model="tiny", messages=USER, max_tokens=600, seed=5,
                                            response_format=Weather) as stream:  # fmt: skip
            streamed = stream.get_final_completion()
    assert isinstance(streamed.choices[0].message.parsed, Weather)


def test_with_what_else_bounds_an_answer(server):
    """Stop strings, min_tokens, logprobs, penalties, n, streams."""
    text, finish = ask(server, COMPLETIONS, {"regex": "[0-9]{4}-[0-9]{2}", "stop": "-"})
    assert re.fullmatch("[0-9]{4}", text)
    assert finish == "stop"
    text, _ = ask(server, COMPLETIONS, {"regex": "ab*", "min_tokens": 9, "stop_token_ids": []})
    assert re.fullmatch("ab{7,}", text)  # a token may be more than one letter
    text, finish = ask(server, COMPLETIONS, {"regex": "abc?", "min_tokens": 50})  # the grammar ends it
    assert re.fullmatch("abc?", text)
    assert finish == "stop"
    text, finish = ask(server, COMPLETIONS, {"regex": "(ab)+", "ignore_eos": True, "max_tokens": 6})
    assert re.fullmatch("(ab)+a?", text)
    body = {"prompt": "x", "regex": DATE, "logprobs": 2, "n": 3, "seed": 1, "repetition_penalty": 1.9, "max_tokens": 20}
    answer = server.post(COMPLETIONS, **body).json()
    for choice in answer["choices"]:
        assert re.fullmatch(DATE, choice["text"])
        assert "".join(choice["logprobs"]["tokens"]) == choice["text"]
        assert min(choice["logprobs"]["token_logprobs"]) > -50  # the model's, not the mask's
    assert len({choice["text"] for choice in answer["choices"]}) > 1
    streamed = {}
    with server.http.stream("POST", COMPLETIONS, json={**body, "stream": True}) as lines:
        for line in lines.iter_lines():
            if line.startswith("data: {"):
                (choice,) = json.loads(line[6:])["choices"]
                streamed[choice["index"]] = streamed.get(choice["index"], "") + choice["text"]
    assert streamed == {choice["index"]: choice["text"] for choice in answer["choices"]}


# ---- the engine alone

TINY = {"device": "cpu", "dtype": "float32", "max_total_tokens": 1024}


def request(rid, regex, **params) -> Request:
    given = {"max_new_tokens": 60, "temperature": 1.0, "seed": 7, **params}
    return Request(str(rid), [5, 6, 7 + rid], SamplingParams(**given), grammar=f"start: /{regex}/")


def drain(engine) -> dict:
    """rid -> tokens, finish_reason, error."""
    got, until = {}, time.monotonic() + 60
    while engine.has_work:
        assert time.monotonic() < until
        for output in engine.step():
            tokens = got.get(output.rid, ([],))[0] + output.token_ids
            got[output.rid] = (tokens, output.finish_reason, output.error)
    return got


@pytest.fixture(scope="module")
def vocabulary(model_folder):
    return Vocabulary(Tokenizer(model_folder).definition, [1])


def test_preempted_sequences_go_on_in_their_grammars(model_folder, vocabulary):
    """As they would with pages for all, and so does one without a grammar among them."""
    answers = []
    few = {"max_total_tokens": 96, "page_size": 4}
    for flags, preempted, overlap in (({}, False, False), (few, True, False), (few, True, True)):
        engine = Engine(ServerArgs(model_path=str(model_folder), **{**TINY, **flags}), overlap=overlap)
        engine.grammars.learn(vocabulary)
        for rid in range(4):
            engine.add(request(rid, "[a-f]{40}[0-9]{3}", max_new_tokens=50))
        engine.add(Request("free", [5, 6], SamplingParams(max_new_tokens=40, seed=1, ignore_eos=True)))
        answers.append(drain(engine))
        assert (engine.statistics().preemptions > 0) == preempted
        assert engine.scheduler.cache.num_available == engine.pool.num_pages
    assert answers[0] == answers[1] == answers[2]
    tokenizer = Tokenizer(model_folder)
    for rid in range(4):
        tokens, finish, _ = answers[0][str(rid)]
        assert re.fullmatch("[a-f]{40}[0-9]{3}", tokenizer.decode(tokens))
        assert finish == "stop"
    assert len(answers[0]["free"][0]) == 40


def test_grammars_that_cannot_be_served(model_folder, vocabulary):
    """fail their own request alone; one that is aborted while its grammar is compiled leaves nothing."""
    engine = Engine(ServerArgs(model_path=str(model_folder), **TINY))
    engine.add(request(0, "a"))
    assert drain(engine) == {"0": ([], "error", "a grammar came before the vocabulary")}
    engine.grammars.learn(vocabulary)
    engine.add(request(1, "a("))
    engine.add(request(2, "abc"))
    engine.add(request(3, "abc"))
    with pytest.raises(ValueError, match="already there"):
        engine.add(request(3, "abc"))
    engine.abort("3")
    got = drain(engine)
    assert set(got) == {"1", "2"}
    assert got["1"][1] == "error"
    assert "unclosed group" in got["1"][2]
    assert Tokenizer(model_folder).decode(got["2"][0]) == "abc"


def test_a_stop_token_that_the_grammar_needs_does_not_leave_it_nothing(model_folder, vocabulary):
    """min_tokens forbids stops, and the grammar everything else."""
    a = Tokenizer(model_folder).encode("a", add_special_tokens=False)
    engine = Engine(ServerArgs(model_path=str(model_folder), **TINY))
    engine.grammars.learn(vocabulary)
    engine.add(request(0, "a", min_new_tokens=5, stop_token_ids=a))
    assert drain(engine)["0"] == (a, "stop", None)
