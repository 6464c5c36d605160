"""Linears that compute with packed weights for a while."""

import platform

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from trapo.engines import packed_linears
from trapo.engines.packed_linears import FEWEST, LARGE, MOST, MOST_OF_LARGE, PackedLinears, pays

pytestmark = pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64") or not torch.backends.mkldnn.is_available(), reason="needs oneDNN"
)


@pytest.fixture(autouse=True)
def small_ones_too(monkeypatch):
    monkeypatch.setattr(packed_linears, "SMALL", 0)


class Block(nn.Module):
    def __init__(self, bias=True):
        super().__init__()
        self.up = nn.Linear(37, 51, bias=bias)
        self.layers = nn.Sequential(nn.Linear(51, 19, bias=bias), nn.ReLU())

    def forward(self, x):
        return self.layers(self.up(x))


@torch.no_grad()
def both(made, x):
    """(with plain weights, with packed ones, the stand-ins)."""
    packed = PackedLinears(made)
    plain = made(x)
    with packed.in_place():
        found = made(x)
    return plain, found, packed.stand_ins


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(FEWEST, 1, 37), (MOST, 37), (2, 5, 37)])
def test_products_are_those_of_the_linears(bias, shape):
    torch.manual_seed(0)
    plain, found, stand_ins = both(Block(bias), torch.randn(shape))
    torch.testing.assert_close(found, plain, atol=1e-5, rtol=1e-5)
    assert found.shape == plain.shape
    assert [s.packed is not None for s in stand_ins] == [True, True]


@pytest.mark.parametrize("rows", [1, FEWEST - 1, MOST + 1])
def test_row_counts_that_do_not_pay_are_the_linears_own_to_the_bit(rows):
    plain, found, stand_ins = both(Block(), torch.randn(rows, 37))
    assert found.equal(plain)
    assert all(s.packed is None for s in stand_ins)
    assert pays(MOST_OF_LARGE, LARGE)
    assert not pays(MOST_OF_LARGE + 1, LARGE)


def test_a_model_is_afterwards_what_it_was_even_if_a_forward_failed():
    made = Block()
    before = [dict(m.__dict__) for m in made.modules()]
    packed = PackedLinears(made)
    with packed.in_place():
        assert set(made.state_dict()) == {"up.weight", "up.bias", "layers.0.weight", "layers.0.bias"}
        assert isinstance(made.up, nn.Linear)
        assert [m.__dict__ for m in made.modules()] != before

    def fail():
        with packed.in_place():
            made(torch.randn(4, 36))

    with pytest.raises(RuntimeError):
        fail()
    assert [m.__dict__ for m in made.modules()] == before


def test_cleared_ones_are_packed_anew():
    made, x = Block(), torch.randn(4, 37)
    packed = PackedLinears(made)
    with torch.no_grad(), packed.in_place():
        made(x)
        for p in made.parameters():
            p.mul_(2)
        stale = made(x)
    packed.clear()
    with torch.no_grad(), packed.in_place():
        torch.testing.assert_close(made(x), Block.forward(made, x))
        assert not torch.allclose(made(x), stale)


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


class Adapted(nn.Linear):  # as an adapter or a quantised linear is one
    def forward(self, x):
        return super().forward(x) + 1


class Weight(torch.Tensor):  # as a quantised weight is one
    pass


def subclassed(linear):
    linear.weight = nn.Parameter(linear.weight.detach().as_subclass(Weight))


def own_forward(linear):
    linear.forward = lambda x: nn.functional.linear(x, linear.weight) * 3


@pytest.mark.parametrize(
    "touch",
    [
        pytest.param(lambda m: m.register_forward_hook(lambda module, args, output: output + 1), id="hook"),
        pytest.param(lambda m: m.register_forward_pre_hook(lambda module, args: (args[0] + 1,)), id="pre-hook"),
        pytest.param(lambda m: parametrize.register_parametrization(m, "weight", Doubled()), id="parametrisation"),
        pytest.param(lambda m: setattr(m, "__class__", Adapted), id="subclass"),
        pytest.param(subclassed, id="another tensor"),
        pytest.param(own_forward, id="own forward"),
    ],
)
def test_linears_that_somebody_has_hands_on_are_left_alone(touch):
    made = Block()
    touch(made.up)
    plain, found, stand_ins = both(made, torch.randn(4, 37))
    assert [s.linear for s in stand_ins] == [made.layers[0]]
    torch.testing.assert_close(found, plain, atol=1e-5, rtol=1e-5)


def test_nothing_is_packed_where_all_modules_are_watched():
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, output: None)
    try:
        assert both(Block(), torch.randn(4, 37))[2] == []
    finally:
        handle.remove()


def test_a_model_that_was_compiled_keeps_its_linears():
    made = Block()
    made.compile(backend="eager")
    packed = PackedLinears(made)
    with packed.in_place():
        assert packed.stand_ins == []


def test_the_largest_are_packed_within_the_bound_of_memory(monkeypatch):
    monkeypatch.setattr(packed_linears, "_memory", lambda: 51 * 37 * 4 * 8)
    made = Block()
    assert [s.linear for s in both(made, torch.randn(4, 37))[2]] == [made.up]


def test_16_bit_autocast_stays_in_16_bits_packed_where_the_cpu_has_them():
    made, x = Block(), torch.randn(4, 37)
    with torch.autocast("cpu", torch.bfloat16):
        plain, found, stand_ins = both(made, x)
    supported = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    assert [(s.dtype, s.packed is not None) for s in stand_ins] == [(torch.bfloat16, True)] * (2 * supported)
    assert plain.dtype is found.dtype is torch.bfloat16
    torch.testing.assert_close(found, plain, atol=2e-2, rtol=2e-2)


def test_a_part_of_a_forward_that_leaves_autocast_is_computed_as_ever():
    made, x = Block(), torch.randn(4, 37)
    packed = PackedLinears(made)
    with packed.in_place(), torch.no_grad():  # packed in float32
        with torch.autocast("cpu", torch.bfloat16):
            assert made(x).equal(Block.forward(made, x))
            assert all(s.packed is None for s in packed.stand_ins)
        made(x)
        assert all(s.packed is not None for s in packed.stand_ins)
