"""Several ranks load a model, and write it, with the memory of little more than one copy."""

import json
import pickle
from pathlib import Path

import pytest
import torch
from rank_processes import run_ranks
from safetensors.torch import load_file, save_file
from tiny_models import tiny_llama
from transformers import AutoConfig, AutoModelForCausalLM

from trapo.errors import TrapoError
from trapo.models import handing_out, weight_file
from trapo.models.plan_around import host_memory
from trapo.models.weights import is_stored_as_it_is
from trapo.runs.ranks import ALONE, Ranks

SIZES = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8, "vocab_size": 4096}


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A model of 210 MB in float32, in a file of 16 bits, so that its memory is no file's, and its bytes. Its tokenizer
    has three words: SmolLM2's takes 30 MB in each process, which real weights would make little of."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    path = tmp_path_factory.mktemp("large")
    config = LlamaConfig(num_hidden_layers=12, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, **SIZES)
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    model.bfloat16().save_pretrained(path)
    words = Tokenizer(WordLevel({"a": 0, "b": 1, "end": 2}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="end").save_pretrained(path)
    return path, 4 * sum(p.numel() for p in model.parameters())


def peak(files, begin, end):
    """The most that all processes had together between two times."""
    events = sorted((time, rank, size) for rank, file in enumerate(files) for time, size in file["seen"])
    now, most = [0] * len(files), 0
    for time, rank, size in events:
        now[rank] = size
        if begin <= time <= end:
            most = max(most, sum(now))
    return most


@pytest.fixture(scope="module")
def four_ranks(large, tiny_model_path, tmp_path_factory):
    out = tmp_path_factory.mktemp("memory") / "model"
    run_ranks(4, "memory", tiny_model_path, large[0], out)
    return out, [json.loads(Path(f"{out}-{rank}.json").read_text()) for rank in range(4)]


def test_four_ranks_load_and_write_a_model_in_little_more_than_one_copy_of_it(large, four_ranks):
    size, (_, files) = large[1], four_ranks
    loaded = max(file["marks"]["loaded"] for file in files)
    written = max(file["marks"]["written"] for file in files)
    assert size < peak(files, 0, loaded) <= 1.3 * size
    assert size < peak(files, loaded, written) <= 1.3 * size


def test_the_plan_of_host_memory_is_what_loading_took(large, four_ranks):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(large[0]), dtype=torch.float32)
    planned = sum(host_memory(model, 4).values())
    _, files = four_ranks
    measured = peak(files, 0, max(file["marks"]["loaded"] for file in files))
    assert planned <= measured <= 1.3 * planned  # each process has something of its own, too


def test_what_four_ranks_write_is_what_they_loaded(large, four_ranks):
    found, expected = (load_file(folder / "model.safetensors") for folder in (four_ranks[0], large[0]))
    assert found.keys() == expected.keys()
    assert all(found[name].equal(value.float()) for name, value in expected.items())


def test_a_file_that_is_written_weight_by_weight_is_that_of_safetensors(tmp_path):
    class Mixed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.wide = torch.nn.Linear(3, 5, dtype=torch.float64)
            self.low = torch.nn.Linear(7, 3, dtype=torch.bfloat16)
            self.register_buffer("count", torch.tensor(3))
            self.register_buffer("not_stored", torch.ones(2), persistent=False)

    model = Mixed()
    weight_file.write_weights(model, tmp_path / "ours")
    save_file(model.state_dict(), tmp_path / "theirs", metadata={"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_a_disk_that_is_full_is_said_at_the_end_and_leaves_nothing(tmp_path):
    folder = tmp_path / "file"
    folder.write_text("not a folder")
    with pytest.raises(OSError, match=r"file"):
        weight_file.write_weights(torch.nn.Linear(2, 2), folder / "weights")
    sink = weight_file._Sink(tmp_path / "weights")
    sink.file.close()
    sink.file = open("/dev/full", "wb", buffering=0)  # noqa: SIM115
    sink.write(b"1")
    sink.write(b"2")
    with pytest.raises(OSError, match="No space left on device"):
        sink.close()
    assert not (tmp_path / "weights").exists()


def test_a_model_travels_without_its_weights_and_stays_tied(tokenizer):
    model = tiny_llama(tokenizer, hidden_size=64, intermediate_size=64, num_attention_heads=4)
    data = handing_out._without_weights(model, tokenizer)
    again, _ = handing_out._received(data)
    bare = pickle.dumps(tokenizer)
    assert len(data) < len(bare) + 50_000 < sum(p.numel() * 4 for p in model.parameters())
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert {p.device.type for p in again.parameters()} == {"meta"}
    assert again.model.rotary_emb.inv_freq.equal(model.model.rotary_emb.inv_freq)
    assert again.config.to_dict() == model.config.to_dict()


def test_a_model_that_cannot_travel_is_refused_in_one_line(tokenizer):
    model = tiny_llama(tokenizer, hidden_size=64, intermediate_size=64, num_attention_heads=4)
    model.register_forward_hook(lambda *args: None)
    with pytest.raises(TrapoError, match=r"model type llama .* cannot be sent to other ranks") as error:
        handing_out._without_weights(model, tokenizer)
    assert "\n" not in str(error.value)


def test_one_process_loads_as_ever(tokenizer):
    model = tiny_llama(tokenizer, hidden_size=64, intermediate_size=64, num_attention_heads=4)
    assert handing_out.load_over(lambda: (model, tokenizer), ALONE, "float32", torch.device("cpu"))[0] is model


@pytest.mark.parametrize("rows", [1, 3, 4, 7, 8])
def test_pieces_are_the_rows_in_order_and_equally_long(rows):
    weight = torch.arange(rows * 2.0).view(rows, 2)
    length = -(-rows // 4)
    pieces = list(handing_out._pieces(weight, length, 4))
    assert {tuple(piece.shape) for piece in pieces} == {(length, 2)}
    assert torch.cat(pieces)[:rows].equal(weight)


def test_families_whose_files_hold_other_tensors_are_left_to_transformers():
    from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 64,
             "num_attention_heads": 2, "num_key_value_heads": 2}  # fmt: skip
    with torch.device("meta"):
        assert is_stored_as_it_is(LlamaForCausalLM(LlamaConfig(**sizes)))
        assert not is_stored_as_it_is(MixtralForCausalLM(MixtralConfig(**sizes)))


def test_the_error_of_the_first_rank_is_that_of_all(monkeypatch):
    """The others do not wait for weights that never come."""

    def fail():
        raise TrapoError("model.path: no")

    monkeypatch.setattr(torch.distributed, "broadcast_object_list", lambda found, src: sent.append(found[0]))
    sent = []
    with pytest.raises(TrapoError, match=r"model.path: no"):
        handing_out.load_over(fail, Ranks(0, 2), "float32", torch.device("cpu"))
    assert [str(error) for error in sent] == ["model.path: no"]
