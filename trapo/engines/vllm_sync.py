"""A vLLM engine takes over the learner's weights here: one class per path.

    InProcess     colocated, on a CPU or a GPU: tensors are handed to the worker, which repacks them
    SharedFolder  `vllm serve` on any device: a safetensors file in a folder that both sides see
    Transfer      `vllm serve` on GPUs: vLLM's own weight transfer, by NCCL or by CUDA IPC

Whatever the path, three things must hold afterwards, or the engine silently generates with something else:

1. weights go through `reload_weights`, not `load_weights`: a CPU worker has packed its linear layers and dropped the
   originals, and a quantised model is repacked likewise;
2. an output head that is tied to the embedding is packed anew: a CPU worker keeps a packed copy that no reload touches;
3. cached prefixes are dropped: their keys and values are the old weights'.

`trapo.engines.guard` checks that they did. `Transfer` and sleeping have been run by no GPU yet.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import distributed as dist
from torch import nn

from trapo.errors import TrapoError
from trapo.models import lora
from trapo.models.weight_file import write_weights
from trapo.models.weights import full_weights
from trapo.runs.ranks import ALONE, Ranks
from trapo.tools.files import temporary, write_folder_atomic

# What `vllm serve` is started with, so that SharedFolder finds `WorkerExtension.trapo_reload` there.
EXTENSION = "trapo.engines.vllm_sync.WorkerExtension"


class Server(Protocol):
    """Calls the control plane of a running `vllm serve` (vllm_server.py)."""

    url: str

    def post(self, path: str, body: dict[str, Any] | None = None) -> Any: ...

    def get(self, path: str) -> Any: ...


class WeightSync(Protocol):
    def __call__(self, model: nn.Module) -> None:
        """Give the engine the model's weights and drop what it has cached with the old ones."""
        ...


def reload_in_worker(
    worker: Any, weights: Iterable[tuple[str, torch.Tensor]] | None = None, path: str | None = None
) -> None:
    """Runs inside a vLLM worker: load the weights (or the checkpoint at path) and pack them for its kernels."""
    worker.reload_weights(weights_iterator=weights, weights_path=path)
    model = worker.model_runner.get_model()
    _repack_head(model)


def _repack_head(model: nn.Module) -> None:
    """Packs a head that owns its weight anew, since it was packed with it; a tied one has no weight of its own, so
    nothing was loaded to it and its packed copy (CPU) is still that of the old embedding."""
    head = getattr(model, "lm_head", None)
    method = getattr(head, "quant_method", None)
    if method is not None and hasattr(head, "cpu_linear"):
        method.process_weights_after_loading(head)


class WorkerExtension:
    """Is mixed into the workers of `vllm serve --worker-extension-cls` for SharedFolder."""

    def trapo_reload(self, path: str) -> None:
        reload_in_worker(self, path=path)


class InProcess:
    """Loads weights into an engine in this process (`vllm.LLM` without multiprocessing). sleeps: a GPU engine that may
    be asleep; it gets its weights' memory back before they come and its cache's afterwards, which keeps the peak
    down."""

    def __init__(self, llm: Any, *, sleeps: bool = False) -> None:
        self.llm, self.sleeps = llm, sleeps

    def __call__(self, model: nn.Module) -> None:
        if self.sleeps:
            self.llm.wake_up(tags=["weights"])
        self.llm.collective_rpc(reload_in_worker, args=(full_weights(model),))
        if self.sleeps:
            self.llm.wake_up(tags=["kv_cache"])
        if not self.llm.reset_prefix_cache():
            raise TrapoError("rollout.engine: vLLM did not reset its prefix cache after a weight sync")


class SharedFolder:
    """Serves a server: writes a checkpoint into `folder`, which the server must see under the same path, and has it
    loaded. The server needs VLLM_SERVER_DEV_MODE=1 and --worker-extension-cls (EXTENSION)."""

    def __init__(self, server: Server, folder: Path) -> None:
        self.server, self.folder = server, folder.resolve()

    def __call__(self, model: nn.Module) -> None:
        ranks, failed = _ranks(), list[OSError]()
        half = self.folder.with_name(f"{temporary(self.folder).name}-file")
        try:
            write_weights(model, half if ranks.first else None)  # gathering takes all ranks
        except OSError as error:
            failed.append(error)

        def move_in(path: Path) -> None:
            half.replace(path / "model.safetensors")

        def hand_over() -> None:
            if failed:
                raise failed[0]
            write_folder_atomic(self.folder, move_in)
            body = {"method": "trapo_reload", "kwargs": {"path": str(self.folder)}}
            self.server.post("/collective_rpc", body)
            _reset_prefix_cache(self.server)

        ranks.once(hand_over)  # none may ask for tokens before, and a failure is everyone's


class Transfer:
    """Serves a server on GPUs: vLLM's weight-transfer API (`--weight-transfer-config '{"backend": "nccl"}'` or "ipc").

    nccl: from this GPU to the server's, which are others. ipc: the server uses this very GPU; it needs
    VLLM_ALLOW_INSECURE_SERIALIZATION=1. NO GPU HAS RUN THIS: only its imports and arguments are tested.
    """

    def __init__(self, server: Server, model: nn.Module, backend: str) -> None:
        from vllm.distributed.weight_transfer import clients, factory

        self.server = server
        self.engine = factory.WeightTransferTrainerFactory.trainer_init(
            self._init_info(server, backend, _ranks().rank),
            client=clients.HTTPVLLMWeightSyncClient(server.url),
            source=_source(model),
        )

    @staticmethod
    def _init_info(server: Server, backend: str, rank: int) -> Any:
        if backend == "ipc":
            from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo

            return IPCTrainerInitInfo(rank=rank, packed=True)
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo
        from vllm.utils.network_utils import get_ip, get_open_port

        workers = (server.get("/get_world_size") or {}).get("world_size")
        if not isinstance(workers, int):
            raise TrapoError(f"rollout.server_url: {server.url} does not say how many workers it has")
        return NCCLTrainerInitInfo(
            rank=rank, master_address=get_ip(), master_port=get_open_port(), world_size=workers + 1
        )

    def __call__(self, model: nn.Module) -> None:
        self.engine.send_weights()
        _ranks().once(lambda: _reset_prefix_cache(self.server))  # none may ask for tokens before


def _source(model: nn.Module) -> Any:
    """Returns `full_weights` as vLLM's WeightSource: shapes are known without gathering anything."""
    from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource

    class Weights(WeightSource):
        def metadata(self) -> list[Any]:
            plain = ((lora.plain_name(name), p) for name, p in model.named_parameters())
            return [ParamMeta(name, p.dtype, tuple(p.shape)) for name, p in plain if name is not None]

        def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
            return full_weights(model)

    return Weights()


def _ranks() -> Ranks:
    return Ranks(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else ALONE


def _reset_prefix_cache(server: Server) -> None:
    answer = server.post("/reset_prefix_cache")
    if not isinstance(answer, dict) or not answer.get("success"):
        raise TrapoError(
            f"rollout.server_url: {server.url} did not reset its prefix cache after a weight sync; is someone else "
            "using this server?"
        )
