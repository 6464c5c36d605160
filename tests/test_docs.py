"""README and documentation: their examples run, their commands name keys that exist, their links lead somewhere."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_llama

import trapo_kernels as tk
from trapo import cli
from trapo.config import load_config, preset_names

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])


def examples(page: str) -> list[str]:
    """The Python blocks of a page, in order."""
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text("utf-8"), re.DOTALL)


def execute(block: str, page: str, names: dict) -> None:
    exec(compile(block, page, "exec"), names)


@pytest.fixture(scope="module")
def model():
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1}
    return tiny_llama(range(101), **sizes)  # 101 tokens


@pytest.fixture(scope="module")
def ids():
    return torch.randint(0, 101, (2, 12), generator=torch.Generator().manual_seed(0))


def test_the_loss_of_the_readme_trains_a_model(model, ids):
    (block,) = examples("README.md")
    mask = torch.ones(2, 11, dtype=torch.bool)
    names = {"model": model, "input_ids": ids, "advantages": torch.tensor([1.0, -0.5]), "completion_mask": mask,
             "expert_mask": torch.arange(11) < 4 * mask}  # fmt: skip
    execute(block, "README.md", names)
    assert names["out"].logprobs.shape == (2, 11)
    assert model.lm_head.weight.grad.abs().sum() > 0
    model.zero_grad()


def test_the_quick_start_runs():
    names: dict = {}
    for block in examples("docs/index.md"):
        execute(block, "docs/index.md", names)
    assert names["weight"].grad.abs().sum() > 0
    assert names["old"].logprobs.shape == (2, 50)


def test_the_page_on_supports_runs():
    names: dict = {}
    for block in examples("docs/supports.md"):
        execute(block, "docs/supports.md", names)
    assert names["on"].logprobs.shape == (2, 5, 8)
    assert names["weight"].grad.abs().sum() > 0


def test_the_loop_of_the_recipe_adds_up_to_one_call(model, ids):
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "advantages": torch.tensor([1.0, -0.5]),
             "expert_mask": torch.arange(11).expand(2, 11) < 4, "mask": ids[:, 1:] >= 0}  # fmt: skip
    block, *_ = examples("docs/recipes/loop.md")

    def gradient_and_metrics(micro_batches):
        names = {"model": model, "micro_batches": micro_batches, "metrics": []}
        execute(block, "docs/recipes/loop.md", names)
        gradient = model.lm_head.weight.grad.clone()
        model.zero_grad()
        return gradient, tk.merge_metrics(names["metrics"])

    one, metrics = gradient_and_metrics([batch])
    halves, merged = gradient_and_metrics([{k: v[i : i + 1] for k, v in batch.items()} for i in range(2)])
    torch.testing.assert_close(halves, one, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(merged["loss"], metrics["loss"], rtol=1e-5, atol=1e-6)


def test_the_line_in_the_place_of_cces_is_the_cross_entropy_of_the_next_label(model, ids):
    (block,) = [block for block in examples("docs/recipes/coming.md") if "linear_policy_loss" in block]
    labels = ids.masked_fill(ids % 3 == 0, -100)
    hidden = model.model(ids).last_hidden_state
    names = {"tk": tk, "hidden": hidden, "lm_head": model.lm_head, "labels": labels}
    execute(block, "docs/recipes/coming.md", names)
    expected = model(ids, labels=labels).loss
    torch.testing.assert_close(names["loss"], expected, rtol=1e-5, atol=1e-6)


def test_the_schedule_of_the_recipe_for_trl_is_one():
    (block,) = [block for block in examples("docs/recipes/trl.md") if "trapo.guidance" in block]
    names: dict = {}
    execute(block, "docs/recipes/trl.md", names)
    assert [group.ratio for group in names["guidance"].micro_groups] == [0.0, 0.5, 1.0]


def commands() -> list[tuple[str, list[str]]]:
    """(page, words) of every `trapo train`, `eval` and `plan` that starts from a preset."""
    found = []
    for page in PAGES:
        text = page.read_text("utf-8").replace("\\\n", " ")
        for line in re.findall(r"^ *trapo +(?:train|eval|plan) .*$", text, re.MULTILINE):
            words = shlex.split(line, comments=True)
            if words[2].removesuffix(".yaml") in preset_names():
                found.append((page.name, words[2:]))
    return found


def test_every_command_names_keys_and_values_that_a_configuration_takes():
    assert len(commands()) >= 8
    for page, (preset, *changes) in commands():
        values = [word for word in changes if not word.startswith("-")]
        assert all("=" in word for word in values), (page, values)
        load_config(preset, values)  # raises TrapoError


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(page):
    text = re.sub(r"```.*?```", "", page.read_text("utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?://|mailto:", target):
            continue
        path, _, heading = target.partition("#")
        file = (page.parent / path) if path else page
        assert file.exists(), target
        # mkdocs checks headings in the site; generated pages have theirs only there.
        if heading and file.suffix == ".md" and "<!-- " not in (there := file.read_text("utf-8")):
            assert heading in {slug(line) for line in re.findall(r"^#+ (.*)$", there, re.MULTILINE)}, target


def slug(title: str) -> str:
    """The anchor that GitHub and mkdocs make of a heading."""
    return re.sub(r"[\s]+", "-", re.sub(r"[^\w\s-]", "", title.lower()).strip())


TROUBLE = (ROOT / "docs/troubleshooting.md").read_text("utf-8")


@pytest.mark.parametrize(
    ("command", "message"),
    re.findall(r"^\$ trapo (.+)\n(trapo: .+)$", TROUBLE, re.MULTILINE),
    ids=lambda text: text[:40],
)
def test_the_command_line_answers_as_the_page_on_troubles_says(
    command, message, tiny_model_path, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.jsonl").write_text('{"question": "1 + 1?", "solution": "2"}\n')
    program, *words = shlex.split(command)
    # SmolLM2's file takes a quarter of a minute to read.
    model = [f"model.path={tiny_model_path}"] if program == "train" and "model.path" not in command else []
    monkeypatch.setattr("sys.argv", ["trapo", program, *words, *model])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(message)


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    re.findall(r"```python\n(tk\..+)\n# (\w+): (.+)\n```", TROUBLE),
    ids=lambda text: text[-40:],
)
def test_the_losses_refuse_as_the_page_on_troubles_says(call, kind, message):
    if "cuda" in call and torch.cuda.is_available():
        pytest.skip("the backend is here")
    names = {"tk": tk, "hidden": torch.zeros(8, 16), "weight": torch.zeros(100, 16), "targets": torch.arange(8)}
    with pytest.raises((TypeError, ValueError)) as caught:
        execute(call, "docs/troubleshooting.md", names)
    assert type(caught.value).__name__ == kind
    assert str(caught.value).startswith(message)


def test_the_page_on_troubles_has_ten_of_them():
    assert len(re.findall(r"^(?:\$ trapo|# \w+Error:)", TROUBLE, re.MULTILINE)) >= 10
