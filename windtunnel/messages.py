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
_FLAG_OF_FIELD = {  # of fields inside that are called otherwise than their setting
    "think_time_s": "think-time",
    "ramp_up_s": "ramp-up",
    "turns": "turns",
    "users": "users",
    "priorities": "priorities",
    "columns": "columns",
    "tokenizer": "tokenizer",
    "seed": "seed",
}
_OTHER_FIELD = re.compile(
    rf"(?<![\w.-])({'|'.join(_FLAG_OF_FIELD)})(?= \S+(?:: give| needs| has no meaning| must)| '| must)"
)
_OVERHEAD = re.compile(r"(?<![\w.-])(?:client_)?overhead_s ([-+.\w]+)")
_FLAG = re.compile(r"--([a-z][a-z-]*[a-z])(?![\w-])")
_OWN_KEYWORDS = ("config", "output_dir", "tolerance")


def in_flags(message: str) -> str:
    """Return the message with settings called by their flags (`max_num_seqs 0` is `--max-num-seqs 0`)."""
    if message.startswith("unknown key"):  # in a file or in Python, where the settings' own names are right
        return message
    message = _FIELD.sub(lambda found: "--" + found[1].replace("_", "-"), message)
    message = _OTHER_FIELD.sub(lambda found: "--" + _FLAG_OF_FIELD[found[1]], message)
    message = re.sub(r"\b(?:Scheduler|Parallel)Spec (\w+)(?==)", r"--\1", message)
    message = message.replace("leave out workload ", "leave out --workload ")
    message = re.sub(r"(?<=needs )turns\b", "--turns", message)
    message = re.sub(r"\b(or|and) users\b", r"\1 --users", message)
    message = message.replace("(columns session=", "(--columns session=")
    message = _OVERHEAD.sub(lambda found: f"--client-overhead-ms {1e3 * float(found[1]):g}", message)
    message = re.sub(r"\blengths (?=')|(?<=choose )lengths ", "--workload ", message)
    return re.sub(r"(?<![\w-])arrival (?=')", "--arrival ", message)


def in_keywords(message: str) -> str:
    """Return the message with settings called by their keywords (`--max-num-seqs 0` is `max_num_seqs 0`)."""

    def keyword(flag: re.Match[str]) -> str:
        name = flag[1].replace("-", "_")
        return name if name in BenchConfig.model_fields or name in _OWN_KEYWORDS else flag[0]

    return _FLAG.sub(keyword, in_flags(message))
