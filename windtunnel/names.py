"""Suggest the setting that an unknown name stands for: a synonym from other tools, or the nearest spelling."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

from engine.errors import InputError

SYNONYMS: dict[str, tuple[str, ...]] = {  # words of other tools, and the settings they may stand for, likeliest first
    "tp": ("tensor_parallel_size", "tensor_parallel_sizes"),
    "tp_size": ("tensor_parallel_size", "tensor_parallel_sizes"),
    "tensor_parallel": ("tensor_parallel_size", "tensor_parallel_sizes"),
    "num_gpus": ("tensor_parallel_size",),
    "gpus": ("tensor_parallel_size",),
    "pp": ("pipeline_parallel_size",),
    "pp_size": ("pipeline_parallel_size",),
    "pipeline_parallel": ("pipeline_parallel_size",),
    "dp": ("num_replicas",),
    "replicas": ("num_replicas",),
    "gpu": ("device",),
    "gpu_type": ("device",),
    "hardware": ("device",),
    "model_name": ("model", "models"),
    "qps": ("request_rate",),
    "rps": ("request_rate",),
    "rate": ("request_rate",),
    "requests": ("num_prompts",),
    "num_requests": ("num_prompts",),
    "n": ("num_prompts",),
    "policy": ("scheduler",),
    "chunk_size": ("max_num_batched_tokens",),
    "chunked_prefill_size": ("max_num_batched_tokens",),
    "token_budget": ("max_num_batched_tokens",),
    "batch_size": ("max_num_seqs",),
    "max_batch_size": ("max_num_seqs",),
    "max_running_requests": ("max_num_seqs",),
    "context_length": ("max_model_len",),
    "max_seq_len": ("max_model_len",),
    "page_size": ("block_size",),
    "mem_fraction_static": ("gpu_memory_utilization",),
    "kv_blocks": ("num_gpu_blocks_override",),
    "dataset": ("workload",),
    "dataset_name": ("workload",),
    "dataset_path": ("trace",),
    "random_input_len": ("input_len",),
    "random_output_len": ("output_len",),
    "prompt_len": ("input_len",),
    "burstiness": ("arrival_cv",),
    "goodput": ("slo",),
    "max_new_tokens": ("max_tokens",),
    "eager": ("enforce_eager",),
    "cuda_graph_sizes": ("cudagraph_capture_sizes",),
    "backend": ("attention_backend",),
    "out": ("output_dir", "output"),
    "output": ("output_dir",),
    "result_dir": ("output_dir",),
    "price": ("gpu_price",),
}


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Return the known setting that `name` most likely stands for, or None; dashes and underscores are the same."""
    folded = {each.replace("-", "_").casefold(): each for each in known}
    word = name.replace("-", "_").casefold()
    for synonym in SYNONYMS.get(word, ()):
        if synonym in folded:
            return folded[synonym]
    near = get_close_matches(word, folded, n=1, cutoff=0.6)
    return folded[near[0]] if near else None


def unknown_setting(kind: str, name: str, known: Iterable[str]) -> InputError:
    """Return the error for an unknown setting, with the one it most likely stands for."""
    names = sorted(known)
    found = nearest(name, names)
    hint = f"did you mean {found!r}?" if found is not None else f"known are {', '.join(names)}"
    return InputError(f"unknown {kind} {name!r}: {hint}")
