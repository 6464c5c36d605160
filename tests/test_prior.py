"""eval.prior: what the base model could do is measured before and after, and shown wherever a run is."""

import json

import pytest
import torch
from killed_run import settings, train_here
from transformers import AutoModelForCausalLM, AutoTokenizer

from trapo.config import merge_config
from trapo.errors import TrapoError
from trapo.evaluation.compare import knowledge
from trapo.evaluation.prior import load_prior
from trapo.report.summary import summary_lines

TEXTS = ["The sun is a star.", "Water boils at one hundred degrees."]


def test_texts_have_the_likelihood_that_transformers_gives_them(tiny_model_path, tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_path)
    model = AutoModelForCausalLM.from_pretrained(tiny_model_path, dtype=torch.float32)
    total, count = 0.0, 0
    for text in TEXTS:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            total += float(model(ids, labels=ids).loss) * (ids.numel() - 1)
        count += ids.numel() - 1
    prior = load_prior(str(path), merge_config({}).data, tokenizer, print)
    nll, tokens = prior.nll(model, "float32")
    assert (nll, tokens) == (pytest.approx(total / count, rel=1e-5), count)
    (tmp_path / "text.txt").write_text(TEXTS[0])
    assert (
        load_prior(str(tmp_path / "text.txt"), merge_config({}).data, tokenizer, print).nll(model, "float32")[1] < count
    )


def test_a_run_measures_texts_before_and_after_and_says_so_everywhere(tiny_model_path, tmp_path):
    path, run_dir = tmp_path / "texts.jsonl", tmp_path / "run"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    train_here(settings(tiny_model_path, run_dir, "mode=sft", "train.steps=3", f"eval.prior={path}", "optim.lr=3e-2"))
    evaluations = [json.loads(file.read_text()) for file in sorted((run_dir / "eval").glob("*.json"))]
    before, after = evaluations[0]["prior_nll"], evaluations[-1]["prior_nll"]
    assert after != before
    summary = json.loads((run_dir / "summary.json").read_text())
    assert (summary["prior_nll_before"], summary["prior_nll_after"]) == (before, after)
    line = f"NLL of what the base knew: {before:.3f} → {after:.3f} nats a token"
    assert line in summary_lines(run_dir, summary)
    assert line.partition(": ")[2] in (run_dir / "report.html").read_text()
    assert any(line.startswith("NLL of what the base knew: A ") for line in knowledge(run_dir, run_dir))


def test_problems_have_an_accuracy_beside_the_likelihood_of_their_traces(tiny_model_path, tmp_path):
    prior = "eval.prior=task://word_problems?split=test&n=2&seed=9"
    train_here(settings(tiny_model_path, tmp_path / "run", "mode=sft", "train.steps=1", "eval.before=false", prior))
    (file,) = (tmp_path / "run" / "eval").glob("*.json")
    found = json.loads(file.read_text())
    assert found["prior_accuracy"] == 0.0
    assert found["prior_tokens"] > 0
    assert found["prior_nll"] != found["trace_nll"]


def test_it_goes_with_data_eval_and_a_file_that_is_there(tiny_model_path):
    with pytest.raises(TrapoError, match=r"eval\.prior: it is measured with data\.eval"):
        merge_config({}, ["eval.prior=x.txt"])
    with pytest.raises(TrapoError, match=r"eval\.prior: /none\.txt cannot be read"):
        load_prior("/none.txt", merge_config({}).data, None, print)
