"""What a run needs of the system around it, and does without: signals in the thread of another program."""

import logging
import threading

from conftest import make_args
from runs import run


def test_a_run_in_a_thread_trains_without_signals(first_script, tiny_models, image_folder, tmp_path, caplog):
    """A user interface calls `main` in a thread, where Python allows no signal handlers: it trains, and says so."""
    caplog.set_level(logging.INFO)
    argv = make_args(tiny_models["sd"], image_folder, tmp_path / "out")
    thread = threading.Thread(target=run, args=(first_script, argv))
    thread.start()
    thread.join()
    assert "not in the main thread: signals do not save and stop this run" in caplog.text
    assert (tmp_path / "out" / "model_index.json").exists()
