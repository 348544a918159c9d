"""--max-prefill-ms: how long a chunk of prompts may be in a step that also decodes, learned from what steps took, on a
clock that the tests set."""

import pytest
from helpers_parallel import collect
from helpers_scheduler import World, prompt_without_stop
from helpers_server import VOCAB, make_model

from wave64.serve.args import ServerArgs
from wave64.serve.engine.engine import MAX_PREFILL_MS, Engine
from wave64.serve.engine.pace import MIN_CHUNK, SHORT_CHUNK, SPREAD, Pace
from wave64.serve.messages import Request, SamplingParams

DECODE_S, LAUNCHES_S = 0.010, 0.005


class Device:
    """A clock, and what steps take on it."""

    def __init__(self, token_s: float = 0.00001) -> None:
        self.now, self.token_s = 100.0, token_s

    def __call__(self) -> float:
        return self.now

    def run(self, decodes: int, prompt: int) -> float:
        took = DECODE_S * bool(decodes) + (LAUNCHES_S + self.token_s * prompt) * bool(prompt)
        self.now += took
        return took


def step(pace: Pace, device: Device, prompt: int, decodes: int = 1) -> float:
    pace.begin(bool(decodes), prompt)
    took = device.run(decodes, prompt)
    pace.end()
    return took


def test_a_chunk_takes_what_it_may():
    """Whatever it was first: launches and decodes are accounted for."""
    device = Device()
    pace = Pace(30.0, 8000, device)
    step(pace, device, 0)
    assert step(pace, device, pace.chunk) == pytest.approx(0.095)
    for _ in range(8):
        took = step(pace, device, pace.chunk)
    assert 0.040 - MIN_CHUNK * device.token_s <= took <= 0.040
    assert pace.chunk % MIN_CHUNK == 0
    device.token_s *= 2  # more text before it
    step(pace, device, pace.chunk)
    for _ in range(8):
        took = step(pace, device, pace.chunk)
    assert 0.040 - MIN_CHUNK * device.token_s <= took <= 0.040


def test_few_tokens_say_nothing_of_many():
    device = Device()
    pace = Pace(30.0, 8000, device)
    for _ in range(20):
        step(pace, device, 3)
    assert pace.chunk == 8000


def test_one_that_compiles_holds_prompts_up_for_a_few_steps():
    device = Device()
    pace = Pace(30.0, 8000, device)
    step(pace, device, 0)
    pace.begin(True, 500)
    device.now += 60.0
    pace.end()
    assert pace.chunk == MIN_CHUNK
    chunks = []
    for _ in range(10):
        step(pace, device, pace.chunk)
        chunks.append(pace.chunk)
    assert chunks[:3] == [2 * MIN_CHUNK, 4 * MIN_CHUNK, 8 * MIN_CHUNK]
    assert 2300 <= chunks[-1] <= 2500


def test_steps_that_overlap_are_measured_from_end_to_end():
    """The next one is launched while one runs; one that fails counts nothing."""
    device = Device()
    pace = Pace(30.0, 8000, device)
    pace.begin(False, 1000)
    pace.begin(False, 1000)
    device.now += 0.1
    pace.end()
    assert pace.chunk == 256
    pace.begin(True, 8)
    pace.drop()
    device.now += 0.1
    pace.end()
    assert pace.chunk == 256


def test_a_limit_of_nothing_is_none():
    device = Device()
    pace = Pace(0.0, 8000, device)
    step(pace, device, 8000)
    assert pace.chunk == 8000


def test_few_tokens_that_wait_are_spread_over_steps():
    """As many as come get on at once, in chunks of which none is much longer than it has to be."""
    pace = Pace(1000.0, 8000)
    assert [pace.chunk_of(waiting) for waiting in (0, 1, SHORT_CHUNK * SPREAD)] == [SHORT_CHUNK] * 3
    waiting, chunks = 8000, []
    while waiting > 0:
        chunks.append(pace.chunk_of(waiting))
        waiting -= chunks[-1]
    assert chunks == sorted(chunks, reverse=True)
    assert chunks[0] == 512 >= 8000 / SPREAD
    assert len(chunks) < 2.5 * SPREAD
    assert Pace(1000.0, 8000).chunk_of(10**6) == 8000
    assert Pace(0.0, 8000).chunk_of(1) == 8000, "without a limit, whole"


def test_what_waits_is_counted_as_far_as_it_has_a_row():
    world = World(num_pages=200, max_running=3, budget=30)
    for name, length in (("a", 50), ("b", 40), ("c", 7), ("d", 100)):
        world.add(name, prompt_without_stop(length, 4, 100 * length), 4)
    assert world.scheduler.prompt_tokens == 50 + 40 + 7
    world.step()
    assert world.scheduler.prompt_tokens == 20 + 40 + 7
    world.step()
    assert world.scheduler.prompt_tokens == 30 + 7, "a decodes"


def prompts_of(made: Engine) -> list[int]:
    """The prompt tokens of each step that is launched from now on."""
    forward, launched = made.runner.forward, []

    def counted(step):
        launched.append(sum(step.counts[step.num_decodes :]))
        return forward(step)

    vars(made.runner)["forward"] = counted
    return launched


def test_short_prompts_are_computed_next_to_decodes_a_few_tokens_at_a_time(tmp_path):
    make_model(tmp_path)
    made = Engine(ServerArgs(model_path=str(tmp_path), device="cpu", dtype="float32", max_total_tokens=2048,
                             max_prefill_ms=1e6))  # fmt: skip
    params = SamplingParams(max_new_tokens=20, temperature=0, ignore_eos=True)
    made.add(Request("a", [1, 2], params))
    made.step()
    launched = prompts_of(made)
    for i in range(3):
        made.add(Request(f"b{i}", [(7 * i + j) % VOCAB for j in range(100)], params))
    while made.has_work:
        made.step()
    assert launched[:4] == [128, 128, 44, 0]


@pytest.mark.parametrize(("count", "chunk"), [(1, 128), (2, 200)])
def test_chunks_are_long_where_requests_wait_for_others_to_end(tmp_path, count, chunk):
    make_model(tmp_path)
    made = Engine(ServerArgs(model_path=str(tmp_path), device="cpu", dtype="float32", max_total_tokens=2048,
                             max_prefill_ms=1e6, max_running_requests=2))  # fmt: skip
    params = SamplingParams(max_new_tokens=20, temperature=0, ignore_eos=True)
    made.add(Request("a", [1, 2], params))
    made.step()
    for i in range(count):
        made.add(Request(f"b{i}", [(7 * i + j) % VOCAB for j in range(200)], params))
    assert made.scheduler.is_full == (count > 1)
    launched = prompts_of(made)
    made.step()
    assert launched == [chunk]


def test_the_scheduler_keeps_to_the_chunk():
    world = World(num_pages=200, max_running=8, budget=100)
    world.add("a", prompt_without_stop(5, 40), 40)
    assert not world.scheduler.is_decoding
    world.step()
    assert world.scheduler.is_decoding
    world.add("b", list(range(60)), 1)
    counts = []
    schedule = world.scheduler.schedule
    world.scheduler.schedule = lambda max_prompt_tokens=None: schedule(25)
    for _ in range(3):
        counts.append(world.step().counts)
    assert counts == [[1, 25], [1, 25], [1, 10]]


@pytest.mark.parametrize("overlap", [False, True])
def test_answers_go_on_while_prompts_arrive(tmp_path_factory, overlap):
    """A long prompt and many short ones come while one decodes: once the first chunk was measured, the gaps between its
    tokens are at most what a decode and --max-prefill-ms take. Alone, a prompt is computed at once."""
    folder, device = tmp_path_factory.mktemp("model"), Device(token_s=0.0001)
    make_model(folder)
    made = Engine(ServerArgs(model_path=str(folder), device="cpu", dtype="float32", chunked_prefill_size=1024,
                             max_total_tokens=4096, max_prefill_ms=20.0, disable_radix_cache=True), overlap=overlap)
    made._pace._clock = device
    forward, launched = made.runner.forward, []

    def timed(*steps):
        launched.append((steps[0].num_decodes, sum(steps[0].counts[steps[0].num_decodes :])))
        return forward(*steps)

    vars(made.runner)["forward"] = timed
    commit = made._commit

    def waited():
        if made._chosen is not None:
            device.run(*launched[len(ended)])
            ended.append(device.now)
        return commit()

    ended: list[float] = []
    made._commit = waited
    collect(made, Request("warm", [5] * 900, SamplingParams(max_new_tokens=1)))
    assert launched == [(0, 900)]
    made.add(Request("a", [1, 2], SamplingParams(max_new_tokens=60, temperature=0, ignore_eos=True)))
    for _ in range(4):
        made.step()
    for i in range(4):
        made.add(Request(f"b{i}", [(7 * i + j) % VOCAB for j in range(900 if not i else 150)],
                         SamplingParams(max_new_tokens=1)))
    gaps, heard = [], None
    while made.has_work:
        for output in made.step():
            if output.rid == "a" and output.token_ids:
                gaps.append(device.now - (heard or device.now))
                heard = device.now
    assert sum(prompt for decodes, prompt in launched if decodes) == 900 + 3 * 150
    assert max(gaps[:3]) <= DECODE_S + 1.25 * 0.020, "the first chunk was measured of a longer one"
    assert 0.025 < max(gaps[3:]) <= DECODE_S + 0.020 + 1e-3


def test_the_default_bounds_steps_of_gpus_only(tmp_path):
    make_model(tmp_path)
    made = Engine(ServerArgs(model_path=str(tmp_path), device="cpu", max_total_tokens=256))
    assert made._pace._limit == 0
    made = Engine(ServerArgs(model_path=str(tmp_path), device="cpu", max_total_tokens=256, max_prefill_ms=5))
    assert made._pace._limit == 0.005
    assert MAX_PREFILL_MS == 100
