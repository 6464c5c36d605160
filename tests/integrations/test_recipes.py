"""The programs of the recipes run as they are written, with a tiny model in the place of the real one and, as the page
on TRL says, two settings more on a CPU."""

import re
from pathlib import Path

import pytest

pytest.importorskip("trl", reason="pip install 'trapo-kernels[integrations]'")
RECIPES = Path(__file__).parents[2] / "docs" / "recipes"
NAME = "HuggingFaceTB/SmolLM2-135M"


@pytest.mark.parametrize("page", ["trl", "transformers"])
def test_the_programs_of_a_recipe_run_one_after_the_other(page, tiny_model_path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (RECIPES / f"{page}.md").read_text("utf-8"), re.DOTALL)
    names: dict = {"__name__": page}
    steps = []
    for block in blocks:
        program = block.replace(NAME, str(tiny_model_path))
        if page == "trl":
            program = program.replace("max_steps=", "use_cpu=True, bf16=False, max_steps=")
        exec(compile(program, page, "exec"), names)
        if "trainer.train()" in block:
            steps.append(names["trainer"].state.global_step)
    assert steps == {"trl": [2, 1, 1], "transformers": []}[page]
    if page == "trl":
        assert names["trainer"].state.log_history
        assert names["guidance"].micro_groups
    else:
        assert names["patched"].metrics["expert_prob"] > 0
