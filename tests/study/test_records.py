from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_unfreeze.study.runs.records import CurvePoint, RunLog, RunRecord, pack_correct, run_key, unpack_correct


def _record(key: str = "k", **changes: object) -> RunRecord:
    values: dict[str, object] = {
        "key": key,
        "arm": "full9",
        "seed": 3,
        "dataset": "pets",
        "acc": 0.6,
        "n_test": 10,
        "correct": pack_correct([1, 1, 1, 1, 1, 1, 0, 0, 0, 0]),
        "images": 6000,
        "flops": 1.25e10,
        "seconds": 3.5,
        "curve": (
            CurvePoint(1.0, 500, 1e9, 0.3, 0.5, "head", True),
            CurvePoint(2.0, 1000, 2e9, 0.6, 0.55, "full", False),
        ),
        "lr_trace": {"stem": ((0.0, 1e-3), (0.5, 5e-4)), "head": ()},
        "distortion": {"displacement": 0.4},
        "tuning_curve": ((0.01, 0.5), (0.03, 0.52)),
    }
    return RunRecord(**{**values, **changes})  # type: ignore[arg-type]


# --- correctness bits -------------------------------------------------------------------------------------------------


@given(st.lists(st.booleans(), min_size=1, max_size=70))
def test_correct_bits__come_back(bits: list[bool]) -> None:
    packed = pack_correct(bits)
    assert unpack_correct(packed, len(bits)).tolist() == bits
    assert len(packed) == 4 * math.ceil(math.ceil(len(bits) / 8) / 3)  # base64 of one bit per image


def test_unpack_correct__refuses_another_length() -> None:
    with pytest.raises(ValueError, match="2 bytes"):
        unpack_correct(pack_correct([True] * 9), 20)


def test_record__refuses_an_accuracy_that_its_bits_deny() -> None:
    with pytest.raises(ValueError, match=r"acc=0.7 for full9, seed 3.*give 0.6"):
        _record(acc=0.7)


# --- the key ----------------------------------------------------------------------------------------------------------


def test_run_key__changes_with_each_part_and_with_nothing_else() -> None:
    config = {"margin": 1.0, "lr": [0.1, 0.3]}
    key = run_key(config, "full9", 0, "1.0")
    assert key == run_key({"lr": [0.1, 0.3], "margin": 1.0}, "full9", 0, "1.0")
    others = [
        run_key({**config, "margin": 0.5}, "full9", 0, "1.0"),
        run_key(config, "skip3", 0, "1.0"),
        run_key(config, "full9", 1, "1.0"),
        run_key(config, "full9", 0, "1.1"),
    ]
    assert len({key, *others}) == 5


def test_run_key__hashes_the_canonical_text() -> None:
    text = '[{"a":"x","b":[1,0.5]},"skip3",4,"v"]'
    assert run_key({"b": [1, 0.5], "a": "x"}, "skip3", 4, "v") == hashlib.sha256(text.encode()).hexdigest()[:24]


def test_run_key__refuses_settings_without_a_stable_text() -> None:
    with pytest.raises(TypeError, match="not JSON serializable"):
        run_key({"model": object()}, "full9", 0, "1.0")


# --- the log ----------------------------------------------------------------------------------------------------------


def test_log__records_come_back_equal(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "deep" / "runs.jsonl")
    assert log.read() == []
    first, second = _record("a"), _record("b", nll=1.5, acc_ood=0.25, tuned_lr=0.3, peak_memory_bytes=2**31)
    log.append(first)
    log.append(second)
    assert log.read() == [first, second]


def test_log__lines_are_strict_json_with_the_schema(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "runs.jsonl")
    log.append(_record("a", nll=math.nan, distortion={"displacement": math.inf}))

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    row = json.loads(log.path.read_text(), parse_constant=refuse)
    assert (row["schema"], row["nll"], row["distortion"]["displacement"]) == (1, None, None)
    (record,) = log.read()
    assert record.nll is None and math.isnan(record.distortion["displacement"])


@pytest.mark.parametrize("kept_bytes", [1, 40, -1])
def test_log__a_torn_last_line_is_dropped_and_cut_off(tmp_path: Path, kept_bytes: int) -> None:
    log = RunLog(tmp_path / "runs.jsonl")
    log.append(_record("a"))
    whole = log.path.read_bytes()
    log.append(_record("b"))
    torn = log.path.read_bytes()[len(whole) :][:kept_bytes]
    log.path.write_bytes(whole + torn)
    assert [record.key for record in log.read()] == ["a"]
    log.append(_record("c"))
    assert [record.key for record in log.read()] == ["a", "c"]
    assert log.path.read_bytes() == whole + _record("c").to_line().encode()


def test_log__a_torn_first_line_longer_than_a_block_is_cut_off(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "runs.jsonl")
    log.path.write_bytes(b'{"key":"' + b"x" * 10_000)
    assert log.read() == []
    log.append(_record("a"))
    assert [record.key for record in log.read()] == ["a"]


def test_log__a_long_whole_line_is_kept(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "runs.jsonl")
    long = _record("a", acc=1.0, n_test=80_000, correct=pack_correct(np.ones(80_000)))
    log.append(long)
    log.append(_record("b"))
    assert log.read() == [long, _record("b")]


def test_log__the_first_line_of_a_key_stands(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "runs.jsonl")
    log.append(_record("a", seconds=1.0))
    log.append(_record("a", seconds=2.0))
    assert [record.seconds for record in log.read()] == [1.0]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("not json", "line 2"),
        (json.dumps({"schema": 2}), "schema 2; this version reads schema 1"),
        ("[]", "schema list"),
        (_record().to_line().strip()[:-1] + ',"colour":"red"}', "unknown fields .'colour'."),
    ],
)
def test_log__a_broken_line_in_the_middle_is_an_error(tmp_path: Path, line: str, message: str) -> None:
    log = RunLog(tmp_path / "runs.jsonl")
    log.append(_record("a"))
    log.path.write_text(log.path.read_text() + line + "\n")
    with pytest.raises(ValueError, match=message):
        log.read()


def test_log__append_reaches_the_disk_before_it_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    real = os.fsync

    def spy(descriptor: int) -> None:
        sizes.append(os.fstat(descriptor).st_size)
        real(descriptor)

    monkeypatch.setattr(os, "fsync", spy)
    log = RunLog(tmp_path / "runs.jsonl")
    log.append(_record("a"))
    assert log.path.stat().st_size in sizes


def test_record__is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        _record().acc = 1.0  # type: ignore[misc]
