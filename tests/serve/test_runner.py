"""What the runner makes of a schedule: decodes next to prompts that were read in part, each in its own pages."""

import pytest
import torch
from helpers_deepseek import make_deepseek
from helpers_llama import load, make_llama

from wave64.serve.engine.runner import Runner
from wave64.serve.engine.schedule import LAST_SAMPLED, Sampling, Schedule

A, B, C = [17, 3, 99, 42, 8], [8, 71, 0, 55, 23, 64, 90, 12], [5, 5, 60, 1, 33, 7]


@pytest.mark.parametrize("name", ["llama", "deepseek"])
def test_prompts_go_on_beside_decodes(tmp_path, device, name):
    theirs = make_llama(tmp_path) if name == "llama" else make_deepseek(tmp_path, 3)
    model, config = load(tmp_path, device)
    runner = Runner(model, config, torch.float32, torch.device(device), 32, 2, 4, capture=False)
    # Rows in another order than sequences, prompts of different lengths before and after.
    runner.forward(Schedule(0, [2, 0, 1], [0, 0, 0], [4, 5, 2], [1, 1, 1], A[:4] + B[:5] + C[:2],
                        [(2, 0, [9, 4, 30]), (0, 0, [7, 21, 3, 0]), (1, 0, [11, 2, 5])]))
    got = runner.forward(Schedule(1, [2, 0, 1], [4, 5, 2], [1, 3, 4], [1, 3, 4], A[4:] + B[5:] + C[2:], []))
    with torch.inference_mode():
        want = torch.cat([theirs(torch.tensor([tokens])).logits[0, first:]
                          for tokens, first in ((A, 4), (B, 5), (C, 2))])
    torch.testing.assert_close(got.cpu(), want, rtol=0, atol=1e-4)


def greedy(rows: list[int]) -> Sampling:
    """The most likely token for each of the rows, all of which sample."""
    count = len(rows)
    return Sampling(rows, list(range(count)), [0.0] * count, [0] * count, [1.0] * count, [0.0] * count, [0.0] * count,
                    [-1] * count)  # fmt: skip


def test_a_schedule_may_name_the_token_that_a_row_sampled_last(tmp_path, device):
    """Decodes and the end of a prompt; with the tokens spelled out, the logits are the same bits."""
    make_llama(tmp_path)
    model, config = load(tmp_path, device)
    first = Schedule(0, [2, 0], [0, 0], [5, 8], [1, 1], A + B, [(2, 0, [9, 4, 30]), (0, 0, [7, 21, 3, 0, 6])])

    def second(tokens) -> Schedule:
        return Schedule(1, [0, 2, 1], [8, 5, 0], [1, 1, 6], [1, 1, 1], tokens + C, [(1, 0, [11, 2, 5])])

    logits = []
    for named in (False, True):
        runner = Runner(model, config, torch.float32, torch.device(device), 32, 2, 4, capture=False)
        from_2, from_0 = runner.run(first, greedy([2, 0])).ids
        assert from_2 != from_0, "else rows might be mixed up unseen"
        logits.append(runner.forward(second([LAST_SAMPLED] * 2 if named else [from_0, from_2])))
    assert torch.equal(*logits)
