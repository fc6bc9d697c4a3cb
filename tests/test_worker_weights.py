"""Checkpoints into a rank's parameters: every tensor lands where it belongs, and what a damaged folder is told."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import checkpoints
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.errors import InputError
from engine.specs import ModelSpec, ParallelSpec, hf_config
from engine.worker.model import Decoder
from engine.worker.parallel import Links, Rank
from engine.worker.weights import INDEX, WHOLE, dummy, load


class NoLinks(Links):
    """For decoders that are never run."""

    def __init__(self, rank: Rank) -> None:
        self.rank = rank


def empty(spec: ModelSpec, tp: int = 1, pp: int = 1, rank: int = 0, dtype: torch.dtype = torch.float32) -> Decoder:
    place = Rank(rank, ParallelSpec(tensor_parallel_size=tp, pipeline_parallel_size=pp))
    return Decoder(spec, place, NoLinks(place), dtype, torch.device("cpu"))


def loaded(folder: Path, tp: int = 1, pp: int = 1, rank: int = 0, dtype: torch.dtype = torch.float32) -> Decoder:
    decoder = empty(hf_config.read(folder), tp, pp, rank, dtype)
    load(decoder, folder)
    return decoder


def parameters(decoder: Decoder) -> dict[str, Tensor]:
    return {name: parameter.clone() for name, parameter in decoder.named_parameters()}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Checkpoints by name, in one file each; not to be changed."""
    known: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in known:
            known[name] = tmp_path_factory.mktemp(name)
            checkpoints.write(known[name], name)
        return known[name]

    return get


@pytest.fixture
def folder(saved: Callable[[str], Path], tmp_path: Path) -> Path:
    """A llama to be damaged."""
    shutil.copytree(saved("llama"), tmp_path, dirs_exist_ok=True)
    return tmp_path


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A llama in several files, to be damaged."""
    checkpoints.write(tmp_path, "llama", max_shard_size="60kB")
    assert len(list(tmp_path.glob("*.safetensors"))) >= 4
    return tmp_path


def change(folder: Path, edit: Callable[[dict[str, Tensor]], None]) -> None:
    tensors = load_file(folder / WHOLE)
    edit(tensors)
    save_file(tensors, folder / WHOLE)


def refused(folder: Path, *messages: str) -> None:
    """Loading fails with each of `messages` said, and leaves the parameters as they were."""
    decoder = empty(hf_config.read(folder))
    dummy(decoder, 0)
    before = parameters(decoder)
    with pytest.raises(InputError) as error:
        load(decoder, folder)
    for message in messages:
        assert message in str(error.value)
    assert all(torch.equal(before[name], parameter) for name, parameter in decoder.named_parameters())


def test_a_sharded_checkpoint_gives_the_same_parameters(sharded: Path, saved: Callable[[str], Path]) -> None:
    whole, parts = parameters(loaded(saved("llama"))), parameters(loaded(sharded))
    assert len(whole) == 21
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_shards_without_an_index_are_read(sharded: Path) -> None:
    before = parameters(loaded(sharded))
    (sharded / INDEX).unlink()
    after = parameters(loaded(sharded))
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    "name", ["llama", "qwen2", "falcon_new", "falcon_multi_query", "falcon_multi_head", "phi", "mixtral", "qwen3_moe"]
)
def test_ranks_hold_each_checkpoint_number_once_and_copies_where_they_must(
    name: str, saved: Callable[[str], Path]
) -> None:
    source = load_file(saved(name) / WHOLE)
    spec = hf_config.read(saved(name))
    unique = torch.cat([tensor.flatten() for tensor in source.values()]).sort().values
    ranks = [loaded(saved(name), tp=2, rank=rank) for rank in range(2)]
    held = torch.cat([parameter.flatten() for decoder in ranks for parameter in decoder.parameters()])
    held = held[held != 0].unique()
    assert torch.equal(held, unique.unique())
    kv = spec.kv_size // 2 if spec.num_key_value_heads > 1 else spec.kv_size
    for rank, decoder in enumerate(ranks):
        weight = decoder.layers[1].qkv_proj.weight
        assert weight.shape == (spec.q_size // 2 + 2 * kv, spec.hidden_size)
        assert decoder.embedding.first == rank * 51


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_experts_in_one_tensor_are_those_of_a_tensor_each(
    name: str, saved: Callable[[str], Path], tmp_path: Path
) -> None:
    checkpoints.write(tmp_path, name, save_original_format=False)
    assert load_file(tmp_path / WHOLE)["model.layers.0.mlp.experts.gate_up_proj"].dim() == 3
    for tp, rank in ((1, 0), (2, 1)):
        one, each = (parameters(loaded(folder, tp=tp, rank=rank)) for folder in (tmp_path, saved(name)))
        assert one.keys() == each.keys()
        assert all(torch.equal(one[parameter], each[parameter]) for parameter in one)


def test_key_value_heads_that_are_fewer_than_ranks_are_copied(saved: Callable[[str], Path]) -> None:
    source = load_file(saved("llama") / WHOLE)  # 8 query heads, 2 KV heads of 8
    q, k, v = (source[f"model.layers.1.self_attn.{each}_proj.weight"] for each in "qkv")
    for rank in range(4):
        kv = slice(rank // 2 * 8, rank // 2 * 8 + 8)
        expected = torch.cat((q[rank * 16 : rank * 16 + 16], k[kv], v[kv]))
        assert torch.equal(loaded(saved("llama"), tp=4, rank=rank).layers[1].qkv_proj.weight, expected)


def test_vocabulary_that_does_not_divide_is_padded_with_zeros(saved: Callable[[str], Path]) -> None:
    source = load_file(saved("phi") / WHOLE)
    last = loaded(saved("phi"), tp=4, rank=3)  # rows 78 to 103 of 101
    for parameter, name in [
        (last.embedding.weight, "model.embed_tokens.weight"),
        (last.lm_head.weight, "lm_head.weight"),
        (last.lm_head.bias, "lm_head.bias"),
    ]:
        assert len(parameter) == 26
        assert torch.equal(parameter[:23], source[name][78:])
        assert not parameter[23:].any()


def test_a_stage_takes_its_own_layers(saved: Callable[[str], Path]) -> None:
    source = load_file(saved("llama") / WHOLE)
    first, last = (loaded(saved("llama"), pp=2, rank=rank) for rank in range(2))
    assert len(first.layers) + len(last.layers) == 3
    norm = source[f"model.layers.{len(first.layers)}.input_layernorm.weight"]
    assert torch.equal(last.layers[0].input_norm.weight, norm)
    assert first.lm_head is None
    assert first.final_norm is None
    assert last.embedding is None


def test_a_tied_head_is_the_embedding_or_a_copy_of_it(saved: Callable[[str], Path]) -> None:
    alone = loaded(saved("llama_tied"))
    assert alone.lm_head.weight is alone.embedding.weight
    first, last = (loaded(saved("llama_tied"), pp=2, rank=rank) for rank in range(2))
    assert torch.equal(last.lm_head.weight, first.embedding.weight)
    assert "lm_head.weight" not in load_file(saved("llama_tied") / WHOLE)


def test_parameters_keep_their_type(saved: Callable[[str], Path]) -> None:
    wide, narrow = loaded(saved("phi")), loaded(saved("phi"), dtype=torch.bfloat16)
    for parameter, rounded in zip(wide.parameters(), narrow.parameters(), strict=True):
        assert torch.equal(parameter.bfloat16(), rounded)
        assert rounded.dtype == torch.bfloat16
        assert not rounded.requires_grad


def test_rotary_tables_of_old_checkpoints_are_passed_over(folder: Path) -> None:
    change(folder, lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    loaded(folder)


def test_a_folder_without_safetensors(folder: Path) -> None:
    (folder / WHOLE).rename(folder / "pytorch_model.bin")
    refused(folder, f"no safetensors in {folder}", "give a Hugging Face folder with model.safetensors")


def test_missing_tensors_are_named_with_what_is_there_instead(folder: Path) -> None:
    def like_gpt(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            if "mlp" in name:
                tensors[name.replace("model.layers", "transformer.h").replace("mlp", "mlp.c")] = tensors.pop(name)

    change(folder, like_gpt)
    refused(
        folder,
        f"{folder} lacks 9 of the 30 tensors",
        "model.layers.0.mlp.gate_proj.weight, model.layers.0.mlp.up_proj.weight",
        "and 6 more. It has transformer.h.0.mlp.c.down_proj.weight, transformer.h.0.mlp.c.gate_proj.weight",
    )


def test_a_checkpoint_of_nothing_alike_shows_what_it_has(folder: Path) -> None:
    save_file({"wte": torch.ones(2), "wpe": torch.ones(2)}, folder / WHOLE)
    refused(folder, "lacks 30 of the 30 tensors", "It has wpe, wte: give all files of a checkpoint")


def test_a_shape_that_contradicts_the_config(folder: Path) -> None:
    checkpoints.edit_config(folder, intermediate_size=112)
    refused(
        folder,
        "model.layers.0.mlp.gate_proj.weight",
        "is (96, 64) but",
        "config makes it (112, 64): give the config.json that belongs to these weights",
    )


def test_tensors_that_the_config_has_no_place_for(saved: Callable[[str], Path], tmp_path: Path) -> None:
    shutil.copytree(saved("internlm"), tmp_path, dirs_exist_ok=True)
    checkpoints.edit_config(tmp_path, bias=False)
    refused(tmp_path, "has 12 tensors that", "config has no place for: model.layers.0.self_attn.", "and 9 more")


def test_layers_past_the_configs_last(folder: Path) -> None:
    checkpoints.edit_config(folder, num_hidden_layers=2)
    refused(folder, "config has no place for: model.layers.2.", "a layer left out?")


def test_a_head_of_its_own_where_the_config_ties_it(folder: Path, saved: Callable[[str], Path]) -> None:
    checkpoints.edit_config(folder, tie_word_embeddings=True)
    refused(folder, "lm_head.weight in", "differs from model.embed_tokens.weight", '"tie_word_embeddings": true')
    change(folder, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}))
    tied = loaded(folder)
    assert tied.lm_head.weight is tied.embedding.weight


def test_quantised_tensors(folder: Path) -> None:
    change(folder, lambda tensors: tensors.update({"model.norm.weight": torch.ones(64, dtype=torch.int8)}))
    refused(folder, "model.norm.weight", "is of type I8: give unquantised weights")


@pytest.mark.parametrize("left", [0, 4, 300, -1000])
def test_a_file_that_was_cut_short(folder: Path, left: int) -> None:
    whole = (folder / WHOLE).read_bytes()
    (folder / WHOLE).write_bytes(whole[:left])
    refused(folder, f"can't read {folder / WHOLE} (", "it is cut short or damaged: get it again")


def test_a_file_that_is_something_else(folder: Path) -> None:
    (folder / WHOLE).write_bytes(b"<html>" + bytes(range(256)) * 9)
    refused(folder, f"can't read {folder / WHOLE} (")


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 1}}'])
def test_a_damaged_index(sharded: Path, text: str) -> None:
    (sharded / INDEX).write_text(text, encoding="utf-8")
    refused(sharded, f"can't read {sharded / INDEX} (", "damaged, or lists no shards")


def test_a_shard_that_is_not_there(sharded: Path) -> None:
    shards = sorted(sharded.glob("*.safetensors"))
    shards[1].unlink()
    refused(sharded, f"{sharded} lacks 1 of the {len(shards)} files", f"lists: {shards[1].name}: get them")


def test_a_shard_that_was_cut_short_is_named(sharded: Path) -> None:
    shard = sorted(sharded.glob("*.safetensors"))[2]
    shard.write_bytes(shard.read_bytes()[:-1])
    refused(sharded, f"can't read {shard} (")


def test_an_index_that_lists_what_a_shard_has_not(sharded: Path) -> None:
    index = json.loads((sharded / INDEX).read_text(encoding="utf-8"))
    gone = index["weight_map"]["model.norm.weight"]
    index["weight_map"] = {name: file for name, file in index["weight_map"].items() if file != gone}
    index["weight_map"]["model.norm.weight"] = next(iter(index["weight_map"].values()))
    (sharded / INDEX).write_text(json.dumps(index), encoding="utf-8")
    refused(sharded, f"{sharded} lacks", "tensors needed of")


def test_dummy_weights_are_seeded_and_of_the_usual_size(saved: Callable[[str], Path]) -> None:
    spec = replace(hf_config.read(saved("phi")), hidden_size=128, head_dim=16)
    decoders = [empty(spec) for _ in range(3)]
    for decoder, seed in zip(decoders, (1, 1, 2), strict=True):
        dummy(decoder, seed)
    first, same, other = map(parameters, decoders)
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)
    assert len({parameter.flatten()[0].item() for parameter in first.values()}) == len(first)
    for name, parameter in first.items():
        assert parameter.std().item() == pytest.approx(0.02, rel=0.3)
        assert parameter.mean().item() == pytest.approx(float(bool(re.search(r"norm\.weight", name))), abs=0.01)


def test_dummy_weights_of_a_layer_are_the_same_on_any_stage(saved: Callable[[str], Path]) -> None:
    spec = hf_config.read(saved("llama_tied"))
    whole, last = empty(spec), empty(spec, pp=3, rank=2)
    dummy(whole, 5)
    dummy(last, 5)
    assert torch.equal(whole.layers[2].qkv_proj.weight, last.layers[0].qkv_proj.weight)
    assert torch.equal(whole.lm_head.weight, last.lm_head.weight)


def test_dummy_ranks_differ_but_share_norms(saved: Callable[[str], Path]) -> None:
    spec = hf_config.read(saved("falcon_new"))
    a, b = empty(spec, tp=2, rank=0), empty(spec, tp=2, rank=1)
    dummy(a, 5)
    dummy(b, 5)
    assert not torch.equal(a.layers[0].qkv_proj.weight, b.layers[0].qkv_proj.weight)
    assert torch.equal(a.layers[0].input_norm.weight, b.layers[0].input_norm.weight)
    assert torch.equal(a.layers[0].input_norm.bias, b.layers[0].input_norm.bias)
