"""What a run needs of the system around it, and does without: threads of other programs, modules of other systems."""

import logging
import sys
import threading

import torch
from conftest import make_args, read_scalars
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


def test_without_the_module_resource_memory_is_not_logged(
        first_script, tiny_models, image_folder, tmp_path, monkeypatch):
    """Windows has no such module: a run there logs every number but that one."""
    monkeypatch.setitem(sys.modules, "resource", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    run(first_script, make_args(tiny_models["sd"], image_folder, tmp_path, report_to="tensorboard"))
    assert read_scalars(tmp_path, "peak_memory_gib") == {}
    assert len(read_scalars(tmp_path, "train_loss")) == 2
