"""A short torture run; `make torture` makes long ones, of every script."""

import random

import pytest
from torture import Victim, torture


@pytest.mark.parametrize(("name", "num_processes", "num_kills"),
                         [("train_text_to_image.py", 1, 3), ("train_text_to_image_lora_sdxl.py", 1, 2),
                          ("train_text_to_image.py", 2, 2)])
def test_killed_runs_end_like_one_that_was_never_killed(name, num_processes, num_kills, tmp_path):
    kills = torture(Victim(name, tmp_path, num_processes), random.Random(0), lambda count: count >= num_kills)
    assert kills.total() >= num_kills
