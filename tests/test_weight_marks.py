"""A mark of weights changes with them, whoever changes them and however."""

import pytest
import torch
from torch import nn

from trapo.engines.weight_marks import mark


def model():
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(64, 96), nn.BatchNorm1d(96), nn.Linear(96, 4, bias=False))
    made.register_buffer("table", torch.zeros(3), persistent=False)
    return made


def test_it_is_the_same_while_nothing_changes():
    made = model()
    before = mark(made)
    made.eval()(torch.randn(3, 64))
    made.train()
    made.table.add_(1)  # no weight: no checkpoint holds it
    assert mark(made) == before


def by_optimizer(kind, **settings):
    def change(made):
        optimizer = kind(made.parameters(), lr=1e-3, **settings)
        made.eval()(torch.randn(3, 64)).sum().backward()
        optimizer.step()

    return change


def by_a_new_parameter(made):
    made[0].weight = nn.Parameter(made[0].weight.detach().clone())


def by_new_data(made):
    made[0].weight.data = made[0].weight.data * 1.5


@torch.no_grad()
def in_place(made):
    made[0].weight[17, 5] += 1


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(by_optimizer(torch.optim.AdamW, fused=True), id="fused"),
        pytest.param(by_optimizer(torch.optim.AdamW, foreach=True), id="foreach"),
        pytest.param(by_optimizer(torch.optim.AdamW, foreach=False), id="loop"),
        pytest.param(by_optimizer(torch.optim.SGD), id="SGD"),
        pytest.param(in_place, id="one element"),
        pytest.param(lambda made: made[1].running_mean.add_(1), id="a saved buffer"),
        pytest.param(by_a_new_parameter, id="another parameter"),
        pytest.param(by_new_data, id="other data"),
        pytest.param(lambda made: made[0].weight.data.mul_(1.5), id="written through .data"),
        pytest.param(lambda made: made.load_state_dict({k: v + 1 for k, v in made.state_dict().items()}), id="loaded"),
    ],
)
def test_it_changes_with_a_weight(change):
    made = model()
    before = mark(made)
    change(made)
    assert mark(made) != before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int8])
def test_weights_of_few_bits_have_one(dtype):
    made = nn.Module()
    made.weight = nn.Parameter(torch.ones(40, 30).to(dtype), requires_grad=False)
    before = mark(made)
    assert mark(made) == before
    made.weight.data.view(torch.uint8).fill_(3)
    assert mark(made) != before


def test_a_weight_that_is_nan_is_still_the_same_weight():
    made = nn.Linear(4, 4)
    made.weight.data.fill_(float("nan"))
    assert mark(made) == mark(made)
    assert mark(nn.Module()) == mark(nn.Module())
