"""What a rank takes of main memory while it loads, and the benchmark of loading."""

import json
import subprocess
import sys
from pathlib import Path

import loading
import pytest

#: a rank in a process of its own, in which something large was freed before: glibc then keeps what is freed, too
RANK = ("import json, sys, loading; bytes(16 << 20)\n"
        "print(json.dumps(loading.load_rank(loading.Path(sys.argv[1]), 1, 8, lambda: None)))")


def test_a_rank_takes_little_more_main_memory_than_its_weights(tmp_path):
    """In bf16, whose weights are laid out anew, one after the other, by those who multiply on a CPU."""
    loading.make(tmp_path, loading.CONFIG | dict(vocab_size=4096, num_hidden_layers=7), sparse=True)
    done = subprocess.run([sys.executable, "-c", RANK, tmp_path], cwd=Path(loading.__file__).parent,
                          capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["bytes"] == pytest.approx(said["weights"], rel=0.01), "its own, no other's"
    assert said["weights"] > 100e6
    assert said["grown"] > 0.9 * said["weights"], "else this sees nothing"
    assert said["grown"] <= loading.MEMORY * said["weights"] + 16e6, "which is what any model takes, for buffers"


def test_plain_reads_are_of_all_bytes_once(tmp_path):
    size = loading.make(tmp_path, loading.TINY | dict(num_hidden_layers=2))
    headers = sum(file.stat().st_size for file in tmp_path.glob("*.safetensors")) - size
    read = [loading.read_plainly(tmp_path, rank, 3, lambda: None)["bytes"] for rank in range(3)]
    assert sum(read) == size + headers
    assert max(read) - min(read) <= 1


@pytest.mark.long
def test_the_benchmark_reads_the_same_bytes_both_ways(tmp_path):
    command = [sys.executable, loading.__file__, "--tiny", "--ranks", "2", "--layers", "2", "--rounds", "1",
               "--folder", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "ranks reach " in done.stdout
    assert not [*tmp_path.iterdir()]
