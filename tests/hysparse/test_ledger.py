"""The ledger against kills, torn lines, resumes and failing views; its views against their own readers."""

import json
import logging
import math
import os
import re
import signal
import subprocess
import sys
import types

import pytest

from hysparse.config import ConfigError, LoggingConfig
from hysparse.ledger import Ledger, LedgerError, LoggingError, latest_by_step, open_ledger, read_ledger

WRITER = """
import os, sys
from hysparse.ledger import Ledger
ledger = Ledger(sys.argv[1])
for step in range(1, 10**9):
    ledger.write("step", step, loss=1 / step)
    print(step, flush=True)
    if sys.argv[2] == "exit" and step == 50:
        os._exit(1)
"""


def steps_of(path) -> list[int]:
    return [record["step"] for record in read_ledger(path)]


@pytest.mark.parametrize("end", ["exit", "kill"])
def test_every_line_that_was_written_survives_the_death_of_the_writer(tmp_path, end):
    path = tmp_path / "ledger.jsonl"
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(path), end], stdout=subprocess.PIPE, text=True)
    reported = [int(writer.stdout.readline()) for _ in range(50)]
    if end == "kill":
        writer.send_signal(signal.SIGKILL)
    reported += [int(line) for line in writer.stdout]  # what it managed to say in the meantime
    writer.wait()
    assert steps_of(path)[: len(reported)] == reported == list(range(1, len(reported) + 1))


def test_every_line_is_synced_before_write_returns(tmp_path, monkeypatch):
    path, synced = tmp_path / "ledger.jsonl", []
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(os.fstat(file).st_size))
    ledger = Ledger(path)
    for step in range(3):
        ledger.write("step", step)
        assert len(synced) == step + 1 and synced[-1] == path.stat().st_size


def test_a_full_disk_is_said_in_a_sentence_and_again_by_nobody(tmp_path):
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger._file.close()
    ledger._file = open("/dev/full", "ab")
    with pytest.raises(LedgerError, match="step 7: .*ledger.jsonl cannot be written .No space left on device.; make"):
        ledger.write("step", 7, loss=1.0)
    ledger.close()


def test_a_kill_at_any_byte_costs_one_line_and_the_next_append_is_clean(tmp_path):
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger(path)
    for step in (1, 2, 3):
        ledger.write("step", step, loss=0.5)
    ledger.close()
    whole = path.read_bytes()
    for size in range(whole.rfind(b"\n", 0, -1) + 1, len(whole)):
        path.write_bytes(whole[:size])
        assert steps_of(path) == [1, 2]
        ledger = Ledger(path)
        ledger.write("step", 4)
        ledger.close()
        assert steps_of(path) == [1, 2, 4]
        assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 4]  # for any other reader


def test_damage_in_the_middle_costs_only_its_lines(tmp_path):
    path = tmp_path / "ledger.jsonl"
    path.write_bytes(b'{"kind": "step", "step": 1}\n{"kind": "st\n\0\0\0\0\n\xff\xfe\n\n{"kind": "step", "step": 2}\n')
    assert steps_of(path) == [1, 2]


def test_floats_come_back_bit_for_bit(tmp_path):
    values = [0.1 + 0.2, math.pi, 5e-324, 1.7976931348623157e308, -0.0, 2.0**-1074 * 3, 8.3e-4, 1 / 3]
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.write("validation", 7, loss=values[0], by_position=values, tokens=2**60 + 1)
    (record,) = read_ledger(ledger.path)
    assert [x.hex() for x in record["by_position"]] == [x.hex() for x in values]
    assert record["loss"].hex() == values[0].hex() and record["tokens"] == 2**60 + 1


def test_what_is_not_finite_becomes_null(tmp_path):
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.write("step", 1, loss=math.nan, parts=[1.0, -math.inf], named={"router": (math.inf, 2)})
    (record,) = read_ledger(ledger.path)
    assert (record["loss"], record["parts"], record["named"]) == (None, [1.0, None], {"router": [None, 2]})
    assert not re.search("NaN|Infinity", ledger.path.read_text())


def records(*written: tuple[str, int, int]) -> list[dict]:
    return [{"kind": kind, "step": step, "life": life} for kind, step, life in written]


def lives(kept: list[dict]) -> list[tuple[int, int]]:
    return [(record["step"], record["life"]) for record in kept]


def test_a_resume_takes_back_the_steps_that_the_kill_lost():
    first = [("start", 0, 1), *(("step", s, 1) for s in range(1, 9)), ("validation", 4, 1), ("validation", 8, 1)]
    first.sort(key=lambda r: r[1])
    history = records(*first, ("start", 5, 2))
    assert lives(latest_by_step(history, "step")) == [(s, 1) for s in range(1, 6)]  # 6 to 8 were lost
    assert lives(latest_by_step(history, "validation")) == [(4, 1)]
    history += records(("step", 6, 2), ("step", 7, 2))
    assert lives(latest_by_step(history, "step")) == [*((s, 1) for s in range(1, 6)), (6, 2), (7, 2)]
    history += records(("start", 2, 3), ("step", 3, 3))  # an older checkpoint, the newest being damaged
    assert lives(latest_by_step(history, "step")) == [(1, 1), (2, 1), (3, 3)]
    assert latest_by_step(history, "validation") == []


def test_the_last_record_of_a_step_wins():
    history = records(("step", 1, 1), ("step", 2, 1), ("validation", 2, 1), ("step", 2, 2), ("validation", 2, 2))
    assert lives(latest_by_step(history, "step")) == [(1, 1), (2, 2)]
    assert lives(latest_by_step(history, "validation")) == [(2, 2)]


class Broken:
    def __init__(self):
        self.calls = 0

    def write(self, record):
        self.calls += 1
        raise OSError("no\nroom")

    def close(self):
        raise AssertionError("a dropped view is left alone")


class Collector:
    def __init__(self):
        self.steps, self.closed = [], False

    def write(self, record):
        self.steps.append(record["step"])

    def close(self):
        self.closed = True


def test_a_failing_view_is_dropped_with_one_line_and_the_ledger_goes_on(tmp_path, caplog):
    broken, fine = Broken(), Collector()
    ledger = Ledger(tmp_path / "ledger.jsonl", [broken, fine])
    for step in (1, 2, 3):
        ledger.write("step", step)
    ledger.close()
    assert steps_of(ledger.path) == fine.steps == [1, 2, 3] and fine.closed and broken.calls == 1
    (warning,) = caplog.messages
    assert "Broken" in warning and "OSError: no room" in warning and "\n" not in warning


def test_tensorboard_reads_the_numbers_and_forgets_what_a_kill_lost(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for start, end, loss in ((0, 6, 1.0), (3, 5, 2.0)):  # the second life goes on from a checkpoint at step 3
        ledger = open_ledger(LoggingConfig(tensorboard=True), tmp_path, "test", {})
        ledger.write("start", start, tokens=start * 10)
        for step in range(start + 1, end + 1):
            ledger.write("step", step, phase="short", loss=loss, tokens=step * 10, gradient_norm=math.nan)
        ledger.write("validation", end, loss=3.0, by_position=[3.5, 2.5])
        ledger.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    tags = {"start/tokens", "step/loss", "step/tokens", "validation/loss"}
    assert set(events.Tags()["scalars"]) == tags | {"validation/by_position/0", "validation/by_position/1"}
    assert [(e.step, e.value) for e in events.Scalars("step/loss")] == [(1, 1), (2, 1), (3, 1), (4, 2), (5, 2)]
    assert [(e.step, e.value) for e in events.Scalars("validation/by_position/1")] == [(5, 2.5)]


def test_wandb_without_a_key_writes_offline_and_a_second_start_continues_the_run(tmp_path, monkeypatch, caplog):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("WANDB_MODE", "online")  # would ask for a key
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nobody answers there
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    for step in (1, 2):
        config = LoggingConfig(tensorboard=False, wandb=True)
        ledger = open_ledger(config, tmp_path, "test", {"model": {"layers": 4}})
        ledger.write("step", step, loss=0.5, phase="short")
        ledger.close()
    (run_id,) = {path.stem.removeprefix("run-") for path in (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")}
    assert run_id == (tmp_path / "wandb_id").read_text()
    assert steps_of(tmp_path / "ledger.jsonl") == [1, 2]
    assert not [record for record in caplog.records if record.name == "hysparse.ledger"]  # offline by intent


class FakeWandb(types.ModuleType):
    """As much of the package as is needed to refuse the connection."""

    class Error(Exception):
        pass

    def __init__(self):
        super().__init__("wandb")
        self.calls = []

    def Settings(self, **settings):
        assert 0 < settings["init_timeout"] <= 30 and 0 < settings["finish_timeout"] <= 120
        return settings

    def init(self, *, mode, id, resume, **_):
        self.calls.append((mode, id, resume))
        if mode == "online":
            raise self.Error("no such\nhost")
        return types.SimpleNamespace(define_metric=lambda *_, **__: None, log=lambda _: None, finish=lambda: None)

    def teardown(self):
        self.calls.append("teardown")


def test_wandb_that_cannot_be_reached_falls_back_to_offline_with_one_line(tmp_path, monkeypatch, caplog):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    open_ledger(LoggingConfig(tensorboard=False, wandb=True), tmp_path, "test", {}).close()
    run_id = (tmp_path / "wandb_id").read_text()
    assert fake.calls == [("online", run_id, "allow"), "teardown", ("offline", run_id, "allow")]
    (warning,) = caplog.messages
    assert "no such host" in warning and "wandb sync" in warning and "\n" not in warning


def test_wandb_that_cannot_start_at_all_costs_only_the_view(tmp_path, monkeypatch, caplog):
    fake = FakeWandb()
    fake.init = lambda **_: (_ for _ in ()).throw(TypeError("another release"))
    monkeypatch.setitem(sys.modules, "wandb", fake)
    with caplog.at_level(logging.WARNING):
        ledger = open_ledger(LoggingConfig(tensorboard=False, wandb=True), tmp_path, "test", {})
    ledger.write("step", 1)
    assert steps_of(ledger.path) == [1] and ["another release" in message for message in caplog.messages] == [True]


@pytest.mark.parametrize("view, module", [("wandb", "wandb"), ("tensorboard", "torch.utils.tensorboard")])
def test_a_missing_package_is_named_with_its_fix(tmp_path, monkeypatch, view, module):
    monkeypatch.setitem(sys.modules, module, None)  # importing it raises ImportError
    enabled = {"wandb": False, "tensorboard": False} | {view: True}
    with pytest.raises(LoggingError, match=f"pip install {view}, or set logging.{view}=false") as error:
        open_ledger(LoggingConfig(**enabled), tmp_path, "test", {})
    assert isinstance(error.value, ConfigError)  # printed without a traceback


def test_without_views_neither_package_is_imported(tmp_path):
    code = (
        "import sys; from hysparse.config import LoggingConfig; from hysparse.ledger import open_ledger;"
        f"open_ledger(LoggingConfig(tensorboard=False), {str(tmp_path)!r}, 'test', {{}}).write('step', 1);"
        "print({'torch', 'tensorboard', 'wandb'} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"
