"""wave64's Llama against transformers' LlamaForCausalLM, in fp32 to 1e-4, however the tokens are cut into batches."""

import pytest
import torch
from helpers_llama import LLAMAS, PagedDriver, greedy, load, make_llama

PROMPT = [17, 3, 99, 42, 8, 8, 71, 0, 55, 23, 64, 90, 12]
TOLERANCE = dict(rtol=0, atol=1e-4)


@pytest.fixture(scope="module", params=LLAMAS)
def llama(request, tmp_path_factory, device):
    """(transformers' model, wave64's, its config), loaded from the same folder; one in two in the old spelling."""
    folder = tmp_path_factory.mktemp("llama")
    old_spelling = list(LLAMAS).index(request.param) % 2 == 1
    theirs = make_llama(folder, old_spelling=old_spelling, **LLAMAS[request.param])
    return theirs, *load(folder, device)


@pytest.fixture
def driver(llama, device):
    return PagedDriver(*llama[1:], device)


def expected(llama, tokens):
    with torch.inference_mode():
        return llama[0](torch.tensor([tokens])).logits[0]


def test_prefill(llama, driver):
    torch.testing.assert_close(driver.step({}, {"a": PROMPT}), expected(llama, PROMPT), **TOLERANCE)


def test_decode_through_the_cache(llama, driver):
    rows = [driver.step({}, {"a": PROMPT[:3]})] + [driver.step({"a": token}, {}) for token in PROMPT[3:]]
    torch.testing.assert_close(torch.cat(rows), expected(llama, PROMPT), **TOLERANCE)


@pytest.mark.parametrize("size", range(1, len(PROMPT) + 1))
def test_chunked_prefill(llama, driver, size):
    rows = [driver.step({}, {"a": PROMPT[i : i + size]}) for i in range(0, len(PROMPT), size)]
    torch.testing.assert_close(torch.cat(rows), expected(llama, PROMPT), **TOLERANCE)


def test_ragged_batch_of_decodes_and_prefills(llama, driver):
    a, b, c, d = PROMPT, PROMPT[::-1], PROMPT[4:] + PROMPT[:3], PROMPT[2:7]
    driver.step({}, {"a": a[:5], "b": b[:1]})
    driver.step({"b": b[1]}, {"c": c[:6]})
    got = driver.step({"b": b[2], "a": a[5]}, {"c": c[6:], "d": d})
    want = [expected(llama, b)[2:3], expected(llama, a)[5:6], expected(llama, c)[6:], expected(llama, d)]
    torch.testing.assert_close(got, torch.cat(want), **TOLERANCE)


def test_logits_of_the_wanted_rows_only(llama, driver):
    got = driver.step({}, {"a": PROMPT, "b": PROMPT[:4]}, rows=[16, 12, 2])
    want = expected(llama, PROMPT)[[3, 12, 2]]
    torch.testing.assert_close(got, want, **TOLERANCE)


def test_greedy_with_five_prompts_in_flight(llama, driver):
    """A new prompt joins every step while the others decode. The dynamic model runs far beyond its trained context."""
    steps = 64
    prompts = {str(n): PROMPT[:n] for n in (1, 4, 7, 10, 13)}
    answers = {name: greedy(llama[0], prompt, steps) for name, prompt in prompts.items()}
    tokens = {name: [] for name in prompts}
    waiting = list(prompts)
    while waiting or any(len(t) < steps for t in tokens.values()):
        decodes = {name: t[-1] for name, t in tokens.items() if 0 < len(t) < steps}
        prefills = {name: prompts[name] for name in waiting[:1]}
        waiting = waiting[1:]
        last = len(decodes) + sum(map(len, prefills.values())) - 1
        logits = driver.step(decodes, prefills, rows=[*range(len(decodes)), last][: len(decodes) + len(prefills)])
        for name, row in zip([*decodes, *prefills], logits, strict=True):
            torch.testing.assert_close(row, answers[name][1][len(tokens[name])], **TOLERANCE)
            tokens[name].append(int(row.argmax()))
    assert tokens == {name: answer for name, (answer, _) in answers.items()}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_dtypes_are_no_less_exact_than_transformers(tmp_path, device, dtype):
    theirs = make_llama(tmp_path, **LLAMAS["llama3-gqa4-tied"])
    ours, config = load(tmp_path, device, dtype)
    with torch.inference_mode():
        exact = theirs(torch.tensor([PROMPT])).logits[0]
        narrow = theirs.to(dtype)(torch.tensor([PROMPT])).logits[0].float()
    error = (PagedDriver(ours, config, device).step({}, {"a": PROMPT}) - exact).square().mean().sqrt()
    assert error <= 1.5 * (narrow - exact).square().mean().sqrt()
    assert error > 0, "the model ran in fp32"
