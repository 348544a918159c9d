"""What a busy engine says of itself."""

from wave64.serve.engine.engine import Throughput


def test_throughput_is_of_the_time_that_steps_took():
    now = [100.0]
    throughput = Throughput(lambda: now[0])

    def step(seconds: float, prompt: int, generated: int, pause: float = 0.0) -> str | None:
        now[0] += pause
        throughput.begin()
        now[0] += seconds
        return throughput.end(prompt, generated)

    assert step(2.0, 300, 1) is None
    assert step(2.0, 0, 3) is None
    assert step(1.0, 200, 4) == "throughput: 100.0 prompt and 1.6 generated tokens/s"
    assert step(0.5, 0, 1, pause=4.0) is None, "five seconds after the last line, not after the last pause"
    assert step(0.5, 10, 1) == "throughput: 10.0 prompt and 2.0 generated tokens/s"
    assert step(0.0, 1, 1, pause=60.0) is None, "a clock too coarse for the step"
