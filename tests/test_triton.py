"""The Triton backend: its tables, its tile kernel, its operators, and that nothing on its path waits for the GPU."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch
from kernel_cases import EVERYTHING, TOLERANCE, assert_close, make_case, run

import trapo_kernels as tk
from trapo_kernels.backends import plain as torch_rows
from trapo_kernels.backends.base import FusedTerms, RowInputs
from trapo_kernels.backends.triton import rows, tiles
from trapo_kernels.chunks import selection
from trapo_kernels.head import Head

pytestmark = pytest.mark.skipif(rows.missing() is not None, reason=f"triton: {rows.missing()}")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def logits_of(rows: int, vocab: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    logits = 4 * torch.randn(rows, vocab, generator=generator)
    return logits.to(dtype), torch.randint(0, vocab, (rows,), generator=generator)


# The row kernels -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vocab", [1, 7, 128, 1024, 2050, 40_000])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_every_length_agree_with_plain_torch(vocab, dtype):
    logits, targets = logits_of(2, vocab, dtype)
    expected = torch_rows.stats(logits.double(), targets, None, True).finish()
    actual = rows.stats(logits, targets, None, True).finish()
    for name, a, b in zip(actual._fields, actual, expected, strict=True):
        assert_close(a, b, 1e-5, name, floor=1.0)


@pytest.mark.parametrize("padding", [0, 5, 64])
def test_rows_may_lie_apart_and_what_is_between_them_is_left_alone(padding):
    logits, targets = logits_of(3, 333, torch.float32)
    wide = torch.full((3, 333 + padding), torch.nan)
    view = wide[:, :333].copy_(logits)
    stats = rows.stats(view, targets, None, True).finish()
    assert_close(stats.logprobs, rows.stats(logits, targets, None, True).finish().logprobs, 0, "logprobs")
    rows.grad_(view, targets, stats, torch.ones(3), torch.ones(3), None)
    assert view.isfinite().all()
    assert wide[:, 333:].isnan().all()


def test_a_target_outside_the_vocabulary_has_an_infinite_loss_and_reads_nothing():
    logits, _ = logits_of(2, 50, torch.float32)
    assert rows.stats(logits, torch.tensor([50, -7]), None, True).finish().logprobs.isnan().all()


def test_every_size_in_the_table_is_a_whole_number_of_wide_accesses():
    for vocab in (1, 1_000, 32_000, 50_257, 152_064, 262_144):
        for dtype in (*DTYPES, torch.float64):
            for capped in (False, True):
                size = rows.sizes(vocab, dtype, capped)
                assert size.K * dtype.itemsize == 16
                assert size.R % (32 * size.warps) == 0
                assert size.R & (size.R - 1) == 0


def test_the_operators_have_fake_kernels_that_agree_with_them():
    logits, targets = logits_of(2, 70, torch.float32)
    stats = rows.stats(logits, targets, None, True).finish()
    vector, expert = torch.ones(2), torch.tensor([True, False])
    terms = tk.Objective.trapo(entropy_coef=0.1).fused()
    assert isinstance(terms, FusedTerms)
    utils = ("test_schema", "test_faketensor")
    torch.library.opcheck(rows._stats, (logits, targets, None), test_utils=utils)
    torch.library.opcheck(
        rows._grad_, (logits.clone(), targets, *stats[:3], stats.entropy, vector, vector, 2.0), test_utils=utils
    )
    inputs = RowInputs(expert, vector, None, None, None, vector)
    torch.library.opcheck(
        rows._fused_, (logits.clone(), targets, *inputs, [float(t) for t in terms], 1.0, None), test_utils=utils
    )
    operands = torch.randn(3, 8).bfloat16(), torch.randn(70, 8).bfloat16()
    torch.library.opcheck(rows._target_logits, (*operands, None, torch.tensor([0, 9, 69]), 2.0), test_utils=utils)
    torch.library.opcheck(
        tiles._linear_stats, (torch.randn(3, 8), torch.randn(70, 8), None, targets.new_zeros(3), 1.0, None),
        test_utils=utils,
    )  # fmt: skip


# The tile kernel -----------------------------------------------------------------------------------------------

HEADS = [Head(), Head(temperature=0.7, logit_scale=0.5), Head(softcap=3.0, temperature=1.3)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head", HEADS, ids=["plain", "scale", "softcap"])
@pytest.mark.parametrize(("n", "vocab", "width"), [(1, 1, 3), (17, 130, 32), (40, 333, 50)])
@pytest.mark.parametrize("bias", [False, True])
def test_tiles_give_the_statistics_of_logits_that_a_gemm_would_have_written(n, vocab, width, dtype, head, bias):
    case = make_case(n, vocab, width, dtype=dtype, with_bias=bias)
    targets = case.targets.clamp(min=0)
    with torch.no_grad():
        actual = tiles.linear_stats(case.hidden, case.weight, case.bias, targets, head, True)
        wide = head.scale * (case.hidden.double() @ case.weight.double().T + (case.bias.double() if bias else 0))
        # Sums that fall on the other side of a boundary differ by a unit of the logits' dtype; and the interpreter
        # cuts fp32 off to bf16 where a GPU rounds to nearest.
        expected = torch_rows.stats(wide.to(dtype).double(), targets, head.cap, True).finish()
    for name, a, b in zip(actual._fields, actual, expected, strict=True):
        assert a.dtype == torch.float32
        assert_close(a, b, TOLERANCE[dtype], name, floor=1.0)


@pytest.mark.parametrize("parts", [1, 2, 5, 11])
def test_the_number_of_shares_changes_nothing_but_rounding(parts):
    case = make_case(20, 700, 24, dtype=torch.float32)
    targets = case.targets.clamp(min=0)
    with torch.no_grad():
        one, several = (
            tiles.launch(case.hidden, case.weight, None, targets, 1.0, None, tiles._interpreted_tile(700), n)
            for n in (1, parts)
        )
    for a, b in zip(several, one, strict=True):
        assert_close(a, b, 1e-6, "state")


@pytest.mark.parametrize("halves", [False, True])
def test_descriptors_and_halves_agree_with_pointers(halves):
    case = make_case(20, 333, 48, dtype=torch.float32)
    targets = case.targets.clamp(min=0)
    plain = tiles.Tile(16, 64, 32, 1, 1, False)
    with torch.no_grad():
        expected, actual = (
            tiles.launch(case.hidden, case.weight, None, targets, 1.0, None, tile, 3)
            for tile in (plain, plain._replace(descriptors=True, halves=halves))
        )
    for a, b in zip(actual, expected, strict=True):
        assert_close(a, b, 1e-6, "state")


def test_old_logprobs_of_an_unchanged_policy_are_those_of_the_loss():
    # In 16 bits, where logits that were not rounded like the GEMM's would make a ratio other than 1 (fp16, since the
    # interpreter does not round bf16 to nearest).
    case = make_case(12, 500, 64, dtype=torch.float16)
    case.targets = case.targets.clamp(min=0)
    with torch.no_grad():
        old = tk.linear_logprobs(case.hidden, case.weight, case.targets, backend="triton").logprobs
    out = tk.linear_policy_loss(
        case.hidden, case.weight, case.targets, tk.Objective.grpo(), advantages=torch.ones(12), backend="triton"
    )
    rounding = 4 * 2**-11  # of an fp16 logit of size 4
    assert (out.logprobs - old).abs().median() < rounding / 100


def test_shares_fill_the_card_in_whole_waves():
    for arch, processors in ((80, 108), (90, 132), (100, 148), (120, 170)):
        tile = tiles.tile(arch, 2, 3_584)
        for rows_, vocab in ((64, 151_936), (8_192, 152_064), (32_768, 128_256), (1, 32_000)):
            parts = tiles.shares(rows_, vocab, tile, processors)
            blocks, all_tiles = -(-rows_ // tile.BM), -(-vocab // tile.BN)
            queue = -(-blocks * parts // processors) * -(-all_tiles // parts)
            assert 1 <= parts <= all_tiles
            assert queue <= 1.25 * -(-blocks * all_tiles // processors) + 1


def test_descriptors_are_for_rows_at_multiples_of_16_bytes_and_masks_for_a_ragged_width():
    assert not tiles.tile(80, 2, 3_584).descriptors
    assert tiles.tile(90, 2, 3_584).descriptors
    assert not tiles.tile(90, 2, 3_584, aligned=False).descriptors
    assert tiles.tile(103, 2, 3_584) == tiles.tile(100, 2, 3_584)
    assert tiles.tile(100, 4, 3_584).specialized
    assert tiles.tile(100, 2, 3_584).halves
    assert tiles.tile(90, 2, 1_001, aligned=False) == tiles._UNEVEN


def test_what_the_tile_kernel_does_not_take_is_streamed():
    case = make_case(5, 33, dtype=torch.float64)
    assert tiles.linear_stats(case.hidden, case.weight, None, case.targets.clamp(min=0), Head(), True) is None
    apart = torch.randn(33, 16).t().contiguous().t()
    assert tiles.linear_stats(torch.randn(5, 16), apart, None, case.targets.clamp(min=0), Head(), True) is None


# The path ------------------------------------------------------------------------------------------------------

# Calls that wait for the stream, or copy to the host. Selection.choose alone has any, and does one of them: leaving
# rows out takes their number (test_waits.py counts).
WAITS = {"item", "cpu", "tolist", "numpy", "nonzero", "synchronize", "as_tensor", "is_nonzero", "argwhere", "unique"}
ON_THE_PATH = (
    "stream.py",
    "chunks/selection.py",
    "chunks/columns.py",
    "objective.py",
    "metrics.py",
    "backends/base.py",
)
ON_THE_PATH += ("functional.py", "paths.py", "call.py", "batch.py", "autograd.py")
ON_THE_PATH += tuple(f"backends/triton/{name}.py" for name in ("rows", "row_kernels", "tiles", "tile_kernels"))


def waiting_calls(path: Path) -> list[str]:
    found = []
    for function in ast.walk(ast.parse(path.read_text())):
        if isinstance(function, ast.FunctionDef):
            for call in ast.walk(function):
                if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr in WAITS:
                    found.append(f"{path.name}: {function.name}: {call.func.attr}")
    return found


def test_nothing_on_the_path_waits_for_the_gpu_but_the_count_of_rows():
    package = Path(tk.__file__).parent
    found = {call for name in ON_THE_PATH for call in waiting_calls(package / name)}
    assert found == {"selection.py: choose: nonzero", "selection.py: choose: tolist"}


def test_the_search_for_waiting_calls_finds_one(tmp_path):
    path = tmp_path / "f.py"
    path.write_text("def f(x):\n    return x.sum().item()\n")
    assert waiting_calls(path) == ["f.py: f: item"]


# Under capture -------------------------------------------------------------------------------------------------


IDS = torch.arange(12) // 4
CAPTURED = {
    "everything": (EVERYTHING, {}),
    "skip_inactive": (tk.Objective.trapo(), {"skip_inactive": True}),
    "coupled": (tk.Objective.gspo(expert="pear"), {"sequence_ids": IDS}),
    "target logit": (tk.Objective.lco(policy="cispo"), {}),
    "statistics": (tk.Objective.eaft(reduction="sequence_mean"), {"sequence_ids": IDS, "statistics": ("sum_sq",)}),
}


@pytest.mark.parametrize("name", CAPTURED)
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("shift", [0.0, 200.0])
def test_inside_a_graph_capture_every_row_is_computed_and_the_result_is_the_same(backend, name, shift, monkeypatch):
    objective, options = CAPTURED[name]
    case = make_case(12, 70, dtype=torch.float32, with_bias=True)
    case.inputs["mask"][0], case.targets[0], case.targets[1] = False, 3, -100
    with torch.no_grad():
        case.bias += shift  # the logits of a row that is left out: e^200 is infinite
    inactive = ~case.inputs["mask"] | (case.targets == -100)
    with torch.no_grad():
        case.hidden[inactive] = torch.nan
    expected, chosen = run(case, objective, backend, **options), run_logprobs(case, backend)
    monkeypatch.setattr(selection, "_capturing", lambda device: True)
    monkeypatch.setattr(torch.Tensor, "nonzero", lambda *_: pytest.fail("a capture may not wait for a number of rows"))
    actual, captured = run(case, objective, backend, **options), run_logprobs(case, backend)
    for name in ("loss", "logprobs", "entropy"):
        assert_close(getattr(actual, name), getattr(expected, name), 1e-5, name)
    for name, value in expected.metrics.items():
        assert_close(actual.metrics[name], value, 1e-5, name)
    for a, b in zip([*actual.grads, *captured], [*expected.grads, *chosen], strict=True):
        assert_close(a, b, 1e-5, "gradient")


def test_a_divergence_inside_a_graph_capture_counts_the_same_tokens(monkeypatch):
    case, ref = (make_case(12, 70, dtype=torch.float32, seed=seed, with_bias=True) for seed in (0, 1))
    mask = case.inputs["mask"].clone()
    mask[0] = False
    with torch.no_grad():
        case.hidden[~mask], ref.hidden[~mask] = torch.nan, torch.nan

    def found(backend):
        out = tk.linear_divergence(
            case.hidden, case.weight, ref.hidden.detach(), ref.weight.detach(), bias=case.bias,
            ref_bias=ref.bias.detach(), mask=mask, backend=backend,
        )  # fmt: skip
        return *out[:2], *torch.autograd.grad(out.loss, case.params())

    expected = found("torch")
    monkeypatch.setattr(selection, "_capturing", lambda device: True)
    for backend in ("torch", "reference"):
        for a, b in zip(found(backend), expected, strict=True):
            assert_close(a, b, 1e-5, backend)


def run_logprobs(case, backend):
    """Log-probabilities and gradients of a sum over half of them."""
    case = case.to(torch.float32).requires_grad()
    out = tk.linear_logprobs(case.hidden, case.weight, case.targets, bias=case.bias, backend=backend).logprobs
    weights = (torch.arange(12) % 2 == 0) & case.inputs["mask"]
    return out.detach()[case.inputs["mask"]], *torch.autograd.grad(out.masked_fill(~weights, 0).sum(), case.params())
