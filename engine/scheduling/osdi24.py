"""How the engine of the Sarathi-Serve paper (OSDI 2024) counted tokens and preempted, for simulated runs.

Two options of a SchedulerSpec, both off but in the preset `sarathi-osdi24`; a run without them never comes here:

- `late_first_token`: after a prompt's last chunk the first token comes an iteration later. What that engine recorded
  as the TTFT ends at the prompt's completion, and the wait from there to the first token is in no metric. A request
  runs one iteration more here, and the first of its `token_times` is the end of its prompt.
- `preempt_for_every_decode`: each decode asks for a free KV block, whether its own last one is full or not, and where
  there is none somebody is preempted.
"""

from __future__ import annotations

from engine.errors import InputError
from engine.scheduling.request import Request
from engine.scheduling.scheduler import Scheduler


class Osdi24Scheduler(Scheduler):
    """A scheduler that counts as that engine did, as far as its spec's options say."""

    def check(self, request: Request) -> None:
        super().check(request)
        kv_cache = self.kv_cache
        room = kv_cache.num_blocks - kv_cache.watermark_blocks
        if kv_cache.blocks_for(request.max_total_tokens) + self.spec.preempt_for_every_decode > room:
            raise InputError(
                f"request {request.id} of {request.max_total_tokens} tokens fills all {room} KV blocks of "
                f"{kv_cache.block_size}, and this engine needs one more to go on: raise --gpu-memory-utilization or "
                f"--num-gpu-blocks-override, or drop the request"
            )

    def add(self, request: Request) -> None:
        super().add(request)
        if self.spec.late_first_token:
            request.late_first_token = True
            request.max_total_tokens += 1

    def rounds(self, spare: int = 0) -> int:
        if not self.spec.preempt_for_every_decode:
            return super().rounds(spare)
        return super().rounds(spare + 1) if self.kv_cache.num_free > spare else 1  # one has to stay free

    def take_decodes(self) -> list[Request]:
        free = self.kv_cache.num_free
        if not self.spec.preempt_for_every_decode or free > len(self._full):
            return super().take_decodes()
        taken: list[Request] = []
        for request in [r for r in self.decoding if not r.num_in_flight_tokens]:
            if request.row is None:  # preempted for one before it
                continue
            while not self.kv_cache.num_free:
                victim = self.policy.victim([r for r in self.running if not r.num_in_flight_tokens])
                self.preempt(victim)
                if victim is request:
                    break
            else:
                if request in self._full:
                    self.kv_cache.grow(request)
                    del self._full[request]
                taken.append(request)
        return taken
