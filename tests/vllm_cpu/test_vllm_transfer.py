"""The GPU paths of weight sync, as far as a CPU can tell: what they call exists in vLLM and takes these arguments."""

import inspect

import pytest
from engine_checks import load

from trapo.engines.vllm_sync import InProcess, Transfer, _source
from trapo.models.weights import full_weights


class Replies:
    url = "http://127.0.0.1:1"

    def get(self, path):
        assert path == "/get_world_size"
        return {"world_size": 2}


def test_ipc_and_nccl_are_set_up_with_vllms_own_records():
    ipc = Transfer._init_info(Replies(), "ipc", 0)
    assert (ipc.backend, ipc.is_sender, ipc.packed) == ("ipc", True, True)
    nccl = Transfer._init_info(Replies(), "nccl", 1)
    assert (nccl.backend, nccl.is_sender, nccl.world_size) == ("nccl", False, 3)  # the learner and the server's two
    assert 0 < nccl.master_port < 65536


def test_what_the_learner_declares_is_what_it_sends(vllm_model_path):
    model = load(vllm_model_path)
    source = _source(model)
    declared = [(m.name, m.dtype, m.shape) for m in source.metadata()]
    assert declared == [(name, weight.dtype, tuple(weight.shape)) for name, weight in source]
    assert declared == [(name, weight.dtype, tuple(weight.shape)) for name, weight in source]  # every round anew
    assert {name for name, _, _ in declared} == {name for name, _ in full_weights(model)}


def test_the_trainer_engines_take_these_arguments():
    from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory

    assert {"init_info", "client", "source"} <= inspect.signature(
        WeightTransferTrainerFactory.trainer_init
    ).parameters.keys()
    for backend in ("ipc", "nccl"):
        engine = WeightTransferTrainerFactory._registry[backend]()
        assert list(inspect.signature(engine.send_weights).parameters) == ["self"]


def test_a_sleeping_engine_gets_memory_for_weights_then_the_weights_then_memory_for_its_cache(vllm_model_path):
    from vllm import LLM, EngineArgs

    calls = []

    class Recorder:
        def wake_up(self, tags=None):
            calls.append(("wake_up", tags))

        def collective_rpc(self, method, args=()):
            calls.append(("reload", len(list(args[0]))))

        def reset_prefix_cache(self):
            calls.append(("reset", None))
            return True

    model = load(vllm_model_path)
    InProcess(Recorder(), sleeps=True)(model)
    weights = len(list(model.named_parameters()))
    assert calls == [("wake_up", ["weights"]), ("reload", weights), ("wake_up", ["kv_cache"]), ("reset", None)]
    for name in ("wake_up", "collective_rpc", "reset_prefix_cache"):
        inspect.signature(getattr(LLM, name)).bind(None, *([] if name != "collective_rpc" else ["method"]))
    assert "level" in inspect.signature(LLM.sleep).parameters
    assert {"enable_sleep_mode", "gpu_memory_utilization"} <= inspect.signature(EngineArgs).parameters.keys()


@pytest.mark.parametrize("backend", ["ipc", "nccl"])
def test_the_servers_side_knows_the_backend(backend):
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    assert WeightTransferEngineFactory._registry[backend]()
