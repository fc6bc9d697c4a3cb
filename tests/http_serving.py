"""A server of this package in a thread of the test's process."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from engine.results.recorder import Recorder
from engine.scheduling.request import BatchShape
from engine.server.app import Server
from engine.server.live import Backend
from engine.server.requests import Limits
from engine.server.run import HttpServer
from engine.server.text import BytesRule, TextCodec
from engine.specs import SchedulerSpec
from simulator.cluster import Deployment, deploy
from simulator.live import LiveCluster
from simulator.predictor.base import RuntimePredictor

MODEL = "microsoft/phi-2"


class Steady(RuntimePredictor):
    """A batch takes as long as it is told."""

    def __init__(self, seconds: float = 0.002) -> None:
        self.seconds = seconds

    def stage_time(self, shape: BatchShape, stage: int) -> float:
        return self.seconds


def deployment(seconds: float = 0.002, **scheduler: object) -> Deployment:
    """phi-2 with a few KV blocks and batches of `seconds`."""
    settings = {"policy": "vllm", "max_num_seqs": 64, "max_num_batched_tokens": 512, "max_model_len": 512} | scheduler
    made = deploy(MODEL, "a100", scheduler=SchedulerSpec(**settings), num_gpu_blocks_override=400)  # type: ignore[arg-type]
    return replace(made, predictor=Steady(seconds))


class Running:
    """A server that runs, and what a test asks it."""

    def __init__(self, server: Server, http: HttpServer, recorder: Recorder | None) -> None:
        self.server, self.http, self.recorder = server, http, recorder
        self.url = "http://{}:{}".format(*http.address)


@contextmanager
def running(
    backend: Backend,
    *,
    codec: TextCodec | None = None,
    limits: Limits | None = None,
    recorder: Recorder | None = None,
    max_queue: int = 4096,
    api_key: str | None = None,
) -> Iterator[Running]:
    """Serve a backend until the end of the block."""
    codec = codec or BytesRule()
    limits = limits or Limits(
        models=(MODEL,), max_model_len=512, simulated=True, draw_length=lambda given, _: given or 7
    )
    server = Server(backend, codec, limits, max_queue=max_queue, api_key=api_key)
    http = HttpServer(server.app(), "127.0.0.1", 0)
    ready = threading.Event()
    thread = threading.Thread(target=http.run, args=(ready.set,), daemon=True)
    thread.start()
    assert ready.wait(30)
    try:
        yield Running(server, http, recorder)
    finally:
        http.stop()
        thread.join(30)
        assert not thread.is_alive()


@contextmanager
def simulated(
    kinds: list[Deployment], *, max_queue: int = 4096, api_key: str | None = None, time_scale: float = 1.0
) -> Iterator[Running]:
    """Serve simulated replicas."""
    recorder = Recorder()
    cluster = LiveCluster(kinds, recorder, token=BytesRule().filler, time_scale=time_scale)
    with running(cluster, recorder=recorder, max_queue=max_queue, api_key=api_key) as served:
        yield served
    cluster.close()
    recorder.close()
