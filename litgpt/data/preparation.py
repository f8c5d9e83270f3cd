"""Texts -> token shards: in several processes, resumable after a kill, reused as long as nothing has changed."""

import errno
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context, parent_process
from pathlib import Path
from queue import Empty
from typing import Any

import numpy as np
from filelock import FileLock
from tqdm import tqdm

from litgpt.data.documents import PIECE_BYTES, Piece, Source, hash_texts, write_json
from litgpt.data.shards import INDEX, VERSION, Shard, TokenShards, is_shards_folder, token_dtype, write_index

SHARD_BYTES = 16 << 20
"""Bytes of text that go into one shard: what a kill loses, and what one process works on."""

BATCH_BYTES = 4 * PIECE_BYTES
"""Bytes of text given to the tokenizer at once."""

BYTES_PER_TOKEN = 4
"""Roughly, in English text with a vocabulary of usual size."""

BUILDING = "building.json"
"""Written into a folder whose shards are not complete: says for what input they are."""


@dataclass(frozen=True)
class Job:
    """One shard to write."""

    folder: Path
    number: int
    sources: tuple[Source, ...]
    dtype: np.dtype
    opening: tuple[int, ...]
    """Ids put before each document."""
    closing: tuple[int, ...]
    """Ids put after each document."""

    @property
    def name(self) -> str:
        return f"shard-{self.number:05d}"

    def finished(self) -> Shard | None:
        """The shard, if an earlier run has completed it."""
        try:
            shard = Shard(**json.loads((self.folder / f"{self.name}.json").read_text()))
            size = (self.folder / shard.file).stat().st_size
        except (OSError, ValueError, TypeError):
            return None
        return shard if size == shard.tokens * self.dtype.itemsize else None


def document_marks(tokenizer: Any, bos: bool, eos: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Ids before and after each document.

    A tokenizer without the mark that is asked for gives its other one, so that documents never run into each other.
    """
    first, last = getattr(tokenizer, "bos_id", None), getattr(tokenizer, "eos_id", None)
    opens = bos or (eos and last is None)
    closes = (eos or (bos and first is None)) and not (opens and first == last)  # one token may be both marks
    return (first,) if opens and first is not None else (), (last,) if closes and last is not None else ()


def tokenizer_hash(tokenizer: Any) -> str:
    """Hash of what decides how `tokenizer` encodes: its model or, where that cannot be had, an encoded sample."""
    processor = getattr(tokenizer, "processor", None)
    if hasattr(processor, "to_str"):
        model = processor.to_str()
    elif hasattr(processor, "serialized_model_proto"):
        model = processor.serialized_model_proto().hex()
    else:
        texts = ["".join(map(chr, range(32, 500))), "The quick brown fox, 1234567890 times.\n\n\tIt jumps.  "]
        model = f"{type(tokenizer).__qualname__} {tokenizer.vocab_size} {encode_batch(tokenizer, texts)}"
    return hash_texts([model, *map(str, document_marks(tokenizer, bos=True, eos=True))])


def encode_batch(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Ids of each text without marks."""
    if hasattr(tokenizer, "encode_batch"):
        return tokenizer.encode_batch(texts, bos=False, eos=False)
    return [tokenizer.encode(text, bos=False, eos=False).tolist() for text in texts]


def batches(sources: Sequence[Source]) -> Iterator[list[Piece]]:
    """Pieces of all sources, about `BATCH_BYTES` at a time."""
    batch, size = [], 0
    for source in sources:
        for piece in source.pieces():
            batch.append(piece)
            size += len(piece.text)
            if size >= BATCH_BYTES:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


def write_shard(job: Job, tokenizer: Any, report: Callable[[int, int, int], None]) -> Shard:
    """Tokenise one shard under a temporary name, make it durable, and give it its name.

    Args:
        job: What to write.
        tokenizer: Encodes the texts.
        report: Called after each batch with the numbers of documents, tokens and bytes that it added.
    """
    path = job.folder / f"{job.name}.bin"
    temporary = job.folder / f".{job.name}.tmp-{os.getpid()}"
    shard = Shard(path.name, 0, 0, 0)
    try:
        with open(temporary, "wb") as file:
            for batch in batches(job.sources):
                ids: list[int] = []
                for piece, encoded in zip(batch, encode_batch(tokenizer, [piece.text for piece in batch])):
                    ids += [*(job.opening if piece.opens else ()), *encoded, *(job.closing if piece.closes else ())]
                tokens = np.asarray(ids, np.int64)
                if len(tokens) and tokens.max() > np.iinfo(job.dtype).max:
                    raise ValueError(f"token id {tokens.max()} does not fit vocab_size {tokenizer.vocab_size}")
                added = (sum(piece.opens for piece in batch), len(tokens), sum(len(p.text.encode()) for p in batch))
                file.write(tokens.astype(job.dtype).tobytes())
                shard = replace(
                    shard,
                    documents=shard.documents + added[0],
                    tokens=shard.tokens + added[1],
                    bytes=shard.bytes + added[2],
                )
                report(*added)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        write_json(path.with_suffix(".json"), asdict(shard))  # last: it says that the shard is complete
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise OSError(f"disk full while writing {path}: free some space and start again") from error
        raise
    finally:
        temporary.unlink(missing_ok=True)
    return shard


def plan_jobs(folder: Path, sources: Sequence[Source], tokenizer: Any, bos: bool, eos: bool, size: int) -> list[Job]:
    """Neighbouring sources put together into shards of about `size` bytes of text."""
    dtype, (opening, closing) = token_dtype(tokenizer), document_marks(tokenizer, bos, eos)
    groups, n_bytes = [[]], 0
    for source in sources:
        if n_bytes >= size:
            groups.append([])
            n_bytes = 0
        groups[-1].append(source)
        n_bytes += source.n_bytes
    return [Job(folder, number, tuple(group), dtype, opening, closing) for number, group in enumerate(groups)]


def prepare_shards(
    folder: Path,
    sources: Sequence[Source],
    tokenizer: Any,
    content: str,
    *,
    bos: bool = False,
    eos: bool = False,
    num_workers: int = 1,
    shard_bytes: int = SHARD_BYTES,
) -> TokenShards:
    """Token shards of `sources` in `folder`: those that are there if nothing has changed, else written now.

    Args:
        folder: Belongs to the shards alone. Finished shards of an interrupted run for the same input are kept.
        sources: The text.
        tokenizer: Encodes the text; it is pickled into each process.
        content: Hash of all the text, by which a change is noticed.
        bos: Put the begin-of-text token before each document (the other mark where the tokenizer has none).
        eos: Put the end-of-text token after each document (likewise).
        num_workers: Processes that tokenise; 0 or 1 is this process, which small data always uses.
        shard_bytes: Bytes of text per shard.
    """
    fingerprint = hash_texts([content, tokenizer_hash(tokenizer), f"{VERSION} {bos} {eos} {shard_bytes} {PIECE_BYTES}"])
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f".{folder.name}.lock")):  # another rank or run may want the same shards
        if shards := open_shards(folder, fingerprint):
            return shards
        start_building(folder, fingerprint)
        jobs = plan_jobs(folder, sources, tokenizer, bos, eos, shard_bytes)
        done = write_shards(jobs, tokenizer, num_workers)
        write_index(folder, done, jobs[0].dtype, fingerprint)
        for leftover in [folder / BUILDING, *(folder / f"{job.name}.json" for job in jobs)]:
            leftover.unlink()
        return TokenShards(folder)


def open_shards(folder: Path, fingerprint: str) -> TokenShards | None:
    """The shards in `folder` if they are complete, undamaged, and made from this input."""
    try:
        shards = TokenShards(folder)
    except (FileNotFoundError, ValueError):
        return None
    return shards if shards.fingerprint == fingerprint else None


def start_building(folder: Path, fingerprint: str) -> None:
    """Empty `folder` unless it holds finished shards of an interrupted run for the same input."""
    (folder / INDEX).unlink(missing_ok=True)
    try:
        same = json.loads((folder / BUILDING).read_text()) == fingerprint
    except (OSError, ValueError):
        same = False
    if not same:
        shutil.rmtree(folder, ignore_errors=True)
        write_json(folder / BUILDING, fingerprint)
    for temporary in folder.glob(".shard-*"):
        temporary.unlink()


def write_shards(jobs: list[Job], tokenizer: Any, num_workers: int) -> list[Shard]:
    """The shards of all `jobs`; those that are finished are not written again."""
    done = {job.number: shard for job in jobs if (shard := job.finished())}
    todo = [job for job in jobs if job.number not in done]
    total = sum(source.n_bytes for job in todo for source in job.sources)
    with tqdm(total=total, desc="Tokenising", unit="B", unit_scale=True, leave=False, delay=1) as bar:
        counts, started = [0, 0], time.perf_counter()

        def report(documents: int, tokens: int, n_bytes: int) -> None:
            counts[:] = counts[0] + documents, counts[1] + tokens
            rate = counts[1] / (time.perf_counter() - started)
            bar.set_postfix_str(f"{counts[0]:,} documents, {rate:,.0f} tokens/s", refresh=False)
            bar.update(min(n_bytes, bar.total - bar.n))

        n_processes = min(num_workers, len(todo), os.cpu_count() or 1)
        if n_processes > 1:
            done |= write_in_processes(todo, tokenizer, n_processes, report)
        else:
            done |= {job.number: write_shard(job, tokenizer, report) for job in todo}
    return [done[job.number] for job in jobs]


def write_in_processes(
    jobs: list[Job], tokenizer: Any, n_processes: int, report: Callable[[int, int, int], None]
) -> dict[int, Shard]:
    """Write `jobs` in fresh processes; what they count comes back through a queue while they work."""
    context = get_context("spawn")  # a forked child would inherit the threads of torch and the tokenizer in any state
    queue = context.Queue()
    executor = ProcessPoolExecutor(n_processes, context, start_worker, (tokenizer, queue, n_processes))
    try:
        pending = futures = {executor.submit(write_shard_here, job): job.number for job in jobs}
        while pending:
            finished, pending = wait(pending, timeout=0.2)
            for future in finished:
                future.result()
            try:
                while True:
                    report(*queue.get_nowait())
            except Empty:
                pass
        return {number: future.result() for future, number in futures.items()}
    except BrokenProcessPool as error:
        raise RuntimeError(
            "a process that tokenises has died: out of memory, or the calling script lacks "
            "`if __name__ == '__main__':`; use num_workers=1 to tokenise in this process"
        ) from error
    finally:
        executor.shutdown(cancel_futures=True)


def start_worker(tokenizer: Any, queue: Any, n_processes: int) -> None:
    """Keep what all jobs of this process need."""
    global _tokenizer, _report
    _tokenizer, _report = tokenizer, queue
    live_as_worker(n_processes)


def live_as_worker(n_processes: int) -> None:
    """Share the cores with the other processes, and end when the parent has been killed."""
    os.environ["RAYON_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // n_processes))
    threading.Thread(target=lambda: (parent_process().join(), os._exit(1)), daemon=True).start()


def write_shard_here(job: Job) -> Shard:
    """`write_shard` in a process that `start_worker` has set up."""
    return write_shard(job, _tokenizer, lambda *counts: _report.put(counts))


def prepare_files(
    folder: Path, sources: Sequence[Any], tokenizer: Any, shard_tokens: int, fast_dev_run: bool, wanted: str
) -> TokenShards:
    """Token shards of a corpus too large to hash: it counts as unchanged as long as the files' names and sizes are.

    Args:
        folder: Where the shards go; must be new, empty, or of an earlier call.
        sources: One for each file, with a `path`.
        tokenizer: Encodes the text; the end-of-text token goes after each document.
        shard_tokens: Tokens per shard, roughly.
        fast_dev_run: Take the first two files only.
        wanted: What the files are, for the error message.
    """
    if not sources:
        raise FileNotFoundError(f"no {wanted}; is --input_dir right?")
    if folder.is_dir() and any(folder.iterdir()) and not (is_shards_folder(folder) or (folder / BUILDING).exists()):
        raise ValueError(f"{folder} is not empty and has no shards of an earlier call; choose another --output_dir")
    sources = sources[:2] if fast_dev_run else sources
    content = hash_texts(f"{source.path.name} {source.path.stat().st_size}" for source in sources)
    shards = prepare_shards(
        folder,
        sources,
        tokenizer,
        content,
        eos=True,
        num_workers=os.cpu_count() or 1,
        shard_bytes=shard_tokens * BYTES_PER_TOKEN,
    )
    print(f"{folder}: {len(shards):,} tokens of {shards.n_documents:,} documents")
    return shards
