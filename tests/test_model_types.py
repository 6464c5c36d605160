"""What the trainer does with each family is what the family's own forward does, or it says that it does not."""

import re
from pathlib import Path

import model_types
import pytest
import transformers
from model_types import causal_types, record, tiny_model

DOCS = Path(__file__).parents[1] / "docs" / "models.md"

FAST = {
    "gemma2": {},  # soft-caps, eager attention
    "hyperclovax": {"logits_scaling": 0.125},  # a factor that Granite divides by
    "falcon_h1": {"lm_head_multiplier": 0.02},  # two caches a layer
    "recurrent_gemma": {"logits_soft_cap": 2.0},
    "qwen3_5_text": {},  # linear attention
    "lfm2": {},  # convolutions
    "gpt_oss": {},  # attention sinks
    "qwen3_moe": {},  # fused experts
    "gpt2": {},  # Conv1D
    "gemma4_text": {},  # layers with heads of other widths
    "bloom": {},  # a dropout module under the name of a rate
    "bert": {},
}


@pytest.mark.parametrize("kind", FAST)
def test_a_family_agrees_or_is_refused(kind, tmp_path, monkeypatch):
    tiny = tiny_model
    monkeypatch.setattr(model_types, "tiny_model", lambda kind: tiny(kind, **FAST[kind]))
    row = record(kind, tmp_path)
    assert not any("WRONG" in cell for cell in row.values()), row
    if kind == "bert":
        assert row["trains"].startswith("refused")
    else:
        assert row["trains"] == "yes", row
        assert row["checkpointing"] == "yes", row
        assert row["LoRA"] == "yes", row


@pytest.mark.slow
def test_no_type_that_transformers_lists_is_wrong_in_silence(tmp_path):
    """`python tests/model_types.py` writes what this finds to docs/models.md."""
    rows = {}
    for kind in causal_types():
        work = tmp_path / kind
        work.mkdir()
        rows[kind] = record(kind, work)
    assert not [kind for kind, row in rows.items() if any("WRONG" in cell for cell in row.values())]
    assert sum(row["trains"] == "yes" for row in rows.values()) > 150
    if f"transformers {transformers.__version__} " in DOCS.read_text():
        # Sizes of differences aside, which are of this machine.
        sizes = re.compile(r" \([0-9.e+-]+\)")
        assert sizes.sub("", model_types.table(rows)) == sizes.sub("", DOCS.read_text())
