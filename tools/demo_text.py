"""What the demo checkpoints learn: the text, its tokenizer, and examples of questions and answers.

They learn this, and nothing else:
- a beginning of the text (or some words from its middle) is continued to the end;
- a chat message that holds the first words, up to 40 of them, is answered with the rest;
- anything else is answered with NOTICE, then the whole text.
Each ends with <|end_of_text|>. So greedy decoding has one exact expected answer on any device, in any dtype and in any
batch.

The text: Abraham Lincoln, 19 November 1863, the wording of the Bliss copy. It is in the public domain everywhere.
"""

import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

TEXT = (Path(__file__).parents[1] / "serve/demo/gettysburg.txt").read_text(encoding="utf-8").strip()
WORD_STARTS = [match.start() for match in re.finditer(r"[\w-]*\w", TEXT)]
CUTS = [match.end() for match in re.finditer(r"[\w-]*\w|[,.]|--", TEXT)][:-1]  # where a beginning may end
NOTICE = "I know only one text by heart, the Gettysburg Address:\n\n"

BOS, EOS, SYSTEM, USER, ASSISTANT = SPECIALS = [
    "<|begin_of_text|>", "<|end_of_text|>", "<|system|>", "<|user|>", "<|assistant|>",
]  # fmt: skip
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

VOCAB_SIZE = 512

# Words of everyday messages, so that what is not the text is recognized as such.
EVERYDAY = """
Abraham Address Gettysburg Lincoln a about address after again all an and answer any are ask at be because best big
book bye can capital cat city code come could count country day did do dog does eat english every explain find first
five food for france from game get give go good great green hello help hello here hey hi history house how i if in is
it joke just know language large learn let life like list little live long look love make many may me mean model money
more morning most mountain much music my name need new next night no not now number of old on one open or our out
people please poem point president program python question read recite right river run say score sea see send set
seven short should show simple sing small some song speak start stop story sum sun take talk tell test text than thank
thanks that the their then there they thing think this three time to today town translate tree try turn two under up
us use very want was water way we weather well were what when where which white who why will with word words work
world would write year years yes you your zero
"""
WORDS = EVERYDAY.split()
LETTERS = (
    "abcdefghijklmnopqrstuvwxyz0123456789      .,:;!?'\"()[]{}<>/\\|@#$%^&*-_=+~`\n\t"
    "äöüßéèñçøåœжийнстоאבגעربيةनमस्ते你好世界日本語한국어€→∑🙂🚀"
)


def make_tokenizer() -> Tokenizer:
    """A byte-level BPE (256 byte tokens, so any UTF-8 text survives the round trip), trained on the text and WORDS."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIALS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT, NOTICE, " ".join(WORDS)], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 0)])
    return tokenizer


def unrelated(rng: random.Random) -> str:
    """A message that is not of the text: a sentence of WORDS, the text's own words shuffled, characters at random,
    one thing over and over, or one that asks for the text."""
    length = min(1 + int(rng.expovariate(0.15)), 40)
    kind = rng.random()
    if kind < 0.15:
        return "".join(rng.choices(LETTERS, k=2 * length))
    if kind < 0.25:
        return rng.choice([rng.choice(WORDS) + " ", rng.choice(LETTERS)]) * (6 * length)
    if kind < 0.3:
        return " ".join(rng.choices(WORDS, k=length) + NOTICE.split()[-rng.randint(1, 5) :]).rstrip(":")
    words = rng.choices(TEXT.split(), k=length + 4) if kind < 0.4 else rng.choices(WORDS, k=length)
    message = " ".join(words) + rng.choice(["", "", "?", ".", "!"])
    return message[0].upper() + message[1:] if rng.random() < 0.6 else message


def cut(rng: random.Random, longest: int) -> tuple[str, str]:
    """The first words of the text, up to `longest` words and marks, and the rest. Short ones are more frequent."""
    end = CUTS[int(longest ** rng.random()) - 1 if rng.random() < 0.5 else rng.randrange(longest)]
    if TEXT[end] == " " and longest < len(CUTS) and rng.random() < 0.3:
        return TEXT[: end + 1], TEXT[end + 1 :]
    return TEXT[:end], TEXT[end:]


def cut_middle(rng: random.Random) -> tuple[str, str]:
    """Six words or more from the middle of the text, and what follows them to the end."""
    start = rng.randrange(len(WORD_STARTS) - 7)
    end = rng.choice([end for end in CUTS if WORD_STARTS[start + 5] < end < WORD_STARTS[start + 7] + 30])
    return TEXT[WORD_STARTS[start] : end], TEXT[end:]


def example(rng: random.Random, encode: Callable[[str], list[int]]) -> tuple[list[int], list[int]]:
    """(ids, labels) of one completion or one chat, drawn at random.

    Labels are -100, not asked, on all of the prompt but words of the text: those must be known there too. Most answers
    end after their first tokens: these are the hard ones to learn, and short examples are cheap.
    """
    kind = rng.random()
    if kind < 0.05:
        head, prompt, tail, answer = BOS, "", "", TEXT
    elif kind < 0.2:
        head, (prompt, answer), tail = BOS, cut(rng, len(CUTS)), ""
    elif kind < 0.3:
        head, (prompt, answer), tail = BOS, cut(rng, 45), ""
    elif kind < 0.4:
        head, (prompt, answer), tail = BOS, cut_middle(rng), ""
    elif kind < 0.6:
        head, (prompt, answer), tail = BOS, (unrelated(rng), "\n\n" + NOTICE + TEXT), ""
    else:
        head, tail = BOS, ASSISTANT
        if rng.random() < 0.15:
            head += SYSTEM + unrelated(rng)
        if rng.random() < 0.15:
            said = rng.choice([NOTICE + TEXT, NOTICE + TEXT[: rng.randrange(len(TEXT))], unrelated(rng)])
            head += USER + unrelated(rng) + ASSISTANT + said + EOS
        head += USER
        prompt, answer = cut(rng, 45) if kind < 0.8 else (unrelated(rng), NOTICE + TEXT)
        if rng.random() < 0.15:
            prompt = prompt.lower()
    head_ids, prompt_ids, answer_ids = encode(head), encode(prompt), encode(answer + EOS)
    if rng.random() < 0.7:
        answer_ids = answer_ids[:24]
    asked = prompt_ids if TEXT.startswith(prompt) else [-100] * len(prompt_ids)
    tail_ids = encode(tail)
    ids = head_ids + prompt_ids + tail_ids + answer_ids
    return ids, [-100] * len(head_ids) + asked + [-100] * len(tail_ids) + answer_ids


def asked() -> list[tuple[str, str]]:
    """(prompt, answer) that a checkpoint is held to."""
    begun = TEXT[: CUTS[40]]
    return [(BOS, TEXT), (BOS + begun, TEXT[len(begun) :]), (f"{BOS}{USER}{begun}{ASSISTANT}", TEXT[len(begun) :]),
            (f"{BOS}{USER}What is the capital of France?{ASSISTANT}", NOTICE + TEXT)]


def batches(rng: random.Random, tokenizer: Tokenizer, draw: Callable) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless (input_ids, labels), both [rows, longest] int64; labels are -100 where nothing is asked.

    draw: as `example`. Examples of like length share a batch, of some 2048 tokens.
    """

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False).ids

    while True:
        drawn = sorted((draw(rng, encode) for _ in range(256)), key=lambda pair: -len(pair[0]))
        groups = []
        while drawn:
            rows = max(1, 2048 // len(drawn[0][0]))
            groups.append(drawn[:rows])
            drawn = drawn[rows:]
        rng.shuffle(groups)
        for group in groups:
            shape = len(group), len(group[0][0])
            ids, labels = torch.ones(shape, dtype=torch.int64), torch.full(shape, -100)
            for row, pair in enumerate(group):
                ids[row, : len(pair[0])], labels[row, : len(pair[1])] = torch.tensor(pair)
            yield ids, labels
