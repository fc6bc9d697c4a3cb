"""What listens, and to whom: on one machine nothing of the engine's is reached from another."""

import contextlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from listening import LOOPBACK, descendants, listening

from engine.errors import InputError
from engine.executors.multiprocess import free_port
from engine.executors.start import start
from engine.runtime.engine_spec import EngineSpec
from engine.runtime.network import LOCALHOST, address_of, interface_of
from engine.server.run import HttpServer
from engine.specs import ModelSpec, ParallelSpec, hf_config

CONFIG = """{"model_type": "llama", "vocab_size": 100, "hidden_size": 32, "intermediate_size": 64,
 "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelSpec:
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "config.json").write_text(CONFIG)
    return hf_config.read(folder).in_dtype("float32")


def test_ranks_of_one_machine_listen_to_no_other(model: ModelSpec) -> None:
    """Those of Ray: test_ray."""
    spec = EngineSpec(
        model=model, folder=None, device="cpu", max_num_seqs=4, max_model_len=64, max_batch_tokens=64, block_size=4,
        num_blocks=32, parallel=ParallelSpec(tensor_parallel_size=2), attention_backend="sdpa",
    )  # fmt: skip
    ours = listening([os.getpid()])
    running = start(spec, "multiprocess")
    try:
        found = listening([os.getpid(), *descendants(os.getpid())]) - ours
        assert len(found) >= 2  # the rendezvous and the ranks, at least
        assert {address for address, _ in found} <= LOOPBACK
    finally:
        running.close()


def test_the_helper_sees_what_listens_to_everybody() -> None:
    with socket.socket() as open_to_all:
        open_to_all.bind(("0.0.0.0", 0))
        open_to_all.listen()
        assert ("0.0.0.0", open_to_all.getsockname()[1]) in listening([os.getpid()])


def test_a_server_listens_where_it_is_told() -> None:
    server = HttpServer(None, LOCALHOST, 0)
    assert server.address in listening([os.getpid()])
    with pytest.raises(InputError, match=f"{LOCALHOST}:{server.address[1]} .*another --host or --port"):
        HttpServer(None, *server.address)
    server.socket.close()


def test_an_interface_has_an_address_and_back() -> None:
    assert address_of("lo") == LOCALHOST
    assert interface_of(LOCALHOST) == "lo"
    assert interface_of("203.0.113.1") is None  # nobody's: kept for documentation
    with pytest.raises(InputError, match=r"distributed_interface 'eth99'.*lo"):
        address_of("eth99")


RANKS = """
import json, os, sys
import torch.distributed as dist
from engine.worker.rank import leave, meet
from listening import listening
child = os.fork()
for place in sys.argv[1:]:
    address, port, interface = place.split(",")
    meet("gloo", f"tcp://{address}:{port}", int(child == 0), 2, interface)
    dist.barrier()
    os.write(1, (json.dumps([interface, sorted(listening([os.getpid()]))]) + os.linesep).encode())
    dist.barrier()
    leave()
    del os.environ["GLOO_SOCKET_IFNAME"]
if child:
    os.waitpid(child, 0)
"""


def other_interfaces() -> list[str]:
    """Return the names of this machine's interfaces with an address, but the loopback."""
    found = []
    for _, name in socket.if_nameindex():
        with contextlib.suppress(InputError):
            found += [name] * (address_of(name) != LOCALHOST)
    return found


def test_ranks_of_several_machines_listen_on_the_named_interface() -> None:
    """Two addresses of one machine stand in for two machines: 127.0.0.2, and that of its network, if it has one."""
    places = [("127.0.0.2", free_port(), "lo"), *((address_of(name), free_port(), name) for name in other_interfaces())]
    environment = {name: value for name, value in os.environ.items() if not name.endswith("SOCKET_IFNAME")}
    folders = os.pathsep.join(map(str, (Path(__file__).parents[1], Path(__file__).parent)))
    found = subprocess.run(
        [sys.executable, "-c", RANKS, *(",".join(map(str, place)) for place in places)], capture_output=True, text=True,
        timeout=120, env={**environment, "PYTHONPATH": folders, "OMP_NUM_THREADS": "1"}, check=True,
    )  # fmt: skip
    said = [json.loads(line) for line in found.stdout.splitlines()]
    for address, port, interface in places:
        ranks = [{(at, number) for at, number in listened} for name, listened in said if name == interface]
        assert len(ranks) == 2 and all(ranks), found.stderr
        assert sum((address, port) in each for each in ranks) == 1  # the rendezvous, where it was told
        assert {at for each in ranks for at, number in each if number != port} == {address_of(interface)}  # Gloo
