"""The GPU benchmark, exercised on a CPU: everybody is checked before anybody is timed."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

pytest.importorskip("bench.providers", reason="bench/providers.py is not here")

from bench import kernels

ARGUMENTS = ["--device", "cpu", "--shapes", "130,16,300", "--dtype", "float32", "--repeats", "1"]


def test_every_part_is_checked_and_timed_and_written_down(tmp_path, capsys):
    out = tmp_path / "kernels.json"
    assert kernels.main([*ARGUMENTS, "--only", "trapo_kernels torch", "GEMMs", "eager", "--out", str(out)]) == 0
    results = json.loads(out.read_text())
    assert results["device"] == "cpu"
    rows = {(row["provider"], row["part"]): row for row in results["rows"]}
    assert {part for _, part in rows} == {"loss and gradients", "forward only"}
    for (provider, _), row in rows.items():
        assert row["ms"] > 0
        assert row["error"] < 1e-4, provider
    printed = capsys.readouterr().out
    assert all(provider in printed for provider, _ in rows)


def test_a_provider_that_is_wrong_is_not_timed(tmp_path, monkeypatch):
    right = next(p for p in kernels.providers("cpu") if p.name == "eager")
    wrong = replace(right, name="wrong", run=lambda case: 2 * right.run(case))
    monkeypatch.setattr(kernels, "providers", lambda device: [wrong])
    out = tmp_path / "kernels.json"
    assert kernels.main([*ARGUMENTS, "--only", "wrong", "--out", str(out)]) == 1
    (row,) = json.loads(out.read_text())["rows"]
    assert row["failed"].startswith("wrong: error")
    assert "ms" not in row


def test_cuda_is_refused_where_there_is_none(monkeypatch, capsys):
    monkeypatch.setattr(kernels.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        kernels.main(["--device", "cuda"])
    assert "there is no CUDA device here" in capsys.readouterr().err
