"""What `grad_tolerance` saves on real hidden states: SmolLM2-135M-Instruct on text of its own and on GSM8K solutions.

    python -m bench.tolerance [--gsm8k ../shared/data/gsm8k-train.jsonl] [--tokens 2048]

Left out is known before the GEMMs, so the share reported is exact; the error is of the gradients against exact ones.
Writes bench/results/grad_tolerance.json and .md.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import trapo_kernels as tk
from bench.measure import RESULTS, interleaved, machine, step
from bench.providers import Case, Provider
from trapo.config import ModelConfig
from trapo.models.loading import head_of, load_model

TOLERANCES = (0.0, 1e-4, 1e-3, 1e-2, 5e-2)
OBJECTIVES = {
    "sft": tk.Objective.sft(),
    "trapo": tk.Objective.trapo(),
    "trapo + entropy": tk.Objective.trapo(entropy_coef=0.001),
}


@torch.no_grad()
def sampled(model: Any, tokenizer: Any, tokens: int) -> list[Tensor]:
    """Returns continuations of the model's own at temperature 1, prompts left out."""
    prompts = ["Tell me about the sea.", "How do I bake bread?", "Write a short story.", "What is a prime number?"]
    out: list[Tensor] = []
    torch.manual_seed(0)
    while sum(len(t) for t in out) < tokens:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompts[len(out) % len(prompts)]}], add_generation_prompt=True, tokenize=False
        )
        ids = tokenizer(text, return_tensors="pt").input_ids
        made = model.generate(input_ids=ids, max_new_tokens=256, do_sample=True, temperature=1.0, top_k=0, top_p=1.0)
        out.append(made[0])
    return out


def solutions(path: Path, tokenizer: Any, tokens: int) -> list[Tensor]:
    out: list[Tensor] = []
    for line in path.read_text().splitlines():
        row = json.loads(line)
        out.append(tokenizer(row["question"] + "\n" + row["answer"], return_tensors="pt").input_ids[0])
        if sum(len(t) for t in out) >= tokens:
            break
    return out


@torch.no_grad()
def case_of(model: Any, texts: list[Tensor], tokens: int) -> Case:
    """Returns the hidden states and next tokens of the texts, with random advantages."""
    decoder = model.get_decoder()
    hidden = torch.cat([decoder(input_ids=t[None]).last_hidden_state[0, :-1] for t in texts])[:tokens]
    targets = torch.cat([t[1:] for t in texts])[:tokens]
    weight = head_of(model).weight.detach().clone()
    g = torch.Generator().manual_seed(0)
    n = len(targets)
    advantages, expert = torch.randn(n, generator=g), torch.rand(n, generator=g) < 0.3
    return Case(hidden.clone().requires_grad_(), weight.requires_grad_(), targets, advantages, expert)


def measure(case: Case, name: str, objective: tk.Objective, rounds: int) -> list[dict[str, Any]]:
    inputs = {} if objective.supervised else {"advantages": case.advantages, "expert_mask": case.expert_mask}

    def run(tolerance: float) -> tk.PolicyLoss:
        return tk.linear_policy_loss(
            case.hidden, case.weight, case.targets, objective, backend="cpu", grad_tolerance=tolerance, **inputs
        )

    def timed(tolerance: float) -> Any:
        provider = Provider("", lambda _: run(tolerance).loss, "entropy", True)
        return lambda: step(provider, case)

    seconds = interleaved({str(t): timed(t) for t in TOLERANCES}, rounds)
    exact = torch.autograd.grad(run(0.0).loss, (case.hidden, case.weight))
    rows = []
    for tolerance in TOLERANCES:
        out = run(tolerance)
        found = torch.autograd.grad(out.loss, (case.hidden, case.weight))
        errors = [float((a - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True)]
        rows.append(
            {
                "objective": name, "tolerance": tolerance, "left_out": float(out.metrics.get("grad_left_out", 0)),
                "ratio": seconds[str(tolerance)] / seconds["0.0"], "error_d_hidden": errors[0],
                "error_d_weight": errors[1], "entropy": float(out.metrics["entropy"]),
            }
        )  # fmt: skip
    return rows


def markdown(results: dict[str, Any]) -> str:
    m = results["machine"]
    lines = [
        "# grad_tolerance on real hidden states", "",
        f"SmolLM2-135M-Instruct, {results['tokens']} tokens, D=576, V=49152, fp32. {m['cpu']}, {m['capability']}, "
        f"{m['threads']} threads, {m['date']}. Times relative to exact gradients, best of {results['rounds']}. "
        "Errors are Frobenius norms relative to the exact gradient.", "",
        "| text | mean entropy | objective | ε | left out | time | error d_hidden | error d_weight |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]  # fmt: skip
    for row in results["rows"]:
        cells = [row["text"], f"{row['entropy']:.2f}", row["objective"], f"{row['tolerance']:g}"]
        cells += [f"{row['left_out']:.1e}", f"{row['ratio']:.2f}"]
        cells += [f"{row['error_d_hidden']:.1e}", f"{row['error_d_weight']:.1e}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gsm8k", type=Path, default=Path("../shared/data/gsm8k-train.jsonl"))
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    model, tokenizer = load_model(ModelConfig())
    texts = {"sampled": sampled(model, tokenizer, arguments.tokens + 64)}
    if arguments.gsm8k.exists():
        texts["GSM8K"] = solutions(arguments.gsm8k, tokenizer, arguments.tokens + 64)
    else:
        print(f"without GSM8K: {arguments.gsm8k} is not there")
    rows = []
    for text, ids in texts.items():
        case = case_of(model, ids, arguments.tokens)
        for name, objective in OBJECTIVES.items():
            rows += [{"text": text, **row} for row in measure(case, name, objective, arguments.rounds)]
            print(rows[-len(TOLERANCES) :], flush=True)
    results = {"machine": machine(), "tokens": arguments.tokens, "rounds": arguments.rounds, "rows": rows}
    (RESULTS / "grad_tolerance.json").write_text(json.dumps(results, indent=1) + "\n")
    (RESULTS / "grad_tolerance.md").write_text(markdown(results))
    print(markdown(results))


if __name__ == "__main__":
    main()
