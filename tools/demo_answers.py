"""What demo-tools learns: its tokenizer, its chat template, and conversations with the one right answer of each.

It answers questions about the weather, the time, sums and capitals, and little else:
- with a tool that helps it calls it, in Llama 3's format; twice for two cities; then it tells what the tool said;
- a sum without a tool it computes digit by digit between <think> and </think>;
- asked for JSON it answers with an object, and where a grammar wants a list of calls it writes one;
- whatever it does not know is answered with UNKNOWN.
So greedy decoding has one exact expected answer to each of ASKED, on any device, in any dtype and in any batch.
"""

import json
import random
from collections.abc import Callable
from typing import Any

import jinja2
from demo_text import EVERYDAY, WORDS, unrelated
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

Json = dict[str, Any]

BOS, EOS, PYTHON_TAG = "<|begin_of_text|>", "<|end_of_text|>", "<|python_tag|>"
SPECIALS = [BOS, EOS, "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>", "<|tools|>", PYTHON_TAG]
THINK, END_THINK = "<think>", "</think>"
CHAT_TEMPLATE = (
    "{{ bos_token }}{% if tools %}{{ '<|tools|>' }}{% for tool in tools %}{{ tool.function.name }}("
    "{{ (tool.function.parameters or {}).properties | default({}) | join(', ') }})"
    "{% if not loop.last %}, {% endif %}{% endfor %}{% endif %}"
    "{% for message in messages %}{{ '<|' + message.role + '|>' }}{{ message.content or '' }}"
    "{% if message.role == 'assistant' %}{% for call in message.tool_calls or [] %}"
    "{{ '<|python_tag|>' if loop.first else '; ' }}"
    '{"name": "{{ call.function.name }}", "parameters": {{ call.function.arguments | tojson }}}'
    "{% endfor %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
RENDER = jinja2.Environment()
RENDER.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
TEMPLATE = RENDER.from_string(CHAT_TEMPLATE)

VOCAB_SIZE = 640
CAPITALS = {"Norway": "Oslo", "France": "Paris", "Japan": "Tokyo", "Peru": "Lima", "Egypt": "Cairo", "Italy": "Rome",
            "Kenya": "Nairobi", "Spain": "Madrid", "Ghana": "Accra", "Nepal": "Kathmandu"}  # fmt: skip
CITIES = [*CAPITALS.values()]
SKIES = ["sun", "rain", "snow", "fog", "wind", "clouds"]
ASK_WEATHER = ["What is the weather in {}?", "How is the weather in {}?", "Weather in {}?", "Will it rain in {} today?"]
ASK_TIME = ["What time is it in {}?", "What is the time in {}?"]
ASK_SUM = ["What is {} plus {}?", "{} plus {}?", "What is {} + {}?", "Add {} and {}."]
ASK_CAPITAL = ["What is the capital of {}?", "Name the capital of {}."]
AS_JSON = " Answer in JSON."

UNKNOWN = "I know only a few questions: ask me about the weather, the time, a sum or a capital."
NO_WEATHER = "I have no tool that knows the weather."
NO_TIME = "I have no tool that knows the time."
STORY = ("A wave of 64 lanes set out across the compute unit. Each lane carried one number, and none went ahead of "
         "the others. Where the path divided, some waited until the rest came back. At the end they added up what they "
         "had, two by two, and one lane wrote the sum. Then the scheduler called the next wave.")  # fmt: skip
HTML = "<b>bold</b> <img src=x onerror=alert(1)> <script>alert(1)</script>"
FIXED = {
    "Hello!": "Hello! Ask me about the weather, the time, a sum or a capital.",
    "Who are you?": "I am demo-tools, a tiny model that ships with wave64.",
    "Tell me a story.": STORY,
    "Show me some HTML.": HTML,
}
ALSO = {"Hi": "Hello!", "Hello": "Hello!", "Good morning!": "Hello!", "What is your name?": "Who are you?",
        "What are you?": "Who are you?", "Tell a story": "Tell me a story.", "Show HTML": "Show me some HTML."}

SUMS = [(26, 58), (48, 37), (64, 28), (12, 34), (73, 19), (55, 66), (40, 20), (90, 35)]
PARAMETERS = {"get_weather": ("city",), "get_time": ("city",), "add": ("a", "b")}


def make_tokenizer() -> Tokenizer:
    """A byte-level BPE whose tokens hold one digit or one mark at most, so that a text has the same tokens wherever a
    grammar makes a model write it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Punctuation("isolated"), pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False)])  # fmt: skip
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=VOCAB_SIZE - 2, special_tokens=SPECIALS, show_progress=False,
                                  initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()))  # fmt: skip
    rng = random.Random(0)
    texts = [text for _ in range(3000) for text in conversation(rng)]
    tokenizer.train_from_iterator([*texts, STORY * 20, HTML * 20, UNKNOWN * 20, " ".join(WORDS), EVERYDAY], trainer)
    tokenizer.add_tokens([AddedToken(mark, normalized=False) for mark in (THINK, END_THINK)])
    assert tokenizer.get_vocab_size() == VOCAB_SIZE
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 0)])
    return tokenizer


def user(text: str) -> Json:
    return {"role": "user", "content": text}


def called(name: str, **arguments: Any) -> Json:
    return {"name": name, "parameters": arguments}


def written(calls: list[Json]) -> str:
    """Calls in Llama 3's format."""
    return PYTHON_TAG + "; ".join(map(json.dumps, calls))


def told(calls: list[Json], results: list[str]) -> list[Json]:
    """The messages of calls and of what the tools said."""
    made = [{"id": f"c{i}", "type": "function",
             "function": {"name": call["name"], "arguments": call["parameters"]}} for i, call in enumerate(calls)]
    said = [{"role": "tool", "tool_call_id": f"c{i}", "content": result} for i, result in enumerate(results)]
    return [{"role": "assistant", "content": None, "tool_calls": made}, *said]


def render(messages: list[Json], tools: list[str]) -> str:
    """The prompt; tools: their names."""
    about = [{"function": {"name": name, "parameters": {"properties": dict.fromkeys(PARAMETERS.get(name, ("x",)))}}}
             for name in tools]  # fmt: skip
    return TEMPLATE.render(messages=messages, tools=about, bos_token=BOS, eos_token=EOS, add_generation_prompt=True)


def thought(a: int, b: int) -> str:
    """The sum of two numbers, digit by digit from the right, then the answer."""
    steps, carry = [], 0
    for i in range(max(len(str(a)), len(str(b)))):
        digits = [number // 10**i % 10 for number in (a, b)] + [1] * carry
        total = sum(digits)
        steps.append(f"{' + '.join(map(str, digits))} = {total}.")
        carry = total // 10
    return f"{THINK}{' '.join(steps)}{END_THINK}"


def number(rng: random.Random) -> int:
    return rng.randrange(10) if rng.random() < 0.1 else rng.randrange(10, 100)


def result(rng: random.Random) -> str:
    """What a tool may say of the weather: a short text, to be repeated as it is."""
    if rng.random() < 0.5:
        return f"{rng.randrange(-20, 41)} degrees, {rng.choice(SKIES)}"
    return " ".join(rng.choices([*WORDS, *SKIES, *map(str, range(100))], k=rng.randint(1, 5)))


def clock(rng: random.Random) -> str:
    return f"{rng.randrange(24):02}:{rng.randrange(60):02}"


def others(rng: random.Random, helpful: str | None) -> list[str]:
    """Names of tools, the helpful one among them; None: any but those that the question is about."""
    names = [name for name in PARAMETERS if rng.random() < 0.4 and name != helpful]
    names += rng.sample(["search", "send_email", "get_news", "read_file"], rng.choice([0, 0, 0, 1]))
    if helpful is not None:
        names.append(helpful)
    rng.shuffle(names)
    return names


#: A question of one turn: what is said, the tools, the right answer, and calls that a grammar may ask for instead.
Turn = tuple[list[Json], list[str], str, list[Json]]


def of_city(rng: random.Random, name: str, ask: list[str], said: Callable[[random.Random], str], none: str) -> Turn:
    """A question about one city or two that a tool answers."""
    cities = rng.sample(CITIES, 2 if rng.random() < 0.3 else 1)
    asked = [user(rng.choice(ask).format(" and ".join(cities)))]
    calls = [called(name, city=city) for city in cities]
    kind = rng.random()
    if kind < 0.2:
        return asked, [tool for tool in others(rng, None) if tool != name], none, []
    if kind < 0.6:
        return asked, others(rng, name), written(calls), calls
    results = [said(rng) for _ in cities]
    answer = "\n".join(f"{city}: {text}" for city, text in zip(cities, results, strict=True))
    return [*asked, *told(calls, results)], others(rng, name), answer, []


def of_sum(rng: random.Random) -> Turn:
    a, b = number(rng), number(rng)
    text, answer = rng.choice(ASK_SUM).format(a, b), f"{a} plus {b} is {a + b}."
    kind, calls = rng.random(), [called("add", a=a, b=b)]
    if kind < 0.25:
        return [user(text)], others(rng, "add"), written(calls), calls
    if kind < 0.4:
        return [user(text), *told(calls, [str(a + b)])], others(rng, "add"), answer, []
    tools = [tool for tool in others(rng, None) if tool != "add"]
    if kind < 0.55:
        return [user(text + AS_JSON)], tools, thought(a, b) + json.dumps({"sum": a + b}), []
    return [user(text)], tools, thought(a, b) + answer, []


def of_capital(rng: random.Random) -> Turn:
    country, city = rng.choice([*CAPITALS.items()])
    text = rng.choice(ASK_CAPITAL).format(country)
    if rng.random() < 0.5:
        return [user(text + AS_JSON)], others(rng, None), json.dumps({"country": country, "capital": city}), []
    return [user(text)], others(rng, None), f"{city} is the capital of {country}.", []


def of_fixed(rng: random.Random) -> Turn:
    text = rng.choice([*FIXED, *ALSO])
    return [user(text)], others(rng, None), FIXED[ALSO.get(text, text)], []


def turn(rng: random.Random) -> Turn:
    """A question drawn at random."""
    kind = rng.random()
    if kind < 0.27:
        return of_city(rng, "get_weather", ASK_WEATHER, result, NO_WEATHER)
    if kind < 0.42:
        return of_city(rng, "get_time", ASK_TIME, clock, NO_TIME)
    if kind < 0.75:
        return of_sum(rng)
    if kind < 0.87:
        return of_capital(rng)
    if kind < 0.94:
        return of_fixed(rng)
    return [user(unrelated(rng))], others(rng, None), UNKNOWN, []


def conversation(rng: random.Random) -> tuple[str, str, str]:
    """(prompt, what a grammar makes the model write, answer) of one conversation drawn at random."""
    asked, tools, answer, calls = turn(rng)
    before: list[Json] = []
    if rng.random() < 0.2:
        before.append({"role": "system", "content": unrelated(rng)})
    if rng.random() < 0.25:
        earlier, _, said, made = turn(rng)
        while made:
            earlier, _, said, made = turn(rng)
        before += [*earlier, {"role": "assistant", "content": said.partition(END_THINK)[2] or said}]
    begun = ""
    if calls and rng.random() < 0.5:
        begun, answer = "[", json.dumps(calls)[1:]
    return render([*before, *asked], tools), begun, answer


def example(rng: random.Random, encode: Callable[[str], list[int]]) -> tuple[list[int], list[int]]:
    """(ids, labels) of one conversation; labels are -100, not asked, on all but the answer."""
    prompt, begun, answer = conversation(rng)
    head, tail = encode(prompt) + encode(begun), encode(answer + EOS)
    return head + tail, [-100] * len(head) + tail


def asked() -> list[tuple[str, str]]:
    """(prompt, answer) that a checkpoint is held to: every city and country, some sums, and what tests ask."""
    system = {"role": "system", "content": "You are a helpful assistant."}
    found = [(render([user(text)], tools), answer) for text, answer in FIXED.items() for tools in ([], [*PARAMETERS])]
    found.append((render([system, user("How old is the moon?")], []), UNKNOWN))
    for country, city in CAPITALS.items():
        calls, text = [called("get_weather", city=city)], ASK_WEATHER[0].format(city)
        found += [
            (render([user(ASK_CAPITAL[0].format(country))], []), f"{city} is the capital of {country}."),
            (render([user(ASK_CAPITAL[0].format(country) + AS_JSON)], []),
             json.dumps({"country": country, "capital": city})),
            (render([user(text)], []), NO_WEATHER),
            (render([user(text)], ["get_weather"]), written(calls)),
            (render([system, user(text)], ["get_weather", "add"]), written(calls)),
            (render([user(text), *told(calls, ["7 degrees, rain"])], ["get_weather"]), f"{city}: 7 degrees, rain"),
        ]  # fmt: skip
    for a, b in SUMS:
        text, calls = ASK_SUM[0].format(a, b), [called("add", a=a, b=b)]
        found += [(render([user(text)], []), f"{thought(a, b)}{a} plus {b} is {a + b}."),
                  (render([user(text + AS_JSON)], []), thought(a, b) + json.dumps({"sum": a + b})),
                  (render([user(text)], ["add"]), written(calls))]  # fmt: skip
    for pair in zip(CITIES, CITIES[1:], strict=False):
        two = [called("get_weather", city=city) for city in pair]
        text = ASK_WEATHER[0].format(" and ".join(pair))
        said = "{}: 7 degrees, rain\n{}: 21 degrees, sun".format(*pair)
        found += [(render([user(text)], ["get_weather", "get_time"]), written(two)),
                  (render([user(text), *told(two, ["7 degrees, rain", "21 degrees, sun"])], ["get_weather"]), said),
                  (render([user(text)], ["get_weather"]) + "[", json.dumps(two)[1:])]  # fmt: skip
    return found
