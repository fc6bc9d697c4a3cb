"""Call settings in error messages what their user calls them: flags on the command line, keywords in Python.

Errors raised inside speak of fields and values (`max_num_seqs 0`).
"""

from __future__ import annotations

import re

from windtunnel.settings import BenchConfig, GenerateConfig

_OF_SERVE = ("time_scale", "max_queue")  # that are no settings of a run
_NAMES = sorted(  # longest first, so that one that begins like another is found
    (name for name in {*BenchConfig.model_fields, *GenerateConfig.model_fields, *_OF_SERVE} if "_" in name),
    key=len,
    reverse=True,
)
_FIELD = re.compile(rf"(?<![\w.])(?:(?:Scheduler|Parallel)Spec )?({'|'.join(_NAMES)})\b(?!: )")
_FLAG = re.compile(r"--([a-z][a-z-]*[a-z])(?![\w-])")
_OWN_KEYWORDS = ("config", "output_dir", "tolerance")


def in_flags(message: str) -> str:
    """Return the message with settings called by their flags (`max_num_seqs 0` is `--max-num-seqs 0`)."""
    if message.startswith("unknown key"):  # in a file or in Python, where the settings' own names are right
        return message
    message = _FIELD.sub(lambda found: "--" + found[1].replace("_", "-"), message)
    message = re.sub(r"\blengths (?=')|(?<=choose )lengths ", "--workload ", message)
    return re.sub(r"(?<![\w-])arrival (?=')", "--arrival ", message)


def in_keywords(message: str) -> str:
    """Return the message with settings called by their keywords (`--max-num-seqs 0` is `max_num_seqs 0`)."""

    def keyword(flag: re.Match[str]) -> str:
        name = flag[1].replace("-", "_")
        return name if name in BenchConfig.model_fields or name in _OWN_KEYWORDS else flag[0]

    return _FLAG.sub(keyword, in_flags(message))
