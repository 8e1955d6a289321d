"""The runs that the tests of the cache kill, and share between two ranks: cache_run.py <folder> <port>.

All are forks of one process that has imported everything and computed nothing, so that it has no threads: an import takes seconds.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from lm import TEXTS, llama, tokenizer

from kdfast.data.teacher_cache import cache_teacher, store

OPTIONS = {"top_k": 12, "log_probs": "uint8", "batch_size": 4, "rows_per_shard": 8}
# Where a run is killed, around shard 2: the manifest is begun; before the file, half of it, after its rename; after its line; when
# all shards are there; when the manifest lists them and the lines are not yet deleted.
KILLS = ("begun", "before", "half", "file", "line", "end", "sealed")


def rows():
    """Of different lengths, with prompts in some; made without `datasets`, which takes seconds to import."""
    found = []
    for i, document in enumerate(TEXTS):
        tokens = torch.tensor([*tokenizer()(document)["input_ids"], 0][:48])
        labels = tokens.clone()
        if i % 5 == 0:
            labels[:6] = -100
        found.append({"input_ids": tokens, "labels": labels, "row_id": i})
    return found


def run(out):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the same sums in every process
    try:
        return cache_teacher(llama(), rows(), out, tokenizer=tokenizer(), **OPTIONS)
    finally:
        torch.set_num_threads(threads)


def die(when: str) -> None:
    """Makes this process kill itself at one of KILLS."""
    kill = lambda: os.kill(os.getpid(), signal.SIGKILL)  # noqa: E731
    write_bytes, write_text = store.write_bytes, store.write_text

    def of_bytes(path, data):
        here = path.name == "shard-00002.safetensors"
        if here and when == "before":
            kill()
        if here and when == "half":
            path.with_name(path.name + ".1.tmp").write_bytes(data[: len(data) // 2])
            kill()
        write_bytes(path, data)
        if here and when == "file":
            kill()

    def of_text(path, content):
        manifest = path.name == "manifest.json"
        write_text(path, content)
        if (path.name, when) == ("shard-00002.json", "line"):
            kill()
        if manifest and when == ("sealed" if "totals" in content else "begun"):
            kill()

    store.write_bytes, store.write_text = of_bytes, of_text
    if when == "end":
        store.finish = lambda *arguments: kill()


def share(out, rank: int, port: str) -> None:
    """One of two ranks, which tells the shards it made."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    computed, write_shard = [], store._write_shard
    store._write_shard = lambda *arguments: computed.append(arguments[3]) or write_shard(*arguments)
    run(out)
    out.with_name(f"rank-{rank}.json").write_text(json.dumps(computed))
    torch.distributed.destroy_process_group()


def killed(out, when: str) -> None:
    die(when)
    run(out)


def forked(work, *arguments) -> int:
    child = os.fork()
    if child == 0:
        try:
            work(*arguments)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return child


def main(folder: Path, port: str) -> None:
    """Writes how each run ended to <folder>/ended.json, and rank-<rank>.json the shards of each rank."""
    import accelerate  # noqa: F401
    import safetensors.torch  # noqa: F401
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: F401

    ended = {when: os.waitpid(forked(killed, folder / when, when), 0)[1] for when in KILLS}
    ranks = [forked(share, folder / "two", rank, port) for rank in (0, 1)]
    ended["ranks"] = [os.waitpid(rank, 0)[1] for rank in ranks]
    (folder / "ended.json").write_text(json.dumps(ended))


if __name__ == "__main__":
    torch.use_deterministic_algorithms(True, warn_only=True)
    main(Path(sys.argv[1]), sys.argv[2])
