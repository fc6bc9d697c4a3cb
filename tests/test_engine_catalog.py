"""The catalog: published sizes, look-ups by name and file, and what a wrong name or file is told."""

import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import yaml
from device_files import DEVICE_YAML

from engine.errors import InputError
from engine.replica_spec import resolve
from engine.specs import DeviceSpec, Link, catalog

# The count that each model's repository publishes, except those worked out by hand. falcon-180B, whose LM head is tied:
# 80 * (2 * 14848^2 + 2 * 14848 * 512 + 8 * 14848^2 + 4 * 14848) + 65024 * 14848 + 2 * 14848. internlm-20b:
# 60 * (4 * 5120^2 + 3 * 5120 * 13824 + 2 * 5120) + 2 * 103168 * 5120 + 5120. Gemma 3 from 4B on: the text decoder.
PARAMETERS = {
    "mistralai/Mistral-7B-v0.1": 7_241_732_096,
    "mistralai/Mistral-7B-Instruct-v0.3": 7_248_023_552,
    "mistralai/Mistral-Nemo-Instruct-2407": 12_247_782_400,
    "mistralai/Mistral-Small-Instruct-2409": 22_247_282_688,
    "mistralai/Mistral-Small-24B-Instruct-2501": 23_572_403_200,
    "mistralai/Mixtral-8x7B-v0.1": 46_702_792_704,
    "mistralai/Mixtral-8x22B-v0.1": 140_620_634_112,
    "mistralai/Mixtral-8x22B-Instruct-v0.1": 140_630_071_296,
    "01-ai/Yi-34B": 34_388_917_248,
    "01-ai/Yi-34B-200K": 34_388_917_248,
    "meta-llama/Llama-2-7b-hf": 6_738_415_616,
    "meta-llama/Llama-2-13b-hf": 13_015_864_320,
    "meta-llama/Llama-2-70b-hf": 68_976_648_192,
    "meta-llama/Meta-Llama-3-8B": 8_030_261_248,
    "meta-llama/Llama-3.1-8B-Instruct": 8_030_261_248,
    "meta-llama/Llama-3.1-405B": 405_853_388_800,
    "meta-llama/Llama-3.2-1B": 1_235_814_400,
    "meta-llama/Llama-3.2-3B": 3_212_749_824,
    "meta-llama/Llama-3.3-70B-Instruct": 70_553_706_496,
    "codellama/CodeLlama-34b-Instruct-hf": 33_743_970_304,
    "tiiuae/falcon-180B": 178_557_088_768,
    "Qwen/Qwen-72B": 72_287_920_128,
    "Qwen/Qwen2.5-0.5B": 494_032_768,
    "Qwen/Qwen2.5-1.5B": 1_543_714_304,
    "Qwen/Qwen2.5-3B": 3_085_938_688,
    "Qwen/Qwen2.5-7B": 7_615_616_512,
    "Qwen/Qwen2.5-14B": 14_770_033_664,
    "Qwen/Qwen2.5-32B": 32_763_876_352,
    "Qwen/Qwen2.5-72B": 72_706_203_648,
    "Qwen/Qwen3-0.6B": 596_049_920,
    "Qwen/Qwen3-1.7B": 1_720_574_976,
    "Qwen/Qwen3-4B": 4_022_468_096,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "Qwen/Qwen3-14B": 14_768_307_200,
    "Qwen/Qwen3-32B": 32_762_123_264,
    "Qwen/Qwen3-30B-A3B": 30_532_122_624,
    "Qwen/Qwen3-235B-A22B": 235_093_634_560,
    "internlm/internlm-20b": 20_088_714_240,
    "microsoft/phi-2": 2_779_683_840,
    "microsoft/Phi-3-mini-4k-instruct": 3_821_079_552,
    "microsoft/Phi-3-medium-4k-instruct": 13_960_238_080,
    "microsoft/phi-4": 14_659_507_200,
    "microsoft/Phi-4-mini-instruct": 3_836_021_760,
    "google/gemma-2-2b": 2_614_341_888,
    "google/gemma-2-9b": 9_241_705_984,
    "google/gemma-2-27b": 27_227_128_320,
    "google/gemma-3-1b-it": 999_885_952,
    "google/gemma-3-4b-it": 3_880_263_168,
    "google/gemma-3-12b-it": 11_766_034_176,
    "google/gemma-3-27b-it": 27_009_346_304,
    "openai/gpt-oss-120b": 116_829_156_672,
    "openai/gpt-oss-20b": 20_914_757_184,
}


def test_every_model_has_its_published_size() -> None:
    every = {name: model.num_parameters for name, model in catalog.MODELS.items()}
    assert {name: every[name] for name in PARAMETERS} == PARAMETERS
    assert set(every.values()) == {*PARAMETERS.values()}  # those left out are other releases of the same shapes


def test_models_of_the_catalog_are_as_their_configs_have_them() -> None:
    oss, qwen = catalog.model("gpt-oss-120b"), catalog.model("Qwen3-30B-A3B-FP8")
    assert (oss.expert_dtype, oss.linear_dtype, oss.sliding_window) == ("mxfp4", None, 128)
    assert (qwen.linear_dtype, qwen.quantization) == ("fp8_block", "fp8_block")
    assert catalog.model("Qwen3-30B-A3B") == replace(qwen, name="Qwen/Qwen3-30B-A3B", linear_dtype=None)
    scaling = catalog.model("Llama-3.1-8B").rope_scaling
    assert scaling is not None and (scaling.kind, scaling.factor) == ("llama3", 8.0)
    gemma = catalog.model("gemma-3-27b-it")
    assert (gemma.norms_per_layer, gemma.qk_norm, len(gemma.full_attention_layers)) == (4, True, 10)


def test_a_near_miss_names_the_nearest_and_no_list() -> None:
    with pytest.raises(InputError) as error:
        catalog.model("Qwen3-30B-A3")
    assert str(error.value).startswith("unknown model 'Qwen3-30B-A3': did you mean 'Qwen3-30B-A3B'?")
    assert "Llama" not in str(error.value)
    with pytest.raises(InputError, match=r"unknown device 'b201': did you mean 'b200'\?$"):
        catalog.device("b201")


def test_models_with_latent_attention_are_refused_by_name() -> None:
    for name in ("deepseek-ai/DeepSeek-V3", "DeepSeek-R1-0528", "moonshotai/Kimi-K2-Instruct"):
        with pytest.raises(InputError, match=f"{name} has multi-head latent attention"):
            catalog.model(name)
    with pytest.raises(InputError, match="unknown model"):  # a Llama
        catalog.model("DeepSeek-R1-Distill-Llama-8B")


def test_a_name_of_several_cards_says_which_is_meant() -> None:
    said = catalog.which_card("a100")
    assert "a100_pcie (NVIDIA A100 80GB PCIe, on pairwise_nvlink)" in said and "a100_sxm" in said
    assert said in resolve("phi-2", "a100").notes()
    assert catalog.which_card("a100_sxm") == "" and resolve("phi-2", "a100_sxm").notes() == []
    assert resolve("phi-2", "a100") == resolve("phi-2", "a100_pcie")


def test_kv_bytes_per_token_by_hand() -> None:
    assert catalog.model("Mistral-7B-v0.1").kv_bytes_per_token == 131072  # 32 layers * 2 * 8 * 128 * 2 bytes
    assert catalog.model("Yi-34B").kv_bytes_per_token == 245760
    assert catalog.model("Llama-2-70b-hf").kv_bytes_per_token == 327680
    assert catalog.model("falcon-180B").kv_bytes_per_token == 163840
    assert catalog.model("Qwen-72B").kv_bytes_per_token == 2621440  # no grouped queries
    assert catalog.model("Qwen2.5-7B").kv_bytes_per_token == 57344


def test_names_ignore_case_and_organisation() -> None:
    assert catalog.model("mistral-7b-V0.1") is catalog.model("mistralai/Mistral-7B-v0.1")
    assert catalog.model("mistralai/Mistral-7B-v0.1").sliding_window == 4096
    assert catalog.model("Mistral-7B-Instruct-v0.3").sliding_window is None
    assert catalog.device("A100") is catalog.device("a100_pcie")
    assert catalog.host_overhead("Eager").name == "eager"


@pytest.mark.parametrize(
    ("look_up", "wrong", "near"),
    [
        (catalog.model, "mistralai/Mistral-7B-v1", "mistralai/Mistral-7B-v0.1"),
        (catalog.device, "a100_sxm4", "a100_sxm"),
        (catalog.network, "nvswich_a100", "nvswitch_a100"),
        (catalog.host_overhead, "cuda_graph", "cuda_graphs"),
    ],
)
def test_an_unknown_name_gets_the_nearest(look_up, wrong: str, near: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(InputError, match=f"unknown .*did you mean '{near}'"):
        look_up(wrong)


def test_every_device_has_a_network_and_says_where_its_numbers_come_from() -> None:
    assert len(catalog.DEVICES) >= 7
    for device in catalog.DEVICES.values():
        assert catalog.network(device.network).name == device.network
        assert device.source and device.description
    assert all(network.source for network in catalog.NETWORKS.values())
    assert all(overhead.source for overhead in catalog.HOST_OVERHEADS.values())


def test_peaks_are_the_data_sheets() -> None:
    sheet = {
        "a100_pcie": (312e12, 1.935e12, 80e9),
        "a100_sxm": (312e12, 2.039e12, 80e9),
        "a40": (149.7e12, 0.696e12, 48e9),
        "h100": (989e12, 3.35e12, 80e9),
        "h200": (989e12, 4.8e12, 141e9),
        "l4": (121e12, 0.3e12, 24e9),
        "b200": (2250e12, 8e12, 192e9),
        "h20": (148e12, 4e12, 96 * 2**30),
        "rtx_pro_6000": (500e12, 1.597e12, 96 * 2**30),
        "mi300x": (1307.4e12, 5.3e12, 192 * 2**30),
    }
    for name, (flops, bandwidth, capacity) in sheet.items():
        device = catalog.device(name)
        assert (device.peak_flops, device.memory_bandwidth) == (flops, bandwidth)
        assert device.memory_bytes == pytest.approx(capacity, rel=0.07)  # of CUDA's total: ECC and firmware take some


def test_links_attain_no_more_than_the_data_sheets() -> None:
    peaks = {"nvswitch_a100": 300e9, "nvswitch_h100": 450e9, "pairwise_nvlink": 32e9, "pcie": 32e9}
    for name, peak in peaks.items():
        assert 0.5 * peak < catalog.network(name).node.bandwidth_bytes_per_s < peak
    pair = catalog.network("pairwise_nvlink").pair
    assert pair is not None and 0.5 * 300e9 < pair.bandwidth_bytes_per_s < 300e9


def test_the_network_between_nodes_is_chosen_apart() -> None:
    plain, other = catalog.network("pairwise_nvlink"), catalog.network("pairwise_nvlink", internode="InfiniBand_200g")
    assert plain.internode == catalog.INTERNODES["ethernet_100g"][0]
    assert other.internode == catalog.INTERNODES["infiniband_200g"][0]
    assert (other.pair, other.node, other.name) == (plain.pair, plain.node, "pairwise_nvlink+infiniband_200g")
    with pytest.raises(InputError, match="did you mean 'ethernet_100g'"):
        catalog.network("pcie", internode="ethernet")


def test_a_model_of_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "config.json").write_text(
        json.dumps({
            "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
            "num_hidden_layers": 32, "num_key_value_heads": 8, "vocab_size": 128256,
            "max_position_embeddings": 8192, "rope_theta": 500000.0, "rms_norm_eps": 1e-5,
        })
    )  # fmt: skip
    assert catalog.model(str(folder)) == replace(catalog.model("Meta-Llama-3-8B"), name="mine")
    with pytest.raises(InputError, match="can't read"):
        catalog.model(str(tmp_path / "absent"))


def test_a_device_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "my_card.yaml"
    path.write_text(DEVICE_YAML)
    device = catalog.device(str(path))
    assert (device.name, device.peak_flops, device.memory_bytes) == ("my_card", 3.12e14, 48_000_000_000)
    assert isinstance(device.memory_bytes, int) and isinstance(device.peak_flops, float)
    path.write_text(yaml.safe_dump(asdict(catalog.device("h100"))))
    assert catalog.device(str(path)) == catalog.device("h100")


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("peak_flops:", "peek_flops:", r"unknown key in .*card\.yaml 'peek_flops': did you mean 'peak_flops'"),
        ("network: pcie", "", r"card\.yaml: the key 'network' is missing"),
        ("312e12", "fast", r"card\.yaml: peak_flops: 'fast': give a number"),
        ("312e12", "-1", r"card\.yaml: DeviceSpec peak_flops=-1\.0: give a number above 0"),
        ("0.7", "1.7", r"matmul_efficiency=1\.7: give a share between 0 and 1"),
        ("48e9", "48.5", r"memory_bytes=48\.5: give a whole number"),
        ("description: a card of mine", "- a", "is not YAML"),
    ],
)
def test_a_wrong_device_file_says_which_key(tmp_path: Path, old: str, new: str, said: str) -> None:
    assert old in DEVICE_YAML
    path = tmp_path / "card.yaml"
    path.write_text(DEVICE_YAML.replace(old, new))
    with pytest.raises(InputError, match=said):
        catalog.device(str(path))


def test_a_device_file_that_is_no_mapping_or_not_there(tmp_path: Path) -> None:
    path = tmp_path / "card.yaml"
    with pytest.raises(InputError, match="can't read"):
        catalog.device(str(path))
    path.write_text("3")
    with pytest.raises(InputError, match="holds 3: give the keys name, description, peak_flops"):
        catalog.device(str(path))


def test_a_device_of_a_calibrations_folder(tmp_path: Path) -> None:
    card = catalog.device("h100")
    (tmp_path / catalog.DEVICE_FILE).write_text(json.dumps({**asdict(card), "name": "mine", "calibration": None}))
    assert catalog.device(str(tmp_path)) == replace(card, name="mine", calibration=str(tmp_path.resolve()))
    with pytest.raises(InputError, match=r"is no calibration .*calibrate fit"):
        catalog.device(str(tmp_path.parent))


def test_a_network_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "lab.yaml"
    path.write_text(yaml.safe_dump(asdict(catalog.network("pairwise_nvlink"))))
    assert catalog.network(str(path)) == catalog.network("pairwise_nvlink")
    body = asdict(catalog.network("pcie"))
    del body["pair"]
    path.write_text(yaml.safe_dump(body))
    assert catalog.network(str(path), internode="infiniband_200g").internode == Link(5e-6, 22e9)
    path.write_text(yaml.safe_dump(body | {"node": {"latency_s": 0, "bandwidth": 1e9}}))
    with pytest.raises(InputError, match=r"lab\.yaml: node 'bandwidth': did you mean 'bandwidth_bytes_per_s'"):
        catalog.network(str(path))


def test_importing_the_catalog_is_light() -> None:
    heavy = "{'yaml', 'torch', 'pandas', 'numpy', 'pydantic'}"
    code = f"import sys, engine.specs.catalog; print(sorted({heavy} & set(sys.modules)))"
    seen = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path.cwd())
    assert seen.stdout.strip() == "[]"


def test_device_specs_are_frozen() -> None:
    device = catalog.device("h100")
    assert isinstance(device, DeviceSpec)
    with pytest.raises(AttributeError):
        device.peak_flops = 1.0  # type: ignore[misc]
