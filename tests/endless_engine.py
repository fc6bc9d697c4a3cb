"""An engine that serves until it is ended from outside; a script that tests run: FOLDER TP PP [EXECUTOR].

Prints the word "serving" when the first requests are finished. Its process has no torch, as that of `windtunnel bench`.
"""

import sys
from pathlib import Path

from engine.executors.start import start
from engine.results.recorder import Recorder
from engine.runtime.driver import Driver
from engine.runtime.engine_spec import EngineSpec
from engine.runtime.sequences import Sequence
from engine.scheduling.policies import resolve
from engine.scheduling.request import Request
from engine.scheduling.scheduler import Scheduler
from engine.specs import ParallelSpec, SchedulerSpec, hf_config


def main(folder: str, tp: int, pp: int, executor_name: str = "multiprocess") -> None:
    spec = EngineSpec(
        model=hf_config.read(Path(folder)).in_dtype("float32"),
        folder=Path(folder),
        device="cpu",
        max_num_seqs=4,
        max_model_len=64,
        max_batch_tokens=64,
        block_size=4,
        num_blocks=64,
        attention_backend="sdpa",
        parallel=ParallelSpec(tensor_parallel_size=tp, pipeline_parallel_size=pp),
    )
    scheduler_spec = resolve(
        SchedulerSpec(max_num_batched_tokens=64, max_num_seqs=4, max_model_len=64, block_size=4), 64
    )
    executor = start(spec, executor_name)
    try:
        while True:
            scheduler = Scheduler(scheduler_spec, executor.num_blocks, max_in_flight=pp)
            sequences = [Sequence(Request(i, 0.0, 16, 16), range(16)) for i in range(8)]
            Driver(scheduler, executor, Recorder(predicted=False)).run(sequences)
            print("serving", flush=True)
    finally:
        executor.close()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:])
