"""What maps on several devices cost, as `python -m benchmarks.sharded` prints it, and its example."""

import pytest

from benchmarks import sharded


def test_table_has_a_line_for_each_rank(capsys):
    assert sharded.main(["--size", "10", "6", "--ranks", "3", "--depth", "2", "--channels", "4"]) == 0
    title, _, *lines = capsys.readouterr().out.splitlines()
    assert title.startswith("1 x 10 x 6, D = 2, C = 4, float32")
    assert [line.split()[:2] for line in lines] == [["0", "3"], ["1", "3"], ["2", "4"]]


def test_ranks_save_the_bytes_of_one_device_together():
    parts = [sharded.saved_bytes(rows * 6, 2, 4, 4, 4) for rows in (3, 3, 4)]
    assert sum(parts) == sharded.saved_bytes(60, 2, 4, 4, 4) == 60 * 4 * (2 + 2 + 4 + 4 + 1)


@pytest.mark.slow
def test_four_processes_train_on_what_one_cannot_hold(capsys):
    assert sharded.main(["--example"]) == 0
    output = capsys.readouterr().out
    assert "1 process:   out of memory" in output
    losses = output.partition("loss ")[2].partition(";")[0].split(" -> ")
    assert float(losses[-1]) < float(losses[0])
